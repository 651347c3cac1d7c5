"""Names and nodes of the mount: one flat directory.

A node is what the kernel knows by a number: it lives from the first LOOKUP until the kernel forgets it, with or
without a name (an unlinked file keeps its node as long as it is open). Numbers are never used twice.

Locks, outermost first; none is held while the engine is asked, except `gate`:
    Node.gate   opening and releasing: which io mode the inode is in; held while the engine hears of it
    Tree.lock   names, lookup counts
    Node.lock   the node's descriptor, so that it is not closed under a reader
The engine's notifications take only Tree.lock, so an engine thread never waits for one of its own hooks.
"""

from __future__ import annotations

import enum
import os
import threading
import time
from collections.abc import Callable

from pylitefs.formats.fuse import abi
from pylitefs.ports import VIRTUAL_KINDS, FileRef


class IoMode(enum.Enum):
    """How the kernel does reads and writes of an inode. The modes exclude each other while any handle is open."""

    IDLE = "idle"  # no handle is open
    CACHED = "cached"  # through the kernel's page cache and us
    PASSTHROUGH = "passthrough"  # straight to the backing file


class Node:
    """A file as the kernel knows it. `name` is None once the name is gone; `fd` is -1 while no handle is open."""

    __slots__ = (
        "backing_id", "drop_cache", "fd", "gate", "handle_count", "hooked", "ino", "lock", "lookups", "mode", "name",
        "ref", "spare_fds", "stale", "virtual", "writable",
    )  # fmt: skip

    def __init__(self, ino: int, name: str, ref: FileRef) -> None:
        self.ino = ino
        self.name: str | None = name
        self.ref = ref
        self.stale = False  # `ref` has to be resolved again (`Tree.ref`)
        self.virtual = ref.kind in VIRTUAL_KINDS
        self.lookups = 0
        self.gate = threading.Lock()
        self.lock = threading.Lock()
        self.mode = IoMode.IDLE
        self.handle_count = 0
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
    """All nodes but the root, by number and by name. `changes` counts what the engine did to names."""

    def __init__(self, resolve: Callable[[str], FileRef]) -> None:
        self._resolve = resolve
        self.lock = threading.Lock()
        self.nodes: dict[int, Node] = {}
        self.names: dict[str, Node] = {}
        self.changes = 0
        self._next_ino = abi.ROOT_ID + 1

    def look_up(self, name: str, ref: FileRef) -> Node:
        """The node of a name that exists, made if need be; counts as one lookup by the kernel."""
        with self.lock:
            node = self.names.get(name)
            if node is None:
                node = Node(self._next_ino, name, ref)
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

    def rename(self, old: str, new: str, new_ref: FileRef) -> None:
        """`old` is `new` now; the node that was `new` before has no name any more."""
        with self.lock:
            self._remove(new)
            node = self.names.pop(old, None)
            if node is not None:
                node.name = new
                node.ref = new_ref
                node.stale = False
                self.names[new] = node

    def unresolve(self, name: str) -> Node | None:
        """The backing file of `name` has moved. The node, if there is one."""
        with self.lock:
            self.changes += 1
            node = self.names.get(name)
            if node is not None:
                node.stale = True
            return node

    def refresh(self, node: Node) -> FileRef:
        """What the node stands for now; of a node without a name, what it stood for last."""
        node.stale = False
        name = node.name
        if name is not None:
            node.ref = self._resolve(name)
        return node.ref

    def vanish(self, name: str) -> Node | None:
        """The engine removed `name`. The node it had."""
        with self.lock:
            self.changes += 1
            return self._remove(name)
