"""Capture beside a live SQLite in WAL mode."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_nodes import check_log, copy_of, new_primary, replay, rows_of
from limits import largest_file
from sqlite_process import SqliteProcess

from pylitefs.engine import ofd_locks
from pylitefs.engine.barrier import Barrier
from pylitefs.engine.database import Database
from pylitefs.engine.transaction import UnstableSource
from pylitefs.engine.wal_capture import FRESH
from pylitefs.formats.ltx.decoder import Reader
from pylitefs.formats.sqlite.locks import CKPT, SHARED_FIRST, SHARED_SIZE
from pylitefs.formats.sqlite.wal_index import HEADER_COPY_SIZE
from pylitefs.ports import FileKind


class Live:
    """A primary and an application that has its database open. `checkpoints`: 0 turns SQLite's own off."""

    def __init__(self, folder: Path, *, page_size: int = 4096) -> None:
        self.folder = folder
        self.node = new_primary(folder / "node", page_size=page_size)
        self.database: Database = self.node.database()
        self.sql = SqliteProcess(self.database.files.database)
        self.sql("PRAGMA wal_autocheckpoint = 0")

    def insert(self, count: int = 1, size: int = 50) -> None:
        for _ in range(count):
            self.sql("INSERT INTO t (v) VALUES (randomblob(?))", size)

    def check(self) -> None:
        """The log replayed is what SQLite sees now."""
        self.node.flush()
        check_log(self.database)
        image = copy_of(self.node, self.folder / "copy")
        assert replay(self.database) == image
        expected = self.sql("SELECT id, v FROM t ORDER BY id")
        assert rows_of(self.folder / "copy") == expected

    def close(self) -> None:
        self.sql.kill()
        self.node.close(clean=False)


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    made = Live(tmp_path)
    yield made
    made.close()


def test_each_commit_is_captured_once(live: Live) -> None:
    for count in range(1, 4):
        live.insert()
        assert live.node.flush().txid == 1 + count
        assert live.node.flush().txid == 1 + count
    live.check()
    assert live.node.kinds() == ["recovered"]


def test_a_batch_counts_its_transactions(live: Live) -> None:
    live.insert(17)
    assert live.node.flush().txid == 18
    entry = live.database.log.entries()[-1]
    assert (entry.min_txid, entry.max_txid) == (2, 18)
    pgnos = [pgno for pgno, _ in Reader(entry.chunks())]
    assert pgnos == sorted(set(pgnos)), "each page once"
    live.check()


def test_an_open_transaction_is_not_captured(live: Live) -> None:
    live.sql("PRAGMA cache_size = 3")
    live.insert()
    live.node.flush()
    live.sql("BEGIN")
    live.insert(60, 3000)  # spills uncommitted frames into the WAL
    assert live.node.flush().txid == 2
    live.sql("ROLLBACK")
    assert live.node.flush().txid == 2
    live.insert()
    assert live.node.flush().txid == 3
    live.check()


@pytest.mark.parametrize("page_size", [512, 1024, 65536])
def test_page_sizes(tmp_path: Path, page_size: int) -> None:
    live = Live(tmp_path, page_size=page_size)
    try:
        live.insert(5, 2000)
        live.check()
        live.sql("DELETE FROM t WHERE id > 2")
        live.check()
        assert live.database.position.txid == 7
    finally:
        live.close()


@pytest.mark.parametrize("kind", ["PASSIVE", "FULL", "RESTART", "TRUNCATE"])
def test_checkpoints_of_every_kind(live: Live, kind: str) -> None:
    for _ in range(4):
        live.insert(3, 400)
        live.node.flush()
        live.sql(f"PRAGMA wal_checkpoint({kind})")
    live.check()
    assert live.database.position.txid == 13
    assert "gap" not in live.node.kinds()


