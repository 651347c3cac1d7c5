"""Copies of a database in a rollback mode whose file holds pages of a transaction that is not committed: SQLite writes
them early when its cache is full. Nothing is damaged then, and the copy waits."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_nodes import Node, file_checksum, new_primary, rows_of
from sqlite_process import SqliteProcess

from pylitefs.engine import snapshot
from pylitefs.errors import DatabaseBusy

MODES = ("DELETE", "TRUNCATE", "PERSIST", "MEMORY", "OFF")


class Spilled:
    """A primary whose application is in the middle of a transaction; the database file has a part of it."""

    def __init__(self, folder: Path, mode: str) -> None:
        self.folder = folder
        self.node: Node = new_primary(folder / "node", page_size=1024, mode="DELETE", rows=300)
        self.database = self.node.database()
        self.sql = SqliteProcess(self.database.files.database)
        self.before = rows_of(self.database.files.database)
        content = Path(self.database.files.database).read_bytes()
        self.sql(f"PRAGMA journal_mode = {mode}")
        self.sql("PRAGMA cache_size = 5")
        self.sql("BEGIN")
        self.sql("UPDATE t SET v = randomblob(100)")
        assert Path(self.database.files.database).read_bytes() != content, "nothing was written early"
        self.database.rollback.note(0, self.database.size_bytes)  # as the mount does at each write

    def end(self, how: str) -> None:
        """What the application's COMMIT or ROLLBACK comes to, with the mount's hook."""
        self.sql(how)
        self.node.store.capture.commit_point(self.database)

    def copy(self) -> Path:
        path = self.folder / "copy"
        self.database.copy_to(str(path))
        return path

    def close(self) -> None:
        self.sql.kill()
        self.node.close(clean=False)


@pytest.fixture(params=MODES)
def spilled(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Spilled]:
    with contextlib.closing(Spilled(tmp_path, request.param)) as made:
        made.mode = request.param  # type: ignore[attr-defined]
        yield made


@pytest.mark.parametrize("how", ["COMMIT", "ROLLBACK"])
def test_a_copy_waits_for_the_transaction(spilled: Spilled, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "ROLLBACK" and spilled.mode == "OFF":  # type: ignore[attr-defined]
        pytest.skip("without a journal there is none")
    looked = threading.Event()
    busy = snapshot.SnapshotReader._is_being_written

    def look(reader: snapshot.SnapshotReader) -> bool:
        looked.set()
        return busy(reader)

    monkeypatch.setattr(snapshot.SnapshotReader, "_is_being_written", look)
    copies: list[Path] = []
    copying = threading.Thread(target=lambda: copies.append(spilled.copy()))
    copying.start()
    assert looked.wait(20), "the copy did not meet the transaction's pages"
    assert copying.is_alive()
    spilled.end(how)
    copying.join(20)
    assert copies, "there is no copy"
    rows = rows_of(copies[0])
    assert rows == spilled.sql("SELECT id, v FROM t ORDER BY id")
    assert (rows == spilled.before) == (how == "ROLLBACK")
    assert file_checksum(copies[0]) == spilled.database.position.checksum


def test_a_copy_does_not_wait_for_ever(spilled: Spilled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "COPY_WAIT_S", 0.2)
    monkeypatch.setattr(snapshot, "CHUNK_WAIT_S", 0.1)
    with pytest.raises(DatabaseBusy, match="a transaction that is not committed"):
        spilled.copy()
    spilled.end("COMMIT")
    assert rows_of(spilled.copy()) == spilled.sql("SELECT id, v FROM t ORDER BY id")


def test_a_chunk_that_was_busy_is_read_again(spilled: Spilled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "CHUNK_WAIT_S", 0.05)
    monkeypatch.setattr(snapshot, "CHUNK_BYTES", 4096)
    with contextlib.closing(spilled.database.snapshot(None)) as reader:
        for _ in range(2):
            with pytest.raises(DatabaseBusy):
                while reader.next_chunk() is not None:
                    pass
        spilled.end("COMMIT")
        while reader.next_chunk() is not None:
            pass


def test_what_a_killed_process_left_is_not_taken_for_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its journal is hot: the next connection rolls back. Nobody holds a lock meanwhile."""
    monkeypatch.setattr(snapshot, "COPY_WAIT_S", 0.2)
    monkeypatch.setattr(snapshot, "CHUNK_WAIT_S", 0.1)
    with contextlib.closing(Spilled(tmp_path, "DELETE")) as made:
        made.sql.kill()
        with pytest.raises(DatabaseBusy, match="a transaction that is not committed"):
            made.copy()
        with contextlib.closing(sqlite3.connect(made.database.files.database)) as db:
            assert db.execute("SELECT count(*) FROM t").fetchone() == (300,)
        made.node.store.capture.commit_point(made.database)
        assert rows_of(made.copy()) == made.before


@pytest.mark.parametrize("mode", ["WAL", "DELETE", "MEMORY"])
@pytest.mark.parametrize("page_size", [512, 4096, 65536])
def test_pages_that_were_allocated_and_never_written(tmp_path: Path, mode: str, page_size: int) -> None:
    """A page that is freed in the transaction that allocated it: SQLite writes neither the page nor, in WAL mode, a
    frame; the file is shorter than the database, or has a hole there."""
    node = new_primary(tmp_path / "node", page_size=page_size, mode=mode)
    database = node.database()
    sql = SqliteProcess(database.files.database)

    def commit() -> None:
        sql("COMMIT")
        if mode == "WAL":
            node.flush()
        else:
            database.rollback.suspect = True
            assert node.store.capture.commit_point(database)

    try:
        sql(f"PRAGMA journal_mode = {mode}")
        for left in (0, 5):
            sql("BEGIN")
            sql("INSERT INTO t (v) VALUES (randomblob(?))", 20 * page_size)
            sql("DELETE FROM t WHERE length(v) > 200")
            sql("INSERT INTO t (v) VALUES (randomblob(?))", left * page_size + 1)
            commit()
            assert sql("PRAGMA freelist_count")[0][0] > 10
            database.copy_to(str(tmp_path / "copy"))
            assert file_checksum(tmp_path / "copy") == database.position.checksum
            assert rows_of(tmp_path / "copy") == sql("SELECT id, v FROM t ORDER BY id")
            if mode == "WAL":
                sql("PRAGMA wal_checkpoint(TRUNCATE)")
                database.copy_to(str(tmp_path / "copy"))
                assert (tmp_path / "copy").read_bytes()[: 3 * page_size] == (
                    Path(database.files.database).read_bytes()[: 3 * page_size]
                )
    finally:
        sql.kill()
        node.close(clean=False)
