"""SQLite on the mount with an engine that does nothing: every journal mode must work as on a local disk."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys

import pytest
from mounted import PlainMount

MODES = ["delete", "truncate", "persist", "memory", "off", "wal"]


def fill(connection: sqlite3.Connection, rows: int) -> None:
    with connection:
        connection.executemany("insert into t(a) values (?)", (("x" * 500,) for _ in range(rows)))


@pytest.mark.parametrize("mode", MODES)
def test_journal_modes(plain_mount: PlainMount, mode: str) -> None:
    path = plain_mount.dir / "a.db"
    first = sqlite3.connect(path)
    assert first.execute(f"pragma journal_mode={mode}").fetchone()[0] == mode
    first.execute("create table t(id integer primary key, a)")
    fill(first, 300)
    second = sqlite3.connect(path)
    assert second.execute("select count(*) from t").fetchone()[0] == 300
    with first:
        first.execute("delete from t where id > 100")
    assert second.execute("select count(*) from t").fetchone()[0] == 100
    first.execute("begin immediate")
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        second.execute("pragma busy_timeout=0")
        second.execute("begin immediate")
    if mode != "off":
        first.execute("delete from t")
        first.rollback()
        assert second.execute("select count(*) from t").fetchone()[0] == 100
    else:
        first.commit()
    first.execute("vacuum")
    assert second.execute("pragma integrity_check").fetchone()[0] == "ok"
    first.close()
    second.close()
    native = sqlite3.connect(plain_mount.files / "a.db")
    assert native.execute("select count(*) from t").fetchone()[0] == 100
    native.close()
    assert not os.path.exists(plain_mount.dir / "a.db-wal")


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_memory_mapped_reads(plain_mount: PlainMount, mode: str) -> None:
    path = plain_mount.dir / "a.db"
    code = f"""
import sqlite3
c = sqlite3.connect({str(path)!r})
c.execute("pragma mmap_size=100000000")
c.execute("pragma journal_mode={mode}")
c.execute("create table t(id integer primary key, a)")
for step in range(5):
    with c:
        c.executemany("insert into t(a) values (?)", (("y" * 900,) for _ in range(300)))
    c.execute("pragma wal_checkpoint(truncate)").fetchall()
    assert c.execute("select count(*), sum(length(a)) from t").fetchone() == (300 * (step + 1), 270000 * (step + 1))
assert c.execute("pragma integrity_check").fetchone()[0] == "ok"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_switching_modes_while_connected(plain_mount: PlainMount) -> None:
    path = plain_mount.dir / "a.db"
    connection = sqlite3.connect(path)
    connection.execute("create table t(id integer primary key, a)")
    for index, mode in enumerate(["wal", "delete", "wal", "truncate", "persist", "wal"]):
        assert connection.execute(f"pragma journal_mode={mode}").fetchone()[0] == mode
        fill(connection, 50)
        other = sqlite3.connect(path)
        assert other.execute("select count(*) from t").fetchone()[0] == 50 * (index + 1)
        other.close()
    connection.close()


def test_exclusive_locking_and_attach(plain_mount: PlainMount) -> None:
    connection = sqlite3.connect(plain_mount.dir / "a.db")
    connection.execute("pragma locking_mode=exclusive")
    connection.execute("pragma journal_mode=wal")
    connection.execute("create table t(id integer primary key, a)")
    fill(connection, 10)
    connection.close()
    connection = sqlite3.connect(plain_mount.dir / "b.db")
    connection.execute("create table t(id integer primary key, a)")
    connection.execute("attach ? as other", (str(plain_mount.dir / "c.db"),))
    connection.execute("create table other.t(id integer primary key, a)")
    with connection:
        connection.execute("insert into main.t(a) values (1)")
        connection.execute("insert into other.t(a) values (1)")
    connection.close()
    assert sorted(os.listdir(plain_mount.files)) == ["a.db", "b.db", "c.db"]


WRITER = """
import sqlite3, sys
c = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)
for _ in range(60):
    c.execute("insert into t(a) values (?)", ("z" * 200,))
"""


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_many_writers(plain_mount: PlainMount, mode: str) -> None:
    path = plain_mount.dir / "a.db"
    connection = sqlite3.connect(path)
    connection.execute(f"pragma journal_mode={mode}")
    connection.execute("create table t(id integer primary key, a)")
    connection.close()
    children = [subprocess.Popen([sys.executable, "-c", WRITER, str(path)]) for _ in range(4)]
    assert [child.wait(90) for child in children] == [0] * 4
    connection = sqlite3.connect(path)
    assert connection.execute("select count(*) from t").fetchone()[0] == 240
    assert connection.execute("pragma integrity_check").fetchone()[0] == "ok"
    connection.close()


def test_a_killed_writer_leaves_a_database_that_recovers(plain_mount: PlainMount) -> None:
    path = plain_mount.dir / "a.db"
    code = f"""
import os, signal, sqlite3
c = sqlite3.connect({str(path)!r}, isolation_level=None)
c.execute("pragma cache_size=5")
c.execute("create table t(id integer primary key, a)")
c.execute("begin")
for _ in range(2000):
    c.execute("insert into t(a) values (?)", ("k" * 500,))
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert (plain_mount.dir / "a.db-journal").exists()
    connection = sqlite3.connect(path)
    assert connection.execute("select count(*) from t").fetchone()[0] == 0
    assert connection.execute("pragma integrity_check").fetchone()[0] == "ok"
    connection.close()
    assert not (plain_mount.dir / "a.db-journal").exists()
