"""What the files prove after a crash: a row that was committed is never taken back, whatever the log says.

The same pages may come twice (a row is changed, and changed back), so equal checksums prove nothing about where a
database stands. In these tests the value of one row says which commit is seen.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_nodes import Node, check_log, file_checksum, log_files, make_sqlite, new_primary, replay
from limits import largest_file
from sqlite_process import SqliteProcess

from pylitefs.cluster.decisions import AskChecksums, View, decide
from pylitefs.cluster.transfer import COMPACT_MIN, merge
from pylitefs.engine import redo
from pylitefs.engine.database import Database
from pylitefs.errors import LitefsError, PositionMismatch
from pylitefs.formats.ltx.format import Position
from pylitefs.formats.sqlite.wal import WAL_HEADER_SIZE, frame_offset


class Bench:
    """A primary whose row 1 is set to one value after another. `sql` is an application in a process of its own."""

    def __init__(self, folder: Path, mode: str = "WAL", synchronous: str = "FULL") -> None:
        self._begin(folder, new_primary(folder / "node", mode=mode), synchronous)

    @classmethod
    def of(cls, node: Node) -> Bench:
        """Of a node that is there already."""
        bench = cls.__new__(cls)
        bench._begin(Path(node.store.data_dir).parent, node, "FULL")
        return bench

    def _begin(self, folder: Path, node: Node, synchronous: str) -> None:
        self.folder, self.node, self.synchronous = folder, node, synchronous
        self.images = 0
        self.sql: SqliteProcess | None = None

    @property
    def database(self) -> Database:
        return self.node.database()

    @property
    def path(self) -> Path:
        return Path(self.database.files.database)

    def open(self) -> SqliteProcess:
        if self.sql is None:
            self.sql = SqliteProcess(str(self.path))
            self.sql(f"PRAGMA synchronous = {self.synchronous}")
            self.sql("PRAGMA wal_autocheckpoint = 0")
        return self.sql

    def commit(self, value: str, row: int = 1) -> None:
        self.open()("UPDATE t SET v = ? WHERE id = ?", value, row)

    def set(self, value: str, row: int = 1) -> bytes:
        """Commit and capture; the log entry."""
        self.commit(value, row)
        if self.database.journal_mode == "rollback":
            self.database.rollback.suspect = True
            self.node.store.capture.commit_point(self.database)
        else:
            self.node.flush()
        return self.newest()

    def newest(self) -> bytes:
        return Path(self.database.log.entries()[-1].path).read_bytes()

    def leave(self) -> None:
        """The last connection is closed: SQLite checkpoints and removes the WAL, as the hooks would tell."""
        assert self.sql is not None
        self.sql.close()
        self.sql.stop()
        self.sql = None
        self.database.wal.forget_all()

    def kill(self) -> None:
        """Application and daemon, with SIGKILL."""
        if self.sql is not None:
            self.sql.kill()
            self.sql = None
        self.node.close(clean=False)

    def start(self, folder: Path | None = None, *, settle: bool = True) -> str:
        self.node = Node(folder or self.folder / "node")
        if settle:
            self.node.store.settle()
            self.node.store.note_boot()
        outcomes = [event.data["outcome"] for event in self.node.events if event.type == "recovered"]
        return str(outcomes[0]) if outcomes else "clean"

    def power_cut(self, *, torn: int = 0) -> Path:
        """The disk as it is now, in another folder and for another boot: the newest `torn` log entries are empty, as
        delayed allocation leaves what was not synced. This node is gone."""
        self.images += 1
        image = self.folder / f"image{self.images}"
        shutil.copytree(self.folder / "node", image)
        with contextlib.suppress(FileNotFoundError):
            (image / "dbs/db/database-shm").unlink()
        for entry in sorted((image / "dbs/db/ltx").glob("*.ltx"))[len(log_files(self.database)) - torn :]:
            entry.write_bytes(b"")
        (image / "boot").write_text("the boot before\n")
        self.kill()
        return image

    def check(self, value: str) -> None:
        """The row has this value, in the file and in what the log leads to."""
        database = self.database
        files = database.files
        assert not any(os.path.exists(path) for path in (files.wal, files.shm, files.journal))
        assert value_of(self.path) == value
        assert database.position.checksum == file_checksum(self.path)
        check_log(database)
        if database.log.first_txid == 1:
            assert replay(database) == self.path.read_bytes()

    def close(self) -> None:
        if self.sql is not None:
            self.sql.kill()
        self.node.close(clean=False)


def value_of(path: Path, row: int = 1) -> str:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return str(db.execute("SELECT v FROM t WHERE id = ?", (row,)).fetchone()[0])


def native(image: Path, folder: Path) -> str:
    """What SQLite alone makes of the image."""
    shutil.copytree(image / "dbs" / "db", folder)
    return value_of(folder / "database")


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


@pytest.fixture
def lazy(tmp_path: Path) -> Iterator[Bench]:
    """synchronous=NORMAL: a power cut may take the last commits."""
    made = Bench(tmp_path, synchronous="NORMAL")
    yield made
    made.close()


# -- the files win -----------------------------------------------------------------------------------------------


def test_kill_after_kill_takes_no_row_back(bench: Bench) -> None:
    """Each time the daemon is killed before the capture, so each entry is a recorded difference."""
    bench.node.store.note_boot()
    bench.set("A")
    bench.leave()
    for value in ("B", "A", "B", "A"):
        bench.commit(value)
        bench.leave()
        bench.kill()
        assert bench.start() == "differs"
        bench.check(value)


@pytest.mark.parametrize("between", ["closed", "restarted"])
def test_a_power_cut_takes_no_durable_row_back(bench: Bench, tmp_path: Path, between: str) -> None:
    """A to B is in the log. B to A is durable, but its entry is torn."""

    def pause() -> None:
        if between == "closed":
            bench.leave()
        else:
            bench.open()("PRAGMA wal_checkpoint(RESTART)")

    for value in ("A", "B"):
        bench.set(value)
        pause()
    bench.set("A")
    if between == "closed":
        pause()
    image = bench.power_cut(torn=1)
    assert native(image, tmp_path / "alone") == "A"
    assert bench.start(image) == "differs"
    bench.check("A")


def test_files_that_were_changed_after_an_orderly_stop_win(bench: Bench) -> None:
    """Somebody puts an older database with its WAL in place while the node is stopped: that is what is wanted."""
    for value in ("A", "B"):
        bench.set(value)
    kept = bench.folder / "kept"
    shutil.copytree(bench.path.parent, kept)
    bench.set("C")
    bench.leave()
    bench.node.close(clean=True)
    for name in ("database", "database-wal"):
        shutil.copyfile(kept / name, bench.path.with_name(name))
    (bench.folder / "node/boot").write_text("the boot before\n")
    assert bench.start() == "differs"
    bench.check("B")


def test_a_give_back_does_not_take_a_durable_row_back(bench: Bench) -> None:
    """Both newest entries are torn; a replica has the first of them, which leads away from what is durable."""
    bench.set("A")
    bench.leave()
    given = bench.set("B")
    bench.leave()
    bench.set("A")
    bench.leave()
    image = bench.power_cut(torn=2)
    bench.start(image, settle=False)
    before = sorted(os.listdir(bench.database.files.ltx))
    with pytest.raises(PositionMismatch):
        bench.node.store.give_back("db", given)
    assert sorted(os.listdir(bench.database.files.ltx)) == before
    bench.node.store.settle()
    bench.check("A")


@pytest.mark.parametrize("lost", [1, 2])
def test_what_another_node_wrote_is_no_later_generation(bench: Bench, tmp_path: Path, lost: int) -> None:
    """Under a HALT lock, or as the primary in between: its transaction has the salts of a WAL of its own, and stands in
    this WAL all the same. What follows it here is durable, and its entries are torn."""
    entries = [bench.newest(), bench.set("A")]
    given = written_elsewhere(bench.folder / "elsewhere", entries, "B")
    store = bench.node.store
    assert store.demote_database("db", 5.0)
    store.worker.submit(store.apply_as_primary, "db", given).result()
    store.promote_database("db")
    assert bench.newest() == given
    for value in ("C", "D")[-lost:]:
        bench.set(value)
    image = bench.power_cut(torn=lost)
    assert native(image, tmp_path / "alone") == "D"
    assert bench.start(image) == "differs"
    bench.check("D")


def written_elsewhere(folder: Path, entries: list[bytes], value: str) -> bytes:
    """What another node commits on top of these log entries."""
    replica = Node(folder / "node", is_primary=False)
    for data in entries:
        replica.database().apply(data)
    assert replica.apply.rest(replica.database())
    replica.close()
    with contextlib.closing(Bench.of(Node(folder / "node"))) as other:
        return other.set(value)


def test_the_place_of_a_rollback_transaction_is_told_by_its_counter(tmp_path: Path) -> None:
    """With EXCLUSIVE locking SQLite does not count on: then nothing tells, and the files win."""
    bench = Bench(tmp_path, "DELETE")
    try:
        bench.open()("PRAGMA locking_mode = EXCLUSIVE")
        bench.set("A")
        bench.leave()
        bench.node.close(clean=True)
        assert bench.start() == "clean"
        noted = os.stat(bench.path)
        bench.open()("PRAGMA locking_mode = EXCLUSIVE")
        bench.set("B")
        bench.set("A")
        given = bench.set("B")
        bench.set("A")
        image = bench.power_cut(torn=2)
        os.utime(image / "dbs/db/database", ns=(noted.st_atime_ns, noted.st_mtime_ns))  # it is written back later
        bench.start(image, settle=False)
        with pytest.raises(PositionMismatch):
            bench.node.store.give_back("db", given)
        bench.node.store.settle()
        bench.check("A")
    finally:
        bench.close()


# -- what proves that the log is ahead -----------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [0, 1, 2])
def test_a_shorter_wal_of_the_same_generation(lazy: Bench, frames: int) -> None:
    for value in ("B", "C", "D"):
        lazy.set(value)
    image = lazy.power_cut()
    os.truncate(image / "dbs/db/database-wal", frame_offset(frames + 1, 4096))
    assert lazy.start(image) == "redone"
    lazy.check("D")


@pytest.mark.parametrize("repaired", [False, True])
def test_an_older_generation_of_the_wal(lazy: Bench, repaired: bool) -> None:
    """The WAL was begun anew and not synced since: several entries are missing. The newest has no place in a WAL."""
    lazy.set("A")
    lazy.set("B")
    lazy.open()("PRAGMA wal_checkpoint(RESTART)")
    old = Path(lazy.database.files.wal).read_bytes()
    database = lazy.path.read_bytes()
    for value in ("A", "B", "A"):
        lazy.set(value)
    if repaired:
        lazy.commit("E")
        lazy.database.wal.doubt()
        lazy.set("F")
        assert lazy.database.log.entries()[-1].header().wal_size == 0
    image = lazy.power_cut()
    (image / "dbs/db/database-wal").write_bytes(old)
    assert (image / "dbs/db/database").read_bytes() == database
    assert lazy.start(image) == "redone"
    lazy.check("F" if repaired else "A")


def test_a_wal_that_never_reached_the_disk(lazy: Bench) -> None:
    """There is no WAL, and the database was not written since the start, so it holds nothing of what the log says."""
    lazy.set("A")
    lazy.leave()
    lazy.node.close(clean=True)
    assert lazy.start() == "clean"
    for value in ("B", "A", "B"):
        lazy.set(value)
    image = lazy.power_cut()
    (image / "dbs/db/database-wal").unlink()
    assert lazy.start(image) == "redone"
    lazy.check("B")


def test_without_a_wal_a_database_that_was_written_to_wins(lazy: Bench) -> None:
    lazy.set("A")
    lazy.leave()
    lazy.node.close(clean=True)
    assert lazy.start() == "clean"
    lazy.set("B")
    lazy.leave()
    lazy.set("A")
    lazy.leave()
    assert lazy.start(lazy.power_cut(torn=1)) == "differs"
    lazy.check("A")


def test_the_time_of_the_file_proves_nothing_beside_a_wal(bench: Bench) -> None:
    """A to B to A, all of it in the database. What is not on the disk yet is the file's time, and the new WAL's
    frames."""
    bench.set("A")
    bench.leave()
    bench.node.close(clean=True)
    assert bench.start() == "clean"
    noted = os.stat(bench.path)
    bench.set("B")
    bench.set("A")
    bench.open()("PRAGMA wal_checkpoint(RESTART)")
    bench.set("A ")
    image = bench.power_cut(torn=2)
    os.truncate(image / "dbs/db/database-wal", WAL_HEADER_SIZE)
    os.utime(image / "dbs/db/database", ns=(noted.st_atime_ns, noted.st_mtime_ns))
    assert bench.start(image) == "differs"
    bench.check("A")


def test_a_transaction_in_the_log_whose_journal_is_still_there(tmp_path: Path) -> None:
    """The node dies between the log and the unlink. The database has the transaction whole, so it is kept."""
    bench = Bench(tmp_path, "DELETE")
    try:
        bench.set("A")
        bench.open()("PRAGMA journal_mode = PERSIST")
        bench.set("B")
        bench.set("C")
        image = bench.power_cut()
        journal = image / "dbs/db/database-journal"
        data = bytearray(journal.read_bytes())
        data[:28] = _hot_header(data, bench.database.commit)
        journal.write_bytes(data)
        assert native(image, tmp_path / "alone") == "B", "the journal is hot"
        assert bench.start(image) == "verified"
        bench.check("C")
    finally:
        bench.close()


def _hot_header(journal: bytearray, pages: int) -> bytes:
    """The header of a journal as it was before PERSIST zeroed it: its one record tells the nonce."""
    page = bytes(journal[512 + 4 : 512 + 4 + 4096])
    stored = int.from_bytes(journal[512 + 4 + 4096 : 512 + 8 + 4096], "big")
    nonce = (stored - sum(page[4096 - 200 : 0 : -200])) & 0xFFFFFFFF
    words = (0xFFFFFFFF, nonce, pages, 512, 4096)
    return bytes.fromhex("d9d505f920a163d7") + b"".join(word.to_bytes(4, "big") for word in words)


def test_a_redo_that_is_cut_off_is_done_again(lazy: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The power fails when some pages are written, and nothing but our own note tells of it."""
    lazy.set("A")
    lazy.leave()
    lazy.node.close(clean=True)
    assert lazy.start() == "clean"
    for row in (1, 2, 3):
        lazy.set("B", row)
    lazy.open()("INSERT INTO t (v) VALUES (zeroblob(20000))")
    lazy.node.flush()
    image = lazy.power_cut()
    (image / "dbs/db/database-wal").unlink()
    written: list[int] = []

    def fails(fd: int, data: bytes, offset: int) -> None:
        written.append(offset)
        if len(written) > 2:
            raise KeyboardInterrupt
        os.pwrite(fd, data, offset)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(redo, "write_at", fails)
        lazy.start(image)
    assert lazy.start(image) == "redone"
    lazy.check("B")
    assert value_of(lazy.path, 3) == "B"
    lazy.node.close(clean=False)
    assert lazy.start(image) == "verified"


