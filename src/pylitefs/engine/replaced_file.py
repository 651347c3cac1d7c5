"""A replica's database file that another one takes the place of, or that is dropped, while applications have it open.

Who reads it in WAL mode has its own -wal and -shm too, and reads a snapshot that it holds to its end. Its next
transaction fails (SQLITE_CANTOPEN), because the old wal-index gets a version that SQLite does not know: else it would
read the old state for ever, with nobody to tell it, or commit to files that have no name. Who has the file open and
holds no lock would look for a -wal by name at its next transaction, find the one of the new file, and take pages of two
databases for one; and the last one to close an old -wal would remove the new one's name. So PENDING is held on the old
file for as long as anybody has it open: nobody begins to read it (SQLITE_BUSY), and nobody gets it to himself. All of
them have to open the database anew.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from pylitefs.engine import ofd_locks
from pylitefs.engine.database import Database
from pylitefs.engine.opener import Opener
from pylitefs.errors import DatabaseBusy
from pylitefs.formats.sqlite.locks import PENDING
from pylitefs.ports import FileKind


@contextlib.contextmanager
def locked_out(database: Database, opener: Opener) -> Iterator[list[int]]:
    """The file loses its name within, and its wal-index is to be retired there: a descriptor of it, if there is one. If
    it raises, everything is as before. The caller may resolve names of the mount. Raises DatabaseBusy, OSError."""
    try:
        fd = os.open(database.files.live(FileKind.DATABASE), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield []
        return
    fds = [fd]
    try:
        with contextlib.suppress(FileNotFoundError):  # nobody reads it in WAL mode
            fds.append(os.open(database.files.live(FileKind.SHM), os.O_RDWR | os.O_CLOEXEC))
        if not ofd_locks.try_lock(fd, PENDING, exclusive=True):
            raise DatabaseBusy(f"{database.name}: somebody is about to write to the file that is to be replaced")
        yield fds[1:]
    except BaseException:
        opener.close(fds)
        raise
    opener.close(fds[1:])
    database.locked_out.append(fd)


def let_go(database: Database, opener: Opener | None) -> None:
    """Nobody has it open any more, or (without an opener) the mount goes."""
    fds, database.locked_out = database.locked_out, []
    if opener is not None and fds:
        opener.close(fds)
    elif opener is None:
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)
