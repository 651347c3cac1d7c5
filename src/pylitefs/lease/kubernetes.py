"""The Kubernetes API as lease engine: objects of coordination.k8s.io/v1 Lease, compared and swapped by resourceVersion.

    NAME           leader and state
    NAME-ID        a member

All carry the label litefs-lease=NAME. The record (`lease.record`) is in an annotation; spec.holderIdentity, renewTime
and so on say the same to people and to kubectl, but nothing here reads them: times of other machines decide nothing.

The service account needs get, list, watch, create, update, patch and delete on leases in its namespace.
"""

from __future__ import annotations

import asyncio
import datetime
import math
import os
import re
import ssl
from collections.abc import Mapping
from typing import Any

from pylitefs.cluster.lease_port import ABSENT, Clock, now_s
from pylitefs.errors import ConfigError, Unavailable
from pylitefs.lease import documents
from pylitefs.lease.http_json import Answer, JsonClient, Rejected, tls_context
from pylitefs.lease.record import LEADER, MEMBERS, Cell, Changed, RecordEngine

ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
LABEL = "litefs-lease"
ANNOTATION = "litefs/record"
MAX_NAME = 63 - len("-0123456789abcdef")  # a label's value has 63 characters at most

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")

Json = dict[str, Any]


def open_kubernetes(
    name: str,
    *,
    namespace: str = "",
    url: str = "",
    token: str = "",
    token_file: str = "",
    ca: str = "",
    timeout_s: float = 2.0,
    clock: Clock = now_s,
    environ: Mapping[str, str] = os.environ,
    account: str = ACCOUNT,
) -> RecordEngine:
    """An engine whose objects are called `name`. What is not given is what a pod finds: the API server in its
    environment, and its service account's token, namespace and certificate. ConfigError where something is missing."""
    if not _NAME.fullmatch(name) or len(name) > MAX_NAME:
        raise ConfigError(
            f'"{name}" cannot be the name of a lease in Kubernetes: use lower-case letters, digits and "-", '
            f"at most {MAX_NAME} of them"
        )
    tls: ssl.SSLContext | None = tls_context(ca) if ca else None
    if not url:
        host, port = environ.get("KUBERNETES_SERVICE_HOST", ""), environ.get("KUBERNETES_SERVICE_PORT", "443")
        if not host:
            raise ConfigError("not in a pod of Kubernetes (no KUBERNETES_SERVICE_HOST): set lease.kubernetes.url")
        url = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
        tls = tls or tls_context(os.path.join(account, "ca.crt"))
        token_file = token_file or os.path.join(account, "token")
    if not namespace:
        namespace = _read(os.path.join(account, "namespace")) if os.path.isdir(account) else "default"
    http = JsonClient("Kubernetes", [url], "lease.kubernetes", timeout_s, tls)
    return RecordEngine(LeaseObjects(http, namespace, name, token, token_file), timeout_s, clock)


