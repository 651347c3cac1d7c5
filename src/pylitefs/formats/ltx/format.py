"""LTX, format version 3: the layout of a file, its fixed structs and its names.

    0            header         100 bytes
    100          page frames    ascending pgno, see `frames`
    .            end of pages   6 zero bytes
    .            page index     uvarint triples (pgno, offset, size) in page order, then one zero byte, see `index`
    .            index size     8 bytes, of the triples and their zero
    end - 16     trailer        16 bytes

    Header (big-endian)                                      Trailer
     0  4  magic "LTX1"            48  8  WAL offset          0  8  database checksum after applying the file
     4  4  flags                   56  8  WAL size            8  8  file checksum
     8  4  page size, bytes        64  4  WAL salt 1
    12  4  commit, pages           68  4  WAL salt 2
    16  8  first TXID              72  8  epoch (in LTX: node id)
    24  8  last TXID               80 20  reserved: written as zero, ignored when read
    32  8  milliseconds since 1970
    40  8  database checksum before applying the file

Flags: only 0x2, "no database checksums"; both of them are zero then. We write with checksums and read both.
Any other bit is an error: it may change the meaning of the rest.

The *file checksum* is CRC-64/GO-ISO with bit 63 set, over the logical content: the header, then for each page its
frame header (with the size field) and the page's **uncompressed** bytes, then everything from the end of pages up
to the file checksum itself. So it does not depend on the compressor, except for the sizes.

The *epoch* is that of the lease under which the newest transaction of the file was written, 0 where nobody knows. LTX
has a node id here, whose meaning it leaves to the writer; Litestream writes 0 and ignores what it reads.

Validity:
- page size is a power of two from 512 to 65,536; 1 <= first TXID <= last TXID;
- first TXID 1 makes the file a *snapshot*: it has no checksum before, and every page 1..commit except the lock page;
- any other file has a checksum before (bit 63 set) and any pages in 1..commit, ascending, never the lock page;
- commit 0 is a deleted (empty) database: no pages, and the checksum after is the empty one, `CHECKSUM_FLAG`;
- WAL salts or a WAL size need a WAL offset.

The version number is not in the file: versions 1 to 3 share the magic, and differ in the flags and page frames.
A torn write is a prefix of a file (`TruncatedError`), or a file with holes (zero pages: end of pages comes early and
the index does not match, or the file checksum does not). Nothing before the trailer says that a file is whole.

Source: superfly/ltx 0.5.2 (ltx.go, encoder.go, decoder.go, README.md), which Litestream uses since 0.5.16.
Litestream 0.5.0 to 0.5.15 use ltx 0.5.0/0.5.1: the same file with another page frame, which we read too.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from typing import Final

from pylitefs.errors import FormatError, TruncatedError

MAGIC: Final = b"LTX1"
CHECKSUM_FLAG: Final = 1 << 63  # set in every checksum, so that none is zero; alone it is the empty database's

HEADER_FLAG_NO_CHECKSUM: Final = 1 << 1
HEADER_FLAGS_KNOWN: Final = HEADER_FLAG_NO_CHECKSUM

MIN_PAGE_SIZE: Final = 512
MAX_PAGE_SIZE: Final = 65_536
MAX_PGNO: Final = (1 << 32) - 1
MAX_TXID: Final = (1 << 64) - 1
PENDING_BYTE: Final = 0x40000000  # SQLite's locks live on the page with this byte, which is never written

_HEADER: Final = struct.Struct(">4sIIIQQqQqqIIQ20x")
_TRAILER: Final = struct.Struct(">QQ")

HEADER_SIZE: Final = 100
PAGE_HEADER_SIZE: Final = 6
TRAILER_SIZE: Final = 16
INDEX_SIZE_SIZE: Final = 8
assert _HEADER.size == HEADER_SIZE
assert _TRAILER.size == TRAILER_SIZE

_FILE_NAME: Final = re.compile(r"([0-9a-f]{16})-([0-9a-f]{16})\.ltx")
_POSITION: Final = re.compile(r"([0-9a-fA-F]{16})/([0-9a-fA-F]{16})")


def lock_pgno(page_size: int) -> int:
    """The page that holds SQLite's lock bytes: in no LTX file and in no checksum."""
    return PENDING_BYTE // page_size + 1


