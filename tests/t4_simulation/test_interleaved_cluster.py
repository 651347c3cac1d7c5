"""Replication and HALT locks, with something else between any two of their steps: after the last write, with nobody
asking, both nodes are at the same position within a second."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

from test_halt import World, world

from harness.interleaver import Steps, sweep
from pylitefs.cluster import hold

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
