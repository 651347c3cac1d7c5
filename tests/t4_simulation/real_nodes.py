"""Nodes with the real engine, without a mount: SQLite writes straight into the primary's files."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

from pylitefs.engine.store import Store, StoreOptions
from pylitefs.events import EventBus


def open_store(folder: Path, *, is_primary: bool) -> Store:
    folder.mkdir(exist_ok=True)
    store = Store(str(folder), EventBus(), StoreOptions(is_primary=is_primary))
    store.load()
    if is_primary:
        store.ensure_cluster_id()
    store.start()
    return store


class Application:
    """Writes a database of the primary with SQLite, straight into its file; every transaction is captured by diff."""

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name = store, name
        path = os.path.join(store.plain_dir, name)
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, v BLOB)")
            db.commit()
        assert store.import_plain(name)
        self.database = store.find(name)

    def run(self, sql: str, *values: object) -> None:
        with self.database.lock:
            with contextlib.closing(sqlite3.connect(self.database.files.database)) as db:
                db.execute("PRAGMA journal_mode = MEMORY")
                db.execute(sql, values)
                db.commit()
            self.database.rollback.suspect = True
            self.store.capture.commit_point(self.database)

    def insert(self, size: int = 50) -> None:
        self.run("INSERT INTO t (v) VALUES (randomblob(?))", size)