def is_page_size(value: int) -> bool:
    return MIN_PAGE_SIZE <= value <= MAX_PAGE_SIZE and value & (value - 1) == 0


@dataclass(frozen=True, slots=True)
class Position:
    """Where a database stands: the last TXID in it and the checksum of its pages. `epoch`, that of the last one, does
    not count for equality. Nodes compare it too (`is_at`), because the checksum is linear: where two pages differ
    in the same bits at the same place, the differences cancel out."""

    txid: int
    checksum: int
    epoch: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return f"{self.txid:016x}/{self.checksum:016x}"

    def is_at(self, other: Position) -> bool:
        """Whether two nodes are at the same transaction: of the same epoch, where there is more than one."""
        return self == other and (self.epoch == other.epoch or max(self.epoch, other.epoch) <= 1)

    def missing(self, head: Position) -> int:
        """How many transactions of another node's `head` a copy at this position lacks, as far as both tell: at least
        one where `head` is of a later epoch, however many there are here, or is another state of the same TXID."""
        mine, theirs = (max(self.epoch, 1), self.txid), (max(head.epoch, 1), head.txid)
        if mine == theirs:
            return int(self.checksum != head.checksum)
        return max(1, head.txid - self.txid) if mine < theirs else 0

    @classmethod
    def parse(cls, text: str) -> Position:
        match = _POSITION.fullmatch(text)
        if match is None:
            raise FormatError(f"not a position (16 hex digits, a slash, 16 hex digits): {text[:40]!r}")
        return cls(int(match[1], 16), int(match[2], 16))


@dataclass(frozen=True, slots=True)
class Header:
    """The first 100 bytes: what the file changes and from which position.

    `commit` is the database size in pages afterwards. `min_txid` to `max_txid` are the transactions the file holds.
    `pre_apply_checksum` is the database checksum the file applies to. The WAL fields say where the pages came from
    and are zero for rollback journals and compacted files; `epoch` is that of the newest transaction, zero if unknown.
    """

    flags: int
    page_size: int
    commit: int
    min_txid: int
    max_txid: int
    timestamp_ms: int
    pre_apply_checksum: int
    wal_offset: int = 0
    wal_size: int = 0
    wal_salt1: int = 0
    wal_salt2: int = 0
    epoch: int = 0

    @property
    def is_snapshot(self) -> bool:
        """The file holds the whole database."""
        return self.min_txid == 1

    @property
    def has_checksums(self) -> bool:
        """The database checksums before and after are filled in."""
        return not self.flags & HEADER_FLAG_NO_CHECKSUM

    @property
    def last_pgno(self) -> int:
        """The last page a snapshot must hold: `commit`, or the one before when that is the lock page."""
        return self.commit - 1 if self.commit == lock_pgno(self.page_size) else self.commit

    @property
    def pre_apply_position(self) -> Position:
        return Position(self.min_txid - 1, self.pre_apply_checksum)

    def validate(self) -> None:
        """Raise `FormatError` unless the header keeps the rules at the top of this module."""
        if self.flags & ~HEADER_FLAGS_KNOWN:
            raise FormatError(f"LTX header: unknown flags {self.flags:#010x} (another format version?)")
        if not is_page_size(self.page_size):
            raise FormatError(f"LTX header: {self.page_size} is not a SQLite page size")
        if not 1 <= self.min_txid <= self.max_txid <= MAX_TXID:
            raise FormatError(f"LTX header: not a range of transactions: {self.min_txid:016x} to {self.max_txid:016x}")
        if self.wal_offset < 0 or self.wal_size < 0:
            raise FormatError(f"LTX header: negative WAL range: offset {self.wal_offset}, size {self.wal_size}")
        if self.wal_offset == 0 and (self.wal_size or self.wal_salt1 or self.wal_salt2):
            raise FormatError("LTX header: WAL size or salts without a WAL offset")
        self._validate_checksum()

    def _validate_checksum(self) -> None:
        checksum = self.pre_apply_checksum
        if self.is_snapshot or not self.has_checksums:
            if checksum != 0:
                kind = "a snapshot" if self.is_snapshot else "a file without checksums"
                raise FormatError(f"LTX header: {kind} must not have a pre-apply checksum, found {checksum:016x}")
        elif not checksum & CHECKSUM_FLAG:
            raise FormatError(f"LTX header: not a pre-apply checksum: {checksum:016x}")

    def pack(self) -> bytes:
        self.validate()
        try:
            return _HEADER.pack(
                MAGIC,
                self.flags,
                self.page_size,
                self.commit,
                self.min_txid,
                self.max_txid,
                self.timestamp_ms,
                self.pre_apply_checksum,
                self.wal_offset,
                self.wal_size,
                self.wal_salt1,
                self.wal_salt2,
                self.epoch,
            )
        except struct.error as error:
            raise FormatError(f"LTX header: a field is out of range: {error}") from None

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> Header:
        """The header that `data` begins with, validated. The reserved bytes are ignored."""
        if len(data) < HEADER_SIZE:
            raise TruncatedError(f"LTX header: {HEADER_SIZE} bytes expected, {len(data)} found")
        magic, *fields = _HEADER.unpack_from(data)
        if magic != MAGIC:
            raise FormatError("not an LTX file: it does not begin with LTX1")
        header = cls(*fields)
        header.validate()
        return header


