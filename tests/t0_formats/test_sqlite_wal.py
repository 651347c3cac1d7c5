from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlite_samples import ALL_PAGE_SIZES, PAGE_SIZES, connect, copy_database, fill, recovered_header, sidecar

from pylitefs.errors import FormatError, TruncatedError
from pylitefs.formats.sqlite import wal
from pylitefs.formats.sqlite.wal import WalHeader, encode_frames, scan_frames, wal_checksum

u32 = st.integers(0, 2**32 - 1)


def real_wal(path: Path, page_size: int, transactions: int = 12) -> bytes:
    db = connect(path, page_size)
    fill(db, transactions, rows=3)
    data = sidecar(path, "-wal").read_bytes()
    copy_database(path, path.parent / "copy", ("-wal",))
    db.close()
    return data


def slow_checksums(header: WalHeader, data: bytes) -> list[tuple[int, int]]:
    """The chain as the format defines it, word by word."""
    state, found = (header.checksum1, header.checksum2), []
    for at in range(wal.WAL_HEADER_SIZE, len(data) - header.frame_size + 1, header.frame_size):
        state = wal_checksum(data[at : at + 8], *state, header.big_endian)
        state = wal_checksum(data[at + 24 : at + header.frame_size], *state, header.big_endian)
        found.append(state)
    return found


@pytest.mark.parametrize("page_size", ALL_PAGE_SIZES)
def test_a_real_wal_is_read_and_written_back_bit_by_bit(tmp_path: Path, page_size: int) -> None:
    data = real_wal(tmp_path / "x.db", page_size)
    header = WalHeader.unpack(data)
    assert header.page_size == page_size and header.pack() == data[:32]
    assert WalHeader.create(page_size, header.checkpoint_seq, *header.salts, header.big_endian) == header

    scan = scan_frames(header, memoryview(data)[32:], header.checksum1, header.checksum2)
    mine = recovered_header(tmp_path / "copy" / "x.db")
    assert scan.count == scan.committed == mine.mx_frame == (len(data) - 32) // header.frame_size
    assert (scan.s0, scan.s1) == (scan.committed_s0, scan.committed_s1) == mine.frame_checksum
    assert scan.commits[-1] == mine.page_count and np.count_nonzero(scan.commits) == 12 + 2

    frames, state, start = bytearray(), (header.checksum1, header.checksum2), 0
    for end in np.flatnonzero(scan.commits) + 1:
        pages = [data[o : o + page_size] for o in (wal.page_offset(n, page_size) for n in range(start + 1, end + 1))]
        run, *state = encode_frames(header, scan.pgnos[start:end].tolist(), pages, int(scan.commits[end - 1]), *state)
        assert len(frames) + 32 == wal.frame_offset(start + 1, page_size)
        frames, start = frames + run, int(end)
    assert frames == data[32:]
    assert tuple(state) == (scan.s0, scan.s1)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("big_endian", [False, True])
def test_sqlite_recovers_what_was_encoded(tmp_path: Path, page_size: int, big_endian: bool) -> None:
    """Also with the byte order that this machine's SQLite does not write."""
    path = tmp_path / "x.db"
    data = real_wal(path, page_size)
    old = WalHeader.unpack(data)
    scan = scan_frames(old, data[32:], old.checksum1, old.checksum2)
    header = WalHeader.create(page_size, 7, 0xFEDCBA98, 0x01234567, big_endian)
    assert WalHeader.unpack(header.pack()) == header
    pages = np.frombuffer(data[32:], np.uint8).reshape(-1, old.frame_size)[:, 24:]
    first, s0, s1 = encode_frames(header, scan.pgnos[:5].tolist(), pages[:5], 0, header.checksum1, header.checksum2)
    rest, s0, s1 = encode_frames(header, scan.pgnos[5:].tolist(), pages[5:], int(scan.commits[-1]), s0, s1)
    target = tmp_path / "copy" / "x.db"
    sidecar(target, "-wal").write_bytes(header.pack() + first + rest)
    found = recovered_header(target)
    assert found.mx_frame == scan.count and found.page_count == scan.commits[-1]
    assert found.salts == header.salts and found.big_endian_checksum == big_endian
    assert found.frame_checksum == (s0, s1) == slow_checksums(header, header.pack() + first + rest)[-1]


