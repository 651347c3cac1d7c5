"""The databases of this node by name, and what all parts of the engine share.

DATA/clusterid           which cluster this node belongs to
DATA/dbs/NAME/           one database, see `files` and `database`
DATA/files/NAME          plain files: local, not replicated
DATA/tombstones          names of databases that were dropped, see `tombstones`
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import secrets
import threading
import time
from dataclasses import dataclass

from pylitefs.engine.apply import Apply
from pylitefs.engine.capture import Capture
from pylitefs.engine.database import Database
from pylitefs.engine.epochs import FIRST, Lines, SeenEpoch
from pylitefs.engine.fence import Fence
from pylitefs.engine.files import DatabaseFiles, Permissions, publish_file
from pylitefs.engine.marker import Marker
from pylitefs.engine.open_files import OpenFiles
from pylitefs.engine.opener import Opener
from pylitefs.engine.plain_files import OneAtATime, PlainWrites
from pylitefs.engine.rollback_capture import is_complete_database, why_unreadable
from pylitefs.engine.services import StoreServices
from pylitefs.engine.tombstones import Tombstone, Tombstones
from pylitefs.engine.worker import Worker
from pylitefs.errors import ClusterMismatch, DatabaseNotFound, FormatError
from pylitefs.events import Event, EventBus
from pylitefs.formats.ltx.format import CHECKSUM_FLAG, Position
from pylitefs.formats.names import problem_of, shown
from pylitefs.ports import CommitGate, LockFiles, Notifier

log = logging.getLogger("litefs.store")

_CLUSTER_ID = re.compile(r"LFSC[0-9A-F]{16}")
DEFAULT_PAGE_SIZE = 4096


@dataclass(frozen=True)
class StoreOptions:
    """`role_from_marker`: the role is not fixed; it starts as a replica, see `marker`. `file_mode`, `uid`, `gid`: what
    database files get. Retention: see `LtxLog.retain`. `scrub_rate`: bytes per second, 0 for no limit."""

    is_primary: bool = True
    role_from_marker: bool = False
    mount_dir: str = "/litefs"
    file_mode: int = 0o666
    uid: int | None = None
    gid: int | None = None
    compress: bool = True
    strict_verify: bool = False
    scrub_interval_s: float = 0.0
    scrub_rate: int = 0
    retention_s: float = 600.0
    retention_interval_s: float = 60.0
    max_log_size_bytes: int = 1 << 30


class Registry:
    """State of the node's engine. `lock` guards `databases`; each database has a lock of its own."""

    def __init__(self, data_dir: str, events: EventBus, options: StoreOptions) -> None:
        self.data_dir = os.path.abspath(data_dir)
        self.events = events
        self.options = options
        self.is_primary = options.is_primary
        self.lock_files: LockFiles | None = None  # what NAME-lock does; None: nothing, on the primary only
        self.gate: CommitGate | None = None  # synchronous replication: what a commit waits for
        self.fence = Fence(math.inf if options.is_primary else 0.0)
        self.marker = Marker(self.data_dir)
        self.worker = Worker()
        self.opener = Opener()
        self.capture = Capture(self.worker, self.opener)
        self.permissions = Permissions(options.file_mode, options.uid, options.gid)
        self.apply = Apply(self.worker, self.opener, self.permissions)
        self.apply.names_wait = lambda: self.captures_any
        self.open_files = OpenFiles()
        self.lock = threading.RLock()
        self.databases: dict[str, Database] = {}
        self.plain_files = OneAtATime()
        self.plain_writes = PlainWrites()
        self._tombstones = Tombstones(self.data_dir)
        self.cluster_id: str | None = None
        self._has_databases = False
        self._not_replicated: dict[str, str] = {}
        self.notifier: Notifier | None = None
        self.mount_dir: str | None = None
        self.passthrough = True
        self._services = StoreServices(self.capture, self.apply)
        self._seen_epoch = SeenEpoch(self.data_dir)
        self._noting = threading.Lock()  # while that is written down
        self._most_replicas = 0

    @property
    def databases_dir(self) -> str:
        return os.path.join(self.data_dir, "dbs")

    @property
    def plain_dir(self) -> str:
        return os.path.join(self.data_dir, "files")

    def plain_path(self, name: str) -> str:
        return os.path.join(self.plain_dir, name)

    # -- names -------------------------------------------------------------------------------------------------

    def is_plain_database(self, name: str) -> bool:
        """Whether a plain file is a whole database that is to be taken over. One that cannot be, because of its name,
        is told of."""
        if not is_complete_database(self.plain_path(name)):
            return False
        problem = problem_of(name)
        if problem is None:
            return True
        self.tell_not_replicated(name, problem)
        return False

    def tell_not_replicated(self, name: str, reason: str) -> None:
        """A plain file is a database, or was meant to be one, and is not replicated. Any thread."""
        if self._not_replicated.get(name) != reason:
            self._not_replicated[name] = reason
            log.error("%s is not replicated: %s", shown(name), reason)
            self.events.emit(Event("notReplicated", name, {"reason": reason}))

    def not_replicated(self) -> dict[str, str]:
        """Plain files in the mount that are databases, or were meant to be, and are not replicated, and why. Any
        thread."""
        for name in list(self._not_replicated):
            path = self.plain_path(name)
            if (problem_of(name) is None or not is_complete_database(path)) and why_unreadable(path) is None:
                self._not_replicated.pop(name, None)
        return dict(self._not_replicated)

    def files_of(self, name: str) -> DatabaseFiles:
        return DatabaseFiles(name, os.path.join(self.databases_dir, name), self.mount_dir, self.passthrough)

    def get(self, name: str) -> Database | None:
        return self.databases.get(name)

    def find(self, name: str) -> Database:
        """As `get`; raises DatabaseNotFound, also for one that was dropped."""
        database = self.known(name)
        if not database.exists:
            raise DatabaseNotFound(name)
        return database

    def known(self, name: str) -> Database:
        """As `find`, but also one that was dropped, and may be made again by a transaction."""
        database = self.databases.get(name)
        if database is None:
            raise DatabaseNotFound(name)
        return database

    def get_or_create(self, name: str) -> Database:
        with self.lock:
            database = self.databases.get(name)
            if database is None:
                if (problem := problem_of(name)) is not None:
                    raise FormatError(f"not a database name: {name[:80]!a}: {problem}")
                database = Database(name, self.files_of(name), self.events)
                database.serve_by(self._services)
                database.captures, database.fence = self.is_primary, self.fence
                database.is_open = lambda: self.notifier is not None and self.notifier.is_open(name)
                database.compress = self.options.compress
                database.begin_empty()
                database.tombstone = self._tombstones.get(name)
                if database.tombstone is not None:
                    database.begin_after(database.tombstone)
                self.databases[name] = database
            return database

    def recall(self, name: str) -> Database | None:
        """As `get`; one of which only a tombstone is left is made again from that. Blocking."""
        with self.lock:
            return self.get_or_create(name) if name in self._tombstones else self.databases.get(name)

    def tombstone(self, name: str) -> Tombstone | None:
        return self._tombstones.get(name)

    def put_tombstones(self, tombstones: dict[str, Tombstone]) -> None:
        """Durable after `keep_tombstones`."""
        self._tombstones.put(tombstones)

    def tombstones(self) -> dict[str, Tombstone]:
        """Of all names that have one; it says nothing where there is a database, also a dropped one. So who asks for
        both asks for the databases first: none is missing then, whatever happens in between."""
        return self._tombstones.copy()

    def note_dropped(self, name: str, position: Position, epochs: Lines) -> bool:
        """There is nothing here of a database that the primary says was dropped: note where it ended; durable after
        `keep_tombstones`. False if there is something, or that is not the position of a drop."""
        with self.lock:
            if name in self.databases or position.checksum != CHECKSUM_FLAG:
                return False
            self._tombstones.put({name: Tombstone(position, epochs)})
            return True

    def keep_tombstones(self) -> None:
        """What is known of dropped names is durable. Blocking. Raises OSError."""
        self._tombstones.save()

    def forget_tombstone(self, name: str) -> None:
        """The primary knows nothing of this name."""
        self._tombstones.put({name: None})

    def forget(self, database: Database) -> None:
        """One that was made by `get_or_create` and came to nothing."""
        with self.lock:
            self.databases.pop(database.name, None)
            database.close(clean=False)
            with contextlib.suppress(OSError):
                os.unlink(database.files.checksums)
            with contextlib.suppress(OSError):  # whatever else is there stays
                os.rmdir(database.files.ltx)
                os.rmdir(database.files.folder)

    def all_names(self) -> list[str]:
        """Every database with a position, also dropped ones."""
        with self.lock:
            return sorted(name for name, database in self.databases.items() if database.position.txid)

    def names(self) -> list[str]:
        with self.lock:
            return sorted(name for name, database in self.databases.items() if database.exists)

    def set_owner(self, path: str) -> None:
        """Permissions of a database file, by `fuse.mode`, `fuse.uid` and `fuse.gid`."""
        self.permissions.give(path)

    @property
    def captures_any(self) -> bool:
        """Whether applications write to something here: their requests about names may wait for the worker."""
        return self.is_primary or any(database.captures for database in list(self.databases.values()))

    # -- the cluster -------------------------------------------------------------------------------------------

    def read_cluster_id(self) -> None:
        """Raises FormatError if the file is damaged."""
        with contextlib.suppress(FileNotFoundError), open(os.path.join(self.data_dir, "clusterid")) as file:
            text = file.read(64).strip()
            if not _CLUSTER_ID.fullmatch(text):
                raise FormatError(
                    f"{self.data_dir}/clusterid does not hold a cluster id (LFSC and 16 hex digits): "
                    "remove it to join anew"
                )
            self.cluster_id = text

    def ensure_cluster_id(self) -> str:
        """The primary makes one up when there is none."""
        if self.cluster_id is None:
            self.adopt_cluster_id(f"LFSC{secrets.token_hex(8).upper()}")
        assert self.cluster_id is not None
        return self.cluster_id

    @property
    def has_databases(self) -> bool:
        """Whether there is any, or was: also one that cannot be opened. Without, the cluster's id binds to nothing."""
        if not self._has_databases and len(self._tombstones):
            self._has_databases = True
        if not self._has_databases:
            with contextlib.suppress(FileNotFoundError), os.scandir(self.databases_dir) as entries:
                self._has_databases = any(True for _ in entries)
        return self._has_databases

    def adopt_cluster_id(self, cluster_id: str) -> None:
        if self.cluster_id == cluster_id:
            return
        if self.cluster_id is not None and self.has_databases:
            raise ClusterMismatch(
                f"this node belongs to cluster {self.cluster_id}, the primary to {cluster_id}: "
                "point lease.advertise-url at the right primary, or give this node an empty data directory"
            )
        if not _CLUSTER_ID.fullmatch(cluster_id):
            raise FormatError(f"not a cluster id: {cluster_id[:40]!r}")
        publish_file(os.path.join(self.data_dir, "clusterid"), f"{cluster_id}\n".encode())
        self.cluster_id = cluster_id

    @property
    def epoch(self) -> int:
        """What this node writes with: the epoch of its lease, or where the role is fixed the one of its start."""
        return self._services.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._services.epoch = epoch

    @property
    def seen_epoch(self) -> int:
        """The highest epoch that this node has followed or written in: an older primary is not followed."""
        epochs = (database.epoch for database in list(self.databases.values()))
        return max([self._seen_epoch.value, self._tombstones.epoch, *epochs])

    def note_epoch(self, epoch: int) -> None:
        """An epoch has begun, and something of it will be done here: durable on return. Blocking. Raises OSError."""
        self._seen_epoch.note(epoch)
        self.epoch = max(epoch, self.epoch)

    def begin_epoch(self, seen: int) -> None:
        """Where no engine counts epochs: one that nobody has seen begins, `seen` or before. It is not told whether this
        node is a copy of what it once was, so it goes by the clock. Blocking."""
        epoch = max(seen + 1, self.epoch + 1, int(time.time()))
        with contextlib.suppress(OSError):  # the disk is full: what is written in it says so, and the next is later
            self._seen_epoch.note(epoch)
        self.epoch = epoch

    def read_epoch(self) -> None:
        """Raises FormatError if the file is damaged."""
        self._seen_epoch.load()
        self.epoch = max(FIRST, self._seen_epoch.value)

    def read_tombstones(self) -> None:
        """Raises OSError."""
        self._tombstones.load()

    def replica_count(self) -> int:
        """How many replicas this primary had at once when it last ran."""
        try:
            with open(os.path.join(self.data_dir, "replicas")) as file:
                return min(int(file.read(16) or 0), 64)
        except (OSError, ValueError):
            return 0

    def note_replicas(self, count: int) -> None:
        """Remember the most replicas of this run: a later unclean start waits for as many. Blocking."""
        with self._noting:
            if count > self._most_replicas:
                self._most_replicas = count
                with contextlib.suppress(OSError):
                    publish_file(os.path.join(self.data_dir, "replicas"), f"{count}\n".encode())
