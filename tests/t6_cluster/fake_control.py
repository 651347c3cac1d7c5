"""A node's cluster, for tests of what is above it: says what it is told to, and remembers what it was asked."""

from __future__ import annotations

import asyncio
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fake_store import CLUSTER_ID, FakeStore

from pylitefs.cluster.control import ClusterView, CommitsWait, HaltLock, HistoryEntry, MemberView
from pylitefs.cluster.lease_port import now_s
from pylitefs.errors import DatabaseNotFound, Ineligible, PositionMismatch
from pylitefs.formats.ltx.format import CHECKSUM_FLAG, Position

ME, OTHER, THIRD = 0x00112233AABBCCDD, 0xB, 0xC
"""`ME` is the id in `fake_store.node_info`."""


class FakeFence:
    def __init__(self, until_s: float) -> None:
        self.until_s = until_s

    def holds(self) -> bool:
        return now_s() < self.until_s


class FencedStore(FakeStore):
    def __init__(self, data_dir: Path, *, is_primary: bool = True) -> None:
        super().__init__(data_dir, is_primary=is_primary)
        self.fence = FakeFence(math.inf if is_primary else 0.0)


def a_view(store: FakeStore, **changes: Any) -> ClusterView:
    """This node and two others; the node with the primary's role is first."""
    me = MemberView(
        ME, "db1", "http://db1:20202", "primary" if store.is_primary else "replica",
        positions={name: (7, database.position.txid) for name, database in store.databases.items()}, seen_s=0.0,
    )  # fmt: skip
    other = MemberView(
        OTHER, "db2", "http://db2:20202", "replica" if store.is_primary else "primary",
        state="live", candidate=False, priority=3, tags={"zone": "a"}, positions={"app.db": (7, 12)}, lag_ms=1.23456,
        lag_txids=2, in_sync=True, seen_s=0.0,
    )  # fmt: skip
    third = MemberView(THIRD, lag_ms=math.inf, seen_s=12.34567)
    view = ClusterView(
        node_id=ME,
        is_primary=store.is_primary,
        cluster_id=CLUSTER_ID,
        epoch=7,
        primary=me if store.is_primary else other,
        members=(me, other, third),
        sync=1,
        in_sync=(OTHER,),
        commits_wait=CommitsWait(2, 3.14159, "0 of 1 replicas connected"),
        history=(
            HistoryEntry(6, OTHER, "db2", 10, "start", 0),
            HistoryEntry(7, ME, "db1", 255, "failover", 1_700_000_000_120),
        ),
        engine="etcd",
    )
    return replace(view, **changes)


@dataclass
class FakeControl:
    """`fails` is raised by the next calls; `hangs`: they never return."""

    store: FakeStore
    changes: dict[str, Any] = field(default_factory=dict)
    asked: list[tuple[Any, ...]] = field(default_factory=list)
    fails: Exception | None = None
    hangs: bool = False
    cut_off: int = 0
    finish: asyncio.Event = field(default_factory=asyncio.Event)
    refusal: str = ""
    views: int = 0
    announced: Any = None

    async def _called(self, *what: Any) -> None:
        self.asked.append(what)
        if self.hangs:
            try:
                await self.finish.wait()
            except asyncio.CancelledError:
                self.cut_off += 1
                raise
        if self.fails is not None:
            raise self.fails

    def view(self) -> ClusterView:
        self.views += 1
        return a_view(self.store, **self.changes)

    async def refresh(self) -> None:
        pass

    async def promote(self, node_id: int | None, force: bool = False) -> None:
        await self._called("promote", node_id, *(["force"] if force else []))

    async def handoff(self, node_id: int | None) -> None:
        await self._called("handoff", node_id)

    async def pause(self, paused: bool) -> None:
        await self._called("pause", paused)

    async def fresh_position(self, name: str) -> Position:
        await self._called("fresh_position", name)
        return self._position(name)

    async def sync(self, name: str, txid: int | None, timeout_s: float) -> Position:
        await self._called("sync", name, txid, timeout_s)
        return self._position(name)

    def _position(self, name: str) -> Position:
        database = self.store.get(name)
        if database is None:
            raise DatabaseNotFound(name)
        return database.position

    async def confirm_failsafe(self, leader_id: int, epoch: int) -> str:
        await self._called("failsafe", leader_id, epoch)
        return self.refusal

    def positions(self) -> dict[str, Any]:
        if self.announced is not None:
            return self.announced  # type: ignore[no-any-return]
        positions = {name: [7, database.position.txid] for name, database in self.store.databases.items()}
        return {"node-id": f"{ME:016X}", "cluster-id": CLUSTER_ID, "epoch": 7, "positions": positions}

    def nudge(self) -> None:
        self.asked.append(("nudge",))


class FakeHalts:
    """Locks by database. `received` has the bytes of every transaction; `paths` those that came as files."""

    def __init__(self, epoch: int = 7) -> None:
        self.epoch = epoch
        self.locks: dict[str, tuple[int, int]] = {}
        self.received: list[bytes] = []
        self.paths: list[str] = []
        self.slow: asyncio.Event | None = None
        self.begun = 0

    async def acquire(self, name: str, lock_id: int, node_id: int) -> HaltLock:
        if self.locks.setdefault(name, (lock_id, node_id)) != (lock_id, node_id):
            raise Ineligible("somebody else holds it")
        return self._lock(lock_id)

    async def renew(self, name: str, lock_id: int) -> HaltLock:
        if self.locks.get(name, (0, 0))[0] != lock_id:
            raise Ineligible("the HALT lock has ended")
        return self._lock(lock_id)

    def _lock(self, lock_id: int) -> HaltLock:
        return HaltLock(lock_id, Position(5, CHECKSUM_FLAG | 5), self.epoch, 1_700_000_000_120)

    async def release(self, name: str, lock_id: int) -> None:
        if self.locks.get(name, (0, 0))[0] == lock_id:
            del self.locks[name]

    async def transaction(self, name: str, lock_id: int, epoch: int, data: bytes | str) -> Position:
        if self.locks.get(name, (0, 0))[0] != lock_id or epoch != self.epoch:
            raise Ineligible("the HALT lock has ended")
        self.begun += 1
        if self.slow is not None:
            await self.slow.wait()
        if isinstance(data, str):
            self.paths.append(data)
            data = Path(data).read_bytes()
            os.stat(self.paths[-1])
        if not data.startswith(b"LTX1"):
            raise PositionMismatch("does not follow")
        self.received.append(data)
        return Position(6, CHECKSUM_FLAG | 6)
