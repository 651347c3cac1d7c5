"""The whole cluster is seen from any node, and a node that has just come is seen by the primary."""

from __future__ import annotations

from cluster_nodes import wait_until
from conftest import New


def test_every_node_tells_how_far_all_others_are(new_cluster: New) -> None:
    """Also of replicas that are connected to the primary only."""
    cluster = new_cluster("directory")
    members = cluster.start(3)
    primary = cluster.primary().cluster()["nodeID"]
    for member in members:

        def seen() -> bool:
            replicas = [one for one in member.cluster()["members"] if one["nodeID"] != primary]  # noqa: B023
            return len(replicas) == 2 and all(
                one["state"] == "live" and one["lagTXIDs"] == 0 and one["lagMs"] is not None for one in replicas
            )

        wait_until(seen, f"{member.name} knows how far everybody is")


def test_a_node_that_wants_to_lead_does_so_once_it_has_caught_up(new_cluster: New) -> None:
    """Also where the primary has not seen it in the register yet, which is looked at now and then."""
    cluster = new_cluster("directory")
    cluster.start(1)
    eager = cluster.member("eager", lease={"promote": True}).start()
    wait_until(eager.takes_writes, "it leads")
    assert eager.cluster()["history"][-1]["reason"] == "handed over"
