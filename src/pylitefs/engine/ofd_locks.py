"""Open-file-description locks on SQLite's lock bytes.

An OFD lock belongs to the open file, not to the process: closing another descriptor of the same file
does not drop it (the trap of POSIX locks), and it conflicts with the POSIX locks that SQLite takes,
inside one process too. Taken on a file of the mount it meets the applications' locks, because the
kernel keeps the locks of a FUSE file itself when the server does not ask for them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from pylitefs.formats.sqlite.locks import PENDING, SHARED_FIRST, SHARED_SIZE

F_OFD_GETLK, F_OFD_SETLK = 36, 37
_FLOCK = struct.Struct("hhqqi4x")  # struct flock on 64-bit Linux: type, whence, start, len, pid


def _call(fd: int, command: int, kind: int, start: int, length: int) -> bytes:
    return fcntl.fcntl(fd, command, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))


def try_lock(fd: int, start: int, length: int = 1, *, exclusive: bool) -> bool:
    """Take a lock now or not at all. The descriptor must be open for reading (shared) or writing (exclusive)."""
    try:
        _call(fd, F_OFD_SETLK, fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK, start, length)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def lock_shared(database: int) -> bool:
    """SHARED of the database file as SQLite takes it: PENDING first, so that a waiting writer is not starved."""
    if not try_lock(database, PENDING, exclusive=False):
        return False
    try:
        return try_lock(database, SHARED_FIRST, SHARED_SIZE, exclusive=False)
    finally:
        unlock(database, PENDING)


def lock_exclusive(database: int) -> bool:
    """EXCLUSIVE of the database file, by who holds SHARED: alone on it. False: somebody else reads or writes it; SHARED
    is still held then."""
    if not try_lock(database, PENDING, exclusive=True):
        return False
    if try_lock(database, SHARED_FIRST, SHARED_SIZE, exclusive=True):
        return True
    unlock(database, PENDING)
    return False


def unlock(fd: int, start: int, length: int = 1) -> None:
    _call(fd, F_OFD_SETLK, fcntl.F_UNLCK, start, length)


def write_locked(fd: int, start: int, length: int = 1) -> int | None:
    """Who holds an exclusive lock within the range: the process id (-1 for an OFD lock), None if nobody.

    Asks only, takes nothing; sends no request to the FUSE server, so even a FUSE thread may call it.
    """
    kind, _, _, _, pid = _FLOCK.unpack(_call(fd, F_OFD_GETLK, fcntl.F_RDLCK, start, length))
    return None if kind == fcntl.F_UNLCK else int(pid)


def any_locked(fd: int, start: int, length: int = 1) -> bool:
    """Whether anybody else holds a lock of either kind within the range."""
    kind, *_ = _FLOCK.unpack(_call(fd, F_OFD_GETLK, fcntl.F_WRLCK, start, length))
    return bool(kind != fcntl.F_UNLCK)
