"""FUSE requests: bytes to values.

Every function takes the buffer of one whole request and the number of bytes that are valid in it (the buffer
itself is larger and reused). `parse_header` must come first: it checks that the fixed part of the body is there, so
the functions after it need to check only what is of variable length. What a running database asks for all the time
(OPEN, FSYNC, RELEASE, READ, WRITE) comes back as plain tuples, the rest as named ones.

Only `FormatError` is raised. Layouts: `abi`.
"""

from __future__ import annotations

from typing import NamedTuple

from pylitefs.errors import FormatError, TruncatedError
from pylitefs.formats.fuse import abi

_BODY = abi.IN_HEADER.size
_NS = 1_000_000_000
_MINIMUM = {opcode: _BODY + row.body_size for opcode, row in abi.OPCODES.items()}

_header = abi.IN_HEADER.unpack_from
_open = abi.OPEN_IN.unpack_from
_read = abi.READ_IN.unpack_from
_write = abi.WRITE_IN.unpack_from
_fsync = abi.FSYNC_IN.unpack_from
_release = abi.RELEASE_IN.unpack_from

Buffer = bytes | bytearray | memoryview


class Init(NamedTuple):
    major: int
    minor: int
    max_readahead: int
    flags: int  # flags2 in the upper 32 bits


class Create(NamedTuple):
    flags: int
    mode: int
    umask: int
    name: str


class Mknod(NamedTuple):
    mode: int
    rdev: int
    umask: int
    name: str


class Rename(NamedTuple):
    new_parent: int
    flags: int
    old: str
    new: str


class Setattr(NamedTuple):
    """`valid` says which of the others count (abi.FATTR_*)."""

    valid: int
    fh: int
    size_bytes: int
    atime_ns: int
    mtime_ns: int
    mode: int
    uid: int
    gid: int


class Fallocate(NamedTuple):
    fh: int
    offset: int
    length: int
    mode: int


def parse_header(data: Buffer, size: int) -> tuple[int, int, int, int, int, int]:
    """(opcode, unique, nodeid, uid, gid, pid) of the request in the first `size` bytes."""
    if size < _BODY or size > len(data):
        raise TruncatedError(f"a request of {size} bytes; its header alone has {_BODY}")
    length, opcode, unique, nodeid, uid, gid, pid, _, _ = _header(data)
    if length != size:
        raise FormatError(f"a request of {size} bytes that says it has {length}")
    if size < _MINIMUM.get(opcode, _BODY):
        raise TruncatedError(f"a request {abi.opcode_name(opcode)} of {size} bytes; it needs {_MINIMUM[opcode]}")
    return opcode, unique, nodeid, uid, gid, pid


def parse_init(data: Buffer) -> Init:
    major, minor, readahead, flags, flags2 = abi.INIT_IN.unpack_from(data, _BODY)
    return Init(major, minor, readahead, flags | flags2 << 32 if flags & abi.INIT_EXT else flags)


def parse_name(data: Buffer, size: int, offset: int = 0) -> str:
    """The name that fills the body from `offset` to its end."""
    return _name(bytes(data[_BODY + offset : size]))


def _name(raw: bytes) -> str:
    end = raw.find(b"\0")
    if end != len(raw) - 1:
        raise FormatError("a name that does not end where its request ends")
    return _component(raw[:-1])


def _component(raw: bytes) -> str:
    if raw in (b"", b".", b"..") or b"/" in raw or b"\0" in raw:
        raise FormatError(f"{raw[:40]!r} is not a file name")
    if len(raw) > abi.WIRE_NAME_MAX:
        raise FormatError(f"a name of {len(raw)} bytes")
    return raw.decode("utf-8", "surrogateescape")


def _two_names(raw: bytes) -> tuple[str, str]:
    first, nul, second = raw.partition(b"\0")
    if not nul:
        raise FormatError("a request with two names that has only one")
    return _component(first), _name(second)


