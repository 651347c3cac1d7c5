"""The network between nodes, or to the engine, fails: hosts in network namespaces, and the clients' histories hold.

Times are printed (`pytest -s`), never asserted: what is waited for only has to come.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cluster_nodes import needs_root, wait_until
from harness.cluster import ALL_DBS, FULL_DB, NORMAL_DB, HaCluster, wait_more
from harness.reports import assert_reads_go_on, lost, report

pytestmark = [needs_root, pytest.mark.timeout(150)]
New = Callable[..., HaCluster]


@pytest.mark.parametrize("sync", [0, 1])
def test_network_cut(new_cluster: New, sync: int) -> None:
    """The primary reaches nobody: it steps down by its own clock, and another one takes over."""
    cluster = new_cluster(network=True, sync=sync, databases=ALL_DBS)
    cluster.start()
    assert cluster.network is not None
    with cluster.workload() as clients:
        wait_more(clients, 100)
        old = cluster.primary()
        cluster.network.isolate(old.name)
        wait_until(lambda: old.role() is not None and not old.takes_writes(), "the old primary steps down")
        cluster.wait_primary([old])
        wait_more(clients, 100)
    report(f"cut from everybody, sync {sync}", *cluster.judge())


@pytest.mark.parametrize(("sender", "receiver"), [("primary", "engine"), ("engine", "primary")])
def test_one_way_cut_from_the_engine(new_cluster: New, sender: str, receiver: str) -> None:
    cluster = new_cluster(network=True, databases=ALL_DBS)
    cluster.start()
    assert cluster.network is not None
    with cluster.workload() as clients:
        wait_more(clients, 100)
        old = cluster.primary()
        names = {"primary": old.name, "engine": "engine"}
        cluster.network.cut_one_way(names[sender], names[receiver])
        wait_until(lambda: old.role() is not None and not old.takes_writes(), "the old primary steps down")
        cluster.wait_primary([old])
        wait_more(clients, 100)
    report(f"one-way cut {sender} → {receiver}", *cluster.judge())


def test_one_way_cut_between_nodes(new_cluster: New) -> None:
    """What the primary sends to its replicas does not arrive; the lease is not touched. Afterwards they catch up."""
    cluster = new_cluster(network=True, databases=ALL_DBS)
    cluster.start()
    assert cluster.network is not None
    with cluster.workload() as clients:
        wait_more(clients, 50)
        old = cluster.primary()
        for replica in cluster.replicas():
            cluster.network.cut_one_way(old.name, replica.name)
        wait_more(clients, 200)
        assert old.takes_writes()
    report("one-way cut primary → replicas", *cluster.judge())


def test_engine_gone_for_everybody(new_cluster: New) -> None:
    """Reads go on; the primary steps down before its lease ends; when the engine is back there is a primary."""
    cluster = new_cluster(network=True, databases=ALL_DBS)
    members = cluster.start()
    with cluster.workload() as clients:
        wait_more(clients, 100)
        cluster.cut_engine()
        cluster.wait_no_primary()
        assert_reads_go_on(cluster, members)
        cluster.heal()
        cluster.wait_primary()
        wait_more(clients, 50)
    report("engine cut from everybody", *cluster.judge())


def test_failsafe(new_cluster: New) -> None:
    """The engine is gone, but every node confirms the primary: writes go on. One that is cut off as well ends that."""
    cluster = new_cluster(network=True, lease={"failsafe": True}, databases=ALL_DBS)
    cluster.start()
    assert cluster.network is not None
    with cluster.workload() as clients:
        wait_more(clients, 100)
        old = cluster.primary()
        cluster.cut_engine()
        for _ in range(3):  # each takes longer than a third of the lease
            wait_more(clients, round(60 * cluster.ttl_s))
        with pytest.raises(OSError, match="nothing has changed: the lease cannot be renewed"):
            old.post("/handoff")
        assert old.takes_writes()
        cluster.network.isolate(cluster.replicas()[0].name)
        cluster.wait_no_primary()
        cluster.heal()
        cluster.wait_primary()
        wait_more(clients, 50)
    report("failsafe", *cluster.judge())


def test_a_branch_is_kept(new_cluster: New) -> None:
    """What only the old primary had goes to lost/ when it comes back after others have gone on, and is reported."""
    cluster = new_cluster(network=True, databases=FULL_DB | NORMAL_DB)
    cluster.start()
    assert cluster.network is not None
    with cluster.workload() as clients:
        wait_more(clients, 100)
        old = cluster.primary()
        cluster.network.cut([old.name], [replica.name for replica in cluster.replicas()])
        wait_more(clients, 100)
        old.kill()
        cluster.wait_primary([old])
        wait_more(clients, 100)
    seen, outcome = cluster.judge()
    report("a branch", seen, outcome)
    assert all(lost(seen, outcome).values()), "there was a branch, but nothing of it is missing"
    for name in cluster.databases:
        branches = [path for path in old.data.glob(f"dbs/{name}/lost/*") if path.is_dir()]
        assert len(branches) == 1, f"{name}: {branches}"
    told = [line for line in old.log_text().splitlines() if "event=lost" in line]
    assert len(told) == len(cluster.databases), told


def test_slow_network(new_cluster: New) -> None:
    """What the primary sends takes a tenth of a second; what waits for replicas takes as long, and is not lost."""
    cluster = new_cluster(network=True, sync=1, databases=ALL_DBS)
    cluster.start()
    assert cluster.network is not None
    with cluster.workload() as clients:
        wait_more(clients, 50)
        old = cluster.primary()
        cluster.network.delay([old.name], 100, 50)
        wait_more(clients, 100)
        old.kill()
        cluster.wait_primary([old])
        cluster.network.heal()
        wait_more(clients, 50)
    report("slow network", *cluster.judge())


def test_lossy_network(new_cluster: New) -> None:
    """A fifth of all packets to and from the primary is lost for a while; whoever leads, the histories hold."""
    cluster = new_cluster(network=True, sync=1, databases=ALL_DBS)
    cluster.start()
    assert cluster.network is not None
    with cluster.workload() as clients:
        wait_more(clients, 50)
        cluster.network.lose([cluster.primary().name], 20)
        wait_more(clients, 100)
        cluster.network.heal()
        wait_more(clients, 50)
    report("lossy network", *cluster.judge())
