"""FUSE requests and replies: layouts against linux/fuse.h's offsets, and garbage in, FormatError out."""

from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pylitefs.errors import FormatError, TruncatedError
from pylitefs.formats.fuse import abi, replies, requests

PARSERS = [
    lambda data: requests.parse_init(data),
    lambda data: requests.parse_name(data, len(data)),
    lambda data: requests.parse_create(data, len(data)),
    lambda data: requests.parse_mknod(data, len(data)),
    lambda data: requests.parse_rename(data, len(data)),
    lambda data: requests.parse_rename2(data, len(data)),
    lambda data: requests.parse_setattr(data),
    lambda data: requests.parse_write(data, len(data)),
    lambda data: requests.parse_batch_forget(data, len(data)),
    lambda data: requests.parse_fallocate(data),
]
BODY_OF = [abi.INIT, abi.LOOKUP, abi.CREATE, abi.MKNOD, abi.RENAME, abi.RENAME2, abi.SETATTR, abi.WRITE,
           abi.BATCH_FORGET, abi.FALLOCATE]  # fmt: skip

NAMES = st.binary(min_size=1, max_size=300).filter(lambda raw: not {0, 47} & set(raw) and raw not in (b".", b".."))


def request(opcode: int, body: bytes, nodeid: int = 1) -> bytes:
    return struct.pack("=IIQQIIIHH", 40 + len(body), opcode, 7, nodeid, 1000, 1001, 4242, 0, 0) + body


def test_header_fields() -> None:
    data = request(abi.LOOKUP, b"name\0", nodeid=9)
    assert requests.parse_header(data, len(data)) == (abi.LOOKUP, 7, 9, 1000, 1001, 4242)


@pytest.mark.parametrize("opcode", abi.OPCODES)
def test_a_body_shorter_than_its_row_is_refused(opcode: int) -> None:
    least = abi.OPCODES[opcode].body_size
    data = request(opcode, bytes(least))
    assert requests.parse_header(data, len(data))[0] == opcode
    if least:
        data = request(opcode, bytes(least - 1))
        with pytest.raises(TruncatedError):
            requests.parse_header(data, len(data))


def test_a_length_that_is_not_what_was_read_is_refused() -> None:
    data = request(abi.LOOKUP, b"name\0")
    with pytest.raises(FormatError):
        requests.parse_header(data + b"x", len(data) + 1)


@given(st.sampled_from(range(len(PARSERS))), st.binary(max_size=200))
def test_garbage_gives_a_value_or_a_format_error(which: int, body: bytes) -> None:
    data = request(BODY_OF[which], body)
    try:
        requests.parse_header(data, len(data))
        PARSERS[which](data)
    except FormatError:
        pass


@given(NAMES)
def test_names_survive_whatever_their_bytes(raw: bytes) -> None:
    name = requests.parse_name(request(abi.LOOKUP, raw + b"\0"), 41 + len(raw))
    assert name.encode("utf-8", "surrogateescape") == raw


@given(NAMES, NAMES, st.integers(0, 2**32 - 1))
def test_rename2(old: bytes, new: bytes, flags: int) -> None:
    data = request(abi.RENAME2, struct.pack("=QII", 1, flags, 0) + old + b"\0" + new + b"\0")
    parsed = requests.parse_rename2(data, len(data))
    assert (parsed.new_parent, parsed.flags) == (1, flags)
    assert parsed.old.encode("utf-8", "surrogateescape") == old
    assert parsed.new.encode("utf-8", "surrogateescape") == new


@pytest.mark.parametrize("raw", [b"", b"\0", b".\0", b"..\0", b"a/b\0", b"a", b"a\0b\0", b"a\0\0", b"x" * 5000 + b"\0"])
def test_what_is_not_a_name(raw: bytes) -> None:
    with pytest.raises(FormatError):
        requests.parse_name(request(abi.LOOKUP, raw), 40 + len(raw))


def test_write_data_is_a_view_of_the_request() -> None:
    body = struct.pack("=QQIIQII", 5, 4096, 3, 4, 0, 0, 0) + b"abc"
    data = bytearray(request(abi.WRITE, body))
    fh, offset, view, clear_setid = requests.parse_write(data, len(data))
    assert (fh, offset, bytes(view), clear_setid) == (5, 4096, b"abc", True)
    data[-1] = ord("z")
    assert bytes(view) == b"abz"


