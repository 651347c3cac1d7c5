"""What is committed in a WAL, seen from beside the application, without any lock.

Two ways to know it:
- The wal-index header in -shm says it (frames 1..mx_frame under these salts); the page numbers are there too.
- Where there is no -shm (`locking_mode=EXCLUSIVE` keeps the wal-index in the application's heap, or nobody has
  the database open), or one that nobody uses (its processes were killed), the frames themselves say it: salts,
  checksum chain, commit field. They may say too much: a commit whose fsync failed was taken back by the application,
  which writes its next frames over it. So the newest transaction is looked at again each time (`rewound`).

Stability (seqlock): SQLite writes new salts into the WAL's header before it overwrites any frame. So frames that
were read while the header kept its salts are the committed ones.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pylitefs.engine import ofd_locks
from pylitefs.engine.files import DatabaseFiles, read_at
from pylitefs.engine.transaction import UnstableSource
from pylitefs.errors import FormatError
from pylitefs.formats.sqlite.locks import DMS
from pylitefs.formats.sqlite.wal import (
    FRAME_HEADER_SIZE,
    WAL_HEADER_SIZE,
    WalHeader,
    frame_offset,
    page_offset,
    scan_frames,
)
from pylitefs.formats.sqlite.wal_index import (
    CHECKPOINT_INFO_OFFSET,
    HEADER_COPY_SIZE,
    HEADER_SIZE,
    CheckpointInfo,
    pgno_locations,
    read_header,
)
from pylitefs.ports import FileKind

_RUN_FRAMES = 64
_READ_BYTES = 1 << 18
_READ_GAP = 16  # frames between two wanted ones that are read along
_SCAN_FRAMES = 256
_TORN_RETRIES = 50


@dataclass(frozen=True, slots=True)
class Committed:
    """A committed prefix of the WAL: frames 1..mx_frame under `salts`, which make the database `commit` pages.

    `change` is SQLite's commit counter (iChange, 32 bits, wraps); None if there is no wal-index.
    (s0, s1) is the checksum of frame mx_frame.
    """

    salts: tuple[int, int]
    page_size: int
    mx_frame: int
    commit: int
    change: int | None
    s0: int = 0
    s1: int = 0


NOTHING = Committed((0, 0), 0, 0, 0, None)


class WalView:
    """Read access to the WAL, its index and the database file. Used by one thread at a time."""

    def __init__(self, files: DatabaseFiles, in_use: Callable[[], bool] | None = None) -> None:
        """`in_use` tells whether a process uses the -shm that is there (without it: `index_in_use` of `use_shm`'s)."""
        self._files = files
        self._in_use = in_use or (lambda: index_in_use(self._mount_shm))
        self._fds: dict[FileKind, int] = {}
        self._mount_shm = -1
        self._indexed = False  # where the last `committed` had it from
        self._scanned = NOTHING  # how far frames were checked where there is no wal-index
        self._scanned_pgnos: NDArray[np.uint32] = np.zeros(0, dtype=np.uint32)
        self._newest = (0, b"")  # first frame of the newest transaction of these, and that frame's header
        self.rewound = False  # what `committed` said was overwritten by the application; stays until it is set back
        self.torn = False  # the wal-index was damaged: the next process makes it anew; stays until it is set back

    def close(self) -> None:
        for fd in self._fds.values():
            with contextlib.suppress(OSError):
                os.close(fd)
        self._fds.clear()

    def forget(self, kind: FileKind) -> None:
        """The file was removed or created anew: open it again when it is needed."""
        fd = self._fds.pop(kind, None)
        if fd is not None:
            os.close(fd)

    def use_shm(self, fd: int) -> None:
        """A descriptor of the mount's -shm, or -1. Without passthrough only the mount shows its current bytes."""
        self._mount_shm = fd

    def _fd(self, kind: FileKind) -> int | None:
        if kind is FileKind.SHM and not self._files.reads_shm_directly:
            return self._mount_shm if self._mount_shm >= 0 else None
        fd = self._fds.get(kind)
        if fd is None:
            path = self._files.backing(kind)
            try:
                fd = self._fds[kind] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
        return fd

    # -- what is committed -----------------------------------------------------------------------------------

    def committed(self) -> Committed | None:
        """The newest committed prefix; None if there is no WAL, or nobody can tell at this moment."""
        self._drop_orphans()
        shm = self._fd(FileKind.SHM)
        self._indexed = shm is not None and self._in_use()
        if shm is None or not self._indexed:
            return self._scan()
        for _ in range(_TORN_RETRIES):
            data = os.pread(shm, HEADER_SIZE, 0)
            header = read_header(data)
            if header is not None:
                if header.mx_frame and self._fd(FileKind.WAL) is None:
                    return None  # left behind by one that is gone
                return Committed(
                    header.salts, header.page_size, header.mx_frame, header.page_count, header.change,
                    *header.frame_checksum,
                )  # fmt: skip
            if len(data) < HEADER_SIZE or not any(data[:96]):
                return None  # not initialised yet
            time.sleep(0.00005)
        self.torn = True
        return None

    def glance(self) -> tuple[int, bytes | None] | None:
        """A descriptor of the wal-index, and the first copy of its header, which changes with every commit; None in its
        place if there is no index in use; None if there is no WAL either."""
        shm = self._fd(FileKind.SHM)
        if shm is not None and self._in_use():
            return shm, os.pread(shm, HEADER_COPY_SIZE, 0)
        return None if self._fd(FileKind.WAL) is None else (-1, None)

    def left_index(self) -> Committed | None:
        """What a wal-index says that nobody uses any more, if it is sound."""
        shm = self._fd(FileKind.SHM)
        header = read_header(os.pread(shm, HEADER_SIZE, 0)) if shm is not None else None
        if header is None:
            return None
        found = header.salts, header.page_size, header.mx_frame, header.page_count
        return Committed(*found, None, *header.frame_checksum)

    def _drop_orphans(self) -> None:
        """A file that has no name any more is not the database's: its name may be another file's by now."""
        for kind in (FileKind.WAL, FileKind.SHM):
            fd = self._fds.get(kind)
            if fd is not None and os.fstat(fd).st_nlink == 0:
                self.forget(kind)

    def checkpoint_info(self) -> CheckpointInfo | None:
        shm = self._fd(FileKind.SHM)
        if shm is None:
            return None
        try:
            return CheckpointInfo.unpack(os.pread(shm, HEADER_SIZE, 0)[CHECKPOINT_INFO_OFFSET:])
        except FormatError:
            return None

    def has_index(self) -> bool:
        return self._fd(FileKind.SHM) is not None and self._in_use()

    def index_is_hidden(self) -> bool:
        """Whether there is a -shm that only the mount shows, and it is not open there yet: what is whole in the WAL
        need not be published, and what is not can still be taken back."""
        return not self._files.reads_shm_directly and self._mount_shm < 0 and os.path.exists(self._files.shm)

    def wal_header(self) -> WalHeader | None:
        wal = self._fd(FileKind.WAL)
        if wal is None:
            return None
        try:
            return WalHeader.unpack(os.pread(wal, WAL_HEADER_SIZE, 0))
        except FormatError:
            return None

    def salts_are(self, salts: tuple[int, int]) -> bool:
        """Whether the WAL still holds the generation with these salts (see "Stability" above)."""
        header = self.wal_header()
        return header is not None and header.salts == salts

    def _scan(self) -> Committed | None:
        header = self.wal_header()
        if header is None:
            return None
        done = self._scanned
        if done.salts == header.salts and done.page_size == header.page_size and not self._newest_stands(header):
            if self.wal_header() != header:
                return None  # a restart, just now
            self.rewound, done = True, NOTHING
        if done.salts != header.salts or done.page_size != header.page_size:
            self._scanned = Committed(
                header.salts, header.page_size, 0, 0, None, header.checksum1, header.checksum2
            )
            self._scanned_pgnos, self._newest = np.zeros(0, dtype=np.uint32), (0, b"")
        self._scan_on(header)
        return self._scanned

    def _newest_stands(self, header: WalHeader) -> bool:
        """Whether the newest transaction was not overwritten. Only that one can be: when a later one begins, the
        application has accepted it."""
        frame, head = self._newest
        wal = self._fd(FileKind.WAL)
        if not frame or wal is None:
            return True
        return os.pread(wal, FRAME_HEADER_SIZE, frame_offset(frame, header.page_size)) == head

    def _scan_on(self, header: WalHeader) -> None:
        """Check the frames after the scanned prefix; the prefix grows by whole transactions."""
        wal = self._fd(FileKind.WAL)
        if wal is None:
            return
        done, size = self._scanned, header.frame_size
        s0, s1, frame = done.s0, done.s1, done.mx_frame
        pending: list[NDArray[np.uint32]] = []
        first, head = frame + 1, b""  # of the transaction that is being read
        while True:
            run = os.pread(wal, size * _SCAN_FRAMES, frame_offset(frame + 1, header.page_size))
            scan = scan_frames(header, run, s0, s1)
            pending.append(scan.pgnos)
            head = head or run[:FRAME_HEADER_SIZE]
            if scan.committed:
                known = np.concatenate([self._scanned_pgnos, *pending])
                self._scanned_pgnos = known[: frame + scan.committed]
                pending = [known[frame + scan.committed :]]
                done = replace(
                    done, mx_frame=frame + scan.committed, commit=int(scan.commits[scan.committed - 1]),
                    s0=scan.committed_s0, s1=scan.committed_s1,
                )  # fmt: skip
                ends = np.flatnonzero(scan.commits)
                if len(ends) > 1:
                    begin = int(ends[-2]) + 1
                    first, head = frame + begin + 1, run[begin * size : begin * size + FRAME_HEADER_SIZE]
                self._newest = first, head
                begin = scan.committed
                first, head = frame + begin + 1, run[begin * size : begin * size + FRAME_HEADER_SIZE]
            frame += scan.count
            s0, s1 = scan.s0, scan.s1
            if scan.count < _SCAN_FRAMES:
                break
        self._scanned = done

    # -- pages -----------------------------------------------------------------------------------------------

    def pgnos(self, first: int, last: int) -> NDArray[np.uint32]:
        """Page numbers of committed frames first..last, from where the last `committed` looked: a wal-index that was
        made since may not be filled yet."""
        if not self._indexed:
            return self._scanned_pgnos[first - 1 : last]
        shm = self._fd(FileKind.SHM)
        if shm is None:
            raise UnstableSource
        parts = []
        for offset, count in pgno_locations(first, last):
            data = os.pread(shm, 4 * count, offset)
            if len(data) != 4 * count:
                raise UnstableSource
            parts.append(np.frombuffer(data, dtype=np.uint32))
        found = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if not found.all():
            raise UnstableSource  # not the index of these frames
        return found

    def commit_count(self, first: int, last: int, page_size: int) -> int:
        """How many of the frames first..last end a transaction."""
        wal = self._fd(FileKind.WAL)
        if wal is None:
            raise UnstableSource
        size, count, frame = page_size + FRAME_HEADER_SIZE, 0, first
        while frame <= last:
            run = min(_SCAN_FRAMES, last - frame + 1)
            data = os.pread(wal, size * run, frame_offset(frame, page_size))
            if len(data) != size * run:
                raise UnstableSource
            words = np.frombuffer(data, dtype=">u4").reshape(run, size // 4)
            count += int(np.count_nonzero(words[:, 1]))
            frame += run
        return count

    def frame_exists(self, frame: int, page_size: int, salts: tuple[int, int]) -> bool:
        """Whether a frame with these salts stands at a place in the WAL."""
        return self.frame_head(frame, page_size)[8:16] == b"".join(salt.to_bytes(4, "big") for salt in salts)

    def frame_head(self, frame: int, page_size: int) -> bytes:
        """The header of a frame as it stands there; less if the WAL ends before."""
        wal = self._fd(FileKind.WAL)
        return b"" if wal is None else os.pread(wal, FRAME_HEADER_SIZE, frame_offset(frame, page_size))

    def raw_frames(self, first: int, count: int, page_size: int) -> bytes:
        """Up to `count` frames as they stand there, whatever they are."""
        wal = self._fd(FileKind.WAL)
        size = (page_size + FRAME_HEADER_SIZE) * count
        return b"" if wal is None else os.pread(wal, size, frame_offset(first, page_size))

    def frame_pages(
        self, pgnos: NDArray[np.uint32], frames: NDArray[np.uint32], page_size: int
    ) -> Iterator[tuple[int, bytes]]:
        """(pgno, page) for each, in the given order; frames that lie in a row are read at once."""
        wal = self._fd(FileKind.WAL)
        if wal is None:
            raise UnstableSource
        numbers, at, total = frames.tolist(), 0, len(frames)
        wanted = pgnos.tolist()
        size = page_size + FRAME_HEADER_SIZE
        while at < total:
            end = at + 1
            while end < total and numbers[end] == numbers[end - 1] + 1 and end - at < _RUN_FRAMES:
                end += 1
            if end == at + 1:
                page = os.pread(wal, page_size, page_offset(numbers[at], page_size))
                if len(page) != page_size:
                    raise UnstableSource
                yield wanted[at], page
            else:
                data = os.pread(wal, size * (end - at), frame_offset(numbers[at], page_size))
                if len(data) != size * (end - at):
                    raise UnstableSource
                for index in range(end - at):
                    start = index * size + FRAME_HEADER_SIZE
                    yield wanted[at + index], data[start : start + page_size]
            at = end

    def read_frames(self, pgnos: NDArray[np.uint32], frames: NDArray[np.uint32], page_size: int) -> dict[int, bytes]:
        """The pages of these frames by page number."""
        wal = self._fd(FileKind.WAL)
        if wal is None:
            raise UnstableSource
        return read_frames(wal, pgnos, frames, page_size)

    def database_page(self, pgno: int, page_size: int) -> bytes:
        """A page of the database file itself; zeros past its end."""
        database = self._fd(FileKind.DATABASE)
        if database is None:
            raise UnstableSource
        return read_at(database, page_size, (pgno - 1) * page_size)

    def database_run(self, pgno: int, count: int, page_size: int) -> bytes:
        """`count` pages of the database file in a row."""
        database = self._fd(FileKind.DATABASE)
        if database is None:
            raise UnstableSource
        return read_at(database, page_size * count, (pgno - 1) * page_size)

    def database_header(self) -> tuple[bytes, int]:
        """The first 100 bytes of the database file, and its size."""
        database = self._fd(FileKind.DATABASE)
        return (b"", 0) if database is None else (os.pread(database, 100, 0), os.fstat(database).st_size)


def index_in_use(shm: int) -> bool:
    """Whether a process uses the -shm (a descriptor of the mount's; -1: True, as it cannot be known). Asks the kernel
    only. SQLite leaves the file behind when it is killed, and goes on without it in `locking_mode=EXCLUSIVE`."""
    try:
        return shm < 0 or ofd_locks.any_locked(shm, DMS)
    except OSError:
        return True


def read_frames(
    wal: int, pgnos: NDArray[np.uint32], frames: NDArray[np.uint32], page_size: int
) -> dict[int, bytes]:
    """The pages of these frames of a WAL by page number, read in few large pieces: each call of pread lets go of the
    interpreter, and getting it back takes longer than the copy. The pieces go through one buffer, because memory that
    is new to the process costs twice as much as the copy. UnstableSource if a frame is not there."""
    order = np.argsort(frames)
    numbers, wanted = frames[order].tolist(), pgnos[order].tolist()
    size, at, total = page_size + FRAME_HEADER_SIZE, 0, len(numbers)
    span = max(1, _READ_BYTES // size)
    buffer = memoryview(bytearray(min(span, numbers[-1] - numbers[0] + 1) * size if total else 0))
    found: dict[int, bytes] = {}
    while at < total:
        first, end = numbers[at], at + 1
        while end < total and numbers[end] - first < span and numbers[end] - numbers[end - 1] <= _READ_GAP:
            end += 1
        length = size * (numbers[end - 1] - first + 1)
        if os.preadv(wal, [buffer[:length]], frame_offset(first, page_size)) != length:
            raise UnstableSource
        start = FRAME_HEADER_SIZE - first * size
        for index in range(at, end):
            place = start + numbers[index] * size
            found[wanted[index]] = bytes(buffer[place : place + page_size])
        at = end
    return found
