"""/dev/fuse of one mount: the first handshake, replies, notifications, backing files.

Reading is the session's (several threads, or `rings`); everything here may be called from any thread. A reply whose
request the kernel has given up (ENOENT) or whose mount is gone (ENODEV) is lost without harm.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sys
from dataclasses import dataclass

from pylitefs.errors import FormatError, MountError
from pylitefs.filesystem.rings import Answer
from pylitefs.formats.fuse import abi, replies, requests

MAX_WRITE = 256 * 1024  # bytes of one READ or WRITE; passthrough leaves few of them
BUFFER_SIZE = MAX_WRITE + 4096
MAX_BACKGROUND = 64
RETRIED = frozenset({errno.EINTR, errno.ENOENT, errno.EAGAIN})  # of read(2): the request was interrupted
_LOST = frozenset({errno.ENOENT, errno.ENODEV, errno.EPERM, errno.ECONNABORTED, errno.ENOTCONN})

WANTED = (
    abi.ASYNC_READ | abi.BIG_WRITES | abi.ASYNC_DIO | abi.PARALLEL_DIROPS | abi.MAX_PAGES | abi.NO_OPENDIR_SUPPORT
    | abi.EXPLICIT_INVAL_DATA | abi.HANDLE_KILLPRIV_V2 | abi.INIT_EXT | abi.HAS_EXPIRE_ONLY
)  # fmt: skip
"""Never WRITEBACK_CACHE (excludes passthrough), POSIX_LOCKS and FLOCK_LOCKS (the kernel keeps locks itself),
AUTO_INVAL_DATA (we say what changed) or ATOMIC_O_TRUNC (truncation has its own hook)."""

_pack_header = abi.OUT_HEADER.pack
_HEADER_SIZE = abi.OUT_HEADER.size


@dataclass(frozen=True)
class Negotiated:
    """What kernel and daemon agreed on."""

    minor: int
    flags: int

    @property
    def passthrough(self) -> bool:
        return self.flags & abi.PASSTHROUGH != 0

    @property
    def io_uring(self) -> bool:
        return self.flags & abi.OVER_IO_URING != 0

    @property
    def expire_only(self) -> bool:
        return self.flags & abi.HAS_EXPIRE_ONLY != 0


class Device:
    """Owns the descriptor. It stays taken after `close`, so that a late reply cannot hit another file."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.awaited: dict[int, Answer] = {}  # requests that came through a ring, by `unique`
        self._backing_ids: set[int] = set()  # that the kernel keeps

    def negotiate(self, *, passthrough: bool, max_stack_depth: int, io_uring: bool = False) -> Negotiated:
        """Answer the kernel's INIT, which must be the first request. MountError if the kernel is too old."""
        unique, offer = self._greeting()
        while offer.major > abi.MAJOR:  # answered with our major version, it asks again
            self.reply(unique, replies.pack_init(
                abi.MINOR, 0, max_readahead=0, max_write=0, max_background=0, max_stack_depth=0,
            ))  # fmt: skip
            unique, offer = self._greeting()
        if (offer.major, offer.minor) < (abi.MAJOR, abi.MINOR_REQUIRED):
            self.fail(unique, errno.EPROTO)
            raise MountError(
                f"the kernel speaks FUSE {offer.major}.{offer.minor}, at least {abi.MAJOR}.{abi.MINOR_REQUIRED} is "
                "needed: use Linux 5.4 or newer"
            )
        flags = offer.flags & (WANTED | abi.PASSTHROUGH * passthrough | abi.OVER_IO_URING * io_uring)
        depth = max_stack_depth if flags & abi.PASSTHROUGH else 0
        self.reply(unique, replies.pack_init(
            min(abi.MINOR, offer.minor), flags, max_readahead=offer.max_readahead, max_write=MAX_WRITE,
            max_background=MAX_BACKGROUND, max_stack_depth=depth,
        ))  # fmt: skip
        return Negotiated(offer.minor, flags)

    def _greeting(self) -> tuple[int, requests.Init]:
        """The INIT request and its `unique`."""
        buffer = bytearray(BUFFER_SIZE)
        while True:
            try:
                size = os.readv(self.fd, [buffer])
                break
            except OSError as error:
                if error.errno not in RETRIED:
                    raise MountError(f"the kernel closed the mount at once: {error.strerror}") from error
        try:
            opcode, unique, *_ = requests.parse_header(buffer, size)
            if opcode != abi.INIT:
                raise FormatError(f"the first request is {abi.opcode_name(opcode)}, not INIT")
            return unique, requests.parse_init(buffer)
        except FormatError as error:
            raise MountError(f"the kernel's FUSE greeting is not understood: {error}") from error

    def reply(self, unique: int, body: bytes) -> bool:
        """Answer a request; False if the kernel no longer waits for it."""
        answer = self.awaited.pop(unique, None)
        if answer is not None:
            answer.give(0, body)
            return True
        return self._write(_pack_header(_HEADER_SIZE + len(body), 0, unique) + body)

    def fail(self, unique: int, code: int) -> bool:
        answer = self.awaited.pop(unique, None)
        if answer is not None:
            answer.give(code, b"")
            return True
        return self._write(_pack_header(_HEADER_SIZE, -code, unique))

    def give_up(self) -> None:
        """Fail every request that came through a ring and has no answer yet: the mount is going."""
        for unique in list(self.awaited):
            self.fail(unique, errno.ENOTCONN)

    def notify(self, message: bytes) -> bool:
        """Send a notification; False if the kernel has nothing cached that it concerns, or the mount is gone."""
        return self._write(message)

    def _write(self, message: bytes) -> bool:
        try:
            os.write(self.fd, message)
        except OSError as error:
            if error.errno in _LOST:
                return False
            raise
        return True

    def backing_open(self, fd: int) -> int:
        """Register an open file as a backing file. Its id; OSError if the kernel or our privileges do not allow it."""
        backing_id: int = fcntl.ioctl(self.fd, abi.IOC_BACKING_OPEN, bytearray(abi.BACKING_MAP.pack(fd, 0, 0)), True)
        self._backing_ids.add(backing_id)
        return backing_id

    def backing_close(self, backing_id: int) -> None:
        self._backing_ids.discard(backing_id)
        fcntl.ioctl(self.fd, abi.IOC_BACKING_CLOSE, backing_id.to_bytes(4, sys.byteorder))

    def close(self) -> None:
        """Let the kernel's end go: /dev/null takes its number, where late replies vanish. The kernel would keep backing
        files of a mount with open files as long as any mount namespace has that mount."""
        for backing_id in list(self._backing_ids):
            with contextlib.suppress(OSError):
                self.backing_close(backing_id)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.dup2(null, self.fd, inheritable=False)
        finally:
            os.close(null)

    def __del__(self) -> None:
        try:
            os.close(self.fd)
        except OSError:
            pass
