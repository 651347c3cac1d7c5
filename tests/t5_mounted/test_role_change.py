"""The role of a node changes while applications go on: nothing that was acknowledged is missing from the log, and those
who only read see whole states, before and after."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from role_node import RoleNode, Writer, needs_mount

sys.path.insert(0, str(Path(__file__).parents[1] / "t2_engine"))

from sqlite_process import SqliteProcess

pytestmark = pytest.mark.skipif(not needs_mount(), reason="needs root and /dev/fuse")
MODES = ["auto", "off"]
WRITERS = {
    "wal-normal": ["journal_mode=WAL", "synchronous=NORMAL"],
    "wal-full": ["journal_mode=WAL", "synchronous=FULL"],
    "wal-small": ["journal_mode=WAL", "synchronous=NORMAL", "wal_autocheckpoint=20"],
    "delete": ["journal_mode=DELETE", "synchronous=FULL"],
    "truncate": ["journal_mode=TRUNCATE", "synchronous=NORMAL"],
    "persist": ["journal_mode=PERSIST"],
    "memory": ["journal_mode=MEMORY", "synchronous=FULL"],
    "off": ["journal_mode=OFF", "synchronous=OFF"],
}
CREATE = "CREATE TABLE t (id INTEGER PRIMARY KEY, v TEXT, filler BLOB)"


class Scene:
    """What a test starts; everything is ended, in good order, whatever happens."""

    def __init__(self, base: Path, passthrough: str) -> None:
        self.base, self.passthrough = base, passthrough
        self.nodes: list[RoleNode] = []
        self.writers: list[Writer] = []
        self.clients: list[SqliteProcess] = []

    def node(self) -> RoleNode:
        self.nodes.append(RoleNode(self.base / f"n{len(self.nodes)}", self.passthrough))
        return self.nodes[-1]

    def client(self, node: RoleNode) -> SqliteProcess:
        self.clients.append(SqliteProcess(node.file()))
        self.clients[-1]("PRAGMA busy_timeout=1000")
        return self.clients[-1]

    def writer(self, node: RoleNode, kind: str, *, keep: bool = False) -> Writer:
        name = f"w{len(self.writers)}"
        self.writers.append(Writer(node.file(), self.base / name, name, *WRITERS[kind], keep=keep))
        return self.writers[-1]

    def acknowledged(self) -> list[str]:
        return [value for writer in self.writers for value in writer.acknowledged()]

    def end(self) -> None:
        for writer in self.writers:
            writer.process.kill()
        for node in self.nodes:
            node.end()  # whoever waits for it goes on
        for writer in self.writers:
            writer.stop()
        for client in self.clients:
            with contextlib.suppress(Exception):
                client.kill()

    def values(self, node: RoleNode) -> list[str]:
        """What SQLite sees in the node's database, from a copy that is made of it."""
        path = self.base / "copy"
        node.export("db", str(path))
        with contextlib.closing(sqlite3.connect(path)) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            return [value for (value,) in db.execute("SELECT v FROM t")]

    def check(self, node: RoleNode, acknowledged: list[str]) -> None:
        """Everything acknowledged is there, once; and the log leads to what is there."""
        found = self.values(node)
        assert len(found) == len(set(found))
        assert set(acknowledged) <= set(found), sorted(set(acknowledged) - set(found))[:10]
        node.log("db")


@pytest.fixture
def scene(tmp_path: Path, passthrough: str) -> Iterator[Scene]:
    made = Scene(tmp_path, passthrough)
    try:
        yield made
    finally:
        made.end()
        for node in made.nodes:
            print(node.errors.read_text()[-2000:], file=sys.stderr)


def copy_log(source: RoleNode, target: RoleNode, after: int) -> int:
    """Have `target` apply what `source` has after a TXID; the last one."""
    for path, low, high in source.log("db"):
        if low > after:
            assert int(target.apply("db", path).split("/")[0], 16) == high
            after = high
    return after


