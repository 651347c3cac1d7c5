"""Replication and HALT locks, with something else between any two of their steps: after the last write, with nobody
asking, both nodes are at the same position within a second."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

from memory_link import Wire
from pair import Pair
from test_halt import World, world

from harness.interleaver import Steps, sweep
from pylitefs.cluster import acks, applier, feed, hold, primary, replica, sync_gate
from pylitefs.cluster.sync_gate import SyncGate, SyncRules, log_heads
from pylitefs.events import Event

LIVE_S = 1.0
LOADED_S = 10.0  # a machine under load may take so long; what is lost is never found


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


async def until(condition: Callable[[], object], otherwise: str) -> None:
    try:
        async with asyncio.timeout(LOADED_S):
            while not condition():
                await asyncio.sleep(0.001)
    except TimeoutError:
        raise AssertionError(otherwise) from None


def scenario(run: Callable[[Steps, Path], Coroutine[Any, Any, None]]) -> Callable[[Steps], None]:
    def call(steps: Steps) -> None:
        with folder() as path:
            asyncio.run(run(steps, path))

    return call


# -- a HALT lock ------------------------------------------------------------------------------------------------------


def committer(w: World) -> Callable[[], None]:
    """An application on the holder, synchronous=NORMAL, for as long as it may write."""
    values = itertools.count(50)

    def commit() -> None:
        if w.theirs.holds and w.theirs.loan is not None:
            w.commit(2, next(values) % 200)

    return commit


@scenario
async def a_full_commit_under_the_lock(steps: Steps, path: Path) -> None:
    async with world(path, ttl_s=30.0) as w:
        opening = await w.open()
        steps.actions(committer(w), committer(w))
        with steps.here():
            await w.fsync(w.commit(1, 9))
            await until(lambda: w.ours.position == w.theirs.position, "the primary never gets it")
        steps.finish()
        await until(lambda: w.ours.position == w.theirs.position, "the primary never gets the last commit")
        assert w.ours.pages == w.theirs.pages
        assert w.halting.held() == ["app"] and not w.reconnected, "the lock was lost"
        await w.close(opening)


@scenario
async def the_lock_is_given_back(steps: Steps, path: Path) -> None:
    async with world(path, ttl_s=30.0) as w:
        opening = await w.open()
        w.commit(1, 9)
        steps.actions(committer(w), committer(w))
        with steps.here():
            await w.close(opening)
        steps.finish()
        assert w.ours.position == w.theirs.position and w.ours.pages == w.theirs.pages
        assert not w.theirs.captures and not w.reconnected
        await until(lambda: w.ours.captures, "the primary's applications are never let in")


def test_a_commit_between_any_two_steps_of_a_lock_that_is_held() -> None:
    assert sweep(a_full_commit_under_the_lock, [hold], pairs=40) > 20


def test_a_commit_between_any_two_steps_of_giving_a_lock_back() -> None:
    assert sweep(the_lock_is_given_back, [hold], pairs=40) > 40


# -- replication, with commits that wait for the replica --------------------------------------------------------------


@contextlib.asynccontextmanager
async def replicating(path: Path) -> AsyncIterator[tuple[Pair, SyncGate]]:
    pair = Pair(path)

    async def change(nodes: frozenset[int]) -> None: ...

    gate = SyncGate(SyncRules(1, take_in_s=0.1), lambda: log_heads(pair.primary), change, frozenset())
    keeping = asyncio.ensure_future(gate.run())
    make = pair.next_wire

    def next_wire() -> Wire:
        pair.replicas.gate = gate
        return make()

    pair.next_wire = next_wire
    try:
        pair.write("a.db", 1)
        async with pair.running():
            yield pair, gate
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        pair.close()


def committed(
    pair: Pair, gate: SyncGate, name: str, loop: asyncio.AbstractEventLoop | None = None
) -> asyncio.Future[None]:
    """A FULL commit; done when it is answered. `loop`: from another thread than that of this loop."""
    loop = loop or asyncio.get_running_loop()
    answered: asyncio.Future[None] = loop.create_future()
    txid = pair.write(name).position.txid

    def told(error: BaseException | None) -> None:
        if not answered.done():
            answered.set_result(None) if error is None else answered.set_exception(error)

    def then(error: BaseException | None) -> None:
        loop.call_soon_threadsafe(told, error)

    threading.Thread(target=gate.wait, args=(name, txid, then)).start()  # the loop may be holding the gate's lock
    return answered


async def agreed(pair: Pair, answers: list[asyncio.Future[None]]) -> None:
    await until(pair.equal, "the replica never gets the last commit")
    await until(lambda: all(answer.done() for answer in answers), "a commit is never answered")
    assert [answer.exception() for answer in answers] == [None] * len(answers)


def commits(*names: str) -> Callable[[Steps], None]:
    """One is on its way while others are committed."""

    async def run(steps: Steps, path: Path) -> None:
        async with replicating(path) as (pair, gate):
            await until(lambda: pair.equal() and gate.in_sync, "it does not begin")
            answers: list[asyncio.Future[None]] = []
            steps.actions(*(lambda name=name: answers.append(committed(pair, gate, name)) for name in names))
            with steps.here():
                answers.append(committed(pair, gate, "a.db"))
                await agreed(pair, answers)
            steps.finish()
            await agreed(pair, answers)

    return scenario(run)


def applies(*what: str) -> Callable[[Steps], None]:
    """The replica's worker takes a transaction over; meanwhile others are committed, or the link is cut ("")."""

    async def run(steps: Steps, path: Path) -> None:
        async with replicating(path) as (pair, gate):
            await until(lambda: pair.equal() and gate.in_sync, "it does not begin")
            loop, answers = asyncio.get_running_loop(), list[asyncio.Future[None]]()

            def act(name: str) -> None:
                if name:
                    answers.append(committed(pair, gate, name, loop))
                else:
                    loop.call_soon_threadsafe(pair.wires[-1].cut, "gone")

            steps.actions(*(lambda name=name: act(name) for name in what))
            with steps.on_worker(pair.replica.worker):
                answers.append(committed(pair, gate, "a.db"))
                await agreed(pair, answers)
            steps.finish()
            await agreed(pair, answers)

    return scenario(run)


