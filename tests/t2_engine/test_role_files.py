"""What a change of role does to the files, without a mount; and what the next start makes of one that was cut off."""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_nodes import (
    NamedFiles,
    NamedStore,
    check_log,
    closing_node,
    log_files,
    make_sqlite,
    new_primary,
    replay,
    rows_of,
)
from sqlite_process import SqliteProcess

from pylitefs.engine import takeover
from pylitefs.engine.database import Database
from pylitefs.engine.fence import Fence
from pylitefs.engine.grip import Grip
from pylitefs.engine.marker import Marker
from pylitefs.engine.shared_wal import SharedWal
from pylitefs.engine.store import Store, StoreOptions
from pylitefs.events import Event, EventBus
from pylitefs.formats.sqlite.wal import WalHeader, encode_frames, scan_frames
from pylitefs.formats.sqlite.wal_index import WalIndexHeader


def open_store(folder: Path) -> NamedStore:
    """A node whose role is not fixed, as it starts."""
    store = NamedStore(str(folder), EventBus(), StoreOptions(is_primary=False, role_from_marker=True))
    store.load()
    store.start()
    return store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files of a node that holds database "db" at TXID 1."""
    with closing_node(new_primary(tmp_path / "n")) as node:
        node.close(clean=True)
    return tmp_path / "n"


def lead(store: Store, epoch: int) -> None:
    store.fence.until_s = math.inf
    store.promote(epoch)


def write(store: Store, sql: str) -> None:
    with contextlib.closing(sqlite3.connect(store.find("db").files.database)) as db:
        db.execute(sql)
        db.commit()


def marker_goes(folder: Path) -> None:
    """In a moment: by another thread than the worker."""
    until_s = time.monotonic() + 10
    while (folder / "primary").exists():
        assert time.monotonic() < until_s, "the marker stays"
        time.sleep(0.01)


def test_the_worker_does_not_wait_for_a_change_of_role_that_waits_for_the_worker(folder: Path) -> None:
    """The start records what it has found on the worker, while a thread has begun to change a role."""
    Marker(str(folder)).write(1, None)
    store = open_store(folder)
    try:
        with store.roles._one:
            store.worker.submit(store.settle).result(timeout=10)
        marker_goes(folder)
        with pytest.raises(RuntimeError, match="must not wait"):
            store.worker.submit(store.resume_writes).result(timeout=10)
    finally:
        store.close(clean=True)


def test_the_fence_ends_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.clock_gettime", lambda clock: now[0])
    fence = Fence()
    assert not fence.holds()
    fence.until_s = 101.0
    assert fence.holds()
    now[0] = 101.0
    assert not fence.holds()
    fence.until_s = math.inf
    assert fence.holds()


def test_a_damaged_marker_covers_everything(tmp_path: Path) -> None:
    marker = Marker(str(tmp_path))
    marker.load()
    assert not marker.covers("db")
    marker.write(7, ["db", "other"])
    marker.load()
    assert marker.covers("db") and not marker.covers("third")
    marker.write(7, None)
    marker.load()
    assert marker.covers("third")
    (tmp_path / "primary").write_bytes(b'{"epo')
    marker.load()
    assert marker.covers("db")
    marker.write(7, [])
    marker.load()
    assert not marker.covers("db") and not (tmp_path / "primary").exists()


def test_the_marker_is_there_before_a_write_and_goes_after_the_last(folder: Path) -> None:
    store = open_store(folder)
    try:
        assert not (folder / "primary").exists() and not store.find("db").captures
        lead(store, 5)
        assert (folder / "primary").exists() and store.find("db").captures and store.is_primary
        write(store, "INSERT INTO t (v) VALUES (x'01')")
        assert store.flush(store.find("db")).result().txid >= 1
        assert store.demote(1.0) == []
        assert not store.is_primary and not store.find("db").captures
    finally:
        store.close(clean=True)
    assert not (folder / "primary").exists()


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
def test_what_was_committed_before_a_kill_is_in_the_log_of_the_next_start(folder: Path, mode: str) -> None:
    """The start is a replica's; what the files have beyond the log is recorded, in the epoch it was written in."""
    store = open_store(folder)
    lead(store, 5)
    store.close(clean=False)
    path = store.find("db").files.database
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA journal_mode = {mode}")
        db.execute("INSERT INTO t (v) VALUES (x'beef')")
        db.commit()
    assert (folder / "primary").exists()
    again = open_store(folder)
    try:
        assert not again.is_primary
        again.worker.submit(again.settle).result()
        database = again.find("db")
        assert database.position == database.log.head and database.position.txid == 2
        check_log(database)
        assert (4, b"\xbe\xef") in rows_of(path)
        marker_goes(folder)
    finally:
        again.close(clean=True)


