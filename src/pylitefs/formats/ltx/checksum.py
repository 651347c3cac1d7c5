"""Checksums of pages and databases as LTX defines them.

Page:      CRC-64/GO-ISO over the page number (4 bytes, big-endian) and the page, with bit 63 set.
Database:  XOR of its pages' checksums with bit 63 set; the lock page is left out, an empty database has bit 63 alone.
           So a page is exchanged by XOR-ing its old checksum out and its new one in.
Running:   `crc64(chunk, crc)` continues `crc`; begin with 0. Set bit 63 at the end to make it a file checksum.

Tables of page checksums are `uint64` arrays: entry i is page i + 1, zero for the lock page.
Source: superfly/ltx, checksum.go.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from fastcrc.crc64 import go_iso

from pylitefs.errors import FormatError
from pylitefs.formats.cursor import Buffer
from pylitefs.formats.ltx.format import CHECKSUM_FLAG, lock_pgno

__all__ = [
    "CHECKSUM_FLAG", "checksums_of", "combine", "crc64", "database_checksum", "go_iso", "page_checksum",
    "page_checksums",
]  # fmt: skip

_pack_pgno = struct.Struct(">I").pack


def crc64(data: Buffer, crc: int = 0) -> int:
    """Continue the plain CRC `crc` over `data`: crc64(b, crc64(a)) == crc64(a + b), and crc64(b"") == 0. The same as
    `go_iso`, which loops over pages call directly."""
    return go_iso(data, crc)


def page_checksum(pgno: int, page: Buffer) -> int:
    return go_iso(page, go_iso(_pack_pgno(pgno))) | CHECKSUM_FLAG


def checksums_of(pages: Sequence[tuple[int, Buffer]]) -> npt.NDArray[np.uint64]:
    """The checksums of pages given as (pgno, page), shape (pages,)."""
    out = np.fromiter((go_iso(page, go_iso(_pack_pgno(pgno))) for pgno, page in pages), np.uint64, len(pages))
    out |= np.uint64(CHECKSUM_FLAG)
    return out


def combine(database_checksum: int, old: int, new: int) -> int:
    """The database checksum after one page's checksum went from `old` to `new`; 0 stands for "no such page"."""
    return database_checksum ^ old ^ new | CHECKSUM_FLAG


def database_checksum(checksums: npt.NDArray[np.uint64]) -> int:
    """The checksum of the database whose page checksums are given, in any order, shape (pages,)."""
    return int(np.bitwise_xor.reduce(checksums, initial=np.uint64(0))) | CHECKSUM_FLAG


def page_checksums(first_pgno: int, pages: Buffer, page_size: int) -> npt.NDArray[np.uint64]:
    """Checksums of consecutive whole pages, the first being `first_pgno`; zero in the place of the lock page."""
    view = memoryview(pages)
    count, rest = divmod(view.nbytes, page_size)
    if rest:
        raise FormatError(f"{view.nbytes} bytes are not whole pages of {page_size}")
    out = np.fromiter(
        (
            go_iso(view[start : start + page_size], go_iso(_pack_pgno(first_pgno + index)))
            for index, start in enumerate(range(0, count * page_size, page_size))
        ),
        dtype=np.uint64,
        count=count,
    )
    out |= np.uint64(CHECKSUM_FLAG)
    lock_index = lock_pgno(page_size) - first_pgno
    if 0 <= lock_index < count:
        out[lock_index] = 0
    return out
