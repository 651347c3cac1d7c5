"""Names that come, go and change hands while other processes look at them."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster_nodes import Cluster, Node, needs_root, scaled, wait_same_position, wait_until

pytestmark = needs_root
NAME = "app.db"
LOOKER = """
import collections, json, os, sys
path, end, what = sys.argv[1:]
seen = collections.Counter()
print("go", flush=True)
while not os.path.exists(end):
    for _ in range(100):
        try:
            if what == "stat":
                os.stat(path)
            else:
                os.close(os.open(path, os.O_RDWR | (os.O_CREAT if what == "make" else 0)))
            seen["ok"] += 1
        except OSError as error:
            seen[error.strerror] += 1
print(json.dumps(seen))
"""


@contextlib.contextmanager
def looking(path: Path, end: Path, what: str) -> Iterator[collections.Counter[str]]:
    """Another process that looks at `path` all the time; what it got is known when the context ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", LOOKER, path, end, what], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    seen: collections.Counter[str] = collections.Counter()
    try:
        assert process.stdout.readline() == "go\n"
        yield seen
        end.touch()
        seen.update(json.loads(process.stdout.readline()))
    finally:
        process.kill()
        process.wait(10)


def make(path: Path, value: str, rows: int = 20) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("create table t(a)")
        db.executemany("insert into t values(?)", [(value * 50,)] * rows)
        db.commit()


def values(node: Node, name: str = NAME) -> set[str]:
    with contextlib.closing(node.connect(name)) as db:
        assert db.execute("pragma integrity_check").fetchall() == [("ok",)]
        return {value for (value,) in db.execute("select a from t")}


@pytest.mark.parametrize("passthrough", ["auto", "off"])
def test_a_database_that_is_removed_and_copied_again_is_always_found(
    cluster: Cluster, tmp_path: Path, passthrough: str
) -> None:
    """Nothing that the kernel remembers of the name may outlive what made it true."""
    node = cluster.node("node").start()
    source, path = tmp_path / "source", node.mount / NAME
    make(source, "x")
    shutil.copyfile(source, path)
    with looking(path, tmp_path / "end", "stat"):
        for number in range(scaled(40)):
            path.unlink()
            shutil.copyfile(source, path)
            assert os.stat(path).st_size == source.stat().st_size, number
            assert NAME in os.listdir(node.mount), number
    assert len(values(node)) == 1


def test_who_opens_a_database_that_gets_another_file_has_one_or_the_other(cluster: Cluster, tmp_path: Path) -> None:
    primary, replica = cluster.pair()
    source, path, new = tmp_path / "source", primary.mount / NAME, primary.mount / "new.db"
    make(source, "x")
    shutil.copyfile(source, path)
    with looking(path, tmp_path / "end", "open") as seen:
        for _ in range(scaled(40)):
            shutil.copyfile(source, new)
            new.rename(path)
    assert set(seen) == {"ok"}, seen
    wait_same_position(primary, replica, NAME)
    assert values(primary) == values(replica)
    wait_until(lambda: not (replica.mount / "new.db").exists(), "the drop follows")


def test_who_opens_a_database_that_is_removed_makes_it_anew(cluster: Cluster, tmp_path: Path) -> None:
    """With O_CREAT, as SQLite does, a file that goes at this moment is made; there is no "no such file"."""
    node = cluster.node("node").start()
    path = node.mount / NAME
    with looking(path, tmp_path / "end", "make") as seen, looking(path, tmp_path / "end", "make") as seen_too:
        for _ in range(scaled(80)):
            make(path, "x", rows=1)
            path.unlink()
    assert set(seen | seen_too) == {"ok"}, (seen, seen_too)


def test_the_wal_of_the_old_file_never_gets_into_the_new_one(cluster: Cluster, tmp_path: Path) -> None:
    """Nor the other way round: who has the old file open would make, or cut off, a WAL by the name that the new file
    has then. Also with a connection that was opened and has not read yet, which looks for the WAL only when it does."""
    primary, replica = cluster.pair()
    path = primary.mount / NAME
    with contextlib.closing(primary.connect(NAME)) as old:
        old.execute("pragma journal_mode=wal")
        old.execute("pragma wal_autocheckpoint=0")
        old.execute("create table t(a)")
        old.execute("insert into t values('old')")
        make(tmp_path / "new", "new", rows=500)
        shutil.copyfile(tmp_path / "new", primary.mount / "new.db")
        with pytest.raises(OSError, match="busy"):
            (primary.mount / "new.db").rename(path)
        old.execute("insert into t values('old')")
    with contextlib.closing(primary.connect(NAME)), pytest.raises(OSError, match="busy"):
        (primary.mount / "new.db").rename(path)
    assert "app.db is not renamed" not in primary.log_text()
    assert "new.db is not renamed: an application has app.db open" in primary.log_text()
    assert values(primary) == {"old"}
    (primary.mount / "new.db").rename(path)
    assert values(primary) == {"new" * 50}
    wait_same_position(primary, replica, NAME)
    assert values(replica) == {"new" * 50}
    assert primary.databases() == [NAME]


@pytest.mark.parametrize("source", ["database", "plain file"])
def test_who_has_a_database_in_a_rollback_mode_never_finds_the_wal_of_another(
    cluster: Cluster, tmp_path: Path, source: str
) -> None:
    """SQLite goes on in WAL mode when it finds a -wal at its next transaction, whatever file it has open."""
    primary, replica = cluster.pair()
    path, new = primary.mount / NAME, primary.mount / ("new.db" if source == "database" else ".new.db")
    make(tmp_path / "new", "new", rows=500)
    with contextlib.closing(sqlite3.connect(tmp_path / "new")) as db:
        db.execute("pragma journal_mode=wal")
    shutil.copyfile(tmp_path / "new", new)
    with contextlib.closing(primary.connect(NAME)) as old:
        old.execute("create table t(a)")
        old.execute("insert into t values('old')")
        with pytest.raises(OSError, match="busy"):
            new.rename(path)
        with contextlib.closing(primary.connect(NAME)) as other:
            other.execute("insert into t values('old')")
            old.execute("insert into t values('old')")
    assert values(primary) == {"old"}
    new.rename(path)
    with contextlib.closing(primary.connect(NAME)) as db:
        db.execute("insert into t values(?)", ("new" * 50,))
    assert values(primary) == {"new" * 50}
    wait_same_position(primary, replica, NAME)
    assert values(replica) == {"new" * 50}


def test_a_rename_that_fails_leaves_nothing_behind(cluster: Cluster) -> None:
    """The next one of the same names is done, and not only said to be done."""
    primary, replica = cluster.pair()
    make(primary.mount / NAME, "x")
    wait_same_position(primary, replica, NAME)
    with pytest.raises(OSError):
        (primary.mount / NAME).rename(primary.mount / ("n" * 252))  # no room for -journal
    assert values(primary) == {"x" * 50}
    with pytest.raises(OSError):
        (primary.mount / NAME).rename(primary.mount / ("n" * 252))
    (primary.mount / NAME).rename(primary.mount / "other.db")
    wait_same_position(primary, replica, "other.db")
    assert values(replica, "other.db") == {"x" * 50}
    assert primary.databases() == ["other.db"]
