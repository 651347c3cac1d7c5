"""A real node that takes office, or leaves it: who connects meanwhile, and who does not answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from fake_engine import FakeStore
from memory_link import Wire
from pair import FAST

from pylitefs.cluster.backoff import Backoff
from pylitefs.cluster.candidate import Settings
from pylitefs.cluster.lease_port import Member, now_s
from pylitefs.cluster.ports import Link
from pylitefs.cluster.replica import Replica
from pylitefs.cluster.roles import NodeIdentity
from pylitefs.config import parse
from pylitefs.engine.store import Store, StoreOptions
from pylitefs.events import EventBus
from pylitefs.lease.memory import MemoryEngine, MemoryService
from pylitefs.node import Node
from pylitefs.node_control import NodeControl


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def member(folder: Path) -> AsyncIterator[tuple[Node, MemoryEngine]]:
    lease = {"type": "object-store", "advertise-url": "http://127.0.0.1:1", "object-store": {"url": "file:///nowhere"}}
    document = {"fuse": {"dir": str(folder / "mnt")}, "data": {"dir": str(folder / "data")}, "lease": lease}
    (folder / "data").mkdir()
    store = Store(str(folder / "data"), EventBus(), StoreOptions(is_primary=False, role_from_marker=True))
    store.load()
    store.start()
    node = Node(parse(json.dumps(document)), store, 1)
    try:
        yield node, MemoryEngine(MemoryService(clock=now_s), timeout_s=1.0, clock=now_s)
    finally:
        await node.stop()
        await node.close()
        await asyncio.to_thread(store.close, clean=True)


class Follower:
    """A replica that follows the node over links in memory."""

    def __init__(self, folder: Path, node: Node) -> None:
        self.store = FakeStore(folder / "follower", is_primary=False)
        self.wires: list[Wire] = []
        self._node = node
        self._serving: list[asyncio.Future[None]] = []
        identity = NodeIdentity(7, "n7")
        self.replica = Replica(
            self.store, identity, self._connect, timings=FAST, backoff=Backoff(0.02, 0.05), hostname="n1"
        )
        self._task = asyncio.ensure_future(self.replica.run())

    async def _connect(self) -> Link:
        wire = Wire(random.Random(1))
        self.wires.append(wire)
        self._serving.append(asyncio.ensure_future(self._node.serve(wire.ends[1])))
        return wire.ends[0]

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, *self._serving, return_exceptions=True)
        self.store.close()


async def test_who_connects_while_a_node_takes_office_is_served_as_soon_as_it_has(tmp_path: Path) -> None:
    """Refused, it would come again after `lease.reconnect-delay`, and FULL commits wait for it."""
    async with member(tmp_path) as (node, engine):
        busy, begun = threading.Event(), threading.Event()
        node.store.worker.submit(lambda: (begun.set(), busy.wait(60)), database="/")
        await until(begun.is_set)
        await node.start_member(engine, "memory", Settings(ttl_s=30.0))
        await until(lambda: node.leadership is not None and node.leadership.enters)
        follower = Follower(tmp_path, node)
        try:
            await asyncio.sleep(0.3)
            assert not follower.replica.state.connected
            busy.set()
            await until(follower.replica.ready.is_set)
            assert len(follower.wires) == 1
        finally:
            busy.set()
            await follower.close()


async def test_a_replica_that_hangs_does_not_hold_up_a_node_that_has_passed_the_lease_on(tmp_path: Path) -> None:
    async with member(tmp_path) as (node, engine):
        await node.start_member(engine, "memory", Settings(ttl_s=30.0))
        await until(lambda: node.leadership is not None and node.leadership.leads)
        follower = Follower(tmp_path, node)
        try:
            await until(follower.replica.ready.is_set)
            assert node.infos()

            async def hangs(data: bytes) -> None:
                await asyncio.sleep(3600)

            follower.wires[-1].ends[1].send = hangs  # type: ignore[method-assign]
            assert node.leadership is not None
            began_s = time.monotonic()
            await node.leadership.leave("handed over", 7)
            assert time.monotonic() - began_s < 0.9, "closing a connection takes a second"
            assert not node.store.is_primary
        finally:
            await follower.close()


async def test_a_primary_that_is_stopped_waits_for_a_replica_that_is_on_its_way(tmp_path: Path) -> None:
    """Right after a promotion nobody may follow it yet, and what is committed then would be on no other node."""
    async with member(tmp_path) as (node, engine):
        await node.start_member(engine, "memory", Settings(ttl_s=30.0))
        await until(lambda: node.leadership is not None and node.leadership.leads)
        assert node.leadership is not None and node.store.is_primary
        await engine.announce(Member(7, "n7", "http://127.0.0.1:7"), 30.0)
        await until(lambda: node.leadership is not None and len(node.leadership.view.members) == 2)

        async def answers(other: Member, timeout_s: float) -> dict[str, object]:
            return {}

        node.ask = answers  # type: ignore[method-assign]
        leaving = asyncio.ensure_future(NodeControl(node).leave())
        await asyncio.sleep(0.8)
        assert not leaving.done(), "it did not wait"
        assert not node.infos()
        follower = Follower(tmp_path, node)
        try:
            await asyncio.wait_for(leaving, 10.0)
            assert node.leadership.document.state.handoff_to == 7
            assert not node.store.is_primary
        finally:
            await follower.close()


async def test_a_primary_whose_other_nodes_are_gone_stops_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with member(tmp_path) as (node, engine):
        await node.start_member(engine, "memory", Settings(ttl_s=30.0))
        await until(lambda: node.leadership is not None and node.leadership.leads)
        assert node.leadership is not None
        await engine.announce(Member(7, "n7", "http://127.0.0.1:1"), 30.0)
        await until(lambda: node.leadership is not None and len(node.leadership.view.members) == 2)
        began_s = time.monotonic()
        await NodeControl(node).leave()
        assert time.monotonic() - began_s < 1.0
        assert "no other node is known to have" in caplog.text
