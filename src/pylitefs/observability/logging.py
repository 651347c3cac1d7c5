"""The daemon's log: one line per record on standard error, for people (`text`) or for programs (`json`).

    level=INFO logger=cluster.replica msg="connected to primary" url=http://db1:20202
    {"level": "INFO", "logger": "cluster.replica", "msg": "connected to primary", "url": "http://db1:20202"}

Every module logs through `logging.getLogger(__name__)`; the name is shown without the package. What a record is about
goes into `extra={...}` and comes out as fields after the message. `time` comes first where `log.timestamp` asks for it.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Iterator
from typing import IO, Any, Protocol

_PACKAGE = "pylitefs."
_STANDARD = frozenset([*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"])
_BARE = re.compile(r"[^\s\"=\\\x00-\x1f\x7f-\x9f]+")  # what logfmt leaves without quotes
_CONTROL = re.compile("[\x7f-\x9f\u2028\u2029]")  # beyond ASCII's: line ends for some, orders for some terminals
_MAX_VALUE = 4096  # characters of one field: what a peer sent may be in it
_QUIET = ("asyncio", "aiohttp.access", "aiohttp.server", "aiohttp.web", "aiohttp.client", "aiohttp.websocket")


class LogSettings(Protocol):
    """The `log` section of the configuration."""

    @property
    def format(self) -> str: ...
    @property
    def timestamp(self) -> bool: ...
    @property
    def debug(self) -> bool: ...


def set_up(settings: LogSettings, stream: IO[str] | None = None) -> None:
    """Send every record of this process to `stream` (standard error), replacing what was set up before."""
    handler = _Handler(stream if stream is not None else sys.stderr)
    formatter = JsonFormatter if settings.format == "json" else TextFormatter
    handler.setFormatter(formatter(settings.timestamp))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.DEBUG if settings.debug else logging.INFO)
    for name in _QUIET:  # libraries: only what went wrong
        logging.getLogger(name).setLevel(logging.WARNING)


class _Handler(logging.StreamHandler[IO[str]]):
    """A log that cannot be written (its reader is gone, the disk is full) must not disturb the work."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class TextFormatter(logging.Formatter):
    """`key=value` words, values quoted where needed."""

    def __init__(self, timestamp: bool) -> None:
        super().__init__()
        self._timestamp = timestamp

    def format(self, record: logging.LogRecord) -> str:
        return " ".join(f"{key}={_word(value)}" for key, value in _fields(self, record, self._timestamp))


class JsonFormatter(logging.Formatter):
    """One JSON object."""

    def __init__(self, timestamp: bool) -> None:
        super().__init__()
        self._timestamp = timestamp

    def format(self, record: logging.LogRecord) -> str:
        fields = {key: _plain(value) for key, value in _fields(self, record, self._timestamp)}
        return _quoted(fields)


def _fields(formatter: logging.Formatter, record: logging.LogRecord, timestamp: bool) -> Iterator[tuple[str, Any]]:
    if timestamp:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        yield "time", f"{seconds}.{int(record.created * 1000) % 1000:03d}Z"
    yield "level", record.levelname
    yield "logger", record.name.removeprefix(_PACKAGE)
    yield "msg", record.getMessage()
    for key, value in vars(record).items():
        if key not in _STANDARD and not key.startswith("_"):
            yield key, value
    if record.exc_info and record.exc_info[1] is not None:
        yield "error", repr(record.exc_info[1])
        yield "stack", formatter.formatException(record.exc_info)


def _word(value: object) -> str:
    text = _text(value)
    return text if _BARE.fullmatch(text) else _quoted(text)


def _quoted(value: object) -> str:
    """As JSON, readable in any language, without a control character."""
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(value, ensure_ascii=False))


def _plain(value: object) -> object:
    return value if isinstance(value, bool | int | float) or value is None else _text(value)


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value).encode("utf-8", "backslashreplace").decode()  # surrogates of undecodable file names
    return text if len(text) <= _MAX_VALUE else text[:_MAX_VALUE] + "…"
