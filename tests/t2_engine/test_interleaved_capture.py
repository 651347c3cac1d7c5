"""Capture, with a commit published between any two of its steps: after the last write, with nobody asking, the log has
everything within a second."""

from __future__ import annotations

import contextlib
import itertools
import math
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event

import pytest
from engine_nodes import replay
from silent_commits import LOADED_S, Silent, until

from harness.interleaver import Steps, sweep
from pylitefs.engine import batches, capture, commit_points, in_place, pending, wal_capture, wal_view, watchdog
from pylitefs.engine import gated as gated_module
from pylitefs.engine.gated import GatedCommits
from pylitefs.engine.watchdog import Watchdog
from pylitefs.ports import Then

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


def test_a_database_that_changes_hands_is_nobodys_defect(live: Silent) -> None:
    """Whoever takes it over tries until all of it is captured."""
    live.database.app_handles, live.database.yields = 1, True
    dog = Watchdog(live.node.store, lambda: None)
    live.rested()
    live.commit()()
    live.worker.submit(dog.look).result()
    live.worker.submit(lambda: None).result()  # what the look has found is judged
    assert "overlooked" not in live.node.kinds()


def test_a_fuse_thread_takes_a_commit_while_the_worker_looks(live: Silent) -> None:
    """As one does at a checkpoint's fsync: both move the cursor, and what the one takes the other must not miss."""

    def scenario(steps: Steps) -> None:
        before = live.database.position.txid
        live.rested()
        publish = live.commit()

        def take() -> None:
            publish()
            live.capture.collect_now(live.database)

        steps.actions(steps.aside(take))
        with steps.on_worker(live.worker):
            live.awake()
        steps.finish()
        live.has(before + 1)

    assert sweep(scenario, MODULES) > 100
    live.check()
    assert "gap" not in live.node.kinds()


@pytest.mark.parametrize("published", [True, False])
def test_an_application_that_is_killed_at_any_step(live: Silent, published: bool) -> None:
    """What is whole in the WAL counts for the next who opens it, and so it does for the log, with nobody asking."""

    def scenario(steps: Steps) -> None:
        before = live.database.position.txid
        live.rested()
        publish = live.commit()

        def kill() -> None:
            if published:
                publish()
            live.sql.kill()

        steps.actions(kill)
        with steps.on_worker(live.worker):
            live.awake()
        steps.finish()
        live.has(before + 1)
        live.wal.before_index_truncate()  # the mount tells of what the next one does
        live.open()
        live.wal.after_index_truncate()

    assert sweep(scenario, MODULES, stride=5) > 100
    live.check()


class Gate:
    """Replicas that have everything at once."""

    active = True

    def wait(self, name: str, txid: int, then: Then) -> None:
        then(None)


@pytest.mark.parametrize("fails", [False, True], ids=["answered", "failed"])
def test_a_commit_that_waits_for_replicas_and_one_that_does_not(live: Silent, fails: bool) -> None:
    """The disk is done with the first one's fsync at any step, and its application publishes it then, or takes it back;
    the second one is written and published at any later ones."""
    store, database = live.node.store, live.database
    gated = GatedCommits(store)

    def scenario(steps: Steps) -> None:
        before = database.position.txid
        done: list[BaseException | None] = []
        store.gate = Gate()
        live.rested()
        publish = live.commit()

        def answered(error: BaseException | None) -> None:
            if error is None:
                publish()
            done.append(error)

        def fsync() -> None:
            if fails:
                gated.wal_fsync_failed(database)
                done.append(None)
            else:
                gated.after_wal_fsync(database, answered)

        more: list[Callable[[], None]] = []

        def write() -> None:
            if done and not fails:
                more.append(live.commit())
                live.worker.post(live.capture.wake, database, database=database.name)

        steps.actions(steps.aside(fsync), write, lambda: more and more.pop()())
        with steps.on_worker(live.worker):
            gated.before_wal_fsync(database)
            live.awake()
            for _ in range(3):
                live.worker.submit(int).result()
        steps.finish()
        until(lambda: bool(done), "the fsync is never answered")
        store.gate = None
        if fails:  # SQLite's next commit is written over it
            live.take_back()
            live.worker.post(live.capture.wake, database, database=database.name)
        until(lambda: database.wal.pending is None, "nobody sees what became of it")
        live.agrees(before)

    assert sweep(scenario, [*MODULES, gated_module, pending], pairs=40, actions=3, stride=7) > 100
    live.check()


def test_a_role_that_changes_at_any_step_of_a_look(live: Silent) -> None:
    """The node ceases to be the primary and becomes it again, at any step; what is committed after that is captured."""
    store, database = live.node.store, live.database
    epochs = itertools.count(100)

    def scenario(steps: Steps) -> None:
        before = database.position.txid
        live.rested()
        publish = live.commit()

        def there_and_back() -> None:
            publish()
            assert store.demote(10.0) == []
            store.fence.until_s = math.inf
            store.promote(next(epochs))

        steps.actions(steps.aside(there_and_back))
        with steps.on_worker(live.worker):
            live.awake()
        steps.finish()
        live.has(before + 1)
        live.commit()()
        live.awake()
        live.has(before + 2)

    assert sweep(scenario, MODULES, stride=7) > 100
    live.check()


def test_a_file_that_is_compared_while_its_wal_is_empty(live: Silent, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a TRUNCATE checkpoint the file is compared with the log. An application commits to two pages, and copies
    them into the file, between any two steps of that: the log never holds one of them without the other."""
    monkeypatch.setattr(commit_points, "_READ_PAGES", 2)
    live.sql("CREATE TABLE u (id INTEGER PRIMARY KEY, gen INTEGER, pad BLOB)")
    live.sql.many("INSERT INTO u VALUES (?, 0, randomblob(3000))", [(number,) for number in range(1, 6)])
    database = live.database
    database.app_handles = database.writers = database.raw_writers = 1

    def captured() -> None:
        live.worker.submit(live.capture.flush, database, database=database.name).result()

    def scenario(steps: Steps) -> None:
        captured()
        live.sql("PRAGMA wal_checkpoint(TRUNCATE)")
        database.rollback.suspect, settled = True, Event()

        def commit() -> None:
            live.sql("UPDATE u SET gen = gen + 1 WHERE id IN (1, 5)")
            live.sql("PRAGMA wal_checkpoint(FULL)")

        steps.actions(commit)
        with steps.in_new_threads():
            live.capture.settle_later(database, lambda error: settled.set(), ended=True)
            assert settled.wait(LOADED_S)
        (live.folder / "replayed").write_bytes(replay(database))
        with contextlib.closing(sqlite3.connect(live.folder / "replayed")) as replica:
            found = replica.execute("SELECT gen FROM u WHERE id IN (1, 5)").fetchall()
        assert found[0] == found[1], "half of a transaction is in the log"
        steps.finish()
        captured()

    assert sweep(scenario, [commit_points, in_place]) > 30
    live.check()
