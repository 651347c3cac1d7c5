"""Synchronous replication with real nodes: what a FULL commit waits for, and what comes of it when it is in vain."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from cluster_nodes import (
    PASSTHROUGH,
    START_S,
    Cluster,
    Node,
    assert_same_bytes,
    assert_sound,
    needs_root,
    wait_same_position,
    wait_until,
)

pytestmark = needs_root
NAME = "app.db"
PROGRAM = str(Path(__file__).with_name("gated_daemon.py"))
WRITER = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("pragma synchronous = full")
db.execute("begin immediate")
db.execute("insert into t(data) values ('killed')")
print("begun", flush=True)
db.execute("commit")
print("committed", flush=True)
"""


class GatedNode(Node):
    rules: ClassVar[dict[str, Any]] = {}

    def start(self, *, wait: bool = True) -> Node:
        path = self.base / "litefs.yml"
        path.write_text(json.dumps(self.config))
        rules = json.dumps({"replicas": 1, "state": str(self.base / "in-sync"), **self.rules})
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, PROGRAM, rules, "mount", "-config", str(path)], stdout=log, stderr=log, cwd=self.base
            )
        if wait:
            wait_until(self.healthy, f"{self.name} is ready\n{self.log_tail()}")
        return self

    def in_sync(self) -> list[int]:
        found: list[int] = json.loads((self.base / "in-sync").read_text())
        return found


def gated_pair(
    cluster: Cluster, journal: str = "wal", *, fuse: Mapping[str, Any] | None = None, **rules: Any
) -> tuple[GatedNode, Node, sqlite3.Connection]:
    primary = GatedNode(cluster.base, "primary", passthrough=cluster.passthrough)
    primary.config["fuse"].update(fuse or {})
    primary.rules = rules  # type: ignore[misc]
    cluster.nodes.append(primary)
    primary.start()
    replica = cluster.node("replica", primary=primary).start()
    wait_until(primary.in_sync, "the replica is in sync")
    writer = primary.connect(NAME)
    writer.execute(f"pragma journal_mode = {journal}")
    writer.execute("pragma synchronous = full")
    writer.execute("create table t(id integer primary key, data)")
    writer.execute("insert into t(data) values ('first')")
    return primary, replica, writer


def count(connection: sqlite3.Connection) -> int:
    return int(connection.execute("select count(*) from t").fetchone()[0])


class Commit:
    """A statement on a thread of its own."""

    def __init__(self, connection: sqlite3.Connection, sql: str = "insert into t(data) values ('waits')") -> None:
        self.done = threading.Event()
        self.error: sqlite3.Error | None = None
        self._run = threading.Thread(target=self._execute, args=(connection, sql), daemon=True)
        self._run.start()

    def _execute(self, connection: sqlite3.Connection, sql: str) -> None:
        try:
            connection.execute(sql)
        except sqlite3.Error as error:
            self.error = error
        self.done.set()


def applied(node: Node) -> int:
    with contextlib.closing(node.connect(NAME)) as connection:
        return count(connection)


@pytest.mark.parametrize("mode", ["wal", "delete", "truncate", "persist"])
@pytest.mark.parametrize("passthrough", PASSTHROUGH)
def test_a_full_commit_waits_for_the_replica(cluster: Cluster, passthrough: str, mode: str) -> None:
    primary, replica, writer = gated_pair(cluster, mode)
    reader = primary.connect(NAME, timeout_s=0.0)
    assert count(reader) == 1
    replica.pause()
    try:
        commit = Commit(writer)
        assert not commit.done.wait(1.0)
        if mode == "wal":
            assert count(reader) == 1, "nobody sees what may still be lost"
        else:
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                count(reader)
    finally:
        replica.resume()
    assert commit.done.wait(START_S) and commit.error is None
    assert count(reader) == 2
    wait_same_position(primary, replica, NAME)
    assert applied(replica) == 2
    assert_same_bytes([primary, replica], NAME)
    reader.close()
    writer.close()


def test_a_normal_commit_does_not_wait(cluster: Cluster) -> None:
    primary, replica, writer = gated_pair(cluster)
    writer.execute("pragma synchronous = normal")
    replica.pause()
    try:
        commit = Commit(writer)
        assert commit.done.wait(START_S) and commit.error is None
        assert count(writer) == 2
    finally:
        replica.resume()
    wait_same_position(primary, replica, NAME)
    writer.close()


