"""Commits in the rollback modes: what to record at a commit point, and how to find one that no hook saw."""

from __future__ import annotations

import errno
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from threading import Thread

import numpy as np
from numpy.typing import NDArray

from pylitefs.engine import ofd_locks
from pylitefs.engine.continuation import finish, proceed
from pylitefs.engine.database import Database
from pylitefs.engine.files import read_at
from pylitefs.engine.in_place import LOCK_BYTES, InPlace
from pylitefs.engine.opener import Opener
from pylitefs.engine.page_checksums import stamp
from pylitefs.engine.rollback_capture import database_size, whole_size
from pylitefs.engine.transaction import Change, UnstableSource
from pylitefs.engine.worker import Worker
from pylitefs.errors import FormatError
from pylitefs.formats.ltx.checksum import page_checksum, page_checksums
from pylitefs.formats.ltx.format import Position, lock_pgno
from pylitefs.formats.names import shown
from pylitefs.formats.sqlite.locks import PENDING
from pylitefs.ports import FileKind, Then

log = logging.getLogger("litefs.capture")

_SETTLE_S = 0.05
_STOP_S = 2.0
_LONGEST_SETTLE_S = 1.0
_LOST_S = 30.0
_TELL_TRIES = 60
_READ_PAGES = 64
_SUM_BYTES = 4 << 20


