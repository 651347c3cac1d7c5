"""A real node and its store under leadership, with an engine in memory: what a promotion that is cut short leaves."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path

from pylitefs.cluster.candidate import Settings
from pylitefs.cluster.lease_port import now_s
from pylitefs.cluster.tasks import blocking
from pylitefs.config import parse
from pylitefs.engine.store import Store, StoreOptions
from pylitefs.events import EventBus
from pylitefs.lease.memory import MemoryEngine, MemoryService
from pylitefs.node import Node

TTL_S = 0.6


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_lease_that_is_lost_while_the_worker_promotes(tmp_path: Path) -> None:
    """Its thread goes on to its end, as nothing can stop it; then it is undone. No commit is let through meanwhile."""
    lease = {"type": "object-store", "advertise-url": "http://127.0.0.1:1", "object-store": {"url": "file:///nowhere"}}
    document = {"fuse": {"dir": str(tmp_path / "mnt")}, "data": {"dir": str(tmp_path / "data")}, "lease": lease}
    (tmp_path / "data").mkdir()
    store = Store(str(tmp_path / "data"), EventBus(), StoreOptions(is_primary=False, role_from_marker=True))
    store.load()
    store.start()
    told: list[str] = []
    store.events.subscribe(lambda event: told.append(event.type) if event.type.endswith("moted") else None)
    service = MemoryService(clock=now_s)
    engine = MemoryEngine(service, timeout_s=0.1, clock=now_s)
    node = Node(parse(json.dumps(document)), store, 1)
    busy, begun = threading.Event(), threading.Event()
    try:
        store.worker.submit(lambda: (begun.set(), busy.wait(60)), database="/")
        await until(begun.is_set)
        await node.start_member(engine, "memory", Settings(ttl_s=TTL_S))
        await until(lambda: store.seen_epoch == 1)  # the promotion has begun, and waits for the worker
        engine.cut = True
        await until(lambda: service.view().leader is None)
        await until(lambda: "renewed" in node.leadership.problem if node.leadership else False)
        await asyncio.sleep(TTL_S)  # also the leader's own patience has ended by now, or ends soon
        assert not store.is_primary and not store.fence.holds()
        assert not told
        busy.set()
        await until(lambda: told)
        assert told == ["demoted"]
        assert not store.is_primary and not store.fence.holds()
        await until(lambda: not (tmp_path / "data" / "primary").exists())
        engine.cut = False
        await until(store.fence.holds)
        assert store.is_primary and node.leadership is not None and node.leadership.document.state.epoch == 2
    finally:
        busy.set()
        await node.stop()
        await node.close()
        await asyncio.to_thread(store.close, clean=True)


async def test_what_a_thread_has_begun_is_waited_for_however_often_it_is_cancelled() -> None:
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        may_end.wait(60)
        ended.set()

    task = asyncio.ensure_future(blocking(work))
    await until(begun.is_set)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert not task.done()
    may_end.set()
    await asyncio.wait({task})
    assert task.cancelled() and ended.is_set()
