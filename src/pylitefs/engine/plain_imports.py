"""Plain files that hold a database are taken over as one, while nobody is in the middle of writing them.

What somebody writes while a file is read and changes hands would belong to no transaction, and the journal that he
makes would stay among the plain files. A commit of SQLite that makes a database of its file keeps others out itself.
So does who waits in an fsync of it, if that is SQLite (in the journal modes MEMORY and OFF).
At any other moment (a close, a look some time after a write) SQLite's own locks are taken, for as long as it takes:
RESERVED, with which nobody else begins a transaction and readers are not disturbed; where the file is in WAL mode
EXCLUSIVE, for who has that open may write without another lock on it. Who writes without SQLite's locks is told by the
count of his writes (`PlainWrites`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading

from pylitefs.engine import ofd_locks
from pylitefs.engine.database import Database
from pylitefs.engine.files import is_file
from pylitefs.engine.naming import Naming
from pylitefs.engine.plain_files import OneAtATime
from pylitefs.engine.registry import Registry
from pylitefs.engine.rollback_capture import journal_in_use
from pylitefs.errors import FormatError
from pylitefs.formats.names import shown
from pylitefs.formats.sqlite.header import HEADER_SIZE, DatabaseHeader
from pylitefs.formats.sqlite.locks import PENDING, RESERVED, SHARED_FIRST, SHARED_SIZE

log = logging.getLogger("litefs.store")

_RETRY_S = 10.0
_SETTLE_S = 0.2
_HIDDEN_SETTLE_S = 0.4  # rsync and others write `.NAME.XXXXXX` first, and rename it when it is whole
_LONGEST_SETTLE_S = 0.5  # between two looks at a file in use
_TELL_TRIES = 60


_LOCKED = "a process has it locked: close it there"
_JOURNAL = "a process died in a transaction and has left its journal: open it once with SQLite, which takes that back"
_WRITTEN = "a process goes on writing to it without SQLite's locks: let it finish"


class PlainImports:
    """What is done to plain files until they are databases."""

    def __init__(self, registry: Registry, naming: Naming) -> None:
        self._registry, self._naming = registry, naming
        self._waiting: set[str] = set()  # for a look that is planned; worker
        self._one = OneAtATime()  # with SQLite's locks, so that these keep out no thread of ours

    def at_rest(self, name: str) -> bool:
        """`Naming.import_plain`, with writers kept out. False also where somebody is in the middle of writing it: its
        commit, or the next look, takes it over. In a thread of its own, because it opens a file of the mount, and not
        while that is fsynced: the kernel holds the file's lock then. Raises OSError."""
        return not self._take(name)

    def _take(self, name: str) -> str:
        """"", or why it cannot be taken over now, and what to do about it."""
        with self._one.alone_with(name):  # the other's lock is no writer's: it is a database when that is given up
            return self._take_alone(name)

    def _take_alone(self, name: str) -> str:
        registry = self._registry
        if registry.mount_dir is None:
            return "" if self._naming.import_plain(name) else _WRITTEN
        try:
            fd, writable = _open(os.path.join(registry.mount_dir, name))
        except OSError as error:  # it has gone, or has just become another file: no fault of who closes it
            return f"it cannot be opened: {error.strerror or error}"
        try:
            if not _keep_out_writers(fd, writable=writable):
                return _LOCKED
            if journal_in_use(registry.plain_path(name + "-journal")):
                return _JOURNAL
            return "" if self._naming.import_plain(name) else _WRITTEN
        finally:
            os.close(fd)

    def write(self, name: str, fd: int, data: memoryview, offset: int, handle: int) -> int:
        """Write to a plain file. It may become a database meanwhile: by somebody who was told of this write, unless it
        came too late for him, and then it is noted here. FUSE threads. Raises OSError."""
        with self._registry.plain_writes.one(name, handle):
            written = os.pwrite(fd, data, offset)
        taken = self._registry.get(name)
        if taken is not None and taken.exists and taken.captures and is_file(fd, taken.files.database):
            with taken.lock:
                self._registry.capture.note_write(taken)
                taken.rollback.note(offset, written, handle)
        return written

    def take_journal(self, database: Database) -> None:
        """An import has left the journal among the plain files, because it was about to go, and now it stays. Any
        thread."""
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._registry.plain_path(database.name + "-journal"), database.files.journal)
        if self._registry.notifier is not None:
            self._registry.notifier.changed(database.name + "-journal")

    def wake(self, name: str, tries: int = 0) -> None:
        """A plain file that holds a database was written to, and no journal tells of its commits: look in a while. On
        the worker."""
        if name not in self._waiting:
            self._waiting.add(name)
            delay_s = _HIDDEN_SETTLE_S if name.startswith(".") else _SETTLE_S
            self._registry.worker.call_later(min(delay_s * (tries + 1), _LONGEST_SETTLE_S), self._look, name, tries)

    def _look(self, name: str, tries: int) -> None:
        self._waiting.discard(name)
        registry = self._registry
        if registry.mount_dir is not None and registry.is_primary and registry.is_plain_database(name):
            threading.Thread(target=self._try, args=(name, tries), name="import", daemon=True).start()

    def _try(self, name: str, tries: int) -> None:
        worker = self._registry.worker
        try:
            if not (why := self._take(name)):
                return
        except Exception as error:
            log.warning("%s: it cannot be taken over yet: %s", shown(name), error)
            worker.post(worker.call_later, _RETRY_S, self.wake, name)
            return
        if tries % _TELL_TRIES == _TELL_TRIES - 1 and self._registry.is_plain_database(name):
            log.warning("%s: it is not replicated yet: %s", shown(name), why)
        worker.post(self.wake, name, tries + 1)  # who lets go of a lock tells nobody


def _open(path: str) -> tuple[int, bool]:
    """A descriptor, and whether it may be locked exclusively: a daemon that is not root may not write every file."""
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, os.O_RDWR | flags), True
    except PermissionError:
        return os.open(path, os.O_RDONLY | flags), False


def _keep_out_writers(fd: int, *, writable: bool) -> bool:
    """Until the descriptor is closed. False if somebody writes, or may begin to without being seen."""
    if not ofd_locks.try_lock(fd, RESERVED, exclusive=writable):
        return False
    try:
        is_wal = DatabaseHeader.unpack(os.pread(fd, HEADER_SIZE, 0)).is_wal
    except FormatError:
        return False
    if not is_wal:
        return True
    if not writable:
        return not ofd_locks.any_locked(fd, PENDING, SHARED_SIZE + 2)
    return ofd_locks.try_lock(fd, PENDING, exclusive=True) and ofd_locks.try_lock(
        fd, SHARED_FIRST, SHARED_SIZE, exclusive=True
    )
