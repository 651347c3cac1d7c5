"""Apply on a replica: the daemon is the database's only WAL writer, as a SQLite connection would be one.

Readers (any SQLite) keep their snapshot, never wait for us, and we never wait for them. The daemon holds, through
the mount: SHARED on the database, DMS shared, WRITE and CKPT exclusive on -shm. Publication follows wal.c: frames,
hash tables, second copy of the header, first copy. Databases in a rollback mode are served the same way while
applications have them open: SQLite opens a database in WAL mode whenever a non-empty -wal stands beside it.

Who may change what, by the rules of wal.c. Nothing else touches -wal and -shm while a name can be opened:

    append frames, publish the header      WRITE
    cut off frames behind the header       WRITE: no snapshot reaches there (`SharedWal.adopt`)
    begin the WAL anew (new salts)         WRITE and READ1..4, with everything in the database file
    write the whole wal-index              WRITE, CKPT and RECOVER; or DMS exclusive, alone (`wal_index_rebuild`)
    remove -wal and -shm                   EXCLUSIVE on the database, with everything in the database file (`remove`)

Crash table
    frames written, header not     the transaction is invisible; the log has it, recovery applies it again
    daemon dies                    the locks are gone with it and so is the mount; recovery checkpoints the WAL
    daemon stops, others read      -wal and -shm stay as they are, the header is one that nobody opens (`retire`);
                                   recovery checkpoints the WAL when the last of them has gone
    -shm removed, -wal not         everything is in the database file: the WAL has the same pages once more
    power cut                      frames carry checksums: a prefix of whole transactions counts, the log redoes the
                                   rest
    checkpoint interrupted         WAL fsynced before, database fsynced after: the WAL still has every page
"""

from __future__ import annotations

import contextlib
import os
import secrets
import struct
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from pylitefs.engine import ofd_locks
from pylitefs.engine.files import DatabaseFiles, read_at, sync_folder, write_at
from pylitefs.engine.transaction import runs
from pylitefs.engine.wal_view import read_frames
from pylitefs.formats.ltx.checksum import page_checksum
from pylitefs.formats.ltx.format import lock_pgno
from pylitefs.formats.sqlite.locks import (
    READ0,
    READ1,
    read_lock,
)
from pylitefs.formats.sqlite.wal import WalHeader, encode_frames, frame_offset, page_offset
from pylitefs.formats.sqlite.wal_index import (
    BACKFILL_ATTEMPTED_OFFSET,
    BACKFILL_OFFSET,
    CHECKPOINT_INFO_OFFSET,
    HEADER_COPY_SIZE,
    READMARK_NOT_USED,
    REGION_SIZE,
    RETIRED_VERSION,
    VERSION,
    CheckpointInfo,
    HashTables,
    WalIndexHeader,
    read_mark_offset,
)
from pylitefs.ports import FileKind

RUN_FRAMES = 256
_COPY_PAGES = 1024  # of a checkpoint at a time in memory
_U32 = struct.Struct("=I")


