"""Rebuilding the primary's state on a replica whose own does not fit: only pages that differ travel.

The pages, and then the transactions that were committed while they were read, are collected beside the live
database. When the end is reached the checksum of the result is known (local checksums where nothing was sent), and only
if it is the primary's is anything changed: by one WAL transaction, which readers do not notice; or by putting a new
file in place where there was none, or one with another page size.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pylitefs.engine.apply import Apply
from pylitefs.engine.building import Building
from pylitefs.engine.database import Database
from pylitefs.engine.epochs import Lines
from pylitefs.engine.files import read_at, write_at
from pylitefs.engine.lost import State, keep_branch
from pylitefs.errors import FormatError
from pylitefs.formats.ltx.checksum import database_checksum, page_checksum
from pylitefs.formats.ltx.decoder import decode
from pylitefs.formats.ltx.format import Position, lock_pgno


class Resync:
    """On the worker. Pages are spooled in a sparse file at their own offsets; `_sums` has their checksums, 0 where
    none was sent."""

    def __init__(self, apply: Apply, database: Database, page_size: int, keep_branch_after: int | None) -> None:
        self._apply, self._database = apply, database
        self.page_size = page_size
        self._keep_branch_after = keep_branch_after
        self._building = Building(database)
        self._pin = database.log.pin(database.log.head.txid)  # also of one that was dropped: it is in use
        self._sums: NDArray[np.uint64] = np.zeros(1024, dtype=np.uint64)
        self._count = 0

    def pages(self, pages: list[tuple[int, bytes]]) -> None:
        """FormatError for a page of the wrong size."""
        for pgno, page in pages:
            if len(page) != self.page_size or pgno < 1:
                raise FormatError(f"snapshot page {pgno}: {len(page)} bytes instead of {self.page_size}")
            if pgno > len(self._sums):
                grown = np.zeros(max(pgno, 2 * len(self._sums)), dtype=np.uint64)
                grown[: len(self._sums)] = self._sums
                self._sums = grown
            write_at(self._building.fd, page, (pgno - 1) * self.page_size)
            self._sums[pgno - 1] = page_checksum(pgno, page)
            self._count += 1

    def transaction(self, data: bytes) -> None:
        """A transaction committed while the pages were read: one whole LTX file."""
        ltx = decode(data)
        if ltx.header.commit and ltx.header.page_size != self.page_size:
            raise FormatError("the page size changed during the snapshot")
        self.pages(list(ltx.pages))

    def finish(self, commit: int, position: Position, epochs: Lines = ()) -> Position:
        """FormatError if the result would not be `position`; everything is then as before. `epochs`: of the history
        that led there."""
        try:
            return self._finish(commit, position, epochs)
        finally:
            self.abort()

    def _finish(self, commit: int, position: Position, epochs: Lines) -> Position:
        database = self._database
        sums = np.zeros(commit, dtype=np.uint64)
        patch = database.exists and database.page_size == self.page_size and database.set_aside_reason is None
        if patch:
            local = database.page_checksums()[:commit]
            sums[: len(local)] = local
        sent = self._sums[:commit]
        mask = sent != 0
        sums[: len(sent)][mask] = sent[mask]
        missing = np.flatnonzero(sums == 0) + 1
        lock = lock_pgno(self.page_size) if self.page_size else 0
        if any(int(pgno) != lock for pgno in missing) or database_checksum(sums) != position.checksum:
            raise FormatError(f"{database.name}: the snapshot does not add up to {position}")
        if self._keep_branch_after is not None:  # the primary never had it: kept, never deleted by us
            keep_branch(database, self._keep_branch_after, State(position, self.page_size, sums))
        database.unclean()
        if commit == 0:
            self._apply.remove_files(database)
        elif patch:
            wanted = np.flatnonzero(mask) + 1
            self._apply.install(database, self._spooled(wanted), self.page_size, commit)
        else:
            os.ftruncate(self._building.fd, commit * self.page_size)
            self._apply.replace_files(database, self._building)
        database.reposition(position, self.page_size, commit, sums, epochs)
        if not patch or not commit:
            self._apply.forget_names(database)
        database.applied_s = time.monotonic()
        database.set_aside_reason = None
        if database.was_measured:  # the pages that differ were told by what the files hold
            database.was_measured = False
            database.note_healed(database.damage, "primary")
        database.emit("resync", pages=self._count, bytes=self._count * self.page_size)
        return position

    def _spooled(self, wanted: NDArray[np.int64]) -> Iterator[tuple[int, bytes]]:
        for pgno in wanted.tolist():
            yield pgno, read_at(self._building.fd, self.page_size, (pgno - 1) * self.page_size)

    def abort(self) -> None:
        self._pin.close()
        with contextlib.suppress(OSError):
            self._building.__exit__()
