"""HALT locks: the primary's half and the holder's, joined by a wire that loses answers, repeats and is cut."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO, Any, Literal

import pytest
from fake_engine import PAGE, FakeDatabase, FakeStore
from pair import Pair

from pylitefs.cluster.control import HaltLock
from pylitefs.cluster.halting import Halting, Opening
from pylitefs.cluster.halts import HaltLocks
from pylitefs.cluster.hold import Gate
from pylitefs.engine.fence import Fence
from pylitefs.engine.loan import Loan
from pylitefs.engine.ltx_log import LtxLog
from pylitefs.errors import DatabaseBusy, DatabaseNotFound, FormatError, Ineligible, NotPrimary, Unavailable
from pylitefs.events import Event
from pylitefs.formats.ltx.format import Position

HOLDER, OTHER = 7, 8
NAME = "app"
TTL_S, WAIT_S = 0.6, 0.4


class HaltDatabase(FakeDatabase):
    holds = False

    @property
    def captures(self) -> bool:
        return self.holds or (self.store.is_primary and not self.demoted)


class HaltStore(FakeStore):
    gate = None

    def __init__(self, data_dir: Path, *, is_primary: bool) -> None:
        super().__init__(data_dir, is_primary=is_primary)
        self.fence = Fence(math.inf)
        self.open_transaction = threading.Event()

    def get_or_create(self, name: str) -> HaltDatabase:
        if name not in self.databases:
            self.databases[name] = HaltDatabase(self, name)
        database = self.databases[name]
        assert isinstance(database, HaltDatabase)
        return database

    def promote_database(self, name: str, fence: Fence | None = None) -> None:
        database = self.get_or_create(name)
        database.demoted, database.holds = False, fence is not None

    def demote_database(self, name: str, timeout_s: float) -> bool:
        if self.open_transaction.is_set():
            return False
        database = self.get_or_create(name)
        database.demoted, database.holds = True, False
        self.worker.submit(lambda: None).result()
        return True


class Wire:
    """The holder's way to the primary. `lose`: how likely an answer is lost, or a request; `cut`: all are."""

    def __init__(self, halts: HaltLocks, rng: random.Random | None = None, lose: float = 0.0) -> None:
        self.halts, self.rng, self.lose, self.cut = halts, rng or random.Random(1), lose, False
        self.sent: list[str] = []

    async def _over(self, what: str, call: Any) -> Any:
        self.sent.append(what)
        if self.cut or self.rng.random() < self.lose / 2:
            raise Unavailable("the request was lost")
        answer = await call()
        if self.rng.random() < self.lose / 2:
            await call()  # it was sent again by something on the way
        if self.cut or self.rng.random() < self.lose:
            raise Unavailable("the answer was lost")
        return answer

    async def halt(self, url: str, name: str, lock_id: int, timeout_s: float) -> HaltLock:
        return await self._over("halt", lambda: self.halts.acquire(name, lock_id, HOLDER))

    async def renew(self, url: str, name: str, lock_id: int, epoch: int, timeout_s: float) -> HaltLock:
        return await self._over("renew", lambda: self.halts.renew(name, lock_id))

    async def release(self, url: str, name: str, lock_id: int, timeout_s: float) -> None:
        await self._over("release", lambda: self.halts.release(name, lock_id))

    async def transaction(
        self, url: str, name: str, lock_id: int, epoch: int, data: bytes | IO[bytes], timeout_s: float
    ) -> Position:
        whole = data if isinstance(data, bytes) else data.read()
        return await self._over("tx", lambda: self.halts.transaction(name, lock_id, epoch, whole))


