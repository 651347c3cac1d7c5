"""A database is removed and made again while somebody still has the old one open. SQLite finds -wal by its name, so who
closes the old one must not remove the new one's: natively it does not, because SQLite asks by the inode whether its
file is still the one of this name (`databaseIsUnmoved`, pager.c)."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_files import check

from cluster_nodes import PASSTHROUGH, Cluster, needs_root

pytestmark = needs_root

APPLICATION = """
import sqlite3, sys
path, mode, first = sys.argv[1:]
db = sqlite3.connect(path)
db.execute(f"pragma journal_mode={mode}")
db.execute("create table t(id integer primary key, data)")
db.executemany("insert into t values (?, 1)", [(int(first) + i,) for i in range(50)])
db.commit()
for line in iter(lambda: print("ok", flush=True) or sys.stdin.readline().strip(), ""):
    if line == "close":
        db.close()
    else:
        db.execute(line)
        db.commit()
"""


class Application:
    def __init__(self, path: Path, mode: str, first: int) -> None:
        words = [sys.executable, "-c", APPLICATION, str(path), mode, str(first)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def run(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        self._answer()

    def _answer(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ok\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def application(path: Path, mode: str, first: int) -> Iterator[Application]:
    app = Application(path, mode, first)
    try:
        yield app
    finally:
        app.kill()


@pytest.mark.parametrize("old, new", [("wal", "wal"), ("wal", "delete"), ("delete", "wal")])
@pytest.mark.parametrize("passthrough", PASSTHROUGH)
def test_who_closes_the_old_database_leaves_the_new_one_its_wal(
    cluster: Cluster, passthrough: str, old: str, new: str
) -> None:
    primary, replica = cluster.pair()
    path = primary.mount / "app.db"
    with application(path, old, 1) as before:
        check(primary, replica, 50)
        inode = path.stat().st_ino
        os.unlink(path)
        with application(path, new, 1000) as after:
            assert path.stat().st_ino != inode, "SQLite could not tell"
            after.run("insert into t values (1, 2)")
            before.run("close")
            assert path.with_name("app.db-wal").exists() == (new == "wal")
            after.run("insert into t values (2, 2)")
            check(primary, replica, 52)
            after.kill()
            check(primary, replica, 52)