def test_a_restart_between_passes_is_followed(live: Live) -> None:
    """All of the old generation is in the log; the commits of the new one are counted from its frames."""
    live.insert(4)
    live.node.flush()
    live.sql("PRAGMA wal_checkpoint(RESTART)")
    live.insert(3)
    assert live.node.flush().txid == 8
    assert "gap" not in live.node.kinds()
    live.check()


def test_a_restart_without_new_frames(live: Live) -> None:
    live.insert(2)
    live.node.flush()
    live.sql("PRAGMA wal_checkpoint(TRUNCATE)")
    assert live.node.flush().txid == 3
    live.insert()
    assert live.node.flush().txid == 4
    live.check()
    assert "gap" not in live.node.kinds()


@pytest.mark.parametrize("after", [0, 1, 30])
def test_missed_transactions_are_repaired_by_diff(live: Live, after: int) -> None:
    live.insert(2)
    live.node.flush()
    live.insert(5, 9000)
    live.sql("PRAGMA wal_checkpoint(RESTART)")
    live.insert()  # overwrites frames that nobody captured
    live.sql("PRAGMA wal_checkpoint(TRUNCATE)")
    live.insert(after)
    live.node.flush()
    assert [kind for kind in live.node.kinds() if kind in ("gap", "repair")] == ["gap", "repair"]
    live.check()
    live.insert()
    live.check()
    assert live.node.kinds().count("gap") == 1


def test_a_gap_that_changed_nothing_is_no_transaction(live: Live) -> None:
    live.insert(1)
    before = live.node.flush()
    live.sql("BEGIN")
    live.sql("UPDATE t SET v = v WHERE id = 1")
    live.sql("COMMIT")
    live.sql("PRAGMA wal_checkpoint(TRUNCATE)")
    live.insert(1)
    after = live.node.flush()
    assert after.txid == before.txid + 1
    live.check()


def test_unknown_counters_after_a_start(live: Live) -> None:
    """The capture begins beside an application that was there before it: a cursor of which nothing is known."""
    live.insert(5)
    live.node.flush()
    live.database.wal.cursor = FRESH
    live.node.flush()
    live.insert(2)
    live.check()


def test_a_torn_index_header_is_not_believed(live: Live) -> None:
    live.insert(2)
    live.node.flush()
    live.insert()
    shm = os.open(live.database.files.shm, os.O_RDWR)
    good = os.pread(shm, 2 * HEADER_COPY_SIZE, 0)
    try:
        for offset in (0, HEADER_COPY_SIZE):
            torn = bytearray(good)
            torn[offset + 17] ^= 0x55
            os.pwrite(shm, torn, 0)
            assert live.node.flush().txid == 3
        os.pwrite(shm, good, 0)
        assert live.node.flush().txid == 4
    finally:
        os.close(shm)
    live.check()


def test_a_generation_that_was_overwritten_while_it_was_read(live: Live) -> None:
    live.insert(3)
    batch = live.database.wal.next_batch()
    assert batch is not None and batch.change.txids == 3
    live.sql("PRAGMA wal_checkpoint(RESTART)")
    live.insert()
    with pytest.raises(UnstableSource):
        live.database.record(
            batch.change, batch.pages, batch.read_missing, lambda: live.database.wal.is_stable(batch), "capture"
        )
    live.check()


def test_a_whole_generation_went_by_before_the_first_pass(live: Live) -> None:
    """With synchronous=OFF no hook announces a checkpoint; the new index counts from zero."""
    live.node.store.capture.created(live.database, FileKind.SHM)
    live.node.store.capture.created(live.database, FileKind.WAL)
    live.insert(3, 5000)
    live.sql("PRAGMA wal_checkpoint(TRUNCATE)")
    assert live.node.flush().txid == 2
    assert live.node.kinds()[-2:] == ["gap", "repair"]
    live.check()
    live.insert()
    live.check()


