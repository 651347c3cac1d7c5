"""The clauses of `cluster.lease_port` that have a meaning for the static lease, asked of real nodes.

There is no engine to ask: the configuration decides.
"""

from __future__ import annotations

import json
import sqlite3
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cluster_nodes import PRIMARY_NAME, Cluster, Node, litefs, needs_root, wait_same_position, wait_until

pytestmark = [needs_root, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Node, Node]]:
    """The one candidate, and two replicas; each test leaves them as they were."""
    with Cluster(tmp_path_factory.mktemp("static")) as cluster:
        primary = cluster.node("primary")
        primary.config["lease"]["hostname"] = PRIMARY_NAME
        primary.start()
        replicas = [cluster.node(name, primary=primary).start(wait=False) for name in ("replica", "second")]
        for replica in replicas:
            wait_until(replica.healthy, f"{replica.name} is ready")
        yield primary, replicas[0], replicas[1]


def write(node: Node, value: int) -> None:
    with closing(node.connect("app.db")) as db:
        db.execute("pragma synchronous = full")
        db.execute("create table if not exists t (v)")
        db.execute("insert into t values (?)", (value,))


def leads(node: Node) -> bool:
    """As load balancers ask."""
    try:
        urllib.request.urlopen(node.url + "/primary", timeout=10).close()
    except urllib.error.HTTPError:
        return False
    return True


def view(node: Node) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(node.get("/cluster"))
    return document


def test_all_call_the_primary_by_one_name(nodes: tuple[Node, Node, Node]) -> None:
    replicas = nodes[1:]
    statuses = [json.loads(node.get("/status")) for node in nodes]
    assert statuses[0]["node"]["hostname"] == PRIMARY_NAME
    assert [status["primary"]["hostname"] for status in statuses[1:]] == [PRIMARY_NAME] * len(replicas)
    assert [view(node)["primary"]["hostname"] for node in nodes] == [PRIMARY_NAME] * len(nodes)


def test_the_configured_candidate_leads_and_nobody_else(nodes: tuple[Node, Node, Node]) -> None:
    primary, *replicas = nodes
    write(primary, 1)
    assert [leads(node) for node in nodes] == [True, False, False]
    for replica in replicas:
        wait_same_position(primary, replica, "app.db")
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            write(replica, 2)
    primary.kill()
    wait_until(lambda: view(replicas[0])["problem"], "the replica has noticed")
    assert view(replicas[0])["primary"]["url"] == primary.url
    assert [leads(replica) for replica in replicas] == [False, False], "nobody takes its place"
    replicas[0].stop()
    replicas[0].start(wait=False)
    primary.start()
    write(primary, 3)
    for replica in replicas:
        wait_until(replica.healthy, f"{replica.name} follows again")
        wait_same_position(primary, replica, "app.db")


def test_every_node_shows_the_cluster(nodes: tuple[Node, Node, Node]) -> None:
    primary, *replicas = nodes
    write(primary, 1)
    ids = {view(node)["nodeID"] for node in nodes}
    assert len(ids) == 3
    for node in nodes:
        wait_until(lambda node=node: {member["nodeID"] for member in view(node)["members"]} == ids, node.name)
        seen = view(node)
        assert seen["engine"] == "static"
        assert seen["primary"]["nodeID"] == view(primary)["nodeID"]
        roles = sorted((member["role"], member["candidate"]) for member in seen["members"])
        assert roles == [("primary", True), ("replica", False), ("replica", False)]
    assert view(replicas[0])["primary"]["url"] == primary.url
    done = litefs("status", "-url", replicas[0].url)
    assert done.returncode == 0
    names = [PRIMARY_NAME, *(view(replica)["nodeID"][:8] for replica in replicas)]
    assert all(name in done.stdout for name in names), done.stdout


def test_it_does_not_expire(nodes: tuple[Node, Node, Node]) -> None:
    """No answer for long is no reason: who was stopped goes on as the primary, in the same epoch."""
    primary, replica, _ = nodes
    write(primary, 1)
    wait_same_position(primary, replica, "app.db")
    epoch = view(primary)["epoch"]
    primary.pause()
    wait_until(lambda: view(replica)["problem"], "the replica has noticed")
    assert not leads(replica)
    primary.resume()
    write(primary, 2)
    assert leads(primary) and view(primary)["epoch"] == epoch
    wait_same_position(primary, replica, "app.db")


def test_its_epoch_never_falls_back(tmp_path: Path) -> None:
    """Also not for a node that comes from an engine, whose epochs were raised at each start."""
    with Cluster(tmp_path) as cluster:
        primary = cluster.node("primary")
        static = primary.config["lease"]
        (tmp_path / "engine").mkdir()
        store = {"url": (tmp_path / "engine").as_uri(), "ttl": "1s"}
        primary.config["lease"] = {"type": "object-store", "advertise-url": primary.url, "object-store": store}
        for _ in range(2):
            primary.start()
            wait_until(lambda: leads(primary), "it leads")
            primary.stop()
        primary.config["lease"] = static
        primary.start()
        write(primary, 1)
        epoch = view(primary)["epoch"]
        assert epoch >= 2
        replica = cluster.node("replica", primary=primary).start()
        wait_same_position(primary, replica, "app.db")
        assert view(replica)["epoch"] == epoch
        for end in (primary.kill, primary.stop):
            end()
            primary.start()
            write(primary, 2)
            assert view(primary)["epoch"] >= epoch
            epoch = view(primary)["epoch"]
            wait_until(replica.healthy, "the replica follows again")
            wait_same_position(primary, replica, "app.db")


def test_nobody_can_change_it_but_the_configuration(nodes: tuple[Node, Node, Node]) -> None:
    primary, replica, second = nodes
    there = f"nodeID={view(second)['nodeID']}"
    for node in (primary, replica):
        for path in (f"/promote?{there}", f"/handoff?{there}", "/handoff", "/pause", "/resume"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(urllib.request.Request(node.url + path, method="POST"), timeout=10)
            told = refused.value.read().decode()
            assert (refused.value.code, told.count("\n")) == (409, 1), f"{node.name}: {path}: {told}"
            assert "set lease.candidate" in told, f"{node.name}: {path}: {told}"
    done = litefs("promote", "-force", "-yes", "-url", replica.url)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "set lease.candidate" in done.stderr
    assert [leads(node) for node in nodes] == [True, False, False]
