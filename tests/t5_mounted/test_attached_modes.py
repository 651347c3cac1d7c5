"""Transactions over attached databases of which some do not take part in SQLite's atomic commit: in WAL mode, with the
journal in memory, or with synchronous=OFF.

SQLite writes a super-journal if at least two databases are written that have a journal file and whose `synchronous` is
not OFF (vdbeaux.c, vdbeCommit: aMJNeeded, safety_level). Those are atomic. The others commit by themselves: WAL when
its frames are written, MEMORY when the file is. With OFF and a journal a database is in the super-journal if there is
one. Without one an error at the end of a database's journal is honoured, but the databases before it are committed.

What was answered is there in all of them; where COMMIT fails the atomic ones have nothing of it; and in each case the
log of every database, and so each replica, comes to be what SQLite reads.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
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

from cluster_nodes import SCALE, wait_until

pytestmark = [
    pytest.mark.skipif(not needs_mount(), reason="needs root and /dev/fuse"),
    pytest.mark.skipif(library() is None, reason="Python's sqlite3 has no libsqlite3 of its own"),
]
LONG_S = 3600.0
LOADED_S = 20.0
Modes = dict[str, tuple[str, str]]  # journal mode and `synchronous` by name; the first is the main database
ATOMIC: Modes = {"db": ("DELETE", "FULL"), "other": ("DELETE", "FULL")}
ALONE: Modes = {"db": ("DELETE", "FULL")}
CHILDREN = {
    "WAL": ("WAL", "FULL"), "WAL NORMAL": ("WAL", "NORMAL"), "MEMORY": ("MEMORY", "FULL"),
    "MEMORY OFF": ("MEMORY", "OFF"), "DELETE OFF": ("DELETE", "OFF"),
}  # fmt: skip


class Family:
    """A primary, and an application that has all databases open."""

    def __init__(self, base: Path, modes: Modes) -> None:
        self.base, self.modes, self.value = base, modes, 0
        self.main = next(iter(modes))
        self.node = RoleNode(base / "node")
        self.node.promote(2, LONG_S)
        self.sql: SteppingProcess | None = None
        self.open()
        for name in modes:
            self.run(f"CREATE TABLE {self.schema(name)}.t (v INTEGER)")
        wait_until(lambda: all(f"{name}-pos" in os.listdir(self.node.mount) for name in modes), "they are databases")

    def schema(self, name: str) -> str:
        return "main" if name == self.main else name

    def open(self) -> None:
        if self.sql is not None:
            self.sql.kill()
        self.sql = SteppingProcess(self.node.file(self.main))
        for name, (mode, synchronous) in self.modes.items():
            if name != self.main:
                self.run(f"ATTACH ? AS {name}", f"file:{self.node.file(name)}?vfs=stepping")
            self.run(f"PRAGMA {self.schema(name)}.journal_mode = {mode}")
            self.run(f"PRAGMA {self.schema(name)}.synchronous = {synchronous}")

    def run(self, sql: str, *values: object) -> Any:
        """Tried again for a while: the daemon may have a lock for a moment."""
        assert self.sql is not None
        until_s = time.monotonic() + LOADED_S
        while True:
            try:
                return self.sql.run(sql, *values)
            except RuntimeError:
                if time.monotonic() > until_s:
                    raise
                time.sleep(0.02)

    def begin(self) -> tuple[str, Any]:
        """Begin to commit; the first event."""
        assert self.sql is not None
        self.value += 1
        self.run("BEGIN IMMEDIATE")
        for name in self.modes:
            self.run(f"INSERT INTO {self.schema(name)}.t VALUES (?)", self.value)
        return self.sql.start("COMMIT")

    def roll_back(self) -> None:
        assert self.sql is not None
        with contextlib.suppress(RuntimeError):
            self.sql.run("ROLLBACK")

    def has(self, name: str) -> bool:
        """Whether a database has the last transaction, as its log says. Its log leads to what is there, and that is
        what SQLite reads."""
        with contextlib.closing(sqlite3.connect(self.node.file(name), timeout=LOADED_S)) as db:
            read = db.execute("SELECT v FROM t ORDER BY rowid").fetchall()
        path = str(self.base / f"copy-{name}")
        position = self.node.position(name)
        self.node.export(name, path)
        self.node.log(name)
        assert int(position.split("/")[1], 16) == file_checksum(path), f"the log of {name} says something else"
        with contextlib.closing(sqlite3.connect(path)) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            logged = db.execute("SELECT v FROM t ORDER BY rowid").fetchall()
        assert read == logged, name
        return (self.value,) in logged

    def end(self) -> None:
        with contextlib.suppress(Exception):
            if self.sql is not None:
                self.sql.kill()
        self.node.end()
        print(self.node.errors.read_text()[-3000:], file=sys.stderr)


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Callable[[Modes], Family]]:
    with contextlib.ExitStack() as stack:

        def make(modes: Modes) -> Family:
            made = Family(tmp_path, modes)
            stack.callback(made.end)
            return made

        yield make


@pytest.mark.parametrize("child", CHILDREN)
@pytest.mark.parametrize("others", [ATOMIC, ALONE], ids=["super-journal", "alone"])
def test_the_lease_ends_between_any_two_steps(family: Callable[[Modes], Family], others: Modes, child: str) -> None:
    """Before it ends for good it is there again: what was refused was rolled back, and SQLite goes on."""
    one = family({**others, "child": CHILDREN[child]})
    assert one.sql is not None
    at = refused = answered = 0
    while True:
        event, steps, gone = one.begin(), 0, False
        while event[0] != "done":
            if steps == at:
                one.node.lead(-1.0)
            gone |= event[0] == "delete" and "-mj" in event[1]
            event, steps = one.sql.answer(True), steps + 1
        failed = isinstance(event[1], str)
        assert gone or failed or others is ALONE, "there was no super-journal"
        if failed:
            one.roll_back()
        if steps <= at:
            assert not failed
            break
        one.node.lead(LONG_S)
        found = {name: one.has(name) for name in one.modes}
        if not failed:
            assert all(found.values()), (event, at, found)
        elif others is ATOMIC:
            assert not any(found[name] for name in others), (event, at, found)
        refused, answered, at = refused + failed, answered + (not failed), at + 1
    assert refused > 0
    assert all(one.has(name) for name in one.modes)


@pytest.mark.parametrize("child", list(CHILDREN) if SCALE > 1 else ["WAL", "MEMORY OFF", "DELETE OFF"])
def test_the_application_is_killed_between_any_two_steps(family: Callable[[Modes], Family], child: str) -> None:
    """The daemon takes the databases over, as when another node becomes the primary."""
    one = family({**ATOMIC, "child": CHILDREN[child]})
    assert one.sql is not None
    kept = at = 0
    while True:
        event, steps, gone = one.begin(), 0, False
        while event[0] != "done" and steps < at:
            gone |= event[0] == "delete" and "-mj" in event[1]
            event, steps = one.sql.answer(True), steps + 1
        if event[0] == "done":
            break
        one.sql.kill()
        one.node.demote(LOADED_S)
        found = {name: one.has(name) for name in one.modes}
        assert {found[name] for name in ATOMIC} == {gone}, (event, at, found)
        assert found["child"] or not gone, (event, at, found)
        one.node.promote(3 + at, LONG_S)
        one.open()
        kept, at = kept + gone, at + 1
    assert 0 < kept < at
