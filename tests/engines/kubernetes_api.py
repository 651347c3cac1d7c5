"""A Kubernetes API server for tests: leases of coordination.k8s.io/v1 and nothing else.

`kubernetes_api.py ADDRESS PORT TOKENS [CERT KEY]`. What it enforces is what the real one does: a bearer token (of those
in the file TOKENS, read for each request), names and kinds, resourceVersion on every update, label selectors, one
resourceVersion for the whole store, and watches that begin after a version and fail with 410 when it is too old.
"""

from __future__ import annotations

import asyncio
import copy
import json
import re
import ssl
import sys
import uuid
from pathlib import Path
from typing import Any

from aiohttp import web

BASE = "/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
MIME_MERGE = "application/merge-patch+json"
KEPT_EVENTS = 200
MICRO_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
SPEC = {
    "holderIdentity": str,
    "leaseDurationSeconds": int,
    "leaseTransitions": int,
    "renewTime": str,
    "acquireTime": str,
}

Json = dict[str, Any]


class Failure(Exception):
    """An answer with a Status object."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason = code, reason

    def answer(self) -> web.Response:
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": self.code}
        return web.json_response({**status, "reason": self.reason, "message": str(self)}, status=self.code)


class Api:
    """The store and its handlers."""

    def __init__(self, tokens: Path) -> None:
        self.tokens = tokens
        self.version = 100
        self.leases: dict[tuple[str, str], Json] = {}
        self.events: list[tuple[int, str, str, Json]] = []  # version, namespace, type, object
        self.changed = asyncio.Condition()

    @web.middleware
    async def guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            token = request.headers.get("Authorization", "").removeprefix("Bearer ")
            if not token or token not in self.tokens.read_text().split():
                raise Failure(401, "Unauthorized", "Unauthorized")
            return await handler(request)
        except Failure as failure:
            return failure.answer()

    def check(self, found: Any, namespace: str) -> Json:
        if (
            not isinstance(found, dict)
            or found.get("apiVersion") != "coordination.k8s.io/v1"
            or found.get("kind") != "Lease"
        ):
            raise Failure(400, "BadRequest", "the object is no Lease of coordination.k8s.io/v1")
        metadata, spec = found.get("metadata", {}), found.get("spec", {})
        problems = []
        if not NAME.fullmatch(metadata.get("name", "")):
            problems.append("metadata.name")
        if metadata.get("namespace", namespace) != namespace:
            problems.append("metadata.namespace")
        problems += [
            f"metadata.labels[{key}]"
            for key, value in metadata.get("labels", {}).items()
            if not LABEL_VALUE.fullmatch(value)
        ]
        if sum(len(value) for value in metadata.get("annotations", {}).values()) > 256 << 10:
            problems.append("metadata.annotations: too long")
        problems += [f"spec.{key}" for key, value in spec.items() if not isinstance(value, SPEC.get(key, type(None)))]
        if spec.get("leaseDurationSeconds", 1) <= 0 or not 0 <= spec.get("leaseTransitions", 0) < 2**31:
            problems.append("spec.leaseDurationSeconds or leaseTransitions")
        if not MICRO_TIME.fullmatch(spec.get("renewTime", "2000-01-01T00:00:00.000000Z")):
            problems.append("spec.renewTime")
        if problems:
            raise Failure(422, "Invalid", "Lease is invalid: " + ", ".join(problems))
        return found

    async def store(self, kind: str, key: tuple[str, str], found: Json) -> Json:
        self.version += 1
        found = copy.deepcopy(found)
        found["metadata"] |= {"namespace": key[0], "resourceVersion": str(self.version)}
        found["metadata"].setdefault("uid", str(uuid.uuid4()))
        if kind == "DELETED":
            del self.leases[key]
        else:
            self.leases[key] = found
        self.events.append((self.version, key[0], kind, found))
        del self.events[:-KEPT_EVENTS]
        async with self.changed:
            self.changed.notify_all()
        return found

    def find(self, request: web.Request) -> tuple[tuple[str, str], Json]:
        key = request.match_info["namespace"], request.match_info["name"]
        if key not in self.leases:
            raise Failure(404, "NotFound", f'leases.coordination.k8s.io "{key[1]}" not found')
        return key, self.leases[key]

    async def get(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(self.find(request)[1])

    async def create(self, request: web.Request) -> web.StreamResponse:
        namespace = request.match_info["namespace"]
        found = self.check(await request.json(), namespace)
        key = namespace, found["metadata"]["name"]
        if found["metadata"].get("resourceVersion"):
            raise Failure(400, "BadRequest", "resourceVersion should not be set on objects to be created")
        if key in self.leases:
            raise Failure(409, "AlreadyExists", f'leases.coordination.k8s.io "{key[1]}" already exists')
        return web.json_response(await self.store("ADDED", key, found), status=201)

    async def replace(self, request: web.Request) -> web.StreamResponse:
        new = await request.json()
        key, old = self.find(request)
        new = self.check(new, key[0])
        version = new["metadata"].get("resourceVersion")
        if not version:
            raise Failure(
                422, "Invalid", "metadata.resourceVersion: Invalid value: 0x0: must be specified for an update"
            )
        if version != old["metadata"]["resourceVersion"]:
            raise Failure(
                409, "Conflict", f'Operation cannot be fulfilled on leases "{key[1]}": the object has been modified'
            )
        return web.json_response(await self.store("MODIFIED", key, new))

    async def patch(self, request: web.Request) -> web.StreamResponse:
        if request.content_type != MIME_MERGE:
            raise Failure(415, "UnsupportedMediaType", "only merge patches")
        patch = await request.json()
        key, old = self.find(request)
        if (
            patch.get("metadata", {}).get("resourceVersion", old["metadata"]["resourceVersion"])
            != old["metadata"]["resourceVersion"]
        ):
            raise Failure(409, "Conflict", "the object has been modified")
        return web.json_response(await self.store("MODIFIED", key, self.check(merged(old, patch), key[0])))

    async def delete(self, request: web.Request) -> web.StreamResponse:
        key, old = self.find(request)
        await self.store("DELETED", key, old)
        return web.json_response({"kind": "Status", "apiVersion": "v1", "status": "Success"})

    async def list_or_watch(self, request: web.Request) -> web.StreamResponse:
        namespace = request.match_info["namespace"]
        wanted = dict(part.split("=", 1) for part in request.query.get("labelSelector", "").split(",") if part)
        if request.query.get("watch") in ("true", "1"):
            return await self.watch(request, namespace, wanted)
        items = [
            found for (space, _), found in sorted(self.leases.items()) if space == namespace and matches(found, wanted)
        ]
        metadata = {"resourceVersion": str(self.version)}
        return web.json_response(
            {"kind": "LeaseList", "apiVersion": "coordination.k8s.io/v1", "metadata": metadata, "items": items}
        )

    async def watch(self, request: web.Request, namespace: str, wanted: Json) -> web.StreamResponse:
        since = int(request.query["resourceVersion"])
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        if len(self.events) == KEPT_EVENTS and since < self.events[0][0] - 1:
            gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": f"too old resource version: {since}"}
            await send(response, {"type": "ERROR", "object": gone})
            return response
        try:
            async with asyncio.timeout(int(request.query.get("timeoutSeconds", "1800"))):
                while True:
                    for version, space, kind, found in self.events:
                        if version > since and space == namespace and matches(found, wanted):
                            await send(response, {"type": kind, "object": found})
                    since = self.version
                    async with self.changed:
                        await self.changed.wait_for(lambda: self.version > since)  # noqa: B023
        except TimeoutError:
            return response


async def send(response: web.StreamResponse, event: Json) -> None:
    await response.write(json.dumps(event).encode() + b"\n")


def matches(found: Json, wanted: Json) -> bool:
    labels = found["metadata"].get("labels", {})
    return all(labels.get(key) == value for key, value in wanted.items())


def merged(old: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    result = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


def main() -> None:
    address, port, tokens, *files = sys.argv[1:]
    tls = None
    if files:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(*files)

    async def application() -> web.Application:
        api = Api(Path(tokens))
        app = web.Application(middlewares=[api.guard])
        app.router.add_get(BASE, api.list_or_watch)
        app.router.add_post(BASE, api.create)
        app.router.add_get(BASE + "/{name}", api.get)
        app.router.add_put(BASE + "/{name}", api.replace)
        app.router.add_patch(BASE + "/{name}", api.patch)
        app.router.add_delete(BASE + "/{name}", api.delete)
        return app

    web.run_app(application(), host=address, port=int(port), print=None, ssl_context=tls, shutdown_timeout=0.1)


if __name__ == "__main__":
    main()
