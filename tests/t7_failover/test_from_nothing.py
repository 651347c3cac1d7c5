"""The engine has lost its memory: what lies in the data directories is all that counts."""

from __future__ import annotations

import shutil

from cluster_nodes import wait_until
from conftest import New
from harness.cluster import ENGINE_HOST


def test_a_node_without_data_that_was_first_gives_way(new_cluster: New) -> None:
    """And follows, although it had begun a cluster of its own."""
    cluster = new_cluster("directory")
    members = list(cluster.start(2))
    primary = cluster.primary()
    before = primary.cluster()["clusterID"]
    connection = primary.connect("full.db")
    connection.execute("insert into log(value) values ('kept')")
    connection.close()
    cluster.wait_settled()
    for member in members:
        member.stop()
    folder = cluster.base / ENGINE_HOST
    shutil.rmtree(folder)
    folder.mkdir()
    empty = cluster.member("empty").start()
    wait_until(empty.takes_writes, "the new node has begun a cluster")
    for member in members:
        member.start()
    wait_until(lambda: any(member.takes_writes() for member in members), "a node with data leads")
    cluster.wait_settled()
    assert cluster.primary().cluster()["clusterID"] == before
    rows = empty.connect("full.db").execute("select value from log").fetchall()
    assert rows == [("kept",)] and (empty.data / "clusterid").read_text().strip() == before
