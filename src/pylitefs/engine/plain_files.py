"""Files of the mount that are no databases (yet): who may take one over, and where one goes that is in the way."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator

from pylitefs.engine.page_checksums import stamp
from pylitefs.formats.names import MAX_FILE_NAME, shown

log = logging.getLogger("litefs.store")


class BeingTakenOver(OSError):
    """EBUSY: a plain file is being taken over as a database at this moment."""


class OneAtATime:
    """A plain file is taken over as a database, or moved, by one thread at a time: else it would be the file of two
    databases, or one would be dropped for a file that is not there any more. Any thread."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._given_back = threading.Condition()

    @contextlib.contextmanager
    def alone_with(self, *names: str, waits: bool = True) -> Iterator[None]:
        """BeingTakenOver if somebody else has one of them now, and is not waited for."""
        with self._given_back:
            if not waits and not self._taken.isdisjoint(names):
                raise BeingTakenOver(errno.EBUSY, "it is just being taken over as a database")
            self._given_back.wait_for(lambda: self._taken.isdisjoint(names))
            self._taken.update(names)
        try:
            yield
        finally:
            with self._given_back:
                self._taken.difference_update(names)
                self._given_back.notify_all()

    def wait(self, *names: str) -> None:
        """Until nobody has any of them. Blocking, not on the worker."""
        with self.alone_with(*names):
            pass


class PlainWrites:
    """What is written to plain files: by which handle last, and how many writes have begun, and ended. Who takes a file
    over as a database asks before and after: a write in between may be in what was read, or not. Any thread."""

    def __init__(self) -> None:
        self._counts: dict[str, tuple[int, int]] = {}
        self._writers: dict[str, int] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def one(self, name: str, handle: int) -> Iterator[None]:
        self._count(name, 1, 0)
        self._writers[name] = handle
        try:
            yield
        finally:
            self._count(name, 0, 1)

    def _count(self, name: str, begun: int, ended: int) -> None:
        with self._lock:
            counts = self._counts.get(name, (0, 0))
            self._counts[name] = counts[0] + begun, counts[1] + ended

    def watch(self, name: str, path: str) -> Callable[[], bool]:
        """What tells whether nobody has written to it since this call, or was about to. A write that passes us by
        changes its time."""
        begun, ended = self._counts.get(name, (0, 0))
        time = stamp(path)
        return lambda: begun == ended and self._counts.get(name, (0, 0)) == (begun, ended) and stamp(path) == time

    def is_writer(self, name: str, handle: int) -> bool:
        """Whether the file was written through this handle last, as far as is known. Another one's fsync or close says
        nothing of what SQLite is about to write."""
        return self._writers.get(name, handle) == handle

    def forget(self, name: str) -> None:
        """Nobody has the file open, if no new one of that name is written to at this moment."""
        if name in self._counts:
            with self._lock:
                begun, ended = self._counts.get(name, (0, 0))
                if begun == ended:
                    self._counts.pop(name, None)
                    self._writers.pop(name, None)


def remove_plain(path: str, of: str | None = None) -> None:
    """`of`: only if it is that file by another name. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        if of is None or os.path.samefile(path, of):
            os.unlink(path)


def keep_plain(folder: str, name: str) -> str | None:
    """Take the plain file of this name out of the way: an empty one goes, another one gets a name of its own, which is
    returned. Raises OSError."""
    plain = os.path.join(folder, name)
    try:
        if not os.stat(plain).st_size:
            os.unlink(plain)
            return None
        for number in itertools.count(1):
            ending = f".local-{number}"
            kept = os.fsdecode(os.fsencode(name)[: MAX_FILE_NAME - len(ending)]) + ending
            if not os.path.lexists(os.path.join(folder, kept)):
                break
        os.rename(plain, os.path.join(folder, kept))
    except FileNotFoundError:
        return None
    log.warning("%s: a file of this name was here already: it is %s now", shown(name), shown(kept))
    return kept
