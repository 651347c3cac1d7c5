"""The replica's hand-over from the loop to the worker: what arrived is queued for each database and applied there.

The worker takes one message of each database in turn, so a large snapshot of one does not hold up the transactions of
another. It works for SLICE_S at a time, so that the worker's other jobs get their turn. One wake-up of the loop reports
all that was done in a slice; pieces of which nothing has come yet are reported with what comes of them.

What cannot be written stays first in its queue and is tried again. If the disk is full all databases wait, and the
primary waits with them. If it is one database only (a process of an earlier mount still has its files open), the others
must not wait for it: what comes for it is dropped, all but the one message that is tried again, and once that one can
be applied the pages that differ are fetched.

A transaction with another page size is tried again every LOOK_S while somebody is in a read transaction, and what comes
after it is kept. That ends, and the file is replaced beside its readers, after READERS_S; when too much is kept; when
somebody waits for what is here (`hurry`: the connection has ended, the primary asks for it); or when something else
than transactions has come after it.
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

from pylitefs.cluster.ports import Store
from pylitefs.cluster.sink import Applied, Broken, Item, Outcome, Sink, Stuck, is_disk_full
from pylitefs.errors import DatabaseBusy, FormatError, LitefsError, ReadersInTheWay, Unavailable
from pylitefs.events import Event
from pylitefs.formats.ltx.format import Header
from pylitefs.formats.stream import Ltx, LtxBegin, LtxData, LtxEnd, SnapshotBegin
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

READERS_S = 5.0
"""How long a transaction with another page size waits for a moment without readers."""

LOOK_S = 0.02
LOOKS = 10
"""So many of those that wait are tried again every LOOK_S; if there are more, each has its turn less often."""

KEPT_BYTES = 4 << 20
"""What may be kept, of all databases together, while some wait for that; less than may be on its way at all."""

_PIECES = (LtxBegin, LtxData, SnapshotBegin, SnapshotPages)
"""Messages after which more of the same must come."""


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
    readers_until_s: float | None = None  # waits for a moment without readers, at most until then
    hurried: bool = False  # readers are not waited for, until nothing is queued and `hurried_to` is applied
    hurried_to: int = 0


def _is_more_of_the_same(item: Item) -> bool:
    """Whether it can wait behind another transaction: it is one, and no drop."""
    if isinstance(item, Ltx):
        with contextlib.suppress(FormatError):
            return Header.unpack(item.data).commit > 0
    return isinstance(item, (LtxBegin, LtxData, LtxEnd))


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
        self._waiting: list[_Queue] = []  # for a moment without readers
        self._will_look = False
        self._ending = False  # nobody is waited for any more

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
            if queue.readers_until_s is not None and not _is_more_of_the_same(item):
                queue.hurried = True
            if not queue.scheduled:
                queue.scheduled = True
                self._ring.append(queue)
            if isinstance(item, LtxBegin):  # its first piece follows at once: one wake-up does for both
                return self._sequence
            submit, self._asked = not self._asked, True
        if submit:
            self._store.worker.submit(self._work, database=APPLYING)
        return self._sequence

    def hurry(self, name: str, txid: int) -> None:
        """Somebody waits for a transaction that has come, or will: it waits for no readers."""
        with self._lock:
            queue = self._queues.get(name)
            if queue is None:
                queue = self._queues[name] = _Queue(Sink(self._store, name))
            queue.hurried, queue.hurried_to = True, max(txid, queue.hurried_to)

    async def drain(self, timeout_s: float) -> None:
        """Wait until what came is applied, what is stuck left out: nobody may be able to send it again."""
        until = self._loop.time() + timeout_s
        with self._lock:
            self._ending = True
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
            self._waiting.clear()
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
                queue.sink.spares_readers = self._spares_readers(queue)
            try:
                outcome = queue.sink.take(item)
            except ReadersInTheWay:
                self._wait_for_readers(queue)
                continue
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
                queue.readers_until_s = None
                if isinstance(outcome, Applied) and outcome.txid >= queue.hurried_to and not queue.items:
                    queue.hurried = False
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

    def _spares_readers(self, queue: _Queue) -> bool:
        """With the lock."""
        until_s = queue.readers_until_s
        return not (self._ending or queue.hurried) and (until_s is None or time.monotonic() < until_s)

    def _wait_for_readers(self, queue: _Queue) -> None:
        with self._lock:
            if self._closed:
                return
            if queue.readers_until_s is None:
                log.info("%s: waits up to %g s for its readers: it gets another page size", queue.sink.name, READERS_S)
                queue.readers_until_s = time.monotonic() + READERS_S
                queue.hurried |= not all(_is_more_of_the_same(item) for _, item, _ in list(queue.items)[1:])
            self._waiting.append(queue)
            if len(self._waiting) == 1:
                self._store.worker.call_later(LOOK_S, self._look_at_readers, database=APPLYING)

    def _look_at_readers(self) -> None:
        """Try again what waits for a moment without readers. Who has most behind it waits no longer if all of them
        together have too much."""
        with self._lock:
            waiting = self._waiting
            kept = [sum(size for _, _, size in queue.items) for queue in waiting]
            if sum(kept) > KEPT_BYTES:
                waiting[kept.index(max(kept))].hurried = True
            waiting.sort(key=lambda queue: not queue.hurried)
            looks = len(waiting) if self._ending else LOOKS
            self._ring.extend(waiting[:looks])
            del waiting[:looks]
            if waiting:
                self._store.worker.call_later(LOOK_S, self._look_at_readers, database=APPLYING)
            submit, self._asked = not self._asked, True
        if submit:
            self._work()

    def _failed(self, queue: _Queue, error: Exception) -> None:
        delay_s = min(RETRY_MAX_S, RETRY_MIN_S * 2**queue.failures)
        queue.failures = min(queue.failures + 1, 16)
        if queue.failures == 1:
            log.warning("%s: cannot be applied now, will be tried again: %s", queue.sink.name, error)
        if is_disk_full(error):
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
