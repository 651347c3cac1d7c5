"""A wal-index that the daemon makes anew is byte for byte the one that SQLite's own recovery makes of the same WAL."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from engine_nodes import NamedFiles, make_sqlite
from sqlite_process import SqliteProcess

from pylitefs.engine.wal_index_rebuild import rebuild_index
from pylitefs.formats.sqlite.wal import WAL_HEADER_SIZE, frame_offset
from pylitefs.formats.sqlite.wal_index import HEADER_SIZE

PAGE = 4096
WALS = ["none", "empty", "header", "torn header", "half a transaction", "whole", "whole and a torn frame"]


def left_by_killed(folder: Path) -> NamedFiles:
    """A database of which everybody was killed, with two commits in its WAL."""
    files = NamedFiles("db", str(folder))
    make_sqlite(files.database, page_size=PAGE)
    writer = SqliteProcess(files.database)
    writer("PRAGMA wal_autocheckpoint = 0")
    writer("INSERT INTO t (v) VALUES (randomblob(100))")
    writer("INSERT INTO t (v) VALUES (randomblob(20000))")
    writer.kill()
    os.unlink(files.shm)
    return files


def make_wal(files: NamedFiles, kind: str) -> None:
    wal = Path(files.wal)
    if kind == "none":
        wal.unlink()
    elif kind == "empty":
        os.truncate(wal, 0)
    elif kind == "header":
        os.truncate(wal, WAL_HEADER_SIZE)
    elif kind == "torn header":
        wal.write_bytes(bytes(WAL_HEADER_SIZE))
    elif kind == "half a transaction":  # it counts for nothing
        content = bytearray(wal.read_bytes()[: frame_offset(2, PAGE)])
        content[WAL_HEADER_SIZE + 4 : WAL_HEADER_SIZE + 8] = bytes(4)
        wal.write_bytes(content)
    elif kind == "whole and a torn frame":
        with open(wal, "ab") as file:
            file.write(os.urandom(24 + PAGE))


@pytest.mark.parametrize("kind", WALS)
def test_it_is_what_sqlite_makes(tmp_path: Path, kind: str) -> None:
    ours = left_by_killed(tmp_path / "ours")
    make_wal(ours, kind)
    shutil.copytree(tmp_path / "ours", tmp_path / "theirs")
    theirs = NamedFiles("db", str(tmp_path / "theirs"))
    reader = SqliteProcess(theirs.database)
    reader("SELECT count(*) FROM t")
    reader.kill()
    if kind == "none":
        Path(ours.wal).touch()
    shm = os.open(ours.shm, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        assert rebuild_index(ours, shm, shared=False)
    finally:
        os.close(shm)
    made, expected = Path(ours.shm).read_bytes(), Path(theirs.shm).read_bytes()
    if kind == "half a transaction":  # SQLite has it in its hash table, where nobody looks for it
        made, expected = made[:HEADER_SIZE], expected[:HEADER_SIZE]
    assert made == expected
