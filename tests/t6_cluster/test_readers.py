"""Readers on a replica, users without privileges, writers without a busy timeout."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cluster_nodes import (
    PASSTHROUGH,
    Cluster,
    Node,
    assert_same_bytes,
    assert_sound,
    needs_root,
    scaled,
    wait_same_position,
    wait_until,
)

pytestmark = needs_root
NAME = "app.db"
NOBODY = 65534
MODES = ["wal", "delete", "truncate", "persist", "memory", "off"]


def create(primary: Node, mode: str, rows: int = 10) -> sqlite3.Connection:
    connection = primary.connect(NAME)
    connection.execute(f"pragma journal_mode={mode}")
    connection.execute("create table t(id integer primary key, data)")
    add(connection, rows)
    return connection


def add(connection: sqlite3.Connection, rows: int) -> None:
    connection.execute("begin")
    connection.executemany("insert into t(data) values (?)", ((os.urandom(400),) for _ in range(rows)))
    connection.execute("commit")


def count(connection: sqlite3.Connection) -> int:
    return int(connection.execute("select count(*) from t").fetchone()[0])


@pytest.mark.parametrize("mode", ["wal", "delete"])
@pytest.mark.parametrize("passthrough", PASSTHROUGH)
def test_a_long_reader_neither_delays_replication_nor_moves(cluster: Cluster, passthrough: str, mode: str) -> None:
    """More goes by than a WAL holds before it is checkpointed; the snapshot stays readable page for page."""
    primary, replica = cluster.pair()
    writer = create(primary, mode, 200)
    wait_same_position(primary, replica, NAME)
    old, fresh = replica.connect(NAME), replica.connect(NAME)
    old.execute("begin")
    before = old.execute("select id, data from t order by id").fetchall()
    for step in range(scaled(8)):
        add(writer, 300)
        writer.execute("update t set data = randomblob(400) where id % 7 = ?", (step % 7,))
        writer.execute("delete from t where id % 31 = ?", (step % 31,))
        if mode == "wal":
            writer.execute("pragma wal_checkpoint(truncate)")
        expected = count(writer)
        wait_same_position(primary, replica, NAME)
        assert count(fresh) == expected
        assert old.execute("select id, data from t order by id").fetchall() == before
    assert_same_bytes([primary, replica], NAME)
    old.execute("commit")
    assert count(old) == count(writer)
    assert_sound(old)
    for connection in (old, fresh, writer):
        connection.close()


@pytest.mark.parametrize("passthrough", PASSTHROUGH)
def test_memory_mapped_readers_see_what_is_applied(cluster: Cluster, passthrough: str) -> None:
    primary, replica = cluster.pair()
    writer = create(primary, "wal", 500)
    wait_same_position(primary, replica, NAME)
    readers = [replica.connect(NAME) for _ in range(2)]
    for reader in readers:
        assert reader.execute("pragma mmap_size=268435456").fetchone()[0] > 0
    for step in range(scaled(6)):
        add(writer, 200)
        writer.execute("update t set data = ? where id % 3 = 0", (b"%d" % step * 300,))
        if step == 3:
            writer.execute("delete from t where id > 400")
            writer.execute("vacuum")
        expected = writer.execute("select id, data from t order by id").fetchall()
        wait_same_position(primary, replica, NAME)
        for reader in readers:
            assert reader.execute("select id, data from t order by id").fetchall() == expected
            assert_sound(reader)
        if step % 2:
            time.sleep(0.7)  # the daemon checkpoints what has settled: pages move from the WAL to the mapped file
    for connection in (*readers, writer):
        connection.close()


WRITES = ["insert into t(data) values (1)", "delete from t", "create table u(a)", "vacuum", "pragma user_version=7"]


@pytest.mark.parametrize("passthrough", PASSTHROUGH)
def test_a_replica_refuses_every_write(cluster: Cluster, passthrough: str) -> None:
    """For each journal mode, as root, before and after the database was read."""
    primary, replica = cluster.pair()
    for mode in MODES:
        create(primary, mode).close()
        position = wait_same_position(primary, replica, NAME)
        for statement in WRITES:
            connection = replica.connect(NAME)
            with pytest.raises(sqlite3.OperationalError, match="attempt to write a readonly database"):
                connection.execute(statement)
            assert count(connection) == 10
            with pytest.raises(sqlite3.OperationalError, match="attempt to write a readonly database"):
                connection.execute(statement)
            connection.close()
        for path, flags in ((NAME, os.O_RDWR), (NAME, os.O_WRONLY | os.O_TRUNC)):
            with pytest.raises(OSError, match="Read-only file system"):
                os.open(replica.mount / path, flags)
        with pytest.raises(OSError, match="Read-only file system"):
            os.unlink(replica.mount / NAME)
        assert replica.position(NAME) == position
        assert_same_bytes([primary, replica], NAME)
        os.unlink(primary.mount / NAME)
        wait_until(lambda: not (replica.mount / NAME).exists(), "the drop is replicated")


CHILD = """
import os, sqlite3, sys
os.setgroups([]); os.setgid({nobody}); os.setuid({nobody})
c = sqlite3.connect(sys.argv[1], timeout=10, isolation_level=None)
for statement in sys.argv[2:]:
    try:
        print(c.execute(statement).fetchall())
    except sqlite3.Error as error:
        print(error)