def test_without_a_marker_a_replica_does_not_make_a_transaction_of_it(folder: Path) -> None:
    """It waits for the primary to say what is right; only if it is promoted itself the files are the truth."""
    store = open_store(folder)
    path = store.find("db").files.database
    store.close(clean=False)
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("INSERT INTO t (v) VALUES (x'beef')")
        db.commit()
    again = open_store(folder)
    try:
        again.worker.submit(again.settle).result()
        database = again.find("db")
        assert database.log.head.txid == 1 and database.position != database.log.head
        lead(again, 6)
        assert database.position == database.log.head and database.position.txid == 2
        check_log(database)
    finally:
        again.close(clean=False)


def written_wal(folder: Path, *, big_endian: bool, commits: int, unpublished: int) -> tuple[NamedFiles, SqliteProcess]:
    """A database in WAL mode that a process has open, whose WAL was written by hand: `commits` are published."""
    path = folder / "database"
    make_sqlite(str(path))
    files = NamedFiles("db", str(folder))
    with open(path, "rb") as file:
        page = file.read(4096)
        count = os.fstat(file.fileno()).st_size // 4096
    header = WalHeader.create(4096, 3, 11, 22, big_endian)
    data, s0, s1 = bytearray(header.pack()), header.checksum1, header.checksum2
    published = s0, s1
    for number in range(commits + unpublished):
        frames, s0, s1 = encode_frames(header, [1], [page], count, s0, s1)
        data += frames
        if number == commits - 1:
            published = s0, s1
    Path(files.wal).write_bytes(data[: 32 + commits * 4120])
    client = SqliteProcess(str(path))
    assert client("SELECT count(*) FROM t") == [(3,)]  # it makes the index, of what is there
    with open(files.wal, "ab") as wal:
        wal.write(data[32 + commits * 4120 :])
    with open(files.shm, "rb") as shm:
        found = WalIndexHeader.unpack(shm.read(48))
    assert (found.mx_frame, found.frame_checksum, found.big_endian_checksum) == (commits, published, big_endian)
    return files, client


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("commits", [1, 5, 4100])
def test_the_daemon_goes_on_in_the_wal_of_an_application(tmp_path: Path, big_endian: bool, commits: int) -> None:
    files, client = written_wal(tmp_path, big_endian=big_endian, commits=commits, unpublished=2)
    database = Database("db", files, EventBus())
    database.page_size = 4096
    with open(files.database, "rb") as file:
        database.commit = os.fstat(file.fileno()).st_size // 4096
    grip = Grip(database, str(tmp_path))
    try:
        client("BEGIN")
        assert client("SELECT count(*) FROM t") == [(3,)]
        assert grip.take() and grip.seal() and grip.is_wal
        with pytest.raises(RuntimeError, match="locked"):
            client("INSERT INTO t (v) VALUES (1)", on="writer")
        replica = SharedWal(files, 4096, database.commit, 0o644)
        replica.adopt(grip.descriptors())
        grip.hand_over()
        assert os.path.getsize(files.wal) == 32 + commits * 4120, "frames that nobody published are gone"
        assert replica.mx_frame == commits
        with contextlib.closing(sqlite3.connect(":memory:")) as source:  # a page 2 with one more row
            source.execute("PRAGMA page_size = 4096")
            source.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, v BLOB)")
            source.executemany("INSERT INTO t (v) VALUES (?)", [(b"new",)] * 4)
            source.commit()
            image = source.serialize()
        replica.append([(2, image[4096:8192])], database.commit)
        assert client("SELECT count(*) FROM t") == [(3,)]
        client("COMMIT")
        assert client("SELECT count(*) FROM t") == [(4,)]
        client("PRAGMA wal_checkpoint(TRUNCATE)")  # kept out
        assert replica.checkpoint()
        assert client("SELECT count(*) FROM t") == [(4,)]
        with open(files.wal, "rb") as wal:
            header = WalHeader.unpack(wal.read(32))
            scan = scan_frames(header, wal.read(), header.checksum1, header.checksum2)
        assert header.big_endian == big_endian and scan.committed == commits + 1
        replica.close()
    finally:
        grip.release()
        client.stop()


def test_no_log_file_is_written_by_a_change_of_role_alone(folder: Path) -> None:
    store = open_store(folder)
    try:
        before = log_files(store.find("db"))
        for epoch in range(3, 7):
            lead(store, epoch)
            assert store.demote(1.0) == []
        assert log_files(store.find("db")) == before
    finally:
        store.close(clean=True)


def test_a_file_that_is_suspected_beside_a_wal_does_not_keep_writes_from_being_paused(tmp_path: Path) -> None:
    """Somebody who is not SQLite may have written to it, and as long as there is a WAL nothing else looks at that."""
    with closing_node(new_primary(tmp_path / "n")) as node:
        database, registry = node.database(), node.store
        application = SqliteProcess(database.files.database)
        try:
            application("PRAGMA wal_autocheckpoint = 0")
            application("INSERT INTO t (v) VALUES (x'01')")
            assert os.path.getsize(database.files.wal)
            database.rollback.suspect = True
            done = registry.worker.submit(takeover.capture_rest, registry, database, None, database="db").result()
            assert done == "" and not database.rollback.suspect
            check_log(database)
            assert database.position == database.log.head
        finally:
            application.kill()


