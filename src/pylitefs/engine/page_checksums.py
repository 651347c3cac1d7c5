"""The page-checksum table of one database: what each page's checksum is at the head of the log.

File `checksums`, a cache: it can always be computed anew from the database.

    offset  size  field (little-endian)
    0       8     magic "PLFSUMS1"
    8       4     page size in bytes
    12      4     commit: number of pages
    16      8     TXID of the position the table belongs to
    24      8     database checksum of that position
    32      1     clean: 1 only after an orderly stop
    40      32    database file and WAL as they were then: (size, mtime ns) each
    72      8     epoch of that position; 0 if unknown
    80      8     reserved, 0
    88      8     CRC-64 of bytes 0..88
    4096    8·n   page checksums, index pgno - 1; 0 for the lock page and for pages past `commit`

The table is mapped shared, so the kernel writes it back when it likes; after a crash it is worthless and
`clean` says so. XOR of all entries, bit 63 set, is the database checksum (LTX).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from dataclasses import dataclass

import numpy as np
from fastcrc import crc64
from numpy.typing import NDArray

from pylitefs.errors import FormatError
from pylitefs.formats.ltx.checksum import database_checksum
from pylitefs.formats.ltx.format import Position

MAGIC = b"PLFSUMS1"
DATA_OFFSET = 4096
_HEADER = struct.Struct("<8sIIQQB7xQQQQQ8x")
_CRC = struct.Struct("<Q")
assert _HEADER.size == 88

FileStamp = tuple[int, int]
"""(size in bytes, mtime in ns) of a file; (0, 0) if there is none."""


def stamp(path: str) -> FileStamp:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return (0, 0)
    return (status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class CleanState:
    """What an orderly stop leaves behind for the next start."""

    page_size: int
    commit: int
    position: Position
    clean: bool
    database: FileStamp = (0, 0)
    wal: FileStamp = (0, 0)

    def pack(self) -> bytes:
        body = _HEADER.pack(
            MAGIC, self.page_size, self.commit, self.position.txid, self.position.checksum, int(self.clean),
            *self.database, *self.wal, self.position.epoch,
        )  # fmt: skip
        return body + _CRC.pack(crc64.go_iso(body))

    @classmethod
    def unpack(cls, data: bytes) -> CleanState:
        """Raises FormatError for anything that `pack` did not write."""
        if len(data) < _HEADER.size + _CRC.size:
            raise FormatError("page-checksum table: header is truncated")
        body = data[: _HEADER.size]
        if _CRC.unpack_from(data, _HEADER.size)[0] != crc64.go_iso(body):
            raise FormatError("page-checksum table: header is damaged")
        magic, page_size, commit, txid, checksum, clean, *rest = _HEADER.unpack(body)
        if magic != MAGIC:
            raise FormatError("page-checksum table: wrong magic")
        return cls(
            page_size, commit, Position(txid, checksum, rest[4]), clean == 1, (rest[0], rest[1]), (rest[2], rest[3]),
        )  # fmt: skip


class PageChecksums:
    """The mapped table. Not thread-safe: its database's lock guards it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._map: mmap.mmap | None = None
        self.values: NDArray[np.uint64] = np.zeros(0, dtype=np.uint64)

    def read_state(self) -> CleanState | None:
        """What the last stop wrote; None if it is damaged, missing, or the table is shorter than it says."""
        try:
            state = CleanState.unpack(os.pread(self._fd, _HEADER.size + _CRC.size, 0))
        except FormatError:
            return None
        if os.fstat(self._fd).st_size < DATA_OFFSET + 8 * state.commit:
            return None
        return state

    def write_state(self, state: CleanState) -> None:
        """Write the header; for a clean one the table goes to the disk first, so that clean never lies."""
        if state.clean:
            if self._map is not None:
                self._map.flush()
            os.fsync(self._fd)
        os.pwrite(self._fd, state.pack(), 0)
        os.fsync(self._fd)

    def reserve(self, pages: int) -> None:
        """Make room for `pages` entries; new ones are 0. Raises OSError (no space); the table is then as before."""
        if pages <= len(self.values):
            return
        room = max(512, pages + pages // 4)
        length = DATA_OFFSET + 8 * room
        if os.fstat(self._fd).st_size < length:
            # Real blocks: a store into a hole of a full disk would be a SIGBUS instead of an error.
            os.posix_fallocate(self._fd, 0, length)
        new = mmap.mmap(self._fd, length)
        self._unmap()
        self._map = new
        self.values = np.frombuffer(new, dtype=np.uint64, offset=DATA_OFFSET)

    def reset(self) -> None:
        """All entries 0."""
        self._unmap()
        os.ftruncate(self._fd, DATA_OFFSET)

    def database_checksum(self, commit: int) -> int:
        self.reserve(commit)
        return database_checksum(self.values[:commit])

    def close(self) -> None:
        self._unmap()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _unmap(self) -> None:
        self.values = np.zeros(0, dtype=np.uint64)
        if self._map is not None:
            with contextlib.suppress(BufferError):  # somebody still looks at it: it goes when they do
                self._map.close()
            self._map = None