@pytest.mark.parametrize("mode", ["wal", "delete", "truncate", "persist"])
@pytest.mark.parametrize("passthrough", PASSTHROUGH)
def test_what_no_replica_held_in_time_is_gone_everywhere(cluster: Cluster, passthrough: str, mode: str) -> None:
    primary, replica, writer = gated_pair(cluster, mode, timeout_s=1.0)
    replica.pause()
    try:
        with pytest.raises(sqlite3.OperationalError, match="disk I/O error"):
            writer.execute("insert into t(data) values ('in vain')")
    finally:
        replica.resume()
    assert "no replica held them within 1 s" in primary.log_text()
    reader = primary.connect(NAME)
    assert [data for (data,) in reader.execute("select data from t")] == ["first"]
    wait_same_position(primary, replica, NAME)
    assert applied(replica) == 1
    wait_until(lambda: not Commit(writer).done.wait(START_S) or count(writer) > 1, "a commit goes through again")
    wait_same_position(primary, replica, NAME)
    assert applied(replica) == count(writer)
    assert_same_bytes([primary, replica], NAME)
    assert_sound(reader)
    reader.close()
    writer.close()


@pytest.mark.parametrize("opened_in", ["wal", "delete"])
@pytest.mark.parametrize("passthrough", PASSTHROUGH)
def test_a_transaction_over_two_databases_that_no_replica_held_in_time(
    cluster: Cluster, passthrough: str, opened_in: str
) -> None:
    """It is refused at the end of its super-journal: what SQLite does to the two journals afterwards it ignores."""
    primary, replica, writer = gated_pair(cluster, opened_in, timeout_s=1.0)
    names = (NAME, "other.db")
    writer.execute("attach ? as other", (str(primary.mount / names[1]),))
    writer.execute(f"pragma other.journal_mode = {opened_in}")
    writer.execute("create table other.t(id integer primary key, data)")
    for schema in ("main", "other"):
        writer.execute(f"pragma {schema}.journal_mode = delete")
        writer.execute(f"pragma {schema}.synchronous = full")

    def commit(data: str) -> None:
        writer.execute("begin immediate")
        for schema in ("main", "other"):
            writer.execute(f"insert into {schema}.t(data) values (?)", (data,))
        writer.execute("commit")

    commit("both")
    replica.pause()
    try:
        with pytest.raises(sqlite3.OperationalError, match="disk I/O error"):
            commit("in vain")
    finally:
        replica.resume()
    if writer.in_transaction:
        writer.execute("rollback")
    wait_until(primary.in_sync, "the replica is in sync again")  # type: ignore[attr-defined]
    commit("after")
    for name, rows in zip(names, (["first", "both", "after"], ["both", "after"]), strict=True):
        wait_same_position(primary, replica, name)
        assert_same_bytes([primary, replica], name)
        for node in (primary, replica):
            with contextlib.closing(node.connect(name)) as reader:
                assert [data for (data,) in reader.execute("select data from t")] == rows
    writer.close()


@pytest.mark.parametrize("mode", ["wal", "delete"])
@pytest.mark.parametrize("passthrough", PASSTHROUGH)
def test_a_writer_that_is_killed_while_it_waits(cluster: Cluster, passthrough: str, mode: str) -> None:
    primary, replica, other = gated_pair(cluster, mode)
    assert count(other) == 1
    before = primary.position(NAME)
    replica.pause()
    try:
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(primary.mount / NAME)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"begun\n"
        wait_until(lambda: primary.position(NAME) != before, "it waits")
        writer.send_signal(signal.SIGKILL)
        assert writer.wait(START_S) == -signal.SIGKILL
        assert writer.stdout.read() == b""
        writer.stdout.close()
    finally:
        replica.resume()
    assert count(other) == 1
    other.execute("insert into t(data) values ('after')")
    wait_same_position(primary, replica, NAME)
    assert applied(replica) == 2
    assert_same_bytes([primary, replica], NAME)
    other.close()


