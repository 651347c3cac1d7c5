"""FUSE replies and notifications: values to bytes. Bodies come without the header, except notifications.

Validity times are whole seconds. `stat` arguments are anything with the attributes of os.stat_result. Layouts: `abi`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from pylitefs.formats.fuse import abi

_NS = 1_000_000_000
_attr_out = abi.ATTR_OUT.pack
_entry_out = abi.ENTRY_OUT.pack
_open_out = abi.OPEN_OUT.pack
_HEADER_SIZE = abi.OUT_HEADER.size


class StatLike(Protocol):
    """What is shown of a file; times in ns."""

    @property
    def st_mode(self) -> int: ...
    @property
    def st_uid(self) -> int: ...
    @property
    def st_gid(self) -> int: ...
    @property
    def st_size(self) -> int: ...
    @property
    def st_blocks(self) -> int: ...
    @property
    def st_blksize(self) -> int: ...
    @property
    def st_atime_ns(self) -> int: ...
    @property
    def st_mtime_ns(self) -> int: ...
    @property
    def st_ctime_ns(self) -> int: ...


class StatfsLike(Protocol):
    """What os.statvfs_result has."""

    @property
    def f_blocks(self) -> int: ...
    @property
    def f_bfree(self) -> int: ...
    @property
    def f_bavail(self) -> int: ...
    @property
    def f_files(self) -> int: ...
    @property
    def f_ffree(self) -> int: ...
    @property
    def f_bsize(self) -> int: ...
    @property
    def f_frsize(self) -> int: ...
    @property
    def f_namemax(self) -> int: ...


def pack_attr(ino: int, stat: StatLike, mode: int, nlink: int, valid_s: int) -> bytes:
    """GETATTR and SETATTR."""
    atime, atime_ns = divmod(stat.st_atime_ns, _NS)
    mtime, mtime_ns = divmod(stat.st_mtime_ns, _NS)
    ctime, ctime_ns = divmod(stat.st_ctime_ns, _NS)
    return _attr_out(
        valid_s, 0, 0, ino, stat.st_size, stat.st_blocks, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns,
        mode, nlink, stat.st_uid, stat.st_gid, 0, stat.st_blksize, 0,
    )  # fmt: skip


def pack_entry(ino: int, stat: StatLike, mode: int, nlink: int, entry_valid_s: int, attr_valid_s: int) -> bytes:
    """LOOKUP, MKNOD, and the first part of CREATE."""
    atime, atime_ns = divmod(stat.st_atime_ns, _NS)
    mtime, mtime_ns = divmod(stat.st_mtime_ns, _NS)
    ctime, ctime_ns = divmod(stat.st_ctime_ns, _NS)
    return _entry_out(
        ino, 0, entry_valid_s, attr_valid_s, 0, 0,
        ino, stat.st_size, stat.st_blocks, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns,
        mode, nlink, stat.st_uid, stat.st_gid, 0, stat.st_blksize, 0,
    )  # fmt: skip


def pack_no_entry(entry_valid_s: int) -> bytes:
    """LOOKUP of a name that does not exist, to be remembered (nodeid 0)."""
    return abi.ENTRY_OUT.pack(0, 0, entry_valid_s, *([0] * 19))


def pack_open(fh: int, flags: int, backing_id: int = 0) -> bytes:
    return _open_out(fh, flags, backing_id)


def pack_write(count: int) -> bytes:
    return abi.WRITE_OUT.pack(count, 0)


def pack_statfs(stat: StatfsLike) -> bytes:
    return abi.STATFS_OUT.pack(
        stat.f_blocks, stat.f_bfree, stat.f_bavail, stat.f_files, stat.f_ffree,
        stat.f_bsize, min(stat.f_namemax, abi.NAME_MAX), stat.f_frsize, 0,
    )  # fmt: skip


def pack_dirents(entries: Iterable[tuple[int, int, int, str]], limit: int) -> bytes:
    """As many of `entries` (inode number, offset of the entry after it, type as in `S_IFMT >> 12`, name) as fit in
    `limit` bytes; each is padded to 8 bytes."""
    out = bytearray()
    for ino, next_offset, kind, name in entries:
        raw = name.encode("utf-8", "surrogateescape")
        size = abi.DIRENT.size + len(raw)
        padded = size + 7 & ~7
        if len(out) + padded > limit:
            break
        out += abi.DIRENT.pack(ino, next_offset, len(raw), kind) + raw + bytes(padded - size)
    return bytes(out)


def pack_init(
    minor: int, flags: int, *, max_readahead: int, max_write: int, max_background: int, max_stack_depth: int
) -> bytes:
    """`max_write` also bounds READ: both travel in pages of 4 KiB. `max_stack_depth` 0 leaves passthrough off."""
    return abi.INIT_OUT.pack(
        abi.MAJOR, minor, max_readahead, flags & 0xFFFFFFFF, max_background, max_background * 3 // 4,
        max_write, 1, max_write // 4096, 0, flags >> 32, max_stack_depth, 0,
    )  # fmt: skip


def _notification(code: int, body: bytes) -> bytes:
    return abi.OUT_HEADER.pack(_HEADER_SIZE + len(body), code, 0) + body


def notify_inval_inode(ino: int, offset: int, length: int) -> bytes:
    """Forget attributes and the cached bytes of a range; length 0 is to the end, offset -1 attributes only."""
    return _notification(abi.NOTIFY_INVAL_INODE, abi.INVAL_INODE_OUT.pack(ino, offset, length))


def notify_inval_entry(parent: int, name: str, expire_only: bool) -> bytes:
    """Forget whether `name` exists; `expire_only` asks again without taking the name from those who use it."""
    raw = name.encode("utf-8", "surrogateescape")
    flags = abi.EXPIRE_ONLY if expire_only else 0
    return _notification(abi.NOTIFY_INVAL_ENTRY, abi.INVAL_ENTRY_OUT.pack(parent, len(raw), flags) + raw + b"\0")