def test_a_replica_goes_on_from_its_log(bench: Bench) -> None:
    """On a replica the log's head is a state of the primary in any case, and the primary tells the rest."""
    entries = [bench.newest(), bench.set("A"), bench.set("B")]
    replica = Node(bench.folder / "replica", is_primary=False)
    target = replica.database()
    for data in entries[:2]:
        target.apply(data)
    assert replica.apply.rest(target)
    before = Path(target.files.database).read_bytes()
    target.apply(entries[2])
    head = target.position
    replica.close(clean=False)
    Path(target.files.database).write_bytes(before)
    for path in (target.files.wal, target.files.shm):
        os.unlink(path)
    replica = Node(bench.folder / "replica", is_primary=False)
    try:
        assert replica.database().position == head
        assert value_of(Path(target.files.database)) == "B"
    finally:
        replica.close(clean=False)


# -- what replicas give back ---------------------------------------------------------------------------------------


def given_back(bench: Bench, *entries: bytes) -> None:
    for data in entries:
        position = bench.node.store.give_back("db", data)
        told = [event.data["txid"] for event in bench.node.events if event.type == "tx"]
        assert told and told[-1] == position.txid, "replicas that lack it must be sent it"
    bench.node.store.settle()
    bench.node.store.note_boot()


@pytest.mark.parametrize("frames", [0, 1, 2, 3])
def test_a_lost_tail_comes_back_where_the_wal_proves_it(lazy: Bench, frames: int) -> None:
    """The log has lost its tail too, and the WAL some of its frames."""
    entries = [lazy.set(value) for value in ("B", "A", "B")]
    entries += [lazy.set("A")]
    image = lazy.power_cut(torn=4)
    os.truncate(image / "dbs/db/database-wal", frame_offset(frames + 1, 4096))
    lazy.start(image, settle=False)
    assert lazy.node.store.started_unclean
    given_back(lazy, *entries[frames:])
    lazy.check("A")


