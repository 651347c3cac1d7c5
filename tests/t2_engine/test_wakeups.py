"""Wake-ups and answers must not be lost on their way: whatever goes wrong in between, what was written is captured with
nobody asking, and a request is answered."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_nodes import make_sqlite
from silent_commits import Silent, until
from sqlite_process import SqliteProcess

from harness.liveness import LIVE_S
from pylitefs.engine import commit_points
from pylitefs.engine import gated as gated_module
from pylitefs.engine.continuation import finish
from pylitefs.engine.gated import GatedCommits
from pylitefs.engine.hooks import EngineHooks
from pylitefs.engine.opener import Opener
from pylitefs.engine.pause import Pause
from pylitefs.engine.pending import Wait
from pylitefs.engine.store import Store, StoreOptions
from pylitefs.events import EventBus
from pylitefs.ports import FileKind, FileRef, Then

WAIT_S = 20.0


class Silence:
    """A notifier that nobody listens to."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args: None


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Silent]:
    with contextlib.closing(Silent(tmp_path)) as made:
        yield made


@pytest.fixture
def mount(live: Silent, tmp_path: Path) -> Iterator[Path]:
    """A folder where the mount would be. The databases' files stay where they are; writes to `db-wal` here are what the
    kernel tells of writes to the WAL."""
    folder = tmp_path / "mount"
    folder.mkdir()
    (folder / "db-wal").touch()
    store = live.node.store
    store.worker.submit(store.mounted, str(folder), True, Silence()).result(WAIT_S)
    yield folder
    store.worker.submit(store.unmounted).result(WAIT_S)


def tell(mount: Path, name: str) -> None:
    """The kernel tells of a write to a file of the mount."""
    with open(mount / name, "ab") as file:
        file.write(b"x")


# -- wake-ups --------------------------------------------------------------------------------------------------------


def test_what_was_written_before_anybody_listened(live: Silent, mount: Path) -> None:
    """The mount answers requests before the node can hear of writes."""
    before = live.database.position.txid
    live.rested()
    live.commit()()
    assert live.database.position.txid == before
    live.worker.submit(live.node.store.serving).result(WAIT_S)
    live.has(before + 1)


def test_plain_files_that_were_written_before_anybody_listened(live: Silent, mount: Path) -> None:
    """A database in journal mode OFF leaves no trace but the file, and the application keeps it open."""
    path = Path(live.node.store.plain_path("new.db"))
    make_sqlite(str(path), mode="DELETE")
    os.link(path, mount / "new.db")
    live.worker.submit(live.node.store.serving).result(WAIT_S)
    until(lambda: (found := live.node.store.get("new.db")) is not None and found.exists)


def test_a_plain_database_that_is_in_use_when_it_could_be_taken_over(live: Silent, mount: Path) -> None:
    """A lock goes without a write: it is looked at again until it is a database."""
    store = live.node.store
    path = Path(store.plain_path("new.db"))
    make_sqlite(str(path), mode="DELETE")
    os.link(path, mount / "new.db")
    writer = SqliteProcess(str(path))
    try:
        writer("BEGIN IMMEDIATE")
        live.worker.submit(store.serving).result(WAIT_S)
        until(lambda: "new.db" in store.plain_imports._waiting)
        until(lambda: "new.db" not in store.plain_imports._waiting)  # the first try
        until(lambda: "new.db" in store.plain_imports._waiting)
        assert store.get("new.db") is None
        writer("COMMIT")
        until(lambda: (found := store.get("new.db")) is not None and found.exists)
    finally:
        writer.stop()


