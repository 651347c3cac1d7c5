"""Capture in the rollback modes. The application's writes are intercepted by the filesystem; here they are noted by
comparing the file before and after, which is what the filesystem's hook would have seen."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
from engine_nodes import Node, check_log, new_primary, replay
from hypothesis import given
from hypothesis import strategies as st
from limits import largest_file
from sqlite_process import SqliteProcess

from pylitefs.engine.rollback_capture import DirtyRanges, database_size, is_complete_database, journal_in_use
from pylitefs.errors import FormatError


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 2000)), max_size=12), st.integers(1, 12))
def test_ranges_name_the_pages_they_touch(writes: list[tuple[int, int]], commit: int) -> None:
    ranges = DirtyRanges()
    expected = set()
    for offset, size in writes:
        ranges.add(offset, size)
        expected |= {byte // 512 + 1 for byte in range(offset, offset + size)}
    assert ranges.pgnos(512, commit).tolist() == sorted(pgno for pgno in expected if pgno <= commit)
    assert bool(ranges) == bool(writes)
    ranges.clear()
    assert not ranges and ranges.pgnos(512, commit).tolist() == []


class Live:
    def __init__(self, folder: Path, mode: str) -> None:
        self.node: Node = new_primary(folder, mode="DELETE", page_size=1024)
        self.database = self.node.database()
        self.sql = SqliteProcess(self.database.files.database)
        self.sql(f"PRAGMA journal_mode = {mode}")
        self.before = self.content()

    def content(self) -> bytes:
        return Path(self.database.files.database).read_bytes()

    def note(self) -> None:
        """Tell the capture what was written since the last call."""
        now = self.content()
        size = max(len(now), len(self.before))
        old = np.frombuffer(self.before.ljust(size, b"\0"), dtype=np.uint8)
        new = np.frombuffer(now.ljust(size, b"\0"), dtype=np.uint8)
        for offset in range(0, size, 1024):
            if not np.array_equal(old[offset : offset + 1024], new[offset : offset + 1024]):
                self.database.rollback.note(offset, 1024)
        self.before = now

    def commit(self, sql: str, *values: object) -> bool:
        self.sql(sql, *values)
        self.note()
        return self.node.store.capture.commit_point(self.database)

    def check(self) -> None:
        check_log(self.database)
        assert replay(self.database) == self.content()

    def close(self) -> None:
        self.sql.kill()
        self.node.close(clean=False)


@pytest.fixture(params=["DELETE", "TRUNCATE", "PERSIST", "MEMORY", "OFF"])
def live(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Live]:
    made = Live(tmp_path, request.param)
    yield made
    made.close()


def test_commits_are_captured(live: Live) -> None:
    for count in range(1, 5):
        assert live.commit("INSERT INTO t (v) VALUES (randomblob(3000))")
        assert live.database.position.txid == 1 + count
        live.check()
    assert live.commit("DELETE FROM t WHERE id < 6")
    assert live.commit("VACUUM")
    live.check()


def test_nothing_noted_is_no_transaction(live: Live) -> None:
    assert not live.node.store.capture.commit_point(live.database)
    live.database.rollback.note(0, 3000)
    assert not live.node.store.capture.commit_point(live.database), "pages that did not change are no transaction"
    assert live.database.position.txid == 1 and not live.database.rollback.pending


def test_writes_that_nobody_noted_are_found_by_comparison(live: Live) -> None:
    live.sql("INSERT INTO t (v) VALUES (randomblob(9000))")
    live.database.rollback.suspect = True
    assert live.node.store.capture.commit_point(live.database)
    assert "repair" in live.node.kinds()
    live.check()


def test_another_page_size(live: Live) -> None:
    live.sql("PRAGMA page_size = 4096")
    assert live.commit("VACUUM")
    assert live.database.page_size == 4096
    live.check()


def test_a_full_disk_keeps_the_notes(live: Live) -> None:
    live.sql("INSERT INTO t (v) VALUES (randomblob(200000))")
    live.note()
    with largest_file(32 << 10), pytest.raises(OSError):
        live.node.store.capture.commit_point(live.database)
    assert live.database.rollback.pending and live.database.position.txid == 1
    assert live.node.store.capture.commit_point(live.database)
    live.check()


def test_a_commit_that_nobody_could_look_at_is_not_answered_as_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the modes MEMORY and OFF an fsync waits until SQLite's locks were looked at. If the daemon has no descriptor
    left for that, the fsync fails; the write is recorded later."""
    live = Live(tmp_path, "MEMORY")
    try:
        live.sql("INSERT INTO t (v) VALUES (randomblob(3000))")
        live.note()
        capture, answers = live.node.store.capture, SimpleQueue[BaseException | None]()
        with monkeypatch.context() as patched:
            patched.setattr(live.node.store.opener, "open", lambda paths, flags, opened: opened(None))
            capture.settle_later(live.database, answers.put, ended=True, synced_by=0)
            assert isinstance(answers.get(timeout=10), OSError)
        assert live.database.rollback.pending and live.database.position.txid == 1
        capture.settle_later(live.database, answers.put, ended=True, synced_by=0)
        assert answers.get(timeout=10) is None
        live.check()
        assert live.database.position.txid == 2
    finally:
        live.close()


