"""A whole database, read while it is being written, without a lock and without a wait for anybody.

*Fuzzy copy and redo.* Pages are read one after the other while transactions go on, so the copy mixes states between
`start` and now. Each page that changed in between is also in a log entry after `start`; applying those entries
to the copy makes it the state of the last of them.

Every page is checked against the checksum table. One that does not match was changed by a commit that was not in the
log yet: after a capture it is in an entry after `start`, so what was read of it does not matter. Or it is torn, and is
read again. So a snapshot also finds pages that the disk has damaged, and a busy writer does not hold it up.

Or somebody has written it who tells neither us nor the WAL. Where applications write, that is what happened unless it
is proven that the disk has changed the page (`proof`): the whole database is compared, what differs is recorded.

In the rollback modes SQLite may write pages of a transaction that it has not committed (its cache is full), and
nothing but the end of that transaction gives the committed ones back. Only then does a snapshot wait.
"""

from __future__ import annotations

import itertools
import logging
import os
import time

import numpy as np
from numpy.typing import NDArray

from pylitefs.engine.database import Database
from pylitefs.engine.files import write_at
from pylitefs.engine.transaction import UnstableSource
from pylitefs.engine.wal_view import WalView
from pylitefs.errors import DatabaseBusy, DatabaseError
from pylitefs.formats.ltx.checksum import database_checksum, page_checksums
from pylitefs.formats.ltx.decoder import Reader
from pylitefs.formats.ltx.format import Position, lock_pgno
from pylitefs.formats.sqlite.wal_index import latest_frames

log = logging.getLogger("litefs.snapshot")

CHUNK_BYTES = 1 << 20
CHUNK_WAIT_S = 0.1  # for a transaction to end, in one call of `next_chunk`
COPY_WAIT_S = 20.0  # the same for each chunk of `copy_to`
_ATTEMPTS = 40
_PAGE_ATTEMPTS = 5
_ALL = 1 << 32  # frames: none of those in the file counts any more


class DamagedPages(DatabaseError):
    """Pages on this disk do not match their checksums, and no transaction explains it. `pages`: and what they have."""

    def __init__(self, text: str, pages: dict[int, int]) -> None:
        super().__init__(text)
        self.pages = pages


