"""The metrics: how each is measured, and the figure it should reach.

Ratios to native SQLite are taken in rounds, native and ours in turn, the order changing every round; a ratio is the
median of the rounds' ratios, so that a machine that slows down for a while slows both. Before the clock starts again
the replica has caught up: what ours leaves to do is measured by `apply`, not charged to native.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nodes import BenchError, Driver, Node, Pair

MIB = 1 << 20


@dataclass(frozen=True)
class Settings:
    parent: Path  # where the temporary directories are made
    passthrough: str
    rounds: int
    slice_s: float  # of one workload, once
    latency_s: float
    apply_s: float
    large_rounds: int
    idle_s: float
    many: int  # databases
    full: bool


@dataclass(frozen=True)
class Metric:
    """One line of the table. `limit` is ("≥" or "<" or "≤", figure), None where the line only informs."""

    name: str
    value: float
    unit: str
    limit: tuple[str, float] | None = None
    native: float | None = None
    ours: float | None = None
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool | None:
        if self.limit is None:
            return None
        sign, figure = self.limit
        return {"≥": self.value >= figure, "≤": self.value <= figure, "<": self.value < figure}[sign]


Group = Callable[[Settings], Iterator[Metric]]


# --- ratios ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratio:
    """One workload on both sides. `on_copy`: ours is the replica."""

    name: str
    least: float
    command: str
    arguments: dict[str, Any]
    writes: bool = True
    on_copy: bool = False


def _compare(pair: Pair, settings: Settings, ratio: Ratio) -> Metric:
    results: dict[str, list[dict[str, Any]]] = {"native": [], "ours": []}
    tails_s, daemons_s = [], 0.0
    for number in range(settings.rounds):
        for side in ("native", "ours") if number % 2 == 0 else ("ours", "native"):
            driver = pair.native if side == "native" else pair.copy if ratio.on_copy else pair.ours
            busy_s = pair.cpu_s
            results[side].append(driver.ask(ratio.command, seconds=settings.slice_s, **ratio.arguments))
            if side == "native":
                continue
            if ratio.writes:
                begun_s = time.monotonic()
                pair.catch_up()
                tails_s.append(time.monotonic() - begun_s)
            daemons_s += pair.cpu_s - busy_s
    rates = {side: [result["ops_per_s"] for result in found] for side, found in results.items()}
    ratios = [ours / native for ours, native in zip(rates["ours"], rates["native"], strict=True)]
    cpu_us = {side: 1e6 * _total(found, "cpu_s") / _total(found, "count") for side, found in results.items()}
    daemons_us = 1e6 * daemons_s / _total(results["ours"], "count")
    return Metric(
        ratio.name,
        statistics.median(ratios),
        "× native",
        ("≥", ratio.least),
        statistics.median(rates["native"]),
        statistics.median(rates["ours"]),
        f"rounds {min(ratios):.2f} to {max(ratios):.2f}; "
        f"CPU µs/op: native {cpu_us['native']:.1f}, ours {cpu_us['ours']:.1f} + daemons {daemons_us:.1f}",
        {"native": results["native"], "ours": results["ours"], "ratios": ratios, "tails_s": tails_s},
    )


def _total(results: list[dict[str, Any]], key: str) -> float:
    return sum(result[key] for result in results)


def _ratios(settings: Settings, journal: str, ratios: tuple[Ratio, ...]) -> Iterator[Metric]:
    with Pair(settings.parent, settings.passthrough) as pair:
        for driver in (pair.native, pair.ours):
            driver.ask("setup", name="bench.db", journal=journal)
            driver.ask("keep", name="bench.db")
        pair.catch_up()
        pair.copy.ask("keep", name="bench.db")
        for ratio in ratios:
            yield _compare(pair, settings, ratio)


def _run(name: str, least: float, workload: str, sync: str = "normal", on_copy: bool = False) -> Ratio:
    arguments = {"workload": workload, "name": "bench.db", "sync": sync}
    return Ratio(name, least, "run", arguments, writes=workload != "read", on_copy=on_copy)


def wal(settings: Settings) -> Iterator[Metric]:
    """WAL, synchronous NORMAL. While nobody has committed since the database was opened SQLite asks for the file's size
    in each read transaction, and the kernel passes that on to the daemon after each page read from the file."""
    ratios = (
        _run("WAL, empty: point reads", 0.25, "read"),
        _run("replica, WAL: point reads", 0.97, "read", on_copy=True),
        _run("WAL NORMAL: inserts", 0.90, "insert"),
        _run("WAL NORMAL: point reads", 0.97, "read"),
        _run("WAL NORMAL: 70 % reads, 30 % inserts", 0.90, "mix"),
        Ratio("WAL NORMAL: 10 writer processes", 0.90, "writers", {"name": "bench.db"}),
        Ratio("WAL: connect, SELECT, close", 0.35, "connects", {"name": "bench.db"}, writes=False),
        _run("WAL FULL: inserts", 0.90, "insert", "full"),
    )
    yield from _ratios(settings, "wal", ratios)


def delete(settings: Settings) -> Iterator[Metric]:
    """Rollback journal that is deleted at each commit."""
    ratios = (
        _run("DELETE NORMAL: inserts", 0.40, "insert"),
        _run("DELETE FULL: inserts", 0.40, "insert", "full"),
        _run("DELETE: point reads", 0.80, "read"),
        _run("replica, DELETE: point reads", 0.80, "read", on_copy=True),
    )
    yield from _ratios(settings, "delete", ratios)


# --- latency and bytes at a fixed pace -------------------------------------------------------------------------------


def _percentile(values: list[float], percent: float) -> float:
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(len(ranked) * percent / 100))]


def _stamped(writer: Driver, reader: Driver, seconds: float) -> tuple[list[float], dict[str, Any]]:
    reader.send("watch", name="stamps.db", timeout_s=20)
    writer.send("stamp", name="stamps.db", per_s=100, seconds=seconds)
    sent = writer.receive()
    ages_ms: list[float] = reader.receive()
    if len(ages_ms) != sent["count"]:
        raise BenchError(f"{sent['count']} rows were committed, the reader saw {len(ages_ms)}")
    return ages_ms, sent


def latency(settings: Settings) -> Iterator[Metric]:
    """Commit to visible on the replica at 100 commits a second, and what the daemon writes for such commits."""
    with Pair(settings.parent, settings.passthrough) as pair:
        for driver in (pair.native, pair.ours):
            driver.ask("setup", name="stamps.db", rows=100)
            driver.ask("keep", name="stamps.db")
        pair.catch_up()
        floor_ms, _ = _stamped(pair.native, pair.native_second(), min(settings.latency_s, 3.0))
        before = pair.primary.usage, pair.replica.usage
        ages_ms, sent = _stamped(pair.ours, pair.copy, settings.latency_s)
        after = pair.primary.usage, pair.replica.usage
        cpu_ms = [1e3 * (end.cpu_s - begin.cpu_s) / sent["count"] for begin, end in zip(before, after, strict=True)]
        note = f"{len(ages_ms)} commits; a second process on the native file: "
        for percent, most in ((50, 2.0), (99, 10.0)):
            floor = _percentile(floor_ms, percent)
            yield Metric(
                f"commit to visible on the replica, p{percent}", _percentile(ages_ms, percent), "ms", ("<", most),
                floor, _percentile(ages_ms, percent), f"{note}{floor:.2f} ms",
                {"ages_ms": ages_ms, "floor_ms": floor_ms} if percent == 50 else {},
            )  # fmt: skip
        yield Metric("commit to visible on the replica, worst", max(ages_ms), "ms", native=max(floor_ms))
        yield Metric("CPU per commit at 100/s, primary", cpu_ms[0], "ms")
        yield Metric("CPU per commit at 100/s, replica", cpu_ms[1], "ms")
        written = after[0].write_bytes - before[0].write_bytes
        yield _written("bytes written, 100 commits/s", sent, written, 0)


def _written(name: str, sent: dict[str, Any], ours: int, log_bytes: int) -> Metric:
    by_sqlite = max(1, sent["write_bytes"])
    note = f"per commit: SQLite {by_sqlite / sent['count']:,.0f} B, daemon {ours / sent['count']:,.0f} B"
    details = {"sqlite": sent, "daemon_write_bytes": ours, "log_size_bytes": log_bytes}
    return Metric(name, ours / by_sqlite, "× SQLite's", ("≤", 0.7), by_sqlite, ours, note, details)


# --- throughput of the replica ---------------------------------------------------------------------------------------


def apply(settings: Settings) -> Iterator[Metric]:
    """Small transactions as fast as writers can, until the replica has shown the last one."""
    for name, command in (("one writer", "run"), ("10 writers", "writers")):
        with Pair(settings.parent, settings.passthrough) as pair:
            pair.ours.ask("setup", name="bench.db")
            pair.ours.ask("keep", name="bench.db")
            pair.catch_up()
            txid = pair.primary.txids()["bench.db"]
            usage, log_bytes = pair.primary.usage, pair.primary.log_size_bytes()
            arguments = {"workload": "insert"} if command == "run" else {}
            begun_ns = time.monotonic_ns()
            sent = pair.ours.ask(command, name="bench.db", seconds=settings.apply_s, **arguments)
            ended_ns = time.monotonic_ns()
            row = pair.ours.ask("newest", name="bench.db")
            seen_ns = pair.copy.ask("await_row", name="bench.db", row=row, timeout_s=100)
            count = pair.primary.txids()["bench.db"] - txid
            written = pair.primary.usage.write_bytes - usage.write_bytes
            tail_s = max(0, seen_ns - ended_ns) / 1e9
            yield Metric(
                f"applied small transactions, {name}", count / (seen_ns - begun_ns) * 1e9, "tx/s", ("≥", 20_000),
                ours=sent["ops_per_s"],
                note=f"{count:,} written at {sent['ops_per_s']:,.0f}/s; the last one seen {tail_s * 1e3:.0f} ms later",
                details={"count": count, "tail_s": tail_s, "sent": sent},
            )  # fmt: skip
            yield _written(f"bytes written, {name}", sent, written, pair.primary.log_size_bytes() - log_bytes)


def catch_up(settings: Settings) -> Iterator[Metric]:
    """A replica that was stopped comes back to a log of small transactions."""
    with Pair(settings.parent, settings.passthrough) as pair:
        pair.ours.ask("setup", name="bench.db")
        pair.ours.ask("keep", name="bench.db")
        pair.catch_up()
        pair.copy.stop()
        pair.replica.stop()
        txid = pair.primary.txids()["bench.db"]
        pair.ours.ask("run", workload="insert", name="bench.db", seconds=settings.apply_s)
        count = pair.primary.txids()["bench.db"] - txid
        begun_s = time.monotonic()
        pair.replica.start()
        started_s = time.monotonic()
        pair.catch_up()
        took_s = time.monotonic() - begun_s
        yield Metric(
            "a stopped replica starts and catches up", took_s, "s",
            note=f"{count:,} transactions; {started_s - begun_s:.2f} s until it was healthy",
        )  # fmt: skip


def large(settings: Settings) -> Iterator[Metric]:
    """Transactions of 100 MB that do not compress, from COMMIT to visible on the replica."""
    size_bytes = 100_000_000
    rates, notes = [], []
    with Pair(settings.parent, settings.passthrough) as pair:
        for driver in (pair.native, pair.ours):
            driver.ask("setup", name="large.db", rows=100)
            driver.ask("keep", name="large.db")
        pair.catch_up()
        for _ in range(settings.large_rounds):
            native = pair.native.ask("large", name="large.db", size_bytes=size_bytes)
            sent = pair.ours.ask("large", name="large.db", size_bytes=size_bytes)
            seen_ns = pair.copy.ask("await_row", name="large.db", table="blobs", row=sent["newest"], timeout_s=100)
            rates.append(size_bytes / 1e6 / ((seen_ns - sent["commit_ns"]) / 1e9))
            notes.append({
                "native_s": (native["done_ns"] - native["begun_ns"]) / 1e9,
                "ours_s": (sent["done_ns"] - sent["begun_ns"]) / 1e9,
                "visible_after_commit_s": (seen_ns - sent["commit_ns"]) / 1e9,
            })  # fmt: skip
            pair.catch_up()
    medians = {key: statistics.median(note[key] for note in notes) for key in notes[0]}
    yield Metric(
        "applied large transactions (100 MB)", statistics.median(rates), "MB/s", ("≥", 150),
        note=f"visible {medians['visible_after_commit_s']:.2f} s after COMMIT was called",
        details={"rounds": notes, "rates": rates},
    )  # fmt: skip
    yield Metric(
        "100 MB transaction, BEGIN to COMMIT", medians["native_s"] / medians["ours_s"], "× native",
        native=100 / medians["native_s"], ours=100 / medians["ours_s"], note="MB/s as the application sees it",
    )  # fmt: skip


# --- size ------------------------------------------------------------------------------------------------------------


def memory(settings: Settings) -> Iterator[Metric]:
    """Peak memory of both daemons that have seen one transaction of 300 MB."""
    with Pair(settings.parent, settings.passthrough) as pair:
        pair.ours.ask("setup", name="large.db", rows=100)
        pair.catch_up()
        idle = {node.name: node.usage.rss_bytes for node in (pair.primary, pair.replica)}
        sent = pair.ours.ask("large", name="large.db", size_bytes=300_000_000)
        pair.copy.ask("await_row", name="large.db", table="blobs", row=sent["newest"], timeout_s=100)
        pair.catch_up()
        for node in (pair.primary, pair.replica):
            usage = node.usage
            yield Metric(
                f"peak memory, 300 MB transaction, {node.name}", usage.peak_rss_bytes / MIB, "MiB", ("<", 150),
                note=f"{idle[node.name] / MIB:.0f} MiB before, {usage.rss_bytes / MIB:.0f} MiB after",
            )  # fmt: skip


def idle(settings: Settings) -> Iterator[Metric]:
    """Memory and CPU of daemons with nothing to do, with one database and with many."""
    with Pair(settings.parent, settings.passthrough) as pair:
        pair.ours.ask("setup", name="bench.db", rows=100)
        pair.catch_up()
        yield from _idle(pair, settings, "1 database")
        if settings.many:
            begun_s = time.monotonic()
            pair.ours.ask("create_many", prefix="many-", count=settings.many - 1, wait_s=300)
            created_s = time.monotonic() - begun_s
            pair.catch_up()
            begun_s = time.monotonic()
            pair.native.ask("create_many", prefix="many-", count=settings.many - 1, wait_s=300)
            native_s = time.monotonic() - begun_s
            yield from _idle(pair, settings, f"{settings.many:,} databases")
            yield Metric(
                f"creating {settings.many:,} databases", created_s, "s", native=native_s, ours=created_s,
                note="for information",
            )  # fmt: skip


RESTED_S = 20.0
"""A replica lets go of a database that nobody uses 15 s after its last transaction; what comes after that is idle."""


def _idle(pair: Pair, settings: Settings, what: str) -> Iterator[Metric]:
    time.sleep(RESTED_S)
    nodes: list[Node] = [pair.primary, pair.replica]
    before = [node.usage for node in nodes]
    begun_s = time.monotonic()
    time.sleep(settings.idle_s)
    passed_s = time.monotonic() - begun_s
    for node, begin in zip(nodes, before, strict=True):
        end = node.usage
        yield Metric(f"idle memory, {what}, {node.name}", end.rss_bytes / MIB, "MiB", ("≤", 64))
        cpu = 100 * (end.cpu_s - begin.cpu_s) / passed_s
        yield Metric(f"idle CPU, {what}, {node.name}", cpu, "%", ("<", 1.0))


# --- restart ---------------------------------------------------------------------------------------------------------


def restart(settings: Settings) -> Iterator[Metric]:
    """Clean restart of a primary: from starting the process to the first row read through the mount."""
    size_bytes = 10 << 30 if settings.full else 64 << 20
    label = "10 GB" if settings.full else "64 MB"
    if settings.full and shutil.disk_usage(settings.parent).free < 25 << 30:
        yield Metric("clean restart, 10 GB database", float("nan"), "s", note="skipped: less than 25 GB free")
        return
    pair = Pair(settings.parent, settings.passthrough)
    node = pair.primary
    driver = None
    try:
        (node.data / "dbs" / "large.db").mkdir(parents=True)
        _sparse_database(node.data / "dbs" / "large.db" / "database", size_bytes)
        begun_s = time.monotonic()
        node.start(within_s=600)
        first_s = time.monotonic() - begun_s
        node.stop()
        begun_ns = time.monotonic_ns()
        node.start()
        healthy_s = (time.monotonic_ns() - begun_ns) / 1e9
        driver = Driver(node.mount)
        seen_ns = driver.ask("await_row", name="large.db", row=100, timeout_s=30)
        took_s = (seen_ns - begun_ns) / 1e9
        note = f"healthy after {healthy_s:.2f} s; the first start, which reads it all, took {first_s:.1f} s"
        yield Metric(f"clean restart, {label} database", took_s, "s", ("<", 2.0) if settings.full else None, note=note)
    finally:
        if driver is not None:
            driver.stop()
        pair.stop()


def _sparse_database(path: Path, size_bytes: int) -> None:
    """A database of that size, most of it a hole: pages that no table uses."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("pragma journal_mode=wal")
    connection.execute("create table t(id integer primary key, a text)")
    connection.executemany("insert into t(a) values(?)", [("x" * 100,)] * 100)
    connection.close()
    with open(path, "r+b") as file:
        file.seek(28)  # size in pages, section 1.3.7 of the file format; 24 and 92, which vouch for it, stay equal
        file.write((size_bytes // 4096).to_bytes(4, "big"))
        os.ftruncate(file.fileno(), size_bytes)


GROUPS: dict[str, Group] = {
    group.__name__: group for group in (wal, delete, latency, apply, catch_up, large, memory, idle, restart)
}


@contextlib.contextmanager
def failures_as_metric(name: str, found: list[Metric]) -> Iterator[None]:
    """A group that fails is a line of the table that says why, and the others go on."""
    try:
        yield
    except (BenchError, OSError, sqlite3.Error) as error:
        found.append(Metric(name, float("nan"), "", ("≥", 0.0), note=f"FAILED: {error}"))
