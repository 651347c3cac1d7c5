"""The replica's hand-over from the loop to the worker: what arrived is queued for each database and applied there.

The worker takes one message of each database in turn, so a large snapshot of one does not hold up the transactions of
another. It works for SLICE_S at a time, so that the worker's other jobs get their turn. One wake-up of the loop reports
all that was done in a slice; pieces of which nothing has come yet are reported with what comes of them.

What cannot be written stays first in its queue and is tried again. If the disk is full all databases wait, and the
primary waits with them. If it is one database only (a process of an earlier mount still has its files open), the others
must not wait for it: what comes for it is dropped, all but the one message that is tried again, and once that one can
be applied the pages that differ are fetched.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np

from pylitefs.cluster.ends import OwnFile, ends_of, is_here
from pylitefs.cluster.ports import Epochs, IncomingFile, PageSums, Resync, Store
from pylitefs.errors import DatabaseBusy, FormatError, LitefsError, PositionMismatch, Unavailable
from pylitefs.events import Event
from pylitefs.formats import stream
from pylitefs.formats.ltx.decoder import Decoder, small_chunks
from pylitefs.formats.ltx.format import Position
from pylitefs.formats.stream import Ltx, LtxBegin, LtxData, LtxEnd, SetAside, SnapshotBegin, SnapshotEnd
from pylitefs.formats.stream_fields import MAX_HISTORY, ResyncReason
from pylitefs.formats.stream_pages import SnapshotPages

log = logging.getLogger("litefs.replication")

SLICE_S = 0.010
SLOW_S, SLOW_PAUSE_S = 0.020, 1.0
"""An fsync that took longer makes the disk a slow one, for a while."""
APPLYING = "\0applying"
"""What the work here is for, to the worker: no database has this name, so it goes on while a long job on one of them
waits for something; that one's own queue is out of the ring meanwhile."""

REPORT_BYTES = 1 << 20
"""So much of something that comes in pieces may be done before the loop is told."""

RETRY_MIN_S = 0.1
RETRY_MAX_S = 5.0
STUCK_TRIES = 3
"""After so many tries a database that cannot be written is not waited for."""


@dataclass(frozen=True)
class PrepareResync:
    """Not from the wire: describe the local copy for a RESYNC; what comes before the answer to it is void. `sums`: its
    page checksums, if those that it should have are not to be believed."""

    name: str
    reason: ResyncReason
    sums: PageSums | None = None


_PIECES = (LtxBegin, LtxData, SnapshotBegin, SnapshotPages)
"""Messages after which more of the same must come."""

Item: TypeAlias = (
    Ltx | LtxBegin | LtxData | LtxEnd | SnapshotBegin | SnapshotPages | SnapshotEnd | SetAside | PrepareResync
)


# --- what comes of a message ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Applied:
    """The database is at `txid`, visible to readers. `durable`: up to where it is durable as well; 0: not looked at.
    `anew`: what was there before, if anything, was replaced, and is nothing that this one came from."""

    name: str
    txid: int
    durable: int = 0
    anew: bool = False


@dataclass(frozen=True)
class Unfit:
    """What came cannot be applied; everything is void until a snapshot comes."""

    name: str
    reason: ResyncReason
    text: str


@dataclass(frozen=True)
class Prepared:
    """Ready to be sent: RESYNC and the page checksums."""

    message: stream.Resync
    checksums: PageSums


@dataclass(frozen=True)
class Stuck:
    """The database cannot be written now; what has come for it, and what comes, is dropped."""

    name: str


@dataclass(frozen=True)
class Violation:
    """The primary has broken the protocol: the connection must end."""

    name: str
    text: str


@dataclass(frozen=True)
class Broken:
    """A defect: what is queued cannot be relied on, and the connection must end. The next one begins anew."""

    error: Exception


Outcome: TypeAlias = Applied | Unfit | Prepared | Stuck | Violation | Broken


class _Disorder(Exception):
    """A message that cannot come at this point."""


# --- one database ---------------------------------------------------------------------------------------------------


