"""Files of the mount that are no databases (yet): who may take one over, and where one goes that is in the way."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import threading
from collections.abc import Iterator

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