def test_what_is_given_back_may_be_merged(lazy: Bench) -> None:
    """The WAL ends exactly where the log does, so whatever follows the log's head is ahead of the files."""
    lazy.set("B")
    before = lazy.database.position
    for number in range(COMPACT_MIN):
        lazy.set(f"C{number}")
    lazy.set("E")
    merged = merge(lazy.database.log.entries()[2:], before)
    assert merged is not None
    data, ends = merged
    assert ends.header.wal_size == 0 and ends.after == lazy.database.position
    image = lazy.power_cut(torn=COMPACT_MIN + 1)
    os.truncate(image / "dbs/db/database-wal", frame_offset(1 + 1, 4096))
    lazy.start(image, settle=False)
    given_back(lazy, data)
    lazy.check("E")


def test_a_lost_tail_comes_back_where_the_wal_is_an_older_one(lazy: Bench) -> None:
    lazy.set("B")
    lazy.open()("PRAGMA wal_checkpoint(RESTART)")
    old = Path(lazy.database.files.wal).read_bytes()
    entries = [lazy.set("C"), lazy.set("B")]
    image = lazy.power_cut(torn=2)
    (image / "dbs/db/database-wal").write_bytes(old)
    lazy.start(image, settle=False)
    given_back(lazy, *entries)
    lazy.check("B")


