"""The HALT lock of a database, for programs that write to it on a replica: `pylitefs.halt(path)`.

    with pylitefs.halt("/litefs/app.db"):
        connection.execute("INSERT ...")

Whoever opens PATH-lock for writing gets the lock from the primary (the open waits for that, and for this node to have
all that the primary has), and gives it back with the last close. An OFD write lock on byte HALT_BYTE of the file then
lets one process, or one thread, of this machine write at a time: LiteFS's client libraries take the same lock. On the
primary both are free. Only the standard library is needed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import threading
import time
from collections.abc import Iterator

from pylitefs.errors import LitefsError

HALT_BYTE = 72
TIMEOUT_S = 10.0

_F_OFD_SETLK, _F_OFD_SETLKW = 37, 38
_FLOCK = struct.Struct("hhqqi4x")  # struct flock on 64-bit Linux: type, whence, start, len, pid
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.05

_REASONS = {
    errno.ENOENT: "there is no such database: give its path in the mount, and check that litefs is running",
    errno.EROFS: "this node may not write, and the primary gives the lock to nobody: see litefs status",
    errno.EAGAIN: "the primary cannot give it now: another node has it, or there is no primary: try again",
    errno.EBUSY: "another node has it, or a transaction on the primary takes long: try again",
    errno.ETIMEDOUT: "the primary did not answer in time, or this node is too far behind: see litefs status, try again",
    errno.EACCES: "no permission to write to the database: run it as another user, or change the file's mode",
    errno.EPERM: "no permission to write to the database: run it as another user, or change the file's mode",
    errno.EIO: "the node has failed: see its log",
    errno.ENOTCONN: "the mount is dead: start litefs",
    errno.ENOLCK: "the kernel is out of locks",
}


class HaltFailed(LitefsError):
    """The lock could not be taken. `errno` is what the system said, ETIMEDOUT after the caller's own time."""

    def __init__(self, path: str, number: int, reason: str = "") -> None:
        why = reason or _REASONS.get(number) or os.strerror(number).lower()
        super().__init__(f"cannot take the HALT lock of {path}: {why}")
        self.errno = number


class HaltLost(LitefsError):
    """The lock was lost, or the primary did not get everything in time: what was not certain may be missing there."""

    def __init__(self, path: str, number: int) -> None:
        super().__init__(
            f"the HALT lock of {path} was lost ({os.strerror(number).lower()}): commits with synchronous=NORMAL or OFF "
            "may be missing on the primary: see this node's log, and litefs lost"
        )
        self.errno = number


@contextlib.contextmanager
def halt(path: str | os.PathLike[str], timeout_s: float | None = TIMEOUT_S) -> Iterator[int]:
    """Hold the HALT lock of the database at `path`, a file in the mount, for the time of the block; gives the
    descriptor of its lock file. Blocks for at most `timeout_s`, None: as long as it takes. Raises HaltFailed.

    Commits of this node to that database go to the primary while it is held; those with synchronous=FULL return when
    the primary has them. At the end of the block it has all of them, or HaltLost is raised.
    """
    fd = take(os.fspath(path), timeout_s)
    try:
        yield fd
    except BaseException:
        with contextlib.suppress(OSError):
            release(fd)
        raise
    try:
        release(fd)
    except OSError as error:
        raise HaltLost(os.fspath(path), error.errno or errno.EIO) from None


def take(path: str, timeout_s: float | None) -> int:
    """Take the lock; the descriptor to give to `release`. Raises HaltFailed."""
    end_s = None if timeout_s is None else time.monotonic() + timeout_s
    try:
        fd = _open(f"{path}-lock", timeout_s)
        try:
            _lock(fd, end_s)
        except BaseException:
            os.close(fd)
            raise
    except _TooLate as late:
        raise HaltFailed(path, errno.ETIMEDOUT, f"{late} within {timeout_s:g} s") from None
    except OSError as error:
        raise HaltFailed(path, error.errno or errno.EIO) from None
    return fd


def release(fd: int) -> None:
    """Give it back: at once what other processes of this machine wait for, the primary's with the last close. OSError:
    the primary does not have everything."""
    try:
        with contextlib.suppress(OSError):  # the mount is gone, and the lock with it
            fcntl.fcntl(fd, _F_OFD_SETLK, _flock(fcntl.F_UNLCK))
    finally:
        os.close(fd)


class _TooLate(Exception):
    """The caller's time is over."""


def _open(path: str, timeout_s: float | None) -> int:
    """On a thread if there is a limit, because nothing else ends an open(2) early. What comes too late is closed."""
    if timeout_s is None:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    guard = threading.Lock()
    done = threading.Event()
    abandoned = False
    outcome: int | OSError = OSError(errno.ETIMEDOUT, "")

    def run() -> None:
        nonlocal outcome
        try:
            found: int | OSError = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            found = error
        with guard:
            if not abandoned:
                outcome = found
                done.set()
                return
        if isinstance(found, int):
            os.close(found)

    threading.Thread(target=run, name="litefs-halt", daemon=True).start()
    try:
        done.wait(timeout_s)
    except BaseException:  # Ctrl-C
        with guard:
            abandoned = True
            if isinstance(outcome, int):
                os.close(outcome)
        raise
    with guard:
        abandoned = not done.is_set()
    if abandoned:
        raise _TooLate("the primary has not given it")
    if isinstance(outcome, OSError):
        raise outcome
    return outcome


def _lock(fd: int, end_s: float | None) -> None:
    """The lock among the processes of this machine. The kernel's own waiting knows no limit: with one it is tried."""
    wanted = _flock(fcntl.F_WRLCK)
    if end_s is None:
        fcntl.fcntl(fd, _F_OFD_SETLKW, wanted)
        return
    pause_s = _FIRST_PAUSE_S
    while True:
        try:
            fcntl.fcntl(fd, _F_OFD_SETLK, wanted)
            return
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
        left_s = end_s - time.monotonic()
        if left_s <= 0:
            raise _TooLate("another process of this machine has not released it")
        time.sleep(min(pause_s, left_s))
        pause_s = min(pause_s * 1.5, _LONGEST_PAUSE_S)


def _flock(kind: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, HALT_BYTE, 1, 0)
