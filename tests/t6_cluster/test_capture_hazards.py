"""What happens to a live database that is captured: another file takes its name, its application is killed, the disk of
the log is full while one application has the database for itself."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster_nodes import (
    PASSTHROUGH,
    Cluster,
    Node,
    assert_same_bytes,
    assert_sound,
    needs_root,
    scaled,
    wait_same_position,
    wait_until,
)

pytestmark = needs_root

_WRITER = r"""
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=1)
db.execute(f"pragma wal_autocheckpoint = {sys.argv[2]}")
print("ready", flush=True)
number = 0
try:
    while True:
        number += 1
        db.execute("update t set v = ? where id between ? and ?", (f"OLD{number}", number % 30, number % 30 + 3))
except sqlite3.Error as error:
    print(error, flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def writer(path: Path, autocheckpoint: int) -> Iterator[subprocess.Popen[str]]:
    """A process that commits as fast as it can; killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", _WRITER, str(path), str(autocheckpoint)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate(timeout=20)


def make(path: Path, rows: int, value: str, mode: str = "wal") -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute(f"pragma journal_mode = {mode}")
        db.execute("create table t (id integer primary key, v)")
        db.executemany("insert into t (v) values (?)", [(value * 40,)] * rows)
        db.commit()


@pytest.mark.parametrize("mode", ["wal", "delete"])
@pytest.mark.parametrize("passthrough", PASSTHROUGH)
def test_another_database_takes_the_name(cluster: Cluster, passthrough: str, mode: str, tmp_path: Path) -> None:
    """`mv new db` while a connection goes on writing to what was there: every copy is the new content and no more. In
    WAL mode it is done only when that connection has gone."""
    primary, replica = cluster.pair()
    make(tmp_path / "old", 400, "o", mode)
    make(tmp_path / "new", 300, "n", mode)
    expected = (tmp_path / "new").read_bytes()
    chance = random.Random(1)
    for number in range(scaled(4)):
        name = f"d{number}"
        shutil.copy(tmp_path / "old", primary.mount / name)
        shutil.copy(tmp_path / "new", primary.mount / f"{name}-next")
        with writer(primary.mount / name, 1):
            time.sleep(chance.uniform(0.02, 0.06))
            if mode == "wal":
                with pytest.raises(OSError, match="busy"):
                    os.rename(primary.mount / f"{name}-next", primary.mount / name)
            else:
                os.rename(primary.mount / f"{name}-next", primary.mount / name)
            time.sleep(0.05)
        if mode == "wal":
            os.rename(primary.mount / f"{name}-next", primary.mount / name)
        wait_same_position(primary, replica, name)
        exported = assert_same_bytes([primary, replica], name)
        (tmp_path / "exported").write_bytes(exported)
        with contextlib.closing(sqlite3.connect(tmp_path / "exported")) as db:
            assert_sound(db)
            assert db.execute("select count(*), sum(v like 'OLD%') from t").fetchone() == (300, 0)
        assert len(exported) == len(expected)
    assert "Traceback" not in primary.log_text()


@pytest.mark.parametrize("passthrough", PASSTHROUGH)
def test_a_writer_is_killed_again_and_again(cluster: Cluster, passthrough: str) -> None:
    """Each next process makes the wal-index anew; some of them do without one."""
    primary, replica = cluster.pair()
    make(primary.mount / "db", 60, "x")
    for number in range(scaled(6)):
        with writer(primary.mount / "db", (1, 20, 0)[number % 3]):
            time.sleep(0.05)
        with contextlib.closing(primary.connect("db")) as db:
            if number % 2:
                db.execute("pragma locking_mode = exclusive")
            db.execute("pragma synchronous = off")
            db.execute("update t set v = ? where id = 40", (f"round {number}",))
            db.execute("pragma wal_checkpoint(restart)")
            db.execute("update t set v = ? where id = 50", (f"round {number}",))
            wait_same_position(primary, replica, "db")
            with contextlib.closing(replica.connect("db")) as copy:
                seen = copy.execute("select distinct v from t where id in (40, 50)").fetchall()
                assert seen == [(f"round {number}",)]
    wait_same_position(primary, replica, "db")
    assert_same_bytes([primary, replica], "db")


def _row(node: Node, number: int) -> str:
    with contextlib.closing(node.connect("db")) as db:
        (value,) = db.execute("select v from t where id = ?", (number,)).fetchone()
        return str(value)


def test_a_database_for_oneself_while_the_log_is_full(cluster: Cluster) -> None:
    """EXCLUSIVE, synchronous=FULL: what fits into the WAL is committed without an error, whatever the log does."""
    primary = cluster.node("primary")
    primary.data.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(primary.data)], check=True)
    try:
        primary.start()
        replica = cluster.node("replica", primary=primary).start()
        make(primary.mount / "db", 2000, "x")
        with contextlib.closing(primary.connect("db")) as db:
            db.execute("pragma locking_mode = exclusive")
            db.execute("select count(*) from t").fetchone()
            db.execute("pragma synchronous = full")
            db.execute("pragma wal_autocheckpoint = 0")
            db.execute("update t set v = 'y' || v")
            db.execute("pragma wal_checkpoint(restart)")  # the WAL has room, and begins anew
            db.execute("update t set v = 'base' where id = 1")
            wait_same_position(primary, replica, "db")
            with contextlib.suppress(OSError), open(primary.data / "ballast", "wb", buffering=0) as ballast:
                while True:
                    ballast.write(bytes(4096))
            for number in range(5):
                db.execute("update t set v = ? where id = 2", (f"full {number}",))
                time.sleep(0.3)
            assert "diskFull" in primary.log_text()
            (primary.data / "ballast").unlink()
            for number in (500, 1000, 1500):
                db.execute("update t set v = 'COMMITTED' where id = ?", (number,))
            db.execute("pragma wal_checkpoint(restart)")
            db.execute("update t set v = 'after' where id = 3")
            wait_same_position(primary, replica, "db")
            for number in (2, 3, 500, 1000, 1500):
                (mine,) = db.execute("select v from t where id = ?", (number,)).fetchone()
                assert _row(replica, number) == mine
        wait_same_position(primary, replica, "db")
        assert_same_bytes([primary, replica], "db")
    finally:
        primary.remove()
        subprocess.run(["umount", "-l", str(primary.data)], check=True)


@pytest.mark.parametrize("passthrough", PASSTHROUGH)
def test_nothing_is_held_after_a_large_transaction(cluster: Cluster, passthrough: str) -> None:
    """The barrier is asked for because there is much to capture, and comes when that is done: nobody needs it then, and
    nothing is written any more that would have it looked at."""
    node = cluster.node("primary", passthrough=passthrough).start()
    with contextlib.closing(node.connect("app.db", timeout_s=0)) as db:
        db.execute("pragma journal_mode = wal")
        db.execute("create table t (v)")
        db.execute("begin")
        db.executemany("insert into t values (zeroblob(?))", [(4000,)] * 10_000)
        db.execute("commit")
        node.position("app.db")
        wait_until(lambda: db.execute("pragma journal_mode = delete").fetchone() == ("delete",), "it has it to itself")