@dataclass(frozen=True, slots=True)
class Trailer:
    """The last 16 bytes: the database checksum after applying the file, and the checksum of the file."""

    post_apply_checksum: int
    file_checksum: int

    def validate(self, header: Header) -> None:
        """Raise `FormatError` unless the trailer fits the file that begins with `header`."""
        checksum = self.post_apply_checksum
        if not header.has_checksums:
            if checksum != 0:
                raise FormatError(f"LTX trailer: checksum {checksum:016x} in a file without checksums")
        elif not checksum & CHECKSUM_FLAG:
            raise FormatError(f"LTX trailer: not a post-apply checksum: {checksum:016x}")
        elif header.commit == 0 and checksum != CHECKSUM_FLAG:
            raise FormatError(f"LTX trailer: checksum {checksum:016x} for a deleted database")
        if not self.file_checksum & CHECKSUM_FLAG:
            raise FormatError(f"LTX trailer: not a file checksum: {self.file_checksum:016x}")

    def pack(self) -> bytes:
        try:
            return _TRAILER.pack(self.post_apply_checksum, self.file_checksum)
        except struct.error as error:
            raise FormatError(f"LTX trailer: a field is out of range: {error}") from None

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> Trailer:
        if len(data) < TRAILER_SIZE:
            raise TruncatedError(f"LTX trailer: {TRAILER_SIZE} bytes expected, {len(data)} found")
        return cls(*_TRAILER.unpack_from(data))


def file_name(min_txid: int, max_txid: int) -> str:
    """The name of the file that holds these transactions; names sort in TXID order."""
    return f"{min_txid:016x}-{max_txid:016x}.ltx"


def parse_file_name(name: str) -> tuple[int, int] | None:
    """(first TXID, last TXID), or None if `name` is not the name of an LTX file."""
    match = _FILE_NAME.fullmatch(name)
    if match is None:
        return None
    min_txid, max_txid = int(match[1], 16), int(match[2], 16)
    return (min_txid, max_txid) if 1 <= min_txid <= max_txid else None
