"""Capture where something goes wrong around it: commits that were taken back, a log that cannot be written, files that
are exchanged, wal-indexes that were made anew, and threads that meet."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from engine_nodes import Node, check_log, copy_of, file_checksum, make_sqlite, new_primary, replay, rows_of
from limits import largest_file
from recording_vfs import RecordingVfs, library
from sqlite_process import SqliteProcess

from pylitefs.engine.batches import COLLECT_BYTES, NONE, Batch, CollectedQueue, Cursor
from pylitefs.engine.checkpoints import Checkpoints
from pylitefs.engine.database import Database
from pylitefs.engine.transaction import Change
from pylitefs.engine.wal_capture import WalCapture
from pylitefs.engine.wal_view import Committed
from pylitefs.formats.sqlite.wal_index import HEADER_COPY_SIZE
from pylitefs.ports import FileKind, FileRef

WAIT_S = 20.0


class Live:
    """A primary and an application that has its database open; checkpoints come when a test says so."""

    def __init__(self, folder: Path, *, exclusive: bool = False, rows: int = 60) -> None:
        self.folder = folder
        self.node: Node = new_primary(folder / "node", rows=rows)
        self.database: Database = self.node.database()
        self.wal, self.files = self.database.wal, self.database.files
        self.capture = self.node.store.capture
        self.exclusive = exclusive
        self.sql = self.process()

    def process(self) -> SqliteProcess:
        sql = SqliteProcess(self.files.database)
        if self.exclusive:
            sql("PRAGMA locking_mode = EXCLUSIVE")
        sql("PRAGMA wal_autocheckpoint = 0")
        sql("SELECT count(*) FROM t")
        return sql

    def kill(self) -> None:
        """The application is killed; the next one finds the files as they are."""
        self.sql.kill()

    def reopen(self) -> None:
        """Another application opens them. If there is a -shm, it truncates it, and the mount tells us."""
        has_index = os.path.exists(self.files.shm) and not self.exclusive
        if has_index:
            self.wal.before_index_truncate()
        self.sql = self.process()
        if has_index:
            self.wal.after_index_truncate()

    def open_shm(self) -> None:
        self.wal.use_shm(os.open(self.files.shm, os.O_RDWR | os.O_CLOEXEC))

    def close_sql(self) -> None:
        """The last connection closes, with the hooks of the mount. The WAL is announced before it goes."""
        wal = Path(self.files.wal).read_bytes()
        self.sql.close()
        Path(self.files.wal).write_bytes(wal)
        self.capture.flush_if_possible(self.database)
        self.capture.removed(self.database, FileKind.SHM)
        self.capture.removed(self.database, FileKind.WAL)
        os.unlink(self.files.wal)

    def put(self, value: str, *ids: int) -> None:
        self.sql(f"UPDATE t SET v = ? WHERE id IN ({','.join(map(str, ids))})", value)

    def quiet(self) -> None:
        """The worker does not look by itself any more."""
        self.node.store.worker.submit(self.capture.forget, self.database).result(WAIT_S)

    def check(self) -> None:
        """The log replayed is what SQLite sees now."""
        self.node.flush()
        check_log(self.database)
        expected = self.sql("SELECT id, v FROM t ORDER BY id")
        (self.folder / "replayed").write_bytes(replay(self.database))
        assert rows_of(self.folder / "replayed") == expected
        assert copy_of(self.node, self.folder / "copy") == (self.folder / "replayed").read_bytes()

    def close(self) -> None:
        self.sql.kill()
        self.node.close(clean=False)


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    with contextlib.closing(Live(tmp_path)) as made:
        yield made


@pytest.fixture
def exclusive(tmp_path: Path) -> Iterator[Live]:
    with contextlib.closing(Live(tmp_path, exclusive=True)) as made:
        assert not os.path.exists(made.files.shm)
        yield made


class Answers:
    """What a request was answered, on whatever thread."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self._done = threading.Event()

    def __call__(self, error: BaseException | None) -> None:
        assert not self._done.is_set(), "answered twice"
        self.error = error
        self._done.set()

    def wait(self) -> BaseException | None:
        assert self._done.wait(WAIT_S), "the request was not answered"
        return self.error


def answer_of(request: Callable[[Answers], object]) -> BaseException | None:
    answers = Answers()
    request(answers)
    return answers.wait()


# -- commits that were taken back ------------------------------------------------------------------------------------


