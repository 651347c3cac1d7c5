"""HALT locks on the primary: who holds one writes a database from another node, and nobody here does meanwhile.

    acquire        wait for the turn, in order ▸ lock the writers out, capture everything ▸ the position to start from
    transaction    under this lock, in this epoch, right after the head? ▸ log and WAL ▸ durable ▸ enough replicas
    switchover     none of these begins while it is found out that the successor has everything (`paused`)
    renew          every transaction does, too
    release, expiry, the end of this node's office    let the writers in again

While it is held the database is *demoted* here: the daemon is its only writer, as on a replica, and applications get
SQLITE_BUSY. The holder's time is measured by this node's clock alone, and nothing depends on it but how long others
wait: a transaction counts only if it comes while the lock is held, whatever the holder believes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from pylitefs.cluster.control import HaltLock
from pylitefs.cluster.ends import ends_of, has_transaction
from pylitefs.cluster.ports import Store
from pylitefs.cluster.tasks import finished, in_thread, watched
from pylitefs.errors import (
    DatabaseBusy,
    DatabaseNotFound,
    FormatError,
    Ineligible,
    LitefsError,
    NotPrimary,
    Unavailable,
)
from pylitefs.events import Event
from pylitefs.formats.ltx.format import Position
from pylitefs.ports import CommitGate

log = logging.getLogger("litefs.halt")
T = TypeVar("T")

TTL_S = 30.0
"""For how long a lock is held without word from its holder. LiteFS's number."""

WAIT_S = 10.0
"""How long somebody waits for the turn, and for an open transaction to end."""

READERS_S, LOOK_S = 1.0, 0.02
"""For how long, and how often, a transaction of the holder is tried before he is told to send it again."""


class Office(Protocol):
    """Until when this node may act as the primary."""

    def holds(self) -> bool: ...


class HaltStore(Store, Protocol):
    """The store of a primary."""

    @property
    def epoch(self) -> int: ...
    @property
    def fence(self) -> Office: ...
    @property
    def gate(self) -> CommitGate | None: ...


@dataclass(eq=False)
class _Held:
    id: int
    node_id: int
    epoch: int
    position: Position
    until_s: float = 0.0  # monotonic
    expires_ms: int = 0
    ended: bool = False
    busy: asyncio.Lock = field(default_factory=asyncio.Lock)  # one transaction at a time, and the end after it
    timer: asyncio.TimerHandle | None = None


@dataclass(eq=False)
class _Taking:
    """A request for the lock. `callers` wait for it: the first one, and the same again after an answer was lost."""

    task: asyncio.Task[_Held]
    node_id: int
    callers: int = 0
    delivered: bool = False


