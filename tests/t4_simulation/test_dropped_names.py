"""Databases that were dropped long ago, of which only tombstones are left: on the primary, on the replica, or both."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_engine import FakeDatabase
from memory_link import Wire
from pair import Pair
from real_nodes import Application, open_store
from test_divergence_engine import changed_places, rows, rows_of, two
from test_replication_engine import Nodes
from test_replication_pair import recording

from pylitefs.cluster import election, primary
from pylitefs.cluster.lease_port import Member, Versioned, View
from pylitefs.cluster.recovery_wait import RecoveryWait
from pylitefs.cluster.replica import Replica
from pylitefs.cluster.roles import NodeIdentity
from pylitefs.engine import forgetting
from pylitefs.engine.lost import TIP, branches
from pylitefs.engine.store import Store
from pylitefs.formats import stream
from pylitefs.node import Node


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path)
    yield pair
    pair.close()


def about(messages: list[stream.Message], name: str) -> list[str]:
    return [type(message).__name__ for message in messages if getattr(message, "name", "") == name]


async def dropped(pair: Pair, name: str = "a.db", count: int = 5) -> FakeDatabase:
    database = await asyncio.to_thread(pair.write, name, count)
    await asyncio.to_thread(database.drop)
    return database


def same_end(pair: Pair, name: str = "a.db") -> bool:
    """Both know of the name, and to both it is at the same position."""
    ends = []
    for store in (pair.primary, pair.replica):
        database, tombstone = store.get(name), store.tombstone(name)
        ends.append(database.position if database else tombstone.position if tombstone else None)
    return ends[0] is not None and ends[0].is_at(ends[1])


async def goes_on(pair: Pair, messages: list[stream.Message], name: str = "a.db") -> None:
    """The name is used again: with the next TXID, and by the log alone."""
    tombstone = pair.primary.tombstone(name)
    assert tombstone is not None
    messages.clear()
    database = await asyncio.to_thread(pair.write, name, 1)
    assert database.position.txid == tombstone.position.txid + 1
    await pair.until_equal()
    assert set(about(messages, name)) == {"Ltx"}
    txid = database.position.txid
    await pair.until(lambda: pair.replicas.progress(name)[2].durable == txid)


async def test_a_new_replica_is_told_in_short(pair: Pair) -> None:
    """And keeps nothing but a tombstone too: an election must not take it for one that lacks something."""
    for number in range(30):
        await dropped(pair, f"{number}.db", 2)
        assert pair.primary.forget(f"{number}.db")
    await dropped(pair)
    assert pair.primary.forget("a.db")
    await asyncio.to_thread(pair.write, "b.db", 3)
    messages = recording(pair)
    async with pair.running():
        await pair.until(lambda: pair.primary.tombstones() == pair.replica.tombstones())
        await pair.until_equal()
        assert about(messages, "a.db") == ["SnapshotBegin", "SnapshotEnd"]
        assert list(pair.replica.databases) == ["b.db"] and list(pair.replicas.sessions[2].feeds) == ["b.db"]
        await goes_on(pair, messages)
    pair.replica = pair.replica.reopened()
    assert pair.replica.tombstones() == pair.primary.tombstones()
    messages.clear()
    async with pair.running():
        await pair.until(pair.follower.ready.is_set)
        assert about(messages, "1.db") == []
        await goes_on(pair, messages, "1.db")


async def test_a_replica_that_has_forgotten_a_name_is_not_behind(pair: Pair) -> None:
    """Though the last heartbeat that told of the name says how far it had come."""
    async with pair.running():
        await dropped(pair)
        await asyncio.to_thread(pair.write, "b.db", 3)
        await pair.until_equal()
        await pair.until(lambda: "a.db" in pair.follower.primary_positions and pair.follower.lag_txids() == 0)
        assert pair.replica.forget("a.db") and pair.replica.get("a.db") is None
        assert pair.follower.lag_txids() == 0


@pytest.mark.parametrize("again", [False, True])
async def test_a_replica_that_was_away_drops_its_copy(pair: Pair, again: bool) -> None:
    """Though it was away when the database was dropped, and forgotten, and perhaps made again and dropped again."""
    async with pair.running():
        await asyncio.to_thread(pair.write, "a.db", 5)
        await pair.until_equal()
    for _ in range(1 + again):
        await dropped(pair)
        assert pair.primary.forget("a.db")
    messages = recording(pair)
    async with pair.running():
        await pair.until(lambda: same_end(pair))
        database = pair.replica.get("a.db")
        assert database is not None and not database.commit and database.lost == [], "nothing of it was only here"
        assert not [event for event in pair.replica.seen if event.type == "lost"]
        await pair.until(lambda: pair.primary.forget("a.db"))
        pair.replica.forget("a.db")
        assert same_end(pair)
        await goes_on(pair, messages)


async def test_what_only_a_replica_had_is_kept_when_it_drops_its_copy(pair: Pair) -> None:
    """It was the primary before, and its last commits were never replicated."""
    async with pair.running():
        await asyncio.to_thread(pair.write, "a.db", 5)
        await pair.until_equal()
    pair.replica.is_primary = True
    mine = pair.replica.databases["a.db"]
    for _ in range(3):
        await asyncio.to_thread(mine.write, {1: bytes(512)})
        await asyncio.to_thread(mine.write, {1: bytes([7]) * 512})
    pair.replica.is_primary = False
    pair.primary.epoch = 2
    await dropped(pair)
    assert pair.primary.forget("a.db")
    async with pair.running(epoch=2):
        await pair.until(lambda: same_end(pair))
    assert [span for span in mine.lost if span[0] > 5] == [(txid, txid) for txid in range(6, 12)]


async def test_only_the_replica_has_forgotten(pair: Pair) -> None:
    messages = recording(pair)
    async with pair.running():
        await dropped(pair)
        await pair.until(lambda: same_end(pair))
    pair.replica.forget("a.db")
    messages.clear()
    async with pair.running():
        await pair.until(pair.follower.ready.is_set)
        assert about(messages, "a.db") == [] and pair.replica.get("a.db") is None
        head = pair.primary.databases["a.db"].position.txid
        await pair.until(lambda: pair.replicas.progress("a.db")[2].durable == head)
        assert pair.primary.forget("a.db"), "the replica holds the drop"
        await goes_on(pair, messages)


async def test_only_the_primary_has_forgotten(pair: Pair) -> None:
    messages = recording(pair)
    async with pair.running():
        await dropped(pair)
        await pair.until(lambda: same_end(pair))
    assert pair.primary.forget("a.db")
    messages.clear()
    async with pair.running():
        await pair.until(pair.follower.ready.is_set)
        assert about(messages, "a.db") == [] and pair.primary.get("a.db") is None
        await goes_on(pair, messages)


async def test_nothing_is_forgotten_that_a_connected_replica_lacks(pair: Pair) -> None:
    """Else it could be counted as one that has everything, and bring the rows back."""
    async with pair.running():
        await asyncio.to_thread(pair.write, "a.db", 3)
        await pair.until_equal()
        pair.replica.fault = lambda what: (_ for _ in ()).throw(OSError(28, what))
        await asyncio.to_thread(pair.primary.databases["a.db"].drop)
        await asyncio.sleep(0.05)
        assert not await asyncio.to_thread(pair.primary.forget, "a.db")
        pair.replica.fault = lambda what: None
        await pair.until(lambda: same_end(pair))
        await pair.until(lambda: pair.primary.forget("a.db"))


async def test_who_comes_back_with_a_copy_makes_all_sessions_count_it_again(pair: Pair, tmp_path: Path) -> None:
    """One replica needs the drop, so the primary has the database again: the others are known to have it."""
    async with pair.running():
        await asyncio.to_thread(pair.write, "a.db", 3)
        await pair.until_equal()
    await dropped(pair)
    assert pair.primary.forget("a.db")
    stale, fresh = pair.replica, type(pair.replica)(tmp_path / "third", is_primary=False)
    pair.replica = fresh
    try:
        async with pair.running(node_ids=(1, 3)):
            await pair.until(lambda: fresh.tombstone("a.db") is not None)
            session = pair.replicas.sessions[3]
            await pair.until(lambda: "a.db" in session._acks)  # it will not be said again
            assert "a.db" not in session.feeds
            follower = Replica(stale, NodeIdentity(2, "db2"), pair.connect, timings=pair.follower.timings)
            following = asyncio.ensure_future(follower.run())
            try:
                await pair.until(lambda: not stale.databases["a.db"].commit)
                head = pair.primary.databases["a.db"].position.txid
                await pair.until(lambda: [p.durable for p in pair.replicas.progress("a.db").values()] == [head, head])
            finally:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
    finally:
        fresh.close()
        pair.replica = stale


async def test_feeds_of_what_was_forgotten_go(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session may last for years."""
    monkeypatch.setattr(primary, "FORGET_BEATS", 1)
    messages = recording(pair)
    async with pair.running():
        await dropped(pair)
        await pair.until(lambda: same_end(pair))
        await pair.until(lambda: pair.primary.forget("a.db"))
        pair.replica.forget("a.db")
        await pair.until(lambda: "a.db" not in pair.replicas.sessions[2].feeds)
        await goes_on(pair, messages)


