"""What a database file can hold that SQLite reads, or cannot, and what a live replica makes of it."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster_nodes import Cluster, Node, assert_sound, litefs, needs_root, wait_same_position, wait_until

pytestmark = needs_root
NAME = "app.db"


def make(path: Path, rows: int = 50, mode: str = "delete", page_size: int = 4096, table: str = "t") -> bytes:
    """A new, closed database; its bytes."""
    path.unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"pragma page_size={page_size}")
        connection.execute(f"pragma journal_mode={mode}")
        connection.execute(f"create table {table}(id integer primary key, v)")
        connection.execute("begin")
        connection.executemany(
            f"insert into {table} values (?, ?)", ((number, os.urandom(200)) for number in range(rows))
        )
        connection.execute("commit")
    return path.read_bytes()


def content(node: Node, name: str = NAME) -> list[Any] | None:
    """The schema and all rows of table t; None if there is no such database."""
    if name not in node.databases():
        return None
    with contextlib.closing(sqlite3.connect(f"file:{node.mount / name}?mode=ro", uri=True)) as connection:
        connection.execute("begin")
        assert_sound(connection)
        schema = connection.execute("select name, sql from sqlite_schema order by name").fetchall()
        tables = [name for name, _ in schema]
        return [schema, *(connection.execute("select * from t").fetchall() if "t" in tables else ())]


def wait_equal(primary: Node, replica: Node, name: str = NAME) -> list[Any] | None:
    """Nobody asks the primary for anything but what SQLite reads: it has to notice by itself."""
    expected = content(primary, name)
    wait_until(lambda: content(replica, name) == expected, f"{name} on the replica", 3.0)
    if expected is not None:
        wait_same_position(primary, replica, name, 3.0)
        assert content(replica, name) == expected
    return expected


def withheld(node: Node, name: str = NAME) -> str | None:
    databases = json.loads(node.get("/status"))["databases"]
    found: str | None = next(database["withheld"] for database in databases if database["name"] == name)
    return found


def _empty_backup(connection: sqlite3.Connection) -> None:
    """From a database without a page: one page of 8192 bytes, of which the file has half."""
    with contextlib.closing(sqlite3.connect(":memory:")) as source:
        source.backup(connection)


def _small_backup(page_size: int) -> Callable[[sqlite3.Connection], None]:
    def act(connection: sqlite3.Connection) -> None:
        with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as source:
            source.execute(f"pragma page_size={page_size}")
            source.execute("create table small(a)")
            source.execute("insert into small values (1)")
            source.backup(connection)

    return act


def _vacuum(page_size: int) -> Callable[[sqlite3.Connection], None]:
    def act(connection: sqlite3.Connection) -> None:
        connection.execute("delete from t where id > 1")
        connection.execute(f"pragma page_size={page_size}")
        connection.execute("vacuum")

    return act


def _incremental_vacuum(connection: sqlite3.Connection) -> None:
    connection.execute("pragma auto_vacuum=incremental")
    connection.execute("vacuum")
    connection.execute("delete from t")
    connection.execute("pragma incremental_vacuum").fetchall()


def _reset(connection: sqlite3.Connection) -> None:
    """What SQLITE_DBCONFIG_RESET_DATABASE does, with what Python has: an empty database in the place of this one."""
    connection.execute("drop table t")
    connection.execute("vacuum")


def _deserialize(connection: sqlite3.Connection) -> None:
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as source:
        source.execute("create table other(a)")
        image = source.serialize()
        source.execute("drop table other")
        source.deserialize(image)
        source.backup(connection)


SHRINKING: dict[str, Callable[[sqlite3.Connection], None]] = {
    "empty backup": _empty_backup,
    "backup of pages of 512 bytes": _small_backup(512),
    "backup of pages of 65536 bytes": _small_backup(65536),
    "vacuum into smaller pages": _vacuum(512),
    "vacuum into larger pages": _vacuum(65536),
    "incremental vacuum": _incremental_vacuum,
    "nothing left": _reset,
    "deserialize": _deserialize,
}


@pytest.mark.parametrize("mode", ["delete", "truncate", "persist", "memory", "off"])
def test_a_file_that_became_shorter(cluster: Cluster, mode: str) -> None:
    """Also one that ends within its last page: SQLite reads zeros there. After each: rows again, by the same
    connection."""
    primary, replica = cluster.pair()
    for number, (what, act) in enumerate(SHRINKING.items()):
        name = f"{number}.db"
        with contextlib.closing(primary.connect(name)) as connection:
            connection.execute("pragma page_size=8192")
            connection.execute(f"pragma journal_mode={mode}")
            connection.execute("create table t(id integer primary key, v)")
            connection.execute("begin")
            connection.executemany("insert into t values (?, ?)", ((row, bytes(300)) for row in range(200)))
            connection.execute("commit")
            wait_equal(primary, replica, name)
            act(connection)
            seen = wait_equal(primary, replica, name)
            assert seen is not None, what
            connection.execute("create table after(a)")
            wait_equal(primary, replica, name)
    primary.stop()
    primary.start()
    for number in range(len(SHRINKING)):
        wait_equal(primary, replica, f"{number}.db")


@pytest.mark.parametrize(("passthrough", "mode"), [("auto", "delete"), ("auto", "wal"), ("off", "delete")])
def test_emptied_in_place(cluster: Cluster, passthrough: str, mode: str) -> None:
    """`: > app.db` makes a new database of it. Replicas do not keep the old tables; a restart does not bring them
    back; and a new database begins in the same file."""
    primary, replica = cluster.pair()
    for again in range(2):
        make(primary.mount / NAME, mode=mode)
        assert wait_equal(primary, replica) is not None
        subprocess.run(["sh", "-c", ': > "$0"', str(primary.mount / NAME)], check=True, timeout=30)
        wait_until(lambda: replica.databases() == [], "the replica has dropped it", 3.0)
        wait_until(lambda: primary.databases() == [], "the primary's list has no database", 3.0)  # a moment after that
        assert (primary.mount / NAME).stat().st_size == 0
        if not again:
            primary.stop()
            primary.start()
            assert (primary.mount / NAME).stat().st_size == 0 and replica.databases() == []


def test_emptied_while_it_is_open(cluster: Cluster) -> None:
    primary, replica = cluster.pair()
    make(primary.mount / NAME)
    with contextlib.closing(primary.connect(NAME)) as connection:
        assert connection.execute("select count(*) from t").fetchone() == (50,)
        wait_equal(primary, replica)
        os.truncate(primary.mount / NAME, 0)
        wait_until(lambda: replica.databases() == [], "the replica has dropped it", 3.0)
        connection.execute("create table t(id integer primary key, v)")
        connection.execute("insert into t values (1, 2)")
        assert wait_equal(primary, replica) is not None
        with contextlib.closing(primary.connect(NAME)) as other:
            other.execute("insert into t values (2, 2)")
        assert len(wait_equal(primary, replica) or []) == 3


def test_emptied_while_the_daemon_is_dead(cluster: Cluster) -> None:
    """The daemon is killed before it has looked: what the file holds counts, and that is nothing."""
    primary, replica = cluster.pair()
    make(primary.mount / NAME)
    wait_equal(primary, replica)
    primary.kill()
    primary.unmount()
    os.truncate(primary.data / "dbs" / NAME / "database", 0)
    primary.start()
    wait_until(lambda: replica.databases() == [], "the replica has dropped it", 10.0)
    assert (primary.mount / NAME).stat().st_size == 0


def _trailing(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"not a page" * 77)


def _old_header(path: Path) -> None:
    """As SQLite before 3.7.0 left it: the number of pages is not valid, the file's size counts."""
    with open(path, "r+b") as file:
        file.seek(28)
        file.write(bytes(4))
        file.seek(92)
        file.write(bytes(8))


