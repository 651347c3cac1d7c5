"""A cluster of `leadership_nodes`, clients on each of them, and what they see; and one who sees everything.

The observer knows what no client can, and says so at once:

    UNFENCED    a commit was found to be covered by the lease after another node had acquired it
    SYNC        a node that is elected, or stands in the in-sync set in the engine, lacks an acknowledged commit
    FEW         a commit was acknowledged that fewer replicas hold than `sync` says
    EMPTY       a node without data was elected, unless an operator forced it, where there is some
    WITNESS     a node was elected that is no candidate
    STALE-READ  a read after `litefs sync` lacks a commit that was acknowledged before
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass

from leadership_nodes import FULL, MACHINES, NORMAL, TTL_S, Entry, SimNode
from sim_engine import SimService
from worlds import World

from harness.history import Copy, History, Outcome, Read, Role, Write
from pylitefs.cluster.control import FORCED
from pylitefs.cluster.state import Document

WRITE_S = 0.12
LAST_S = 0.002
READ_S = 1.0
FRESH_S = 0.7


@dataclass(frozen=True)
class Setup:
    """`drift`: how wrong clocks go. `doubles`, `stalls`: how many requests to the engine are there twice, and how many
    messages take seconds. `gaps`: the daemon may be stopped between its last look at the clock and its answer.
    `witnesses`: nodes that are no candidates. `joins`: an empty node comes later. `wipes`: how many machines are lost.
    `old_disks`: a node that the cluster does not count on comes back with what it had a while ago."""

    count: int = 3
    sync: int = 0
    mode: str = "wait"
    timeout_s: float = 0.0
    failsafe: bool = False
    maximum_lag: int | None = None
    witnesses: tuple[int, ...] = ()
    drift: float = 0.02
    doubles: float = 0.0
    stalls: float = 0.0
    slow_disks: bool = False
    gaps: bool = False
    joins: bool = False
    wipes: int = 0
    old_disks: bool = False


class SimCluster:
    def __init__(self, world: World, setup: Setup) -> None:
        self.world, self.setup = world, setup
        world.stalls = setup.stalls
        self.service = SimService(world, self._written)
        self.history = History()
        self.observed: list[str] = []
        self.clients = world.process("clients")
        self.nodes = {number: SimNode(self, number) for number in range(1, setup.count + 1)}
        self.writing = True
        self.calm = False  # nothing is slow or stopped any more
        self._fresh: list[tuple[str, float, frozenset[str]]] = []
        self._acknowledged: dict[str, int] = {}  # in which epoch
        self._newest: tuple[int, Entry] | None = None  # of FULL, acknowledged: its number, and what it is
        self._known = ("", Document())
        self._terms = 0
        self._count = 0
        self.kills = self.cuts = 0  # of nodes; of these with the power, or the disk

    def start(self) -> None:
        for node in self.nodes.values():
            self._start(node)
        if self.setup.joins:
            self.world.at(self.world.rng.uniform(3.0, 25.0), self._join)
        self.clients.spawn(self._read_fresh())

    def _start(self, node: SimNode) -> None:
        node.start()
        for name in (FULL, NORMAL):
            self.clients.spawn(self._write(node, name))
        self.clients.spawn(self._read(node))

    def _join(self) -> None:
        node = self.nodes[len(self.nodes) + 1] = SimNode(self, len(self.nodes) + 1)
        self._start(node)

    def at(self, node_id: int) -> SimNode:
        """What runs on that node's machine, or the one that has taken its place."""
        return self.nodes[node_id % MACHINES]

    def node(self, node_id: int) -> SimNode | None:
        found = self.at(node_id)
        return found if found.node_id == node_id else None

    def fsync_s(self) -> float:
        if self.setup.slow_disks and not self.calm and self.world.rng.random() < 0.05:
            return self.world.rng.choice((0.3, 2.5))
        return self.world.rng.uniform(0.0005, 0.01)

    @property
    def document(self) -> Document:
        """What all share, as it stands in the engine."""
        state = self.service.view().state
        if self._known[0] != state.version:
            self._known = state.version, Document.unpack(state.data)
        return self._known[1]

    # -- clients

    async def _write(self, node: SimNode, name: str) -> None:
        while True:
            await asyncio.sleep(self._pause_s(node))
            if self.writing and node.captures and not node.writes_paused and not node.disk_full:
                await self._commit(node, name)

    def _pause_s(self, node: SimNode) -> float:
        """Till the next commit: a while, or until the lease is about to end."""
        pause_s = WRITE_S * self.world.rng.uniform(0.3, 1.7)
        left_s = (node.until_s - node.clock()) / node.rate - LAST_S if node.captures else 0.0
        return left_s if 0.0 < left_s < pause_s else pause_s

    async def _commit(self, node: SimNode, name: str) -> None:
        self._count += 1
        value, start_s = f"{node.hostname}.{name}.{self._count}.", self.world.now_s
        number, epoch = node.append(name, value), node.epoch
        at = len(self.history.writes)
        self.history.writes.append(Write(value, node.hostname, name, start_s, None, "unknown"))
        if name == FULL:
            certain_s = await self._answer(node, number)
            if certain_s is None:
                return
            self._observe(node, (epoch, value), number, certain_s)
            for at_s in (start_s, self.world.now_s):  # it is certain in which epoch
                self.history.roles.append(Role(node.hostname, at_s, at_s, True, epoch))
        elif number == 1 or self.world.rng.random() < 0.1:
            node.disk.durable[NORMAL] = number  # the database is made, or a checkpoint
        self.history.writes[at] = Write(value, node.hostname, name, start_s, self.world.now_s, "ok")

    async def _answer(self, node: SimNode, number: int) -> float | None:
        """A process that waits for its fsync: until the daemon answers, or is killed."""
        process = node.process
        assert process is not None
        answer: asyncio.Future[float | None] = self.clients.loop.create_future()

        async def hook() -> None:
            found = await node.commit(number)
            if not answer.done():
                answer.set_result(found)

        process.loop.call_soon(lambda: process.spawn(hook()))
        while not answer.done():
            if not process.alive:
                return None
            await asyncio.wait({answer}, timeout=0.1)
        return answer.result()

    async def _read(self, node: SimNode) -> None:
        while True:
            await asyncio.sleep(READ_S * self.world.rng.uniform(0.3, 1.7))
            for name in node.logs:
                self.saw(node, name)

    def saw(self, node: SimNode, name: str) -> None:
        """A reader on that node sees all there is."""
        now_s = self.world.now_s
        reader = f"{node.hostname}.{node.disks}.{name}"
        self.history.reads.append(Read(reader, node.hostname, name, now_s, now_s, node.shown(name)))

    async def _read_fresh(self) -> None:
        while True:
            await asyncio.sleep(FRESH_S * self.world.rng.uniform(0.3, 1.7))
            node = self.world.rng.choice(list(self.nodes.values()))
            if node.acts:
                self.clients.spawn(self._sync(node))

    def _certain(self) -> set[str]:
        """What was acknowledged and is not lost, as what an earlier primary had may be if commits wait for nobody."""
        terms = self.service.terms
        newest = terms[-1][1].epoch if terms else 0
        return {value for value, epoch in self._acknowledged.items() if self.setup.sync or epoch == newest}

    async def _sync(self, node: SimNode) -> None:
        before, process, start_s = self._certain(), node.process, self.world.now_s
        assert process is not None
        answer: asyncio.Future[tuple[str, ...] | None] = self.clients.loop.create_future()

        async def ask() -> None:
            answer.set_result(await node.fresh(FULL))

        process.loop.call_soon(lambda: process.spawn(ask()))
        await asyncio.wait({answer}, timeout=10.0)
        if any(at_s > start_s - TTL_S for at_s in self.service.deleted.values()):
            return  # the holder of a lease that was deleted does not know
        before &= self._certain()  # another may lead now
        if answer.done() and (seen := answer.result()) is not None and (lacking := before.difference(seen)):
            self._fresh.append((node.hostname, self.world.now_s, frozenset(lacking)))

    # -- the observer

    def _observe(self, node: SimNode, entry: Entry, number: int, certain_s: float) -> None:
        epoch, value = entry
        self._acknowledged[value] = epoch
        if epoch not in self.service.deleted:
            later = [
                (at_s, leader)
                for at_s, leader in self.service.terms
                if at_s < certain_s and leader.epoch > epoch and leader.node_id != node.node_id
            ]
            if later:
                self.observed.append(
                    f"UNFENCED {value} was acknowledged in epoch {epoch} at {certain_s:.3f} s: {later[0][1].hostname} "
                    f"had acquired epoch {later[0][1].epoch} at {later[0][0]:.3f} s"
                )
        if self._newest is None or number > self._newest[0]:
            self._newest = number, entry
        if certain_s == self.world.now_s:
            self._look_at_set()
            self._look_at_replicas(node)

    def _look_at_replicas(self, primary: SimNode) -> None:
        setup = self.setup
        if setup.mode != "wait" or setup.wipes or setup.old_disks or self._newest is None:
            return  # with those, what had held it may be gone by now
        holders = [node.number for node in self.nodes.values() if node is not primary and self._has_newest(node)]
        if len(holders) < setup.sync:
            self.observed.append(f"FEW nodes hold {self._newest[1][1]} at {self.world.now_s:.3f} s: {holders}")

    def _has_newest(self, node: SimNode) -> bool:
        assert self._newest is not None
        number, entry = self._newest
        return node.disk.durable[FULL] >= number and node.logs[FULL][number - 1] == entry

    def _written(self) -> None:
        """The state in the engine has changed."""
        leader = self.service.view().leader
        if leader is not None and not self.at(leader.node_id).candidate:
            self.observed.append(f"WITNESS {leader.hostname} has the lease, in epoch {leader.epoch}")
        node = self.node(leader.node_id) if leader is not None else None
        document, is_new = self.document, len(self.service.terms) > self._terms
        forced = bool(document.history) and document.history[-1].reason == FORCED
        if is_new and node is not None and document.state.has_data and not forced and not node.positions():
            self.observed.append(f"EMPTY {node.hostname} leads in epoch {document.state.epoch}")
        self._terms = len(self.service.terms)
        self._look_at_set()

    def _look_at_set(self) -> None:
        state = self.document.state
        if not self.setup.sync or self._newest is None:
            return
        epoch, value = self._newest[1]
        in_sync = state.in_sync or frozenset()
        for node_id in {*in_sync, state.last_leader}:
            node = self.node(node_id)
            if node is None or epoch > state.epoch:
                continue
            if not self._has_newest(node):
                said = "in sync" if node_id in in_sync else "elected"
                self.observed.append(f"SYNC {node.hostname} is {said} at {self.world.now_s:.3f} s, and lacks {value}")

    def stale_reads(self, final: frozenset[str]) -> list[str]:
        return [
            f"STALE-READ on {node} at {at_s:.3f} s, after a sync: {min(lacking & final)} was acknowledged before"
            for node, at_s, lacking in self._fresh
            if lacking & final
        ]

    # -- the end

    def write_last(self) -> list[int]:
        """A last commit in each database, nothing is written afterwards; where in the history they are."""
        leader = self.leader()
        assert leader is not None
        first = len(self.history.writes)
        for name in (FULL, NORMAL):
            self.clients.spawn(self._commit(leader, name))
        return [first, first + 1]

    def leader(self) -> SimNode | None:
        found = [node for node in self.nodes.values() if node.runs and node.holds()]
        return found[0] if len(found) == 1 else None

    def may_lose_disk(self, node: SimNode) -> bool:
        """Whether the cluster does not count on what that node has acknowledged."""
        state = self.document.state
        counted = {state.last_leader, state.handoff_to, *(state.in_sync or ())}
        gates = [other.gate for other in self.nodes.values() if other.runs and other.gate is not None]
        return node.node_id not in counted and not any(node.node_id in gate._replicas for gate in gates)

    def changes(self) -> int:
        """How often another node than before has acquired the lease."""
        nodes = [leader.node_id for _, leader in self.service.terms]
        return sum(one != other for one, other in itertools.pairwise(nodes))

    def settled(self) -> bool:
        leader = self.leader()
        return leader is not None and all(node.logs == leader.logs for node in self.nodes.values())

    def has_lost_all(self) -> bool:
        """Nobody has any data: the only machine that had some is lost, and no commit was acknowledged that others had
        to hold. That needs an operator, who begins anew."""
        acknowledged = any(write.outcome == "ok" and write.db == FULL for write in self.history.writes)
        return not acknowledged and not any(node.positions() for node in self.nodes.values())

    def outcome(self) -> Outcome:
        leader = self.leader()
        assert leader is not None
        copies = {}
        for node in self.nodes.values():
            copies[node.hostname] = {
                name: Copy(str(len(log)), str(hash(tuple(log))), "ok", tuple(value for _, value in log))
                for name, log in node.logs.items()
            }
        lost = {name: frozenset().union(*(node.kept[name] for node in self.nodes.values())) for name in (FULL, NORMAL)}
        return Outcome(leader.hostname, copies, lost, frozenset({FULL} if self.setup.sync else ()), frozenset({FULL}))
