"""A kernel for tests: sends requests as bytes to a Dispatcher and keeps the answers."""

from __future__ import annotations

import os
import stat
import struct
import threading
from pathlib import Path

import pytest
from plain_hooks import PlainHooks

from pylitefs.filesystem.session import Dispatcher
from pylitefs.filesystem.volume import Request
from pylitefs.formats.fuse import abi

ROOT = abi.ROOT_ID
ATTR_FIELDS = ("ino", "size", "blocks", "atime", "mtime", "ctime", "atimensec", "mtimensec", "ctimensec", "mode",
               "nlink", "uid", "gid")  # fmt: skip
SETATTR_FIELDS = ("fh", "size", "atime", "mtime", "ansec", "mnsec", "mode", "uid", "gid")


def raises(code: int) -> object:
    """A context that expects an OSError with this errno."""
    return pytest.raises(OSError, match=f"Errno {code}\\]")


class FakeChannel:
    """A kernel that remembers what it was told."""

    def __init__(self) -> None:
        self.bodies: dict[int, bytes] = {}
        self.errors: dict[int, int] = {}
        self.notifications: list[bytes] = []
        self.backing: dict[int, int] = {}
        self.backing_error: OSError | None = None
        self.waiting = True
        self.answered = threading.Condition()
        self._next_id = 1

    def _answer(self, table: dict[int, bytes] | dict[int, int], unique: int, value: bytes | int) -> bool:
        with self.answered:
            assert unique not in self.bodies and unique not in self.errors, "answered twice"
            table[unique] = value  # type: ignore[assignment,index]
            self.answered.notify_all()
        return self.waiting

    def reply(self, unique: int, body: bytes) -> bool:
        return self._answer(self.bodies, unique, body)

    def fail(self, unique: int, code: int) -> bool:
        return self._answer(self.errors, unique, code)

    def notify(self, message: bytes) -> bool:
        self.notifications.append(message)
        return True

    def backing_open(self, fd: int) -> int:
        if self.backing_error is not None:
            raise self.backing_error
        self._next_id += 1
        self.backing[self._next_id] = fd
        return self._next_id

    def backing_close(self, backing_id: int) -> None:
        del self.backing[backing_id]


class Kernel:
    """Sends requests and waits for their answers."""

    def __init__(self, data_dir: Path, *, passthrough: bool = True) -> None:
        self.data = data_dir
        self.hooks = PlainHooks(str(data_dir))
        self.channel = FakeChannel()
        self.log: list[str] = []
        self.dispatcher = Dispatcher(
            self.hooks, self.channel, str(data_dir), self.log.append,
            passthrough=passthrough, expire_only=True, uid=0, gid=0,
        )  # fmt: skip
        self._rq = Request(bytearray(1 << 17))
        self._unique = 0

    def send(self, opcode: int, body: bytes = b"", node: int = ROOT, pid: int = 1) -> int:
        self._unique += 2
        size = 40 + len(body)
        self._rq.data[:size] = struct.pack(
            "=IIQQIIIHH", size, opcode, self._unique, node, os.getuid(), os.getgid(), pid, 0, 0) + body  # fmt: skip
        self.dispatcher.dispatch(self._rq, size)
        return self._unique

    def ask(self, opcode: int, body: bytes = b"", node: int = ROOT, pid: int = 1) -> bytes:
        """The body of the answer; OSError if it is an error."""
        unique = self.send(opcode, body, node, pid)
        channel = self.channel
        with channel.answered:
            assert channel.answered.wait_for(lambda: unique in channel.bodies or unique in channel.errors, 10)
        if unique in channel.errors:
            raise OSError(channel.errors[unique], "from the handler")
        return channel.bodies[unique]

    def look_up(self, name: str) -> int:
        node: int = struct.unpack_from("=Q", self.ask(abi.LOOKUP, os.fsencode(name) + b"\0"))[0]
        return node

    def create(self, name: str, flags: int = os.O_RDWR, mode: int = 0o644, pid: int = 1) -> tuple[int, int, int, int]:
        """(node, fh, FOPEN flags, backing id)"""
        body = self.ask(abi.CREATE, abi.CREATE_IN.pack(flags, mode | stat.S_IFREG, 0o22, 0) + os.fsencode(name) + b"\0",
                        pid=pid)  # fmt: skip
        return struct.unpack_from("=Q", body)[0], *abi.OPEN_OUT.unpack_from(body, abi.ENTRY_OUT.size)

    def open(self, node: int, flags: int = os.O_RDWR, pid: int = 1) -> tuple[int, int, int]:
        fh, open_flags, backing = abi.OPEN_OUT.unpack(self.ask(abi.OPEN, abi.OPEN_IN.pack(flags, 0), node, pid))
        return fh, open_flags, backing

    def release(self, node: int, fh: int) -> None:
        self.ask(abi.RELEASE, abi.RELEASE_IN.pack(fh, 0, 0, 0), node)

    def write(self, node: int, fh: int, data: bytes, offset: int = 0) -> int:
        body = self.ask(abi.WRITE, abi.WRITE_IN.pack(fh, offset, len(data), 0, 0, 0, 0) + data, node)
        count: int = abi.WRITE_OUT.unpack(body)[0]
        return count

    def read(self, node: int, fh: int, size: int = 4096, offset: int = 0) -> bytes:
        return self.ask(abi.READ, abi.READ_IN.pack(fh, offset, size, 0, 0, 0, 0), node)

    def attr(self, node: int) -> dict[str, int]:
        values = abi.ATTR.unpack_from(self.ask(abi.GETATTR, bytes(16), node), 16)
        return dict(zip(ATTR_FIELDS, values, strict=False))

    def setattr(self, node: int, valid: int, **values: int) -> bytes:
        fields = dict.fromkeys(SETATTR_FIELDS, 0) | values
        return self.ask(abi.SETATTR, abi.SETATTR_IN.pack(
            valid, 0, fields["fh"], fields["size"], 0, fields["atime"], fields["mtime"], 0, fields["ansec"],
            fields["mnsec"], 0, fields["mode"], 0, fields["uid"], fields["gid"], 0), node)  # fmt: skip

    def rename(self, old: str, new: str, flags: int = 0) -> None:
        self.ask(abi.RENAME2, abi.RENAME2_IN.pack(ROOT, flags, 0) + os.fsencode(f"{old}\0{new}\0"))

    def unlink(self, name: str) -> None:
        self.ask(abi.UNLINK, os.fsencode(name) + b"\0")

    def names(self, size: int = 4096) -> list[str]:
        found, offset = [], 0
        while body := self.ask(abi.READDIR, abi.READ_IN.pack(0, offset, size, 0, 0, 0, 0)):
            at = 0
            while at < len(body):
                _, offset, length, _ = abi.DIRENT.unpack_from(body, at)
                found.append(os.fsdecode(body[at + 24 : at + 24 + length]))
                at += 24 + (length + 7 & ~7)
        return found

    def calls(self, hook: str) -> list[tuple[object, ...]]:
        return [call[1:] for call in self.hooks.calls if call[0] == hook]