def _stale_header(path: Path) -> None:
    """A library that does not know the number of pages has written since: it is wrong, and said to be."""
    with open(path, "r+b") as file:
        file.seek(28)
        file.write((3).to_bytes(4, "big"))
        file.seek(92)
        file.write(b"\0\0\0\x09")


READABLE: dict[str, Callable[[Path], None]] = {
    "trailing": _trailing,
    "old header": _old_header,
    "stale header": _stale_header,
}


@pytest.mark.parametrize(("passthrough", "page_size"), [("auto", 65536), ("off", 512)])
def test_whatever_sqlite_reads_is_replicated(
    cluster: Cluster, passthrough: str, page_size: int, tmp_path: Path
) -> None:
    primary, replica = cluster.pair()
    for number, (what, change) in enumerate(READABLE.items()):
        source = tmp_path / f"{number}.db"
        make(source, page_size=page_size)
        change(source)
        subprocess.run(["cp", source, primary.mount], check=True, timeout=30)
        assert wait_equal(primary, replica, source.name) is not None, what
        assert (primary.mount / source.name).read_bytes() == source.read_bytes()
        with contextlib.closing(primary.connect(source.name)) as connection:
            connection.execute("insert into t values (1000, 1)")
        wait_equal(primary, replica, source.name)
    primary.stop()
    primary.start()
    for number in range(len(READABLE)):
        wait_equal(primary, replica, f"{number}.db")


def _garbage(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(b"\xa5" * 512)


def _cut_off(path: Path) -> None:
    os.truncate(path, 8192)


def _bad_page_size(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(16)
        file.write((1000).to_bytes(2, "big"))


def _bad_format(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(18)
        file.write(b"\x09\x09")


def _too_much_reserved(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(20)
        file.write(b"\xff")


UNREADABLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "garbage": (_garbage, "not a SQLite database"),
    "cut off": (_cut_off, "the file ends after"),
    "page size": (_bad_page_size, "not a SQLite page size"),
    "format": (_bad_format, "unknown SQLite file format"),
    "reserved": (_too_much_reserved, "reserved bytes"),
}


def test_what_sqlite_cannot_read_is_said(cluster: Cluster, tmp_path: Path) -> None:
    """The replica keeps what it has, and the primary says so: event, `litefs status`, its JSON and the log; over a
    restart; until there is a database again, which needs nobody's help."""
    primary, replica = cluster.pair()
    reserved = make(tmp_path / "source.db", page_size=512)
    for number, (what, (spoil, reason)) in enumerate(UNREADABLE.items()):
        name = f"{number}.db"
        path = primary.mount / name
        path.write_bytes(reserved if what == "reserved" else make(tmp_path / "other.db"))
        before = wait_equal(primary, replica, name)
        assert before is not None and withheld(primary, name) is None
        spoil(path)
        wait_until(lambda name=name, reason=reason: reason in (withheld(primary, name) or ""), f"{what} is said", 3.0)
        assert content(replica, name) == before, what
    told = litefs("status", "-url", primary.url).stdout
    for number in range(len(UNREADABLE)):
        assert f"{number}.db is not replicated as it is now: " in " ".join(told.split())
        assert f"event=withheld database={number}.db" in primary.log_text()
    primary.stop()
    primary.start()
    for number, (what, (_, reason)) in enumerate(UNREADABLE.items()):
        name = f"{number}.db"
        assert reason in (withheld(primary, name) or ""), what
        (primary.mount / name).write_bytes(make(tmp_path / "good.db", rows=7, mode="delete"))
        assert len(wait_equal(primary, replica, name) or []) == 8, what
        assert withheld(primary, name) is None