def demote_wholly(node: RoleNode) -> None:
    node.demote(5.0)
    until_s = time.monotonic() + 10
    while node.captures("db"):
        assert time.monotonic() < until_s, "the database was not taken over"
        time.sleep(0.01)


@pytest.mark.parametrize("passthrough", MODES)
@pytest.mark.parametrize("kind", WRITERS)
def test_every_acknowledged_commit_is_in_the_log_after_a_demotion(scene: Scene, kind: str) -> None:
    node, other = scene.node(), scene.node()
    node.promote(2)
    client = scene.client(node)
    client(f"PRAGMA {WRITERS[kind][0]}")
    client(CREATE)
    reader = scene.client(node)
    assert reader("SELECT count(*) FROM t") == [(0,)]
    writers = [scene.writer(node, kind), scene.writer(node, kind, keep=True)]
    for writer in writers:
        writer.wait_for(20)
    demote_wholly(node)
    before = scene.acknowledged()
    position = node.position("db")
    scene.check(node, before)
    last = copy_log(node, other, 0)
    assert other.position("db") == position
    other.promote(3)
    elsewhere = scene.client(other)
    elsewhere("INSERT INTO t (v) VALUES ('from the other')")
    assert copy_log(other, node, last) == last + 1
    assert node.position("db") == other.position("db")
    assert reader("SELECT count(*) FROM t WHERE v = 'from the other'") == [(1,)]
    assert client("SELECT count(*) FROM t WHERE v = 'from the other'") == [(1,)]
    assert reader("PRAGMA integrity_check") == [("ok",)]
    assert sorted(scene.values(node)) == sorted(scene.values(other))
    scene.check(node, scene.acknowledged())  # a writer may have been slow to write down its last one


@pytest.mark.parametrize("passthrough", MODES)
def test_a_reader_in_a_transaction_keeps_its_snapshot_through_both_changes(scene: Scene) -> None:
    node = scene.node()
    node.promote(2)
    client, reader = scene.client(node), scene.client(node)
    client("PRAGMA journal_mode=WAL")
    client(CREATE)
    client("INSERT INTO t (v) VALUES ('a')")
    reader("BEGIN")
    assert reader("SELECT v FROM t") == [("a",)]
    client("INSERT INTO t (v) VALUES ('b')")
    demote_wholly(node)
    assert reader("SELECT v FROM t") == [("a",)]
    with pytest.raises(RuntimeError, match=r"locked|readonly"):
        client("INSERT INTO t (v) VALUES ('c')")
    node.promote(3)
    scene.client(node)("INSERT INTO t (v) VALUES ('d')")
    client("INSERT INTO t (v) VALUES ('e')")  # a connection of the first time may write again
    assert reader("SELECT v FROM t") == [("a",)]
    reader("COMMIT")
    assert reader("SELECT v FROM t") == [("a",), ("b",), ("d",), ("e",)]
    assert node.log("db")[-1][2] == 6
    scene.check(node, ["a", "b", "d", "e"])


@pytest.mark.parametrize("passthrough", MODES)
@pytest.mark.parametrize("kind", ["wal-normal", "wal-small", "delete", "persist"])
def test_the_primary_changes_again_and_again_under_load(scene: Scene, kind: str) -> None:
    nodes = [scene.node(), scene.node()]
    nodes[0].promote(2)
    client = scene.client(nodes[0])
    client(f"PRAGMA {WRITERS[kind][0]}")
    client(CREATE)
    last = copy_log(nodes[0], nodes[1], 0)
    for node in nodes:
        scene.client(node)("SELECT count(*) FROM t")  # stays open
    for node in nodes:
        scene.writer(node, kind)
        scene.writer(node, kind, keep=True)
    for cycle in range(8):
        primary, replica = nodes[cycle % 2], nodes[(cycle + 1) % 2]
        scene.writers[2 * (cycle % 2)].wait_for(5)
        demote_wholly(primary)
        last = copy_log(primary, replica, last)
        assert primary.position("db") == replica.position("db")
        for client in scene.clients[1:]:
            assert client("PRAGMA integrity_check") == [("ok",)]
        replica.promote(3 + cycle)
    demote_wholly(nodes[0])
    copy_log(nodes[0], nodes[1], last)
    acknowledged = scene.acknowledged()
    for node in nodes:
        scene.check(node, acknowledged)
    assert scene.values(nodes[0]) == scene.values(nodes[1])


