"""One HALT lock that this node holds, from the first open of NAME-lock to the end (see `halting`).

taking     asked for it ▸ waiting until this node is where the primary stands ▸ the capture begins here
held       a sender and a renewer run; whoever opens the file shares it
ending     nobody has it open, or it was lost: writers locked out ▸ the rest sent, if it was not lost ▸ given back
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from enum import Enum
from typing import IO, Protocol

from pylitefs.cluster.control import HaltLock
from pylitefs.cluster.ends import ends_of
from pylitefs.cluster.ports import Database, LogEntry, Store
from pylitefs.cluster.tasks import blocking, in_thread
from pylitefs.cluster.transfer import COMPACT_MIN, merge, small_run
from pylitefs.engine.fence import Fence
from pylitefs.engine.loan import Loan
from pylitefs.errors import DatabaseBusy, DatabaseNotFound, Ineligible, LitefsError, NotPrimary, Unavailable
from pylitefs.events import Event
from pylitefs.formats.ltx.format import Position
from pylitefs.formats.stream_fields import MAX_CHUNK
from pylitefs.ports import Then

log = logging.getLogger("litefs.halt")

ASK_S = 5.0  # for an answer that takes the primary no work
SEND_S = 60.0  # for a transaction, and as long again as it takes at
SLOWEST_BYTES_S = 1 << 20
DEMOTE_S = 1.0  # a try to lock the writers out
SHARE_S = 5.0
"""Who comes later waits for the next lock: else a busy node could keep it for ever."""

NOTE_S = 1.0  # between notes of how far the primary is
RETRY_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class Peers(Protocol):
    """The primary, over HTTP (`http.peers`). Unavailable: it may have been done or not, try again."""

    async def halt(self, url: str, name: str, lock_id: int, timeout_s: float) -> HaltLock: ...
    async def renew(self, url: str, name: str, lock_id: int, epoch: int, timeout_s: float) -> HaltLock: ...
    async def release(self, url: str, name: str, lock_id: int, timeout_s: float) -> None: ...
    async def transaction(
        self, url: str, name: str, lock_id: int, epoch: int, data: bytes | IO[bytes], timeout_s: float
    ) -> Position: ...


class WriterDatabase(Database, Protocol):
    """A database that may be lent to this node."""

    loan: Loan | None


class WriterStore(Store, Protocol):
    """`fence`: until when what is committed may be acknowledged."""

    def promote_database(self, name: str, fence: Fence | None = None, /) -> None: ...


class Lost(LitefsError):
    """The lock is not held any more."""


class Share:
    """One open of NAME-lock: `then` is what it waits for."""

    def __init__(self, name: str, then: Then) -> None:
        self.name = name
        self._then: Then | None = then
        self.hold: Hold | None = None  # that it has a share in
        self.flushed = False  # a descriptor of it was closed
        self.timer: asyncio.TimerHandle | None = None

    @property
    def waits(self) -> bool:
        return self._then is not None

    def answer(self, error: BaseException | None) -> None:
        then, self._then = self._then, None
        if self.timer is not None:
            self.timer.cancel()
        if then is not None:
            try:
                then(error)
            except Exception:  # others wait for theirs
                log.exception("a defect: %s-lock: an open could not be answered", self.name)


class Surroundings(Protocol):
    """What a lock needs of its node."""

    store: WriterStore
    peers: Peers
    ttl_s: float
    open_s: float

    @property
    def primary_url(self) -> Callable[[], str]: ...
    @property
    def reconnect(self) -> Callable[[], None]: ...


class Gate:
    """A `CommitGate`: commits of one database wait until the primary has them durably."""

    active = True

    def __init__(self, name: str, position: Position) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._txid = position.txid
        self._waiting: list[tuple[int, Then]] = []
        self._problem = ""

    def wait(self, name: str, txid: int, then: Then) -> None:
        with self._lock:
            if not self._problem and txid > self._txid:
                self._waiting.append((txid, then))
                return
            error = self._error() if txid > self._txid else None
        then(error)

    def reached(self, txid: int) -> None:
        with self._lock:
            self._txid = max(txid, self._txid)
            ready = [then for wanted, then in self._waiting if wanted <= txid]
            self._waiting = [item for item in self._waiting if item[0] > txid]
        for then in ready:
            self._answer(then, None)

    def fail(self, problem: str) -> None:
        """Nothing more will be reached."""
        with self._lock:
            self._problem = self._problem or problem or "the HALT lock has ended"
            waiting, self._waiting = self._waiting, []
            error = self._error()
        for _, then in waiting:
            self._answer(then, error)

    def _answer(self, then: Then, error: OSError | None) -> None:
        try:
            then(error)
        except Exception:  # the others are answered all the same
            log.exception("a defect: %s: a commit could not be answered", self._name)

    def _error(self) -> OSError:
        return OSError(errno.EIO, f"{self._name}: {self._problem}")


class State(Enum):
    """Of a lock."""

    TAKING = "taking"
    HELD = "held"
    ENDING = "ending"


class Hold:
    """The lock of one database, from the first open to the end."""

    def __init__(self, node: Surroundings, name: str) -> None:
        self.name = name
        self.state = State.TAKING
        self.moved = asyncio.Event()  # something has happened to the database
        self.next: list[Share] = []  # came too late for this one
        self._node, self._store, self._peers = node, node.store, node.peers
        self._openings: set[Share] = set()
        self._url = node.primary_url()
        self._id = secrets.randbelow((1 << 63) - 1) + 1
        self._epoch = 0
        self._since_s = 0.0
        self._until_s = 0.0  # by our clock, and counted from before the primary's began
        self._fence = Fence()
        self._database: WriterDatabase
        self._gate: Gate
        self._acked = Position(0, 0)
        self._progress = asyncio.Event()  # replaced each time something was acknowledged
        self._problem = ""
        self._unneeded = asyncio.Event()
        self._over = asyncio.Event()  # it was lost
        self._gave_up_at = 0  # the last TXID that was written here when it was lost
        self._captures = False
        self._hurried = False
        self.task: asyncio.Task[Hold] = asyncio.ensure_future(self._run())

    # --- those who share it -----------------------------------------------------------------------------------------

    def add(self, opening: Share) -> None:
        crowded = self.state is State.HELD and time.monotonic() - self._since_s > SHARE_S
        if self.state is State.ENDING or crowded:
            self.next.append(opening)
            return
        self._openings.add(opening)
        opening.hold = self
        if self.state is State.HELD:
            opening.answer(None)

    def remove(self, opening: Share) -> None:
        """It is closed, or not waited for any more."""
        self._openings.discard(opening)
        if opening in self.next:
            self.next.remove(opening)
        if not self._openings:
            self.give_back()

    def give_back(self) -> None:
        """Nobody needs it any more."""
        if self._unneeded.is_set():
            return
        self._unneeded.set()
        if self.state is State.TAKING:
            self.task.cancel()
        elif self.state is State.HELD:
            self.state = State.ENDING

    def flush(self, opening: Share, last: bool, then: Then) -> None:
        """A close(2): of the last descriptor there is, as far as that can be known."""
        opening.flushed = True
        ends = last and all(one.flushed for one in self._openings)
        if ends:
            self.give_back()
        work = asyncio.ensure_future(self._closed_well(ends))

        def done(task: asyncio.Task[None]) -> None:
            then(None if task.cancelled() else task.exception())

        work.add_done_callback(done)

    async def _closed_well(self, ends: bool) -> None:
        """Return when the primary has everything, and its lock if that `ends`. OSError if it will not have it."""
        try:
            async with asyncio.timeout(self._node.open_s) as limit:
                if self._captures:
                    position = await asyncio.wrap_future(self._database.flush())
                    limit.reschedule(asyncio.get_running_loop().time() + self._node.open_s + self._unsent_s())
                    await self._all_sent(position)
                if ends or self.state is State.ENDING:
                    await asyncio.wait([self.task])
        except TimeoutError:
            if self._acked.txid < self._database.position.txid:
                raise OSError(errno.EIO, "the primary does not answer") from None
        except (LitefsError, OSError):
            pass
        if self._problem and self._acked.txid < self._gave_up_at:
            raise OSError(errno.EIO, self._problem)

    def _unsent_s(self) -> float:
        """How long what the primary does not have may take on its way."""
        entries = self._database.log.entries()
        return sum(entry.size_bytes for entry in entries if entry.max_txid > self._acked.txid) / SLOWEST_BYTES_S

    async def _all_sent(self, position: Position) -> None:
        """Wait for everything up to there. Lost, if that is not possible any more."""
        while self._acked.txid < position.txid:
            if self._problem:
                raise Lost(self._problem)
            await self._progress.wait()

    def look_at_primary(self) -> None:
        if self._captures and (self._store.is_primary or self._node.primary_url() != self._url):
            self._lose("the primary has changed")

    def end_now(self, reason: str) -> None:
        """This node's role is about to change: what is not done quickly is not done."""
        self._hurried = True
        if self._captures:
            self._lose(reason)
        else:
            self.give_back()

    # --- its life ---------------------------------------------------------------------------------------------------

    async def _run(self) -> Hold:
        try:
            await self._take()
        except (Exception, asyncio.CancelledError) as error:
            if not isinstance(error, LitefsError | OSError | asyncio.CancelledError):
                log.exception("a defect: %s: taking its HALT lock", self.name)
            self.state = State.ENDING
            self._problem = str(error) or "not wanted any more"
            for opening in list(self._openings):
                opening.answer(_as_errno(error))
            await self._undo()
            return self
        self.state, self._since_s = State.HELD, time.monotonic()
        log.info("%s: holding its HALT lock, at %s", self.name, self._acked)
        self._store.events.emit(Event("haltHeld", self.name, {"position": str(self._acked)}))
        for opening in list(self._openings):
            opening.answer(None)
        parts = (self._send(), self._renew(), self._return(), self._over.wait())
        work = [asyncio.ensure_future(part) for part in parts]
        try:
            await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
            for task in work:
                if task.done() and (failure := task.exception()) is not None:
                    self._lose(str(failure) if isinstance(failure, LitefsError) else repr(failure))
        finally:
            self.state = State.ENDING
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)
            await self._end()
        return self

    async def _take(self) -> None:
        until_s = time.monotonic() + self._node.open_s
        database = self._store.get(self.name)
        if database is None or not database.commit:
            raise DatabaseNotFound(self.name)
        if database.captures or database.set_aside_reason is not None:
            raise DatabaseBusy(f"{self.name} is in use by something else")
        self._database = database  # type: ignore[assignment]
        lock = await self._ask_for_it(until_s)
        self._epoch = lock.epoch
        async with asyncio.timeout(max(0.1, until_s - time.monotonic())):
            while not database.position.is_at(lock.position):
                self.moved.clear()
                if not database.position.is_at(lock.position):
                    await self.moved.wait()
        self._acked = database.position
        self._gate = Gate(self.name, self._acked)
        self._set_until(self._until_s)
        await blocking(database.log.agreed.begin, lock.epoch, self._acked)
        self._database.loan = Loan(lock.epoch, self._gate)
        self._captures = True
        await blocking(self._store.promote_database, self.name, self._fence)
        if database.log.agreed.position is None or database.position.txid < lock.position.txid:
            raise Unavailable(f"{self.name} has left {lock.position}")

    async def _ask_for_it(self, until_s: float) -> HaltLock:
        """The same id each time: an answer may have been lost."""
        step = 0
        while True:
            self._url = self._node.primary_url()
            if not self._url:
                raise Unavailable("no primary is known")
            began_s = time.monotonic()
            try:
                lock = await self._peers.halt(self._url, self.name, self._id, max(0.1, until_s - began_s) + 1.0)
                self._until_s = began_s + self._node.ttl_s
                return lock
            except Unavailable as error:
                pause_s = RETRY_S[min(step, len(RETRY_S) - 1)]
                if time.monotonic() + pause_s >= until_s:
                    raise
                log.info("%s: its HALT lock is not to be had yet: %s", self.name, error)
                await asyncio.sleep(pause_s)
                step += 1

    async def _undo(self) -> None:
        """It was not had, or not wanted any more in the end."""
        if self._captures:
            self._fence.until_s = 0.0
            self._gate.fail(self._problem)
            await self._lock_out()
            self._hand_back()
        await self._tell_release()
        if self._captures:
            self._node.reconnect()

    def _set_until(self, until_s: float) -> None:
        self._until_s = until_s
        left_s = until_s - time.monotonic()
        self._fence.until_s = time.clock_gettime(time.CLOCK_BOOTTIME) + left_s

    # --- while it is held -------------------------------------------------------------------------------------------

    async def _renew(self) -> None:
        """Raises Lost."""
        pause_s = self._node.ttl_s / 3
        while True:
            await asyncio.sleep(pause_s)
            began_s = time.monotonic()
            if began_s >= self._until_s:
                raise Lost("it could not be renewed in time")
            ask_s = min(ASK_S, self._until_s - began_s)
            try:
                await self._peers.renew(self._url, self.name, self._id, self._epoch, ask_s)
            except (NotPrimary, Ineligible, DatabaseNotFound) as error:
                raise Lost(str(error)) from None
            except Unavailable as error:
                log.warning("%s: its HALT lock cannot be renewed: %s", self.name, error)
                pause_s = min(1.0, self._node.ttl_s / 30)
            else:
                self._set_until(began_s + self._node.ttl_s)
                pause_s = self._node.ttl_s / 3

    async def _send(self) -> None:
        """Send what is captured, in order. Raises Lost."""
        entries, noted_s = self._database.log, 0.0
        with contextlib.closing(entries.pin(self._acked.txid)):
            while True:
                self.moved.clear()
                head = entries.head  # before the entry is looked for: a commit in between is told of by `moved`
                entry = entries.after(self._acked.txid)
                if entry is None:
                    if not head.is_at(self._acked):
                        raise Lost("the log of this node has changed")
                    await self.moved.wait()
                    continue
                before, self._acked = self._acked, await self._send_from(entry)
                entries.agreed.position = self._acked
                self._gate.reached(self._acked.txid)
                progress, self._progress = self._progress, asyncio.Event()
                progress.set()
                log.debug("%s: the primary has %s to %s", self.name, before, self._acked)
                if time.monotonic() >= noted_s + NOTE_S:
                    noted_s = time.monotonic()
                    await in_thread(entries.agreed.note)

    async def _send_from(self, entry: LogEntry) -> Position:
        """Send one entry, or what has gathered, as one."""
        run = small_run(self._database.log, entry)
        merged = await in_thread(merge, run, self._acked) if len(run) >= COMPACT_MIN else None
        if merged is not None:
            end = merged[1].after
            return await self._post(merged[0], Position(end.txid, end.checksum, self._epoch))
        header, trailer = await in_thread(ends_of, entry.path)
        after = Position(header.max_txid, trailer.post_apply_checksum, self._epoch)
        if header.pre_apply_position != self._acked:
            raise Lost("the log of this node has changed")
        if entry.size_bytes <= MAX_CHUNK:
            return await self._post(await in_thread(_read, entry.path), after)
        return await self._post(entry.path, after)

    async def _post(self, data: bytes | str, after: Position) -> Position:
        size_bytes = len(data) if isinstance(data, bytes) else (await in_thread(os.stat, data)).st_size
        step, give_up_s, send_s = 0, 0.0, SEND_S + size_bytes / SLOWEST_BYTES_S
        while True:
            began_s = time.monotonic()
            try:
                with contextlib.ExitStack() as stack:
                    body = data if isinstance(data, bytes) else stack.enter_context(open(data, "rb"))
                    position = await self._peers.transaction(self._url, self.name, self._id, self._epoch, body, send_s)
            except (NotPrimary, Ineligible, DatabaseNotFound) as error:
                raise Lost(str(error)) from None
            except OSError as failure:
                raise Lost(f"the log of this node cannot be read: {failure.strerror}") from None
            except Unavailable as error:
                give_up_s = give_up_s or time.monotonic() + self._node.ttl_s
                if time.monotonic() >= give_up_s:
                    raise Lost(f"the primary could not take a transaction in time: {error}") from None
                if step == 0:
                    log.warning("%s: a transaction could not be sent, trying again: %s", self.name, error)
                await asyncio.sleep(RETRY_S[min(step, len(RETRY_S) - 1)])
                step += 1
                continue
            if not position.is_at(after):
                raise Lost(f"the primary is at {position} after a transaction that leads to {after}")
            self._set_until(max(self._until_s, began_s + self._node.ttl_s))
            return after

    # --- the end ----------------------------------------------------------------------------------------------------

    async def _return(self) -> None:
        """When nobody needs it: lock the writers out, and send the rest. The sender goes on meanwhile."""
        await self._unneeded.wait()
        await self._lock_out()
        while not self._problem and self._acked.txid < self._database.position.txid:  # lost, it has been set for good
            await self._progress.wait()

    async def _lock_out(self) -> None:
        """Only the daemon writes the database from now on. For as long as it takes: a process may be in the middle of a
        transaction."""
        told = False
        while not self._store.is_primary:  # else it is written here by right
            why = "before the open transaction ends"
            try:
                if await blocking(self._store.demote_database, self.name, DEMOTE_S):
                    return
            except DatabaseNotFound:
                return  # dropped
            except Exception as error:
                surprising = not isinstance(error, LitefsError | OSError)
                why = f"now, it is tried again: {error}"
                log.debug("%s: locking the writers out", self.name, exc_info=error if surprising else None)
            if self._hurried:
                return
            if not told:
                log.warning("%s: its HALT lock cannot be given back %s", self.name, why)
            told = True
            await asyncio.sleep(0.05)

    def _lose(self, problem: str) -> None:
        """Nothing is acknowledged any more. Quick: the rest of the end comes after it."""
        if self._problem:
            return
        self._problem = problem
        self._gave_up_at = self._database.position.txid
        self._fence.until_s = 0.0
        self._gate.fail(f"the HALT lock was lost: {problem}")
        self._progress.set()
        self._unneeded.set()
        self._over.set()
        self.state = State.ENDING

    async def _end(self) -> None:
        """All tasks are over: as a replica again."""
        self._fence.until_s = 0.0
        if self._problem:
            unsent = self._database.position.txid - self._acked.txid
            log.error("%s: its HALT lock was lost: %s (%d transactions not sent)", self.name, self._problem, unsent)
            self._store.events.emit(Event("haltLost", self.name, {"reason": self._problem, "transactions": unsent}))
        await self._lock_out()
        self._gave_up_at = max(self._gave_up_at, self._database.position.txid)
        self._gate.fail(self._problem)
        self._hand_back()
        await self._tell_release()
        if self._problem:
            self._node.reconnect()

    def _hand_back(self) -> None:
        """It is the primary's again."""
        self._database.loan = None
        if self._acked.txid == self._database.position.txid:
            self._database.log.agreed.end()

    async def _tell_release(self) -> None:
        """It ends by itself if this does not come through."""
        if not self._url or self._hurried:
            return
        for pause_s in RETRY_S[:3]:
            try:
                await self._peers.release(self._url, self.name, self._id, ASK_S)
                return
            except (NotPrimary, Ineligible, DatabaseNotFound):
                return
            except LitefsError:
                await asyncio.sleep(pause_s)


def _as_errno(error: BaseException) -> BaseException:
    """What open(2) says."""
    if isinstance(error, TimeoutError):
        return OSError(errno.ETIMEDOUT, "this node is behind the primary")
    if isinstance(error, DatabaseNotFound | OSError):
        return error
    if isinstance(error, asyncio.CancelledError):
        return InterruptedError(errno.EINTR, "interrupted")
    return OSError(errno.EAGAIN, str(error))


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
