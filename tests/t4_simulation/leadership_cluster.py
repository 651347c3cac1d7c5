"""Nodes without databases for `cluster.leadership`, on an engine in memory and a loop with virtual time.

A node's log is a list of values. While its fence is open a node acknowledges what it appends; its followers copy.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

from pylitefs.cluster.candidate import Settings
from pylitefs.cluster.election import Positions
from pylitefs.cluster.leadership import Leadership
from pylitefs.cluster.lease_port import ABSENT, Held, Leader, Member, Versioned
from pylitefs.cluster.state import Document
from pylitefs.errors import Unavailable
from pylitefs.lease.memory import MemoryEngine, MemoryService, loop_time_s

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))

from virtual_time import VirtualTimeLoop

TTL_S = 3.0


class FlakyEngine(MemoryEngine):
    """What becomes of the next updates of the state: one that is "refused" does not reach the service, of one that is
    "unheard" the answer is lost."""

    def __init__(self, service: MemoryService) -> None:
        super().__init__(service, timeout_s=0.5)
        self.faults: list[str] = []
        self.is_renewing = False

    async def renew(self, held: Held) -> Held:
        self.is_renewing = True
        try:
            return await super().renew(held)
        finally:
            self.is_renewing = False

    async def update(self, state: bytes, version: str = ABSENT, held: Held | None = None) -> Versioned:
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "refused":
            raise Unavailable("the engine was not reached")
        written = await super().update(state, version, held)
        if fault == "unheard":
            raise Unavailable("the engine's answer was lost")
        return written


class FakeNode:
    """A `leadership.Node`. `promote_s` and `demote_s` are how long that takes; one that `follows` copies its leader."""

    def __init__(self, cluster: Cluster, node_id: int, settings: Settings) -> None:
        self.node_id, self.hostname, self.url = node_id, f"node-{node_id}", f"http://node-{node_id}"
        self.cluster = cluster
        self.log: list[tuple[int, str]] = []  # (epoch, value)
        self.cluster_id = ""
        self.until_s = 0.0
        self.epoch = 0
        self.is_primary = False
        self.leader: Leader | None = None
        self.events: list[str] = []
        self.settings = settings
        self.engine = FlakyEngine(cluster.service)
        self.task: asyncio.Task[None] | None = None
        self.promote_s = 0.01
        self.demote_s = 0.0
        self.is_being_promoted = False
        self.is_fit = True
        self.follows = True

    def start(self) -> None:
        """Also again, after `kill`."""
        self.engine.cut = self.is_primary = False
        self.leader = None
        self.cluster.down.discard(self.node_id)
        self.leadership = Leadership(self.engine, self, self.settings, clock=loop_time_s)
        self.task = asyncio.create_task(self.leadership.run())

    async def kill(self) -> None:
        """As SIGKILL: nothing is told to anybody."""
        assert self.task is not None
        self.engine.cut = True
        self.until_s = 0.0
        self.cluster.down.add(self.node_id)
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    def write(self, value: str) -> bool:
        """Whether it was acknowledged."""
        if not (self.is_primary and loop_time_s() < self.until_s):
            return False
        self.log.append((self.epoch, value))
        self.cluster.acknowledged.append((self.epoch, self.node_id, value))
        return True

    # --- leadership.Node

    @property
    def seen_epoch(self) -> int:
        return self.epoch

    def positions(self) -> Positions:
        return {"a.db": (self.log[-1][0], len(self.log))} if self.log else {}

    async def promote(self, epoch: int, cluster_id: str) -> str:
        """As `node.Node`: a thread that was started goes on to its end, also when this is cancelled."""
        assert not self.is_being_promoted, "twice at the same time"
        self.is_being_promoted = True
        end_s, cancelled = loop_time_s() + self.promote_s, None
        while loop_time_s() < end_s:
            try:
                await asyncio.sleep(end_s - loop_time_s())
            except asyncio.CancelledError as error:
                cancelled = error
        self.is_being_promoted = False
        self.is_primary, self.epoch, self.leader = True, epoch, None
        if cancelled is not None:
            raise cancelled
        self.cluster_id = cluster_id or self.cluster_id or f"C{self.node_id}"
        self.events.append(f"promoted {epoch}")
        return self.cluster_id

    def was_forced(self, epoch: int, txid: int) -> None:
        self.events.append(f"forced {epoch}")

    def lead_until(self, until_s: float) -> None:
        self.until_s = until_s

    async def demote(self, reason: str) -> None:
        await asyncio.sleep(self.demote_s)
        if self.is_primary:
            self.is_primary = False
            self.events.append(f"demoted: {reason}")

    def passed_on(self, successor: int) -> None:
        self.events.append(f"passed on to {successor}")

    async def follow(self, leader: Leader) -> None:
        if leader != self.leader:
            self.leader = leader
            self.events.append(f"follows {leader.node_id}")
        node = self.cluster.nodes[leader.node_id]
        if self.follows and self.cluster.can_talk(self, node) and node.is_primary:
            self.log = list(node.log)
            self.cluster_id = node.cluster_id

    async def ask(self, member: Member, timeout_s: float) -> Positions:
        node = self.cluster.nodes[member.node_id]
        if not self.cluster.can_talk(self, node):
            await asyncio.sleep(timeout_s)
            raise Unavailable("no answer")
        return node.positions()

    async def confirm(self, member: Member, epoch: int, timeout_s: float) -> str:
        node = self.cluster.nodes[member.node_id]
        if not self.cluster.can_talk(self, node):
            await asyncio.sleep(timeout_s)
            raise Unavailable("no answer")
        if node.leader is None or node.leader.node_id != self.node_id:
            return "it does not follow"
        return node.leadership.promise(self.node_id, epoch)

    async def has_promised(self, member: Member, timeout_s: float) -> bool:
        node = self.cluster.nodes[member.node_id]
        if not self.cluster.can_talk(self, node):
            raise Unavailable("no answer")
        return node.leadership.has_promised


class Cluster:
    """Nodes 1 to `count`. `acknowledged` has (epoch, node, value)."""

    def __init__(self, count: int, **settings: Any) -> None:
        self.service = MemoryService()
        self.acknowledged: list[tuple[int, int, str]] = []
        self.cuts: set[frozenset[int]] = set()
        self.down: set[int] = set()
        self.nodes = {
            number: FakeNode(self, number, Settings(ttl_s=TTL_S, **settings)) for number in range(1, count + 1)
        }

    def can_talk(self, one: FakeNode, other: FakeNode) -> bool:
        return other.node_id not in self.down and frozenset((one.node_id, other.node_id)) not in self.cuts

    def start(self, *numbers: int) -> None:
        for number in numbers or self.nodes:
            self.nodes[number].start()

    async def stop(self) -> None:
        for node in self.nodes.values():
            if node.task is not None:
                node.task.cancel()
                await asyncio.gather(node.task, return_exceptions=True)

    @property
    def leader(self) -> FakeNode | None:
        """The node that acknowledges; there must not be two."""
        found = [node for node in self.nodes.values() if node.is_primary and loop_time_s() < node.until_s]
        assert len(found) < 2, found
        return found[0] if found else None

    async def until(self, condition: Callable[[], object], timeout_s: float = 60.0) -> float:
        """How long it took, in seconds."""
        start_s = loop_time_s()
        while not condition():
            assert loop_time_s() - start_s < timeout_s, "it did not come to that"
            await asyncio.sleep(0.005)
            _ = self.leader
        return loop_time_s() - start_s

    @property
    def document(self) -> Document:
        """What all share."""
        return Document.unpack(self.service.view().state.data)

    def replicate(self) -> None:
        """Every node that follows has all its leader has."""
        for node in self.nodes.values():
            if node.leader is not None and not node.is_primary and self.can_talk(node, self.nodes[node.leader.node_id]):
                source = self.nodes[node.leader.node_id]
                if source.is_primary:
                    node.log, node.cluster_id = list(source.log), source.cluster_id


@contextlib.asynccontextmanager
async def cluster_of(count: int, *, write: bool = True, **settings: Any) -> AsyncIterator[tuple[Cluster, FakeNode]]:
    """A cluster that runs, and its first leader, which all follow. With `write` everybody has a row."""
    cluster = Cluster(count, **settings)
    cluster.start()
    try:
        await cluster.until(lambda: cluster.leader)
        first = cluster.leader
        assert first is not None
        await cluster.until(lambda: all(node is first or node.leader for node in cluster.nodes.values()))
        if write:
            assert first.write("x")
            await cluster.until(lambda: cluster.document.state.has_data)
            cluster.replicate()
        yield cluster, first
    finally:
        await cluster.stop()


def virtual(scenario: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that runs on virtual time."""

    @functools.wraps(scenario)
    def test(**arguments: Any) -> None:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            runner.run(scenario(**arguments))

    return test
