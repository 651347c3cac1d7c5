"""Writes LTX files (format version 3, see `format`).

Pure: every call returns the bytes to append to the file. What is kept of a page is its number and frame size (eight
bytes), so the size of a transaction is limited by the file system only.

    encoder = Encoder(header)
    write(encoder.begin())
    for run in runs:                          # of (pgno, page), ascending
        writev(encoder.run(run))
    write(encoder.finish(post_apply_checksum))

A file that was begun and not finished is torn: no reader takes it for a whole one.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

from pylitefs.errors import FormatError
from pylitefs.formats.cursor import Buffer
from pylitefs.formats.ltx.checksum import go_iso
from pylitefs.formats.ltx.format import CHECKSUM_FLAG, HEADER_SIZE, TRAILER_SIZE, Header, Trailer, lock_pgno
from pylitefs.formats.ltx.frames import (
    END_OF_PAGES,
    FRAME_HEADER,
    FRAME_HEADER_SIZE,
    PAGE_FLAG_SIZE,
    compress_page,
    compress_page_fast,
    store_page,
)
from pylitefs.formats.ltx.index import encode_index

_pack_frame_header = FRAME_HEADER.pack
_FEW_PAGES = 32  # runs of up to so many pages are compressed well, longer ones fast: there the time counts


class Encoder:
    """One file. Calls out of order are a bug of the caller: RuntimeError. Pages that break the format: FormatError."""

    def __init__(self, header: Header, *, compress: bool = True) -> None:
        self._header_bytes = header.pack()
        self.header = header
        self.trailer: Trailer | None = None
        self.size_bytes = 0
        self._page_size = header.page_size
        self._commit = header.commit
        self._lock_pgno = lock_pgno(header.page_size)
        self._is_snapshot = header.is_snapshot
        self._accepts_pages = False
        self._crc = 0
        self._previous = 0
        self._compress = compress
        self._pgnos = array("I")
        self._sizes = array("I")

    @property
    def page_count(self) -> int:
        return len(self._pgnos)

    def begin(self) -> bytes:
        if self.size_bytes:
            raise RuntimeError("Encoder.begin: called twice")
        self._crc = go_iso(self._header_bytes)
        self.size_bytes = HEADER_SIZE
        self._accepts_pages = True
        return self._header_bytes

    def page(self, pgno: int, data: Buffer) -> bytes:
        """The frame of one page; see `run`."""
        return b"".join(self.run(((pgno, data),)))

    def run(self, pages: Sequence[tuple[int, Buffer]]) -> list[bytes]:
        """The frames of some pages, as pieces to write one after the other. Each is (pgno, `page_size` bytes), pgno
        larger than all before (the next one in a snapshot), at most `commit` and not the lock page."""
        if not self._compress:
            block_of = store_page
        else:
            block_of = compress_page if len(pages) <= _FEW_PAGES else compress_page_fast
        page_size, commit, lock, is_snapshot = self._page_size, self._commit, self._lock_pgno, self._is_snapshot
        crc, previous, written = self._crc, self._previous, 0
        pieces: list[bytes] = []
        append, remember = pieces.append, self._sizes.append
        for pgno, data in pages:
            if (
                not previous < pgno <= commit
                or pgno == lock
                or len(data) != page_size
                or not self._accepts_pages
                or (is_snapshot and pgno != _next_in_snapshot(previous, lock))
            ):
                raise self._refusal(pgno, data, previous)
            block = block_of(data)
            size = len(block)
            head = _pack_frame_header(pgno, PAGE_FLAG_SIZE, size)
            crc = go_iso(data, go_iso(head, crc))
            append(head)
            append(block)
            size += FRAME_HEADER_SIZE
            remember(size)
            written += size
            previous = pgno
        self._pgnos.extend([pgno for pgno, _ in pages])
        self._crc, self._previous = crc, previous
        self.size_bytes += written
        return pieces

    def finish(self, post_apply_checksum: int) -> bytes:
        """End of pages, page index and trailer. `post_apply_checksum` is the database's afterwards (0 if the header
        says that there are none); it is not recomputed here."""
        if not self._accepts_pages:
            raise RuntimeError("Encoder.finish: before begin, or called twice")
        if self._is_snapshot and self._previous != self.header.last_pgno:
            raise FormatError(f"LTX snapshot ends with page {self._previous} of {self._commit}")
        tail = END_OF_PAGES + encode_index(self._pgnos, self._sizes)
        crc = go_iso(tail, self._crc)
        # The trailer's first half is covered by the file checksum, which is its second half.
        unsigned = Trailer(post_apply_checksum, CHECKSUM_FLAG)
        unsigned.validate(self.header)
        trailer = Trailer(post_apply_checksum, go_iso(unsigned.pack()[:8], crc) | CHECKSUM_FLAG)
        self._accepts_pages = False
        self.trailer = trailer
        self.size_bytes += len(tail) + TRAILER_SIZE
        return tail + trailer.pack()

    def _refusal(self, pgno: int, data: Buffer, previous: int) -> Exception:
        """Why `run` cannot take this page."""
        if not self._accepts_pages:
            return RuntimeError("Encoder.run: before begin or after finish")
        if len(data) != self._page_size:
            return FormatError(f"LTX page {pgno}: {len(data)} bytes instead of {self._page_size}")
        if not 1 <= pgno <= self._commit:
            return FormatError(f"LTX page {pgno}: outside of a database of {self._commit} pages")
        if pgno == self._lock_pgno:
            return FormatError(f"LTX page {pgno}: the lock page is not data")
        if pgno <= previous:
            return FormatError(f"LTX page {pgno}: after page {previous}, pages must ascend")
        needed = _next_in_snapshot(previous, self._lock_pgno)
        return FormatError(f"LTX page {pgno}: a snapshot needs page {needed} first")


def _next_in_snapshot(previous: int, lock: int) -> int:
    return previous + 2 if previous + 1 == lock else previous + 1


def encode_parts(header: Header, pages: Iterable[tuple[int, Buffer]], post_apply_checksum: int) -> list[bytes]:
    """A whole file in memory as pieces to be written one after the other: header, frames, the rest.

    Pieces, because joining them costs half as much again as encoding (`writev` takes them as they are).
    """
    encoder = Encoder(header)
    return [encoder.begin(), *encoder.run(tuple(pages)), encoder.finish(post_apply_checksum)]


def encode(header: Header, pages: Iterable[tuple[int, Buffer]], post_apply_checksum: int) -> bytes:
    """A whole file in memory; for small transactions."""
    return b"".join(encode_parts(header, pages, post_apply_checksum))
