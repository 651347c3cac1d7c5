"""Random work over a bad link, by seed: whatever happens, once the link holds the copies are byte-identical."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_engine import CLUSTER, PAGE, FakeDatabase, FakeReader, page
from memory_link import Wire
from pair import FAST, Pair

from pylitefs.cluster import feed
from pylitefs.cluster.channel import Timings
from pylitefs.cluster.ports import PageSums
from pylitefs.cluster.primary import RecoveryWait
from pylitefs.cluster.replica import Replica
from pylitefs.cluster.roles import NodeIdentity
from pylitefs.formats import stream
from pylitefs.formats.ltx.format import Position
from pylitefs.formats.stream import PROTOCOL_VERSION, Databases, Error, Hello, Sender, Welcome, pack, unpack
from pylitefs.formats.stream_fields import MAX_CHUNK, ErrorCode

NAMES = ("a.db", "b.db", "c.db")


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path)
    yield pair
    pair.close()


def bad_wire(pair: Pair) -> Wire:
    """One that is slow, breaks, or changes a bit."""
    rng = pair.rng
    wire = Wire(rng, lifetime=int(2 ** rng.uniform(6, 19)), max_delay_s=rng.choice([0, 0, 0.001]))
    damage_at = rng.choice([None, None, rng.randint(1, 40)])
    count = 0

    def change(data: bytes) -> bytes:
        nonlocal count
        count += 1
        if count != damage_at or data[0] == Welcome.CODE:  # only in what it says about databases
            return data
        at = rng.randrange(len(data))
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]

    wire.change = change
    return wire


async def work(pair: Pair, steps: int) -> None:
    """Random transactions of the primary; things happen to its log and to the replica's disk."""
    rng = pair.rng
    for _ in range(steps):
        name = rng.choice(NAMES)
        database = pair.primary.get_or_create(name)
        match rng.randrange(12):
            case 0:
                database.forget_log()
            case 1 if database.commit:
                database.drop()
            case 2:
                count = 2 * MAX_CHUNK // PAGE
                database.write({n: page(rng, noise=True) for n in range(1, count)})
            case 3:
                pair.write(name, 70)
            case 4 if database.commit > 2:
                top = database.commit // 2 + 1
                database.write({top: page(rng)}, top)
            case 5:
                left = 3

                def fault(what: str) -> None:
                    nonlocal left
                    left -= 1
                    if left >= 0:
                        raise OSError(errno.ENOSPC, "No space left on device")

                pair.replica.fault = fault
            case _:
                pair.write(name, rng.randint(1, 5), pages=rng.randint(1, 10), size=60)
        await asyncio.sleep(rng.choice([0, 0, 0.002, 0.01]))


@pytest.mark.parametrize("seed", range(12))
async def test_copies_are_identical_in_the_end(tmp_path: Path, seed: int) -> None:
    pair = Pair(tmp_path, seed)
    try:
        pair.next_wire = lambda: bad_wire(pair)
        for _ in range(2):
            async with pair.running():
                await work(pair, 20)
            if pair.rng.random() < 0.5:
                pair.replica = pair.replica.reopened() if not pair.replica.resyncs else pair.replica
        pair.next_wire = lambda: Wire(pair.rng)
        async with pair.running():
            if pair.wires:
                pair.wires[-1].cut("the bad times are over")
            await pair.until_equal(30)
            pair.write("a.db", 3)
            await pair.until_equal()
            await pair.hush()
    finally:
        pair.close()


@pytest.mark.parametrize("seed", range(6))
async def test_a_primary_that_loses_its_tail_recovers(tmp_path: Path, seed: int) -> None:
    """Nothing that the replica has is lost if it can be had in time; and the copies are identical in any case."""
    pair = Pair(tmp_path, seed)
    try:
        async with pair.running():
            pair.write("a.db", 10 + seed)
            pair.write("b.db", 3)
            await pair.until_equal()
        before = pair.primary.contents()
        pair.primary = pair.primary.reopened(lose=pair.rng.randint(1, 3))
        pair.next_wire = lambda: Wire(pair.rng, lifetime=pair.rng.randint(100, 4000))
        recovery = RecoveryWait(NAMES, wait_s=0.6, grace_s=0.2)
        async with pair.running(recovery=recovery):
            await asyncio.sleep(0.05)
            pair.next_wire = lambda: Wire(pair.rng)
            pair.wires[-1].cut("and on")
            await recovery.wait()
            pair.write("a.db", 1)
            await pair.until_equal()
            kept = pair.primary.databases["a.db"].log.covering(before["a.db"][0].txid)
            assert kept is not None or pair.replica.databases["a.db"].lost
            await pair.hush()
    finally:
        pair.close()


# --- peers that are not what they should be ---------------------------------------------------------------------------


