"""A copied data directory, or a copied configuration: the node that comes later does not begin, and says why."""

from __future__ import annotations

import shutil

from cluster_nodes import wait_until
from conftest import New
from harness.nodes import Member


def problem_of(node: Member) -> str:
    return str(node.cluster()["problem"])


def test_a_copy_of_a_node_does_not_begin(new_cluster: New) -> None:
    """And the node that it is a copy of goes on as if nothing had happened."""
    cluster = new_cluster("directory")
    cluster.start(2)
    replica = cluster.replicas()[0]
    copy = cluster.member("copy")
    shutil.copytree(replica.data, copy.data)
    copy.start()
    wait_until(lambda: f"the node at {replica.url} has the same id as this one" in problem_of(copy), "it says so")
    assert "remove the file id" in problem_of(copy)
    assert copy.request("/readiness")[0] == 503 and replica.request("/replica")[0] == 200
    assert {member["url"] for member in cluster.primary().cluster()["members"]} == {n.url for n in cluster.members[:2]}
    copy.stop()
    assert len(cluster.primary().cluster()["members"]) == 2
    (copy.data / "id").unlink()
    copy.start()
    wait_until(lambda: copy.request("/replica")[0] == 200, "it follows once it has an id of its own")


def test_a_node_with_the_url_of_another_does_not_begin(new_cluster: New) -> None:
    cluster = new_cluster("directory")
    first = cluster.start(1)[0]
    other = cluster.member("other", lease={"advertise-url": first.url})
    other.start()
    expected = f"lease.advertise-url is {first.url}, and another node answers"
    wait_until(lambda: expected in problem_of(other), "it says so")
    assert [member["nodeID"] for member in first.cluster()["members"]] == [first.cluster()["nodeID"]]
