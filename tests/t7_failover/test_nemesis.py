"""A random nemesis on random clusters, by seed: the clients' histories hold.

The seed draws the cluster (engine, nodes, synchronous replication, journal modes, passthrough) and the faults.
PYLITEFS_TEST_SEED is the first seed; it repeats a run's cluster and faults, not its timing. PYLITEFS_TEST_SCALE makes
runs longer, and more of them.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from cluster_nodes import SCALE, needs_root, scaled
from harness.cluster import (
    DELETE_DB,
    ENGINE_HOST,
    FULL_DB,
    MIXED_DB,
    NORMAL_DB,
    PERSIST_DB,
    ROLLBACK_DB,
    TRUNCATE_DB,
    HaCluster,
    gaps,
)
from harness.disks import RamDisk, RealDisk
from harness.nodes import Member

FAULTS_S = 20.0 * SCALE
pytestmark = [needs_root, pytest.mark.timeout(round(FAULTS_S + 200))]
New = Callable[..., HaCluster]
RUNS = scaled(2)
FIRST = int(os.environ.get("PYLITEFS_TEST_SEED", time.time_ns() % 1_000_000))
HALTED_FROM = 1  # `sync`: below it, what a holder of a HALT lock commits may be lost with the primary


@dataclass(frozen=True)
class Setup:
    """A cluster, drawn by its seed."""

    engine: str
    nodes: int
    sync: int
    databases: dict[str, tuple[str, str]]
    passthrough: str
    disk: type[RamDisk]
    failsafe: bool
    retention: str

    @staticmethod
    def drawn(seed: int) -> Setup:
        rng = random.Random(f"cluster {seed}")
        nodes = rng.choice((3, 3, 5))
        return Setup(
            rng.choice(("etcd", "etcd", "s3", "kubernetes", "directory")),
            nodes,
            rng.choice((0, 1, 2) if nodes == 5 else (0, 1)),
            rng.choice((FULL_DB, MIXED_DB))
            | rng.choice((NORMAL_DB | DELETE_DB, DELETE_DB, PERSIST_DB, NORMAL_DB | TRUNCATE_DB, *(ROLLBACK_DB,) * 3)),
            rng.choice(("auto", "auto", "off")),
            rng.choice((RamDisk, RealDisk)),
            rng.random() < 0.25,
            rng.choice(("10m", "2s")),
        )


@dataclass(frozen=True)
class Pace:
    """How long a fault lasts, and how long there is none."""

    lasts_s: tuple[float, ...] = (0.3, 1.0, 2.5, 4.0)
    rests_s: tuple[float, ...] = (0.1, 0.5, 2.0)


class Nemesis:
    """One fault after the other, each undone after a while; sometimes two at a time."""

    def __init__(self, cluster: HaCluster, seed: int, faults: tuple[str, ...] = (), pace: Pace | None = None) -> None:
        self.cluster, self.rng = cluster, random.Random(seed)
        self.told: list[str] = []
        self._pace = pace or Pace()
        self._begun_s = time.monotonic()
        self._faults = [self.kill, self.stop, self.isolate, self.halve, self.one_way, self.lose, self.delay, self.fill,
                        self.skew, self.hand_over, self.terminate]  # fmt: skip
        if cluster.service is not None:
            self._faults.append(self.engine)
        if all(isinstance(member.disk, RealDisk) for member in cluster.members):
            self._faults += [self.power, self.power_of_all]
        if faults:
            self._faults = [getattr(self, name) for name in faults]

    def run(self, for_s: float) -> None:
        while time.monotonic() - self._begun_s < for_s:
            with contextlib.ExitStack() as stack:
                for _ in range(self.rng.choice((1, 1, 2))):
                    self._strike(stack)
                time.sleep(self.rng.choice(self._pace.lasts_s))
            time.sleep(self.rng.choice(self._pace.rests_s))

    def _strike(self, stack: contextlib.ExitStack) -> None:
        members = self.cluster.members
        primary = next((one for one in members if one.runs and not one.stopped and one.takes_writes()), None)
        victim = primary if primary is not None and self.rng.random() < 0.6 else self.rng.choice(members)
        fault = self.rng.choice(self._faults)
        if victim.runs and not victim.stopped:
            self.told.append(f"{time.monotonic() - self._begun_s:6.2f} {fault.__name__} {victim.name}")
            fault(victim, stack)

    def kill(self, victim: Member, stack: contextlib.ExitStack) -> None:
        victim.kill()
        stack.callback(victim.start, wait=False)

    def terminate(self, victim: Member, stack: contextlib.ExitStack) -> None:
        begun = victim.role() is not None  # before, the signal may come before there is anything to end
        victim.terminate()
        assert victim.process is not None
        assert victim.process.wait(40) == 0 or not begun
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

    def delay(self, victim: Member, stack: contextlib.ExitStack) -> None:
        assert self.cluster.network is not None
        delay_ms = self.rng.choice((20, 100, 400))
        self.cluster.network.delay([victim.name], delay_ms, delay_ms // 2)
        stack.callback(self._heal_network)

    def skew(self, victim: Member, stack: contextlib.ExitStack) -> None:
        """Its wall clock jumps, and jumps back."""
        victim.skew(self.rng.choice((-4e6, -30.0, 5.0, 3600.0, 4e6)))
        stack.callback(victim.skew, 0)

    def power(self, victim: Member, stack: contextlib.ExitStack) -> None:
        self.cluster.lose_power([victim])
        stack.callback(self.cluster.plug_in, [victim])

    def power_of_all(self, victim: Member, stack: contextlib.ExitStack) -> None:
        members = [member for member in self.cluster.members if member.runs]
        self.cluster.lose_power(members)
        stack.callback(self.cluster.plug_in, members)

    def fill(self, victim: Member, stack: contextlib.ExitStack) -> None:
        victim.fill()
        stack.callback(victim.empty)

    def hand_over(self, victim: Member, stack: contextlib.ExitStack) -> None:
        with contextlib.suppress(OSError):  # it may refuse, or not answer
            victim.post("/promote", timeout_s=2.0)


@dataclass(frozen=True)
class Scene:
    """What was broken once, small enough for each run of the tests: the faults that did it, with readers that hold
    snapshots, readers that open the database at every moment, and applications that stay. So many rounds of silence
    follow."""

    name: str
    seed: int
    faults: tuple[str, ...]
    databases: dict[str, tuple[str, str]]
    sync: int = 0
    retention: str = "10m"
    rounds: int = 5
    pace: Pace = Pace((0.0, 0.1, 1.0), (0.3, 1.0, 2.0))


SCENES = [
    Scene("stops", 7101, ("terminate",), FULL_DB | MIXED_DB, retention="2s"),
    Scene("stops with sync", 7102, ("terminate", "hand_over"), FULL_DB | ROLLBACK_DB, sync=1, retention="2s"),
    Scene("hand-over", 7103, ("hand_over",), MIXED_DB | ROLLBACK_DB | DELETE_DB, sync=1),
    Scene("lost leases", 7104, ("engine", "stop"), FULL_DB | ROLLBACK_DB, sync=1, pace=Pace((2.2, 3.0), (1.5, 3.0))),
    Scene("kills", 7105, ("kill",), MIXED_DB | PERSIST_DB, sync=1, retention="2s", pace=Pace((0.1, 3.0), (1.5, 3.0))),
    Scene("silence", 7106, (), FULL_DB | NORMAL_DB | DELETE_DB, rounds=25),
]
SCENE_S = 10.0 * SCALE


@pytest.mark.parametrize("scene", SCENES, ids=[scene.name for scene in SCENES])
def test_what_was_broken_once(new_cluster: New, scene: Scene) -> None:
    cluster = new_cluster("etcd", sync=scene.sync, databases=scene.databases, limit_s=SCENE_S + 180)
    cluster.start(3, data={"retention": scene.retention, "retention-monitor-interval": "1s"})
    nemesis = Nemesis(cluster, scene.seed, scene.faults, scene.pace)
    try:
        with cluster.workload(pause_ms=20.0, watched=True):
            if scene.faults:
                nemesis.run(SCENE_S)
        seen, _ = cluster.judge()
        took_s = cluster.hush(scaled(scene.rounds), random.Random(scene.seed))
        cluster.judge()
    except BaseException as error:
        error.add_note("\n".join([str(scene), *nemesis.told]))
        raise
    print(f"\n{scene.name}: {len(nemesis.told)} faults, {len(seen.writes)} writes, {len(seen.reads)} reads; "
          f"silence for {max(took_s):.1f} s at most")  # fmt: skip


@pytest.mark.parametrize("number", range(RUNS))
def test_random_faults(new_cluster: New, number: int) -> None:
    setup = Setup.drawn(FIRST + number)
    print(f"\nPYLITEFS_TEST_SEED={FIRST + number}: {setup}")
    cluster = new_cluster(
        setup.engine, network=True, sync=setup.sync, databases=setup.databases, limit_s=FAULTS_S + 180,
        lease={"failsafe": setup.failsafe},
    )  # fmt: skip
    retention = {"retention": setup.retention, "retention-monitor-interval": "1s"}
    cluster.start(setup.nodes, disk=setup.disk, passthrough=setup.passthrough, data=retention)
    nemesis = Nemesis(cluster, FIRST + number)
    try:
        with cluster.workload(pause_ms=20.0, halts=setup.sync >= HALTED_FROM, watched=True):
            nemesis.run(FAULTS_S)
        seen, outcome = cluster.judge()
    except BaseException as error:
        error.add_note("\n".join([f"PYLITEFS_TEST_SEED={FIRST + number}", str(setup), *nemesis.told]))
        raise
    for db in cluster.databases:
        print(f"{db}: {len(seen.acknowledged(db))} commits, {len(outcome.copies[outcome.primary][db].values)} rows, "
              f"gaps {[round(length, 1) for _, length in gaps(seen, db)[:3]]} s")  # fmt: skip
    assert all(seen.acknowledged(db) for db in cluster.databases), "nothing was ever committed"
