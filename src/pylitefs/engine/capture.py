"""Capture on the primary: when to look, and what to do with what is found.

    woken by   inotify on the mount          -> soon, at most every `_PACE` times the last pass's duration
               fsync, unlink, truncate hooks -> now, before the application is answered (`flush`)
               a position is asked for       -> now (`flush`)
A WAL commit becomes visible by a store to shared memory, which raises no event. So a pass that follows an event is
followed by a few more, later and later, and does not end while frames stand in the WAL that may still be committed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future

from pylitefs.engine import ofd_locks
from pylitefs.engine.database import Database
from pylitefs.engine.files import read_at
from pylitefs.engine.opener import Opener
from pylitefs.engine.page_checksums import stamp
from pylitefs.engine.rollback_capture import database_size
from pylitefs.engine.transaction import Change, UnstableSource
from pylitefs.engine.wal_capture import BARRIER_FRAMES, WalCapture, wait_stable
from pylitefs.engine.wal_seed import Seed
from pylitefs.engine.worker import Timer, Worker
from pylitefs.errors import FormatError, Unavailable
from pylitefs.formats.ltx.format import Position, lock_pgno
from pylitefs.formats.sqlite.locks import PENDING, SHARED_SIZE
from pylitefs.ports import FileKind

log = logging.getLogger("litefs.capture")

_LOOK_AGAIN_S = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_PACE = 3.0
_MAX_PAUSE_S = 0.02
_SETTLE_S = 0.05
_SETTLE_TRIES = 40
_ATTEMPTS = 8
_RESTLESS_S = 0.01
_RETRY_S = 1.0  # after an error of the disk
_LOCK_BYTES = SHARED_SIZE + 2  # PENDING, RESERVED and the SHARED range
_READ_PAGES = 64
_GIVE_WAY_PAGES = 256


class _Schedule:
    """When to look at one database next."""

    __slots__ = ("not_before_s", "step", "timer")

    def __init__(self) -> None:
        self.step = 0
        self.not_before_s = 0.0
        self.timer: Timer | None = None


class Capture:
    """Capture of all databases; its methods run on the worker unless they say otherwise."""

    def __init__(self, worker: Worker, opener: Opener) -> None:
        self._worker = worker
        self._opener = opener
        self._schedules: dict[str, _Schedule] = {}
        self._opening: set[str] = set()
        self._settling: set[str] = set()
        self._restless: set[str] = set()  # could not be read while it was written to

    # -- when ------------------------------------------------------------------------------------------------

    def wake(self, database: Database) -> None:
        """Something was written: look soon."""
        schedule = self._schedules.setdefault(database.name, _Schedule())
        schedule.step = 0
        delay = schedule.not_before_s - time.monotonic()
        if delay <= 0:
            self._look(database)
        else:
            self._look_in(database, schedule, delay)

    def wake_rollback(self, database: Database) -> None:
        """Pages or the journal were written: see in a while whether a commit went by that no hook saw."""
        if database.name not in self._settling:
            self._settling.add(database.name)
            self._worker.call_later(_SETTLE_S, self._settle_due, database)

    def has_unseen_writes(self, database: Database) -> bool:
        """Whether a rollback-mode commit may have gone by that no hook saw. Any thread.

        Handles that were opened in WAL mode write past us; after a switch to a rollback mode the file's time tells.
        """
        if database.raw_writers and not wal_in_use(database):
            now = stamp(database.files.database)
            if now != database.settled_stamp:
                database.settled_stamp = now
                database.rollback.suspect = True
        return database.rollback.pending

    def _settle_due(self, database: Database, tries: int = 0) -> None:
        self._settling.discard(database.name)
        if not database.rollback.pending:
            return

        def again(error: BaseException | None) -> None:
            if database.rollback.pending and tries < _SETTLE_TRIES and database.name not in self._settling:
                self._settling.add(database.name)
                self._worker.call_later(_SETTLE_S * (tries + 2), self._settle_due, database, tries + 1)

        self.settle_later(database, again)

    def forget(self, database: Database) -> None:
        schedule = self._schedules.pop(database.name, None)
        if schedule is not None and schedule.timer is not None:
            schedule.timer.cancel()

    def _look_in(self, database: Database, schedule: _Schedule, delay_s: float) -> None:
        due = time.monotonic() + delay_s
        if schedule.timer is not None and not schedule.timer.cancelled:
            if schedule.timer.due_s <= due:
                return
            schedule.timer.cancel()
        schedule.timer = self._worker.call_later(delay_s, self._timer_due, database)

    def _timer_due(self, database: Database) -> None:
        schedule = self._schedules.get(database.name)
        if schedule is not None:
            schedule.timer = None
            self._look(database)

    def _look(self, database: Database) -> None:
        schedule = self._schedules.setdefault(database.name, _Schedule())
        started = time.monotonic()
        found = False
        try:
            self.open_shm(database)
            behind = database.wal.backlog() > BARRIER_FRAMES or database.name in self._restless
            if behind and not database.wal.barrier.held:
                self.with_barrier(database, lambda held: None)
            found = self._pass(database)
            if database.failing is None:
                self._restless.discard(database.name)
                self.let_restart(database)
        except UnstableSource:
            self._restless.add(database.name)  # the next try is under the barrier
            self._look_in(database, schedule, _RESTLESS_S)
            return
        except OSError as error:
            log.warning("%s: capture waits for the disk: %s", database.name, error)
            self._look_in(database, schedule, _RETRY_S)
            return
        took = time.monotonic() - started
        if found:
            schedule.step = 0
            pause = min(max(took * _PACE, 0.0005), _MAX_PAUSE_S)
            schedule.not_before_s = started + took + pause
            self._look_in(database, schedule, pause)
        elif schedule.step < len(_LOOK_AGAIN_S):
            self._look_in(database, schedule, _LOOK_AGAIN_S[schedule.step])
            schedule.step += 1
        elif database.wal.commit_may_follow():
            self._look_in(database, schedule, _LOOK_AGAIN_S[-1])  # a slow fsync before the commit is published

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
        if database.wal is wal and wal.shm_fd < 0 and _same_file(fds[0], database.files.shm):
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
            if fds is None or wal.barrier.held or database.wal is not wal:
                if fds is not None:
                    self._opener.close(fds)
                then(wal.barrier.held)
                return
            held = wal.hold_restart(fds)
            if not held and not wal.barrier.held:
                self._opener.close(fds)
            then(held)

        paths = [database.files.live(FileKind.DATABASE), database.files.live(FileKind.SHM)]
        self._opener.open(paths, os.O_RDWR, opened)

    def let_restart(self, database: Database) -> None:
        fds = database.wal.barrier.release()
        if fds:
            self._opener.close(fds)

    def created(self, database: Database, kind: FileKind, seeded: Seed | None) -> None:
        """An application made a new -wal or -shm; `seeded`: what we wrote into it."""
        self._opener.close(database.wal.created(kind, seeded))
        self.wake(database)

    def removed(self, database: Database, kind: FileKind) -> None:
        self._opener.close(database.wal.removed(kind))

    def forget_files(self, database: Database) -> None:
        self._opener.close(database.wal.forget_all())

    # -- flush -----------------------------------------------------------------------------------------------

    def flush(self, database: Database) -> Position:
        """The position that covers every commit that had returned before the call. One pass does it: it takes all
        that is committed when it begins, and what is committed meanwhile is not asked for.

        Raises OSError while the log cannot be written.
        """
        self._pass(database)
        return database.position

    def flush_if_possible(self, database: Database) -> None:
        """As `flush` where what cannot be read in peace is left to the gap detector. Raises OSError."""
        with contextlib.suppress(UnstableSource):
            self.flush(database)

    def flush_later(self, database: Database) -> Future[Position]:
        """`flush` from any thread; also settles writes in rollback modes that no hook saw the end of."""
        result: Future[Position] = Future()

        tries = iter(range(_ATTEMPTS))

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
            self.settle_later(database, work)
        else:
            self._worker.post(work, None, database=database.name)
        return result

    def settle_later(self, database: Database, then: Callable[[BaseException | None], None]) -> None:
        """`settle_rollback`, from any thread; continues on the worker."""

        def opened(fds: list[int] | None) -> None:
            self._worker.post(settle, fds, database=database.name)

        def settle(fds: list[int] | None) -> None:
            finish(then, lambda: fds is not None and self.settle_rollback(database, fds[0]))
            if fds is not None:
                self._opener.close(fds)

        self._opener.open([database.files.live(FileKind.DATABASE)], os.O_RDONLY, opened)

    def _pass(self, database: Database) -> bool:
        """One pass over WAL and rollback state; True if a transaction was recorded. Raises OSError."""
        if database.set_aside_reason is not None:
            return False
        try:
            found = self._wal_pass(database)
        except OSError as error:
            if database.failing is None:
                database.failing = error.strerror or str(error)  # not the exception: its traceback holds buffers
                database.emit("diskFull", error=str(error))
            raise
        if database.failing is not None:
            database.failing = None
            database.emit("diskFreed")
        return found

    # -- WAL -------------------------------------------------------------------------------------------------

    def _wal_pass(self, database: Database) -> bool:
        wal = database.wal
        for attempt in range(_ATTEMPTS):
            try:
                batch = wal.next_batch()
                if batch is None:
                    return False
                if batch.gap:
                    database.emit("gap", cursor=str(wal.cursor), found=str(batch.committed))
                change = batch.change
                entry = database.record(
                    change, self._giving_way(database, batch.pages), batch.read_missing, lambda: wal.is_stable(batch),  # noqa: B023
                    "repair" if batch.gap else "capture",
                )  # fmt: skip
            except UnstableSource:
                wait_stable(attempt)
                continue
            wal.advance(batch)
            self._opener.do(database.log.make_spare)
            if batch.gap and entry is not None:
                database.emit("repair", pages=change.commit)
            return entry is not None or batch.frames > 0
        self._worker.post(self.wake, database, database=database.name)
        raise UnstableSource(f"{database.name}: the WAL changed faster than it could be read; it will be tried again")

    def _giving_way(self, database: Database, pages: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
        """The pages of a batch; between stretches of a large one other databases get their turn."""
        for number, page in enumerate(pages, 1):
            yield page
            if number % _GIVE_WAY_PAGES == 0:
                self._worker.give_way(database.name)

    # -- rollback modes --------------------------------------------------------------------------------------

    def commit_point(self, database: Database, source: str = "capture") -> bool:
        """The database file holds a committed state now and nobody can change it before this returns: record it.
        Any thread (FUSE threads call it in their hooks). Raises OSError."""
        with database.lock:
            if not database.rollback.pending:
                return False
            fd = os.open(database.files.database, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return self._record_file(database, fd, source)
            finally:
                os.close(fd)

    def _record_file(self, database: Database, fd: int, source: str) -> bool:
        try:
            page_size, commit = database_size(os.pread(fd, 100, 0), os.fstat(fd).st_size)
        except FormatError as error:
            if database.exists and os.fstat(fd).st_size:
                log.warning("%s: not a database any more: %s", database.name, error)
            return False
        if commit == 0 or os.fstat(fd).st_size < commit * page_size:
            return False  # being copied: the rest is still to come
        everything = database.rollback.suspect or page_size != database.page_size or not database.exists
        pages: Iterable[tuple[int, bytes]]
        if everything:
            pages = file_pages(fd, page_size, commit)
        else:
            skip = lock_pgno(page_size)
            wanted = database.rollback.dirty.pgnos(page_size, commit).tolist()
            pages = ((pgno, read_at(fd, page_size, (pgno - 1) * page_size)) for pgno in wanted if pgno != skip)
        entry = database.record(
            Change(page_size, commit), pages, lambda pgno: read_at(fd, page_size, (pgno - 1) * page_size),
            lambda: True, source,
        )  # fmt: skip
        if database.rollback.suspect and entry is not None and source == "capture":
            database.emit("repair", pages=commit)
        database.rollback.clear()
        self._opener.do(database.log.make_spare)
        return entry is not None

    def settle_rollback(self, database: Database, mount_fd: int) -> bool:
        """Record noted writes whose commit nothing told us of (MEMORY, OFF, a copied file): committed they are when
        nobody holds a write lock and no journal could take them back. `mount_fd`: the mount's database file."""
        with database.lock:
            if database.rollback.replacing or wal_in_use(database):
                return False
            if not database.rollback.journal_is_finished() and (
                database.rollback.journal_in_use()
                or ofd_locks.write_locked(mount_fd, PENDING, _LOCK_BYTES) is not None
            ):
                return False
            return self.commit_point(database)