def test_a_lost_tail_comes_back_to_a_database_that_was_not_written_to(lazy: Bench) -> None:
    lazy.set("A")
    lazy.leave()
    lazy.node.close(clean=True)
    assert lazy.start() == "clean"
    entries = [lazy.set("B"), lazy.set("A")]
    image = lazy.power_cut(torn=2)
    (image / "dbs/db/database-wal").unlink()
    lazy.start(image, settle=False)
    given_back(lazy, *entries)
    lazy.check("A")


def test_a_stop_during_the_wait_keeps_what_proves(lazy: Bench) -> None:
    """SIGTERM while the node waits for replicas: the next start knows as much as this one did."""
    entries = [lazy.set(value) for value in ("B", "A", "B", "A")]
    image = lazy.power_cut(torn=3)
    wal = image / "dbs/db/database-wal"
    os.truncate(wal, frame_offset(2 + 1, 4096))
    data = wal.read_bytes()
    assert lazy.start(image, settle=False) == "differs"
    lazy.node.close(clean=True)
    assert wal.read_bytes() == data
    lazy.start(image, settle=False)
    assert lazy.node.store.started_unclean
    given_back(lazy, *entries[2:])
    lazy.check("A")


def test_a_stop_during_the_wait_of_a_database_that_fits_its_log(lazy: Bench) -> None:
    """The database equals the log's head, but whether it has seen more only the WAL can tell: also after a stop."""
    entries = [lazy.set(value) for value in ("B", "A", "B", "A")]
    image = lazy.power_cut(torn=3)
    wal = image / "dbs/db/database-wal"
    os.truncate(wal, frame_offset(3 + 1, 4096))  # B A B, and the log says B
    assert lazy.start(image, settle=False) == "verified"
    lazy.node.close(clean=True)
    lazy.start(image, settle=False)
    assert lazy.node.store.started_unclean
    with pytest.raises(PositionMismatch):
        lazy.node.store.give_back("db", entries[1])
    given_back(lazy, entries[3])
    lazy.check("A")