def test_write_that_carries_less_than_it_says() -> None:
    data = request(abi.WRITE, struct.pack("=QQIIQII", 5, 0, 4, 0, 0, 0, 0) + b"abc")
    with pytest.raises(FormatError):
        requests.parse_write(data, len(data))


def test_setattr_times_are_nanoseconds() -> None:
    body = struct.pack("=IIQQQqqqIIIIIIII", abi.FATTR_MTIME, 0, 3, 9, 0, 1, -2, 0, 5, 7, 0, 0o644, 0, 10, 20, 0)
    parsed = requests.parse_setattr(request(abi.SETATTR, body))
    assert (parsed.atime_ns, parsed.mtime_ns) == (1_000_000_005, -2_000_000_000 + 7)
    assert (parsed.fh, parsed.size_bytes, parsed.mode, parsed.uid, parsed.gid) == (3, 9, 0o644, 10, 20)


def test_flags2_counts_only_with_init_ext() -> None:
    for flags, expected in ((abi.INIT_EXT, abi.INIT_EXT | abi.PASSTHROUGH), (0, 0)):
        body = struct.pack("=IIIII44x", 7, 41, 0, flags, abi.PASSTHROUGH >> 32)
        assert requests.parse_init(request(abi.INIT, body)).flags == expected


def test_batch_forget() -> None:
    body = struct.pack("=II", 2, 0) + struct.pack("=QQQQ", 2, 1, 3, 5)
    data = request(abi.BATCH_FORGET, body)
    assert requests.parse_batch_forget(data, len(data)) == [(2, 1), (3, 5)]
    with pytest.raises(FormatError):
        requests.parse_batch_forget(data[:-16], len(data) - 16)


def test_init_reply_offsets() -> None:
    body = replies.pack_init(
        40, abi.INIT_EXT | abi.PASSTHROUGH, max_readahead=1, max_write=8192, max_background=8, max_stack_depth=2
    )
    assert len(body) == 64
    assert struct.unpack_from("=IIII", body) == (7, 40, 1, abi.INIT_EXT)
    assert struct.unpack_from("=IIHH", body, 20) == (8192, 1, 2, 0)
    assert struct.unpack_from("=II", body, 32) == (abi.PASSTHROUGH >> 32, 2)


def test_attr_reply_offsets(tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(tmp_path, "f")
    with open(path, "wb") as file:
        file.write(b"x" * 5000)
    os.utime(path, ns=(1_500_000_007, -3))
    found = os.stat(path)
    body = replies.pack_attr(77, found, found.st_mode, 1, 60)
    assert len(body) == 104
    assert struct.unpack_from("=QII", body) == (60, 0, 0)
    ino, size, _, atime, mtime = struct.unpack_from("=QQQqq", body, 16)
    assert (ino, size, atime, mtime) == (77, 5000, 1, -1)
    assert struct.unpack_from("=II", body, 64) == (500_000_007, 999_999_997)
    entry = replies.pack_entry(77, found, found.st_mode, 1, 1, 60)
    assert entry[40:] == body[16:]


def test_dirents_stop_at_the_limit_and_are_aligned() -> None:
    entries = [(index, index, 8, "n" * index) for index in range(1, 40)]
    body = replies.pack_dirents(entries, 500)
    assert len(body) <= 500
    offset = 0
    names = []
    while offset < len(body):
        _, _, length, _ = abi.DIRENT.unpack_from(body, offset)
        names.append(body[offset + 24 : offset + 24 + length].decode())
        offset += 24 + (length + 7 & ~7)
    assert names == ["n" * index for index in range(1, len(names) + 1)]
    assert offset == len(body)


def test_notifications_carry_their_code_and_no_unique() -> None:
    for message, code in (
        (replies.notify_inval_inode(5, 0, 0), abi.NOTIFY_INVAL_INODE),
        (replies.notify_inval_entry(1, "a", True), abi.NOTIFY_INVAL_ENTRY),
    ):
        assert abi.OUT_HEADER.unpack_from(message) == (len(message), code, 0)
