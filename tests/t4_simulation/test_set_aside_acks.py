"""A replica is told to set its copy of a name aside, and the primary makes a database of that name meanwhile. What was
acknowledged of the old copy says nothing about the new database, though its TXIDs are the same."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from fake_engine import CLUSTER, FakeDatabase, FakeStore, page
from memory_link import Wire
from pair import FAST, Pair

from pylitefs.cluster.acks import Acks
from pylitefs.cluster.channel import Channel
from pylitefs.cluster.primary import Replicas
from pylitefs.cluster.roles import NodeIdentity
from pylitefs.cluster.sync_gate import SyncGate, SyncRules, log_heads
from pylitefs.formats import stream
from pylitefs.formats.ltx.format import CHECKSUM_FLAG, Position
from pylitefs.formats.stream_fields import ResyncReason
from pylitefs.status import ReplicaProgress

NAME = "mine.db"
THEIRS = Position(9, CHECKSUM_FLAG | 9, epoch=1)
STALE = stream.Ack((stream.Progress(NAME, 9, 9, 9),))
M = TypeVar("M")


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path)
    yield pair
    pair.close()


class Script:
    """A replica whose messages the test sends, one by one; it had `mine.db` at TXID 9 when it connected."""

    def __init__(self, pair: Pair, gate: SyncGate, channel: Channel, replicas: Replicas) -> None:
        self.pair, self.gate, self.channel, self.replicas = pair, gate, channel, replicas
        self.came: list[stream.Message] = []

    async def say(self, *messages: stream.Message) -> None:
        for message in messages:
            await self.channel.send(message)
        for _ in range(20):  # the primary's task has taken them, and what follows from them
            await asyncio.sleep(0.001)

    async def hear(self, kind: type[M]) -> M:
        """The next message of this kind; heartbeats and READY are not of interest."""
        async with asyncio.timeout(5):
            while True:
                message, _ = await self.channel.receive(5)
                if isinstance(message, kind):
                    return message
                assert isinstance(message, stream.Heartbeat | stream.Ready), message

    async def hears_nothing(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.1):
                await self.hear(stream.Error)

    def commit(self, name: str = NAME) -> asyncio.Future[None]:
        """A commit of the primary, done when it is answered."""
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.gate.wait(name, self.pair.write(name).position.txid, lambda error: answered.set_result(None))
        return answered

    @property
    def standing(self) -> ReplicaProgress:
        return self.replicas.sessions[2].feeds[NAME].standing


@contextlib.asynccontextmanager
async def scripted(pair: Pair, *in_sync: int) -> AsyncIterator[Script]:
    async def change(nodes: frozenset[int]) -> None: ...

    gate = SyncGate(SyncRules(1), lambda: log_heads(pair.primary), change, frozenset(in_sync))
    keeping = asyncio.ensure_future(gate.run())
    wire = Wire(pair.rng)
    channel = Channel(wire.ends[0], stream.Sender.PRIMARY)
    async with Replicas(pair.primary, NodeIdentity(1, "db1"), timings=FAST) as replicas:
        replicas.gate = gate
        serving = asyncio.ensure_future(replicas.serve(wire.ends[1]))
        await channel.send(stream.Hello(stream.PROTOCOL_VERSION, CLUSTER, 2, "db2", 1))
        await channel.send(stream.Databases(True, ((NAME, THEIRS),)))
        await channel.expect(stream.Welcome, 5)
        try:
            yield Script(pair, gate, channel, replicas)
        finally:
            wire.cut("the end")
            keeping.cancel()
            await asyncio.gather(serving, keeping, return_exceptions=True)


async def test_acknowledgements_of_the_old_copy_do_not_count_for_a_new_database(pair: Pair) -> None:
    async with scripted(pair, 2) as replica:
        await replica.hear(stream.SetAside)
        answered = replica.commit()  # of a database that was just made
        await replica.say(STALE, STALE)  # they were under way
        await replica.hears_nothing()
        await replica.say(STALE)
        assert replica.standing.durable == 0 and not answered.done(), "held by a replica that has nothing of it"

        await replica.say(stream.Ack((stream.Progress(NAME, 0, 0, 0),)))
        await replica.hear(stream.Ltx)
        assert not answered.done()
        await replica.say(stream.Ack((stream.Progress(NAME, 1, 1, 1),)))
        async with asyncio.timeout(5):
            await answered
        assert replica.standing == ReplicaProgress(1, 1, 1)


async def test_a_replica_that_cannot_set_its_copy_aside_is_told_again(pair: Pair) -> None:
    """And what it acknowledges then is not taken for an answer either."""
    async with scripted(pair, 2) as replica:
        await replica.hear(stream.SetAside)
        await replica.say(STALE, stream.Resync(NAME, 1, ResyncReason.LOCAL, 0, 0, THEIRS))
        await replica.hear(stream.SetAside)
        answered = replica.commit()
        await replica.say(stream.Ack((stream.Progress(NAME, 0, 0, 0),)))
        await replica.hear(stream.Ltx)
        await replica.say(stream.Ack((stream.Progress(NAME, 1, 1, 1),)))
        async with asyncio.timeout(5):
            await answered


@pytest.mark.parametrize("refuses", [False, True])
async def test_a_copy_that_cannot_be_moved_holds_up_no_commit_of_another_database(pair: Pair, refuses: bool) -> None:
    """A process has it open there, say. The replica is not in sync yet, and is to be taken in."""
    pair.write("app.db")
    async with scripted(pair) as replica:
        seen: set[type[stream.Message]] = set()
        async with asyncio.timeout(5):
            while not {stream.SetAside, stream.Ltx} <= seen:
                seen.add(type((await replica.channel.receive(5))[0]))
        if refuses:
            await replica.say(stream.Resync(NAME, 1, ResyncReason.LOCAL, 0, 0, THEIRS))
            await replica.hear(stream.SetAside)
        await replica.say(stream.Ack((stream.Progress("app.db", 1, 1, 1),)))
        answered = replica.commit("app.db")
        await replica.hear(stream.Ltx)
        await replica.say(stream.Ack((stream.Progress("app.db", 2, 2, 2),)))
        async with asyncio.timeout(5):
            await answered
        assert replica.gate.in_sync == {2}


async def test_ready_does_not_wait_for_the_answer(pair: Pair) -> None:
    """One copy that cannot be moved keeps no replica from being ready."""
    async with scripted(pair, 2) as replica:
        await replica.hear(stream.SetAside)
        await replica.hear(stream.Ready)


async def test_a_new_database_reaches_a_replica_that_could_not_set_its_copy_aside_at_once(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its disk fails twice, then a defect shows up, then it goes well; the primary is idle from then on."""
    pair.replica.cluster_id = CLUSTER
    for _ in range(9):
        pair.replica.get_or_create(NAME).write({1: page(pair.rng)})
    left: list[Exception] = [OSError(5, "Input/output error"), OSError(28, "No space left"), ValueError("a defect")]
    real = pair.replica.set_aside

    def set_aside(name: str, reason: str) -> None:
        if left:
            raise left.pop(0)
        real(name, reason)

    monkeypatch.setattr(pair.replica, "set_aside", set_aside)
    async with pair.running():
        await pair.until(lambda: len(pair.replicas.sessions) == 1)
        await asyncio.to_thread(pair.write, NAME, 2)
        await pair.until_equal()
        await pair.until(lambda: pair.replicas.progress(NAME)[2].durable == 2)


