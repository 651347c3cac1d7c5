"""Which databases the kernel has cached, as the daemon tells the mount guard."""

from __future__ import annotations

import os
import struct
import threading

_NUMBER = struct.Struct("=Q")


class CachedDatabases:
    """The inode numbers of the database files whose pages the kernel has cached. `share` makes a file without a name of
    them, for the mount guard: when the daemon has gone, these pages must not be read (see `pylitefs.mount_guard`).

    Numbers are only added: an inode that has gone is not found by the kernel, and its number is never used again."""

    def __init__(self) -> None:
        self._numbers: dict[int, None] = {}  # in the order in which they came
        self._fd = -1
        self._lock = threading.Lock()

    def add(self, ino: int) -> None:
        with self._lock:
            if ino not in self._numbers:
                if self._fd >= 0:
                    os.pwrite(self._fd, _NUMBER.pack(ino), _NUMBER.size * len(self._numbers))
                self._numbers[ino] = None

    def share(self) -> int:
        """A descriptor of the file; the same one each time, until `close`. Each number is 8 bytes of this machine."""
        with self._lock:
            if self._fd < 0:
                self._fd = os.memfd_create("litefs-cached", os.MFD_CLOEXEC)
                os.pwrite(self._fd, b"".join(map(_NUMBER.pack, self._numbers)), 0)
            return self._fd

    def close(self) -> None:
        with self._lock:
            fd, self._fd = self._fd, -1
            if fd >= 0:
                os.close(fd)

    def numbers(self) -> list[int]:
        with self._lock:
            return list(self._numbers)

    def __contains__(self, ino: int) -> bool:
        return ino in self._numbers
