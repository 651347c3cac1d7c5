"""A database that was dropped leaves a log with its position, and a folder. When the log is as old as the retention
keeps anything, only a tombstone stays.

    step                                   a crash after it leaves
    the tombstone is durable               the folder, whose log ends where the tombstone says: a dropped database as
                                           before; later it is done again
    the folder is moved to DATA/going      nothing but the tombstone, and what the next start removes. After a power cut
                                           perhaps the folder as before

The folder is moved, and the object taken out of the registry, under the registry's lock: who asks for the name then
gets a new one, which begins where the tombstone says. Whoever has the old object still cannot record anything with it
(`Database.is_forgotten`). What was moved is removed by a thread, because that takes the disk some milliseconds each.

Nothing is forgotten that somebody may be using, or that has anything of its own to keep (`_may_go`): a handle, a change
that is under way, a branch in lost/, a question that the start has left open, a connected replica that does not have
the drop durably.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable

from pylitefs.engine.database import Database
from pylitefs.engine.registry import Registry
from pylitefs.engine.tombstones import Tombstone
from pylitefs.formats.ltx.format import CHECKSUM_FLAG
from pylitefs.ports import SUFFIXES

log = logging.getLogger("litefs.store")

_AT_ONCE = 50  # databases; other jobs get their turn then
_USELESS = ("checksums", "database.new", "looked-at", "looked-at-wal")
_FOLDERS = ("ltx", "lost")


class Forgetting:
    """On the worker. `is_open`: whether the start has left a question about a name; `needs_drop`: whether a connected
    replica lacks what was recorded last, the drop."""

    def __init__(self, registry: Registry, is_open: Callable[[str], bool]) -> None:
        self._registry = registry
        self._is_open = is_open
        self.needs_drop: Callable[[str], bool] = lambda name: False
        self._removal = _Removal(os.path.join(registry.data_dir, "going"))
        self._seen_s: dict[str, float] = {}  # of those whose log has no entry to tell its age: since when

    def forget_old(self) -> None:
        """Raises OSError; it is tried again the next time, as what is in use."""
        age_s = self._registry.options.retention_s
        candidates = [database for database in list(self._registry.databases.values()) if not database.exists]
        names = {database.name for database in candidates}
        self._seen_s = {name: since_s for name, since_s in self._seen_s.items() if name in names}
        self._forget([database for database in candidates if 0 < age_s <= self._age_s(database)])

    def start(self) -> None:
        """Remove what the last run could not."""
        self._removal.begin()

    def stop(self) -> None:
        self._removal.stop()

    def _age_s(self, database: Database) -> float:
        entries = database.log.entries()
        if entries:
            return time.time() - entries[-1].mtime_s
        now_s = time.monotonic()
        return now_s - self._seen_s.setdefault(database.name, now_s)

    def _forget(self, databases: list[Database]) -> None:
        some = [database for database in databases[:_AT_ONCE] if self._may_go(database)]
        self._registry.put_tombstones({database.name: _tombstone(database) for database in some})
        self._registry.keep_tombstones()  # also those that were noted otherwise
        for database in some:
            with contextlib.suppress(OSError):
                self._forget_one(database)
        if rest := databases[_AT_ONCE:]:
            self._registry.worker.post(self._forget, rest)
        elif databases:
            self._removal.begin()

    def _forget_one(self, database: Database) -> None:
        registry, name = self._registry, database.name
        with registry.lock, contextlib.ExitStack() as locks:
            for lock in (database.wal.mutex, database.lock):
                if not lock.acquire(blocking=False):  # it is in use
                    return
                locks.callback(lock.release)
            tombstone = registry.tombstone(name)
            if (
                registry.databases.get(name) is not database
                or tombstone is None
                or not tombstone.position.is_at(database.position)
                or not self._may_go(database)
            ):
                return
            self._removal.take(database.files.folder)
            del registry.databases[name]
            database.is_forgotten = True
            registry.capture.forget(database)
            database.close(clean=False)
        self._seen_s.pop(name, None)

    def _may_go(self, database: Database) -> bool:
        end, log_ = database.position, database.log
        return (
            not database.exists
            and end.txid > 0
            and end.checksum == CHECKSUM_FLAG
            and end.is_at(log_.head)
            and log_.shared() == log_.head
            and not log_.is_pinned
            and not self._is_used(database)
            and not self._is_open(database.name)
            and not self.needs_drop(database.name)
            and _has_nothing(database)
        )

    def _is_used(self, database: Database) -> bool:
        registry, notifier = self._registry, self._registry.notifier
        return bool(
            database.set_aside_reason is not None
            or database.is_busy
            or database.failing is not None
            or database.loan is not None
            or database.replica is not None
            or database.locked_out
            or database.lock_fd != -1
            or database.writers
            or database.raw_writers
            or database.rollback.pending
            or not registry.apply.is_unused(database)
            or registry.open_files.has_old_users(database)
            or registry.apply.is_made_active(database)
            or registry.capture.is_settling(database)
            or database.opening
            or (notifier is not None and any(notifier.is_open(database.name + suffix) for suffix in ("", *SUFFIXES)))
        )


def _tombstone(database: Database) -> Tombstone:
    return Tombstone(database.position, database.log.epochs(), database.moves)


def _has_nothing(database: Database) -> bool:
    """Whether the folder holds nothing that must stay. A database file, or a note of what a crash cut off, must."""
    files = database.files
    return {*_USELESS, *_FOLDERS}.issuperset(_listed(files.folder)) and not _listed(files.lost)


def _listed(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except FileNotFoundError:
        return []


class _Removal:
    """Of folders that nobody needs any more, in a thread."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()

    def take(self, path: str) -> None:
        """Raises OSError, and nothing has happened then."""
        os.makedirs(self._folder, exist_ok=True)
        os.rename(path, os.path.join(self._folder, secrets.token_hex(8)))

    def begin(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="remove", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while (items := _listed(self._folder)) and not self._stopping.is_set():
            for item in items:
                if self._stopping.is_set():
                    return
                shutil.rmtree(os.path.join(self._folder, item), ignore_errors=True)
            if _listed(self._folder) == items:
                log.warning("%s cannot be emptied", self._folder)
                return

    def stop(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
