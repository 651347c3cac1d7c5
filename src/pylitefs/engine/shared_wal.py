"""The WAL of a database whose writer changes: from applications to the daemon, and back.

The daemon never begins with an empty WAL in the place of another one. It takes the locks of a writer, and goes on with
what is there: in the wal-index that others use, or, where nobody has one, in one that it makes from the frames. If its
idea that nobody uses the database was wrong, a lock is in its way, or it shares the files: both are harmless.

Both write the same files by the same rules, so a change of the writer is a change of who holds WRITE and CKPT. What is
published (frames, salts, checksums, hash tables, read marks) stays as it is: readers in the middle of a transaction, of
either time, notice nothing.
"""

from __future__ import annotations

import contextlib
import os
import secrets

import numpy as np

from pylitefs.engine import ofd_locks
from pylitefs.engine.files import write_at
from pylitefs.engine.replica_wal import ReplicaWal
from pylitefs.engine.wal_index_rebuild import published_frames, rebuild_index
from pylitefs.engine.wal_view import Committed
from pylitefs.errors import DatabaseBusy, FormatError
from pylitefs.formats.sqlite.locks import CKPT, DMS, WRITE
from pylitefs.formats.sqlite.wal import WAL_HEADER_SIZE, WalHeader, frame_offset
from pylitefs.formats.sqlite.wal_index import (
    CHECKPOINT_INFO_OFFSET,
    HEADER_SIZE,
    CheckpointInfo,
    HashTables,
    pgno_locations,
    read_header,
)
from pylitefs.ports import FileKind

Descriptors = tuple[int, int, int]
"""Of the mount's database, -wal and -shm, open for reading and writing."""