@pytest.mark.parametrize("passthrough", MODES)
@pytest.mark.parametrize("kind", ["wal-full", "delete"])
def test_a_stopped_daemon_acknowledges_nothing_after_its_lease(scene: Scene, kind: str) -> None:
    node = scene.node()
    node.promote(2, 3600.0)
    client = scene.client(node)
    client(f"PRAGMA {WRITERS[kind][0]}")
    client("PRAGMA synchronous=FULL")
    client(CREATE)
    client("INSERT INTO t (v) VALUES ('before')")
    node.lead(1.5)
    node.pause_process()
    answer: list[str] = []

    def commit() -> None:
        try:
            client("INSERT INTO t (v) VALUES ('too late')")
            answer.append("acknowledged")
        except RuntimeError as error:
            answer.append(str(error))

    thread = threading.Thread(target=commit)
    thread.start()
    time.sleep(2.0)  # the lease ends while the daemon is stopped
    node.resume_process()
    thread.join(20)
    assert answer and answer != ["acknowledged"], answer
    with pytest.raises(RuntimeError):
        client("INSERT INTO t (v) VALUES ('later still')")
    assert scene.client(node)("SELECT v FROM t") == [("before",)]
    demote_wholly(node)
    assert scene.values(node) == ["before"]
    node.promote(3)
    scene.client(node)("INSERT INTO t (v) VALUES ('after')")
    scene.check(node, ["before", "after"])


@pytest.mark.parametrize("passthrough", MODES)
def test_commits_that_do_not_wait_for_the_disk_are_in_the_log_of_a_stopped_daemon(scene: Scene) -> None:
    node = scene.node()
    node.promote(2, 3600.0)
    client = scene.client(node)
    client("PRAGMA journal_mode=WAL")
    client("PRAGMA synchronous=NORMAL")
    client(CREATE)
    client("INSERT INTO t (v) VALUES ('before')")
    node.lead(0.2)
    node.pause_process()
    if scene.passthrough == "auto":  # in cached mode every write asks the daemon
        time.sleep(0.3)
        client("INSERT INTO t (v) VALUES ('meanwhile')")
    node.resume_process()
    demote_wholly(node)
    scene.check(node, ["before"] + ["meanwhile"] * (scene.passthrough == "auto"))


@pytest.mark.parametrize("passthrough", ["auto"])
@pytest.mark.parametrize("kind", ["wal-normal", "delete"])
def test_a_killed_daemon_leaves_what_was_acknowledged_to_the_next_start(scene: Scene, kind: str) -> None:
    """Killed as the primary, and in the middle of a demotion that a writer holds up: in both cases the next start is a
    replica, and has in its log what its files hold."""
    node = scene.node()
    node.promote(2)
    client = scene.client(node)
    client(f"PRAGMA {WRITERS[kind][0]}")
    client(CREATE)
    writer = scene.writer(node, kind)
    for how in ("primary", "demoting"):
        if how == "demoting":
            node.promote(3)
            writer = scene.writer(node, kind)
        writer.wait_for(10)
        if how == "demoting":
            node.tell("demote", 5.0)
        node.kill()
        writer.process.kill()
        writer.stop()
        for client in scene.clients:
            client.kill()
        scene.clients.clear()
        acknowledged = scene.acknowledged()
        node.start()
        assert not node.captures("db")
        scene.check(node, acknowledged)
        node.tell("told")
        assert isinstance(node.answer(), list)
        assert not (node.data / "primary").exists()


