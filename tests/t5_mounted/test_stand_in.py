"""A database in a rollback mode goes on in WAL mode while it is open through a promotion: its commits mean what they
mean in its own mode, whatever `synchronous` is but OFF, and it goes back to that mode as soon as it can."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from role_node import RoleNode, needs_mount

sys.path.insert(0, str(Path(__file__).parents[1] / "t2_engine"))

from sqlite_process import SqliteProcess

pytestmark = pytest.mark.skipif(not needs_mount(), reason="needs root and /dev/fuse")
MODES = ["auto", "off"]


def wait_until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    until_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until_s, "it did not come to that"
        time.sleep(0.01)


class Scene:
    """A node on which a database in mode DELETE was open for reading when it was promoted."""

    def __init__(self, base: Path, passthrough: str) -> None:
        self.clients: list[SqliteProcess] = []
        self.nodes = [RoleNode(base / name, passthrough) for name in ("first", "second")]
        first, self.node = self.nodes
        first.promote(2)
        creator = SqliteProcess(first.file())
        self.clients.append(creator)
        creator("PRAGMA journal_mode=DELETE")
        creator("CREATE TABLE t (v)")
        creator("INSERT INTO t VALUES ('first')")
        for path, _, _ in first.log("db"):
            self.node.apply("db", path)
        self.reader = self.client()
        assert self.values() == ["first"]
        self.node.promote(3)

    def client(self, *pragmas: str) -> SqliteProcess:
        made = SqliteProcess(self.node.file())
        self.clients.append(made)
        for pragma in ("busy_timeout=1000", *pragmas):
            made(f"PRAGMA {pragma}")
        return made

    def values(self) -> list[str]:
        return [value for (value,) in self.reader("SELECT v FROM t")]

    def end(self) -> None:
        for node in self.nodes:
            with contextlib.suppress(Exception):
                node.gate("none")
            node.end()
        for client in self.clients:
            with contextlib.suppress(Exception):
                client.kill()


@pytest.fixture
def scene(tmp_path: Path, passthrough: str) -> Iterator[Scene]:
    made = Scene(tmp_path, passthrough)
    try:
        yield made
    finally:
        made.end()
        for node in made.nodes:
            print(node.errors.read_text()[-2000:], file=sys.stderr)


class Statement:
    """One that may wait."""

    def __init__(self, client: SqliteProcess, sql: str) -> None:
        self.error = ""
        self.done = threading.Event()
        threading.Thread(target=self._run, args=(client, sql), daemon=True).start()

    def _run(self, client: SqliteProcess, sql: str) -> None:
        try:
            client(sql)
        except (RuntimeError, AssertionError) as error:
            self.error = str(error)
        self.done.set()


@pytest.mark.parametrize("passthrough", MODES)
@pytest.mark.parametrize("synchronous", ["NORMAL", "FULL"])
def test_a_commit_waits_for_replicas_once(scene: Scene, synchronous: str) -> None:
    writer = scene.client(f"synchronous={synchronous}")
    assert writer("PRAGMA journal_mode") == [("wal",)]
    scene.node.gate("shut")
    for number in range(3):
        commit = Statement(writer, f"INSERT INTO t VALUES ('{number}')")
        wait_until(lambda: scene.node.waiting() == 1)
        assert not commit.done.wait(0.3)
        assert len(scene.values()) == 1 + number, "nobody sees what may still be lost"
        scene.node.gate("grant")
        assert commit.done.wait(10), "it waited a second time"
        assert commit.error == ""
        assert scene.values()[-1] == str(number)
    assert scene.node.log("db")[-1][2] == 2 + 3
    assert scene.reader("PRAGMA integrity_check") == [("ok",)]


@pytest.mark.parametrize("passthrough", MODES)
def test_a_large_transaction_waits_at_its_end(scene: Scene) -> None:
    """Pages that were spilled and changed again are written over in the WAL; its frames get their checksums last."""
    writer = scene.client("synchronous=NORMAL", "cache_size=5")
    scene.node.gate("shut")
    writer("BEGIN")
    writer("CREATE TABLE big (v)")
    for _ in range(60):
        writer("INSERT INTO big VALUES (randomblob(3000))")
    writer("UPDATE big SET v = randomblob(2500)")
    assert scene.node.waiting() == 0
    commit = Statement(writer, "COMMIT")
    wait_until(lambda: scene.node.waiting() == 1)
    assert not commit.done.wait(0.3)
    scene.node.gate("grant")
    assert commit.done.wait(10) and commit.error == ""
    assert scene.reader("SELECT count(*) FROM big") == [(60,)]
    assert scene.reader("PRAGMA integrity_check") == [("ok",)]
    scene.node.log("db")


@pytest.mark.parametrize("passthrough", MODES)
def test_a_commit_that_no_replica_has_fails_and_leaves_nothing(scene: Scene) -> None:
    writer = scene.client("synchronous=NORMAL")
    scene.node.gate("fail")
    with pytest.raises(RuntimeError, match="disk I/O error"):
        writer("INSERT INTO t VALUES ('in vain')")
    assert scene.values() == ["first"]
    scene.node.gate("open")
    writer("INSERT INTO t VALUES ('again')")
    assert scene.values() == ["first", "again"]
    assert scene.client()("SELECT v FROM t") == [("first",), ("again",)]
    scene.node.log("db")
    scene.node.export("db", str(scene.node.data / "copy"))
    with contextlib.closing(sqlite3.connect(scene.node.data / "copy")) as db:
        assert db.execute("SELECT v FROM t").fetchall() == [("first",), ("again",)]


@pytest.mark.parametrize("passthrough", MODES)
def test_a_node_whose_lease_is_over_acknowledges_nothing(scene: Scene) -> None:
    writer = scene.client("synchronous=NORMAL")
    writer("INSERT INTO t VALUES ('in time')")
    scene.node.lead(-1.0)
    with pytest.raises(RuntimeError, match="disk I/O error"):
        writer("INSERT INTO t VALUES ('too late')")
    assert scene.values() == ["first", "in time"]
    scene.node.lead(100.0)
    writer("INSERT INTO t VALUES ('again')")
    assert scene.values() == ["first", "in time", "again"]


@pytest.mark.parametrize("passthrough", MODES)
def test_without_replicas_to_wait_for_nothing_waits(scene: Scene) -> None:
    writer = scene.client("synchronous=NORMAL")
    for number in range(20):
        writer("INSERT INTO t VALUES (?)", str(number))
    assert len(scene.values()) == 21
    scene.node.log("db")


@pytest.mark.parametrize("passthrough", MODES)
def test_a_writer_that_is_killed_while_it_waits(scene: Scene) -> None:
    writer = scene.client("synchronous=NORMAL")
    scene.node.gate("shut")
    commit = Statement(writer, "INSERT INTO t VALUES ('killed')")
    wait_until(lambda: scene.node.waiting() == 1)
    writer.kill()
    assert commit.done.wait(10)
    other = scene.client("synchronous=NORMAL")
    scene.node.gate("open")
    other("INSERT INTO t VALUES ('after')")
    assert scene.values() == ["first", "after"]
    scene.node.log("db")


@pytest.mark.parametrize("passthrough", MODES)
@pytest.mark.parametrize("last", ["reader", "killed writer", "writer"])
def test_it_goes_back_to_its_own_mode_when_nobody_has_it_open(scene: Scene, last: str) -> None:
    writer = scene.client("synchronous=NORMAL")
    writer("INSERT INTO t VALUES ('more')")
    first, second = (writer, scene.reader) if last == "reader" else (scene.reader, writer)
    first.close()
    second.kill() if last == "killed writer" else second.close()
    wait_until(lambda: not (scene.node.mount / "db-wal").exists())
    again = scene.client()
    assert again("PRAGMA journal_mode") == [("delete",)]
    assert again("SELECT v FROM t") == [("first",), ("more",)]
    again("INSERT INTO t VALUES ('in its own mode')")
    scene.node.log("db")


@pytest.mark.parametrize("passthrough", MODES)
@pytest.mark.parametrize("opened", ["while it is lent", "when it is back"])
def test_a_database_that_comes_back_from_the_holder_of_its_lock(scene: Scene, opened: str) -> None:
    """On the primary the daemon writes it while another node has its HALT lock, and applications open it meanwhile."""
    scene.reader.close()
    wait_until(lambda: not (scene.node.mount / "db-wal").exists())
    assert scene.reader("PRAGMA journal_mode") == [("delete",)]
    assert scene.node.demote_database("db", 5.0)
    assert scene.values() == ["first"]
    writer = scene.client("synchronous=NORMAL") if opened == "while it is lent" else None
    if writer is not None:
        assert writer("SELECT v FROM t") == [("first",)]
        with pytest.raises(RuntimeError, match="locked"):
            writer("INSERT INTO t VALUES ('too early')")
    scene.node.promote_database("db")
    writer = writer or scene.client("synchronous=NORMAL")
    assert writer("PRAGMA journal_mode") == [("wal",)]
    scene.node.gate("shut")
    commit = Statement(writer, "INSERT INTO t VALUES ('back')")
    wait_until(lambda: scene.node.waiting() == 1)
    assert not commit.done.wait(0.3)
    scene.node.gate("grant")
    assert commit.done.wait(10) and commit.error == ""
    assert scene.values() == ["first", "back"]


@pytest.mark.parametrize("passthrough", MODES)
def test_a_database_in_wal_mode_does_not_wait_at_normal_commits(scene: Scene) -> None:
    """Also if its mode was changed right before the promotion, and only the WAL says so."""
    first, node = scene.nodes
    client = SqliteProcess(first.file("other"))
    scene.clients.append(client)
    client("PRAGMA journal_mode=DELETE")
    client("CREATE TABLE t (v)")
    logs = iter([entry for entry in first.log("other") if entry[1] >= 1])
    node.demote(5.0)
    node.apply("other", next(logs)[0])
    reader = SqliteProcess(node.file("other"))
    scene.clients.append(reader)
    reader("BEGIN")
    reader("SELECT * FROM t")  # its snapshot keeps the change of the mode out of the file
    client("PRAGMA journal_mode=WAL")
    client("INSERT INTO t VALUES (1)")
    for path, _, _ in first.log("other")[1:]:
        node.apply("other", path)
    node.promote(4)
    node.gate("shut")
    writer = SqliteProcess(node.file("other"))
    scene.clients.append(writer)
    writer("PRAGMA synchronous=NORMAL")
    commit = Statement(writer, "INSERT INTO t VALUES (2)")
    assert commit.done.wait(10) and commit.error == ""
    assert node.waiting() == 0