"""


def as_nobody(path: os.PathLike[str], *statements: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD.format(nobody=NOBODY), os.fspath(path), *statements],
        capture_output=True, text=True, timeout=30, check=False, cwd="/",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("mode", ["wal", "delete"])
@pytest.mark.parametrize("passthrough", PASSTHROUGH)
def test_an_unprivileged_user(cluster: Cluster, passthrough: str, mode: str) -> None:
    """Reads and creates on both; writes on the primary, also what root has made."""
    primary, replica = cluster.pair()
    create(primary, mode).close()
    insert, select = "insert into t(data) values (1)", "select count(*) from t"
    assert as_nobody(primary.mount / NAME, insert, select) == ["[]", "[(11,)]"]
    wait_same_position(primary, replica, NAME)
    assert as_nobody(replica.mount / NAME, select, insert, select) == [
        "[(11,)]", "attempt to write a readonly database", "[(11,)]"
    ]  # fmt: skip
    opened = replica.connect(NAME)  # by root; both are served at once
    assert count(opened) == 11
    assert as_nobody(replica.mount / NAME, select) == ["[(11,)]"]
    opened.close()
    own = primary.mount / "own.db"
    made = as_nobody(own, f"pragma journal_mode={mode}", "create table t(id)", "insert into t values (1)")
    assert made == [f"[('{mode}',)]", "[]", "[]"]
    assert os.stat(own).st_uid == NOBODY
    wait_same_position(primary, replica, "own.db")
    assert as_nobody(replica.mount / "own.db", select) == ["[(1,)]"]
    assert_same_bytes([primary, replica], "own.db")


class Busy(threading.Thread):
    """Calls `work` with a connection without a busy timeout until it is stopped; `problem` is its first error."""

    def __init__(self, node: Node, work: str) -> None:
        super().__init__(daemon=True)
        self.problem: BaseException | None = None
        self.rounds = 0
        self._halt = threading.Event()
        self._connection = node.connect(NAME, timeout_s=0)
        self._work = work

    def run(self) -> None:
        try:
            while not self._halt.is_set():
                for statement in self._work.split(";"):
                    self._connection.execute(statement).fetchall()
                self.rounds += 1
        except BaseException as error:
            self.problem = error

    def stop(self) -> None:
        self._halt.set()
        self.join(30)
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()
        if self.problem is not None:
            raise self.problem


READ = "begin; select count(*), total(length(data)) from t; select max(id) from t; commit"


@pytest.mark.parametrize("passthrough", PASSTHROUGH)
def test_nobody_without_a_busy_timeout_sees_a_lock(cluster: Cluster, passthrough: str) -> None:
    """One writer and readers in WAL mode, on the primary and on the replica, while checkpoints go on: SQLite itself
    gives none of them SQLITE_BUSY, so neither may we. The writer's connections come and go, as web requests do."""
    primary, replica = cluster.pair()
    writer = create(primary, "wal", 200)
    writer.execute("pragma busy_timeout=0")
    writer.execute("pragma wal_autocheckpoint=20")
    wait_same_position(primary, replica, NAME)
    threads = [Busy(node, READ) for node in (primary, replica, replica)]
    for thread in threads:
        thread.start()
    try:
        ends_s = time.monotonic() + scaled(4)
        step = 0
        while time.monotonic() < ends_s:
            step += 1
            writer.execute("insert into t(data) values (randomblob(3000))")
            writer.execute("update t set data = randomblob(500) where id % 50 = ?", (step % 50,))
            if step % 40 == 0:
                writer.execute("pragma wal_checkpoint(passive)")
                _ = primary.position(NAME)
            if step % 60 == 0:
                writer.execute("delete from t where id % 3 = 0")
                writer.close()
                writer = primary.connect(NAME, timeout_s=0)
                writer.execute("pragma wal_autocheckpoint=20")
    finally:
        for thread in threads:
            thread.stop()
    assert all(thread.rounds > 10 for thread in threads)
    wait_same_position(primary, replica, NAME)
    assert_same_bytes([primary, replica], NAME)
    writer.close()