@pytest.mark.parametrize("passthrough", MODES)
@pytest.mark.parametrize("mode", ["WAL", "MEMORY"])
@pytest.mark.parametrize("user", ["who made it", "another"])
def test_who_made_the_database_has_it_open_too(scene: Scene, mode: str, user: str) -> None:
    """It was a plain file when he opened it; who opens it later is not out when he closes it. Nothing but the file is
    there, so no lock would keep anybody from writing to it when this node is not the primary any more."""
    node = scene.node()
    node.promote(2)
    client, maker = scene.client(node), scene.client(node)
    maker(f"PRAGMA journal_mode={mode}")
    maker(CREATE)
    maker("INSERT INTO t (v) VALUES ('before')")
    if user == "another":
        client(f"PRAGMA journal_mode={mode}")
        client("SELECT v FROM t")
        maker.close()
    else:
        client = maker
    client("PRAGMA synchronous=NORMAL")
    if mode == "WAL":
        client("PRAGMA wal_checkpoint(TRUNCATE)")
    demote_wholly(node)
    with pytest.raises(RuntimeError):
        client("INSERT INTO t (v) VALUES ('after')")
    assert scene.values(node) == ["before"]
    scene.check(node, ["before"])


@pytest.mark.parametrize("passthrough", MODES)
@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
def test_a_database_that_somebody_has_for_himself_is_taken_over_when_he_lets_go(scene: Scene, mode: str) -> None:
    node, other = scene.node(), scene.node()
    node.promote(2)
    client = scene.client(node)
    client(f"PRAGMA journal_mode={mode}")
    client(CREATE)
    client.close()
    client("PRAGMA locking_mode=EXCLUSIVE")
    client("PRAGMA synchronous=NORMAL")
    client("INSERT INTO t (v) VALUES ('mine')")
    assert node.demote(0.2) == ["db"]
    assert node.captures("db")
    assert (node.data / "primary").exists()
    last = copy_log(node, other, 0)
    other.promote(3)
    scene.client(other)("INSERT INTO t (v) VALUES ('theirs')")
    path = other.log("db")[-1][0]
    with pytest.raises(RuntimeError, match=r"EBUSY|applications write"):
        node.apply("db", path)
    client.close()
    wait_until(lambda: not node.captures("db"))
    wait_until(lambda: not (node.data / "primary").exists())
    assert node.log("db")[-1][2] == last
    node.apply("db", path)
    scene.check(node, ["mine", "theirs"])
    assert client("SELECT v FROM t") == [("mine",), ("theirs",)]


@pytest.mark.parametrize("passthrough", MODES)
def test_checkpoints_of_an_application_do_not_keep_the_daemon_from_taking_over(scene: Scene) -> None:
    """They hold CKPT nearly all the time, and wait for WRITE meanwhile."""
    node = scene.node()
    node.promote(2)
    client, checkpointer = scene.client(node), scene.client(node)
    client("PRAGMA journal_mode=WAL")
    client(CREATE)
    writer = scene.writer(node, "wal-normal", keep=True)
    stop = threading.Event()

    def checkpoint() -> None:
        while not stop.is_set():
            with contextlib.suppress(RuntimeError):  # refused while the role changes
                checkpointer("PRAGMA wal_checkpoint(TRUNCATE)")

    thread = threading.Thread(target=checkpoint)
    thread.start()
    try:
        for epoch in range(3, 9):
            writer.wait_for(5)
            demote_wholly(node)
            scene.check(node, writer.acknowledged())
            node.promote(epoch)
    finally:
        stop.set()
        thread.join(20)
    demote_wholly(node)
    scene.check(node, writer.acknowledged())


