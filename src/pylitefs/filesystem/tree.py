"""Names and nodes of the mount: one flat directory.

A node is what the kernel knows by a number: it lives from the first LOOKUP until the kernel forgets it, with or
without a name (an unlinked file keeps its node as long as it is open). Numbers are never used twice.

A node stands for one file of the disk (`file_id`), and never for another one that gets the same name: the kernel keeps
POSIX locks by node. So a file has one node, and a name that leads to another file gets another node, whoever notices it
first. What a name leads to is never told to the tree; it looks for itself, under `Tree.lock`:

    who asks                        what is looked for
    LOOKUP (`find`)                 the file that the name leads to now
    the engine (`look_again`)       the same, after *every* change that it makes; then the kernel forgets the name
    OPEN, GETATTR (`Volume`)        whether the path still leads to the node's file; if not, ESTALE: the kernel looks up

So it does not matter when a notification comes, and a late one does no harm. An entry may live long, because the kernel
is always told to forget the name after the last change: it holds the directory's lock from before it sends a LOOKUP
until it has used the answer, and takes the same lock to forget a name. An answer that was decided before a change is
therefore forgotten after it. The kernel only *renews* entries without that lock; but then the entry leads to a node,
and the entry of a node that loses its name is taken away (NOTIFY_INVAL_ENTRY without "expire only"), renewed or not.

Locks, outermost first; none is held while the engine is asked for more than `resolve`, except `gate`:
    Node.gate   opening and releasing: which io mode the inode is in; held while the engine hears of it
    Tree.lock   names, lookup counts; held while names are moved (`move`)
    Node.lock   the node's descriptor, so that it is not closed under a reader
The engine's notifications take only Tree.lock, so an engine thread never waits for one of its own hooks.
"""

from __future__ import annotations

import enum
import os
import stat
import threading
import time
from collections.abc import Callable
from typing import TypeAlias

from pylitefs.formats.fuse import abi
from pylitefs.ports import VIRTUAL_KINDS, FileRef

FileId: TypeAlias = tuple[int, int]
"""Device and inode number of a file on the disk."""


def id_of(found: os.stat_result) -> FileId:
    return found.st_dev, found.st_ino


class IoMode(enum.Enum):
    """How the kernel does reads and writes of an inode. The modes exclude each other while any handle is open."""

    IDLE = "idle"  # no handle is open
    CACHED = "cached"  # through the kernel's page cache and us
    PASSTHROUGH = "passthrough"  # straight to the backing file


class Node:
    """A file as the kernel knows it. `name` is None once the name is gone; `fd` is -1 while no handle is open.
    `file_id` tells which file of the disk it is, None for a virtual one."""

    __slots__ = (
        "app_handles", "backing_id", "drop_cache", "fd", "file_id", "gate", "handle_count", "hooked", "ino", "lock",
        "lookups", "mode", "moved", "name", "ref", "spare_fds", "stale", "virtual", "writable",
    )  # fmt: skip

    def __init__(self, ino: int, name: str, ref: FileRef, file_id: FileId | None) -> None:
        self.ino = ino
        self.file_id = file_id
        self.name: str | None = name
        self.ref = ref
        self.stale = False  # `ref` has to be resolved again (`Tree.ref`)
        self.virtual = ref.kind in VIRTUAL_KINDS
        self.lookups = 0
        self.gate = threading.Lock()
        self.lock = threading.Lock()
        self.mode = IoMode.IDLE
        self.handle_count = 0
        self.app_handles = 0  # of these, those that are not the daemon's own
        self.moved = False  # its file has another name and another node now: who opens this one, looks up the name
        self.fd = -1
        self.writable = False  # whether `fd` is
        self.spare_fds: list[int] = []  # descriptors that were replaced by a writable one, still in use
        self.backing_id = 0
        self.hooked = False
        self.drop_cache = False  # pages cached before the last passthrough open must not be kept

    def fstat(self) -> os.stat_result | None:
        """State of the open file; None if no handle is open."""
        with self.lock:
            return os.fstat(self.fd) if self.fd >= 0 else None


class RootStat:
    """The root directory, as os.stat would show it. Anyone may make files in it, on any node."""

    st_mode = 0o40777
    st_size = 0
    st_blocks = 0
    st_blksize = 4096

    def __init__(self, uid: int, gid: int) -> None:
        self.st_uid = uid
        self.st_gid = gid
        self.st_atime_ns = self.st_mtime_ns = self.st_ctime_ns = time.time_ns()

    def touch(self) -> None:
        self.st_mtime_ns = self.st_ctime_ns = time.time_ns()