async def test_an_fsync_of_the_copy_that_was_set_aside_says_nothing_of_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was begun before, and ends when the first transactions of the new database are applied."""
    store, wire = FakeStore(tmp_path, is_primary=False), Wire(random.Random(1))
    told = Acks(store, Channel(wire.ends[0], stream.Sender.PRIMARY), FAST)
    database = store.get_or_create(NAME)
    for number in range(3):
        database.write({1: bytes([number]) * 512})
    begun, go_on = threading.Event(), threading.Event()

    def log_durable() -> int:
        begun.set()
        go_on.wait(10)
        return 3

    monkeypatch.setattr(database, "log_durable", log_durable)
    told.begin({NAME: database.position}, at_once=True)
    working = asyncio.ensure_future(told.make_durable())
    try:
        await asyncio.to_thread(begun.wait, 10)
        store.set_aside(NAME, "the primary does not have it")
        told.applied(NAME, 0, anew=True)
        monkeypatch.setattr(FakeDatabase, "log_durable", lambda database: None)
        monkeypatch.setattr(FakeDatabase, "durable", lambda database: 0)  # nothing is, yet
        store.get_or_create(NAME).write({1: b"n" * 512})
        store.databases[NAME].write({1: b"o" * 512})
        told.applied(NAME, 1)
        told.applied(NAME, 2)
        go_on.set()
        for _ in range(50):
            await asyncio.sleep(0.002)
            assert told._progress(NAME).durable == 0, "an fsync of the old copy"
    finally:
        go_on.set()
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        store.close()