async def test_a_tombstone_that_the_primary_knows_nothing_of_goes(pair: Pair) -> None:
    async with pair.running():
        await dropped(pair)
        await pair.until(lambda: same_end(pair))
    if "a.db" in pair.replica.databases:  # else it was dropped before it came, and there is nothing but a tombstone
        pair.replica.forget("a.db")
    pair.primary.databases.pop("a.db")
    async with pair.running():
        await pair.until(lambda: pair.replica.tombstone("a.db") is None)


async def test_the_name_is_used_again_while_a_replica_is_told(pair: Pair) -> None:
    """Right between the two messages that say so."""
    await dropped(pair)
    assert pair.primary.forget("a.db")
    make = pair.next_wire
    writing: list[str] = []

    def next_wire() -> Wire:
        wire = make()
        wire.max_delay_s = 0.01  # so that what wakes the session does so between the two

        def look(data: bytes) -> bytes:
            message = stream.unpack(data, stream.Sender.PRIMARY)
            if isinstance(message, stream.SnapshotBegin) and not writing:
                pair.write("a.db", 2)
                writing.append(message.name)
            return data

        wire.change = look
        return wire

    pair.next_wire = next_wire
    async with pair.running():
        await pair.until(lambda: writing)
        await pair.until_equal()
        assert pair.replica.databases["a.db"].position.txid == 8
        assert pair.replica.resyncs == 0


