"""The real engine over a link with faults, by seed: random SQL, crashes of the replica, identical files in the end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sqlite3
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from memory_link import Wire
from pair import FAST
from real_nodes import Application, open_store

from harness.liveness import silence
from pylitefs.cluster.backoff import Backoff
from pylitefs.cluster.ports import Link
from pylitefs.cluster.primary import RecoveryWait, Replicas
from pylitefs.cluster.replica import Replica
from pylitefs.cluster.roles import NodeIdentity
from pylitefs.engine.store import Store
from pylitefs.events import Event
from pylitefs.ports import FileKind, FileRef


def positions(store: Store) -> dict[str, object]:
    return {name: store.find(name).position for name in store.names()}


class Nodes:
    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.rng = random.Random(seed)
        self.primary = open_store(folder / "primary", is_primary=True)
        self.replica = open_store(folder / "replica", is_primary=False)
        self.apps: dict[str, Application] = {}
        self.bad = True
        self.wires: list[Wire] = []

    @contextlib.asynccontextmanager
    async def running(self, recovery: RecoveryWait | None = None, epoch: int = 1) -> AsyncIterator[None]:
        serving = []

        async def connect() -> Link:
            lifetime = int(2 ** self.rng.uniform(7, 20)) if self.bad else None
            wire = Wire(self.rng, lifetime, self.rng.choice([0, 0.001]) if self.bad else 0)
            self.wires.append(wire)
            serving.append(asyncio.ensure_future(self.replicas.serve(wire.ends[1])))
            return wire.ends[0]

        identity = NodeIdentity(1, "db1")
        async with Replicas(self.primary, identity, recovery=recovery, timings=FAST, epoch=epoch) as self.replicas:
            self.follower = Replica(
                self.replica, NodeIdentity(2, "db2"), connect, timings=FAST, backoff=Backoff(0.01, 0.05, self.rng)
            )
            task = asyncio.ensure_future(self.follower.run())
            try:
                yield
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        await asyncio.gather(*serving, return_exceptions=True)

    def work(self) -> None:
        """One random transaction of the application."""
        rng = self.rng
        name = rng.choice(["a.db", "b.db"])
        if name not in self.apps:
            self.apps[name] = Application(self.primary, name)
        app = self.apps[name]
        match rng.randrange(10):
            case 0:
                app.run("DELETE FROM t WHERE id % 3 = 0")
            case 1:
                app.run("VACUUM")
            case 2:
                app.insert(700_000)
            case 3:
                app.database.log.retain(0, 1)
            case 4:
                app.run("UPDATE t SET v = randomblob(200) WHERE id % 2 = 0")
            case _:
                app.insert(rng.randrange(1, 9000))

    def crash_replica(self) -> None:
        """It stops without a word; what it had in memory is gone, its files are as they are."""
        self.replica.close(clean=False)
        self.replica = open_store(self.folder / "replica", is_primary=False)

    async def until(self, condition: Callable[[], object]) -> None:
        try:
            async with asyncio.timeout(30):
                while not condition():
                    await asyncio.sleep(0.005)
        except TimeoutError:
            state = self.follower.state
            raise AssertionError(f"did not happen; replica: {state}; primary: {self.replicas.infos()}") from None

    async def until_equal(self) -> None:
        await self.until(lambda: positions(self.primary) == positions(self.replica))
        for name in self.primary.names():
            copies = []
            for store in (self.primary, self.replica):
                path = self.folder / "copy"
                await asyncio.to_thread(store.find(name).copy_to, str(path))
                copies.append(path.read_bytes())
                with contextlib.closing(sqlite3.connect(path)) as db:
                    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert copies[0] == copies[1], name

    async def hush(self, rounds: int = 5) -> None:
        """So many times a commit, and silence until the replica has it."""
        for _ in range(rounds):
            await asyncio.sleep(self.rng.choice((0.0, 0.001, 0.03)))
            await asyncio.to_thread(self.work)
            await silence(lambda: {"primary": positions(self.primary), "replica": positions(self.replica)})

    def close(self) -> None:
        self.primary.close(clean=True)
        self.replica.close(clean=True)


@pytest.mark.parametrize("seed", range(6))
async def test_files_are_identical_in_the_end(tmp_path: Path, seed: int) -> None:
    nodes = Nodes(tmp_path, seed)
    try:
        for _ in range(3):
            async with nodes.running():
                for _ in range(15):
                    await asyncio.to_thread(nodes.work)
                    await asyncio.sleep(nodes.rng.choice([0, 0.01]))
            if nodes.rng.random() < 0.6:
                nodes.crash_replica()
        nodes.bad = False
        async with nodes.running():
            await nodes.until_equal()
            await asyncio.to_thread(nodes.work)
            await nodes.until_equal()
            await nodes.hush()
    finally:
        nodes.close()


RENAMED = {"on": ["c.db"], "back": ["a.db"], "exchanged": ["a.db", "x.db"]}


def _move(nodes: Nodes, old: str, new: str) -> None:
    source = FileRef(old, FileKind.DATABASE, old, nodes.primary.find(old).files.database)
    target = FileRef(new, FileKind.PLAIN, None, nodes.primary.plain_path(new))
    nodes.primary.worker.submit(nodes.primary.naming.rename, source, target).result()


@pytest.mark.parametrize("how", ["once", "on", "back", "behind", "exchanged"])
async def test_a_replica_has_what_was_renamed_by_one_name_at_every_moment(tmp_path: Path, how: str) -> None:
    """The drop of the old name is small, and the new one's content is not: it must not be overtaken."""
    nodes = Nodes(tmp_path, 1)
    nodes.bad = False
    seen: list[set[str]] = []
    try:
        app = Application(nodes.primary, "a.db")
        app.insert(12_000_000)
        async with nodes.running():
            await nodes.until_equal()
            rows = app.database.position.checksum
            if how == "behind":
                app.insert(3)
                rows = app.database.position.checksum
                nodes.replica.events.subscribe(lambda event: None)

            def look(event: Event) -> None:
                if event.type in ("tx", "drop", "resync"):
                    stores = [nodes.replica.databases.get(name) for name in ("a.db", "b.db", "c.db", "x.db")]
                    seen.append({item.name for item in stores if item is not None and item.position.checksum == rows})

            nodes.replica.events.subscribe(look)
            if how == "exchanged":
                Application(nodes.primary, "x.db")
                await nodes.until_equal()
                seen.clear()
            await asyncio.to_thread(_move, nodes, "a.db", "b.db")
            if how == "exchanged":
                await asyncio.to_thread(_move, nodes, "x.db", "a.db")
                await asyncio.to_thread(_move, nodes, "b.db", "x.db")
            if how in ("on", "back"):
                await asyncio.to_thread(_move, nodes, "b.db", "c.db" if how == "on" else "a.db")
            await nodes.until_equal()
            await nodes.until(lambda: nodes.primary.all_names() == nodes.replica.all_names())
            assert nodes.replica.names() == RENAMED.get(how, ["b.db"])
            if how == "behind":
                seen = seen[1:]
            assert seen and all(seen), seen
    finally:
        nodes.close()


