"""Somebody else fsyncs a database, or its journal, or closes it, while half of a transaction stands in the file: the
replica shows what was before it or what is after it, also when the primary is killed then."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from test_sync import GatedNode, gated_pair

from cluster_nodes import Cluster, Node, needs_root, wait_same_position, wait_until

pytestmark = needs_root
NAME = "spilled.db"
BEFORE, AFTER = (300, 45150), (300, -300)
SETTLE_S = 0.4  # longer than what is written is left alone before it is looked at
APPLICATION = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
for line in sys.stdin:
    connection.execute(line).fetchall()
    print("done", flush=True)
"""
FILL = (
    "insert into t with recursive c(n) as (select 1 union all select n + 1 from c where n < 300)"
    " select n, hex(randomblob(200)) from c"
)
FSYNC = "import os, sys; fd = os.open(sys.argv[1], os.{}); os.fsync(fd); os.close(fd)"


class Application:
    """A process that has a database open with SQLite."""

    def __init__(self, node: Node, name: str, *statements: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", APPLICATION, str(node.mount / name)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self(*statements)

    def __call__(self, *statements: str) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        for statement in statements:
            print(statement, file=self.process.stdin, flush=True)
            assert self.process.stdout.readline() == "done\n", statement

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def application(node: Node, name: str, *statements: str) -> Iterator[Application]:
    made = Application(node, name, *statements)
    try:
        yield made
    finally:
        made.end()


def seen(node: Node, name: str = NAME) -> tuple[int, int]:
    """What a reader finds; AssertionError if that is not sound."""
    with contextlib.closing(node.connect(name)) as connection:
        connection.execute("begin")
        assert connection.execute("pragma integrity_check").fetchall() == [("ok",)]
        count, total = connection.execute("select count(*), sum(x) from t").fetchone()
        return int(count), int(total)


def fsync_all(node: Node, name: str = NAME) -> None:
    """As `sync` and `dd conv=fsync` do it, of every file there is."""
    for path in (node.mount / name, node.mount / f"{name}-journal"):
        for flags in ("O_RDONLY", "O_RDWR"):
            if path.exists():
                subprocess.run([sys.executable, "-c", FSYNC.format(flags), str(path)], check=True, timeout=20)


def pair(cluster: Cluster, gated: bool) -> tuple[Node, Node]:
    if not gated:
        return cluster.pair()
    primary, replica, writer = gated_pair(cluster)
    writer.close()
    assert isinstance(primary, GatedNode)
    return primary, replica


def stays(replica: Node) -> None:
    until_s = time.monotonic() + SETTLE_S
    while time.monotonic() < until_s:
        assert seen(replica) == BEFORE
        time.sleep(0.05)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("mode", ["delete", "truncate", "persist", "memory", "off"])
def test_half_a_transaction_is_published_by_nobody(cluster: Cluster, mode: str, gated: bool) -> None:
    primary, replica = pair(cluster, gated)
    start = (f"pragma journal_mode = {mode}", "pragma synchronous = full", "pragma cache_size = 5")
    tables = ("create table t(x, y)", "create index i on t(y)", FILL)
    with application(primary, NAME, *start, *tables) as writer:
        wait_same_position(primary, replica, NAME)
        assert seen(replica) == BEFORE
        for end in ("commit",) if mode == "off" else ("rollback", "commit"):
            writer("begin immediate", "update t set x = -1, y = hex(randomblob(200))")
            fsync_all(primary)
            stays(replica)
            writer(end)
            wait_same_position(primary, replica, NAME)
            assert seen(replica) == (AFTER if end == "commit" else BEFORE)
        writer("update t set x = rowid", "begin immediate", "update t set x = -1, y = hex(randomblob(200))")
        wait_until(lambda: seen(replica) == BEFORE, "the replica has the state before")
        fsync_all(primary)
        time.sleep(SETTLE_S)
        primary.kill()
        assert seen(replica) == BEFORE


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("mode", ["memory", "off"])
def test_nor_where_the_writes_pass_us_by(cluster: Cluster, mode: str, gated: bool) -> None:
    """A connection that was opened in WAL mode changes to a mode without a journal: the process with SQLite's locks
    tells whose fsync it is."""
    primary, replica = pair(cluster, gated)
    tables = ("pragma journal_mode = wal", "create table t(x, y)", "create index i on t(y)", FILL)
    with application(primary, NAME, *tables):
        pass
    start = ("select 1 from t", f"pragma journal_mode = {mode}", "pragma synchronous = full", "pragma cache_size = 5")
    with application(primary, NAME, *start) as writer:
        wait_same_position(primary, replica, NAME)
        assert seen(replica) == BEFORE
        writer("begin immediate", "update t set x = -1, y = hex(randomblob(200))")
        fsync_all(primary)
        stays(replica)
        writer("commit")
        wait_same_position(primary, replica, NAME)
        assert seen(replica) == AFTER


def test_a_journal_that_persist_left_is_not_that_of_a_transaction_without_one(cluster: Cluster) -> None:
    primary, replica = cluster.pair()
    tables = ("create table t(x, y)", "create index i on t(y)", FILL)
    with application(primary, NAME, "pragma journal_mode = persist", *tables):
        pass
    assert os.path.getsize(primary.mount / f"{NAME}-journal")
    with application(primary, NAME, "pragma journal_mode = memory", "pragma cache_size = 5") as writer:
        wait_same_position(primary, replica, NAME)
        writer("begin immediate", "update t set x = -1, y = hex(randomblob(200))")
        stays(replica)  # the look some time after a write
        fsync_all(primary)
        stays(replica)
        writer("commit")
        wait_same_position(primary, replica, NAME)
        assert seen(replica) == AFTER


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("mode", ["delete", "memory"])
def test_a_new_database_begins_with_whole_transactions(cluster: Cluster, mode: str, gated: bool) -> None:
    primary, replica = pair(cluster, gated)
    start = (f"pragma journal_mode = {mode}", "pragma synchronous = full", "pragma cache_size = 5")
    with application(primary, NAME, *start) as writer:
        writer("begin immediate", "create table t(x, y)", "create index i on t(y)", FILL)
        writer("update t set x = -x, y = hex(randomblob(200))")
        assert os.path.getsize(primary.mount / NAME), "it has spilled"
        fsync_all(primary)
        time.sleep(SETTLE_S)
        assert NAME not in replica.databases()
        writer("update t set x = -x, y = hex(randomblob(200))", "commit")
        wait_until(lambda: NAME in replica.databases(), "the replica has it")
        wait_same_position(primary, replica, NAME)
        assert seen(replica) == BEFORE
