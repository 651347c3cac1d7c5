"""Synchronous replication: commits that are in the log before SQLite publishes them."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine_nodes import NamedFiles, Node, check_log, copy_of, make_sqlite, new_primary, replay, rows_of
from recording_vfs import library
from stepping_process import SteppingProcess, is_wal
from test_naming import rename

from pylitefs.engine.database import Database
from pylitefs.engine.gated import GatedCommits
from pylitefs.engine.hooks import EngineHooks
from pylitefs.engine.page_checksums import stamp
from pylitefs.engine.transaction import UnstableSource
from pylitefs.ports import FileKind, FileRef, Then

pytestmark = pytest.mark.skipif(library() is None, reason="Python's sqlite3 has no libsqlite3 of its own")
WAIT_S = 20.0


class Gate:
    """A gate that the test opens: `waiting` are (TXID, continuation)."""

    def __init__(self) -> None:
        self.active = True
        self.waiting: list[tuple[int, Then]] = []
        self.asked: list[int] = []
        self._came = threading.Condition()

    def wait(self, name: str, txid: int, then: Then) -> None:
        with self._came:
            self.waiting.append((txid, then))
            self.asked.append(txid)
            self._came.notify_all()

    def open(self, error: BaseException | None = None) -> list[int]:
        """Answer all that wait; their TXIDs."""
        with self._came:
            waiting, self.waiting = self.waiting, []
        for _, then in waiting:
            then(error)
        return [txid for txid, _ in waiting]


class Fsync:
    """An fsync of the WAL, from its hook on."""

    def __init__(self, hooks: EngineHooks, ref: FileRef) -> None:
        self._hooks, self._ref = hooks, ref
        self.answered = threading.Event()
        self.error: BaseException | None = None
        hooks.before_fsync(ref, self._fsync)

    def _fsync(self, error: BaseException | None) -> None:
        assert error is None
        self._hooks.after_fsync(self._ref, self._answer, 1)

    def _answer(self, error: BaseException | None) -> None:
        self.error = error
        self.answered.set()


class Live:
    """A primary with a gate, and an application whose fsyncs the test answers."""

    def __init__(self, folder: Path, mode: str = "WAL") -> None:
        self.folder = folder
        self.node: Node = new_primary(folder / "node", mode=mode)
        self.database: Database = self.node.database()
        self.store = self.node.store
        self.gate = Gate()
        self.store.gate = self.gate
        self.hooks = EngineHooks(self.store, self.store.apply)
        self.sql = SteppingProcess(self.database.files.database)
        self.run("PRAGMA wal_autocheckpoint = 0")
        self.run("PRAGMA synchronous = FULL")

    def ref(self, kind: FileKind) -> FileRef:
        return FileRef("db", kind, "db", self.database.files.backing(kind))

    def run(self, sql: str, *values: object) -> object:
        """A statement, with the hooks at its fsyncs and the gate open."""
        event = self.sql.start(sql, *values)
        while event[0] != "done":
            if is_wal(event):
                self.pass_through(Fsync(self.hooks, self.ref(FileKind.WAL)))
            event = self.sql.answer(True)
        assert not isinstance(event[1], str), event
        return event[1]

    def pass_through(self, fsync: Fsync) -> None:
        """Have it answered, with the gate open."""
        until(lambda: [self.gate.open(), fsync.answered.is_set()][1])
        assert fsync.error is None

    def waits(self, fsync: Fsync) -> bool:
        """Whether it waits at the gate; False if it was answered."""
        until(lambda: self.gate.waiting or fsync.answered.is_set())
        return bool(self.gate.waiting)

    def commit(self, sql: str = "INSERT INTO t (v) VALUES (randomblob(50))", *, on: str = "main") -> Fsync:
        """Begin a commit; its fsync, whose transaction waits at the gate."""
        event = self.sql.start(sql, on=on)
        assert is_wal(event), event
        while True:
            self.gate.open()  # of those that were killed
            fsync = Fsync(self.hooks, self.ref(FileKind.WAL))
            if self.waits(fsync):
                return fsync
            event = self.sql.answer(True)  # of the WAL's header
            assert is_wal(event), event

    def finish(self, fsync: Fsync, error: OSError | None = None) -> object:
        """Open the gate; what the application gets."""
        self.gate.open(error)
        assert fsync.answered.wait(WAIT_S) and fsync.error is error
        event = self.sql.answer(error is None)
        while event[0] != "done":
            event = self.sql.answer(True)
        return event[1]

    def finish_unseen(self, sql: str) -> object:
        """A commit whose fsyncs go by without a hook."""
        event = self.sql.start(sql)
        while event[0] != "done":
            event = self.sql.answer(True)
        return event[1]

    def unlinked(self, kind: FileKind) -> None:
        """The hook of a removal."""
        done = threading.Event()
        self.hooks.before_unlink(self.ref(kind), False, lambda error: done.set())
        assert done.wait(WAIT_S)

    def check(self) -> None:
        """The log replayed is what SQLite sees now."""
        settled(self.node)
        check_log(self.database)
        image = copy_of(self.node, self.folder / "copy")
        assert replay(self.database) == image
        assert rows_of(self.folder / "copy") == self.sql.run("SELECT id, v FROM t ORDER BY id", on="check")

    def close(self) -> None:
        self.gate.active = False
        self.gate.open()
        self.sql.kill()
        self.node.close(clean=False)


def until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.0005)


def settled(node: Node, name: str = "db") -> None:
    """Nothing is pending, and everything is in the log."""
    database = node.database(name)

    def done() -> bool:
        with contextlib.suppress(UnstableSource):
            node.store.flush(database).result(WAIT_S)
            return database.wal.pending is None
        return False

    until(done)


def gate_error() -> OSError:
    return OSError(errno.EIO, "no replica")


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    made = Live(tmp_path)
    yield made
    made.close()


def test_a_commit_is_in_the_log_before_anybody_sees_it(live: Live) -> None:
    before = live.database.position.txid
    fsync = live.commit()
    assert live.database.position.txid == before + 1
    assert [txid for txid, _ in live.gate.waiting] == [before + 1]
    assert not fsync.answered.is_set()
    assert live.database.wal.pending is not None
    reader = SteppingProcess(live.database.files.database)
    try:
        assert reader.run("SELECT count(*) FROM t") == [(3,)]
        assert live.finish(fsync) == []
        assert reader.run("SELECT count(*) FROM t") == [(4,)]
    finally:
        reader.stop()
    live.check()
    assert live.database.position.txid == before + 1, "published, and not recorded again"
    assert live.database.wal.pending is None


def test_many_commits_each_once(live: Live) -> None:
    before = live.database.position.txid
    for count in range(1, 6):
        live.run("INSERT INTO t (v) VALUES (randomblob(50))")
        assert live.database.position.txid == before + count
    live.check()
    assert live.database.position.txid == before + 5
    assert live.gate.asked == list(range(before + 1, before + 6))
    assert "gap" not in live.node.kinds()


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("mode", ["DELETE", "TRUNCATE"])
def test_a_journal_has_gone_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, active: bool
) -> None:
    """SQLite itself does not see to it with synchronous=FULL, NORMAL: after a power cut it would take back a commit
    that was acknowledged when replicas had it."""
    live, synced = Live(tmp_path, mode=mode), list[int]()
    really = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.fstat(fd).st_ino)
        really(fd)

    try:
        live.gate.active = active
        files = live.database.files
        Path(files.journal).touch()
        wanted = os.stat(files.folder if mode == "DELETE" else files.journal).st_ino
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            if mode == "DELETE":
                live.hooks.unlinked(live.ref(FileKind.JOURNAL))
            else:
                live.hooks.after_truncate(live.ref(FileKind.JOURNAL), 0)
        assert (wanted in synced) == active
    finally:
        live.close()


def test_an_index_that_only_the_mount_shows(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without passthrough. Until it is open there a commit must not be taken for a published one: it would be recorded
    twice, and taken back between, while the first record is what its fsync waits for."""
    before, opener, opens = live.database.position.txid, live.store.opener, []
    monkeypatch.setattr(NamedFiles, "reads_shm_directly", property(lambda _: False))
    really = opener.open
    monkeypatch.setattr(opener, "open", lambda *call: opens.append(call))
    with live.database.wal.mutex:
        opener.close(live.database.wal._forget_shm())
    assert is_wal(live.sql.start("INSERT INTO t (v) VALUES (1)"))
    first = Fsync(live.hooks, live.ref(FileKind.WAL))
    until(lambda: opens)
    time.sleep(0.2)  # longer than what cannot be read in peace is tried
    assert not live.gate.waiting and not first.answered.is_set()
    monkeypatch.setattr(opener, "open", really)
    for call in opens:
        really(*call)
    if not live.waits(first):  # of the WAL's header
        assert is_wal(live.sql.answer(True))
        first = Fsync(live.hooks, live.ref(FileKind.WAL))
        assert live.waits(first)
    assert live.finish(first) == []
    live.check()
    assert live.database.position.txid == before + 1
    assert "gap" not in live.node.kinds()


