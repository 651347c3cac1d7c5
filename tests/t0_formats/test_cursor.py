from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pylitefs.errors import FormatError, TruncatedError
from pylitefs.formats.cursor import Cursor, pack_bytes, pack_string, pack_uvarint

READS = ["u8", "u16", "u32", "u64", "uvarint", "take", "bytes", "string"]


def read(cursor: Cursor, name: str) -> object:
    if name == "take":
        return cursor.take(5)
    if name in ("bytes", "string"):
        return getattr(cursor, name)(20)
    return getattr(cursor, name)()


def test_reads_big_endian_in_order() -> None:
    cursor = Cursor(bytes.fromhex("01 0203 04050607 08090a0b0c0d0e0f ffff"))
    assert [cursor.u8(), cursor.u16(), cursor.u32(), cursor.u64()] == [1, 0x203, 0x4050607, 0x8090A0B0C0D0E0F]
    assert (cursor.offset, cursor.remaining) == (15, 2)
    with pytest.raises(FormatError):
        cursor.expect_end()
    assert cursor.take(2) == b"\xff\xff"
    cursor.expect_end()


# Examples of the varint encoding from Go's encoding/binary and the protobuf documentation.
@pytest.mark.parametrize(("value", "encoded"), [(0, "00"), (1, "01"), (127, "7f"), (128, "8001"), (150, "9601"),
                                                (300, "ac02"), (2**64 - 1, "ffffffffffffffffff01")])  # fmt: skip
def test_uvarint_known(value: int, encoded: str) -> None:
    assert pack_uvarint(value) == bytes.fromhex(encoded)
    assert Cursor(bytes.fromhex(encoded)).uvarint() == value


@pytest.mark.parametrize("encoded", ["ffffffffffffffffff02", "8080808080808080808001", "ffffffffffffffffffffff"])
def test_uvarint_beyond_64_bits(encoded: str) -> None:
    with pytest.raises(FormatError, match="64 bits"):
        Cursor(bytes.fromhex(encoded)).uvarint()


@pytest.mark.parametrize("value", [-1, 2**64])
def test_uvarint_packs_only_u64(value: int) -> None:
    with pytest.raises(FormatError):
        pack_uvarint(value)


@given(st.integers(0, 2**64 - 1), st.binary(max_size=300), st.text(max_size=100))
def test_round_trip(value: int, data: bytes, text: str) -> None:
    cursor = Cursor(pack_uvarint(value) + pack_bytes(data) + pack_string(text))
    assert (cursor.uvarint(), cursor.bytes(300), cursor.string(400)) == (value, data, text)
    cursor.expect_end()


def test_limit_is_checked_before_the_bytes_are_there() -> None:
    cursor = Cursor(pack_uvarint(2**60))
    with pytest.raises(FormatError, match="at most 10") as caught:
        cursor.bytes(10)
    assert not isinstance(caught.value, TruncatedError)
    assert cursor.offset == 0
    assert Cursor(pack_bytes(b"x" * 10)).bytes(10) == b"x" * 10
    with pytest.raises(FormatError):
        Cursor(pack_bytes(b"x" * 11)).bytes(10)


def test_string_must_be_utf8() -> None:
    with pytest.raises(FormatError, match="UTF-8"):
        Cursor(pack_bytes(b"\xff\xfe")).string(10)


@pytest.mark.parametrize("name", READS)
def test_shortage(name: str) -> None:
    full = {"take": b"12345", "bytes": pack_bytes(b"ab"), "string": pack_string("ab"), "uvarint": b"\x80\x01"}.get(
        name, bytes(int(name[1:]) // 8 if name[1:].isdigit() else 0)
    )
    read(Cursor(full), name)
    for size in range(len(full)):
        cursor = Cursor(full[:size])
        with pytest.raises(TruncatedError):
            read(cursor, name)
        assert cursor.offset == 0


def test_negative_count() -> None:
    with pytest.raises(FormatError):
        Cursor(b"abc").take(-1)


@given(st.binary(max_size=60), st.lists(st.sampled_from(READS), max_size=12))
def test_garbage_gives_only_format_errors(data: bytes, names: list[str]) -> None:
    cursor = Cursor(memoryview(data))
    for name in names:
        before = cursor.offset
        try:
            read(cursor, name)
        except FormatError:
            assert cursor.offset == before
        assert 0 <= cursor.offset <= len(data)
        assert cursor.offset + cursor.remaining == len(data)
