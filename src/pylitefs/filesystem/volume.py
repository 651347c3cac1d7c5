"""What all request handlers share: the request being handled, and how files are found, shown and checked."""

from __future__ import annotations

import ctypes
import os
import stat
import time
from collections.abc import Callable
from errno import EIO, ENAMETOOLONG, ENOENT, ENOTDIR, ESTALE
from typing import TypeVar

from pylitefs.filesystem.answers import Act, Answers
from pylitefs.filesystem.dying import Answerable, Patience
from pylitefs.filesystem.handles import Handles
from pylitefs.filesystem.tree import Node, RootStat, Tree, id_of
from pylitefs.formats.fuse import abi, replies
from pylitefs.ports import VIRTUAL_KINDS, FileHooks, FileKind, FileRef, Then

FOREVER_S = 3600  # validity of what only the mount or a notification changes
T = TypeVar("T")
_WRITE_BITS = 0o222 if os.geteuid() == 0 else 0o022  # the daemon itself may write, without being root too
_libc = ctypes.CDLL(None)


class Request:
    """The request a thread is handling; valid until the handler returns. `data` holds `size` bytes of message."""

    __slots__ = ("data", "gid", "nodeid", "opcode", "pid", "size", "uid", "unique")

    def __init__(self, data: bytearray) -> None:
        self.data = data
        self.size = self.opcode = self.unique = self.nodeid = self.uid = self.gid = self.pid = 0


class VirtualStat:
    """A file that exists only in the mount, as os.stat would show it."""

    st_blocks = 0
    st_blksize = 4096

    def __init__(self, root: RootStat, size_bytes: int) -> None:
        self.st_mode = stat.S_IFREG | 0o444
        self.st_uid = root.st_uid
        self.st_gid = root.st_gid
        self.st_size = size_bytes
        self.st_atime_ns = self.st_mtime_ns = self.st_ctime_ns = time.time_ns()


class Volume:
    """The mounted directory: its tree, handles and engine."""

    def __init__(
        self, hooks: FileHooks, answers: Answers, handles: Handles, tree: Tree, root: RootStat, data_dir: str,
        patience: Patience,
    ) -> None:
        self.hooks = hooks
        self.answers = answers
        self.handles = handles
        self.tree = tree
        self.root = root
        self.data_dir = data_dir
        self.patience = patience
        self._pid = os.getpid()

    def after(self, rq: Request, act: Act) -> Then:
        return self.answers.after(rq.unique, rq.opcode, act)

    def patiently(self, rq: Request, act: Act) -> Answerable:
        """As `after`, for what may wait for other nodes: it is given up when the caller was killed meanwhile."""
        return Answerable(self.patience, rq.pid, rq.unique, self.after(rq, act))

    def by_daemon(self, pid: int) -> bool:
        """Whether a request comes from this process; the kernel tells the calling *thread's* id."""
        return pid == self._pid or (pid > 0 and is_own_thread(self._pid, pid))

    def node(self, ino: int) -> Node:
        node = self.tree.nodes.get(ino)
        if node is None:
            raise OSError(ESTALE, "no such node")
        return node

    def ref(self, node: Node) -> FileRef:
        return self.tree.refresh(node) if node.stale else node.ref

    def path(self, node: Node) -> str:
        """The backing file of a node that has a name. ESTALE otherwise: the kernel then looks the name up again."""
        path = self.ref(node).path
        if node.name is None or path is None:
            raise OSError(ESTALE, "the file has no name any more")
        return path

    def on_path(self, node: Node, use: Callable[[str], T]) -> T:
        """`use(path)`, again as often as the file was moved inside the data directory meanwhile. ESTALE if it has gone,
        never ENOENT: who opens with O_CREAT would get it, though the kernel can look the name up again, and make it."""
        path = self.path(node)
        while True:
            try:
                return use(path)
            except FileNotFoundError:
                node.stale = True
                before, path = path, self.path(node)
                if path == before:
                    raise OSError(ESTALE, "the file has gone") from None

    def open(self, node: Node, flags: int) -> int:
        """A descriptor of the node's own file. ESTALE if its name leads to another one by now. Not while names are
        moved (`Tree.move`): who opens a database before that finds its own -wal, who opens it afterwards the new one.
        """
        with self.tree.lock:
            fd = self.on_path(node, lambda path: open_backing(path, flags))
        try:
            if id_of(os.fstat(fd)) != node.file_id:
                raise OSError(ESTALE, "the name leads to another file")
        except OSError:
            os.close(fd)
            raise
        return fd

    def lstat(self, node: Node) -> os.stat_result:
        """State of the node's own file, by its name. ESTALE if that leads to another one by now."""
        found = self.on_path(node, os.lstat)
        if id_of(found) != node.file_id:
            raise OSError(ESTALE, "the name leads to another file")
        return found

    def stat(self, node: Node) -> replies.StatLike:
        """State of a node's file: of the open one, else of what its name leads to."""
        if node.virtual:
            return self.virtual_stat(node.ref)
        return node.fstat() or self.lstat(node)

    def virtual_stat(self, ref: FileRef) -> VirtualStat:
        size_bytes = self.hooks.virtual_size(ref)
        if size_bytes is None:
            raise OSError(ENOENT, "no such file")
        found = VirtualStat(self.root, size_bytes)
        if ref.kind is FileKind.LOCK and ref.database is not None:  # for those who may write the database
            owner = os.lstat(backing_path(self.hooks.resolve(ref.database)))
            found.st_mode = stat.S_IFREG | (owner.st_mode & 0o666)
            found.st_uid, found.st_gid = owner.st_uid, owner.st_gid
        return found

    def shown_mode(self, ref: FileRef, mode: int) -> int:
        """A database cannot be written on a replica, and says so."""
        if ref.kind is FileKind.DATABASE and not self.hooks.writable(ref):
            return mode & ~_WRITE_BITS
        return mode

    def attr_body(self, node: Node) -> bytes:
        """The reply to GETATTR and SETATTR."""
        found = self.stat(node)
        return replies.pack_attr(
            node.ino, found, self.shown_mode(node.ref, found.st_mode), node.name is not None,
            0 if node.virtual else FOREVER_S,
        )  # fmt: skip

    def entry_body(self, node: Node, found: replies.StatLike, valid_s: int = FOREVER_S) -> bytes:
        mode = self.shown_mode(node.ref, found.st_mode)
        return replies.pack_entry(node.ino, found, mode, 1, valid_s, valid_s)

    def name_in_root(self, rq: Request, name: str) -> FileRef:
        """What a name of a request stands for. The root is the only directory."""
        if rq.nodeid != abi.ROOT_ID:
            raise OSError(ENOTDIR, "not a directory")
        if len(name.encode("utf-8", "surrogateescape")) > abi.NAME_MAX:
            raise OSError(ENAMETOOLONG, "file name too long")
        return self.hooks.resolve(name)


def open_backing(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)


def backing_path(ref: FileRef) -> str:
    """Where a file that is not virtual lies."""
    if ref.path is None:
        raise OSError(EIO, f"{ref.name} has no backing file")
    return ref.path


def is_virtual(ref: FileRef) -> bool:
    return ref.kind in VIRTUAL_KINDS


if hasattr(_libc, "tgkill"):  # glibc 2.30; signal 0 asks only whether the thread is there

    def is_own_thread(pid: int, tid: int) -> bool:
        return bool(_libc.tgkill(pid, tid, 0) == 0)

else:

    def is_own_thread(pid: int, tid: int) -> bool:
        return os.path.exists(f"/proc/{pid}/task/{tid}")
