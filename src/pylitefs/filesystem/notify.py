"""Telling the kernel what to forget: the implementation of `ports.Notifier`.

The kernel may make a notification wait until a request of ours is answered (an entry's parent is locked while UNLINK
or CREATE runs), so one sent from a handler would wait for itself. Hence a queue and a thread of its own. A message
that is still waiting in the queue is not queued again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Protocol

from pylitefs.filesystem.tree import Tree
from pylitefs.formats.fuse import abi, replies


class NotifyTarget(Protocol):
    def notify(self, message: bytes) -> bool: ...


class KernelNotifier:
    """One per mount. `start` it once the mount is there, `stop` it when the mount is gone."""

    def __init__(self, tree: Tree, device: NotifyTarget, log: Callable[[str], None], *, expire_only: bool) -> None:
        self._tree = tree
        self._device = device
        self._log = log
        self._expire_only = expire_only
        self._queue: dict[bytes, None] = {}  # in the order of arrival
        self._changed = threading.Condition()
        self._queued = 0  # messages put in so far
        self._sent = 0  # of those, how many the kernel has heard or need not hear
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="fuse-notify", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        with self._changed:
            self._stopping = True
            self._queue.clear()
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def drain(self, timeout_s: float) -> bool:
        """Wait until the kernel has heard everything said so far; False if that takes longer than `timeout_s`.
        Never from a FUSE thread."""
        with self._changed:
            target = self._queued
            return self._changed.wait_for(lambda: self._stopping or self._sent >= target, timeout_s)

    def invalidate_file(self, name: str) -> None:
        node = self._tree.names.get(name)
        if node is not None:
            self._put(replies.notify_inval_inode(node.ino, 0, 0))

    def changed(self, name: str) -> None:
        """The listing comes last: the kernel takes the directory's lock to forget a name, so who reads the directory
        has come to an end by then, and what he has read is forgotten too.

        The entry of a name that has gone is taken away, for it may just be being renewed. NOTIFY_DELETE would hold the
        directory's lock and wait for that of whichever file has the name by then (fuse_reverse_inval_entry): the kernel
        holds this one during an fsync, which may wait for an open of the daemon, and that for the directory.
        """
        node, stays = self._tree.look_again(name)
        if node is not None:
            self._put(replies.notify_inval_inode(node.ino, -1, 0))
        expire_only = self._expire_only and (stays or node is None)
        self._put(replies.notify_inval_entry(abi.ROOT_ID, name, expire_only), self._listing())

    def forget_pages(self, inodes: Iterable[int]) -> None:
        """What is cached of the content of these files."""
        self._put(*(replies.notify_inval_inode(ino, 0, 0) for ino in inodes))

    def move(self, old: str, new: str, do: Callable[[], None], *, anew: bool = False) -> None:
        self._tree.move(old, new, do, anew=anew)

    def is_open(self, name: str) -> bool:
        return self._tree.is_open(name)

    @staticmethod
    def _listing() -> bytes:
        """The kernel keeps the root's listing until the root itself changes."""
        return replies.notify_inval_inode(abi.ROOT_ID, 0, 0)

    def _put(self, *messages: bytes) -> None:
        with self._changed:
            if self._stopping:
                return
            for message in messages:
                self._queue.pop(message, None)
                self._queue[message] = None
                self._queued += 1
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or bool(self._queue))
                if self._stopping:
                    return
                messages = list(self._queue)
                self._queue.clear()
                target = self._queued
            for message in messages:
                try:
                    self._device.notify(message)
                except OSError as error:
                    self._log(f"a notification to the kernel failed: {error.strerror}")
            with self._changed:
                self._sent = target
                self._changed.notify_all()