class SharedWal(ReplicaWal):
    """A replica's WAL that applications have written before, or will afterwards. A checkpoint of theirs that was under
    way when it was adopted may hold CKPT for a while; it is ours when that ends."""

    _holds_checkpoint = True

    def checkpoint(self) -> bool:
        return self._may_checkpoint() and super().checkpoint()

    def _may_checkpoint(self) -> bool:
        if not self._holds_checkpoint and ofd_locks.try_lock(self._shm, CKPT, exclusive=True):
            self._holds_checkpoint = True
            self.backfill = min(self._info().backfill, self.mx_frame)
        return self._holds_checkpoint

    def open(self) -> None:
        """Become the writer of a database that nobody else writes. Whatever -wal and -shm are there, and whoever has
        them open, is gone on with: nothing that was committed is taken away from anybody. Raises DatabaseBusy,
        FormatError, OSError."""
        try:
            self._database = os.open(self._files.live(FileKind.DATABASE), os.O_RDWR | os.O_CLOEXEC)
            if not ofd_locks.lock_shared(self._database):
                raise DatabaseBusy(f"{self._files.name}: another process holds its lock exclusively")
            self._shm = self._create(FileKind.SHM)
            alone = self._lock_writer()
            self._wal = self._create(FileKind.WAL)
            if alone or read_header(os.pread(self._shm, HEADER_SIZE, 0)) is None:
                last = published_frames(self._shm, _wal_header(self._wal))
                if not rebuild_index(self._files, self._shm, last=last, shared=not alone):
                    raise DatabaseBusy(f"{self._files.name}: another process makes its wal-index anew")
            if alone:  # from now on others may map it
                ofd_locks.try_lock(self._shm, DMS, exclusive=False)
            self.adopt((self._database, self._wal, self._shm))
            self._restart_if_used()  # where it was not possible in `adopt`: SQLite looks for a WAL that is not empty
        except BaseException:
            self._close_fds()
            raise

    def _lock_writer(self) -> bool:
        """DMS, WRITE and CKPT. True if nobody else has the wal-index; DMS is exclusive then. Raises DatabaseBusy."""
        alone = ofd_locks.try_lock(self._shm, DMS, exclusive=True)
        for byte, exclusive in ((DMS, alone), (WRITE, True), (CKPT, True)):
            if not ofd_locks.try_lock(self._shm, byte, exclusive=exclusive):
                raise DatabaseBusy(f"{self._files.name}: another process holds lock byte {int(byte)} of its -shm")
        return alone

    def _create(self, kind: FileKind) -> int:
        fd = os.open(self._files.live(kind), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, self._mode)
        owner = os.fstat(self._database)
        with contextlib.suppress(OSError):
            os.fchmod(fd, self._mode)
            if os.geteuid() == 0:
                os.fchown(fd, owner.st_uid, owner.st_gid)
        return fd

    def begin_with(self, fds: Descriptors) -> None:
        """As `open`, with files that are open, and locked as there. Raises OSError; `fds` are the caller's then."""
        self._database, self._wal, self._shm = fds
        try:
            self._make_empty()
        except BaseException:
            self._database = self._wal = self._shm = -1
            raise

    def adopt(self, fds: Descriptors, *, holds_checkpoint: bool = True) -> None:
        """Go on with the WAL that applications have written, and use: the same files, locked as in `open` (CKPT may be
        missing), so that the wal-index says what is committed and nobody changes it. Raises FormatError, OSError;
        `fds` are the caller's then, and nobody can see a difference."""
        _, wal, shm = fds
        index = read_header(os.pread(shm, HEADER_SIZE, 0))
        if index is None:
            raise FormatError(f"{self._files.name}: its wal-index is damaged")
        info = CheckpointInfo.unpack(os.pread(shm, HEADER_SIZE, 0)[CHECKPOINT_INFO_OFFSET:])
        header = _wal_header(wal)
        tables = HashTables()
        if index.mx_frame:
            if header is None or header.salts != index.salts or header.page_size != self.page_size:
                raise FormatError(f"{self._files.name}: its wal-index does not belong to its WAL")
            pgnos = [os.pread(shm, 4 * count, at) for at, count in pgno_locations(1, index.mx_frame)]
            tables = HashTables.from_pgnos(np.frombuffer(b"".join(pgnos), dtype=np.uint32))
            if tables.mx_frame != index.mx_frame:
                raise FormatError(f"{self._files.name}: its wal-index is shorter than it says")
            self._header, self.commit = header, index.page_count
            self._s0, self._s1 = index.frame_checksum
        else:  # the first frame brings the header, and new salts
            seq = 0 if header is None else header.checkpoint_seq + 1
            # An index made for an empty WAL has no salts: two databases that counted from it would look like one.
            salt = secrets.randbits(32) if index.salts == (0, 0) else (index.salts[0] + 1) & 0xFFFFFFFF
            self._header = WalHeader.create(self.page_size, seq, salt, secrets.randbits(32))
            self._header_stale = True
        for offset, patch in tables.truncate(tables.mx_frame):  # without the traces of those who gave up
            write_at(shm, patch, offset)
        if index.mx_frame:  # a commit that failed at its fsync is whole: who has no wal-index would count it
            os.ftruncate(wal, frame_offset(index.mx_frame + 1, self.page_size))
        self._tables, self._change = tables, index.change
        self.backfill = min(info.backfill, index.mx_frame)
        self._unsynced, self._holds_checkpoint = True, holds_checkpoint
        self._database, self._wal, self._shm = fds
        if not index.mx_frame:
            self._publish()  # with its page size and commit, which an index made for an empty WAL does not know
            with contextlib.suppress(OSError):  # then the first frame tries again
                self._restart_if_used()

    def hand_over(self) -> tuple[Committed, Descriptors]:
        """What is published, for those who write from now on, and the files, still locked: the caller's. Raises
        OSError; then call it again, or close."""
        self.roll_back()
        self._restart_if_used()
        salts = self._header.salts
        end = Committed(salts, self.page_size, self.mx_frame, self.commit, self._change, self._s0, self._s1)
        fds = self._database, self._wal, self._shm
        self._database = self._wal = self._shm = -1
        return end, fds


def _wal_header(wal: int) -> WalHeader | None:
    try:
        return WalHeader.unpack(os.pread(wal, WAL_HEADER_SIZE, 0))
    except FormatError:
        return None
