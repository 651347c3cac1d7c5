"""SQLite's rollback journal: NAME-journal, the pages as they were before a transaction. Integers are big-endian.

The file is a row of segments; each begins at a multiple of the sector size with a header that fills a sector:

    offset  size
     0       8   magic d9 d5 05 f9 20 a1 63 d7
     8       4   number of records in this segment; 0xffffffff: as many as fit into the file
    12       4   nonce, added to the checksum of each record
    16       4   size of the database in pages before the transaction
    20       4   sector size in bytes, a power of two from 32 to 65536     } read in the first
    24       4   page size in bytes; 0 in very old journals: the database's} segment only

and goes on with records of one page each:

     0       4   page number
     4       n   page
     4+n     4   nonce + the bytes at n-200, n-400, ... while positive (mod 2**32)

Last, if the transaction spans several databases, a trailer names the super-journal:

     0       4   page number of the lock page, which no record can have
     4       n   name in UTF-8
     4+n     4   n
     8+n     4   sum of the name's bytes as signed 8-bit integers
    12+n     8   magic

Commit is what makes the journal disappear: unlink, truncation to 0 bytes, or 28 zero bytes over the first header.
With synchronous on, magic and count are zero until the records were synced, so a header with magic has its
records. With synchronous off both are there from the start and the count is 0xffffffff. Playback of a hot
journal cuts the database to its old size and writes back the records in order, up to the first that is short,
has a wrong checksum, or has page number 0 or that of the lock page. Pages behind the old size are passed over.
If the named super-journal does not exist, the transaction was committed and the journal is not played back.
Source: sqlite.org/fileformat2.html, section 3; pager.c (readJournalHdr, pager_playback, readSuperJournal).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from pylitefs.errors import FormatError, TruncatedError
from pylitefs.formats.sqlite.header import Buffer, lock_page, valid_page_size

MAGIC = bytes.fromhex("d9d505f920a163d7")
JOURNAL_HEADER_SIZE = 28
COUNT_FROM_SIZE = 0xFFFFFFFF
MIN_SECTOR_SIZE = 32
MAX_SECTOR_SIZE = 65536
# unixVfs.mxPathname: SQLite takes a longer name for none.
MAX_SUPER_NAME = 512

_HEADER = struct.Struct(">8s5I")
_U32 = struct.Struct(">I")
_TRAILER = struct.Struct(">II8s")
_RECORD_EXTRA = 8
_CHECKSUM_STRIDE = 200
_BATCH_BYTES = 1 << 18

assert _HEADER.size == JOURNAL_HEADER_SIZE
assert len(MAGIC) == 8

Read = Callable[[int, int], Buffer]
"""(offset, n) -> n bytes of the file from there, fewer only at its end."""


@dataclass(frozen=True, slots=True)
class JournalHeader:
    """The header of a segment. `page_size` is 0 in journals from before SQLite 3.5.8."""

    record_count: int
    nonce: int
    initial_pages: int
    sector_size: int
    page_size: int

    def pack(self) -> bytes:
        """JOURNAL_HEADER_SIZE bytes; zeros follow up to the sector size."""
        return _HEADER.pack(
            MAGIC, self.record_count, self.nonce, self.initial_pages, self.sector_size, self.page_size
        )

    @classmethod
    def unpack(cls, data: Buffer) -> JournalHeader:
        """Decode the header of a file. TruncatedError; FormatError for a wrong magic, sector or page size."""
        header = cls._unpack_any(data)
        if header.page_size and not valid_page_size(header.page_size):
            raise FormatError(f"{header.page_size} is not a SQLite page size")
        sector = header.sector_size
        if not MIN_SECTOR_SIZE <= sector <= MAX_SECTOR_SIZE or sector & (sector - 1):
            raise FormatError(f"{sector} is not a sector size of a rollback journal")
        return header

    @classmethod
    def _unpack_any(cls, data: Buffer) -> JournalHeader:
        """Decode the header of any segment; the sizes in a later one are not looked at, as in readJournalHdr."""
        if len(data) < JOURNAL_HEADER_SIZE:
            raise TruncatedError(f"a journal header has {JOURNAL_HEADER_SIZE} bytes, not {len(data)}")
        magic, count, nonce, pages, sector, page_size = _HEADER.unpack_from(data)
        if magic != MAGIC:
            raise FormatError("not a rollback journal: it does not begin with its magic bytes")
        return cls(count, nonce, pages, sector, page_size)


def is_hot_header(prefix: Buffer) -> bool:
    """Whether a journal that begins with these 28 bytes could be rolled back: its header is written and synced.

    Hot it is only if no connection holds RESERVED and its super-journal, if it names one, exists.
    """
    return len(prefix) >= JOURNAL_HEADER_SIZE and bytes(prefix[:8]) == MAGIC


def nonce(prefix: Buffer) -> int | None:
    """The nonce of the transaction that wrote these 28 bytes, or None if they are fewer or all zero.

    It is random for each transaction and there before the magic is.
    """
    head = bytes(prefix[:JOURNAL_HEADER_SIZE])
    if len(head) < JOURNAL_HEADER_SIZE or not any(head):
        return None
    return int(_U32.unpack_from(head, 12)[0])


def page_checksum(page: Buffer, start: int) -> int:
    """The checksum of a record with this page; `start` is the segment's nonce."""
    return (start + sum(page[len(page) - _CHECKSUM_STRIDE : 0 : -_CHECKSUM_STRIDE])) & 0xFFFFFFFF


