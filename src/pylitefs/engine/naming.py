"""Databases come and go by what happens to their names: copied in, renamed, removed.

A file is born plain. It becomes a database when it turns out to hold one at a commit point, when the handle it was
copied through is closed, or when it is renamed: content decides, not the name.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator

from pylitefs.engine.aside import finish_aside, put_aside
from pylitefs.engine.database import Database
from pylitefs.engine.files import SUFFIX_OF, new_folder, sync_folder
from pylitefs.engine.lost import write_info
from pylitefs.engine.plain_files import keep_plain, remove_plain
from pylitefs.engine.registry import DEFAULT_PAGE_SIZE, Registry
from pylitefs.engine.renaming import check_unused, needs_its_name, record_content
from pylitefs.engine.replacement import Replacement, finish_replacement, forget_moved, link_file, was_moved
from pylitefs.engine.transaction import Change, UnstableSource
from pylitefs.events import Event
from pylitefs.formats.ltx.format import CHECKSUM_FLAG
from pylitefs.formats.names import problem_of, shown
from pylitefs.ports import SIDE_KINDS, SUFFIXES, FileKind, FileRef, Moved

log = logging.getLogger("litefs.store")


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
        """A plain file of this name is a whole database: take it over as one. Any thread. False if it is not one.

        The files get their names in the database's folder first, the transaction is recorded, then the plain names go:
        whoever looks up a name meanwhile finds the file, by one of them or by the other."""
        with self._registry.plain_files.alone_with(name):
            return self._import_plain(name, leave_journal=leave_journal)

    def _import_plain(self, name: str, *, leave_journal: bool) -> bool:
        with self._registry.lock:
            if not self._registry.is_plain_database(name):
                return False
            database = self._registry.get_or_create(name)
            if database.exists:
                return False
            try:  # with the lock still held: a database that was dropped and has a file again is not forgotten
                kinds = self._link_to_database(name, leave_journal=leave_journal)
            except OSError:
                self._stays_plain(database)
                raise
        is_unwritten = self._registry.plain_writes.watch(name, database.files.database)
        try:
            with _still(database), contextlib.suppress(UnstableSource):
                if not database.captures:
                    raise OSError(errno.EROFS, os.strerror(errno.EROFS))
                database.wal.begin_here()
                database.rollback.suspect = True
                self._registry.capture.commit_point(database, "import", is_still=is_unwritten)
        except OSError:  # no room for the log, no descriptors: it stays plain, and its next commit tries again
            self._stays_plain(database)
            raise
        if self._stays_plain(database):  # it was written to meanwhile
            return False
        self._registry.open_files.became(database)
        if not is_unwritten():  # whose write came just then has perhaps not noted it
            database.rollback.suspect = True
            self._registry.worker.post(self._registry.capture.wake_rollback, database, database=name)
        self._remove_plain(name, kinds)
        self._registry.worker.post(self._registry.capture.wake, database, database=name)  # it may have a WAL
        self._tell(name)
        return True

    def _stays_plain(self, database: Database) -> bool:
        """If an import has come to nothing: the files go back. Whether it is so."""
        with self._registry.lock, database.lock:
            if database.exists:
                return False
            database.rollback.clear()
            self._make_plain(database, database.name)
            return True

    def _tell(self, *names: str) -> None:
        """The names of databases, and those of their files, have changed."""
        if self._registry.notifier is not None:
            for name in names:
                for suffix in ("", *SUFFIXES):
                    self._registry.notifier.changed(name + suffix)

    def _move(self, old: str, new: str, do: Callable[[], None], *, anew: bool = False) -> None:
        if self._registry.notifier is not None:
            self._registry.notifier.move(old, new, do, anew=anew)
        else:
            do()

    def _link_to_database(self, name: str, *, leave_journal: bool = False) -> list[FileKind]:
        """Give plain files their names in the database's folder, beside those they have. Which there were."""
        folder = os.path.join(self._registry.databases_dir, name)
        os.makedirs(os.path.join(folder, "ltx"), exist_ok=True)
        kinds = []
        for kind, suffix in SUFFIX_OF.items():
            if kind is FileKind.JOURNAL and leave_journal:
                continue
            with contextlib.suppress(FileNotFoundError):
                link_file(self._registry.plain_path(name + suffix), os.path.join(folder, kind.value))
                kinds.append(kind)
        self._registry.set_owner(os.path.join(folder, "database"))
        sync_folder(folder)
        return kinds

    def _remove_plain(self, name: str, kinds: Iterable[FileKind]) -> None:
        """They are found in the database's folder now. Durable: a power cut must not bring them back after a drop."""
        file = self._registry.files_of(name).database
        for kind in kinds:
            remove_plain(self._registry.plain_path(name + SUFFIX_OF[kind]), file if kind is FileKind.DATABASE else None)
        sync_folder(self._registry.plain_dir)

    def finish_promotions(self) -> None:
        """Plain files that are databases: their import was cut off by a crash. Side files go with their database."""
        for name in os.listdir(self._registry.databases_dir):
            files = self._registry.files_of(name)
            if os.path.isdir(files.folder):
                finish_aside(files)
                finish_replacement(files, self._registry.files_of)
        may_import = self._registry.options.is_primary or self._registry.marker.names is None
        for name in sorted(os.listdir(self._registry.plain_dir)):
            plain, there = self._registry.plain_path(name), self._registry.files_of(name).database
            if os.path.exists(there):
                if os.path.samefile(plain, there):
                    os.unlink(plain)
                else:
                    self._keep_plain(name)
            elif self._registry.is_plain_database(name) and may_import:
                self._remove_plain(name, self._link_to_database(name))
        for name in os.listdir(self._registry.plain_dir):
            for suffix, kind in SUFFIXES.items():
                base = name[: -len(suffix)]
                files = self._registry.files_of(base)
                if kind in SIDE_KINDS and name.endswith(suffix) and base and os.path.isfile(files.database):
                    if os.path.exists(files.backing(kind)):
                        os.unlink(self._registry.plain_path(name))
                    else:
                        os.rename(self._registry.plain_path(name), files.backing(kind))

    def finish_move(self, database: Database) -> bool:
        """At the start: a crash came after its files had got another database's name, and before that was recorded.
        False if nothing of the kind has happened. Raises OSError."""
        if not was_moved(database.files):
            return False
        if database.exists:  # made anew from its log
            self.drop(database)
        elif database.log.head.checksum != CHECKSUM_FLAG:
            database.position = database.log.head
            self.record_drop(database)
        forget_moved(database.files)
        return True

    def drop(self, database: Database) -> None:
        """The database was removed: note it in the log, remove its files. On the worker, flushed before."""
        with _still(database):
            if not database.exists:
                return
            self.record_drop(database)
            self._clear_live(database)
        database.emit("drop", txid=database.position.txid)

    def emptied(self, database: Database) -> None:
        """An application has cut its file off to nothing, in place: to SQLite that is a new database. The file goes on
        as a plain one, also for who has it open, until it holds a database again. Any thread, under `Database.lock`.

        The name stands for the plain file from the moment in which the drop is recorded: until then the file has both
        names, so that nobody finds none and makes another.
        """
        plain = self._registry.plain_path(database.name)
        link_file(database.files.database, plain)
        try:
            self.record_drop(database)
        except OSError:
            if os.path.exists(database.files.database):
                os.unlink(plain)
            else:
                os.rename(plain, database.files.database)
            raise
        with contextlib.suppress(FileNotFoundError):
            os.unlink(database.files.database)
        for kind in SIDE_KINDS:
            with contextlib.suppress(FileNotFoundError):
                os.rename(database.files.backing(kind), self._registry.plain_path(database.name + SUFFIX_OF[kind]))
        database.rollback.clear()
        database.withhold(None)
        self._registry.open_files.left(database, plain=True)
        self._tell(database.name)
        self._registry.worker.post(self._leave, database, database=database.name)
        database.emit("drop", txid=database.position.txid)

    def _leave(self, database: Database) -> None:
        """What was seen in the files of a database that was emptied does not count any more. On the worker."""
        with database.wal.mutex:
            if not database.exists:
                self._registry.capture.forget(database)
                self._registry.capture.replaced(database)

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
        self._registry.open_files.left(database)
        self._registry.capture.replaced(database)
        database.rollback.clear()
        database.withhold(None)
        sync_folder(database.files.folder)
        self._tell(database.name)

    def rename(self, old: FileRef, new: FileRef) -> None:
        """A rename in which a database takes part. On the worker. Raises OSError, and nothing has changed then: EBUSY,
        ENOENT where a plain file has become a database since it was asked what it is."""
        with self._registry.plain_files.alone_with(old.name, new.name, waits=False):
            source, target = self._registry.databases.get(old.name), self._registry.databases.get(new.name)
            if source is not None and source.exists:
                if (problem := problem_of(new.name)) is not None:
                    raise OSError(errno.EINVAL, f"{shown(new.name)}: {problem}")
                self._rename_database(source, new.name)
                return
            if self._move_plain(old.name, new.name, target):
                return
        self.import_plain(new.name)

    def _move_plain(self, old: str, new: str, target: Database | None) -> bool:
        """True if it is a database by now, in the place of `target`."""
        plain, renamed = self._registry.plain_path(old), self._registry.plain_path(new)
        os.lstat(plain)  # nothing is dropped for a file that is not there
        if target is not None and target.exists:
            self._registry.capture.flush(target)
            if self._registry.is_plain_database(old):
                self._replace_content(target, old)
                return True
            check_unused(plain, target, self._registry.notifier)
            self.drop(target)
        self._move(old, new, lambda: os.rename(plain, renamed))
        self._registry.open_files.renamed(old, new)
        return False

    def _replace_content(self, database: Database, plain_name: str) -> None:
        """Another database file takes the place of this one; what was committed in its WAL is in the log already."""
        path = self._registry.plain_path(plain_name)
        check_unused(path, database, self._registry.notifier)
        replacement = Replacement(database.files, path, None)
        try:
            with _still(database):
                replacement.note()
                self._move(plain_name, database.name, lambda: self._exchange(path, database, replacement))
                self._registry.open_files.became(database, plain_name)
                replacement.finish()
                database.wal_stands_in = False
                self._registry.set_owner(database.files.database)
                self._registry.capture.replaced(database)
                database.rollback.suspect = True
                self._registry.capture.commit_point(database, "import")
        finally:
            self._tell(plain_name, database.name)

    def _rename_database(self, source: Database, name: str) -> None:
        """`source` is called `name` from now on. The new name's content is recorded before the drop of the old one:
        whoever follows the log has the rows under one of the names at least."""
        check_unused(source, self._registry.get(name), self._registry.notifier)  # before anything is made for it
        capture, target = self._registry.capture, self._registry.get_or_create(name)
        capture.flush_if_possible(source)
        if target.exists:
            capture.flush_if_possible(target)
        replacement = Replacement(target.files, source.files.database, source.files)
        try:
            with _still(source, target):
                replacement.note()
                exchange = functools.partial(self._exchange, source, target, replacement)
                self._move(source.name, name, exchange, anew=needs_its_name(source))
                stood_in, target.wal_stands_in = target.wal_stands_in, source.wal_stands_in
                capture.replaced(target)
                try:
                    record_content(target, capture)
                except OSError:
                    if not target.exists:  # nothing has the new name: all is as it was
                        target.rollback.clear()
                        target.wal_stands_in = stood_in
                        self._move(name, source.name, functools.partial(self._undo, source, target, replacement))
                        replacement.finish()
                        raise
                    capture.wake_rollback(target)  # the old file of this name is gone: it is recorded later
                    self._moved_away(source, target, replacement)
                    raise
                if not target.exists:  # SQLite cannot read it: a plain file
                    self._make_plain(target, name)
                    self._registry.open_files.left(target, plain=True)
                self._moved_away(source, target, replacement)
            if target.exists:
                remove_plain(self._registry.plain_path(name))  # what had the name
                capture.flush_if_possible(target)  # what its WAL has on top, where that could not be read with it
        finally:
            self._tell(source.name, name)
        source.emit("drop", txid=source.position.txid)

    def _exchange(self, source: Database | str, target: Database, replacement: Replacement) -> None:
        with contextlib.ExitStack() as nobody_is_let_in:
            for database in (source, target):
                if isinstance(database, Database):
                    nobody_is_let_in.enter_context(database.handles_lock)
            try:
                check_unused(source, target, self._registry.notifier)
            except OSError:
                replacement.finish()
                raise
            replacement.exchange()
            self._users_moved(source if isinstance(source, Database) else None, target)

    def _undo(self, source: Database, target: Database, replacement: Replacement) -> None:
        with source.handles_lock, target.handles_lock:
            replacement.undo()
            self._users_moved(target, source)

    def _users_moved(self, source: Database | None, target: Database) -> None:
        """Who has the file open goes with it. Both `handles_lock`s are held."""
        self._registry.open_files.moved(source, target)
        for database in filter(None, (source, target)):  # it is asked for anew at the next write
            self._registry.capture.forget_lock_fd(database)

    def _moved_away(self, source: Database, target: Database, replacement: Replacement) -> None:
        if target.exists:
            source.has_moved(Moved(target.name, target.position.txid, source.position.txid))
        self.record_drop(source)
        replacement.finish()
        source.wal_stands_in = False
        self._registry.capture.replaced(source)
        source.rollback.clear()
        source.withhold(None)

    def _make_plain(self, database: Database, name: str) -> None:
        """Its files have plain names only. Raises OSError."""
        for kind, suffix in SUFFIX_OF.items():
            path, plain = database.files.backing(kind), self._registry.plain_path(name + suffix)
            with contextlib.suppress(FileNotFoundError):
                os.rename(path, plain)
                os.unlink(path)  # where both were names of one file rename(2) has done nothing

    def clear_name(self, name: str) -> None:
        """A database was made by what another node sent: plain files with its names make room."""
        for suffix in SUFFIX_OF.values():
            try:
                self._keep_plain(name + suffix)
            except OSError as error:  # it is hidden, and not lost
                log.warning("%s: a file of this name was here already: %s", shown(name + suffix), error)

    def _keep_plain(self, name: str) -> None:
        if (kept := keep_plain(self._registry.plain_dir, name)) is not None:
            self._tell(kept)

    def set_aside(self, name: str, reason: str) -> None:
        """Keep a database that the primary does not know out of the way: its files go to lost/. On the worker."""
        with self._registry.lock:
            database = self._registry.databases.get(name)
            self._registry.forget_tombstone(name)
            if database is None:
                return
            folder, head = new_folder(database.files.lost), database.log.head
            write_info(folder, name, None, head, head.txid, reason)
            self._registry.apply.let_go(database)
            database.close(clean=False)
            put_aside(database.files, folder)
            del self._registry.databases[name]
            self._tell(name)
        lost = {"transactions": head.txid, "max_txid": head.txid, "epoch": head.epoch, "to": str(head)}
        self._registry.events.emit(Event("lost", name, {"reason": reason, "folder": folder, **lost}))