@pytest.mark.parametrize("passthrough", MODES)
def test_a_pause_lets_nobody_write_and_loses_nothing(scene: Scene) -> None:
    node = scene.node()
    node.promote(2)
    client = scene.client(node)
    client("PRAGMA journal_mode=WAL")
    client(CREATE)
    scene.writer(node, "wal-normal")
    scene.writer(node, "wal-full", keep=True)
    for writer in scene.writers:
        writer.wait_for(5)
    for _ in range(5):
        assert node.pause(5.0)
        time.sleep(0.1)  # what has returned is noted by its process now
        before = scene.acknowledged()
        position = node.position("db")
        opened: list[str] = []
        opening = threading.Thread(target=lambda made=opened: made.append(open_and_write(node.file())))
        opening.start()
        time.sleep(0.1)
        assert scene.acknowledged() == before
        assert node.position("db") == position
        assert opened == [], "a new connection that writes waits"
        node.resume()
        opening.join(20)
        assert opened == ["written"]
        for writer in scene.writers:
            writer.wait_for(3)
    assert node.pause(5.0)
    opening = threading.Thread(target=lambda made=opened: made.append(open_and_write(node.file())))
    opening.start()
    assert node.demote(1.0) == []
    opening.join(10)
    assert "readonly" in opened[-1] or "locked" in opened[-1]
    scene.check(node, scene.acknowledged())


def open_and_write(path: str) -> str:
    client = SqliteProcess(path)
    try:
        client("PRAGMA busy_timeout=15000")
        client("INSERT INTO t (v) VALUES (hex(randomblob(8)))")
        return "written"
    except RuntimeError as error:
        return str(error)
    finally:
        client.stop()


@pytest.mark.parametrize("passthrough", MODES)
@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
def test_one_database_is_given_away_and_taken_back_while_others_are_written(scene: Scene, mode: str) -> None:
    """As the primary does for a HALT lock; the holder is another node. The other database's connections come and go,
    so that its files are removed while the first one changes hands."""
    node, holder = scene.node(), scene.node()
    node.promote(2)
    client = scene.client(node)
    client(f"PRAGMA journal_mode={mode}")
    client(CREATE)
    busy = SqliteProcess(node.file("busy"))
    scene.clients.append(busy)
    busy("PRAGMA journal_mode=WAL")
    busy("CREATE TABLE t (v)")
    stop = threading.Event()
    errors: list[str] = []

    def come_and_go() -> None:
        while not stop.is_set():
            try:
                busy.close()
                busy("PRAGMA busy_timeout=2000")
                busy("INSERT INTO t VALUES (1)")
            except RuntimeError as error:
                errors.append(str(error))

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        last = copy_log(node, holder, 0)
        for turn in range(6):
            assert node.demote_database("db", 5.0)
            last = copy_log(node, holder, last)
            holder.promote_database("db")
            theirs = scene.client(holder)
            theirs(f"INSERT INTO t (v) VALUES ('halt {turn}')")
            theirs.close()
            for path, low, high in holder.log("db"):
                if low > last:
                    apply_patiently(node, path)
                    last = high
            with pytest.raises(RuntimeError, match=r"readonly|locked"):
                client("INSERT INTO t (v) VALUES ('not now')")
            assert holder.demote_database("db", 5.0)
            assert client(f"SELECT count(*) FROM t WHERE v = 'halt {turn}'") == [(1,)]
            node.promote_database("db")
            mine = scene.client(node)
            mine(f"INSERT INTO t (v) VALUES ('primary {turn}')")
            mine.close()
    finally:
        stop.set()
        thread.join(30)
    assert not thread.is_alive() and errors == []
    scene.check(node, [f"{who} {turn}" for who in ("halt", "primary") for turn in range(6)])
    copy_log(node, holder, last)
    assert scene.values(node) == scene.values(holder)


def apply_patiently(node: RoleNode, path: str) -> None:
    for _ in range(100):
        try:
            node.apply_as_primary("db", path)
            return
        except RuntimeError as error:
            assert "Busy" in str(error), error
            time.sleep(0.02)
    raise AssertionError("the database stays busy")


def wait_until(condition: Callable[[], object]) -> None:
    until_s = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.01)
