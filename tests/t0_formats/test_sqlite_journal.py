from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlite_samples import ALL_PAGE_SIZES, PAGE_SIZES, copy_database, sidecar

from pylitefs.errors import FormatError, TruncatedError
from pylitefs.formats.sqlite import journal
from pylitefs.formats.sqlite.header import DatabaseHeader
from pylitefs.formats.sqlite.journal import JournalHeader, records

u32 = st.integers(0, 2**32 - 1)

CHILD = """
import sqlite3, sys, time
path, page_size, mode, synchronous = sys.argv[1:]
db = sqlite3.connect(path, isolation_level=None)
for pragma in ("page_size=" + page_size, "auto_vacuum=FULL", "journal_mode=" + mode, "synchronous=" + synchronous):
    db.execute("PRAGMA " + pragma)
db.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, a, b)")
db.execute("CREATE INDEX ta ON t(a)")
many = "WITH n(i) AS (VALUES(1) UNION ALL SELECT i+1 FROM n WHERE i<%d) "
db.execute(many % 300 + "INSERT INTO t SELECT i, random(), randomblob(%d) FROM n" % max(200, int(page_size) // 20))
db.execute("UPDATE t SET a = a + 1")  # leaves old records in a persistent journal
db.execute("PRAGMA cache_size=3")
db.execute("PRAGMA cache_spill=1")
db.execute("BEGIN")
db.execute("UPDATE t SET a = random(), b = randomblob(length(b)) WHERE id % 3")
db.execute("DELETE FROM t WHERE id > 200")
db.execute(many % 90 + "INSERT INTO t(a, b) SELECT random(), randomblob(%d) FROM n" % int(page_size))
db.execute("UPDATE t SET b = randomblob(20) WHERE id < 30")
print("ready", flush=True)
time.sleep(60)
"""

# The commit of several databases is killed by a write beyond the size limit: when the second database is written,
# both journals name the super-journal.
SUPER_CHILD = """
import resource, signal, sqlite3, sys
one, two, page_size, mode, synchronous = sys.argv[1:]
db = sqlite3.connect(one, isolation_level=None)
db.execute("ATTACH ? AS two", (two,))
for schema in ("main.", "two."):
    for pragma in ("page_size=" + page_size, "journal_mode=" + mode, "synchronous=" + synchronous):
        db.execute("PRAGMA " + schema + pragma)
    db.execute(f"CREATE TABLE {schema}t(id INTEGER PRIMARY KEY, b)")
    db.execute(f"INSERT INTO {schema}t VALUES (1, 'old')")
db.execute("PRAGMA two.cache_size=-100000")
db.execute("BEGIN")
db.execute("UPDATE main.t SET b = 'new'")
db.execute("UPDATE two.t SET b = zeroblob(4000000)")
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (2000000, 2000000))
db.execute("COMMIT")
"""