class World:
    def __init__(self, folder: Path, *, lose: float = 0.0, seed: int = 1, ttl_s: float = TTL_S) -> None:
        self.primary = HaltStore(folder / "primary", is_primary=True)
        self.replica = HaltStore(folder / "replica", is_primary=False)
        self.halts = HaltLocks(self.primary, ttl_s=ttl_s, wait_s=WAIT_S)
        self.wire = Wire(self.halts, random.Random(seed), lose)
        self.url = "http://primary"
        self.reconnected = 0
        self.halting = Halting(self.replica, self.wire, lambda: self.url, self._reconnect, ttl_s=ttl_s, open_s=2.0)
        for number in (1, 2):
            self.ours.write({number: bytes([number]) * PAGE})
        self.feed()

    def _reconnect(self) -> None:
        self.reconnected += 1

    @property
    def ours(self) -> HaltDatabase:
        return self.primary.get_or_create(NAME)

    @property
    def theirs(self) -> HaltDatabase:
        return self.replica.get_or_create(NAME)

    def feed(self) -> None:
        """What the primary has, to the replica."""
        while (entry := self.ours.log.after(self.theirs.position.txid)) is not None:
            data = Path(entry.path).read_bytes()
            self.replica.worker.submit(self.theirs.apply, data).result()

    async def open(self) -> Opening:
        opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def then(error: BaseException | None) -> None:
            opened.set_result(None) if error is None else opened.set_exception(error)

        opening = self.halting.open(NAME, then)
        await opened
        return opening

    async def close(self, opening: Opening, *, last: bool = True) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        opening.flush(last, lambda error: done.set_result(None) if error is None else done.set_exception(error))
        try:
            await done
        finally:
            if last:
                opening.release()

    def commit(self, number: int, value: int) -> Position:
        """An application on the replica, synchronous=NORMAL."""
        assert self.theirs.holds and self.theirs.loan is not None
        before, self.replica.epoch = self.replica.epoch, self.theirs.loan.epoch
        try:
            return self.theirs.write({number: bytes([value]) * PAGE})
        finally:
            self.replica.epoch = before

    async def fsync(self, position: Position) -> None:
        """The same, synchronous=FULL: returns when it may be acknowledged."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def then(error: BaseException | None) -> None:
            done.set_result(None) if error is None else done.set_exception(error)

        assert self.theirs.loan is not None
        self.theirs.loan.gate.wait(NAME, position.txid, then)
        await done


@contextlib.asynccontextmanager
async def world(folder: Path, **how: Any) -> AsyncIterator[World]:
    made = World(folder, **how)
    try:
        yield made
    finally:
        made.wire.cut = True
        await made.halting.end_all("the test is over")
        await made.halting.close()
        await made.halts.end_all("the test is over")
        made.primary.close()
        made.replica.close()


async def test_what_is_written_under_the_lock_is_on_the_primary(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        opening = await w.open()
        assert not w.ours.captures and w.theirs.captures and w.halting.held() == [NAME]
        for value in range(10, 20):
            await w.fsync(w.commit(1, value))
            assert w.ours.position == w.theirs.position and w.ours.pages[1] == bytes([value]) * PAGE
        for value in range(20, 60):
            w.commit(2, value)
        await w.close(opening)
        assert w.ours.position == w.theirs.position and w.ours.pages == w.theirs.pages
        assert w.ours.captures and not w.theirs.captures and w.theirs.loan is None
        assert w.halts.holders() == {}


async def test_a_copy_that_is_the_same_by_its_checksum_only_is_not_written_to(tmp_path: Path) -> None:
    """Two histories may come to one checksum: the epoch tells that they parted. It is waited for the primary's."""
    async with world(tmp_path) as w:
        right = w.theirs.position
        w.theirs.position = Position(right.txid, right.checksum, right.epoch + 1)
        opening = asyncio.ensure_future(w.open())
        while "halt" not in w.wire.sent:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        assert not opening.done() and not w.theirs.captures
        w.theirs.position = right
        w.replica.events.emit(Event("tx", NAME, {}))
        await w.close(await opening)


@pytest.mark.parametrize("seed", range(8))
async def test_lost_answers_and_repeated_requests_change_nothing(tmp_path: Path, seed: int) -> None:
    async with world(tmp_path, lose=0.3, seed=seed, ttl_s=20.0) as w:
        opening = await w.open()
        for value in range(10, 30):
            await w.fsync(w.commit(1 + value % 2, value))
            assert w.ours.position == w.theirs.position
        await w.close(opening)
        assert [e.max_txid for e in w.ours.log.entries()] == list(range(1, 23))
        assert w.ours.pages == w.theirs.pages and not w.reconnected