def read_super_journal_name(read: Read, size: int) -> str | None:
    """The path of the super-journal that a journal of `size` bytes ends with, or None.

    Bytes that are not UTF-8 come as surrogates, as in file names elsewhere in Python. A damaged trailer is none,
    which means: roll back.
    """
    if size < _TRAILER.size:
        return None
    tail = read(size - _TRAILER.size, _TRAILER.size)
    if len(tail) < _TRAILER.size:
        return None
    length, checksum, magic = _TRAILER.unpack(tail)
    if magic != MAGIC or not 0 < length <= min(MAX_SUPER_NAME, size - _TRAILER.size):
        return None
    name = bytes(read(size - _TRAILER.size - length, length))
    # C's char is signed on x86 and unsigned on ARM, and the sum is over chars.
    unsigned = sum(name)
    signed = unsigned - 256 * sum(byte > 127 for byte in name)
    if len(name) < length or checksum not in (unsigned & 0xFFFFFFFF, signed & 0xFFFFFFFF):
        return None
    return name.split(b"\0")[0].decode("utf-8", "surrogateescape") or None


@dataclass(frozen=True, slots=True)
class Rollback:
    """How to undo a transaction: make the database `initial_pages` long, then write each (pgno, page) as it comes.

    Iterating reads the journal, some hundred KiB at a time, and may be repeated. A page number comes once in a
    journal that SQLite wrote; if it came twice the later one counts, as in pager_playback.
    """

    header: JournalHeader
    read: Read
    size: int

    @property
    def initial_pages(self) -> int:
        return self.header.initial_pages

    @property
    def page_size(self) -> int:
        return self.header.page_size

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        sector, record = self.header.sector_size, self.page_size + _RECORD_EXTRA
        forbidden = lock_page(self.page_size)
        offset = 0
        while offset + sector <= self.size:
            try:
                segment = JournalHeader._unpack_any(self.read(offset, JOURNAL_HEADER_SIZE))
            except FormatError:
                return
            offset += sector
            count = segment.record_count
            if count == COUNT_FROM_SIZE:
                count = (self.size - sector) // record
            end = offset + count * record
            while offset < end:
                batch = min(end - offset, max(1, _BATCH_BYTES // record) * record)
                data = bytes(self.read(offset, batch))
                for start in range(0, len(data) - record + 1, record):
                    pgno = _U32.unpack_from(data, start)[0]
                    if pgno in (0, forbidden):
                        return
                    if pgno > self.initial_pages:
                        continue
                    page = data[start + 4 : start + record - 4]
                    if page_checksum(page, segment.nonce) != _U32.unpack_from(data, start + record - 4)[0]:
                        return
                    yield pgno, page
                if len(data) < batch:
                    return
                offset += batch
            offset = -(-offset // sector) * sector


def records(read: Read, size: int, page_size: int = 0) -> Rollback:
    """The rollback that a journal of `size` bytes holds. `page_size`: the database's, for very old journals.

    Raises FormatError if there is no valid header or not a whole sector for it: then there is nothing to undo and
    the database is as it was.
    """
    header = JournalHeader.unpack(read(0, JOURNAL_HEADER_SIZE))
    if size < header.sector_size:
        raise TruncatedError(f"a journal of {size} bytes has no room for its header of {header.sector_size}")
    if not header.page_size:
        header = replace(header, page_size=page_size)
        if not valid_page_size(page_size):
            raise FormatError("the journal does not tell its page size")
    return Rollback(header, read, size)