def crash(path: Path, page_size: int, mode: str, synchronous: str) -> None:
    """Leave a hot journal beside `path`: a process killed in the middle of a transaction that has spilled pages."""
    arguments = [sys.executable, "-c", CHILD, str(path), str(page_size), mode, synchronous]
    child = subprocess.Popen(arguments, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
    finally:
        child.kill()
        child.communicate()


def reader(data: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, n: data[offset : offset + n]


def roll_back(database: bytes, data: bytes) -> bytes:
    """The database after our playback of the journal `data`."""
    try:
        undo = records(reader(data), len(data), DatabaseHeader.unpack(database).page_size)
    except FormatError:
        return database
    out = bytearray(database[: undo.initial_pages * undo.page_size])
    out.extend(bytes(undo.initial_pages * undo.page_size - len(out)))
    for pgno, page in undo:
        assert len(page) == undo.page_size
        out[(pgno - 1) * undo.page_size : pgno * undo.page_size] = page
    return bytes(out)


def sqlite_roll_back(path: Path) -> bytes:
    """The database after SQLite found the journal itself."""
    db = sqlite3.connect(path, isolation_level=None)
    try:
        db.execute("SELECT count(*) FROM sqlite_master").fetchall()
    except sqlite3.DatabaseError:
        pass  # a damaged journal may leave a damaged database
    finally:
        db.close()
    return path.read_bytes()


@pytest.mark.parametrize("mode", ["DELETE", "TRUNCATE", "PERSIST"])
@pytest.mark.parametrize("synchronous", ["OFF", "FULL"])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_rollback_is_that_of_sqlite(tmp_path: Path, page_size: int, synchronous: str, mode: str) -> None:
    path = tmp_path / "x.db"
    crash(path, page_size, mode, synchronous)
    data, torn = sidecar(path, "-journal").read_bytes(), path.read_bytes()
    assert journal.is_hot_header(data[:28]) and journal.read_super_journal_name(reader(data), len(data)) is None
    header = JournalHeader.unpack(data)
    assert header.pack() == data[:28] and header.page_size == page_size
    assert (header.record_count == journal.COUNT_FROM_SIZE) == (synchronous == "OFF")
    assert journal.nonce(data[:28]) == header.nonce
    undo = records(reader(data), len(data))
    pgnos = [pgno for pgno, _ in undo]
    assert len(pgnos) == len(set(pgnos)) > 5 and [pgno for pgno, _ in undo] == pgnos
    if synchronous == "FULL":
        assert data.count(journal.MAGIC) > 1, "spilling must have made several segments"
    mine = roll_back(torn, data)
    theirs = sqlite_roll_back(path)
    assert mine != torn
    assert mine == theirs
    assert DatabaseHeader.unpack(mine).page_count * page_size == len(mine)
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    db.close()


@pytest.mark.parametrize("mode", ["DELETE", "TRUNCATE", "PERSIST"])
def test_a_committed_transaction_leaves_no_hot_journal(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "x.db"
    db = sqlite3.connect(path, isolation_level=None)
    db.execute(f"PRAGMA journal_mode={mode}")
    db.execute("CREATE TABLE t(a)")
    db.execute("BEGIN")
    db.execute("INSERT INTO t VALUES (1)")
    during = sidecar(path, "-journal").read_bytes()[:28]
    assert not journal.is_hot_header(during)  # not synced yet: no magic
    assert len(during) < 28 or journal.nonce(during) is not None
    db.execute("COMMIT")
    after = sidecar(path, "-journal").read_bytes() if mode != "DELETE" else b""
    db.close()
    assert not journal.is_hot_header(after) and journal.nonce(after) is None
    assert (len(after) > 512) == (mode == "PERSIST")
    with pytest.raises(FormatError):
        records(reader(after), len(after))


@pytest.mark.parametrize("mode", ["DELETE", "PERSIST"])
@pytest.mark.parametrize("synchronous", ["NORMAL", "FULL"])
@pytest.mark.parametrize("page_size", [512, 4096])
@pytest.mark.parametrize("name", ["one", "ünï-☃"])
def test_super_journal(tmp_path: Path, mode: str, synchronous: str, page_size: int, name: str) -> None:
    one, two = tmp_path / f"{name}.db", tmp_path / "two.db"
    arguments = [sys.executable, "-c", SUPER_CHILD, str(one), str(two), str(page_size), mode, synchronous]
    assert subprocess.run(arguments).returncode < 0
    named = [path for path in tmp_path.iterdir() if "-mj" in path.name]
    assert len(named) == 1
    after = {}
    for path in (one, two):
        data, torn = sidecar(path, "-journal").read_bytes(), path.read_bytes()
        assert journal.read_super_journal_name(reader(data), len(data)) == str(named[0])
        damaged = bytearray(data)
        damaged[-20] ^= 1
        assert journal.read_super_journal_name(reader(damaged), len(damaged)) is None
        after[path] = roll_back(torn, data)
        assert after[path] != torn
        copy = copy_database(path, tmp_path / "copy", ("-journal",))  # its super-journal still exists
        assert sqlite_roll_back(copy) == after[path]
    for path in (one, two):
        assert sqlite_roll_back(path) == after[path]
        db = sqlite3.connect(path)
        assert db.execute("SELECT b FROM t").fetchall() == [("old",)]
        db.close()


@cache
def samples() -> list[tuple[bytes, bytes]]:
    found = []
    with TemporaryDirectory() as folder:
        for synchronous in ("OFF", "FULL"):
            path = Path(folder) / f"{synchronous}.db"
            crash(path, 1024, "DELETE", synchronous)
            found.append((path.read_bytes(), sidecar(path, "-journal").read_bytes()))
    return found


@given(st.integers(0, 1), st.sampled_from(["flip", "header", "cut", "zero", "count", "pgno"]), st.randoms())
@settings(max_examples=120, deadline=None)
def test_damaged_journals_are_played_back_as_far_as_sqlite_does(which: int, kind: str, rnd: random.Random) -> None:
    torn, data = samples()[which]
    bad = bytearray(data)
    if kind == "flip":
        for _ in range(rnd.randrange(1, 40)):
            bad[rnd.randrange(len(bad))] ^= rnd.randrange(1, 256)
    elif kind == "header":
        bad[rnd.randrange(28)] ^= 1 << rnd.randrange(8)
    elif kind == "cut":
        del bad[rnd.randrange(len(bad)) :]
    elif kind == "zero":
        at = rnd.randrange(len(bad))
        bad[at : at + 512] = bytes(len(bad[at : at + 512]))
    elif kind == "count":
        bad[8:12] = rnd.choice([0, 1, 2, 7, 2**31, 2**32 - 1]).to_bytes(4, "big")
    else:
        at = 512 + rnd.randrange(3) * 1032
        bad[at : at + 4] = rnd.choice([0, 1, 5000, 0x40000000 // 1024 + 1]).to_bytes(4, "big")
    bad[16:18] = bytes(len(bad[16:18]))  # neither of us is to make a database of terabytes
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x.db"
        path.write_bytes(torn)
        sidecar(path, "-journal").write_bytes(bad)
        assert sqlite_roll_back(path) == roll_back(torn, bytes(bad))


@given(u32, u32, u32, st.sampled_from([32, 512, 4096, 65536]), st.sampled_from([0, *ALL_PAGE_SIZES]))
def test_header_round_trip(count: int, nonce: int, pages: int, sector: int, page_size: int) -> None:
    header = JournalHeader(count, nonce, pages, sector, page_size)
    assert JournalHeader.unpack(header.pack()) == header
    assert journal.nonce(header.pack()) == nonce
    with pytest.raises(TruncatedError):
        JournalHeader.unpack(header.pack()[:27])


def test_very_old_journals_take_the_page_size_of_the_database() -> None:
    page = bytes(range(256)) * 2
    record = (1).to_bytes(4, "big") + page + journal.page_checksum(page, 9).to_bytes(4, "big")
    data = JournalHeader(1, 9, 1, 512, 0).pack().ljust(512, b"\0") + record
    with pytest.raises(FormatError):
        records(reader(data), len(data))
    assert list(records(reader(data), len(data), page_size=512)) == [(1, page)]


def test_pages_behind_the_old_size_are_passed_over() -> None:
    """Even with a wrong checksum: pager_playback_one_page looks at it only for pages that it restores."""
    page = bytes(range(256)) * 2
    checksum = journal.page_checksum(page, 9).to_bytes(4, "big")
    body = b"".join(pgno.to_bytes(4, "big") + page + check for pgno, check in [
        (2, checksum), (3, bytes(4)), (1, checksum), (2, bytes(4)), (1, checksum),
    ])  # fmt: skip
    data = JournalHeader(5, 9, 2, 512, 512).pack().ljust(512, b"\0") + body
    assert [pgno for pgno, _ in records(reader(data), len(data))] == [2, 1]


def test_reading_is_in_small_pieces() -> None:
    page = bytes(65536)
    record = (3).to_bytes(4, "big") + page + (9).to_bytes(4, "big")
    data = JournalHeader(journal.COUNT_FROM_SIZE, 9, 3, 512, 65536).pack().ljust(512, b"\0") + 40 * record
    asked: list[int] = []

    def read(offset: int, n: int) -> bytes:
        asked.append(n)
        return data[offset : offset + n]

    assert sum(1 for _ in records(read, len(data))) == 40
    assert max(asked) <= 1 << 18


@given(st.binary(max_size=300), st.integers(0, 2**32 - 1), st.integers(0, 40))
@settings(deadline=None)
def test_garbage_gives_only_format_errors(tail: bytes, count: int, extra: int) -> None:
    header = JournalHeader(count, 1, 50, 32, 512).pack()
    for data in (tail, journal.MAGIC + tail, header + tail, header + tail * extra, tail + journal.MAGIC):
        journal.read_super_journal_name(reader(data), len(data))
        journal.nonce(data)
        try:
            undo = records(reader(data), len(data))
        except FormatError:
            continue
        assert all(0 < pgno <= undo.initial_pages and len(page) == undo.page_size for pgno, page in undo)


def test_a_file_that_shrank_while_it_was_read() -> None:
    header = JournalHeader(5, 1, 50, 512, 512).pack().ljust(512, b"\0")
    assert list(records(reader(header), 10_000_000)) == []
    assert journal.read_super_journal_name(reader(header), 10_000_000) is None
