"""Writers that are not SQLite: who copies over a database file, or patches it, in place and without SQLite's locks.

    rsync --inplace, dd conv=notrunc, cp over a file, an application that saves an image in pieces

Nothing tells of their commit points, and between two writes the file is half old and half new. So what they write is
recorded when

    nobody has the file open for writing any more      as it is: this is what its readers keep
    a descriptor is closed, or the file is fsynced     if it is sound (it may be the descriptor of somebody else)
    nothing was written for a time                     if it is sound, or empty
    … for the longest time                             as it is

Beside a WAL that is in use SQLite reads the new file with the WAL's frames on top. That is recorded, as a difference
from the log, when it is sound. As long as it is not, replicas keep the state before, and it is said (`withheld`).
A file that is cut off to nothing, or was open for writing alone (O_WRONLY), was not written by SQLite.

The time begins with half a second and doubles whenever the file was not sound. SQLite itself holds a lock from a
transaction's first write to its end, so its transactions in the journal modes MEMORY and OFF are recorded when the lock
has gone. Whether one is held at a write the kernel tells from a descriptor of the mount's file; it is opened at the
first write that has no journal, and until then nobody knows: then the rules above hold.
"""

from __future__ import annotations

import os
import threading
import time

from pylitefs.engine import ofd_locks
from pylitefs.engine.database import Database
from pylitefs.engine.opener import Opener
from pylitefs.engine.page_checksums import FileStamp, stamp
from pylitefs.engine.soundness import is_sound, is_sound_with_wal
from pylitefs.formats.sqlite.locks import PENDING, SHARED_SIZE
from pylitefs.ports import FileKind

LOCK_BYTES = SHARED_SIZE + 2  # PENDING, RESERVED and the SHARED range
_LONGEST_S = 16.0
_TORN = "it is being written in place, and as it is now it is not sound"
_TORN_WITH_WAL = "it was written over while its WAL is in use, and what SQLite reads now is not sound"


class InPlace:
    """Part of the capture in rollback modes."""

    def __init__(self, opener: Opener) -> None:
        self._lock_opener = opener
        self.one_looks = threading.Lock()  # at what SQLite reads beside a WAL: it needs the room of a copy

    # -- whose writes these are ------------------------------------------------------------------------------------

    def note_write(self, database: Database) -> None:
        """A write that has no journal is about to be noted: whether SQLite makes it. FUSE threads, under
        `Database.lock`."""
        rollback = database.rollback
        if database.lock_fd >= 0:
            if ofd_locks.write_locked(database.lock_fd, PENDING, LOCK_BYTES) is None:
                rollback.foreign = True
        else:
            rollback.foreign = True  # perhaps
            if database.lock_fd == -1:
                database.lock_fd = -2  # asked for
                self._lock_opener.open(
                    [database.files.live(FileKind.DATABASE)], os.O_RDONLY, lambda fds: self._opened(database, fds)
                )

    def _opened(self, database: Database, fds: list[int] | None) -> None:
        with database.lock:
            database.lock_fd = -1
            if fds is not None and database.app_handles and database.captures:
                database.lock_fd, fds = fds[0], None
        self._lock_opener.close(fds or ())

    def forget_lock_fd(self, database: Database) -> None:
        """Nobody has it open any more. Any thread."""
        if database.lock_fd >= 0:
            with database.lock:
                fd, database.lock_fd = database.lock_fd, -1
            if fd >= 0:
                self._lock_opener.close([fd])

    # -- when they are recorded ------------------------------------------------------------------------------------

    def is_foreign(self, database: Database) -> bool:
        """Whether somebody who takes no locks may be about to write more."""
        rollback = database.rollback
        return database.writers > 0 and (rollback.foreign or (rollback.suspect and database.raw_writers > 0))

    def quiet_left_s(self, database: Database) -> float:
        """How long nothing must be written any more before the file is looked at; 0: it is time."""
        rollback, now_s = database.rollback, time.monotonic()
        seen = self._seen(database)
        if seen != rollback.seen:
            rollback.seen, rollback.seen_s = seen, now_s
        return max(0.0, rollback.seen_s + rollback.quiet_s - now_s)

    def is_ready(self, database: Database) -> bool:
        """Whether what somebody else than SQLite has written may be recorded; who is asked must do so under
        `Database.lock` only if `is_unchanged` by then. Blocking, on a thread of its own. Raises OSError."""
        rollback = database.rollback
        before = self._seen(database)
        sound = is_sound(database.files.database)
        quiet = self.quiet_left_s(database) <= 0
        if quiet and not before[1][0]:
            sound = True  # an empty file is a database to SQLite, and nobody goes on to fill it
        rollback.looked = before
        if sound or (quiet and rollback.quiet_s >= _LONGEST_S):
            return True
        if quiet:
            rollback.quiet_s *= 2
            database.withhold(_TORN)
        return False

    def is_ready_beside_wal(self, database: Database) -> bool:
        """As `is_ready`, where a WAL is in use: whether what SQLite reads now is sound."""
        rollback, files = database.rollback, database.files
        quiet = self.quiet_left_s(database) <= 0
        rollback.looked = self._seen(database)
        if is_sound_with_wal(files.database, files.wal, files.folder):
            return True
        if quiet:
            rollback.quiet_s *= 2
        database.withhold(_TORN_WITH_WAL)
        return False

    def is_unchanged(self, database: Database) -> bool:
        return database.rollback.looked == self._seen(database)

    @staticmethod
    def _seen(database: Database) -> tuple[int, FileStamp]:
        return database.rollback.writes, stamp(database.files.database)
