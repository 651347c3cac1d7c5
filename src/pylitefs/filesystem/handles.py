"""Open handles, and the descriptor and io mode that all handles of a node share.

One backing descriptor serves every handle of a node (reads and writes are positioned, and the kernel has checked each
handle's access mode): opened with the first handle, closed with the last. With it goes the io mode, because the
kernel refuses to mix passthrough and cached opens of one inode.
"""

from __future__ import annotations

import errno
import itertools
import os
import resource
import stat
from collections.abc import Callable
from typing import Protocol

from pylitefs.filesystem.cached_databases import CachedDatabases
from pylitefs.filesystem.tree import IoMode, Node
from pylitefs.formats.fuse import abi
from pylitefs.ports import FileHooks, FileKind, LockOpening

OpenBacking = Callable[[bool], int]
"""Opens the backing file of a node, for reading and writing if True, and returns the descriptor."""

_SETID = stat.S_ISUID | stat.S_ISGID  # a passed-through write would not clear them
_SHARE_OF_APPLICATIONS = 0.75  # of our descriptors: the rest is for the log, and for what is open already
_SCARCE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
_ALWAYS_HOOKED = frozenset({FileKind.DATABASE, FileKind.JOURNAL, FileKind.WAL})
_READ_ONLY_ERRORS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY})


class BackingFiles(Protocol):
    """The part of the device that passthrough needs."""

    def backing_open(self, fd: int) -> int: ...

    def backing_close(self, backing_id: int) -> None: ...


class Handle:
    """An open file of one process. `content` is what a virtual file said when this handle first read it. `direct`: its
    reads and writes come to us, beside others that pass through."""

    __slots__ = ("by_daemon", "content", "direct", "lock", "node", "unseen", "writable", "write_only")

    def __init__(self, node: Node, writable: bool, by_daemon: bool) -> None:
        self.node = node
        self.writable = writable
        self.by_daemon = by_daemon
        self.direct = False
        self.write_only = False
        self.content: bytes | None = None
        self.lock: LockOpening | None = None  # of a lock file that is open for writing
        self.unseen = False  # its process is in a PID namespace that we cannot see into