def test_pages_that_were_allocated_and_freed(live: Live) -> None:
    """The database grows over pages that are in no frame."""
    live.sql("BEGIN")
    live.insert(30, 20_000)
    live.sql("DELETE FROM t WHERE id > 4")
    live.sql("COMMIT")
    live.check()
    live.insert(10, 20_000)
    live.check()


def test_vacuum_shrinks(live: Live) -> None:
    live.insert(20, 20_000)
    live.node.flush()
    large = live.database.commit
    live.sql("DELETE FROM t WHERE id > 3")
    live.sql("VACUUM")
    live.check()
    assert live.database.commit < large / 2


def test_no_index_in_exclusive_locking_mode(live: Live) -> None:
    live.insert()
    live.node.flush()
    live.sql.close()
    live.node.store.capture.created(live.database, FileKind.WAL)
    live.database.wal.removed(FileKind.WAL)
    live.database.wal.removed(FileKind.SHM)
    live.sql("PRAGMA locking_mode = EXCLUSIVE")
    live.sql("PRAGMA wal_autocheckpoint = 0")
    start = live.database.position.txid
    for count in range(1, 4):
        live.insert()
        assert not os.path.exists(live.database.files.shm)
        assert live.node.flush().txid == start + count
    live.insert(8)
    assert live.node.flush().txid == start + 11
    live.sql("BEGIN")
    live.insert()
    assert live.node.flush().txid == start + 11
    live.sql("COMMIT")
    live.check()


def test_an_exclusive_restart_that_was_not_announced_is_repaired(live: Live) -> None:
    live.sql.close()
    for kind in (FileKind.WAL, FileKind.SHM):
        live.database.wal.removed(kind)
    live.sql("PRAGMA locking_mode = EXCLUSIVE")
    live.insert(3)
    live.node.flush()
    live.insert(4, 5000)
    live.sql("PRAGMA wal_checkpoint(RESTART)")
    live.insert(1)
    live.check()
    assert "repair" in live.node.kinds()


def test_the_last_connection_closes(live: Live) -> None:
    """Its checkpoint and its unlink of the WAL are announced; the next connection makes new files."""
    live.insert(3)
    live.node.flush()
    live.sql.close()
    assert not os.path.exists(live.database.files.wal)
    live.database.wal.removed(FileKind.WAL)
    live.database.wal.removed(FileKind.SHM)
    live.sql("PRAGMA wal_autocheckpoint = 0")
    live.insert(2)
    assert live.node.flush().txid == 6
    live.check()
    assert "gap" not in live.node.kinds()


def test_many_frames_over_many_regions_of_the_index(live: Live) -> None:
    live.sql("PRAGMA synchronous = OFF")
    live.sql.many("INSERT INTO t (v) VALUES (zeroblob(?))", [(10,)] * 9000)
    live.check()
    assert live.database.position.txid == 9001
    live.sql("BEGIN")
    live.sql.many("INSERT INTO t (v) VALUES (zeroblob(?))", [(3900,)] * 9000)
    live.sql("COMMIT")
    live.check()
    assert live.database.position.txid == 9002


def test_a_full_disk_is_waited_out(live: Live) -> None:
    live.insert(2)
    before = live.node.flush()
    live.insert(20, 20_000)
    with largest_file(64 << 10):
        for _ in range(2):
            with pytest.raises(OSError):
                live.node.flush()
    assert live.database.position == before
    live.insert(2)
    assert live.node.flush().txid == before.txid + 22
    assert [kind for kind in live.node.kinds() if kind.startswith("disk")] == ["diskFull", "diskFreed"]
    live.check()


