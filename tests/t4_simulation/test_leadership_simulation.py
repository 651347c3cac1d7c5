"""Elections, leases and switchovers under a nemesis, in virtual time, by seed: nothing acknowledged is lost.

The nodes' databases are lists; the leadership, the election, the shared state and the commit gate are the real ones.
A failure shows the command that repeats it. PYLITEFS_TEST_SEED is the first seed, PYLITEFS_TEST_SCALE=100 runs a
hundred times as many.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from leadership_nodes import STOPS_S, SimNode
from sim_engine import ENGINE
from simulated_cluster import Setup, SimCluster
from worlds import World

from cluster_nodes import scaled
from harness.history import check
from harness.liveness import LIVE_S

FIRST = int(os.environ.get("PYLITEFS_TEST_SEED", "1"))
SEEDS = 8
FAULTS_S = 40.0  # of virtual time
SETTLE_S = 90.0
AGAIN = (
    "PYLITEFS_TEST_SEED={seed} PYLITEFS_TEST_SCALE=0.01 make test "
    "ARGS='tests/t4_simulation/test_leadership_simulation.py::test_nothing_acknowledged_is_lost[{name}]'"
)


class Nemesis:
    """What goes wrong, until `until_s`."""

    def __init__(self, cluster: SimCluster, until_s: float) -> None:
        self.cluster, self.world, self.rng = cluster, cluster.world, cluster.world.rng
        self.until_s = until_s
        self.told: list[str] = []
        self._wipes = cluster.setup.wipes
        self._faults: list[Callable[[SimNode], None]] = [
            self.kill, self.kill, self.cut_power, self.pause, self.pause, self.isolate, self.isolate, self.cut_one_way,
            self.cut_from_engine, self.cut_engine, self.lose, self.slow, self.hand_over, self.hand_over, self.give_up,
            self.give_up_and_die, self.fade, self.fade, self.stop, self.promote, self.drop_lease, self.pause_failover,
            self.fill_disk,
        ]  # fmt: skip
        if cluster.setup.wipes:
            self._faults += [self.lose_machine] * 2
        if cluster.setup.old_disks:
            self._faults += [self.old_disk] * 2
        self._next()

    def _next(self) -> None:
        """Faults come together, or with time to recover between them."""
        pause_s = self.rng.choice((0.02, 0.2, 0.8, 3.0, 6.0)) * self.rng.uniform(0.5, 1.5)
        self.world.after(pause_s, self._strike)

    def _strike(self) -> None:
        if self.world.now_s > self.until_s:
            return
        leader = self.cluster.leader()
        victims = list(self.cluster.nodes.values())
        victim = leader if leader is not None and self.rng.random() < 0.6 else self.rng.choice(victims)
        fault = self.rng.choice(self._faults)
        self.told.append(f"{self.world.now_s:6.2f} {fault.__name__} {victim.hostname}")
        fault(victim)
        self._next()

    def _later(self, call: Callable[[], object]) -> None:
        """Undo it after a while: shorter than the lease, about as long, or longer."""
        self.world.after(self.rng.choice((0.1, 0.7, 2.7, 3.2, 8.0)), call)

    def _again(self, victim: SimNode) -> None:
        self._later(lambda: victim.runs or victim.start())

    # -- processes and machines

    def kill(self, victim: SimNode) -> None:
        if victim.runs:
            victim.kill()
            self._again(victim)

    def cut_power(self, victim: SimNode) -> None:
        if victim.runs:
            victim.cut_power()
            self._again(victim)

    def lose_machine(self, victim: SimNode) -> None:
        if victim.runs and self._wipes and self.world.now_s > 5:
            self._wipes -= 1
            victim.lose_machine()
            self._again(victim)

    def old_disk(self, victim: SimNode) -> None:
        if not victim.runs:
            return
        disk = victim.disk.copy()

        def restore() -> None:
            if victim.runs and victim.node_id == disk.node_id and self.cluster.may_lose_disk(victim):
                self.told.append(f"{self.world.now_s:6.2f} {victim.hostname} is restored")
                victim.put(disk)
                self._again(victim)

        self.world.after(self.rng.choice((1.0, 5.0, 15.0)), restore)

    def pause(self, victim: SimNode) -> None:
        process = victim.process
        assert process is not None
        process.pause()
        self._later(process.go_on)

    def fill_disk(self, victim: SimNode) -> None:
        victim.disk_full = True
        if victim.acts:
            victim.order(victim.watch_disk())
        self._later(lambda: setattr(victim, "disk_full", False))

    # -- the network

    def _cut(self, ways: set[tuple[str, str]]) -> None:
        self.world.cuts |= ways
        self._later(lambda: self.world.cuts.difference_update(ways))

    def isolate(self, victim: SimNode) -> None:
        others = {node.hostname for node in self.cluster.nodes.values()} | {ENGINE}
        self._cut({(victim.hostname, other) for other in others} | {(other, victim.hostname) for other in others})

    def cut_one_way(self, victim: SimNode) -> None:
        others = [node.hostname for node in self.cluster.nodes.values()] + [ENGINE]
        other = self.rng.choice(others)
        self._cut({self.rng.choice([(victim.hostname, other), (other, victim.hostname)])})

    def cut_from_engine(self, victim: SimNode) -> None:
        self._cut({(victim.hostname, ENGINE), (ENGINE, victim.hostname)})

    def fade(self, victim: SimNode) -> None:
        """The engine's answers come later and later, then it is gone."""
        way = ENGINE, victim.hostname
        self.world.late_s[way] = self.rng.uniform(0.2, 0.7)

        def cut() -> None:
            self.world.late_s.pop(way, None)
            ways = {way, way[::-1]}
            self.world.cuts |= ways
            self.world.after(self.rng.choice((2.0, 6.0)), lambda: self.world.cuts.difference_update(ways))

        self.world.after(self.rng.uniform(1.5, 4.0), cut)

    def cut_engine(self, _victim: SimNode) -> None:
        names = {node.hostname for node in self.cluster.nodes.values()}
        self._cut({(name, ENGINE) for name in names} | {(ENGINE, name) for name in names})

    def lose(self, _victim: SimNode) -> None:
        self.world.loss = self.rng.choice((0.05, 0.3))
        self._later(lambda: setattr(self.world, "loss", 0.0))

    def slow(self, _victim: SimNode) -> None:
        self.world.latency_s = self.rng.choice((0.05, 0.2))
        self._later(lambda: setattr(self.world, "latency_s", 0.002))

    # -- operators

    def _leader(self, other_than: SimNode) -> SimNode | None:
        leader = self.cluster.leader()
        return leader if leader is not None and leader is not other_than and leader.acts else None

    def hand_over(self, victim: SimNode) -> None:
        if leader := self._leader(victim):
            leader.order(leader.hand_over(victim.node_id))

    def give_up(self, victim: SimNode) -> None:
        """A switchover whose operator does not wait for it."""
        if leader := self._leader(victim):
            switching = leader.order(leader.hand_over(victim.node_id))
            self.world.after(10 ** self.rng.uniform(-3.0, 0.0), switching.cancel)

    def give_up_and_die(self, victim: SimNode) -> None:
        """… and the one who was to take over falls behind, before the primary dies."""
        if leader := self._leader(victim):
            self.give_up(victim)
            self.world.after(1.0, lambda: self.isolate(victim))
            self.world.after(self.rng.uniform(1.5, 6.0), lambda: self.kill(leader))

    def stop(self, victim: SimNode) -> None:
        if victim.acts:
            victim.order(victim.stop())
            self.world.after(10.0, lambda: victim.runs or victim.start())

    def promote(self, victim: SimNode) -> None:
        """With failsafe, only where there is a primary: an operator who takes the lease overrules the promises."""
        setup = self.cluster.setup
        if victim.acts and (self.cluster.leader() or not setup.failsafe):
            force = not setup.sync and not setup.failsafe and self.rng.random() < 0.3
            victim.order(victim.take_over(force))

    def pause_failover(self, victim: SimNode) -> None:
        if victim.acts:
            victim.order(victim.set_paused(True))
            self._later(lambda: victim.acts and victim.order(victim.set_paused(False)))

    def drop_lease(self, _victim: SimNode) -> None:
        """An operator deletes it, of which the holder learns late: it acknowledges on, unless replicas must agree."""
        if self.cluster.setup.sync:
            self.cluster.service.drop()

    def heal(self) -> None:
        self.world.cuts.clear()
        self.world.late_s.clear()
        self.world.loss, self.world.latency_s, self.world.stalls = 0.0, 0.002, 0.0
        for node in self.cluster.nodes.values():
            node.disk_full = False
            if node.runs:
                assert node.process is not None
                node.process.go_on()
            else:
                node.start()

    def settle(self) -> None:
        """Whoever has stopped or paused something goes on."""
        for node in self.cluster.nodes.values():
            if not node.runs:
                node.start()
            node.order(node.set_paused(False))

    def operate(self) -> None:
        """What takes an operator: with maximum-lag, when those who had more have lost it; with failsafe, when a primary
        that knew some of the nodes only is lost for good."""
        setup = self.cluster.setup
        if (setup.maximum_lag is not None or setup.failsafe) and self.cluster.leader() is None:
            for node in self.cluster.nodes.values():
                node.order(node.take_over(force=not setup.failsafe))


