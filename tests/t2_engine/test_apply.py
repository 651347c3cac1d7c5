"""Apply of LTX files on a replica: everything is checked first, and what is refused changes nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from engine_nodes import (
    Node,
    check_log,
    closing_node,
    copy_of,
    file_checksum,
    log_files,
    make_sqlite,
    new_primary,
    rows_of,
)
from limits import largest_file
from sqlite_process import SqliteProcess

from pylitefs.engine import replica_wal
from pylitefs.engine.apply import Building
from pylitefs.engine.database import Database
from pylitefs.engine.lost import branches
from pylitefs.errors import FormatError, LitefsError, PositionMismatch, ReadersInTheWay
from pylitefs.formats.ltx.decoder import Reader, decode
from pylitefs.formats.ltx.encoder import encode
from pylitefs.formats.ltx.format import Position


class Pair:
    """A primary without a daemon's haste, and a replica that is given its log by hand."""

    def __init__(self, folder: Path, mode: str = "DELETE") -> None:
        self.folder = folder
        self.primary = new_primary(folder / "primary", page_size=1024, mode=mode)
        self.replica = Node(folder / "replica", is_primary=False)
        self.source: Database = self.primary.database()
        self.target: Database = self.replica.database()

    def write(self, *statements: str) -> bytes:
        """One transaction on the primary; its LTX file."""
        with contextlib.closing(sqlite3.connect(self.source.files.database, isolation_level=None)) as db:
            for sql in statements:
                db.execute(sql)
        self.source.rollback.suspect = True
        assert self.primary.store.capture.commit_point(self.source)
        return self.newest()

    def insert(self, size: int = 50) -> bytes:
        return self.write(f"INSERT INTO t (v) VALUES (randomblob({size}))")

    def newest(self) -> bytes:
        return Path(self.source.log.entries()[-1].path).read_bytes()

    def catch_up(self) -> None:
        while (entry := self.source.log.after(self.target.position.txid)) is not None:
            self.target.apply(Path(entry.path).read_bytes())

    def check(self) -> None:
        assert self.target.position == self.source.position
        check_log(self.target)
        image = Path(self.source.files.database).read_bytes()
        assert copy_of(self.replica, self.folder / "copy") == image
        assert self.replica.apply.rest(self.target)
        assert Path(self.target.files.database).read_bytes() == image
        assert not os.path.exists(self.target.files.wal) and not os.path.exists(self.target.files.shm)

    def close(self) -> None:
        self.replica.close(clean=False)
        self.primary.close(clean=False)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path)
    yield made
    made.close()


def state_of(database: Database) -> tuple[object, ...]:
    replica = database.replica
    return (
        database.position, database.page_size, database.commit, sorted(os.listdir(database.files.ltx)),
        database.page_checksums().tolist(), None if replica is None else (replica.mx_frame, replica.commit),
    )  # fmt: skip


def refuse(pair: Pair, data: bytes, error: type[Exception] = FormatError) -> None:
    before = state_of(pair.target)
    with pytest.raises(error):
        pair.target.apply(data)
    assert state_of(pair.target) == before
    header_span = (1, 1)
    with contextlib.suppress(LitefsError):
        header = decode(data).header
        header_span = (header.min_txid, header.max_txid)
    incoming = pair.target.receive(*header_span)
    with pytest.raises(error):
        for at in range(0, len(data), 777):
            incoming.write(data[at : at + 777])
        incoming.finish()
    incoming.abort()
    assert state_of(pair.target)[:-1] == before[:-1]
    assert pair.target.replica is None or pair.target.replica.checkpoint()  # no open transaction is left


def test_a_log_is_followed(pair: Pair) -> None:
    pair.catch_up()
    pair.check()
    for size in (10, 5000, 100_000):
        pair.insert(size)
    pair.write("DELETE FROM t WHERE id < 5")
    pair.write("VACUUM")
    pair.catch_up()
    pair.check()
    events = [event.data for event in pair.replica.events if event.type == "tx"]
    assert [data["txid"] for data in events] == list(range(1, 7))
    assert {data["source"] for data in events} == {"apply"}


