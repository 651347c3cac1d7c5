"""Synchronous replication: commits that are in the log, and not published yet.

With `synchronous=FULL` SQLite writes a commit's frames, fsyncs the WAL, and only then publishes them in the wal-index
(wal.c, sqlite3WalFrames; pager.c holds WRITE all the while). So at that fsync the commit is whole in the WAL and
nobody can see it. It goes into the log then, as *pending*, and the fsync is answered when enough replicas hold it.

It need not come to be: the fsync fails and SQLite takes it back, or the process is killed. The next writer then writes
over its frames. So the cursor stays before them, and every look asks what became of them:

    the published frames reach over them, and the last    committed: the cursor moves, nothing is recorded again (the
    one has the same checksum (it covers all before)      checksum chain covers the content)
    … and it has another                                  taken back
    the WAL was begun anew                                taken back, or the gap detector finds a commit too many
    other frames stand there, unpublished                 taken back
    every fsync that waited for it has failed             taken back
    nobody holds WRITE, nor the database exclusively,     taken back: who commits holds one of them until it publishes
    and somebody uses the wal-index
    … and nobody does: all were killed                    undecided: who opens it next counts every whole frame
    none of these                                         undecided

What was taken back is in the log, and on replicas. The next transaction of the log then also brings its pages back to
what they are now. It still stands in the WAL, and so does any other commit whose fsync failed: see `Uncommitted`. A
process of an application that makes the wal-index anew counts every whole frame, also of these: then that is a new
commit, and is recorded as one.

A pending entry does not say which frames it holds: if it is taken back others stand there, and a power cut that takes
the rest of the log would leave it as false evidence (see `evidence`).
"""

from __future__ import annotations

import contextlib
import errno
import threading
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from pylitefs.engine.batches import NONE, Batch, Cursor
from pylitefs.engine.continuation import proceed
from pylitefs.engine.transaction import Change, UnstableSource
from pylitefs.engine.wal_compare import WalPages
from pylitefs.engine.wal_view import Committed, WalView
from pylitefs.formats.ltx.format import lock_pgno
from pylitefs.formats.sqlite.wal import FRAME_HEADER_SIZE, WalHeader, scan_frames
from pylitefs.formats.sqlite.wal_index import WalIndexHeader, latest_frames
from pylitefs.ports import Then

_FIRST_RUN, _LONGEST_RUN = 16, 256  # frames read at once
_CHECKSUM = slice(8, FRAME_HEADER_SIZE)  # of a frame's header: salts and checksum
_MUTEX_S = 0.02
_U32 = 1 << 32

Pgnos = NDArray[np.uint32]


@dataclass(frozen=True, slots=True, eq=False)
class Tail:
    """Frames first..last, whole transactions that are not published. `pgnos`: the pages they hold, ascending, and
    `numbers` the frames with the newest version of each. `head`: the last frame's salts and checksum."""

    salts: tuple[int, int]
    page_size: int
    commit: int
    first: int
    last: int
    head: bytes
    pgnos: Pgnos
    numbers: Pgnos

    def stands(self, view: WalView) -> bool:
        """Whether these frames are still in the WAL."""
        return view.salts_are(self.salts) and view.frame_head(self.last, self.page_size)[_CHECKSUM] == self.head