def test_what_the_gate_refuses_is_taken_back(live: Live) -> None:
    before = live.database.position
    assert "disk I/O error" in str(live.finish(live.commit(), gate_error()))
    live.check()
    assert live.sql.run("SELECT count(*) FROM t") == [(3,)]
    assert live.database.position.txid == before.txid + 2
    assert live.database.position.checksum == before.checksum
    live.run("INSERT INTO t (v) VALUES (randomblob(50))")
    live.check()
    assert live.database.position.txid == before.txid + 3
    assert "gap" not in live.node.kinds()


def test_the_same_again_after_it_was_refused(live: Live) -> None:
    insert = "INSERT INTO t (v) VALUES (zeroblob(50))"
    for _ in range(3):
        assert "disk I/O error" in str(live.finish(live.commit(insert), gate_error()))
    before = live.database.position.txid
    assert live.finish(live.commit(insert)) == []
    live.check()
    assert live.sql.run("SELECT count(*) FROM t") == [(4,)]
    assert live.database.position.txid > before


def test_a_disk_that_fails_takes_it_back(live: Live) -> None:
    before = live.database.position.checksum
    event = live.sql.start("INSERT INTO t (v) VALUES (randomblob(50))")
    while not live.gate.waiting:
        assert is_wal(event)
        live.hooks.before_fsync(live.ref(FileKind.WAL), lambda error: None)
        until(lambda: live.gate.waiting or not live.store.worker.submit(lambda: None, database="db").result(WAIT_S))
        if not live.gate.waiting:
            live.hooks.after_fsync(live.ref(FileKind.WAL), lambda error: None, 1)
            event = live.sql.answer(True)
    live.hooks.fsync_failed(live.ref(FileKind.WAL))
    event = live.sql.answer(False)
    assert "disk I/O error" in str(event[1])
    live.gate.open()
    live.check()
    assert live.database.position.checksum == before