def test_a_large_file_in_pieces(pair: Pair) -> None:
    pair.catch_up()
    data = pair.insert(900_000)
    incoming = pair.target.receive(2, 2)
    for at in range(0, len(data), 10_000):
        incoming.write(data[at : at + 10_000])
    assert incoming.finish() == pair.source.position
    pair.check()
    assert not [name for name in os.listdir(pair.target.files.ltx) if name.endswith(".tmp")]


def test_an_abandoned_file_leaves_nothing(pair: Pair) -> None:
    pair.catch_up()
    before = state_of(pair.target)
    incoming = pair.target.receive(2, 2)
    incoming.write(pair.insert(50_000)[:20_000])
    incoming.abort()
    assert state_of(pair.target)[:-1] == before[:-1]
    assert pair.target.replica is None or pair.target.replica.checkpoint()  # no open transaction is left
    pair.catch_up()
    pair.check()


def test_an_announced_span_must_be_the_real_one(pair: Pair) -> None:
    pair.catch_up()
    incoming = pair.target.receive(2, 3)
    incoming.write(pair.insert())
    with pytest.raises(FormatError):
        incoming.finish()
    pair.catch_up()
    pair.check()


def test_what_does_not_follow_is_refused(pair: Pair) -> None:
    second = pair.insert()
    third = pair.insert()
    refuse(pair, second, PositionMismatch)  # before the first
    pair.catch_up()
    refuse(pair, second, PositionMismatch)  # again
    refuse(pair, third, PositionMismatch)
    pair.check()


def test_a_wrong_checksum_before_or_after_is_refused(pair: Pair) -> None:
    pair.catch_up()
    ltx = decode(pair.insert())
    header = ltx.header
    other = replace(header, pre_apply_checksum=header.pre_apply_checksum ^ 1)
    wrong_before = encode(other, ltx.pages, ltx.trailer.post_apply_checksum)
    refuse(pair, wrong_before, PositionMismatch)
    refuse(pair, encode(header, ltx.pages, ltx.trailer.post_apply_checksum ^ 1), PositionMismatch)
    refuse(pair, encode(header, ltx.pages[:-1], ltx.trailer.post_apply_checksum), PositionMismatch)
    pair.catch_up()
    pair.check()


@pytest.mark.parametrize("seed", range(3))
def test_damaged_bytes_are_refused(pair: Pair, seed: int) -> None:
    rng = random.Random(seed)
    pair.catch_up()
    data = pair.insert(3000)
    for _ in range(25):
        bad = bytearray(data)
        match rng.randrange(3):
            case 0:
                bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
            case 1:
                del bad[rng.randrange(len(bad)) :]
            case _:
                bad += rng.randbytes(rng.randrange(1, 50))
        if bytes(bad[:80]) == data[:80] and bad[100:] == data[100:]:
            continue  # the reserved bytes of the header; they are covered by the file checksum all the same
        refuse(pair, bytes(bad), LitefsError)
    refuse(pair, rng.randbytes(5000))
    refuse(pair, b"")
    pair.catch_up()
    pair.check()


@pytest.mark.parametrize("page_size", [512, 4096, 65536])
def test_another_page_size(pair: Pair, page_size: int) -> None:
    pair.catch_up()
    pair.write(f"PRAGMA page_size = {page_size}", "VACUUM")
    pair.catch_up()
    pair.insert()
    pair.catch_up()
    pair.check()


