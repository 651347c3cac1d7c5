"""How far a replica is, as the primary tells it: only what was found to be our history counts, whatever a TXID says."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from fake_engine import PAGE, FakeReader
from memory_link import Wire
from pair import Pair

from pylitefs.cluster.feed import Feed
from pylitefs.cluster.sync_gate import SyncGate, SyncRules, log_heads
from pylitefs.events import Event
from pylitefs.formats.stream import Progress
from pylitefs.status import ReplicaProgress

REPLICA = 2
NONE = ReplicaProgress(0, 0, 0)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path)
    yield pair
    pair.close()


@contextlib.asynccontextmanager
async def gated(pair: Pair, written: frozenset[int]) -> AsyncIterator[SyncGate]:
    """Running, with commits that wait for the replica."""

    async def change(nodes: frozenset[int]) -> None: ...

    gate = SyncGate(SyncRules(1, take_in_s=0.1), lambda: log_heads(pair.primary), change, written)
    keeping = asyncio.ensure_future(gate.run())
    make = pair.next_wire

    def next_wire() -> Wire:
        pair.replicas.gate = gate
        return make()

    pair.next_wire = next_wire
    try:
        async with pair.running():
            yield gate
    finally:
        pair.next_wire = make
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)


async def committed(pair: Pair, gate: SyncGate, name: str, timeout_s: float = 5.0) -> None:
    """One commit, to its answer."""
    answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    database = await asyncio.to_thread(pair.write, name)

    def then(error: BaseException | None) -> None:
        answered.set_result(None) if error is None else answered.set_exception(error)

    gate.wait(name, database.position.txid, then)
    async with asyncio.timeout(timeout_s):
        await answered


def release(pair: Pair, name: str) -> None:
    pair.primary.databases[name].set_aside_reason = None
    pair.primary.events.emit(Event("recovered", name, {"outcome": "released"}))


@pytest.mark.parametrize("more", [-1, 0, 3])
async def test_a_branch_does_not_count_however_long_it_is(pair: Pair, more: int) -> None:
    """A switchover would hand over to it, and what the primary has committed since they parted would go to lost/."""
    pair.write("a.db", 5)
    async with pair.running():
        await pair.until_equal()
    ours = pair.write("a.db", 4)
    theirs = pair.replica.databases["a.db"]
    for number in range(4 + more):
        theirs.write({1: bytes([number]) * PAGE})
    assert theirs.position.txid == ours.position.txid + more

    def as_told() -> int:
        infos = pair.replicas.infos()
        assert pair.replicas.progress("a.db").get(REPLICA) in (None, *(info.databases["a.db"] for info in infos))
        return infos[0].databases["a.db"].applied if infos else 0

    async with pair.running():
        while not pair.equal():
            assert as_told() == 0 or theirs.position == ours.position, "a branch, as what we have"
            await asyncio.sleep(0)
        await pair.until(lambda: as_told() == ours.position.txid)


async def test_what_is_acknowledged_while_a_snapshot_is_closed_counts(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said once; the primary is still busy with the end of what it has sent."""
    head = pair.write("a.db", 30, size=40).position.txid
    pair.primary.databases["a.db"].forget_log()
    acknowledged = threading.Event()
    real = Feed.acknowledged

    def hear(feed: Feed, progress: Progress) -> None:
        real(feed, progress)
        if progress.durable == head:
            acknowledged.set()

    monkeypatch.setattr(Feed, "acknowledged", hear)
    monkeypatch.setattr(FakeReader, "close", lambda reader: (acknowledged.wait(10), reader.pin.close()))
    async with pair.running():
        await pair.until(lambda: pair.replicas.progress("a.db").get(REPLICA, NONE).durable == head)
        await pair.until(lambda: pair.replicas.infos()[0].lag_ms == 0)


async def test_a_replica_on_a_branch_says_that_it_is_behind(pair: Pair) -> None:
    """Until it is in line; a health check may ask for it. Its TXID is higher than the primary's."""
    pair.write("a.db", 5)
    async with pair.running():
        await pair.until_equal()
    theirs = pair.replica.databases["a.db"]
    for number in range(9):
        theirs.write({1: bytes([number]) * PAGE})
    pair.unreachable = True
    async with pair.running(epoch=2):
        head = pair.write("a.db", 4).position
        pair.follower.primary_positions["a.db"] = head  # as a heartbeat has told
        assert theirs.position.txid > head.txid and pair.follower.lag_txids() == 1
        pair.unreachable = False
        await pair.until_equal()
        await pair.until(lambda: pair.follower.lag_txids() == 0)
        assert pair.follower.primary_positions["a.db"].is_at(head)


async def test_what_a_replica_says_it_has_is_not_durable_before_it_says_so(pair: Pair) -> None:
    pair.write("a.db", 5)
    async with pair.running():
        await pair.until_equal()
    pair.replica.databases["a.db"].durable_txid = 0
    async with pair.running():
        await pair.until(lambda: pair.replicas.infos() and pair.replicas.infos()[0].databases["a.db"].applied)
        told = pair.replicas.infos()[0].databases["a.db"]
        assert told.durable <= pair.replica.databases["a.db"].durable_txid


async def test_a_database_that_is_set_aside_holds_up_no_commit_of_another(pair: Pair) -> None:
    """An old process has its files open, say, and the replica is behind of what its log has."""
    pair.write("a.db", 2)
    pair.write("b.db", 2)
    async with pair.running():
        await pair.until_equal()
    pair.write("b.db", 2)
    pair.primary.databases["b.db"].set_aside_reason = "still open in a process of an earlier mount"
    async with gated(pair, frozenset()) as gate:
        await committed(pair, gate, "a.db")
        assert gate.in_sync == {REPLICA}
        release(pair, "b.db")
        await pair.until_equal(1.0)
        await committed(pair, gate, "b.db")


async def test_a_database_that_was_set_aside_meanwhile_holds_up_no_commit_of_another(pair: Pair) -> None:
    pair.write("a.db", 2)
    pair.write("b.db", 2)
    async with gated(pair, frozenset({REPLICA})) as gate:
        await pair.until_equal()
        await committed(pair, gate, "a.db")
        pair.primary.databases["b.db"].set_aside_reason = "malformed"
        pair.wires[-1].cut("gone")
        await pair.until(lambda: len(pair.wires) > 1)
        await committed(pair, gate, "a.db")


async def test_who_waits_for_a_released_database_is_woken(pair: Pair) -> None:
    """Nothing is written to it afterwards."""
    pair.write("b.db", 2)
    pair.primary.databases["b.db"].set_aside_reason = "still open in a process of an earlier mount"
    async with pair.running():
        await pair.until(pair.follower.ready.is_set)
        release(pair, "b.db")
        await pair.until_equal(1.0)


async def test_a_copy_of_a_database_that_is_set_aside_counts_if_it_is_what_the_log_says(pair: Pair) -> None:
    pair.write("a.db", 3)
    async with pair.running():
        await pair.until_equal()
    pair.primary.databases["a.db"].set_aside_reason = "malformed"
    async with pair.running():
        await pair.until(lambda: pair.replicas.infos() and pair.replicas.infos()[0].databases["a.db"].applied == 3)
    theirs = pair.replica.databases["a.db"]
    theirs.write({1: b"x" * PAGE})
    async with pair.running():
        await pair.until(pair.follower.ready.is_set)
        assert pair.replicas.infos()[0].databases["a.db"].applied == 0