class Tree:
    """All nodes but the root, by number and by name. `resolve` is the engine's; it takes no lock."""

    def __init__(self, resolve: Callable[[str], FileRef]) -> None:
        self._resolve = resolve
        self.lock = threading.Lock()
        self.nodes: dict[int, Node] = {}
        self.names: dict[str, Node] = {}
        self._next_ino = abi.ROOT_ID + 1

    def find(self, name: str) -> tuple[Node, os.stat_result] | None:
        """LOOKUP of a file on the disk: its node, made if need be, which counts as one lookup by the kernel, and its
        state; None if no file has this name. Raises OSError."""
        with self.lock:
            ref, found = self._look(name)
            if found is None:
                return None
            return self._known(name, ref, id_of(found)), found

    def created(self, ref: FileRef, found: os.stat_result) -> Node:
        """A new file was made under its name: its node. Counts as one lookup."""
        with self.lock:
            self._remove(ref.name)  # of a file that was removed behind our back: its number may be the new one's
            return self._known(ref.name, ref, id_of(found))

    def find_virtual(self, ref: FileRef) -> Node:
        """LOOKUP of a virtual file."""
        with self.lock:
            return self._known(ref.name, ref, None)

    def _look(self, name: str) -> tuple[FileRef, os.stat_result | None]:
        """What a name stands for, and the state of its file; None if there is none.

        The engine gives a file its new place before it says so, and takes it from its old place afterwards. So where
        nothing is found the question is asked again until the answer stays the same."""
        ref = self._resolve(name)
        while True:
            if ref.path is None:
                return ref, None
            try:
                found = os.lstat(ref.path)
                return ref, found if stat.S_ISREG(found.st_mode) else None
            except FileNotFoundError:
                again = self._resolve(name)
                if again.path == ref.path:
                    return ref, None
                ref = again

    def _known(self, name: str, ref: FileRef, file_id: FileId | None) -> Node:
        node = self.names.get(name)
        if node is None or node.file_id != file_id:
            self._remove(name)
            node = Node(self._next_ino, name, ref, file_id)
            self._next_ino += 1
            self.nodes[node.ino] = self.names[name] = node
        else:
            node.ref = ref
            node.stale = False
        node.lookups += 1
        return node

    def forget(self, ino: int, lookups: int) -> None:
        with self.lock:
            node = self.nodes.get(ino)
            if node is None:
                return
            node.lookups -= lookups
            if node.lookups <= 0:
                del self.nodes[ino]
                if node.name is not None and self.names.get(node.name) is node:
                    del self.names[node.name]

    def remove(self, name: str) -> Node | None:
        """Take the name from its node, which stays while the kernel knows it. The node, if there was one."""
        with self.lock:
            return self._remove(name)

    def _remove(self, name: str) -> Node | None:
        node = self.names.pop(name, None)
        if node is not None:
            node.name = None
        return node

    def move(self, old: str, new: str, do: Callable[[], None], *, anew: bool = False) -> None:
        """Rename the file `old` to `new` by `do`, which moves it on the disk (and nothing else: it is called under the
        lock, so that nobody finds the file under its new name before it has its node there). Raises what `do` raises;
        no name has changed then.

        `anew`: no application has it open, and it gets another node. Until the rename is answered the kernel goes on to
        find the node by the old name; who opens it so, must learn that the name has gone."""
        with self.lock:
            do()
            self._remove(new)
            if anew:
                if (node := self._remove(old)) is not None:
                    node.moved = True
                return
            node = self.names.pop(old, None)
            if node is not None:
                node.name = new
                node.stale = True
                self.names[new] = node

    def is_open(self, name: str) -> bool:
        """Whether an application has the file of this name open."""
        node = self.names.get(name)
        return node is not None and node.app_handles > 0

    def refresh(self, node: Node) -> FileRef:
        """What the node stands for now; of a node without a name, what it stood for last."""
        node.stale = False
        name = node.name
        if name is not None:
            node.ref = self._resolve(name)
        return node.ref

    def look_again(self, name: str) -> tuple[Node | None, bool]:
        """The engine has changed what `name` leads to. The node that had the name, and whether it still has."""
        with self.lock:
            node = self.names.get(name)
            if node is None:
                return None, False
            try:
                _, found = self._look(name)
                stays = node.virtual or (found is not None and id_of(found) == node.file_id)
            except OSError:
                stays = False  # the kernel asks again, and gets the error
            if stays:
                node.stale = True
            else:
                self._remove(name)
            return node, stays
