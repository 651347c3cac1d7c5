"""What a disk may hold after a power cut.

A `Recorder` notes what a run does to the files of one folder tree: writes, truncations, fsyncs, and names made, renamed
and removed. `image` then builds what may be left of it if the power fails after the n-th operation:

- of a file: everything before its last fsync; of later writes any subset, each of them cut at 512-byte sectors
- of a folder: every change of names before its last fsync; of later ones a prefix, in their order
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

SECTOR = 512
SIMPLE = ("none", "all", "prefix", "random")
POLICIES = (*SIMPLE, "mixed", "mixed", "log first")
"""What survives of what was not synced. "mixed": another of the first four for each file and folder; "log first": all
that is in folders called ltx, and nothing else."""


@dataclass(frozen=True)
class Op:
    """`kind`: write, truncate, sync (of `file`); link, unlink, rename, sync folder (of `path`); or mark."""

    kind: str
    file: int = -1
    path: str = ""
    offset: int = 0
    data: bytes = b""
    target: str = ""


@dataclass
class Recorder:
    """Paths are relative to `root`. `ignored`: ends of names that are not recorded."""

    root: Path
    ignored: tuple[str, ...] = ("-shm", "boot")
    ops: list[Op] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)
    base: dict[int, bytes] = field(default_factory=dict)
    base_names: dict[str, int] = field(default_factory=dict)
    _last: dict[int, bytes] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        for path in sorted(self.root.rglob("*")):
            if path.is_file() and not path.name.endswith(self.ignored):
                number = self.base_names[str(path.relative_to(self.root))] = len(self.base)
                self.base[number] = path.read_bytes()
        self.names = dict(self.base_names)
        self._next = len(self.base)

    # -- recording -------------------------------------------------------------------------------------------

    def relative(self, path: str) -> str | None:
        full = os.path.abspath(path)
        if not full.startswith(f"{self.root}/") or full.endswith(self.ignored):
            return None
        return os.path.relpath(full, self.root)

    def _number(self, path: str) -> int | None:
        name = self.relative(path)
        return None if name is None else self.names.get(name)

    def created(self, path: str) -> None:
        """Any thread: the log's next file is made on one of its own."""
        name = self.relative(path)
        with self._lock:
            if name is not None and name not in self.names:
                self.names[name] = self._next
                self._next += 1
                self.ops.append(Op("link", self.names[name], name))

    def write(self, path: str, data: bytes, offset: int) -> None:
        if (number := self._number(path)) is not None:
            self.ops.append(Op("write", number, offset=offset, data=data))

    def truncate(self, path: str, size: int) -> None:
        if (number := self._number(path)) is not None:
            self.ops.append(Op("truncate", number, offset=size))

    def sync(self, path: str) -> None:
        if os.path.isdir(path):
            self.sync_folder(path)
        elif (number := self._number(path)) is not None:
            self.ops.append(Op("sync", number))

    def sync_folder(self, path: str) -> None:
        self.ops.append(Op("sync folder", path=os.path.relpath(path, self.root)))

    def unlink(self, path: str) -> None:
        name = self.relative(path)
        if name is not None and self.names.pop(name, None) is not None:
            self.ops.append(Op("unlink", path=name))

    def rename(self, old: str, new: str) -> None:
        source, target = self.relative(old), self.relative(new)
        if source is not None and target is not None and source in self.names:
            self.names[target] = self.names.pop(source)
            self.ops.append(Op("rename", path=source, target=target))

    def mark(self, text: str) -> None:
        self.ops.append(Op("mark", path=text))

    def write_back(self, chance: float, rng: random.Random) -> None:
        """The kernel wrote some files and folders to the disk on its own account."""
        for name in sorted(self.names):
            if rng.random() < chance:
                self.ops.append(Op("sync", self.names[name]))
        for folder in sorted({os.path.dirname(name) for name in self.names}):
            if rng.random() < chance:
                self.ops.append(Op("sync folder", path=folder))

    def note_mapped(self, path: str) -> None:
        """A file that is written through a mapping: note what changed since the last call, sector by sector."""
        number = self._number(path)
        if number is None:
            return
        now, before = Path(path).read_bytes(), self._last.get(number, b"")
        for at in range(0, len(now), SECTOR):
            if now[at : at + SECTOR] != before[at : at + SECTOR]:
                self.ops.append(Op("write", number, offset=at, data=now[at : at + SECTOR]))
        self._last[number] = now

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Also record what Python code does to the files, through `os`."""
        patch = pytest.MonkeyPatch()

        def of(fd: int) -> str:
            return os.readlink(f"/proc/self/fd/{fd}")

        def before(name: str, tell: Callable[..., object]) -> None:
            original = getattr(os, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                tell(*args)
                return original(*args, **kwargs)

            patch.setattr(os, name, call)

        real_open, real_writev, real_write = os.open, os.writev, os.write

        def open_(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            new = not os.path.exists(path)
            fd = real_open(path, flags, *args, **kwargs)
            if new:
                self.created(path)
            elif flags & os.O_TRUNC:
                self.truncate(path, 0)
            return fd

        def written(fd: int, data: bytes) -> None:
            at = os.lseek(fd, 0, os.SEEK_CUR) - len(data)
            self.write(of(fd), data, at)

        def writev(fd: int, parts: Any) -> int:
            count = real_writev(fd, parts)
            written(fd, b"".join(parts)[:count])
            return count

        def write(fd: int, data: Any) -> int:
            count = real_write(fd, data)
            if self.relative(of(fd)) is not None:
                written(fd, bytes(data)[:count])
            return count

        patch.setattr(os, "open", open_)
        patch.setattr(os, "writev", writev)
        patch.setattr(os, "write", write)
        before("pwrite", lambda fd, data, offset: self.write(of(fd), bytes(data), offset))
        before("ftruncate", lambda fd, size: self.truncate(of(fd), size))
        before("fsync", lambda fd: self.sync(of(fd)))
        before("fdatasync", lambda fd: self.sync(of(fd)))
        before("unlink", lambda path: self.unlink(os.fspath(path)))
        before("rename", lambda old, new: self.rename(os.fspath(old), os.fspath(new)))
        try:
            yield
        finally:
            patch.undo()

    # -- crashing --------------------------------------------------------------------------------------------

    def boundaries(self) -> list[int]:
        """Right before and right after each fsync."""
        found = {len(self.ops)}
        for index, op in enumerate(self.ops):
            if op.kind.startswith("sync"):
                found |= {index, index + 1}
        return sorted(found)

    def image(self, count: int, rng: random.Random, policy: str, folder: Path) -> None:
        """What may be left in `folder` if the power fails after `count` operations."""
        contents: dict[int, bytearray] = {number: bytearray(data) for number, data in self.base.items()}
        unsynced: dict[int, list[Op]] = {}
        first_name = {number: name for name, number in self.base_names.items()}
        first_name |= {op.file: op.path for op in self.ops[:count] if op.kind == "link"}
        names, changes = dict(self.base_names), list[Op]()
        for op in self.ops[:count]:
            if op.kind in ("write", "truncate"):
                unsynced.setdefault(op.file, []).append(op)
            elif op.kind == "sync":
                content = contents.setdefault(op.file, bytearray())
                for earlier in unsynced.pop(op.file, []):
                    _apply(content, earlier)
            elif op.kind == "sync folder":
                inside = [change for change in changes if os.path.dirname(change.path) == op.path]
                changes = [change for change in changes if change not in inside]
                _change_names(names, inside)
            elif op.kind != "mark":
                changes.append(op)
        for name_folder in sorted({os.path.dirname(change.path) for change in changes}):
            inside = [change for change in changes if os.path.dirname(change.path) == name_folder]
            _change_names(names, inside[: _prefix(len(inside), rng, _one(policy, name_folder, rng))])
        for number, ops in unsynced.items():
            content = contents.setdefault(number, bytearray())
            for op in _survivors(ops, rng, _one(policy, os.path.dirname(first_name.get(number, "")), rng)):
                _apply(content, op)
        for name, number in names.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(contents.get(number, b""))


def _one(policy: str, folder: str, rng: random.Random) -> str:
    """The policy for one file or folder."""
    if policy == "log first":
        return "all" if os.path.basename(folder) == "ltx" else "none"
    return rng.choice(SIMPLE) if policy == "mixed" else policy


def _prefix(count: int, rng: random.Random, policy: str) -> int:
    return {"none": 0, "all": count}.get(policy, rng.randint(0, count))


def _survivors(ops: list[Op], rng: random.Random, policy: str) -> Iterator[Op]:
    if policy in ("none", "all", "prefix"):
        kept = _prefix(len(ops), rng, policy)
        yield from ops[:kept]
        if policy == "prefix" and kept < len(ops):
            yield from _torn(ops[kept], rng)
        return
    for op in ops:
        match rng.randrange(3):
            case 0:
                yield op
            case 1:
                yield from _torn(op, rng)


def _torn(op: Op, rng: random.Random) -> Iterator[Op]:
    """Some of a write's sectors."""
    if op.kind != "write":
        return
    at, end = op.offset, op.offset + len(op.data)
    while at < end:
        stop = min(end, (at // SECTOR + 1) * SECTOR)
        if rng.random() < 0.5:
            yield Op("write", op.file, offset=at, data=op.data[at - op.offset : stop - op.offset])
        at = stop


def _apply(content: bytearray, op: Op) -> None:
    if op.kind == "truncate":
        del content[op.offset :]
        content += bytes(op.offset - len(content))
    else:
        content += bytes(max(0, op.offset - len(content)))
        content[op.offset : op.offset + len(op.data)] = op.data


def _change_names(names: dict[str, int], changes: list[Op]) -> None:
    for op in changes:
        if op.kind == "link":
            names[op.path] = op.file
        elif op.kind == "unlink":
            names.pop(op.path, None)
        elif op.path in names:
            names[op.target] = names.pop(op.path)