class FailingSync:
    """Makes SQLite's fsync of the WAL fail while `armed`."""

    def __init__(self) -> None:
        self.armed = False

    def created(self, path: str) -> None: ...

    def write(self, path: str, data: bytes, offset: int) -> None: ...

    def truncate(self, path: str, size: int) -> None: ...

    def delete(self, path: str, sync_folder: bool) -> None: ...

    def sync(self, path: str) -> None:
        if self.armed and path.endswith("-wal"):
            raise OSError("the disk says no")


@pytest.mark.skipif(library() is None, reason="SQLite's library cannot be reached through ctypes")
@pytest.mark.parametrize("refused", [1, 40], ids=["one frame", "many frames"])
@pytest.mark.parametrize("seen", [True, False], ids=["captured", "not captured"])
def test_a_commit_that_was_taken_back(tmp_path: Path, refused: int, seen: bool) -> None:
    """EXCLUSIVE: its frames count by all that can be read; SQLite writes its next ones over them, and a long one leaves
    its end behind a short one."""
    node = new_primary(tmp_path / "node", rows=3000)
    database, disk = node.database(), FailingSync()
    vfs = RecordingVfs(f"taken{os.getpid()}{refused}{seen}", disk, 1)
    try:
        with contextlib.closing(
            sqlite3.connect(f"file:{database.files.database}?vfs={vfs._name.decode()}", uri=True, isolation_level=None)
        ) as sql:
            sql.execute("PRAGMA locking_mode = EXCLUSIVE")
            sql.execute("PRAGMA synchronous = FULL")
            sql.execute("PRAGMA wal_autocheckpoint = 0")
            sql.execute("UPDATE t SET v = 'base' WHERE id = 1")
            node.flush()
            disk.armed = True
            with pytest.raises(sqlite3.OperationalError):
                sql.execute("UPDATE t SET v = 'REFUSED' WHERE id % (3000 / ?) = 2", (refused,))
            disk.armed = False
            if seen:
                assert node.flush().txid == 3, "it looks like a commit"
            sql.execute("UPDATE t SET v = 'COMMITTED' WHERE id = 3000")
            sql.execute("UPDATE t SET v = 'COMMITTED' WHERE id = 2500")
            assert node.store.capture.collect_now(database) is not seen
            node.flush()
            assert ("repair" in node.kinds()) is seen
            sql.execute("PRAGMA wal_checkpoint(RESTART)")
            node.store.capture.collect_now(database)
            sql.execute("UPDATE t SET v = 'after' WHERE id = 2")
            node.flush()
            check_log(database)
            (tmp_path / "replayed").write_bytes(replay(database))
            assert rows_of(tmp_path / "replayed") == sql.execute("SELECT id, v FROM t ORDER BY id").fetchall()
    finally:
        vfs.unregister()
        node.close(clean=False)


def test_a_commit_that_was_taken_back_and_nothing_after_it(exclusive: Live) -> None:
    """The application closes: its checkpoint leaves that commit out, and the WAL that has it goes."""
    live = exclusive
    live.put("base", 1)
    live.node.flush()
    before = Path(live.files.wal).read_bytes()
    live.put("REFUSED", 2)
    refused = Path(live.files.wal).read_bytes()
    live.node.flush()
    live.wal.fsync_failed()
    live.kill()
    Path(live.files.wal).write_bytes(before)  # what the application that took it back believes
    live.reopen()
    live.sql("PRAGMA wal_checkpoint(RESTART)")
    Path(live.files.wal).write_bytes(refused)
    live.close_sql()
    assert live.database.rollback.suspect
    live.capture.settle_later(live.database, lambda error: None)
    assert live.database.flush().result(WAIT_S)
    assert live.database.position.checksum == file_checksum(live.files.database)
    live.sql = live.process()
    live.put("next", 3)
    live.check()


# -- the log cannot be written ---------------------------------------------------------------------------------------


def commit_while_the_log_is_full(live: Live, value: str) -> None:
    """A commit's fsync is answered without an error; what could be collected then waits for the log in vain."""
    live.sql("UPDATE t SET v = ? || id", value * 200)
    assert answer_of(lambda then: Checkpoints(live.node.store).before_wal_fsync(live.database, then)) is None
    with contextlib.suppress(OSError):
        live.node.store.worker.submit(live.capture.flush, live.database).result(WAIT_S)
    assert live.database.failing is not None