class TestBarrier:
    """It stops a restart of the WAL, no checkpoint, no reader and no writer."""

    @staticmethod
    def hold(live: Live) -> list[int]:
        files = live.database.files
        fds = [os.open(path, os.O_RDWR | os.O_CLOEXEC) for path in (files.database, files.shm)]
        assert live.database.wal.hold_restart(fds)
        return fds

    def test_it_keeps_frames(self, live: Live) -> None:
        live.insert(3)
        self.hold(live)
        salts = live.database.wal.view.wal_header()
        busy, log_frames, copied = live.sql("PRAGMA wal_checkpoint(PASSIVE)")[0]
        assert busy == 0 and log_frames == copied > 0, "the checkpoint is not limited"
        live.insert(2)
        assert live.database.wal.view.wal_header() == salts, "no restart"
        assert live.sql("PRAGMA wal_checkpoint(RESTART)")[0][0] == 1
        assert live.node.flush().txid == 6
        for fd in live.database.wal.barrier.release():
            os.close(fd)
        assert live.sql("PRAGMA wal_checkpoint(RESTART)")[0][0] == 0
        live.insert()
        assert live.database.wal.view.wal_header() != salts
        live.check()
        assert "gap" not in live.node.kinds()

    def test_the_last_connection_cannot_delete_the_wal(self, live: Live) -> None:
        live.insert(3)
        fds = self.hold(live)
        live.sql.close()
        assert os.path.exists(live.database.files.wal)
        assert live.node.flush().txid == 4
        assert ofd_locks.write_locked(fds[0], SHARED_FIRST, SHARED_SIZE) is None
        live.sql("SELECT 1")
        live.check()

    def test_it_is_not_taken_against_an_exclusive_lock(self, live: Live) -> None:
        live.insert()
        files = live.database.files
        mine = [os.open(path, os.O_RDWR | os.O_CLOEXEC) for path in (files.database, files.shm)]
        other = os.open(files.database, os.O_RDWR | os.O_CLOEXEC)
        live.sql.kill()
        assert ofd_locks.try_lock(other, SHARED_FIRST, SHARED_SIZE, exclusive=True)
        barrier = Barrier()
        assert not barrier.acquire(mine, live.database.wal.view) and not barrier.held
        for fd in (*mine, other):
            os.close(fd)

    def test_it_protects_the_present_generation_where_an_earlier_one_is_lost(self, live: Live) -> None:
        live.insert()
        live.node.flush()
        live.insert()
        live.sql("PRAGMA wal_checkpoint(RESTART)")
        live.insert()
        files = live.database.files
        fds = [os.open(path, os.O_RDWR | os.O_CLOEXEC) for path in (files.database, files.shm)]
        assert live.database.wal.hold_restart(fds)
        assert live.sql("PRAGMA wal_checkpoint(RESTART)")[0][0] == 1
        live.check()
        assert live.node.kinds().count("gap") == 1
        for fd in live.database.wal.barrier.release():
            os.close(fd)


def test_who_checkpoints_is_known(live: Live) -> None:
    live.insert()
    wal = live.database.wal
    assert wal.checkpoint_running(), "unknown counts as yes"
    wal.use_shm(os.open(live.database.files.shm, os.O_RDWR | os.O_CLOEXEC))
    assert not wal.checkpoint_running()
    other = os.open(live.database.files.shm, os.O_RDWR | os.O_CLOEXEC)
    assert ofd_locks.try_lock(other, CKPT, exclusive=True)
    assert wal.checkpoint_running()
    os.close(other)
    assert not wal.checkpoint_running()


def test_an_application_that_was_killed(live: Live, tmp_path: Path) -> None:
    """Its WAL and index stay; what it committed is captured, what it had not is not."""
    live.insert(3)
    live.sql("PRAGMA cache_size = 3")
    live.sql("BEGIN")
    live.insert(50, 3000)
    live.sql.kill()
    assert live.node.flush().txid == 4
    shutil.copyfile(live.database.files.database, tmp_path / "alone")
    shutil.copyfile(live.database.files.wal, tmp_path / "alone-wal")
    live.sql = SqliteProcess(live.database.files.database)
    live.sql("PRAGMA wal_autocheckpoint = 0")
    assert live.sql("SELECT id, v FROM t ORDER BY id") == rows_of(tmp_path / "alone")
    live.insert()
    live.check()
    assert live.database.position.txid == 5
