"""Two nodes over a link in memory: every way a replica is brought to the primary's state; the link has no faults."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_engine import CLUSTER, PAGE, page
from memory_link import Wire
from pair import FAST, Pair

from pylitefs.cluster.channel import Timings
from pylitefs.cluster.primary import RecoveryWait
from pylitefs.cluster.replica import Replica
from pylitefs.formats import stream
from pylitefs.formats.ltx.decoder import decode
from pylitefs.formats.stream import Sender
from pylitefs.formats.stream_fields import MAX_CHUNK


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path)
    yield pair
    pair.close()


def sent(wire: Wire) -> list[stream.Message]:
    """Record what the primary sends over a wire from now on."""
    messages: list[stream.Message] = []

    def record(data: bytes) -> bytes:
        messages.append(stream.unpack(data, Sender.PRIMARY))
        return data

    wire.change = record
    return messages


def recording(pair: Pair) -> list[stream.Message]:
    """What the primary sends over all connections to come."""
    messages: list[stream.Message] = []
    make = pair.next_wire

    def next_wire() -> Wire:
        wire = make()

        def record(data: bytes) -> bytes:
            messages.append(stream.unpack(data, Sender.PRIMARY))
            return data

        wire.change = record
        return wire

    pair.next_wire = next_wire
    return messages


def kinds(messages: list[stream.Message]) -> set[type]:
    return {type(message) for message in messages}


async def test_transactions_arrive_one_by_one_and_are_acknowledged(pair: Pair) -> None:
    messages = recording(pair)
    async with pair.running():
        await pair.until(pair.follower.ready.is_set)
        database = pair.write("a.db", 5)
        await pair.until_equal()
        pair.write("a.db", 1)
        await pair.until_equal()
        assert pair.replica.cluster_id == CLUSTER and pair.replica.primary_hostname == "db1"
        head = database.position.txid
        await pair.until(lambda: pair.replicas.progress("a.db")[2].durable == head)
        info = pair.replicas.infos()[0]
        assert info.hostname == "db2" and info.databases["a.db"].applied == head
        assert info.state == "live" and info.lag_ms == 0
        assert pair.replica.lag_ms is not None and pair.follower.lag_txids() == 0
    assert stream.SnapshotBegin not in kinds(messages)
    assert [m.name for m in messages if isinstance(m, stream.Ltx)] == ["a.db"] * 6
    types = [event.type for event in pair.primary.seen]
    assert types.count("replicaConnected") == types.count("replicaLost") == 1


async def test_a_replica_that_has_nothing_gets_a_snapshot_when_the_log_is_short(pair: Pair) -> None:
    pair.write("a.db", 30, size=40)
    pair.primary.databases["a.db"].forget_log()
    messages = recording(pair)
    async with pair.running():
        await pair.until_equal()
        pair.write("a.db", 3)
        await pair.until_equal()
    assert stream.SnapshotBegin in kinds(messages)


async def test_transactions_during_a_snapshot_are_part_of_it(pair: Pair) -> None:
    pair.write("big.db", 40, pages=30, size=600)
    pair.primary.databases["big.db"].forget_log()
    messages = recording(pair)
    async with pair.running():
        await pair.until(lambda: stream.SnapshotBegin in kinds(messages))
        for _ in range(20):
            await asyncio.to_thread(pair.write, "big.db", 1, 3, 700)
        await pair.until_equal()
    end = next(i for i, m in enumerate(messages) if isinstance(m, stream.SnapshotEnd))
    assert stream.Ltx in kinds(messages[:end])


async def test_a_snapshot_does_not_hold_up_another_database(pair: Pair) -> None:
    pair.write("big.db", 100, pages=40, size=4000, noise=True)
    pair.primary.databases["big.db"].forget_log()
    pair.write("small.db", 1)
    messages = recording(pair)
    async with pair.running():
        await pair.until(lambda: stream.SnapshotBegin in kinds(messages))
        pair.write("small.db", 1)
        await pair.until_equal()
    end = next(i for i, m in enumerate(messages) if isinstance(m, stream.SnapshotEnd))
    assert sum(isinstance(m, stream.Ltx) and m.name == "small.db" for m in messages[:end]) == 2


async def test_a_large_transaction_travels_in_pieces(pair: Pair) -> None:
    messages = recording(pair)
    async with pair.running():
        await pair.until(pair.follower.ready.is_set)
        database = pair.primary.get_or_create("a.db")
        for _ in range(2):
            database.write({n: page(pair.rng, noise=True) for n in range(1, 3 * MAX_CHUNK // PAGE)})
            await pair.until_equal()
    assert sum(isinstance(m, stream.LtxData) for m in messages) >= 6
    assert stream.Ltx not in kinds(messages)


async def test_a_long_backlog_is_merged(pair: Pair) -> None:
    async with pair.running():
        pair.write("a.db", 1)
        await pair.until_equal()
        pair.unreachable = True
        pair.wires[-1].cut("gone")
        pair.write("a.db", 300)
        messages = recording(pair)
        pair.unreachable = False
        await pair.until_equal()
    files = [decode(m.data) for m in messages if isinstance(m, stream.Ltx)]
    assert sum(f.header.max_txid - f.header.min_txid + 1 for f in files) == 300
    assert len(files) <= 5


async def test_a_replica_whose_log_no_longer_fits_gets_only_what_differs(pair: Pair) -> None:
    async with pair.running():
        pair.write("a.db", 50, size=100, pages=20)
        await pair.until_equal()
        pair.unreachable = True
        pair.wires[-1].cut("gone")
        database = pair.primary.databases["a.db"]
        for number in (3, 5):
            database.write({number: page(pair.rng)})
        database.forget_log()
        pair.primary.pages_sent = 0
        pair.unreachable = False
        await pair.until_equal()
        assert pair.primary.pages_sent == 2
        assert pair.replica.databases["a.db"].lost == []


async def test_a_diverged_replica_is_rewound_and_keeps_its_branch(pair: Pair) -> None:
    async with pair.running():
        pair.write("a.db", 10)
        await pair.until_equal()
    pair.write("a.db", 1)
    pair.replica.databases["a.db"].write({1: page(pair.rng)})
    pair.replica.databases["a.db"].write({2: page(pair.rng)})
    async with pair.running():
        await pair.until_equal()
        assert pair.replica.databases["a.db"].lost == [(11, 11), (12, 12)]


async def test_a_primary_that_takes_writes_already_takes_what_follows_exactly(pair: Pair) -> None:
    async with pair.running():
        pair.write("a.db", 5)
        await pair.until_equal()
    before = pair.primary.contents()
    pair.primary = pair.primary.reopened(lose=2)
    async with pair.running():
        await pair.until_equal()
        assert pair.primary.contents() == before
        assert pair.replica.databases["a.db"].lost == [] and pair.replica.resyncs == 0
        await pair.until(lambda: not pair.primary.databases["a.db"].demoted)


async def test_a_replica_that_is_ahead_of_a_primary_that_went_on_is_rewound(pair: Pair) -> None:
    async with pair.running():
        pair.write("a.db", 6)
        await pair.until_equal()
    pair.primary = pair.primary.reopened(lose=3)
    pair.write("a.db", 1)
    async with pair.running():
        await pair.until_equal()
        assert pair.primary.databases["a.db"].position.txid == 4
        assert pair.replica.databases["a.db"].lost == [(4, 4), (5, 5), (6, 6)]


@pytest.mark.parametrize("large", [False, True])
async def test_a_primary_gets_back_what_it_lost(pair: Pair, large: bool) -> None:
    async with pair.running():
        pair.write("a.db", 5)
        if large:
            top = 2 * MAX_CHUNK // PAGE
            pair.primary.databases["a.db"].write({n: page(pair.rng, noise=True) for n in range(1, top)})
        pair.write("b.db", 5)
        await pair.until_equal()
        before = pair.primary.contents()
    pair.primary = pair.primary.reopened(lose=2)
    recovery = RecoveryWait(["a.db", "b.db"], wait_s=10, grace_s=0.01)
    async with pair.running(recovery=recovery):
        outcome = await recovery.wait()
        assert pair.primary.contents() == before
        assert outcome.replicas == 1 and set(outcome.given_back) == {"a.db", "b.db"}
        pair.write("a.db", 2)
        await pair.until_equal()
    assert pair.replica.resyncs == 0
    assert not [name for name in Path(pair.primary.data_dir).iterdir() if name.is_file()]


async def test_a_database_that_the_primary_lost_whole_comes_back(pair: Pair) -> None:
    async with pair.running():
        pair.write("a.db", 3)
        await pair.until_equal()
        before = pair.primary.contents()
    pair.primary = pair.primary.reopened(lose=3)
    recovery = RecoveryWait([], wait_s=10, grace_s=0.01)
    async with pair.running(recovery=recovery):
        await recovery.wait()
        assert pair.primary.contents() == before


async def test_a_tail_that_does_not_fit_is_not_taken(pair: Pair) -> None:
    async with pair.running():
        pair.write("a.db", 6)
        await pair.until_equal()
    pair.primary = pair.primary.reopened(lose=3)
    pair.write("a.db", 1)
    recovery = RecoveryWait(["a.db"], wait_s=10, grace_s=0.01)
    async with pair.running(recovery=recovery):
        outcome = await recovery.wait()
        assert not outcome.given_back
        await pair.until_equal()
        assert pair.primary.databases["a.db"].position.txid == 4
        assert pair.replica.databases["a.db"].lost == [(4, 4), (5, 5), (6, 6)]


async def test_the_wait_ends_without_any_replica(pair: Pair) -> None:
    recovery = RecoveryWait(["a.db"], wait_s=0.02)
    outcome = await recovery.wait()
    assert outcome.replicas == 0 and not recovery.active


async def test_same_content_at_a_higher_txid_is_adopted(pair: Pair) -> None:
    first = {1: page(pair.rng)}
    async with pair.running():
        database = pair.primary.get_or_create("a.db")
        database.write(first)
        database.write({1: page(pair.rng)})
        database.write(first)
        await pair.until_equal()
    pair.primary = pair.primary.reopened(lose=2)
    recovery = RecoveryWait(["a.db"], wait_s=10, grace_s=0.01)
    async with pair.running(recovery=recovery):
        await recovery.wait()
        await pair.until_equal()
        assert pair.primary.databases["a.db"].position.txid == 3


async def test_databases_are_dropped_and_made_again(pair: Pair) -> None:
    async with pair.running():
        pair.write("a.db", 3)
        await pair.until_equal()
        pair.primary.databases["a.db"].drop()
        await pair.until_equal()
        pair.write("a.db", 3)
        await pair.until_equal()
        assert pair.replica.databases["a.db"].position.txid == 7
    pair.primary.databases["a.db"].drop()
    pair.primary.databases["a.db"].forget_log()
    async with pair.running():
        await pair.until_equal()
        assert pair.replica.databases["a.db"].commit == 0


async def test_a_database_that_the_primary_never_had_is_set_aside(pair: Pair) -> None:
    pair.replica.cluster_id = CLUSTER
    pair.replica.get_or_create("mine.db").write({1: page(pair.rng)})
    async with pair.running():
        pair.write("a.db", 1)
        await pair.until_equal()
    assert "lost" in [event.type for event in pair.replica.seen]


async def test_a_database_that_the_primary_cannot_use_is_left_alone(pair: Pair) -> None:
    async with pair.running():
        pair.write("a.db", 3)
        await pair.until_equal()
    before = pair.replica.contents()["a.db"]
    pair.primary = pair.primary.reopened(lose=3)
    pair.primary.databases["a.db"].set_aside_reason = "malformed"
    async with pair.running():
        pair.write("b.db", 1)
        await pair.until(lambda: "b.db" in pair.replica.contents())
        await pair.until(pair.follower.ready.is_set)
    assert pair.replica.contents()["a.db"] == before


async def test_only_the_databases_of_the_filter_are_copied(pair: Pair) -> None:
    pair.write("a.db", 2)
    async with pair.running(databases=["b.db", "c.db"]):
        pair.write("b.db", 2)
        await pair.until(lambda: "b.db" in pair.replica.contents())
        await pair.until(pair.follower.ready.is_set)
        pair.write("a.db", 1)
        pair.write("c.db", 1)
        await pair.until(lambda: pair.replica.all_names() == ["b.db", "c.db"])
    assert pair.replica.get("a.db") is None


async def test_a_full_disk_holds_everything_up_and_loses_nothing(pair: Pair) -> None:
    full = True

    def fault(what: str) -> None:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")

    async with pair.running():
        pair.write("a.db", 1)
        await pair.until_equal()
        pair.replica.fault = fault
        pair.write("a.db", 3)
        await pair.until(lambda: "diskFull" in [event.type for event in pair.replica.seen])
        assert pair.replica.databases["a.db"].position.txid == 1
        full = False
        await pair.until_equal()
    assert [e.type for e in pair.replica.seen if e.type.startswith("disk")] == ["diskFull", "diskFreed"]
    assert len(pair.wires) == 1


async def test_a_damaged_transaction_is_replaced_by_pages(pair: Pair) -> None:
    damaged = 0

    def damage(data: bytes) -> bytes:
        nonlocal damaged
        message = stream.unpack(data, Sender.PRIMARY)
        if isinstance(message, stream.Ltx) and not damaged:
            damaged += 1
            return data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]
        return data

    async with pair.running():
        pair.write("a.db", 3)
        await pair.until_equal()
        pair.wires[-1].change = damage
        pair.write("a.db", 3)
        await pair.until_equal()
    assert damaged == 1 and pair.replica.resyncs == 1 and len(pair.wires) == 1


async def test_a_damaged_log_entry_of_the_primary_is_passed_over(pair: Pair) -> None:
    async with pair.running():
        pair.write("a.db", 3)
        await pair.until_equal()
    pair.write("a.db", 2)
    entry = pair.primary.databases["a.db"].log.entries()[3]
    Path(entry.path).write_bytes(b"rubbish")
    async with pair.running():
        await pair.until_equal()
    assert pair.replica.resyncs == 1


async def test_the_copy_on_the_replica_repairs_itself(pair: Pair) -> None:
    async with pair.running():
        pair.write("a.db", 3)
        await pair.until_equal()
        copy = pair.replica.databases["a.db"]
        copy.position = type(copy.position)(copy.position.txid, copy.position.checksum ^ 1)
        pair.write("a.db", 1)
        await pair.until_equal()
    assert pair.replica.resyncs == 1


async def test_many_databases_are_ready_together(pair: Pair) -> None:
    for number in range(300):
        pair.write(f"{number}.db", 1)
    async with pair.running():
        await pair.until(pair.follower.ready.is_set)
        assert pair.equal()
        await pair.until(lambda: len(pair.follower.primary_positions) == 300)


async def test_a_replica_that_does_not_read_is_waited_for(pair: Pair) -> None:
    """Back-pressure: what cannot be sent stays in the log, and the heartbeats of the replica keep the connection."""
    async with pair.running(timings=Timings(**{**FAST.__dict__, "deadline_s": 0.5})):
        pair.write("a.db", 1)
        await pair.until_equal()
        end = pair.wires[-1].ends[0]
        end.stalled = True
        pair.write("a.db", 20, pages=20, size=300, noise=True)
        await asyncio.sleep(0.2)
        end.stalled = False
        end.wake()
        await pair.until_equal()


async def test_either_side_says_plainly_who_left_and_why(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def complain(follower: Replica, what: str, *, harmless: bool = False) -> None:
        assert harmless or what != "disconnected"
        problems.append(f"{what}: {follower.state.problem}")

    def reasons() -> list[str]:
        return [event.data["reason"] for event in pair.primary.seen if event.type == "replicaLost"]

    problems: list[str] = []
    monkeypatch.setattr(Replica, "_complain", complain)
    async with pair.running():
        await pair.until(pair.follower.ready.is_set)
        pair.unreachable = True
        await pair.replicas.__aexit__()
        await pair.until(lambda: problems)
    assert problems[0] == "disconnected: the primary db1 (0000000000000001) stops"
    assert reasons() == ["the primary db1 (0000000000000001) stops"]
    pair.unreachable = False
    async with pair.running():
        await pair.until(pair.follower.ready.is_set)
        pair.follower.leaving = "becomes the primary"
        pair.following.cancel()
        await pair.until(lambda: len(reasons()) == 2)
    assert reasons()[1] == "the replica db2 (0000000000000002) becomes the primary"
