"""What a feed sends through, and what bounds the memory and the time that a slow replica costs.

Of all that waits for one replica only READ_AHEAD pieces (512 KB at most) are in memory, however many databases have
something for it: what is to be sent is read when it is its turn. A replica that has taken nothing for STALL_S is cut
off: the snapshot it may be in the middle of keeps the log from being shortened.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

from pylitefs.cluster.ports import Database, Store
from pylitefs.cluster.recovery_wait import RecoveryWait
from pylitefs.cluster.roles import Refused
from pylitefs.cluster.transfer import Blocking
from pylitefs.formats.stream import Message
from pylitefs.formats.stream_fields import ErrorCode

if TYPE_CHECKING:
    from pylitefs.cluster.feed import Feed
    from pylitefs.cluster.moves import Place

READ_AHEAD = 4
"""Pieces of log entries for one replica that are in memory at once, beside its snapshots."""

STALL_S = 60.0
"""How long one message may wait to be taken."""

NO_PAGES_SIZE = 4096
"""Any page size is right for a snapshot without pages; 0 is not, to earlier versions."""

T = TypeVar("T")


class Outlet(Protocol):
    """The session a feed belongs to."""

    store: Store
    recovery: RecoveryWait | None
    snapshot_slots: asyncio.Semaphore
    snapshot_timeout_s: float
    epoch: int
    feeds: dict[str, Feed]

    @property
    def blocking(self) -> Blocking: ...
    async def send(self, message: Message) -> None: ...
    async def database(self, name: str) -> Database | None:
        """Also one that was dropped so long ago that only a tombstone is left: it is made again from that."""

    def start(self, coroutine: Coroutine[Any, Any, None]) -> bool: ...
    def examined(self, name: str) -> None:
        """The first decision about this database is made, and it is not to ask for transactions."""

    def caught_up(self, name: str) -> None: ...
    def holds(self, name: str, txid: int) -> None:
        """The replica holds our transactions up to this one durably."""

    def copies(self, name: str) -> bool:
        """Whether the replica copies the database of this name."""

    def lacks(self, place: Place, feed: Feed) -> bool:
        """Whether the replica does not have durably what is, or was, in this place. If so, `feed` is poked when it
        holds more of the name."""

    def strayed(self, name: str) -> None:
        """Its copy was not what it seemed to be, and is mended."""

    @property
    def replica_id(self) -> int: ...


async def send(outlet: Outlet, message: Message) -> None:
    """Refused if the replica does not take it in time."""
    try:
        async with asyncio.timeout(STALL_S):
            await outlet.send(message)
    except TimeoutError:
        raise Refused(ErrorCode.TOO_SLOW, f"too slow: it has not taken what was sent for {STALL_S:g} s") from None


_slots: WeakKeyDictionary[Outlet, asyncio.Semaphore] = WeakKeyDictionary()


class Turn:
    """A feed's turn to read, as a context manager, one at a time. What was sent makes room for others: a large entry,
    which is read piece by piece, waits for its turn with each."""

    def __init__(self, outlet: Outlet) -> None:
        self._outlet = outlet
        self._room = _slots.setdefault(outlet, asyncio.Semaphore(READ_AHEAD))
        self._has_room = False

    async def __aenter__(self) -> Turn:
        await self._take()
        return self

    async def __aexit__(self, *error: object) -> None:
        self._give()

    async def ready(self) -> None:
        """Wait until more may be read."""
        await self._take()

    async def blocking(self, call: Callable[..., T], /, *args: Any) -> T:
        """Read something, off the loop thread."""
        await self._take()
        return await self._outlet.blocking(call, *args)

    async def send(self, message: Message) -> None:
        """Send what was read."""
        await send(self._outlet, message)
        self._give()

    async def _take(self) -> None:
        if not self._has_room:
            await self._room.acquire()
            self._has_room = True

    def _give(self) -> None:
        if self._has_room:
            self._has_room = False
            self._room.release()
