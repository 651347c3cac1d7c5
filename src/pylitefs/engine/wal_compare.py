"""Pages of a database in WAL mode as of one commit, and which of them the log does not have (*repair by diff*)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pylitefs.engine.batches import NONE
from pylitefs.engine.rollback_capture import database_size
from pylitefs.engine.transaction import ReadPage, UnstableSource
from pylitefs.engine.wal_view import Committed, WalView
from pylitefs.errors import FormatError
from pylitefs.formats.ltx.checksum import page_checksums
from pylitefs.formats.ltx.format import lock_pgno
from pylitefs.formats.sqlite.wal_index import latest_frames

_DIFF_BYTES = 1 << 20

Pgnos = NDArray[np.uint32]


class WalPages:
    """Used where its view is used. Everything raises UnstableSource where something was overwritten meanwhile."""

    def __init__(self, view: WalView) -> None:
        self.view = view

    def reader(self, now: Committed) -> ReadPage:
        """Reads one page as of `now` by its number, wherever it is. What the WAL has is looked up at the first call
        only: a database may have gained a million pages that nobody wrote."""
        newest: dict[int, int] | None = None

        def read(pgno: int) -> bytes:
            nonlocal newest
            if newest is None:
                pgnos, frames = self._newest(now)
                newest = dict(zip(pgnos.tolist(), frames.tolist(), strict=True))
            return self._page(pgno, newest.get(pgno), now)

        return read

    def of(self, wanted: Pgnos, now: Committed) -> Iterator[tuple[int, bytes]]:
        """(pgno, page) as of `now`, in the given order."""
        newest: dict[int, int] = {}
        if now.mx_frame:
            pgnos, frames = self._newest(now)
            at = np.searchsorted(pgnos, wanted)
            inside = at < len(pgnos)
            hit = np.zeros(len(wanted), dtype=bool)
            hit[inside] = pgnos[at[inside]] == wanted[inside]
            newest = dict(zip(wanted[hit].tolist(), frames[at[hit]].tolist(), strict=True))
        for pgno in wanted.tolist():
            yield pgno, self._page(pgno, newest.get(pgno), now)

    def _newest(self, now: Committed) -> tuple[Pgnos, Pgnos]:
        """(page numbers in order, the newest frame of each)."""
        if not now.mx_frame:
            return NONE, NONE
        return latest_frames(self.view.pgnos(1, now.mx_frame), 1)

    def _page(self, pgno: int, frame: int | None, now: Committed) -> bytes:
        if frame is None:
            return self.view.database_page(pgno, now.page_size)
        one = np.array([pgno], dtype=np.uint32), np.array([frame], dtype=np.uint32)
        for _, page in self.view.frame_pages(*one, now.page_size):
            return page
        raise UnstableSource

    def sized(self, now: Committed) -> Committed:
        """With page size and number of pages: the index of an empty WAL may not know them. 0 pages if there is no
        database."""
        if now.mx_frame or (now.page_size and now.commit):
            return now
        try:
            page_size, commit = database_size(*self.view.database_header())
        except FormatError:
            return replace(now, commit=0)
        return replace(now, page_size=page_size, commit=commit)

    def compare(self, now: Committed, known: NDArray[np.uint64]) -> tuple[Committed, Pgnos, Pgnos]:
        """(as of when, pages that may differ from `known`, those of them that are in the database file only).
        `known`: the page checksums at the log's head.

        Two steps, because writers go on. First the database file is compared with the checksum table: a page without a
        frame in this generation is not written meanwhile, and one that gets a frame is in the second step anyway.
        Then the pages found, and all that have frames, are taken as of the newest commit.
        """
        differs = self._that_differ(now, known)
        later = self.view.committed()
        if later is None:
            raise UnstableSource
        later = self.sized(later)
        if later.salts != now.salts or later.page_size != now.page_size:
            raise UnstableSource
        framed = np.unique(self.view.pgnos(1, later.mx_frame)) if later.mx_frame else NONE
        from_file = np.setdiff1d(differs, framed)
        wanted = np.union1d(from_file, framed).astype(np.uint32)
        wanted = wanted[(wanted <= later.commit) & (wanted != lock_pgno(later.page_size))]
        return later, wanted, from_file

    def _that_differ(self, now: Committed, known: NDArray[np.uint64]) -> Pgnos:
        """Pages of the database file whose checksum is not the table's."""
        found = [NONE]
        run = max(1, _DIFF_BYTES // now.page_size)
        for first in range(1, now.commit + 1, run):
            count = min(run, now.commit - first + 1)
            data = self.view.database_run(first, count, now.page_size)
            sums = page_checksums(first, data, now.page_size)
            expected = np.zeros(count, dtype=np.uint64)
            part = known[first - 1 : first - 1 + count]
            expected[: len(part)] = part
            found.append((np.flatnonzero(sums != expected) + first).astype(np.uint32))
        return np.concatenate(found)
