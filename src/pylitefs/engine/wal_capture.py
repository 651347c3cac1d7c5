"""Capture in WAL mode: every committed transaction into the log, from beside the application.

The cursor says up to which frame of which WAL generation (salts) the log holds everything. A pass takes all
committed frames after it at once, keeps each page's newest version and writes one LTX entry.

Nothing may be lost between two passes. A frame is overwritten only after a checkpoint has copied all frames to
the database, and before a checkpoint copies anything it fsyncs the WAL (except with synchronous=OFF). That fsync
reaches us, and is answered only when the capture has reached the end: so in general no lock is needed.
Where it does not suffice (synchronous=OFF, or a backlog too large to wait for) there is the *barrier*, a shared
lock on a read slot whose mark is "not used": it stops a WAL restart and limits no checkpoint.
Whatever was missed all the same is noticed: SQLite's commit counter must have grown by exactly the commits seen
(*gap detector*). Then the database itself is compared with the checksum table (*repair by diff*).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from pylitefs.engine import ofd_locks
from pylitefs.engine.barrier import Barrier
from pylitefs.engine.batches import COLLECT_BYTES, FRESH, NONE, Batch, Collected, Cursor
from pylitefs.engine.files import DatabaseFiles
from pylitefs.engine.transaction import Change, UnstableSource
from pylitefs.engine.wal_seed import Seed
from pylitefs.engine.wal_view import Committed, WalView
from pylitefs.formats.ltx.checksum import page_checksums
from pylitefs.formats.ltx.format import lock_pgno
from pylitefs.formats.sqlite.locks import CKPT, WRITE
from pylitefs.formats.sqlite.wal import FRAME_HEADER_SIZE, frame_offset
from pylitefs.formats.sqlite.wal_index import (
    latest_frames,
)
from pylitefs.ports import FileKind

BARRIER_FRAMES = 4096
COLLECT_FRAMES = 4096  # a batch of so many frames may be held in memory
_DIFF_BYTES = 1 << 20
_U32 = 1 << 32


class WalCapture:
    """The observer of one database's WAL. The worker uses it; a FUSE thread may, for a moment, with `mutex`."""

    def __init__(self, files: DatabaseFiles, known_sums: Callable[[], NDArray[np.uint64]]) -> None:
        """`known_sums`: the page checksums at the log's head."""
        self.files = files
        self._known_sums = known_sums
        self.view = WalView(files)
        self.cursor = FRESH
        self.barrier = Barrier()
        self.shm_fd = -1  # the mount's -shm: to ask for locks with; in cached mode also to read it
        self.mutex = threading.RLock()  # guards cursor, view and `collected`
        self.collected: deque[Collected] = deque()  # taken into memory, not in the log yet
        self._awaited: Committed | None = None  # what a checkpoint that runs may overwrite afterwards
        self._synced: Cursor | None = None
        self._seeded: tuple[int, int] | None = None  # salts of a WAL that was begun by us, see `wal_seed`

    # -- what happened to the files --------------------------------------------------------------------------

    def created(self, kind: FileKind, seeded: Seed | None = None) -> list[int]:
        """A new -wal or -shm. A new wal-index counts commits from zero; what we wrote into the WAL is known already.
        Returns descriptors to close."""
        self.view.forget(kind)
        closable: list[int] = []
        if kind is FileKind.SHM:
            closable = self._forget_shm()
            # Unless a pass has seen commits already, when this was still on its way to us.
            fresh = self.cursor.frame == (1 if self._seeded == self.cursor.salts is not None else 0)
            self.cursor = Cursor(self.cursor.salts, self.cursor.frame, 0 if fresh else None)
        elif kind is FileKind.WAL:
            self._seeded = seeded.salts if seeded else None
            self.cursor = Cursor(self._seeded, 1 if seeded else 0, self.cursor.change)
        return closable

    def removed(self, kind: FileKind) -> list[int]:
        self.view.forget(kind)
        if kind is FileKind.SHM:
            return self._forget_shm()
        if kind is FileKind.WAL:
            self.cursor = FRESH
        return []

    def forget_all(self) -> list[int]:
        closable = self._forget_shm()
        self.view.close()
        self.cursor = FRESH
        return closable

    def use_shm(self, fd: int) -> None:
        """A descriptor of the mount's -shm, opened by the opener."""
        self.shm_fd = fd
        self.view.use_shm(fd)

    def _forget_shm(self) -> list[int]:
        closable = self.barrier.release()
        if self.shm_fd >= 0:
            closable.append(self.shm_fd)
            self.shm_fd = -1
            self.view.use_shm(-1)
        return closable

    def checkpoint_running(self) -> bool:
        """Whether a process holds CKPT (True if that cannot be known). Any thread; asks the kernel only."""
        fd = self.shm_fd
        if fd < 0:
            return True
        try:
            return ofd_locks.write_locked(fd, CKPT) is not None
        except OSError:
            return True

    def checkpoint_restarts(self) -> bool:
        """Whether the checkpoint that runs also wants the WAL to itself (FULL, RESTART, TRUNCATE hold WRITE too)."""
        fd = self.shm_fd
        if fd < 0:
            return True
        try:
            return ofd_locks.write_locked(fd, WRITE) == ofd_locks.write_locked(fd, CKPT)
        except OSError:
            return True

    # -- one pass --------------------------------------------------------------------------------------------

    def backlog(self) -> int:
        """Committed frames that are not in the log yet."""
        now = self.view.committed()
        if now is None:
            return 0
        return now.mx_frame - self.cursor.frame if now.salts == self.cursor.salts else now.mx_frame

    def commit_may_follow(self) -> bool:
        """Whether the WAL has frames of this generation after the committed ones: a transaction under way."""
        now = self.view.committed()
        if now is None or now.page_size == 0:
            return False
        return self.view.frame_exists(now.mx_frame + 1, now.page_size, now.salts)

    def next_batch(self) -> Batch | None:
        """What was committed since the cursor; None if nothing was. Raises UnstableSource: ask again."""
        now = self.view.committed()
        cursor = self.cursor
        if now is None or (now.mx_frame == 0 and cursor.salts is None and cursor.change in (None, now.change)):
            return None
        if now.salts == cursor.salts and now.mx_frame == cursor.frame:
            return None
        first = cursor.frame + 1
        gap = False
        if now.salts != cursor.salts or now.mx_frame < cursor.frame:
            first = 1
            if now.mx_frame == 0:
                # Restarted, nothing written yet: frames of the old generation may be gone.
                if self._gap(now, 0):
                    return self.diff(now)
                self.cursor = Cursor(now.salts, 0, now.change)
                return None
            if now.page_size == 0 or not self.view.salts_are(now.salts):
                raise UnstableSource  # the new generation's header is not written yet
            gap = self._gap(now, self.view.commit_count(1, now.mx_frame, now.page_size))
        if gap:
            return self.diff(now)
        return self._batch(now, first)

    def _gap(self, now: Committed, commits: int) -> bool:
        """Whether transactions of the generation before `now` were missed; `commits` are those under the new salts."""
        cursor = self.cursor
        if now.change is None:
            # No wal-index to ask: nothing is missed if the capture was at the end when a checkpoint synced the WAL.
            return cursor.salts is not None and cursor.frame > 0 and self._synced != cursor
        if cursor.change is None:
            return cursor.salts is not None
        return (now.change - cursor.change) % _U32 != commits

    def _batch(self, now: Committed, first: int) -> Batch:
        frames = now.mx_frame - first + 1
        commits = 0
        if now.change is not None and self.cursor.change is not None and now.salts == self.cursor.salts:
            commits = (now.change - self.cursor.change) % _U32
        if not 1 <= commits <= frames:
            commits = max(1, self.view.commit_count(first, now.mx_frame, now.page_size))
        pgnos, numbers = latest_frames(self.view.pgnos(first, now.mx_frame), first)
        inside = (pgnos <= now.commit) & (pgnos != lock_pgno(now.page_size))
        if not inside.all():
            pgnos, numbers = pgnos[inside], numbers[inside]
        size = now.page_size
        change = Change(
            size, now.commit, commits, frame_offset(first, size), frames * (size + FRAME_HEADER_SIZE), now.salts
        )
        return Batch(
            change, self.view.frame_pages(pgnos, numbers, size), lambda pgno: self._page(pgno, now), now,
            Cursor(now.salts, now.mx_frame, now.change), frames, pgnos=pgnos, numbers=numbers,
        )  # fmt: skip

    def _page(self, pgno: int, now: Committed) -> bytes:
        """One page as of `now`, wherever it is."""
        for candidate, page in self._pages_of(np.array([pgno], dtype=np.uint32), now):
            assert candidate == pgno
            return page
        raise UnstableSource

    def _pages_of(self, wanted: NDArray[np.uint32], now: Committed) -> Iterator[tuple[int, bytes]]:
        newest: dict[int, int] = {}
        if now.mx_frame:
            pgnos, frames = latest_frames(self.view.pgnos(1, now.mx_frame), 1)
            at = np.searchsorted(pgnos, wanted)
            inside = at < len(pgnos)
            hit = np.zeros(len(wanted), dtype=bool)
            hit[inside] = pgnos[at[inside]] == wanted[inside]
            newest = dict(zip(wanted[hit].tolist(), frames[at[hit]].tolist(), strict=True))
        for pgno in wanted.tolist():
            frame = newest.get(pgno)
            if frame is None:
                yield pgno, self.view.database_page(pgno, now.page_size)
            else:
                one = np.array([pgno], dtype=np.uint32), np.array([frame], dtype=np.uint32)
                yield from self.view.frame_pages(*one, now.page_size)

    # -- repair by diff --------------------------------------------------------------------------------------

    def diff(self, now: Committed) -> Batch:
        """Everything in which the database differs from the log, as of a moment while this runs.

        Two steps, because writers go on. First the database file is compared with the checksum table: a page without a
        frame in this generation is not written meanwhile, and one that gets a frame is in the second step anyway.
        Then the pages found, and all that have frames, are taken as of the newest commit.
        """
        differs = self._pages_that_differ(now)
        later = self.view.committed()
        if later is None or later.salts != now.salts or later.page_size != now.page_size:
            raise UnstableSource
        framed = np.unique(self.view.pgnos(1, later.mx_frame)) if later.mx_frame else NONE
        from_file = np.setdiff1d(differs, framed)
        wanted = np.union1d(from_file, framed).astype(np.uint32)
        wanted = wanted[(wanted <= later.commit) & (wanted != lock_pgno(later.page_size))]
        return Batch(
            Change(later.page_size, later.commit), self._pages_of(wanted, later), lambda pgno: self._page(pgno, later),
            later, Cursor(later.salts, later.mx_frame, later.change), later.mx_frame, gap=True, from_file=from_file,
        )  # fmt: skip

    def _pages_that_differ(self, now: Committed) -> NDArray[np.uint32]:
        """Pages of the database file whose checksum is not the table's."""
        known = self._known_sums()
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

    def is_stable(self, batch: Batch) -> bool:
        """Whether what the batch read was still what it claims to be."""
        now = batch.committed
        if now.mx_frame and not self.view.salts_are(now.salts):
            return False
        if not batch.gap:
            return True
        # A diff read pages of the database file: none of them may have got a frame, which a checkpoint may have copied.
        end = self.view.committed()
        if end is None or end.salts != now.salts:
            return False
        if end.mx_frame <= now.mx_frame:
            return True
        return len(np.intersect1d(batch.from_file, self.view.pgnos(now.mx_frame + 1, end.mx_frame))) == 0

    def is_collectable(self, batch: Batch) -> bool:
        """Whether a batch is small enough for `collect`."""
        return (
            not batch.gap
            and batch.frames <= COLLECT_FRAMES
            and batch.frames * batch.change.page_size <= COLLECT_BYTES
        )

    def collect(self, batch: Batch, known_commit: int) -> None:
        """Take a small batch's pages into memory and move the cursor past it: its frames may be overwritten from now
        on, the log gets them later. `known_commit`: the size in pages of the state before. Raises UnstableSource."""
        last = self.collected[-1] if self.collected else None
        if last is not None:
            known_commit = last.change.commit
        pages = self.view.read_frames(batch.pgnos, batch.numbers, batch.change.page_size)
        commit = batch.change.commit
        if commit > known_commit:  # a page that was allocated and freed at once has no frame
            lock = lock_pgno(batch.change.page_size)
            for pgno in range(known_commit + 1, commit + 1):
                if pgno not in pages and pgno != lock:
                    pages[pgno] = batch.read_missing(pgno)
        if not self.is_stable(batch):
            raise UnstableSource
        if last is None or not last.take_in(batch, pages):
            self.collected.append(Collected(batch.change, pages, batch.read_missing))
        self.cursor = batch.cursor

    def doubt(self) -> None:
        """What was collected cannot be right: the next pass compares the whole database."""
        self.collected.clear()
        self.cursor = Cursor((0, 0), 1, None)

    def advance(self, batch: Batch) -> None:
        self.cursor = batch.cursor

    def mark_synced(self) -> None:
        """The WAL was fsynced, and everything before that is in the log."""
        self._synced = self.cursor

    # -- a checkpoint that runs ------------------------------------------------------------------------------

    def await_checkpoint(self) -> None:
        """A checkpoint begins; the frames committed so far must be taken before it ends (`is_awaited`)."""
        self._awaited = self.view.committed()

    def is_awaited(self) -> bool:
        """Whether a checkpoint has to wait for us before it ends. Any thread."""
        awaited, cursor = self._awaited, self.cursor
        return awaited is not None and (cursor.salts != awaited.salts or cursor.frame < awaited.mx_frame)

    # -- the barrier -----------------------------------------------------------------------------------------

    def hold_restart(self, fds: list[int]) -> bool:
        """Keep the WAL from being restarted while a large backlog is worked off; `fds` as for `Barrier.acquire`."""
        if not self.barrier.acquire(fds, self.view):
            return False
        # The lock protects the generation that is current now; an earlier one may be gone (a gap, then).
        now = self.view.committed()
        return now is not None and self.view.salts_are(now.salts)


def wait_stable(attempt: int) -> None:
    """Between attempts of a read that was unstable."""
    time.sleep(min(0.0002 * (1 << attempt), 0.02))