class LeaseObjects:
    """`lease.record.Cells` in Kubernetes. A cell's version is its object's resourceVersion."""

    def __init__(self, http: JsonClient, namespace: str, name: str, token: str, token_file: str) -> None:
        self._http = http
        self._path = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._name = name
        self._token = token
        self._token_file = token_file
        self._listed = ""  # the resourceVersion up to which changes are known
        self.where = f'the lease "{name}" of Kubernetes at {http.urls[0]}'

    async def read(self, name: str) -> Cell | None:
        answer = await self._ask("GET", self._object_path(name), again=True)
        if answer.status == 404:
            return None
        return _cell(self._document(answer, "Lease", 200))

    async def read_all(self) -> Mapping[str, Cell]:
        """Without a resourceVersion a list is as new as anything that was written before."""
        answer = await self._ask("GET", self._path, query={"labelSelector": f"{LABEL}={self._name}"}, again=True)
        document = self._document(answer, "LeaseList", 200)
        cells = {}
        for found in document.get("items") or []:
            name = self._cell_name(_metadata(found).get("name", ""))
            if name is not None:
                cells[name] = _cell(found)
        self._listed = str(_metadata(document).get("resourceVersion", ""))
        return cells

    async def write(self, name: str, data: bytes, version: str | None) -> None:
        document = self._object(name, data)
        if version is None:
            headers = {"Content-Type": "application/merge-patch+json"}
            answer = await self._ask("PATCH", self._object_path(name), document=document, headers=headers, again=True)
            if answer.status != 404:
                self._document(answer, "Lease", 200)
                return
        if not version:
            answer = await self._ask("POST", self._path, document=document)
        else:
            document["metadata"]["resourceVersion"] = version
            answer = await self._ask("PUT", self._object_path(name), document=document)
        if answer.status == 409 or (version and answer.status == 404):
            raise Changed
        self._document(answer, "Lease", 200, 201)

    async def remove(self, name: str) -> None:
        answer = await self._ask("DELETE", self._object_path(name), again=True)
        if answer.status not in (200, 202, 404):
            raise self._http.unexpected(answer)

    async def pause(self, timeout_s: float, poll_s: float) -> bool:
        """A watch, from where the last list ended. An event that says that this is too long ago ends it too."""
        if not self._listed:
            await asyncio.sleep(min(timeout_s, poll_s))
            return True
        query = {
            "watch": "true",
            "labelSelector": f"{LABEL}={self._name}",
            "resourceVersion": self._listed,
            "timeoutSeconds": str(math.ceil(timeout_s) + 1),
        }
        self._authorize()
        try:
            return await self._http.watch("GET", self._path, self._noted, timeout_s, query=query)
        except Rejected as error:
            if error.answer.status != 410:
                raise
            self._listed = ""  # too long ago
            return True

    async def close(self) -> None:
        await self._http.close()

    def _noted(self, event: Any) -> bool:
        found = documents.part(event, "object") if isinstance(event, dict) else {}
        failed = not isinstance(event, dict) or event.get("type") == "ERROR"
        self._listed = "" if failed else str(_metadata(found).get("resourceVersion", ""))
        return True

    # --- Kubernetes' words

    def _object(self, name: str, data: bytes) -> Json:
        fields = documents.decode(data)
        holder = documents.part(fields, "leader" if name == LEADER else "member")
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {
                "name": self._object_name(name),
                "labels": {LABEL: self._name},
                "annotations": {ANNOTATION: data.decode()},
            },
            "spec": {
                "holderIdentity": str(holder.get("hostname") or holder.get("node-id") or ""),
                "leaseDurationSeconds": max(1, math.ceil(documents.ttl_from(fields) or 1.0)),
                "leaseTransitions": min(int(holder.get("epoch") or 0), 2**31 - 1),
                "renewTime": now,
            },
        }

    def _object_name(self, name: str) -> str:
        return self._name if name == LEADER else f"{self._name}-{name.removeprefix(MEMBERS)}"

    def _cell_name(self, name: str) -> str | None:
        if name == self._name:
            return LEADER
        return MEMBERS + name.removeprefix(f"{self._name}-") if name.startswith(f"{self._name}-") else None

    def _object_path(self, name: str) -> str:
        return f"{self._path}/{self._object_name(name)}"

    async def _ask(self, method: str, path: str, **options: Any) -> Answer:
        self._authorize()
        return await self._http.ask(method, path, **options)

    def _authorize(self) -> None:
        """The token's file is read each time: Kubernetes replaces it every hour."""
        if token := _read(self._token_file) if self._token_file else self._token:
            self._http.headers["Authorization"] = f"Bearer {token}"

    def _document(self, answer: Answer, kind: str, *expected: int) -> Json:
        if answer.status not in expected:
            raise self._http.unexpected(answer)
        with self._http.reading(answer):
            document: Json = answer.document
            if document["kind"] != kind:
                raise ValueError
        return document


def _metadata(document: Any) -> Json:
    return documents.part(document, "metadata") if isinstance(document, dict) else {}


def _cell(document: Json) -> Cell:
    """An object without our annotation is an empty record, which is none."""
    metadata = _metadata(document)
    data = documents.part(metadata, "annotations").get(ANNOTATION, "")
    return Cell(str(data).encode(), str(metadata.get("resourceVersion", ABSENT)))


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except OSError as error:
        raise Unavailable(
            f"cannot read {path}: {error.strerror}: has the pod a service account? (automountServiceAccountToken)"
        ) from None
