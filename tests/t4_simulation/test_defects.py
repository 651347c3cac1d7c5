"""An unexpected exception anywhere is logged as a defect, and what has met it goes on: no loop ends in silence, and
whoever waits for an answer gets one."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pair import Pair
from test_halt import NAME, world

from pylitefs.cluster import healing, tasks
from pylitefs.cluster.applier import Applier
from pylitefs.cluster.control import HaltLock
from pylitefs.cluster.healing import Healing
from pylitefs.cluster.hold import Gate
from pylitefs.cluster.ports import Link
from pylitefs.cluster.tasks import supervised, watched
from pylitefs.errors import Unavailable
from pylitefs.formats.ltx.format import Position


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path)
    yield pair
    pair.close()


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "AGAIN_S", (0.001,))


async def test_what_is_supervised_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    failures = [RuntimeError("one"), RuntimeError("two")]

    async def work() -> None:
        if failures:
            raise failures.pop()

    async with asyncio.timeout(10):
        await supervised("the work", work)
    assert caplog.text.count("a defect: the work has failed") == 2


async def test_a_task_that_nobody_waits_for_is_not_silent(caplog: pytest.LogCaptureFixture) -> None:
    async def work(error: Exception) -> None:
        raise error

    for error in (RuntimeError("surprising"), Unavailable("told"), OSError(errno.EIO, "told")):
        task = asyncio.ensure_future(work(error))
        task.add_done_callback(watched)
        await asyncio.wait([task])
        await asyncio.sleep(0)
    assert "surprising" in caplog.text and "told" not in caplog.text


async def test_a_follower_goes_on(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    failures = [RuntimeError("one"), KeyError("two")]
    connect = pair.connect

    async def failing() -> Link:
        if failures:
            raise failures.pop()
        return await connect()

    pair.connect = failing  # type: ignore[method-assign]
    pair.write("a.db", 3)
    async with pair.running():
        await pair.until_equal()
    assert not failures and caplog.text.count("a defect") == 2


async def test_an_applier_that_breaks_ends_the_connection_and_the_next_one_works(
    pair: Pair, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.write("a.db", 3)
    failures, work = [RuntimeError("a defect here")], Applier._work_for_a_while

    def breaking(applier: Applier) -> None:
        if failures and "a.db" in pair.replica.databases:
            raise failures.pop()
        work(applier)

    monkeypatch.setattr(Applier, "_work_for_a_while", breaking)
    async with pair.running():
        await pair.until_equal()
        pair.write("a.db", 1)
        await pair.until_equal()
        pair.write("a.db", 1)
        await pair.until_equal()
        assert not failures and len(pair.wires) == 2 and "a defect" in caplog.text


async def test_an_open_is_answered_whatever_happens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with world(tmp_path) as w:
        halt = w.wire.halt

        async def defective(*_: Any) -> HaltLock:
            raise RuntimeError("a defect here")

        w.wire.halt = defective  # type: ignore[method-assign]
        async with asyncio.timeout(10):
            with pytest.raises(OSError):
                await w.open()
        assert "a defect" in caplog.text
        w.wire.halt = halt  # type: ignore[method-assign]
        opening = await w.open()
        await w.close(opening)


async def test_a_lock_is_given_back_when_the_disk_lets_it(tmp_path: Path) -> None:
    async with world(tmp_path, ttl_s=20.0) as w:
        opening = await w.open()
        failures = [OSError(errno.ENOSPC, "no room"), RuntimeError("a defect here")]
        demote = w.replica.demote_database

        def failing(name: str, timeout_s: float) -> bool:
            if failures:
                raise failures.pop()
            return demote(name, timeout_s)

        w.replica.demote_database = failing  # type: ignore[method-assign]
        w.commit(1, 9)
        await w.close(opening)
        assert not failures and not w.theirs.captures and not w.halts.holders() and w.theirs.loan is None
        assert w.ours.position == w.theirs.position


def test_one_commit_that_cannot_be_answered_does_not_keep_the_others_waiting() -> None:
    answers: list[BaseException | None] = []

    def broken(error: BaseException | None) -> None:
        raise RuntimeError("a defect here")

    for end in ("reached", "failed"):
        gate = Gate(NAME, Position(1, 1))
        gate.wait(NAME, 2, broken)
        gate.wait(NAME, 2, answers.append)
        gate.reached(2) if end == "reached" else gate.fail("over")
    assert answers[0] is None and isinstance(answers[1], OSError)


async def test_nothing_begins_in_a_pause_that_follows_another(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        working: asyncio.Task[None] | None = None
        begun = asyncio.Event()

        async def work() -> None:
            async with w.halts._working():
                begun.set()

        async with w.halts.paused(1.0):
            working = asyncio.ensure_future(work())
            await asyncio.sleep(0.01)
        async with w.halts.paused(1.0):  # before the one that waits was woken
            await asyncio.sleep(0.01)
            assert not begun.is_set()
        await working


async def test_damage_that_is_found_as_healing_ends_is_healed(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(healing, "AGAIN_S", (0.001,))
    monkeypatch.setattr(pair.primary, "find_damage", None, raising=False)
    pair.write("a.db", 1)

    async def blocking(call: Any, *args: Any) -> Any:
        return None

    healer = Healing(pair.primary, lambda: (), blocking)

    async def heal_once(name: str, database: object) -> int:
        seen.append(name)
        if len(seen) == 1:
            asyncio.get_running_loop().call_soon(healer.heal, name)  # the first to run after this task has ended
        return 0

    monkeypatch.setattr(healer, "_heal_once", heal_once)
    healer.heal("a.db")
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert seen == ["a.db"] * 2
    await healer.close()
