from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pylitefs.errors import FormatError, TruncatedError
from pylitefs.formats.ltx.format import (
    CHECKSUM_FLAG,
    HEADER_FLAG_NO_CHECKSUM,
    HEADER_SIZE,
    MAX_TXID,
    TRAILER_SIZE,
    Header,
    Position,
    Trailer,
    file_name,
    lock_pgno,
    parse_file_name,
)

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
PLAIN = Header(0, 4096, 10, 5, 7, 1000, CHECKSUM_FLAG | 1)


@st.composite
def headers(draw: st.DrawFn) -> Header:
    first = draw(st.integers(1, MAX_TXID) | st.just(1))
    flags = draw(st.sampled_from([0, HEADER_FLAG_NO_CHECKSUM]))
    wal_offset = draw(st.integers(0, 2**63 - 1))
    return Header(
        flags=flags,
        page_size=draw(st.sampled_from([512 << n for n in range(8)])),
        commit=draw(U32),
        min_txid=first,
        max_txid=draw(st.integers(first, MAX_TXID)),
        timestamp_ms=draw(st.integers(-(2**63), 2**63 - 1)),
        pre_apply_checksum=0 if flags or first == 1 else draw(U64) | CHECKSUM_FLAG,
        wal_offset=wal_offset,
        wal_size=draw(st.integers(0, 2**63 - 1)) if wal_offset else 0,
        wal_salt1=draw(U32) if wal_offset else 0,
        wal_salt2=draw(U32) if wal_offset else 0,
        epoch=draw(U64),
    )


def test_header_layout() -> None:
    header = Header(2, 512, 0x0C0D0E0F, 0x1011, 0x1819, 0x2021, 0, 0x3031, 0x3839, 0x40, 0x44, 0x4849)
    assert header.pack().hex() == (
        "4c545831" "00000002" "00000200" "0c0d0e0f" "0000000000001011" "0000000000001819" "0000000000002021"
        "0000000000000000" "0000000000003031" "0000000000003839" "00000040" "00000044" "0000000000004849" + "00" * 20
    )  # fmt: skip


@given(headers())
def test_header_round_trip(header: Header) -> None:
    packed = header.pack()
    assert len(packed) == HEADER_SIZE
    assert Header.unpack(packed) == header
    assert Header.unpack(packed[:80] + b"\xaa" * 20) == header, "reserved bytes are ignored"


@pytest.mark.parametrize(
    "change",
    [
        {"flags": 1},
        {"flags": 4},
        {"page_size": 0},
        {"page_size": 256},
        {"page_size": 4095},
        {"page_size": 131072},
        {"min_txid": 0},
        {"max_txid": 4},
        {"max_txid": 2**64},
        {"wal_offset": -1},
        {"wal_offset": 32, "wal_size": -1},
        {"wal_size": 1},
        {"wal_salt1": 1},
        {"wal_salt2": 1},
        {"pre_apply_checksum": 0},
        {"pre_apply_checksum": 1},
        {"min_txid": 1},
        {"flags": HEADER_FLAG_NO_CHECKSUM},
        {"commit": 2**32},
        {"commit": -1},
        {"epoch": -1},
        {"timestamp_ms": 2**63},
        {"pre_apply_checksum": 3 << 63},
    ],
)
def test_header_rules(change: dict[str, int]) -> None:
    PLAIN.pack()
    with pytest.raises(FormatError):
        replace(PLAIN, **change).pack()


def test_header_needs_magic_and_all_its_bytes() -> None:
    packed = PLAIN.pack()
    for size in range(HEADER_SIZE):
        with pytest.raises(TruncatedError):
            Header.unpack(packed[:size])
    with pytest.raises(FormatError, match="LTX1"):
        Header.unpack(b"LTX2" + packed[4:])


