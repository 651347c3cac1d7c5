"""The messages of the replication protocol (see `stream`) that carry pages, or ask for some."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Final

import lz4.block

from pylitefs.errors import FormatError
from pylitefs.formats.ltx.frames import payload_limit
from pylitefs.formats.stream_fields import U32, Name, PageSize, list_of, number, rest

MAX_PAGES_SIZE: Final = 256 * 1024  # bytes of the pages in one message, unpacked


@dataclass(frozen=True, slots=True)
class SnapshotPages:
    """Pages in any order, newer versions of a page after older ones: `packed` is one LZ4 block of them all."""

    CODE: ClassVar[int] = 33
    name: Name
    page_size: PageSize
    pgnos: Annotated[tuple[int, ...], list_of(number(4, low=1), MAX_PAGES_SIZE // 512)]
    packed: Annotated[bytes, rest(payload_limit(MAX_PAGES_SIZE))]

    @classmethod
    def of(cls, name: str, page_size: int, pages: Sequence[tuple[int, bytes]]) -> SnapshotPages:
        block = lz4.block.compress(b"".join(page for _, page in pages), mode="fast", store_size=False)
        return cls(name, page_size, tuple(pgno for pgno, _ in pages), block)

    def pages(self) -> list[tuple[int, bytes]]:
        """(pgno, page) of each. FormatError if they are not what the message says."""
        size, page_size = len(self.pgnos) * self.page_size, self.page_size
        if not 0 < size <= MAX_PAGES_SIZE:
            raise FormatError(f"{len(self.pgnos)} pages of {page_size} bytes in one message")
        try:
            raw = lz4.block.decompress(self.packed, uncompressed_size=size)
        except (lz4.block.LZ4BlockError, ValueError):
            raise FormatError("the LZ4 block of a snapshot is damaged") from None
        if len(raw) != size:
            raise FormatError(f"{len(raw)} bytes of pages instead of {size}")
        return [
            (pgno, raw[at : at + page_size]) for pgno, at in zip(self.pgnos, range(0, size, page_size), strict=True)
        ]


@dataclass(frozen=True, slots=True)
class AskPages:
    """Pages of the primary's that its disk has damaged. It knows their checksums: at which position they were so does
    not matter."""

    CODE: ClassVar[int] = 38
    name: Name
    request: U32
    pgnos: Annotated[tuple[int, ...], list_of(number(4, low=1), MAX_PAGES_SIZE // 512)]


@dataclass(frozen=True, slots=True)
class Pages:
    """The answer to ASK_PAGES number `request`: those of the pages that the replica has as it should. `data`: one after
    the other, all of one size."""

    CODE: ClassVar[int] = 16
    name: Name
    request: U32
    pgnos: Annotated[tuple[int, ...], list_of(number(4, low=1), MAX_PAGES_SIZE // 512)]
    data: Annotated[bytes, rest(MAX_PAGES_SIZE, least=0)]

    def pages(self) -> list[tuple[int, bytes]]:
        """(pgno, page) of each. FormatError if they are not what the message says."""
        size, left = divmod(len(self.data), max(1, len(self.pgnos)))
        if left or (not self.pgnos and self.data):
            raise FormatError(f"{len(self.pgnos)} pages in {len(self.data)} bytes")
        return [(pgno, self.data[at * size : (at + 1) * size]) for at, pgno in enumerate(self.pgnos)]