@pytest.mark.parametrize("mode", ["delete", "persist"])
def test_a_lone_writer_in_a_rollback_mode_never_waits(cluster: Cluster, mode: str) -> None:
    primary, replica = cluster.pair()
    writer = create(primary, mode)
    writer.execute("pragma busy_timeout=0")
    for step in range(scaled(150)):
        writer.execute("insert into t(data) values (randomblob(2000))")
        if step % 10 == 0:
            _ = primary.position(NAME)
            primary.export(NAME)
    wait_same_position(primary, replica, NAME)
    assert_same_bytes([primary, replica], NAME)
    writer.close()


def test_databases_that_get_another_page_size_wait_for_their_readers_alone(cluster: Cluster) -> None:
    """More of them than may be nested on the worker. Another database is replicated meanwhile, they are opened, and all
    that are open go on when the readers have come to their end."""
    primary, replica = cluster.pair()
    names = [f"{number}.db" for number in range(6)]
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(contextlib.closing(primary.connect(name))).execute("create table t(id, data)")
        other = stack.enter_context(contextlib.closing(create(primary, "wal")))
        for name in (NAME, *names):
            wait_same_position(primary, replica, name)
        within = [stack.enter_context(contextlib.closing(replica.connect(name, timeout_s=0))) for name in names]
        idle = [stack.enter_context(contextlib.closing(replica.connect(name, timeout_s=0))) for name in names]
        for reader in within:
            reader.execute("begin")
        assert [count(reader) for reader in (*within, *idle)] == [0] * 12
        for name in names:
            with contextlib.closing(primary.connect(name)) as writer:
                writer.execute("pragma page_size=8192")
                writer.execute("vacuum")
                writer.execute("insert into t values (1, 2)")
                assert writer.execute("pragma page_size").fetchone() == (8192,)
        for _ in range(10):
            add(other, 1)
            wait_same_position(primary, replica, NAME)
        for name in names:
            with contextlib.closing(replica.connect(name, timeout_s=0)) as opened:
                assert count(opened) == 0
        for reader in within:
            assert count(reader) == 0
            reader.execute("commit")
        for name in names:
            wait_same_position(primary, replica, name)
        assert [count(reader) for reader in (*within, *idle)] == [1] * 12
    for name in (NAME, *names):
        assert_same_bytes([primary, replica], name)


@pytest.mark.parametrize(("passthrough", "mode"), [("auto", "wal"), ("auto", "delete"), ("off", "wal")])
def test_who_reads_on_a_replica_is_told_when_another_file_has_the_name(
    cluster: Cluster, tmp_path: Path, passthrough: str, mode: str
) -> None:
    """Never an old state for ever: an error, until it opens the database anew. A snapshot is read to its end."""
    primary, replica = cluster.pair()

    def remove_and_make() -> None:
        (primary.mount / NAME).unlink()
        create(primary, mode, 11).close()

    def there_and_back() -> None:
        (primary.mount / NAME).rename(primary.mount / "b.db")
        (primary.mount / "b.db").rename(primary.mount / NAME)

    def move_over() -> None:
        with contextlib.closing(sqlite3.connect(tmp_path / "new.db")) as new:
            new.execute("create table t(id integer primary key, data)")
            add(new, 12)
        subprocess.run(["mv", tmp_path / "new.db", primary.mount / NAME], check=True)

    create(primary, mode).close()
    wait_same_position(primary, replica, NAME)
    for act in (remove_and_make, there_and_back, move_over):
        idle, within = replica.connect(NAME, timeout_s=0), replica.connect(NAME)
        with contextlib.closing(idle), contextlib.closing(within):
            within.execute("begin")
            before = count(within)
            assert count(idle) == before
            act()
            wait_same_position(primary, replica, NAME)
            with contextlib.closing(primary.connect(NAME)) as writer:
                add(writer, 1)
                expected = count(writer)
            wait_same_position(primary, replica, NAME)
            for _ in range(2):
                with pytest.raises(sqlite3.OperationalError, match=r"unable to open database file|is locked"):
                    count(idle)
            assert count(within) == before
            within.execute("commit")
        with contextlib.closing(replica.connect(NAME)) as anew:
            assert count(anew) == expected, act.__name__
    wait_same_position(primary, replica, NAME)
    assert_same_bytes([primary, replica], NAME)
