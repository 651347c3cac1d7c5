"""Merges consecutive LTX files into one that has the same effect.

Each page comes from the newest file that has it. Pages beyond the size of any later file are dropped, even if the
database grew again afterwards: truncation emptied them. The result covers all transactions: it begins with the first
file's TXID and pre-apply checksum and ends with the last one's TXID, size, time and post-apply checksum. The WAL
fields mean nothing any more and are zero; the epoch is that of the newest file. If the first file is a snapshot, so is
the result.

The rules are those of superfly/ltx (compactor.go), stricter in two points: files must follow each other without
overlap, and where checksums are kept each file's must continue the one before.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol

from pylitefs.errors import FormatError
from pylitefs.formats.ltx.encoder import Encoder
from pylitefs.formats.ltx.format import HEADER_FLAG_NO_CHECKSUM, Header, Trailer


class Source(Protocol):
    """One file to merge; `decoder.Reader` is one.

    Iterating gives (pgno, page) ascending, once; when it ends the trailer is there and the file verified.
    """

    header: Header
    trailer: Trailer | None

    def __iter__(self) -> Iterator[tuple[int, bytes]]: ...


def compacted_header(headers: Sequence[Header], flags: int = 0) -> Header:
    """The header of the merged file. FormatError if the files do not follow each other.

    `flags` are those of the result. `HEADER_FLAG_NO_CHECKSUM` drops the database checksums, which `litestream
    restore` needs up to at least 0.5.16 (litestream issue 1427); without it every file must have them.
    """
    if not headers:
        raise FormatError("LTX compaction: no files")
    for before, after in itertools.pairwise(headers):
        if before.page_size != after.page_size:
            raise FormatError(f"LTX compaction: page sizes differ: {before.page_size} and {after.page_size}")
        if after.min_txid != before.max_txid + 1:
            raise FormatError(
                f"LTX compaction: transaction {after.min_txid:016x} does not follow {before.max_txid:016x}, "
                "files are missing"
            )
    keeps_checksums = not flags & HEADER_FLAG_NO_CHECKSUM
    if keeps_checksums and not all(header.has_checksums for header in headers):
        raise FormatError("LTX compaction: a file without database checksums cannot become one with them")
    first, last = headers[0], headers[-1]
    header = Header(
        flags=flags,
        page_size=first.page_size,
        commit=last.commit,
        min_txid=first.min_txid,
        max_txid=last.max_txid,
        timestamp_ms=last.timestamp_ms,
        pre_apply_checksum=first.pre_apply_checksum if keeps_checksums else 0,
        epoch=max(header.epoch for header in headers),
    )
    header.validate()
    return header


def compact(sources: Sequence[Source], flags: int = 0) -> Iterator[bytes]:
    """The merged file in chunks. The sources are given oldest first and read in step, one page of each in memory.

    A FormatError, also after the last page, means that what came out is not a file: throw it away.
    """
    header = compacted_header([source.header for source in sources], flags)
    encoder = Encoder(header)
    yield encoder.begin()
    for pgno, page in _merged(sources):
        yield encoder.page(pgno, page)
    checksum = _final_checksum(sources)
    yield encoder.finish(checksum if header.has_checksums else 0)


def _merged(sources: Sequence[Source]) -> Iterator[tuple[int, bytes]]:
    """The newest version of each page that is still in the database at the end, ascending."""
    streams = []
    limit = sources[-1].header.commit
    for age, source in enumerate(reversed(sources)):  # age 0 is the newest
        limit = min(limit, source.header.commit)
        streams.append(_aged(source, age, limit))
    previous = 0
    for pgno, _, page in heapq.merge(*streams):
        if pgno != previous:
            previous = pgno
            yield pgno, page


def _aged(source: Source, age: int, limit: int) -> Iterator[tuple[int, int, bytes]]:
    """Pages up to `limit` as (pgno, age, page), which sort the newest of a page first. Reads the source to its end."""
    for pgno, page in source:
        if pgno <= limit:
            yield pgno, age, page


def _final_checksum(sources: Sequence[Source]) -> int:
    """The last file's post-apply checksum, once every file is verified and continues the one before."""
    checksum = 0
    for index, source in enumerate(sources):
        header, trailer = source.header, source.trailer
        if trailer is None:
            raise FormatError(f"LTX compaction: the file from {header.min_txid:016x} on was not read to its end")
        if index and header.has_checksums and checksum and header.pre_apply_checksum != checksum:
            raise FormatError(
                f"LTX compaction: transaction {header.min_txid:016x} applies to checksum "
                f"{header.pre_apply_checksum:016x}, the one before leads to {checksum:016x}"
            )
        checksum = trailer.post_apply_checksum
    return checksum
