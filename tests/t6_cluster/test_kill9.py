"""kill -9 of either daemon while an application commits: what was acknowledged is there afterwards, and both agree.

The machine itself does not stop here, so a commit survives with every `synchronous`.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from itertools import count

import pytest

from cluster_nodes import (
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
NAME = "app.db"
SETTINGS = [("wal", "normal"), ("wal", "full"), ("delete", "full")]
FS_MODES = [("auto", *setting) for setting in SETTINGS] + [("off", *SETTINGS[0]), ("off", *SETTINGS[2])]
_PAYLOAD = b"\xa5" * 700


class Writer(threading.Thread):
    """Commits one row after the other until it is stopped or fails; `acknowledged` is the last one that returned."""

    def __init__(self, node: Node, mode: str, synchronous: str, first: int) -> None:
        super().__init__(daemon=True)
        self.acknowledged = first - 1
        self.problem: sqlite3.Error | None = None
        self._numbers = count(first)
        self._halt = threading.Event()
        self._connection = node.connect(NAME)
        self._connection.execute(f"pragma journal_mode={mode}")
        self._connection.execute(f"pragma synchronous={synchronous}")
        self._connection.execute("pragma wal_autocheckpoint=200")

    def run(self) -> None:
        try:
            while not self._halt.is_set():
                number = next(self._numbers)
                rows = [(number * 10 + index, _PAYLOAD) for index in range(1 + number % 3)]
                self._connection.execute("begin immediate")
                self._connection.executemany("insert into t(id, data) values (?, ?)", rows)
                self._connection.execute("commit")
                self.acknowledged = number
                time.sleep(0.001)
        except sqlite3.Error as error:
            self.problem = error

    def stop(self) -> None:
        """Close the connection, whatever state it is in."""
        self._halt.set()
        self.join(20)
        assert not self.is_alive(), "the writer hangs"
        self._connection.close()


def create(primary: Node, mode: str) -> None:
    connection = primary.connect(NAME)
    connection.execute(f"pragma journal_mode={mode}")
    connection.execute("create table t(id integer primary key, data)")
    connection.close()


def rows_of(node: Node) -> dict[int, int]:
    """How many rows each transaction left."""
    connection = node.connect(NAME)
    try:
        assert_sound(connection)
        found: dict[int, int] = dict(connection.execute("select id / 10, count(*) from t group by 1").fetchall())
        return found
    finally:
        connection.close()


def check_all(nodes: tuple[Node, Node], acknowledged: int) -> int:
    """Every acknowledged transaction is whole on both; the last one that is there, which may be one more."""
    primary, replica = nodes
    wait_same_position(primary, replica, NAME)
    rows = rows_of(primary)
    last = max(rows, default=0)
    assert acknowledged <= last <= acknowledged + 1, f"{acknowledged} was acknowledged, the last one is {last}"
    assert rows == {number: 1 + number % 3 for number in range(1, last + 1)}
    assert rows_of(replica) == rows
    assert_same_bytes(nodes, NAME)
    return last


@pytest.mark.parametrize(("passthrough", "mode", "synchronous"), FS_MODES)
def test_the_primary_is_killed(cluster: Cluster, passthrough: str, mode: str, synchronous: str) -> None:
    primary, replica = cluster.pair()
    create(primary, mode)
    last = 0
    for round_number in range(scaled(3)):
        writer = Writer(primary, mode, synchronous, last + 1)
        writer.start()
        goal = last + 30 + 17 * round_number
        wait_until(lambda writer=writer, goal=goal: writer.acknowledged >= goal or writer.problem, "some commits")
        primary.kill()
        writer.stop()
        primary.start()
        last = check_all((primary, replica), writer.acknowledged)


@pytest.mark.parametrize(("passthrough", "mode", "synchronous"), FS_MODES)
def test_the_replica_is_killed(cluster: Cluster, passthrough: str, mode: str, synchronous: str) -> None:
    primary, replica = cluster.pair()
    create(primary, mode)
    writer = Writer(primary, mode, synchronous, 1)
    writer.start()
    for round_number in range(scaled(3)):
        goal = writer.acknowledged + 20 + 13 * round_number
        wait_until(lambda goal=goal: writer.acknowledged >= goal or writer.problem, "some commits")
        replica.kill()
        wait_until(lambda goal=goal: writer.acknowledged >= goal + 10 or writer.problem, "commits without a replica")
        replica.start()
    assert writer.problem is None
    writer.stop()
    check_all((primary, replica), writer.acknowledged)


def test_both_are_killed_at_once(cluster: Cluster) -> None:
    primary, replica = cluster.pair()
    create(primary, "wal")
    last = 0
    for _ in range(scaled(2)):
        writer = Writer(primary, "wal", "normal", last + 1)
        writer.start()
        wait_until(lambda writer=writer, goal=last + 40: writer.acknowledged >= goal or writer.problem, "some commits")
        replica.kill()
        primary.kill()
        writer.stop()
        primary.start(wait=False)
        replica.start()
        wait_until(primary.healthy, "the primary is ready")
        last = check_all((primary, replica), writer.acknowledged)


def test_a_reader_of_a_killed_replica_gets_an_error_and_can_come_back(cluster: Cluster) -> None:
    primary, replica = cluster.pair()
    create(primary, "wal")
    wait_same_position(primary, replica, NAME)
    reader = replica.connect(NAME)
    reader.execute("begin")
    assert reader.execute("select count(*) from t").fetchone() == (0,)
    replica.kill()
    reader.close()
    replica.start()
    assert check_all((primary, replica), 0) == 0


def test_an_orderly_restart_reads_no_database(cluster: Cluster) -> None:
    """Whatever the journal mode left beside the database, after SIGTERM the next start trusts what was written."""
    primary, replica = cluster.pair()
    modes = ["wal", "delete", "truncate", "persist", "memory", "off"]
    for mode in modes:
        connection = primary.connect(f"{mode}.db")
        connection.execute(f"pragma journal_mode={mode}")
        connection.execute("create table t(a)")
        connection.execute("insert into t values (1)")
        connection.close()
        wait_same_position(primary, replica, f"{mode}.db")
    for node in (replica, primary):
        before = len(node.log_text())
        node.stop()
        node.start()
        assert "recovered" not in node.log_text()[before:] and "unclean" not in node.log_text()[before:]
    for mode in modes:
        connection = primary.connect(f"{mode}.db")
        connection.execute("insert into t values (2)")
        connection.close()
        wait_same_position(primary, replica, f"{mode}.db")
        assert_same_bytes([primary, replica], f"{mode}.db")
