"""The writer of transactions: its files replayed give the database, whatever the change; a failure changes nothing."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_nodes import check_log, replay
from limits import largest_file

from pylitefs.engine.database import Database
from pylitefs.engine.files import DatabaseFiles
from pylitefs.engine.ltx_log import LogEntry
from pylitefs.engine.transaction import Change, UnstableSource
from pylitefs.events import EventBus
from pylitefs.formats.ltx.checksum import database_checksum, page_checksums
from pylitefs.formats.ltx.decoder import Reader
from pylitefs.formats.ltx.format import CHECKSUM_FLAG, lock_pgno


class Image:
    """A database whose pages are in memory; `record` hands the named ones to the engine."""

    def __init__(self, folder: Path, page_size: int = 1024) -> None:
        self.database = Database("db", DatabaseFiles("db", str(folder)), EventBus())
        self.database.begin_empty()
        self.page_size = page_size
        self.data = bytearray()
        self.asked: list[int] = []

    @property
    def commit(self) -> int:
        return len(self.data) // self.page_size

    def page(self, pgno: int) -> bytes:
        return bytes(self.data[(pgno - 1) * self.page_size : pgno * self.page_size])

    def put(self, pgno: int, page: bytes) -> None:
        assert len(page) == self.page_size
        self.resize(max(self.commit, pgno))
        self.data[(pgno - 1) * self.page_size : pgno * self.page_size] = page

    def resize(self, commit: int) -> None:
        size = commit * self.page_size
        self.data[size:] = bytes(max(0, size - len(self.data)))

    def missing(self, pgno: int) -> bytes:
        self.asked.append(pgno)
        return self.page(pgno)

    def record(self, *pgnos: int, stable: bool = True, txids: int = 1) -> LogEntry | None:
        return self.database.record(
            Change(self.page_size, self.commit, txids), ((pgno, self.page(pgno)) for pgno in pgnos), self.missing,
            lambda: stable, "capture",
        )  # fmt: skip

    def check(self) -> None:
        expected = CHECKSUM_FLAG
        if self.data:
            expected = database_checksum(page_checksums(1, bytes(self.data), self.page_size))
        assert self.database.position.checksum == expected
        assert self.database.commit == self.commit
        assert not self.data or self.database.page_size == self.page_size
        check_log(self.database)
        assert replay(self.database) == bytes(self.data)
        table = self.database.page_checksums()
        assert (database_checksum(table) if len(table) else CHECKSUM_FLAG) == expected


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Image]:
    made = Image(tmp_path)
    for pgno in range(1, 6):
        made.put(pgno, bytes([pgno]) * made.page_size)
    made.record(1, 2, 3, 4, 5)
    yield made
    made.database.close(clean=False)


def pgnos_of(entry: LogEntry | None) -> list[int]:
    assert entry is not None
    return [pgno for pgno, _ in Reader(entry.chunks())]


def test_the_first_transaction_is_a_snapshot(image: Image) -> None:
    entry = image.database.log.entries()[0]
    assert entry.header().is_snapshot and pgnos_of(entry) == [1, 2, 3, 4, 5]
    image.check()


def test_only_what_changed_is_written(image: Image) -> None:
    image.put(3, b"x" * 1024)
    assert pgnos_of(image.record(1, 2, 3, 4)) == [3]
    image.check()


def test_no_change_is_no_transaction(image: Image) -> None:
    before = image.database.position
    assert image.record(1, 2, 3) is None
    assert image.database.position == before and os.listdir(image.database.files.ltx) == [
        "0000000000000001-0000000000000001.ltx"
    ]
    image.check()


def test_pages_that_were_never_written_are_fetched(image: Image) -> None:
    """SQLite grows a database over pages that it allocated and freed in one transaction without writing them."""
    image.put(9, b"y" * 1024)
    assert pgnos_of(image.record(1, 9)) == [6, 7, 8, 9]
    assert image.asked == [6, 7, 8]
    image.resize(12)
    image.put(1, b"z" * 1024)
    assert pgnos_of(image.record(1)) == [1, 10, 11, 12]
    image.check()


def test_growth_alone_is_a_transaction(image: Image) -> None:
    image.resize(7)
    assert pgnos_of(image.record()) == [6, 7]
    image.check()


def test_shrink(image: Image) -> None:
    image.resize(2)
    image.put(1, b"s" * 1024)
    assert pgnos_of(image.record(1)) == [1]
    image.check()
    image.resize(4)
    image.record()
    image.check()


def test_shrink_alone_is_a_transaction(image: Image) -> None:
    image.resize(4)
    assert pgnos_of(image.record()) == []
    image.check()


def test_pages_beyond_the_end_are_left_out(image: Image) -> None:
    image.resize(3)
    pages = [(1, b"a" * 1024), (9, b"b" * 1024)]
    image.put(1, b"a" * 1024)
    image.database.record(Change(1024, 3), pages, image.missing, lambda: True, "capture")
    image.check()


@pytest.mark.parametrize("page_size", [512, 4096, 65536])
def test_another_page_size_is_a_whole_database(image: Image, page_size: int) -> None:
    image.page_size = page_size
    image.data = bytearray()
    for pgno in range(1, 4):
        image.put(pgno, bytes([pgno + 9]) * page_size)
    assert pgnos_of(image.record(1, 2, 3)) == [1, 2, 3]
    image.check()
    image.put(2, b"n" * page_size)
    assert pgnos_of(image.record(2)) == [2]
    image.check()


def test_drop_and_a_new_database_of_the_same_name(image: Image) -> None:
    image.data = bytearray()
    entry = image.record()
    assert entry is not None and entry.header().commit == 0 and not image.database.exists
    image.check()
    image.put(1, b"1" * 1024)
    image.put(2, b"2" * 1024)
    assert pgnos_of(image.record(1)) == [1, 2]
    assert image.database.position.txid == 3, "TXIDs go on"
    image.check()


def test_a_batch_counts_its_transactions(image: Image) -> None:
    image.put(2, b"b" * 1024)
    entry = image.record(2, txids=40)
    assert entry is not None and (entry.min_txid, entry.max_txid) == (2, 41)
    image.check()


def test_an_unstable_source_changes_nothing(image: Image) -> None:
    before, data = image.database.position, bytes(image.data)
    image.put(2, b"u" * 1024)
    with pytest.raises(UnstableSource):
        image.record(2, stable=False)
    assert image.database.position == before
    image.data = bytearray(data)
    image.check()
    assert len(os.listdir(image.database.files.ltx)) == 1


def test_a_full_disk_changes_nothing_and_the_next_try_works(image: Image) -> None:
    noise = random.Random(1)
    before, data = image.database.position, bytes(image.data)
    for pgno in range(1, 600):
        image.put(pgno, noise.randbytes(1024))
    wanted = bytes(image.data)
    with largest_file(64 << 10), pytest.raises(OSError):
        image.record(*range(1, 600))
    assert image.database.position == before and len(os.listdir(image.database.files.ltx)) == 1
    image.data = bytearray(data)
    image.check()
    image.data = bytearray(wanted)
    assert image.record(*range(1, 600)) is not None
    image.check()


def test_the_lock_page_is_left_out(tmp_path: Path) -> None:
    """Around 1 GiB, without a gigabyte: the pages before it are only counted."""
    size = 65536
    lock = lock_pgno(size)
    page = b"p" * size
    database = Database("db", DatabaseFiles("db", str(tmp_path)), EventBus())
    database.begin_empty()
    database.record(Change(size, 2), [(1, page), (2, page)], lambda pgno: page, lambda: True, "capture")
    entry = database.record(Change(size, lock + 1), [(1, page)], lambda pgno: page, lambda: True, "capture")
    found = pgnos_of(entry)
    assert lock not in found and found[-1] == lock + 1 and len(found) == lock - 2
    assert database.table.values[lock - 1] == 0
    assert database_checksum(database.page_checksums()) == database.position.checksum
    database.close(clean=False)


@pytest.mark.parametrize("seed", range(8))
def test_random_changes(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    image = Image(tmp_path, 512)
    for _ in range(40):
        smallest = image.commit
        match rng.randrange(8):
            case 0:
                smallest = rng.randrange(0, 30)
                image.resize(smallest)
            case 1:
                image.page_size = rng.choice([512, 1024])
                image.data = bytearray()
        changed = {rng.randrange(1, 30) for _ in range(rng.randrange(5))}
        if image.data:
            for pgno in changed:
                image.put(pgno, rng.randbytes(image.page_size))
        changed |= set(range(smallest + 1, image.commit + 1))
        if not image.database.exists or image.page_size != image.database.page_size:
            changed = set(range(1, image.commit + 1))
        unchanged = {rng.randrange(1, 30) for _ in range(2)}
        if image.data or image.database.exists:
            image.record(*sorted(pgno for pgno in changed | unchanged if pgno <= image.commit))
        if image.database.position.txid and image.commit:
            image.check()
    image.database.close(clean=False)
