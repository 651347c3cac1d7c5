"""The replication messages: whatever is packed is read back; whatever bytes come, nothing but FormatError comes out."""

from __future__ import annotations

import dataclasses
from typing import Any

import lz4.block
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pylitefs.errors import FormatError, TruncatedError
from pylitefs.formats import stream, stream_fields, stream_pages
from pylitefs.formats.ltx.format import Position
from pylitefs.formats.names import MAX_NAME, is_database_name
from pylitefs.formats.stream import MESSAGES, PROTOCOL_VERSION, Message, Sender, pack, unpack
from pylitefs.formats.stream_fields import MAX_CHUNK, MIN_FILE_SIZE, ErrorCode, ResyncReason

u64 = st.integers(0, 2**64 - 1)
u32 = st.integers(0, 2**32 - 1)
names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=60).filter(
    lambda name: name not in (".", "..")
)
positions = st.builds(Position, u64, u64, u64)
epochs = st.lists(st.tuples(u64, u64), max_size=4).map(tuple)
page_sizes = st.sampled_from([0, 512, 4096, 65536])
txids = st.integers(1, 2**64 - 1)
chunks = st.binary(min_size=1, max_size=300)

messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(stream.Error, st.sampled_from(ErrorCode), st.text(max_size=200)),
    st.builds(stream.Heartbeat, u64, st.lists(st.tuples(names, positions), max_size=4).map(tuple)),
    st.builds(
        stream.Hello, st.just(PROTOCOL_VERSION), st.text(max_size=12), u64, names, u64, st.lists(names).map(tuple)
    ),
    st.builds(stream.Databases, st.booleans(), st.lists(st.tuples(names, positions), max_size=4).map(tuple)),
    st.builds(stream.Ack, st.lists(st.builds(stream.Progress, names, u64, u64, u64), max_size=4).map(tuple)),
    st.builds(
        stream.Resync,
        names,
        u32,
        st.sampled_from(ResyncReason),
        page_sizes,
        u32,
        positions,
        st.lists(positions, max_size=4).map(tuple),
        epochs,
    ),
    st.builds(stream.Checksums, names, u32, st.integers(1, 2**32 - 1), chunks.map(lambda data: data * 8)),
    st.builds(stream.TailEnd, names, st.booleans()),
    st.builds(stream.Ltx, names, st.binary(min_size=MIN_FILE_SIZE, max_size=400)),
    st.builds(stream.LtxBegin, names, txids, txids, st.integers(MIN_FILE_SIZE, stream_fields.MAX_FILE_SIZE)),
    st.builds(stream.LtxData, names, chunks),
    st.builds(stream.LtxEnd, names, st.booleans()),
    st.builds(stream.Welcome, st.just(PROTOCOL_VERSION), st.text(max_size=12), u64, names, u64),
    st.builds(stream.SendChecksums, names, st.sampled_from(ResyncReason)),
    st.builds(stream.SnapshotBegin, names, u32, page_sizes, positions, st.booleans(), u64),
    st.builds(stream_pages.SnapshotPages, names, page_sizes, st.lists(u32.filter(bool), max_size=5).map(tuple), chunks),
    st.builds(stream_pages.Pages, names, u32, st.lists(u32.filter(bool), max_size=5).map(tuple), chunks),
    st.builds(stream_pages.AskPages, names, u32, st.lists(u32.filter(bool), max_size=5).map(tuple)),
    st.builds(stream.SnapshotEnd, names, positions, u32, epochs),
    st.builds(stream.GiveBack, names, positions, u64),
    st.builds(stream.SetAside, names),
    st.just(stream.Ready()),
    st.builds(stream.AskDurable, names, txids),
)


def sender_of(message: Message) -> Sender:
    allowed = MESSAGES[message.CODE][1]
    return Sender.REPLICA if Sender.REPLICA in allowed else Sender.PRIMARY


@settings(max_examples=400)
@given(messages)
def test_what_is_packed_is_read_back(message: Message) -> None:
    read = unpack(pack(message), sender_of(message))
    assert read == message
    assert repr(read) == repr(message), "epochs of positions do not count for equality, and must arrive all the same"