# -- the real engine ---------------------------------------------------------------------------------------------------


def forget_old(store: Store) -> None:
    """An hour later."""

    def work() -> None:
        with pytest.MonkeyPatch.context() as patch:
            store.forgetting.forget_old()  # those without a log are seen for the first time
            hour = SimpleNamespace(time=lambda: time.time() + 3600, monotonic=lambda: time.monotonic() + 3600)
            patch.setattr(forgetting, "time", hour)
            store.forgetting.forget_old()

    store.worker.submit(work).result()
    store.worker.submit(lambda: None).result()


def make_and_drop(store: Store, *names: str) -> None:
    for name in names:
        Application(store, name)
        store.worker.submit(store.naming.drop, store.find(name)).result()


def elected(store: Store) -> dict[str, tuple[int, int]]:
    """What an election knows of a node."""
    node = SimpleNamespace(store=store, is_primary=store.is_primary)
    return dict(Node._known_positions(node))  # type: ignore[arg-type]


async def test_who_has_forgotten_is_as_far_as_who_has_not(tmp_path: Path) -> None:
    """And so is who was told. Also a node that is behind in a name that others have forgotten is behind."""
    nodes = Nodes(tmp_path, 1)
    nodes.bad = False
    third = open_store(tmp_path / "third", is_primary=False)
    stale = open_store(tmp_path / "stale", is_primary=False)
    try:
        nodes.primary.note_epoch(7)
        app = Application(nodes.primary, "a.db")
        with replica_is(nodes, stale):
            Application(nodes.primary, "3.db")
            async with nodes.running(epoch=7):
                await nodes.until_equal()
        nodes.primary.worker.submit(nodes.primary.naming.drop, nodes.primary.find("3.db")).result()
        await asyncio.to_thread(make_and_drop, nodes.primary, "1.db", "2.db")
        async with nodes.running(epoch=7):
            await nodes.until(lambda: elected(nodes.replica) == elected(nodes.primary))
            forget_old(nodes.replica)
            assert nodes.replica.all_names() == ["a.db"]
        before = elected(nodes.primary)
        assert before == {"1.db": (7, 2), "2.db": (7, 2), "3.db": (7, 2), "a.db": (7, 1)}
        forget_old(nodes.primary)
        assert nodes.primary.all_names() == ["a.db"] and elected(nodes.primary) == before == elected(nodes.replica)
        with replica_is(nodes, third):
            async with nodes.running(epoch=7):
                await nodes.until(lambda: elected(third) == before)
            assert third.all_names() == ["a.db"] and os.listdir(third.databases_dir) == ["a.db"]
        assert _elects(elected(third), elected(nodes.replica)) == "the better priority"
        assert _elects(elected(stale), elected(nodes.replica)) == "who is ahead"
        with replica_is(nodes, stale):
            async with nodes.running(epoch=7):
                await nodes.until(lambda: elected(stale) == before)
                assert stale.names() == ["a.db"] and branches(stale.data_dir) == []
                assert nodes.primary.all_names() == ["3.db", "a.db"], "it was needed again"
                await nodes.until(lambda: _forgets(nodes.primary) == ["a.db"])
        assert nodes.primary.flush_all().result() == {"a.db": app.database.position}
    finally:
        third.close(clean=True)
        stale.close(clean=True)
        nodes.close()