class Sink:
    """[W] Applies the messages about one database, in order."""

    def __init__(self, store: Store, name: str) -> None:
        self.name = name
        self._store = store
        self._request = 0
        self._void = False  # nothing counts until SNAPSHOT_BEGIN with `_request`
        self._incoming: IncomingFile | None = None
        self._left = 0  # bytes that the file in `_incoming` or `_decoder` still has to get
        self._resync: Resync | None = None
        self._begun: SnapshotBegin | None = None  # of a database of which nothing is here: perhaps it was dropped
        self._page_size = 0
        self._decoder: Decoder | None = None  # a large log entry within a snapshot

    def take(self, item: Item) -> Outcome | None:
        """What came of it; None if there is nothing to tell.

        OSError, DatabaseBusy, Unavailable: nothing has happened, try again."""
        try:
            return self._take(item)
        except _Disorder:
            self.abort()
            return Violation(self.name, f"{type(item).__name__} out of order")
        except (DatabaseBusy, Unavailable, OSError):
            raise
        except PositionMismatch as error:
            return self._unfit(ResyncReason.MISMATCH, error)
        except FormatError as error:
            bad = ResyncReason.BAD_SNAPSHOT if self._resync is not None else ResyncReason.BAD_TRANSACTION
            return self._unfit(bad, error)
        except LitefsError as error:
            return self._unfit(ResyncReason.LOCAL, error)
        except Exception as error:
            log.exception("%s: cannot apply %s", self.name, type(item).__name__)
            return self._unfit(ResyncReason.LOCAL, error)

    def abort(self) -> None:
        """Forget what is incomplete."""
        incoming, self._incoming = self._incoming, None
        resync, self._resync = self._resync, None
        self._decoder = self._begun = None
        for part in (incoming, resync):
            if part is not None:
                with contextlib.suppress(OSError, LitefsError):
                    part.abort()

    def missed(self) -> Unfit:
        """Something that came for it was dropped."""
        return self._unfit(ResyncReason.LOCAL, Unavailable("it can be written again, and has missed transactions"))

    def _unfit(self, reason: ResyncReason, error: Exception) -> Unfit:
        self.abort()
        self._void = True
        return Unfit(self.name, reason, str(error))

    def _take(self, item: Item) -> Outcome | None:
        match item:
            case PrepareResync(_, reason, sums):
                return self._prepare(reason, sums)
            case SetAside():
                return self._set_aside()
            case SnapshotBegin():
                self._begin_snapshot(item)
            case SnapshotEnd(_, position, 0) if self._begun and not self._void and self._is_gone(item):
                return Applied(self.name, position.txid, anew=True)
            case _ if self._void:
                pass
            case _ if self._begun is not None:
                self._make_ready(self._begun)
                self._begun = None
                return self._take(item)
            case Ltx(_, data):
                return self._whole_file(data)
            case LtxBegin():
                self._begin_file(item)
            case LtxData(_, data):
                self._more_of_file(data)
            case LtxEnd(_, whole):
                return self._end_file(whole)
            case SnapshotPages():
                self._take_pages(item)
            case SnapshotEnd():
                return self._end_snapshot(item)
        return None

    # --- transactions -----------------------------------------------------------------------------------------------

    def _whole_file(self, data: bytes) -> Outcome | None:
        if self._in_file:
            raise _Disorder
        if self._resync is not None:
            self._resync.transaction(data)
            return None
        database = self._store.get_or_create(self.name)
        if is_here(database, data):
            return Applied(self.name, ends_of(data)[0].max_txid)
        return Applied(self.name, database.apply(data).txid)

    @property
    def _in_file(self) -> bool:
        return self._incoming is not None or self._decoder is not None

    def _begin_file(self, item: LtxBegin) -> None:
        if self._in_file:
            raise _Disorder
        if self._resync is not None:
            self._decoder = Decoder()
        else:
            database = self._store.get_or_create(self.name)
            is_own = 0 < item.max_txid <= database.position.txid
            self._incoming = OwnFile(database) if is_own else database.receive(item.min_txid, item.max_txid)
        self._left = item.size

    def _more_of_file(self, data: bytes) -> None:
        if not self._in_file or len(data) > self._left:
            raise _Disorder
        if self._incoming is not None:
            self._incoming.write(data)
        elif self._decoder is not None and self._resync is not None:
            for piece in small_chunks((data,)):
                self._resync.pages(self._decoder.feed(piece))
        self._left -= len(data)

    def _end_file(self, whole: bool) -> Outcome | None:
        if not self._in_file or (whole and self._left):
            raise _Disorder
        if not whole:
            self.abort()
            self._void = True  # the primary asks for our checksums next
            return None
        if self._incoming is not None:
            incoming, self._incoming = self._incoming, None
            return self._finish(incoming.finish)
        assert self._decoder is not None
        self._decoder.finish()
        self._decoder = None
        return None

    # --- snapshots --------------------------------------------------------------------------------------------------

    def _prepare(self, reason: ResyncReason, sums: PageSums | None) -> Prepared:
        database = self._store.get(self.name)
        position, page_size = Position(0, 0), 0
        history: list[Position] = []
        epochs: Epochs = ()
        if database is not None:
            history, epochs = database.log.positions(MAX_HISTORY - 1), database.log.epochs()
        if database is not None and database.set_aside_reason is not None:
            position, sums = database.log.head, None  # its files are of no use, but what its log has may be a branch
        elif database is not None:
            position, page_size = database.position, database.page_size
            sums = database.page_checksums() if sums is None else sums
        self.abort()
        self._void = True
        self._request += 1
        if sums is None or not len(sums):
            page_size, sums = 0, _NO_SUMS
        message = stream.Resync(
            self.name, self._request, reason, page_size, len(sums), position, tuple(history), epochs
        )
        return Prepared(message, sums)

    def _begin_snapshot(self, item: SnapshotBegin) -> None:
        if self._void and item.request != self._request:
            return
        self.abort()
        self._void = False
        if self._store.get(self.name) is None:
            self._begun = item
        else:
            self._make_ready(item)

    def _is_gone(self, item: SnapshotEnd) -> bool:
        """The snapshot is that of a database that was dropped, and there is nothing of it here."""
        if not self._store.note_dropped(self.name, item.position, item.epochs):
            return False
        self._begun = None
        return True

    def _make_ready(self, item: SnapshotBegin) -> None:
        """For what the snapshot brings."""
        database = self._store.get_or_create(self.name)
        keep = item.keep_branch_after if item.has_branch else None
        shared = database.log.shared()
        if shared != database.log.head:  # rather too much than too little: an epoch does not tell these apart
            keep = shared.txid if keep is None else min(keep, shared.txid)
        recorded = database.log.agreed.recorded_after
        if recorded is not None:
            keep = recorded if keep is None else min(keep, recorded)
        self._resync = database.resync(item.page_size, keep)
        self._page_size = item.page_size

    def _take_pages(self, item: SnapshotPages) -> None:
        if self._resync is None or self._in_file:
            raise _Disorder
        if item.page_size != self._page_size:
            raise FormatError(f"pages of {item.page_size} bytes in a snapshot with pages of {self._page_size}")
        self._resync.pages(item.pages())

    def _end_snapshot(self, item: SnapshotEnd) -> Outcome:
        if self._resync is None or self._in_file:
            raise _Disorder
        resync, self._resync = self._resync, None
        try:
            return self._finish(lambda: resync.finish(item.commit, item.position, item.epochs), anew=True)
        except FormatError as error:
            return self._unfit(ResyncReason.BAD_SNAPSHOT, error)

    def _finish(self, finish: Callable[[], Position], *, anew: bool = False) -> Outcome:
        """The end of something that came in pieces. It cannot be tried again: what is missing is fetched anew."""
        try:
            return Applied(self.name, finish().txid, anew=anew)
        except (OSError, DatabaseBusy, Unavailable) as error:
            if _is_disk_full(error):
                self._store.events.emit(Event("diskFull", self.name, {"error": str(error)}))
            return self._unfit(ResyncReason.LOCAL, error)

    def _set_aside(self) -> Applied:
        self.abort()
        self._store.set_aside(self.name, "the primary does not have this database")
        self._void = False
        return Applied(self.name, 0, anew=True)


