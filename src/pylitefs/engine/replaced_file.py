"""A replica's database file that another one takes the place of, or that is dropped, while applications have it open.

Who reads it in WAL mode has its own -wal and -shm too, and reads on in its snapshot. But who has it open and holds no
lock would look for a -wal by name at its next transaction, find the one of the new file, and take pages of two
databases for one; and the last one to close an old -wal would remove the new one's name. So PENDING is held on the old
file for as long as anybody has it open: nobody begins to read it, and nobody gets it to himself. To an application that
is SQLITE_BUSY, until it opens the database anew.
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
def locked_out(database: Database, opener: Opener) -> Iterator[None]:
    """The file loses its name within. If that raises, everything is as before. The caller may resolve names of the
    mount. Raises DatabaseBusy, OSError."""
    try:
        fd = os.open(database.files.live(FileKind.DATABASE), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield
        return
    try:
        if not ofd_locks.try_lock(fd, PENDING, exclusive=True):
            raise DatabaseBusy(f"{database.name}: somebody is about to write to the file that is to be replaced")
        yield
    except BaseException:
        opener.close([fd])
        raise
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