async def refusal(pair: Pair, **options: object) -> str:
    """The problem that the replica states when it is not let in."""
    async with pair.running(**options):  # type: ignore[arg-type]
        await pair.until(lambda: pair.follower.state.problem not in ("", "connecting"))
        return pair.follower.state.problem


async def test_another_cluster_is_refused_and_nothing_changes(pair: Pair) -> None:
    pair.write("a.db", 2)
    pair.replica.cluster_id = "LFSCFFFFFFFFFFFFFFFF"
    pair.replica.get_or_create("a.db").write({1: page(pair.rng)})
    before = pair.replica.contents()
    problem = await refusal(pair)
    assert CLUSTER in problem and "LFSCFFFFFFFFFFFFFFFF" in problem
    assert pair.replica.contents() == before


async def test_a_foreign_node_with_data_is_refused(pair: Pair) -> None:
    pair.replica.get_or_create("a.db").write({1: page(pair.rng)})
    assert "no cluster id" in await refusal(pair)
    assert pair.replica.cluster_id is None and pair.replica.all_names() == ["a.db"]


async def test_a_node_does_not_follow_itself(pair: Pair) -> None:
    assert "connected to itself" in await refusal(pair, node_ids=(7, 7))


async def test_a_node_that_is_not_the_primary_says_so(pair: Pair) -> None:
    pair.primary.is_primary = False
    assert "not the primary" in await refusal(pair)


async def test_a_primary_of_an_older_epoch_is_refused(pair: Pair) -> None:
    pair.write("a.db", 1)
    async with pair.running(epoch=3):
        await pair.until_equal()
        pair.follower.epoch = 4
        pair.wires[-1].cut("gone")
        await pair.until(lambda: "epoch" in pair.follower.state.problem)
        pair.write("a.db", 1)
        assert pair.replica.databases["a.db"].position.txid == 1


async def speak(pair: Pair, *messages: bytes) -> list[stream.Message]:
    """Send bytes to the primary as a replica might; what it says before it closes."""
    link = await pair.connect()
    answers: list[stream.Message] = []
    with pytest.raises(Exception, match=r"closed|cut"):
        for data in messages:
            await link.send(data)
        while True:
            answers.append(unpack(await link.receive(), Sender.PRIMARY))
    return answers


HELLO = pack(Hello(PROTOCOL_VERSION, CLUSTER, 77, "x"))
NO_DATABASES = pack(Databases(True, ()))


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([b"\xff rubbish"], ErrorCode.PROTOCOL),
        ([b""], ErrorCode.PROTOCOL),
        ([NO_DATABASES], ErrorCode.PROTOCOL),
        ([pack(Welcome(PROTOCOL_VERSION))], ErrorCode.PROTOCOL),
        ([b"\x0a" + (99).to_bytes(2, "big") + b"from the future"], ErrorCode.VERSION),
        ([b"\x0a" + (0).to_bytes(2, "big")], ErrorCode.VERSION),
        ([HELLO, pack(Databases(False, ()))], ErrorCode.PROTOCOL),
        ([HELLO, NO_DATABASES, HELLO], ErrorCode.PROTOCOL),
        ([HELLO, NO_DATABASES, pack(stream.Ltx("a.db", bytes(200)))], ErrorCode.PROTOCOL),
        ([HELLO, NO_DATABASES, pack(stream.TailEnd("unknown.db", True))], ErrorCode.PROTOCOL),
        ([HELLO, NO_DATABASES, pack(stream.Checksums("a.db", 1, 1, bytes(8)))], ErrorCode.PROTOCOL),
        ([HELLO], ErrorCode.TOO_SLOW),
        ([HELLO, NO_DATABASES], ErrorCode.TOO_SLOW),
    ],
)
async def test_a_peer_that_breaks_the_protocol_is_told_and_dropped(
    pair: Pair, messages: list[bytes], code: ErrorCode
) -> None:
    pair.write("a.db", 1)
    pair.unreachable = True
    before = pair.primary.contents()
    async with pair.running(timings=Timings(**{**FAST.__dict__, "deadline_s": 0.05, "handshake_s": 0.05})):
        pair.unreachable = False
        answers = await speak(pair, *messages)
        pair.unreachable = True
        assert isinstance(answers[-1], Error) and answers[-1].code is code
        await pair.until(lambda: 77 not in pair.replicas.sessions)
    assert pair.primary.contents() == before


async def test_a_primary_that_sends_rubbish_changes_nothing(pair: Pair) -> None:
    """Any bytes in place of any message: the replica drops the connection or repairs itself, and goes on."""
    async with pair.running():
        pair.write("a.db", 3)
        await pair.until_equal()
        for size in (0, 1, 3, 40):
            wires = len(pair.wires)
            await pair.until(lambda: pair.follower.state.connected)
            pair.wires[-1].change = lambda data, size=size: pair.rng.randbytes(size)  # type: ignore[misc]
            pair.write("a.db", 1)
            await pair.until(lambda wires=wires: len(pair.wires) > wires)  # type: ignore[misc]
            await pair.until_equal()


