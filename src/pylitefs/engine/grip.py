"""SQLite's locks on a database that applications have open, taken through the mount: nobody else can write.

    WAL mode        SHARED, DMS, WRITE        and CKPT, if it is free, to become the writer (`seal`)
    rollback modes  SHARED, RESERVED          and EXCLUSIVE to become the writer

Who has SHARED keeps -wal and -shm from being removed, so these are opened after it is held, and closed before it is
given up. Locks are tried, never waited for. What only the kernel can tell (who uses the wal-index) is asked like SQLite
does: who gets DMS alone makes the index anew from the WAL's frames, and so does who finds it torn.

A hot journal is one whose transaction has lost its process, or was cut off by the fence. It is rolled back here, unless
the log has what the database holds: then only the journal's removal, the commit, was missing.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable

import numpy as np

from pylitefs.engine import ofd_locks
from pylitefs.engine.commit_points import file_checksums
from pylitefs.engine.database import Database
from pylitefs.engine.leftovers import play_back
from pylitefs.engine.page_checksums import stamp
from pylitefs.engine.rollback_capture import journal_in_use
from pylitefs.engine.shared_wal import Descriptors
from pylitefs.engine.wal_index_rebuild import rebuild_index
from pylitefs.errors import FormatError
from pylitefs.formats.sqlite.header import DatabaseHeader
from pylitefs.formats.sqlite.locks import CKPT, DMS, PENDING, RESERVED, SHARED_FIRST, SHARED_SIZE, WRITE
from pylitefs.formats.sqlite.wal_index import HEADER_SIZE, read_header
from pylitefs.ports import FileKind

SPIN_S = 0.0005  # between two tries of a lock
_PATIENCE_S = 0.05  # with the locks held so far, for the next one


class Grip:
    """For one thread at a time, which is neither the worker nor a FUSE thread: it resolves names of the mount.

    `is_wal`: whether it is WAL mode that is kept still; None as long as nothing is held.
    """

    def __init__(self, database: Database, plain_dir: str) -> None:
        self._database = database
        self._files = database.files
        self._plain_dir = plain_dir
        self._fds: dict[FileKind, int] = {}
        self.is_wal: bool | None = None
        self.holds_writers = False
        self.holds_checkpoint = False  # not while an application's checkpoint runs: that changes nothing for a writer
        self.is_sealed = False

    # -- taking --------------------------------------------------------------------------------------------------

    def prepare(self) -> bool:
        """Take what nobody notices: in WAL mode SHARED and DMS. True if that is so, or not needed. Raises OSError."""
        if self.is_wal is not None:
            return True
        database = self._open(FileKind.DATABASE, create=False)
        if not ofd_locks.lock_shared(database):
            self.release()
            return False
        if stamp(self._files.wal)[0] == 0 and not self._is_wal_mode():
            self.release()  # as long as SHARED is held, who writes in a rollback mode cannot commit
            return True
        self.is_wal = True
        shm = self._open(FileKind.SHM, create=True)
        self._open(FileKind.WAL, create=True)
        alone = ofd_locks.try_lock(shm, DMS, exclusive=True)
        if not alone and not ofd_locks.try_lock(shm, DMS, exclusive=False):
            self.release()
            return False
        if alone:
            self._rebuild_index(alone=True)
            ofd_locks.try_lock(shm, DMS, exclusive=False)
        return True

    def take(self) -> bool:
        """Keep all others from writing. False if somebody is in the middle of it; `release` then, or try again."""
        if self.holds_writers:
            return True
        if not self.prepare():
            return False
        self.holds_writers = self._take_write() if self.is_wal else self._take_reserved()
        return self.holds_writers

    def _take_write(self) -> bool:
        return ofd_locks.try_lock(self._fds[FileKind.SHM], WRITE, exclusive=True)

    def _take_reserved(self) -> bool:
        """PENDING first: nobody may begin to read before it is known that there is no hot journal. (Who reads takes a
        journal for that of a running transaction while RESERVED is held.)"""
        database = self._open(FileKind.DATABASE, create=False)
        try:
            if not ofd_locks.try_lock(database, PENDING, exclusive=True):
                return False
            if not ofd_locks.try_lock(database, RESERVED, exclusive=True):
                return False
            if stamp(self._files.wal)[0] or self._is_wal_mode():  # it has just become WAL mode
                return False
            if journal_in_use(self._files.journal):
                if not ofd_locks.try_lock(database, SHARED_FIRST, SHARED_SIZE, exclusive=True):
                    return False
                self._clear_journal(database)
            if not ofd_locks.try_lock(database, SHARED_FIRST, SHARED_SIZE, exclusive=False):
                return False
            self.is_wal, self.holds_writers = False, True
            return True
        finally:
            if self.holds_writers:
                ofd_locks.unlock(database, PENDING)
            else:
                self.release()

    def seal(self) -> bool:
        """After `take`: keep everybody from the database file too. In a rollback mode nobody reads then either. False:
        not now."""
        if self.is_sealed:
            return True
        if self.is_wal:
            shm = self._fds[FileKind.SHM]
            self.holds_checkpoint = ofd_locks.try_lock(shm, CKPT, exclusive=True)
            self.is_sealed = read_header(os.pread(shm, HEADER_SIZE, 0)) is not None
            if not self.is_sealed and self.holds_checkpoint:  # recovery is for who holds both
                self.is_sealed = self._rebuild_index(alone=False)
            return self.is_sealed
        database = self._fds[FileKind.DATABASE]
        if not ofd_locks.try_lock(database, PENDING, exclusive=True):
            return False
        # If others still read, PENDING is kept for the next try: no more of them come.
        self.is_sealed = ofd_locks.try_lock(database, SHARED_FIRST, SHARED_SIZE, exclusive=True)
        return self.is_sealed

    def make_wal(self) -> bool:
        """After `seal` in a rollback mode: files for a WAL, locked as a writer locks them. False: not now."""
        shm = self._open(FileKind.SHM, create=True)
        self._open(FileKind.WAL, create=True)
        return (
            ofd_locks.try_lock(shm, DMS, exclusive=True)  # nobody has an old one
            and ofd_locks.try_lock(shm, DMS, exclusive=False)
            and ofd_locks.try_lock(shm, WRITE, exclusive=True)
            and ofd_locks.try_lock(shm, CKPT, exclusive=True)
        )

    def unseal(self) -> None:
        """Let those who only read go on."""
        if self.holds_writers:
            self.is_sealed = False
            if self.is_wal:
                ofd_locks.unlock(self._fds[FileKind.SHM], CKPT)
            else:
                database = self._fds[FileKind.DATABASE]
                ofd_locks.try_lock(database, SHARED_FIRST, SHARED_SIZE, exclusive=False)
                ofd_locks.unlock(database, PENDING)

    def who_is_in_the_way(self) -> str:
        """For people: what `take` or `seal` met."""
        shm, database = self._fds.get(FileKind.SHM), self._fds.get(FileKind.DATABASE)
        pid = None
        with contextlib.suppress(OSError):
            if self.is_wal and shm is not None:
                pid = ofd_locks.write_locked(shm, WRITE)
            elif database is not None:
                pid = ofd_locks.write_locked(database, PENDING, SHARED_SIZE + 2)
        who = "another process" if pid is None or pid <= 0 else f"process {pid}"
        return f"{who} is in a transaction, or uses it"

    def is_stale(self) -> bool:
        """Whether a file that it holds has lost its name."""
        return any(os.fstat(fd).st_nlink == 0 for fd in self._fds.values())

    # -- giving up -----------------------------------------------------------------------------------------------

    @property
    def shm(self) -> int:
        return self._fds[FileKind.SHM]

    def descriptors(self) -> Descriptors:
        """All three files are open, and locked as the daemon's WAL needs it."""
        return self._fds[FileKind.DATABASE], self._fds[FileKind.WAL], self._fds[FileKind.SHM]

    def hand_over(self) -> None:
        """The descriptors are the daemon's WAL's from now on. In a rollback mode others are let in: they find the
        WAL."""
        database = self._fds[FileKind.DATABASE]
        if not self.is_wal:
            ofd_locks.try_lock(database, SHARED_FIRST, SHARED_SIZE, exclusive=False)
            ofd_locks.unlock(database, PENDING)
            ofd_locks.unlock(database, RESERVED)
        self._fds = {}
        self.is_wal, self.holds_writers, self.is_sealed = None, False, False

    def open_index(self) -> int:
        """Another descriptor of the mount's -shm: locks of this grip are others' to it."""
        return os.open(self._files.live(FileKind.SHM), os.O_RDWR | os.O_CLOEXEC)

    def release(self) -> None:
        """Give everything up. SQLite's order: the locks of -shm before SHARED."""
        for kind in (FileKind.WAL, FileKind.SHM, FileKind.DATABASE):
            fd = self._fds.pop(kind, None)
            if fd is not None:
                with contextlib.suppress(OSError):
                    os.close(fd)
        self.is_wal, self.holds_writers, self.is_sealed = None, False, False

    # -- helpers -------------------------------------------------------------------------------------------------

    def _open(self, kind: FileKind, *, create: bool) -> int:
        fd = self._fds.get(kind)
        if fd is not None:
            return fd
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        is_new = create and not os.path.exists(self._files.backing(kind))
        fd = self._fds[kind] = os.open(self._files.live(kind), flags, 0o666)
        if is_new:
            owner = os.stat(self._files.database)
            with contextlib.suppress(OSError):
                os.fchmod(fd, owner.st_mode & 0o777)
                if os.geteuid() == 0:
                    os.fchown(fd, owner.st_uid, owner.st_gid)
        return fd

    def _is_wal_mode(self) -> bool:
        try:
            return DatabaseHeader.unpack(self._database.first_bytes()).is_wal
        except FormatError:
            return False

    def _rebuild_index(self, *, alone: bool) -> bool:
        """As SQLite's recovery, but without a commit that is known to have failed. Nobody writes meanwhile. False: not
        now."""
        wal, shm = self._database.wal, self._fds[FileKind.SHM]
        index = read_header(os.pread(shm, HEADER_SIZE, 0))
        with wal.mutex:
            failed = wal.uncommitted.behind(index, wal.view, wal.pending) if index is not None else None
        wal.before_index_truncate()
        done = rebuild_index(self._files, shm, failed=failed, shared=not alone)
        wal.after_index_truncate()
        return done

    def _clear_journal(self, database: int) -> None:
        """Nobody reads or writes. Raises OSError."""
        with self._database.lock:
            self._database.rollback.suspect = True
            known = self._database.page_checksums()
        found = file_checksums(self._files.database)
        if not np.array_equal(found, known):
            play_back(self._files, [self._plain_dir], database)
        with open(self._files.database, "rb") as file:
            os.fsync(file.fileno())
        os.unlink(self._files.live(FileKind.JOURNAL))


def patiently(step: Callable[[], bool], grip: Grip) -> bool:
    """Try a step of a grip for a moment; False if it was not possible."""
    until_s = time.monotonic() + _PATIENCE_S
    while not step():
        if grip.is_wal is None or time.monotonic() >= until_s:  # None: it holds nothing, others are let through
            return False
        time.sleep(SPIN_S)
    return True
