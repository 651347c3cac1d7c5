"""A disk that changes what was written to it: nobody has written the file then, and its times say so."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

from harness.disks import RealDisk

FS_IOC_FIEMAP = 0xC020660B  # linux/fiemap.h
_SYNC = 1
_HEAD, _EXTENT = struct.Struct("=QQIIII"), struct.Struct("=QQQQQIIII")


class RottenDisk(RealDisk):
    """ext4 in a file of its own, whose blocks can be changed beneath it."""

    def flip(self, path: Path | str, offset: int, bit: int = 0) -> None:
        """One bit of a file, on the disk. What the kernel has of it in memory is forgotten."""
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            before, place = os.pread(fd, 1, offset), _place(fd, offset)
            with open(self.image, "r+b", buffering=0) as image:
                image.seek(place)
                byte = image.read(1)[0]
                image.seek(place)
                image.write(bytes([byte ^ 1 << bit]))
                os.fsync(image.fileno())
            assert before == bytes([byte]), "the block that was found is another"
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(fd, 1, offset) != before, "the file is still in memory"
        finally:
            os.close(fd)


def _place(fd: int, offset: int) -> int:
    """Where a byte of a file is on its disk (the ioctl FIEMAP)."""
    question = bytearray(_HEAD.pack(offset, 1, _SYNC, 0, 1, 0) + bytes(_EXTENT.size))
    fcntl.ioctl(fd, FS_IOC_FIEMAP, question, True)
    assert _HEAD.unpack_from(question)[3] == 1, "the byte is nowhere"
    logical, physical, *_ = _EXTENT.unpack_from(question, _HEAD.size)
    return int(physical + offset - logical)
