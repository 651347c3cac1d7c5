"""Names of databases: one rule, and every name that it allows can be written everywhere and read back."""

from __future__ import annotations

import json
import os
from urllib.parse import quote, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pylitefs.errors import FormatError
from pylitefs.formats import names, stream
from pylitefs.formats.stream import Sender, pack, unpack
from pylitefs.formats.stream_fields import ErrorCode
from pylitefs.http.queries import name_in

RAW = st.binary(min_size=1, max_size=300)
NAMES = RAW.map(os.fsdecode).filter(names.is_database_name)

ALLOWED = [
    b"app.db", b"a", b"caf\xe9.db", b"\xff\xfe", "é.db".encode(), "😀".encode(), b"shop-pos", b"stock-lock", b" ",
    b" a ", b"-", b".app.db", b"...", b"-wal.db", b"a\nb", b"a\tb", b"\x01", b"\x7f", b"a b", b"a%41", b"a\\x41",
    b"a+b", b"a&b=c", b"a#b", b"a?b", b'a"b', b"a'b", b"*", b"CON", b"wal", b"x" * 247,
]  # fmt: skip
REFUSED = [
    b"", b".", b"..", b".primary", b".lag", b"a/b", b"/", b"a\0b", b"a-wal", b"a-shm", b"a-journal", b"-wal",
    b"x" * 248, b"x" * 255, "é".encode() * 124,
]  # fmt: skip


@pytest.mark.parametrize("raw", ALLOWED)
def test_what_is_allowed(raw: bytes) -> None:
    name = os.fsdecode(raw)
    assert names.problem_of(name) is None and names.is_database_name(name)
    assert names.to_bytes(name) == raw and names.from_bytes(raw) == name


@pytest.mark.parametrize("raw", REFUSED)
def test_what_is_not(raw: bytes) -> None:
    problem = names.problem_of(os.fsdecode(raw))
    assert problem and "\n" not in problem
    with pytest.raises(FormatError):
        pack(stream.SetAside(os.fsdecode(raw)))


@pytest.mark.parametrize("text", ["\ud800", "\udcc3\udca9", "a\udfff"])
def test_text_that_stands_for_no_file_name(text: str) -> None:
    """Two texts for one file would be two databases."""
    assert not names.is_database_name(text)


@given(NAMES)
def test_every_name_is_itself_when_it_is_read_back(name: str) -> None:
    assert os.fsencode(name) == names.to_bytes(name)
    assert unpack(pack(stream.SetAside(name)), Sender.PRIMARY) == stream.SetAside(name)
    assert json.loads(json.dumps({name: name}).encode("ascii")) == {name: name}
    assert name_in(urlencode({"timeout": "1", "name": name}, errors="surrogateescape")) == name
    assert name_in(f"db={quote(names.to_bytes(name))}", "db") == name


@given(RAW)
def test_what_a_peer_sends_is_a_name_or_refused(raw: bytes) -> None:
    data = pack(stream.SetAside("x"))[:1] + _counted(raw)
    try:
        found = unpack(data, Sender.PRIMARY)
    except FormatError:
        assert not names.is_database_name(os.fsdecode(raw))
    else:
        assert found == stream.SetAside(os.fsdecode(raw)) and names.is_database_name(os.fsdecode(raw))


@given(NAMES, NAMES)
def test_shown_names_can_be_printed_and_told_apart(one: str, other: str) -> None:
    text = names.shown(one)
    assert text.isprintable() and text.encode()
    assert (text == names.shown(other)) == (one == other)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"app.db", "app.db"),
        (b"caf\xe9", r"caf\xe9"),
        ("é ü".encode(), "é ü"),
        (b"a\nb\x01", r"a\x0ab\x01"),
        (b"\\x41", r"\\x41"),
    ],
)
def test_how_names_are_shown(raw: bytes, text: str) -> None:
    assert names.shown(os.fsdecode(raw)) == text


def test_a_text_for_people_may_have_any_name_in_it() -> None:
    error = stream.Error(ErrorCode.PROTOCOL, "caf\udce9: no")
    assert unpack(pack(error), Sender.PRIMARY) == stream.Error(ErrorCode.PROTOCOL, "caf\\udce9: no")


def _counted(raw: bytes) -> bytes:
    size = bytes([len(raw)]) if len(raw) < 128 else bytes([len(raw) & 0x7F | 0x80, len(raw) >> 7])
    return size + raw
