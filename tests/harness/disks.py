"""Disks of nodes: a small one that can be filled, and one whose machine can lose its power."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import subprocess
import time
from pathlib import Path

FS_IOC_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32), of ext4 and xfs: stop at once
NO_LOG_FLUSH = 2  # what is not on the disk yet is lost, also the file system's own journal
RELEASE_S = 20.0


class RamDisk:
    """A file system in memory at `path`, of `size_bytes`."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path, self.size_bytes = path, size_bytes

    def attach(self) -> None:
        _mount("-t", "tmpfs", "-o", f"size={self.size_bytes},mode=755", "tmpfs", str(self.path))

    def detach(self) -> None:
        """Also when it is used."""
        while os.path.ismount(self.path):
            done = subprocess.run(["umount", "-l", str(self.path)], stderr=subprocess.DEVNULL, timeout=10, check=False)
            if done.returncode:
                break


class RealDisk(RamDisk):
    """ext4 in a file of its own. What was not synced is lost when it is cut off."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        super().__init__(path, size_bytes)
        self.image = path.with_name("image")

    def attach(self) -> None:
        if not self.image.exists():
            with open(self.image, "wb") as file:
                file.truncate(self.size_bytes)
            subprocess.run(["mkfs.ext4", "-q", str(self.image)], check=True, timeout=20)
        _mount("-o", "loop,commit=60", str(self.image), str(self.path))  # written back by itself after a minute

    def cut_off(self) -> None:
        """The power goes. Whoever still has a file open gets EIO; `attach` when nobody has."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, FS_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(fd)

    def wait_released(self) -> None:
        """Until nobody uses what was cut off, and detached."""
        end_s = time.monotonic() + RELEASE_S
        while subprocess.run(["losetup", "-j", self.image], capture_output=True, timeout=10, check=True).stdout:
            assert time.monotonic() < end_s, f"somebody still uses {self.path}"
            time.sleep(0.02)


def fill(path: Path) -> None:
    """Write to the file until not a byte is left on its disk."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        for size in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    os.write(fd, bytes(size))
    finally:
        os.close(fd)


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, timeout=20)
