"""Numbers and layouts of the FUSE protocol, version 7.31 to 7.45, as the kernel speaks it over /dev/fuse.

A request is one read(2), a reply or a notification one write(2). Integers are in the machine's own byte order.

    request   offset  size                       reply     offset  size
    len            0     4  whole message        len            0     4  whole message
    opcode         4     4                       error          4     4  0 or -errno
    unique         8     8  names the request    unique         8     8  of the request
    nodeid        16     8  1 is the root        body          16        only if error is 0
    uid           24     4
    gid           28     4
    pid           32     4  of the *thread*      notification: as a reply, with unique 0 and the
    extlen        36     2  in 8 bytes           notification's code where the error stands
    padding       38     2
    body          40

A request is valid if `len` is what read(2) returned and its body is at least as long as its opcode's row in
`OPCODES` says. The kernel never splits a message: a short one is not torn but wrong.
Source: include/uapi/linux/fuse.h.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

MAJOR: Final = 7
MINOR: Final = 40  # the first with passthrough; what we announce
MINOR_REQUIRED: Final = 31  # EXPLICIT_INVAL_DATA (7.30), NO_OPENDIR_SUPPORT (7.29), KILL_SUIDGID

ROOT_ID: Final = 1
NAME_MAX: Final = 255  # of the filesystems below us; the protocol itself allows more
WIRE_NAME_MAX: Final = 4095
MIN_READ_BUFFER: Final = 8192

IN_HEADER = struct.Struct("=IIQQIIIHH")
OUT_HEADER = struct.Struct("=IiQ")
ATTR = struct.Struct("=QQQqqqIIIIIIIIII")
ENTRY_OUT = struct.Struct("=QQQQII" + ATTR.format[1:])
ATTR_OUT = struct.Struct("=QII" + ATTR.format[1:])
OPEN_OUT = struct.Struct("=QIi")
WRITE_OUT = struct.Struct("=II")
STATFS_OUT = struct.Struct("=QQQQQIIII24x")
DIRENT = struct.Struct("=QQII")
INIT_IN = struct.Struct("=IIIII44x")
INIT_OUT = struct.Struct("=IIIIHHIIHHIIH22x")
GETATTR_IN = struct.Struct("=IIQ")
SETATTR_IN = struct.Struct("=IIQQQqqqIIIIIIII")
MKNOD_IN = struct.Struct("=IIII")
MKDIR_IN = struct.Struct("=II")
RENAME_IN = struct.Struct("=Q")
RENAME2_IN = struct.Struct("=QII")
LINK_IN = struct.Struct("=Q")
OPEN_IN = struct.Struct("=II")
CREATE_IN = struct.Struct("=IIII")
READ_IN = struct.Struct("=QQIIQII")
WRITE_IN = struct.Struct("=QQIIQII")
RELEASE_IN = struct.Struct("=QIIQ")
FLUSH_IN = struct.Struct("=QIIQ")
FSYNC_IN = struct.Struct("=QII")
FALLOCATE_IN = struct.Struct("=QQQII")
FORGET_IN = struct.Struct("=Q")
BATCH_FORGET_IN = struct.Struct("=II")
FORGET_ONE = struct.Struct("=QQ")
INTERRUPT_IN = struct.Struct("=Q")
INVAL_INODE_OUT = struct.Struct("=Qqq")
INVAL_ENTRY_OUT = struct.Struct("=QII")
BACKING_MAP = struct.Struct("=iIQ")  # argument of FUSE_DEV_IOC_BACKING_OPEN: fd, flags, padding

for _layout, _size in (
    (IN_HEADER, 40), (OUT_HEADER, 16), (ATTR, 88), (ENTRY_OUT, 128), (ATTR_OUT, 104), (OPEN_OUT, 16), (WRITE_OUT, 8),
    (STATFS_OUT, 80), (DIRENT, 24), (INIT_IN, 64), (INIT_OUT, 64), (GETATTR_IN, 16), (SETATTR_IN, 88), (MKNOD_IN, 16),
    (MKDIR_IN, 8), (RENAME_IN, 8), (RENAME2_IN, 16), (LINK_IN, 8), (OPEN_IN, 8), (CREATE_IN, 16), (READ_IN, 40),
    (WRITE_IN, 40), (RELEASE_IN, 24), (FLUSH_IN, 24), (FSYNC_IN, 16), (FALLOCATE_IN, 32), (FORGET_IN, 8),
    (BATCH_FORGET_IN, 8), (FORGET_ONE, 16), (INTERRUPT_IN, 8), (INVAL_INODE_OUT, 24), (INVAL_ENTRY_OUT, 16),
    (BACKING_MAP, 16),
):  # fmt: skip
    assert _layout.size == _size, (_layout.format, _layout.size, _size)

# INIT flags; those from bit 32 on travel in flags2
ASYNC_READ: Final = 1 << 0
POSIX_LOCKS: Final = 1 << 1
ATOMIC_O_TRUNC: Final = 1 << 3
BIG_WRITES: Final = 1 << 5
FLOCK_LOCKS: Final = 1 << 10
AUTO_INVAL_DATA: Final = 1 << 12
ASYNC_DIO: Final = 1 << 15
WRITEBACK_CACHE: Final = 1 << 16
PARALLEL_DIROPS: Final = 1 << 18
MAX_PAGES: Final = 1 << 22
NO_OPENDIR_SUPPORT: Final = 1 << 24
EXPLICIT_INVAL_DATA: Final = 1 << 25
HANDLE_KILLPRIV_V2: Final = 1 << 28
INIT_EXT: Final = 1 << 30
HAS_EXPIRE_ONLY: Final = 1 << 35
PASSTHROUGH: Final = 1 << 37
OVER_IO_URING: Final = 1 << 41

# flags of an OPEN or CREATE reply
FOPEN_DIRECT_IO: Final = 1 << 0
FOPEN_KEEP_CACHE: Final = 1 << 1
FOPEN_NOFLUSH: Final = 1 << 5
FOPEN_PASSTHROUGH: Final = 1 << 7

# `valid` of SETATTR
FATTR_MODE: Final = 1 << 0
FATTR_UID: Final = 1 << 1
FATTR_GID: Final = 1 << 2
FATTR_SIZE: Final = 1 << 3
FATTR_ATIME: Final = 1 << 4
FATTR_MTIME: Final = 1 << 5
FATTR_FH: Final = 1 << 6
FATTR_ATIME_NOW: Final = 1 << 7
FATTR_MTIME_NOW: Final = 1 << 8
FATTR_KILL_SUIDGID: Final = 1 << 11

WRITE_KILL_SUIDGID: Final = 1 << 2
FSYNC_FDATASYNC: Final = 1 << 0
RENAME_NOREPLACE: Final = 1 << 0
EXPIRE_ONLY: Final = 1 << 0

NOTIFY_INVAL_INODE: Final = 2
NOTIFY_INVAL_ENTRY: Final = 3


def _iow(number: int, size: int) -> int:
    """The code of an ioctl of /dev/fuse (magic 229) that takes a pointer to `size` bytes (asm-generic/ioctl.h)."""
    return 1 << 30 | size << 16 | 229 << 8 | number


IOC_BACKING_OPEN: Final = _iow(1, BACKING_MAP.size)
IOC_BACKING_CLOSE: Final = _iow(2, 4)

LOOKUP: Final = 1
FORGET: Final = 2
GETATTR: Final = 3
SETATTR: Final = 4
READLINK: Final = 5
SYMLINK: Final = 6
MKNOD: Final = 8
MKDIR: Final = 9
UNLINK: Final = 10
RMDIR: Final = 11
RENAME: Final = 12
LINK: Final = 13
OPEN: Final = 14
READ: Final = 15
WRITE: Final = 16
STATFS: Final = 17
RELEASE: Final = 18
FSYNC: Final = 20
SETXATTR: Final = 21
GETXATTR: Final = 22
LISTXATTR: Final = 23
REMOVEXATTR: Final = 24
FLUSH: Final = 25
INIT: Final = 26
OPENDIR: Final = 27
READDIR: Final = 28
RELEASEDIR: Final = 29
FSYNCDIR: Final = 30
GETLK: Final = 31
SETLK: Final = 32
SETLKW: Final = 33
ACCESS: Final = 34
CREATE: Final = 35
INTERRUPT: Final = 36
BMAP: Final = 37
DESTROY: Final = 38
IOCTL: Final = 39
POLL: Final = 40
NOTIFY_REPLY: Final = 41
BATCH_FORGET: Final = 42
FALLOCATE: Final = 43
READDIRPLUS: Final = 44
RENAME2: Final = 45
LSEEK: Final = 46
COPY_FILE_RANGE: Final = 47
SYNCFS: Final = 50
TMPFILE: Final = 51
STATX: Final = 52


@dataclass(frozen=True)
class Opcode:
    """`body_size`: bytes the body has at least, a name with its NUL counting 2."""

    name: str
    body_size: int = 0
    replies: bool = True


OPCODES: dict[int, Opcode] = {
    LOOKUP: Opcode("LOOKUP", 2),
    FORGET: Opcode("FORGET", FORGET_IN.size, replies=False),
    GETATTR: Opcode("GETATTR", GETATTR_IN.size),
    SETATTR: Opcode("SETATTR", SETATTR_IN.size),
    READLINK: Opcode("READLINK"),
    SYMLINK: Opcode("SYMLINK", 4),
    MKNOD: Opcode("MKNOD", MKNOD_IN.size + 2),
    MKDIR: Opcode("MKDIR", MKDIR_IN.size + 2),
    UNLINK: Opcode("UNLINK", 2),
    RMDIR: Opcode("RMDIR", 2),
    RENAME: Opcode("RENAME", RENAME_IN.size + 4),
    LINK: Opcode("LINK", LINK_IN.size + 2),
    OPEN: Opcode("OPEN", OPEN_IN.size),
    READ: Opcode("READ", READ_IN.size),
    WRITE: Opcode("WRITE", WRITE_IN.size),
    STATFS: Opcode("STATFS"),
    RELEASE: Opcode("RELEASE", RELEASE_IN.size),
    FSYNC: Opcode("FSYNC", FSYNC_IN.size),
    SETXATTR: Opcode("SETXATTR"),
    GETXATTR: Opcode("GETXATTR"),
    LISTXATTR: Opcode("LISTXATTR"),
    REMOVEXATTR: Opcode("REMOVEXATTR"),
    FLUSH: Opcode("FLUSH", FLUSH_IN.size),
    INIT: Opcode("INIT", INIT_IN.size),
    OPENDIR: Opcode("OPENDIR"),
    READDIR: Opcode("READDIR", READ_IN.size),
    RELEASEDIR: Opcode("RELEASEDIR"),
    FSYNCDIR: Opcode("FSYNCDIR", FSYNC_IN.size),
    GETLK: Opcode("GETLK"),
    SETLK: Opcode("SETLK"),
    SETLKW: Opcode("SETLKW"),
    ACCESS: Opcode("ACCESS"),
    CREATE: Opcode("CREATE", CREATE_IN.size + 2),
    INTERRUPT: Opcode("INTERRUPT", INTERRUPT_IN.size, replies=False),
    BMAP: Opcode("BMAP"),
    DESTROY: Opcode("DESTROY"),
    IOCTL: Opcode("IOCTL"),
    POLL: Opcode("POLL"),
    NOTIFY_REPLY: Opcode("NOTIFY_REPLY", replies=False),
    BATCH_FORGET: Opcode("BATCH_FORGET", BATCH_FORGET_IN.size, replies=False),
    FALLOCATE: Opcode("FALLOCATE", FALLOCATE_IN.size),
    READDIRPLUS: Opcode("READDIRPLUS"),
    RENAME2: Opcode("RENAME2", RENAME2_IN.size + 4),
    LSEEK: Opcode("LSEEK"),
    COPY_FILE_RANGE: Opcode("COPY_FILE_RANGE"),
    SYNCFS: Opcode("SYNCFS"),
    TMPFILE: Opcode("TMPFILE"),
    STATX: Opcode("STATX"),
}


def opcode_name(opcode: int) -> str:
    row = OPCODES.get(opcode)
    return row.name if row else f"opcode {opcode}"
