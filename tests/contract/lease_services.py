"""What the contract suite knows of a lease engine. The real ones are processes: `tests/engines/services.py`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from engines.services import (
    BUCKET,
    BUCKET_HEADERS,
    BUCKET_OPTIONS,
    Service,
    base64_text,
    consul,
    etcd,
    kubernetes,
    request,
    s3,
)
from pylitefs.cluster.lease_port import Engine

__all__ = [
    "BUCKET",
    "BUCKET_HEADERS",
    "BUCKET_OPTIONS",
    "Service",
    "Subject",
    "base64_text",
    "consul",
    "etcd",
    "kubernetes",
    "request",
    "s3",
]


@dataclass
class Subject:
    """One cluster on one engine. `make` makes another node's engine for the same cluster, `delete` is what an operator
    may do to the lease, `ttl_s` the shortest to test."""

    name: str
    make: Callable[[], Engine]
    delete: Callable[[], Awaitable[None]]
    ttl_s: float = 1.0
    virtual: bool = False
    engines: list[Engine] = field(default_factory=list)

    def engine(self) -> Engine:
        """Another node's."""
        self.engines.append(self.make())
        return self.engines[-1]

    def engine_list(self, count: int) -> list[Engine]:
        return [self.engine() for _ in range(count)]

    async def close(self) -> None:
        await asyncio.gather(*(engine.close() for engine in self.engines))
