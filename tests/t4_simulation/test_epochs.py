"""Epochs between two nodes: an older primary does not count, and no transaction is dropped without a trace."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_engine import CLUSTER, PAGE, FakeDatabase, FakeStore, page
from pair import Pair

from pylitefs.cluster import tail
from pylitefs.formats.ltx.decoder import decode
from pylitefs.formats.ltx.format import Position
from pylitefs.formats.stream_fields import MAX_CHUNK


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path)
    yield made
    made.close()


# --- who may follow whom ----------------------------------------------------------------------------------------------


async def test_an_older_primary_is_refused_and_told(pair: Pair) -> None:
    async with pair.running(epoch=5):
        pair.write("a.db", 2)
        await pair.until_equal()
    assert pair.replica.noted_epoch == 5
    before = pair.replica.contents()
    pair.write("a.db", 2)
    async with pair.running(epoch=4):
        await pair.until(lambda: len(pair.newer_epochs) > 2)
        assert set(pair.newer_epochs) == {5}
        assert "epoch 5 has begun" in pair.follower.state.problem
    assert pair.replica.contents() == before


async def test_a_replica_whose_position_is_of_a_later_epoch_is_not_touched(pair: Pair) -> None:
    """It has forgotten which epoch it followed, but its log says it."""
    async with pair.running(epoch=5):
        pair.write("a.db", 2)
        await pair.until_equal()
    pair.replica.noted_epoch = 0
    before = pair.replica.contents()
    async with pair.running(epoch=4):
        await pair.until(lambda: 5 in pair.newer_epochs)
    assert pair.replica.contents() == before


async def test_the_epoch_is_kept_before_anything_of_it_is_applied(pair: Pair) -> None:
    broken = True

    def fault(what: str) -> None:
        if broken and what == "epoch":
            raise OSError(errno.ENOSPC, "No space left on device")

    pair.replica.fault = fault
    pair.write("a.db", 2)
    async with pair.running(epoch=7):
        await pair.until(lambda: "No space left" in pair.follower.state.problem)
        assert not pair.replica.contents() and not pair.follower.state.connected
        broken = False
        await pair.until_equal()
        assert pair.replica.noted_epoch == 7 == pair.follower.epoch


async def test_a_session_ends_when_the_epoch_rises_on_the_primary(pair: Pair) -> None:
    async with pair.running(epoch=2):
        pair.write("a.db", 2)
        await pair.until_equal()
        pair.primary.epoch = pair.replicas.epoch = 3
        await pair.until(lambda: pair.follower.state.epoch == 3 and pair.follower.state.connected)
        pair.write("a.db", 2)
        await pair.until_equal()
    assert len(pair.wires) == 2 and pair.replica.noted_epoch == 3
    assert [position.epoch for position in pair.replica.databases["a.db"].log.positions(9)] == [3, 3, 2, 2] or (
        pair.replica.databases["a.db"].epoch == 3
    )


async def test_a_session_ends_when_the_replica_learns_of_a_later_epoch(pair: Pair) -> None:
    async with pair.running(epoch=2):
        pair.write("a.db", 2)
        await pair.until_equal()
        before = pair.replica.contents()
        pair.follower.saw_epoch(3)
        pair.write("a.db", 1)
        await pair.until(lambda: 3 in pair.newer_epochs)
        assert pair.replica.contents() == before
        pair.primary.epoch = pair.replicas.epoch = 3
        await pair.until_equal()


async def test_a_session_that_is_cancelled_while_it_ends_is_ended_nevertheless(pair: Pair) -> None:
    """As when a replica takes the lease: it learns of the new epoch, and at once follows nobody any more."""
    async with pair.running(epoch=2):
        pair.write("a.db", 2)
        await pair.until_equal()
        pair.follower.saw_epoch(3)
        await asyncio.sleep(0)  # it has begun to end
        await asyncio.sleep(0)
        pair.following.cancel()
        await asyncio.gather(pair.following, return_exceptions=True)
        assert pair.wires[-1].broken is not None, "the connection is left open"


async def test_a_transaction_of_a_later_epoch_than_the_session_is_not_applied(pair: Pair) -> None:
    async with pair.running(epoch=2):
        pair.write("a.db", 1)
        await pair.until_equal()
        pair.primary.epoch = 9  # it writes with an epoch that it has not told its replicas of
        pair.write("a.db", 1)
        await pair.until(lambda: len(pair.wires) > 1)
        assert pair.replica.databases["a.db"].position.txid == 1


async def test_a_new_primary_with_the_same_content_is_followed_without_a_resync(pair: Pair) -> None:
    async with pair.running(epoch=2):
        pair.write("a.db", 5)
        await pair.until_equal()
    change_places(pair)
    async with pair.running(epoch=3):
        await pair.until(pair.follower.ready.is_set)
        pair.write("a.db", 1)
        await pair.until_equal()
    assert pair.primary.resyncs == pair.replica.resyncs == 0
    assert pair.replica.databases["a.db"].log.epochs() == ((2, 1), (3, 6))


def change_places(pair: Pair) -> None:
    pair.primary, pair.replica = pair.replica, pair.primary
    pair.primary.is_primary, pair.replica.is_primary = True, False


# --- transactions that the primary has not ----------------------------------------------------------------------------


def lose_the_tail(pair: Pair, count: int, **change: object) -> FakeDatabase:
    """The primary wrote `count` transactions that nobody got, and is a replica now."""
    for _ in range(count):
        pair.primary.databases["a.db"].write({1: page(pair.rng, **change)})  # type: ignore[arg-type]
    left = pair.primary.databases["a.db"]
    change_places(pair)
    return left


async def test_a_former_primary_gives_what_nobody_else_has(pair: Pair) -> None:
    async with pair.running(epoch=2):
        pair.write("a.db", 3)
        await pair.until_equal()
    left = lose_the_tail(pair, 4)
    head = left.position
    async with pair.running(epoch=3):
        await pair.until_equal()
        assert pair.primary.databases["a.db"].position == head
        assert pair.primary.databases["a.db"].epoch == 2, "the giver's epoch"
        pair.write("a.db", 1)
        await pair.until_equal()
    assert left.lost == [] and pair.replica.resyncs == 0
    assert not list(Path(pair.primary.data_dir).glob("give-back-*"))


@pytest.mark.parametrize("reason", ["files", "bytes", "busy"])
async def test_what_the_primary_does_not_take_is_kept(pair: Pair, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    async with pair.running(epoch=2):
        pair.write("a.db", 3)
        await pair.until_equal()
    left = lose_the_tail(pair, 4)
    if reason == "bytes":
        monkeypatch.setattr("pylitefs.cluster.feed.LIMIT_BYTES", 100)
    elif reason == "files":
        monkeypatch.setattr(tail, "LIMIT_FILES", 2)
    else:
        monkeypatch.setattr("pylitefs.cluster.feed.BUSY_PAUSE_S", 0.01)
        monkeypatch.setattr(pair.primary, "demote_database", lambda name, timeout_s: False)
    async with pair.running(epoch=3):
        await pair.until_equal(40)
        assert pair.primary.databases["a.db"].position.txid == 3
    assert left.lost == [(4, 4), (5, 5), (6, 6), (7, 7)]


async def test_a_large_transaction_is_given_too(pair: Pair) -> None:
    async with pair.running(epoch=2):
        pair.write("a.db", 3)
        await pair.until_equal()
    top = 2 * MAX_CHUNK // PAGE
    pair.primary.databases["a.db"].write({n: page(pair.rng, noise=True) for n in range(1, top)})
    left = lose_the_tail(pair, 1)
    head = left.position
    async with pair.running(epoch=3):
        await pair.until_equal()
    assert pair.primary.databases["a.db"].position == head and left.lost == []


async def test_a_branch_of_an_epoch_that_is_over_is_kept_although_it_is_longer(pair: Pair) -> None:
    async with pair.running(epoch=2):
        pair.write("a.db", 3)
        await pair.until_equal()
    left = lose_the_tail(pair, 4)
    async with pair.running(epoch=3):
        pair.write("a.db", 1)  # before the replica could say a word
        await pair.until_equal()
        assert pair.primary.databases["a.db"].position.txid == 4
    assert left.lost == [(4, 4), (5, 5), (6, 6), (7, 7)]


async def test_a_branch_is_kept_where_the_log_no_longer_reaches_back(pair: Pair) -> None:
    async with pair.running(epoch=2):
        pair.write("a.db", 3)
        await pair.until_equal()
    left = lose_the_tail(pair, 2)
    pair.primary.epoch = 3
    pair.write("a.db", 9)
    pair.primary.databases["a.db"].forget_log()
    async with pair.running(epoch=3):
        await pair.until_equal()
    assert left.lost == [(4, 4), (5, 5)]
    change_places(pair)
    change_places(pair)
    pair.write("a.db", 9)
    pair.primary.databases["a.db"].forget_log()
    async with pair.running(epoch=3):
        await pair.until_equal()
    assert left.lost == [(4, 4), (5, 5)], "merely old now"


@pytest.mark.parametrize("seed", range(5))
async def test_giving_back_to_a_primary_that_is_being_written(pair: Pair, seed: int) -> None:
    """Either the tail gets in before the writers, or it is kept; a write of the application is never lost."""
    pair.rng.seed(seed)
    async with pair.running(epoch=2):
        pair.write("a.db", 3)
        await pair.until_equal()
    left = lose_the_tail(pair, 3)
    tail_pages = [decode(Path(e.path).read_bytes()).pages for e in left.log.entries()[-3:]]
    target, stop, written = pair.primary.databases["a.db"], asyncio.Event(), []

    def write() -> None:
        number = 20 + len(written)
        data = page(pair.rng)
        size = max(number, target.commit)
        target.write({n: page(pair.rng) for n in range(target.commit + 1, number)} | {number: data}, size)
        written.append((number, data))

    async def writers() -> None:
        while not stop.is_set():
            await asyncio.sleep(pair.rng.choice([0, 0.0005, 0.01, 0.05]))
            await asyncio.to_thread(write)

    async with pair.running(epoch=3):
        await asyncio.sleep(pair.rng.choice([0, 0.002, 0.01]))
        writing = asyncio.ensure_future(writers())
        await pair.until(lambda: len(written) > 20)
        stop.set()
        await writing
        await pair.until_equal()
    assert all(target.pages[number] == data for number, data in written)
    given = [decode(Path(e.path).read_bytes()).pages for e in target.log.entries()]
    assert (left.lost == []) == (tail_pages[0] in given) or left.lost == [(4, 4), (5, 5), (6, 6)]
    assert left.lost or all(pages in given for pages in tail_pages)


# --- nothing is dropped without a trace -------------------------------------------------------------------------------


class Turns:
    """Two nodes that take turns as the primary. Each transaction adds a page with a number that is never used again, so
    what a database holds says which transactions led to it. These pages are made to collide: the checksum of pages with
    the numbers 12 and 15 is that of pages with 13 and 14."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.pair = Pair(folder, seed)
        self.pair.replica.cluster_id = CLUSTER
        self.rng = random.Random(seed)
        self.epoch = 1
        self.written: set[bytes] = set()

    def write(self, count: int) -> None:
        for _ in range(count):
            data = len(self.written).to_bytes(4, "big") * (PAGE // 4)
            self.written.add(data)
            database = self.pair.primary.get_or_create("a.db")
            database.write({database.commit + 1: data})

    async def turn(self) -> None:
        """A term of office: writes before, while and after a replica is connected; the last of them nobody gets."""
        rng, pair = self.rng, self.pair
        if rng.random() < 0.6:
            change_places(pair)
        self.epoch += rng.choice([1, 1, 2])
        pair.primary.epoch = self.epoch
        pair.primary.note_epoch(self.epoch)
        if rng.random() < 0.5:
            self.write(rng.randrange(4))
        if rng.random() < 0.8:
            pair.unreachable = False
            async with pair.running(epoch=self.epoch):
                if rng.random() < 0.8:
                    await pair.until_equal()
                    self.write(rng.randrange(3))
                if rng.random() < 0.5:
                    await pair.until_equal()
        pair.primary.epoch = self.epoch
        self.write(rng.randrange(4))
        if rng.random() < 0.3 and pair.primary.get("a.db") is not None:
            pair.primary.databases["a.db"].forget_log()

    def found(self) -> set[bytes]:
        pages: set[bytes] = set(self.pair.primary.databases["a.db"].pages.values())
        for store in (self.pair.primary, self.pair.replica):
            pages |= store.databases["a.db"].kept_pages
            for path in Path(store.data_dir).glob("*/lost/*/*.ltx"):
                pages.update(data for _, data in decode(path.read_bytes()).pages)
        return pages


@pytest.mark.parametrize("seed", range(25))
async def test_every_transaction_is_with_the_primary_or_in_lost(tmp_path: Path, seed: int) -> None:
    turns = Turns(tmp_path, seed)
    try:
        turns.write(2)
        async with turns.pair.running(epoch=1):
            await turns.pair.until_equal()
        for _ in range(8):
            await turns.turn()
        turns.epoch += 1
        async with turns.pair.running(epoch=turns.epoch):
            await turns.pair.until_equal()
        assert turns.written <= turns.found()
        assert turns.pair.primary.databases["a.db"].log.passed(turns.pair.replica.databases["a.db"].position)
    finally:
        turns.pair.close()


def test_a_position_says_which_epoch_it_is_of(tmp_path: Path) -> None:
    store = FakeStore(tmp_path / "node", is_primary=True)
    try:
        store.epoch = 4
        database = store.get_or_create("a.db")
        database.write({1: bytes(PAGE)})
        assert database.epoch == database.position.epoch == 4
        again = store.reopened()
        assert again.databases["a.db"].log.head.epoch == 4 and again.databases["a.db"].log.epochs() == ((4, 1),)
        again.close()
        assert Position(1, 2, 3) == Position(1, 2, 4) and not Position(1, 2, 3).is_at(Position(1, 2, 4))
    finally:
        store.close()
