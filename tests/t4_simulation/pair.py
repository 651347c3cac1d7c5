"""A primary and a replica in one process, joined by a link in memory."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from fake_engine import FakeDatabase, FakeStore, page
from memory_link import Wire

from harness.liveness import silence
from pylitefs.cluster.backoff import Backoff
from pylitefs.cluster.channel import Timings
from pylitefs.cluster.ports import Link, LinkClosed
from pylitefs.cluster.primary import RecoveryWait, Replicas
from pylitefs.cluster.replica import Replica
from pylitefs.cluster.roles import NodeIdentity

FAST = Timings(heartbeat_s=0.02, deadline_s=1.0, handshake_s=1.0, close_s=0.2, durable_s=0.02, ack_s=0.001)


class Pair:
    """`wires` has every connection that was made; `next_wire` makes the next one."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self.primary = FakeStore(folder / "primary", is_primary=True)
        self.replica = FakeStore(folder / "replica", is_primary=False)
        self.wires: list[Wire] = []
        self.next_wire: Callable[[], Wire] = lambda: Wire(self.rng)
        self.unreachable = False
        self.replicas: Replicas
        self.follower: Replica

    def write(self, name: str, count: int = 1, pages: int = 2, size: int = 8, noise: bool = False) -> FakeDatabase:
        """`count` transactions that touch `pages` random pages of at most `size`."""
        database = self.primary.get_or_create(name)
        for _ in range(count):
            top = database.commit + 1
            numbers = {min(self.rng.randint(1, size), top + i) for i in range(pages)} | ({1} if top == 1 else set())
            numbers = {n for n in numbers if n <= database.commit} | set(range(top, max(numbers) + 1))
            database.write({n: page(self.rng, noise=noise) for n in sorted(numbers)})
        return database

    async def connect(self) -> Link:
        if self.unreachable:
            raise LinkClosed("connection refused")
        wire = self.next_wire()
        self.wires.append(wire)
        serving = asyncio.ensure_future(self.replicas.serve(wire.ends[1]))
        self._serving.add(serving)
        serving.add_done_callback(self._serving.discard)
        return wire.ends[0]

    @contextlib.asynccontextmanager
    async def running(
        self,
        *,
        databases: Sequence[str] = (),
        recovery: RecoveryWait | None = None,
        timings: Timings = FAST,
        node_ids: tuple[int, int] = (1, 2),
        epoch: int = 1,
    ) -> AsyncIterator[Pair]:
        self.primary.epoch = epoch
        self.newer_epochs: list[int] = []
        self._serving: set[asyncio.Future[None]] = set()
        node = NodeIdentity(node_ids[0], "db1")
        async with Replicas(
            self.primary, node, recovery=recovery, timings=timings, epoch=epoch,
            on_newer_epoch=self.newer_epochs.append,
        ) as self.replicas:  # fmt: skip
            self.follower = Replica(
                self.replica,
                NodeIdentity(node_ids[1], "db2"),
                self.connect,
                databases=databases,
                timings=timings,
                backoff=Backoff(0.01, 0.05, self.rng),
            )
            self.following = asyncio.ensure_future(self.follower.run())
            try:
                yield self
            finally:
                self.following.cancel()
                await asyncio.gather(self.following, return_exceptions=True)

    async def until(self, condition: Callable[[], object], timeout_s: float = 20.0) -> None:
        """Wait until something is true."""
        try:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    await asyncio.sleep(0.002)
        except TimeoutError:
            state = self.follower.state
            infos = self.replicas.infos()
            stand = {n: [str(store.contents().get(n, ("-",))[0]) for store in (self.primary, self.replica)]
                     for n in sorted({*self.primary.contents(), *self.replica.contents()})}  # fmt: skip
            raise AssertionError(
                f"did not happen in time; primary and replica are at {stand}; replica: {state}; primary: {infos}"
            ) from None

    def equal(self) -> bool:
        return self.primary.contents() == self.replica.contents()

    async def until_equal(self, timeout_s: float = 20.0) -> None:
        await self.until(self.equal, timeout_s)

    async def hush(self, rounds: int = 5) -> None:
        """So many times a commit or a few, and silence until the replica has them."""
        for _ in range(rounds):
            await asyncio.sleep(self.rng.choice((0.0, 0.001, 0.03)))
            name = self.rng.choice(sorted(self.primary.databases))
            await asyncio.to_thread(self.write, name, self.rng.choice((1, 1, 3)))
            await silence(lambda: {"primary": self.primary.contents(), "replica": self.replica.contents()})

    def close(self) -> None:
        self.primary.close()
        self.replica.close()
