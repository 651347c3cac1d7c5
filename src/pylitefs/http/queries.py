"""The query parameters of requests. Pure; what is wrong is a UsageError that says what was expected.

db, name       a database's name, percent-encoded by its bytes (`formats.names`)
lag            how far behind is near enough: "10s", "500ms" (Go's form), or "100tx", transactions; may be repeated
nodeID         up to 16 hex digits, not 0
txid           up to 16 hex digits
timeout        seconds, "2.5", or a duration, "500ms"
force          true or false
id, lockID     of a HALT lock: a positive 63-bit number
epoch          a number
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import parse_qsl

from pylitefs.config_values import ValueProblem, format_duration, parse_duration_s
from pylitefs.errors import UsageError
from pylitefs.formats.names import problem_of

MAX_LOCK_ID = (1 << 63) - 1
MAX_LIMITS = 8
MAX_FIELDS = 100
_MAX_SHOWN = 80  # characters of what was sent
_HEX = re.compile(r"[0-9a-fA-F]{1,16}")
_TRANSACTIONS = re.compile(r"([0-9]{1,18})tx")
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
_DECIMAL = re.compile(r"[0-9]{1,19}")


@dataclass(frozen=True)
class LagLimit:
    """At most so far behind: one of the two is set."""

    lag_ms: float | None = None
    transactions: int | None = None

    def __str__(self) -> str:
        if self.lag_ms is not None:
            return format_duration(self.lag_ms / 1000)
        return f"{self.transactions}tx"


def checked_name(name: str | None, key: str = "name") -> str:
    """The database name of a request. Raises UsageError for one that could not be a database's."""
    if not name:
        raise UsageError(f"name required: add ?{key}=DATABASE")
    if problem := problem_of(name):
        raise UsageError(f"{_shown(name)} cannot be the name of a database: {problem}")
    return name


def name_in(raw_query: str, key: str = "name") -> str | None:
    """The database name in a query string as it came; None if there is none. (What the server has decoded already has
    lost the bytes that are not UTF-8.)"""
    try:
        found = parse_qsl(raw_query, keep_blank_values=True, errors="surrogateescape", max_num_fields=MAX_FIELDS)
    except ValueError:
        raise UsageError(f"more than {MAX_FIELDS} parameters") from None
    return next((value for name, value in found if name == key), None)


def lag_limits(texts: Sequence[str]) -> tuple[LagLimit, ...]:
    """All of them must be kept. Empty: any lag will do."""
    if len(texts) > MAX_LIMITS:
        raise UsageError(f"lag is given {len(texts)} times, {MAX_LIMITS} at most")
    return tuple(parse_lag(text) for text in texts)


def parse_lag(text: str) -> LagLimit:
    if match := _TRANSACTIONS.fullmatch(text):
        return LagLimit(transactions=int(match[1]))
    try:
        return LagLimit(lag_ms=parse_duration_s(text) * 1000)
    except ValueProblem:
        raise UsageError(
            f'not a lag: {_shown(text)}: expected a duration such as "10s" or "500ms", or transactions, "100tx"'
        ) from None


def optional_node_id(query: Mapping[str, str], key: str = "nodeID") -> int | None:
    text = query.get(key)
    return None if text is None else parse_node_id(text, key)


def parse_node_id(text: str | None, key: str = "nodeID") -> int:
    if text is None or not _HEX.fullmatch(text) or int(text, 16) == 0:
        raise UsageError(f"not a node id: {key}={_shown(text or '')}: expected up to 16 hex digits, see litefs status")
    return int(text, 16)


def optional_txid(query: Mapping[str, str]) -> int | None:
    text = query.get("txid")
    if text is None:
        return None
    if not _HEX.fullmatch(text):
        raise UsageError(f"not a TXID: {_shown(text)}: expected up to 16 hex digits, as in NAME-pos")
    return int(text, 16)


def timeout_s(query: Mapping[str, str], default_s: float, max_s: float) -> float:
    """More than `max_s` is `max_s`."""
    text = query.get("timeout")
    if text is None:
        return default_s
    if _SECONDS.fullmatch(text):
        return min(float(text), max_s)
    try:
        return min(parse_duration_s(text), max_s)
    except ValueProblem:
        raise UsageError(f'not a timeout: {_shown(text)}: expected seconds, or a duration such as "500ms"') from None


def flag(query: Mapping[str, str], key: str) -> bool:
    text = query.get(key, "false")
    if text not in ("true", "false"):
        raise UsageError(f"not true or false: {key}={_shown(text)}")
    return text == "true"


def parse_lock_id(query: Mapping[str, str], key: str) -> int:
    text = query.get(key, "")
    if not _DECIMAL.fullmatch(text) or not 1 <= int(text) <= MAX_LOCK_ID:
        raise UsageError(f"not the id of a lock: {key}={_shown(text)}: expected a number from 1 to 2^63-1")
    return int(text)


def parse_epoch(text: str | None, where: str) -> int:
    if text is None or not _DECIMAL.fullmatch(text):
        raise UsageError(f"not an epoch: {where} {_shown(text or '')}: expected a number")
    return int(text)


def _shown(text: str) -> str:
    return ascii(text[:_MAX_SHOWN])