def test_no_commit_is_refused_for_a_log_that_is_full(exclusive: Live) -> None:
    """Without a wal-index an fsync of the WAL may be a commit's. A checkpoint's last one is refused, so SQLite keeps
    its WAL."""
    live, checkpoints = exclusive, Checkpoints(exclusive.node.store)
    with largest_file(1024):
        commit_while_the_log_is_full(live, "a")
        commit_while_the_log_is_full(live, "b")
        assert isinstance(answer_of(lambda then: checkpoints.before_database_fsync(live.database, then)), OSError)
    assert answer_of(lambda then: checkpoints.before_database_fsync(live.database, then)) is None
    live.sql("PRAGMA wal_checkpoint(RESTART)")
    live.put("after", 3)
    live.check()
    assert "gap" not in live.node.kinds()


def test_an_unopened_index_refuses_no_commit(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that has just been made: the mount's -shm is not open yet, so nobody knows who checkpoints."""
    checkpoints = Checkpoints(live.node.store)
    monkeypatch.setattr(live.capture, "open_shm", lambda database: None)
    with largest_file(1024):
        commit_while_the_log_is_full(live, "a")
        commit_while_the_log_is_full(live, "b")
        assert live.wal.shm_fd < 0
        assert isinstance(answer_of(lambda then: checkpoints.before_database_fsync(live.database, then)), OSError)
    live.check()


def test_the_end_of_an_exclusive_checkpoint_counts_and_not_an_fsync(exclusive: Live) -> None:
    """synchronous=OFF after a commit whose fsync was seen: what follows it is missed, and that is noticed."""
    live, checkpoints = exclusive, Checkpoints(exclusive.node.store)
    live.put("one", 1)
    assert answer_of(lambda then: checkpoints.before_wal_fsync(live.database, then)) is None
    live.node.flush()
    live.quiet()
    live.put("MISSED", 40)
    live.sql("PRAGMA wal_checkpoint(RESTART)")
    live.put("three", 3)
    live.check()
    assert live.node.kinds()[-2:] == ["gap", "repair"]


def test_an_exclusive_generation_that_nobody_saw(exclusive: Live) -> None:
    live, checkpoints = exclusive, Checkpoints(exclusive.node.store)
    live.put("one", 1)
    assert answer_of(lambda then: checkpoints.before_database_fsync(live.database, then)) is None
    live.quiet()
    for value in ("MISSED", "three"):
        live.sql("PRAGMA wal_checkpoint(RESTART)")
        live.put(value, 40 if value == "MISSED" else 3)
    live.check()
    assert live.node.kinds()[-2:] == ["gap", "repair"]


def test_what_is_not_a_full_disk_has_a_name_of_its_own(live: Live) -> None:
    live.put("one", 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    live.node.flush()
    live.put("two", 2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        for _ in range(2):
            with pytest.raises(OSError):
                live.node.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with largest_file(1024):
        live.sql("UPDATE t SET v = randomblob(100)")
        with pytest.raises(OSError):
            live.node.flush()
    live.node.flush()
    told = [event for event in live.node.events if event.type in ("logFailing", "logWorks", "diskFull", "diskFreed")]
    assert [event.type for event in told] == ["logFailing", "logWorks", "diskFull", "diskFreed"]
    assert "open files" in str(told[0].data["error"])
    live.check()


def test_a_disk_that_fails_once_is_asked_again(
    live: Live, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a commit may follow is read from the WAL as well. Nothing is written then that would wake the worker."""
    tries: list[int] = []
    asked_again = threading.Event()
    really = WalCapture.commit_may_follow

    def fail_first(wal: WalCapture) -> bool:
        tries.append(1)
        if len(tries) == 1:
            raise OSError(errno.EIO, "the disk")
        asked_again.set()
        return really(wal)

    live.put("one", 1)
    live.quiet()
    monkeypatch.setattr(WalCapture, "commit_may_follow", fail_first)
    live.node.store.worker.post(live.capture.wake, live.database)
    assert asked_again.wait(WAIT_S)
    assert not [record for record in caplog.records if record.exc_info]
    live.check()


# -- wal-indexes ------------------------------------------------------------------------------------------------------


def test_the_counter_of_an_index_that_was_made_anew(live: Live) -> None:
    """After a killed application it begins at zero: as many missed commits as were counted before look like none."""
    live.put("one", 1)
    live.put("two", 2)
    live.node.flush()
    assert live.wal.cursor.change == 2
    live.kill()
    live.reopen()
    live.sql("PRAGMA synchronous = OFF")
    live.put("MISSED", 40)
    live.put("MISSED", 50)
    live.sql("PRAGMA wal_checkpoint(RESTART)")
    live.put("three", 3)
    live.check()
    assert live.node.kinds()[-2:] == ["gap", "repair"]


def test_the_counter_is_learned_again(live: Live) -> None:
    live.put("one", 1)
    live.put("two", 2)
    live.node.flush()
    live.kill()
    live.reopen()
    live.node.flush()
    assert live.wal.cursor.change == 0
    live.put("three", 3)
    live.node.flush()
    live.sql("PRAGMA wal_checkpoint(RESTART)")
    live.put("four", 4)
    live.check()
    assert "gap" not in live.node.kinds()


def test_a_new_index_is_no_index_that_was_made_anew(live: Live) -> None:
    live.sql.close()
    live.wal.removed(FileKind.WAL)
    live.wal.removed(FileKind.SHM)
    live.wal.created(FileKind.SHM)
    live.wal.before_index_truncate()
    live.sql = live.process()
    live.wal.after_index_truncate()
    live.put("MISSED", 40)
    live.sql("PRAGMA wal_checkpoint(TRUNCATE)")
    live.put("two", 2)
    live.check()
    assert live.node.kinds()[-2:] == ["gap", "repair"], "it counts from zero, so one commit is missing"
    live.node.flush()
    live.sql("PRAGMA wal_checkpoint(TRUNCATE)")
    live.put("three", 3)
    live.check()
    assert live.node.kinds().count("gap") == 1


def test_a_new_index_beside_a_wal_that_is_empty(live: Live) -> None:
    """Nothing is missing when it is restarted before anything was written."""
    live.sql.close()
    live.wal.removed(FileKind.WAL)
    live.wal.removed(FileKind.SHM)
    Path(live.files.wal).touch()
    live.wal.created(FileKind.WAL)
    live.wal.created(FileKind.SHM)
    live.wal.before_index_truncate()
    live.sql = live.process()
    live.wal.after_index_truncate()
    live.sql("PRAGMA wal_checkpoint(TRUNCATE)")
    live.check()
    live.put("one", 1)
    live.check()
    assert "gap" not in live.node.kinds()


def test_a_damaged_index_counts_anew_when_it_is_repaired(live: Live) -> None:
    """A process died while it wrote the header; the next one makes the index anew where it is."""
    other = SqliteProcess(live.files.database)
    other("SELECT 1 FROM t")
    live.put("one", 1)
    live.put("two", 2)
    live.node.flush()
    live.kill()
    shm = os.open(live.files.shm, os.O_RDWR)
    os.pwrite(shm, b"\x55" * 8, HEADER_COPY_SIZE + 16)
    os.close(shm)
    live.node.flush()
    live.sql = other
    live.sql("PRAGMA wal_autocheckpoint = 0")
    live.sql("PRAGMA synchronous = OFF")
    live.put("MISSED", 40)
    live.put("MISSED", 50)
    live.sql("PRAGMA wal_checkpoint(RESTART)")
    live.put("three", 3)
    live.check()
    assert live.node.kinds()[-2:] == ["gap", "repair"]


def test_a_counter_that_went_back_is_not_believed(live: Live) -> None:
    """Nobody told us of the truncation."""
    for number in range(5):
        live.put(f"value {number}", 1)
    live.node.flush()
    live.kill()
    live.sql = live.process()
    live.sql("PRAGMA synchronous = OFF")
    live.node.flush()
    for number in range(5):
        live.put(f"MISSED {number}", 40)
    live.sql("PRAGMA wal_checkpoint(RESTART)")
    live.put("next", 3)
    live.check()
    assert live.node.kinds()[-2:] == ["gap", "repair"]


def test_an_index_that_nobody_uses(live: Live) -> None:
    """EXCLUSIVE after a killed application: its -shm stays, and says for good what was committed then."""
    live.put("one", 1)
    live.node.flush()
    live.kill()
    live.open_shm()
    live.exclusive = True
    checkpoints = Checkpoints(live.node.store)
    live.reopen()
    live.put("two", 2)
    assert live.node.flush().txid == 3
    live.put("three", 3)
    assert live.wal.checkpoint_running(), "unknown counts as yes"
    assert answer_of(lambda then: checkpoints.before_wal_fsync(live.database, then)) is None
    assert answer_of(lambda then: checkpoints.before_database_fsync(live.database, then)) is None
    live.sql("PRAGMA wal_checkpoint(RESTART)")
    live.put("four", 4)
    assert os.path.exists(live.files.shm)
    live.node.flush()
    check_log(live.database)
    (live.folder / "replayed").write_bytes(replay(live.database))
    assert rows_of(live.folder / "replayed") == live.sql("SELECT id, v FROM t ORDER BY id")
    assert "gap" not in live.node.kinds()


def test_a_restart_that_is_not_written_yet(live: Live) -> None:
    """It stands in the wal-index alone; who has to read the WAL anew goes on in the generation before."""
    live.put("one", 1)
    live.node.flush()
    wal = Path(live.files.wal).read_bytes()
    live.sql("PRAGMA wal_checkpoint(TRUNCATE)")
    Path(live.files.wal).write_bytes(wal)  # the truncation was refused
    live.node.flush()
    assert live.wal.cursor.frame == 0
    live.kill()
    live.reopen()
    live.node.flush()
    assert live.wal.cursor.frame == 1
    assert live.wal.backlog() == 0
    live.put("two", 2)
    assert live.wal.backlog() == 1
    live.check()
    live.sql("PRAGMA wal_checkpoint(RESTART)")
    live.node.flush()
    live.close_sql()
    assert not live.database.rollback.suspect
    live.sql = live.process()
    live.put("three", 3)
    live.check()
    assert "gap" not in live.node.kinds()


def test_an_index_of_an_empty_wal(live: Live) -> None:
    """Made anew, it knows neither page size nor number of pages; a comparison takes them from the database."""
    live.put("one", 1)
    live.node.flush()
    live.put("MISSED", 40)
    live.sql("PRAGMA wal_checkpoint(TRUNCATE)")
    live.kill()
    live.reopen()
    live.check()
    assert live.node.kinds()[-2:] == ["gap", "repair"]
    live.put("two", 2)
    live.check()


def test_a_wal_that_goes_before_it_was_read(live: Live) -> None:
    """Whatever removed it: what the database has by then is in the log before the next commit."""
    live.put("one", 1)
    live.node.flush()
    live.put("MISSED", 40)
    live.sql("PRAGMA wal_checkpoint(TRUNCATE)")
    live.put("MISSED", 50)
    live.sql("PRAGMA wal_checkpoint(PASSIVE)")
    live.capture.removed(live.database, FileKind.WAL)
    assert live.database.rollback.suspect
    live.put("two", 2)
    live.check()


# -- in memory and not in the log -----------------------------------------------------------------------------------


def test_a_comparison_begins_after_what_is_in_memory(live: Live) -> None:
    """A page that was changed, taken into memory, and changed back unseen differs from neither state of the log."""
    first = live.sql("SELECT v FROM t WHERE id = 1")[0][0]
    page = Path(live.files.database).read_bytes()
    live.put("other", 1)
    with live.wal.mutex:
        batch = live.wal.next_batch()
        assert batch is not None
        live.wal.collect(batch, live.database.commit)
    live.sql("PRAGMA wal_checkpoint(TRUNCATE)")
    live.sql("PRAGMA synchronous = OFF")
    live.sql("UPDATE t SET v = ? WHERE id = 1", first)
    live.sql("PRAGMA wal_checkpoint(TRUNCATE)")
    live.put("next", 60)
    live.check()
    assert live.node.kinds()[-2:] == ["gap", "repair"]
    assert len(page) == live.database.size_bytes


def test_nothing_is_compared_on_the_way_to_an_answer(tmp_path: Path) -> None:
    """A FUSE thread leaves a gap to the worker."""
    with contextlib.closing(Live(tmp_path, rows=3000)) as live:
        live.put("one", 1)
        live.node.flush()
        live.put("MISSED", 40)
        live.sql("PRAGMA wal_checkpoint(RESTART)")
        live.put("two", 2)
        asked: list[int] = []
        known = live.wal._known_sums
        live.wal._known_sums = lambda: asked.append(1) or known()  # type: ignore[func-returns-value]
        assert not live.capture.collect_now(live.database)
        assert asked == []
        live.check()
        assert asked == [1]


def _batch(commit: int, offset: int) -> Batch:
    salts = (1, 2)
    change = Change(512, commit, 1, offset, 100, salts)
    return Batch(
        change, [], lambda pgno: bytes(512), Committed(salts, 512, 1, commit, 1), Cursor(salts, 1, 1), 1, False, NONE
    )


def test_the_queue_while_its_other_end_is_taken() -> None:
    queue = CollectedQueue()
    assert queue.first() is None and queue.commit is None
    queue.add(_batch(10, 1000), {1: b"a"})
    taken = queue.first()
    assert taken is not None and len(queue) == 1
    queue.add(_batch(9, 1100), {2: b"b"})
    assert len(queue) == 1 and taken.close() == [(1, b"a"), (2, b"b")]
    queue.add(_batch(5, 1200), {3: b"c"})
    assert len(queue) == 2, "one that is on its way takes nothing in"
    queue.done(taken)
    queue.done(taken)
    assert len(queue) == 1 and queue.commit == 5
    last = queue.first()
    assert last is not None
    queue.done(last)
    assert len(queue) == 0 and queue.commit == 5, "the size stays known when the last one is in the log"
    queue.add(_batch(5, 1300), {4: bytes(COLLECT_BYTES)})
    gone = queue.first()
    queue.clear()
    assert gone is not None and queue.commit is None
    queue.done(gone)


def test_a_database_that_shrank_while_the_last_batch_was_written(live: Live) -> None:
    """Pages between the size that was just recorded and the new one belong to the new batch."""
    live.sql("INSERT INTO t (v) SELECT randomblob(20000) FROM t")
    live.node.flush()
    stale = live.database.commit
    live.sql("DELETE FROM t WHERE id > 3")
    live.sql("VACUUM")
    with live.wal.mutex:
        batch = live.wal.next_batch()
        assert batch is not None
        live.wal.collect(batch, stale)
    live.capture._record_collected(live.database)  # the worker comes in between
    live.sql("INSERT INTO t (v) VALUES (randomblob(200000))")
    with live.wal.mutex:
        batch = live.wal.next_batch()
        assert batch is not None and live.database.commit < batch.change.commit < stale
        new = set(range(live.database.commit + 1, batch.change.commit + 1))
        few = batch.pgnos <= live.database.commit + 1  # as if the others had been freed at once: those have no frame
        batch = replace(batch, pgnos=batch.pgnos[few], numbers=batch.numbers[few])
        live.wal.collect(batch, stale)
        taken = live.wal.collected.first()
    assert taken is not None
    assert new <= set(taken.pages)
    live.check()


def test_a_database_that_gains_more_pages_than_fit_into_memory(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody makes the file longer from outside, and SQLite's next transaction makes these pages its own: they have
    no frames."""
    held = 0
    add = live.wal.collected.add

    def added(batch: Batch, pages: dict[int, bytes]) -> None:
        nonlocal held
        held = max(held, sum(map(len, pages.values())))
        add(batch, pages)

    monkeypatch.setattr(live.wal.collected, "add", added)
    live.sql("PRAGMA wal_checkpoint(TRUNCATE)")
    live.node.flush()
    live.kill()
    commit = 12_000
    with open(live.files.database, "r+b") as file:
        file.truncate(commit * int.from_bytes(os.pread(file.fileno(), 2, 16), "big"))
        os.pwrite(file.fileno(), commit.to_bytes(4, "big"), 28)
    live.reopen()
    live.sql("INSERT INTO t (v) VALUES (zeroblob(20000))")
    live.node.flush()
    check_log(live.database)
    assert copy_of(live.node, live.folder / "copy") == replay(live.database)
    assert live.database.commit > commit
    assert held <= COLLECT_BYTES


def test_what_goes_wrong_on_a_fuse_thread_is_left_to_the_worker(
    live: Live, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    live.put("one", 1)
    with monkeypatch.context() as patch:
        patch.setattr(live.wal, "collect", lambda *_: {}["a mistake of ours"])
        assert not live.capture.collect_now(live.database)
        assert not live.capture.collect_now(live.database)
    assert len([record for record in caplog.records if "could not be taken at once" in record.message]) == 1
    live.check()


# -- files that are exchanged ------------------------------------------------------------------------------------------


def _rename(node: Node, old: FileRef, new: FileRef) -> None:
    node.store.worker.submit(node.store.naming.rename, old, new).result(WAIT_S)


@pytest.mark.parametrize("plain", [True, False], ids=["a file", "a database"])
def test_a_commit_is_collected_just_before_another_file_takes_the_name(
    live: Live, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a FUSE thread has collected of the old content does not land on the new one, and nobody opens its WAL."""
    node, naming = live.node, live.node.store.naming
    if plain:
        path = node.store.plain_path("new")
        make_sqlite(path, mode="DELETE", rows=90)
        old = FileRef("new", FileKind.PLAIN, None, path)
    else:
        other = node.store.get_or_create("new")
        make_sqlite(node.store.plain_path("new"), mode="WAL", rows=90)
        os.rename(node.store.plain_path("new"), other.files.database)
        other.rollback.suspect = True
        live.capture.commit_point(other, "import")
        old = FileRef("new", FileKind.DATABASE, "new", other.files.database)
    live.put("OLD", 1)
    live.node.flush()
    busy: list[bool] = []

    def meanwhile() -> None:
        """What the thread of an application's fsync does."""
        live.put("OLD", *range(1, 31))
        thread = threading.Thread(target=lambda: busy.append(live.capture.collect_now(live.database)))
        thread.start()
        thread.join(WAIT_S)

    monkeypatch.setattr(naming, "record_drop", _before(naming.record_drop, meanwhile))
    monkeypatch.setattr(node.store, "is_plain_database", _before(node.store.is_plain_database, meanwhile))
    with monkeypatch.context() as patch:
        # whoever gets at the files while they are exchanged would keep what it has opened
        patch.setattr(Database, "remove_live_files", _before(Database.remove_live_files, meanwhile))
        _rename(node, old, FileRef("db", FileKind.DATABASE, "db", live.files.database))
    assert busy, "nobody came in between"
    live.put("OLD", 5)
    live.sql("PRAGMA wal_checkpoint(RESTART)")
    live.capture.collect_now(live.database)
    node.flush()
    assert len(live.wal.collected) == 0
    assert live.database.position.checksum == file_checksum(live.files.database)
    (live.folder / "replayed").write_bytes(replay(live.database))
    assert len(rows_of(live.folder / "replayed")) == 90
    check_log(live.database)


def _before(call: Callable[..., object], first: Callable[[], object]) -> Callable[..., object]:
    """`call`, and something else before it the first time."""
    todo = [first]

    def both(*args: object, **kwargs: object) -> object:
        if todo:
            todo.pop()()
        return call(*args, **kwargs)

    return both


def test_a_wal_moves_with_its_database_and_is_restarted_meanwhile(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the new name's content is read, a part of the WAL goes: nothing torn is recorded, and nothing left out."""
    live.put("one", 1)
    live.node.flush()
    target = live.node.store.get_or_create("other")

    def restart() -> None:
        live.put("MISSED", 40)
        live.sql("PRAGMA wal_checkpoint(RESTART)")
        live.put("two", 2)

    monkeypatch.setattr(target.wal, "is_stable", _before(target.wal.is_stable, restart))
    expected_salts = live.wal.cursor.salts
    _rename(
        live.node, FileRef("db", FileKind.DATABASE, "db", live.files.database),
        FileRef("other", FileKind.DATABASE, "other", target.files.database),
    )  # fmt: skip
    live.node.flush("other")
    assert target.wal.cursor.salts != expected_salts
    (live.folder / "replayed").write_bytes(replay(target))
    assert rows_of(live.folder / "replayed") == live.sql("SELECT id, v FROM t ORDER BY id")
    check_log(target)


def test_a_wal_without_a_name_is_not_read(live: Live) -> None:
    live.put("one", 1)
    live.node.flush()
    for path in (live.files.wal, live.files.shm):
        os.unlink(path)
    live.put("two", 2)
    assert live.wal.next_batch() is None
    assert live.wal.view.wal_header() is None


# -- threads that meet -------------------------------------------------------------------------------------------------


def test_a_gap_is_found_while_the_database_is_dropped(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread of an fsync has the WAL and would like the position; the worker the other way round."""
    live.put("one", 1)
    live.node.flush()
    live.put("MISSED", 40)
    live.sql("PRAGMA wal_checkpoint(RESTART)")
    live.put("two", 2)
    inside, dropping = threading.Event(), threading.Event()
    committed = live.wal.view.committed

    def look() -> Committed | None:
        if threading.current_thread().name == "fuse-0":
            inside.set()
            dropping.wait(1)
        return committed()

    monkeypatch.setattr(live.wal.view, "committed", look)
    naming = live.node.store.naming
    monkeypatch.setattr(naming, "record_drop", _before(naming.record_drop, dropping.set))
    fuse = threading.Thread(target=live.capture.collect_now, args=(live.database,), name="fuse-0", daemon=True)
    fuse.start()
    assert inside.wait(WAIT_S)
    live.node.store.worker.submit(naming.drop, live.database, database="db").result(WAIT_S)
    fuse.join(WAIT_S)
    assert not fuse.is_alive() and not live.database.exists


class Order:
    """Remembers which lock was taken under which. `RANKS`: the order of docs/CONCURRENCY.md, outermost first."""

    RANKS = ("Registry.lock", "WalCapture.mutex", "Database.lock", "LtxLog._lock", "CollectedQueue._lock")

    def __init__(self) -> None:
        self.held = threading.local()
        self.seen: dict[tuple[str, str], str] = {}

    def entered(self, name: str, owner: int) -> None:
        stack = self.held.__dict__.setdefault("stack", [])
        if (name, owner) not in stack:
            for outer, _ in stack:
                self.seen.setdefault((outer, name), threading.current_thread().name)
        stack.append((name, owner))

    def left(self, name: str, owner: int) -> None:
        stack = self.held.stack
        del stack[len(stack) - 1 - stack[::-1].index((name, owner))]

    def inversions(self) -> list[tuple[str, str]]:
        ranks = {name: rank for rank, name in enumerate(self.RANKS)}
        return [pair for pair in self.seen if ranks[pair[0]] > ranks[pair[1]]]

    def doubled(self) -> set[str]:
        """Threads that held the same lock of two databases."""
        return {thread for (outer, inner), thread in self.seen.items() if outer == inner}


class Watched:
    """A lock that tells an `Order`."""

    def __init__(self, lock: threading.Lock | threading.RLock, name: str, order: Order) -> None:
        self._lock, self._name, self._order = lock, name, order

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        taken = self._lock.acquire(blocking, timeout)
        if taken:
            self._order.entered(self._name, id(self))
        return taken

    def release(self) -> None:
        self._order.left(self._name, id(self))
        self._lock.release()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> Order:
    """Every database that is made from now on has locks that are watched."""
    found = Order()
    make = Database.__init__

    def made(self: Database, *args: object, **kwargs: object) -> None:
        make(self, *args, **kwargs)  # type: ignore[arg-type]
        for owner, attribute, name in (
            (self, "lock", "Database.lock"), (self.wal, "mutex", "WalCapture.mutex"),
            (self.log, "_lock", "LtxLog._lock"), (self.wal.collected, "_lock", "CollectedQueue._lock"),
        ):  # fmt: skip
            setattr(owner, attribute, Watched(getattr(owner, attribute), name, found))

    monkeypatch.setattr(Database, "__init__", made)
    return found


def test_an_inversion_would_be_seen(order: Order, tmp_path: Path) -> None:
    with contextlib.closing(new_primary(tmp_path / "node")) as node:
        database = node.database()
        with database.lock, database.wal.mutex:
            assert len(database.log.entries()) == 1
        assert ("Database.lock", "WalCapture.mutex") in order.inversions()


def test_locks_are_taken_in_one_order(order: Order, tmp_path: Path) -> None:
    with contextlib.closing(Live(tmp_path)) as live:
        node, store, capture = live.node, live.node.store, live.capture
        store.lock = Watched(store.lock, "Registry.lock", order)  # type: ignore[assignment]
        checkpoints = Checkpoints(store)

        def fsyncs() -> None:
            assert answer_of(lambda then: checkpoints.before_wal_fsync(live.database, then)) is None
            assert answer_of(lambda then: checkpoints.before_database_fsync(live.database, then)) is None

        live.open_shm()
        live.put("one", 1)
        live.database.flush().result(WAIT_S)
        live.put("two", 2)
        assert capture.collect_now(live.database)
        fsyncs()
        live.sql("PRAGMA wal_checkpoint(RESTART)")
        with live.wal.mutex:
            live.wal.doubt()
        live.put("three", 3)
        capture.collect_now(live.database)
        fsyncs()
        live.database.flush().result(WAIT_S)
        assert "gap" in node.kinds()
        live.sql("INSERT INTO t (v) SELECT randomblob(4000) FROM t, t")  # too large for the memory
        live.sql("INSERT INTO t (v) SELECT randomblob(4000) FROM t LIMIT 3000")
        fsyncs()
        live.check()
        for name in ("plain", "second", "third"):
            make_sqlite(store.plain_path(name), rows=5)
        _rename(
            node, FileRef("plain", FileKind.PLAIN, None, store.plain_path("plain")),
            FileRef("db", FileKind.DATABASE, "db", live.files.database),
        )  # fmt: skip
        assert store.import_plain("second") and store.import_plain("third")
        second, third = store.find("second"), store.find("third")
        _rename(
            node, FileRef("second", FileKind.DATABASE, "second", second.files.database),
            FileRef("third", FileKind.DATABASE, "third", third.files.database),
        )  # fmt: skip
        for kind in (FileKind.SHM, FileKind.WAL):
            store.worker.submit(capture.created, third, kind).result(WAIT_S)
            store.worker.submit(capture.removed, third, kind).result(WAIT_S)
        third.snapshot(None).close()
        store.worker.submit(store.naming.drop, third, database="third").result(WAIT_S)
        store.flush_all().result(WAIT_S)
        for thing in (second, third, live.database):
            thing.wal.doubt()
        store.flush_all().result(WAIT_S)
    assert order.inversions() == []
    assert order.doubled() <= {"engine"}
    assert ("WalCapture.mutex", "Database.lock") in order.seen
