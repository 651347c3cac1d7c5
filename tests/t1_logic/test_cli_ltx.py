"""`litefs ltx`: what it prints of good files, and one line for every bad one."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pylitefs.cli.main import cli
from pylitefs.formats.ltx.checksum import database_checksum, page_checksum, page_checksums
from pylitefs.formats.ltx.decoder import decode_index, index_range
from pylitefs.formats.ltx.encoder import Encoder
from pylitefs.formats.ltx.format import Header, file_name, lock_pgno

TAIL_SIZE = 24


def ltx(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, ["ltx", *map(str, args)])


def write_ltx(path: Path, header: Header, pages: dict[int, bytes], post_apply_checksum: int) -> Path:
    encoder = Encoder(header)
    with open(path, "wb") as file:
        file.write(encoder.begin())
        for pgno, page in pages.items():
            file.write(encoder.page(pgno, page))
        file.write(encoder.finish(post_apply_checksum))
    return path


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "app.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE t (a, b)")
    connection.executemany("INSERT INTO t VALUES (?, ?)", [(n, "x" * n) for n in range(300)])
    connection.commit()
    connection.close()
    return path


@pytest.fixture
def snapshot(database: Path) -> Path:
    """The whole of `database` as transaction 1."""
    data = database.read_bytes()
    pages = {at // 4096 + 1: data[at : at + 4096] for at in range(0, len(data), 4096)}
    header = Header(0, 4096, len(pages), 1, 1, 1_700_000_000_123, 0, epoch=12)
    checksum = database_checksum(page_checksums(1, data, 4096))
    return write_ltx(database.parent / file_name(1, 1), header, pages, checksum)


@pytest.fixture
def change(tmp_path: Path) -> Path:
    """Transactions 2 to 7: two pages."""
    header = Header(0, 512, 9, 2, 7, 0, 1 << 63 | 5, wal_offset=32, wal_size=100, wal_salt1=1, wal_salt2=0xFF)
    return write_ltx(tmp_path / file_name(2, 7), header, {3: bytes(512), 9: b"x" * 512}, 1 << 63 | 6)


def test_verify_good_files(snapshot: Path, change: Path) -> None:
    result = ltx("verify", snapshot, change)
    pages = (snapshot.parent / "app.db").stat().st_size // 4096
    assert pages > 10
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == (
        f"{snapshot}: ok, TXID 0000000000000001, {pages} pages, snapshot\n"
        f"{change}: ok, TXIDs 0000000000000002-0000000000000007, 2 pages\n"
    )


def test_verify_says_one_line_for_each_bad_file_and_goes_on(change: Path, tmp_path: Path) -> None:
    data = change.read_bytes()
    (tmp_path / "cut.ltx").write_bytes(data[:-1])
    (tmp_path / "flipped.ltx").write_bytes(data[:110] + bytes([data[110] ^ 1]) + data[111:])
    (tmp_path / "longer.ltx").write_bytes(data + b"\0")
    (tmp_path / "empty.ltx").write_bytes(b"")
    (tmp_path / file_name(3, 7)).write_bytes(data)
    bad = ["cut.ltx", "flipped.ltx", "longer.ltx", "empty.ltx", file_name(3, 7), "missing.ltx", "."]
    result = ltx("verify", *(tmp_path / name for name in bad), change)
    assert result.exit_code == 1
    assert result.stdout == f"{change}: ok, TXIDs 0000000000000002-0000000000000007, 2 pages\n"
    lines = result.stderr.splitlines()
    assert len(lines) == len(bad)
    for name, line in zip(bad, lines, strict=True):
        assert line.startswith(f"ERROR: {tmp_path / name}: ")
    assert "ends early" in lines[0]
    assert "which its name does not say" in lines[4]
    assert lines[5].endswith("No such file or directory")


def test_dump_prints_header_pages_and_trailer(change: Path) -> None:
    result = ltx("dump", change)
    assert (result.exit_code, result.stderr) == (0, "")
    rows = dict(re.findall(r"^(\S.*?)  +(.*)$", result.stdout, re.MULTILINE))
    assert rows["page size"] == "512"
    assert rows["commit"] == "9 pages"
    assert rows["min TXID"] == "0000000000000002 (2)"
    assert rows["max TXID"] == "0000000000000007 (7)"
    assert rows["timestamp"] == "1970-01-01T00:00:00.000Z (0)"
    assert rows["pre-apply checksum"] == "8000000000000005"
    assert rows["WAL salts"] == "00000001 000000ff"
    assert rows["post-apply checksum"] == "8000000000000006"
    assert rows["file checksum"] == f"{int.from_bytes(change.read_bytes()[-8:], 'big'):016x}"


def test_the_page_table_is_the_index_of_the_file(snapshot: Path) -> None:
    data = snapshot.read_bytes()
    offset, size = index_range(data[-TAIL_SIZE:], len(data))
    table = [tuple(map(int, row)) for row in re.findall(r"^ +(\d+) +(\d+) +(\d+)$", ltx("dump", snapshot).stdout, re.M)]
    assert table == [(pgno, *place) for pgno, place in decode_index(data[offset : offset + size]).items()]
    assert "timestamp            2023-11-14T22:13:20.123Z (1700000000123)\n" in ltx("dump", snapshot).stdout


def test_dump_prints_a_damaged_file_as_far_as_it_goes(snapshot: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.ltx"
    cut.write_bytes(snapshot.read_bytes()[:400])
    result = ltx("dump", cut)
    assert result.exit_code == 1
    assert "page size            4096\n" in result.stdout
    assert "trailer" not in result.stdout
    assert result.stderr.startswith(f"ERROR: {cut}: ")
    assert result.stderr.count("\n") == 1
    strange = tmp_path / "strange.ltx"
    strange.write_bytes(snapshot.read_bytes()[:32] + b"\x7f" * 8 + snapshot.read_bytes()[40:])
    assert "not a date" in ltx("dump", strange).stdout


def test_checksum_is_the_one_in_the_log(database: Path, snapshot: Path) -> None:
    result = ltx("checksum", database)
    pages = database.stat().st_size // 4096
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"{snapshot.read_bytes()[-16:-8].hex()} {pages} {database}\n"


def test_checksum_of_upstreams_example(tmp_path: Path) -> None:
    """The databases of LiteFS's own tests, made by SQLite 3.39.2; the version in the header is part of the checksum."""
    path = tmp_path / "app.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE t (x)")
    checksums = []
    for _ in range(2):
        data = bytearray(path.read_bytes())
        data[96:100] = (3039002).to_bytes(4, "big")
        (tmp_path / "copy.db").write_bytes(data)
        checksums.append(ltx("checksum", tmp_path / "copy.db").stdout.split()[0])
        connection.execute("INSERT INTO t VALUES (100)")
        connection.commit()
    connection.close()
    assert checksums == ["f630f5ae3060002c", "b765dce8249e9b4b"]


