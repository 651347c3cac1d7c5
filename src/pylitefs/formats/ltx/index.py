"""The page index of an LTX file: where each page's frame is, for reading single pages.

    uvarint pgno, uvarint offset of its frame in the file, uvarint size of its frame      once per page, in file order
    0x00                                                                                  end
    u64 big-endian: size of all the above in bytes

Frames follow each other without gaps, the first right after the header, so the sizes determine the offsets and the
index adds nothing to a file that is read from the start: there it is compared byte for byte with what it has to be.
"""

from __future__ import annotations

import struct
from array import array

from pylitefs.errors import FormatError, TruncatedError
from pylitefs.formats.cursor import Buffer, Cursor, pack_uvarint
from pylitefs.formats.ltx.format import HEADER_SIZE, INDEX_SIZE_SIZE, MAX_PGNO, TRAILER_SIZE
from pylitefs.formats.ltx.frames import FRAME_HEADER_SIZE, MAX_FRAME_SIZE

_U64 = struct.Struct(">Q")
TAIL_SIZE = INDEX_SIZE_SIZE + TRAILER_SIZE  # the last bytes of a file, from which its index can be found

# Every value of up to two bytes: page numbers and sizes of most files.
_SHORT = [pack_uvarint(value) for value in range(1 << 14)]


def encode_index(pgnos: array[int], sizes: array[int]) -> bytes:
    """The index with its size field, for frames of these pages and sizes (bytes), in file order."""
    out: list[bytes] = []
    append = out.append
    short, short_end = _SHORT, len(_SHORT)
    offset = HEADER_SIZE
    for pgno, size in zip(pgnos, sizes, strict=True):
        append(short[pgno] if pgno < short_end else pack_uvarint(pgno))
        append(short[offset] if offset < short_end else pack_uvarint(offset))
        append(short[size] if size < short_end else pack_uvarint(size))
        offset += size
    append(b"\0")
    index = b"".join(out)
    return index + _U64.pack(len(index))


def index_range(tail: Buffer, file_size: int) -> tuple[int, int]:
    """(offset, size) in bytes of the index, from the last `TAIL_SIZE` bytes of a file of `file_size` bytes."""
    if len(tail) != TAIL_SIZE:
        raise TruncatedError(f"LTX index: the last {TAIL_SIZE} bytes of the file are needed, got {len(tail)}")
    size = _U64.unpack_from(tail)[0]
    offset = file_size - TAIL_SIZE - size
    if size < 1 or offset < HEADER_SIZE:
        raise FormatError(f"LTX index: a size of {size} bytes in a file of {file_size}")
    return offset, size


def decode_index(data: Buffer) -> dict[int, tuple[int, int]]:
    """pgno -> (offset, size) in bytes of each frame. `data` is what `index_range` points to, without the size field."""
    cursor = Cursor(data)
    index: dict[int, tuple[int, int]] = {}
    previous, expected_offset = 0, HEADER_SIZE
    while pgno := cursor.uvarint():
        offset, size = cursor.uvarint(), cursor.uvarint()
        if not previous < pgno <= MAX_PGNO:
            raise FormatError(f"LTX index: page {pgno} after page {previous}")
        if offset != expected_offset or not FRAME_HEADER_SIZE < size <= MAX_FRAME_SIZE:
            raise FormatError(f"LTX index: page {pgno} cannot be {size} bytes at offset {offset}")
        index[pgno] = (offset, size)
        previous, expected_offset = pgno, offset + size
    cursor.expect_end()
    return index