@pytest.mark.parametrize("next_writer", ["another commit", "nobody", "the same rows"])
def test_a_writer_that_is_killed_at_its_fsync(live: Live, next_writer: str) -> None:
    other = SteppingProcess(live.database.files.database)
    try:
        other.run("SELECT count(*) FROM t")  # keeps the wal-index in use
        live.commit("INSERT INTO t (v) VALUES (zeroblob(60))")
        taken = live.database.position.txid
        live.sql.kill()
        live.sql = other
        if next_writer == "another commit":
            live.run("PRAGMA synchronous = FULL")
            live.run("INSERT INTO t (v) VALUES (randomblob(2000))")
        elif next_writer == "the same rows":
            live.run("PRAGMA synchronous = NORMAL")
            live.run("INSERT INTO t (v) VALUES (zeroblob(60))")
        live.check()
        assert live.sql.run("SELECT count(*) FROM t") == [(3 if next_writer == "nobody" else 4,)]
        assert live.database.position.txid > taken or next_writer == "the same rows"
        assert "gap" not in live.node.kinds()
    finally:
        live.sql = other


def test_everybody_is_killed_at_the_fsync(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next process makes the wal-index anew, and counts what is whole in the WAL. So it is not taken back before:
    on a replica it would be seen, be gone, and be there again."""
    decided: list[object] = []
    decide = GatedCommits._decide
    monkeypatch.setattr(GatedCommits, "_decide", lambda *args: (decide(*args), decided.append(args)))
    live.run("INSERT INTO t (v) VALUES (randomblob(50))")
    live.commit()
    taken = live.database.position
    live.sql.kill()
    decided.clear()
    until(lambda: len(decided) > 1 or live.database.position != taken)
    assert live.database.position == taken
    live.sql = SteppingProcess(live.database.files.database)
    assert live.sql.run("SELECT count(*) FROM t") == [(5,)]
    live.check()
    assert live.database.position == taken and "gap" not in live.node.kinds()


@pytest.mark.parametrize("directly", [True, False])
@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("refused", [False, True])
def test_everybody_is_killed_at_the_fsync_and_the_database_is_renamed(
    live: Live, monkeypatch: pytest.MonkeyPatch, directly: bool, over: bool, refused: bool
) -> None:
    """What the next process counts is recorded by the rename itself: nobody looks at the new name before somebody opens
    it. `directly`: whether the wal-index can be read without the mount."""
    if over:
        make_sqlite(live.store.plain_path("other"))
        assert live.store.import_plain("other")
    live.run("INSERT INTO t (v) VALUES (randomblob(50))")
    fsync = live.commit()
    if refused:
        assert "disk I/O error" in str(live.finish(fsync, gate_error()))
        settled(live.node)
    live.sql.kill()
    monkeypatch.setattr(NamedFiles, "reads_shm_directly", property(lambda _: directly))
    rename(live.node, "db", "other")
    other = live.node.database("other")
    told = [(event.database, event.data["source"]) for event in live.node.events if event.type == "tx"]
    assert told[-2:] == [("other", "import"), ("db", "drop")]
    (live.folder / "replayed").write_bytes(replay(other))
    live.sql = SteppingProcess(other.files.database)
    assert live.sql.run("SELECT count(*) FROM t") == [(5,)]
    assert rows_of(live.folder / "replayed") == live.sql.run("SELECT id, v FROM t ORDER BY id")
    position = other.position
    settled(live.node, "other")
    assert other.position == position and "gap" not in live.node.kinds()


def test_a_normal_commit_does_not_wait(live: Live) -> None:
    live.run("PRAGMA synchronous = NORMAL")
    live.run("INSERT INTO t (v) VALUES (randomblob(50))")
    live.gate.asked.clear()
    assert live.sql.start("INSERT INTO t (v) VALUES (randomblob(50))") == ("done", [])
    assert live.gate.asked == []
    live.check()


def test_a_checkpoint_does_not_wait(live: Live) -> None:
    live.run("INSERT INTO t (v) VALUES (randomblob(50))")
    live.gate.asked.clear()
    event = live.sql.start("PRAGMA wal_checkpoint(PASSIVE)")
    assert is_wal(event)
    fsync = Fsync(live.hooks, live.ref(FileKind.WAL))
    assert fsync.answered.wait(WAIT_S) and fsync.error is None
    while event[0] != "done":
        event = live.sql.answer(True)
    assert live.gate.asked == []
    live.check()


@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("kind", ["RESTART", "TRUNCATE"])
def test_the_first_commit_of_a_new_generation(live: Live, kind: str, refused: bool) -> None:
    for _ in range(3):
        live.run("INSERT INTO t (v) VALUES (randomblob(500))")
    live.run(f"PRAGMA wal_checkpoint({kind})")
    before = live.database.position.txid
    fsync = live.commit()
    assert live.gate.asked[-1] == live.database.position.txid == before + 1
    live.finish(fsync, gate_error() if refused else None)
    live.check()
    live.run("INSERT INTO t (v) VALUES (randomblob(500))")
    live.check()
    assert live.sql.run("SELECT count(*) FROM t") == [(8 - refused,)]
    if not refused:  # else the header's fsync, before the frames are written over, takes them for a commit once more
        assert live.database.position.txid == before + 2


def test_refused_and_then_begun_anew(live: Live) -> None:
    """The frames of what was refused go with their generation, before anybody looked."""
    live.run("INSERT INTO t (v) VALUES (randomblob(500))")
    live.finish(live.commit("UPDATE t SET v = randomblob(600)"), gate_error())
    live.run("PRAGMA wal_checkpoint(RESTART)")
    live.run("INSERT INTO t (v) VALUES (randomblob(500))")
    live.check()
    assert "gap" not in live.node.kinds()


def test_a_large_commit_that_grows_and_one_that_shrinks(live: Live) -> None:
    live.run("INSERT INTO t (v) VALUES (randomblob(200000))")
    live.check()
    live.finish(live.commit("INSERT INTO t (v) VALUES (randomblob(300000))"), gate_error())
    live.check()
    live.finish(live.commit("VACUUM"))
    live.run("DELETE FROM t WHERE id > 3")
    live.finish(live.commit("VACUUM"), gate_error())
    live.check()
    live.finish(live.commit("VACUUM"))
    live.check()


def test_a_snapshot_has_what_is_pending(live: Live) -> None:
    """A replica that is to hold it may have to fetch the whole database first."""
    live.run("INSERT INTO t (v) VALUES (randomblob(30000))")
    fsync = live.commit("UPDATE t SET v = randomblob(length(v) + 100000)")
    image = copy_of(live.node, live.folder / "copy")
    assert image == replay(live.database)
    assert not fsync.answered.is_set()
    live.finish(fsync)
    live.check()


def test_the_last_connection_closes_after_a_refusal(live: Live) -> None:
    live.finish(live.commit(), gate_error())
    until(lambda: live.database.wal.pending is None)
    live.unlinked(FileKind.SHM)  # SQLite does it within the close, right before the WAL's
    event = live.sql.start(None)
    while event[0] != "done":
        if is_wal(event):
            assert Fsync(live.hooks, live.ref(FileKind.WAL)).answered.wait(WAIT_S)
        if event[0] == "delete" and event[1].endswith("-wal"):
            live.unlinked(FileKind.WAL)
        event = live.sql.answer(True)
    assert stamp(live.database.files.wal) == (0, 0)
    live.check()
    assert live.sql.run("SELECT count(*) FROM t") == [(3,)]


def test_exclusive_locking(live: Live) -> None:
    """Without a wal-index what is whole counts; the fsync waits all the same."""
    live.sql.run(None)
    live.sql.run("PRAGMA locking_mode = EXCLUSIVE")
    live.sql.run("PRAGMA synchronous = FULL")
    live.run("INSERT INTO t (v) VALUES (randomblob(50))")
    fsync = live.commit()
    assert live.gate.asked[-1] == live.database.position.txid
    assert live.finish(fsync) == []
    assert "disk I/O error" in str(live.finish(live.commit(), gate_error()))
    live.run("INSERT INTO t (v) VALUES (randomblob(70))")
    assert live.sql.run("SELECT count(*) FROM t") == [(6,)]
    live.sql.run(None)
    live.check()


def test_a_start_with_a_pending_tail(tmp_path: Path) -> None:
    live = Live(tmp_path)
    try:
        live.commit()
        taken = live.database.position
    finally:
        live.close()
    node = Node(tmp_path / "node")
    try:
        node.store.settle()
        assert node.database().position.checksum == taken.checksum
        assert len(rows_of(node.database().files.database)) == 4
        check_log(node.database())
    finally:
        node.close()


@pytest.mark.parametrize("seed", range(8))
def test_any_sequence(live: Live, seed: int) -> None:
    """Whatever is committed, refused, rolled back, checkpointed or killed: the log leads to the database."""
    rng = random.Random(seed)
    keeper = SteppingProcess(live.database.files.database)
    statements = [
        "INSERT INTO t (v) VALUES (randomblob(100))", "INSERT INTO t (v) VALUES (zeroblob(9000))", "VACUUM",
        "UPDATE t SET v = randomblob(length(v)) WHERE id % 2", "DELETE FROM t WHERE id % 3 = 1",
        "INSERT INTO t (v) SELECT randomblob(3000) FROM t LIMIT 30",
    ]  # fmt: skip
    try:
        keeper.run("SELECT count(*) FROM t")
        for _ in range(25):
            live.run("PRAGMA synchronous = FULL")
            match rng.randrange(8):
                case 0 | 1 | 2:
                    live.run("INSERT INTO t (v) VALUES (1)")
                    live.run(rng.choice(statements))
                case 3 | 4:
                    live.run("INSERT INTO t (v) VALUES (zeroblob(200))")  # so that there is something to change
                    assert "disk I/O error" in str(live.finish(live.commit(statements[rng.randrange(2)]), gate_error()))
                case 5:
                    live.run("PRAGMA synchronous = NORMAL")
                    live.run(rng.choice(statements))
                case 6:
                    live.run(f"PRAGMA wal_checkpoint({rng.choice(['PASSIVE', 'RESTART', 'TRUNCATE'])})")
                case 7:
                    live.commit()
                    live.sql.kill()
                    live.sql = SteppingProcess(live.database.files.database)
                    live.run("PRAGMA wal_autocheckpoint = 0")
            if rng.random() < 0.4:
                live.check()
        live.check()
    finally:
        keeper.stop()


@pytest.mark.parametrize("how", ["refused", "killed", "without a gate"])
def test_a_commit_that_failed_does_not_come_back_when_the_daemon_takes_over(live: Live, how: str) -> None:
    """All processes of the application are killed, so it is the daemon that makes the wal-index anew; in the WAL the
    commit that was acknowledged to nobody stands whole."""
    live.database.app_handles = 1
    live.run("INSERT INTO t (v) VALUES (randomblob(50))")
    if how == "without a gate":
        live.gate.active = False
        event = live.sql.start("INSERT INTO t (v) VALUES (zeroblob(60))")
        assert is_wal(event)
        live.hooks.before_fsync(live.ref(FileKind.WAL), lambda error: None)
        live.hooks.fsync_failed(live.ref(FileKind.WAL))
        assert "disk I/O error" in str(live.sql.answer(False)[1])
    else:
        fsync = live.commit("INSERT INTO t (v) VALUES (zeroblob(60))")
        if how == "refused":
            assert "disk I/O error" in str(live.finish(fsync, gate_error()))
    live.sql.kill()
    live.gate.open(gate_error())
    assert live.store.demote(WAIT_S) == [] and not live.database.captures
    live.sql = SteppingProcess(live.database.files.database)
    assert live.sql.run("SELECT count(*) FROM t") == [(4,)]
    check_log(live.database)


def test_the_same_rows_once_more_are_a_commit_also_if_the_first_try_failed(live: Live) -> None:
    """The second try writes the same frames at the same place, and is acknowledged; nobody had time to look."""
    live.database.app_handles = 1
    live.run("INSERT INTO t (v) VALUES (randomblob(50))")
    insert = "INSERT INTO t (v) VALUES (zeroblob(60))"
    assert "disk I/O error" in str(live.finish(live.commit(insert), gate_error()))
    with live.database.wal.mutex, live.database.lock:
        assert live.finish_unseen(insert) == []
        live.sql.kill()
    assert live.store.demote(WAIT_S) == [] and not live.database.captures
    live.sql = SteppingProcess(live.database.files.database)
    assert live.sql.run("SELECT count(*) FROM t") == [(5,)]
    check_log(live.database)
