from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pylitefs.errors import FormatError
from pylitefs.formats.ltx.checksum import (
    CHECKSUM_FLAG,
    combine,
    crc64,
    database_checksum,
    page_checksum,
    page_checksums,
)
from pylitefs.formats.ltx.format import lock_pgno


def test_check_value() -> None:
    assert crc64(b"123456789") == 0xB90956C775A41001
    assert crc64(b"") == 0


@given(st.lists(st.binary(max_size=50), max_size=6))
def test_running(chunks: list[bytes]) -> None:
    crc = 0
    for chunk in chunks:
        crc = crc64(memoryview(chunk), crc)
    assert crc == crc64(b"".join(chunks))


# Known values of superfly/ltx.
@pytest.mark.parametrize(("page", "expected"), [(b"\x01" * 512, 0xE4E4AAA102377EEE), (bytes(4096), 0xD9328F592D9E733D)])
def test_page_known(page: bytes, expected: int) -> None:
    assert page_checksum(1, page) == expected
    assert page_checksum(1, memoryview(bytearray(page))) == expected


@given(st.integers(1, 2**32 - 1), st.binary(min_size=512, max_size=512))
def test_page_is_the_crc_of_number_and_page(pgno: int, page: bytes) -> None:
    assert page_checksum(pgno, page) == crc64(pgno.to_bytes(4, "big") + page) | CHECKSUM_FLAG


def checksum_of(path: Path) -> int:
    """Of a database whose writer's SQLite version number is taken out of the first page, so that it is the same
    everywhere."""
    data = bytearray(path.read_bytes())
    data[96:100] = (3039002).to_bytes(4, "big")
    return database_checksum(page_checksums(1, data, 4096))


def test_real_database(tmp_path: Path) -> None:
    path = tmp_path / "app.db"
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA page_size = 4096")
    connection.execute("CREATE TABLE t (x)")
    assert checksum_of(path) == 0xF630F5AE3060002C
    connection.execute("INSERT INTO t VALUES (100)")
    assert checksum_of(path) == 0xB765DCE8249E9B4B
    connection.close()


@given(st.lists(st.binary(min_size=16, max_size=16), min_size=1, max_size=8), st.data())
def test_combine_equals_recomputing(pages: list[bytes], data: st.DataObject) -> None:
    table = np.array([page_checksum(i + 1, p) for i, p in enumerate(pages)], dtype=np.uint64)
    total = database_checksum(table)
    assert total & CHECKSUM_FLAG
    index = data.draw(st.integers(0, len(pages) - 1))
    new = page_checksum(index + 1, data.draw(st.binary(min_size=16, max_size=16)))
    changed = table.copy()
    changed[index] = new
    assert combine(total, int(table[index]), new) == database_checksum(changed)
    shorter = table[:-1]
    assert combine(total, int(table[-1]), 0) == database_checksum(shorter)
    assert combine(database_checksum(shorter), 0, int(table[-1])) == total


def test_empty_database() -> None:
    assert database_checksum(np.empty(0, dtype=np.uint64)) == CHECKSUM_FLAG


def test_table_of_pages_leaves_the_lock_page_out() -> None:
    lock = lock_pgno(65536)
    pages = bytes(65536) * 3
    table = page_checksums(lock - 1, pages, 65536)
    assert table.tolist() == [page_checksum(lock - 1, bytes(65536)), 0, page_checksum(lock + 1, bytes(65536))]
    assert page_checksums(7, b"", 512).shape == (0,)
    with pytest.raises(FormatError):
        page_checksums(1, bytes(513), 512)
