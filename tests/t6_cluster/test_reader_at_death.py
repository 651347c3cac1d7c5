"""A reader whose daemon dies sees an error, or the state that there was: never an older one, never half a transaction.

SQLite asks with stat(2) whether a journal or a WAL stands beside a database whose header says that it is in a rollback
mode, and takes every error for "no" (unixAccess in os_unix.c). When the daemon is gone the answer is ENOTCONN. What it
would read then is the bare file: without the replica's WAL, or with half of a transaction that a hot journal undoes.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys

import pytest

from cluster_nodes import Cluster, Node, needs_root, wait_same_position

pytestmark = needs_root
NAME = "app.db"
ROWS = 400
FS_MODES = ["auto", "off"]

_WRITER = f"""
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("pragma cache_size=5")
db.execute("begin")
db.execute("update t set n = 1 where id <= {ROWS // 2}")
print("half", flush=True)
sys.stdin.read()
"""


def create(primary: Node) -> sqlite3.Connection:
    connection = primary.connect(NAME)
    connection.execute("create table t(id integer primary key, n integer, filler)")
    with connection:
        connection.execute("begin")
        connection.executemany("insert into t values (?, 0, ?)", [(one, b"x" * 2000) for one in range(1, ROWS + 1)])
        connection.execute("commit")
    return connection


def seen(connection: sqlite3.Connection) -> tuple[int, int] | None:
    """How many rows, and of how many the transaction is there; None where it was told that it cannot read."""
    try:
        found: tuple[int, int] = connection.execute("select count(*), sum(n) from t").fetchone()
        return found
    except sqlite3.OperationalError as error:
        assert "no such table" not in str(error)
        return None


def end(node: Node, how: str) -> None:
    if how == "kill":
        node.kill()
    else:
        node.stop()


@pytest.mark.parametrize("passthrough", FS_MODES)
@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_replica_without_its_wal(cluster: Cluster, passthrough: str, how: str) -> None:
    """An application has opened the database, and reads it for the first time when the daemon is gone."""
    primary, replica = cluster.pair()
    writer = create(primary)
    wait_same_position(primary, replica, NAME)
    holder = replica.connect(NAME)
    holder.execute("begin")
    assert seen(holder) == (ROWS, 0)  # as long as it is held, the WAL's pages are not in the file
    writer.execute("delete from t where id > 100")
    writer.execute("update t set n = 1")
    wait_same_position(primary, replica, NAME)
    late = replica.connect(NAME)
    warm = replica.connect(NAME)
    assert seen(warm) == (100, 100)
    os.stat(replica.mount / NAME)  # the kernel knows the size of the file: fstat(2) does not fail
    end(replica, how)
    assert seen(late) in (None, (100, 100))
    assert seen(holder) in (None, (ROWS, 0))
    assert seen(warm) in (None, (100, 100))


@pytest.mark.parametrize("passthrough", FS_MODES)
@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_primary_with_half_a_transaction(cluster: Cluster, passthrough: str, how: str) -> None:
    """The application that was in the middle of a transaction ends with the daemon: nobody rolls back."""
    primary = cluster.node("primary").start()
    create(primary).close()
    reader = primary.connect(NAME)
    reader.execute("pragma cache_size=5")
    assert seen(reader) == (ROWS, 0)
    with subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(primary.mount / NAME)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"half\n"
        os.stat(primary.mount / NAME)
        if how == "kill":
            primary.kill()
        else:
            assert primary.process is not None
            primary.process.terminate()
            primary.process.wait(20)
        writer.kill()
    assert seen(reader) in (None, (ROWS, 0))