def test_header_properties() -> None:
    assert not PLAIN.is_snapshot
    assert PLAIN.has_checksums
    assert PLAIN.pre_apply_position == Position(4, CHECKSUM_FLAG | 1)
    assert replace(PLAIN, min_txid=1, pre_apply_checksum=0).is_snapshot
    lock = lock_pgno(65536)
    assert lock == 16385
    assert [replace(PLAIN, page_size=65536, commit=lock + d).last_pgno - lock for d in (-1, 0, 1)] == [-1, -1, 1]


@given(U64, U64)
def test_trailer_round_trip(post: int, file: int) -> None:
    trailer = Trailer(post, file)
    assert len(trailer.pack()) == TRAILER_SIZE
    assert trailer.pack() == post.to_bytes(8, "big") + file.to_bytes(8, "big")
    assert Trailer.unpack(trailer.pack()) == trailer


def test_trailer_rules() -> None:
    flag = CHECKSUM_FLAG
    bare = replace(PLAIN, flags=HEADER_FLAG_NO_CHECKSUM, pre_apply_checksum=0)
    deleted = replace(PLAIN, commit=0)
    for header, post in ((PLAIN, flag | 1), (bare, 0), (deleted, flag)):
        Trailer(post, flag | 1).validate(header)
    for header, post, file in (
        (PLAIN, 0, flag),
        (PLAIN, 1, flag),
        (bare, flag, flag),
        (deleted, flag | 1, flag),
        (PLAIN, flag, 0),
        (PLAIN, flag, 1),
    ):
        with pytest.raises(FormatError):
            Trailer(post, file).validate(header)
    with pytest.raises(TruncatedError):
        Trailer.unpack(bytes(15))


@given(U64, U64)
def test_position_round_trip(txid: int, checksum: int) -> None:
    text = str(Position(txid, checksum))
    assert len(text) == 33
    assert Position.parse(text) == Position(txid, checksum)


ZERO = "0" * 16


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1/2",
        "0" * 33,
        f"{ZERO}/{'0' * 15}g",
        f"{ZERO}/{ZERO}\n",
        f"+{'0' * 15}/{ZERO}",
        f"{ZERO}-{ZERO}",
        "x" * 9999,
    ],
)
def test_position_rejects(text: str) -> None:
    with pytest.raises(FormatError) as caught:
        Position.parse(text)
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)


def test_file_names() -> None:
    assert file_name(1, 0xABC) == "0000000000000001-0000000000000abc.ltx"
    assert parse_file_name("0000000000000001-0000000000000abc.ltx") == (1, 0xABC)
    for name in (
        "0000000000000001-0000000000000ABC.ltx",
        "0000000000000001-0000000000000abc.ltx.tmp",
        "0000000000000001-0000000000000abc.ltx\n",
        "0000000000000002-0000000000000001.ltx",
        "0000000000000000-0000000000000001.ltx",
        "1-2.ltx",
        "",
    ):
        assert parse_file_name(name) is None


@given(st.integers(1, MAX_TXID), st.integers(1, MAX_TXID))
def test_file_names_round_trip_and_sort(a: int, b: int) -> None:
    first, last = sorted((a, b))
    assert parse_file_name(file_name(first, last)) == (first, last)
    assert (file_name(a, a) < file_name(b, b)) == (a < b)


@pytest.mark.parametrize(
    ("here", "head", "missing"),
    [
        (Position(5, 1, 3), Position(9, 2, 3), 4),
        (Position(0, 0, 0), Position(9, 2, 3), 9),
        (Position(9, 2, 3), Position(9, 2, 3), 0),
        (Position(10, 3, 3), Position(9, 2, 3), 0),  # what was said is old
        (Position(9, 1, 3), Position(9, 2, 3), 1),  # another state
        (Position(20, 1, 2), Position(9, 2, 3), 1),  # a branch, however long it is
        (Position(9, 2, 2), Position(9, 2, 3), 1),  # the same by its checksum only
        (Position(9, 2, 0), Position(9, 2, 1), 0),  # written before there were epochs
        (Position(3, 2, 4), Position(9, 2, 3), 0),
    ],
)
def test_how_much_is_missing(here: Position, head: Position, missing: int) -> None:
    assert here.missing(head) == missing
