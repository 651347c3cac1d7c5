"""Requests about names: looking up, making, removing, renaming, listing. The mount is one flat directory."""

from __future__ import annotations

import bisect
import itertools
import os
import stat
import threading
from collections.abc import Callable
from errno import EEXIST, EINVAL, ENOTDIR, EPERM
from pathlib import Path

from pylitefs.filesystem.files import WRITING, FileRequests, Handler
from pylitefs.filesystem.notify import KernelNotifier
from pylitefs.filesystem.tree import Node
from pylitefs.filesystem.volume import FOREVER_S, Request, Volume, backing_path, is_virtual
from pylitefs.formats.fuse import abi, replies, requests
from pylitefs.ports import SUFFIXES, FileKind, FileRef

_UNKNOWN_INO = 0xFFFFFFFF  # of a name the kernel has not looked up
_DT_DIR = stat.S_IFDIR >> 12
_DT_REG = stat.S_IFREG >> 12


class DirectorySync:
    """Makes names durable: remembers which directories of the data directory changed, and fsyncs them on demand."""

    def __init__(self, data_dir: str) -> None:
        self._top = Path(data_dir)
        self._known: set[Path] = set()  # directories that are durable themselves
        self._changed: set[Path] = set()
        self._lock = threading.Lock()  # held while syncing: who comes second returns no earlier than the first

    def note(self, path: str) -> None:
        """A name was made in or taken from the directory of `path`."""
        directory = Path(path).parent
        self._changed.add(directory)
        while directory not in self._known and directory != self._top and self._top in directory.parents:
            self._known.add(directory)
            directory = directory.parent
            self._changed.add(directory)

    def sync(self) -> None:
        with self._lock:
            changed = list(self._changed)
            self._changed.difference_update(changed)
            try:
                for directory in changed:
                    self._sync(directory)
            except OSError:
                self._changed.update(changed)
                raise

    def _sync(self, directory: Path) -> None:
        try:
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            self._known.discard(directory)
            return
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class NameRequests:
    """Handlers by opcode in `table`."""

    def __init__(self, volume: Volume, files: FileRequests, notifier: KernelNotifier) -> None:
        self._volume = volume
        self._files = files
        self._hooks = volume.hooks
        self._tree = volume.tree
        self._notifier = notifier
        self._directories = DirectorySync(volume.data_dir)
        self._listing: list[tuple[int, str]] = []  # (offset, name), ascending
        self._listing_lock = threading.Lock()
        self._listing_numbers = itertools.count(3)
        self.table: dict[int, Handler] = {
            abi.LOOKUP: self._lookup,
            abi.FORGET: self._forget,
            abi.BATCH_FORGET: self._batch_forget,
            abi.CREATE: self._create,
            abi.MKNOD: self._mknod,
            abi.UNLINK: self._unlink,
            abi.RENAME: lambda rq: self._rename(rq, requests.parse_rename(rq.data, rq.size)),
            abi.RENAME2: lambda rq: self._rename(rq, requests.parse_rename2(rq.data, rq.size)),
            abi.READDIR: self._readdir,
            abi.FSYNCDIR: self._fsyncdir,
        }

    # -- looking up

    def _lookup(self, rq: Request) -> bytes:
        volume = self._volume
        name = requests.parse_name(rq.data, rq.size)
        ref = volume.name_in_root(rq, name)
        if is_virtual(ref):
            found: replies.StatLike = volume.virtual_stat(ref)
            return volume.entry_body(self._tree.find_virtual(ref), found, valid_s=0)
        entry = self._tree.find(name)
        if entry is None:
            return replies.pack_no_entry(FOREVER_S)
        return volume.entry_body(*entry)

    def _forget(self, rq: Request) -> None:
        self._tree.forget(rq.nodeid, requests.parse_forget(rq.data))

    def _batch_forget(self, rq: Request) -> None:
        for nodeid, lookups in requests.parse_batch_forget(rq.data, rq.size):
            self._tree.forget(nodeid, lookups)

    # -- making

    def _create(self, rq: Request) -> None:
        request = requests.parse_create(rq.data, rq.size)
        volume = self._volume
        by_daemon = volume.by_daemon(rq.pid)
        writable = request.flags & WRITING != 0
        unique, pid = rq.unique, rq.pid

        def opened(node: Node) -> None:
            try:
                handle = self._files.open_handle(node, writable, by_daemon, pid)
            except BaseException:
                self._tree.forget(node.ino, 1)
                raise
            body = volume.entry_body(node, volume.stat(node)) + replies.pack_open(*handle)
            if not volume.answers.sink.reply(unique, body):
                volume.handles.release(handle[0])
                self._tree.forget(node.ino, 1)

        ref = volume.name_in_root(rq, request.name)
        if is_virtual(ref):
            raise OSError(EPERM, f"{ref.name} is made by litefs itself")
        entry = self._tree.find(request.name)
        if entry is None:
            self._make(rq, ref, request.mode, by_daemon, opened)
            return
        if request.flags & os.O_EXCL:
            self._tree.forget(entry[0].ino, 1)
            raise OSError(EEXIST, "file exists")
        self._open_existing(rq, request, entry[0], by_daemon, opened)

    def _open_existing(
        self, rq: Request, request: requests.Create, node: Node, by_daemon: bool, opened: Callable[[Node], None]
    ) -> None:
        """CREATE of a file that the engine has made since the kernel last looked."""
        ref = self._volume.ref(node)

        def truncate() -> None:
            fd = self._volume.open(node, os.O_WRONLY | os.O_TRUNC)
            os.close(fd)
            self._hooks.after_truncate(ref, 0)
            opened(node)

        truncated = self._volume.after(rq, truncate)  # now: `rq` is another request when `go_on` runs

        def go_on() -> None:
            if request.flags & os.O_TRUNC:
                self._hooks.before_truncate(ref, 0, truncated, by_daemon)
            else:
                opened(node)

        self._hooks.may_open(ref, request.flags, by_daemon, self._volume.after(rq, go_on))

    def _mknod(self, rq: Request) -> None:
        request = requests.parse_mknod(rq.data, rq.size)
        if stat.S_IFMT(request.mode) not in (0, stat.S_IFREG):
            raise OSError(EPERM, "only regular files can be made here")
        ref = self._volume.name_in_root(rq, request.name)
        if is_virtual(ref):
            raise OSError(EPERM, f"{ref.name} is made by litefs itself")
        if os.path.lexists(backing_path(ref)):
            raise OSError(EEXIST, "file exists")
        volume, unique = self._volume, rq.unique

        def made(node: Node) -> None:
            volume.answers.sink.reply(unique, volume.entry_body(node, volume.stat(node)))

        self._make(rq, ref, request.mode, volume.by_daemon(rq.pid), made)

    def _make(self, rq: Request, ref: FileRef, mode: int, by_daemon: bool, made: Callable[[Node], None]) -> None:
        """Make a new file for the caller, with its owner and the mode it asked for (its umask is already in it)."""
        uid, gid = rq.uid, rq.gid

        def act() -> None:
            fresh = self._hooks.resolve(ref.name)
            path = backing_path(fresh)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode & 0o777)
            try:
                now = os.fstat(fd)
                if (now.st_uid, now.st_gid) != (uid, gid) and os.geteuid() == 0:
                    os.fchown(fd, uid, gid)
                if stat.S_IMODE(now.st_mode) != mode & 0o7777:  # our own umask took part
                    os.fchmod(fd, mode & 0o7777)
                node = self._tree.created(fresh, now)
            except OSError:
                os.unlink(path)
                raise
            finally:
                os.close(fd)
            self._hooks.created(fresh)
            self._name_changed(path)
            made(node)

        self._hooks.may_create(ref, by_daemon, self._volume.after(rq, act))

    def _name_changed(self, *paths: str) -> None:
        for path in paths:
            self._directories.note(path)
        self._volume.root.touch()

    # -- removing and renaming

    def _unlink(self, rq: Request) -> None:
        name = requests.parse_name(rq.data, rq.size)
        ref = self._volume.name_in_root(rq, name)
        if is_virtual(ref):
            raise OSError(EPERM, f"{name} is kept by litefs itself")

        def act() -> bytes:
            if ref.kind is FileKind.DATABASE:
                self._side_files_gone(name)
                self._volume.root.touch()
            else:
                try:
                    os.unlink(backing_path(ref))
                except FileNotFoundError:  # with the end of its transaction the engine may have moved it
                    os.unlink(backing_path(self._hooks.resolve(name)))
                self._name_changed(backing_path(ref))
            self._tree.remove(name)
            self._hooks.unlinked(ref)
            return b""

        self._hooks.before_unlink(ref, self._volume.by_daemon(rq.pid), self._volume.patiently(rq, act))

    def _side_files_gone(self, name: str) -> None:
        """The engine has removed a database and all that belonged to it."""
        for suffix in SUFFIXES:
            self._notifier.changed(name + suffix)

    def _rename(self, rq: Request, request: requests.Rename) -> None:
        volume = self._volume
        if request.flags & ~abi.RENAME_NOREPLACE:
            raise OSError(EINVAL, "names cannot be exchanged")
        if request.new_parent != abi.ROOT_ID:
            raise OSError(ENOTDIR, "not a directory")
        old = volume.name_in_root(rq, request.old)
        new = volume.name_in_root(rq, request.new)
        if is_virtual(old) or is_virtual(new):
            raise OSError(EPERM, "the files of litefs itself cannot be renamed")
        if request.flags & abi.RENAME_NOREPLACE and os.path.lexists(backing_path(new)):
            raise OSError(EEXIST, "file exists")

        def act() -> bytes:
            if self._hooks.renamed_by_engine(old, new):
                for side in [name + suffix for name in (old.name, new.name) for suffix in SUFFIXES]:
                    self._notifier.changed(side)
                volume.root.touch()
            else:
                self._tree.move(old.name, new.name, lambda: os.rename(backing_path(old), backing_path(new)))
                self._name_changed(backing_path(old), backing_path(new))
            return b""

        self._hooks.before_rename(old, new, volume.after(rq, act))

    # -- the directory itself

    def _readdir(self, rq: Request) -> bytes:
        """Each name has a number of its own as its offset, so a listing that goes on while names come and go, or
        while somebody else begins another, neither skips nor repeats one that was there all the time."""
        _, offset, size = requests.parse_read(rq.data)
        if offset == 0:
            self._list_names()
        start = bisect.bisect_right(self._listing, offset, key=lambda entry: entry[0])
        end = start + size // abi.DIRENT.size
        known = self._tree.names
        entries = []
        for number, name in self._listing[start:end]:
            if number in (1, 2):
                entries.append((abi.ROOT_ID, number, _DT_DIR, name))
            else:
                node = known.get(name)
                entries.append((node.ino if node else _UNKNOWN_INO, number, _DT_REG, name))
        return replies.pack_dirents(entries, size)

    def _list_names(self) -> None:
        names = sorted(self._hooks.names())
        with self._listing_lock:
            old = {name: number for number, name in self._listing}
            fresh = [(old.get(name) or next(self._listing_numbers), name) for name in names]
            self._listing = [(1, "."), (2, ".."), *sorted(fresh)]

    def _fsyncdir(self, rq: Request) -> bytes:
        self._directories.sync()
        return b""

