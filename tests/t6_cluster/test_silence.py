"""After the last write, with nobody asking, every node has it: single commits, each followed by silence.

Nothing here asks the primary for a position (that would have it look), nor writes a second time. The long mode,
`PYLITEFS_TEST_SCALE=50 … --timeout 3000 -s`, makes 1,000 commits in each journal mode and prints how long they took.
"""

from __future__ import annotations

import contextlib
import random
import sqlite3
import time
from pathlib import Path

import pytest

from cluster_nodes import PASSTHROUGH, Cluster, Node, needs_root, scaled, wait_until

pytestmark = needs_root
LIVE_S = 1.0
LOADED_S = 10.0  # a loaded machine may take so long; what is lost never comes
MODES = {
    "wal-normal": ("journal_mode = WAL", "synchronous = NORMAL"),
    "wal-full": ("journal_mode = WAL", "synchronous = FULL"),
    "wal-off": ("journal_mode = WAL", "synchronous = OFF"),
    "wal-exclusive": ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = NORMAL"),
    "delete": ("journal_mode = DELETE", "synchronous = FULL"),
    "memory": ("journal_mode = MEMORY", "synchronous = OFF"),
    "persist-exclusive": ("locking_mode = EXCLUSIVE", "journal_mode = PERSIST"),
}


@pytest.mark.parametrize("passthrough", PASSTHROUGH)
def test_a_single_commit_arrives_by_itself(tmp_path: Path, passthrough: str) -> None:
    chance, todo = random.Random(passthrough), [mode for mode in MODES for _ in range(scaled(20))]
    chance.shuffle(todo)
    with Cluster(tmp_path, passthrough) as cluster, contextlib.ExitStack() as stack:
        primary, replica = cluster.pair()
        writers, readers = {}, {}
        for mode, pragmas in MODES.items():
            db = writers[mode] = stack.enter_context(contextlib.closing(primary.connect(mode)))
            for pragma in pragmas:
                db.execute(f"PRAGMA {pragma}")
            db.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, v)")
        for mode in MODES:
            wait_until(lambda mode=mode: _has_table(replica, mode), f"the replica has {mode}")  # type: ignore[misc]
            readers[mode] = stack.enter_context(contextlib.closing(replica.connect(mode)))
        times: dict[str, list[float]] = {mode: [] for mode in MODES}
        for mode in todo:
            writers[mode].execute("INSERT INTO t (v) VALUES (randomblob(?))", (chance.choice((50, 5000)),))
            times[mode].append(_arrival_s(readers[mode], len(times[mode]) + 1, mode))
            time.sleep(chance.choice((0, 0, 0.001, 0.01)))
    for mode, took in times.items():
        took.sort()
        print(f"{mode}, passthrough {passthrough}: {len(took)} commits, {sum(s > LIVE_S for s in took)} late, "
              f"median {took[len(took) // 2] * 1000:.1f} ms, worst {took[-1] * 1000:.1f} ms")  # fmt: skip


@pytest.mark.parametrize("opened_in", ["delete", "wal"])
@pytest.mark.parametrize("mode", ["memory", "off"])
def test_a_wal_begins_right_after_a_commit_that_nothing_tells_the_end_of(
    cluster: Cluster, mode: str, opened_in: str
) -> None:
    """With synchronous=OFF and no journal file a commit is found by looking for it, a moment later; by then the
    database may be in WAL mode, and what is committed there stands on top of it. What a connection that was opened in
    WAL mode writes passes us by."""
    primary, replica = cluster.pair()
    with contextlib.closing(primary.connect(mode)) as db:
        db.execute(f"PRAGMA journal_mode = {opened_in}")
        db.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, v)")
    with contextlib.closing(primary.connect(mode)) as db:
        db.execute("PRAGMA synchronous = OFF")
        wait_until(lambda: _has_table(replica, mode), "the replica has it")
        with contextlib.closing(replica.connect(mode)) as reader:
            for round_number in range(scaled(4)):
                db.execute(f"PRAGMA journal_mode = {mode}")
                db.execute("INSERT INTO t (v) VALUES (randomblob(20000))")
                assert db.execute("PRAGMA journal_mode = WAL").fetchone() == ("wal",)
                db.execute("INSERT INTO t (v) VALUES (randomblob(50))")
                _arrival_s(reader, 2 * round_number + 2, mode)
                assert reader.execute("SELECT count(*) FROM t").fetchone() == (2 * round_number + 2,)
                assert reader.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                rows = db.execute("SELECT * FROM t ORDER BY id").fetchall()
                assert reader.execute("SELECT * FROM t ORDER BY id").fetchall() == rows


def _arrival_s(reader: sqlite3.Connection, count: int, what: str) -> float:
    written_s = time.monotonic()
    while not _has(reader, count):
        assert time.monotonic() < written_s + LOADED_S, f"commit {count} of {what} does not arrive"
        time.sleep(0.001)
    return time.monotonic() - written_s


def _has_table(node: Node, name: str) -> bool:
    if not (node.mount / name).exists():
        return False
    with contextlib.closing(node.connect(name)) as db:
        return bool(db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0])


def _has(reader: sqlite3.Connection, count: int) -> bool:
    try:
        return bool(reader.execute("SELECT max(id) FROM t").fetchone()[0] == count)
    except sqlite3.OperationalError:  # a rollback mode on the replica: it is just being written to
        return False
