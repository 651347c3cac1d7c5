"""Renames of databases while a replica follows: what it holds, it holds under one name at every moment, as long as the
primary has it under any."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fake_engine import FakeStore, page
from memory_link import Wire
from pair import FAST, Pair
from test_interleaved_cluster import replicating, scenario, until

from harness.interleaver import Steps, sweep
from harness.liveness import silence
from pylitefs.cluster import feed, primary
from pylitefs.events import Event
from pylitefs.formats import stream

BIG = 120  # pages: more than a link takes at once
STRIDE = 1 if float(os.environ.get("PYLITEFS_TEST_SCALE", "1")) > 1 else 23


class Rows:
    """Each database that is made has rows of its own (its page 1), which stay when it is renamed or written to."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.held: set[bytes] = set()
        self.lacking: list[str] = []
        pair.replica.events.subscribe(self._look)

    def make(self, name: str, size: int = 3) -> None:
        database = self.pair.primary.get_or_create(name)
        noise = self.pair.rng.randbytes
        database.write({number: noise(512) for number in range(1, size + 1)})

    def write(self, name: str) -> None:
        def work() -> None:
            if database.commit:
                database._write({self.pair.rng.randint(2, database.commit): page(self.pair.rng)}, None)

        database = self.pair.primary.databases[name]
        self.pair.primary.worker.submit(work).result()

    def _look(self, event: Event) -> None:
        """On the replica's worker, right after anything has changed there."""
        if event.type not in ("tx", "resync"):
            return
        here, there = rows(self.pair.replica), rows(self.pair.primary)
        if missing := (self.held & set(there)) - set(here):
            names = sorted(there[one] for one in missing)
            self.lacking.append(f"{event.database} came to {event.data or event.type}: nothing has the rows of {names}")
        self.held |= set(here)


def rows(store: FakeStore) -> dict[bytes, str]:
    return {pages[1]: name for name, (_, pages) in store.contents().items() if pages}


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path)
    yield pair
    pair.close()


RENAMES = {
    "once": ["a.db b.db"],
    "there and back": ["a.db b.db", "b.db a.db"],
    "there and back and there": ["a.db b.db", "b.db a.db", "a.db b.db"],
    "one after the other": ["a.db b.db", "+a.db", "a.db c.db"],
    "exchanged": ["a.db c.db", "b.db a.db", "c.db b.db"],
    "three in a circle": ["a.db c.db", "b.db a.db", "x.db b.db", "c.db x.db"],
    "through a name": ["a.db c.db", "c.db d.db", "b.db c.db", "c.db e.db"],
}


def do(of: Rows, what: str) -> None:
    if what.startswith("+"):
        of.make(what[1:])
    else:
        of.pair.primary.rename(*what.split())


@pytest.mark.parametrize("away", ["follows", "is behind", "was away", "was away for long"])
@pytest.mark.parametrize("how", RENAMES)
async def test_a_replica_has_the_rows_under_one_name_at_every_moment(pair: Pair, how: str, away: str) -> None:
    of = Rows(pair)
    for name in ("a.db", "b.db", "x.db"):
        of.make(name, BIG)
    async with pair.running():
        await pair.until_equal()
        if away == "is behind":
            pair.wires[-1].ends[0].stalled = True
            await asyncio.to_thread(of.write, "a.db")
        if away in ("is behind", "follows"):
            for what in RENAMES[how]:
                await asyncio.to_thread(do, of, what)
            pair.wires[-1].ends[0].stalled = False
            pair.wires[-1].ends[0].wake()
            await pair.until_equal()
    if away.startswith("was"):
        for what in RENAMES[how]:
            do(of, what)
        if away.endswith("long"):
            for database in pair.primary.databases.values():
                database.forget_log()
        async with pair.running():
            await pair.until_equal()
    in_a_circle = how in ("exchanged", "three in a circle") and away == "was away for long"
    assert not of.lacking or in_a_circle, of.lacking