@settings(max_examples=400)
@given(messages, st.data())
def test_damaged_messages_raise_format_errors_only(message: Message, data: st.DataObject) -> None:
    raw = bytearray(pack(message))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    read_anyhow(bytes(raw))


@settings(max_examples=600)
@given(st.sampled_from(sorted(MESSAGES)), st.binary(max_size=200))
def test_any_bytes_raise_format_errors_only(code: int, body: bytes) -> None:
    read_anyhow(bytes([code]) + body)


def read_anyhow(data: bytes) -> None:
    for sender in (Sender.REPLICA, Sender.PRIMARY):
        try:
            message = unpack(data, sender)
            if isinstance(message, (stream_pages.SnapshotPages, stream_pages.Pages)):
                message.pages()
        except FormatError:
            continue
        if getattr(message, "protocol", PROTOCOL_VERSION) == PROTOCOL_VERSION:
            assert unpack(pack(message), sender) == message


@given(messages.filter(lambda message: not isinstance(message, stream.Ready)))
def test_a_message_that_is_cut_short_is_not_taken_for_a_whole_one(message: Message) -> None:
    """Except where the rest is raw data, whose end is the message's end."""
    raw = pack(message)
    for size in range(len(raw)):
        try:
            cut = unpack(raw[:size], sender_of(message))
        except FormatError:
            continue
        assert (
            isinstance(
                cut, (stream.Ltx, stream.LtxData, stream.Checksums, stream_pages.SnapshotPages, stream_pages.Pages)
            )
            or getattr(cut, "protocol", 1) != PROTOCOL_VERSION
        )


def test_each_message_comes_from_its_side_only() -> None:
    hello = pack(stream.Hello(PROTOCOL_VERSION))
    assert isinstance(unpack(hello, Sender.REPLICA), stream.Hello)
    with pytest.raises(FormatError, match="wrong side"):
        unpack(hello, Sender.PRIMARY)
    with pytest.raises(FormatError, match="unknown message type"):
        unpack(b"\xf0", Sender.PRIMARY)
    with pytest.raises(TruncatedError):
        unpack(b"", Sender.PRIMARY)
    with pytest.raises(FormatError, match="unexpected bytes"):
        unpack(pack(stream.Ready()) + b"x", Sender.PRIMARY)


def test_of_another_version_only_the_number_is_read() -> None:
    for version in (0, PROTOCOL_VERSION + 1, 65535):
        data = version.to_bytes(2, "big") + b"whatever comes"
        assert unpack(b"\x0a" + data, Sender.REPLICA) == stream.Hello(version)
        assert unpack(b"\x1e" + data, Sender.PRIMARY) == stream.Welcome(version)


def test_codes_of_a_later_version_are_read_as_unknown() -> None:
    raw = bytearray(pack(stream.Error(ErrorCode.BUSY, "x")))
    raw[1] = 250
    message = unpack(bytes(raw), Sender.PRIMARY)
    assert isinstance(message, stream.Error) and message.code is ErrorCode.UNKNOWN


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/", "a\0b", "x" * (MAX_NAME + 1), "é" * 128, "a-wal"])
def test_names_that_are_no_plain_file_names_are_refused_both_ways(name: str) -> None:
    assert not is_database_name(name)
    with pytest.raises(FormatError):
        pack(stream.SetAside(name))
    raw = name.encode("utf-8", "surrogateescape")
    size = bytes([len(raw)]) if len(raw) < 128 else bytes([len(raw) & 0x7F | 0x80, len(raw) >> 7])
    with pytest.raises(FormatError):
        unpack(bytes([stream.SetAside.CODE]) + size + raw, Sender.PRIMARY)