class ReplicaWal:
    """The live WAL of one database on a replica. Used by the worker thread only."""

    def __init__(self, files: DatabaseFiles, page_size: int, commit: int, mode: int) -> None:
        self._files = files
        self.page_size = page_size
        self.commit = commit
        self._mode = mode
        self._database = self._wal = self._shm = -1
        self._tables = HashTables()
        self._change = 0
        self._header = WalHeader.create(page_size, 0, secrets.randbits(32), secrets.randbits(32))
        self._s0 = self._s1 = 0
        self.backfill = 0
        self._before: tuple[int, int, int] | None = None  # (mx_frame, s0, s1) when the open transaction began
        self._held: list[tuple[int, bytes]] = []  # its newest pages, not written yet
        self._unsynced = False
        self._unnamed = True  # the WAL's name may not be on the disk
        self._header_stale = False  # a generation was begun, its header is not in the file yet
        self.readers_are_out = False  # see `lock_readers_out`

    @property
    def mx_frame(self) -> int:
        return self._tables.mx_frame

    @property
    def size_bytes(self) -> int:
        return frame_offset(self.mx_frame + 1, self.page_size)

    # -- life ------------------------------------------------------------------------------------------------

    def _make_empty(self) -> None:
        os.ftruncate(self._wal, 0)
        self._write_wal_header()
        os.ftruncate(self._shm, 0)
        write_at(self._shm, bytes(REGION_SIZE), 0)
        marks = (0, READMARK_NOT_USED, READMARK_NOT_USED, READMARK_NOT_USED, READMARK_NOT_USED)
        write_at(self._shm, CheckpointInfo(0, marks, 0).pack(), CHECKPOINT_INFO_OFFSET)
        self._publish()

    def close(self) -> None:
        """Drop the locks. -wal and -shm stay as they are: whoever opens the database next goes on with them."""
        self._close_fds()

    def remove(self) -> bool:
        """As SQLite's last connection: remove -wal and -shm, and drop the locks. Everything must be checkpointed.
        False, and nothing has changed, while anybody else uses the database: the lock EXCLUSIVE is needed, because a
        connection in WAL mode holds SHARED as long as it has -wal and -shm open."""
        if self._before is not None or self.backfill < self.mx_frame or not ofd_locks.lock_exclusive(self._database):
            return False
        for kind in (FileKind.SHM, FileKind.WAL):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._files.live(kind))
        self._close_fds()
        return True

    def retire(self) -> None:
        """As `close`, while applications have it open: whoever does gets SQLITE_CANTOPEN from now on. Their descriptors
        outlive the mount, and the kernel would go on to pass their writes through, to a database that nobody replicates
        any more."""
        if self._shm >= 0:
            with contextlib.suppress(OSError):
                self._publish(RETIRED_VERSION)
        self._close_fds()

    def _close_fds(self) -> None:
        for fd in (self._wal, self._shm, self._database):
            if fd >= 0:
                with contextlib.suppress(OSError):
                    os.close(fd)
        self._wal = self._shm = self._database = -1
        self.readers_are_out = False

    # -- transactions ------------------------------------------------------------------------------------------

    def append(self, pages: Iterable[tuple[int, bytes]], commit: int) -> int:
        """One transaction: all `pages` become visible at once, the database has `commit` pages then. Returns how many
        frames it took. On an error (disk full) nothing became visible and the next one overwrites what was written."""
        self.begin()
        first = self.mx_frame
        try:
            for run in runs(pages, RUN_FRAMES):
                self.extend(run)
            self.finish(commit)
        except BaseException:
            self.roll_back()
            raise
        return self.mx_frame - first

    def begin(self) -> None:
        """Begin a transaction whose pages come in pieces (`extend`); nobody sees them before `finish`."""
        if self._before is not None:
            raise RuntimeError("a transaction is being appended already")
        if self.mx_frame == 0:
            self._restart_if_used()
        self._before = (self.mx_frame, self._s0, self._s1)

    def extend(self, pages: list[tuple[int, bytes]]) -> None:
        """The next pages. The last ones are held back: one of them becomes the commit frame."""
        self._held += pages
        while len(self._held) > RUN_FRAMES:
            self._write_run(self._held[:RUN_FRAMES], 0)
            self._held = self._held[RUN_FRAMES:]

    def finish(self, commit: int) -> None:
        """Commit. After an error (OSError) either call it again or `roll_back`."""
        if not self._held:  # only the size changed: a commit needs a frame to stand in
            self._held = [(1, self.read_page(1))]
        self._write_run(self._held, commit)
        self._held = []
        self._before = None
        self.commit = commit
        self._change = (self._change + 1) & 0xFFFFFFFF
        self._publish()
        self._unsynced = True

    def roll_back(self) -> None:
        """Forget a transaction that was begun; harmless if none was."""
        self._held = []
        if self._before is None:
            return
        before, self._s0, self._s1 = self._before
        self._before = None
        for offset, patch in self._tables.truncate(before):
            write_at(self._shm, patch, offset)

    def _write_run(self, run: list[tuple[int, bytes]], commit: int) -> None:
        pgnos = [pgno for pgno, _ in run]
        data = [page for _, page in run]
        frames, s0, s1 = encode_frames(self._header, pgnos, data, commit, self._s0, self._s1)
        write_at(self._wal, frames, frame_offset(self.mx_frame + 1, self.page_size))
        for offset, patch in self._tables.append(pgnos):
            write_at(self._shm, patch, offset)
        self._s0, self._s1 = s0, s1

    def _write_wal_header(self) -> None:
        write_at(self._wal, self._header.pack(), 0)
        self._s0, self._s1 = self._header.checksum1, self._header.checksum2

    def _publish(self, version: int = VERSION) -> None:
        header = WalIndexHeader(
            self._change, self._header.big_endian, self.page_size, self.mx_frame, self.commit,
            (self._s0, self._s1), self._header.salts,
        ).pack(version)  # fmt: skip
        write_at(self._shm, header, HEADER_COPY_SIZE)
        write_at(self._shm, header, 0)

    def read_page(self, pgno: int) -> bytes:
        """The newest version of a page."""
        frame = self._tables.lookup(pgno)
        if frame:
            return read_at(self._wal, self.page_size, page_offset(frame, self.page_size))
        return read_at(self._database, self.page_size, (pgno - 1) * self.page_size)

    def differing(self, sums: NDArray[np.uint64]) -> bool:
        """Whether a page of these frames is another one than these checksums say (index pgno - 1). Pages that no longer
        belong to the database do not count."""
        pgnos, frames = self._tables.latest_frames(1, self.mx_frame)
        inside = (pgnos <= self.commit) & (pgnos != lock_pgno(self.page_size))
        pgnos, frames = pgnos[inside], frames[inside]
        for at in range(0, len(pgnos), _COPY_PAGES):
            part = slice(at, at + _COPY_PAGES)
            pages = read_frames(self._wal, pgnos[part], frames[part], self.page_size)
            if any(page_checksum(pgno, page) != int(sums[pgno - 1]) for pgno, page in pages.items()):
                return True
        return False

    # -- checkpoint ------------------------------------------------------------------------------------------

    def sync(self) -> None:
        """Make what was appended durable, the first time the WAL's name too: a checkpoint that is cut off is finished
        from it, and an older WAL under that name would take the database back."""
        if self._unsynced or self._unnamed:
            os.fsync(self._wal)
            if self._unnamed:
                sync_folder(self._files.folder)
            self._unsynced = self._unnamed = False

    def checkpoint(self) -> bool:
        """Copy frames to the database as far as no reader needs the old pages (PASSIVE, by the rules of wal.c), and
        begin the WAL anew if nobody uses it. True if everything is in the database file."""
        if self._before is not None:
            return False  # frames of an open transaction stand behind the committed ones
        if self.mx_frame == 0:
            return True
        if self.backfill < self.mx_frame:
            self._backfill(self._safe_frame())
        if self.backfill < self.mx_frame:
            return False
        self._restart()
        return True

    def _info(self) -> CheckpointInfo:
        return CheckpointInfo.unpack(os.pread(self._shm, REGION_SIZE, CHECKPOINT_INFO_OFFSET)[:40])

    def _safe_frame(self) -> int:
        """The last frame that every reader has in its snapshot."""
        safe, info = self.mx_frame, self._info()
        for slot in range(1, 5):
            mark = info.read_marks[slot]
            if mark >= safe:
                continue
            if ofd_locks.try_lock(self._shm, read_lock(slot), exclusive=True):
                self._set_read_mark(slot, safe if slot == 1 else READMARK_NOT_USED)
                ofd_locks.unlock(self._shm, read_lock(slot))
            else:
                safe = mark
        return safe

    def _set_read_mark(self, slot: int, frame: int) -> None:
        write_at(self._shm, _U32.pack(frame), read_mark_offset(slot))

    def _backfill(self, safe: int) -> None:
        if safe <= self.backfill or not ofd_locks.try_lock(self._shm, READ0, exclusive=True):
            return
        try:
            write_at(self._shm, _U32.pack(safe), BACKFILL_ATTEMPTED_OFFSET)
            self.sync()
            self._copy_frames(self.backfill + 1, safe)
            if safe == self.mx_frame:
                os.ftruncate(self._database, self.commit * self.page_size)
            os.fsync(self._database)
            self.backfill = safe
            write_at(self._shm, _U32.pack(safe), BACKFILL_OFFSET)
        finally:
            ofd_locks.unlock(self._shm, READ0)

    def _copy_frames(self, first: int, last: int) -> None:
        """Each page's newest of these frames to its place in the database; neighbours in one write."""
        size = self.page_size
        pgnos, frames = self._tables.latest_frames(first, last)
        for at in range(0, len(pgnos), _COPY_PAGES):
            part = slice(at, at + _COPY_PAGES)
            pages = read_frames(self._wal, pgnos[part], frames[part], size)
            wanted = sorted(pgno for pgno in pages if pgno <= self.commit)
            start = 0
            for end in range(1, len(wanted) + 1):
                if end == len(wanted) or wanted[end] != wanted[end - 1] + 1:
                    run = b"".join([pages[pgno] for pgno in wanted[start:end]])
                    write_at(self._database, run, (wanted[start] - 1) * size)
                    start = end

    def _restart(self) -> bool:
        """walRestartHdr: new salts, no frames. Only if no reader holds a slot that points into the WAL."""
        if not ofd_locks.try_lock(self._shm, READ1, 4, exclusive=True):
            return False
        try:
            self._begin_generation()
        finally:
            ofd_locks.unlock(self._shm, READ1, 4)
        return True

    def _begin_generation(self) -> None:
        old = self._header
        self._header = WalHeader.create(
            self.page_size, old.checkpoint_seq + 1, (old.salt1 + 1) & 0xFFFFFFFF, secrets.randbits(32)
        )
        self._tables.clear()
        self._publish()
        write_at(self._shm, _U32.pack(0), BACKFILL_OFFSET)
        write_at(self._shm, _U32.pack(0), BACKFILL_ATTEMPTED_OFFSET)
        self._set_read_mark(1, 0)
        for slot in (2, 3, 4):
            self._set_read_mark(slot, READMARK_NOT_USED)
        self.backfill = 0
        self._header_stale = True

    def _restart_if_used(self) -> None:
        """The first append of a generation writes the WAL's header, and has it on the disk before any frame, as SQLite
        does (wal.c, syncHeader): else a power cut might leave the old header with some of its frames, which take pages
        back."""
        if self._header_stale:
            self._write_wal_header()
            os.fsync(self._wal)
            self._header_stale = False

    # -- whole replacement -----------------------------------------------------------------------------------

    def lock_readers_out(self) -> bool:
        """Everything is in the database file, nobody is in a read transaction, and nobody begins one before
        `let_readers_in`. False, and nothing of that is so, if somebody is in one now."""
        if self.checkpoint() and not self.mx_frame:
            self.readers_are_out = ofd_locks.try_lock(self._shm, READ0, 5, exclusive=True)
        return self.readers_are_out

    def let_readers_in(self) -> None:
        if self.readers_are_out:
            self.readers_are_out = False
            ofd_locks.unlock(self._shm, READ0, 5)

    def replace(self, pages: Iterable[tuple[int, bytes]], page_size: int, commit: int) -> None:
        """Rewrite the database with another page size, in place, while readers are locked out. The caller has the
        pages safe elsewhere: after a crash in here they are applied again. The frames that lie in the WAL since the
        checkpoint are no longer what the database holds, so a new header ends them before the first page is written.
        """
        if not self.readers_are_out:
            raise RuntimeError("readers are not locked out")
        self._make_room(commit * page_size)
        self._restart_if_used()
        for pgno, page in pages:
            write_at(self._database, page, (pgno - 1) * page_size)
        os.ftruncate(self._database, commit * page_size)
        os.fsync(self._database)
        self.page_size, self.commit = page_size, commit
        self._change = (self._change + 1) & 0xFFFFFFFF
        self._begin_generation()
        self._restart_if_used()

    def _make_room(self, size_bytes: int) -> None:
        """So that a full disk is found before anything is overwritten."""
        try:
            os.posix_fallocate(self._database, 0, size_bytes)
        except OSError:
            os.ftruncate(self._database, self.commit * self.page_size)
            raise
