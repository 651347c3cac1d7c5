from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pylitefs.errors import FormatError
from pylitefs.formats.ltx.checksum import combine, page_checksum
from pylitefs.formats.ltx.compact import compact, compacted_header
from pylitefs.formats.ltx.decoder import Ltx, Reader, decode
from pylitefs.formats.ltx.encoder import encode
from pylitefs.formats.ltx.format import CHECKSUM_FLAG, HEADER_FLAG_NO_CHECKSUM, Header

PAGE_SIZE = 512
Database = dict[int, bytes]


def fill(value: int) -> bytes:
    return struct.pack(">I", value) * (PAGE_SIZE // 4)


def checksum_of(database: Database) -> int:
    total = CHECKSUM_FLAG
    for pgno, page in database.items():
        total = combine(total, 0, page_checksum(pgno, page))
    return total


def history(sizes: list[int], seed: int, flags: int = 0) -> tuple[list[bytes], list[Database]]:
    """LTX files that take an empty database through these sizes, and the database after each. As SQLite does, every
    page that is new is written."""
    choose = random.Random(seed)
    before: Database = {}
    files, states = [], []
    for txid, commit in enumerate(sizes, start=1):
        after = {pgno: page for pgno, page in before.items() if pgno <= commit}
        changes = {}
        for pgno in range(1, commit + 1):
            if pgno not in after or choose.random() < 0.4:
                changes[pgno] = fill(txid * 1000 + pgno)
        after = dict(sorted((after | changes).items()))
        pre = 0 if txid == 1 or flags else checksum_of(before)
        header = Header(flags, PAGE_SIZE, commit, txid, txid, 1000 + txid, pre, 32, 64, 1, 2, epoch=70 + txid)
        files.append(encode(header, sorted(changes.items()), 0 if flags else checksum_of(after)))
        states.append(after)
        before = after
    return files, states


def pieces(file: bytes) -> Iterator[bytes]:
    yield from (file[at : at + 333] for at in range(0, len(file), 333))


def merge(files: list[bytes], flags: int = 0) -> Ltx:
    return decode(b"".join(compact([Reader(pieces(file)) for file in files], flags)))


def apply(database: Database, ltx: Ltx) -> Database:
    commit = ltx.header.commit
    return dict(sorted((pgno, page) for pgno, page in (database | dict(ltx.pages)).items() if pgno <= commit))


@given(st.lists(st.integers(0, 12), min_size=1, max_size=6), st.integers(0, 1000), st.data())
@settings(max_examples=150, deadline=None)
def test_merged_file_does_what_its_inputs_did(sizes: list[int], seed: int, data: st.DataObject) -> None:
    files, states = history(sizes, seed)
    first = data.draw(st.integers(0, len(sizes) - 1))
    last = data.draw(st.integers(first, len(sizes) - 1))
    ltx = merge(files[first : last + 1])
    before = states[first - 1] if first else {}
    assert apply(before, ltx) == states[last]
    assert ltx.header == Header(
        0, PAGE_SIZE, sizes[last], first + 1, last + 1, 1001 + last, checksum_of(before) if first else 0,
        epoch=71 + last,
    )
    assert ltx.trailer.post_apply_checksum == checksum_of(states[last])
    if first < last:
        middle = data.draw(st.integers(first, last - 1))
        left = b"".join(compact([Reader([f]) for f in files[first : middle + 1]]))
        right = b"".join(compact([Reader([f]) for f in files[middle + 1 : last + 1]]))
        assert merge([left, right]) == ltx, "merging in two steps gives the same"


def test_one_file_loses_only_what_tells_of_its_origin() -> None:
    files, _ = history([3], 1)
    ltx = merge(files)
    assert ltx.pages == decode(files[0]).pages
    assert (ltx.header.wal_offset, ltx.header.wal_size, ltx.header.wal_salt1, ltx.header.wal_salt2) == (0, 0, 0, 0)
    assert ltx.header.epoch == 71


def test_pages_of_a_truncated_part_do_not_come_back() -> None:
    """Grown again without writing page 5: in the result it is absent, not the content from before the truncation."""
    a = encode(Header(0, 512, 5, 2, 2, 0, CHECKSUM_FLAG | 1), [(1, fill(1)), (5, fill(5))], CHECKSUM_FLAG | 2)
    b = encode(Header(0, 512, 2, 3, 3, 0, CHECKSUM_FLAG | 2), [(2, fill(2))], CHECKSUM_FLAG | 3)
    c = encode(Header(0, 512, 6, 4, 4, 0, CHECKSUM_FLAG | 3), [(6, fill(6))], CHECKSUM_FLAG | 4)
    assert merge([a, b, c]).pages == ((1, fill(1)), (2, fill(2)), (6, fill(6)))


def test_checksums_can_be_dropped_but_not_made_up() -> None:
    files, states = history([3, 4, 2], 5)
    ltx = merge(files[1:], HEADER_FLAG_NO_CHECKSUM)
    assert (ltx.header.pre_apply_checksum, ltx.trailer.post_apply_checksum) == (0, 0)
    assert apply(states[0], ltx) == states[2]
    bare, states = history([3, 4, 2], 5, HEADER_FLAG_NO_CHECKSUM)
    assert apply({}, merge(bare, HEADER_FLAG_NO_CHECKSUM)) == states[2]
    with pytest.raises(FormatError, match="without database checksums"):
        merge(bare)


def test_inputs_must_follow_each_other() -> None:
    files, _ = history([3, 3, 3, 3], 2)
    for wrong in ([0, 2], [1, 0], [1, 1], []):
        with pytest.raises(FormatError, match="compaction"):
            merge([files[i] for i in wrong])
    one = Header(0, 512, 3, 2, 3, 0, CHECKSUM_FLAG | 1)
    with pytest.raises(FormatError, match="does not follow"):
        compacted_header([one, Header(0, 512, 3, 3, 5, 0, CHECKSUM_FLAG | 1)])
    with pytest.raises(FormatError, match="page sizes"):
        compacted_header([one, Header(0, 1024, 3, 4, 5, 0, CHECKSUM_FLAG | 1)])


def test_checksums_must_follow_each_other() -> None:
    a = encode(Header(0, 512, 5, 2, 2, 0, CHECKSUM_FLAG | 1), [(1, fill(1))], CHECKSUM_FLAG | 2)
    b = encode(Header(0, 512, 5, 3, 3, 0, CHECKSUM_FLAG | 9), [(2, fill(2))], CHECKSUM_FLAG | 3)
    with pytest.raises(FormatError, match="applies to checksum"):
        merge([a, b])


def test_damage_in_any_input_is_found() -> None:
    files, _ = history([3, 5, 4], 3)
    for index, file in enumerate(files):
        damaged = files.copy()
        damaged[index] = file[:-1] + bytes([file[-1] ^ 1])
        with pytest.raises(FormatError, match="file checksum"):
            merge(damaged)
        damaged[index] = file[:-1]
        with pytest.raises(FormatError, match="ends early"):
            merge(damaged)


def test_compacts_as_go_does() -> None:
    """The two inputs and the result of a compaction by superfly/ltx 0.5.2."""
    checksum = 0x8A249272AD9F7DEA
    first = [(1, b"\x81" * 1024), (2, b"\x82" * 1024), (3, b"\x83" * 1024)]
    second = [(1, b"\x91" * 1024), (3, b"\x93" * 1024)]
    assert checksum_of(dict(first)) == checksum
    ltx = merge(
        [
            encode(Header(0, 1024, 3, 1, 1, 1000, 0), first, checksum),
            encode(Header(0, 1024, 3, 2, 2, 2000, checksum), second, checksum),
        ]
    )
    assert ltx.header == Header(0, 1024, 3, 1, 2, 2000, 0)
    assert ltx.pages == ((1, second[0][1]), (2, first[1][1]), (3, second[1][1]))
    assert ltx.trailer.post_apply_checksum == checksum