_NO_SUMS: PageSums = np.zeros(0, dtype=np.uint64)


# --- all of them ----------------------------------------------------------------------------------------------------


@dataclass
class _Queue:
    """What waits for one database. `sequence` numbers count up over all databases of a connection."""

    sink: Sink
    items: deque[tuple[int, Item, int]] = field(default_factory=deque)  # (sequence, item, size in bytes)
    scheduled: bool = False  # in the ring, being worked on, or waiting to be tried again
    failures: int = 0
    disk_full: bool = False
    stuck: Item | None = None  # is tried again; the loop was told that it is done, as everything that comes after it
    missed: bool = False  # something was dropped


Report = Callable[[list[Outcome], list[int], int], None]
"""Called on the loop: outcomes, the sequence numbers that are done, and the bytes that this has freed."""


class Applier:
    """The queues of one connection. `put` and `close` on the loop thread; the work is done on the store's worker."""

    def __init__(self, store: Store, report: Report) -> None:
        self._store = store
        self._report = report
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()  # guards all below, and the queues; held for a few operations only
        self._queues: dict[str, _Queue] = {}
        self._ring: deque[_Queue] = deque()
        self._asked = False  # a job is submitted, and has not begun
        self._closed = False
        self._sequence = 0
        self._results = _Results()  # on the worker: not told yet
        self.at_once = False  # the primary's commits wait for us
        self._slow_until_s = 0.0

    def put(self, item: Item, size: int) -> int:
        """Queue an item; its sequence number, or 0 if it was dropped, because its database cannot be written."""
        with self._lock:
            queue = self._queues.get(item.name)
            if queue is None:
                queue = self._queues[item.name] = _Queue(Sink(self._store, item.name))
            if queue.stuck is not None:
                queue.missed = True
                return 0
            self._sequence += 1
            queue.items.append((self._sequence, item, size))
            if not queue.scheduled:
                queue.scheduled = True
                self._ring.append(queue)
            if isinstance(item, LtxBegin):  # its first piece follows at once: one wake-up does for both
                return self._sequence
            submit, self._asked = not self._asked, True
        if submit:
            self._store.worker.submit(self._work, database=APPLYING)
        return self._sequence

    async def drain(self, timeout_s: float) -> None:
        """Wait until what came is applied, what is stuck left out: nobody may be able to send it again."""
        until = self._loop.time() + timeout_s
        while self._loop.time() < until:
            with self._lock:
                if not any(queue.items and queue.stuck is None for queue in self._queues.values()):
                    return
            await asyncio.sleep(0.002)

    async def close(self) -> None:
        """Drop what is queued, wait for what is being done, and forget what is incomplete."""
        with self._lock:
            self._closed = True
            self._ring.clear()
            queues = list(self._queues.values())
            for queue in queues:
                queue.items.clear()
                queue.stuck = None

        def abort() -> None:
            for queue in queues:
                queue.sink.abort()

        await asyncio.shield(asyncio.wrap_future(self._store.worker.submit(abort)))

    # --- on the worker ----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            self._work_for_a_while()
        except Exception as error:
            log.exception("a defect: the queues of what is to be applied")
            self._tell([Broken(error)], [], 0)

    def _tell(self, outcomes: list[Outcome], sequences: list[int], freed: int) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            self._loop.call_soon_threadsafe(self._report, outcomes, sequences, freed)

    def _work_for_a_while(self) -> None:
        until = time.monotonic() + SLICE_S
        with self._lock:
            self._asked = False
        while True:
            with self._lock:
                if not self._ring:
                    again = False
                    break
                if time.monotonic() >= until:
                    again, self._asked = not self._asked, True
                    break
                queue = self._ring.popleft()
                item = queue.stuck or queue.items[0][1]
            try:
                outcome = queue.sink.take(item)
            except (OSError, DatabaseBusy, Unavailable) as error:
                self._failed(queue, error)
                continue
            self._succeeded(queue)
            with self._lock:
                if queue.stuck is not None:
                    queue.stuck = None
                    outcome = queue.sink.missed() if queue.missed else outcome
                    queue.missed = False
                elif queue.items:  # else it was closed meanwhile
                    self._results.done(queue.items.popleft())
                queue.scheduled = bool(queue.items)
                if queue.items:
                    self._ring.append(queue)
            if outcome is not None:
                self._results.outcomes.append(outcome)
                self._results.are_due = True
        results = self._results
        if self.at_once and not again:
            self._make_durable(results.outcomes)
        if results.are_due and not self._closed:
            self._results = _Results()
            self._tell(results.outcomes, results.sequences, results.freed)
        if again:
            self._store.worker.submit(self._work, database=APPLYING)

    def _make_durable(self, outcomes: list[Outcome]) -> None:
        """What was applied of one database is made durable right here: on its way to a thread and back it would wait
        for the loop twice. If there are several, or the disk is slow, which others of the worker must not wait for,
        fsyncs run on threads (`Acks`)."""
        applied = [outcome for outcome in outcomes if isinstance(outcome, Applied)]
        began_s = time.monotonic()
        if not applied or len({outcome.name for outcome in applied}) > 1 or began_s < self._slow_until_s:
            return
        newest = applied[-1]
        database = self._store.get(newest.name)
        if database is not None:
            with contextlib.suppress(OSError, LitefsError):  # tried again by `Acks`, which tells of it
                outcomes[outcomes.index(newest)] = replace(newest, durable=database.log_durable() or 0)
            ended_s = time.monotonic()
            if ended_s - began_s > SLOW_S:
                self._slow_until_s = ended_s + SLOW_PAUSE_S

    def _failed(self, queue: _Queue, error: Exception) -> None:
        delay_s = min(RETRY_MAX_S, RETRY_MIN_S * 2**queue.failures)
        queue.failures = min(queue.failures + 1, 16)
        if queue.failures == 1:
            log.warning("%s: cannot be applied now, will be tried again: %s", queue.sink.name, error)
        if _is_disk_full(error):
            if not queue.disk_full:
                queue.disk_full = True
                self._store.events.emit(Event("diskFull", queue.sink.name, {"error": str(error)}))
        elif _is_held(error) or queue.failures >= STUCK_TRIES:
            with self._lock:
                if queue.stuck is None and queue.items:
                    queue.stuck, queue.missed = queue.items[0][1], len(queue.items) > 1
                    while queue.items:
                        self._results.done(queue.items.popleft())
                    self._results.outcomes.append(Stuck(queue.sink.name))
                    self._results.are_due = True
        self._store.worker.call_later(delay_s, self._resume, queue)

    def _resume(self, queue: _Queue) -> None:
        with self._lock:
            if self._closed or not (queue.items or queue.stuck is not None):
                return
            self._ring.append(queue)
            submit, self._asked = not self._asked, True
        if submit:
            self._work()

    def _succeeded(self, queue: _Queue) -> None:
        queue.failures = 0
        if queue.disk_full:
            queue.disk_full = False
            self._store.events.emit(Event("diskFreed", queue.sink.name))


@dataclass
class _Results:
    """What the loop is to be told of one slice of work."""

    outcomes: list[Outcome] = field(default_factory=list)
    sequences: list[int] = field(default_factory=list)
    freed: int = 0
    are_due: bool = False

    def done(self, queued: tuple[int, Item, int]) -> None:
        sequence, item, size = queued
        self.sequences.append(sequence)
        self.freed += size
        self.are_due |= self.freed >= REPORT_BYTES or not isinstance(item, _PIECES)


def _is_held(error: Exception) -> bool:
    """Whether a process of an earlier mount has the database open, which may last."""
    return isinstance(error, OSError) and error.errno == errno.EBUSY


def _is_disk_full(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
