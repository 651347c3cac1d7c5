"""A database changes hands, from applications to the daemon and back, with somebody else at work between any two steps.

The daemon's steps are its system calls on -wal, -shm and the database. Between two of them another process opens the
database, reads it and closes it; reads in a connection that it has, with what SQLite keeps of it in memory; writes;
closes the last connection, so that SQLite checkpoints and removes the WAL; or is killed. Whatever it is: a reader sees
a sound database with every acknowledged row, and none twice; and the log leads to just that.

Every step once where the database is in use, and every third else, with one actor after the other. With
PYLITEFS_TEST_SCALE every step, and that often, with other actors.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from pathlib import Path

import pytest
from engine_nodes import Node, check_log, copy_of, new_primary, replay, rows_of
from live_steps import LiveSteps
from sqlite_process import SqliteProcess

from pylitefs.engine.transaction import UnstableSource

SCALE = max(1, int(os.environ.get("PYLITEFS_TEST_SCALE", "1")))
SEED = int(os.environ.get("PYLITEFS_TEST_SEED", "0"))
ACTORS = ("opens", "stays", "writes", "closes", "dies", "snapshot")
STRIDE = 7  # steps of one test case lie so far apart
MOST = 700
BUSY = ("locked", "busy", "locking protocol")  # the last: a lock was held for as long as the other actor took


class World:
    """A primary; `main`, `idle` and `snap` are connections of one application, the others come and go."""

    def __init__(self, folder: Path, *, start: str) -> None:
        self.folder = folder
        self.node: Node = new_primary(folder / "node")
        self.database = self.node.database()
        self.database.app_handles = 1  # so nothing is taken for unused
        self.path = self.database.files.database
        self.app, self.actor, self.other = (SqliteProcess(self.path) for _ in range(3))
        self.rows = 3
        if start != "closed":
            self.app("PRAGMA cache_size=5", on="idle")
            self.app("CREATE INDEX t_v ON t (v)")
            for _ in range(4):
                assert self.write("main")
            self.look("idle")
            self.app("BEGIN", on="snap")
            self.snapshot = self.look("snap", within=True)
            assert self.write("main")
        if start == "killed":  # nobody has the wal-index, the WAL is left
            self.app.kill()
            self.app = SqliteProcess(self.path)
        self.start = start

    def look(self, on: str, *, within: bool = False, app: SqliteProcess | None = None) -> int:
        """Read all of it on a connection; the number of rows, -1 if it is locked."""
        ask = app or self.app
        try:
            if not within:
                ask("BEGIN", on=on)
            try:
                (count,) = ask("SELECT count(*) FROM t NOT INDEXED", on=on)[0]
                assert ask("PRAGMA integrity_check", on=on) == [("ok",)]
                assert ask("SELECT count(*), count(DISTINCT id) FROM t", on=on) == [(count, count)]
            finally:
                if not within:
                    with contextlib.suppress(RuntimeError):
                        ask("COMMIT", on=on)
        except RuntimeError as error:
            assert any(word in str(error) for word in BUSY), error
            return -1
        return int(count)

    def write(self, on: str) -> bool:
        try:
            self.app("INSERT INTO t (v) VALUES (randomblob(3000))", on=on)
        except RuntimeError as error:
            assert any(word in str(error) for word in (*BUSY, "disk I/O")), error
            return False
        self.rows += 1
        return True

    # -- actors

    def opens(self) -> None:
        assert self.look("new", app=self.actor) in (-1, self.rows)
        self.actor.close("new")

    def stays(self) -> None:
        if self.start == "used":
            assert self.look("idle") in (-1, self.rows)

    def writes(self) -> None:
        self.write("main" if self.start == "used" else "late")

    def closes(self) -> None:
        if self.start == "used":
            with contextlib.suppress(RuntimeError):
                self.app("COMMIT", on="snap")
            for connection in ("snap", "idle", "main"):
                self.app.close(connection)
            self.start = "closed"
        self.opens()

    def dies(self) -> None:
        self.app.kill()
        self.app = SqliteProcess(self.path)
        self.start = "killed"
        self.opens()

    def snapshot_stays(self) -> None:
        if self.start == "used":
            assert self.look("snap", within=True) == self.snapshot

    def act(self, actor: str) -> None:
        getattr(self, "snapshot_stays" if actor == "snapshot" else actor)()

    # -- what happens

    def change_hands(self, epoch: int) -> None:
        store = self.node.store
        store.demote(5.0)
        with contextlib.suppress(UnstableSource):
            store.flush(self.database).result(10)
        assert not self.database.captures, "it was not taken over"
        self.look("between", app=self.other)
        self.other.close("between")
        if self.database.replica is None:
            store.worker.submit(store.apply.activate, self.database).result(10)
        store.promote(epoch)

    def check(self) -> None:
        until_s = time.monotonic() + 20
        while (found := self.look("last", app=self.other)) < 0 and time.monotonic() < until_s:
            time.sleep(0.01)
        assert found == self.rows
        self.snapshot_stays()
        writer = SqliteProcess(self.path)
        try:
            writer("INSERT INTO t (v) VALUES (randomblob(3000))")
            self.rows += 1
            assert self.look("last", app=self.other) == self.rows
            self.node.store.flush(self.database).result(20)
            check_log(self.database)
            image = copy_of(self.node, self.folder / "copy")
            assert replay(self.database) == image
            assert len(rows_of(self.folder / "copy")) == self.rows
        finally:
            writer.stop()

    def end(self) -> None:
        for process in (self.app, self.actor, self.other):
            with contextlib.suppress(Exception):
                process.kill()
        self.node.close(clean=False)


@pytest.mark.parametrize("start", ["used", "killed", "closed"])
@pytest.mark.parametrize("offset", range(STRIDE))
def test_somebody_between_any_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str, offset: int
) -> None:
    for turn in range(SCALE):
        steps_apart = STRIDE if start == "used" or SCALE > 1 else 3 * STRIDE
        for at in range(1 + offset, MOST, steps_apart):
            actor = ACTORS[(at // STRIDE + offset + turn + SEED) % len(ACTORS)]
            world = World(tmp_path / f"{turn}-{at}", start=start)
            try:
                with monkeypatch.context() as patch:
                    steps = LiveSteps(patch, world.path, at, lambda world=world, actor=actor: world.act(actor))
                    world.node.store.fence.until_s = math.inf
                    with steps:
                        world.change_hands(2)
                world.check()
            except BaseException:
                print(f"{actor} before step {at}, {steps.trace[at - 3 : at + 2]}")
                raise
            finally:
                world.end()
            if steps.count < at:
                break
