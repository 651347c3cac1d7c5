"""What the primary sends to one replica about one database: the steps of `decisions`, one after the other, in one task.

The task runs only while there is something to send. A transaction that follows what was sent before goes out with one
read of the log and no decision. Not more than WINDOW entries are under way: the replica's acknowledgements open the
window again, and what has gathered meanwhile is merged. So a replica that is behind gets few large entries, and one
that keeps up gets each at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque

from pylitefs.cluster import moves
from pylitefs.cluster.decisions import (
    NOTHING,
    AdoptTxid,
    AskChecksums,
    AskTail,
    CaughtUp,
    SendLog,
    SetAside,
    Snapshot,
    Stale,
    Taking,
    decide,
    view_of,
)
from pylitefs.cluster.outlet import NO_PAGES_SIZE, Outlet, Turn, send
from pylitefs.cluster.ports import Database, Epochs, Log, LogEntry, PageSums, SnapshotReader
from pylitefs.cluster.resync_request import ResyncRequest
from pylitefs.cluster.roles import Refused, StaleEpoch
from pylitefs.cluster.tail import LIMIT_BYTES, NextTransactions, TailReceiver, adopt
from pylitefs.cluster.transfer import COMPACT_MIN, BadLogEntry, Ends, merge, next_pages, send_entry, small_run
from pylitefs.errors import DatabaseBusy, DatabaseError, LitefsError, Unavailable
from pylitefs.events import Event
from pylitefs.formats import stream
from pylitefs.formats.ltx.format import Position
from pylitefs.formats.stream import (
    Checksums,
    GiveBack,
    Ltx,
    LtxBegin,
    LtxData,
    LtxEnd,
    Message,
    Progress,
    Resync,
    TailEnd,
)
from pylitefs.formats.stream_fields import ErrorCode, ResyncReason
from pylitefs.formats.stream_pages import SnapshotPages
from pylitefs.status import ReplicaProgress

log = logging.getLogger("litefs.replication")

WINDOW = 64
"""Log entries of one database that are sent before the first of them is acknowledged."""

RETRY_S, DISK_RETRY_S = 10.0, 0.5
"""How long a database that this node cannot read is left alone; and where its disk is full, perhaps for a moment."""

BUSY_S = 60.0
"""How long a snapshot waits for a transaction that has written to the file before its commit (rollback modes)."""

BUSY_PAUSE_S = 0.2

ATTEMPTS = 3
"""How often something that the next transaction may spoil is tried before the connection is given up."""


class _Superseded(Exception):
    """A RESYNC has come in: what was being sent is not wanted any more."""


class _NotFollowing(Exception):
    """The log entry does not follow what was sent, or has left the log: decide anew."""


class Feed:
    """`sent` is where the replica is once it has applied everything sent so far. What it says of itself, in HELLO and
    in its acknowledgements, counts as `standing` only once its copy was found to be a state our log went through."""

    def __init__(self, outlet: Outlet, name: str, position: Position) -> None:
        self.name = name
        self.sent = position
        self.state = "connecting"
        self.progress = Progress(name, position.txid, position.txid, 0)
        self._outlet = outlet
        self._turn = Turn(outlet)
        self._live = False  # what was sent last came from the log, and the log goes on from there
        self._running = False
        self._behind_since_ms = _now_ms()
        self._in_flight: deque[tuple[int, int]] = deque()  # (last TXID, commit time in ms) of entries not yet applied
        self._changed = asyncio.Event()
        self._durable = 0  # as acknowledged since its copy is what it is
        self._in_line = False  # its copy is one that our log led to
        self._leaves_copy = False  # it was told to set its copy aside, and has not said yet that it has nothing
        self.waits_for: frozenset[moves.Place] = frozenset()  # of one of these, for as long as it rests
        self.need_not_wait = 0  # up to this TXID
        self._incoming: ResyncRequest | None = None
        self._tail: asyncio.Queue[Message] | None = None
        self._tail_refused = False
        self._tail_tries = 0
        self._attempts = 0
        self._retry_at_s = 0.0

    # --- what the session tells -------------------------------------------------------------------------------------

    def poke(self) -> None:
        """Something may have changed: see to it. Loop thread."""
        self._changed.set()
        if not self._running and time.monotonic() >= self._retry_at_s:
            self._running = self._outlet.start(self._run())

    def acknowledged(self, progress: Progress) -> None:
        if self._leaves_copy and progress.applied:
            return  # it speaks of the copy that it is to set aside: a new database of this name has these TXIDs, too
        self._leaves_copy = False
        self.progress = progress
        while self._in_flight and self._in_flight[0][0] <= progress.applied:
            self._in_flight.popleft()
        self._changed.set()
        self._durable = progress.durable
        self._tell_durable()

    @property
    def standing(self) -> ReplicaProgress:
        """How far the replica is in our history: nothing, unless its copy is a state of it (by epoch and checksum, see
        `decisions`). Everybody who asks how far a replica is asks this."""
        if not self._in_line:
            return ReplicaProgress(0, 0, 0, in_line=False)
        told, limit = self.progress, self.sent.txid
        return ReplicaProgress(min(told.received, limit), min(told.applied, limit), min(told.durable, limit))

    def _tell_durable(self) -> None:
        if self._in_line:
            self._outlet.holds(self.name, min(self._durable, self.sent.txid))

    def _is_in_line(self) -> None:
        if not self._in_line:
            self._in_line = True
            self._tell_durable()

    def _strayed(self) -> None:
        self._in_line, self._durable = False, 0
        self._outlet.strayed(self.name)

    def resync(self, message: Resync) -> None:
        self._strayed()
        self._leaves_copy = False  # what it acknowledges from now on is the result of what answers this
        database = self._outlet.store.get(self.name)
        self._incoming = ResyncRequest(message, database.commit if database is not None else 0)
        self.poke()

    def checksums(self, message: Checksums) -> None:
        if self._incoming is None:
            raise Refused(ErrorCode.PROTOCOL, "page checksums that belong to nothing")
        self._incoming.add(message)
        if self._incoming.complete:
            self.poke()

    async def tail(self, message: Ltx | LtxBegin | LtxData | LtxEnd | TailEnd) -> None:
        """Part of what the replica gives back. Waits while there is more of it than can be taken in."""
        if self._tail is None:
            raise Refused(ErrorCode.PROTOCOL, "transactions that nobody has asked for")
        await self._tail.put(message)

    def lag_ms(self, head_txid: int, now_ms: int) -> int:
        """How long the oldest transaction that the replica has not applied has been committed."""
        if self.standing.applied >= head_txid and self.state == "live":
            return 0
        since = self._in_flight[0][1] if self._in_flight else self._behind_since_ms
        return max(0, now_ms - since)

    # --- the task ---------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        self._behind_since_ms = _now_ms()
        try:
            while await self._step() or self._changed.is_set():  # set since the step began: look again
                pass
        except DatabaseError as error:  # of this node; the other databases go on
            self._fail(error, RETRY_S)
        except OSError as error:  # the same; a full disk, perhaps, and soon it is not
            if isinstance(error, ConnectionError | TimeoutError):
                raise
            self._fail(error, DISK_RETRY_S)
        finally:
            self._running = False

    def _fail(self, error: Exception, retry_s: float) -> None:
        log.error("%s cannot be sent to replica %016X: %s", self.name, self._outlet.replica_id, error)
        self._live, self.state, self._attempts = False, "failed", 0
        self._outlet.examined(self.name)
        self._retry_at_s = time.monotonic() + retry_s
        asyncio.get_running_loop().call_later(retry_s, self.poke)

    async def _step(self) -> bool:
        """One thing that is to be done; False when nothing was found."""
        self._changed.clear()
        self.waits_for = frozenset()
        try:
            if self._incoming is not None:
                return await self._answer_resync()
            database = await self._outlet.database(self.name)
            if self._live and database is not None:
                if await self._stream(database.log):
                    self._attempts = 0
                self._live = self.sent.is_at(database.log.head)
                if self._live and self._incoming is None:
                    self._settled()
                    return False
            return await self._decide(database)
        except _Superseded:
            self._live = False
        except moves.MustWait:
            self._attempts = 0
            return False
        except BadLogEntry as error:
            self._live = False
            log.error("the log of %s is damaged: %s", self.name, error)
            self._emit("corruptLog", path=str(error).split(":")[0])
            await self._ask_checksums(ResyncReason.BAD_LOG)
        return True

    @property
    def rests(self) -> bool:
        """Whether the replica has everything there is, and nothing is to be done about it."""
        idle = not (self._running or self._in_flight) and self._incoming is None and self._tail is None
        return idle and self._live and self._in_line

    async def _decide(self, database: Database | None) -> bool:
        if self._incoming is not None:
            return True
        outlet = self._outlet
        if database is not None and database.set_aside_reason is not None:
            outlet.examined(self.name)  # nothing is known about it: the replica keeps what it has
            if self.sent.is_at(database.log.head):
                self._is_in_line()
            self._settled()
            self._live, self.state = False, "set aside"
            return False
        view = await outlet.blocking(view_of, database, self.sent, outlet.epoch)
        if self._incoming is not None:
            return True
        known = database is not None and view.head.txid > 0
        taking = Taking.NOTHING if self._tail_refused else Taking.NEXT
        if outlet.recovery is not None and outlet.recovery.active:
            concerned = outlet.recovery.concerns(self.name, known) and not self._tail_refused
            taking = Taking.LOST if concerned else Taking.NOTHING
        decision = decide(self.sent, view, taking)
        if not isinstance(decision, AskTail):
            outlet.examined(self.name)
        if isinstance(decision, SendLog):
            self._is_in_line()  # also while it waits: another database may wait for what it has
        match decision if database is None else moves.in_turn(self, outlet, decision, database.log, view):
            case None:
                return False
            case Stale(epoch):
                raise StaleEpoch(outlet.epoch, epoch)
            case CaughtUp():
                self._is_in_line()
                self._settled()
                return False
            case SendLog():
                self._is_in_line()
                self._try_again("the log changes faster than it can be sent")
                self._live = True
            case Snapshot():
                self._try_again("the database changes faster than a snapshot can be sent")
                await self._snapshot()
            case AskChecksums(reason):
                self._try_again("the replica's copy cannot be brought in line")
                await self._ask_checksums(reason)
            case AskTail(after):
                self._try_again("the replica's transactions cannot be taken over")
                await (self._ask_tail(after) if taking is Taking.LOST else self._ask_next(after))
            case AdoptTxid(position):
                self._tail_refused = self._tail_refused or not await adopt(outlet, self.name, position)
            case SetAside():
                await self._set_aside()
        return True

    def _settled(self) -> None:
        self._live, self.state, self._attempts = True, "live", 0
        self._outlet.caught_up(self.name)

    def _try_again(self, problem: str) -> None:
        self._attempts += 1
        if self._attempts > ATTEMPTS * 4:
            raise DatabaseError(problem)

    def _moved_to(self, position: Position) -> None:
        """The replica is somewhere else, not by a log entry."""
        self.sent = position
        self.progress = Progress(self.name, 0, 0, 0)  # until it says otherwise
        self._durable = 0
        self._in_flight.clear()

    def _check(self) -> None:
        if self._incoming is not None:
            raise _Superseded

    def _emit(self, kind: str, **data: object) -> None:
        self._outlet.store.events.emit(Event(kind, self.name, data))

    # --- the log ----------------------------------------------------------------------------------------------------

    async def _stream(self, entries: Log) -> bool:
        """Send what the log has after `sent`, up to its head or where it does not continue. True if anything went."""
        progressed = False
        with contextlib.suppress(_NotFollowing):
            while (entry := entries.after(self.sent.txid)) and self._may_go_to(entry.max_txid):
                self._check()
                if len(self._in_flight) >= WINDOW:
                    self.state = "catch-up"
                    await self._changed.wait()
                    self._changed.clear()
                    continue
                async with self._turn:
                    if entries.head.txid - self.sent.txid < COMPACT_MIN or not await self._send_merged(entries, entry):
                        await self._send_one(entries, entry)
                progressed = True
        return progressed

    def _may_go_to(self, txid: int) -> bool:
        return moves.waits_for(self, self._outlet, txid) is None

    async def _send_one(self, entries: Log, entry: LogEntry) -> None:
        def check(ends: Ends) -> None:
            self._check()
            if ends.before != self.sent:
                raise _NotFollowing

        try:
            ends = await send_entry(self._turn.send, self._turn.blocking, self.name, entry, check, self._turn.ready)
        except FileNotFoundError:
            still = entries.after(self.sent.txid)
            if still is not None and still.path == entry.path:
                raise BadLogEntry(f"{entry.path}: the file is missing") from None
            raise _NotFollowing from None
        except OSError as error:
            raise BadLogEntry(f"{entry.path}: {error.strerror or error}") from None
        self._was_sent(ends)

    async def _send_merged(self, entries: Log, first: LogEntry) -> bool:
        run = small_run(entries, first)
        if len(run) < COMPACT_MIN or not self._may_go_to(run[-1].max_txid):
            return False
        self.state = "catch-up"
        merged = await self._turn.blocking(merge, run, self.sent)
        self._check()
        if merged is None:
            return False
        data, ends = merged
        await self._turn.send(Ltx(self.name, data))
        self._was_sent(ends)
        return True

    def _was_sent(self, ends: Ends) -> None:
        self.sent = ends.after
        if self.progress.applied < ends.after.txid:
            self._in_flight.append((ends.after.txid, ends.header.timestamp_ms))

    async def _set_aside(self) -> None:
        """The replica is to keep its copy out of the way. Acknowledgements of that copy may be under way: none counts,
        and nothing of a new database of this name is sent, before the replica has said that it has nothing. It always
        says so, or with a RESYNC that it cannot, or the connection ends."""
        self._live, self.state = False, "resync"
        if self._in_line:
            self._strayed()
        self._leaves_copy = True
        await send(self._outlet, stream.SetAside(self.name))
        self._moved_to(NOTHING)
        self._outlet.caught_up(self.name)
        while self._leaves_copy:
            await self._changed.wait()
            self._changed.clear()

    # --- snapshots --------------------------------------------------------------------------------------------------

    async def _ask_checksums(self, reason: ResyncReason) -> None:
        self._live, self.state = False, "resync"
        if self._in_line:
            self._strayed()
        if self._incoming is None:
            await send(self._outlet, stream.SendChecksums(self.name, reason))
        while self._incoming is None:
            await self._changed.wait()
            self._changed.clear()

    async def _answer_resync(self) -> bool:
        self._live, self.state = False, "resync"
        incoming = self._incoming
        assert incoming is not None
        while not incoming.complete:
            await self._changed.wait()
            self._changed.clear()
            if incoming is not self._incoming:
                return True
        self._try_again("the replica's copy cannot be brought in line")
        self._incoming = None
        resync = incoming.resync
        log.info("replica %016X fetches pages of %s: %s", self._outlet.replica_id, self.name, resync.reason.name)
        try:
            await self._snapshot(resync.request, incoming)
        except (DatabaseError, OSError, moves.MustWait):
            self._incoming = self._incoming or incoming  # it is answered later
            raise
        return True

    async def _snapshot(self, request: int = 0, incoming: ResyncRequest | None = None) -> None:
        """Send the database as it is now, or what of it differs from the replica's copy."""
        database = await self._outlet.database(self.name)
        if database is None or database.log.head.txid == 0:
            await self._set_aside()
            return
        branch, since = None, 0
        if incoming is not None:
            branch = await self._outlet.blocking(incoming.branch, database.log)
            since = incoming.resync.position.txid if branch is None else branch
            moves.check_turn(self, self._outlet, database.log.head.txid, since)
        timeout_s = self._outlet.snapshot_timeout_s or None
        async with self._outlet.snapshot_slots:
            self.state = "snapshot"
            try:
                async with asyncio.timeout(timeout_s):
                    for _ in range(ATTEMPTS):
                        known = incoming.known(database.page_size) if incoming is not None else None
                        if await self._send_snapshot(database, request, known, branch, since):
                            return
            except TimeoutError:
                raise Refused(
                    ErrorCode.TOO_SLOW, f'the snapshot of "{self.name}" took longer than http.snapshot-timeout'
                ) from None
        raise DatabaseError("it changes faster than a snapshot of it can be sent")

    async def _send_snapshot(
        self, database: Database, request: int, known: PageSums | None, branch: int | None, since: int
    ) -> bool:
        """False if it has to be begun anew, because the page size has changed or the log was cut."""
        outlet = self._outlet
        if not database.commit:
            return await self._send_drop(database, request, branch, since)
        reader = await outlet.blocking(database.snapshot, known)
        try:
            begin = stream.SnapshotBegin(
                self.name, request, reader.page_size, reader.start, branch is not None, branch or 0
            )
            self._check()
            await send(outlet, begin)
            size_bytes = 0
            while (messages := await self._next_pages(database, reader)) is not None:
                for message in messages:
                    self._check()
                    await send(outlet, message)
                    size_bytes += len(message.packed)
            await asyncio.wrap_future(database.flush())
            position, commit, epochs = await self._state_of(database)
            if not await self._send_between(database.log, reader.page_size, reader.start, position):
                return False
            epochs = tuple(line for line in epochs if line[1] <= position.txid)
            moves.check_turn(self, outlet, position.txid, since)
            self._ends_at(position)
            await send(outlet, stream.SnapshotEnd(self.name, position, commit, epochs))
        except _NotFollowing:
            return False
        finally:
            await asyncio.shield(asyncio.ensure_future(outlet.blocking(reader.close)))
        self._has_snapshot(size_bytes)
        return True

    async def _send_drop(self, database: Database, request: int, branch: int | None, since: int) -> bool:
        """A snapshot without a page, for which nothing need be read. False if the name is used again."""
        self._check()
        position, commit, epochs = await self._state_of(database)
        if commit:
            return False
        begin = stream.SnapshotBegin(self.name, request, NO_PAGES_SIZE, position, branch is not None, branch or 0)
        await send(self._outlet, begin)
        moves.check_turn(self, self._outlet, position.txid, since)
        self._ends_at(position)
        await send(self._outlet, stream.SnapshotEnd(self.name, position, 0, epochs))
        self._has_snapshot(0)
        return True

    async def _state_of(self, database: Database) -> tuple[Position, int, Epochs]:
        """Its position, size in pages and history at one moment."""
        return await asyncio.wrap_future(
            self._outlet.store.worker.submit(lambda: (database.position, database.commit, database.log.epochs()))
        )

    def _ends_at(self, position: Position) -> None:
        """A snapshot, whose end is sent next: what is acknowledged from now on is its result, however soon it comes."""
        self._moved_to(position)
        self._in_flight.append((position.txid, self._behind_since_ms))

    def _has_snapshot(self, size_bytes: int) -> None:
        self._live = True
        self._is_in_line()
        self._emit("snapshotSent", node_id=f"{self._outlet.replica_id:016X}", bytes=size_bytes)

    async def _next_pages(self, database: Database, reader: SnapshotReader) -> list[SnapshotPages] | None:
        until_s = time.monotonic() + BUSY_S
        while True:
            try:
                return await self._outlet.blocking(next_pages, self.name, reader)
            except DatabaseBusy:
                if time.monotonic() >= until_s:
                    raise
            except DatabaseError:
                if database.page_size != reader.page_size:
                    raise _NotFollowing from None
                raise
            self._check()
            await asyncio.sleep(BUSY_PAUSE_S)

    async def _send_between(self, entries: Log, page_size: int, start: Position, end: Position) -> bool:
        """The log from `start` to `end`, as part of a snapshot. False if it is not there."""
        at = start

        def check(ends: Ends) -> None:
            self._check()
            if ends.before != at or (ends.header.page_size != page_size and page_size):
                raise _NotFollowing

        while at != end:
            entry = entries.after(at.txid)
            if entry is None or entry.max_txid > end.txid:
                return False
            try:
                async with self._turn:
                    ends = await send_entry(
                        self._turn.send, self._turn.blocking, self.name, entry, check, self._turn.ready
                    )
            except (_NotFollowing, OSError):
                return False
            at = ends.after
        return True

    # --- what this node has lost ------------------------------------------------------------------------------------

    async def _ask_tail(self, after: Position) -> None:
        """Take over what the replica has after `after`; whatever comes of it, the next step decides anew."""
        recovery = self._outlet.recovery
        assert recovery is not None
        self.state = "give-back"
        self._tail = asyncio.Queue(maxsize=16)
        try:
            with recovery.receiving():
                await send(self._outlet, GiveBack(self.name, after))
                problem = await TailReceiver(
                    self._outlet, self._tail, lambda data: recovery.give_back(self._outlet.store, self.name, data)
                ).run()
        finally:
            self._tail = None
        database = self._outlet.store.get(self.name)
        head = database.log.head if database is not None else NOTHING
        if problem is not None:
            log.warning("%s: the replica cannot give back what it has after %s: %s", self.name, after, problem)
        if head.is_at(after):
            self._tail_refused = True

    async def _ask_next(self, after: Position) -> None:
        """Take over what follows our head exactly, while applications write; what does not fit is left to the
        replica to keep. Whatever comes of it, the next step decides anew."""
        self.state = "give-back"
        self._tail = asyncio.Queue(maxsize=16)
        problem: str | None
        with NextTransactions(self._outlet, self.name, after) as transactions:
            try:
                await send(self._outlet, GiveBack(self.name, after, LIMIT_BYTES))
                problem = await transactions.collect(self._tail)
            finally:
                self._tail = None
            if problem is None:
                try:
                    await transactions.append()
                except (LitefsError, OSError) as error:
                    self._tail_tries += 1
                    if isinstance(error, Unavailable) and self._tail_tries < ATTEMPTS:
                        await asyncio.sleep(BUSY_PAUSE_S)
                        return
                    problem = str(error)
        database = self._outlet.store.get(self.name)
        if problem is not None:
            log.warning("%s: what the replica has after %s cannot be taken over: %s", self.name, after, problem)
        if database is None or database.log.head.is_at(after):
            self._tail_refused = True


def _now_ms() -> int:
    return int(time.time() * 1000)
