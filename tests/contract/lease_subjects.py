"""A cluster for a test, on any of the lease engines."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from lease_services import (
    BUCKET,
    BUCKET_HEADERS,
    BUCKET_OPTIONS,
    Service,
    Subject,
    base64_text,
    consul,
    etcd,
    kubernetes,
    request,
    s3,
)

from pylitefs.lease.consul import ConsulEngine
from pylitefs.lease.directory import open_directory
from pylitefs.lease.etcd import EtcdEngine
from pylitefs.lease.kubernetes import open_kubernetes
from pylitefs.lease.memory import MemoryEngine, MemoryService
from pylitefs.lease.object_store import open_bucket

SERVICES = {"etcd": etcd, "consul": consul, "object-store": s3, "kubernetes": kubernetes}
ENGINES = (*SERVICES, "directory", "memory")


class Services:
    """Those that have been asked for, one of each kind for the whole session."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._running: dict[str, Service] = {}

    def get(self, kind: str) -> Service:
        if kind not in self._running:
            self._running[kind] = self._stack.enter_context(SERVICES[kind](self._folder / kind))
        return self._running[kind]


def new_subject(kind: str, services: Services, folder: Path) -> Subject:
    """A cluster of its own on an engine of this kind."""
    cluster = f"test-{secrets.token_hex(6)}"
    if kind == "directory":
        (folder / cluster).mkdir()
        return directory_subject(folder / cluster)
    return memory_subject() if kind == "memory" else subject_of(kind, services.get(kind), cluster)


def directory_subject(folder: Path) -> Subject:
    async def delete() -> None:
        (folder / "leader").unlink()

    return Subject("directory", lambda: open_directory(folder.as_uri()), delete)


def memory_subject() -> Subject:
    service = MemoryService()

    async def delete() -> None:
        service.delete_lease()

    return Subject("memory", lambda: MemoryEngine(service), delete, virtual=True)


def subject_of(kind: str, service: Service, cluster: str, timeout_s: float = 5.0) -> Subject:
    """`cluster` on a running service."""
    operator: Any
    ttl_s = 1.0
    if kind == "etcd":
        make: Any = partial(EtcdEngine, [service.url], f"litefs/{cluster}", timeout_s=timeout_s)
        key = base64_text(f"/litefs/{cluster}/leader")
        operator = partial(request, "POST", f"{service.url}/v3/kv/deleterange", {"key": key})
        ttl_s = 2.0
    elif kind == "consul":
        make = partial(ConsulEngine, service.url, f"{cluster}/primary", timeout_s=timeout_s)
        operator = partial(request, "DELETE", f"{service.url}/v1/kv/{cluster}/primary")
    elif kind == "object-store":
        options = {**BUCKET_OPTIONS, "endpoint": service.url}
        make = partial(open_bucket, f"s3://{BUCKET}/{cluster}", options, timeout_s)
        operator = partial(request, "DELETE", f"{service.url}/{BUCKET}/{cluster}/leader", headers=BUCKET_HEADERS)
    else:
        make = partial(open_kubernetes, cluster, namespace="apps", url=service.url, token="secret", timeout_s=timeout_s)
        path = f"/apis/coordination.k8s.io/v1/namespaces/apps/leases/{cluster}"
        operator = partial(request, "DELETE", service.url + path, headers={"Authorization": "Bearer secret"})

    async def delete() -> None:
        await asyncio.to_thread(operator)

    return Subject(kind, make, delete, ttl_s)
