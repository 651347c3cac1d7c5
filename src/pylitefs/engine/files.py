"""Where one database's files are.

`folder` (DATA/dbs/NAME) holds the real files. The same files appear in the mount; there, and only there, are the
applications' locks, and in cached mode the current bytes of -shm. So each question has one right path:

    read database or WAL        backing file (writes pass through, or are written through)
    read -shm                   backing file with passthrough, the mount's otherwise (`reads_shm_directly`)
    locks, and writes while     `live`: the mount's files (keeps the kernel's sizes and caches right)
    applications may look on
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

from pylitefs.ports import FileKind

CHUNK_BYTES = 1 << 20
SUFFIX_OF = {FileKind.DATABASE: "", FileKind.WAL: "-wal", FileKind.SHM: "-shm", FileKind.JOURNAL: "-journal"}


@dataclass(frozen=True)
class DatabaseFiles:
    """Paths of one database. `mount_dir` is None where nothing is mounted (start, tests): then the live files
    are the backing ones. `passthrough` tells whether the mount passes I/O through."""

    name: str
    folder: str
    mount_dir: str | None = None
    passthrough: bool = True

    def backing(self, kind: FileKind) -> str:
        return f"{self.folder}/{kind.value}"  # asked for all the time: os.path.join takes five times as long

    def live(self, kind: FileKind) -> str:
        if self.mount_dir is None:
            return self.backing(kind)
        return f"{self.mount_dir}/{self.name}{SUFFIX_OF[kind]}"

    @property
    def reads_shm_directly(self) -> bool:
        """Whether the backing -shm has the current bytes (in cached mode only the mount's has)."""
        return self.passthrough or self.mount_dir is None

    @property
    def database(self) -> str:
        return self.backing(FileKind.DATABASE)

    @property
    def wal(self) -> str:
        return self.backing(FileKind.WAL)

    @property
    def shm(self) -> str:
        return self.backing(FileKind.SHM)

    @property
    def journal(self) -> str:
        return self.backing(FileKind.JOURNAL)

    @property
    def ltx(self) -> str:
        return os.path.join(self.folder, "ltx")

    @property
    def checksums(self) -> str:
        return os.path.join(self.folder, "checksums")

    @property
    def lost(self) -> str:
        return os.path.join(self.folder, "lost")


@dataclass(frozen=True)
class Permissions:
    """Of database files: `fuse.mode`, `fuse.uid`, `fuse.gid` of this node."""

    mode: int = 0o666
    uid: int | None = None
    gid: int | None = None

    def give(self, file: str | int) -> None:
        """To a file, by its path or descriptor. As far as we may: no OSError."""
        with contextlib.suppress(OSError):
            os.chmod(file, self.mode)
            if self.uid is not None or self.gid is not None:
                os.chown(file, -1 if self.uid is None else self.uid, -1 if self.gid is None else self.gid)


def is_file(fd: int, path: str) -> bool:
    """Whether a descriptor is of the file that has this name now."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def sync_folder(path: str) -> None:
    """Make names created or removed in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_file(path: str) -> None:
    """Make a file's content and size durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def file_chunks(path: str) -> Iterator[bytes]:
    """The bytes of a file, which may be renamed meanwhile (it is opened at once)."""
    file = open(path, "rb")  # noqa: SIM115 - closed when the generator ends

    def chunks() -> Iterator[bytes]:
        with file:
            while data := file.read(CHUNK_BYTES):
                yield data

    return chunks()


def publish_file(path: str, data: bytes) -> None:
    """Replace a small file so that after any crash it holds the old bytes or the new ones."""
    temporary = f"{path}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        os.write(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(temporary, path)
    sync_folder(os.path.dirname(path))


def read_at(fd: int, size: int, offset: int) -> bytes:
    """`size` bytes at `offset`, zeros past the end of the file (as SQLite reads)."""
    data = os.pread(fd, size, offset)
    while len(data) < size:
        more = os.pread(fd, size - len(data), offset + len(data))
        if not more:
            return data.ljust(size, b"\0")
        data += more
    return data


def write_at(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """All of `data` at `offset`. Raises OSError (ENOSPC) after a short write."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written


def new_folder(parent: str) -> str:
    """A new folder named after this moment, for what is put aside."""
    base = os.path.join(parent, time.strftime("%Y%m%dT%H%M%S"))
    for number in itertools.count():
        path = base if number == 0 else f"{base}-{number}"
        with contextlib.suppress(FileExistsError):
            os.makedirs(path)
            return path
    raise AssertionError


def sync_filesystem(path: str) -> None:
    """Everything that was written to the file system of `path` becomes durable (syncfs(2))."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        ctypes.CDLL(None).syncfs(fd)
    finally:
        os.close(fd)


def same_file(fd: int, path: str) -> bool:
    """Whether a descriptor of the mount belongs to the backing file that has this name now (it may have been replaced
    while it was being opened; the filesystem shows the backing file's size and times)."""
    try:
        mine, theirs = os.fstat(fd), os.stat(path)
    except OSError:
        return False
    return mine.st_nlink > 0 and mine.st_size <= theirs.st_size