async def test_a_silent_primary_is_left(pair: Pair) -> None:
    async with pair.running(timings=Timings(**{**FAST.__dict__, "deadline_s": 0.05})):
        pair.write("a.db", 1)
        await pair.until_equal()
        pair.wires[-1].ends[0].stalled = True
        await pair.until(lambda: len(pair.wires) > 1 and pair.follower.state.connected)
        pair.write("a.db", 1)
        await pair.until_equal()


async def test_messages_out_of_order_end_the_connection(pair: Pair) -> None:
    pair.unreachable = True
    async with pair.running():
        wire = Wire(pair.rng)
        follower = Replica(pair.replica, NodeIdentity(5), lambda: _made(wire), timings=FAST)
        task = asyncio.ensure_future(follower.run())
        primary = wire.ends[1]
        assert isinstance(unpack(await primary.receive(), Sender.REPLICA), Hello)
        assert isinstance(unpack(await primary.receive(), Sender.REPLICA), Databases)
        await primary.send(pack(Welcome(PROTOCOL_VERSION, CLUSTER, 9, "db1", 1)))
        await primary.send(pack(stream.SnapshotEnd("a.db", Position(5, 1 << 63), 0)))
        last: stream.Message | None = None
        with pytest.raises(Exception, match="closed"):
            while True:
                last = unpack(await primary.receive(), Sender.REPLICA)
        assert isinstance(last, Error) and "out of order" in last.text
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _made(wire: Wire) -> object:
    return wire.ends[0]


async def test_a_second_connection_of_a_node_replaces_the_first(pair: Pair) -> None:
    async with pair.running():
        await pair.until(pair.follower.ready.is_set)
        link = await pair.connect()
        await link.send(pack(Hello(PROTOCOL_VERSION, CLUSTER, 2, "x")))
        await link.send(NO_DATABASES)
        assert isinstance(unpack(await link.receive(), Sender.PRIMARY), Welcome)
        await pair.until(lambda: "again" in pair.follower.state.problem or len(pair.wires) > 2)


async def test_an_orderly_stop_of_the_primary_is_clean(pair: Pair) -> None:
    async with pair.running():
        await pair.until(pair.follower.ready.is_set)
        session = next(iter(pair.replicas.sessions.values()))
        pair.unreachable = True
        serving = list(pair._serving)
        for task in list(pair.replicas._serving):
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        await pair.until(lambda: not pair.follower.state.connected)
        assert session.replica_id not in pair.replicas.sessions
        pair.unreachable = False
        pair.write("a.db", 1)
        await pair.until_equal()


async def test_a_primary_whose_disk_is_full_sends_the_others(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot of one cannot be begun: that concerns neither the connection nor the others, and soon it is tried
    again."""
    tries, snapshot = [], FakeDatabase.snapshot

    def full(self: FakeDatabase, known: PageSums | None) -> FakeReader:
        if self.name == "a.db" and len(tries) < 3:
            tries.append(self.name)
            raise OSError(errno.ENOSPC, "No space left on device")
        return snapshot(self, known)

    monkeypatch.setattr(FakeDatabase, "snapshot", full)
    monkeypatch.setattr(feed, "DISK_RETRY_S", 0.01)
    for name in ("a.db", "b.db"):
        pair.write(name, 2).forget_log()
    async with pair.running():
        await pair.until_equal()
    assert len(tries) == 3 and len(pair.wires) == 1


async def test_a_primary_that_was_behind_does_not_take_back_a_drop(pair: Pair) -> None:
    """It may be that of a database that was renamed, whose new name it does not know."""
    async with pair.running():
        pair.write("a.db", 3)
        await pair.until_equal()
        kept = pair.primary.contents()["a.db"]
        await asyncio.to_thread(pair.primary.databases["a.db"].drop)
        await pair.until_equal()
    pair.primary = pair.primary.reopened(lose=1)
    async with pair.running():
        await pair.until_equal()
        assert pair.primary.contents()["a.db"] == kept


async def test_a_primary_that_was_behind_takes_back_a_drop_and_what_came_after_it(pair: Pair) -> None:
    async with pair.running():
        pair.write("a.db", 3)
        await pair.until_equal()
        await asyncio.to_thread(pair.primary.databases["a.db"].drop)
        await pair.until_equal()
        pair.write("a.db", 2)
        await pair.until_equal()
        kept = pair.primary.contents()["a.db"]
    pair.primary = pair.primary.reopened(lose=3)
    async with pair.running():
        await pair.until_equal()
        assert pair.primary.contents()["a.db"] == kept
