"""The simplest engine there can be: every name is a file in one directory, and everything is allowed.

What a name is for follows from its suffix; "hooked" in a name asks for the write hook, "slow" lets every continuation
run on another thread. `calls` lists what the filesystem asked, as tuples.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable

from pylitefs.ports import SUFFIXES, FileKind, FileRef, LockOpening, Then


class PlainOpening:
    def __init__(self, hooks: PlainHooks, ref: FileRef, then: Then) -> None:
        self.hooks, self.ref, self.then = hooks, ref, then

    def cancel(self) -> None:
        self.then(InterruptedError(errno.EINTR, "interrupted"))

    def flush(self, last: bool, then: Then) -> None:
        self.hooks.calls.append(("lock_flush", self.ref.name, last))
        then(None)

    def release(self) -> None:
        self.hooks.calls.append(("lock_release", self.ref.name))


class PlainHooks:
    def __init__(self, data_dir: str) -> None:
        self.directory = os.path.join(data_dir, "files")
        os.makedirs(self.directory, exist_ok=True)
        self.is_primary = True
        self.primary: str | None = None
        self.calls: list[tuple[object, ...]] = []
        self.errors: dict[str, BaseException] = {}  # hook name -> what its continuation gets
        self.position = 0
        self.moved: dict[str, str] = {}
        self.opened_as: dict[int, tuple[bool, bool]] = {}  # by handle: whether writable, whether hooked

    def resolve(self, name: str) -> FileRef:
        if name == ".primary":
            return FileRef(name, FileKind.PRIMARY, None, None)
        if name == ".lag":
            return FileRef(name, FileKind.LAG, None, None)
        kind, database = FileKind.PLAIN, None
        for suffix, found in SUFFIXES.items():
            if name.endswith(".db" + suffix):
                kind, database = found, name[: -len(suffix)]
        if name.endswith(".db"):
            kind, database = FileKind.DATABASE, name
        if kind in (FileKind.POSITION, FileKind.LOCK):
            return FileRef(name, kind, database, None)
        return FileRef(name, kind, database, self.moved.get(name, os.path.join(self.directory, name)))

    def names(self) -> list[str]:
        return [".lag", *os.listdir(self.directory)]

    def _go_on(self, hook: str, ref: FileRef, then: Then) -> None:
        self.calls.append((hook, ref.name))
        error = self.errors.get(hook)
        if "slow" in ref.name:
            threading.Thread(target=then, args=(error,)).start()
        else:
            then(error)

    def virtual_content(self, ref: FileRef, then: Callable[[bytes | BaseException], None]) -> None:
        self.calls.append(("virtual_content", ref.name))
        if self.virtual_size(ref) is None:
            then(FileNotFoundError(2, "no such file"))
            return
        self.position += 1
        content = b"%016x/%016x\n" % (self.position, 0) if ref.kind is FileKind.POSITION else b"%010d\n" % self.position
        if "slow" in ref.name:
            threading.Thread(target=then, args=(content,)).start()
        else:
            then(content)

    def virtual_size(self, ref: FileRef) -> int | None:
        if ref.kind is FileKind.POSITION:
            return 34 if os.path.exists(os.path.join(self.directory, ref.database or "")) else None
        if ref.kind is FileKind.LOCK:
            return 0 if os.path.exists(os.path.join(self.directory, ref.database or "")) else None
        if ref.kind is FileKind.PRIMARY:
            return len(self.primary) + 1 if self.primary else None
        return 11

    def writable(self, ref: FileRef) -> bool:
        return self.is_primary

    def may_open(self, ref: FileRef, flags: int, by_daemon: bool, then: Then) -> None:
        self._go_on("may_open", ref, then)

    def open_lock(self, ref: FileRef, then: Then) -> LockOpening:
        """Held back until `self.lock_then` is called, if the name has "held" in it."""
        self.calls.append(("open_lock", ref.name))
        opening = PlainOpening(self, ref, then)
        if "held" not in ref.name:
            self._go_on("open_lock_answer", ref, then)
        return opening

    def may_create(self, ref: FileRef, by_daemon: bool, then: Then) -> None:
        self._go_on("may_create", ref, then)

    def wants_write_hook(self, ref: FileRef) -> bool:
        return "hooked" in ref.name

    def wants_wal_writes(self, ref: FileRef) -> bool:
        return "direct" in ref.name and ref.kind is FileKind.WAL

    def is_commit(self, ref: FileRef, fd: int, offset: int, size: int) -> bool:
        self.calls.append(("is_commit", ref.name, offset, size))
        return "direct" in ref.name and os.pread(fd, 6, offset) == b"commit"

    def opened(self, ref: FileRef, handle: int, pid: int, *, writable: bool, hooked: bool, by_daemon: bool) -> None:
        self.calls.append(("opened", ref.name, writable, hooked, by_daemon))
        self.opened_as[handle] = writable, hooked

    def write(self, ref: FileRef, fd: int, data: memoryview, offset: int, handle: int) -> int:
        self.calls.append(("write", ref.name, offset, len(data)))
        return os.pwrite(fd, data, offset)

    def before_truncate(self, ref: FileRef, size_bytes: int, then: Then, by_daemon: bool) -> None:
        self._go_on("before_truncate", ref, then)

    def created(self, ref: FileRef) -> None:
        return

    def after_truncate(self, ref: FileRef, size_bytes: int) -> None:
        self.calls.append(("after_truncate", ref.name, size_bytes))

    def before_fsync(self, ref: FileRef, then: Then) -> None:
        self._go_on("before_fsync", ref, then)

    def after_fsync(self, ref: FileRef, then: Then, handle: int) -> None:
        self._go_on("after_fsync", ref, then)

    def fsync_failed(self, ref: FileRef) -> None:
        self.calls.append(("fsync_failed", ref.name))

    def before_unlink(self, ref: FileRef, by_daemon: bool, then: Then) -> None:
        if ref.kind is FileKind.DATABASE:
            for name in os.listdir(self.directory):
                if name.startswith(ref.name):
                    os.unlink(os.path.join(self.directory, name))
        self._go_on("before_unlink", ref, then)

    def unlinked(self, ref: FileRef) -> None:
        assert not os.path.exists(ref.path), "asked before it was done"

    def before_rename(self, old: FileRef, new: FileRef, then: Then) -> None:
        self._go_on("before_rename", old, then)

    def renamed_by_engine(self, old: FileRef, new: FileRef) -> bool:
        return False

    def overwritten(self, ref: FileRef) -> None: ...

    def released(self, ref: FileRef, handle: int, last: bool, by_daemon: bool) -> None:
        self.calls.append(("released", ref.name, *self.opened_as.pop(handle), last, by_daemon))

    def flushed(self, ref: FileRef, then: Then, handle: int) -> None:
        self._go_on("flushed", ref, then)
