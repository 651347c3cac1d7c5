"""Reads LTX files (format version 3, see `format`), whole or in chunks as they arrive.

Memory is bounded whatever the input says: between two calls a decoder holds less than one frame plus eight bytes
for each page it has seen, and within a call the pages of that one chunk (LZ4 can pack a page 255 times smaller).

**Pages come out before the file is verified.** Only `finish` says that the file is whole: its checksum, order, page
index, and for a snapshot every page and the database checksum. Until then nothing decoded may be published.

The file checksum covers pages after decompression: a flipped bit in a compressed block either changes the page, and
is found, or does not, and is harmless.
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from pylitefs.errors import FormatError, TruncatedError
from pylitefs.formats.cursor import Buffer
from pylitefs.formats.ltx.checksum import checksums_of, crc64, go_iso
from pylitefs.formats.ltx.format import (
    CHECKSUM_FLAG,
    HEADER_SIZE,
    PAGE_HEADER_SIZE,
    TRAILER_SIZE,
    Header,
    Position,
    Trailer,
    lock_pgno,
)
from pylitefs.formats.ltx.frames import (
    END_OF_PAGES,
    FRAME_HEADER,
    FRAME_HEADER_SIZE,
    PAGE_FLAG_SIZE,
    decode_page,
    decompress_page,
    frame_layout,
    payload_limit,
    unpack_payload,
)
from pylitefs.formats.ltx.index import decode_index, encode_index, index_range

__all__ = [
    "Decoder", "Ltx", "Reader", "decode", "decode_index", "decode_page", "index_range", "small_chunks", "verify_stream",
]  # fmt: skip

SMALL_CHUNK = 64 << 10  # bytes of a file; LZ4 packs at most 255 times
_OLD_HEAD_SIZE = 17  # what `frame_layout` needs of an ltx 0.5.1 frame


class _Part(enum.Enum):
    """What the next byte belongs to."""

    HEADER = enum.auto()
    PAGES = enum.auto()
    TAIL = enum.auto()
    DONE = enum.auto()
    FAILED = enum.auto()


class Decoder:
    """Feed the bytes of one file in any pieces, then `finish`. After an error it refuses everything."""

    def __init__(self) -> None:
        self.header: Header | None = None  # known after the first 100 bytes
        self._trailer: Trailer | None = None
        self._part = _Part.HEADER
        self._held = b""  # bytes of a part that is not complete
        self._pending = bytearray()  # bytes after those, too few to complete it
        self._need = HEADER_SIZE  # how many bytes complete it
        self._crc = 0
        self._pgnos = array("I")
        self._sizes = array("I")
        self._tail = b""
        self._checksum: int | None = None  # of the pages so far, for snapshots that have checksums

    @property
    def page_count(self) -> int:
        return len(self._pgnos)

    def feed(self, chunk: Buffer) -> list[tuple[int, bytes]]:
        """The pages, (pgno, bytes), that `chunk` completes. FormatError on anything wrong, and from then on."""
        if self._part is _Part.FAILED:
            raise FormatError("LTX decoder: used again after an error")
        if len(self._held) + len(self._pending) + len(chunk) < self._need:
            self._pending += chunk
            return []
        data = b"".join((self._held, self._pending, chunk)) if self._held or self._pending else bytes(chunk)
        pages: list[tuple[int, bytes]] = []
        try:
            consumed = self._consume(data, pages)
        except FormatError:
            self._part = _Part.FAILED
            raise
        self._held = data[consumed:]
        self._pending = bytearray()
        return pages

    def finish(self) -> Trailer:
        """The trailer, if the file is whole and correct."""
        if self._part is _Part.FAILED:
            raise FormatError("LTX decoder: used again after an error")
        if self._trailer is None:
            missing = self._need - len(self._held) - len(self._pending)
            raise TruncatedError(f"LTX file ends early, at least {missing} more bytes are needed")
        return self._trailer

    def _consume(self, data: bytes, pages: list[tuple[int, bytes]]) -> int:
        position = 0
        if self._part is _Part.HEADER:
            position = self._read_header(data)
        if self._part is _Part.PAGES:
            position = self._read_pages(data, position, pages)
        if self._part is _Part.TAIL:
            position = self._read_tail(data, position)
        if self._part is _Part.DONE and position < len(data):
            raise FormatError(f"LTX file: {len(data) - position} bytes after the trailer")
        return position

    def _read_header(self, data: bytes) -> int:
        head = data[:HEADER_SIZE]
        self.header = header = Header.unpack(head)
        self._crc = crc64(head)
        if header.is_snapshot and header.has_checksums:
            self._checksum = CHECKSUM_FLAG
        self._part = _Part.PAGES
        self._need = FRAME_HEADER_SIZE
        return HEADER_SIZE

    def _read_pages(self, data: bytes, position: int, pages: list[tuple[int, bytes]]) -> int:
        """Decode the complete frames from `position` on; returns where the first incomplete one begins."""
        header = self.header
        assert header is not None
        page_size, commit, lock = header.page_size, header.commit, lock_pgno(header.page_size)
        limit = payload_limit(page_size)
        unpack_head = FRAME_HEADER.unpack_from
        is_snapshot = header.min_txid == 1
        previous, crc = self._pgnos[-1] if self._pgnos else 0, self._crc
        pgnos, sizes, first_new = self._pgnos.append, self._sizes.append, len(pages)
        view, end = memoryview(data), len(data)
        while True:
            # Any frame and any end of pages has at least this many bytes after it begins.
            if end - position < FRAME_HEADER_SIZE:
                self._need = FRAME_HEADER_SIZE
                break
            pgno, flags, size = unpack_head(data, position)
            if flags == PAGE_FLAG_SIZE and 0 < size <= limit and pgno:
                hashed_end = position + FRAME_HEADER_SIZE
                frame_end = hashed_end + size
                if frame_end > end:
                    self._need = frame_end - position
                    break
                page = decompress_page(view[hashed_end:frame_end], page_size, pgno)
            elif pgno == 0 and flags == 0:
                self._part = _Part.TAIL
                break
            else:
                if flags == 0 and end - position < _OLD_HEAD_SIZE:
                    self._need = _OLD_HEAD_SIZE
                    break
                layout = frame_layout(data, position, page_size)
                frame_end = position + layout.size
                if frame_end > end:
                    self._need = layout.size
                    break
                page = unpack_payload(view, position, layout, page_size)
                hashed_end = position + layout.hashed_size
            if not previous < pgno <= commit or pgno == lock:
                raise FormatError(f"LTX page {pgno}: after page {previous} in a database of {commit} pages")
            if is_snapshot and pgno != previous + 1 and not (previous + 1 == lock and pgno == lock + 1):
                raise FormatError(f"LTX page {pgno}: after page {previous} in a snapshot, which may skip none")
            crc = go_iso(page, go_iso(view[position:hashed_end], crc))
            pgnos(pgno)
            sizes(frame_end - position)
            pages.append((pgno, page))
            previous, position = pgno, frame_end
        self._crc = crc
        if self._checksum is not None and len(pages) > first_new:
            self._checksum ^= int(np.bitwise_xor.reduce(checksums_of(pages[first_new:])))
            self._checksum |= CHECKSUM_FLAG
        return self._end_pages(header, position) if self._part is _Part.TAIL else position

    def _end_pages(self, header: Header, position: int) -> int:
        """Step over the end of pages at `position` and prepare what has to follow."""
        last = self._pgnos[-1] if self._pgnos else 0
        if header.is_snapshot and last != header.last_pgno:
            raise FormatError(f"LTX snapshot ends with page {last} of {header.commit}")
        self._tail = encode_index(self._pgnos, self._sizes)
        self._crc = crc64(self._tail, crc64(END_OF_PAGES, self._crc))
        self._need = len(self._tail) + TRAILER_SIZE
        return position + PAGE_HEADER_SIZE

    def _read_tail(self, data: bytes, position: int) -> int:
        tail_size = len(self._tail)
        if len(data) - position < tail_size + TRAILER_SIZE:
            return position
        if data[position : position + tail_size] != self._tail:
            raise FormatError("LTX page index does not match the pages")
        trailer_bytes = data[position + tail_size : position + tail_size + TRAILER_SIZE]
        trailer = Trailer.unpack(trailer_bytes)
        assert self.header is not None
        trailer.validate(self.header)
        checksum = crc64(trailer_bytes[:8], self._crc) | CHECKSUM_FLAG
        if checksum != trailer.file_checksum:
            raise FormatError(f"LTX file checksum is {checksum:016x}, the trailer says {trailer.file_checksum:016x}")
        if self._checksum is not None and self._checksum != trailer.post_apply_checksum:
            raise FormatError(
                f"LTX snapshot has database checksum {self._checksum:016x},"
                f" the trailer says {trailer.post_apply_checksum:016x}"
            )
        self._trailer = trailer
        self._tail = b""
        self._part = _Part.DONE
        self._need = 1
        return position + tail_size + TRAILER_SIZE


@dataclass(frozen=True, slots=True)
class Ltx:
    """A whole file, verified."""

    header: Header
    pages: tuple[tuple[int, bytes], ...]
    trailer: Trailer

    @property
    def post_apply_position(self) -> Position:
        return Position(self.header.max_txid, self.trailer.post_apply_checksum)


def decode(data: Buffer) -> Ltx:
    """Decode and verify a whole file in memory; for small transactions."""
    decoder = Decoder()
    pages = decoder.feed(data)
    trailer = decoder.finish()
    assert decoder.header is not None
    return Ltx(decoder.header, tuple(pages), trailer)


class Reader:
    """A file that comes as an iterable of chunks: its header at once, its pages by iteration, its trailer at the end.

    The trailer is there only once the iteration has ended by itself, and with it the verification.
    """

    def __init__(self, chunks: Iterable[Buffer]) -> None:
        self._chunks = small_chunks(chunks)
        self._decoder = Decoder()
        self._pages: list[tuple[int, bytes]] = []
        self.trailer: Trailer | None = None
        for chunk in self._chunks:
            self._pages = self._decoder.feed(chunk)
            if self._decoder.header is not None:
                break
        if self._decoder.header is None:
            self._decoder.finish()
        assert self._decoder.header is not None
        self.header: Header = self._decoder.header

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """Once only: (pgno, page), ascending."""
        pages, self._pages = self._pages, []
        yield from pages
        for chunk in self._chunks:
            yield from self._decoder.feed(chunk)
        self.trailer = self._decoder.finish()


def small_chunks(chunks: Iterable[Buffer]) -> Iterator[Buffer]:
    """The same bytes in pieces that cannot become more than 16 MB of pages."""
    for chunk in chunks:
        view = memoryview(chunk)
        for at in range(0, len(view), SMALL_CHUNK):
            yield view[at : at + SMALL_CHUNK]


def verify_stream(chunks: Iterable[Buffer]) -> tuple[Header, Trailer]:
    """Read a whole file, keep nothing of it, and return its ends. FormatError if it is not correct."""
    reader = Reader(chunks)
    for _ in reader:
        pass
    assert reader.trailer is not None
    return reader.header, reader.trailer