def hush(world: World, cluster: SimCluster) -> list[str]:
    """A last commit in each database, and silence: whether it is answered, and everywhere, in time."""
    cluster.calm = True
    world.run(world.now_s + max(STOPS_S) + 3.0)  # what is under way comes to its end
    last = cluster.write_last()
    world.run(world.now_s + LIVE_S)
    writes = cluster.history.writes
    problems = [f"SILENT {writes[at].value} is not answered" for at in last if writes[at].outcome != "ok"]
    if not cluster.settled() or len(writes) != last[-1] + 1:
        ends = {node.hostname: {name: len(log) for name, log in node.logs.items()} for node in cluster.nodes.values()}
        problems.append(f"SILENT not the same {LIVE_S:g} s after the last write: {ends}")
    return problems


def run(world: World, cluster: SimCluster, nemesis: Nemesis) -> list[str]:
    """What was wrong."""
    world.run(FAULTS_S + 10.0)
    nemesis.heal()
    world.run(world.now_s + 12.0)
    cluster.writing = False
    nemesis.settle()
    end_s = world.now_s + SETTLE_S
    while not cluster.settled() and world.now_s < end_s:
        world.run(world.now_s + 1.0)
        if world.now_s > end_s - SETTLE_S / 2:
            nemesis.operate()
    if not cluster.settled():
        nodes = cluster.nodes.values()
        if not cluster.observed and cluster.has_lost_all():
            return []
        return [
            *cluster.observed,
            *(f"UNSETTLED {node.hostname}: {node.leadership.problem} {node.positions()}" for node in nodes),
        ]
    silent = hush(world, cluster)
    cluster.history.writes.sort(key=lambda write: write.start_s)
    cluster.history.roles.sort(key=lambda role: role.start_s)
    outcome = cluster.outcome()
    final = frozenset(value for copy in outcome.copies[outcome.primary].values() for value in copy.values)
    problems = [*cluster.observed, *silent, *check(cluster.history, outcome), *cluster.stale_reads(final)]
    if not any(write.outcome == "ok" for write in cluster.history.writes):
        problems.append("IDLE nothing was ever committed")
    return problems


