"""Readers that hold a snapshot, and processes that open the database, at every moment of a stop and of a change of the
role: nobody sees a commit go, and the files that are left have all of them."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from role_node import Opener, RoleNode, needs_mount

sys.path.insert(0, str(Path(__file__).parents[1] / "t2_engine"))

from sqlite_process import SqliteProcess

pytestmark = pytest.mark.skipif(not needs_mount(), reason="needs root and /dev/fuse")
MODES = ["auto", "off"]
ROWS = "INSERT INTO t (v) VALUES (? || hex(randomblob(700)))"


class Scene:
    """One node with a database `db`, and those who use it."""

    def __init__(self, base: Path, passthrough: str) -> None:
        self.base = base
        self.node = RoleNode(base / "n", passthrough)
        self.clients: list[SqliteProcess] = []
        self.openers: list[Opener] = []

    def client(self) -> SqliteProcess:
        self.clients.append(SqliteProcess(self.node.file()))
        self.clients[-1]("PRAGMA busy_timeout=10000")
        return self.clients[-1]

    def open_and_close(self, *kinds: str) -> None:
        for kind in kinds:
            self.openers.append(Opener(self.node.file(), self.base / f"o{len(self.openers)}", kind))

    def seen(self) -> list[str]:
        """What they found that must not be."""
        bad = [line for opener in self.openers for line in opener.stop()]
        self.openers.clear()
        return bad

    def end(self) -> None:
        for opener in self.openers:
            opener.process.kill()
        self.node.end()
        for client in self.clients:
            with contextlib.suppress(Exception):
                client.kill()

    def files(self) -> int:
        """The rows that SQLite finds in a copy of the files as they are, without their wal-index."""
        source, copy = self.node.data / "dbs" / "db", self.base / "copy"
        for suffix, name in (("", "database"), ("-wal", "wal")):
            target = Path(f"{copy}{suffix}")
            target.unlink(missing_ok=True)
            if (source / name).exists():
                shutil.copyfile(source / name, target)
        with contextlib.closing(sqlite3.connect(copy)) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            return int(db.execute("SELECT count(*) FROM t").fetchone()[0])


@pytest.fixture
def scene(tmp_path: Path, passthrough: str) -> Iterator[Scene]:
    made = Scene(tmp_path, passthrough)
    try:
        yield made
    finally:
        made.end()
        print(made.node.errors.read_text()[-2000:], file=sys.stderr)


def create(scene: Scene, mode: str, rows: int = 50) -> SqliteProcess:
    writer = scene.client()
    writer(f"PRAGMA journal_mode={mode}")
    writer("CREATE TABLE t (id INTEGER PRIMARY KEY, v TEXT)")
    writer("CREATE INDEX t_v ON t (v)")
    for number in range(rows):
        writer(ROWS, str(number))
    return writer


@pytest.mark.parametrize("passthrough", MODES)
@pytest.mark.parametrize("as_primary", [False, True])
def test_a_stop_beside_a_snapshot_and_openers_takes_nothing_away(scene: Scene, as_primary: bool) -> None:
    node = scene.node
    node.promote(2)
    writer = create(scene, "WAL")
    reader = scene.client()
    reader("BEGIN")
    assert reader("SELECT count(*) FROM t") == [(50,)]
    for number in range(200):
        writer(ROWS, f"later {number}")
    scene.open_and_close("ro", "rw", "stay")
    for opener in scene.openers:
        opener.wait_for("250")
    if not as_primary:
        node.demote(5.0)
    node.tell("stop")
    node.answer()
    time.sleep(0.2)
    assert scene.seen() == []
    assert scene.files() == 250
    with contextlib.suppress(RuntimeError):  # the mount is gone; where it passes nothing through, so is its file
        assert reader("SELECT count(*) FROM t") == [(50,)]
    reader.kill()
    writer.kill()
    node.process.wait(20)
    node.start()
    scene.open_and_close("ro")
    scene.openers[0].wait_for("250")
    assert scene.seen() == []


@pytest.mark.parametrize("passthrough", MODES)
@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
def test_changes_of_the_role_beside_snapshots_and_openers(scene: Scene, mode: str) -> None:
    node, rows = scene.node, 50
    node.promote(2)
    writer = create(scene, mode)
    scene.open_and_close("ro", "rw", "stay")
    for opener in scene.openers:
        opener.wait_for("50")
    for epoch in range(3, 8):
        reader = scene.client()
        if mode == "WAL":  # in a rollback mode it would keep the daemon waiting, as it keeps every writer
            reader("BEGIN")
            assert reader("SELECT count(*) FROM t") == [(rows,)]
        before = rows
        node.demote(5.0)
        until_s = time.monotonic() + 20
        while node.captures("db"):
            assert time.monotonic() < until_s, "the database was not taken over"
            time.sleep(0.01)
        node.promote(epoch)
        writer = scene.client()
        for number in range(5 + 40 * (epoch % 2)):
            writer(ROWS, f"{epoch} {number}")
            rows += 1
        if epoch % 3 == 0:
            writer("PRAGMA wal_checkpoint")
        if mode == "WAL":
            assert reader("SELECT count(*) FROM t") == [(before,)], "a snapshot does not move"
            assert reader("PRAGMA integrity_check") == [("ok",)]
        reader.kill()
        writer.kill()
        node.position("db")
    for opener in scene.openers:
        opener.wait_for(str(rows))
    assert scene.seen() == []
    node.log("db")
