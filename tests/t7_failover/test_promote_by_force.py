"""All nodes that have every acknowledged commit are gone: `litefs promote -force`, with real nodes."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable
from typing import Any

import pytest

from cluster_nodes import litefs, needs_root, wait_until
from harness.cluster import FULL_DB, HaCluster
from harness.nodes import Member

pytestmark = [needs_root, pytest.mark.timeout(150)]


def insert(member: Member, name: str, value: str, synchronous: str = "full") -> None:
    with contextlib.closing(member.connect(name)) as db:
        db.execute(f"pragma synchronous = {synchronous}")
        db.execute("insert into log (value) values (?)", (value,))


def values(member: Member, name: str) -> list[str]:
    with contextlib.closing(sqlite3.connect(f"file:{member.mount / name}?mode=ro", uri=True, timeout=10)) as db:
        return [value for (value,) in db.execute("select value from log order by seq")]


def test_promote_by_force(new_cluster: Callable[..., HaCluster]) -> None:
    """sync: 1; the primary and the node in sync are killed with a commit that the third never got. It leads only when
    it is forced, and what it lacks is kept in lost/ when the others come back."""
    cluster = new_cluster(sync=1)
    cluster.start()
    (name,) = FULL_DB
    primary = cluster.primary()
    insert(primary, name, "everywhere")
    cluster.wait_settled()
    standby = next(member for member in cluster.replicas() if member.cluster()["nodeID"] in primary.cluster()["inSync"])
    third = next(member for member in cluster.replicas() if member is not standby)
    assert third.cluster()["nodeID"] not in primary.cluster()["inSync"]
    force = ("promote", "-force", "-yes", "-url", third.url)
    refused = litefs(*force)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert f"{primary.name} holds the lease" in refused.stderr
    third.kill()
    insert(primary, name, "on two")
    primary.kill()
    standby.kill()
    third.start()

    wait_until(lambda: "must come back first" in third.cluster()["problem"], "the third says what would help")
    refused = litefs("promote", "-url", third.url)
    assert refused.returncode == 1 and "litefs promote -force" in refused.stderr
    assert not third.takes_writes()

    done = litefs(*force)
    assert done.returncode == 0, done.stderr
    assert third.takes_writes()
    assert values(third, name) == ["everywhere"]
    entry = json.loads(third.get("/history"))[-1]
    assert (entry["reason"], entry["epoch"]) == ("forced: acknowledged commits may be missing", 2)

    def position() -> dict[str, Any]:
        of_node = {member["nodeID"]: member["positions"] for member in third.cluster()["members"]}
        found: dict[str, Any] = of_node[third.cluster()["nodeID"]][name]
        return found

    wait_until(lambda: position()["txid"] == entry["txid"], "it tells where it is")
    assert third.cluster()["inSync"] == []
    assert "made the primary by force" in third.log_text() and "event=forced epoch=2" in third.log_text()

    insert(third, name, "meanwhile", "normal")  # or the others could give back what they have
    for member in (primary, standby):
        member.start()
    insert(third, name, "afterwards")
    cluster.wait_settled()
    for member in cluster.members:
        assert values(member, name) == ["everywhere", "meanwhile", "afterwards"], member.name
    for member in (primary, standby):
        listed = litefs("lost", "list", "-data-dir", str(member.data))
        assert name in listed.stdout, f"{member.name}: {listed.stdout} {listed.stderr}"


def test_any_node_passes_a_promotion_on_where_nobody_leads(new_cluster: Callable[..., HaCluster]) -> None:
    """Automatic failover is paused, the primary gone: there is nobody to hand over, so the node itself is asked."""
    cluster = new_cluster("directory")
    cluster.start()
    old = cluster.primary()
    assert litefs("pause", "-url", old.url).returncode == 0
    asked, wanted = cluster.replicas()
    old.kill()
    wait_until(lambda: "paused" in asked.cluster()["problem"], "the lease has ended")
    wait_until(lambda: "paused" in wanted.cluster()["problem"], "the lease has ended")
    done = litefs("promote", "-url", asked.url, "-node", wanted.name)
    assert done.returncode == 0, done.stderr
    assert wanted.takes_writes()
    assert json.loads(wanted.get("/history"))[-1]["reason"] == "promoted"