@dataclass(frozen=True)
class Played:
    """One run: what was wrong, "" if nothing was; and how much there was of what."""

    text: str
    counts: dict[str, int]


def played(seed: int, name: str) -> Played:
    world = World(seed)
    try:
        cluster = SimCluster(world, SETUPS[name])
        cluster.start()
        nemesis = Nemesis(cluster, FAULTS_S)
        try:
            problems = run(world, cluster, nemesis)
        except Exception as error:
            problems = [f"RAISED {error!r}"]
            if os.environ.get("PYLITEFS_TEST_RAISE"):
                raise
        again = AGAIN.format(seed=seed, name=name)
        text = "\n".join([f"{name}, seed {seed}:", *problems[:20], *nemesis.told, again]) if problems else ""
        history = cluster.history
        counts = {"kills": cluster.kills, "cuts": cluster.cuts, "changes": cluster.changes(),
                  "acknowledged": sum(write.outcome == "ok" for write in history.writes),
                  "reads": len(history.reads), "virtual_ms": round(world.now_s * 1000)}  # fmt: skip
        return Played(text, counts)
    finally:
        world.close()


HOSTILE = {"drift": 0.045, "doubles": 0.03, "stalls": 0.01}
SETUPS = {
    "async": Setup(),
    "async-hostile": Setup(**HOSTILE, gaps=True, slow_disks=True, joins=True, old_disks=True),
    "async-witness": Setup(**HOSTILE, witnesses=(3,)),
    "async-maximum-lag": Setup(**HOSTILE, maximum_lag=5, joins=True),
    "failsafe": Setup(failsafe=True, drift=0.045),
    "failsafe-hostile": Setup(**HOSTILE, failsafe=True, joins=True, gaps=True),
    "sync": Setup(sync=1),
    "sync-hostile": Setup(**HOSTILE, sync=1, gaps=True, slow_disks=True, old_disks=True, joins=True),
    "sync-machine-lost": Setup(**HOSTILE, sync=1, wipes=1),
    "sync-timeout": Setup(**HOSTILE, sync=1, timeout_s=1.0, witnesses=(3,), gaps=True),
    "sync-degrade": Setup(**HOSTILE, sync=1, mode="degrade", timeout_s=1.0, slow_disks=True),
    "sync-two-of-five": Setup(**HOSTILE, count=5, sync=2, failsafe=True, wipes=2, slow_disks=True, old_disks=True),
}


@pytest.mark.timeout(max(120, 2 * scaled(SEEDS)))
@pytest.mark.parametrize("setup", SETUPS)
def test_nothing_acknowledged_is_lost(setup: str) -> None:
    bad = []
    for seed in range(FIRST, FIRST + scaled(SEEDS)):
        problem = played(seed, setup).text
        if problem:
            bad.append(problem)
        if len(bad) == 3:
            break
        if seed % 20 == 0:
            gc.collect()
    assert not bad, "\n\n".join(bad)
