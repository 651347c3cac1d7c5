"""The engine's side of the filesystem: what a FUSE request on a database means (see `ports.FileHooks`).

Everything that may take long or needs the mount is handed to the worker (or a thread of its own, if it is large) and
the request is answered from there; a FUSE thread only does short work on backing files.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Callable

from pylitefs.engine.apply import Apply
from pylitefs.engine.commit_hooks import CommitHooks, if_held
from pylitefs.engine.commit_points import wal_in_use
from pylitefs.engine.continuation import finish, proceed
from pylitefs.engine.database import Database
from pylitefs.engine.files import sync_file, sync_folder
from pylitefs.engine.page_checksums import stamp
from pylitefs.engine.renaming import when_unused
from pylitefs.engine.rollback_capture import is_complete_database, journal_in_use
from pylitefs.engine.store import Store
from pylitefs.errors import FormatError
from pylitefs.formats.names import problem_of, shown
from pylitefs.formats.sqlite.header import HEADER_SIZE, DatabaseHeader, is_sqlite
from pylitefs.ports import SIDE_KINDS, VIRTUAL_KINDS, FileKind, FileRef, LockOpening, Then

log = logging.getLogger("litefs.hooks")

_WRITES = os.O_WRONLY | os.O_RDWR
_ZERO_HEADER = bytes(28)


def read_only() -> OSError:
    return OSError(errno.EROFS, os.strerror(errno.EROFS))


class EngineHooks(CommitHooks):
    """Implements `FileHooks` on a store. What an application commits is answered only while `Database.may_commit`."""

    def __init__(self, store: Store, apply: Apply) -> None:
        super().__init__(store)
        self._apply = apply
        self._engine_renames: set[tuple[str, str]] = set()

    def writable(self, ref: FileRef) -> bool:
        database = self._database(ref)
        return self._store.is_primary if database is None else database.captures

    # -- open and close --------------------------------------------------------------------------------------

    def may_open(self, ref: FileRef, flags: int, by_daemon: bool, then: Then) -> None:
        database = self._database(ref)
        if database is None or by_daemon or ref.kind in VIRTUAL_KINDS:
            then(None)
        elif database.is_busy or self._store.is_closing:
            then(_busy(database))
        elif database.set_aside_reason is not None and (flags & _WRITES or ref.kind is not FileKind.DATABASE):
            then(read_only())
        elif ref.kind is FileKind.DATABASE and not database.captures and self._store.roles.is_lent(database):
            self._apply.before_open(database, then)
        elif database.captures or (flags & _WRITES and ref.kind is not FileKind.SHM):
            writing = flags & _WRITES != 0 and ref.kind is not FileKind.SHM

            def again() -> None:
                try:
                    self.may_open(ref, flags, by_daemon, then)
                except Exception as error:
                    proceed(then, error)

            waits = again if ref.kind is FileKind.DATABASE else None
            self._store.roles.let_in(database, writing=writing, then=then, again=waits)
        elif ref.kind is FileKind.DATABASE and database.set_aside_reason is None:
            self._apply.before_open(database, then)
        else:
            then(None)

    def open_lock(self, ref: FileRef, then: Then) -> LockOpening:
        database = self._database(ref)
        if database is not None and database.is_busy:
            then(_busy(database))
        elif database is None or database.set_aside_reason is not None:
            then(read_only())
        elif self._store.lock_files is not None:
            return self._store.lock_files.open(database.name, then)
        else:
            then(None if self._store.is_primary else read_only())
        return NothingHeld()

    def may_create(self, ref: FileRef, by_daemon: bool, then: Then) -> None:
        database = self._database(ref)
        if by_daemon:
            then(None)
        elif ref.kind in VIRTUAL_KINDS:
            then(PermissionError(errno.EPERM, ref.name))
        elif database is not None and (database.is_busy or self._store.is_closing):
            then(_busy(database))
        elif not self._may_begin(ref, database):
            self._remove_stillborn(ref)
            then(PermissionError(errno.EACCES, ref.name))  # SQLite reports it as "attempt to write a readonly database"
        elif database is not None and database.set_aside_reason is not None:
            then(read_only())
        else:
            self._before_wal(ref, then)

    def _may_begin(self, ref: FileRef, database: Database | None) -> bool:
        """Whether this file may be made; readers of a database in WAL mode make its -wal and -shm too."""
        if database is None:
            return self._may_make or not ref.name.endswith(("-journal", "-wal"))
        return database.may_commit or (database.captures and ref.kind is not FileKind.JOURNAL)

    def _remove_stillborn(self, ref: FileRef) -> None:
        """SQLite has made an empty file for a new database, which cannot be begun on a replica: leave none behind."""
        base = ref.name.removesuffix("-journal").removesuffix("-wal")
        if ref.kind is FileKind.PLAIN and os.path.exists(self._plain(base)) and not stamp(self._plain(base))[0]:
            os.unlink(self._plain(base))
            if self._store.notifier is not None:
                self._store.notifier.changed(base)

    def created(self, ref: FileRef) -> None:
        database = self._database(ref)
        if database is None or not database.captures or ref.kind not in SIDE_KINDS:
            return
        with contextlib.suppress(OSError):  # the database's permissions: SQLite would ask for them with another request
            os.chmod(database.files.backing(ref.kind), os.stat(database.files.database).st_mode & 0o777)
        if ref.kind is FileKind.WAL:
            database.wal_stands_in = False  # this one is SQLite's own
        if ref.kind is not FileKind.JOURNAL:
            self._store.worker.post(self._store.capture.created, database, ref.kind, database=database.name)

    def wants_write_hook(self, ref: FileRef) -> bool:
        if ref.kind is FileKind.DATABASE:
            return not self._in_wal_mode(ref)
        if ref.kind is not FileKind.PLAIN or ref.path is None:
            return False
        head = self._head(ref.path)
        return not head or is_sqlite(head)

    @staticmethod
    def _head(path: str) -> bytes:
        try:
            with open(path, "rb") as file:
                return file.read(HEADER_SIZE)
        except OSError:
            return b""

    def _in_wal_mode(self, ref: FileRef) -> bool:
        try:
            return DatabaseHeader.unpack(self._head(ref.path or "")).is_wal
        except FormatError:
            return False

    def opened(self, ref: FileRef, handle: int, pid: int, *, writable: bool, hooked: bool, by_daemon: bool) -> None:
        database = self._database(ref)
        if by_daemon or ref.kind not in (FileKind.DATABASE, FileKind.PLAIN):
            return
        if database is not None:
            with database.handles_lock:
                if database.settled_stamp == (0, 0) and not database.raw_writers and not database.rollback.pending:
                    database.settled_stamp = stamp(database.files.database)  # as the start found it
        elif writable:
            self._check_still_plain(ref)
        self._store.open_files.opened(handle, ref.name, database, pid, writable=writable, raw=not hooked)
        taken = self._store.get(ref.name) if database is None else None
        if taken is not None and taken.exists and taken.captures:  # since it was asked whose file it is
            self._store.open_files.became(taken)

    def released(self, ref: FileRef, handle: int, last: bool, by_daemon: bool) -> None:
        if last and ref.kind in (FileKind.PLAIN, FileKind.DATABASE):
            self._store.plain_writes.forget(ref.name)
        opened = None if by_daemon else self._store.open_files.released(handle)
        if opened is None or (database := opened.database) is None:
            return
        if opened.raw and database.captures and self._has_unseen_content(database):
            database.rollback.suspect = True
        if database.app_handles == 0:
            self._store.capture.forget_lock_fd(database)
        if database.captures:
            if database.rollback.pending and opened.writable:
                self._store.worker.post(self._store.capture.settle, database, 0, True, database=database.name)
            if database.app_handles == 0:
                self._store.stand_ins.closed(database)
        elif database.app_handles == 0:
            self._apply.idle(database)

    def flushed(self, ref: FileRef, then: Then, handle: int) -> None:
        database = self._database(ref)
        if database is not None:
            if database.captures and database.rollback.pending:
                def settled(error: BaseException | None) -> None:
                    if error is None:
                        self._gated.after_commit(database, True, if_held(database, then), caller=then, on_worker=True)
                    else:
                        then(error)

                self._store.capture.settle_later(database, settled, ended=True)
            else:
                then(None)
        elif (
            ref.kind is FileKind.PLAIN
            and self._store.is_primary
            and not ref.name.startswith(".")
            and self._store.plain_writes.is_writer(ref.name, handle)
            and not journal_in_use(self._plain(ref.name + "-journal"))
        ):
            self._take_over(ref.name, then, at_rest=True)
        else:
            then(None)

    # -- writes ----------------------------------------------------------------------------------------------

    def write(self, ref: FileRef, fd: int, data: memoryview, offset: int, handle: int) -> int:
        database = self._database(ref)
        if database is None:
            if not self._may_make and offset == 0 and is_sqlite(bytes(data[:HEADER_SIZE])):
                raise read_only()
            if offset == 0 and ref.name.endswith("-journal") and bytes(data[:28]) == _ZERO_HEADER:
                self._import_base(ref.name)
            return self._store.plain_imports.write(ref.name, fd, data, offset, handle)
        elif database.captures:
            if ref.kind is FileKind.DATABASE:
                return self._write_database(database, fd, data, offset, handle)
            if ref.kind is FileKind.JOURNAL and offset == 0 and bytes(data[:28]) == _ZERO_HEADER:
                self._commit_now(database)
        return os.pwrite(fd, data, offset)

    def _write_database(self, database: Database, fd: int, data: memoryview, offset: int, handle: int) -> int:
        if wal_in_use(database):
            return os.pwrite(fd, data, offset)  # a checkpoint: the WAL has told us these pages
        if (self._store.roles.pause.on or not database.may_commit) and not (
            # The rest of a transaction, or what undoes it, must be possible: whether it counts is decided at its end.
            database.rollback.pending or database.rollback.journal_in_use()
        ):
            raise read_only()
        with database.lock:
            if database.rollback.starts_transaction() and database.may_commit:
                self._store.capture.commit_point(database)
            if not database.rollback.has_journal:
                self._store.capture.note_write(database)
            written = os.pwrite(fd, data, offset)
            database.rollback.note(offset, written, handle)
            return written

    def before_truncate(self, ref: FileRef, size_bytes: int, then: Then, by_daemon: bool) -> None:
        database = self._database(ref)
        if ref.kind is FileKind.PLAIN and size_bytes == 0:
            self._plain_commit(ref, then, leave_journal=False)
        elif database is None or by_daemon:
            then(None)
        elif not database.captures:
            then(read_only())
        elif ref.kind is FileKind.JOURNAL and size_bytes == 0:  # PERSIST cuts an old one's end off before a commit
            self._commit(database, then)
        elif ref.kind is FileKind.WAL and not size_bytes and database.journal_mode == "rollback":
            then(PermissionError(errno.EACCES, ref.name))  # an empty one would not be found: see `Apply`
        elif ref.kind is FileKind.WAL:
            self._on_worker(database, lambda: self._wal_truncates(database, size_bytes), then)
        elif ref.kind is FileKind.DATABASE and not size_bytes and not self._may_replace(database):
            then(read_only())
        else:
            if ref.kind is FileKind.DATABASE and size_bytes == 0:
                database.rollback.suspect = True
            if ref.kind is FileKind.SHM:
                database.wal.before_index_truncate()
            then(None)

    def _may_replace(self, database: Database) -> bool:
        """Whether it may go, or get another content, without SQLite's locks."""
        return database.may_commit and not self._store.roles.pause.on

    def _wal_truncates(self, database: Database, size_bytes: int) -> None:
        self._store.capture.flush_if_possible(database)
        self._gated.wal_goes(database, size_bytes)

    def after_truncate(self, ref: FileRef, size_bytes: int) -> None:
        database = self._capturing(ref)
        if database is None:
            return
        if ref.kind is FileKind.SHM:
            database.wal.after_index_truncate()
        elif ref.kind is FileKind.DATABASE:
            self._database_truncated(database, size_bytes)
        elif ref.kind is FileKind.JOURNAL and not size_bytes and self._gated.gate_of(database) is not None:
            sync_file(database.files.journal)  # see `unlinked`: with TRUNCATE SQLite does it from FULL on

    # -- names that go -----------------------------------------------------------------------------------------

    def before_unlink(self, ref: FileRef, by_daemon: bool, then: Then) -> None:
        database = self._database(ref)
        if ref.kind in VIRTUAL_KINDS:
            then(PermissionError(errno.EPERM, ref.name))
        elif ref.kind is FileKind.PLAIN:
            self._plain_goes(ref, then)
        elif database is None:
            then(None)
        elif database.is_busy:
            then(_busy(database))
        elif by_daemon or not database.captures:
            then(None if by_daemon else read_only())
        elif ref.kind is FileKind.JOURNAL:
            self._commit(database, then)
        elif ref.kind is FileKind.DATABASE and (self._store.roles.pause.on or not database.may_commit or database.loan):
            then(read_only())
        elif ref.kind is FileKind.DATABASE:
            self._on_worker(database, lambda: self._drop(database), then)
        else:
            self._store.worker.post(self._remove_side, database, ref.kind, then, database=database.name)

    def unlinked(self, ref: FileRef) -> None:
        """SQLite makes it durable with synchronous=EXTRA only that a journal has gone: one that is there again after a
        power cut takes its commit back, and replicas have it already."""
        self._super_journal_gone(ref)
        database = self._capturing(ref) if ref.kind is FileKind.JOURNAL else None
        if database is not None and self._gated.gate_of(database) is not None:
            sync_folder(database.files.folder)

    def _drop(self, database: Database) -> None:
        with contextlib.suppress(OSError):  # a full disk must not keep anybody from making room
            self._store.capture.flush_if_possible(database)
        self._store.naming.drop(database)

    def _remove_side(self, database: Database, kind: FileKind, then: Then) -> None:
        def take() -> None:
            self._store.capture.flush_if_possible(database)
            if kind is FileKind.WAL:
                self._gated.wal_goes(database)
                database.wal_stands_in = False
            self._store.capture.removed(database, kind)

        finish(then, take)

    def before_rename(self, old: FileRef, new: FileRef, then: Then) -> None:
        kinds = {old.kind, new.kind}
        if kinds & VIRTUAL_KINDS or kinds & SIDE_KINDS:
            then(PermissionError(errno.EPERM, f"{old.name} -> {new.name}"))
            return
        may_be_taken_over = [old.name, new.name] if self._may_make else [old.name]
        if FileKind.DATABASE not in kinds and not any(map(is_complete_database, map(self._plain, may_be_taken_over))):
            self._store.open_files.renamed(old.name, new.name)
            then(None)
            if self._store.is_primary:
                self._store.worker.post(self._store.unreadable.look, new.name)
            return
        if old.kind is FileKind.DATABASE and (problem := problem_of(new.name)) is not None:
            then(OSError(errno.EINVAL, f"{shown(new.name)}: {problem}"))
            return
        involved = [database for name in (old.name, new.name) if (database := self._store.get(name)) is not None]
        if not self._may_make or not all(database.may_commit for database in involved):
            then(read_only())
            return

        def answer(error: BaseException | None) -> None:
            if error is None:
                self._engine_renames.add((old.name, new.name))  # only if it was done: `then` looks at once
            then(error)

        def renamed(error: BaseException | None) -> None:
            """Replicas are not waited for: until the answer the kernel holds the lock of the directory, and nobody can
            open anything by its name. What was acknowledged they have under one name or the other."""
            database = self._store.get(new.name)
            if database is not None and database.exists:
                if_held(database, answer)(error)
            else:
                answer(error)

        def rename() -> None:
            worker, naming = self._store.worker, self._store.naming
            when_unused(self._store, old.name, new.name, lambda: worker.submit(naming.rename, old, new).result())

        self._in_thread(rename, renamed)

    def renamed_by_engine(self, old: FileRef, new: FileRef) -> bool:
        key = (old.name, new.name)
        found = key in self._engine_renames
        self._engine_renames.discard(key)
        return found

    # -- helpers -----------------------------------------------------------------------------------------------

    def _on_worker(self, database: Database, work: Callable[[], object], then: Then) -> None:
        self._store.worker.post(finish, then, work, database=database.name)


class NothingHeld:
    """A `LockOpening` that stands for nothing."""

    def cancel(self) -> None: ...

    def flush(self, last: bool, then: Then) -> None:
        then(None)

    def release(self) -> None: ...


def _busy(database: Database) -> OSError:
    return OSError(errno.EBUSY, f"{database.name}: {database.set_aside_reason or 'busy'}")