async def test_what_waits_for_another_name_does_not_wait_for_the_next_time_that_all_is_made_durable(
    pair: Pair,
) -> None:
    """That would be once for each step of an exchange. There is no next time here."""
    of = Rows(pair)
    for name in ("a.db", "b.db"):
        of.make(name)
    async with pair.running(timings=replace(FAST, durable_s=1e6)):
        await pair.until_equal()
        for _ in range(10):
            for what in RENAMES["exchanged"]:
                await asyncio.to_thread(do, of, what)
        await pair.until_equal()
    assert not of.lacking


async def test_a_copy_that_is_mended_waits_for_the_new_name_too(pair: Pair) -> None:
    """The replica cannot go on from the log: what differs is fetched, and by then the database was renamed."""
    of = Rows(pair)
    of.make("a.db", 20 * BIG)
    async with pair.running():
        await pair.until_equal()
        wire, damaged = pair.wires[-1], []

        def damage(data: bytes) -> bytes:
            if not damaged and isinstance(stream.unpack(data, stream.Sender.PRIMARY), stream.Ltx):
                damaged.append(1)
                wire.ends[1].stalled = True  # the request for what differs stays under way
                return data[:-20] + bytes(20)
            return data

        wire.change = damage
        of.write("a.db")
        await pair.until(lambda: wire.ends[1].inbox and damaged)
        do(of, "a.db b.db")
        wire.ends[1].stalled = False
        wire.ends[1].wake()
        await pair.until_equal()
    assert pair.replica.resyncs, "it was not mended"
    assert not of.lacking


@pytest.mark.parametrize("prunes", [False, True])
@pytest.mark.parametrize("seed", range(12))
async def test_renames_by_seed(tmp_path: Path, seed: int, prunes: bool) -> None:
    """With logs that do not reach back any more rows may be missing for a moment where names were exchanged. It goes
    on all the same."""
    pair = Pair(tmp_path, seed)
    rng = random.Random(seed)
    of = Rows(pair)
    names = ["a.db", "b.db", "c.db", "d.db"]
    make = pair.next_wire

    def next_wire() -> Wire:
        wire = make()
        wire.max_delay_s = rng.choice([0, 0, 0.002])
        return wire

    pair.next_wire = next_wire

    def act() -> None:
        there = [name for name in names if name in pair.primary.databases and pair.primary.databases[name].commit]
        match rng.randrange(12):
            case _ if not there:
                of.make(rng.choice(names), rng.choice([3, BIG]))
            case 0 | 1:
                name = rng.choice(names)
                if name not in there:
                    of.make(name, rng.choice([3, BIG]))
            case 2 | 3 | 4:
                of.write(rng.choice(there))
            case 5:
                if len(there) > 2:
                    pair.primary.databases[rng.choice(there)].drop()
            case 6 if prunes:
                pair.primary.databases[rng.choice(there)].forget_log()
            case 7:
                pair.wires[-1].cut("gone")
            case _:
                old, new = rng.choice(there), rng.choice(names)
                if old != new and (new not in there or rng.random() < 0.1):
                    pair.primary.rename(old, new)

    try:
        async with pair.running():
            for _ in range(60):
                await asyncio.to_thread(act)
                await asyncio.sleep(rng.choice([0, 0, 0, 0.005, 0.03]))
            await pair.until_equal()
            await silence(lambda: {"primary": pair.primary.contents(), "replica": pair.replica.contents()})
        assert prunes or not of.lacking, of.lacking
    finally:
        pair.close()


def renamed(*what: str) -> Callable[[Steps], None]:
    async def run(steps: Steps, path: Path) -> None:
        async with replicating(path) as (pair, _):
            of = Rows(pair)
            of.make("b.db")
            await until(pair.equal, "it does not begin")
            of.held |= set(rows(pair.replica))
            steps.actions(*(lambda one=one: do(of, one) for one in what))
            with steps.here():
                await asyncio.to_thread(of.write, "a.db")
                await until(pair.equal, "the replica never gets the last commit")
            steps.finish()
            await until(pair.equal, "the replica never gets the last rename")
            assert not of.lacking, of.lacking

    return scenario(run)


@pytest.mark.parametrize("how", ["there and back", "exchanged"])
def test_a_rename_between_any_two_steps_of_a_feed(how: str) -> None:
    assert sweep(renamed(*RENAMES[how]), [feed, primary], stride=STRIDE, pairs=5) > 20
