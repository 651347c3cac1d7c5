"""A store for tests of what is above it: its databases are plain SQLite files in a directory."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from pylitefs.engine.tombstones import Tombstone
from pylitefs.events import Event, EventBus
from pylitefs.formats.ltx.format import CHECKSUM_FLAG, Position
from pylitefs.status import NodeInfo, ReplicaInfo

START = Position(1, CHECKSUM_FLAG | 1)
CLUSTER_ID = "LFSC0123456789ABCDEF"


@dataclass
class FakeLog:
    count: int = 3
    size_bytes: int = 4096


@dataclass
class FakeDatabase:
    name: str
    path: Path
    position: Position = START
    timestamp_ms: int = 1_700_000_000_120
    log: FakeLog = field(default_factory=FakeLog)
    journal_mode: str = "wal"
    wal_size_bytes: int = 0
    page_size: int = 4096
    sqlite_version: int = 3_051_003
    set_aside_reason: str | None = None
    withheld: str | None = None
    failing: str | None = None

    @property
    def size_bytes(self) -> int:
        return self.path.stat().st_size

    @property
    def commit(self) -> int:
        return self.size_bytes // self.page_size

    def copy_to(self, path: str) -> Position:
        shutil.copyfile(self.path, path)
        return self.position


class FakeStore:
    """`imported` remembers the bytes of every import."""

    def __init__(self, data_dir: Path, *, is_primary: bool = True) -> None:
        self.data_dir = str(data_dir)
        self.cluster_id: str | None = CLUSTER_ID
        self.events = EventBus()
        self.is_primary = is_primary
        self.primary_hostname: str | None = None if is_primary else "db1"
        self.lag_ms: int | None = None if is_primary else 7
        self.databases: dict[str, FakeDatabase] = {}
        self.tombstones: dict[str, Tombstone] = {}
        self.flushes = 0
        self.flush_result: Future[dict[str, Position]] | None = None
        self.imported: dict[str, bytes] = {}
        self.replicas: list[ReplicaInfo] = []

    def add(self, name: str, rows: int = 3) -> FakeDatabase:
        path = Path(self.data_dir) / name
        make_database(path, rows)
        self.databases[name] = FakeDatabase(name, path)
        return self.databases[name]

    def names(self) -> list[str]:
        return list(self.databases)

    def not_replicated(self) -> dict[str, str]:
        return {}

    def get(self, name: str) -> FakeDatabase | None:
        return self.databases.get(name)

    def tombstone(self, name: str) -> Tombstone | None:
        return self.tombstones.get(name)

    def flush_all(self) -> Future[dict[str, Position]]:
        self.flushes += 1
        if self.flush_result is not None:
            return self.flush_result
        future: Future[dict[str, Position]] = Future()
        future.set_result({name: database.position for name, database in self.databases.items()})
        return future

    def import_database(self, name: str, path: str) -> None:
        self.imported[name] = Path(path).read_bytes()
        target = Path(self.data_dir) / name
        os.replace(path, target)
        self.databases[name] = FakeDatabase(name, target)

    def commit(self, name: str, txid: int) -> None:
        """Tell the bus of a transaction."""
        self.databases[name].position = Position(txid, CHECKSUM_FLAG | txid)
        data = {
            "txid": txid,
            "min_txid": txid,
            "post_apply_checksum": CHECKSUM_FLAG | txid,
            "page_size": 4096,
            "commit": 2,
            "timestamp_ms": 1_700_000_000_120,
            "source": "capture",
            "size_bytes": 500,
            "seconds": 0.0003,
        }
        self.events.emit(Event("tx", name, data))

    def list_replicas(self) -> list[ReplicaInfo]:
        return self.replicas


def make_database(path: Path, rows: int = 3) -> None:
    """A SQLite file in WAL mode, without a WAL beside it."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, word TEXT)")
        connection.executemany("INSERT INTO t VALUES (?, ?)", ((i, f"word {i}" * 20) for i in range(rows)))
        connection.commit()


def node_info(**changes: object) -> NodeInfo:
    values: dict[str, object] = {
        "node_id": "00112233AABBCCDD",
        "version": "9.9",
        "mount_dir": "/litefs",
        "candidate": True,
        "started_s": 0.0,
        "hostname": "db1",
    }
    return NodeInfo(**(values | changes))  # type: ignore[arg-type]
