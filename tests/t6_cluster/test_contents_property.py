"""Whatever is done to a database file, by SQLite or by others, in whatever order: after each step and a moment of
silence the replica shows what SQLite reads on the primary, or the primary says why it does not."""

from __future__ import annotations

import contextlib
import json
import os
import random
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster_nodes import Cluster, Node, dump, needs_root, scaled, wait_until

pytestmark = needs_root
NAME = "app.db"
STEPS = 14
SEED = int(os.environ.get("PYLITEFS_TEST_SEED", "20261130"))
MODES = ("delete", "truncate", "persist", "memory", "off", "wal")


def shown(node: Node) -> dict[str, list[Any]] | str:
    """What SQLite reads; or that it cannot, which an empty file and none are alike in."""
    path = node.mount / NAME
    if not path.exists() or not path.stat().st_size:
        return "nothing"
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10.0)) as connection:
            connection.execute("begin")
            return dump(connection)
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError:
        return "malformed"


def is_withheld(node: Node) -> bool:
    databases = json.loads(node.get("/status"))["databases"]
    return any(database["name"] == NAME and database.get("withheld") for database in databases)


class Steps:
    """What can be done to one database. `seed` decides."""

    def __init__(self, node: Node, scratch: Path, seed: int) -> None:
        self.path, self.other = node.mount / NAME, scratch / "other.db"
        self.random = random.Random(seed)
        self.number = 0

    def step(self) -> str:
        acts: list[Callable[[], object]] = [
            self.write, self.write, self.write, self.vacuum, self.backup, self.cp, self.rsync, self.cut, self.emptied,
            self.patch, self.mv, self.rm,
        ]  # fmt: skip
        act = self.random.choice(acts)
        with contextlib.suppress(sqlite3.DatabaseError):  # of a file that is none any more
            act()
        return act.__name__

    def connect(self) -> contextlib.closing[sqlite3.Connection]:
        return contextlib.closing(sqlite3.connect(self.path, isolation_level=None, timeout=10.0))

    def write(self) -> None:
        with self.connect() as connection:
            connection.execute(f"pragma journal_mode={self.random.choice(MODES)}")
            connection.execute(f"pragma synchronous={self.random.choice(['off', 'normal', 'full'])}")
            connection.execute("create table if not exists t(id integer primary key, data)")
            for _ in range(self.random.randint(1, 5)):
                size = self.random.choice((10, 500, 20000))
                connection.execute("insert into t(data) values (?)", (self.random.randbytes(size),))

    def vacuum(self) -> None:
        with self.connect() as connection:
            connection.execute("pragma journal_mode=delete")
            connection.execute(f"pragma page_size={self.random.choice((512, 4096, 65536))}")
            connection.execute("vacuum")

    def image(self) -> Path:
        self.other.unlink(missing_ok=True)
        self.number += 1
        with contextlib.closing(sqlite3.connect(self.other, isolation_level=None)) as connection:
            connection.execute(f"pragma page_size={self.random.choice((512, 1024, 4096, 8192))}")
            connection.execute(f"pragma journal_mode={self.random.choice(('delete', 'wal'))}")
            connection.execute("create table t(id integer primary key, data)")
            connection.execute(f"create table image{self.number}(a)")
            data = self.random.randbytes(self.random.randint(1, 90000))
            connection.execute("insert into t(data) values (?)", (data,))
        if self.random.random() < 0.2:
            with open(self.other, "ab") as file:
                file.write(b"trailing")
        return self.other

    def backup(self) -> None:
        source = ":memory:" if self.random.random() < 0.3 else str(self.image())
        with contextlib.closing(sqlite3.connect(source)) as connection, self.connect() as target:
            target.execute("pragma journal_mode=delete")
            connection.backup(target)

    def cp(self) -> None:
        subprocess.run(["cp", self.image(), self.path], check=True, timeout=30)

    def rsync(self) -> None:
        """In place, as `rsync --inplace` does, in two parts."""
        data = self.image().read_bytes()
        at = self.random.randint(1, len(data) - 1)
        with open(self.path, "r+b" if self.path.exists() else "w+b", buffering=0) as file:
            os.pwrite(file.fileno(), data[:at], 0)
            os.pwrite(file.fileno(), data[at:], at)
            file.truncate(len(data))

    def cut(self) -> None:
        if self.path.exists():
            os.truncate(self.path, self.random.randint(0, self.path.stat().st_size))

    def emptied(self) -> None:
        subprocess.run(["sh", "-c", ': > "$0"', str(self.path)], check=True, timeout=30)

    def patch(self) -> None:
        if self.path.exists() and (size := self.path.stat().st_size):
            with open(self.path, "r+b", buffering=0) as file:
                os.pwrite(file.fileno(), self.random.randbytes(16), self.random.randrange(size))

    def mv(self) -> None:
        subprocess.run(["mv", self.image(), self.path], check=True, timeout=30)

    def rm(self) -> None:
        self.path.unlink(missing_ok=True)


@pytest.mark.parametrize("number", range(scaled(3)))
def test_any_sequence(cluster: Cluster, number: int, tmp_path: Path) -> None:
    primary, replica = cluster.pair()
    seed = SEED + number
    steps = Steps(primary, tmp_path, seed)
    done: list[str] = []
    for _ in range(STEPS):
        done.append(steps.step())
        told = f"seed {seed}: {', '.join(done)}"

        def agree() -> bool:
            return shown(primary) == shown(replica) or is_withheld(primary)

        wait_until(agree, told, 5.0)
