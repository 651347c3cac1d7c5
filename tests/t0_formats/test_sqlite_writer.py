"""A WAL writer made of nothing but `wal`, `wal_index` and `locks`, beside readers of a real SQLite."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import struct
from pathlib import Path

import numpy as np
import pytest
from sqlite_samples import Reader, connect, copy_database, fill, sidecar

from pylitefs.formats.sqlite import locks, wal, wal_index
from pylitefs.formats.sqlite.wal import WalHeader, encode_frames, scan_frames
from pylitefs.formats.sqlite.wal_index import READMARK_NOT_USED, CheckpointInfo, HashTables, WalIndexHeader, read_header

F_OFD_GETLK, F_OFD_SETLK = 36, 37
FLOCK = struct.Struct("hhqqi4x")


def lock(fd: int, kind: int, start: int, length: int = 1) -> None:
    fcntl.fcntl(fd, F_OFD_SETLK, FLOCK.pack(kind, os.SEEK_SET, start, length, 0))


def holder(fd: int, start: int, length: int = 1, kind: int = fcntl.F_WRLCK) -> int:
    """The kind of lock that stands against ours, F_UNLCK for none."""
    answer = fcntl.fcntl(fd, F_OFD_GETLK, FLOCK.pack(kind, os.SEEK_SET, start, length, 0))
    return int(FLOCK.unpack(answer)[0])


class Writer:
    """Appends transactions to the WAL of `path` and publishes them, as wal.c orders it."""

    def __init__(self, path: Path, big_endian: bool = False) -> None:
        self.db, self.wal, self.shm = (os.open(sidecar(path, s), os.O_RDWR) for s in ("", "-wal", "-shm"))
        lock(self.db, fcntl.F_RDLCK, locks.SHARED_FIRST, locks.SHARED_SIZE)
        lock(self.shm, fcntl.F_RDLCK, locks.DMS)
        lock(self.shm, fcntl.F_WRLCK, locks.WRITE)
        found = read_header(os.pread(self.shm, wal_index.HEADER_SIZE, 0))
        assert found is not None and found.mx_frame == 0
        page_size = struct.unpack(">H", os.pread(self.db, 2, 16))[0]
        self.page_size = 65536 if page_size == 1 else page_size
        self.change, self.big_endian, self.tables = found.change, big_endian, HashTables()
        self.start_log(1, 0xFFFFFFFE, 0x80000001)

    def start_log(self, sequence: int, salt1: int, salt2: int) -> None:
        self.tables.clear()
        self.header = WalHeader.create(self.page_size, sequence, salt1, salt2, self.big_endian)
        self.sums = self.header.checksum1, self.header.checksum2
        os.pwrite(self.wal, self.header.pack(), 0)

    def restart(self) -> None:
        """walRestartHdr: new salts are published before any frame is overwritten."""
        for slot in range(1, locks.READ_SLOTS):
            lock(self.shm, fcntl.F_WRLCK, locks.read_lock(slot))
        salt1, salt2 = (self.header.salt1 + 1) & 0xFFFFFFFF, 0x12345678
        self.tables.clear()
        header = WalIndexHeader(self.change, self.big_endian, self.page_size, 0, self.pages, (0, 0), (salt1, salt2))
        self.publish(header)
        marks = (0, 0, READMARK_NOT_USED, READMARK_NOT_USED, READMARK_NOT_USED)
        os.pwrite(self.shm, CheckpointInfo(0, marks, 0).pack(), wal_index.CHECKPOINT_INFO_OFFSET)
        for slot in range(1, locks.READ_SLOTS):
            lock(self.shm, fcntl.F_UNLCK, locks.read_lock(slot))
        self.start_log(self.header.checkpoint_seq + 1, salt1, salt2)

    def commit(self, pgnos: list[int], pages: list[bytes], size: int, split: int | None = None) -> None:
        first = self.tables.mx_frame + 1
        at, sums = wal.frame_offset(first, self.page_size), self.sums
        cut = len(pgnos) if split is None else split
        for part, commit in ((slice(0, cut), 0 if cut < len(pgnos) else size), (slice(cut, None), size)):
            run, *sums = encode_frames(self.header, pgnos[part], pages[part], commit, *sums)
            os.pwrite(self.wal, run, at)
            at += len(run)
        for offset, data in self.tables.append(pgnos):
            os.pwrite(self.shm, data, offset)
        self.change, self.sums, self.pages = (self.change + 1) & 0xFFFFFFFF, (sums[0], sums[1]), size
        self.publish(
            WalIndexHeader(
                self.change, self.big_endian, self.page_size, self.tables.mx_frame, size, self.sums, self.header.salts
            )
        )

    def publish(self, header: WalIndexHeader) -> None:
        os.pwrite(self.shm, header.pack(), 48)
        os.pwrite(self.shm, header.pack(), 0)

    def close(self) -> None:
        for fd in (self.shm, self.wal, self.db):
            os.close(fd)


class Source:
    """A database that a real SQLite writes; hands out its transactions."""

    def __init__(self, path: Path) -> None:
        self.path, self.frame = path, 0

    def transactions(self) -> list[tuple[list[int], list[bytes], int]]:
        data = sidecar(self.path, "-wal").read_bytes()
        header = WalHeader.unpack(data)
        if self.frame == 0:
            self.sums = header.checksum1, header.checksum2
        at = wal.frame_offset(self.frame + 1, header.page_size)
        scan = scan_frames(header, memoryview(data)[at:], *self.sums)
        self.sums, self.frame = (scan.s0, scan.s1), self.frame + scan.count
        frames = np.frombuffer(data[at:], np.uint8).reshape(-1, header.frame_size)[:, 24:]
        found, start = [], 0
        for end in (np.flatnonzero(scan.commits) + 1).tolist():
            last = {int(pgno): i for i, pgno in enumerate(scan.pgnos[start:end], start)}
            found.append((list(last), [frames[i].tobytes() for i in last.values()], int(scan.commits[end - 1])))
            start = end
        return found


SUM = "SELECT count(*), sum(a), sum(length(b)), max(id) FROM t"


@pytest.mark.parametrize("page_size, big_endian, transactions", [
    (512, False, 1200), (1024, True, 60), (4096, False, 200), (4096, True, 30), (65536, False, 12),
])  # fmt: skip
def test_readers_see_what_we_commit(tmp_path: Path, page_size: int, big_endian: bool, transactions: int) -> None:
    (tmp_path / "source").mkdir()
    origin = tmp_path / "source" / "x.db"
    primary = connect(origin, page_size)
    fill(primary, 1)
    primary.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    path = copy_database(origin, tmp_path / "replica", ())
    source = Source(origin)

    with Reader(path) as reader, Reader(path) as old:
        before = old(SUM)
        assert before == primary.execute(SUM).fetchall()
        writer = Writer(path, big_endian)
        assert "database is locked" in str(reader("BEGIN IMMEDIATE"))
        old("BEGIN")
        assert old(SUM) == before

        fill(primary, transactions // 3)
        for pgnos, pages, size in source.transactions():
            writer.commit(pgnos, pages, size)
        assert reader(SUM) == primary.execute(SUM).fetchall() != before
        fill(primary, transactions // 3, rows=5)
        for pgnos, pages, size in source.transactions():
            writer.commit(pgnos, pages, size, split=len(pgnos) // 2)
        assert reader(SUM) == primary.execute(SUM).fetchall()
        assert reader("PRAGMA integrity_check") == [("ok",)]
        assert old(SUM) == before
        old("COMMIT")
        assert old(SUM) == reader(SUM)
        if page_size == 512:
            assert writer.tables.mx_frame > 8158

        recovers_without_shm(path, tmp_path / "crashed", primary, reader)

        busy, log, done = reader("PRAGMA wal_checkpoint(PASSIVE)")[0]  # type: ignore[index]
        assert (busy, log, done) == (0, writer.tables.mx_frame, writer.tables.mx_frame)
        writer.restart()
        assert reader(SUM) == primary.execute(SUM).fetchall()
        fill(primary, transactions // 3)
        for pgnos, pages, size in source.transactions():
            writer.commit(pgnos, pages, size)
        assert reader(SUM) == primary.execute(SUM).fetchall()
        assert reader("PRAGMA integrity_check") == [("ok",)]
        recovers_without_shm(path, tmp_path / "crashed", primary, reader)
        writer.close()
        assert reader("INSERT INTO t(a) VALUES (1)") == []  # SQLite goes on from our frames
        assert old("PRAGMA integrity_check") == [("ok",)]
    primary.close()
    assert not sidecar(path, "-wal").exists()
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    db.close()


def recovers_without_shm(path: Path, folder: Path, primary: sqlite3.Connection, reader: Reader) -> None:
    """A fresh SQLite finds the same rows, and rebuilds the same tables, from the WAL alone."""
    copy = copy_database(path, folder, ("-wal",))
    db = sqlite3.connect(copy)
    db.execute("PRAGMA wal_autocheckpoint=0")
    assert db.execute(SUM).fetchall() == primary.execute(SUM).fetchall()
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    rebuilt, ours = sidecar(copy, "-shm").read_bytes(), sidecar(path, "-shm").read_bytes()
    db.close()
    header, expected = read_header(ours), read_header(rebuilt)
    assert header is not None and expected is not None
    assert (header.mx_frame, header.page_count, header.salts, header.frame_checksum) == (
        expected.mx_frame, expected.page_count, expected.salts, expected.frame_checksum
    )  # fmt: skip
    end = (wal_index.region_of(header.mx_frame) + 1) * wal_index.REGION_SIZE
    assert ours[136:end] == rebuilt[136:end]


def test_the_lock_bytes_are_those_of_sqlite(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    db = connect(path)
    fill(db, 2)
    db.close()
    with Reader(path) as one:
        one(SUM)
        main, shm = os.open(path, os.O_RDWR), os.open(sidecar(path, "-shm"), os.O_RDWR)
        try:
            assert holder(main, locks.SHARED_FIRST, locks.SHARED_SIZE) == fcntl.F_RDLCK
            assert holder(main, locks.PENDING) == holder(main, locks.RESERVED) == fcntl.F_UNLCK
            assert holder(shm, locks.DMS) == fcntl.F_RDLCK
            assert holder(shm, locks.WRITE, 8) == fcntl.F_UNLCK
            one("BEGIN")
            one(SUM)
            assert holder(shm, locks.READ0) == fcntl.F_RDLCK  # an empty WAL is ignored
            one("INSERT INTO t(a) VALUES (1)")
            assert holder(shm, locks.WRITE) == fcntl.F_WRLCK
            assert holder(shm, locks.CKPT, 2) == fcntl.F_UNLCK
            one("COMMIT")
            one("BEGIN")
            one(SUM)
            assert holder(shm, locks.read_lock(0)) == fcntl.F_UNLCK
            assert holder(shm, locks.read_lock(1), locks.READ_SLOTS - 1) == fcntl.F_RDLCK
            one("COMMIT")
            lock(shm, fcntl.F_WRLCK, locks.CKPT)
            assert one("PRAGMA wal_checkpoint")[0][0] == 1  # type: ignore[index]
            lock(shm, fcntl.F_UNLCK, locks.CKPT)
        finally:
            os.close(shm)
            os.close(main)


def test_the_lock_bytes_of_a_rollback_journal(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    db = connect(path, journal_mode="delete")
    fill(db, 2)
    db.close()
    with Reader(path) as one, Reader(path) as two:
        main = os.open(path, os.O_RDWR)
        try:
            one("BEGIN IMMEDIATE")
            assert holder(main, locks.RESERVED) == fcntl.F_WRLCK
            assert holder(main, locks.PENDING) == fcntl.F_UNLCK
            one("ROLLBACK")
            one("BEGIN EXCLUSIVE")
            assert holder(main, locks.PENDING) == fcntl.F_WRLCK
            assert holder(main, locks.SHARED_FIRST, locks.SHARED_SIZE, fcntl.F_RDLCK) == fcntl.F_WRLCK
            one("ROLLBACK")
            two("BEGIN")
            two(SUM)
            assert holder(main, locks.SHARED_FIRST, locks.SHARED_SIZE) == fcntl.F_RDLCK
            assert holder(main, locks.SHARED_FIRST, locks.SHARED_SIZE, fcntl.F_RDLCK) == fcntl.F_UNLCK
        finally:
            os.close(main)


@pytest.mark.parametrize("slot", [-1, 5])
def test_there_are_five_read_slots(slot: int) -> None:
    with pytest.raises(ValueError):
        locks.read_lock(slot)
