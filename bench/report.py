"""The table, as text for the terminal and as Markdown, and the results as JSON."""

from __future__ import annotations

import json
import os
import platform
import sqlite3
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metrics import Metric

HEADINGS = ("metric", "native", "ours", "result", "target", "", "note")


def number(value: float | None) -> str:
    if value is None:
        return ""
    if value != value:  # NaN: not measured
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def cells(metric: Metric) -> tuple[str, ...]:
    target = f"{metric.limit[0]} {metric.limit[1]:,g}" if metric.limit else ""
    verdict = {True: "ok", False: "MISSED", None: ""}[metric.passed]
    result = f"{number(metric.value)} {metric.unit}"
    return (metric.name, number(metric.native), number(metric.ours), result, target, verdict, metric.note)


def markdown_row(row: Sequence[str]) -> str:
    return "| " + " | ".join(row) + " |"


def table(metrics: Sequence[Metric]) -> str:
    """A Markdown table whose columns are aligned, so that it is read on a terminal as well."""
    rows = [HEADINGS, *map(cells, metrics)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    numeric = range(1, 4)

    def line(row: Sequence[str]) -> str:
        padded = [
            text.rjust(widths[column]) if column in numeric else text.ljust(widths[column])
            for column, text in enumerate(row)
        ]
        return markdown_row(padded)

    rule = ["-" * (width - 1) + ":" if column in numeric else "-" * width for column, width in enumerate(widths)]
    return "\n".join([line(HEADINGS), markdown_row(rule), *(line(row) for row in rows[1:])])


def machine(directory: Path) -> dict[str, Any]:
    """What the figures depend on."""
    words = ["findmnt", "-n", "-o", "FSTYPE", "-T", str(directory)]
    return {
        "kernel": platform.release(),
        "processors": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)),
        "filesystem": _output(words),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "commit": _output(["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]),
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def _output(words: list[str]) -> str:
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def headline(facts: dict[str, Any]) -> str:
    return (
        f"Linux {facts['kernel']}, {facts['processors']} processors, {facts['memory_gib']} GiB, "
        f"{facts['filesystem'] or 'unknown file system'}, SQLite {facts['sqlite']}, Python {facts['python']}, "
        f"passthrough {facts['passthrough']}, load at start {facts['load_at_start']}"
    )


def save(directory: Path, facts: dict[str, Any], metrics: Sequence[Metric]) -> Path:
    """Write DATE.json and DATE.md; the path of the latter. A second run on the same day replaces the first."""
    directory.mkdir(parents=True, exist_ok=True)
    date = time.strftime("%Y-%m-%d")
    rows = [
        {
            "name": metric.name, "value": None if metric.value != metric.value else metric.value, "unit": metric.unit,
            "target": metric.limit, "passed": metric.passed, "native": metric.native, "ours": metric.ours,
            "note": metric.note, "details": metric.details,
        }
        for metric in metrics
    ]  # fmt: skip
    document = {"date": date, **facts, "metrics": rows}
    (directory / f"{date}.json").write_text(json.dumps(document, indent=1, default=str) + "\n")
    path = directory / f"{date}.md"
    path.write_text(
        f"# Measured on {date}\n\n{headline(facts)}; {facts['mode']} run of commit {facts['commit']}.\n\n"
        f"{table(metrics)}\n\nRates are operations per second. Repeat with `make bench`.\n"
    )
    return path