@pytest.mark.parametrize(
    "message",
    [
        stream.Ltx("a", bytes(MIN_FILE_SIZE - 1)),
        stream.Ltx("a", bytes(MAX_CHUNK + 1)),
        stream.LtxData("a", b""),
        stream.LtxBegin("a", 0, 1, 1000),
        stream.LtxBegin("a", 1, 2**64, 1000),
        stream.LtxBegin("a", 1, 1, 10),
        stream.Checksums("a", 1, 1, bytes(7)),
        stream.Checksums("a", 1, 0, bytes(8)),
        stream.Checksums("a", 1, 1, bytes(8 * stream.MAX_CHECKSUMS + 8)),
        stream.SnapshotBegin("a", 1, 1000, Position(1, 1)),
        stream.Heartbeat(-1),
        stream.Heartbeat(1, (("a", Position(1, 1)),) * 1001),
        stream.Error(ErrorCode.BUSY, "x" * 1001),
        stream.Hello(1, databases_wanted=("a",) * 1001),
    ],
)
def test_limits_hold_when_packing(message: Message) -> None:
    with pytest.raises(FormatError):
        pack(message)


def test_a_count_beyond_its_limit_is_refused_before_anything_is_read() -> None:
    huge = b"\xff\xff\xff\xff\x0f"
    for raw in (b"\x0c" + huge, b"\x0b\x01" + huge, b"\x02" + bytes(8) + huge):
        with pytest.raises(FormatError, match="at most"):
            unpack(raw + bytes(100), Sender.REPLICA)
    with pytest.raises(FormatError, match="at most"):
        unpack(b"\x14\x01a" + bytes(stream.MAX_MESSAGE), Sender.REPLICA)


@settings(suppress_health_check=[HealthCheck.data_too_large])
@given(st.sampled_from([512, 4096, 65536]), st.integers(1, 4), st.randoms(use_true_random=False))
def test_snapshot_pages_come_back(page_size: int, count: int, rng: Any) -> None:
    pages = [(rng.randint(1, 2**32 - 1), rng.randbytes(page_size)) for _ in range(count)]
    message = stream_pages.SnapshotPages.of("a", page_size, pages)
    read = unpack(pack(message), Sender.PRIMARY)
    assert isinstance(read, stream_pages.SnapshotPages) and read.pages() == pages
    with pytest.raises(FormatError):
        dataclasses.replace(read, pgnos=(*read.pgnos, 1)).pages()


def test_snapshot_pages_never_unpack_to_more_than_they_say() -> None:
    bomb = lz4.block.compress(bytes(1 << 24), store_size=False)
    for message in (
        stream_pages.SnapshotPages("a", 512, (1,), bomb[:200_000]),
        stream_pages.SnapshotPages("a", 0, (1,), b"x"),
        stream_pages.SnapshotPages("a", 512, (), b"x"),
        stream_pages.SnapshotPages("a", 65536, (1, 2, 3, 4, 5), b"x"),
    ):
        with pytest.raises(FormatError):
            message.pages()


def test_pages_that_were_asked_for_come_back_or_are_refused() -> None:
    pages = [(7, b"a" * 512), (9, b"b" * 512)]
    message = stream_pages.Pages("a", 1, (7, 9), b"".join(page for _, page in pages))
    read = unpack(pack(message), Sender.REPLICA)
    assert isinstance(read, stream_pages.Pages) and read.pages() == pages
    assert stream_pages.Pages("a", 1, (), b"").pages() == []
    for strange in (dataclasses.replace(read, pgnos=(7, 8, 9)), dataclasses.replace(read, pgnos=())):
        with pytest.raises(FormatError):
            strange.pages()


def test_checksums_of_a_database_are_cut_into_messages() -> None:
    sums = np.arange(stream.MAX_CHECKSUMS * 2 + 5, dtype=np.uint64) | np.uint64(1 << 63)
    parts = list(stream.checksum_messages("a", 3, sums))
    assert [part.first_pgno for part in parts] == [1, stream.MAX_CHECKSUMS + 1, 2 * stream.MAX_CHECKSUMS + 1]
    read = [unpack(pack(part), Sender.REPLICA) for part in parts]
    assert np.array_equal(np.concatenate([part.array for part in read if isinstance(part, stream.Checksums)]), sums)
    assert not list(stream.checksum_messages("a", 3, sums[:0]))


def test_batches_always_have_one() -> None:
    assert stream.batches([]) == [()]
    assert [len(part) for part in stream.batches(range(2500))] == [1000, 1000, 500]
