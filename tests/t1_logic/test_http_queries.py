"""Query parameters of the HTTP API: what is accepted, and that nothing but a UsageError comes of the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pylitefs.errors import UsageError
from pylitefs.http import queries
from pylitefs.http.queries import LagLimit


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("10s", LagLimit(lag_ms=10_000)),
        ("500ms", LagLimit(lag_ms=500)),
        ("1m30s", LagLimit(lag_ms=90_000)),
        ("0", LagLimit(lag_ms=0)),
        ("100tx", LagLimit(transactions=100)),
        ("0tx", LagLimit(transactions=0)),
    ],
)
def test_lags(text: str, limit: LagLimit) -> None:
    assert queries.parse_lag(text) == limit
    assert queries.parse_lag(str(limit)) == limit


@pytest.mark.parametrize(
    "text", ["", "10", "-1s", "-1tx", "1.5tx", "tx", "10 s", "10MB", "nan", "infs", "٣s", "9" * 40 + "h"]
)
def test_what_is_no_lag(text: str) -> None:
    with pytest.raises(UsageError, match="not a lag"):
        queries.parse_lag(text)


def test_not_too_many_limits() -> None:
    assert len(queries.lag_limits(["1s", "2tx"])) == 2
    with pytest.raises(UsageError):
        queries.lag_limits(["1s"] * (queries.MAX_LIMITS + 1))


@pytest.mark.parametrize(("text", "seconds"), [("0", 0), ("2.5", 2.5), ("500ms", 0.5), ("9999999", 60), ("1h", 60)])
def test_timeouts_have_a_limit(text: str, seconds: float) -> None:
    assert queries.timeout_s({"timeout": text}, 1, 60) == seconds
    assert queries.timeout_s({}, 1, 60) == 1


@pytest.mark.parametrize("text", ["", "-1", "1e9", "nan", "inf", "1s2", "１"])
def test_what_is_no_timeout(text: str) -> None:
    with pytest.raises(UsageError, match="not a timeout"):
        queries.timeout_s({"timeout": text}, 1, 60)


def test_numbers() -> None:
    assert queries.parse_node_id("00112233AABBCCDD") == 0x00112233AABBCCDD
    assert queries.optional_node_id({}) is None
    assert queries.optional_txid({"txid": "ff"}) == 255
    assert queries.optional_txid({}) is None
    assert queries.parse_lock_id({"id": str(2**63 - 1)}, "id") == 2**63 - 1
    assert queries.parse_epoch("7", "epoch") == 7


PARSERS: list[Callable[[str], Any]] = [
    queries.parse_lag,
    queries.checked_name,
    queries.parse_node_id,
    lambda text: queries.optional_txid({"txid": text}),
    lambda text: queries.timeout_s({"timeout": text}, 1, 60),
    lambda text: queries.parse_lock_id({"id": text}, "id"),
    lambda text: queries.parse_epoch(text, "epoch"),
]
ALMOST = st.text(st.sampled_from("0123456789abcdefABCDEFxtmsh.-+ _/\x00\n٣é"), max_size=40)


@pytest.mark.parametrize("parse", PARSERS)
@given(text=st.one_of(st.text(max_size=300), ALMOST))
def test_garbage_is_a_usage_error_of_one_line(parse: Callable[[str], Any], text: str) -> None:
    try:
        parse(text)
    except UsageError as error:
        assert "\n" not in str(error)
        assert str(error).isprintable()
        assert len(str(error)) < 1000


@given(st.integers())
def test_ids_are_in_their_range(number: int) -> None:
    for parse, text, is_good in (
        (queries.parse_node_id, f"{number:x}", 0 < number < 2**64),
        (lambda text: queries.parse_lock_id({"id": text}, "id"), str(number), 0 < number < 2**63),
        (lambda text: queries.optional_txid({"txid": text}), f"{number:x}", 0 <= number < 2**64),
    ):
        if is_good:
            assert parse(text) == number
        else:
            with pytest.raises(UsageError):
                parse(text)
