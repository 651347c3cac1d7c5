"""Capture, with a commit published between any two of its steps: after the last write, with nobody asking, the log has
everything within a second."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from silent_commits import Silent

from harness.interleaver import Steps, sweep
from pylitefs.engine import batches, capture, wal_capture, wal_view, watchdog
from pylitefs.engine.watchdog import Watchdog

MODULES = [capture, wal_capture, wal_view, batches]
@pytest.fixture
def live(tmp_path: Path) -> Iterator[Silent]:
    with contextlib.closing(Silent(tmp_path)) as made:
        yield made


def test_one_commit_before_silence(live: Silent) -> None:
    """Its frames wake the capture, and it is published between any two steps of the look."""

    def scenario(steps: Steps) -> None:
        before = live.database.position.txid
        live.rested()
        steps.actions(live.commit())
        with steps.on_worker(live.worker):
            live.awake()
        steps.finish()
        live.has(before + 1)

    assert sweep(scenario, MODULES) > 100
    live.check()


@pytest.mark.parametrize("checkpoint", [False, True], ids=["same generation", "the WAL begins anew"])
def test_a_commit_while_the_one_before_is_captured(live: Silent, checkpoint: bool) -> None:
    """What is written meanwhile wakes the capture once more; it is published at any step after that."""

    def scenario(steps: Steps) -> None:
        before = live.database.position.txid
        if checkpoint:
            live.sql("PRAGMA wal_checkpoint(RESTART)")
        live.rested()
        live.commit()()
        published: list[Callable[[], None]] = []

        def write() -> None:
            published.append(live.commit())
            live.worker.post(live.capture.wake, live.database, database=live.database.name)

        steps.actions(write, lambda: published[0]())
        with steps.on_worker(live.worker):
            live.awake()
            live.worker.submit(int).result()  # the second wake-up too
        steps.finish()
        live.has(before + 2)

    assert sweep(scenario, MODULES, pairs=150) > 100
    live.check()
    assert live.node.kinds().count("gap") == 0


def test_the_watchdog_takes_nothing_for_a_defect(live: Silent) -> None:
    """A commit is written, told of and published at any step of its look: what is on its way is not overlooked. The
    watchdog's own looks capture nothing that the normal way would not."""

    def scenario(steps: Steps) -> None:
        before, told = live.database.position.txid, []
        live.rested()
        publish = live.commit()
        dog = Watchdog(live.node.store, lambda: told and live.capture.wake(live.database))
        live.database.app_handles = 1
        live.worker.submit(dog.look).result()
        steps.actions(lambda: (told.append(True), publish()))
        with steps.on_worker(live.worker):
            live.worker.submit(dog.look).result()
            live.worker.submit(int).result()  # what it found is judged
        steps.finish()
        live.worker.submit(live.capture.wake, live.database).result()
        live.has(before + 1)

    sweep(scenario, [*MODULES, watchdog])
    live.check()
    assert "overlooked" not in live.node.kinds()


def test_what_nobody_was_woken_for_is_found_and_told(live: Silent) -> None:
    """The net works: a commit whose event is lost is captured, and counted as a defect."""
    before = live.database.position.txid
    live.database.app_handles = 1
    dog = Watchdog(live.node.store, lambda: None)
    live.worker.submit(dog.look).result()
    live.rested()
    live.commit()()
    live.worker.submit(dog.look).result()
    live.has(before + 1)
    assert live.node.kinds().count("overlooked") == 1
    live.check()