def connection_ends(steps: Steps) -> None:
    """The link is cut, and a commit follows."""

    async def run(steps: Steps, path: Path) -> None:
        async with replicating(path) as (pair, gate):
            await until(lambda: pair.equal() and gate.in_sync, "it does not begin")
            answers: list[asyncio.Future[None]] = []
            steps.actions(
                lambda: pair.wires[-1].cut("gone"), lambda: answers.append(committed(pair, gate, "a.db"))
            )
            with steps.here():
                answers.append(committed(pair, gate, "a.db"))
                await agreed(pair, answers)
            steps.finish()
            await agreed(pair, answers)

    scenario(run)(steps)


def released(steps: Steps) -> None:
    """A database that was set aside is released, with nothing written to it afterwards."""

    async def run(steps: Steps, path: Path) -> None:
        async with replicating(path) as (pair, gate):
            await until(lambda: pair.equal() and gate.in_sync, "it does not begin")
            database = pair.primary.databases["a.db"]
            database.set_aside_reason = "busy"
            pair.write("a.db", 1)

            def release() -> None:
                database.set_aside_reason = None
                pair.primary.events.emit(Event("recovered", "a.db", {"outcome": "released"}))

            steps.actions(release)
            answers: list[asyncio.Future[None]] = []
            with steps.here():
                answers.append(committed(pair, gate, "b.db"))
                await until(lambda: all(answer.done() for answer in answers), "one database holds up the other")
            steps.finish()
            await agreed(pair, answers)

    scenario(run)(steps)


def test_a_commit_between_any_two_steps_of_a_feed_and_the_gate() -> None:
    assert sweep(commits("a.db"), [feed, sync_gate], pairs=0) > 20


def test_a_new_database_between_any_two_steps_of_a_feed_and_the_gate() -> None:
    assert sweep(commits("b.db", "a.db"), [feed, sync_gate], pairs=30) > 20


def test_a_commit_between_any_two_steps_of_the_replica() -> None:
    assert sweep(commits("a.db"), [acks, replica]) > 40


def test_a_commit_between_any_two_steps_of_the_applier() -> None:
    assert sweep(applies("a.db", "b.db"), [applier, acks], pairs=20) > 20


def test_the_end_of_a_connection_between_any_two_steps_of_the_applier() -> None:
    assert sweep(applies("", "a.db"), [applier, acks], pairs=20) > 20


def test_a_release_between_any_two_steps_of_a_feed_and_the_gate() -> None:
    assert sweep(released, [primary, feed, sync_gate]) > 20


def test_the_end_of_a_connection_between_any_two_steps() -> None:
    assert sweep(connection_ends, [feed, sync_gate], pairs=20) > 20
