"""Files that a real SQLite wrote, and what the tests of `formats.sqlite` need around them."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

from pylitefs.formats.sqlite import wal_index
from pylitefs.formats.sqlite.header import valid_page_size

PAGE_SIZES = [512, 1024, 4096, 65536]
ALL_PAGE_SIZES = [size for size in range(512, 65537, 512) if valid_page_size(size)]


def connect(path: Path, page_size: int = 4096, journal_mode: str = "wal") -> sqlite3.Connection:
    """An autocommit connection that never checkpoints by itself."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute(f"PRAGMA page_size={page_size}")
    db.execute(f"PRAGMA journal_mode={journal_mode}")
    db.execute("PRAGMA wal_autocheckpoint=0")
    db.execute("PRAGMA synchronous=OFF")
    return db


def fill(db: sqlite3.Connection, transactions: int, rows: int = 1, size: int = 300) -> None:
    """Commits that insert and overwrite rows of table t, with an index, so that pages repeat in the WAL."""
    db.execute("CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, a, b)")
    db.execute("CREATE INDEX IF NOT EXISTS ta ON t(a)")
    for i in range(transactions):
        db.execute("BEGIN")
        for _ in range(rows):
            db.execute("INSERT INTO t(a, b) VALUES (abs(random() % 1000), randomblob(?))", (size,))
        db.execute("UPDATE t SET a = a + 1 WHERE id = ?", (i // 2,))
        db.execute("COMMIT")


def sidecar(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def copy_database(path: Path, folder: Path, suffixes: tuple[str, ...]) -> Path:
    """Copy a database and those of its files that exist."""
    folder.mkdir(exist_ok=True)
    target = folder / path.name
    for suffix in ("", *suffixes):
        target.with_name(path.name + suffix).unlink(missing_ok=True)
        if sidecar(path, suffix).exists():
            shutil.copyfile(sidecar(path, suffix), sidecar(target, suffix))
    return target


def recovered_header(path: Path) -> wal_index.WalIndexHeader:
    """What SQLite's own recovery of the WAL of `path` (no -shm) finds."""
    db = sqlite3.connect(path)
    try:
        db.execute("PRAGMA wal_autocheckpoint=0")
        db.execute("BEGIN")
        db.execute("SELECT count(*) FROM sqlite_master").fetchall()
        header = wal_index.read_header(sidecar(path, "-shm").read_bytes())
        db.execute("ROLLBACK")
    finally:
        db.close()
    assert header is not None
    return header


READER = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=0)
db.execute("PRAGMA wal_autocheckpoint=0")
for line in sys.stdin:
    try:
        print(repr(db.execute(line).fetchall()), flush=True)
    except sqlite3.Error as error:
        print(repr(f"{type(error).__name__}: {error}"), flush=True)
"""


class Reader:
    """A connection in a process of its own, so that its POSIX locks are not dropped by our closing of files."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", READER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, sql: str) -> object:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(sql + "\n")
        self.process.stdin.flush()
        return eval(self.process.stdout.readline(), {"__builtins__": {}})

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()
