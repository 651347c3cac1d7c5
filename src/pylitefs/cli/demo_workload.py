"""The applications of `litefs demo`: a writer on the primary, a reader on every replica, and the final comparison.

They use plain `sqlite3` on the files of the mounts, as any application would.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from rich.text import Text

from pylitefs.cli.demo_cluster import Cluster, Node
from pylitefs.cli.export import export_to
from pylitefs.errors import LitefsError

DATABASE = "app.db"
RATE_PER_S = 200  # transactions in the measured part: leaves the machine time to show latency, not queueing
CONVERGE_TIMEOUT_S = 60.0
_POLL_S = 0.0003  # of a reader: the resolution of the latencies
_SAMPLES = 20_000
_WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "islet", "jetty")


class Writer(threading.Thread):
    """Inserts one row per transaction: paced at first, as fast as it can after `hurry`."""

    def __init__(self, path: Path) -> None:
        super().__init__(name="writer", daemon=True)
        self._path = path
        self._ended = threading.Event()
        self._hurried = threading.Event()
        self.ready = threading.Event()
        self.count = 0
        self.committed_ns: dict[int, int] = {}  # id -> when COMMIT had returned, for the paced part
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            with contextlib.closing(sqlite3.connect(self._path, isolation_level=None)) as connection:
                self._write(connection)
        except Exception as error:
            self.error = error
        finally:
            self.ready.set()

    def hurry(self) -> None:
        self._hurried.set()

    def stop(self) -> None:
        self._hurried.set()
        self._ended.set()
        if self.is_alive():
            self.join()

    def _write(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("CREATE TABLE visit (id INTEGER PRIMARY KEY, written_ms INTEGER, word TEXT)")
        self.ready.set()
        next_s = time.monotonic()
        while not self._ended.is_set():
            paced = not self._hurried.is_set()
            row = (self.count + 1, time.time_ns() // 1_000_000, _WORDS[self.count % len(_WORDS)])
            connection.execute("INSERT INTO visit VALUES (?, ?, ?)", row)  # a transaction of its own
            if paced:
                self.committed_ns[row[0]] = time.monotonic_ns()
            self.count += 1
            if paced:
                next_s += 1 / RATE_PER_S
                self._hurried.wait(max(0.0, next_s - time.monotonic()))


@dataclass(frozen=True)
class Seen:
    """The rows first..last became visible together."""

    first: int
    last: int
    at_ns: int


class Reader(threading.Thread):
    """Watches the newest row on a replica."""

    def __init__(self, node: Node) -> None:
        super().__init__(name=f"reader-{node.name}", daemon=True)
        self.node = node
        self._ended = threading.Event()
        self._seen: deque[Seen] = deque()
        self._latencies_ms: deque[float] = deque(maxlen=_SAMPLES)
        self.newest_id = 0
        self.newest_row = ""
        self.error: Exception | None = None

    def run(self) -> None:
        path = self.node.mount_dir / DATABASE
        try:
            while not self._ended.is_set() and not self._has_table(path):
                time.sleep(0.02)
            with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
                while not self._ended.wait(_POLL_S):
                    self._look(connection)
        except Exception as error:
            self.error = error

    def stop(self) -> None:
        self._ended.set()
        if self.is_alive():
            self.join()

    def _has_table(self, path: Path) -> bool:
        if not path.exists():
            return False
        with contextlib.closing(sqlite3.connect(path)) as connection:
            found = connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'visit'").fetchone()
        return found is not None

    def _look(self, connection: sqlite3.Connection) -> None:
        row = connection.execute("SELECT id, word FROM visit ORDER BY id DESC LIMIT 1").fetchone()
        if row is not None and row[0] > self.newest_id:
            self._seen.append(Seen(self.newest_id + 1, row[0], time.monotonic_ns()))
            self.newest_id, self.newest_row = row[0], f"#{row[0]} {row[1]}"

    def latencies_ms(self, committed_ns: dict[int, int]) -> tuple[float, float] | None:
        """(p50, p99) from the return of COMMIT to visible here, over the paced rows so far."""
        while self._seen:
            seen = self._seen.popleft()
            for row_id in range(seen.first, seen.last + 1):
                if (at_ns := committed_ns.get(row_id)) is not None:
                    self._latencies_ms.append(max(0, seen.at_ns - at_ns) / 1e6)  # visible before COMMIT returned: 0
        ordered = sorted(self._latencies_ms)
        if not ordered:
            return None
        return ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]


@dataclass(frozen=True)
class Check:
    """One line of the final comparison."""

    what: str
    detail: str
    passed: bool


def compare(cluster: Cluster, rows_written: int) -> list[Check]:
    """Wait until every node is at the primary's position, then compare copies of the database from all of them."""
    positions = _wait_converged(cluster)
    checks = [_same("position", positions)]
    digests, rows, verdicts = {}, {}, {}
    for node in cluster.nodes:
        copy = node.directory / "export.db"
        try:
            export_to(node.client, DATABASE, str(copy))
        except LitefsError as error:
            return [*checks, Check("export", f"{node.name}: {error}", False)]
        with open(copy, "rb") as file:
            digests[node.name] = hashlib.file_digest(file, "sha256").hexdigest()
        with contextlib.closing(sqlite3.connect(copy)) as connection:
            rows[node.name] = f"{connection.execute('SELECT count(*) FROM visit').fetchone()[0]:,}"
            verdicts[node.name] = str(connection.execute("PRAGMA integrity_check(1)").fetchone()[0])
    checks.append(_same("sha256", digests))
    checks.append(_same("rows", rows, expected=f"{rows_written:,}"))
    checks.append(_same("integrity_check", verdicts, expected="ok"))
    return checks


def _wait_converged(cluster: Cluster) -> dict[str, str]:
    deadline_s = time.monotonic() + CONVERGE_TIMEOUT_S
    while True:
        positions = {node.name: position(node) for node in cluster.nodes}
        if len(set(positions.values())) == 1 or time.monotonic() > deadline_s:
            return positions
        time.sleep(0.05)


def position(node: Node) -> str:
    """TXID/checksum of the demo's database on that node; says so where there is none."""
    for database in (node.status() or {}).get("databases", []):
        if database["name"] == DATABASE:
            return f"{database['txid']}/{database['checksum']}"
    return f"{node.name} has no position"


def _same(what: str, values: dict[str, str], expected: str | None = None) -> Check:
    """Whether all nodes have the same value, and the expected one."""
    wanted = expected if expected is not None else next(iter(values.values()))
    different = [f"{name}: {value}" for name, value in values.items() if value != wanted]
    if different:
        return Check(what, f"{wanted} expected, but {'; '.join(different)}", False)
    return Check(what, f"{wanted} on {len(values)} nodes", True)


def check_line(check: Check) -> Text:
    mark = Text("  ok     " if check.passed else "  FAILED ", style="green" if check.passed else "bold red")
    return mark + Text(f"{check.what:<16}", style="bold") + Text(check.detail)
