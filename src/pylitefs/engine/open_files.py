"""Which files of databases applications have open: by open file, because a file may get another name meanwhile.

What is counted at an open is taken back at the release of the same open file, from the database whose file it is then:
a plain file that becomes a database brings its users along (`became`), a rename takes them to the new name (`moved`),
and those of a file that has lost its name belong to no database any more (`left`).
"""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pylitefs.engine.database import Database


@dataclass(slots=True, eq=False)
class OpenFile:
    """`database`: None if the file is no database's; `name` is what the plain file is called then, "" if it has none.
    `raw`: its writes pass us by. `thread`: which has opened it, 0 if that cannot be seen. `left`: whose file it was
    when it lost its name."""

    database: Database | None
    name: str
    writable: bool
    raw: bool
    thread: int
    left: Database | None = None


class OpenFiles:
    """Of all databases, the daemon's own ones left out. The counts of a database, and its `users`, are guarded by its
    `handles_lock`; which file is nobody's by `_lock`, which is taken after that. Any thread."""

    def __init__(self) -> None:
        self._by_handle: dict[int, OpenFile] = {}
        self._lock = threading.Lock()

    def opened(
        self, handle: int, name: str, database: Database | None, thread: int, *, writable: bool, raw: bool
    ) -> None:
        """A database file, or a plain file (`database` is None). `thread`: the id of the calling thread; 0: it cannot
        be seen."""
        opened = OpenFile(database, name, writable, writable and raw, thread)
        if database is None:
            with self._lock:
                self._by_handle[handle] = opened
            return
        with database.handles_lock, self._lock:
            self._by_handle[handle] = database.users[handle] = opened
            _count(database, opened, 1)

    def process_of(self, handle: int) -> int:
        """Of an open file; 0: it cannot be told, or who has opened it is gone. It is asked for here, because that would
        be a tenth of the cost of an open."""
        return 0 if (opened := self._by_handle.get(handle)) is None else process_of_thread(opened.thread)

    def released(self, handle: int) -> OpenFile | None:
        """The open file that was released, with the database it is of now; None if it was not counted."""
        while (opened := self._by_handle.get(handle)) is not None:
            database = opened.database
            with contextlib.ExitStack() as stack:
                if database is not None:
                    stack.enter_context(database.handles_lock)
                stack.enter_context(self._lock)
                if opened.database is database:
                    del self._by_handle[handle]
                    if database is not None:
                        del database.users[handle]
                        _count(database, opened, -1)
                    return opened
        return None

    def became(self, database: Database, old_name: str | None = None) -> None:
        """The plain file of this name, or that which had the old one until now, is the database's file."""
        if old_name is not None:
            self.renamed(old_name, database.name)
        with database.handles_lock, self._lock:
            for handle, opened in self._by_handle.items():
                if opened.database is None and opened.name == database.name:
                    opened.database = database
                    database.users[handle] = opened
                    _count(database, opened, 1)

    def renamed(self, old: str, new: str) -> None:
        """A plain file."""
        with self._lock:
            for opened in self._by_handle.values():
                if opened.database is None and opened.name in (old, new):
                    opened.name = new if opened.name == old else ""

    def moved(self, source: Database | None, target: Database) -> None:
        """The file of `source` (None: a plain one, see `became`) is that of `target` from now on, whose own is
        nobody's. Both `handles_lock`s are held."""
        with self._lock:
            _let_go(target)
            for handle, opened in (source.users if source is not None else {}).items():
                assert source is not None
                opened.database, opened.name = target, target.name
                target.users[handle] = opened
                _count(target, opened, 1)
                _count(source, opened, -1)
            if source is not None:
                source.users.clear()

    def has_old_users(self, database: Database) -> bool:
        """Whether anybody has a file open that was the database's once, and has no name any more."""
        with self._lock:
            return any(opened.left is database for opened in self._by_handle.values())

    def left(self, database: Database, *, plain: bool = False) -> None:
        """Its file has no name any more, or is a plain one: who has it open is no user of the database."""
        with database.handles_lock, self._lock:
            _let_go(database, database.name if plain else "")


def _let_go(database: Database, name: str = "") -> None:
    for opened in database.users.values():
        opened.database, opened.name, opened.left = None, name, database
        _count(database, opened, -1)
    database.users.clear()


def _count(database: Database, opened: OpenFile, by: int) -> None:
    database.app_handles += by
    database.writers += by * opened.writable
    database.raw_writers += by * opened.raw


def process_of_thread(thread: int) -> int:
    """The process of a thread; 0: it cannot be told."""
    if thread <= 0:
        return 0
    with contextlib.suppress(OSError, ValueError):
        if int(os.readlink("/proc/self")) != os.getpid():
            return 0  # this /proc has the numbers of another PID namespace
        with open(f"/proc/{thread}/status", "rb") as file:
            for line in file:
                if line.startswith(b"Tgid:"):
                    return int(line[5:])
    return 0