def test_an_open_transaction_is_not_settled(tmp_path: Path) -> None:
    live = Live(tmp_path, "DELETE")
    try:
        live.sql("PRAGMA cache_size = 2")
        live.sql("BEGIN")
        live.sql("INSERT INTO t (v) VALUES (randomblob(30000))")
        live.note()
        assert live.database.rollback.pending and live.database.rollback.journal_in_use()
        fd = os.open(live.database.files.database, os.O_RDONLY)
        assert not live.node.store.capture.settle_rollback(live.database, fd)
        live.sql("COMMIT")
        live.note()
        assert live.node.store.capture.settle_rollback(live.database, fd)
        os.close(fd)
        live.check()
        assert live.database.position.txid == 2
    finally:
        live.close()


def test_a_lock_without_a_journal_is_not_settled(tmp_path: Path) -> None:
    live = Live(tmp_path, "MEMORY")
    try:
        live.sql("PRAGMA cache_size = 2")
        live.sql("BEGIN")
        live.sql("INSERT INTO t (v) VALUES (randomblob(30000))")
        live.note()
        assert live.node.store.flush(live.database).result(timeout=20).txid == 1
        live.sql("COMMIT")
        live.note()
        assert live.node.store.flush(live.database).result(timeout=20).txid == 2
        live.check()
    finally:
        live.close()


def test_the_journals_nonce_tells_transactions_apart(tmp_path: Path) -> None:
    """PERSIST in exclusive locking mode: the header's zeroing may not have been seen."""
    live = Live(tmp_path, "PERSIST")
    try:
        live.sql("PRAGMA cache_size = 2")
        rollback = live.database.rollback
        for round_ in range(2):
            live.sql("BEGIN")
            live.sql("INSERT INTO t (v) VALUES (randomblob(30000))")
            assert rollback.starts_transaction() == (round_ == 1)
            assert not rollback.starts_transaction()
            live.note()
            live.sql("COMMIT")
            assert rollback.journal_is_finished() and not rollback.journal_in_use()
    finally:
        live.close()


def test_sizes_and_completeness(tmp_path: Path) -> None:
    live = Live(tmp_path / "node", "DELETE")
    try:
        data = live.content()
    finally:
        live.close()
    assert database_size(data[:100], len(data)) == (1024, len(data) // 1024)
    with pytest.raises(FormatError):
        database_size(b"x" * 100, 4096)
    path = tmp_path / "file"
    for content, complete in [
        (data, True), (data[:-1], True), (data + b"trailing", True), (data[:-1024], False), (data[:1024], False),
        (b"", False), (b"text", False), (bytes(4096), False),
    ]:  # fmt: skip
        path.write_bytes(content)
        assert is_complete_database(str(path)) == complete
    assert not is_complete_database(str(tmp_path / "none"))
    journal = tmp_path / "journal"
    assert not journal_in_use(str(journal))
    for content, used in [(b"", False), (bytes(512), False), (b"\xd9" * 27, False), (b"\xd9" * 28, True)]:
        journal.write_bytes(content)
        assert journal_in_use(str(journal)) == used
