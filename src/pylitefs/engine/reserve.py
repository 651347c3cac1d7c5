"""Room on the disk that is kept for the moment when there is none: a primary uses it to write down its last
transactions and to pass its role on."""

from __future__ import annotations

import contextlib
import os

RESERVE_BYTES = 4 << 20
FULL_BYTES = 1 << 20
"""With less than this free a disk counts as full."""


class Reserve:
    """The file DATA/reserve. Blocking; from one thread at a time."""

    def __init__(self, data_dir: str) -> None:
        self._data_dir = data_dir
        self._path = os.path.join(data_dir, "reserve")

    def is_full(self) -> bool:
        """Whether the disk is full, not counting what is reserved."""
        with contextlib.suppress(OSError):
            room = os.statvfs(self._data_dir)
            return room.f_bavail * room.f_frsize < FULL_BYTES
        return False

    def keep(self) -> None:
        """Reserve the room, if it is there."""
        with contextlib.suppress(OSError):
            room = os.statvfs(self._data_dir)
            if os.path.exists(self._path) or room.f_bavail * room.f_frsize < 4 * RESERVE_BYTES:
                return
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, RESERVE_BYTES)
            except OSError:
                self.use()
                raise
            finally:
                os.close(fd)

    def use(self) -> None:
        """Give it up: it can be written to now."""
        with contextlib.suppress(OSError):
            os.unlink(self._path)