class SnapshotReader:
    """Blocking; not for the worker or the event loop. `known`: the receiver's page checksums, to skip equal pages.
    `first`: the page to begin with."""

    def __init__(self, database: Database, known: NDArray[np.uint64] | None, first: int = 1) -> None:
        self._database = database
        self.start: Position = database.flush().result()
        self._pin = database.log.pin(self.start.txid)
        self.page_size = database.page_size
        self._commit = database.commit
        self._known = known
        self.next_pgno = first  # what the next call begins with
        self._wrong: dict[int, int] = {}  # pages that did not match when they were last read, and their checksums
        self._view = WalView(database.files, database.wal.has_index)
        self.run = max(1, CHUNK_BYTES // max(512, self.page_size))

    def next_chunk(self) -> list[tuple[int, bytes]] | None:
        """About 1 MB of (pgno, page); an empty list if nothing of this stretch differs; None at the end.

        DatabaseBusy if a transaction that is not committed has written here: the call may be repeated.
        DamagedPages if some stay different from what the log says (the disk has changed them): the next call goes on
        behind them.
        """
        first = self.next_pgno
        if first > self._commit:
            return None
        count = min(self.run, self._commit - first + 1)
        pages = self._try(first, count)
        if pages is None and self._database.captures:
            self._check_table()
            if self._is_written():
                self._database.compare().result()
                pages = self._try(first, count)
            if pages is None and self._is_written():
                raise DatabaseBusy(f"{self._database.name}: it is written in a way that cannot be followed")
        self.next_pgno += count
        if pages is None:
            raise self._is_damaged(self._wrong or dict.fromkeys(range(first, first + count), 0))
        return pages

    def _try(self, first: int, count: int) -> list[tuple[int, bytes]] | None:
        """The pages of one stretch; None if some (`_wrong`) stay different from what the log says. DatabaseBusy."""
        until_s, unexplained = time.monotonic() + CHUNK_WAIT_S, 0
        self._wrong = {}
        for attempt in itertools.count():
            if self._database.page_size != self.page_size:
                raise DatabaseError(f"{self._database.name}: the page size changed during a snapshot; it is begun anew")
            pages = self._read(first, count)
            if pages is not None:
                return pages
            if self._wrong and self._wrong.items() <= self._database.damage.items():
                return None  # as it is known
            if not self._is_being_written():
                unexplained += 1
                if unexplained == _ATTEMPTS:
                    return None
            elif time.monotonic() >= until_s:
                raise DatabaseBusy(
                    f"{self._database.name}: a transaction that is not committed has written to the database file: "
                    "end it, or open the database once if its process is gone"
                )
            self._database.flush().result()
            time.sleep(min(0.001 * (1 << min(attempt, 6)), 0.05))
        raise AssertionError

    def _is_written(self) -> bool:
        """Where applications write: whether one of them may have written what was found to differ. The damage among it
        is noted first, so that it is not recorded as theirs."""
        database = self._database
        with database.lock:
            wanted = {pgno: int(database.table.values[pgno - 1]) for pgno in self._wrong if pgno <= database.commit}
        damaged = {
            pgno: self._wrong[pgno]
            for pgno, checksum in wanted.items()
            if database.damage.get(pgno) == self._wrong[pgno] or database.sound.proves(pgno, checksum)
        }
        if damaged:
            self._note_damage(damaged)
        if others := sorted(self._wrong.keys() - damaged.keys()):
            log.warning(
                "%s: %s, and nothing proves that it was the disk: they are recorded as an application's",
                database.name, _told(others, "differ from what was logged"),
            )  # fmt: skip
        return len(damaged) < len(self._wrong) or not self._wrong

    def _check_table(self) -> None:
        """A table of checksums that is damaged itself says nothing about pages. Raises DamagedPages."""
        database = self._database
        with database.lock:
            if database_checksum(database.table.values[: database.commit]) == database.position.checksum:
                return
        reason = f"{database.name}: the table of page checksums does not add up"
        database.emit("damaged", reason=reason, pages=len(self._wrong))
        self.next_pgno = min(self.next_pgno + self.run, self._commit + 1)
        raise DamagedPages(reason, self._wrong)

    def _note_damage(self, wrong: dict[int, int]) -> str:
        reason = f"{self._database.name}: {_told(sorted(wrong), 'do not match their checksums')}"
        self._database.note_damage(reason, wrong)
        return reason

    def _is_damaged(self, wrong: dict[int, int]) -> DamagedPages:
        reason = self._note_damage(wrong)
        return DamagedPages(f"{reason}; restore a backup if neither the log nor another node has them", wrong)

    def page(self, pgno: int) -> bytes | None:
        """One page, if it is what the log says, or becomes so in a moment."""
        for attempt in range(_PAGE_ATTEMPTS):
            if pgno > self._database.commit or self._database.page_size != self.page_size:
                return None
            pages = self._read(pgno, 1)
            if pages is not None:
                return pages[0][1] if pages else None
            self._database.flush().result()
            time.sleep(0.001 * (1 << attempt))
        return None

    def checksums(self) -> NDArray[np.uint64]:
        """Of all pages as they are; 0 where the file is too short. UnstableSource if they cannot be read in peace."""
        parts = [np.zeros(0, dtype=np.uint64)]
        for first in range(1, self._commit + 1, self.run):
            count = min(self.run, self._commit - first + 1)
            for attempt in range(_ATTEMPTS):
                try:
                    data = self._run_now(first, count)
                    break
                except UnstableSource:
                    if attempt + 1 == _ATTEMPTS:
                        raise DatabaseBusy(f"{self._database.name}: it is written to all the time") from None
            parts.append(page_checksums(first, bytes(data), self.page_size))
        return np.concatenate(parts)

    def _is_being_written(self) -> bool:
        """Whether the file may hold pages of a transaction in a rollback mode that has not come to its end."""
        return self._database.rollback.pending or self._database.rollback.journal_in_use()

    def _read(self, first: int, count: int) -> list[tuple[int, bytes]] | None:
        """The pages of one stretch that differ from the receiver's; None if some do not match the table now."""
        size, skip = self.page_size, lock_pgno(self.page_size)
        before = self.expected(first, count)
        try:
            data = self._run_now(first, count)
        except UnstableSource:
            return None
        found = page_checksums(first, bytes(data), size)
        after = before
        if not np.array_equal(found, before):
            self._database.flush().result()
            after = self.expected(first, count)
        # Pages cut off meanwhile are not sent; one that changed in the log meanwhile is in an entry after `start`.
        inside = max(0, min(count, self._database.commit - first + 1))
        wrong = np.flatnonzero(((found != after) & (before == after))[:inside])
        if len(wrong):
            self._wrong = dict(zip((wrong + first).tolist(), found[wrong].tolist(), strict=True))
            return None
        wanted = np.ones(inside, dtype=bool)
        if self._known is not None:
            theirs = self._known[first - 1 : first - 1 + inside]
            wanted[: len(theirs)] = theirs != found[: len(theirs)]
        return [
            (first + int(index), bytes(data[index * size : (index + 1) * size]))
            for index in np.flatnonzero(wanted)
            if first + int(index) != skip
        ]

    def expected(self, first: int, count: int) -> NDArray[np.uint64]:
        """The checksums of this stretch at the head of the log; 0 past the end of the database."""
        expected = np.zeros(count, dtype=np.uint64)
        with self._database.lock:
            known = self._database.table.values[first - 1 : first - 1 + count]
            expected[: len(known)] = known
        return expected

    def _run_now(self, first: int, count: int) -> bytearray:
        """These pages as they are: from the file, and what is newer from the WAL. Of what a checkpoint has copied the
        file counts, which readers may use as well. Raises UnstableSource."""
        self._view.close()  # files may have been replaced since the last chunk
        copied = self._copied_frames()
        data = bytearray(self._view.database_run(first, count, self.page_size))
        pending = self._database.wal.pending
        now = self._view.committed()
        if now is not None and now.mx_frame and now.page_size == self.page_size:
            pgnos, frames = latest_frames(self._view.pgnos(1, now.mx_frame), 1)
            self._overlay_frames(data, first, count, pgnos[frames > copied], frames[frames > copied])
        if pending is not None and not pending.gone and pending.tail.stands(self._view):
            self._overlay_frames(data, first, count, pending.tail.pgnos, pending.tail.numbers)
        return data

    def _copied_frames(self) -> int:
        """So many frames of the WAL are in the database file; 0 where that cannot be told. SQLite notes it when the
        file was synced (wal.c, nBackfill)."""
        replica = self._database.replica
        if replica is not None:
            return replica.backfill if replica.mx_frame else _ALL
        info = self._view.checkpoint_info() if self._view.has_index() else None
        return info.backfill if info is not None else 0

    def _overlay_frames(
        self, data: bytearray, first: int, count: int, pgnos: NDArray[np.uint32], frames: NDArray[np.uint32]
    ) -> None:
        inside = (pgnos >= first) & (pgnos < first + count)
        for pgno, page in self._view.frame_pages(pgnos[inside], frames[inside], self.page_size):
            data[(pgno - first) * self.page_size : (pgno - first + 1) * self.page_size] = page

    def close(self) -> None:
        self._pin.close()
        self._view.close()


def _told(pgnos: list[int], what: str) -> str:
    few = ", ".join(map(str, pgnos[:8])) + (f" and {len(pgnos) - 8} more" if len(pgnos) > 8 else "")
    return f"pages {what}: {few}"


def file_checksums(database: Database) -> NDArray[np.uint64]:
    """The checksums of all pages as the files hold them, whatever they should be. Blocking; not for the worker. What is
    committed meanwhile may be in or not."""
    reader = SnapshotReader(database, None)
    try:
        return reader.checksums()
    finally:
        reader.close()


def copy_to(database: Database, path: str) -> Position:
    """Write a consistent copy, byte for byte what SQLite sees, to `path`. Blocking; not for the worker."""
    reader = SnapshotReader(database, None)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        while (pages := _patiently(reader)) is not None:
            for pgno, page in pages:
                write_at(fd, page, (pgno - 1) * reader.page_size)
        position, commit = redo_after(database, reader.start, fd)
        os.ftruncate(fd, (commit or database.commit) * reader.page_size)
        os.fsync(fd)
        return position
    finally:
        os.close(fd)
        reader.close()


def _patiently(reader: SnapshotReader) -> list[tuple[int, bytes]] | None:
    until_s = time.monotonic() + COPY_WAIT_S
    while True:
        try:
            return reader.next_chunk()
        except DatabaseBusy:
            if time.monotonic() >= until_s:
                raise


def redo_after(database: Database, start: Position, fd: int) -> tuple[Position, int]:
    """Apply the log after `start` to a copy: (the position reached, its size in pages; 0 if there was nothing)."""
    target = database.log.head
    txid, commit = start.txid, 0
    while txid < target.txid:
        entry = database.log.after(txid)
        if entry is None:
            raise DatabaseError(f"{database.name}: the log has a hole after {txid:016x}; try again")
        reader = Reader(entry.chunks())
        for pgno, page in reader:
            write_at(fd, page, (pgno - 1) * reader.header.page_size)
        txid, commit = entry.max_txid, reader.header.commit
    return (target if txid == target.txid else start), commit