class Handles:
    """All open handles by number. `passthrough` turns False for good when the kernel refuses a backing file."""

    def __init__(
        self, hooks: FileHooks, device: BackingFiles, log: Callable[[str], None], *, passthrough: bool
    ) -> None:
        self._hooks = hooks
        self._device = device
        self._log = log
        self._numbers = itertools.count(1)
        self.passthrough = passthrough
        self.cached = CachedDatabases()
        self.ending = False  # the mount is about to end: see `check_alive`
        self.open: dict[int, Handle] = {}

    def check_alive(self, node: Node) -> None:
        """Before a read or a write. Once the mount is ending no page of a database comes into the kernel's cache any
        more. Raises OSError."""
        if self.ending and node.ino in self.cached:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

    def open_virtual(self, node: Node, lock: LockOpening | None = None, *, unseen: bool = False) -> int:
        fh = next(self._numbers)
        handle = Handle(node, lock is not None, False)
        handle.unseen = unseen
        handle.lock = lock
        self.open[fh] = handle
        return fh

    def open_node(
        self, node: Node, open_fd: OpenBacking, writable: bool, by_daemon: bool, pid: int
    ) -> tuple[int, int, int]:
        """A new handle: (fh, FOPEN flags, backing id). `open_fd` is called for the first handle, and for the first
        writable one if the file could only be opened for reading before."""
        with node.gate:
            if node.handle_count == 0:
                self._enter(node, open_fd, writable, by_daemon)
            elif writable and not node.writable:
                self._make_writable(node, open_fd(True))
            node.handle_count += 1
            node.app_handles += not by_daemon
            handle = Handle(node, writable, by_daemon)
            if node.mode is IoMode.PASSTHROUGH:
                flags = abi.FOPEN_PASSTHROUGH | abi.FOPEN_NOFLUSH
                if writable and not by_daemon and self._hooks.wants_wal_writes(node.ref):
                    handle.direct = True
                    flags |= abi.FOPEN_DIRECT_IO  # which the kernel allows beside a backing file (fuse_file_io_open)
            else:
                flags = 0 if node.drop_cache else abi.FOPEN_KEEP_CACHE
                if by_daemon or not (node.hooked and writable):
                    flags |= abi.FOPEN_NOFLUSH  # ours: a killed daemon would wait for itself while its files are closed
                node.drop_cache = False
            fh, hooked = next(self._numbers), node.hooked
            try:
                self._hooks.opened(node.ref, fh, pid, writable=writable, hooked=hooked, by_daemon=by_daemon)
            except BaseException:
                self._drop(node, by_daemon)
                raise
            self.open[fh] = handle
            return fh, flags, node.backing_id

    def _enter(self, node: Node, open_fd: Callable[[bool], int], writable: bool, by_daemon: bool) -> None:
        """Open the backing file of an idle node and choose its io mode."""
        wanted = self._hooks.wants_write_hook(node.ref)
        try:
            fd, node.writable = open_fd(True), True
        except OSError as error:
            if writable or error.errno not in _READ_ONLY_ERRORS:
                raise
            fd, node.writable = open_fd(False), False
        if not by_daemon and fd >= _SHARE_OF_APPLICATIONS * resource.getrlimit(resource.RLIMIT_NOFILE)[0]:
            os.close(fd)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        backing_id = 0
        if self.passthrough and not wanted and not os.fstat(fd).st_mode & _SETID:
            backing_id = self._backing_open(fd)
        with node.lock:
            node.fd = fd
        node.backing_id = backing_id
        node.mode = IoMode.PASSTHROUGH if backing_id else IoMode.CACHED
        if not backing_id and (wanted or node.ref.kind is FileKind.DATABASE):
            self.cached.add(node.ino)
        node.hooked = wanted or (not backing_id and node.ref.kind in _ALWAYS_HOOKED)
        node.drop_cache = node.drop_cache or backing_id != 0

    def _backing_open(self, fd: int) -> int:
        """A backing id, or 0 if this file must be cached. Refusal for good (privileges, a stacked filesystem, an old
        kernel) ends passthrough for the whole mount."""
        try:
            return self._device.backing_open(fd)
        except OSError as error:
            if error.errno not in _SCARCE and self.passthrough:
                self.passthrough = False
                self._log(f"passthrough is off, files are cached from now on: {error.strerror}")
            return 0

    @staticmethod
    def _make_writable(node: Node, fd: int) -> None:
        with node.lock:
            node.spare_fds.append(node.fd)
            node.fd = fd
            node.writable = True

    def release(self, fh: int) -> None:
        handle = self.open.pop(fh)
        node = handle.node
        if handle.lock is not None:
            handle.lock.release()
        if node.virtual:
            return
        with node.gate:
            last = self._drop(node, handle.by_daemon)
            self._hooks.released(node.ref, fh, last, handle.by_daemon)

    def _drop(self, node: Node, by_daemon: bool) -> bool:
        """One handle less; True if it was the last."""
        node.handle_count -= 1
        node.app_handles -= not by_daemon
        if node.handle_count == 0:
            self._leave(node)
        return node.handle_count == 0

    def _leave(self, node: Node) -> None:
        with node.lock:
            fds = [node.fd, *node.spare_fds]
            node.fd = -1
            node.spare_fds = []
        if node.backing_id:
            try:
                self._device.backing_close(node.backing_id)
            except OSError:
                pass  # the mount is gone, and the id with it
        node.backing_id = 0
        node.mode = IoMode.IDLE
        node.hooked = False
        for fd in fds:
            os.close(fd)

    def release_all(self) -> None:
        """After the mount is gone: what the kernel did not release any more."""
        for fh in list(self.open):
            self.release(fh)