class CommitPoints(InPlace):
    """See `rollback_capture` for what is noted until then."""

    def __init__(self, worker: Worker, opener: Opener) -> None:
        super().__init__(opener)
        self._worker = worker
        self._opener = opener
        self._settling: set[str] = set()
        self._begun_s: dict[str, float] = {}  # looks that are under way, since when
        self._end_by_s = math.inf
        self.emptied: Callable[[Database], object] = lambda database: None
        """What becomes of a database whose file is empty (`Naming.emptied`)."""

    def end_soon(self) -> None:
        """The node stops: reading a whole database must come to its end soon, or be given up: the next start does it
        again, for the files say what the log lacks. Any thread."""
        self._end_by_s = time.monotonic() + _STOP_S

    def _check_stop(self) -> None:
        if time.monotonic() > self._end_by_s:
            raise OSError(errno.ECANCELED, "litefs stops: the next start does the rest")

    def commit_point(
        self, database: Database, source: str = "capture", *, is_still: Callable[[], bool] = lambda: True
    ) -> bool:
        """The database file holds a committed state now and nobody can change it before this returns: record it. Where
        somebody could, `is_still` tells afterwards that nobody has. Any thread (FUSE threads call it in their hooks).
        Raises OSError, UnstableSource: everything is as before."""
        with database.lock:
            if not database.rollback.pending:
                return False
            fd = os.open(database.files.database, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return self._record_file(database, fd, source, is_still)
            finally:
                os.close(fd)

    def _commit_point_if_still(self, database: Database) -> bool:
        """`commit_point` where nothing keeps writers out: an application in WAL mode whose WAL is empty may commit, and
        copy that into the file, while it is read; and so may who writes in place. What was read then is no state that
        there was: it is looked at again. Under the database's lock. Raises OSError."""
        before = self._seen(database)
        try:
            return self.commit_point(
                database, is_still=lambda: self._seen(database) == before and self._is_free(database, None)
            )
        except UnstableSource:
            return False

    def record_before_wal(self, database: Database) -> None:
        """SQLite makes a WAL with SHARED in its hands: by then each transaction in a rollback mode has ended, also one
        that nothing tells the end of (MEMORY and OFF with synchronous=OFF). It is recorded before the WAL is there,
        because what is committed in that stands on top of it. Not what somebody else than SQLite is writing at this
        moment, if it is not sound. Raises OSError; not on the worker, nor on a FUSE thread."""
        foreign = self.is_foreign(database)
        if foreign and not self.is_ready(database):
            return
        with database.lock:
            unfinished = database.rollback.journal_in_use() or wal_in_use(database) or not database.may_commit
            if not unfinished and (not foreign or self.is_unchanged(database)):
                self.commit_point(database)

    def _record_file(self, database: Database, fd: int, source: str, is_still: Callable[[], bool]) -> bool:
        seen = stamp(database.files.database)  # before it is read: what is written after that was not seen
        size = os.fstat(fd).st_size
        if size == 0 and database.exists and database.loan is None:  # to SQLite a new database
            self.emptied(database)
            log.warning(
                "%s: a program has cut its file off to nothing, and its rows are gone: replicas drop the database as "
                "well. If that was a mistake, import a backup (litefs import)",
                shown(database.name),
            )
            return True
        try:
            page_size, commit = whole_size(os.pread(fd, 100, 0), size)
        except FormatError as error:
            if database.exists:
                database.withhold(str(error))
            return False
        everything = database.rollback.suspect or page_size != database.page_size or not database.exists
        pages: Iterable[tuple[int, bytes]]
        if everything:
            pages = file_pages(fd, page_size, commit, self._check_stop)
            if damage := database.damage if page_size == database.page_size else None:
                pages = (item for item in pages if page_checksum(*item) != damage.get(item[0]))
        else:
            skip = lock_pgno(page_size)
            wanted = database.rollback.dirty.pgnos(page_size, commit).tolist()
            pages = ((pgno, read_at(fd, page_size, (pgno - 1) * page_size)) for pgno in wanted if pgno != skip)
        entry = database.record(
            Change(page_size, commit), pages, lambda pgno: read_at(fd, page_size, (pgno - 1) * page_size),
            is_still, source,
        )  # fmt: skip
        if database.rollback.suspect and entry is not None and source == "capture":
            database.emit("repair", pages=commit)
        database.rollback.clear()
        database.settled_stamp = seen
        if not wal_in_use(database) and os.path.exists(database.files.wal):
            database.wal.file_was_recorded()
        database.withhold(None)
        self._opener.do(database.log.make_spare)
        return entry is not None

    @staticmethod
    def is_as_logged(database: Database) -> bool:
        """Whether the file holds what the log does, so what was written came to nothing or was rolled back. Nobody
        writes meanwhile; any thread."""
        with database.lock:
            if not database.rollback.pending:
                return True
            with open(database.files.database, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                try:
                    page_size, commit = whole_size(file.read(100), size)
                except FormatError:
                    return False
                if (page_size, commit) != (database.page_size, database.commit):
                    return False
                known = database.file_sums_expected()
                if database.rollback.suspect:
                    return bool(np.array_equal(file_checksums(database.files.database), known[:commit]))
                fd = file.fileno()
                return all(
                    page_checksum(pgno, read_at(fd, page_size, (pgno - 1) * page_size)) == int(known[pgno - 1])
                    for pgno in database.rollback.dirty.pgnos(page_size, commit).tolist()
                    if pgno != lock_pgno(page_size)
                )

    def settle_rollback(self, database: Database, mount_fd: int) -> bool:
        """Record noted writes whose commit nothing told us of (MEMORY, OFF, a copied file): committed they are when
        nobody holds a write lock and no journal could take them back. Those of who takes no locks are left alone (see
        `in_place`). `mount_fd`: the mount's database file."""
        with database.lock:
            free = self._is_free(database, mount_fd) and not self.is_foreign(database)
            return free and self._commit_point_if_still(database)

    @staticmethod
    def _is_free(database: Database, mount_fd: int | None) -> bool:
        """Whether no transaction of SQLite is under way. Without `mount_fd` its locks are not asked for."""
        if wal_in_use(database) and not _is_idle_and_empty(database):
            return False
        return database.rollback.own_journal_is_finished() or not (
            database.rollback.journal_in_use()
            or (mount_fd is not None and ofd_locks.write_locked(mount_fd, PENDING, LOCK_BYTES) is not None)
        )

    def settle_later(
        self, database: Database, then: Callable[[BaseException | None], None], *, ended: bool = False,
        synced_by: int | None = None,
    ) -> None:  # fmt: skip
        """`settle_rollback`, from any thread; continues on the worker, or another thread, with an error where nobody
        could look. `ended`: somebody has closed the file, or fsynced it. `synced_by`: a process (0: not known) that
        may have written it waits in its fsync, so if that is SQLite it has the locks."""

        def opened(fds: list[int] | None) -> None:
            self._worker.post(settle, fds, database=database.name)

        def settle(fds: list[int] | None) -> None:
            go_on = then
            try:
                if fds is not None:
                    go_on = self._settle(database, fds[0], then, ended=ended, synced_by=synced_by)
                elif database.exists and database.rollback.pending:  # a commit may be waiting for this
                    raise OSError(errno.EIO, f"{database.name}: its file in the mount cannot be opened")
                error: BaseException | None = None
            except BaseException as caught:
                error = caught
            self._opener.close(fds or ())
            proceed(go_on, error)

        self._opener.open([database.files.live(FileKind.DATABASE)], os.O_RDONLY, opened)

    def _settle(
        self, database: Database, mount_fd: int, then: Then, *, ended: bool, synced_by: int | None
    ) -> Then:
        """What is to be called next: `then`, or something else if that is called later. Raises OSError."""
        if not self._is_free(database, mount_fd) and _has_locks(mount_fd, synced_by):
            with database.lock:
                if self._is_free(database, None):
                    self.commit_point(database)
        elif database.rollback.overwritten and wal_in_use(database) and not _is_idle_and_empty(database):
            if ended or not self.quiet_left_s(database):
                beside = Thread(target=finish, args=(then, partial(self._check_beside_wal, database)), daemon=True)
                return lambda error: beside.start()
        elif not self.settle_rollback(database, mount_fd):
            foreign = database.rollback.pending and self._is_free(database, mount_fd) and self.is_foreign(database)
            if foreign and (ended or not self.quiet_left_s(database)):
                work = partial(self._check, database)
                check = Thread(target=finish, args=(then, work), name="check", daemon=True)
                return lambda error: check.start()
        return then

    def _check(self, database: Database) -> None:
        """Record what somebody else than SQLite has written, if it may be. Raises OSError."""
        if database.rollback.pending and self.is_ready(database):
            with database.lock:
                if self.is_unchanged(database) and self._is_free(database, None):
                    self._commit_point_if_still(database)

    def _check_beside_wal(self, database: Database) -> None:
        """The database file was written over while its WAL is in use: record in what the newest commit differs from the
        log, if it is sound. Not on the worker. Raises OSError."""
        with self.one_looks:
            if not database.rollback.overwritten or not self.is_ready_beside_wal(database):
                return
            with database.lock:
                if not self.is_unchanged(database):
                    return
                database.rollback.clear()
            try:
                self._worker.submit(self._compare, database, database=database.name).result()
            except BaseException:
                database.rollback.suspect = database.rollback.overwritten = True
                raise
            if not database.rollback.overwritten:
                database.withhold(None)

    def _compare(self, database: Database) -> None:
        with database.wal.mutex:
            database.wal.doubt()
        self.flush(database)

    def flush(self, database: Database) -> Position:
        """See `Capture`."""
        raise NotImplementedError

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

    def wal_removed(self, database: Database, *, unsure: bool) -> None:
        """A WAL goes whose frames were all copied into the database file. `unsure`: not all of them were taken."""
        if unsure:
            with database.lock:
                database.rollback.suspect = True
        database.settled_stamp = stamp(database.files.database)
        if database.rollback.pending:  # also where somebody wrote over the file, who is not SQLite
            self.wake_rollback(database)

    def wake_rollback(self, database: Database) -> None:
        """Pages or the journal were written: see in a while whether a commit went by that no hook saw."""
        if database.name not in self._settling:
            self._settling.add(database.name)
            self._worker.call_later(_SETTLE_S, self.settle, database, database=database.name)

    def is_settling(self, database: Database) -> bool:
        """Whether somebody looks after what was written: at a time that is set, or just now (the file may be slow, or
        its lock with somebody else). Who does so for very long counts as lost."""
        under_way_s = time.monotonic() - self._begun_s.get(database.name, -math.inf)
        return database.name in self._settling or under_way_s < _LOST_S

    def settle(self, database: Database, tries: int = 0, ended: bool = False) -> None:
        """Record them now if that is possible, else as soon as it is. On the worker. `ended`: see `settle_later`."""
        self._settling.discard(database.name)
        if not database.rollback.pending:
            return
        self._begun_s[database.name] = time.monotonic()

        def again(error: BaseException | None) -> None:
            """For as long as it takes: a lock that is given up tells nobody."""
            self._begun_s.pop(database.name, None)
            if error is not None and tries % _TELL_TRIES == 0:
                log.warning("%s: what was written is not recorded yet: %s", database.name, error)
            if database.captures and database.rollback.pending and database.name not in self._settling:
                self._settling.add(database.name)
                delay_s = min(_SETTLE_S * (tries + 2), _LONGEST_SETTLE_S)
                if self.is_foreign(database):
                    delay_s = min(max(_SETTLE_S, self.quiet_left_s(database)), _LONGEST_SETTLE_S)
                self._worker.call_later(delay_s, self.settle, database, tries + 1, database=database.name)

        self.settle_later(database, again, ended=ended)


def file_pages(
    fd: int, page_size: int, commit: int, check: Callable[[], None] = lambda: None
) -> Iterator[tuple[int, bytes]]:
    """Every page of a database file, in runs, without the lock page. `check` is called for each run, and may raise."""
    skip = lock_pgno(page_size)
    for first in range(1, commit + 1, _READ_PAGES):
        check()
        count = min(_READ_PAGES, commit - first + 1)
        run = read_at(fd, count * page_size, (first - 1) * page_size)
        for index in range(count):
            if first + index != skip:
                yield first + index, run[index * page_size : (index + 1) * page_size]


def file_checksums(path: str) -> NDArray[np.uint64]:
    """Of every page of a database file; empty if it is none. Raises OSError."""
    with open(path, "rb") as file:
        try:
            page_size, commit = database_size(file.read(100), os.fstat(file.fileno()).st_size)
        except FormatError:
            return np.zeros(0, dtype=np.uint64)
        run = max(1, _SUM_BYTES // page_size)
        parts = [np.zeros(0, dtype=np.uint64)]
        for first in range(1, commit + 1, run):
            count = min(run, commit - first + 1)
            data = read_at(file.fileno(), count * page_size, (first - 1) * page_size)
            parts.append(page_checksums(first, data, page_size))
        return np.concatenate(parts)


def _has_locks(mount_fd: int, process: int | None) -> bool:
    """Whether a process (0: it cannot be told; None: none) may be the one that has SQLite's write locks."""
    holder = ofd_locks.write_locked(mount_fd, PENDING, LOCK_BYTES)
    return process is not None and (process == 0 or holder is None or holder <= 0 or holder == process)


def wal_in_use(database: Database) -> bool:
    """Whether the database is in WAL mode at this moment: there is a WAL with something in it."""
    return stamp(database.files.wal)[0] > 0


def _is_idle_and_empty(database: Database) -> bool:
    """An empty file that nobody has open: whatever stands in a WAL beside it, SQLite removes that when it opens it
    (pager.c, pagerOpenWalIfPresent)."""
    return stamp(database.files.database)[0] == 0 and not database.in_use
