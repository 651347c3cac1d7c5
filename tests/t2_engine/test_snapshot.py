"""Copies of a database that is being written, and the pages that the disk has damaged."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
from engine_nodes import Node, new_primary, rows_of
from sqlite_process import SqliteProcess

from pylitefs.engine import snapshot
from pylitefs.engine.files import file_chunks
from pylitefs.engine.lost import PAGES, State, keep_branch
from pylitefs.errors import DatabaseError
from pylitefs.formats.ltx.decoder import Reader
from pylitefs.formats.ltx.format import Position


class Live:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.node: Node = new_primary(folder / "node", page_size=1024)
        self.database = self.node.database()
        self.sql = SqliteProcess(self.database.files.database)
        self.sql("INSERT INTO t (v) VALUES (0)")
        self.node.flush()

    def work(self, rng: random.Random) -> None:
        match rng.randrange(6):
            case 0:
                self.sql("DELETE FROM t WHERE id % 3 = 0")
            case 1:
                self.sql("UPDATE t SET v = randomblob(500)")
            case 2:
                self.sql(f"PRAGMA wal_checkpoint({rng.choice(['PASSIVE', 'RESTART', 'TRUNCATE'])})")
            case _:
                self.sql("INSERT INTO t (v) VALUES (randomblob(?))", rng.randrange(1, 20_000))

    def copy(self) -> Position:
        return self.database.copy_to(str(self.folder / "copy"))

    def close(self) -> None:
        self.sql.kill()
        self.node.close(clean=False)


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    made = Live(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("seed", range(3))
def test_a_copy_while_a_writer_runs(live: Live, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each copy is one state that SQLite committed: rows and checksum fit the position it claims."""
    monkeypatch.setattr(snapshot, "CHUNK_BYTES", 4096)
    rng = random.Random(seed)
    for _ in range(10):
        live.work(rng)
    states: list[list[tuple[object, ...]]] = [live.sql("SELECT id, v FROM t ORDER BY id")]
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            live.work(rng)
            states.append(live.sql("SELECT id, v FROM t ORDER BY id"))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(4):
            before = len(states) - 1
            live.copy()
            rows = rows_of(live.folder / "copy")
            deadline = threading.Event()
            while rows not in states[before:] and not deadline.wait(0.05) and len(states) < before + 500:
                pass  # the state may be newer than what the writer has read back so far
            assert rows in states[before:]
    finally:
        stop.set()
        writer.join()
    live.copy()
    assert rows_of(live.folder / "copy") == live.sql("SELECT id, v FROM t ORDER BY id")


def test_known_pages_are_skipped(live: Live) -> None:
    live.sql("INSERT INTO t (v) VALUES (randomblob(50000))")
    live.node.flush()
    known = live.database.page_checksums()
    live.sql("UPDATE t SET v = 'new' WHERE id = 1")
    reader = live.database.snapshot(known)
    found = [pgno for chunk in iter(reader.next_chunk, None) for pgno, _ in chunk]
    reader.close()
    assert found and len(found) < 4 < live.database.commit
    assert reader.start == live.database.position


def test_the_log_after_the_start_is_kept(live: Live) -> None:
    reader = live.database.snapshot(None)
    for _ in range(4):
        live.sql("INSERT INTO t (v) VALUES (1)")
        live.node.flush()
    live.database.log.retain(0, 1)
    entry = live.database.log.after(reader.start.txid)
    assert entry is not None
    reader.close()
    live.database.log.retain(0, 1)
    assert live.database.log.count == 1


@pytest.mark.parametrize("where", ["database", "wal"])
def test_a_damaged_page_is_found(live: Live, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "_ATTEMPTS", 3)
    live.sql("INSERT INTO t (v) VALUES (randomblob(50000))")
    live.node.flush()
    if where == "database":
        live.sql("PRAGMA wal_checkpoint(TRUNCATE)")
        path, offset = live.database.files.database, 20 * 1024 + 500
    else:
        path, offset = live.database.files.wal, 32 + 20 * 1048 + 500
    fd = os.open(path, os.O_RDWR)
    good = os.pread(fd, 1, offset)
    os.pwrite(fd, bytes([good[0] ^ 4]), offset)
    live.database.captures = False  # as on a replica, where only the daemon writes
    with pytest.raises(DatabaseError, match=r"do not match their checksums: 2[01]; restore"):
        live.copy()
    os.pwrite(fd, good, offset)
    os.close(fd)
    live.copy()


@pytest.mark.parametrize("where", ["database", "wal"])
def test_what_was_written_past_us_is_recorded(live: Live, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where applications write, and nothing proves that it was the disk."""
    monkeypatch.setattr(snapshot, "_ATTEMPTS", 3)
    live.sql("INSERT INTO t (v) VALUES (randomblob(50000))")
    before = live.node.flush()
    if where == "database":
        live.sql("PRAGMA wal_checkpoint(TRUNCATE)")
        path, offset = live.database.files.database, 20 * 1024 + 500
    else:
        path, offset = live.database.files.wal, 32 + 20 * 1048 + 500
    fd = os.open(path, os.O_RDWR)
    os.pwrite(fd, bytes([os.pread(fd, 1, offset)[0] ^ 4]), offset)
    os.close(fd)
    live.copy()
    assert "repair" in live.node.kinds() and "damaged" not in live.node.kinds()
    assert live.database.position.txid == before.txid + 1
    live.copy()
    assert live.database.position.txid == before.txid + 1


def test_a_change_of_the_page_size_ends_a_snapshot(tmp_path: Path) -> None:
    node = new_primary(tmp_path / "node", page_size=1024, mode="DELETE")
    database = node.database()
    sql = SqliteProcess(database.files.database)
    try:
        reader = database.snapshot(None)
        sql("PRAGMA page_size = 4096")
        sql("VACUUM")
        database.rollback.suspect = True
        assert node.store.capture.commit_point(database)
        with pytest.raises(DatabaseError, match="page size changed"):
            reader.next_chunk()
        reader.close()
        database.copy_to(str(tmp_path / "copy"))
        assert (tmp_path / "copy").read_bytes() == Path(database.files.database).read_bytes()
    finally:
        sql.kill()
        node.close(clean=False)


def test_a_branch_is_kept_but_for_its_damaged_pages(live: Live) -> None:
    """The log does not reach back, so its pages are all there is of it: one that the disk has changed is no reason to
    lose the others."""
    base, after = live.database.page_checksums(), live.database.position
    live.sql("INSERT INTO t (v) VALUES (randomblob(90000))")
    live.node.flush()
    live.sql("INSERT INTO t (v) VALUES (1)")
    live.node.flush()
    live.sql("PRAGMA wal_checkpoint(TRUNCATE)")
    live.database.log.retain(0, 1)
    page = live.database.commit - 20
    with open(live.database.files.database, "r+b") as file:
        file.seek((page - 1) * 1024 + 50)
        file.write(b"rotten")
    live.database.captures = False  # a replica by now
    folder = keep_branch(live.database, after.txid, State(after, 1024, base))
    assert folder is not None
    kept = {pgno for pgno, _ in Reader(file_chunks(os.path.join(folder, PAGES)))}
    assert {pgno for pgno in kept if pgno > len(base)} == set(range(len(base) + 1, live.database.commit + 1)) - {page}


def test_who_reads_while_the_node_stops_does_not_wait_for_ever(tmp_path: Path) -> None:
    """The process could not end either: it waits for such threads."""
    live = Live(tmp_path)
    live.close()
    with pytest.raises(CancelledError):
        live.database.flush().result(10)
