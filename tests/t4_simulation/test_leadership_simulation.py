"""Elections, leases and switchovers under a nemesis, in virtual time, by seed: nothing acknowledged is lost.

The nodes' databases are lists; the leadership, the election and the shared state are the real ones. A failure shows
its seed: PYLITEFS_TEST_SEED runs that one first, PYLITEFS_TEST_SCALE=20 runs twenty times as many.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable

import pytest
from leadership_nodes import ENGINE, SimCluster, SimNode
from worlds import World

from cluster_nodes import scaled
from harness.history import check

FIRST = int(os.environ.get("PYLITEFS_TEST_SEED", "1"))
SEEDS = 15
FAULTS_S = 40.0  # of virtual time
SETTLE_S = 60.0


class Nemesis:
    """What goes wrong, until `until_s`."""

    def __init__(self, cluster: SimCluster, until_s: float, *, wipes: bool = False) -> None:
        self.cluster, self.world, self.rng = cluster, cluster.world, cluster.world.rng
        self.until_s = until_s
        self.told: list[str] = []
        self._wipes = wipes
        self._faults: list[Callable[[SimNode], None]] = [
            self.kill, self.kill, self.pause, self.pause, self.isolate, self.isolate, self.cut_one_way,
            self.cut_from_engine, self.cut_engine, self.lose, self.slow, self.hand_over, self.hand_over,
            self.drop_lease,
        ]  # fmt: skip
        self._next()

    def _next(self) -> None:
        """Faults come together, or with time to recover between them."""
        pause_s = self.rng.choice((0.02, 0.2, 0.8, 3.0, 6.0)) * self.rng.uniform(0.5, 1.5)
        self.world.at(self.world.now_s + pause_s, self._strike)

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

    def _later(self, call: Callable[[], None]) -> None:
        """Undo it after a while: shorter than the lease, about as long, or longer."""
        self.world.at(self.world.now_s + self.rng.choice((0.1, 0.7, 2.7, 3.2, 8.0)), call)

    def kill(self, victim: SimNode) -> None:
        if not victim.runs:
            return
        if self._wipes and self.world.now_s > 5:
            self._wipes = False
            self.told[-1] += ", its machine is lost"
            victim.wipe()
        else:
            victim.kill()
        self._later(lambda: victim.runs or victim.start())

    def pause(self, victim: SimNode) -> None:
        process = victim.process
        assert process is not None
        process.paused = True
        self._later(lambda: setattr(process, "paused", False))

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

    def cut_engine(self, _victim: SimNode) -> None:
        names = {node.hostname for node in self.cluster.nodes.values()}
        self._cut({(name, ENGINE) for name in names} | {(ENGINE, name) for name in names})

    def lose(self, _victim: SimNode) -> None:
        self.world.loss = self.rng.choice((0.05, 0.3))
        self._later(lambda: setattr(self.world, "loss", 0.0))

    def slow(self, _victim: SimNode) -> None:
        self.world.latency_s = self.rng.choice((0.05, 0.2))
        self._later(lambda: setattr(self.world, "latency_s", 0.002))

    def hand_over(self, victim: SimNode) -> None:
        leader = self.cluster.leader()
        if leader is not None and leader is not victim and leader.process is not None and not leader.process.paused:
            process = leader.process
            process.loop.call_soon(lambda: process.spawn(leader.hand_over(victim.node_id)))

    def drop_lease(self, _victim: SimNode) -> None:
        """An operator deletes it, of which the holder learns late: it acknowledges on, unless replicas must agree."""
        if self.cluster.sync:
            self.cluster.service.delete_lease()

    def heal(self) -> None:
        self.world.cuts.clear()
        self.world.loss, self.world.latency_s = 0.0, 0.002
        for node in self.cluster.nodes.values():
            if node.runs:
                assert node.process is not None
                node.process.paused = False
            else:
                node.start()


def simulate(seed: int, count: int, **options: object) -> str:
    """One run; what was wrong, "" if nothing was."""
    wipes = bool(options.pop("wipes", False))
    world = World(seed)
    try:
        cluster = SimCluster(world, count, **options)  # type: ignore[arg-type]
        cluster.start()
        nemesis = Nemesis(cluster, FAULTS_S, wipes=wipes)
        try:
            world.run(FAULTS_S + 10.0)
            nemesis.heal()
            world.run(world.now_s + 10.0)
            cluster.writing = False
            end_s = world.now_s + SETTLE_S
            while not cluster.settled() and world.now_s < end_s:
                world.run(world.now_s + 1.0)
            if not cluster.settled():
                problems = [
                    f"UNSETTLED {node.hostname}: {node.leadership.problem} {node.positions()}"
                    for node in cluster.nodes.values()
                ]
            else:
                cluster.history.writes.sort(key=lambda write: write.start_s)
                cluster.history.roles.sort(key=lambda role: role.start_s)
                problems = check(cluster.history, cluster.outcome())
                if not any(write.outcome == "ok" for write in cluster.history.writes):
                    problems.append("IDLE nothing was ever committed")
        except Exception as error:
            problems = [f"RAISED {error!r}"]
            if os.environ.get("PYLITEFS_TEST_RAISE"):
                raise
        return "\n".join([f"seed {seed}:", *problems, *nemesis.told]) if problems else ""
    finally:
        world.close()


SETUPS = {
    "three nodes": {"count": 3},
    "three nodes, failsafe": {"count": 3, "failsafe": True},
    "three nodes, sync": {"count": 3, "sync": 1},
    "three nodes, sync, a machine is lost": {"count": 3, "sync": 1, "wipes": True},
    "five nodes, sync 2, failsafe": {"count": 5, "sync": 2, "failsafe": True},
}


@pytest.mark.parametrize("setup", SETUPS)
def test_nothing_acknowledged_is_lost(setup: str) -> None:
    bad = []
    for seed in range(FIRST, FIRST + scaled(SEEDS)):
        problem = simulate(seed, **SETUPS[setup])  # type: ignore[arg-type]
        if problem:
            bad.append(problem)
        if len(bad) == 3:
            break
        if seed % 20 == 0:
            gc.collect()
    assert not bad, "\n\n".join(bad)
