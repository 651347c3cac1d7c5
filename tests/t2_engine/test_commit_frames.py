"""Which write to a WAL makes a commit whole: asked after each write of a real SQLite, however it is cut or joined."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from recording_vfs import RecordingVfs, library

from pylitefs.engine.stand_in import completes_commit
from pylitefs.errors import FormatError
from pylitefs.formats.sqlite.wal import WAL_HEADER_SIZE, WalHeader, scan_frames

pytestmark = pytest.mark.skipif(library() is None, reason="Python's sqlite3 has no libsqlite3 of its own")
Write = tuple[int, bytes]
COMMITS = 5


class Writes:
    """What SQLite writes to the WAL."""

    def __init__(self) -> None:
        self.found: list[Write] = []

    def created(self, path: str) -> None: ...
    def truncate(self, path: str, size: int) -> None: ...
    def sync(self, path: str) -> None: ...
    def delete(self, path: str, sync_folder: bool) -> None: ...

    def write(self, path: str, data: bytes, offset: int) -> None:
        if path.endswith("-wal"):
            self.found.append((offset, data))


def record(folder: Path, page_size: int, seed: int) -> list[Write]:
    """Small transactions, and large ones whose pages are spilled and written over; the WAL begins anew in between."""
    rng, writes = random.Random(seed), Writes()
    vfs = RecordingVfs(f"stand-in-{page_size}-{seed}", writes, seed)
    try:
        uri = f"file:{folder / 'db'}?vfs={vfs._name.decode()}"
        with contextlib.closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as db:
            db.execute(f"PRAGMA page_size = {page_size}")
            db.execute("CREATE TABLE t (n INTEGER PRIMARY KEY, v)")
            db.execute("CREATE TABLE counter (n)")
            db.execute("INSERT INTO counter VALUES (0)")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute("PRAGMA cache_size = 4")
            db.execute("PRAGMA wal_autocheckpoint = 0")
            shutil.copyfile(folder / "db", folder / "base")
            writes.found.clear()
            for number in range(1, COMMITS + 1):
                db.execute("BEGIN")
                for _ in range(rng.choice([1, 1, 12])):
                    db.execute("INSERT INTO t (v) VALUES (randomblob(?))", (rng.randrange(2 * page_size),))
                db.execute("UPDATE t SET v = randomblob(50) WHERE n % 3 = ?", (rng.randrange(3),))
                db.execute("UPDATE counter SET n = ?", (number,))
                db.execute("COMMIT")
    finally:
        vfs.unregister()
    assert vfs.errors == []
    return writes.found


def joined(writes: list[Write]) -> Iterator[Write]:
    """The header of a frame and its page in one write."""
    for first, second in itertools.zip_longest(writes, writes[1:]):
        if len(first[1]) == 24 and second is not None and second[0] == first[0] + 24 and len(second[1]) > 24:
            yield first[0], first[1] + second[1]
        elif len(first[1]) <= 32 or first[0] < 56 or not _follows_a_header(writes, first):
            yield first


def _follows_a_header(writes: list[Write], page: Write) -> bool:
    at = writes.index(page)
    return at > 0 and len(writes[at - 1][1]) == 24 and writes[at - 1][0] + 24 == page[0]


def cut(writes: list[Write], rng: random.Random) -> Iterator[Write]:
    """As the kernel may hand a write over in parts."""
    for offset, data in writes:
        parts = sorted({0, len(data), *(rng.randrange(len(data)) for _ in range(2))})
        for start, end in itertools.pairwise(parts):
            yield offset + start, data[start:end]


def commits_in(fd: int) -> int:
    """How many whole commits the WAL has, by all of its frames."""
    try:
        header = WalHeader.unpack(os.pread(fd, WAL_HEADER_SIZE, 0))
    except FormatError:
        return 0
    frames = os.pread(fd, os.fstat(fd).st_size, WAL_HEADER_SIZE)
    return int((scan_frames(header, frames, header.checksum1, header.checksum2).commits != 0).sum())


def last_commit(folder: Path) -> int:
    """What SQLite finds: the number of the last commit."""
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    shutil.copyfile(folder / "base", copy / "db")
    shutil.copyfile(folder / "replayed", copy / "db-wal")
    with contextlib.closing(sqlite3.connect(copy / "db")) as db:
        return int(db.execute("SELECT n FROM counter").fetchone()[0])


@pytest.mark.parametrize("how", ["as written", "joined", "cut"])
@pytest.mark.parametrize(("page_size", "seed"), [(512, 1), (1024, 2), (4096, 3), (65536, 4)])
def test_exactly_the_write_that_makes_a_commit_whole_is_taken_for_it(
    tmp_path: Path, page_size: int, seed: int, how: str
) -> None:
    writes = record(tmp_path, page_size, seed)
    if how != "as written":
        writes = list(joined(writes) if how == "joined" else cut(writes, random.Random(seed)))
    before, found = 0, 0
    fd = os.open(tmp_path / "replayed", os.O_RDWR | os.O_CREAT)
    try:
        for offset, data in writes:
            os.pwrite(fd, data, offset)
            now = commits_in(fd)
            assert completes_commit(fd, offset, len(data)) is (now != before), (offset, len(data))
            if now != before:
                found += 1
                assert last_commit(tmp_path) == found
            before = now
    finally:
        os.close(fd)
    assert found == COMMITS


def test_frames_of_an_earlier_round_are_no_commit(tmp_path: Path) -> None:
    """Behind the newest frames stand those of the WAL before it began anew, whole as they were."""
    writes = record(tmp_path, 1024, 5)
    fd = os.open(tmp_path / "replayed", os.O_RDWR | os.O_CREAT)
    try:
        for offset, data in writes:
            os.pwrite(fd, data, offset)
        offset, data = writes[-1]
        assert completes_commit(fd, offset, len(data))
        header = bytearray(os.pread(fd, 32, 0))
        header[16] ^= 1  # another salt, and no right checksum
        os.pwrite(fd, header, 0)
        assert not completes_commit(fd, offset, len(data))
    finally:
        os.close(fd)
