"""The engine on plain folders, with SQLite beside it. The files are named as SQLite wants them (database,
database-wal, ...), so that SQLite can open them where the engine sees them."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from pylitefs.engine.apply import Apply
from pylitefs.engine.database import Database
from pylitefs.engine.files import SUFFIX_OF, DatabaseFiles
from pylitefs.engine.store import Store, StoreOptions
from pylitefs.events import Event, EventBus
from pylitefs.formats.ltx.checksum import database_checksum, page_checksums
from pylitefs.formats.ltx.decoder import Reader, verify_stream
from pylitefs.formats.ltx.format import Position
from pylitefs.formats.sqlite.header import DatabaseHeader
from pylitefs.ports import FileKind


class NamedFiles(DatabaseFiles):
    """Side files stand beside the database under SQLite's names."""

    def backing(self, kind: FileKind) -> str:
        return os.path.join(self.folder, "database" + SUFFIX_OF[kind])


class NamedStore(Store):
    """A store whose databases have `NamedFiles`."""

    def files_of(self, name: str) -> DatabaseFiles:
        return NamedFiles(name, os.path.join(self.databases_dir, name))


class Node:
    """A store that is loaded. The test's own thread does what the worker does elsewhere: it calls the engine itself. A
    primary's worker runs too, because copies ask it; a replica's does not, so no timer comes in between.
    `events`: all that were emitted."""

    def __init__(self, folder: Path, *, is_primary: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.events: list[Event] = []
        bus = EventBus()
        bus.subscribe(self.events.append)
        self.store = NamedStore(str(folder), bus, StoreOptions(is_primary=is_primary))
        try:
            self.store.load()
        except BaseException:
            self.store.close(clean=False)
            raise
        if is_primary:
            self.store.start()
        self.closed = False

    def kinds(self) -> list[str]:
        return [event.type for event in self.events if event.type != "tx"]

    @property
    def apply(self) -> Apply:
        return self.store.apply

    def database(self, name: str = "db") -> Database:
        return self.store.get_or_create(name)

    def flush(self, name: str = "db") -> Position:
        return self.store.capture.flush(self.database(name))

    def close(self, *, clean: bool = True) -> None:
        if not self.closed:
            self.closed = True
            self.store.close(clean=clean)


def make_sqlite(path: str, *, page_size: int = 4096, mode: str = "WAL", rows: int = 3) -> None:
    """A small closed database with table t."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA page_size = {page_size}")
        db.execute(f"PRAGMA journal_mode = {mode}")
        db.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, v BLOB)")
        db.executemany("INSERT INTO t (v) VALUES (?)", [(bytes(100),)] * rows)
        db.commit()


def new_primary(folder: Path, *, page_size: int = 4096, mode: str = "WAL", rows: int = 3) -> Node:
    """A primary with database "db", in its log as TXID 1."""
    path = folder / "dbs" / "db" / "database"
    make_sqlite(str(path), page_size=page_size, mode=mode, rows=rows)
    node = Node(folder)
    node.store.settle()
    assert node.database().position.txid == 1
    return node


def rows_of(path: str | Path) -> list[tuple[object, ...]]:
    """Table t of a database file that nobody writes to (read beside its WAL, if it has one)."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return db.execute("SELECT id, v FROM t ORDER BY id").fetchall()


def copy_of(node: Node, path: Path, name: str = "db") -> bytes:
    """What SQLite sees in a node's database, byte for byte, as one file."""
    node.database(name).copy_to(str(path))
    return path.read_bytes()


def file_checksum(path: str | Path) -> int:
    """LTX's database checksum of a file, computed anew."""
    data = Path(path).read_bytes()
    header = DatabaseHeader.unpack(data)
    return database_checksum(page_checksums(1, data, header.page_size))


def log_files(database: Database) -> list[str]:
    return sorted(name for name in os.listdir(database.files.ltx) if name.endswith(".ltx"))


def check_log(database: Database) -> None:
    """Every file of the log is whole, they follow one another, and the last one is the position."""
    entries = database.log.entries()
    assert log_files(database) == [os.path.basename(entry.path) for entry in entries]
    previous: Position | None = None
    for entry in entries:
        header, trailer = verify_stream(entry.chunks())
        assert (header.min_txid, header.max_txid) == (entry.min_txid, entry.max_txid)
        if previous is not None:
            assert header.min_txid == previous.txid + 1
            assert header.pre_apply_checksum == previous.checksum
        previous = Position(header.max_txid, trailer.post_apply_checksum)
    if previous is not None:
        assert database.log.head == previous == database.position


def replay(database: Database, base: bytes = b"") -> bytes:
    """The database that the log leads to, starting from `base`."""
    image = bytearray(base)
    for entry in database.log.entries():
        reader = Reader(entry.chunks())
        size = reader.header.page_size
        for pgno, page in reader:
            image[(pgno - 1) * size : pgno * size] = page
            if len(image) < pgno * size:
                image += bytes(pgno * size - len(image))
        del image[reader.header.commit * size :]
    return bytes(image)


@contextlib.contextmanager
def closing_node(node: Node) -> Iterator[Node]:
    try:
        yield node
    finally:
        node.close(clean=False)
