"""Writes one LTX file from a database's pages, and moves the database's position.

The order is the crash policy: pages go to a temporary file; when all are in and the source says that they
were stable, the file gets its name; then the checksum table and the position in memory follow. Whatever dies
in between leaves either no entry or a whole one, and the table is rebuilt after a crash.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from pylitefs.engine.ltx_log import LogEntry, LtxLog
from pylitefs.engine.page_checksums import PageChecksums
from pylitefs.formats.ltx.checksum import checksums_of
from pylitefs.formats.ltx.encoder import Encoder
from pylitefs.formats.ltx.format import CHECKSUM_FLAG, Header, Position, lock_pgno

_RUN_PAGES, _RUN_BYTES = 256, 4 << 20
_MAX_PARTS = 1000  # below the kernel's limit of buffers for one writev

Pages = Iterable[tuple[int, bytes]]
ReadPage = Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class Change:
    """What a new transaction does to the database. `txids`: how many transactions it stands for."""

    page_size: int
    commit: int
    txids: int = 1
    wal_offset: int = 0
    wal_size: int = 0
    wal_salts: tuple[int, int] = (0, 0)
    timestamp_ms: int = 0


class UnstableSource(Exception):
    """The pages changed while they were read; nothing was written."""


def wait_stable(attempt: int) -> None:
    """Between attempts of a read that was unstable."""
    time.sleep(min(0.0002 * (1 << attempt), 0.02))


class TransactionWriter:
    """One transaction on top of (`position`, `old_commit`) of a database with this log and checksum table."""

    def __init__(
        self, log: LtxLog, table: PageChecksums, position: Position, old_page_size: int, old_commit: int,
        change: Change, *, compress: bool = True, epoch: int = 0,
    ) -> None:  # fmt: skip
        self._log, self._table, self._change = log, table, change
        fresh = position.txid == 0
        rebuilt = fresh or old_page_size != change.page_size or old_commit == 0
        self._old_commit = 0 if rebuilt else old_commit
        self._rebuilt = rebuilt
        self._checksum = CHECKSUM_FLAG if rebuilt else position.checksum
        self.header = Header(
            flags=0,
            page_size=change.page_size,
            commit=change.commit,
            min_txid=position.txid + 1,
            max_txid=position.txid + max(1, change.txids),
            timestamp_ms=change.timestamp_ms or int(time.time() * 1000),
            pre_apply_checksum=0 if fresh else position.checksum,
            wal_offset=change.wal_offset,
            wal_size=change.wal_size,
            wal_salt1=change.wal_salts[0] if change.wal_offset else 0,
            wal_salt2=change.wal_salts[1] if change.wal_offset else 0,
            epoch=epoch,
        )
        self._encoder = Encoder(self.header, compress=compress)
        self._pgnos: list[NDArray[np.uint32]] = []
        self._sums: list[NDArray[np.uint64]] = []
        self.page_count = 0
        self.bytes_written = 0

    def write(self, pages: Pages, read_missing: ReadPage, is_stable: Callable[[], bool]) -> LogEntry | None:
        """Write `pages` (ascending) and make the file the head of the log; None if nothing changed.

        Pages that the database gained but that are not among `pages` are taken from `read_missing`, because SQLite does
        not write a page that was allocated and freed in one transaction. `is_stable` is asked when all pages
        were read. Raises UnstableSource, OSError (disk full); the log is then as before.
        """
        temporary = self._log.temporary()
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            try:
                rest = self._write_pages(fd, self._with_missing(pages, read_missing))
                if not is_stable():
                    raise UnstableSource
                if not self.page_count and self._change.commit == self._old_commit and not self._rebuilt:
                    return None
                rest.append(self._encoder.finish(self._checksum))
                self._write_parts(fd, rest)
            finally:
                os.close(fd)
            entry = self._log.publish(temporary, self.header, self._checksum)
            temporary = ""
        finally:
            if temporary:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
        self._update_table()
        return entry

    def _with_missing(self, pages: Pages, read_missing: ReadPage) -> Pages:
        """`pages` and those of old_commit+1..commit that are not among them, in order."""
        expected = self._old_commit + 1
        skip, commit = lock_pgno(self._change.page_size), self._change.commit
        for pgno, page in pages:
            if pgno > commit:
                break
            while expected < pgno:
                if expected != skip:
                    yield expected, read_missing(expected)
                expected += 1
            yield pgno, page
            if pgno >= expected:
                expected = pgno + 1
        for pgno in range(expected, commit + 1):
            if pgno != skip:
                yield pgno, read_missing(pgno)

    def _write_pages(self, fd: int, pages: Pages) -> list[bytes]:
        """Encode the pages that changed; returns what is not written yet (all of it, for a small transaction)."""
        self._table.reserve(max(self._change.commit, self._old_commit))
        parts: list[bytes] = [self._encoder.begin()]
        for run in runs(pages, min(_RUN_PAGES, _RUN_BYTES // self._change.page_size)):
            if len(parts) + 2 * len(run) > _MAX_PARTS:
                self._write_parts(fd, parts)
                parts = []
            parts += self._encoder.run(self._changed(run))
        if self._change.commit < self._old_commit:
            gone = self._table.values[self._change.commit : self._old_commit]
            self._checksum ^= int(np.bitwise_xor.reduce(gone))
        self._checksum |= CHECKSUM_FLAG
        return parts

    def _changed(self, run: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
        """Those that are not as the table says, exchanged in the database's checksum."""
        pgnos = np.fromiter((pgno for pgno, _ in run), np.uint32, len(run))
        new = checksums_of(run)
        old = np.zeros(len(run), dtype=np.uint64)
        known = int(np.searchsorted(pgnos, self._old_commit, side="right"))  # they ascend
        old[:known] = self._table.values[pgnos[:known] - 1]
        differs = new != old
        if not differs.all():
            run = [item for item, changed in zip(run, differs.tolist(), strict=True) if changed]
            pgnos, new, old = pgnos[differs], new[differs], old[differs]
        self._checksum ^= int(np.bitwise_xor.reduce(new)) ^ int(np.bitwise_xor.reduce(old))
        self._pgnos.append(pgnos)
        self._sums.append(new)
        self.page_count += len(run)
        return run

    def _write_parts(self, fd: int, parts: list[bytes]) -> None:
        written, total = os.writev(fd, parts), sum(map(len, parts))
        self.bytes_written += total
        if written != total:  # a full disk writes what fits first, and fails on the rest
            rest = memoryview(b"".join(parts))[written:]
            while rest:
                rest = rest[os.write(fd, rest) :]

    def _update_table(self) -> None:
        values = self._table.values
        if self._pgnos:
            values[np.concatenate(self._pgnos) - 1] = np.concatenate(self._sums)
        if self._rebuilt:
            lock = lock_pgno(self._change.page_size)
            if lock <= self._change.commit:
                values[lock - 1] = 0
            values[self._change.commit :] = 0
        else:
            values[self._change.commit : self._old_commit] = 0


def runs(pages: Pages, count: int) -> Iterator[list[tuple[int, bytes]]]:
    """`pages` in lists of up to `count`."""
    rest = iter(pages)
    while run := list(islice(rest, count)):
        yield run
