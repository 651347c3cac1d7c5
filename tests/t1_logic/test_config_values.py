"""Durations and sizes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pylitefs.config_values import (
    ValueProblem,
    format_duration,
    format_size,
    parse_duration_s,
    parse_size_bytes,
    split_address,
)


# The good ones with their values and the bad ones are from the documentation and behaviour of Go's time.ParseDuration.
@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        ("5s", 5.0),
        ("+5s", 5.0),
        ("1h30m", 5400.0),
        ("1.5h", 5400.0),
        (".5s", 0.5),
        ("5.s", 5.0),
        ("500ms", 0.5),
        ("1h15m30.918s", 4530.918),
        ("100us", 0.0001),
        ("100µs", 0.0001),
        ("100μs", 0.0001),
        ("1ns", 1e-9),
        ("30m1h", 5400.0),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "s",
        ".s",
        "5x",
        "5 s",
        "1h 30m",
        "-5s",
        "--5s",
        "1d",
        "5S",
        "1e3s",
        "99999999h",
        "9" * 400 + "s",
        "5s\n",
        "١s",
    ],
)
def test_not_durations(text: str) -> None:
    with pytest.raises(ValueProblem):
        parse_duration_s(text)


@given(st.integers(0, 10**15))
def test_durations_round_trip(microseconds: int) -> None:
    text = format_duration(microseconds / 1e6)
    assert parse_duration_s(text) == pytest.approx(microseconds / 1e6, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("0B", 0),
        ("1B", 1),
        ("10KB", 10 * 1024),
        ("10KiB", 10 * 1024),
        ("10k", 10 * 1024),
        ("512MB", 512 << 20),
        ("512 MB", 512 << 20),
        ("1GB", 1 << 30),
        ("1.5GB", 3 << 29),
        ("2tb", 2 << 40),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size_bytes(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "1", "GB", "-1GB", "1XB", "1GBB", "1 2GB", "9999999TB", "9" * 400 + "B", "1iB", "1e3B"]
)
def test_not_sizes(text: str) -> None:
    with pytest.raises(ValueProblem):
        parse_size_bytes(text)


@given(st.integers(0, 2**63 - 1))
def test_sizes_round_trip(size_bytes: int) -> None:
    assert parse_size_bytes(format_size(size_bytes)) == size_bytes


def test_sizes_are_shown_in_the_largest_whole_unit() -> None:
    assert [format_size(value) for value in (0, 1, 1024, 1500, 1 << 30)] == ["0", "1B", "1KB", "1500B", "1GB"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (":20202", ("", 20202)),
        (":0", ("", 0)),
        ("0.0.0.0:80", ("0.0.0.0", 80)),
        ("localhost:65535", ("localhost", 65535)),
        ("[::1]:80", ("::1", 80)),
        ("[fe80::1%eth0]:80", ("fe80::1%eth0", 80)),
    ],
)
def test_addresses(text: str, expected: tuple[str, int]) -> None:
    assert split_address(text) == expected


@pytest.mark.parametrize(
    "text", ["", "80", "host", "host:", ":65536", "::1:80", "[::1]", "a b:80", "http://a:80", ":80/", ":-1"]
)
def test_not_addresses(text: str) -> None:
    with pytest.raises(ValueProblem):
        split_address(text)
