"""The barrier: keeps a WAL from being restarted while a large backlog is worked off, and limits no checkpoint."""

from __future__ import annotations

import contextlib

from pylitefs.engine import ofd_locks
from pylitefs.engine.wal_view import WalView
from pylitefs.formats.sqlite.locks import SHARED_FIRST, SHARED_SIZE, read_lock
from pylitefs.formats.sqlite.wal_index import READMARK_NOT_USED


class Barrier:
    """A reader's locks, held through the mount: SHARED on the database and one read slot of -shm whose mark is "not
    used". Whoever holds a lock byte of -shm must hold SHARED too, or the last connection to close could delete the
    WAL."""

    def __init__(self) -> None:
        self._fds: list[int] = []

    @property
    def held(self) -> bool:
        return bool(self._fds)

    def holds(self, fds: list[int]) -> bool:
        """Whether it is held with these."""
        return self._fds is fds

    def acquire(self, fds: list[int], view: WalView) -> bool:
        """Take it with descriptors of the mount's (database, -shm). They stay the caller's if this is False: no slot is
        free, or somebody locks the database exclusively."""
        database, shm = fds
        if not ofd_locks.lock_shared(database):
            return False
        if self._lock_slot(shm, view):
            self._fds = fds
            return True
        ofd_locks.unlock(database, SHARED_FIRST, SHARED_SIZE)
        return False

    @staticmethod
    def _lock_slot(shm: int, view: WalView) -> bool:
        info = view.checkpoint_info()
        if info is None:
            return False
        for slot in (4, 3, 2):
            if info.read_marks[slot] != READMARK_NOT_USED:
                continue
            if ofd_locks.try_lock(shm, read_lock(slot), exclusive=False):
                after = view.checkpoint_info()
                if after is not None and after.read_marks[slot] == READMARK_NOT_USED:
                    return True
                ofd_locks.unlock(shm, read_lock(slot))
        return False

    def release(self) -> list[int]:
        """Drop the locks at once; returns the descriptors, for the opener to close."""
        fds, self._fds = self._fds, []
        if fds:
            with contextlib.suppress(OSError):
                ofd_locks.unlock(fds[1], read_lock(1), 4)
                ofd_locks.unlock(fds[0], SHARED_FIRST, SHARED_SIZE)
        return fds