def test_a_lost_branch_does_not_come_back_later(bench: Bench) -> None:
    """The replica with the lost transaction is away when the primary starts, and there when it starts again."""
    bench.set("A")
    bench.leave()
    given = bench.set("B")
    bench.leave()
    bench.set("A")
    bench.leave()
    image = bench.power_cut(torn=2)
    assert bench.start(image) == "verified"
    bench.check("A")
    bench.kill()
    for how in ("killed", "stopped", "killed"):
        (image / "boot").write_text("the boot before\n")
        bench.start(image, settle=False)
        with pytest.raises(PositionMismatch):
            bench.node.store.give_back("db", given)
        bench.node.store.settle()
        bench.check("A")
        bench.node.close(clean=how == "stopped")


def test_a_database_that_was_lost_whole_comes_back(bench: Bench) -> None:
    entries = [bench.newest(), bench.set("A"), bench.set("B")]
    image = bench.power_cut()
    shutil.rmtree(image / "dbs/db")
    bench.start(image, settle=False)
    assert bench.node.store.get("db") is None
    assert bench.node.store.started_unclean, "replicas must be waited for"
    with pytest.raises(LitefsError):
        bench.node.store.give_back("db", entries[1])
    with pytest.raises(LitefsError):
        bench.node.store.give_back("db", entries[0][:-20])
    assert bench.node.store.get("db") is None and not (image / "dbs/db").exists()
    given_back(bench, *entries)
    bench.check("B")
    bench.node.close(clean=True)
    assert bench.start(image) == "clean" and not bench.node.store.started_unclean