class Wait:
    """What an fsync waits for beside the disk. `done` once, from any thread; later calls change nothing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._result: tuple[BaseException | None] | None = None
        self._then: list[Then] = []
        self.failed: bool | None = None  # what the caller of the fsync was told

    def done(self, error: BaseException | None) -> None:
        with self._lock:
            if self._result is not None:
                return
            self._result = (error,)
            waiting, self._then = self._then, []
        for then in waiting:
            proceed(then, error)

    def told(self, *, failed: bool) -> None:
        """The caller of an fsync is told this. One that was told of success makes it a success."""
        self.failed = failed and self.failed is not False

    def then(self, call: Then) -> None:
        """Call now, or when it is done."""
        with self._lock:
            if self._result is None:
                self._then.append(call)
                return
            error = self._result[0]
        call(error)


@dataclass(slots=True, eq=False)
class Pending:
    """`tail` is in the log as part of the transactions up to `txid`. `index_salts`: what the wal-index said then.
    `waits`: the fsyncs that are answered when replicas hold it."""

    tail: Tail
    txid: int
    index_salts: tuple[int, int]
    waits: list[Wait] = field(default_factory=list)
    gone: bool = False  # taken back
    quiet: bool = True  # it is too early for a writer that was killed

    def rests(self) -> bool:
        """Whether there is nothing to see: its writer, who keeps others out, waits for an answer."""
        return self.quiet and any(wait.failed is None for wait in self.waits)

    def succeeded(self) -> bool:
        """Whether an fsync of it was answered with success: its application may have been told that it is committed."""
        return any(wait.failed is False for wait in self.waits)

    def all_failed(self) -> bool:
        return bool(self.waits) and all(wait.failed for wait in self.waits)

    def may_be_answered(self) -> bool:
        """Whether an fsync has been, or may still be, answered with success."""
        return not self.gone and not self.all_failed()

    def look(self, now: Committed, view: WalView) -> bool:
        """What became of it, see the table above; True if it is committed."""
        tail = self.tail
        if now.salts != tail.salts:
            fresh = now.mx_frame == 0 and now.salts == self.index_salts and view.salts_are(tail.salts)
            self.gone = self.gone or not fresh or self.all_failed()
            return False
        if now.mx_frame < tail.last:
            self.gone = self.gone or now.mx_frame >= tail.first or self.all_failed()
            return False
        if not self.gone and tail.stands(view):
            return True
        if not view.salts_are(tail.salts):
            raise UnstableSource
        self.gone = True
        return False

    def give_up(self) -> None:
        """Have what waits for it fail."""
        for wait in self.waits:
            wait.done(OSError(errno.EIO, "the transaction cannot be replicated any more"))

    def pages_lost(self, now: Committed) -> Pgnos:
        """The pages that have to be as in `now` again: those it changed, and those it cut off."""
        cut = np.arange(self.tail.commit + 1, now.commit + 1, dtype=np.uint32)
        pgnos = np.union1d(self.tail.pgnos, cut).astype(np.uint32)
        return np.asarray(pgnos[(pgnos <= now.commit) & (pgnos != lock_pgno(now.page_size))], dtype=np.uint32)


def take_back(pending: Pending, pages: WalPages, now: Committed, first: int) -> Batch:
    """What brings the log back to `now`: the pages of a transaction that did not come to be, and frames first.., which
    were committed since."""
    now, view = pages.sized(now), pages.view
    framed = view.pgnos(1, now.mx_frame) if now.mx_frame else NONE
    since = framed[first - 1 :]
    commits = view.commit_count(first, now.mx_frame, now.page_size) if len(since) else 0
    wanted = np.union1d(pending.pages_lost(now), since).astype(np.uint32)
    wanted = wanted[(wanted <= now.commit) & (wanted != lock_pgno(now.page_size))]
    return Batch(
        Change(now.page_size, now.commit, max(1, commits)), pages.of(wanted, now), pages.reader(now),
        now, Cursor(now.salts, now.mx_frame, now.change), len(since),
        takes_back=True, from_file=np.setdiff1d(wanted, framed).astype(np.uint32),
    )  # fmt: skip


def after(tail: Tail, now: Committed, before: Cursor) -> Cursor:
    """The cursor behind a tail, one transaction, that was published."""
    if now.change is None or now.mx_frame == tail.last:
        return Cursor(tail.salts, tail.last, now.change)
    return Cursor(tail.salts, tail.last, None if before.change is None else (before.change + 1) % _U32)


@dataclass(slots=True)
class Uncommitted:
    """Transactions that stand whole in the WAL, perhaps, and are known not to be committed: the application was told of
    an error, or killed before it was told anything. `taken_back`: by the log, last. `failed`: whose fsync failed last.
    `index_end`: the wal-index's end, if that was removed in order.

    The same frames may be written once more and be committed then (an application tries again). So they are left out
    only where a wal-index says as well that it ends right before them.
    """

    taken_back: Tail | None = None
    failed: Tail | None = None
    index_end: Committed | None = None

    def tails(self, pending: Pending | None = None) -> list[Tail]:
        """All of these, and one that is pending, unless its application was told of success."""
        undecided = pending.tail if pending is not None and not pending.succeeded() else None
        return [tail for tail in (self.taken_back, self.failed, undecided) if tail is not None]

    def note_failed(self, view: WalView, mutex: threading.RLock) -> None:
        """An fsync of the WAL fails, and the writer still keeps all others out. `mutex` guards `view`; without it
        nothing is noted, and the frames count where they alone tell, as natively. Any thread."""
        if mutex.acquire(timeout=_MUTEX_S):
            try:
                with contextlib.suppress(OSError):
                    self.failed = find_unpublished(view) or self.failed
            finally:
                mutex.release()

    def behind(self, end: Committed | WalIndexHeader, view: WalView, pending: Pending | None) -> Tail | None:
        """The one that stands right behind the end of a wal-index."""
        for tail in self.tails(pending):
            if end.mx_frame == tail.first - 1 and (end.salts == tail.salts or not end.mx_frame) and tail.stands(view):
                return tail
        return None

    def without(self, now: Committed, view: WalView, pending: Pending | None) -> Committed:
        """`now`, where the frames alone say it; but without what the wal-index did not count: one that was removed in
        order, by a last user who removes the WAL next, or one that all have left, who were killed."""
        end = None if now.change is not None else self.index_end or view.left_index()
        tail = None if end is None else self.behind(end, view, pending)
        if end is None or tail is None or (now.salts, now.mx_frame) != (tail.salts, tail.last):
            return now
        return replace(end, salts=now.salts, page_size=now.page_size, change=None)


def find_unpublished(view: WalView) -> Tail | None:
    """As `find_tail`, wherever the capture has come to; None also where that cannot be told now."""
    now, header = view.committed(), view.wal_header()
    if now is None or now.change is None or header is None or (now.mx_frame and header.salts != now.salts):
        return None
    if not now.mx_frame and header.salts != now.salts and _is_old(header, now, set()):
        return None
    start = (now.s0, now.s1) if now.mx_frame else (header.checksum1, header.checksum2)
    return _scan(view, header, now.mx_frame + 1, start)


def find_tail(view: WalView, cursor: Cursor, left: tuple[int, int] | None) -> Tail | None:
    """The whole transactions that stand behind the published frames, which are those up to the cursor; None if there is
    none. `left`: salts of the generation before. Raises UnstableSource."""
    now, header = view.committed(), view.wal_header()
    if header is None:
        return None
    if now is None or (now.mx_frame and (now.salts, now.mx_frame) != (cursor.salts, cursor.frame)):
        raise UnstableSource
    if now.mx_frame:
        if header.salts != now.salts or header.page_size != now.page_size:
            raise UnstableSource  # the index of another WAL
        start = now.s0, now.s1
    elif header.salts != now.salts and _is_old(header, now, {cursor.salts, left}):
        return None
    else:
        start = header.checksum1, header.checksum2
    return _scan(view, header, now.mx_frame + 1, start)


def _is_old(header: WalHeader, now: Committed, known: set[tuple[int, int] | None]) -> bool:
    """Whether the WAL still has the generation before: it is begun anew in the wal-index first, with the first salt
    counted up by one (wal.c, walRestartHdr); its header follows with the first frame."""
    return header.salts in known or (now.salts != (0, 0) and now.salts[0] == (header.salt1 + 1) % _U32)


def _scan(view: WalView, header: WalHeader, first: int, start: tuple[int, int]) -> Tail | None:
    pgnos: list[Pgnos] = []
    at, (s0, s1), run = first, start, _FIRST_RUN
    count, commit = 0, 0  # frames of whole transactions, and the size after them
    while True:
        scan = scan_frames(header, view.raw_frames(at, run, header.page_size), s0, s1)
        pgnos.append(scan.pgnos)
        if scan.committed:
            count, commit = at - first + scan.committed, int(scan.commits[scan.committed - 1])
        at, s0, s1 = at + scan.count, scan.s0, scan.s1
        if scan.count < run:
            break
        run = min(2 * run, _LONGEST_RUN)
    if not count:
        return None
    found, numbers = latest_frames(np.concatenate(pgnos)[:count], first)
    inside = (found <= commit) & (found != lock_pgno(header.page_size))
    last = first + count - 1
    head = view.frame_head(last, header.page_size)[_CHECKSUM]
    return Tail(
        header.salts, header.page_size, commit, first, last, head, found[inside], numbers[inside]
    )  # fmt: skip
