"""The first 100 bytes of a SQLite database. All integers are big-endian.

    offset  size
     0      16   "SQLite format 3\\0"
    16       2   page size: a power of two, 512..32768, or 1 for 65536
    18       1   write version: 1 rollback journal, 2 WAL
    19       1   read version:  1 rollback journal, 2 WAL
    20       1   reserved bytes at the end of each page, at most page size - 480
    21       3   0x40 0x20 0x20
    24       4   file change counter
    28       4   size of the database in pages, valid only if 24 and 92 agree and it is not zero
    40       4   schema cookie
    92       4   the change counter for which 28 and 96 were written
    96       4   SQLITE_VERSION_NUMBER of the library that wrote it

An empty file is a valid empty database, but has no header. A torn write of page 1 cannot be seen here: the
header has no checksum; the journal or the WAL repairs it. In WAL mode the header in the file is only as new
as the last checkpoint.
Source: sqlite.org/fileformat2.html, section 1.3.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from pylitefs.errors import FormatError, TruncatedError

HEADER_SIZE = 100
MAGIC = b"SQLite format 3\0"
MIN_PAGE_SIZE = 512
MAX_PAGE_SIZE = 65536

_LAYOUT = struct.Struct(">16sHBBB3sII8xI48xII")
_LOCK_OFFSET = 0x40000000
_FRACTIONS = bytes((64, 32, 32))

Buffer = bytes | bytearray | memoryview

assert _LAYOUT.size == HEADER_SIZE
assert len(MAGIC) == 16


def valid_page_size(page_size: int) -> bool:
    """Whether SQLite can have pages of this many bytes: a power of two from 512 to 65536."""
    return MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE and page_size & (page_size - 1) == 0


def lock_page(page_size: int) -> int:
    """Page number of the page that holds the lock bytes and therefore never any data.

    Databases smaller than 1 GiB do not reach it.
    """
    return _LOCK_OFFSET // page_size + 1


def _page_size(stored: int) -> int:
    return MAX_PAGE_SIZE if stored == 1 else stored


def is_sqlite(prefix: Buffer) -> bool:
    """Whether a file that begins with `prefix` is a SQLite database.

    With less than 16 bytes: no. With 18 or more the page size must be valid too.
    """
    if bytes(prefix[:16]) != MAGIC:
        return False
    return len(prefix) < 18 or valid_page_size(_page_size(int.from_bytes(prefix[16:18], "big")))


@dataclass(frozen=True, slots=True)
class DatabaseHeader:
    """The fields of the header that matter to a replicator. `page_size` in bytes, `page_count` in pages."""

    page_size: int
    write_version: int
    read_version: int
    reserved: int
    change_counter: int
    page_count: int
    schema_cookie: int
    version_valid_for: int
    sqlite_version: int

    @classmethod
    def unpack(cls, data: Buffer) -> DatabaseHeader:
        """Decode the first HEADER_SIZE bytes of `data`.

        Raises TruncatedError if there are fewer, FormatError for a wrong magic, page size or version.
        """
        if len(data) < HEADER_SIZE:
            raise TruncatedError(f"a SQLite header has {HEADER_SIZE} bytes, not {len(data)}")
        magic, stored, write, read, reserved, fractions, *rest = _LAYOUT.unpack_from(data)
        if magic != MAGIC:
            raise FormatError('not a SQLite database: it does not begin with "SQLite format 3"')
        if fractions != _FRACTIONS:
            raise FormatError("not a SQLite database: bytes 21 to 23 are wrong")
        header = cls(_page_size(stored), write, read, reserved, *rest)
        header.validate()
        return header

    def validate(self) -> None:
        """Raise FormatError for values that SQLite itself refuses to open (btree.c, lockBtree)."""
        if not valid_page_size(self.page_size):
            raise FormatError(f"{self.page_size} is not a SQLite page size")
        if self.read_version > 2:
            raise FormatError(f"unknown SQLite file format {self.write_version}.{self.read_version}")
        if self.page_size - self.reserved < 480:
            raise FormatError(f"{self.reserved} reserved bytes leave less than 480 of a {self.page_size}-byte page")

    @property
    def is_wal(self) -> bool:
        """Whether the file is marked for WAL mode; a -wal file need not exist."""
        return self.write_version == 2 or self.read_version == 2

    @property
    def journal_mode(self) -> str:
        """"wal" or "rollback"; which rollback mode is the connection's affair and not stored."""
        return "wal" if self.is_wal else "rollback"

    @property
    def page_count_valid(self) -> bool:
        """Whether `page_count` may be believed; otherwise the size of the file tells."""
        return self.change_counter == self.version_valid_for and self.page_count > 0