class _Seat:
    """One database. Who has `turn` holds its lock, or is about to take it."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.held: _Held | None = None
        self.taking: dict[int, _Taking] = {}


class HaltLocks:
    """Implements `control.Halts`. One for the life of a node: `end_all` when it ceases to be the primary, or stops."""

    def __init__(self, store: HaltStore, *, ttl_s: float = TTL_S, wait_s: float = WAIT_S) -> None:
        self._store = store
        self._ttl_s, self._wait_s = ttl_s, wait_s
        self._seats: dict[str, _Seat] = {}
        self._background: set[asyncio.Task[Any]] = set()
        self._may_work, self._idle = asyncio.Event(), asyncio.Event()
        self._may_work.set()
        self._idle.set()
        self._at_work = 0

    # --- what is asked ----------------------------------------------------------------------------------------------

    async def acquire(self, name: str, lock_id: int, node_id: int) -> HaltLock:
        self._check_office()
        database = self._store.get(name)
        if database is None or not database.commit:
            raise DatabaseNotFound(name)  # an application here makes it; LiteFS would make an empty one
        seat = self._seats.setdefault(name, _Seat())
        if seat.held is not None and seat.held.id == lock_id and not seat.held.ended:
            if seat.held.node_id != node_id:
                raise Ineligible("another node holds a HALT lock with this id: choose another")
            return self._prolong(seat.held)
        taking = seat.taking.get(lock_id)
        if taking is None:
            task = asyncio.ensure_future(self._take(seat, name, lock_id, node_id))
            taking = seat.taking[lock_id] = _Taking(task, node_id)
            task.add_done_callback(lambda task: self._taken(seat, name, lock_id, task))
        elif taking.node_id != node_id:
            raise Ineligible("another node asks for a HALT lock with this id: choose another")
        taking.callers += 1
        try:
            held = await asyncio.shield(taking.task)
            taking.delivered = True
            return self._prolong(held)
        except asyncio.CancelledError:
            if taking.task.cancelled():
                raise Unavailable(f'the HALT lock of "{name}" was given back, or this node is stopping') from None
            raise
        finally:
            taking.callers -= 1
            if not taking.callers and not taking.delivered:
                self._abandon(seat, name, taking)

    async def renew(self, name: str, lock_id: int) -> HaltLock:
        self._check_office()
        return self._prolong(self._held(name, lock_id))

    async def release(self, name: str, lock_id: int) -> None:
        seat = self._seats.get(name)
        if seat is None:
            return
        taking = seat.taking.get(lock_id)
        if taking is not None:
            taking.delivered = False
            taking.task.cancel()
            await asyncio.wait([taking.task])
        if seat.held is not None and seat.held.id == lock_id:
            await self._run(self._end(seat, name, seat.held, "released"))

    async def transaction(self, name: str, lock_id: int, epoch: int, data: bytes | str) -> Position:
        self._check_office()
        held = self._held(name, lock_id)
        if epoch != held.epoch:
            raise Ineligible(f"the HALT lock was taken in epoch {held.epoch}, not {epoch}: take it again")
        async with self._working():
            self._held(name, lock_id)
            async with held.busy:
                if held.ended:
                    raise _not_held(name)
                position: Position = await self._run(self._applied(name, held, data))
                self._check_office()  # else another node may be the primary by now, without it
                if held is self._seats[name].held and not held.ended:
                    self._prolong(held)
        await self._replicated(name, position.txid)
        return position

    async def end_all(self, reason: str) -> None:
        """Every lock ends: this node is not the primary any more, or is about to stop."""
        self._may_work.set()  # what waited finds that out
        ending = []
        for name, seat in list(self._seats.items()):
            for taking in seat.taking.values():
                taking.delivered = False
                taking.task.cancel()
                ending.append(taking.task)
            if seat.held is not None:
                ending.append(self._start(self._end(seat, name, seat.held, reason)))
        if ending:
            await asyncio.gather(*ending, return_exceptions=True)
        await asyncio.gather(*self._background, return_exceptions=True)

    @contextlib.asynccontextmanager
    async def paused(self, timeout_s: float) -> AsyncIterator[None]:
        """Nothing is taken from a holder meanwhile, no lock is taken, and none ends unless all do. Unavailable if what
        is under way takes longer."""
        self._may_work.clear()
        try:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._idle.wait()
            except TimeoutError:
                raise Unavailable("a HALT lock is in use, so writes could not be paused: nothing has changed") from None
            yield
        finally:
            self._may_work.set()

    def holders(self) -> dict[str, int]:
        """The node that has each lock, by database."""
        return {name: seat.held.node_id for name, seat in self._seats.items() if seat.held is not None}

    # --- taking -----------------------------------------------------------------------------------------------------

    async def _take(self, seat: _Seat, name: str, lock_id: int, node_id: int) -> _Held:
        store = self._store
        until_s = time.monotonic() + self._wait_s
        try:
            async with asyncio.timeout(self._wait_s):
                await seat.turn.acquire()
        except TimeoutError:
            raise DatabaseBusy(f'another node has the HALT lock of "{name}": try again') from None
        try:
            async with self._working():
                held = await self._lock_writers_out(name, lock_id, node_id, until_s)
        except BaseException:
            seat.turn.release()
            raise
        seat.held = held
        self._prolong(held)
        held.timer = asyncio.get_running_loop().call_later(self._ttl_s, self._look_at, seat, name, held)
        store.events.emit(Event("halt", name, {"node_id": f"{node_id:016X}", "position": str(held.position)}))
        return held

    async def _lock_writers_out(self, name: str, lock_id: int, node_id: int, until_s: float) -> _Held:
        store = self._store
        try:
            self._check_office()
            database = store.get(name)
            if database is None or not database.commit:
                raise DatabaseNotFound(name)
            epoch = store.epoch
            left_s = max(0.1, until_s - time.monotonic())
            if not await self._run(in_thread(store.demote_database, name, left_s)):
                raise DatabaseBusy(f'"{name}" is in the middle of a transaction on the primary: try again')
            self._check_office()
            if store.epoch != epoch:
                raise NotPrimary
            return _Held(lock_id, node_id, epoch, database.position)
        except BaseException:
            await self._run(self._let_in(name))
            raise

    def _taken(self, seat: _Seat, name: str, lock_id: int, task: asyncio.Task[_Held]) -> None:
        """It is held, or will not be."""
        taking = seat.taking.pop(lock_id)
        if not task.cancelled():
            task.exception()  # is told to the callers, if there are any
        if not taking.callers and not taking.delivered:
            self._abandon(seat, name, taking)

    def _abandon(self, seat: _Seat, name: str, taking: _Taking) -> None:
        """Nobody wants it any more."""
        task = taking.task
        if not task.done():
            task.cancel()
        elif not task.cancelled() and task.exception() is None and not task.result().ended:
            self._start(self._end(seat, name, task.result(), "not wanted any more"))

    # --- holding ----------------------------------------------------------------------------------------------------

    def _held(self, name: str, lock_id: int) -> _Held:
        seat = self._seats.get(name)
        if seat is None or seat.held is None or seat.held.id != lock_id or seat.held.ended:
            raise _not_held(name)
        if seat.held.epoch != self._store.epoch:
            raise Ineligible(f"epoch {seat.held.epoch} is over: the HALT lock has ended, take it again")
        return seat.held

    def _prolong(self, held: _Held) -> HaltLock:
        held.until_s = time.monotonic() + self._ttl_s
        held.expires_ms = int((time.time() + self._ttl_s) * 1000)
        return HaltLock(held.id, held.position, held.epoch, held.expires_ms)

    def _look_at(self, seat: _Seat, name: str, held: _Held) -> None:
        """Its time may be over."""
        if held.ended:
            return
        left_s = held.until_s - time.monotonic()
        if left_s > 0:
            held.timer = asyncio.get_running_loop().call_later(left_s, self._look_at, seat, name, held)
            return
        log.warning("%s: node %016X has not renewed its HALT lock: it is taken away", name, held.node_id)
        self._start(self._end(seat, name, held, "expired"))

    async def _applied(self, name: str, held: _Held, data: bytes | str) -> Position:
        """As soon as nobody is in its way (who reads a database that gets another page size). DatabaseBusy: the holder
        comes again."""
        began_s = until_s = time.monotonic()
        until_s += READERS_S
        while True:
            try:
                return await _of_worker(self._store, name, self._apply, name, held, data)
            except DatabaseBusy:
                now_s = time.monotonic()
                if now_s > until_s:
                    raise
            await asyncio.sleep(max(LOOK_S, now_s - began_s))  # it may be large
            began_s = time.monotonic()

    def _apply(self, name: str, held: _Held, data: bytes | str) -> Position:
        """[W] A transaction of the holder. Everything is asked once more: nothing else runs on the worker meanwhile."""
        store = self._store
        self._check_office()
        database = store.get(name)
        if held.ended or database is None or database.captures or store.epoch != held.epoch:
            raise _not_held(name)
        header, trailer = ends_of(data)
        if header.epoch != held.epoch or not header.has_checksums:
            raise FormatError(f"{name}: a transaction of epoch {header.epoch} under a HALT lock of epoch {held.epoch}")
        if header.max_txid > database.position.txid:
            store.apply_as_primary(name, data)
        elif not has_transaction(database.log, header, trailer):
            raise Ineligible(f'"{name}" is at {database.position} on the primary: the HALT lock is of no use any more')
        database.durable()
        return Position(header.max_txid, trailer.post_apply_checksum, header.epoch)

    async def _replicated(self, name: str, txid: int) -> None:
        """Synchronous replication: what is acknowledged to the holder is on as many nodes as any other commit."""
        gate = self._store.gate
        if gate is None or not gate.active:
            return
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def tell(error: BaseException | None) -> None:
            if not done.done():
                done.set_result(None) if error is None else done.set_exception(Unavailable(str(error)))

        gate.wait(name, txid, lambda error: _call(loop, tell, error))
        await done

    # --- the end ----------------------------------------------------------------------------------------------------

    async def _end(self, seat: _Seat, name: str, held: _Held, reason: str) -> None:
        """After a transaction that is being applied. Called again it waits for the same."""
        first, held.ended = not held.ended, True
        async with held.busy:
            if not first or seat.held is not held:
                return
            if held.timer is not None:
                held.timer.cancel()
            try:
                async with self._working():
                    await self._let_in(name)
            finally:
                seat.held = None
                seat.turn.release()
        self._store.events.emit(Event("haltEnd", name, {"node_id": f"{held.node_id:016X}", "reason": reason}))

    async def _let_in(self, name: str) -> None:
        """Applications here may write again, if this is the primary still."""
        if not self._store.is_primary:
            return
        try:
            await in_thread(self._store.promote_database, name)
        except (OSError, LitefsError) as error:
            log.error("%s: cannot be written after a HALT lock: %s", name, error)

    @contextlib.asynccontextmanager
    async def _working(self) -> AsyncIterator[None]:
        """Not while it is paused."""
        while not self._may_work.is_set():  # it may have been paused again before this task was woken
            await self._may_work.wait()
        self._at_work += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._at_work -= 1
            if not self._at_work:
                self._idle.set()

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _check_office(self) -> None:
        if not self._store.is_primary:
            raise NotPrimary
        if not self._store.fence.holds():
            raise NotPrimary("this node's lease has ended: ask the primary")

    def _start(self, work: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        task.add_done_callback(watched)
        return task

    async def _run(self, work: Any) -> Any:
        """To its end, also if the caller is cancelled meanwhile; `end_all` waits for it too."""
        return await finished(self._start(work))


def _not_held(name: str) -> Ineligible:
    return Ineligible(f'the HALT lock of "{name}" is not held any more: take it again')


async def _of_worker(store: Store, name: str, call: Callable[..., T], *args: object) -> T:
    return await asyncio.wrap_future(store.worker.submit(call, *args, database=name))


def _call(loop: asyncio.AbstractEventLoop, call: Callable[..., object], *args: object) -> None:
    with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
        loop.call_soon_threadsafe(call, *args)