def test_checksum_leaves_out_the_lock_page_and_reads_in_pieces(database: Path, tmp_path: Path) -> None:
    """A sparse database of 64 KiB pages with data after the lock page at 1 GiB."""
    path = tmp_path / "big.db"
    first = bytearray(65536)
    first[:100] = database.read_bytes()[:100]
    first[16:18] = (1).to_bytes(2, "big")
    lock = lock_pgno(65536)
    with open(path, "wb") as file:
        file.write(first)
        file.seek((lock - 1) * 65536)
        file.write(b"l" * 65536 + b"x" * 65536)
    result = ltx("checksum", path)
    zeros = bytes(65536)
    expected = page_checksum(1, bytes(first)) ^ page_checksum(lock + 1, b"x" * 65536)
    for pgno in range(2, lock):
        expected ^= page_checksum(pgno, zeros)
    assert result.stdout == f"{expected | 1 << 63:016x} {lock + 1} {path}\n"


def test_checksum_of_what_is_no_database(tmp_path: Path, database: Path) -> None:
    (tmp_path / "text").write_bytes(b"hello" * 100)
    (tmp_path / "short").write_bytes(b"SQLite format 3\0")
    (tmp_path / "torn").write_bytes(database.read_bytes()[:-1])
    (tmp_path / "empty").write_bytes(b"")
    result = ltx("checksum", *(tmp_path / name for name in ("text", "short", "torn", "empty")))
    assert result.exit_code == 1
    assert result.stdout == f"8000000000000000 0 {tmp_path / 'empty'}\n"
    assert [line.split(": ")[1] for line in result.stderr.splitlines()] == [
        str(tmp_path / name) for name in ("text", "short", "torn")
    ]


def test_checksum_mentions_a_wal(tmp_path: Path) -> None:
    path = tmp_path / "app.db"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE TABLE t (x)")
    result = ltx("checksum", path)
    connection.close()
    assert result.exit_code == 0
    assert result.stderr == f"note: {path}-wal may hold transactions that are not in this checksum\n"
    assert ltx("checksum", path).stderr == ""


def test_usage() -> None:
    alone = ltx()
    assert alone.exit_code == 2
    assert "litefs ltx verify /var/lib/litefs" in alone.stdout
    for args in (["verify"], ["nope"], ["verify", "-x", "f"]):
        result = ltx(*args)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("ERROR: litefs ltx")
        assert result.stderr.count("\n") == 1