def test_one_database_that_fails_keeps_no_other_from_being_looked_at(
    live: Silent, mount: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = live.node.store
    live.worker.submit(store.serving).result(WAIT_S)
    before, failed = live.database.position.txid, threading.Event()
    broken = store.get_or_create("broken")
    real = store.capture.has_unseen_writes

    def fail(database: Any) -> bool:
        if database is broken and not failed.is_set():
            failed.set()
            raise RuntimeError("this one is broken")
        return real(database)

    monkeypatch.setattr(store.capture, "has_unseen_writes", fail)
    (mount / "broken").touch()
    assert store._watch is not None
    read = store._watch.read
    monkeypatch.setattr(store._watch, "read", lambda: sorted(read() or ()))

    def told() -> None:  # both in one reading, the broken one first
        for name in ("broken", "db-wal"):
            tell(mount, name)

    live.rested()
    live.commit()()
    live.worker.submit(told).result(WAIT_S)
    live.has(before + 1)
    assert failed.wait(WAIT_S)


def test_an_unexpected_error_in_a_look_is_not_its_end(live: Silent) -> None:
    before, view = live.database.position.txid, live.database.wal.view
    real, failed = view.committed, threading.Event()

    def fail() -> Any:
        if not failed.is_set():
            failed.set()
            raise ValueError("something nobody thought of")
        return real()

    live.rested()
    live.commit()()
    view.committed = fail  # type: ignore[method-assign]
    live.awake()
    assert failed.is_set()
    live.has(before + 1)


def test_a_commit_while_an_answered_one_still_rests(live: Silent, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two fsyncs of a pending commit was answered, so the application has gone on; the other's caller does not
    come back. The wake-up of the next commit, which waits for nobody, must not be dropped."""
    monkeypatch.setattr(gated_module, "_WATCH_S", (1000.0,))  # the test does what is done then

    class Open:
        active = True

        def wait(self, name: str, txid: int, then: Then) -> None:
            then(None)

    store, database = live.node.store, live.database
    store.gate = Open()
    gated = GatedCommits(store)
    publish = live.commit()
    answered = threading.Event()
    for number in range(2):  # the second caller's disk takes for ever
        gated.before_wal_fsync(database)
        if not number:
            gated.after_wal_fsync(database, lambda error: answered.set())
            assert answered.wait(WAIT_S)
    live.worker.submit(int).result(WAIT_S)
    pending = database.wal.pending
    assert pending is not None
    assert len(pending.waits) == 2
    assert pending.rests()
    publish()
    store.gate = None
    before = database.position.txid
    publish = live.commit()
    live.awake()
    pending.quiet = False
    live.worker.submit(store.capture.flush, database).result(WAIT_S)
    assert database.wal.pending is None
    publish()
    live.has(before + 1)
    live.check()


def test_a_write_that_waits_for_a_lock_which_nobody_tells_of(live: Silent, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a rollback mode what was written is recorded when nobody could take it back: however long that takes."""
    assert commit_points._LONGEST_SETTLE_S <= 1.0
    capture, database = live.capture, live.database
    tries = []

    def later(database: Any, then: Then, **how: bool) -> None:
        tries.append(database)
        if len(tries) < 60:
            then(OSError(errno.EBUSY, "somebody has a lock"))
        else:
            database.rollback.clear()
            then(None)

    monkeypatch.setattr(capture, "settle_later", later)
    monkeypatch.setattr(commit_points, "_LONGEST_SETTLE_S", 0.001)
    with database.lock:
        database.rollback.suspect = True
    live.worker.submit(capture.wake_rollback, database).result(WAIT_S)
    until(lambda: not database.rollback.pending)
    assert len(tries) == 60


# -- answers ---------------------------------------------------------------------------------------------------------


class Broken:
    """A continuation that fails the first time."""

    def __init__(self) -> None:
        self.told: list[BaseException | None] = []

    def __call__(self, error: BaseException | None) -> None:
        self.told.append(error)
        if len(self.told) == 1:
            raise RuntimeError("it could not be continued")


def test_a_request_whose_continuation_fails_is_answered_with_that(caplog: pytest.LogCaptureFixture) -> None:
    then, wait = Broken(), Wait()
    finish(then, lambda: None)
    assert [type(error) for error in then.told] == [type(None), RuntimeError]
    then = Broken()
    wait.then(then)
    wait.done(None)
    assert [type(error) for error in then.told] == [type(None), RuntimeError]
    assert caplog.text.count("a request could not be continued") == 2


def test_one_open_that_fails_after_a_pause_keeps_no_other_waiting(caplog: pytest.LogCaptureFixture) -> None:
    pause, gone_on = Pause(), []
    pause.begin()

    def fail() -> None:
        raise RuntimeError("this open fails")

    assert pause.hold(fail)
    assert pause.hold(lambda: gone_on.append(True))
    pause.end()
    assert gone_on == [True]
    assert "this open fails" in caplog.text


def test_an_open_that_fails_in_the_engine_is_answered(live: Silent) -> None:
    """Opens wait for the end of a pause; what goes wrong afterwards is their answer."""
    store, answers = live.node.store, []
    hooks = EngineHooks(store, store.apply)
    ref = FileRef("db", FileKind.DATABASE, "db", live.database.files.database)
    store.roles.pause.begin()
    hooks.may_open(ref, os.O_RDWR, False, answers.append)
    assert not answers
    store.roles.let_in = None  # type: ignore[assignment, method-assign]
    store.roles.pause.end()
    assert [type(error) for error in answers] == [TypeError]


def test_the_opener_always_calls_back(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    opener, found = Opener(), []
    came = threading.Event()

    def opened(fds: list[int] | None) -> None:
        found.append(fds)
        came.set()

    def fail() -> None:
        raise RuntimeError("a job fails")

    opener.start()
    try:
        opener.do(fail)
        opener.open([str(tmp_path), "not\0a name"], os.O_RDONLY, opened)
        assert came.wait(WAIT_S)
        assert found == [None]
        assert "a job fails" in caplog.text
    finally:
        opener.stop()


def test_a_commit_whose_gate_fails_is_answered(live: Silent) -> None:
    """As one does whose loop has ended."""

    class Closed:
        active = True

        def wait(self, name: str, txid: int, then: Then) -> None:
            raise RuntimeError("Event loop is closed")

    live.node.store.gate = Closed()
    gated, answers, answered = GatedCommits(live.node.store), [], threading.Event()

    def then(error: BaseException | None) -> None:
        answers.append(error)
        answered.set()

    gated.after_commit(live.database, True, then, caller=None)
    publish = live.commit()
    gated.before_wal_fsync(live.database)
    gated.after_wal_fsync(live.database, then)
    until(lambda: len(answers) == 2)
    publish()
    assert all(isinstance(error, Exception) for error in answers)


def test_who_gives_up_waiting_for_a_position_is_no_error(live: Silent, caplog: pytest.LogCaptureFixture) -> None:
    """As a request does whose client has gone: what is at work for it comes to its end, and others are answered."""
    go_on = threading.Event()
    live.worker.post(go_on.wait, 10)
    one, all_of_them = live.capture.flush_later(live.database), live.node.store.flush_all()
    for asked in (one, all_of_them):
        asked.cancel()
    other = live.capture.flush_later(live.database)
    go_on.set()
    assert other.result(10).txid == live.database.position.txid
    assert one.result(10) == other.result() and all_of_them.result(10)["db"] == other.result()
    assert not caplog.records


@pytest.mark.parametrize("name", ["app.db", ".hidden"])
def test_a_plain_file_that_holds_a_database_is_looked_at_in_time(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it was in use when it was looked at; a hidden one, which may be about to be renamed, too."""
    store = Store(str(tmp_path), EventBus(), StoreOptions(is_primary=True))
    planned: list[float] = []
    monkeypatch.setattr(store.worker, "call_later", lambda delay_s, *_, **__: planned.append(delay_s))
    for tries in range(20):
        store.plain_imports._waiting.clear()
        store.plain_imports.wake(name, tries)
    assert len(planned) == 20 and max(planned) <= LIVE_S / 2
