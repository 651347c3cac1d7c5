"""A primary whose role is fixed comes back with an older state, and goes on writing; its replica is away meanwhile."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3

from cluster_nodes import (
    Cluster,
    Node,
    assert_same_bytes,
    needs_root,
    wait_same_position,
    wait_until,
)
from pylitefs.engine.lost import branches
from pylitefs.formats.ltx.format import Position

pytestmark = needs_root
NAME = "app.db"


def write(node: Node, what: str, count: int) -> None:
    with contextlib.closing(node.connect(NAME)) as connection:
        connection.execute("pragma journal_mode = wal")
        connection.execute("create table if not exists t (id integer primary key, v text)")
        for number in range(count):
            connection.execute("insert into t (v) values (?)", (f"{what} {number}",))


def restarted_without_its_log(primary: Node) -> None:
    """From now on its log does not reach back to what its replica has."""
    primary.config["data"] |= {"retention": "100ms", "retention-monitor-interval": "100ms"}
    primary.start()


def wait_for_a_short_log(primary: Node) -> None:
    log = primary.data / "dbs" / NAME / "ltx"
    wait_until(lambda: len([name for name in os.listdir(log) if name.endswith(".ltx")]) == 1, "the log is short")


def test_what_an_old_copy_of_the_primary_lacks_is_kept(cluster: Cluster) -> None:
    """Its data directory was put back, as it was after an orderly stop: nothing in it tells. By the time the replica
    is back the primary has come further than that ever was."""
    primary, replica = cluster.pair()
    write(primary, "before", 5)
    primary.stop()
    copy = primary.base / "copy"
    shutil.copytree(primary.data, copy)
    primary.start()
    parted = Position.parse(wait_same_position(primary, replica, NAME))
    write(primary, "lost", 7)
    lost = Position.parse(wait_same_position(primary, replica, NAME))
    replica.stop()
    primary.stop()
    shutil.rmtree(primary.data)
    copy.rename(primary.data)
    restarted_without_its_log(primary)
    write(primary, "since", 40)
    wait_for_a_short_log(primary)
    replica.start()
    assert Position.parse(wait_same_position(primary, replica, NAME)).txid > lost.txid
    assert_same_bytes([primary, replica], NAME)
    (branch,) = branches(str(replica.data))
    assert (branch.after, branch.to) == (parted, lost)
    tip = branch.path("tip.db")
    assert tip is not None
    with contextlib.closing(sqlite3.connect(f"file:{tip}?immutable=1", uri=True)) as db:
        kept = [v for (v,) in db.execute("select v from t where v like 'lost%' order by id")]
    assert kept == [f"lost {number}" for number in range(7)]
    assert "litefs_branches_lost_total 1.0" in replica.get("/metrics").decode()
    assert branches(str(primary.data)) == []


def test_a_replica_that_was_away_for_long_has_lost_nothing(cluster: Cluster) -> None:
    """Over several restarts of the primary, with a log that does not reach back."""
    primary, replica = cluster.pair()
    write(primary, "before", 5)
    wait_same_position(primary, replica, NAME)
    replica.stop()
    for turn in range(2):
        primary.stop()
        restarted_without_its_log(primary)
        write(primary, f"since {turn}", 10)
    primary.kill()
    primary.start()
    write(primary, "at last", 10)
    wait_for_a_short_log(primary)
    replica.start()
    wait_same_position(primary, replica, NAME)
    assert_same_bytes([primary, replica], NAME)
    assert branches(str(replica.data)) == []
    assert "LOG_TOO_SHORT" in primary.log_text() or "LOG_TOO_SHORT" in replica.log_text()


def test_a_primary_whose_clock_was_set_back_is_followed(cluster: Cluster) -> None:
    """Its replicas have seen a later epoch than its own: the configuration says who the primary is."""
    primary, replica = cluster.pair()
    write(primary, "before", 3)
    wait_same_position(primary, replica, NAME)
    replica.stop()
    (replica.data / "epoch").write_text("4000000000\n")  # far in the future
    replica.start()
    write(primary, "after", 3)
    wait_same_position(primary, replica, NAME)
    assert_same_bytes([primary, replica], NAME)
    assert branches(str(replica.data)) == []
