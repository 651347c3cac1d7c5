"""A transaction over two attached databases, in the rollback modes, with something that happens between any two of the
steps that SQLite commits it with: each database has it or neither, here and in the log, and what was answered is there.

The unlink of the super-journal is the commit. What SQLite does after it, it no longer looks at: an error there reaches
nobody, so a commit that must not be has to be refused until then."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from role_node import RoleNode, needs_mount

sys.path.insert(0, str(Path(__file__).parents[1] / "t2_engine"))

from engine_nodes import file_checksum
from recording_vfs import library
from stepping_process import SteppingProcess

pytestmark = [
    pytest.mark.skipif(not needs_mount(), reason="needs root and /dev/fuse"),
    pytest.mark.skipif(library() is None, reason="Python's sqlite3 has no libsqlite3 of its own"),
]
NAMES = ("db", "other")
MODES = ["DELETE", "TRUNCATE", "PERSIST"]
LONG_S = 3600.0
LOADED_S = 20.0


class Pair:
    """A primary on a disk of its own, and an application that has both databases open."""

    def __init__(self, base: Path, mode: str, *, opened_in_wal: bool = False, outside: bool = False) -> None:
        self.base, self.mode, self.value, self.outside = base, mode, 0, outside
        (base / "disk").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(base / "disk")], check=True)
        (base / "disk" / "data").mkdir()
        self.node = _node(base)
        self.node.promote(2, LONG_S)
        self.sql: SteppingProcess | None = None
        self.open("WAL" if opened_in_wal else mode)
        for name in NAMES:
            self.run(f"CREATE TABLE {self.schema(name)}.t (v INTEGER)")
        for _ in range(3):
            self.run("INSERT INTO other.t VALUES (0)")  # its TXIDs are greater than those of the first
        for name in NAMES:
            self.run(f"PRAGMA {self.schema(name)}.journal_mode = {mode}")

    def schema(self, name: str) -> str:
        return "main" if name == NAMES[0] and not self.outside else name

    def open(self, mode: str) -> None:
        if self.sql is not None:
            self.sql.kill()
        self.sql = SteppingProcess(str(self.base / "main") if self.outside else self.node.file(NAMES[0]))
        for name in NAMES[not self.outside :]:
            self.run(f"ATTACH ? AS {name}", f"file:{self.node.file(name)}?vfs=stepping")
        for name in NAMES:
            self.run(f"PRAGMA {self.schema(name)}.journal_mode = {mode}")
            self.run(f"PRAGMA {self.schema(name)}.synchronous = FULL")

    def run(self, sql: str, *values: object) -> Any:
        """Tried again for a while: a hot journal may have to wait for room."""
        assert self.sql is not None
        until_s = time.monotonic() + LOADED_S
        while True:
            try:
                return self.sql.run(sql, *values)
            except RuntimeError:
                if time.monotonic() > until_s:
                    raise
                time.sleep(0.05)

    def begin(self) -> tuple[str, Any]:
        """Begin to commit; the first event."""
        assert self.sql is not None
        self.value += 1
        self.run("BEGIN IMMEDIATE")
        for name in NAMES:
            self.run(f"INSERT INTO {self.schema(name)}.t VALUES (?)", self.value)
        return self.sql.start("COMMIT")

    def rolled_back(self) -> None:
        """After an error of COMMIT."""
        assert self.sql is not None
        with contextlib.suppress(RuntimeError):
            self.sql.run("ROLLBACK")

    def check(self, name: str) -> bool:
        """Whether a database has the last transaction. Its log leads to what is there."""
        path = str(self.base / f"copy-{name}")
        position = self.node.position(name)
        self.node.export(name, path)
        self.node.log(name)
        assert int(position.split("/")[1], 16) == file_checksum(path), f"the log of {name} says something else"
        with contextlib.closing(sqlite3.connect(path)) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            return db.execute("SELECT count(*) FROM t WHERE v = ?", (self.value,)).fetchone() == (1,)

    def has(self) -> bool:
        found = [self.check(name) for name in NAMES]
        assert found[0] == found[1], "half a transaction"
        return found[0]

    def fill(self) -> None:
        with contextlib.suppress(OSError), open(self.base / "disk" / "filler", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def make_room(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self.base / "disk" / "filler").unlink()

    def end(self) -> None:
        with contextlib.suppress(Exception):
            if self.sql is not None:
                self.sql.kill()
        self.node.end()
        subprocess.run(["umount", "-l", str(self.base / "disk")], check=False)
        print(self.node.errors.read_text()[-3000:], file=sys.stderr)


def _node(base: Path) -> RoleNode:
    """Its data lie on the disk."""
    (base / "node").mkdir()
    os.symlink(base / "disk" / "data", base / "node" / "data")
    return RoleNode(base / "node")


@pytest.fixture
def pairs(tmp_path: Path) -> Iterator[Callable[..., Pair]]:
    with contextlib.ExitStack() as stack:

        def make(mode: str, **how: Any) -> Pair:
            pair = Pair(tmp_path, mode, **how)
            stack.callback(pair.end)
            return pair

        yield make


def sweep(pair: Pair, act: Callable[[], object], undo: Callable[[], object]) -> None:
    """`act` happens before the first step of a commit, before the second, ...: an error leaves neither database with
    the transaction, and an answer is the truth."""
    assert pair.sql is not None
    refused = answered = at = 0
    while True:
        event, steps, gone = pair.begin(), 0, False
        while event[0] != "done":
            if steps == at:
                act()
            gone |= event[0] == "delete" and "-mj" in event[1]
            event, steps = pair.sql.answer(True), steps + 1
        failed = isinstance(event[1], str)
        assert gone or failed, "there was no super-journal"
        if failed:
            pair.rolled_back()
        if steps <= at:
            assert not failed
            break
        undo()
        for name in NAMES:  # rolls back what is left
            count = pair.run(f"SELECT count(*) FROM {pair.schema(name)}.t WHERE v = ?", pair.value)
            assert count == [(0 if failed else 1,)], (name, event, at)
        assert pair.has() is not failed, (event, at)
        refused, answered, at = refused + failed, answered + (not failed), at + 1
    assert refused > 3 and answered > 0


@pytest.mark.parametrize("how", [{}, {"opened_in_wal": True}, {"outside": True}], ids=lambda how: " ".join(how))
@pytest.mark.parametrize("mode", MODES)
def test_the_lease_ends_between_any_two_steps(pairs: Callable[..., Pair], mode: str, how: dict[str, bool]) -> None:
    """The main database, and with it the super-journal, may lie outside of the mount."""
    pair = pairs(mode, **how)
    sweep(pair, lambda: pair.node.lead(-1.0), lambda: pair.node.lead(LONG_S))


@pytest.mark.parametrize("mode", MODES)
def test_the_disk_is_full_between_any_two_steps(pairs: Callable[..., Pair], mode: str) -> None:
    pair = pairs(mode)
    sweep(pair, pair.fill, pair.make_room)


@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("mode", MODES)
def test_the_application_is_killed_between_any_two_steps(pairs: Callable[..., Pair], mode: str, gated: bool) -> None:
    """The daemon takes the databases over, as when another node becomes the primary."""
    pair = pairs(mode)
    assert pair.sql is not None
    if gated:
        pair.node.gate("open")
    kept = at = 0
    while True:
        event, steps, gone = pair.begin(), 0, False
        while event[0] != "done" and steps < at:
            gone |= event[0] == "delete" and "-mj" in event[1]
            event, steps = pair.sql.answer(True), steps + 1
        if event[0] == "done":
            break
        pair.sql.kill()
        pair.node.demote(LOADED_S)
        assert pair.has() is gone, (event, at)
        pair.node.promote(3 + at, LONG_S)
        pair.open(mode)
        kept, at = kept + gone, at + 1
    assert 0 < kept < at


@pytest.mark.parametrize("opened_in_wal", [False, True], ids=["", "opened in WAL mode"])
@pytest.mark.parametrize("fails", [False, True], ids=["granted", "fails"])
@pytest.mark.parametrize("mode", MODES)
def test_replicas_are_waited_for_before_the_commit(
    pairs: Callable[..., Pair], mode: str, fails: bool, opened_in_wal: bool
) -> None:
    """A connection that was opened in WAL mode is recorded later, as nobody has seen what it wrote."""
    pair = pairs(mode, opened_in_wal=opened_in_wal)
    assert pair.sql is not None
    sql = pair.sql
    pair.node.gate("shut")
    events = [pair.begin()]

    def commit() -> None:
        while events[-1][0] != "done":
            events.append(sql.answer(True))

    thread = threading.Thread(target=commit)
    thread.start()
    until_s = time.monotonic() + LOADED_S
    while not pair.node.waiting():
        assert thread.is_alive() and time.monotonic() < until_s, events
        time.sleep(0.01)
    assert sum(event[0] == "delete" and event[1].endswith("-journal") for event in events) == 0
    pair.node.gate("fail" if fails else "open")
    thread.join(LOADED_S)
    failed = isinstance(events[-1][1], str)
    assert failed is fails, events
    pair.node.gate("none")
    if failed:
        pair.rolled_back()
    assert pair.run("SELECT count(*) FROM main.t WHERE v = ?", pair.value) == [(0 if failed else 1,)]
    assert pair.has() is not failed
