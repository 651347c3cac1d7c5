"""What a primary finds after a crash, and what its replica gives back: on real mounts, with real kills."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from cluster_nodes import Cluster, Node, assert_same_bytes, needs_root, scaled, wait_same_position, wait_until

pytestmark = needs_root
NAME = "app.db"

_COMMIT_AND_KILL = """
import os, signal, sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("select * from t").fetchall()
db.execute("update t set v = ? where id = 1", (sys.argv[2],))
os.kill(int(sys.argv[3]), signal.SIGKILL)
print("committed", flush=True)
os._exit(0)
"""


def create(node: Node, mode: str) -> None:
    connection = node.connect(NAME)
    connection.execute(f"pragma journal_mode={mode}")
    connection.execute("create table t(id integer primary key, v)")
    connection.execute("insert into t values (1, '0')")
    connection.close()


def value_of(node: Node) -> str:
    connection = node.connect(NAME)
    try:
        return str(connection.execute("select v from t where id = 1").fetchone()[0])
    finally:
        connection.close()


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_a_row_that_is_changed_back_and_forth(cluster: Cluster, mode: str) -> None:
    """Each time the daemon is killed right after the commit, and the row has a value that it had before."""
    node = cluster.node("primary")
    node.config["lease"]["recovery-wait"] = "100ms"  # there is nobody to wait for
    node.start()
    create(node, mode)
    for number in range(scaled(4)):
        value = str((number + 1) % 2)
        assert node.process is not None
        words = [sys.executable, "-c", _COMMIT_AND_KILL, str(node.mount / NAME), value, str(node.process.pid)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
        assert done.stdout == "committed\n", done.stderr
        node.kill()
        node.start()
        assert value_of(node) == value


def test_a_database_that_the_primary_lost_whole(cluster: Cluster) -> None:
    """The machine stopped before the folder of a new database was on the disk; the replica had it already."""
    primary, replica = cluster.pair()
    create(primary, "wal")
    wait_same_position(primary, replica, NAME)
    replica.kill()
    primary.kill()
    shutil.rmtree(primary.data / "dbs" / NAME)
    (primary.data / "boot").write_text("the boot before\n")
    primary.config["lease"]["recovery-wait"] = "20s"
    primary.start(wait=False)
    replica.start()
    wait_until(primary.healthy, "the primary is ready")
    assert value_of(primary) == "0"
    wait_same_position(primary, replica, NAME)
    assert_same_bytes((primary, replica), NAME)
    assert not list(replica.data.rglob("lost"))