@pytest.mark.parametrize("ends", [False, True])
def test_nothing_of_the_old_wal_counts_beside_another_page_size(pair: Pair, ends: bool) -> None:
    """Whoever has the files without the wal-index: a copy of the directory, and the node itself after a crash."""
    pair.catch_up()
    pair.insert(20_000)
    pair.catch_up()
    pair.write("INSERT INTO t (v) VALUES (1)", "PRAGMA page_size = 512", "VACUUM")
    pair.catch_up()
    if ends:
        pair.replica.close(clean=False)
        os.unlink(pair.target.files.shm)
    copy = pair.folder / "copy.db"
    shutil.copyfile(pair.target.files.database, copy)
    shutil.copyfile(pair.target.files.wal, f"{copy}-wal")
    with open(copy, "r+b") as file:  # a replica has a WAL whatever the database's mode is
        file.seek(18)
        file.write(b"\2\2")
    with contextlib.closing(sqlite3.connect(copy)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.execute("PRAGMA page_size").fetchone() == (512,)
    assert rows_of(str(copy)) == rows_of(pair.source.files.database)


@pytest.mark.parametrize("step", range(8))
def test_a_crash_within_a_change_of_the_page_size(pair: Pair, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The log has the transaction before the database has: it is there afterwards, or is applied again."""
    pair.catch_up()
    pair.insert(20_000)
    pair.catch_up()
    pair.write("PRAGMA page_size = 512", "VACUUM")
    left = step

    class Crash(BaseException):
        pass

    def until(name: str) -> Callable[..., object]:
        real = getattr(replica_wal, name, None) or getattr(os, name)

        def call(*args: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise Crash
            return real(*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(replica_wal, "write_at", until("write_at"))
        patch.setattr(replica_wal.os, "ftruncate", until("ftruncate"))
        with contextlib.suppress(Crash):
            pair.catch_up()
    pair.replica.close(clean=False)
    with closing_node(Node(pair.folder / "replica", is_primary=False)) as again:
        again.store.settle()
        pair.replica, pair.target = again, again.database()
        pair.catch_up()
        pair.check()


def test_another_page_size_beside_a_long_reader(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while the file is replaced; the reader keeps its state until it opens the database again."""
    pair.catch_up()
    pair.replica.apply.activate(pair.target)
    reader = SqliteProcess(pair.target.files.database)
    try:
        reader("BEGIN")
        expected = reader("SELECT id, v FROM t ORDER BY id")
        pair.write("INSERT INTO t (v) VALUES (1)", "PRAGMA page_size = 4096", "VACUUM")
        pair.catch_up()
        assert reader("SELECT id, v FROM t ORDER BY id") == expected
        new = reader("SELECT id, v FROM t ORDER BY id", on="new")
        assert new == rows_of(pair.source.files.database)
        reader.close("new")
        pair.insert()
        pair.catch_up()
        assert reader("SELECT id, v FROM t ORDER BY id") == expected
    finally:
        reader.kill()
    pair.check()


@pytest.mark.parametrize("pieces", [1, 3])
def test_another_page_size_is_refused_while_somebody_reads_and_changes_nothing(pair: Pair, pieces: int) -> None:
    """Asked for twice; it is applied in place as soon as nobody reads, and a connection that stays goes on."""
    pair.catch_up()
    pair.replica.apply.activate(pair.target)
    reader = SqliteProcess(pair.target.files.database)
    data = pair.write("INSERT INTO t (v) VALUES (randomblob(200000))", "PRAGMA page_size = 4096", "VACUUM")
    last = pair.source.log.head.txid
    incoming = pair.target.receive(last, last) if pieces > 1 else None
    for at in range(pieces if incoming else 0):
        incoming.write(data[at * len(data) // pieces : (at + 1) * len(data) // pieces])  # type: ignore[union-attr]

    def apply() -> Position:
        return incoming.finish(spare_readers=True) if incoming else pair.target.apply(data, spare_readers=True)

    try:
        reader("BEGIN")
        expected = reader("SELECT id, v FROM t ORDER BY id")
        if pair.source.position.txid > pair.target.position.txid + 1:  # both statements are transactions
            pair.target.apply(Path(pair.source.log.entries()[-2].path).read_bytes())
        before, names = state_of(pair.target), sorted(os.listdir(pair.target.files.folder))
        for _ in range(2):
            with pytest.raises(ReadersInTheWay):
                apply()
            assert state_of(pair.target) == before and sorted(os.listdir(pair.target.files.folder)) == names
            assert reader("SELECT id, v FROM t ORDER BY id") == expected
        inode = os.stat(pair.target.files.database).st_ino
        reader("COMMIT")
        assert apply() == pair.source.position
        assert os.stat(pair.target.files.database).st_ino == inode
        assert reader("SELECT id, v FROM t ORDER BY id") == rows_of(pair.source.files.database)
    finally:
        reader.kill()
    pair.check()


def test_what_does_not_follow_does_not_wait_for_readers(pair: Pair) -> None:
    """It is refused at once, whoever reads."""
    pair.catch_up()
    pair.replica.apply.activate(pair.target)
    reader = SqliteProcess(pair.target.files.database)
    try:
        reader("BEGIN")
        reader("SELECT count(*) FROM t")
        pair.insert()
        data = pair.write("PRAGMA page_size = 4096", "VACUUM")
        before = state_of(pair.target)
        with pytest.raises(PositionMismatch):
            pair.target.apply(data, spare_readers=True)
        assert state_of(pair.target) == before
    finally:
        reader.kill()


@pytest.mark.parametrize("how", ["page size", "set aside", "drop"])
def test_who_has_the_old_file_open_does_not_take_the_new_files_wal_for_its_own(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """It holds no lock at that moment, as in a rollback mode between two transactions."""
    monkeypatch.setattr("pylitefs.engine.shared_wal.SharedWal.lock_readers_out", lambda *_: False)
    pair.catch_up()
    old, last = SqliteProcess(pair.target.files.database), SqliteProcess(pair.target.files.database)
    try:
        assert old("SELECT count(*) FROM t") == [(3,)]
        if how == "page size":
            pair.replica.apply.activate(pair.target)
            last("BEGIN")
            last("SELECT count(*) FROM t")
        pair.target.app_handles = 2
        if how == "page size":
            pair.write("PRAGMA page_size = 4096", "VACUUM")
        elif how == "set aside":
            pair.target.set_aside_reason = "it cannot be read"
            pair.write("DELETE FROM t", "INSERT INTO t (v) VALUES (randomblob(5000))")
            TestResync().run(pair, TestResync.pages(pair.source))
        else:
            pair.primary.store.naming.drop(pair.source)
            pair.catch_up()
            make_sqlite(pair.source.files.database, page_size=1024, mode="DELETE", rows=9)
            pair.source.rollback.suspect = True
            assert pair.primary.store.capture.commit_point(pair.source)
        pair.catch_up()
        pair.insert(3000)
        pair.catch_up()
        pair.replica.apply.activate(pair.target)
        pair.insert(2000)
        pair.catch_up()
        assert os.path.getsize(pair.target.files.wal) > 0
        with pytest.raises(RuntimeError, match="locked"):
            old("SELECT id, v FROM t")
        new = last("SELECT id, v FROM t ORDER BY id", on="new")
        assert new == rows_of(pair.source.files.database)
        last.close("new")
        if how == "page size":
            assert last("SELECT count(*) FROM t") == [(3,)]
            last.close("main")
        assert os.path.exists(pair.target.files.wal), "it was another file's"
    finally:
        old.kill()
        last.kill()
    pair.target.app_handles = 0
    pair.replica.apply._upkeep(pair.target)
    assert not pair.target.locked_out
    pair.check()


@pytest.mark.parametrize("how", ["page size", "set aside", "drop", "put aside"])
def test_who_reads_the_old_file_in_a_wal_is_told(pair: Pair, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Between two transactions it holds SHARED and its old wal-index, which nobody changes any more: it would read the
    old state for ever. A snapshot is read to its end."""
    monkeypatch.setattr("pylitefs.engine.shared_wal.SharedWal.lock_readers_out", lambda *_: False)
    pair.catch_up()
    pair.replica.apply.activate(pair.target)
    idle, within = SqliteProcess(pair.target.files.database), SqliteProcess(pair.target.files.database)
    try:
        within("BEGIN")
        assert idle("SELECT count(*) FROM t") == within("SELECT count(*) FROM t") == [(3,)]
        pair.target.app_handles = 2
        if how == "page size":
            pair.write("PRAGMA page_size = 4096", "VACUUM")
            pair.catch_up()
        elif how == "set aside":
            pair.target.set_aside_reason = "it cannot be read"
            pair.write("DELETE FROM t", "INSERT INTO t (v) VALUES (randomblob(5000))")
            TestResync().run(pair, TestResync.pages(pair.source))
        elif how == "drop":
            pair.primary.store.naming.drop(pair.source)
            pair.catch_up()
        else:
            pair.replica.store.naming.set_aside(pair.target.name, "the primary does not know it")
        with pytest.raises(RuntimeError, match="unable to open database file"):
            idle("SELECT count(*) FROM t")
        assert within("SELECT count(*) FROM t") == [(3,)]
        within("COMMIT")
        with pytest.raises(RuntimeError, match="unable to open database file"):
            within("SELECT count(*) FROM t")
        if how in ("page size", "set aside"):
            pair.replica.apply.activate(pair.target)
            expected = [(len(rows_of(pair.source.files.database)),)]
            assert idle("SELECT count(*) FROM t", on="new") == expected
            within.close("main")
            idle.close("main")
            assert os.path.exists(pair.target.files.wal), "it was another file's"
            assert idle("SELECT count(*) FROM t", on="new") == expected
    finally:
        idle.kill()
        within.kill()


def test_a_replacement_that_fails_locks_nobody_out(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.catch_up()
    reader = SqliteProcess(pair.target.files.database)
    try:
        assert reader("SELECT count(*) FROM t") == [(3,)]
        pair.target.app_handles = 1
        pair.target.set_aside_reason = "it cannot be read"
        pair.insert()

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "no room")

        with monkeypatch.context() as patch:
            patch.setattr("pylitefs.engine.replacement.publish_file", full)
            with pytest.raises(OSError, match="no room"):
                TestResync().run(pair, TestResync.pages(pair.source))
        pair.replica.store.opener.start()
        pair.replica.store.opener.stop()
        assert reader("SELECT count(*) FROM t") == [(3,)] and not pair.target.locked_out
    finally:
        reader.kill()


@pytest.mark.parametrize("at", ["noted", "exchanged"])
def test_a_crash_while_a_file_takes_anothers_place(pair: Pair, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """The old -wal never lies beside the new file."""
    pair.catch_up()
    pair.replica.apply.activate(pair.target)
    pair.insert(3000)
    pair.catch_up()
    assert os.path.getsize(pair.target.files.wal) > 0
    old = Path(pair.target.files.wal).read_bytes()
    pair.target.set_aside_reason = "it cannot be read"
    pair.write("DELETE FROM t", "INSERT INTO t (v) VALUES (randomblob(5000))")

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    step = "_take_side_files" if at == "exchanged" else "os.rename"
    with monkeypatch.context() as patch:
        patch.setattr(f"pylitefs.engine.replacement.{step}", crash)
        with pytest.raises(KeyboardInterrupt):
            TestResync().run(pair, TestResync.pages(pair.source))
    assert Path(pair.target.files.wal).read_bytes() == old
    pair.replica.store.naming.finish_promotions()
    assert os.path.exists(pair.target.files.wal) == (at == "noted")
    content = Path(pair.target.files.database).read_bytes()
    assert (content == Path(pair.source.files.database).read_bytes()) == (at == "exchanged")


def test_drop_and_create(pair: Pair) -> None:
    pair.insert()
    pair.catch_up()
    pair.primary.store.naming.drop(pair.source)
    pair.catch_up()
    assert not pair.target.exists and not os.path.exists(pair.target.files.database)
    assert "drop" in pair.replica.kinds()
    with contextlib.closing(sqlite3.connect(pair.source.files.database)) as db:
        db.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, v BLOB)")
    pair.source.rollback.suspect = True
    assert pair.primary.store.capture.commit_point(pair.source)
    pair.insert()
    pair.catch_up()
    pair.check()
    assert pair.target.position.txid == 5


@pytest.mark.parametrize("limit", [2_000, 150_000])
def test_a_full_disk_on_the_replica(pair: Pair, limit: int) -> None:
    """Neither the log nor the WAL has room: the position stays, and the same file works later."""
    pair.catch_up()
    pair.replica.apply.activate(pair.target)
    data = pair.insert(400_000)
    before = pair.target.position
    with largest_file(limit), pytest.raises(OSError):
        pair.target.apply(data)
    assert pair.target.position == before and log_files(pair.target) == log_files(pair.source)[:1]
    pair.target.apply(data)
    pair.check()


def test_the_log_has_room_but_the_wal_has_not(pair: Pair) -> None:
    pair.catch_up()
    pair.write("CREATE TABLE z AS SELECT zeroblob(600000) AS v")
    data = pair.newest()
    assert len(data) < 100_000
    before = pair.target.position
    pair.replica.apply.activate(pair.target)
    with largest_file(100_000), pytest.raises(OSError):
        pair.target.apply(data)
    assert pair.target.position == before and len(log_files(pair.target)) == 1
    pair.target.apply(data)
    pair.check()


def test_a_reader_neither_delays_nor_moves(pair: Pair) -> None:
    pair.catch_up()
    pair.replica.apply.activate(pair.target)
    reader = SqliteProcess(pair.target.files.database)
    try:
        reader("BEGIN")
        expected = reader("SELECT id, v FROM t ORDER BY id")
        for _ in range(10):
            pair.insert(3000)
            pair.catch_up()
        assert pair.target.position == pair.source.position
        assert not pair.replica.apply.rest(pair.target)
        assert reader("SELECT id, v FROM t ORDER BY id") == expected
        reader("COMMIT")
        assert reader("SELECT id, v FROM t ORDER BY id") == rows_of(pair.source.files.database)
    finally:
        reader.kill()
    pair.check()


class TestResync:
    @staticmethod
    def pages(database: Database) -> list[tuple[int, bytes]]:
        data, size = Path(database.files.database).read_bytes(), database.page_size
        return [(at // size + 1, data[at : at + size]) for at in range(0, len(data), size)]

    def run(self, pair: Pair, pages: list[tuple[int, bytes]], keep: int | None = None) -> Position:
        resync = pair.target.resync(pair.source.page_size, keep)
        for pgno, page in pages:
            resync.pages([(pgno, page)])
        return resync.finish(pair.source.commit, pair.source.position)

    def test_into_nothing(self, pair: Pair) -> None:
        pair.insert(5000)
        assert self.run(pair, self.pages(pair.source)) == pair.source.position
        assert pair.target.log.entries() == []
        pair.insert()
        pair.catch_up()
        pair.check()
        assert "resync" in pair.replica.kinds()

    def test_only_what_differs(self, pair: Pair) -> None:
        pair.write("CREATE TABLE large AS SELECT randomblob(20000) AS v")
        pair.catch_up()
        old = pair.target.page_checksums()
        pair.insert(7000)
        new = pair.source.page_checksums()
        same = {pgno for pgno in range(1, len(old) + 1) if old[pgno - 1] == new[pgno - 1]}
        differ = [(pgno, page) for pgno, page in self.pages(pair.source) if pgno not in same]
        assert 0 < len(differ) < len(new)
        self.run(pair, differ)
        pair.insert()
        pair.catch_up()
        pair.check()

    def test_too_little_changes_nothing(self, pair: Pair) -> None:
        pair.catch_up()
        pair.insert(7000)
        before = state_of(pair.target)
        with pytest.raises(FormatError):
            self.run(pair, self.pages(pair.source)[:1])
        bad = [(pgno, bytes(1024)) for pgno, _ in self.pages(pair.source)]
        with pytest.raises(FormatError):
            self.run(pair, bad)
        resync = pair.target.resync(1024, None)
        with pytest.raises(FormatError):
            resync.pages([(1, b"short")])
        resync.abort()
        assert state_of(pair.target) == before
        assert not os.path.exists(os.path.join(pair.target.files.folder, "database.new"))
        pair.catch_up()
        pair.check()

    def test_transactions_while_pages_are_sent(self, pair: Pair) -> None:
        pages = self.pages(pair.source)
        resync = pair.target.resync(1024, None)
        resync.pages(pages[:2])
        first = pair.insert(5000)
        resync.pages(pages[2:])
        resync.transaction(first)
        resync.transaction(pair.write("DELETE FROM t WHERE id > 3", "VACUUM"))
        assert resync.finish(pair.source.commit, pair.source.position) == pair.source.position
        pair.check()

    def test_a_transaction_of_another_page_size_is_refused(self, pair: Pair) -> None:
        resync = pair.target.resync(1024, None)
        with pytest.raises(FormatError):
            resync.transaction(pair.write("PRAGMA page_size = 4096", "VACUUM"))
        resync.abort()

    def test_another_page_size(self, pair: Pair) -> None:
        pair.catch_up()
        pair.write("PRAGMA page_size = 4096", "VACUUM")
        self.run(pair, self.pages(pair.source))
        pair.check()

    def test_a_branch_is_kept(self, pair: Pair) -> None:
        for _ in range(3):
            pair.insert()
        pair.catch_up()
        branch = {Path(entry.path).name: Path(entry.path).read_bytes() for entry in pair.target.log.entries()[2:]}
        left, after = pair.target.position, pair.target.log.positions(3)[-1]
        self.run(pair, [], keep=2)  # the same pages: only the log's end is another one
        moved = {path.name: path.read_bytes() for path in Path(pair.target.files.lost).rglob("*.ltx")}
        assert moved == branch
        (kept,) = branches(pair.replica.store.data_dir, pair.target.name)
        assert (kept.after, kept.to, kept.transactions, kept.reason != "") == (after, left, 2, True)
        lost = next(event for event in pair.replica.events if event.type == "lost")
        assert (lost.data["min_txid"], lost.data["max_txid"]) == (3, 4)

    def test_readers_do_not_notice(self, pair: Pair) -> None:
        pair.catch_up()
        pair.replica.apply.activate(pair.target)
        reader = SqliteProcess(pair.target.files.database)
        try:
            reader("BEGIN")
            expected = reader("SELECT id, v FROM t ORDER BY id")
            pair.insert(9000)
            self.run(pair, self.pages(pair.source))
            assert reader("SELECT id, v FROM t ORDER BY id") == expected
            reader("COMMIT")
            assert reader("SELECT id, v FROM t ORDER BY id") == rows_of(pair.source.files.database)
        finally:
            reader.kill()
        pair.check()


def test_building_that_is_given_up_leaves_nothing(pair: Pair) -> None:
    pair.catch_up()
    with pytest.raises(ZeroDivisionError), Building(pair.target) as building:
        path: str = building.path
        raise ZeroDivisionError
    assert not os.path.exists(path)
    pair.check()


@pytest.mark.parametrize("lost", [1, 3])
def test_a_primary_gets_its_tail_back(pair: Pair, lost: int) -> None:
    tail = [pair.insert(3000) for _ in range(lost)]
    files = pair.source.files
    position = pair.source.position
    image = Path(files.database).read_bytes()
    earlier = pair.source.log.entries()[0]
    data = bytearray()
    for pgno, page in Reader(earlier.chunks()):
        data[(pgno - 1) * 1024 : pgno * 1024] = page
    pair.primary.close(clean=False)
    Path(files.database).write_bytes(data)
    for name in log_files(pair.source)[1:]:
        os.unlink(os.path.join(files.ltx, name))
    pair.primary = Node(pair.folder / "primary")
    pair.source = pair.primary.database()
    assert pair.source.position.txid == 1
    if lost > 1:
        with pytest.raises(PositionMismatch):
            pair.primary.store.give_back("db", tail[1])
    with pytest.raises(LitefsError):
        pair.primary.store.give_back("db", tail[0][:-30])
    for ltx in tail:
        pair.primary.store.give_back("db", ltx)
    assert pair.source.position == position
    assert Path(files.database).read_bytes() == image and file_checksum(files.database) == position.checksum
    check_log(pair.source)


