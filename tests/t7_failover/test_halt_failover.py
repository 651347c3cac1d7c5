"""Writes from a replica under HALT while the primary, or the holder, fails: what was acknowledged is there once."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster_nodes import needs_root, wait_until
from harness import nodes
from harness.cluster import Clients, HaCluster
from harness.history import History, Outcome
from harness.nodes import Member
from pylitefs.engine.lost import branches

pytestmark = [needs_root, pytest.mark.timeout(150)]
New = Callable[..., HaCluster]
DATABASES = {"full.db": ("wal", "full"), "normal.db": ("wal", "normal"), "delete.db": ("delete", "full")}
SHORT = """
import sys
if sys.argv[1:2] == ["mount"] or "mount" in sys.orig_argv:
    from pylitefs.cluster.halting import Halting
    from pylitefs.cluster.halts import HaltLocks
    for kind in (Halting, HaltLocks):
        kind.__init__.__kwdefaults__["ttl_s"] = 4.0
"""


@pytest.fixture(autouse=True)
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks that expire after 4 s instead of 30, in every node that is started."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text((nodes.SKEWED / "sitecustomize.py").read_text() + SHORT)
    monkeypatch.setattr(nodes, "SKEWED", folder)


@contextlib.contextmanager
def workload(cluster: HaCluster, *holders: Member) -> Iterator[Clients]:
    """On `holders` clients that write under HALT, on every other node those that write where it is the primary."""
    for member in cluster.members:
        for name, (_, synchronous) in cluster.databases.items():
            kind = "halt" if member in holders else "write"
            cluster.clients.start(kind, member, name, synchronous, 5.0, 200.0)
            cluster.clients.start("read", member, name, "ro", 100.0)
    cluster.clients.observe(cluster.members)
    try:
        yield cluster.clients
        cluster.heal()
    finally:
        cluster.clients.stop()


def by(clients: Clients, member: Member) -> int:
    """How many commits were acknowledged to the HALT clients of a node."""
    return clients.acknowledged("halt", member.name)


def wait_by(clients: Clients, member: Member, count: int) -> None:
    wanted = by(clients, member) + count
    wait_until(lambda: by(clients, member) >= wanted, f"{count} more commits under HALT on {member.name}", 60.0)


def report(what: str, seen: History, outcome: Outcome) -> None:
    for db, copy in outcome.copies[outcome.primary].items():
        halted = [write for write in seen.acknowledged(db) if ".halt." in write.value]
        there = set(copy.values)
        print(f"\n{what}, {db}: {len(copy.values)} rows; acknowledged {len(seen.acknowledged(db))}, under HALT "
              f"{len(halted)}, of these not there {sum(write.value not in there for write in halted)}")  # fmt: skip


def notes(cluster: HaCluster) -> str:
    """What the clients under HALT were told."""
    path = cluster.clients.folder / "notes"
    return path.read_text() if path.exists() else ""


def strike(cluster: HaCluster, what: str, victim: Member) -> None:
    match what:
        case "kill":
            victim.kill()
        case "lose":
            victim.kill()
            victim.unmount()
            shutil.rmtree(victim.data)
            cluster.forgetful |= {name for name, (_, synchronous) in DATABASES.items() if synchronous != "full"}
        case "stop":
            victim.pause()
        case "cut":
            assert cluster.network is not None
            cluster.network.isolate(victim.name)
        case "handoff" | "promote":
            victim.post(f"/{what}")


@pytest.mark.rotates(2)
@pytest.mark.parametrize(
    ("what", "whom", "sync"),
    [
        ("kill", "primary", 0), ("stop", "primary", 1), ("cut", "primary", 0), ("handoff", "primary", 0),
        ("promote", "holder", 0), ("kill", "holder", 1), ("stop", "holder", 0), ("cut", "holder", 1),
        ("lose", "primary", 1), ("lose", "holder", 1),
    ],
)  # fmt: skip
def test_faults(new_cluster: New, what: str, whom: str, sync: int) -> None:
    """Two replicas write under HALT, the primary in between. They write again while the fault lasts, and afterwards."""
    cluster = new_cluster(network=what == "cut", sync=sync, databases=DATABASES)
    cluster.start()
    old = cluster.primary()
    holder, other = cluster.replicas()
    victim = old if whom == "primary" else holder
    with workload(cluster, holder, other) as clients:
        wait_by(clients, holder, 20)
        wait_by(clients, other, 20)
        strike(cluster, what, victim)
        if victim is old:
            cluster.wait_primary([old])
        survivor = other if victim is holder else next(one for one in (holder, other) if not one.takes_writes())
        wait_by(clients, survivor, 20)
        if what in ("kill", "lose"):
            victim.start()
        cluster.heal()
        wait_by(clients, holder, 10)
        wait_by(clients, other, 10)
    seen, outcome = cluster.judge()
    report(f"{what} {whom}, sync {sync}", seen, outcome)
    print(notes(cluster))
    if what in ("handoff", "promote"):
        for db in ("full.db", "delete.db"):
            there = set(outcome.copies[outcome.primary][db].values)
            missing = [write.value for write in seen.acknowledged(db) if write.value not in there]
            assert not missing, "a switchover lost commits that were acknowledged"


def test_the_branch_of_a_holder_does_not_win_an_election(new_cluster: New) -> None:
    """It has more transactions than anybody else, but the primary had taken its lock away and went on without them."""
    cluster = new_cluster(network=True)
    cluster.start()
    assert cluster.network is not None
    old = cluster.primary()
    holder, other = cluster.replicas()
    with open(holder.mount / "full.db-lock", "r+b", buffering=0) as lock:
        cluster.network.cut([holder.name], [old.name])
        insert(holder, "branch", 20, "normal")
        insert(old, "primary", 3, "full")  # once the lock has expired
        wait_until(lambda: other.positions() == old.positions(), "the other replica has it")
        old.kill()
        cluster.heal()
        cluster.wait_primary([old])
        with contextlib.suppress(OSError):
            lock.close()
    old.start()
    cluster.wait_settled()
    values = {member.name: member.copy("full.db").values for member in cluster.members}
    assert all(seen == tuple(f"primary {n}" for n in range(3)) for seen in values.values()), values
    (branch,) = branches(str(holder.data), "full.db")
    assert branch.transactions == 20


def insert(member: Member, what: str, count: int, synchronous: str) -> None:
    with contextlib.closing(member.connect("full.db")) as connection:
        connection.execute(f"pragma synchronous={synchronous}")
        for n in range(count):
            connection.execute("insert into log (value) values (?)", (f"{what} {n}",))