def test_a_file_that_is_missing_is_not_a_drop(bench: Bench) -> None:
    """The replicas' copies may be all there is."""
    for value in "ABC":
        bench.set(value)
    bench.database.log.retain(0, 1)
    assert bench.database.log.first_txid > 1
    bench.leave()
    copy = bench.path.read_bytes()
    head = bench.database.position
    bench.kill()
    bench.path.unlink()
    bench.start()
    assert bench.database.exists and "missing" in str(bench.database.set_aside_reason)
    assert bench.database.log.head == head
    bench.node.close(clean=True)
    bench.path.write_bytes(copy)
    bench.start()
    assert bench.database.set_aside_reason is None
    bench.check("C")


def test_only_an_orderly_stop_ends_the_waiting_for_lost_databases(tmp_path: Path) -> None:
    node = Node(tmp_path / "node")
    assert not node.store.started_unclean, "there was nothing to lose yet"
    node.store.note_boot()
    node.close(clean=False)
    node = Node(tmp_path / "node")
    assert node.store.started_unclean
    node.close(clean=True)  # SIGTERM during the wait
    node = Node(tmp_path / "node")
    assert node.store.started_unclean
    node.store.note_boot()
    node.close(clean=True)
    node = Node(tmp_path / "node")
    assert not node.store.started_unclean
    node.close(clean=True)


# -- a disk that is full, and files that are garbage ---------------------------------------------------------------


def test_a_full_disk_at_the_start_is_waited_for(bench: Bench) -> None:
    bench.open()("INSERT INTO t (v) VALUES (randomblob(300000))")
    bench.set("B")
    rows = bench.open()("SELECT count(*) FROM t")
    bench.kill()
    wal = Path(bench.database.files.wal).read_bytes()
    with largest_file(100_000):
        bench.start()
        database = bench.database
        assert database.is_busy and database.set_aside_reason
        assert Path(database.files.wal).read_bytes() == wal
        bench.node.store._startup.retry_busy()
        assert database.is_busy
        assert Path(database.files.wal).read_bytes() == wal
    bench.node.store._startup.look_again(at_once=True)
    assert not database.is_busy and database.set_aside_reason is None
    assert [event.data.get("outcome") for event in bench.node.events if event.type == "recovered"][-1] == "released"
    bench.check("B")
    with contextlib.closing(sqlite3.connect(bench.path)) as db:
        assert db.execute("SELECT count(*) FROM t").fetchall() == rows


