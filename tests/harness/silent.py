"""A node's databases as they lie in its data directory, read through copies, without a word to the daemon.

Asking a node for its position makes it look, and what it had overlooked is found: the question hides the fault.
"""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
from pathlib import Path

MAGIC = b"SQLite format 3\0"


def content(data: Path, name: str, into: Path) -> str:
    """A digest of what a reader of this node's files sees, without a word to the daemon."""
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(parents=True)
    live, copy = data / "dbs" / name, into / "copy.db"
    shutil.copyfile(live / "database", copy)
    wal, journal = live / "wal", live / "journal"
    if journal.exists() and journal.stat().st_size:  # may be hot: then a reader rolls back
        shutil.copyfile(journal, into / "copy.db-journal")
        connection = sqlite3.connect(copy)
        try:
            connection.execute("select count(*) from sqlite_schema").fetchall()
        finally:
            connection.close()
    if wal.exists() and wal.stat().st_size > 32:
        shutil.copyfile(wal, into / "copy.db-wal")
        with open(copy, "r+b") as file:  # a replica has a WAL whatever the database's mode is
            file.seek(18)
            if file.read(2) == b"\1\1":
                file.seek(18)
                file.write(b"\2\2")
        connection = sqlite3.connect(copy)
        try:
            connection.execute("pragma wal_checkpoint(truncate)").fetchall()
        finally:
            connection.close()
    image = bytearray(copy.read_bytes())
    page_size = int.from_bytes(image[16:18], "big")
    page_size = 65536 if page_size == 1 else page_size or 512
    count = int.from_bytes(image[28:32], "big") if image[24:28] == image[92:96] else 0
    if count:
        del image[count * page_size :]  # space that was reserved, or has not been cut off yet, is none of the database
    image += bytes(-len(image) % page_size)  # SQLite reads zeros behind the end, as after a `backup`
    image[18:20] = b"\0\0"
    return f"{len(image)} bytes {hashlib.sha256(image).hexdigest()[:12]}"


def is_image(path: Path) -> bool:
    """Whether SQLite opens it; it says "file is not a database" where the versions or the fractions are others."""
    try:
        with open(path, "rb") as file:
            head = file.read(100)
    except OSError:
        return False
    if len(head) < 100 or head[:16] != MAGIC or path.name.endswith(("-journal", "-wal")):
        return False
    page_size = int.from_bytes(head[16:18], "big")
    size_ok = page_size == 1 or (page_size >= 512 and page_size & (page_size - 1) == 0)
    return size_ok and head[19] <= 2 and head[21:24] == b"\x40\x20\x20"


def is_sound(path: Path) -> bool:
    """Whether SQLite finds nothing wrong with it."""
    connection = sqlite3.connect(path)
    try:
        return connection.execute("pragma quick_check").fetchone() == ("ok",)
    except sqlite3.Error:
        return False
    finally:
        connection.close()