@pytest.mark.parametrize("cut", ["salt", "pgno", "page", "checksum", "commit", "short", "last"])
def test_the_committed_prefix_is_what_sqlite_recovers(tmp_path: Path, cut: str) -> None:
    path = tmp_path / "x.db"
    data = bytearray(real_wal(path, 1024, 40))
    header = WalHeader.unpack(data)
    total = (len(data) - 32) // header.frame_size
    for frame in (1, 2, 3, 37, total // 2, total):
        bad, at = bytearray(data), wal.frame_offset(frame, 1024)
        if cut == "short":
            del bad[at + 30 :]
        elif cut == "pgno":
            bad[at : at + 4] = bytes(4)
        else:
            bad[at + {"salt": 15, "page": 1047, "checksum": 23, "commit": 7, "last": 1000}[cut]] ^= 1
        target = tmp_path / "copy" / "x.db"
        sidecar(target, "-wal").write_bytes(bad)
        found = recovered_header(target)
        scan = scan_frames(header, bytes(bad[32:]), header.checksum1, header.checksum2)
        assert scan.count == frame - 1
        assert scan.committed == found.mx_frame
        if scan.committed:
            assert (scan.committed_s0, scan.committed_s1) == found.frame_checksum


@given(sizes=st.lists(st.integers(0, 9), max_size=30), tail=st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_scanning_in_chunks_is_scanning_at_once(sizes: list[int], tail: int) -> None:
    header = WalHeader.create(512, 1, 2, 3)
    state = header.checksum1, header.checksum2
    data, pgnos = b"", []
    for n, size in enumerate(sizes):
        numbers = [n * 10 + i + 1 for i in range(size)]
        run, *state = encode_frames(header, numbers, [bytes([n + i]) * 512 for i in range(size)], size % 3, *state)
        data, pgnos = data + run, pgnos + numbers
    data += bytes(tail)
    whole = scan_frames(header, data, header.checksum1, header.checksum2)
    assert whole.pgnos.tolist() == pgnos
    assert (whole.s0, whole.s1) == tuple(state)
    s0, s1, seen, done, committed = header.checksum1, header.checksum2, [], 0, (0, header.checksum1, header.checksum2)
    for at in range(0, len(data), 3 * 536):
        part = scan_frames(header, data[at : at + 3 * 536], s0, s1)
        s0, s1 = part.s0, part.s1
        seen += part.commits.tolist()
        if part.committed:
            committed = (done + part.committed, part.committed_s0, part.committed_s1)
        done += part.count
    assert seen == whole.commits.tolist()
    assert committed == (whole.committed, whole.committed_s0, whole.committed_s1)


@given(
    page_size=st.sampled_from([512, 1024, 4096]), count=st.integers(1, 5), big_endian=st.booleans(), s0=u32, s1=u32,
    seed=u32,
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_vectorised_checksums_are_the_reference(
    page_size: int, count: int, big_endian: bool, s0: int, s1: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    headers = random.integers(0, 256, (count, 8), dtype=np.uint8)
    pages = random.integers(0, 256, (count, page_size), dtype=np.uint8)
    sums = wal.frame_checksums(page_size, big_endian)
    chain = sums.chain(headers, pages, s0, s1)
    assert (sums.chain(headers.view("<u4"), pages, s0, s1) == chain).all()
    state, expected = (s0, s1), []
    for head, page in zip(headers, pages, strict=True):
        state = wal_checksum(head.tobytes(), *state, big_endian)
        state = wal_checksum(page.tobytes(), *state, big_endian)
        expected.append(list(state))
    assert chain.tolist() == expected


@pytest.mark.parametrize("fill_byte", [0x00, 0xFF])
def test_checksums_of_extreme_pages(fill_byte: int) -> None:
    pages = np.full((600, 4096), fill_byte, dtype=np.uint8)
    header = WalHeader.create(4096, 2**32 - 1, 2**32 - 1, 2**32 - 1)
    numbers = [2**32 - 1] * 600
    run, s0, s1 = encode_frames(header, numbers, pages, 2**32 - 1, header.checksum1, header.checksum2)
    assert slow_checksums(header, header.pack() + run)[-1] == (s0, s1)
    scan = scan_frames(header, run, header.checksum1, header.checksum2)
    assert (scan.count, scan.committed, scan.s0, scan.s1) == (600, 600, s0, s1)


def test_page_zero_ends_the_log_even_with_a_good_checksum() -> None:
    header = WalHeader.create(512, 0, 1, 2)
    run, _, _ = encode_frames(header, [1], [bytes(512)], 1, header.checksum1, header.checksum2)
    run[0:4] = bytes(4)
    state = slow_checksums(header, header.pack() + run)[-1]
    run[16:24] = state[0].to_bytes(4, "big") + state[1].to_bytes(4, "big")
    assert scan_frames(header, run, header.checksum1, header.checksum2).count == 0
    run[3] = 1
    state = slow_checksums(header, header.pack() + run)[-1]
    run[16:24] = state[0].to_bytes(4, "big") + state[1].to_bytes(4, "big")
    assert scan_frames(header, run, header.checksum1, header.checksum2).count == 1


def test_nothing_to_encode_or_scan() -> None:
    header = WalHeader.create(4096, 0, 1, 2)
    assert encode_frames(header, [], [], 0, 5, 6) == (b"", 5, 6)
    scan = scan_frames(header, b"", 5, 6)
    assert (scan.count, scan.committed, scan.s0, scan.s1, scan.committed_s0) == (0, 0, 5, 6, 5)
    assert len(scan.pgnos) == len(scan.commits) == 0


def test_impossible_frames_are_refused() -> None:
    header = WalHeader.create(512, 0, 1, 2)
    page = bytes(512)
    for pgnos, pages, commit in [
        ([1], [], 0), ([1], [page[1:]], 0), ([0], [page], 0), ([2**32], [page], 0), ([1], [page], -1),
        ([1, 2], [page, page + page], 0), ([1], np.zeros((1, 1024), np.uint8), 0),
    ]:  # fmt: skip
        with pytest.raises(FormatError):
            encode_frames(header, pgnos, pages, commit, 0, 0)
    with pytest.raises(FormatError):
        WalHeader.create(1000, 0, 1, 2)
    with pytest.raises(FormatError):
        wal_checksum(b"1234")
    with pytest.raises(FormatError):
        wal.FrameChecksums(513)


@given(st.sampled_from(PAGE_SIZES), u32, u32, u32, st.booleans())
def test_header_round_trip(page_size: int, sequence: int, salt1: int, salt2: int, big_endian: bool) -> None:
    header = WalHeader.create(page_size, sequence, salt1, salt2, big_endian)
    assert WalHeader.unpack(header.pack()) == header
    damaged = bytearray(header.pack())
    damaged[salt1 % 32] ^= 0x10
    with pytest.raises(FormatError):
        WalHeader.unpack(damaged)
    with pytest.raises(TruncatedError):
        WalHeader.unpack(header.pack()[:31])


@given(st.binary(max_size=64))
def test_garbage_header_gives_only_format_errors(data: bytes) -> None:
    for candidate in (data, bytes.fromhex("377f0682002de218") + data):
        with pytest.raises(FormatError):
            WalHeader.unpack(candidate)


@given(st.binary(max_size=4000))
@settings(deadline=None)
def test_garbage_frames_do_not_count(data: bytes) -> None:
    header = WalHeader.create(512, 0, 0x11111111, 0x22222222)
    assert scan_frames(header, data, 0, 0).count == 0