@pytest.mark.parametrize("name", [NAME, "plain"])
def test_a_rename_does_not_wait_and_loses_nothing(cluster: Cluster, tmp_path: Path, name: str) -> None:
    """While it waited nobody could open anything in the mount. The next commit brings what it has brought."""
    primary, replica, user = gated_pair(cluster, "delete")
    user.close()
    if name == "plain":
        name = ".hidden"  # as rsync makes it: not taken for a database before it is renamed
        _first_transaction(tmp_path / "source", "delete")
        shutil.copyfile(tmp_path / "source", primary.mount / name)
    replica.pause()
    try:
        subprocess.run(["mv", primary.mount / name, primary.mount / "new.db"], check=True, timeout=10)
        (primary.mount / "note").write_text("others go on")
        code = "import sqlite3, sys; sqlite3.connect(sys.argv[1]).executescript('insert into t(data) values (1)')"
        writer = subprocess.Popen([sys.executable, "-c", code, primary.mount / "new.db"])
        with pytest.raises(subprocess.TimeoutExpired):
            writer.wait(2.0)
    finally:
        replica.resume()
    assert writer.wait(START_S) == 0
    with contextlib.closing(replica.connect("new.db")) as reader:
        assert count(reader) == (2 if name == NAME else 1)
    wait_until(lambda: replica.databases() == sorted({NAME, "new.db"} - {name}), "the old name is gone")