def file_pages(fd: int, page_size: int, commit: int) -> Iterator[tuple[int, bytes]]:
    """Every page of a database file, in runs, without the lock page."""
    skip = lock_pgno(page_size)
    for first in range(1, commit + 1, _READ_PAGES):
        count = min(_READ_PAGES, commit - first + 1)
        run = read_at(fd, count * page_size, (first - 1) * page_size)
        for index in range(count):
            if first + index != skip:
                yield first + index, run[index * page_size : (index + 1) * page_size]


def wal_in_use(database: Database) -> bool:
    """Whether the database is in WAL mode at this moment: there is a WAL with something in it."""
    return stamp(database.files.wal)[0] > 0


def _same_file(fd: int, path: str) -> bool:
    """Whether a descriptor of the mount belongs to the backing file that has this name now (it may have been replaced
    while it was being opened; the filesystem shows the backing file's size and times)."""
    try:
        mine, theirs = os.fstat(fd), os.stat(path)
    except OSError:
        return False
    return mine.st_nlink > 0 and mine.st_size <= theirs.st_size


def finish(then: Callable[[BaseException | None], None], work: Callable[[], object]) -> None:
    """Do `work`, then continue a request with how it went."""
    error: BaseException | None = None
    try:
        work()
    except BaseException as caught:
        error = caught
    with contextlib.suppress(Exception):
        then(error)
