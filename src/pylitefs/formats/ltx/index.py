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

import numpy as np

from pylitefs.errors import FormatError, TruncatedError
from pylitefs.formats.cursor import Buffer, Cursor, pack_uvarint
from pylitefs.formats.ltx.format import HEADER_SIZE, INDEX_SIZE_SIZE, MAX_PGNO, TRAILER_SIZE
from pylitefs.formats.ltx.frames import FRAME_HEADER_SIZE, MAX_FRAME_SIZE

_U64 = struct.Struct(">Q")
TAIL_SIZE = INDEX_SIZE_SIZE + TRAILER_SIZE  # the last bytes of a file, from which its index can be found

_FEW = 16  # entries; below it arrays cost more than they save


def encode_index(pgnos: array[int], sizes: array[int]) -> bytes:
    """The index with its size field, for frames of these pages and sizes (bytes), in file order."""
    index = _encode_few(pgnos, sizes) if len(pgnos) <= _FEW else _encode_many(pgnos, sizes)
    return index + _U64.pack(len(index))


def _encode_few(pgnos: array[int], sizes: array[int]) -> bytes:
    out = bytearray()
    offset = HEADER_SIZE
    for pgno, size in zip(pgnos, sizes, strict=True):
        out += pack_uvarint(pgno) + pack_uvarint(offset) + pack_uvarint(size)
        offset += size
    return bytes(out) + b"\0"


def _encode_many(pgnos: array[int], sizes: array[int]) -> bytes:
    """All values at once: byte k of every value that has one."""
    values = np.zeros((len(pgnos), 3), dtype=np.uint64)
    values[:, 0], values[:, 2] = pgnos, sizes
    values[0, 1] = HEADER_SIZE
    np.cumsum(values[:-1, 2], out=values[1:, 1])
    values[1:, 1] += np.uint64(HEADER_SIZE)
    flat = values.reshape(-1)
    lengths = np.ones(len(flat), dtype=np.int64)
    for bits in range(7, int(flat.max()).bit_length(), 7):
        lengths += flat >= np.uint64(1 << bits)
    ends = np.cumsum(lengths)
    out = np.zeros(int(ends[-1]) + 1, dtype=np.uint8)  # with the zero at the end
    starts = ends - lengths
    for byte in range(int(lengths.max())):
        have = lengths > byte
        low = (flat[have] >> np.uint64(7 * byte)).astype(np.uint8) & 0x7F
        out[starts[have] + byte] = low | np.where(lengths[have] > byte + 1, 0x80, 0).astype(np.uint8)
    return out.tobytes()


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
