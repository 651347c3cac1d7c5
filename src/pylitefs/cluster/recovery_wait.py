"""The pause before a primary that was not stopped cleanly takes writes: its replicas may hold what its disk lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pylitefs.cluster.ports import Store
from pylitefs.errors import Unavailable
from pylitefs.formats.ltx.format import Position


@dataclass(frozen=True)
class RecoveryOutcome:
    """What came of the wait: `given_back` has the new position of each database that got transactions back."""

    replicas: int
    given_back: dict[str, Position] = field(default_factory=dict)


class RecoveryWait:
    """Ends `wait_s` after `wait` is called, or `grace_s` after every replica that has connected was examined (and had
    given back what it could); `expected` of them, as many as there were before, must have connected for that.

    `databases` are those whose tail may be lost. A give-back that runs at the deadline may end, up to `longest_s`. When
    `wait` has returned nothing is being applied nor will be, so the mount can be opened for writes.
    """

    def __init__(
        self,
        databases: Iterable[str],
        wait_s: float = 3.0,
        grace_s: float = 0.3,
        longest_s: float = 60.0,
        expected: int = 1,
    ) -> None:
        self.databases = frozenset(databases)
        self.active = True
        self._expected = expected
        self._wait_s, self._grace_s, self._longest_s = wait_s, grace_s, longest_s
        self._examined: dict[object, bool] = {}
        self._seen = 0
        self._receiving = 0
        self._applying = 0
        self._given: dict[str, Position] = {}
        self._changed = asyncio.Event()

    def concerns(self, name: str, known: bool) -> bool:
        """Whether a replica's transactions for this database are wanted; `known`: this node has the database."""
        return self.active and (not known or name in self.databases)

    def connected(self, session: object) -> None:
        self._examined[session] = False
        self._seen += 1
        self._changed.set()

    def examined(self, session: object) -> None:
        """Nothing more is to be had from this replica."""
        if session in self._examined:
            self._examined[session] = True
            self._changed.set()

    def disconnected(self, session: object) -> None:
        self._examined.pop(session, None)
        self._changed.set()

    @contextlib.contextmanager
    def receiving(self) -> Iterator[None]:
        """While a replica sends transactions."""
        self._receiving += 1
        try:
            yield
        finally:
            self._receiving -= 1
            self._changed.set()

    async def give_back(self, store: Store, name: str, data: bytes | str) -> Position:
        """`Store.give_back`, in time or not at all (Unavailable). FormatError, PositionMismatch, OSError."""
        if not self.active:
            raise Unavailable("the primary takes writes already")
        loop = asyncio.get_running_loop()
        future = store.worker.submit(store.give_back, name, data)
        self._applying += 1
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._applied))  # also when we are cancelled
        position = await asyncio.wrap_future(future)
        self._given[name] = position
        return position

    def _applied(self) -> None:
        self._applying -= 1
        self._changed.set()

    async def wait(self) -> RecoveryOutcome:
        """Wait as the class says. Cancellation ends the recovery too."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        deadline = begin + self._wait_s
        settled_at: float | None = None
        try:
            while True:
                now = loop.time()
                running = self._receiving + self._applying
                settled = len(self._examined) >= max(1, self._expected) and all(self._examined.values()) and not running
                settled_at = (now if settled_at is None else settled_at) if settled else None
                end = deadline if settled_at is None else min(deadline, settled_at + self._grace_s)
                if running:
                    end = max(end, begin + self._longest_s)
                if now >= end:
                    break
                self._changed.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(end - now):
                        await self._changed.wait()
        finally:
            self.active = False
        while self._applying:
            self._changed.clear()
            await self._changed.wait()
        return RecoveryOutcome(self._seen, dict(self._given))
