from __future__ import annotations

import os
import sqlite3
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlite_samples import ALL_PAGE_SIZES, connect, fill, sidecar

from pylitefs import mount_guard
from pylitefs.errors import FormatError, TruncatedError
from pylitefs.formats.sqlite import wal_index
from pylitefs.formats.sqlite.wal import WalHeader, scan_frames
from pylitefs.formats.sqlite.wal_index import CheckpointInfo, HashTables, WalIndexHeader, read_header

u32 = st.integers(0, 2**32 - 1)
pairs = st.tuples(u32, u32)
pgno_lists = st.lists(st.integers(1, 2**32 - 1) | st.integers(1, 40), max_size=60)


class ShmFile(bytearray):
    """What patches make of a file."""

    def apply(self, patches: list[tuple[int, bytes]]) -> None:
        for offset, data in patches:
            if len(self) < offset + len(data):
                self.extend(bytes(offset + len(data) - len(self)))
            self[offset : offset + len(data)] = data


def find_frame(shm: bytes, pgno: int, mx_frame: int) -> int:
    """sqlite3WalFindFrame, as wal.c describes it: the newest frame of a page, by the file's hash tables alone."""
    for region in range(wal_index.region_of(mx_frame) if mx_frame else -1, -1, -1):
        before = 4062 + (region - 1) * 4096 if region else 0
        pgnos = struct.unpack_from("<4096I", shm, region * 32768)
        pgnos = pgnos[34:] if region == 0 else pgnos
        slots = struct.unpack_from("<8192H", shm, region * 32768 + 16384)
        key, found = pgno * 383 % 8192, 0
        while slots[key]:
            frame = before + slots[key]
            if frame <= mx_frame and pgnos[slots[key] - 1] == pgno:
                found = max(found, frame)
            key = (key + 1) % 8192
        if found:
            return found
    return 0


@pytest.mark.parametrize("page_size", ALL_PAGE_SIZES)
def test_header_and_checkpoint_info_of_a_real_database(tmp_path: Path, page_size: int) -> None:
    path = tmp_path / "x.db"
    db = connect(path, page_size)
    fill(db, 5)
    before = read_header(sidecar(path, "-shm").read_bytes())
    fill(db, 3)
    shm, data = sidecar(path, "-shm").read_bytes(), sidecar(path, "-wal").read_bytes()
    pages = db.execute("PRAGMA page_count").fetchone()[0]
    wal_header = WalHeader.unpack(data)
    scan = scan_frames(wal_header, data[32:], wal_header.checksum1, wal_header.checksum2)
    header = read_header(shm)
    assert before is not None and header is not None
    assert header.change - before.change == 3
    assert header.page_size == page_size and header.page_count == pages
    assert header.mx_frame == scan.committed and header.frame_checksum == (scan.s0, scan.s1)
    assert header.salts == wal_header.salts and header.big_endian_checksum == wal_header.big_endian
    assert header.pack() == shm[:48] == shm[48:96]
    assert WalIndexHeader.unpack(header.pack()) == header

    info = CheckpointInfo.unpack(shm[96:136])
    assert (info.backfill, info.backfill_attempted) == (0, 0)
    db.execute("PRAGMA wal_checkpoint(PASSIVE)")
    shm = sidecar(path, "-shm").read_bytes()
    info = CheckpointInfo.unpack(memoryview(shm)[96:])
    assert info.backfill == info.backfill_attempted == header.mx_frame
    assert info.pack() == shm[96:136]
    assert struct.unpack_from("<5I", shm, wal_index.read_mark_offset(0)) == info.read_marks
    assert struct.unpack_from("<I", shm, wal_index.BACKFILL_OFFSET)[0] == info.backfill
    assert struct.unpack_from("<I", shm, wal_index.BACKFILL_ATTEMPTED_OFFSET)[0] == info.backfill
    assert wal_index.READMARK_NOT_USED in info.read_marks
    db.close()