CLOSER = """
import os, sys, time
with open(sys.argv[2], "rb") as source:
    data = source.read()
target = open(sys.argv[1], "wb", buffering=0)
target.write(data)
print("begun", flush=True)
if sys.argv[3] == "close":
    target.close()
    print("committed", flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize("io_uring", ["auto", "off"])
@pytest.mark.parametrize("where", ["unlink", "truncate", "close", "exit"])
def test_who_is_killed_while_he_waits_ends(cluster: Cluster, tmp_path: Path, where: str, io_uring: str) -> None:
    """In any system call: he has been told nothing, so either outcome is right, the same one on all nodes."""
    primary, replica, other = gated_pair(
        cluster, "truncate" if where == "truncate" else "delete", fuse={"io-uring": io_uring}
    )
    words: list[Any] = [sys.executable, "-c", WRITER.replace("= full", "= off"), primary.mount / NAME]
    name = NAME
    if where in ("close", "exit"):
        name = "new.db"
        _first_transaction(tmp_path / "source.db", "delete")
        words = [sys.executable, "-c", CLOSER, primary.mount / name, tmp_path / "source.db", where]
    replica.pause()
    logged = set(primary.data.glob("dbs/*/ltx/*.ltx"))
    try:
        writer = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE)
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"begun\n"
        if where == "exit":
            writer.send_signal(signal.SIGKILL)
        wait_until(lambda: set(primary.data.glob("dbs/*/ltx/*.ltx")) - logged, "it waits")
        writer.send_signal(signal.SIGKILL)
        assert writer.wait(START_S) == -signal.SIGKILL
        assert writer.stdout.read() == b""
        writer.stdout.close()
    finally:
        replica.resume()
    if name == NAME:
        assert count(other) == 1
        other.execute("insert into t(data) values ('after')")
        assert applied(replica) == 2
    wait_same_position(primary, replica, name)
    assert_same_bytes([primary, replica], name)
    other.close()


def test_a_replica_that_comes_anew_fetches_what_is_pending(cluster: Cluster) -> None:
    """The only one in sync is lost for good while a commit waits: another one takes its place, and the commit ends."""
    primary, replica, writer = gated_pair(cluster)
    before = primary.in_sync()
    replica.kill()
    replica.unmount()
    commit = Commit(writer)
    assert not commit.done.wait(0.5)
    spare = cluster.node("spare", primary=primary).start()
    assert commit.done.wait(START_S) and commit.error is None
    assert primary.in_sync() != before
    wait_same_position(primary, spare, NAME)
    assert applied(spare) == 2
    writer.close()


def test_degrade_goes_on_alone(cluster: Cluster) -> None:
    primary, replica, writer = gated_pair(cluster, mode="degrade", timeout_s=1.0)
    replica.pause()
    try:
        commit = Commit(writer)
        assert commit.done.wait(START_S) and commit.error is None
        assert primary.in_sync() == []
    finally:
        replica.resume()
    wait_until(primary.in_sync, "it is in sync again")
    wait_same_position(primary, replica, NAME)
    writer.close()


def test_ten_writers_share_the_round_trips(cluster: Cluster) -> None:
    primary = cluster.node("primary")
    primary.config["replication"] = {"sync": 1}
    primary.start()
    replica = cluster.node("replica", primary=primary).start()
    errors: list[BaseException] = []

    def write(number: int) -> None:
        try:
            connection = primary.connect(f"db{number}")
            connection.execute("pragma journal_mode = wal")
            connection.execute("pragma synchronous = full")
            connection.execute("create table t(id integer primary key, data)")
            for _ in range(20):
                connection.execute("insert into t(data) values (?)", (os.urandom(100),))
            connection.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for number in range(10):
        wait_same_position(primary, replica, f"db{number}")
        assert_same_bytes([primary, replica], f"db{number}")
    metrics = primary.get("/metrics").decode()
    (waited,) = re.findall(r"^litefs_sync_wait_seconds_count (.+)$", metrics, re.MULTILINE)
    assert float(waited) >= 10 * 7
    assert 'litefs_sync_failed_commits_total{reason="timeout"} 0.0' in metrics


def _first_transaction(path: Path, mode: str) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=10.0)) as connection:
        connection.execute("pragma synchronous = full")
        connection.execute(f"pragma journal_mode = {mode}")
        connection.execute("create table t(id integer primary key, data)")


def _gated(cluster: Cluster, **rules: Any) -> tuple[GatedNode, Node]:
    primary, replica, writer = gated_pair(cluster, "delete", **rules)
    writer.close()
    wait_same_position(primary, replica, NAME)
    return primary, replica


@pytest.mark.parametrize("how", ["delete", "truncate", "persist", "memory", "wal", "cp", "fsync", "mv", "import"])
def test_a_new_database_waits_for_the_replica(cluster: Cluster, how: str, tmp_path: Path) -> None:
    """Its first transaction is a commit like any other, however it comes about."""
    primary, replica = _gated(cluster)
    source, path = tmp_path / "source.db", primary.mount / "new.db"
    _first_transaction(source, "delete")
    words: list[Any]
    if how in ("cp", "mv", "fsync"):
        words = {"cp": ["cp"], "mv": ["mv"], "fsync": ["dd", "conv=fsync", "status=none"]}[how]
        words += [f"if={source}", f"of={path}"] if how == "fsync" else [source, path]
    elif how == "import":
        words = [sys.executable, "-m", "pylitefs", "import", "-url", primary.url, "-name", "new.db", source]
    else:
        code = "import sys; sys.path[:0] = sys.argv[3:]; import test_sync as t; t._first_transaction(*sys.argv[1:3])"
        here = Path(__file__).parent
        words = [sys.executable, "-c", code, path, how, here, here.parent]
    replica.pause()
    try:
        process = subprocess.Popen(list(map(str, words)))
        wait_until(lambda: list((primary.data / "dbs").glob("new.db/ltx/*.ltx")), "it is in the log")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2.0)
    finally:
        replica.resume()
    assert process.wait(START_S) == 0
    with contextlib.closing(replica.connect("new.db")) as reader:
        assert reader.execute("select name from sqlite_schema").fetchall() == [("t",)], "at once"
    wait_same_position(primary, replica, "new.db")


@pytest.mark.parametrize("mode", ["delete", "truncate", "persist"])
def test_a_first_transaction_that_no_replica_held_in_time(cluster: Cluster, mode: str) -> None:
    """It fails, is taken back on all nodes, and can be tried again: by the same connection, and by another one."""
    primary, replica = _gated(cluster, timeout_s=1.0)
    path = primary.mount / "new.db"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("pragma synchronous = full")
        connection.execute(f"pragma journal_mode = {mode}")
        replica.pause()
        try:
            with pytest.raises(sqlite3.OperationalError, match="disk I/O error"):
                connection.execute("create table t(id integer primary key, data)")
        finally:
            replica.resume()
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            assert other.execute("select name from sqlite_schema").fetchall() == []
        wait_until(lambda: replica.databases() == primary.databases() == [NAME], "it is taken back on all nodes")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=10.0)) as other:
        other.execute("create table if not exists t(a)")
        other.execute("insert into t values (1)")
    wait_same_position(primary, replica, "new.db")
    with contextlib.closing(replica.connect("new.db")) as reader:
        assert count(reader) == 1
        assert_sound(reader)
    assert_same_bytes([primary, replica], "new.db")
