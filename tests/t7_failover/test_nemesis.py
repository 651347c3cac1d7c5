"""Five nodes under a random nemesis, by seed, with synchronous replication: the clients' histories hold.

PYLITEFS_TEST_SEED repeats a run's faults (not its timing), PYLITEFS_TEST_SCALE makes it longer.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable

import pytest

from cluster_nodes import SCALE, needs_root
from harness.cluster import ALL_DBS, ENGINE_HOST, HaCluster, gaps
from harness.nodes import Member

FAULTS_S = 25.0 * SCALE
pytestmark = [needs_root, pytest.mark.timeout(round(FAULTS_S + 200))]
New = Callable[..., HaCluster]
DISK = 64 << 20


class Nemesis:
    """One fault after the other, each undone after a while; sometimes two at a time."""

    def __init__(self, cluster: HaCluster, seed: int) -> None:
        self.cluster, self.rng = cluster, random.Random(seed)
        self.told: list[str] = []
        self._begun_s = time.monotonic()

    def run(self, for_s: float) -> None:
        while time.monotonic() - self._begun_s < for_s:
            with contextlib.ExitStack() as stack:
                for _ in range(self.rng.choice((1, 1, 2))):
                    self._strike(stack)
                time.sleep(self.rng.choice((0.3, 1.0, 2.5, 4.0)))
            time.sleep(self.rng.choice((0.1, 0.5, 2.0)))

    def _strike(self, stack: contextlib.ExitStack) -> None:
        members = self.cluster.members
        primary = next((one for one in members if one.runs and not one.stopped and one.takes_writes()), None)
        victim = primary if primary is not None and self.rng.random() < 0.6 else self.rng.choice(members)
        faults = [self.kill, self.stop, self.isolate, self.halve, self.one_way, self.engine, self.lose, self.fill,
                  self.hand_over, self.terminate]  # fmt: skip
        fault = self.rng.choice(faults)
        if victim.runs and not victim.stopped:
            self.told.append(f"{time.monotonic() - self._begun_s:6.2f} {fault.__name__} {victim.name}")
            fault(victim, stack)

    def kill(self, victim: Member, stack: contextlib.ExitStack) -> None:
        victim.kill()
        stack.callback(victim.start, wait=False)

    def terminate(self, victim: Member, stack: contextlib.ExitStack) -> None:
        victim.terminate()
        assert victim.process is not None
        victim.process.wait(40)
        stack.callback(victim.start, wait=False)

    def stop(self, victim: Member, stack: contextlib.ExitStack) -> None:
        victim.pause()
        stack.callback(victim.resume)

    def _heal_network(self) -> None:
        assert self.cluster.network is not None
        self.cluster.network.heal()

    def isolate(self, victim: Member, stack: contextlib.ExitStack) -> None:
        assert self.cluster.network is not None
        self.cluster.network.isolate(victim.name)
        stack.callback(self._heal_network)

    def halve(self, victim: Member, stack: contextlib.ExitStack) -> None:
        """Two nodes on one side, three on the other; the engine on either."""
        assert self.cluster.network is not None
        names = [member.name for member in self.cluster.members]
        self.rng.shuffle(names)
        sides = [names[:2], names[2:]]
        self.rng.choice(sides).append(ENGINE_HOST)
        self.cluster.network.cut(*sides)
        stack.callback(self._heal_network)

    def one_way(self, victim: Member, stack: contextlib.ExitStack) -> None:
        assert self.cluster.network is not None
        other = self.rng.choice([name for name in self.cluster.network.places if name != victim.name])
        ends = [victim.name, other]
        self.rng.shuffle(ends)
        self.cluster.network.cut_one_way(*ends)
        stack.callback(self._heal_network)

    def engine(self, victim: Member, stack: contextlib.ExitStack) -> None:
        """It hangs."""
        assert self.cluster.service is not None
        self.cluster.service.pause()
        stack.callback(self.cluster.service.resume)

    def lose(self, victim: Member, stack: contextlib.ExitStack) -> None:
        assert self.cluster.network is not None
        self.cluster.network.lose([victim.name], self.rng.choice((10, 40)))
        stack.callback(self._heal_network)

    def fill(self, victim: Member, stack: contextlib.ExitStack) -> None:
        victim.fill()
        stack.callback(victim.empty)

    def hand_over(self, victim: Member, stack: contextlib.ExitStack) -> None:
        with contextlib.suppress(OSError):  # it may refuse, or not answer
            victim.post("/promote", timeout_s=2.0)


@pytest.mark.parametrize("sync", [0, 1])
def test_random_faults(new_cluster: New, sync: int) -> None:
    seed = int(os.environ.get("PYLITEFS_TEST_SEED", time.time_ns() % 1_000_000))
    cluster = new_cluster(network=True, sync=sync, databases=ALL_DBS, limit_s=FAULTS_S + 180)
    cluster.start(5, disk_bytes=DISK)
    nemesis = Nemesis(cluster, seed)
    print(f"\nseed {seed}")
    try:
        with cluster.workload(pause_ms=20.0):
            nemesis.run(FAULTS_S)
        seen, outcome = cluster.judge()
    except BaseException as error:
        error.add_note("\n".join([f"PYLITEFS_TEST_SEED={seed}", *nemesis.told]))
        raise
    for db in cluster.databases:
        print(f"{db}: {len(seen.acknowledged(db))} commits, {len(outcome.copies[outcome.primary][db].values)} rows, "
              f"gaps {[round(length, 1) for _, length in gaps(seen, db)[:3]]} s")  # fmt: skip
    assert all(seen.acknowledged(db) for db in cluster.databases), "nothing was ever committed"