def test_the_header_that_recovery_writes_without_a_wal(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    connect(path).close()
    db = sqlite3.connect(path)
    db.execute("SELECT * FROM sqlite_master").fetchall()
    header = read_header(sidecar(path, "-shm").read_bytes())
    db.close()
    assert header is not None
    assert header.mx_frame == 0 and header.pack() == WalIndexHeader.unpack(header.pack()).pack()


def test_torn_or_unwritten_headers_are_none() -> None:
    header = WalIndexHeader(5, False, 4096, 9, 4, (1, 2), (3, 4))
    good = header.pack() * 2 + bytes(40)
    assert read_header(good) == header and read_header(memoryview(good)) == header
    newer = WalIndexHeader(6, False, 4096, 10, 4, (1, 2), (3, 4)).pack()
    assert read_header(good[:48] + newer) is None
    assert read_header(bytes(136)) is None
    assert read_header(good[:95]) is None
    assert read_header(b"") is None
    uninitialised = WalIndexHeader(5, False, 4096, 9, 4, (1, 2), (3, 4), is_init=False).pack()
    assert read_header(uninitialised * 2) is None
    for at in range(48):
        bad = bytearray(good[:48])
        bad[at] ^= 0x40
        assert read_header(bytes(bad * 2)) is None


@given(u32, st.booleans(), st.sampled_from(ALL_PAGE_SIZES), u32, u32, pairs, pairs, st.booleans())
def test_header_round_trip(
    change: int, big: bool, page_size: int, mx: int, pages: int, sums: tuple[int, int], salts: tuple[int, int],
    init: bool,
) -> None:  # fmt: skip
    header = WalIndexHeader(change, big, page_size, mx, pages, sums, salts, init)
    assert len(header.pack()) == 48
    assert WalIndexHeader.unpack(header.pack()) == header


@given(page_size=st.sampled_from(ALL_PAGE_SIZES), change=u32, mx_frame=u32, sums=pairs, salts=pairs)
def test_the_mount_guard_retires_a_header_as_the_daemon_does(
    page_size: int, change: int, mx_frame: int, sums: tuple[int, int], salts: tuple[int, int]
) -> None:
    """It imports nothing of the package, so it has its own code for this."""
    header = WalIndexHeader(change, False, page_size, mx_frame, 1, sums, salts)
    assert mount_guard.retired_header(header.pack()) == header.pack(wal_index.RETIRED_VERSION)


def test_a_disk_that_fails_does_not_end_the_mount_guard(tmp_path: Path) -> None:
    """It has the mount still to take away; and other wal-indexes to retire, of another disk perhaps."""
    (tmp_path / "shm").write_bytes(WalIndexHeader(1, False, 4096, 1, 1, (0, 0), (0, 0)).pack() * 2)
    with open(tmp_path / "shm", "r+b") as good:
        bad = os.open(tmp_path, os.O_RDONLY)  # a directory: EISDIR
        mount_guard.retire([bad, good.fileno()])
        os.close(bad)
    assert struct.unpack_from("=I", (tmp_path / "shm").read_bytes()) == (wal_index.RETIRED_VERSION,)


@given(st.binary(max_size=120))
def test_garbage_gives_only_format_errors(data: bytes) -> None:
    try:
        header = WalIndexHeader.unpack(data)
    except FormatError:
        header = None
    assert header is None or len(data) >= 48
    read_header(data + data)
    if len(data) < 40:
        with pytest.raises(TruncatedError):
            CheckpointInfo.unpack(data)
    else:
        info = CheckpointInfo.unpack(data)
        assert CheckpointInfo.unpack(info.pack()) == info


def test_entries_are_where_sqlite_puts_them() -> None:
    assert [wal_index.region_of(n) for n in (1, 4062, 4063, 8158, 8159, 12254, 12255)] == [0, 0, 1, 1, 2, 2, 3]
    assert wal_index.pgno_locations(1, 4062) == [(136, 4062)]
    assert wal_index.pgno_locations(5, 5) == [(152, 1)]
    assert wal_index.pgno_locations(4062, 8160) == [(16380, 1), (32768, 4096), (65536, 2)]
    assert wal_index.pgno_locations(7, 6) == []


@pytest.mark.parametrize("step", [1, 2, 7, 50, 4000, 100000])
def test_tables_are_byte_for_byte_those_of_sqlite(tmp_path: Path, step: int) -> None:
    """More than 8158 frames, so three regions, and many frames of the same few pages."""
    path = tmp_path / "x.db"
    db = connect(path, 512)
    fill(db, 600, rows=8, size=100)
    shm, data = sidecar(path, "-shm").read_bytes(), sidecar(path, "-wal").read_bytes()
    db.close()
    header = WalHeader.unpack(data)
    scan = scan_frames(header, data[32:], header.checksum1, header.checksum2)
    assert scan.committed > 8158 + 100
    mine, tables = ShmFile(), HashTables()
    pgnos = scan.pgnos.tolist()
    for start in range(0, len(pgnos), step):
        mine.apply(tables.append(pgnos[start : start + step]))
    assert mine[136:] == shm[136:]
    for offset, count in wal_index.pgno_locations(1, scan.committed):
        assert struct.unpack_from(f"<{count}I", shm, offset) == tuple(pgnos[:count])
        del pgnos[:count]

    last = {int(pgno): frame for frame, pgno in enumerate(scan.pgnos, 1)}
    pages, frames = wal_index.latest_frames(scan.pgnos, 1)
    assert dict(zip(pages.tolist(), frames.tolist(), strict=True)) == last
    assert pages.tolist() == sorted(last)
    again = HashTables.from_pgnos(scan.pgnos)
    assert again.mx_frame == scan.committed
    for pgno in [1, 2, 3, max(last), max(last) + 1]:
        assert again.lookup(pgno) == last.get(pgno, 0) == find_frame(shm, pgno, scan.committed)
        for mx in (0, 1, 3, 4062, 4063, 5000, 8159):
            assert again.lookup(pgno, mx) == find_frame(shm, pgno, mx)
    assert again.append([77]) == tables.append(np.array([77], dtype=np.uint32))
    assert again.lookup(77) == scan.committed + 1


def test_leftovers_of_a_writer_that_rolled_back_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    db = connect(path, 512)
    fill(db, 20)
    db.execute("PRAGMA cache_size=2")
    db.execute("BEGIN")
    db.execute("WITH n(i) AS (VALUES(1) UNION ALL SELECT i+1 FROM n WHERE i<600) "
               "INSERT INTO t(a, b) SELECT i, randomblob(400) FROM n")  # fmt: skip
    dirty = ShmFile(sidecar(path, "-shm").read_bytes())  # as if the writer had died here: pages were spilled
    data = sidecar(path, "-wal").read_bytes()
    db.execute("ROLLBACK")
    clean = sidecar(path, "-shm").read_bytes()
    db.close()
    found = read_header(dirty)
    assert found is not None
    assert dirty[136:] != clean[136:]
    header = WalHeader.unpack(data)
    scan = scan_frames(header, data[32:], header.checksum1, header.checksum2)
    assert scan.committed == found.mx_frame < scan.count
    tables = HashTables.from_pgnos(scan.pgnos[: scan.committed])
    dirty.apply(tables.truncate(tables.mx_frame))
    assert dirty[136 : 136 + 4 * 4062] == clean[136 : 136 + 4 * 4062]
    assert dirty[16384:32768] == clean[16384:32768]


@given(st.lists(pgno_lists, max_size=6), st.integers(0, 400))
@settings(deadline=None)
def test_truncate_and_clear_leave_no_trace(runs: list[list[int]], keep: int) -> None:
    tables, mine = HashTables(), ShmFile(136)
    for run in runs:
        mine.apply(tables.append(run))
    pgnos = [pgno for run in runs for pgno in run][:keep]
    mine.apply(tables.truncate(len(pgnos)))
    fresh, expected = HashTables(), ShmFile(136)
    expected.apply(fresh.append(pgnos))
    assert tables.mx_frame == len(pgnos)
    for more in ([5, 6, 5], [9] * 3):
        mine.apply(tables.append(more))
        expected.apply(fresh.append(more))
        assert mine == expected
        pgnos += more
    last = {pgno: frame for frame, pgno in enumerate(pgnos, 1)}
    pages, frames = tables.latest_frames(1, len(pgnos))
    assert dict(zip(pages.tolist(), frames.tolist(), strict=True)) == last
    assert all(tables.lookup(pgno) == frame for pgno, frame in last.items())
    tables.clear()
    assert (tables.mx_frame, tables.lookup(5), tables.truncate(0)) == (0, 0, [])
    mine.apply(tables.append([3]))
    assert find_frame(mine, 3, 1) == 1 and not any(find_frame(mine, pgno, 1) for pgno in {5, 6, 9, *pgnos} - {3})


@given(pgno_lists.filter(len), st.integers(1, 2**31))
def test_latest_frames(pgnos: list[int], first: int) -> None:
    pages, frames = wal_index.latest_frames(np.array(pgnos, dtype=np.uint32), first)
    expected = {pgno: first + i for i, pgno in enumerate(pgnos)}
    assert list(zip(pages.tolist(), frames.tolist(), strict=True)) == sorted(expected.items())


def test_a_full_region_whose_pages_all_collide() -> None:
    """Page numbers 8192 apart share their slot: the runs wrap around the end of the table."""
    pgnos = [8191 + 8192 * i for i in range(4062)]
    mine, tables = ShmFile(), HashTables()
    mine.apply(tables.append(pgnos[:2000]))
    mine.apply(tables.append(pgnos[2000:]))
    assert [find_frame(mine, pgnos[i], 4062) for i in (0, 1999, 2000, 4061)] == [1, 2000, 2001, 4062]
    assert len(mine) == 32768


def test_no_latest_frames_of_nothing() -> None:
    pages, frames = wal_index.latest_frames(np.array([], dtype=np.uint32), 1)
    assert len(pages) == len(frames) == 0


@pytest.mark.parametrize("bad", [[0], [1, -1], [2**32]])
def test_impossible_page_numbers_change_nothing(bad: list[int]) -> None:
    tables = HashTables()
    tables.append([1, 2])
    with pytest.raises(FormatError):
        tables.append(bad)
    with pytest.raises(FormatError):
        tables.truncate(3)
    assert tables.mx_frame == 2
