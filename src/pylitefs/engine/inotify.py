"""inotify(7) on one directory: which of its files were written to.

A write that the kernel passes through raises IN_MODIFY on the mount's own dentry, as any write does.
The kernel merges equal events in a row, so a busy writer leaves one event, not thousands.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct

IN_MODIFY = 0x2
IN_Q_OVERFLOW = 0x4000
_EVENT = struct.Struct("iIII")
_BUFFER_BYTES = 65536


class DirectoryWatch:
    """Readable (poll `fd`) when a file of `path` was modified. Raises OSError (EMFILE, ENOSPC: inotify limits)."""

    def __init__(self, path: str) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), f"inotify: {os.strerror(ctypes.get_errno())}")
        if libc.inotify_add_watch(self.fd, os.fsencode(path), IN_MODIFY) < 0:
            error = ctypes.get_errno()
            os.close(self.fd)
            raise OSError(error, f"inotify: {os.strerror(error)}", path)

    def read(self) -> set[str] | None:
        """Names that were modified since the last call; None if events were lost, so any may have been."""
        names: set[str] = set()
        overflow = False
        with contextlib.suppress(BlockingIOError):
            while True:
                data = os.read(self.fd, _BUFFER_BYTES)
                at = 0
                while at < len(data):
                    _, mask, _, length = _EVENT.unpack_from(data, at)
                    at += _EVENT.size
                    if mask & IN_Q_OVERFLOW:
                        overflow = True
                    elif length:
                        names.add(os.fsdecode(data[at : at + length].rstrip(b"\0")))
                    at += length
                if len(data) < _BUFFER_BYTES // 2:
                    break
        return None if overflow else names

    def close(self) -> None:
        os.close(self.fd)
