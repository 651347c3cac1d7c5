"""What `litefs status` and `litefs demo` print."""

from __future__ import annotations

import copy
import io
from typing import Any, Literal

import pytest
from rich.console import Console

from pylitefs.cli import demo
from pylitefs.cli.status import format_duration, format_ms, format_size, render

PRIMARY: dict[str, Any] = {
    "node": {
        "id": "0123456789ABCDEF",
        "hostname": "db1.example.com",
        "version": "0.1.0",
        "role": "primary",
        "candidate": True,
        "clusterID": "LFSC0123456789ABCDEF",
        "mountDir": "/litefs",
        "dataDir": "/var/lib/litefs",
        "passthrough": True,
        "uptimeSeconds": 11520,
        "problem": None,
    },
    "primary": None,
    "lagMs": None,
    "databases": [
        {
            "name": "an-application-with-quite-a-long-name[bold].db",
            "txid": "000000000001a2bc",
            "checksum": "c0ffee0123456789",
            "sizeBytes": 1_234_567_890,
            "journalMode": "wal",
            "walSizeBytes": 4 << 20,
            "logSizeBytes": 12_345_678,
            "sqliteVersion": "3.40.1",
            "mayCorruptWAL": True,
            "setAside": None,
        },
        {
            "name": "b.db",
            "txid": "0000000000000000",
            "checksum": "0000000000000000",
            "sizeBytes": 8192,
            "journalMode": "rollback",
            "walSizeBytes": 0,
            "logSizeBytes": 0,
            "sqliteVersion": "3.40.1",
            "mayCorruptWAL": False,
            "setAside": "malformed",
        },
    ],
    "replicas": [
        {
            "nodeID": "AAAA456789ABCDEF",
            "hostname": "",
            "address": "10.0.0.12:49152",
            "state": "live",
            "lagTXIDs": 0,
            "lagMs": 0.81,
        },
        {
            "nodeID": "BBBB",
            "hostname": "db3",
            "address": "10.0.0.13:49152",
            "state": "catch-up",
            "lagTXIDs": 1234,
            "lagMs": None,
        },
    ],
}


def printed(shown: Any, width: int = 80, colour: bool = False) -> str:
    out = io.StringIO()
    colours: Literal["standard"] | None = "standard" if colour else None
    Console(file=out, width=width, highlight=False, force_terminal=colour, color_system=colours).print(shown)
    return out.getvalue()


def test_an_old_sqlite_is_named() -> None:
    name = PRIMARY["databases"][0]["name"]
    assert f"{name} was written by SQLite 3.40.1: a rare bug" in " ".join(printed(render(PRIMARY)).split())
    many = copy.deepcopy(PRIMARY)
    many["databases"] = [{**PRIMARY["databases"][0], "name": f"{number}.db"} for number in range(5)]
    assert "0.db, 1.db, 2.db and 2 more was written by" in " ".join(printed(render(many)).split())
    new = copy.deepcopy(PRIMARY)
    new["databases"][0]["mayCorruptWAL"] = False
    assert "written by SQLite" not in printed(render(new))


def test_a_primary_fits_80_columns_and_loses_nothing() -> None:
    text = printed(render(PRIMARY))
    assert max(len(line) for line in text.splitlines()) <= 80
    for expected in (
        "primary",
        "0123456789ABCDEF",
        "LFSC0123456789ABCDEF",
        "passthrough",
        "000000000001a2bc",
        "c0ffee0123456789",
        "1.1 GB",
        "4.0 MB",
        "12 MB",
        "rollback",
        "b.db is not replicated: malformed",
        "10.0.0.12:49152",
        "live",
        "0.81 ms",
        "1,234 tx",
        "3 h 12 m",
    ):
        assert expected in text
    assert "\x1b" not in text
    assert "\x1b" in printed(render(PRIMARY), colour=True)


def test_names_are_not_markup() -> None:
    assert "name[bold].db" in printed(render(PRIMARY), width=120)


def test_a_replica_shows_its_primary_and_lag() -> None:
    replica = copy.deepcopy(PRIMARY)
    replica["node"] |= {"role": "replica", "problem": "cannot reach the primary", "clusterID": None}
    replica |= {"primary": {"hostname": "db1", "url": "http://db1:20202"}, "lagMs": 12, "databases": [], "replicas": []}
    text = printed(render(replica))
    for expected in ("db1  http://db1:20202", "12 ms", "cannot reach the primary", "no databases yet", "not known yet"):
        assert expected in text
    assert "replicas connected" not in text


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 KB"), (1536, "1.5 KB"), (12_345_678, "12 MB"), (1 << 40, "1.0 TB")],
)
def test_sizes(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


def test_small_formats() -> None:
    assert [format_ms(value) for value in (0.4231, 12.4, 3100, 125_000)] == ["0.42 ms", "12 ms", "3.1 s", "2 m 5 s"]
    durations = {0: "0 s", 45: "45 s", 200: "3 m 20 s", 3600: "1 h", 187_200: "2 d 4 h"}
    assert {duration_s: format_duration(duration_s) for duration_s in durations} == durations


def test_the_demo_fits_80_columns() -> None:
    view = demo.View(
        12.3,
        60,
        True,
        1_234_567,
        tuple(range(0, 30_000, 1000)),
        (
            demo.NodeView("primary", 1_234_567, 0, None, ""),
            demo.NodeView("replica-1", 1_234_560, 7, (0.81, 2.5), "#1234560 amber"),
            demo.NodeView("replica-2", 1_234_567, 0, (0.9, 12.5), "#1234567 jetty"),
        ),
    )
    text = printed(demo.render(view))
    assert max(len(line) for line in text.splitlines()) <= 80
    for expected in ("1,234,567", "0.81 ms", "12 ms", "#1234560 amber", "29,000 tx/s", "48 s left"):
        assert expected in text
    line = demo.plain_line(view)
    assert "\n" not in line
    assert "replica-1 1,234,560 (p50 0.81 ms, p99 2.50 ms)" in line
