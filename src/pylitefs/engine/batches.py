"""What a pass over a WAL yields, see `wal_capture`: a batch to stream into the log, or pages taken into memory."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from pylitefs.engine.transaction import Change, Pages, ReadPage, UnstableSource
from pylitefs.engine.wal_view import Committed

COLLECT_BYTES = 16 << 20  # of pages that may be held in memory as one transaction
NONE: NDArray[np.uint32] = np.zeros(0, dtype=np.uint32)


@dataclass(frozen=True, slots=True)
class Cursor:
    """Frames 1..frame under `salts` are in the log. salts None: no generation seen yet. `change`: SQLite's commit
    counter at the cursor; None if unknown."""

    salts: tuple[int, int] | None
    frame: int
    change: int | None


FRESH = Cursor(None, 0, None)
IN_DOUBT = Cursor((-1, -1), 1, None)  # of no generation there is: the next pass compares the whole database


@dataclass(frozen=True, slots=True)
class Batch:
    """One pass: what to write, and where the cursor is afterwards. `gap`: transactions before it were missed."""

    change: Change
    pages: Pages
    read_missing: ReadPage
    committed: Committed
    cursor: Cursor
    frames: int
    gap: bool = False
    pgnos: NDArray[np.uint32] = field(default_factory=lambda: NONE)  # the pages, and the frames they are in
    numbers: NDArray[np.uint32] = field(default_factory=lambda: NONE)
    from_file: NDArray[np.uint32] = field(default_factory=lambda: NONE)  # pages taken from the database file
    takes_back: bool = False  # also brings back the pages of a pending transaction that did not come to be


class Missed(UnstableSource):
    """Transactions were missed: only a comparison of the whole database helps, and this is not the time for it."""


@dataclass(slots=True, eq=False)
class Collected:
    """Pages in memory that are to become one transaction of the log; none of them can be missing from the state
    before (`Batch.read_missing` is for a log that began anew meanwhile)."""

    change: Change
    pages: dict[int, bytes]
    read_missing: ReadPage
    _lock: threading.Lock = field(default_factory=threading.Lock)  # innermost: nothing is waited for under it
    _closed: bool = False  # on its way into the log

    def close(self) -> list[tuple[int, bytes]]:
        """Take in nothing any more; the pages in order."""
        with self._lock:
            self._closed = True
        return sorted(self.pages.items())

    def take_in(self, batch: Batch, pages: dict[int, bytes]) -> bool:
        """Add what was committed right after, in the same generation of the WAL: the next one begins after a
        checkpoint, and the state between is what a power cut leaves behind. False if that is not possible."""
        with self._lock:
            old, new = self.change, batch.change
            follows = old.wal_salts == new.wal_salts and old.wal_offset + old.wal_size == new.wal_offset
            if self._closed or not follows or (len(self.pages) + len(pages)) * new.page_size > COLLECT_BYTES:
                return False
            if new.commit < old.commit:
                self.pages = {pgno: page for pgno, page in self.pages.items() if pgno <= new.commit}
            self.pages.update(pages)
            self.change = replace(
                new, txids=old.txids + new.txids, wal_offset=old.wal_offset, wal_size=old.wal_size + new.wal_size
            )
            self.read_missing = batch.read_missing
            return True


class CollectedQueue:
    """What is in memory and not in the log yet, oldest first. One puts in and clears (who has `WalCapture.mutex`), one
    takes out (who has `Database.lock`), at the same time. `commit`: the size in pages of the newest state that was put
    in, also when it is in the log by now; None if something else came into the log after it."""

    def __init__(self) -> None:
        self._items: deque[Collected] = deque()
        self._lock = threading.Lock()  # innermost
        self.commit: int | None = None

    def __len__(self) -> int:
        return len(self._items)

    def add(self, batch: Batch, pages: dict[int, bytes]) -> None:
        """Put in what was committed after all that is here."""
        with self._lock:
            last = self._items[-1] if self._items else None
            if last is None or not last.take_in(batch, pages):
                self._items.append(Collected(batch.change, pages, batch.read_missing))
            self.commit = batch.change.commit

    def first(self) -> Collected | None:
        """The oldest. It stays here until it is `done`."""
        with self._lock:
            return self._items[0] if self._items else None

    def done(self, item: Collected) -> None:
        """It is in the log."""
        with self._lock:
            if self._items and self._items[0] is item:
                self._items.popleft()

    def clear(self) -> None:
        with self._lock:
            self._items.clear()
            self.commit = None
