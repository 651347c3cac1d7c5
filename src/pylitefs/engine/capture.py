"""Capture on the primary: when to look, and what to do with what is found.

    woken by   inotify on the mount          -> soon; from 2,000 transactions/s on in batches of 50 ms
               fsync, unlink, truncate hooks -> now, before the application is answered (`flush`)
               a position is asked for       -> now (`flush`)
A WAL commit becomes visible by a store to shared memory, which raises no event. So as long as frames stand in the WAL
that may still be committed we look again, later and later.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from pylitefs.engine.batches import Batch, Missed
from pylitefs.engine.commit_points import CommitPoints
from pylitefs.engine.database import Database
from pylitefs.engine.files import same_file
from pylitefs.engine.opener import Opener
from pylitefs.engine.transaction import UnstableSource, wait_stable
from pylitefs.engine.wal_capture import BARRIER_FRAMES, COLLECT_FRAMES, WalCapture
from pylitefs.engine.worker import Timer, Worker, not_done
from pylitefs.errors import FormatError, Unavailable
from pylitefs.formats.ltx.format import Position
from pylitefs.ports import FileKind

log = logging.getLogger("litefs.capture")

_LOOK_AGAIN_S = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)  # the last: a slow fsync before the publication
_FSYNC_S = 0.002  # where an fsync is to follow what was written: it looks itself
_PACE = 3.0
_PAUSE_S = 0.0005  # for each transaction of the last pass: above 2,000/s batches grow to the longest pause
_MAX_PAUSE_S = 0.05
_ATTEMPTS = 8
_MAX_COLLECTED = 4
_RESTLESS_S = 0.01
_MUTEX_S = 0.02  # longer than a batch takes to collect
_RETRY_S = 1.0  # after an error of the disk
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_EVENTS = {True: ("diskFull", "diskFreed"), False: ("logFailing", "logWorks")}  # by whether the disk is full


class _Schedule:
    """When to look at one database next."""

    __slots__ = ("not_before_s", "step", "timer")

    def __init__(self) -> None:
        self.step = 0
        self.not_before_s = 0.0
        self.timer: Timer | None = None


class Capture(CommitPoints):
    """Capture of all databases; its methods run on the worker unless they say otherwise."""

    def __init__(self, worker: Worker, opener: Opener) -> None:
        super().__init__(worker, opener)
        self._schedules: dict[str, _Schedule] = {}
        self._opening: set[str] = set()
        self._restless: set[str] = set()  # could not be read while it was written to
        self._failures: dict[str, str] = {}  # the event that tells the end of what was told
        self._surprised = False

    # -- when ------------------------------------------------------------------------------------------------

    def wake(self, database: Database) -> float:
        """Something was written: look soon. Returns how long that may take, in seconds."""
        schedule = self._schedules.setdefault(database.name, _Schedule())
        schedule.step = 0
        delay = max(schedule.not_before_s - time.monotonic(), _FSYNC_S if database.fsync_follows else 0.0)
        if delay <= 0:
            self._look(database)
            return 0.0
        self._look_in(database, schedule, delay)
        return delay

    def is_planned(self, database: Database) -> bool:
        """Whether the next look is planned."""
        return (schedule := self._schedules.get(database.name)) is not None and schedule.timer is not None

    def forget(self, database: Database) -> None:
        schedule = self._schedules.pop(database.name, None)
        if schedule is not None and schedule.timer is not None:
            schedule.timer.cancel()

    def _look_in(self, database: Database, schedule: _Schedule, delay_s: float) -> None:
        due = time.monotonic() + delay_s
        if schedule.timer is not None:
            if schedule.timer.due_s <= due:
                return
            schedule.timer.cancel()
        schedule.timer = self._worker.call_later(delay_s, self._timer_due, database, database=database.name)

    def _timer_due(self, database: Database) -> None:
        schedule = self._schedules.get(database.name)
        if schedule is not None:
            schedule.timer = None
            self._look(database)

    def _look(self, database: Database) -> None:
        """Look; and as long as something may follow, plan the next look: what woke us does so once only."""
        if not database.captures or database.set_aside_reason is not None:
            return  # when that ends, `takeover.wake` looks
        schedule = self._schedules.setdefault(database.name, _Schedule())
        rests = database.wal.pending is not None and database.wal.pending.rests()
        if rests or self._worker.is_in_way(database.name):
            self._look_in(database, schedule, _RESTLESS_S)
            return
        started, before, found = time.monotonic(), database.position.txid, False
        try:
            self.open_shm(database)
            with database.wal.mutex:
                behind = database.wal.backlog() > BARRIER_FRAMES or database.name in self._restless
            if behind and not database.wal.barrier.held:
                self.with_barrier(database, lambda held: held and self.wake(database))
            found = self._pass(database)
            if database.failing is None:
                self._restless.discard(database.name)
                self.let_restart(database)
            with database.wal.mutex:
                may_follow = database.wal.commit_may_follow()
        except UnstableSource:
            if not database.wal.view.index_is_hidden():
                self._restless.add(database.name)  # the next try is under the barrier
            self._look_in(database, schedule, _RESTLESS_S)
            return
        except Exception as error:
            unexpected = not isinstance(error, OSError)
            log.warning("%s: capture waits for the disk: %s", database.name, error, exc_info=unexpected)
            self._look_in(database, schedule, _RETRY_S)
            return
        took = time.monotonic() - started
        if found:
            schedule.step, database.fsync_follows = 0, False
            transactions = database.position.txid - before
            pause = min(max(took * _PACE, _PAUSE_S * transactions), _MAX_PAUSE_S)
            schedule.not_before_s = started + took + pause
        if not may_follow:
            return  # before another commit something is written, which wakes us
        if found:
            self._look_in(database, schedule, pause)
        else:
            self._look_in(database, schedule, _LOOK_AGAIN_S[min(schedule.step, len(_LOOK_AGAIN_S) - 1)])
            schedule.step += 1

    # -- files of the mount ------------------------------------------------------------------------------------

    def open_shm(self, database: Database) -> None:
        """Have the mount's -shm opened, if there is one: to ask for SQLite's locks."""
        wal = database.wal
        if wal.shm_fd >= 0 or database.name in self._opening or not os.path.exists(database.files.shm):
            return
        self._opening.add(database.name)

        def opened(fds: list[int] | None) -> None:
            self._worker.post(self._shm_opened, database, wal, fds, database=database.name)

        self._opener.open([database.files.live(FileKind.SHM)], os.O_RDWR, opened)

    def _shm_opened(self, database: Database, wal: WalCapture, fds: list[int] | None) -> None:
        self._opening.discard(database.name)
        if fds is None:
            return
        if database.captures and database.wal is wal and wal.shm_fd < 0 and same_file(fds[0], database.files.shm):
            wal.use_shm(fds[0])
            self.wake(database)
        else:
            self._opener.close(fds)

    def with_barrier(self, database: Database, then: Callable[[bool], object]) -> None:
        """Take the barrier (see `wal_capture`), then go on, on the worker, told whether it is held."""
        wal = database.wal

        def opened(fds: list[int] | None) -> None:
            self._worker.post(acquire, fds, database=database.name)

        def acquire(fds: list[int] | None) -> None:
            held = wal.barrier.held
            try:
                if fds is not None and not held and database.wal is wal:
                    held = wal.hold_restart(fds)
            except Exception as error:
                log.warning("%s: its WAL cannot be kept from a restart: %s", database.name, error)
            if fds is not None and not wal.barrier.holds(fds):
                self._opener.close(fds)
            then(held)

        paths = [database.files.live(FileKind.DATABASE), database.files.live(FileKind.SHM)]
        self._opener.open(paths, os.O_RDWR, opened)

    def let_restart(self, database: Database) -> None:
        if fds := database.wal.barrier.release():
            self._opener.close(fds)

    def created(self, database: Database, kind: FileKind) -> None:
        """An application made a new -wal or -shm."""
        with database.wal.mutex:
            fds = database.wal.created(kind)
        self._opener.close(fds)
        self.wake(database)

    def removed(self, database: Database, kind: FileKind) -> None:
        """An application removes its -wal or -shm, and what they held was taken."""
        with database.wal.mutex:
            fds = database.wal.removed(kind)
            unsure = kind is FileKind.WAL and database.wal.in_doubt
        self._opener.close(fds)
        if kind is FileKind.WAL:
            self.wal_removed(database, unsure=unsure)

    def forget_files(self, database: Database) -> None:
        with database.wal.mutex:
            fds = database.wal.forget_all()
        self._opener.close(fds)

    def replaced(self, database: Database) -> None:
        """Other files have its names now, or none: what was seen in the old ones does not count any more."""
        with database.wal.mutex:
            self.forget_files(database)
            database.wal.collected.clear()
            database.wal.begin_here()

    # -- flush -----------------------------------------------------------------------------------------------

    def flush(self, database: Database) -> Position:
        """The position that covers every commit that had returned before the call. One pass does it: it takes all
        that is committed when it begins, and what is committed meanwhile is not asked for.

        Raises OSError while the log cannot be written.
        """
        self._pass(database)
        return database.position

    def flush_if_possible(self, database: Database) -> None:
        """As `flush`; what cannot be read in peace is left to the gap detector and the next look. Raises OSError."""
        try:
            self.flush(database)
        except UnstableSource:
            self._look_in(database, self._schedules.setdefault(database.name, _Schedule()), _RESTLESS_S)

    def flush_later(self, database: Database) -> Future[Position]:
        """`flush` from any thread; also settles writes in rollback modes that no hook saw the end of."""
        result, tries = Future[Position](), iter(range(_ATTEMPTS))
        result.set_running_or_notify_cancel()  # who waited for it may give up: it is answered all the same

        def work(_: object) -> None:
            try:
                result.set_result(self.flush(database))
            except UnstableSource:
                if next(tries, None) is None:
                    result.set_exception(Unavailable(f"{database.name} is written to faster than it can be read"))
                else:
                    self.with_barrier(database, work)
            except BaseException as error:
                result.set_exception(error)

        if self.has_unseen_writes(database):
            self.settle_later(database, work, ended=database.lock_fd < 0)
        else:
            self._worker.submit(work, None, database=database.name).add_done_callback(partial(not_done, result))
        return result

    def _pass(self, database: Database) -> bool:
        """One pass over WAL and rollback state; True if a transaction was recorded. Raises OSError."""
        if database.set_aside_reason is not None or not database.captures:
            return False
        try:
            found = self._wal_pass(database)
        except OSError as error:
            begins, ends = _EVENTS[error.errno in _FULL]
            if self._failures.get(database.name) != ends:
                self._told_end(database)
                database.emit(begins, error=str(error))
                self._failures[database.name] = ends
            database.failing = error.strerror or str(error)  # not the exception: its traceback holds buffers
            raise
        database.failing = None
        self._told_end(database)
        return found

    def _told_end(self, database: Database) -> None:
        ends = self._failures.pop(database.name, None)
        if ends is not None:
            database.emit(ends)

    # -- WAL -------------------------------------------------------------------------------------------------

    def _wal_pass(self, database: Database) -> bool:
        """Record what was collected and what has been committed since. Small batches are taken into memory first, so
        that a checkpoint waits for their reading only; large ones are streamed."""
        if database.wal.view.index_is_hidden():
            self.open_shm(database)
            raise UnstableSource(f"{database.name}: its wal-index is being opened")
        for attempt in range(_ATTEMPTS):
            wal = database.wal
            try:
                with wal.mutex:
                    batch = self._next_batch(database)
                    if batch is not None and wal.is_collectable(batch, database.commit) and database.exists:
                        wal.collect(batch, database.commit)
                    elif batch is not None:
                        self._record_collected(database)
                        return self._stream(database, batch)
                return self._record_collected(database)
            except UnstableSource:
                wait_stable(attempt)
        self._worker.post(self.wake, database, database=database.name)
        raise UnstableSource(f"{database.name}: the WAL changed faster than it could be read; it will be tried again")

    def _next_batch(self, database: Database) -> Batch | None:
        """If transactions were missed, the log gets what was seen of them before it is compared."""
        try:
            return database.wal.next_batch(diff=False)
        except Missed:
            self._record_collected(database)
            return database.wal.next_batch()

    def _record_collected(self, database: Database) -> bool:
        """Write collected batches into the log, in order. One that fails stays for the next try."""
        collected = database.wal.collected
        found = False
        try:
            with database.lock:  # one at a time takes from the queue
                while (taken := collected.first()) is not None:
                    pages = taken.close()
                    database.record(taken.change, pages, taken.read_missing, lambda: True, "capture")
                    collected.done(taken)
                    self._opener.do(database.log.make_spare)
                    found = True
        except FormatError as error:
            log.error("%s: a batch does not make sense, the database will be compared: %s", database.name, error)
            with database.wal.mutex:
                database.wal.doubt()
            raise UnstableSource from error
        return found

    def _stream(self, database: Database, batch: Batch) -> bool:
        wal = database.wal
        if batch.gap:
            database.emit("gap", cursor=str(wal.cursor), found=str(batch.committed))
        entry = database.record(
            batch.change, self._worker.giving_way(database.name, batch.pages), batch.read_missing,
            lambda: wal.is_stable(batch), "repair" if batch.gap else "capture",
        )  # fmt: skip
        wal.advance(batch)
        self._opener.do(database.log.make_spare)
        if batch.gap and entry is not None:
            database.emit("repair", pages=batch.change.commit)
        return True

    def checkpoint_begins(self, database: Database) -> None:
        """Note what a checkpoint, whose first fsync this is, must not end without (FUSE thread). Where nobody can look
        now, or nothing tells how far the checkpoint goes (no wal-index), that is everything."""
        wal = database.wal
        if wal.shm_fd >= 0 and database.files.reads_shm_directly and wal.mutex.acquire(timeout=_MUTEX_S):
            try:
                if wal.view.has_index():
                    wal.await_checkpoint()
                    return
            except OSError:
                pass
            finally:
                wal.mutex.release()
        wal.await_everything()

    def collect_now(self, database: Database, *, ends: bool = True) -> bool:
        """Take everything committed into memory, without the worker (FUSE thread); False if that cannot be done now.
        `ends`: a checkpoint ends with the answer."""
        wal = database.wal
        if database.failing is not None or not database.files.reads_shm_directly:
            return False
        if not wal.mutex.acquire(timeout=_MUTEX_S):
            return False
        try:
            if not database.exists or wal.backlog() > COLLECT_FRAMES or len(wal.collected) >= _MAX_COLLECTED:
                return False
            batch = wal.next_batch(diff=False)
            if batch is not None:
                if not wal.is_collectable(batch, database.commit):
                    return False
                wal.collect(batch, database.commit)
            wal.mark_synced(ends=ends)
        except (UnstableSource, OSError):
            return False
        except Exception:
            if not self._surprised:
                log.exception("%s: a commit could not be taken at once, the worker takes it", database.name)
            self._surprised = True
            return False
        finally:
            wal.mutex.release()
        hurry = len(wal.collected) >= _MAX_COLLECTED - 1
        self._worker.post(self._look if hurry else self.wake, database, database=database.name)
        return True
