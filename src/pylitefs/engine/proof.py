"""What proves that it was the disk that changed a page, and not an application; and being alone with a file.

Applications can write a database file in ways that nobody tells us of: through a mount of the one file in a container,
through the data directory, in place, by a copy over it. So a page that is not what was logged is damage only where

1. it was read, and right, at a time at which nobody had the file open for writing (a read lease is granted then, see
   fcntl(2): also nobody had it mapped, and no write was under way), and no WAL or journal stood beside it;
2. the file has not been written since: every write begins by setting its change time (ctime), which nobody can set
   back, and whoever opened it later cannot write without that;
3. and it should be what it was then: no transaction has changed that page.

Anything else is taken for what an application wrote, and recorded (`snapshot`). To put a page in its place one must be
alone with the file: a write lease, which is granted only if nobody else has it open, and lets nobody open it meanwhile.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylitefs.engine.files import DatabaseFiles
from pylitefs.engine.page_checksums import stamp
from pylitefs.engine.rollback_capture import journal_in_use
from pylitefs.errors import Unavailable

TICK_S = 0.1
"""Two changes of a file within the clock's resolution (10 ms at most) may have one time."""

_F_SETSIG = 10  # Linux


@dataclass(frozen=True)
class FileState:
    """Which file it is, and when it was last changed, in ns. Two that are equal: nothing was written in between."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int


def state_of(fd: int) -> FileState:
    found = os.fstat(fd)
    return FileState(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


class SoundPages:
    """Pages that were read right in one state of a database file. Of one database; any thread."""

    def __init__(self, files: DatabaseFiles) -> None:
        self._files = files
        self._found: tuple[FileState, NDArray[np.uint64]] | None = None  # checksums by page, 0: not read

    def begin(self) -> FileState | None:
        """The state of the file, if from now on every write to it can be told by `note` and `proves`."""
        with contextlib.suppress(OSError), open(self._files.database, "rb", buffering=0) as file:
            if not self._stands_alone() or not _lease(file.fileno(), fcntl.F_RDLCK):
                return None
            _lease(file.fileno(), fcntl.F_UNLCK)
            state = state_of(file.fileno())
            if time.time_ns() - state.ctime_ns > TICK_S * 1e9:
                return state
        return None

    def note(self, state: FileState, first: int, sums: NDArray[np.uint64]) -> None:
        """The pages from `first` on were read since `begin` has returned `state`, and had these checksums (0: it is not
        known), as they should."""
        if not self._stands_alone() or state != self._state():
            return
        before, known = self._found or (None, np.zeros(0, dtype=np.uint64))
        if before != state:
            known = np.zeros(0, dtype=np.uint64)
        end = first - 1 + len(sums)
        if len(known) < end:
            known = np.concatenate([known, np.zeros(end - len(known), dtype=np.uint64)])
        part = known[first - 1 : end]
        known[first - 1 : end] = np.where(sums != 0, sums, part)
        self._found = state, known

    def proves(self, pgno: int, wanted: int) -> bool:
        """Whether this page, which is not what it should be (its checksum is not `wanted`), was changed by the disk."""
        if self._found is None:
            return False
        state, sums = self._found
        return pgno <= len(sums) and int(sums[pgno - 1]) == wanted != 0 and state == self._state()

    def _state(self) -> FileState | None:
        try:
            with open(self._files.database, "rb", buffering=0) as file:
                return state_of(file.fileno())
        except OSError:
            return None

    def _stands_alone(self) -> bool:
        return stands_alone(self._files)


def stands_alone(files: DatabaseFiles) -> bool:
    """Whether the database file is all there is: no WAL with anything in it, and no journal that counts."""
    return stamp(files.wal)[0] == 0 and not journal_in_use(files.journal)


@contextlib.contextmanager
def alone_with(path: str) -> Iterator[int]:
    """A descriptor for reading and writing of a file that nobody else has open; who opens it waits until the end
    (`lease-break-time` at most, 45 s). Unavailable, if somebody has. Raises OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if not _lease(fd, fcntl.F_WRLCK):
            raise Unavailable("a process has it open")
        yield fd
        _lease(fd, fcntl.F_UNLCK)
    finally:
        os.close(fd)  # which ends the lease


def still_alone(fd: int) -> bool:
    """Whether the lease of `alone_with` has not been taken away. It is given back by its holder, or after its time."""
    return fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_WRLCK


def _lease(fd: int, kind: int) -> bool:
    """False: somebody has the file open, or it cannot be told on this file system. Who opens it later makes the kernel
    signal us: by one that does nothing, the default would end the process."""
    try:
        if kind != fcntl.F_UNLCK:
            fcntl.fcntl(fd, _F_SETSIG, int(signal.SIGURG))
        fcntl.fcntl(fd, fcntl.F_SETLEASE, kind)
        return True
    except OSError:
        return False


def is_alone(fd: int) -> bool | None:
    """Whether nobody else has the file open at this moment; None if that cannot be told."""
    fcntl.fcntl(fd, _F_SETSIG, int(signal.SIGURG))
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except BlockingIOError:
        return False
    except OSError:
        return None
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return True


class Damage:
    """The part of a `Database` that keeps which of its pages the disk has changed."""

    damage: dict[int, int]  # pages that do not match their checksums, not replaced yet: what they have
    was_measured: bool

    def emit(self, kind: str, **data: object) -> None:
        raise NotImplementedError

    def note_damage(self, reason: str, pages: Mapping[int, int]) -> None:
        """These pages have other checksums than they should. Any thread."""
        if any(pgno not in self.damage for pgno in pages):
            self.damage, self.was_measured = {**self.damage, **pages}, False
            self.emit("damaged", reason=reason, pages=len(pages))

    def note_healed(self, pgnos: Iterable[int], source: str) -> None:
        """These are what they should be again. Any thread."""
        healed = self.damage.keys() & set(pgnos)
        if healed:
            self.damage = {pgno: found for pgno, found in self.damage.items() if pgno not in healed}
            self.emit("healed", pages=len(healed), source=source)
