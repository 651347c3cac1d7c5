"""The page-checksum table: what it keeps, and that damage is never believed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pylitefs.engine.page_checksums import DATA_OFFSET, CleanState, PageChecksums, stamp
from pylitefs.errors import FormatError
from pylitefs.formats.ltx.checksum import database_checksum, page_checksum
from pylitefs.formats.ltx.format import CHECKSUM_FLAG, Position

STATE = CleanState(4096, 3, Position(7, CHECKSUM_FLAG | 9, 3), True, (12288, 5), (32, 6))
u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)


@given(u32, u32, u64, u64, st.booleans(), st.tuples(u64, u64), u64)
def test_states_come_back(
    size: int, commit: int, txid: int, checksum: int, clean: bool, file: tuple[int, int], epoch: int
) -> None:
    state = CleanState(size, commit, Position(txid, checksum, epoch), clean, file, file)
    assert repr(CleanState.unpack(state.pack())) == repr(state)


@given(st.binary(max_size=120))
def test_garbage_is_a_format_error(data: bytes) -> None:
    with pytest.raises(FormatError):
        CleanState.unpack(data)


def test_every_flipped_bit_is_noticed() -> None:
    packed = STATE.pack()
    for bit in range(8 * len(packed)):
        data = bytearray(packed)
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            CleanState.unpack(bytes(data))


def test_values_and_state_survive_a_clean_stop(tmp_path: Path) -> None:
    table = PageChecksums(str(tmp_path / "checksums"))
    assert table.read_state() is None
    table.reserve(3)
    sums = [page_checksum(pgno, bytes([pgno]) * 512) for pgno in (1, 2, 3)]
    table.values[:3] = sums
    table.write_state(STATE)
    table.close()
    again = PageChecksums(str(tmp_path / "checksums"))
    assert again.read_state() == STATE
    assert again.database_checksum(3) == database_checksum(np.array(sums, dtype=np.uint64))
    assert again.values[:3].tolist() == sums
    again.close()


def test_the_table_grows_and_keeps_its_values(tmp_path: Path) -> None:
    table = PageChecksums(str(tmp_path / "checksums"))
    table.reserve(10)
    table.values[:10] = range(1, 11)
    table.reserve(100_000)
    assert table.values[:10].tolist() == list(range(1, 11)) and not table.values[10:100_000].any()
    table.reset()
    table.reserve(10)
    assert not table.values[:10].any()
    table.close()


@pytest.mark.parametrize("damage", ["short", "header", "empty", "missing"])
def test_damage_means_no_state(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "checksums"
    table = PageChecksums(str(path))
    table.reserve(3)
    table.write_state(STATE)
    table.close()
    if damage == "short":
        os.truncate(path, DATA_OFFSET + 8)
    elif damage == "header":
        data = bytearray(path.read_bytes())
        data[20] ^= 1
        path.write_bytes(data)
    elif damage == "empty":
        os.truncate(path, 0)
    else:
        path.unlink()
    again = PageChecksums(str(path))
    assert again.read_state() is None
    again.reserve(3)
    assert not again.values[:3].any()
    again.close()


def test_stamp_tells_files_apart(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert stamp(str(path)) == (0, 0)
    path.write_bytes(b"abc")
    os.utime(path, ns=(1, 1_700_000_000_000_000_001))
    assert stamp(str(path)) == (3, 1_700_000_000_000_000_001)
