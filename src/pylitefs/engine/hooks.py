"""The engine's side of the filesystem: what a FUSE request on a database means (see `ports.FileHooks`).

Everything that may take long or needs the mount is handed to the worker (or a thread of its own, if it is large) and
the request is answered from there; a FUSE thread only does short work on backing files.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Callable

from pylitefs.engine.apply import Apply
from pylitefs.engine.checkpoints import Checkpoints
from pylitefs.engine.commit_points import finish, wal_in_use
from pylitefs.engine.database import Database
from pylitefs.engine.rollback_capture import journal_in_use
from pylitefs.engine.store import Store
from pylitefs.engine.wal_seed import seed
from pylitefs.errors import FormatError
from pylitefs.formats.sqlite.header import HEADER_SIZE, DatabaseHeader, is_sqlite
from pylitefs.ports import SIDE_KINDS, SUFFIXES, VIRTUAL_KINDS, FileKind, FileRef, Then

log = logging.getLogger("litefs.hooks")

_WRITES = os.O_WRONLY | os.O_RDWR
_ZERO_HEADER = bytes(28)
_LARGE_BYTES = 8 << 20  # a commit of more than this leaves the FUSE thread
_NEVER_REPLICATED_MS = 2147483647
_DOT_FILES = {".primary": FileKind.PRIMARY, ".lag": FileKind.LAG}


def read_only() -> OSError:
    return OSError(errno.EROFS, os.strerror(errno.EROFS))


class EngineHooks:
    """Implements `FileHooks` on a store."""

    def __init__(self, store: Store, apply: Apply) -> None:
        self._store = store
        self._apply = apply
        self._checkpoints = Checkpoints(store)
        self._engine_renames: set[tuple[str, str]] = set()

    # -- names -----------------------------------------------------------------------------------------------

    def resolve(self, name: str) -> FileRef:
        if name in _DOT_FILES:
            return FileRef(name, _DOT_FILES[name], None, None)
        database = self._store.get(name)
        if database is not None and database.exists:
            return FileRef(name, FileKind.DATABASE, name, database.files.database)
        for suffix, kind in SUFFIXES.items():
            if name.endswith(suffix):
                database = self._store.get(name[: -len(suffix)])
                if database is not None and database.exists:
                    path = database.files.backing(kind) if kind in SIDE_KINDS else None
                    return FileRef(name, kind, database.name, path)
        return FileRef(name, FileKind.PLAIN, None, os.path.join(self._store.plain_dir, name))

    def names(self) -> list[str]:
        found = [".lag"]
        if self._store.primary_hostname is not None:
            found.append(".primary")
        for name in self._store.names():
            database = self._store.get(name)
            assert database is not None
            found += [name, name + "-pos"]
            for suffix, kind in SUFFIXES.items():
                if kind in SIDE_KINDS and os.path.exists(database.files.backing(kind)):
                    found.append(name + suffix)
        return found + os.listdir(self._store.plain_dir)

    def virtual_size(self, ref: FileRef) -> int | None:
        if ref.kind is FileKind.POSITION:
            return 34
        if ref.kind is FileKind.LAG:
            return 11
        hostname = self._store.primary_hostname
        return None if hostname is None else len(hostname.encode()) + 1

    def virtual_content(self, ref: FileRef, then: Callable[[bytes | BaseException], None]) -> None:
        if ref.kind is FileKind.POSITION:
            database = self._store.get(ref.database or "")
            if database is None:
                then(FileNotFoundError(errno.ENOENT, ref.name))
                return
            self._store.flush(database).add_done_callback(
                lambda done: then(done.exception() or f"{done.result()}\n".encode())
            )
        elif ref.kind is FileKind.LAG:
            then(self._lag())
        elif self._store.primary_hostname is None:
            then(FileNotFoundError(errno.ENOENT, ref.name))
        else:
            then(f"{self._store.primary_hostname}\n".encode())

    def _lag(self) -> bytes:
        """Milliseconds as LiteFS prints them: sign and 9 digits; 0 on the primary, the largest number before the
        first contact (11 bytes, so that its newline is cut)."""
        lag = self._store.lag_ms
        value = 0 if self._store.is_primary else _NEVER_REPLICATED_MS if lag is None else lag
        return f"{value:+010d}\n".encode()[:11]

    def writable(self) -> bool:
        return self._store.is_primary

    # -- open and close --------------------------------------------------------------------------------------

    def may_open(self, ref: FileRef, flags: int, by_daemon: bool, then: Then) -> None:
        database = self._database(ref)
        if database is None or by_daemon or ref.kind in VIRTUAL_KINDS:
            then(None)
        elif database.is_busy:
            then(_busy(database))
        elif database.set_aside_reason is not None and (flags & _WRITES or ref.kind is not FileKind.DATABASE):
            then(read_only())
        elif self._store.is_primary:
            then(None)
        elif flags & _WRITES and ref.kind is not FileKind.SHM:
            then(read_only())
        elif ref.kind is FileKind.DATABASE and database.set_aside_reason is None:
            self._apply.before_open(database, then)
        else:
            then(None)

    def may_create(self, ref: FileRef, by_daemon: bool, then: Then) -> None:
        database = self._database(ref)
        if by_daemon:
            then(None)
        elif ref.kind in VIRTUAL_KINDS:
            then(PermissionError(errno.EPERM, ref.name))
        elif database is not None and database.is_busy:
            then(_busy(database))
        elif not self._store.is_primary and (database is not None or ref.name.endswith(("-journal", "-wal"))):
            self._remove_stillborn(ref)
            then(PermissionError(errno.EACCES, ref.name))  # SQLite reports it as "attempt to write a readonly database"
        elif database is not None and database.set_aside_reason is not None:
            then(read_only())
        else:
            then(None)

    def _remove_stillborn(self, ref: FileRef) -> None:
        """SQLite has made an empty file for a new database, which cannot be begun on a replica: leave none behind."""
        base = ref.name.removesuffix("-journal").removesuffix("-wal")
        if ref.kind is FileKind.PLAIN and os.path.exists(self._plain(base)) and not _has_bytes(self._plain(base)):
            os.unlink(self._plain(base))
            if self._store.notifier is not None:
                self._store.notifier.forget_file(base)

    def created(self, ref: FileRef) -> None:
        database = self._database(ref)
        if database is None or not self._store.is_primary or ref.kind not in SIDE_KINDS:
            return
        with contextlib.suppress(OSError):  # the database's permissions: SQLite would ask for them with another request
            os.chmod(database.files.backing(ref.kind), os.stat(database.files.database).st_mode & 0o777)
        if ref.kind is FileKind.JOURNAL:
            return
        seeded = seed(database.files) if ref.kind is FileKind.WAL else None
        self._store.worker.post(self._store.capture.created, database, ref.kind, seeded, database=database.name)

    def wants_write_hook(self, ref: FileRef) -> bool:
        if ref.kind is FileKind.DATABASE:
            return self._store.is_primary and not self._in_wal_mode(ref)
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

    def opened(self, ref: FileRef, writable: bool, hooked: bool, by_daemon: bool) -> None:
        database = self._database(ref)
        if database is not None and ref.kind is FileKind.DATABASE and not by_daemon:
            with database.handles_lock:
                database.app_handles += 1
                database.raw_writers += writable and not hooked

    def released(self, ref: FileRef, writable: bool, hooked: bool, last: bool, by_daemon: bool) -> None:
        database = self._database(ref)
        if database is None or ref.kind is not FileKind.DATABASE or by_daemon:
            return
        with database.handles_lock:
            database.app_handles = max(0, database.app_handles - 1)
            raw = writable and not hooked
            database.raw_writers = max(0, database.raw_writers - raw)
        if raw and self._store.is_primary and not wal_in_use(database) and not self._in_wal_mode(ref):
            database.rollback.suspect = True
        if writable:
            database.rollback.replacing = False
        pending = database.rollback.pending
        if self._store.is_primary:
            if pending:
                self._store.capture.settle_later(database, lambda error: None)
        elif database.app_handles == 0:
            self._apply.idle(database)

    def flushed(self, ref: FileRef, then: Then) -> None:
        database = self._database(ref)
        if not self._store.is_primary:
            then(None)
        elif database is not None:
            if database.rollback.pending:
                database.rollback.replacing = False
                self._store.capture.settle_later(database, then)
            else:
                then(None)
        elif ref.kind is FileKind.PLAIN and not ref.name.startswith(".") and self._is_importable(ref):
            self._in_thread(lambda: self._store.import_plain(ref.name), then)
        else:
            then(None)

    def _is_importable(self, ref: FileRef) -> bool:
        return self._store.is_plain_database(ref.name) and not journal_in_use(self._plain(ref.name + "-journal"))

    # -- writes ----------------------------------------------------------------------------------------------

    def write(self, ref: FileRef, fd: int, data: memoryview, offset: int) -> int:
        database = self._database(ref)
        if database is None:
            if not self._store.is_primary and offset == 0 and is_sqlite(bytes(data[:HEADER_SIZE])):
                raise read_only()
            if offset == 0 and ref.name.endswith("-journal") and bytes(data[:28]) == _ZERO_HEADER:
                self._import_base(ref.name)
        elif self._store.is_primary:
            if ref.kind is FileKind.DATABASE:
                return self._write_database(database, fd, data, offset)
            if ref.kind is FileKind.JOURNAL and offset == 0 and bytes(data[:28]) == _ZERO_HEADER:
                self._commit_now(database)
        return os.pwrite(fd, data, offset)

    def _write_database(self, database: Database, fd: int, data: memoryview, offset: int) -> int:
        if wal_in_use(database):
            return os.pwrite(fd, data, offset)  # a checkpoint: the WAL has told us these pages
        with database.lock:
            if database.rollback.starts_transaction():
                self._store.capture.commit_point(database)
            written = os.pwrite(fd, data, offset)
            database.rollback.note(offset, written)
            return written

    def before_truncate(self, ref: FileRef, size_bytes: int, then: Then, by_daemon: bool) -> None:
        database = self._database(ref)
        if ref.kind is FileKind.PLAIN and size_bytes == 0 and self._store.is_primary:
            self._plain_commit(ref, then, leave_journal=False)
        elif database is None:
            then(None)
        elif not self._store.is_primary:
            then(None if by_daemon else read_only())
        elif ref.kind is FileKind.JOURNAL and size_bytes == 0:  # PERSIST cuts an old one's end off before a commit
            self._commit(database, then)
        elif ref.kind is FileKind.WAL:
            self._on_worker(database, lambda: self._store.capture.flush_if_possible(database), then)
        else:
            if ref.kind is FileKind.DATABASE and size_bytes == 0:
                database.rollback.suspect = database.rollback.replacing = True
            if ref.kind is FileKind.SHM:
                database.wal.before_index_truncate()
            then(None)

    def after_truncate(self, ref: FileRef, size_bytes: int) -> None:
        database = self._database(ref) if ref.kind is FileKind.SHM else None
        if database is not None and self._store.is_primary:
            database.wal.after_index_truncate()

    def fsync_failed(self, ref: FileRef) -> None:
        database = self._database(ref) if ref.kind is FileKind.WAL else None
        if database is not None and self._store.is_primary:
            database.wal.fsync_failed()

    def before_fsync(self, ref: FileRef, then: Then) -> None:
        database = self._database(ref) if self._store.is_primary else None
        if database is not None and ref.kind is FileKind.WAL:
            self._checkpoints.before_wal_fsync(database, then)
        elif database is not None and ref.kind is FileKind.DATABASE:
            self._checkpoints.before_database_fsync(database, then)
        else:
            then(None)

    def after_fsync(self, ref: FileRef) -> None:
        if ref.kind in (FileKind.DATABASE, FileKind.JOURNAL) and self._store.is_primary:
            database = self._database(ref)
            if database is None or wal_in_use(database):
                return
            with database.lock:
                if ref.kind is FileKind.DATABASE and database.raw_writers:
                    database.rollback.suspect = True
                if database.rollback.pending and not database.rollback.journal_in_use():
                    self._store.capture.commit_point(database)
        elif ref.kind is FileKind.PLAIN and self._store.is_primary and self._is_importable(ref):
            self._store.import_plain(ref.name)

    # -- commit points -----------------------------------------------------------------------------------------

    def _commit(self, database: Database, then: Then) -> None:
        """The journal goes away: the transaction is committed, or rolled back (then no page has changed)."""
        with database.lock:
            if database.raw_writers and not wal_in_use(database):
                database.rollback.suspect = True
            large = database.rollback.suspect and database.size_bytes > _LARGE_BYTES
        if large:
            self._in_thread(lambda: self._commit_now(database), then)
        else:
            finish(then, lambda: self._commit_now(database))

    def _commit_now(self, database: Database) -> None:
        self._store.capture.commit_point(database)

    def _plain_commit(self, ref: FileRef, then: Then, *, leave_journal: bool) -> None:
        """The journal of a file that is no database yet goes away: it may have become one."""
        base = ref.name.removesuffix("-journal")
        if base != ref.name and self._store.is_primary and self._store.is_plain_database(base):
            self._in_thread(lambda: self._store.import_plain(base, leave_journal=leave_journal), then)
        else:
            then(None)

    def _import_base(self, journal: str) -> None:
        """A plain file's journal was invalidated in place (PERSIST, EXCLUSIVE)."""
        if self._store.is_primary:
            self._store.import_plain(journal.removesuffix("-journal"))

    # -- names that go -----------------------------------------------------------------------------------------

    def before_unlink(self, ref: FileRef, by_daemon: bool, then: Then) -> None:
        database = self._database(ref)
        if ref.kind in VIRTUAL_KINDS:
            then(PermissionError(errno.EPERM, ref.name))
        elif ref.kind is FileKind.PLAIN:
            if self._store.is_primary:
                self._plain_commit(ref, then, leave_journal=True)
            else:
                then(None)
        elif database is None:
            then(None)
        elif database.is_busy:
            then(_busy(database))
        elif not self._store.is_primary:
            then(None if by_daemon else read_only())
        elif ref.kind is FileKind.JOURNAL:
            self._commit(database, then)
        elif ref.kind is FileKind.DATABASE:
            self._on_worker(database, lambda: self._drop(database), then)
        else:
            self._store.worker.post(self._remove_side, database, ref.kind, then, database=database.name)

    def _drop(self, database: Database) -> None:
        with contextlib.suppress(OSError):  # a full disk must not keep anybody from making room
            self._store.capture.flush_if_possible(database)
        self._store.naming.drop(database)

    def _remove_side(self, database: Database, kind: FileKind, then: Then) -> None:
        def take() -> None:
            self._store.capture.flush_if_possible(database)
            self._store.capture.removed(database, kind)

        finish(then, take)

    def before_rename(self, old: FileRef, new: FileRef, then: Then) -> None:
        kinds = {old.kind, new.kind}
        if kinds & VIRTUAL_KINDS or kinds & SIDE_KINDS:
            then(PermissionError(errno.EPERM, f"{old.name} -> {new.name}"))
            return
        if FileKind.DATABASE not in kinds and not self._store.is_plain_database(old.name):
            then(None)
            return
        if not self._store.is_primary:
            then(read_only())
            return
        self._engine_renames.add((old.name, new.name))
        self._in_thread(lambda: self._store.worker.submit(self._store.naming.rename, old, new).result(), then)

    def renamed_by_engine(self, old: FileRef, new: FileRef) -> bool:
        key = (old.name, new.name)
        found = key in self._engine_renames
        self._engine_renames.discard(key)
        return found

    # -- helpers -----------------------------------------------------------------------------------------------

    def _database(self, ref: FileRef) -> Database | None:
        return None if ref.database is None else self._store.get(ref.database)

    def _plain(self, name: str) -> str:
        return os.path.join(self._store.plain_dir, name)

    def _on_worker(self, database: Database, work: Callable[[], object], then: Then) -> None:
        self._store.worker.post(finish, then, work, database=database.name)

    @staticmethod
    def _in_thread(work: Callable[[], object], then: Then) -> None:
        threading.Thread(target=finish, args=(then, work), name="commit", daemon=True).start()


def _busy(database: Database) -> OSError:
    return OSError(errno.EBUSY, f"{database.name}: {database.set_aside_reason or 'busy'}")


def _has_bytes(path: str) -> bool:
    try:
        return os.stat(path).st_size > 0
    except FileNotFoundError:
        return False
