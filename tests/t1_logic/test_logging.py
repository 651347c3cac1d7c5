"""The log: one line per record, whatever is in it; and sd_notify."""

from __future__ import annotations

import io
import json
import logging
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pylitefs.config import LogConfig
from pylitefs.observability import systemd
from pylitefs.observability.logging import JsonFormatter, TextFormatter, set_up


@pytest.fixture
def logged() -> Iterator[Callable[[LogConfig], io.StringIO]]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def start(config: LogConfig) -> io.StringIO:
        stream = io.StringIO()
        set_up(config, stream)
        return stream

    yield start
    root.handlers[:] = handlers
    root.setLevel(level)


def test_text(logged: Callable[[LogConfig], io.StringIO]) -> None:
    out = logged(LogConfig())
    logging.getLogger("pylitefs.cluster.replica").info("connected to %s", "db1", extra={"url": "http://db1", "n": 3})
    logging.getLogger("pylitefs.cluster.replica").debug("not shown")
    assert out.getvalue() == 'level=INFO logger=cluster.replica msg="connected to db1" url=http://db1 n=3\n'


def test_json_with_time_and_debug(logged: Callable[[LogConfig], io.StringIO]) -> None:
    out = logged(LogConfig(format="json", timestamp=True, debug=True))
    logging.getLogger("pylitefs.engine").debug("captured", extra={"txid": 7, "ok": True, "path": Path("/x")})
    record = json.loads(out.getvalue())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record.pop("time"))
    assert record == {
        "level": "DEBUG",
        "logger": "engine",
        "msg": "captured",
        "txid": 7,
        "ok": True,
        "path": "/x",
    }


def test_an_exception_is_one_line_too(logged: Callable[[LogConfig], io.StringIO]) -> None:
    for config in (LogConfig(), LogConfig(format="json")):
        out = logged(config)
        try:
            raise ValueError("first\nsecond")
        except ValueError:
            logging.getLogger("pylitefs.x").exception("failed")
        assert out.getvalue().count("\n") == 1
        assert "ValueError" in out.getvalue()
        assert "test_logging.py" in out.getvalue()


@given(message=st.text(), value=st.text() | st.integers() | st.floats() | st.binary())
def test_any_content_stays_one_line(message: str, value: object) -> None:
    record = logging.makeLogRecord({"msg": message, "name": "n", "levelname": "INFO", "field": value})
    assert len(TextFormatter(timestamp=False).format(record).splitlines()) == 1
    line = JsonFormatter(timestamp=False).format(record)
    assert len(line.splitlines()) == 1
    assert json.loads(line)["msg"] == message


def test_a_log_that_nobody_reads_disturbs_nothing(logged: Callable[[LogConfig], io.StringIO]) -> None:
    out = logged(LogConfig())
    out.close()
    logging.getLogger("pylitefs.x").info("into the void")


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(tmp_path: Path, abstract: bool) -> None:
    path = f"pylitefs-test-{tmp_path.name}-{id(tmp_path)}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind("\0" + path if abstract else path)
        assert systemd.notify("READY=1", {"NOTIFY_SOCKET": "@" + path if abstract else path})
        assert receiver.recv(100) == b"READY=1"


def test_without_systemd_nothing_happens(tmp_path: Path) -> None:
    assert not systemd.notify("READY=1", {})
    assert not systemd.notify("READY=1", {"NOTIFY_SOCKET": str(tmp_path / "nobody")})