class Scene:
    """A primary whose role is not fixed, and an application that has its database open."""

    def __init__(self, folder: Path) -> None:
        self.store, self.events = open_store(folder), list[Event]()
        self.store.events.subscribe(self.events.append)
        lead(self.store, 5)
        self.database = self.store.find("db")
        self.sql = SqliteProcess(self.database.files.database)
        self.database.app_handles = self.database.writers = 1

    def told(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.type == kind]

    def rows(self) -> int:
        with contextlib.closing(sqlite3.connect(self.database.files.database)) as db:
            return int(db.execute("SELECT count(*) FROM t").fetchone()[0])


@pytest.fixture
def scene(folder: Path) -> Iterator[Scene]:
    made = Scene(folder)
    try:
        yield made
    finally:
        made.sql.kill()
        made.store.close(clean=False)


def write_without_journal(scene: Scene) -> None:
    """One row, by a connection that has left WAL mode."""
    scene.sql("PRAGMA journal_mode = DELETE")
    scene.store.flush(scene.database).result(10)
    scene.sql("PRAGMA journal_mode = OFF")
    scene.sql("INSERT INTO t (v) VALUES (x'01')")


def test_sqlites_own_writes_of_which_nobody_knows_whose_they_are_do_not_keep_a_database_from_being_taken_over(
    scene: Scene,
) -> None:
    """With journal_mode=OFF nothing tells a first write from one of somebody who takes no locks; the grip is in the way
    of asking."""
    database = scene.database
    write_without_journal(scene)
    with database.lock:
        database.rollback.foreign = True
        database.rollback.note(0, 4096)
        database.rollback.note(4096, 4096)
    assert scene.store.demote(5.0) == [] and not database.captures
    check_log(database)
    assert scene.rows() == 4
    assert replay(database) == copy_of_database(scene)


def test_what_was_written_in_a_rollback_mode_right_before_the_wal_does_not_keep_it_from_being_taken_over(
    scene: Scene,
) -> None:
    database = scene.database
    write_without_journal(scene)
    with database.lock:
        database.rollback.note(4096, 4096)
    scene.sql("PRAGMA journal_mode = WAL")
    scene.sql("INSERT INTO t (v) VALUES (x'02')")
    assert scene.store.demote(5.0) == [] and not database.captures
    check_log(database)
    assert scene.rows() == 5
    assert replay(database) == copy_of_database(scene)


def copy_of_database(scene: Scene) -> bytes:
    path = scene.database.files.folder + "/copy"
    scene.database.copy_to(path)
    return Path(path).read_bytes()


@pytest.mark.parametrize("is_open", [True, False])
def test_what_sqlite_cannot_read_is_kept_when_this_node_ceases_to_be_the_primary(scene: Scene, is_open: bool) -> None:
    """It is no state of the log. Until the primary has sent a copy it is served as it is; or it is the primary's own
    again, if this node becomes that."""
    database, store = scene.database, scene.store
    scene.sql("PRAGMA journal_mode = DELETE")
    before = store.flush(database).result(10)
    scene.sql.kill()
    database.app_handles = database.writers = int(is_open)
    Path(database.files.database).write_bytes(b"encrypted" * 1000)
    with database.lock:
        database.rollback.suspect = True
    assert store.pause_writes(1.0), "it is in nobody's way: a switchover goes on without it"
    store.resume_writes()
    assert store.demote(5.0) == [] and not database.captures
    assert database.set_aside_reason is not None and "SQLite cannot read" in database.set_aside_reason
    assert database.position != before and database.log.head == before
    assert [event.data["reason"] for event in scene.told("setAside")] == [database.set_aside_reason]
    (kept,) = scene.told("lost")
    assert Path(str(kept.data["folder"]), "database").read_bytes() == b"encrypted" * 1000
    lead(store, 6)
    assert database.captures and database.set_aside_reason is None and database.position == before
    assert database.rollback.pending
    make_sqlite(database.files.folder + "/whole", mode="DELETE", rows=9)
    with open(database.files.database, "r+b", buffering=0) as file:  # a look in between must not see an empty file
        file.write(Path(database.files.folder, "whole").read_bytes())
        file.truncate(file.tell())
    assert store.capture.commit_point(database)
    check_log(database)
    assert database.withheld is None and scene.rows() == 9


def test_what_keeps_a_database_from_being_taken_over_is_told(scene: Scene) -> None:
    scene.sql("BEGIN IMMEDIATE")
    scene.sql("INSERT INTO t (v) VALUES (x'01')")
    assert scene.store.demote(1.5) == ["db"]
    (told,) = scene.told("notTakenOver")
    assert "transaction" in str(told.data["reason"])
    scene.sql("ROLLBACK")
    until_s = time.monotonic() + 10
    while scene.database.captures:
        assert time.monotonic() < until_s, "it is not taken over"
        time.sleep(0.01)
    check_log(scene.database)
