"""What SQLite's locks on a -shm tell, asked of the kernel only: any thread may."""

from __future__ import annotations

from pylitefs.engine import ofd_locks
from pylitefs.engine.files import DatabaseFiles
from pylitefs.engine.page_checksums import stamp
from pylitefs.engine.wal_view import index_in_use
from pylitefs.formats.sqlite.locks import CKPT, WRITE


class WalLocks:
    """`shm_fd`: a descriptor of the mount's -shm, or -1 while there is none."""

    def __init__(self, files: DatabaseFiles) -> None:
        self.files = files
        self.shm_fd = -1

    def checkpoint_running(self) -> bool:
        """Whether a process holds CKPT (True if that cannot be known)."""
        fd = self.shm_fd
        if fd < 0:
            return True
        try:
            return ofd_locks.write_locked(fd, CKPT) is not None or not index_in_use(fd)
        except OSError:
            return True

    def has_index(self) -> bool:
        """Whether there is a -shm that is in use."""
        return index_in_use(self.shm_fd) if self.shm_fd >= 0 else stamp(self.files.shm) != (0, 0)

    def checkpoint_restarts(self) -> bool:
        """Whether the checkpoint that runs also wants the WAL to itself (FULL, RESTART, TRUNCATE hold WRITE too)."""
        fd = self.shm_fd
        if fd < 0:
            return True
        try:
            return ofd_locks.write_locked(fd, WRITE) == ofd_locks.write_locked(fd, CKPT)
        except OSError:
            return True

    def is_checkpoint_only(self) -> bool:
        """Whether a checkpoint runs and nobody can be committing: an fsync of the WAL is then the checkpoint's."""
        fd = self.shm_fd
        try:
            return fd >= 0 and ofd_locks.write_locked(fd, CKPT) is not None and not self._write_held(fd)
        except OSError:
            return False

    def nobody_writes(self) -> bool:
        """Whether WRITE is free. Who is in `locking_mode=EXCLUSIVE` does not take it: the database's lock tells."""
        fd = self.shm_fd
        try:
            return fd >= 0 and not self._write_held(fd)
        except OSError:
            return False

    @staticmethod
    def _write_held(fd: int) -> bool:
        return ofd_locks.write_locked(fd, WRITE) is not None