def test_a_disk_that_fills_up_while_a_difference_is_recorded(bench: Bench) -> None:
    bench.set("A")
    bench.leave()
    bench.open()("INSERT INTO t (v) VALUES (randomblob(300000))")
    bench.commit("B")
    bench.leave()
    bench.kill()
    assert bench.start(settle=False) == "differs"
    with largest_file(50_000):
        bench.node.store.settle()
        assert bench.database.is_busy and "diskFull" not in bench.node.kinds()
    seen: list[tuple[str, bool]] = []
    stop = bench.node.store.events.subscribe(
        lambda event: seen.append((event.type, bench.database.set_aside_reason is not None))
    )
    bench.node.store._startup.look_again(at_once=True)
    stop()
    assert not bench.database.is_busy and bench.database.set_aside_reason is None
    assert ("tx", True) in seen and seen[-1] == ("recovered", False), "whoever looks meanwhile must not believe it"
    assert all(is_set_aside for _, is_set_aside in seen[:-1])
    bench.check("B")


def test_a_database_that_turns_out_to_be_garbage_is_withheld(bench: Bench) -> None:
    bench.set("A")
    bench.leave()
    bench.open()("INSERT INTO t (v) VALUES (randomblob(300000))")
    bench.leave()
    bench.kill()
    with largest_file(50_000):
        bench.start()
        assert bench.database.is_busy
    bench.path.write_bytes(b"garbage" * 1000)
    bench.node.store._startup.look_again(at_once=True)
    assert bench.database.withheld and "not a SQLite database" in bench.database.withheld
    assert not bench.database.is_busy and bench.database.set_aside_reason is None


def test_a_set_aside_replica_does_not_claim_to_be_caught_up(bench: Bench) -> None:
    head = bench.database.position
    bench.kill()
    bench.path.write_bytes(b"garbage" * 1000)
    bench.node = Node(bench.folder / "node", is_primary=False)
    database = bench.database
    assert database.set_aside_reason and not database.is_busy
    assert database.position != head
    assert isinstance(decide(database.position, View(head, 1, False, head.checksum), False), AskChecksums)


# -- stopping ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flush_all", [False, True])
def test_a_stop_after_a_killed_application_is_clean(bench: Bench, flush_all: bool) -> None:
    bench.set("B")
    assert bench.sql is not None
    bench.sql.kill()
    bench.sql = None
    bench.node.store.unmounted()
    if flush_all:
        bench.node.store.flush_all().result(10)
    bench.node.close(clean=True)
    assert bench.start() == "clean"
    bench.check("B")


def test_a_commit_that_the_index_does_not_tell_of_is_captured_at_the_stop(bench: Bench) -> None:
    """The application was killed after its commit frame and before the wal-index: SQLite counts it, so do we."""
    bench.set("B")
    index = Path(bench.database.files.shm).read_bytes()
    bench.commit("C")
    assert bench.sql is not None
    bench.sql.kill()
    bench.sql = None
    Path(bench.database.files.shm).write_bytes(index)
    bench.node.store.unmounted()
    bench.node.store.flush_all().result(10)
    bench.node.close(clean=True)
    assert bench.start() == "clean"
    bench.check("C")


@pytest.mark.parametrize("unmounted", [False, True])
def test_a_gap_right_before_the_stop_is_found(tmp_path: Path, unmounted: bool) -> None:
    """synchronous=OFF: a checkpoint went by that nothing told of, and with it a commit to another page."""
    bench = Bench(tmp_path, synchronous="OFF")
    try:
        sql = bench.open()
        sql("INSERT INTO t (v) SELECT zeroblob(3000) FROM t")
        bench.set("B")
        bench.commit("missed", row=5)
        sql("PRAGMA wal_checkpoint(RESTART)")
        bench.commit("C")
        sql.kill()
        bench.sql = None
        if unmounted:
            bench.node.store.unmounted()
        bench.node.close(clean=True)
        assert bench.start() == "clean"
        bench.check("C")
        replayed = tmp_path / "replayed"
        replayed.write_bytes(replay(bench.database))
        assert value_of(replayed, 5) == "missed"
    finally:
        bench.close()


def test_other_databases_start_beside_one_that_waits(bench: Bench) -> None:
    bench.set("B")
    make_sqlite(str(bench.folder / "node/dbs/other/database"))
    bench.open()("INSERT INTO t (v) VALUES (randomblob(300000))")
    bench.kill()
    with largest_file(100_000):
        bench.start()
    assert bench.database.is_busy
    assert bench.node.store.find("other").position == Position(1, bench.node.store.find("other").position.checksum)
    assert os.path.getsize(bench.database.files.wal) > WAL_HEADER_SIZE