def parse_open(data: Buffer) -> int:
    """The open(2) flags."""
    flags: int = _open(data, _BODY)[0]
    return flags


def parse_create(data: Buffer, size: int) -> Create:
    flags, mode, umask, _ = abi.CREATE_IN.unpack_from(data, _BODY)
    return Create(flags, mode, umask, parse_name(data, size, abi.CREATE_IN.size))


def parse_mknod(data: Buffer, size: int) -> Mknod:
    mode, rdev, umask, _ = abi.MKNOD_IN.unpack_from(data, _BODY)
    return Mknod(mode, rdev, umask, parse_name(data, size, abi.MKNOD_IN.size))


def parse_rename(data: Buffer, size: int) -> Rename:
    (new_parent,) = abi.RENAME_IN.unpack_from(data, _BODY)
    return Rename(new_parent, 0, *_two_names(bytes(data[_BODY + abi.RENAME_IN.size : size])))


def parse_rename2(data: Buffer, size: int) -> Rename:
    new_parent, flags, _ = abi.RENAME2_IN.unpack_from(data, _BODY)
    return Rename(new_parent, flags, *_two_names(bytes(data[_BODY + abi.RENAME2_IN.size : size])))


def parse_setattr(data: Buffer) -> Setattr:
    valid, _, fh, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, uid, gid, _ = (
        abi.SETATTR_IN.unpack_from(data, _BODY)
    )  # fmt: skip
    return Setattr(valid, fh, size, atime * _NS + atime_ns, mtime * _NS + mtime_ns, mode, uid, gid)


def parse_read(data: Buffer) -> tuple[int, int, int]:
    """(fh, offset, size in bytes); of READDIR too, where `offset` is the last entry's."""
    fh, offset, size, _, _, _, _ = _read(data, _BODY)
    return fh, offset, size


def parse_write(data: Buffer, size: int) -> tuple[int, int, memoryview, bool]:
    """(fh, offset, data, whether to clear set-uid and set-gid); the data is a view of the request's buffer."""
    fh, offset, length, flags, _, _, _ = _write(data, _BODY)
    start = _BODY + abi.WRITE_IN.size
    if length != size - start:
        raise FormatError(f"a WRITE of {length} bytes that carries {size - start}")
    return fh, offset, memoryview(data)[start:size], flags & abi.WRITE_KILL_SUIDGID != 0


def parse_fsync(data: Buffer) -> tuple[int, bool]:
    """(fh, whether only the data need be durable)."""
    fh, flags, _ = _fsync(data, _BODY)
    return fh, flags & abi.FSYNC_FDATASYNC != 0


def parse_handle(data: Buffer) -> int:
    """The fh of RELEASE and FLUSH, which both begin with it."""
    fh: int = _release(data, _BODY)[0]
    return fh


def parse_interrupt(data: Buffer) -> int:
    """The number of the request that is not waited for any more."""
    unique: int = abi.INTERRUPT_IN.unpack_from(data, _BODY)[0]
    return unique


def parse_fallocate(data: Buffer) -> Fallocate:
    fh, offset, length, mode, _ = abi.FALLOCATE_IN.unpack_from(data, _BODY)
    return Fallocate(fh, offset, length, mode)


def parse_forget(data: Buffer) -> int:
    """How many lookups are taken back."""
    count: int = abi.FORGET_IN.unpack_from(data, _BODY)[0]
    return count


def parse_batch_forget(data: Buffer, size: int) -> list[tuple[int, int]]:
    """(nodeid, lookups) of each node to forget."""
    count, _ = abi.BATCH_FORGET_IN.unpack_from(data, _BODY)
    start = _BODY + abi.BATCH_FORGET_IN.size
    if count * abi.FORGET_ONE.size > size - start:
        raise TruncatedError(f"a BATCH_FORGET of {count} nodes in {size} bytes")
    end = start + count * abi.FORGET_ONE.size
    return [(nodeid, lookups) for nodeid, lookups in abi.FORGET_ONE.iter_unpack(bytes(data[start:end]))]
