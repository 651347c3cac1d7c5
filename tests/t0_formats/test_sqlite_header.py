from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlite_samples import ALL_PAGE_SIZES, connect

from pylitefs.errors import FormatError, TruncatedError
from pylitefs.formats.sqlite.header import HEADER_SIZE, MAGIC, DatabaseHeader, is_sqlite, lock_page, valid_page_size


@pytest.mark.parametrize("page_size", ALL_PAGE_SIZES)
@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_header_of_a_real_database(tmp_path: Path, page_size: int, mode: str) -> None:
    path = tmp_path / "x.db"
    db = connect(path, page_size, mode)
    db.execute("CREATE TABLE t(a)")
    db.execute("INSERT INTO t VALUES (1)")
    pages = db.execute("PRAGMA page_count").fetchone()[0]
    cookie = db.execute("PRAGMA schema_version").fetchone()[0]
    version = [int(n) for n in db.execute("SELECT sqlite_version()").fetchone()[0].split(".")]
    db.close()
    data = path.read_bytes()
    header = DatabaseHeader.unpack(data)
    assert is_sqlite(data) and is_sqlite(data[:16]) and is_sqlite(memoryview(data))
    assert (header.page_size, header.page_count, header.schema_cookie) == (page_size, pages, cookie)
    assert header.page_count_valid and header.reserved == 0
    assert header.journal_mode == ("wal" if mode == "wal" else "rollback")
    assert header.is_wal == (mode == "wal")
    assert header.sqlite_version == version[0] * 1000000 + version[1] * 1000 + version[2]


def test_page_count_is_not_believed_after_a_write_by_an_old_library(tmp_path: Path) -> None:
    db = connect(tmp_path / "x.db", journal_mode="delete")
    db.execute("CREATE TABLE t(a)")
    db.close()
    data = bytearray((tmp_path / "x.db").read_bytes())
    data[27] += 1
    assert not DatabaseHeader.unpack(data).page_count_valid


@pytest.mark.parametrize("at, value", [(0, 0), (16, 3), (17, 1), (19, 3), (21, 0), (23, 31)])
def test_bytes_that_sqlite_refuses(tmp_path: Path, at: int, value: int) -> None:
    db = connect(tmp_path / "x.db", 4096, "delete")
    db.execute("CREATE TABLE t(a)")
    db.close()
    data = bytearray((tmp_path / "x.db").read_bytes())
    data[at] = value
    with pytest.raises(FormatError):
        DatabaseHeader.unpack(data)


def test_what_is_no_database() -> None:
    assert not is_sqlite(b"")
    assert not is_sqlite(MAGIC[:15])
    assert not is_sqlite(b"SQLite format 4\0")
    assert not is_sqlite(MAGIC + b"\x02\x01")
    with pytest.raises(TruncatedError):
        DatabaseHeader.unpack(MAGIC.ljust(HEADER_SIZE - 1, b"\0"))
    with pytest.raises(FormatError):
        DatabaseHeader.unpack(bytes(HEADER_SIZE))


@pytest.mark.parametrize("page_size", ALL_PAGE_SIZES)
def test_lock_page_holds_the_pending_byte(page_size: int) -> None:
    pgno = lock_page(page_size)
    assert (pgno - 1) * page_size <= 0x40000000 < pgno * page_size


def test_page_sizes() -> None:
    assert [n for n in range(70000) if valid_page_size(n)] == [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]
    assert not valid_page_size(-512)


@given(st.one_of(st.binary(max_size=120), st.binary(min_size=84, max_size=110).map(MAGIC.__add__)))
def test_garbage_gives_only_format_errors(data: bytes) -> None:
    try:
        header = DatabaseHeader.unpack(data)
    except FormatError:
        return
    assert is_sqlite(data)
    assert valid_page_size(header.page_size)
