"""Databases come and go by what happens to their names: copied in, renamed, removed.

A file is born plain. It becomes a database when it turns out to hold one at a commit point, when the handle it was
copied through is closed, or when it is renamed: content decides, not the name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator

from pylitefs.engine.database import Database
from pylitefs.engine.files import SUFFIX_OF, new_folder, sync_folder
from pylitefs.engine.lost import write_info
from pylitefs.engine.registry import DEFAULT_PAGE_SIZE, Registry
from pylitefs.engine.rollback_capture import is_complete_database
from pylitefs.engine.transaction import Change
from pylitefs.events import Event
from pylitefs.ports import SIDE_KINDS, SUFFIXES, VIRTUAL_SUFFIXES, FileKind, FileRef


@contextlib.contextmanager
def _still(*databases: Database) -> Iterator[None]:
    """Nobody looks at their files, takes from their WALs or moves their positions meanwhile."""
    with contextlib.ExitStack() as stack:
        for database in databases:
            stack.enter_context(database.wal.mutex)
        for database in databases:
            stack.enter_context(database.lock)
        yield


class Naming:
    """Imports, renames and drops. On the worker, unless a method says otherwise."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def import_plain(self, name: str, *, leave_journal: bool = False) -> bool:
        """A plain file of this name is a whole database: take it over as one. Any thread. False if it is not one."""
        with self._registry.lock:
            if not self._registry.is_plain_database(name):
                return False
            database = self._registry.get_or_create(name)
        try:
            with self._registry.lock:
                self._move_to_database(name, leave_journal=leave_journal)
            with _still(database):
                if not database.captures:
                    raise OSError(errno.EROFS, os.strerror(errno.EROFS))
                database.wal.begin_here()
                database.rollback.suspect = True
                self._registry.capture.commit_point(database, "import")
        except OSError:  # no room for the log, no descriptors: it stays plain, and its next commit tries again
            with self._registry.lock:
                if not database.exists:
                    database.rollback.clear()
                    self._move_back(name)
            raise
        self._registry.worker.post(self._registry.capture.wake, database, database=name)  # it may have a WAL
        self._tell_renamed(name)
        return True

    def _tell_renamed(self, name: str) -> None:
        if self._registry.notifier is not None:
            for suffix in SUFFIX_OF.values():
                self._registry.notifier.renamed_backing(name + suffix)
            for suffix in VIRTUAL_SUFFIXES:
                self._registry.notifier.invalidate_entry(name + suffix)

    def _move_to_database(self, name: str, *, leave_journal: bool = False) -> None:
        folder = os.path.join(self._registry.databases_dir, name)
        os.makedirs(os.path.join(folder, "ltx"), exist_ok=True)
        for kind, suffix in SUFFIX_OF.items():
            if kind is FileKind.JOURNAL and leave_journal:
                continue
            with contextlib.suppress(FileNotFoundError):
                os.rename(self._registry.plain_path(name + suffix), os.path.join(folder, kind.value))
        self._registry.set_owner(os.path.join(folder, "database"))
        sync_folder(folder)

    def _move_back(self, name: str) -> None:
        folder = os.path.join(self._registry.databases_dir, name)
        for kind, suffix in SUFFIX_OF.items():
            with contextlib.suppress(FileNotFoundError):
                os.rename(os.path.join(folder, kind.value), self._registry.plain_path(name + suffix))

    def finish_promotions(self) -> None:
        """Plain files that are databases: their import was cut off by a crash. Side files go with their database."""
        for name in sorted(os.listdir(self._registry.plain_dir)):
            if (
                (self._registry.options.is_primary or self._registry.marker.names is None)
                and is_complete_database(self._registry.plain_path(name))
                and self._registry.is_name(name)
            ):
                self._move_to_database(name)
        for name in os.listdir(self._registry.plain_dir):
            for suffix, kind in SUFFIXES.items():
                base = name[: -len(suffix)]
                folder = os.path.join(self._registry.databases_dir, base)
                if (
                    kind in SIDE_KINDS
                    and name.endswith(suffix)
                    and base
                    and os.path.isfile(os.path.join(folder, "database"))
                ):
                    os.rename(self._registry.plain_path(name), os.path.join(folder, kind.value))

    def drop(self, database: Database) -> None:
        """The database was removed: note it in the log, remove its files. On the worker, flushed before."""
        with _still(database):
            if not database.exists:
                return
            self.record_drop(database)
            self._clear_live(database)
        database.emit("drop", txid=database.position.txid)

    def record_drop(self, database: Database) -> None:
        """Durable before any file goes: a power cut must not leave a log that knows nothing of it."""
        change = Change(database.page_size or DEFAULT_PAGE_SIZE, 0)
        try:
            database.record(change, [], lambda pgno: b"", lambda: True, "drop")
        except OSError:
            database.log.retain(0.0, 1)  # a full disk: removing a database must be possible all the same
            database.record(change, [], lambda pgno: b"", lambda: True, "drop")
        database.sync_log()

    def _clear_live(self, database: Database) -> None:
        self._registry.capture.forget(database)
        database.remove_live_files()
        self._registry.capture.replaced(database)
        database.rollback.clear()
        sync_folder(database.files.folder)
        if self._registry.notifier is not None:
            for suffix in ("", "-wal", "-shm", "-journal"):
                self._registry.notifier.forget_file(database.name + suffix)
            for suffix in VIRTUAL_SUFFIXES:
                self._registry.notifier.invalidate_entry(database.name + suffix)

    def rename(self, old: FileRef, new: FileRef) -> None:
        """A rename in which a database takes part. On the worker."""
        target = self._registry.databases.get(new.name)
        if old.kind is FileKind.DATABASE:
            self._rename_database(self._registry.find(old.name), new.name)
            return
        if target is not None and target.exists:
            self._registry.capture.flush(target)
            if not self._registry.is_plain_database(old.name):
                self.drop(target)
                os.rename(self._registry.plain_path(old.name), self._registry.plain_path(new.name))
                return
            self._replace_content(target, self._registry.plain_path(old.name))
            return
        os.rename(self._registry.plain_path(old.name), self._registry.plain_path(new.name))
        self.import_plain(new.name)

    def _replace_content(self, database: Database, path: str) -> None:
        """Another database file takes the place of this one; what was committed in its WAL is in the log already."""
        with _still(database):
            for kind in (FileKind.SHM, FileKind.WAL, FileKind.JOURNAL):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(database.files.backing(kind))
                if self._registry.notifier is not None:
                    self._registry.notifier.forget_file(database.name + SUFFIX_OF[kind])
            os.rename(path, database.files.database)
            self._registry.set_owner(database.files.database)
            self._registry.capture.replaced(database)
            database.rollback.suspect = True
            self._registry.capture.commit_point(database, "import")

    def _rename_database(self, source: Database, name: str) -> None:
        self._registry.capture.flush(source)
        target = self._registry.get_or_create(name)
        if target.exists:
            self._registry.capture.flush(target)
        with _still(source, target):
            self.record_drop(source)
            target.remove_live_files()
            for kind in SUFFIX_OF:
                with contextlib.suppress(FileNotFoundError):
                    os.rename(source.files.backing(kind), target.files.backing(kind))
            self._registry.capture.replaced(source)
            self._registry.capture.replaced(target)
            source.rollback.clear()
            target.rollback.suspect = True
            self._registry.capture.commit_point(target, "import")
        self._registry.capture.flush(target)  # what its WAL has on top of the file
        self._tell_renamed(source.name)
        self._tell_renamed(name)
        source.emit("drop", txid=source.position.txid)

    def set_aside(self, name: str, reason: str) -> None:
        """Keep a database that the primary does not know out of the way: its files go to lost/. On the worker."""
        with self._registry.lock:
            database = self._registry.databases.get(name)
            if database is None:
                return
            folder, head = new_folder(database.files.lost), database.log.head
            write_info(folder, name, None, head, head.txid, reason)
            self._registry.apply.let_go(database)
            database.close(clean=False)
            for item in ("database", "wal", "journal", "ltx"):
                with contextlib.suppress(FileNotFoundError):
                    shutil.move(os.path.join(database.files.folder, item), os.path.join(folder, item))
            del self._registry.databases[name]
            if self._registry.notifier is not None:
                for suffix in ("", "-wal", "-shm", "-journal"):
                    self._registry.notifier.forget_file(name + suffix)
        lost = {"transactions": head.txid, "max_txid": head.txid, "epoch": head.epoch, "to": str(head)}
        self._registry.events.emit(Event("lost", name, {"reason": reason, "folder": folder, **lost}))