@contextlib.contextmanager
def replica_is(nodes: Nodes, store: Store) -> Iterator[None]:
    before, nodes.replica = nodes.replica, store
    try:
        yield
    finally:
        nodes.replica = before


def _forgets(store: Store) -> list[str]:
    forget_old(store)
    return store.all_names()


def _elects(mine: dict[str, tuple[int, int]], theirs: dict[str, tuple[int, int]]) -> str:
    """What a node that has the better priority decides, where no transaction may be missing."""
    members = tuple(Member(number, f"db{number}", f"http://db{number}", True, 0, {}, {}) for number in (1, 2))
    view = View(None, Versioned(b""), members)
    me = election.Self(1, "C", mine, priority=5)
    state = election.ClusterState("C", 7, has_data=True, positions=theirs)
    decision = election.decide(view, state, me, {2: theirs}, election.Rules(0), 100.0, 0.0)
    return "the better priority" if isinstance(decision, election.Acquire) else "who is ahead"


@pytest.mark.parametrize("trim", [False, True])
async def test_a_branch_is_kept_where_the_name_is_forgotten_by_all_others(tmp_path: Path, trim: bool) -> None:
    """It was the primary, and its last commits were never replicated; the next primary dropped the database."""
    with two(tmp_path) as nodes:
        app = Application(nodes.primary, "a.db")
        for _ in range(4):
            app.insert(300)
        async with nodes.running():
            await nodes.until_equal()
        app.insert(7)
        if trim:
            app.database.log.retain(0, 1)
        left = rows_of(nodes.primary, tmp_path)
        app = changed_places(nodes, 2)
        nodes.primary.worker.submit(nodes.primary.settle).result()
        nodes.primary.worker.submit(nodes.primary.naming.drop, app.database).result()
        forget_old(nodes.primary)
        assert nodes.primary.all_names() == []
        async with nodes.running(epoch=2):
            await nodes.until(lambda: not nodes.replica.names())
            await nodes.until(lambda: elected(nodes.replica) == elected(nodes.primary))
        (branch,) = branches(nodes.replica.data_dir)
        tip = branch.path(TIP)
        assert tip is not None and rows(tip) == left
        assert trim or branch.transactions == 1
        forget_old(nodes.replica)
        assert nodes.replica.all_names() == ["a.db"], "its lost/ is there"


async def test_a_replica_whose_start_knows_of_no_drop_is_told_again(tmp_path: Path) -> None:
    """Names that come back after all have been stopped in between, or killed."""
    with two(tmp_path) as nodes:
        await asyncio.to_thread(make_and_drop, nodes.primary, "1.db", "2.db", "3.db")
        forget_old(nodes.primary)
        Application(nodes.primary, "4.db")
        for _ in range(2):
            async with nodes.running():
                await nodes.until(lambda: elected(nodes.replica) == elected(nodes.primary))
            nodes.crash_replica()
        Application(nodes.primary, "2.db").insert(100)
        async with nodes.running():
            await nodes.until_equal()
            assert nodes.replica.find("2.db").position.txid == 4
            await nodes.hush()


async def test_a_name_that_came_back_and_was_lost_is_given_back(tmp_path: Path) -> None:
    """By a power cut of the primary, which takes all that is newer than the tombstone; the replica has it."""
    with two(tmp_path) as nodes:
        await asyncio.to_thread(make_and_drop, nodes.primary, "a.db")
        forget_old(nodes.primary)
        async with nodes.running():
            await nodes.until(lambda: elected(nodes.replica) == elected(nodes.primary))
            app = Application(nodes.primary, "a.db")
            app.insert(300)
            await nodes.until_equal()
        head, left = app.database.position, rows_of(nodes.primary, tmp_path)
        assert head.txid == 4
        nodes.primary.close(clean=False)
        shutil.rmtree(tmp_path / "primary" / "dbs" / "a.db")
        (tmp_path / "primary" / "boot").write_text("another boot of the machine\n")
        nodes.primary = open_store(tmp_path / "primary", is_primary=True)
        recovery = RecoveryWait({*nodes.primary.all_names(), *nodes.primary.tombstones()}, 10.0)
        async with nodes.running(recovery):
            await recovery.wait()
            await asyncio.to_thread(nodes.primary.worker.submit(nodes.primary.settle).result)
            assert nodes.primary.find("a.db").position.is_at(head)
            await nodes.until_equal()
        assert rows_of(nodes.primary, tmp_path) == left and branches(nodes.replica.data_dir) == []
