"""What is measured: the operations of an application on SQLite databases in one directory.

Standard library only, and nothing of this project: the same program runs on the native disk and on a mount.
`python workloads.py DIR` reads commands from standard input, one JSON object a line, and answers each with one line,
{"ok": RESULT} or {"error": TEXT}. Every command runs in a fresh child process, so that no connection and no lock
outlives its measurement; `keep` leaves a connection open until `release`, so that closing another one is not the last.

A workload's result: {"ops_per_s", "count", "elapsed_s", "cpu_s", "write_bytes", "wchar"}; the last two are the kernel's
account of what the measured processes wrote meanwhile (/proc/PID/io): pages made dirty, and bytes of write calls.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sqlite3
import sys
import time
from collections.abc import Callable
from typing import Any

ROWS = 20_000  # of the table that is read
BATCH = 10  # operations between two looks at the clock
BUSY_TIMEOUT_S = 30.0
POLL_S = 0.00005  # of a reader that waits for a row
FORK = multiprocessing.get_context("fork")

Result = dict[str, Any]
Operation = Callable[[sqlite3.Connection, random.Random], object]


def connect(name: str, sync: str = "normal") -> sqlite3.Connection:
    connection = sqlite3.connect(name, isolation_level=None, timeout=BUSY_TIMEOUT_S)
    connection.execute(f"pragma synchronous={sync}")
    return connection


def written() -> tuple[int, int]:
    """What this process has written so far: bytes of pages made dirty, bytes of write calls."""
    with open("/proc/self/io") as file:
        counts = dict(line.split(": ") for line in file.read().splitlines())
    return int(counts["write_bytes"]), int(counts["wchar"])


# --- the operations --------------------------------------------------------------------------------------------------


def read(connection: sqlite3.Connection, rng: random.Random) -> object:
    return connection.execute("select a from t where id=?", (rng.randrange(1, ROWS),)).fetchone()


def insert(connection: sqlite3.Connection, rng: random.Random) -> object:
    return connection.execute("insert into t(a, b) values(?, ?)", ("y" * 100, rng.randrange(1 << 30)))


def mix(connection: sqlite3.Connection, rng: random.Random) -> object:
    return (read if rng.random() < 0.7 else insert)(connection, rng)


OPERATIONS: dict[str, Operation] = {"read": read, "insert": insert, "mix": mix}


# --- commands, each in its own process -------------------------------------------------------------------------------


def setup(name: str, journal: str = "wal", rows: int = ROWS) -> Result:
    """A table with an integer key, a text and an indexed number."""
    connection = sqlite3.connect(name, isolation_level=None, timeout=BUSY_TIMEOUT_S)
    mode = connection.execute(f"pragma journal_mode={journal}").fetchone()[0]
    if mode != journal:
        raise RuntimeError(f"journal mode {journal}: SQLite answers {mode}")
    rng = random.Random(0)
    connection.execute("begin")
    connection.execute("create table t(id integer primary key, a text, b int)")
    connection.execute("create index tb on t(b)")
    values = (("x" * 100, rng.randrange(1 << 30)) for _ in range(rows))
    connection.executemany("insert into t(a, b) values(?, ?)", values)
    connection.execute("commit")
    connection.close()
    return {}


def timed(operation: Operation, name: str, sync: str, seconds: float, start: Callable[[], object]) -> Result:
    connection = connect(name, sync)
    rng = random.Random(os.getpid())
    operation(connection, rng)
    start()
    dirty, called = written()
    cpu_s = time.process_time()
    begun_s = time.perf_counter()
    count = 0
    while (elapsed_s := time.perf_counter() - begun_s) < seconds:
        for _ in range(BATCH):
            operation(connection, rng)
        count += BATCH
    cpu_s = time.process_time() - cpu_s
    dirty_end, called_end = written()
    connection.close()
    return {
        "ops_per_s": count / elapsed_s,
        "count": count,
        "elapsed_s": elapsed_s,
        "cpu_s": cpu_s,
        "write_bytes": dirty_end - dirty,
        "wchar": called_end - called,
    }


def run(workload: str, name: str, seconds: float, sync: str = "normal") -> Result:
    return timed(OPERATIONS[workload], name, sync, seconds, lambda: None)


def writers(name: str, seconds: float, count: int = 10, sync: str = "normal") -> Result:
    """Several processes insert at once; rates and counts are added up."""
    barrier = FORK.Barrier(count)
    parts = [spawn(timed, insert, name, sync, seconds, barrier.wait) for _ in range(count)]
    results = [finish(*part) for part in parts]
    return {key: sum(result[key] for result in results) for key in results[0]} | {
        "elapsed_s": max(result["elapsed_s"] for result in results)
    }


def _commit(name: str, seconds: float, start: Callable[[], object]) -> list[float]:
    connection = connect(name, "full")
    rng = random.Random(os.getpid())
    insert(connection, rng)
    start()
    took_ms = []
    begun_s = now_s = time.perf_counter()
    while now_s - begun_s < seconds:
        before_s = now_s
        insert(connection, rng)
        now_s = time.perf_counter()
        took_ms.append((now_s - before_s) * 1000)
    connection.close()
    return took_ms


def commits(names: list[str], seconds: float) -> Result:
    """One process for each of `names`, which may be the same, inserts with synchronous=FULL; how long each took."""
    barrier = FORK.Barrier(len(names))
    parts = [spawn(_commit, name, seconds, barrier.wait) for name in names]
    took_ms = [took for part in parts for took in finish(*part)]
    return {"ops_per_s": len(took_ms) / seconds, "count": len(took_ms), "took_ms": took_ms}


def connects(name: str, seconds: float) -> Result:
    """Connect, SELECT one row, close, in a process that has another connection open."""
    keeper = connect(name)
    keeper.execute("select 1 from t").fetchone()
    cpu_s = time.process_time()
    begun_s = time.perf_counter()
    count = 0
    while (elapsed_s := time.perf_counter() - begun_s) < seconds:
        connection = sqlite3.connect(name, timeout=BUSY_TIMEOUT_S)
        connection.execute("select a from t where id=7").fetchone()
        connection.close()
        count += 1
    cpu_s = time.process_time() - cpu_s
    keeper.close()
    return {"ops_per_s": count / elapsed_s, "count": count, "elapsed_s": elapsed_s, "cpu_s": cpu_s}


def stamp(name: str, per_s: float, seconds: float) -> Result:
    """Insert rows at a fixed pace, each with the monotonic clock of the moment before its statement."""
    connection = connect(name)
    connection.execute("create table if not exists stamps(id integer primary key, at_ns int)")
    dirty, called = written()
    begun_s = time.monotonic()
    count = late = 0
    while (due_s := begun_s + count / per_s) < begun_s + seconds:
        pause_s = due_s - time.monotonic()
        if pause_s > 0:
            time.sleep(pause_s)
        else:
            late += 1
        connection.execute("insert into stamps(at_ns) values(?)", (time.monotonic_ns(),))
        count += 1
    dirty_end, called_end = written()
    connection.close()
    return {"count": count, "late": late, "write_bytes": dirty_end - dirty, "wchar": called_end - called}


def watch(name: str, timeout_s: float, quiet_s: float = 1.0) -> list[float]:
    """See the rows of `stamp` arrive: the age of each, in ms, when a SELECT first returned it. Ends when none has come
    for `quiet_s` after the first, or after `timeout_s` without any."""
    connection = connect(name)
    query = "select id, at_ns from stamps where id > ?"
    last = 0
    ages_ms: list[float] = []
    limit_s = time.monotonic() + timeout_s
    while time.monotonic() < limit_s:
        try:
            rows = connection.execute(query, (last,)).fetchall()
        except sqlite3.OperationalError:  # no such table: not yet
            rows = []
        if rows:
            now_ns = time.monotonic_ns()
            ages_ms += [(now_ns - at_ns) / 1e6 for _, at_ns in rows]
            last = rows[-1][0]
            limit_s = time.monotonic() + quiet_s
        time.sleep(POLL_S)
    connection.close()
    return ages_ms


def large(name: str, size_bytes: int) -> Result:
    """One transaction of random blobs. `commit_ns`: the monotonic clock when COMMIT was called; `done_ns`: after it."""
    connection = connect(name)
    connection.execute("create table if not exists blobs(id integer primary key, data blob)")
    pool = os.urandom(4 << 20)
    rng = random.Random(0)
    blob_bytes = 100_000
    begun_ns = time.monotonic_ns()
    connection.execute("begin")
    for _ in range(size_bytes // blob_bytes):
        at = rng.randrange(len(pool) - blob_bytes)
        connection.execute("insert into blobs(data) values(?)", (pool[at : at + blob_bytes],))
    newest = connection.execute("select max(id) from blobs").fetchone()[0]
    commit_ns = time.monotonic_ns()
    connection.execute("commit")
    done_ns = time.monotonic_ns()
    connection.close()
    return {"begun_ns": begun_ns, "commit_ns": commit_ns, "done_ns": done_ns, "newest": newest}


def newest(name: str, table: str = "t") -> int:
    connection = connect(name)
    found: int | None = connection.execute(f"select max(id) from {table}").fetchone()[0]
    connection.close()
    return found or 0


def await_row(name: str, row: int, timeout_s: float, table: str = "t") -> int:
    """The monotonic clock, in ns, when a SELECT saw a row with that id or a higher one."""
    connection = connect(name)
    limit_s = time.monotonic() + timeout_s
    while time.monotonic() < limit_s:
        try:
            found = connection.execute(f"select max(id) from {table}").fetchone()[0]
        except sqlite3.OperationalError:  # no such table: not yet
            found = None
        if found is not None and found >= row:
            return time.monotonic_ns()
        time.sleep(0.001)
    raise RuntimeError(f"row {row} of {table} was not visible within {timeout_s:.0f} s, the newest is {found}")


def create_many(prefix: str, count: int) -> Result:
    """Small databases in WAL mode, one row each."""
    for number in range(count):
        connection = sqlite3.connect(f"{prefix}{number:04d}.db", isolation_level=None)
        connection.execute("pragma journal_mode=wal")
        connection.execute("create table t(id integer primary key, a text)")
        connection.execute("insert into t(a) values('x')")
        connection.close()
    return {}


COMMANDS: dict[str, Callable[..., object]] = {
    function.__name__: function
    for function in (setup, run, writers, commits, connects, stamp, watch, large, newest, await_row, create_many)
}


# --- processes -------------------------------------------------------------------------------------------------------


def _child(sink: Any, function: Callable[..., object], arguments: tuple[object, ...], named: dict[str, Any]) -> None:
    try:
        sink.send({"ok": function(*arguments, **named)})
    except Exception as error:
        sink.send({"error": f"{function.__name__}: {type(error).__name__}: {error}"})


def spawn(function: Callable[..., object], *arguments: object, **named: Any) -> tuple[Any, Any]:
    source, sink = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_child, args=(sink, function, arguments, named))
    process.start()
    sink.close()
    return process, source


def finish(process: Any, source: Any) -> Any:
    try:
        answer = source.recv()
    except EOFError:
        answer = {"error": "the process died"}
    source.close()
    process.join()
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer["ok"]


def _hold(name: str, until: Any, ready: Any) -> None:
    connection = connect(name)
    connection.execute("select 1 from sqlite_schema").fetchone()
    ready.set()
    until.wait()
    connection.close()


class Keepers:
    """Connections that stay open, by database."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Any, Any]] = {}

    def keep(self, name: str) -> None:
        until, ready = FORK.Event(), FORK.Event()
        process = FORK.Process(target=_hold, args=(name, until, ready), daemon=True)
        process.start()
        if not ready.wait(BUSY_TIMEOUT_S):
            raise RuntimeError(f"{name} could not be opened")
        self._kept[name] = (process, until)

    def release(self, name: str = "") -> None:
        """Close that connection; all of them without a name."""
        for each in [name] if name else list(self._kept):
            process, until = self._kept.pop(each)
            until.set()
            process.join()


def serve(directory: str) -> None:
    os.chdir(directory)
    keepers = Keepers()
    for line in sys.stdin:
        named = json.loads(line)
        command = named.pop("command")
        try:
            if command in ("keep", "release"):
                result = getattr(keepers, command)(**named)
            else:
                result = finish(*spawn(COMMANDS[command], **named))
            answer = {"ok": result}
        except Exception as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)
    keepers.release()
    os.chdir("/")


if __name__ == "__main__":
    serve(sys.argv[1])
