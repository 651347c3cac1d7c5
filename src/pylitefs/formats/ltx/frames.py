"""One page in an LTX file.

    0  4  page number, 1 or more; zero (with zero flags) marks the end of the pages and stands alone
    4  2  flags: 0x0001 says that a size follows; no other bit is known
    6  4  size of the payload in bytes
    10 n  payload: the page as one LZ4 block, exactly one page when unpacked

That is what ltx 0.5.2 and we write. Before (ltx 0.5.0 and 0.5.1, Litestream up to 0.5.15) the flags were zero and an
LZ4 *frame* followed, whose writer always used the same options, so the frame has one shape, the only one we read:

    6  7   04 22 4d 18 64 40 a7: magic, options (independent blocks of 64 KiB, checksum of the content), their checksum
    13 4   size of the block, little-endian; bit 31 set if it is stored uncompressed
    17 n   the block
    .  8   zero (end of blocks), xxHash-32 of the page; not verified here, the file checksum covers the page

Sizes are checked against the worst case of LZ4 for the page size before anything is read or allocated.
Format version 2 had four-byte page headers; its frames show up as unknown flags.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple

import lz4.block

from pylitefs.errors import FormatError, TruncatedError
from pylitefs.formats.cursor import Buffer
from pylitefs.formats.ltx.format import MAX_PAGE_SIZE, PAGE_HEADER_SIZE, is_page_size

PAGE_FLAG_SIZE = 1 << 0

FRAME_HEADER = struct.Struct(">IHI")  # page number, flags, payload size
FRAME_HEADER_SIZE = FRAME_HEADER.size
END_OF_PAGES = bytes(PAGE_HEADER_SIZE)
assert FRAME_HEADER_SIZE == PAGE_HEADER_SIZE + 4

_OLD_PREFIX = bytes.fromhex("04224d186440a7")
_OLD_HEADER_SIZE = PAGE_HEADER_SIZE + len(_OLD_PREFIX) + 4
_OLD_FOOTER_SIZE = 8
_OLD_STORED = 1 << 31
_compress = lz4.block.compress
_unpack_u32_le = struct.Struct("<I").unpack_from


class FrameLayout(NamedTuple):
    """Where the parts of a frame are, relative to its first byte."""

    pgno: int
    hashed_size: int  # leading bytes that go into the file checksum as they are
    payload_start: int
    payload_size: int
    stored: bool  # the payload is the page itself
    size: int


def payload_limit(page_size: int) -> int:
    """The largest LZ4 block of one page (LZ4_compressBound)."""
    return page_size + page_size // 255 + 16


MAX_FRAME_SIZE = _OLD_HEADER_SIZE + payload_limit(MAX_PAGE_SIZE) + _OLD_FOOTER_SIZE


def compress_page(page: Buffer) -> bytes:
    """The page as an LZ4 block. Acceleration 2 takes up to a fifth less time than 1 for 1 to 6 % larger blocks."""
    block: bytes = _compress(page, mode="fast", acceleration=2, store_size=False)
    return block


def compress_page_fast(page: Buffer) -> bytes:
    """As `compress_page` in half the time, for blocks that are a tenth to a sixth larger."""
    block: bytes = _compress(page, mode="fast", acceleration=8, store_size=False)
    return block


def store_page(page: Buffer) -> bytes:
    """The page as an LZ4 block of literals only: as large as the page, and no work for either side."""
    return _literals_head(len(page)) + page


@lru_cache(maxsize=16)
def _literals_head(size: int) -> bytes:
    """The token and length of one run of `size` literals (lz4_Block_format: 15 in the token, then 255s and the
    rest)."""
    full, rest = divmod(size - 15, 255)
    return b"\xf0" + b"\xff" * full + bytes([rest])


def decompress_page(payload: Buffer, page_size: int, pgno: int) -> bytes:
    """The page of exactly `page_size` bytes; nothing larger is ever allocated."""
    try:
        page: bytes = lz4.block.decompress(payload, uncompressed_size=page_size)
    except lz4.block.LZ4BlockError:
        raise FormatError(f"LTX page {pgno}: its LZ4 block is damaged") from None
    if len(page) != page_size:
        raise FormatError(f"LTX page {pgno}: {len(page)} bytes instead of {page_size}")
    return page


def frame_layout(data: Buffer, start: int, page_size: int) -> FrameLayout:
    """The layout of the frame at `start`. `TruncatedError` if `data` ends before that can be told (17 bytes do)."""
    if len(data) - start < FRAME_HEADER_SIZE:
        raise TruncatedError("LTX page: its header is cut off")
    pgno, flags, size = FRAME_HEADER.unpack_from(data, start)
    if pgno == 0:
        raise FormatError("LTX page: page number 0")
    if flags & ~PAGE_FLAG_SIZE:
        raise FormatError(f"LTX page {pgno}: unknown flags {flags:#06x} (another format version?)")
    if flags:
        if not 0 < size <= payload_limit(page_size):
            raise FormatError(f"LTX page {pgno}: {size} bytes cannot be one page of {page_size}")
        return FrameLayout(pgno, FRAME_HEADER_SIZE, FRAME_HEADER_SIZE, size, False, FRAME_HEADER_SIZE + size)
    return _old_frame_layout(data, start, page_size, pgno)


def _old_frame_layout(data: Buffer, start: int, page_size: int, pgno: int) -> FrameLayout:
    if len(data) - start < _OLD_HEADER_SIZE:
        raise TruncatedError(f"LTX page {pgno}: its header is cut off")
    at = start + PAGE_HEADER_SIZE
    if data[at : at + len(_OLD_PREFIX)] != _OLD_PREFIX:
        raise FormatError(f"LTX page {pgno}: neither a sized block nor the LZ4 frame of ltx 0.5.0 and 0.5.1")
    size = _unpack_u32_le(data, at + len(_OLD_PREFIX))[0]
    stored = bool(size & _OLD_STORED)
    size &= ~_OLD_STORED
    if not (size == page_size if stored else 0 < size <= payload_limit(page_size)):
        raise FormatError(f"LTX page {pgno}: {size} bytes cannot be one page of {page_size}")
    total = _OLD_HEADER_SIZE + size + _OLD_FOOTER_SIZE
    return FrameLayout(pgno, PAGE_HEADER_SIZE, _OLD_HEADER_SIZE, size, stored, total)


def unpack_payload(data: memoryview, start: int, layout: FrameLayout, page_size: int) -> bytes:
    """The page of a frame that is complete in `data`."""
    payload_end = start + layout.payload_start + layout.payload_size
    payload = data[start + layout.payload_start : payload_end]
    if layout.payload_start == _OLD_HEADER_SIZE and any(data[payload_end : payload_end + 4]):
        raise FormatError(f"LTX page {layout.pgno}: its LZ4 frame has more than one block")
    if layout.stored:
        return payload.tobytes()
    return decompress_page(payload, page_size, layout.pgno)


def decode_page(data: Buffer, page_size: int) -> tuple[int, bytes]:
    """(pgno, page) of exactly one frame, as the page index points to it.

    Random access: no checksum covers a single page, compare it with a page checksum if one is known.
    """
    if not is_page_size(page_size):
        raise FormatError(f"{page_size} is not a SQLite page size")
    layout = frame_layout(data, 0, page_size)
    if len(data) < layout.size:
        raise TruncatedError(f"LTX page {layout.pgno}: {layout.size} bytes expected, {len(data)} found")
    if len(data) > layout.size:
        raise FormatError(f"LTX page {layout.pgno}: {len(data) - layout.size} bytes too many")
    return layout.pgno, unpack_payload(memoryview(data), 0, layout, page_size)
