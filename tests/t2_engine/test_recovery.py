"""Starting after an orderly stop, after a kill, and after anything that may have happened to the files meanwhile."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_nodes import Node, check_log, file_checksum, log_files, make_sqlite, new_primary, replay, rows_of
from sqlite_process import SqliteProcess

from pylitefs.engine.database import Database
from pylitefs.engine.leftovers import is_held_elsewhere
from pylitefs.engine.recovery import Outcome
from pylitefs.formats.sqlite.journal import MAGIC


class Start:
    """A primary that can be stopped in many ways and started again."""

    def __init__(self, folder: Path, mode: str = "WAL") -> None:
        self.folder = folder
        self.node = new_primary(folder, mode=mode)
        self.sql: SqliteProcess | None = None

    @property
    def database(self) -> Database:
        return self.node.database()

    @property
    def path(self) -> Path:
        return Path(self.node.database().files.database)

    def insert(self, count: int = 1, size: int = 3000) -> None:
        if self.sql is None:
            self.sql = SqliteProcess(str(self.path))
            self.sql("PRAGMA wal_autocheckpoint = 0")
        for _ in range(count):
            self.sql("INSERT INTO t (v) VALUES (randomblob(?))", size)

    def rows(self) -> list[tuple[object, ...]]:
        assert self.sql is not None
        return self.sql("SELECT id, v FROM t ORDER BY id")

    def kill(self) -> None:
        """The application and the daemon are killed."""
        if self.sql is not None:
            self.sql.kill()
            self.sql = None
        self.node.close(clean=False)

    def stop(self) -> None:
        """The application closes the database, the daemon stops in order."""
        if self.sql is not None:
            self.sql.close()
            self.sql.stop()
            self.sql = None
            self.node.database().wal.forget_all()
        self.node.close(clean=True)

    def start(self, *, settle: bool = True, is_primary: bool = True) -> str:
        """The outcome ("clean" says nothing, so there is no event for it)."""
        self.node = Node(self.folder, is_primary=is_primary)
        if settle:
            self.node.store.settle()
        outcomes = [event.data["outcome"] for event in self.node.events if event.type == "recovered"]
        return str(outcomes[0]) if outcomes else "clean"

    def check(self, rows: list[tuple[object, ...]] | None = None) -> None:
        """The log says what the file is, and the file alone is the database."""
        database = self.database
        files = database.files
        assert not any(os.path.exists(path) for path in (files.wal, files.shm, files.journal))
        assert database.position.checksum == file_checksum(self.path)
        check_log(database)
        if database.log.first_txid == 1:
            assert replay(database) == self.path.read_bytes()
        if rows is not None:
            assert rows_of(self.path) == rows

    def close(self) -> None:
        if self.sql is not None:
            self.sql.kill()
        self.node.close(clean=False)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    made = Start(tmp_path / "node")
    yield made
    made.close()


def test_an_orderly_stop_is_clean_and_reads_nothing(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    start.insert(3)
    rows = start.rows()
    start.node.flush()
    start.stop()
    monkeypatch.setattr("pylitefs.engine.recovery.load_checksums", lambda database: pytest.fail("it was read"))
    assert start.start() == "clean"
    start.check(rows)
    assert not start.node.store.started_unclean
    start.insert()
    start.node.flush()
    check_log(start.database)


def test_a_database_that_was_touched_while_we_were_stopped(start: Start) -> None:
    start.insert(3)
    start.node.flush()
    position = start.database.position
    start.stop()
    with contextlib.closing(sqlite3.connect(start.path)) as db:
        db.execute("INSERT INTO t (v) VALUES ('meanwhile')")
        db.commit()
    assert start.start() == "differs"
    start.check(rows_of(start.path))
    assert start.database.position.txid == position.txid + 1


@pytest.mark.parametrize("captured", [True, False])
def test_a_kill_with_everything_in_the_wal(start: Start, captured: bool) -> None:
    start.insert(4)
    rows = start.rows()
    if captured:
        start.node.flush()
    start.kill()
    assert start.start() == ("verified" if captured else "differs")
    start.check(rows)
    assert start.database.position.txid == (5 if captured else 2)


def test_a_copy_that_was_looked_at_goes(start: Start) -> None:
    """The daemon was killed while it looked, in a copy, at a database that was written over beside its WAL."""
    start.insert(4)
    start.node.flush()
    folder = Path(start.database.files.folder)
    for suffix in ("", "-wal", "-shm", "-journal"):
        shutil.copyfile(start.path, folder / f"looked-at{suffix}")
    start.kill()
    start.start()
    assert not list(folder.glob("looked-at*"))


def test_an_uncommitted_tail_of_the_wal_is_left_out(start: Start) -> None:
    start.insert(2)
    rows = start.rows()
    start.node.flush()
    assert start.sql is not None
    start.sql("PRAGMA cache_size = 2")
    start.sql("BEGIN")
    start.insert(20)
    start.kill()
    assert start.start() == "verified"
    start.check(rows)


@pytest.mark.parametrize("settled", [0, 2])
def test_a_lost_wal_is_redone_from_the_log(start: Start, settled: int) -> None:
    """A power cut took the WAL (synchronous=NORMAL), the log was written back in time."""
    start.insert(2)
    start.node.flush()
    start.insert(3)
    start.node.flush()
    rows = start.rows()
    start.kill()
    wal = Path(start.database.files.wal)
    os.truncate(wal, 0 if not settled else 32 + settled * 4120)
    (start.folder / "boot").write_text("another boot\n")
    assert start.start() == "redone"
    start.check(rows)
    assert start.database.position.txid == 6


def test_a_torn_log_tail_is_rebuilt_from_the_database(start: Start) -> None:
    start.insert(2)
    start.node.flush()
    start.insert(2)
    start.node.flush()
    rows = start.rows()
    path = Path(start.database.log.entries()[-1].path)
    start.kill()
    path.write_bytes(path.read_bytes()[:-40])
    assert start.start() == "differs"
    assert "corruptLog" in start.node.kinds()
    start.check(rows)
    assert start.database.position.txid == 4


def test_the_difference_alone_is_recorded_where_the_table_survived(start: Start) -> None:
    start.insert(30)
    start.node.flush()
    start.insert(1, 10)
    start.kill()
    assert start.start() == "differs"
    entry = start.database.log.entries()[-1]
    assert entry.size_bytes < 20_000 < start.database.size_bytes
    start.check()


@pytest.mark.parametrize("how", ["gone", "garbage", "flipped", "short"])
def test_the_table_is_a_cache(start: Start, how: str) -> None:
    start.insert(2)
    rows = start.rows()
    start.node.flush()
    start.stop()
    table = Path(start.database.files.checksums)
    data = bytearray(table.read_bytes())
    if how == "gone":
        table.unlink()
    elif how == "garbage":
        table.write_bytes(random.Random(1).randbytes(len(data)))
    elif how == "flipped":
        data[30] ^= 1
        table.write_bytes(data)
    else:
        table.write_bytes(data[:50])
    assert start.start() == "verified"
    start.check(rows)


@pytest.mark.parametrize("mode", ["DELETE", "TRUNCATE", "PERSIST"])
def test_a_hot_journal_is_rolled_back(tmp_path: Path, mode: str) -> None:
    start = Start(tmp_path / "node", "DELETE")
    try:
        start.node.store.note_boot()
        start.insert(3)
        assert start.sql is not None
        start.sql(f"PRAGMA journal_mode = {mode}")
        start.insert(1)
        start.database.rollback.suspect = True
        start.node.store.capture.commit_point(start.database)
        position, rows = start.database.position, start.rows()
        start.sql("PRAGMA cache_size = 2")
        start.sql("BEGIN")
        start.sql("DELETE FROM t WHERE id < 3")
        start.insert(20)
        start.kill()
        assert Path(start.database.files.journal).read_bytes()[:8] == MAGIC
        assert start.start() == "verified"
        assert start.database.position == position
        start.check(rows)
    finally:
        start.close()


def test_a_journal_that_was_finished_is_not_rolled_back(tmp_path: Path) -> None:
    start = Start(tmp_path / "node", "DELETE")
    try:
        assert start.sql is None
        start.insert(1)
        assert start.sql is not None
        start.sql("PRAGMA journal_mode = PERSIST")
        start.insert(2)
        rows = start.rows()
        start.kill()
        assert start.start() == "differs"
        start.check(rows)
    finally:
        start.close()


@pytest.mark.parametrize("super_exists", [True, False])
def test_a_super_journal_decides(tmp_path: Path, super_exists: bool) -> None:
    start = Start(tmp_path / "node", "DELETE")
    try:
        start.insert(3)
        start.database.rollback.suspect = True
        start.node.store.capture.commit_point(start.database)
        assert start.sql is not None
        before = start.rows()
        start.sql("PRAGMA cache_size = 2")
        start.sql("BEGIN")
        start.sql("UPDATE t SET v = 'x'")
        start.insert(20)
        start.sql.kill()
        start.sql = None
        start.node.close(clean=False)
        journal = Path(start.database.files.journal)
        name = b"/somewhere/db-mj0123ABCD"
        journal.write_bytes(
            journal.read_bytes() + name + len(name).to_bytes(4, "big") + sum(name).to_bytes(4, "big") + MAGIC
        )
        if super_exists:
            (start.folder / "files" / "db-mj0123ABCD").write_bytes(b"db-journal\0")
        with contextlib.suppress(sqlite3.DatabaseError):
            start.start()
        assert not journal.exists()
        if super_exists:
            start.check(before)
        else:
            assert start.path.read_bytes()[:16] == b"SQLite format 3\0"
            check_log(start.database)
    finally:
        start.close()


@pytest.mark.parametrize("stopped", ["killed", "in order before that", "in order after that"])
@pytest.mark.parametrize("is_primary", [True, False])
def test_a_missing_database_is_built_from_a_whole_log(start: Start, stopped: str, is_primary: bool) -> None:
    """A stop in order notes how the files are. That there is none does not make an empty database of it."""
    start.insert(3)
    rows = start.rows()
    start.node.flush()
    if stopped == "killed":
        start.kill()
    elif stopped == "in order before that":
        start.stop()
    for path in (start.path, Path(start.database.files.wal), Path(start.database.files.shm)):
        path.unlink(missing_ok=True)
    if stopped == "in order after that":
        start.stop()
    assert start.start(is_primary=is_primary) == "redone"
    start.check(rows)


def test_a_dropped_database_stays_dropped(start: Start) -> None:
    start.insert()
    start.node.flush()
    start.sql.kill()  # type: ignore[union-attr]
    start.sql = None
    start.node.store.naming.drop(start.database)
    start.kill()
    start.start()
    assert not start.database.exists and not start.path.exists()
    assert start.database.position.txid == 3
    make_sqlite(str(start.folder / "files" / "db"), mode="DELETE")
    assert start.node.store.import_plain("db")
    assert start.database.position.txid == 4


@pytest.mark.parametrize("content", [b"", b"not a database" * 100, None])
def test_what_is_not_a_database_is_set_aside(start: Start, content: bytes | None) -> None:
    start.insert()
    start.node.flush()
    start.kill()
    data = start.path.read_bytes()
    for kind in ("wal", "shm"):
        Path(getattr(start.database.files, kind)).unlink()
    bad = content if content is not None else b"SQLite format 4\0" + data[16:]
    start.path.write_bytes(bad)
    other = start.folder / "dbs" / "other" / "database"
    make_sqlite(str(other))
    start.start(settle=False)
    store = start.node.store
    if bad:
        assert store.find("db").set_aside_reason and "setAside" in start.node.kinds()
        assert start.path.read_bytes() == bad, "nothing is changed"
    else:
        start.check()  # an empty file is rebuilt from the log
    store.settle()
    assert store.find("other").position.txid == 1 and store.find("other").set_aside_reason is None


def test_a_file_that_an_old_process_holds_is_not_touched(start: Start) -> None:
    start.insert(3)
    start.node.flush()
    start.node.close(clean=False)
    before = {name: (start.path.parent / name).read_bytes() for name in ("database", "database-wal")}
    assert is_held_elsewhere(str(start.path))
    start.start(settle=False)
    database = start.node.database()
    assert database.position.txid == 4 and database.is_busy
    assert {name: (start.path.parent / name).read_bytes() for name in before} == before
    rows = start.rows()
    assert start.sql is not None
    start.sql.kill()
    start.sql = None
    start.node.close(clean=False)
    assert not is_held_elsewhere(str(start.path))
    assert start.start() == "verified"
    start.check(rows)


def test_a_file_that_the_kernel_is_about_to_let_go_is_waited_for(start: Start) -> None:
    """As after a kill: the mount of the daemon that died holds it, until the mount guard has ended that."""
    start.node.store.note_boot()
    start.insert(3)
    start.node.flush()
    rows = start.rows()
    start.node.close(clean=False)
    sql = start.sql
    assert sql is not None and is_held_elsewhere(str(start.path))
    start.sql = None
    release = threading.Timer(0.3, sql.kill)
    release.start()
    try:
        start.start()
    finally:
        release.join()
    assert "busyAfterCrash" not in start.node.kinds()
    start.check(rows)


def test_a_replica_that_differs_says_so_and_waits(start: Start) -> None:
    start.insert(3)
    start.node.flush()
    start.insert(1)
    rows = start.rows()
    start.kill()
    assert start.start(is_primary=False) == Outcome.DIFFERS.value
    assert start.database.log.head.txid == 4 and start.database.position.txid == 4
    assert start.database.position != start.database.log.head
    assert rows_of(start.path) == rows


def test_recovery_can_be_repeated(start: Start) -> None:
    """Killed at the end of recovery, again and again: nothing changes any more."""
    start.insert(4)
    rows = start.rows()
    start.kill()
    assert start.start() == "differs"
    position = start.database.position
    for _ in range(3):
        start.node.close(clean=False)
        assert start.start() == "verified"
        assert start.database.position == position
        start.check(rows)
    start.stop()
    assert start.start() == "clean"
    assert start.database.position == position and len(log_files(start.database)) == 2


def test_a_copy_of_the_node_starts_like_the_node(start: Start, tmp_path: Path) -> None:
    start.insert(4)
    start.node.flush()
    rows = start.rows()
    shutil.copytree(start.folder, tmp_path / "copy")
    start.kill()
    start.folder = tmp_path / "copy"
    assert start.start() == "verified"
    start.check(rows)
