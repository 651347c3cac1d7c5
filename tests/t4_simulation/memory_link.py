"""A link in memory whose faults come from a seed: delays, and a cut after so many bytes, in the middle of a message if
that is where it falls (a message that is cut does not arrive)."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable

from pylitefs.cluster.ports import LinkClosed

BUFFER_BYTES = 64 * 1024


class Wire:
    """Both directions of one connection. `lifetime` is how many bytes it carries before it is cut."""

    def __init__(self, rng: random.Random, lifetime: int | None = None, max_delay_s: float = 0.0) -> None:
        self.rng = rng
        self.left = lifetime
        self.max_delay_s = max_delay_s
        self.ends = (MemoryLink(self, "primary:1"), MemoryLink(self, "replica:2"))
        self.ends[0].other, self.ends[1].other = self.ends[1], self.ends[0]
        self.broken: LinkClosed | None = None
        self.change: Callable[[bytes], bytes] = lambda data: data  # what the primary's messages become on the way

    def cut(self, reason: str, clean: bool = False) -> None:
        if self.broken is None:
            self.broken = LinkClosed(reason, clean)
            for end in self.ends:
                end.wake()


class MemoryLink:
    """One end: `other` is where its messages arrive."""

    other: MemoryLink

    def __init__(self, wire: Wire, peer: str) -> None:
        self.wire, self.peer = wire, peer
        self.inbox: deque[bytes] = deque()
        self.size = 0
        self.stalled = False  # it does not read
        self.changed = asyncio.Event()

    def wake(self) -> None:
        self.changed.set()

    async def send(self, data: bytes) -> None:
        wire = self.wire
        while self.other.size > BUFFER_BYTES and wire.broken is None:
            self.other.changed.clear()
            await self.other.changed.wait()
        if wire.max_delay_s:
            await asyncio.sleep(wire.rng.uniform(0, wire.max_delay_s))
        if wire.broken is not None:
            raise wire.broken
        if wire.left is not None:
            wire.left -= len(data)
            if wire.left < 0:
                wire.cut("the wire was cut")
                raise LinkClosed("the wire was cut")
        if self is wire.ends[1]:  # the end that the primary holds: its peer is the replica
            data = wire.change(data)
        self.other.inbox.append(data)
        self.other.size += len(data)
        self.other.wake()

    async def receive(self) -> bytes:
        while True:
            if self.inbox and not self.stalled:
                data = self.inbox.popleft()
                self.size -= len(data)
                self.wake()
                return data
            if self.wire.broken is not None:
                raise self.wire.broken
            self.changed.clear()
            await self.changed.wait()

    async def close(self) -> None:
        self.wire.cut("closed", clean=True)