@pytest.mark.parametrize("lost", [1, 3])
async def test_a_primary_that_lost_its_tail_gets_it_back(tmp_path: Path, lost: int) -> None:
    """The primary's disk is set back to an earlier moment: database and log, as a power cut may leave them."""
    nodes = Nodes(tmp_path, 1)
    nodes.bad = False
    try:
        app = Application(nodes.primary, "a.db")
        app.insert(3000)
        files = app.database.files
        before = Path(files.database).read_bytes()
        kept = set(os.listdir(files.ltx))
        async with nodes.running():
            for _ in range(lost):
                app.insert(5000)
            head = app.database.position
            await nodes.until_equal()
        nodes.primary.close(clean=False)
        Path(files.database).write_bytes(before)
        for name in set(os.listdir(files.ltx)) - kept:
            os.unlink(os.path.join(files.ltx, name))
        nodes.primary = open_store(tmp_path / "primary", is_primary=True)
        assert nodes.primary.started_unclean
        recovery = RecoveryWait(nodes.primary.all_names(), wait_s=10, grace_s=0.01)
        async with nodes.running(recovery):
            outcome = await recovery.wait()
            nodes.primary.worker.submit(nodes.primary.settle).result()
            assert outcome.given_back == {"a.db": head}
            await nodes.until_equal()
    finally:
        nodes.close()
