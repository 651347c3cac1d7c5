"""All databases of this node and its plain files, by name.

    DATA/clusterid           which cluster this node belongs to
    DATA/dbs/NAME/           one database, see `files` and `database`
    DATA/files/NAME          plain files: local, not replicated

A file is born plain. It becomes a database when it turns out to hold one at a commit point, when the handle it was copied through
is closed, or when it is renamed (`import_plain`): content decides, not the name.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from pylitefs.engine import ofd_locks
from pylitefs.engine.apply import Apply, give_back
from pylitefs.engine.capture import Capture
from pylitefs.engine.database import Database
from pylitefs.engine.files import (
    SUFFIX_OF,
    DatabaseFiles,
    new_folder,
    publish_file,
    sync_filesystem,
    sync_folder,
)
from pylitefs.engine.inotify import DirectoryWatch
from pylitefs.engine.opener import Opener
from pylitefs.engine.recovery import (
    Outcome,
    Recovered,
    is_held_elsewhere,
    normalise,
    record_difference,
    recover,
    remove_wal,
)
from pylitefs.engine.rollback_capture import is_complete_database, journal_in_use
from pylitefs.engine.services import StoreServices
from pylitefs.engine.verifier import Verifier
from pylitefs.engine.transaction import Change
from pylitefs.engine.worker import Worker
from pylitefs.errors import ClusterMismatch, DatabaseNotFound, FormatError, LitefsError, PositionMismatch
from pylitefs.events import Event, EventBus
from pylitefs.formats.ltx.format import Position
from pylitefs.formats.sqlite.locks import PENDING, SHARED_SIZE
from pylitefs.ports import SIDE_KINDS, SUFFIXES, FileKind, FileRef, Notifier

log = logging.getLogger("litefs.store")

_CLUSTER_ID = re.compile(r"LFSC[0-9A-F]{16}")
_DEFAULT_PAGE_SIZE = 4096
_BUSY_RETRY_S = 0.5
_WATCH_PAUSE_S = 0.001
_PLAIN_SETTLE_S = 0.2
_HIDDEN_SETTLE_S = 5.0  # rsync and others write `.NAME.XXXXXX` first, and rename it


@dataclass(frozen=True)
class StoreOptions:
    """`file_mode`, `uid`, `gid`: what database files get. Retention: see `LtxLog.retain`."""

    is_primary: bool = True
    mount_dir: str = "/litefs"
    file_mode: int = 0o666
    uid: int | None = None
    gid: int | None = None
    compress: bool = True
    strict_verify: bool = False
    retention_s: float = 600.0
    retention_interval_s: float = 60.0
    max_log_size_bytes: int = 1 << 30


class Store:
    def __init__(self, data_dir: str, events: EventBus, options: StoreOptions) -> None:
        self.data_dir = os.path.abspath(data_dir)
        self.events = events
        self.options = options
        self.worker = Worker()
        self.opener = Opener()
        self.capture = Capture(self.worker, self.opener)
        self.apply = Apply(self.worker, self.opener, options.file_mode)
        self._services = StoreServices(self.capture, self.apply, captures=options.is_primary)
        self._unsettled: dict[str, Recovered] = {}
        self.started_unclean = False
        self._same_boot = False
        self._boot = ""
        self._most_replicas = 0
        self.lock = threading.RLock()
        self.is_primary = options.is_primary
        self.primary_hostname: str | None = None
        self.lag_ms: int | None = None
        self.cluster_id: str | None = None
        self.notifier: Notifier | None = None
        self._mount_dir: str | None = None
        self._passthrough = True
        self._watch: DirectoryWatch | None = None
        self._settling: set[str] = set()
        self._databases: dict[str, Database] = {}

    # -- start -----------------------------------------------------------------------------------------------

    @property
    def databases_dir(self) -> str:
        return os.path.join(self.data_dir, "dbs")

    @property
    def plain_dir(self) -> str:
        return os.path.join(self.data_dir, "files")

    def prepare(self) -> list[str]:
        """Make the folders, read the cluster id; returns the names of the databases that are there."""
        for folder in (self.databases_dir, self.plain_dir):
            os.makedirs(folder, exist_ok=True)
        with contextlib.suppress(FileNotFoundError), open(os.path.join(self.data_dir, "clusterid")) as file:
            text = file.read(64).strip()
            if not _CLUSTER_ID.fullmatch(text):
                raise FormatError(
                    f"{self.data_dir}/clusterid does not hold a cluster id (LFSC and 16 hex digits): remove it to join anew"
                )
            self.cluster_id = text
        for leftover in os.scandir(self.data_dir):
            if leftover.name.endswith(".tmp"):
                os.unlink(leftover.path)
        self._read_boot()
        self._finish_promotions()
        return sorted(item.name for item in os.scandir(self.databases_dir) if item.is_dir())

    def _read_boot(self) -> None:
        """Find out whether the machine was restarted since this node last ran (then unsynced writes may be lost)."""
        with open("/proc/sys/kernel/random/boot_id") as file:
            self._boot = file.read().strip()
        with contextlib.suppress(FileNotFoundError), open(os.path.join(self.data_dir, "boot")) as file:
            self._same_boot = file.read(64).strip() == self._boot

    def note_boot(self) -> None:
        """All databases are recovered: from now on only what this boot writes counts."""
        if not self._same_boot:
            publish_file(os.path.join(self.data_dir, "boot"), f"{self._boot}\n".encode())
            self._same_boot = True

    def _finish_promotions(self) -> None:
        """Plain files that are databases: their import was cut off by a crash. Side files go with their database."""
        for name in sorted(os.listdir(self.plain_dir)):
            if self.options.is_primary and is_complete_database(self._plain(name)) and self._is_name(name):
                self._move_to_database(name)
        for name in os.listdir(self.plain_dir):
            for suffix, kind in SUFFIXES.items():
                base = name[: -len(suffix)]
                folder = os.path.join(self.databases_dir, base)
                if kind in SIDE_KINDS and name.endswith(suffix) and base and os.path.isfile(os.path.join(folder, "database")):
                    os.rename(self._plain(name), os.path.join(folder, kind.value))

    def load(self) -> None:
        """Recover every database (see `recovery`). Nothing is mounted yet. One that cannot be read is set aside."""
        for name in self.prepare():
            if self._is_name(name):
                self._load_one(self.get_or_create(name))
            else:
                log.warning("%s: not a name for a database, left alone", os.path.join(self.databases_dir, name))

    def _load_one(self, database: Database) -> bool:
        """True unless an old process still holds its files."""
        database.set_aside_reason = None
        try:
            found = recover(database, super_journal_dirs=[self.plain_dir], same_boot=self._same_boot)
        except (FormatError, OSError) as error:
            database.set_aside_reason = str(error)
            database.page_size, database.commit = database.page_size or _DEFAULT_PAGE_SIZE, max(1, database.commit)
            log.error("%s: set aside, read-only: %s", database.name, error)
            database.emit("setAside", reason=str(error))
            return True
        for path in found.dropped:
            database.emit("corruptLog", path=path)
        if found.outcome is Outcome.BUSY:
            database.page_size, database.commit = _DEFAULT_PAGE_SIZE, 1  # it exists, and may not be created anew
            if not database.is_busy:
                database.is_busy = True
                who = holders(os.path.join(self.options.mount_dir, database.name))
                database.emit("busyAfterCrash", reason=f"held open through a mount whose litefs died: restart {who}")
            database.set_aside_reason = "still open in a process of an earlier mount"
            return False
        if found.outcome not in (Outcome.CLEAN, Outcome.EMPTY):
            self.started_unclean = True
            database.emit("recovered", outcome=found.outcome.value, txid=database.position.txid)
        if found.outcome is Outcome.DIFFERS and self.is_primary:
            self._unsettled[database.name] = found
        return True

    def _retry_busy(self) -> None:
        """Databases that an old process held: recover them once it has let go. On the worker."""
        waiting = [database for database in self._databases.values() if database.is_busy]
        for database in waiting:
            if self._load_one(database):
                self.settle()
                database.is_busy = False
                if self.notifier is not None:
                    for suffix in SUFFIX_OF.values():
                        self.notifier.invalidate_entry(database.name + suffix)
                database.emit("recovered", outcome="released", txid=database.position.txid)
        if any(database.is_busy for database in waiting):
            self.worker.call_later(_BUSY_RETRY_S, self._retry_busy)

    def settle(self) -> None:
        """Primary: nobody gives anything back any more; what the files hold is recorded as it is."""
        for name, found in self._unsettled.items():
            database = self._databases[name]
            try:
                if os.path.exists(database.files.database):
                    record_difference(database, found.previous)
                else:
                    self._record_missing(database)
                remove_wal(database.files)
            except (LitefsError, OSError) as error:
                database.set_aside_reason = str(error)
                database.emit("setAside", reason=str(error))
        self._unsettled.clear()

    def _record_missing(self, database: Database) -> None:
        """The file is gone, and the log does not hold all of it: it was removed."""
        database.position, database.commit = database.log.head, 0
        self._record_drop(database)
        database.emit("lost", reason="the database file was missing at the start", folder=database.files.ltx)

    def give_back(self, name: str, data: bytes | str) -> Position:
        """Primary, before it takes writes: a transaction it had lost (an LTX file, or the path of one)."""
        database = self.find(name)
        path = database.log.temporary()
        if isinstance(data, bytes):
            with open(path, "wb") as file:
                file.write(data)
        else:
            shutil.copyfile(data, path)
        try:
            found = self._unsettled.get(name)
            position = give_back(database, path, found.wal_end if found is not None else None)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        self._unsettled.pop(name, None)
        remove_wal(database.files)
        return position

    def adopt_txid(self, name: str, position: Position) -> Position:
        """Primary, before it takes writes: a replica has exactly this content at a higher TXID; take that over."""
        database = self.find(name)
        if database.position.checksum != position.checksum or database.log.head.txid >= position.txid:
            raise PositionMismatch(f"{name}: {position} is not the state here, {database.position}")
        if name in self._unsettled:
            record_difference(database, self._unsettled.pop(name).previous, position.txid)
        return database.position

    def replica_count(self) -> int:
        """How many replicas this primary had at once when it last ran."""
        try:
            with open(os.path.join(self.data_dir, "replicas")) as file:
                return min(int(file.read(16) or 0), 64)
        except (OSError, ValueError):
            return 0

    def note_replicas(self, count: int) -> None:
        """Remember the most replicas of this run: a later unclean start waits for as many."""
        if count > self._most_replicas:
            self._most_replicas = count
            with contextlib.suppress(OSError):
                publish_file(os.path.join(self.data_dir, "replicas"), f"{count}\n".encode())

    def ensure_cluster_id(self) -> str:
        """The primary makes one up when there is none."""
        if self.cluster_id is None:
            self.adopt_cluster_id(f"LFSC{secrets.token_hex(8).upper()}")
        assert self.cluster_id is not None
        return self.cluster_id

    def adopt_cluster_id(self, cluster_id: str) -> None:
        if self.cluster_id == cluster_id:
            return
        if self.cluster_id is not None:
            raise ClusterMismatch(
                f"this node belongs to cluster {self.cluster_id}, the primary to {cluster_id}: "
                "point lease.advertise-url at the right primary, or give this node an empty data directory"
            )
        if not _CLUSTER_ID.fullmatch(cluster_id):
            raise FormatError(f"not a cluster id: {cluster_id[:40]!r}")
        publish_file(os.path.join(self.data_dir, "clusterid"), f"{cluster_id}\n".encode())
        self.cluster_id = cluster_id

    def mounted(self, mount_dir: str, passthrough: bool, notifier: Notifier) -> None:
        """From now on applications see the files under `mount_dir`."""
        self._mount_dir, self._passthrough, self.notifier = mount_dir, passthrough, notifier
        self.apply.notifier = notifier
        with self.lock:
            for database in self._databases.values():
                database.set_files(self._files(database.name))
        if self.is_primary:
            self._watch = DirectoryWatch(mount_dir)
            self.worker.watch(self._watch.fd, self._written)

    def _written(self) -> None:
        """Files of the mount were written to: look at the WALs among them."""
        assert self._watch is not None
        names = self._watch.read()
        # A busy writer would wake us for every write: look away for a moment, events are kept meanwhile.
        self.worker.unwatch(self._watch.fd)
        self.worker.call_later(_WATCH_PAUSE_S, self._watch_again)
        if names is None:
            names = {name + "-wal" for name in self.names()}
        for name in names:
            if name.endswith("-wal"):
                database = self._databases.get(name[:-4])
                if database is not None and database.exists:
                    self.capture.wake(database)
            else:
                base = name.removesuffix("-journal")
                database = self._databases.get(base)
                if database is not None and self.capture.has_unseen_writes(database):
                    self.capture.wake_rollback(database)
                elif (database is None or not database.exists) and self.is_plain_database(base):
                    self._wake_plain(base)

    def _watch_again(self) -> None:
        if self._watch is not None:
            self.worker.watch(self._watch.fd, self._written)

    def _wake_plain(self, name: str) -> None:
        """A plain file that holds a database is being written, and no journal tells of its commits."""
        if name not in self._settling:
            self._settling.add(name)
            delay_s = _HIDDEN_SETTLE_S if name.startswith(".") else _PLAIN_SETTLE_S
            self.worker.call_later(delay_s, self._open_plain, name)

    def _open_plain(self, name: str) -> None:
        self._settling.discard(name)

        def opened(fds: list[int] | None) -> None:
            if fds is not None:
                if not ofd_locks.any_locked(fds[0], PENDING, SHARED_SIZE + 2) and not journal_in_use(
                    self._plain(name + "-journal")
                ):
                    threading.Thread(target=self.import_plain, args=(name,), name="import", daemon=True).start()
                self.opener.close(fds)

        if self._mount_dir is not None and self.is_plain_database(name):
            self.opener.open([os.path.join(self._mount_dir, name)], os.O_RDONLY, opened)

    def unmounted(self) -> None:
        self._mount_dir, self.notifier, self.apply.notifier = None, None, None
        with self.lock:
            for database in self._databases.values():
                database.set_files(self._files(database.name))

    # -- databases -------------------------------------------------------------------------------------------

    def _files(self, name: str) -> DatabaseFiles:
        return DatabaseFiles(name, os.path.join(self.databases_dir, name), self._mount_dir, self._passthrough)

    def get(self, name: str) -> Database | None:
        return self._databases.get(name)

    def find(self, name: str) -> Database:
        """As `get`; raises DatabaseNotFound, also for one that was dropped."""
        database = self._databases.get(name)
        if database is None or not database.exists:
            raise DatabaseNotFound(name)
        return database

    def get_or_create(self, name: str) -> Database:
        with self.lock:
            database = self._databases.get(name)
            if database is None:
                if not self._is_name(name):
                    raise FormatError(f"not a database name: {name[:80]!r}")
                database = Database(name, self._files(name), self.events)
                database.serve_by(self._services)
                database.compress = self.options.compress
                database.begin_empty()
                self._databases[name] = database
            return database

    @staticmethod
    def _is_name(name: str) -> bool:
        return (
            0 < len(os.fsencode(name)) <= 255 - len("-journal")
            and name not in (".", "..", ".primary", ".lag")
            and not any(c == "/" or ord(c) < 32 for c in name)
            and not name.endswith(tuple(SUFFIXES))
        )

    def all_names(self) -> list[str]:
        """Every database with a position, also dropped ones."""
        with self.lock:
            return sorted(name for name, database in self._databases.items() if database.position.txid)

    def names(self) -> list[str]:
        with self.lock:
            return sorted(name for name, database in self._databases.items() if database.exists)

    def flush(self, database: Database) -> Future[Position]:
        """The position after everything that was committed before the call."""
        if not self.is_primary:
            done: Future[Position] = Future()
            done.set_result(database.position)
            return done
        return self.capture.flush_later(database)

    def flush_all(self) -> Future[dict[str, Position]]:
        """The positions of all databases, each a barrier. One whose log cannot be written keeps the position it has."""
        names = self.all_names()
        result: Future[dict[str, Position]] = Future()
        found: dict[str, Position] = {}
        lock = threading.Lock()

        def done(name: str, position: Future[Position]) -> None:
            database = self._databases.get(name)
            with lock:
                failed = position.exception() is not None
                found[name] = (database.position if database else Position(0, 0)) if failed else position.result()
                if len(found) == len(names):
                    result.set_result(dict(found))

        if not names:
            result.set_result({})
        for name in names:
            self.flush(self._databases[name]).add_done_callback(partial(done, name))
        return result

    # -- plain files become databases, databases go --------------------------------------------------------------

    def _plain(self, name: str) -> str:
        return os.path.join(self.plain_dir, name)

    def is_plain_database(self, name: str) -> bool:
        return self._is_name(name) and is_complete_database(self._plain(name))

    def import_plain(self, name: str, *, leave_journal: bool = False) -> bool:
        """A plain file of this name is a whole database: take it over as one. Any thread. False if it is not one."""
        with self.lock:
            if not self.is_plain_database(name):
                return False
            self._move_to_database(name, leave_journal=leave_journal)
            database = self.get_or_create(name)
        with database.lock:
            database.rollback.suspect = True
            self.capture.commit_point(database, "import")
        self.worker.post(self.capture.wake, database, database=name)  # it may have a WAL
        self._tell_renamed(name)
        return True

    def _tell_renamed(self, name: str) -> None:
        if self.notifier is not None:
            for suffix in SUFFIX_OF.values():
                self.notifier.renamed_backing(name + suffix)
            self.notifier.invalidate_entry(name + "-pos")

    def _move_to_database(self, name: str, *, leave_journal: bool = False) -> None:
        folder = os.path.join(self.databases_dir, name)
        os.makedirs(os.path.join(folder, "ltx"), exist_ok=True)
        for kind, suffix in SUFFIX_OF.items():
            if kind is FileKind.JOURNAL and leave_journal:
                continue
            with contextlib.suppress(FileNotFoundError):
                os.rename(self._plain(name + suffix), os.path.join(folder, kind.value))
        self.set_owner(os.path.join(folder, "database"))
        sync_folder(folder)

    def set_owner(self, path: str) -> None:
        """Permissions of a database file, by `fuse.mode`, `fuse.uid` and `fuse.gid`."""
        with contextlib.suppress(OSError):
            os.chmod(path, self.options.file_mode)
            if self.options.uid is not None or self.options.gid is not None:
                os.chown(path, -1 if self.options.uid is None else self.options.uid,
                         -1 if self.options.gid is None else self.options.gid)  # fmt: skip

    def drop(self, database: Database) -> None:
        """The database was removed: note it in the log, remove its files. On the worker, flushed before."""
        with database.lock:
            if not database.exists:
                return
            self._record_drop(database)
            self._clear_live(database)
        database.emit("drop", txid=database.position.txid)

    def _record_drop(self, database: Database) -> None:
        """Durable before any file goes: a power cut must not leave a log that knows nothing of it."""
        change = Change(database.page_size or _DEFAULT_PAGE_SIZE, 0)
        try:
            database.record(change, [], lambda pgno: b"", lambda: True, "drop")
        except OSError:
            database.log.retain(0.0, 1)  # a full disk: removing a database must be possible all the same
            database.record(change, [], lambda pgno: b"", lambda: True, "drop")
        database.sync_log()

    def _clear_live(self, database: Database) -> None:
        self.capture.forget(database)
        self.capture.forget_files(database)
        database.rollback.clear()
        database.remove_live_files()
        sync_folder(database.files.folder)
        if self.notifier is not None:
            for suffix in ("", "-wal", "-shm", "-journal"):
                self.notifier.forget_file(database.name + suffix)
            self.notifier.invalidate_entry(database.name + "-pos")

    def rename(self, old: FileRef, new: FileRef) -> None:
        """A rename in which a database takes part. On the worker."""
        target = self._databases.get(new.name)
        if old.kind is FileKind.DATABASE:
            self._rename_database(self.find(old.name), new.name)
            return
        if target is not None and target.exists:
            self.capture.flush(target)
            if not self.is_plain_database(old.name):
                self.drop(target)
                os.rename(self._plain(old.name), self._plain(new.name))
                return
            self._replace_content(target, self._plain(old.name))
            return
        os.rename(self._plain(old.name), self._plain(new.name))
        self.import_plain(new.name)

    def _replace_content(self, database: Database, path: str) -> None:
        """Another database file takes the place of this one; what was committed in its WAL is in the log already."""
        with database.lock:
            self.capture.forget_files(database)
            for kind in (FileKind.SHM, FileKind.WAL, FileKind.JOURNAL):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(database.files.backing(kind))
                if self.notifier is not None:
                    self.notifier.forget_file(database.name + SUFFIX_OF[kind])
            os.rename(path, database.files.database)
            self.set_owner(database.files.database)
            database.rollback.suspect = True
            self.capture.commit_point(database, "import")

    def _rename_database(self, source: Database, name: str) -> None:
        self.capture.flush(source)
        target = self.get_or_create(name)
        if target.exists:
            self.capture.flush(target)
        with source.lock, target.lock:
            self.capture.forget_files(source)
            self.capture.forget_files(target)
            self._record_drop(source)
            target.remove_live_files()
            for kind in SUFFIX_OF:
                with contextlib.suppress(FileNotFoundError):
                    os.rename(source.files.backing(kind), target.files.backing(kind))
            source.rollback.clear()
            target.rollback.suspect = True
            self.capture.commit_point(target, "import")
        self.capture.flush(target)  # what its WAL has on top of the file
        source.emit("drop", txid=source.position.txid)

    def set_aside(self, name: str, reason: str) -> None:
        """Keep a database that the primary does not know out of the way: its files go to lost/. On the worker."""
        with self.lock:
            database = self._databases.get(name)
            if database is None:
                return
            folder = new_folder(database.files.lost)
            self.apply.let_go(database)
            database.close(clean=False)
            for item in ("database", "wal", "journal", "ltx"):
                with contextlib.suppress(FileNotFoundError):
                    shutil.move(os.path.join(database.files.folder, item), os.path.join(folder, item))
            del self._databases[name]
            if self.notifier is not None:
                for suffix in ("", "-wal", "-shm", "-journal"):
                    self.notifier.forget_file(name + suffix)
        self.events.emit(Event("lost", name, {"reason": reason, "folder": folder}))

    # -- state for others --------------------------------------------------------------------------------------

    def set_primary_info(self, hostname: str | None) -> None:
        changed = hostname != self.primary_hostname
        self.primary_hostname = hostname
        if changed:
            self.events.emit(Event("primaryChange", None, {"is_primary": self.is_primary, "hostname": hostname}))
            if self.notifier is not None:
                self.notifier.invalidate_entry(".primary")

    def set_lag_ms(self, lag_ms: int | None) -> None:
        self.lag_ms = lag_ms

    # -- upkeep ------------------------------------------------------------------------------------------------

    def start_upkeep(self) -> None:
        """Begin what is done now and then: retention, and waiting for files that old processes hold."""
        if self.options.retention_interval_s > 0:
            self.worker.post(self.worker.call_later, self.options.retention_interval_s, self._retain)
        self.worker.post(self._retry_busy)
        if self.options.strict_verify:
            Verifier(self).start()

    def _retain(self) -> None:
        for database in list(self._databases.values()):
            with contextlib.suppress(OSError):
                database.log.retain(max(0.0, self.options.retention_s), self.options.max_log_size_bytes)
        self.worker.call_later(self.options.retention_interval_s, self._retain)

    def start(self) -> None:
        """Start the worker and its helper."""
        self.worker.start()
        self.opener.start()

    def rest_all(self) -> None:
        """Replica, before unmounting: leave every database as one file where no reader needs more. On the worker."""
        for database in list(self._databases.values()):
            with contextlib.suppress(OSError):
                if not self.apply.rest(database) and database.replica is not None:
                    database.replica.close(remove=False)
                    database.replica = None

    def close(self, *, clean: bool) -> None:
        """Stop the worker and release all databases. `clean`: nobody can write to them any more."""
        self.worker.stop()
        self.opener.stop()
        orderly = {}
        for database in self._databases.values():
            with contextlib.suppress(OSError, LitefsError):
                orderly[database.name] = clean and self._leave_in_order(database)
        sync_filesystem(self.data_dir)  # a table that says "clean" must not outlive what it describes
        for database in self._databases.values():
            with contextlib.suppress(OSError):
                database.close(clean=orderly.get(database.name, False))

    def _leave_in_order(self, database: Database) -> bool:
        """Nothing is mounted any more. Capture what is not in the log yet, from the files themselves (an application that
        was cut off may have committed to the WAL without telling the wal-index), and leave one plain file. True if the
        log and the file are now the same state for certain."""
        files = database.files
        if database.is_busy or database.set_aside_reason is not None:
            return False
        if any(is_held_elsewhere(files.backing(kind)) for kind in (FileKind.DATABASE, FileKind.WAL, FileKind.SHM)):
            return False
        self.capture.forget_files(database)
        if self.is_primary:
            if database.rollback.pending and not journal_in_use(files.journal):
                self.capture.commit_point(database)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(files.shm)
            self.capture.flush(database)
            normalise(files, [self.plain_dir])
            remove_wal(files)
        return database.failing is None and not os.path.exists(files.wal) and not journal_in_use(files.journal)


def holders(path: str) -> str:
    """Processes that have a database of the mount open, for a person: "PID (COMMAND), …"."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if int(pid) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            links = (os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd"))
            if any(link.removesuffix("-wal").removesuffix("-shm") == path for link in links):
                with open(f"/proc/{pid}/comm") as file:
                    found.append(f"{pid} ({file.read().strip()})")
    return ", ".join(found) or "the programs that use it"