async def test_all_opens_share_one_lock_and_the_last_close_ends_it(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        first, second = await asyncio.gather(w.open(), w.open())
        assert w.wire.sent.count("halt") == 1
        w.commit(1, 9)
        await w.close(first)
        assert w.halts.holders() == {NAME: HOLDER} and w.ours.position == w.theirs.position
        w.commit(1, 10)
        await w.close(second)
        assert w.halts.holders() == {} and w.ours.pages[1] == bytes([10]) * PAGE


async def test_a_descriptor_that_is_not_the_last_ends_nothing(tmp_path: Path) -> None:
    """A child of the holder closes what it has inherited."""
    async with world(tmp_path) as w:
        opening = await w.open()
        await w.close(opening, last=False)
        await w.fsync(w.commit(1, 9))
        await w.close(opening)
        assert w.halts.holders() == {}


async def test_it_is_renewed_while_it_is_held(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        opening = await w.open()
        while w.wire.sent.count("renew") < 6:  # twice its time
            await asyncio.sleep(0.01)
        await w.fsync(w.commit(1, 9))
        await w.close(opening)
        assert not w.reconnected


async def test_a_partition_ends_it_on_both_sides(tmp_path: Path) -> None:
    """Nothing is acknowledged that the primary has not; it lets its own applications in again."""
    async with world(tmp_path) as w:
        opening = await w.open()
        await w.fsync(w.commit(1, 9))
        w.wire.cut = True
        position = w.commit(1, 66)
        with pytest.raises(OSError):
            await w.fsync(position)
        with pytest.raises(OSError):
            await w.close(opening)
        while w.halts.holders():
            await asyncio.sleep(0.01)
        w.ours.write({1: b"p" * PAGE})
        while not w.reconnected:
            await asyncio.sleep(0.01)
        assert not w.theirs.captures and w.theirs.position != w.ours.position
        w.wire.cut = False
        assert any(event.type == "haltLost" for event in w.replica.seen)


async def test_an_answer_that_was_lost_for_good_is_not_applied_twice(tmp_path: Path) -> None:
    """The primary has it, the holder does not know."""
    async with world(tmp_path) as w:
        await w.open()
        w.wire.lose = 2.0  # every answer
        w.wire.rng = random.Random(0)
        position = w.commit(1, 9)
        with pytest.raises(OSError):
            await w.fsync(position)
        assert w.ours.position in (position, Position(2, w.ours.position.checksum))


async def test_what_was_lost_is_refused_by_the_primary(tmp_path: Path) -> None:
    async with world(tmp_path, ttl_s=20.0) as w:
        lock = await w.halts.acquire(NAME, 5, HOLDER)
        w.theirs.loan = Loan(lock.epoch, Gate(NAME, lock.position))
        w.replica.promote_database(NAME, Fence(math.inf))
        w.commit(1, 9)
        data = Path(w.theirs.log.entries()[-1].path).read_bytes()
        for lock_id, epoch in ((6, lock.epoch), (5, lock.epoch + 1)):
            with pytest.raises(Ineligible):
                await w.halts.transaction(NAME, lock_id, epoch, data)
        with pytest.raises(FormatError):  # a transaction of another epoch than its lock
            w.theirs.loan = Loan(3, w.theirs.loan.gate)
            w.commit(1, 10)
            await w.halts.transaction(NAME, 5, lock.epoch, Path(w.theirs.log.entries()[-1].path).read_bytes())
        w.primary.fence.until_s = 0.0
        with pytest.raises(NotPrimary):
            await w.halts.transaction(NAME, 5, lock.epoch, data)
        w.primary.fence.until_s = math.inf
        await w.halts.release(NAME, 5)
        with pytest.raises(Ineligible):
            await w.halts.transaction(NAME, 5, lock.epoch, data)
        with pytest.raises(Ineligible):
            await w.halts.renew(NAME, 5)
        assert w.ours.position.txid == 2
        w.theirs.holds = False


async def test_the_order_of_those_who_wait(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.halts.acquire(NAME, 1, HOLDER)
        second = asyncio.ensure_future(w.halts.acquire(NAME, 2, OTHER))
        third = asyncio.ensure_future(w.halts.acquire(NAME, 3, HOLDER))
        again = asyncio.ensure_future(w.halts.acquire(NAME, 2, OTHER))
        await asyncio.sleep(0.05)
        assert not second.done()
        await w.halts.release(NAME, 1)
        assert await second == await again or (await second).id == 2
        with pytest.raises(DatabaseBusy):
            await third
        with pytest.raises(DatabaseNotFound):
            await w.halts.acquire("none", 4, OTHER)
        assert w.halts.holders() == {NAME: OTHER}


async def test_who_does_not_wait_any_more_does_not_get_it(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.halts.acquire(NAME, 1, HOLDER)
        second = asyncio.ensure_future(w.halts.acquire(NAME, 2, OTHER))
        await asyncio.sleep(0.02)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        await w.halts.release(NAME, 1)
        assert w.halts.holders() == {} and w.ours.captures
        await w.halts.acquire(NAME, 3, OTHER)


async def test_an_open_transaction_on_the_primary(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        w.primary.open_transaction.set()
        with pytest.raises(DatabaseBusy):
            await w.halts.acquire(NAME, 1, HOLDER)
        w.primary.open_transaction.clear()
        await w.halts.acquire(NAME, 2, HOLDER)


async def test_the_end_of_the_office_ends_all_locks(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        opening = await w.open()
        waiting = asyncio.ensure_future(w.halts.acquire(NAME, 9, OTHER))
        await asyncio.sleep(0.02)
        w.primary.is_primary = False
        await w.halts.end_all("demoted")
        with pytest.raises(Unavailable):
            await waiting
        position = w.commit(1, 9)
        with pytest.raises(OSError):
            await w.fsync(position)
        with pytest.raises(OSError):
            await w.close(opening)
        assert w.ours.position.txid == 2


async def test_a_switchover_knows_all_that_was_taken(tmp_path: Path) -> None:
    """While it looks for what the successor lacks nothing is acknowledged, and nobody is let in; then all goes on."""
    async with world(tmp_path, ttl_s=20.0) as w:
        opening = await w.open()
        async with w.halts.paused(1.0):
            at = w.ours.position
            waiting = asyncio.ensure_future(w.fsync(w.commit(1, 9)))
            taking = asyncio.ensure_future(w.halts.acquire(NAME, 9, OTHER))
            ending = asyncio.ensure_future(w.close(opening))
            await asyncio.sleep(0.1)
            assert w.ours.position == at and not w.ours.captures and not (waiting.done() or ending.done())
        await waiting
        await ending
        assert w.ours.pages[1] == bytes([9]) * PAGE and (await taking).position == w.ours.position
        ending = asyncio.ensure_future(w.halts.release(NAME, 9))
        async with w.halts.paused(1.0):
            await asyncio.sleep(0.1)
            assert not w.ours.captures
            w.primary.is_primary = False  # it was passed on
            await w.halts.end_all("demoted")
        await ending
        assert w.halts.holders() == {}


async def test_a_switchover_does_not_wait_for_a_long_transaction(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        release = threading.Event()
        w.primary.worker.post(release.wait)
        taking = asyncio.ensure_future(w.halts.acquire(NAME, 1, OTHER))
        await asyncio.sleep(0.05)
        with pytest.raises(Unavailable):
            async with w.halts.paused(0.05):
                raise AssertionError("the lock is being taken")
        release.set()
        await taking


async def test_another_primary_ends_it_at_once(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.open()
        w.wire.cut = True
        position = w.commit(1, 9)
        waiting = asyncio.ensure_future(w.fsync(position))
        await asyncio.sleep(0.02)
        await w.halting.end_all("another primary")
        with pytest.raises(OSError):
            await waiting
        assert w.halting.held() == [] and not w.theirs.captures


async def test_another_primary_while_it_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last close waits for the primary to have everything: that ends, and the loop is not kept busy by it."""
    waits: list[asyncio.Event] = []

    class Counted(asyncio.Event):
        async def wait(self) -> Literal[True]:
            waits.append(self)
            if len(waits) > 1000:
                raise RuntimeError("it would wait for ever for what is set")
            return await super().wait()

    monkeypatch.setattr(asyncio, "Event", Counted)
    async with world(tmp_path, ttl_s=20.0) as w:
        opening = await w.open()
        w.wire.cut = True
        w.commit(1, 9)
        closing = asyncio.ensure_future(w.close(opening))
        while w.theirs.captures:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        await w.halting.end_all("another primary")
        with pytest.raises(OSError):
            await closing
        assert w.halting.held() == [] and len(waits) < 100


async def test_an_open_is_interrupted_or_comes_too_late(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.halts.acquire(NAME, 1, OTHER)
        errors: list[BaseException | None] = []
        opening = w.halting.open(NAME, errors.append)
        await asyncio.sleep(0.05)
        opening.cancel()
        while not errors:
            await asyncio.sleep(0.01)
        assert isinstance(errors[0], InterruptedError)
        opening.release()
        await w.halts.release(NAME, 1)
        await asyncio.sleep(0.05)
        assert w.halts.holders() == {} and w.ours.captures
        w.url = ""
        with pytest.raises(OSError):
            await w.open()


async def test_a_replica_that_is_behind_waits_for_the_position(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        w.ours.write({2: b"n" * PAGE})
        opened = asyncio.ensure_future(w.open())
        await asyncio.sleep(0.1)
        assert not opened.done() and not w.theirs.captures
        w.feed()
        opening = await opened
        assert w.theirs.pages[2] == b"n" * PAGE
        await w.close(opening)


async def test_a_transaction_that_stays_open_keeps_the_lock(tmp_path: Path) -> None:
    """Nobody has the lock file open, but a process is in the middle of a transaction: it may still commit."""
    async with world(tmp_path, ttl_s=20.0) as w:
        opening = await w.open()
        w.replica.open_transaction.set()
        closing = asyncio.ensure_future(w.close(opening))
        await asyncio.sleep(0.2)
        assert w.halts.holders() == {NAME: HOLDER}
        w.commit(1, 9)
        w.replica.open_transaction.clear()
        await closing
        assert w.halts.holders() == {} and w.ours.pages[1] == bytes([9]) * PAGE


async def test_what_the_primary_may_not_have_is_told_apart(tmp_path: Path) -> None:
    """What a node claims to have ends with what the primary has confirmed, also after a restart."""
    async with world(tmp_path) as w:
        opening = await w.open()
        await w.fsync(w.commit(1, 9))
        agreed = w.theirs.position
        w.wire.cut = True
        w.commit(1, 66)
        assert w.theirs.log.shared() == agreed
        while not w.reconnected:
            await asyncio.sleep(0.01)
        with pytest.raises(OSError):
            await w.close(opening)
        assert w.theirs.position.txid == 4 and w.theirs.log.shared() == agreed
        again = LtxLog(w.theirs.log.folder)
        again.open(verify=True)
        assert again.head.txid == 4 and again.shared().txid <= agreed.txid
        Path(again.folder, "agreed").write_bytes(b"torn")
        again.open(verify=True)
        assert again.shared() == Position(0, 0)
        again.agreed.end()
        again.open(verify=True)
        assert again.shared() == again.head


async def test_after_a_lock_that_was_given_back_everything_is_shared(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        opening = await w.open()
        for value in range(9, 15):
            w.commit(1, value)
        await w.close(opening)
        assert w.theirs.log.agreed.position is None and not Path(w.theirs.log.folder, "agreed").exists()


@pytest.mark.parametrize("epoch", [1, 2])
async def test_a_holders_branch_is_kept_where_the_log_no_longer_reaches_back(tmp_path: Path, epoch: int) -> None:
    """The epoch does not tell it from what the primary has written meanwhile."""
    pair = Pair(tmp_path)
    async with pair.running(epoch=epoch):
        pair.write(NAME, 3)
        await pair.until_equal()
    holder = pair.replica.databases[NAME]
    holder.log.agreed.begin(epoch, holder.position)
    pair.replica.epoch = epoch
    for value in (1, 2):
        holder.write({1: bytes([value]) * PAGE})
    pair.write(NAME, 9)
    pair.primary.databases[NAME].forget_log()
    async with pair.running(epoch=epoch):
        await pair.until_equal()
    assert holder.lost == [(4, 4), (5, 5)] and holder.log.agreed.position is None
    pair.close()
