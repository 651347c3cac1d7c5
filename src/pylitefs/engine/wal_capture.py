"""Capture in WAL mode: every committed transaction into the log, from beside the application.

The cursor says up to which frame of which WAL generation (salts) the log holds everything. A pass takes all
committed frames after it at once, keeps each page's newest version and writes one LTX entry.

Nothing may be lost between two passes. A frame is overwritten only after a checkpoint has copied all frames to
the database, and before a checkpoint copies anything it fsyncs the WAL (except with synchronous=OFF). That fsync
reaches us, and is answered only when the capture has reached the end: so in general no lock is needed.
Where it does not suffice (synchronous=OFF, or a backlog too large to wait for) there is the *barrier*, a shared
lock on a read slot whose mark is "not used": it stops a WAL restart and limits no checkpoint.
Whatever was missed all the same is noticed: SQLite's commit counter must have grown by exactly the commits seen
(*gap detector*). Then the database itself is compared with the checksum table (*repair by diff*). The counter begins
anew with a new wal-index, or one that a process makes anew; without any, a restart of the WAL is believed to have
taken nothing away only if the capture was at the end when the checkpoint before it ended, and it is the next restart.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pylitefs.engine.barrier import Barrier
from pylitefs.engine.batches import COLLECT_BYTES, FRESH, IN_DOUBT, Batch, CollectedQueue, Cursor, Missed
from pylitefs.engine.files import DatabaseFiles
from pylitefs.engine.page_checksums import stamp
from pylitefs.engine.pending import Pending, Tail, Uncommitted, after, find_tail, take_back
from pylitefs.engine.transaction import Change, UnstableSource
from pylitefs.engine.wal_compare import WalPages
from pylitefs.engine.wal_locks import WalLocks
from pylitefs.engine.wal_view import Committed, WalView
from pylitefs.formats.ltx.format import lock_pgno
from pylitefs.formats.sqlite.wal import FRAME_HEADER_SIZE, frame_offset
from pylitefs.formats.sqlite.wal_index import latest_frames
from pylitefs.ports import FileKind

BARRIER_FRAMES = 4096
COLLECT_FRAMES = 4096  # a batch of so many frames may be held in memory
_U32 = 1 << 32


class WalCapture(WalLocks):
    """The observer of one database's WAL. The worker uses it; a FUSE thread may, for a moment, with `mutex`."""

    def __init__(self, files: DatabaseFiles, known_sums: Callable[[], NDArray[np.uint64]]) -> None:
        """`known_sums`: the page checksums at the log's head."""
        super().__init__(files)
        self._known_sums = known_sums
        self.view = WalView(files)
        self._pages = WalPages(self.view)
        self.cursor = FRESH
        self.barrier = Barrier()
        self.pending: Pending | None = None  # in the log, and not committed yet, see `pending`
        self.uncommitted = Uncommitted()
        self.mutex = threading.RLock()  # guards cursor and view, and what goes into `collected`
        self.collected = CollectedQueue()  # taken into memory, not in the log yet
        self._awaited: Committed | None = None  # what a checkpoint that runs may overwrite afterwards
        self._asked = self._answered = 0  # checkpoints of which that is not known, and those that had everything
        self._synced: Cursor | None = None
        self._left = FRESH  # the end of the generation before, while its successor stands in the wal-index only
        self._index_had_bytes = self._index_is_new = False
        self._fsync_failed = False
        self._refused: tuple[int, int] | None = None  # salts under which an fsync failed
        self._file_alone = False  # the log has the database file since then, and what the WAL holds stands on top

    # -- what happened to the files --------------------------------------------------------------------------

    def created(self, kind: FileKind) -> list[int]:
        """A new -wal or -shm. A new wal-index counts commits from zero. Returns descriptors to close."""
        self.view.forget(kind)
        closable: list[int] = []
        self.uncommitted.index_end = None
        if kind is FileKind.SHM:
            closable = self._forget_shm()
            # Unless a pass has seen commits already, when this was still on its way to us.
            self.cursor = replace(self.cursor, change=None if self.cursor.frame else 0)
        elif kind is FileKind.WAL:
            self._left = FRESH
            if not self.in_doubt:
                self.cursor = Cursor(None, 0, self.cursor.change)
        return closable

    def removed(self, kind: FileKind) -> list[int]:
        """The -wal or -shm goes away. If not all of the WAL was taken, the next pass compares the whole database."""
        if kind is FileKind.WAL:
            self.cursor = IN_DOUBT if self._is_incomplete() else FRESH
            self.pending, self.uncommitted, self._file_alone = None, Uncommitted(), False
            self._fsync_failed, self._refused, self._synced, self._left = False, None, None, FRESH
        elif kind is FileKind.SHM:
            self.uncommitted.index_end = self.view.committed() if self.view.has_index() else None
        self.view.forget(kind)
        return self._forget_shm() if kind is FileKind.SHM else []

    def _is_incomplete(self) -> bool:
        if self.in_doubt or self._fsync_failed or self._refused is not None or self.pending is not None:
            return True
        with contextlib.suppress(OSError):
            return self.backlog() != 0
        return False

    def release(self) -> list[int]:
        """Close what is open; what is known stays. Returns descriptors to close."""
        self.view.close()
        return self._forget_shm()

    def forget_all(self) -> list[int]:
        self.cursor, self._left, self.pending, self._file_alone = FRESH, FRESH, None, False
        return self.release()

    def file_was_recorded(self) -> None:
        """The log has the database file alone, beside a WAL that is empty at that moment. What it says from now on is
        new, also frames that were taken before and are put back. Any thread, under the database's lock."""
        self._file_alone = True

    def begin_here(self) -> None:
        """The database file is about to be read as it is; what its WAL has follows. A restart in between is a gap."""
        with contextlib.suppress(OSError):
            now = self.view.committed()
            self.cursor = FRESH if now is None or not now.mx_frame else Cursor(now.salts, 0, None)

    def before_index_truncate(self) -> None:
        """A process that is alone makes the wal-index anew: its commit counter begins at zero. A new -shm is truncated
        too, while it is empty. On a FUSE thread, with `after_index_truncate` before the process goes on."""
        self._index_had_bytes = stamp(self.files.shm)[0] > 0

    def after_index_truncate(self) -> None:
        if self._index_had_bytes:
            self._index_is_new = True

    def fsync_failed(self) -> None:
        """An application's fsync failed, and it was not told yet: without a wal-index nobody could tell later if it
        took its newest commit back. Any thread."""
        self._fsync_failed = True
        self.uncommitted.note_failed(self.view, self.mutex)

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

    # -- one pass --------------------------------------------------------------------------------------------

    def backlog(self) -> int:
        """Committed frames that are not in the log yet."""
        now = self._committed()
        if now is None:
            return 0
        return now.mx_frame - self.cursor.frame if now.salts == self.cursor.salts else now.mx_frame

    def commit_may_follow(self) -> bool:
        """Whether the WAL has a frame behind the cursor, or was begun anew: of a commit that is not published yet, or
        was since the last pass (so the published end cannot tell). A later commit has yet to write, which wakes us."""
        header, cursor = self.view.wal_header(), self.cursor
        if header is None or header.salts != cursor.salts or self._file_alone:
            return header is not None
        return self.view.frame_exists(cursor.frame + 1, header.page_size, header.salts)

    @property
    def in_doubt(self) -> bool:
        return self._file_alone or self.cursor.salts == IN_DOUBT.salts

    def _committed(self) -> Committed | None:
        """What is committed. The first frame of a generation brings its salts into the WAL; until then a process that
        has to read the WAL anew goes on in the one before."""
        now, left = self.view.committed(), self._left
        now = None if now is None else self.uncommitted.without(now, self.view, self.pending)
        if now is not None and self.cursor.frame == 0 and now.salts == left.salts and now.mx_frame >= left.frame:
            self.cursor = left
        return now

    def _look(self) -> Committed | None:
        """What is committed; and what that says of the cursor."""
        if self._file_alone:
            self._file_alone = False
            self.doubt()
        if self._index_is_new:
            self._index_is_new = False
            self._uncount()
        now = self._committed()
        if self.view.torn:
            self.view.torn = False
            self._uncount()
        if self.view.rewound:
            self.view.rewound, self._refused = False, None
            self.doubt()
        if now is None:
            return None
        if self._fsync_failed:
            self._fsync_failed, self._refused = False, now.salts
        if self.pending is not None and self.pending.look(now, self.view):
            self._is_published(self.pending.tail, now)
        if now.salts == self.cursor.salts and now.change is not None:
            if self.cursor.change is not None and (now.change - self.cursor.change) % _U32 > _U32 // 2:
                self._uncount()
            if self.cursor.change is None and now.mx_frame == self.cursor.frame:
                self.cursor = replace(self.cursor, change=now.change)
        return now

    def _is_published(self, tail: Tail, now: Committed) -> None:
        self.pending, old, last = None, self.cursor, now.mx_frame
        if old.salts in (None, tail.salts) or not self._gap(now, self.view.commit_count(1, last, now.page_size)):
            self.cursor = after(tail, now, old)

    def _uncount(self) -> None:
        """SQLite's commit counter does not go on from where the cursor saw it."""
        old = self.cursor
        self.cursor = IN_DOUBT if old.salts is None and old.change is not None else replace(old, change=None)

    def next_batch(self, *, diff: bool = True) -> Batch | None:
        """What was committed since the cursor; None if nothing was. Raises UnstableSource: ask again. If transactions
        were missed: a comparison with the log, which must have all that was collected; Missed without `diff`."""
        now = self._look()
        cursor = self.cursor
        gone = self.pending if self.pending is not None and self.pending.gone else None
        if now is None:
            return None
        if now.mx_frame == 0 and cursor.salts is None and cursor.change in (None, now.change) and gone is None:
            return None
        if now.salts == cursor.salts and now.mx_frame == cursor.frame:
            return take_back(gone, self._pages, now, cursor.frame + 1) if gone else None
        first = cursor.frame + 1
        gap = False
        if now.salts != cursor.salts or now.mx_frame < cursor.frame:
            first = 1
            if now.mx_frame == 0:
                # Restarted, nothing written yet: frames of the old generation may be gone.
                gap = self._gap(now, 0)
                if not gap:
                    self._left = replace(cursor, change=None)
                    if gone:
                        return take_back(gone, self._pages, now, 1)
                    self.cursor = Cursor(now.salts, 0, now.change)
                    return None
            elif now.page_size == 0 or not self.view.salts_are(now.salts):
                raise UnstableSource  # the new generation's header is not written yet
            else:
                gap = self._gap(now, self.view.commit_count(1, now.mx_frame, now.page_size))
        else:
            self._synced = None
        if not gap:
            return take_back(gone, self._pages, now, first) if gone else self._batch(now, first)
        if not diff:
            raise Missed
        if self.pending is not None and self.pending.may_be_answered() and self.pending.tail.salts == now.salts:
            self.pending.give_up()  # the comparison would take it back
            raise UnstableSource
        return self.diff(now)

    def _gap(self, now: Committed, commits: int) -> bool:
        """Whether transactions of the generation before `now` were missed; `commits` are those under the new salts."""
        cursor = self.cursor
        if self._refused is not None:
            return True
        if now.change is None:
            # No wal-index to ask. A restart counts the first salt up by one (wal.c, walRestartHdr).
            if cursor.salts is None:
                return False
            return self._synced != cursor or now.salts[0] != (cursor.salts[0] + 1) % _U32
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
            change, self.view.frame_pages(pgnos, numbers, size), self._pages.reader(now), now,
            Cursor(now.salts, now.mx_frame, now.change), frames, pgnos=pgnos, numbers=numbers,
        )  # fmt: skip

    def unpublished(self) -> Tail | None:
        """Whole transactions behind the published ones, all of which the log has. Raises UnstableSource."""
        return find_tail(self.view, self.cursor, self._left.salts)

    def diff(self, now: Committed) -> Batch | None:
        """Everything in which the database differs from the log, as of a moment while this runs (see `wal_compare`).
        None if there is no database any more."""
        now = self._pages.sized(now)
        if not now.commit:
            return None
        later, wanted, from_file = self._pages.compare(now, self._known_sums())
        return Batch(
            Change(later.page_size, later.commit), self._pages.of(wanted, later),
            self._pages.reader(later), later, Cursor(later.salts, later.mx_frame, later.change),
            later.mx_frame, gap=True, from_file=from_file,
        )  # fmt: skip

    def is_stable(self, batch: Batch) -> bool:
        """Whether what the batch read was still what it claims to be."""
        now = batch.committed
        if now.mx_frame and not self.view.salts_are(now.salts):
            return False
        if not batch.gap and not batch.takes_back:
            return True
        # It read pages of the database file: none of them may have got a frame, which a checkpoint may have copied.
        end = self.view.committed()
        if end is None or end.salts != now.salts:
            return False
        if end.mx_frame <= now.mx_frame:
            return True
        return len(np.intersect1d(batch.from_file, self.view.pgnos(now.mx_frame + 1, end.mx_frame))) == 0

    def is_collectable(self, batch: Batch, known_commit: int) -> bool:
        """Whether a batch is small enough for `collect`: its frames, and the pages that the database gains, which need
        not have frames. `known_commit` as for `collect`."""
        pages = max(batch.frames, batch.change.commit - self._known_commit(known_commit))
        small = pages <= COLLECT_FRAMES and pages * batch.change.page_size <= COLLECT_BYTES
        return small and not batch.gap and not batch.takes_back

    def _known_commit(self, logged: int) -> int:
        return logged if self.collected.commit is None else self.collected.commit

    def collect(self, batch: Batch, known_commit: int) -> None:
        """Take a small batch's pages into memory and move the cursor past it: its frames may be overwritten from now
        on, the log gets them later. `known_commit`: the log's size in pages. Raises UnstableSource."""
        known_commit = self._known_commit(known_commit)
        pages = self.view.read_frames(batch.pgnos, batch.numbers, batch.change.page_size)
        commit = batch.change.commit
        if commit > known_commit:  # a page that was allocated and freed at once has no frame
            lock = lock_pgno(batch.change.page_size)
            for pgno in range(known_commit + 1, commit + 1):
                if pgno not in pages and pgno != lock:
                    pages[pgno] = batch.read_missing(pgno)
        if not self.is_stable(batch):
            raise UnstableSource
        self.collected.add(batch, pages)
        self.cursor = batch.cursor

    def doubt(self) -> None:
        """What was collected cannot be right: the next pass compares the whole database."""
        self.collected.clear()
        self.cursor = IN_DOUBT

    def advance(self, batch: Batch) -> None:
        """The log has everything up to here."""
        self.cursor = batch.cursor
        self.collected.commit = None
        if self.pending is not None and (batch.gap or batch.takes_back):
            self.uncommitted.taken_back, self.pending = self.pending.tail, None
        if batch.gap and batch.committed.salts != self._refused:
            self._refused = None

    def mark_synced(self, *, ends: bool = True) -> None:
        """A checkpoint is at its end (or may be on its way, not `ends`). What was committed before it should be in the
        log, or in memory."""
        asked = self._asked
        if self.in_doubt or self.backlog():
            self._synced = None
        else:
            self._synced, self._answered = self.cursor if ends else self._synced, asked

    # -- a checkpoint that runs ------------------------------------------------------------------------------

    def await_checkpoint(self) -> None:
        """A checkpoint begins; the frames committed so far must be taken before it ends (`is_awaited`)."""
        self._awaited = self.view.committed()

    def await_everything(self) -> None:
        """It may be that a checkpoint begins; nobody can tell how far it goes. Any thread."""
        self._asked += 1

    def is_awaited(self) -> bool:
        """Whether a checkpoint has to wait for us before it ends. Any thread."""
        awaited, cursor = self._awaited, self.cursor
        lacks = awaited is not None and (cursor.salts != awaited.salts or cursor.frame < awaited.mx_frame)
        return self._asked != self._answered or lacks or (awaited is not None and self._file_alone)

    # -- the barrier -----------------------------------------------------------------------------------------

    def hold_restart(self, fds: list[int]) -> bool:
        """Keep the WAL from being restarted while a large backlog is worked off; `fds` as for `Barrier.acquire`."""
        if not self.barrier.acquire(fds, self.view):
            return False
        # The lock protects the generation that is current now; an earlier one may be gone (a gap, then).
        now = self.view.committed()
        return now is not None and self.view.salts_are(now.salts)
