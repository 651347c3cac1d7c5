"""The daemon as WAL writer, with real SQLite readers beside it."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_nodes import NamedFiles, make_sqlite, rows_of
from limits import largest_file
from sqlite_process import SqliteProcess

from pylitefs.engine.shared_wal import SharedWal
from pylitefs.engine.wal_view import WalView
from pylitefs.errors import DatabaseBusy
from pylitefs.formats.sqlite.wal_index import read_header

Pages = list[tuple[int, bytes]]


class Pair:
    """A database that SQLite writes elsewhere, state by state, and the replica that follows with each state's pages."""

    def __init__(self, folder: Path, page_size: int = 1024) -> None:
        self.folder = folder
        self.page_size = page_size
        self.source = folder / "source"
        make_sqlite(str(self.source), page_size=page_size, mode="DELETE")
        self.files = NamedFiles("db", str(folder / "replica"))
        os.makedirs(self.files.folder)
        shutil.copyfile(self.source, self.files.database)
        self.image = self.source.read_bytes()
        self.replica = SharedWal(self.files, page_size, len(self.image) // page_size, 0o644)
        self.replica.open()
        self.readers = SqliteProcess(self.files.database)

    def write(self, *statements: str) -> tuple[Pages, int]:
        """Run SQL on the source: (the pages that changed, pages in all)."""
        db = sqlite3.connect(self.source, isolation_level=None)
        for sql in statements:
            db.execute(sql)
        db.close()
        new = self.source.read_bytes()
        size = self.page_size
        pages = [
            (at // size + 1, new[at : at + size])
            for at in range(0, len(new), size)
            if new[at : at + size] != self.image[at : at + size]
        ]
        self.image = new
        return pages, len(new) // size

    def step(self, *statements: str) -> None:
        self.replica.append(*self.write(*statements))

    def insert(self, size: int = 50) -> None:
        self.step(f"INSERT INTO t (v) VALUES (randomblob({size}))")

    def count(self, on: str) -> int:
        return int(self.readers("SELECT count(*) FROM t", on=on)[0][0])

    def check(self, on: str = "check") -> None:
        """A new reader sees the source's state."""
        assert self.readers("SELECT id, v FROM t ORDER BY id", on=on) == rows_of(self.source)
        assert self.readers("PRAGMA integrity_check", on=on) == [("ok",)]
        self.readers.close(on)

    def close(self) -> None:
        self.readers.kill()
        self.replica.close()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path)
    yield made
    made.close()


def test_new_readers_see_every_transaction(pair: Pair) -> None:
    pair.check()
    for _ in range(5):
        pair.insert(3000)
        pair.check()
    pair.step("DELETE FROM t WHERE id % 2", "INSERT INTO t (v) VALUES (randomblob(9000))")
    pair.check()


def test_an_open_transaction_keeps_its_snapshot(pair: Pair) -> None:
    readers = ["a", "b", "c"]
    expected = {}
    for on in readers:
        pair.insert(2000)
        pair.readers("BEGIN", on=on)
        expected[on] = pair.count(on)
    for _ in range(10):
        pair.insert(2000)
        pair.replica.checkpoint()
    assert {on: pair.count(on) for on in readers} == expected
    assert list(expected.values()) == [4, 5, 6]
    for on in readers:
        assert pair.readers("PRAGMA integrity_check", on=on) == [("ok",)]
        pair.readers("COMMIT", on=on)
        assert pair.count(on) == 16


def test_writing_is_refused(pair: Pair) -> None:
    pair.insert()
    with pytest.raises(RuntimeError, match="locked"):
        pair.readers("INSERT INTO t (v) VALUES (1)")
    assert pair.readers("PRAGMA wal_checkpoint(TRUNCATE)")[0][0] == 1
    pair.insert()
    pair.check()


def test_a_reader_that_closes_last_does_not_take_the_wal_away(pair: Pair) -> None:
    pair.insert()
    assert pair.count("only") == 4
    pair.readers.close("only")
    assert os.path.exists(pair.files.wal) and os.path.exists(pair.files.shm)
    pair.insert()
    pair.check()


def test_checkpoint_copies_no_more_than_readers_allow(pair: Pair) -> None:
    pair.insert()
    pair.readers("BEGIN", on="old")
    assert pair.count("old") == 4
    mark = pair.replica.mx_frame
    for _ in range(5):
        pair.insert()
    assert not pair.replica.checkpoint()
    assert pair.replica.backfill == mark < pair.replica.mx_frame
    pair.readers("COMMIT", on="old")
    assert pair.replica.checkpoint()
    assert Path(pair.files.database).read_bytes() == pair.image
    pair.check()


def test_a_reader_of_the_newest_frame_only_delays_the_restart(pair: Pair) -> None:
    pair.insert()
    pair.readers("BEGIN", on="new")
    assert pair.count("new") == 4
    pair.replica.checkpoint()
    assert pair.replica.backfill == pair.replica.mx_frame > 0
    assert Path(pair.files.database).read_bytes() == pair.image
    frames = pair.replica.mx_frame
    pair.insert()
    assert pair.replica.mx_frame > frames, "it goes on in the same generation"
    assert pair.count("new") == 4
    pair.readers("COMMIT", on="new")
    assert pair.replica.checkpoint() and pair.replica.mx_frame == 0
    pair.check()


def test_a_restart_begins_a_new_generation(pair: Pair) -> None:
    view = WalView(pair.files)
    generations = set()
    for _ in range(4):
        pair.insert(5000)
        header = view.wal_header()
        assert header is not None
        generations.add(header.salts)
        pair.check()
        assert pair.replica.checkpoint()
        assert pair.replica.mx_frame == 0 and Path(pair.files.database).read_bytes() == pair.image
        pair.check()
    assert len(generations) == 4
    view.close()


def test_a_reader_of_the_database_file_alone_stops_the_copy(pair: Pair) -> None:
    """Its slot is 0: it reads the file and ignores the WAL, so nothing may be copied under it."""
    pair.insert()
    assert pair.replica.checkpoint()
    pair.readers("BEGIN", on="file")
    assert pair.count("file") == 4
    pair.insert()
    before = Path(pair.files.database).read_bytes()
    assert not pair.replica.checkpoint()
    assert Path(pair.files.database).read_bytes() == before and pair.count("file") == 4
    pair.readers("COMMIT", on="file")
    assert pair.replica.checkpoint()
    pair.check()


def test_without_the_index_sqlite_recovers_the_same_rows(pair: Pair, tmp_path: Path) -> None:
    """What is in the WAL file is a WAL by itself: this is what a power cut leaves."""
    for size in (100, 70_000, 3000):
        pair.insert(size)
    shutil.copyfile(pair.files.database, tmp_path / "copy")
    shutil.copyfile(pair.files.wal, tmp_path / "copy-wal")
    assert rows_of(tmp_path / "copy") == rows_of(pair.source)


def test_size_changes(pair: Pair) -> None:
    for _ in range(6):
        pair.insert(20_000)
    pair.step("DELETE FROM t WHERE id > 2")
    pair.step("VACUUM")
    pair.check()
    assert pair.replica.checkpoint()
    assert Path(pair.files.database).read_bytes() == pair.image
    pair.insert(20_000)
    pair.check()


def test_a_commit_without_pages(pair: Pair) -> None:
    """Only the size changed: a frame must carry it all the same."""
    page = pair.replica.read_page(1)
    assert pair.replica.append([], len(pair.image) // 1024 + 2) == 1
    assert pair.replica.read_page(1) == page
    assert pair.replica.checkpoint()
    assert Path(pair.files.database).read_bytes() == pair.image + bytes(2048)


def test_more_frames_than_a_region_of_the_index_has(pair: Pair) -> None:
    pair.step("INSERT INTO t (v) VALUES (zeroblob(4500000))")
    assert pair.replica.mx_frame > 4062
    pair.check()
    pair.insert()
    pair.check()
    assert pair.replica.checkpoint()
    pair.check()


@pytest.mark.parametrize("frames_before", [0, 3, 300, 4060])
@pytest.mark.parametrize("good", [0, 1, 500])
def test_an_append_that_fails_in_the_middle(pair: Pair, frames_before: int, good: int) -> None:
    if frames_before:
        pair.step(f"INSERT INTO t (v) VALUES (zeroblob({(frames_before - 2) * 1020}))")
        assert abs(pair.replica.mx_frame - frames_before) < 25
    pair.readers("BEGIN", on="old")
    before = pair.count("old")
    pages, commit = pair.write("INSERT INTO t (v) VALUES (randomblob(1000000))")

    def failing() -> Iterator[tuple[int, bytes]]:
        yield from pages[:good]
        raise OSError(28, "no space left")

    mx_frame = pair.replica.mx_frame
    with pytest.raises(OSError, match="no space"):
        pair.replica.append(failing(), commit)
    assert pair.replica.mx_frame == mx_frame
    assert pair.count("new") == before, "nothing of it is visible"
    pair.readers.close("new")
    pair.replica.append(pages, commit)
    assert pair.count("old") == before
    pair.check()
    pair.readers("COMMIT", on="old")
    assert pair.replica.checkpoint()
    assert Path(pair.files.database).read_bytes() == pair.image


def test_a_full_disk_while_appending(pair: Pair) -> None:
    pair.insert()
    pages, commit = pair.write("INSERT INTO t (v) VALUES (randomblob(800000))")
    with largest_file(300_000), pytest.raises(OSError):
        pair.replica.append(pages, commit)
    assert pair.count("new") == 4
    pair.readers.close("new")
    pair.replica.append(pages, commit)
    pair.check()


@pytest.mark.parametrize("page_size", [512, 4096, 65536])
def test_another_page_size_needs_a_moment_alone(pair: Pair, page_size: int) -> None:
    pair.insert(5000)
    pair.write(f"PRAGMA page_size = {page_size}", "VACUUM")
    count = len(pair.image) // page_size
    pages = [(pgno, pair.image[(pgno - 1) * page_size : pgno * page_size]) for pgno in range(1, count + 1)]
    pair.readers("BEGIN", on="old")
    assert pair.count("old") == 4
    assert not pair.replica.lock_readers_out()
    with pytest.raises(RuntimeError, match="not locked out"):
        pair.replica.replace(pages, page_size, count)
    assert pair.count("old") == 4
    pair.readers("COMMIT", on="old")
    assert pair.replica.lock_readers_out()
    pair.replica.replace(pages, page_size, count)
    pair.replica.let_readers_in()
    assert Path(pair.files.database).read_bytes() == pair.image
    assert pair.count("old") == 4, "a connection that was open goes on"
    pair.page_size = page_size
    pair.check()
    pair.insert(9000)
    pair.check()
    assert pair.replica.checkpoint()
    assert Path(pair.files.database).read_bytes() == pair.image


def test_a_generation_that_was_begun_but_not_written_to(pair: Pair) -> None:
    pair.insert()
    assert pair.replica.checkpoint()
    with open(pair.files.shm, "rb") as shm:
        header = read_header(shm.read(136))
    assert header is not None and header.mx_frame == 0
    pair.check()
    pair.replica.close()
    pair.replica = SharedWal(pair.files, 1024, len(pair.image) // 1024, 0o644)
    os.unlink(pair.files.shm)
    pair.replica.open()
    pair.insert()
    pair.check()


def test_an_active_writer_elsewhere_is_busy(tmp_path: Path) -> None:
    path = tmp_path / "replica" / "database"
    make_sqlite(str(path), mode="WAL")
    files = NamedFiles("db", str(path.parent))
    sql = SqliteProcess(str(path))
    try:
        sql("BEGIN IMMEDIATE")
        replica = SharedWal(files, 4096, 2, 0o644)
        with pytest.raises(DatabaseBusy):
            replica.open()
        sql("INSERT INTO t (v) VALUES (1)")
        sql("COMMIT")
        assert sql("SELECT count(*) FROM t") == [(4,)]
    finally:
        sql.kill()


@pytest.mark.parametrize("seed", range(6))
def test_random_work_beside_random_readers(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    pair = Pair(tmp_path, rng.choice([512, 1024, 4096]))
    open_since: dict[str, list[tuple[object, ...]]] = {}
    try:
        for step in range(40):
            match rng.randrange(10):
                case 0 | 1 | 2 | 3:
                    pair.insert(rng.choice([10, 900, 30_000]))
                case 4:
                    pair.step("DELETE FROM t WHERE id % 3 = 1")
                case 5:
                    pair.step("VACUUM")
                case 6 | 7:
                    if pair.replica.checkpoint():
                        assert Path(pair.files.database).read_bytes() == pair.image
                case 8 if len(open_since) < 6:
                    on = f"reader{step}"
                    pair.readers("BEGIN", on=on)
                    open_since[on] = pair.readers("SELECT id, v FROM t ORDER BY id", on=on)
                    assert open_since[on] == rows_of(pair.source)
                case 9 if open_since:
                    on = rng.choice(sorted(open_since))
                    assert pair.readers("SELECT id, v FROM t ORDER BY id", on=on) == open_since.pop(on)
                    pair.readers("COMMIT", on=on)
                    pair.readers.close(on)
        for on, rows in open_since.items():
            assert pair.readers("SELECT id, v FROM t ORDER BY id", on=on) == rows
            pair.readers.close(on)
        pair.check()
        assert pair.replica.checkpoint()
        assert Path(pair.files.database).read_bytes() == pair.image
    finally:
        pair.close()
