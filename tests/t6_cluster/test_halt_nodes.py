"""Writes from a replica under the HALT lock, on real nodes and through the mount."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import pylitefs
from cluster_nodes import (
    PASSTHROUGH,
    Cluster,
    Node,
    assert_same_bytes,
    assert_sound,
    needs_root,
    wait_same_position,
    wait_until,
)
from pylitefs.engine.lost import branches

pytestmark = needs_root
_F_OFD_SETLKW = 38
MODES = ["wal", "delete"]
TURNS = 15


def begin(node: Node, mode: str = "wal") -> None:
    """A database with a counter at 0."""
    with contextlib.closing(node.connect("app.db")) as connection:
        connection.execute(f"pragma journal_mode={mode}")
        connection.execute("create table counter (n integer not null)")
        connection.execute("insert into counter values (0)")
        connection.execute("create table log (who text, n integer)")


def count(node: Node) -> int:
    with contextlib.closing(node.connect("app.db")) as connection:
        value: int = connection.execute("select n from counter").fetchone()[0]
        return value


def increment(node: Node, who: str, synchronous: str = "normal") -> None:
    with contextlib.closing(node.connect("app.db")) as connection:
        connection.execute(f"pragma synchronous={synchronous}")
        connection.execute("begin immediate")
        n = connection.execute("select n from counter").fetchone()[0]
        connection.execute("update counter set n = ?", (n + 1,))
        connection.execute("insert into log values (?, ?)", (who, n + 1))
        connection.execute("commit")


def settled(*nodes: Node) -> None:
    """All replicas have what the primary has, byte for byte."""
    for replica in nodes[1:]:
        wait_same_position(nodes[0], replica, "app.db")
    assert_same_bytes(nodes, "app.db")
    for node in nodes:
        with contextlib.closing(node.connect("app.db")) as connection:
            assert_sound(connection)


@pytest.mark.parametrize("passthrough", PASSTHROUGH)
@pytest.mark.parametrize("mode", MODES)
def test_a_replica_writes_under_the_lock(cluster: Cluster, mode: str, passthrough: str) -> None:
    primary, replica = cluster.pair()
    begin(primary, mode)
    wait_same_position(primary, replica, "app.db")
    with pylitefs.halt(replica.mount / "app.db"):
        increment(replica, "replica")
        increment(replica, "replica", "full")
    assert count(primary) == 2
    increment(primary, "primary")  # at once: the lock is given back before the close returns
    settled(primary, replica)
    assert count(replica) == 3
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        increment(replica, "replica")


SHORT = """
import sys
if sys.argv[1:2] == ["mount"] or "mount" in sys.orig_argv:
    from pylitefs.cluster.halting import Halting
    from pylitefs.cluster.halts import HaltLocks
    for kind in (Halting, HaltLocks):
        kind.__init__.__kwdefaults__["ttl_s"] = 3.0
"""


@pytest.fixture
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks that expire after 3 s instead of 30, in every node that is started."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SHORT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))


def trio(cluster: Cluster) -> tuple[Node, Node, Node]:
    primary, first = cluster.pair()
    second = cluster.node("second", primary=primary).start()
    begin(primary)
    for replica in (first, second):
        wait_same_position(primary, replica, "app.db")
    return primary, first, second


WORK = """
import os, sqlite3, sys
import pylitefs
path, who, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
for turn in range(rounds):
    with pylitefs.halt(path, timeout_s=60):
        db = sqlite3.connect(path, timeout=30, isolation_level=None)
        db.execute(f"pragma synchronous={'full' if turn % 2 else 'normal'}")
        for _ in range(3):
            db.execute("begin immediate")
            n = db.execute("select n from counter").fetchone()[0]
            db.execute("update counter set n = ?", (n + 1,))
            db.execute("insert into log values (?, ?)", (who, n + 1))
            db.execute("commit")
        db.close()
"""


def test_clients_of_two_replicas_take_turns(cluster: Cluster) -> None:
    primary, first, second = trio(cluster)
    rounds = 4
    clients = [
        subprocess.Popen([sys.executable, "-c", WORK, str(node.mount / "app.db"), f"{node.name}-{index}", str(rounds)])
        for node in (first, second)
        for index in range(2)
    ]
    try:
        for _ in range(5):
            increment(primary, "primary")
        for client in clients:
            assert client.wait(80) == 0
    finally:
        for client in clients:
            client.kill()
            client.wait()
    assert count(primary) == 4 * rounds * 3 + 5
    with contextlib.closing(primary.connect("app.db")) as connection:
        assert connection.execute("select count(distinct n) from log").fetchone()[0] == 4 * rounds * 3 + 5
    settled(primary, first, second)


def test_a_full_commit_is_on_the_primary_when_it_returns(cluster: Cluster) -> None:
    primary, replica = cluster.pair()
    begin(primary)
    wait_same_position(primary, replica, "app.db")
    with pylitefs.halt(replica.mount / "app.db"), contextlib.closing(replica.connect("app.db")) as connection:
        connection.execute("pragma synchronous=full")
        for n in range(1, 6):
            connection.execute("update counter set n = n + 1")
            assert count(primary) == n


def test_applications_of_the_primary_are_busy_and_go_on_afterwards(cluster: Cluster) -> None:
    """Also one that opens the database meanwhile: its connection is not read-only for ever."""
    primary, replica = cluster.pair()
    begin(primary)
    wait_same_position(primary, replica, "app.db")
    with contextlib.closing(primary.connect("app.db", timeout_s=0)) as before:
        before.execute("select * from counter").fetchall()
        with pylitefs.halt(replica.mount / "app.db"):
            during = primary.connect("app.db", timeout_s=0)
            for connection in (before, during):
                with pytest.raises(sqlite3.OperationalError, match="locked"):
                    connection.execute("update counter set n = n + 10")
            increment(replica, "replica")
        with contextlib.closing(during):
            for connection in (before, during):
                connection.execute("pragma busy_timeout=10000")
                connection.execute("update counter set n = n + 10")
    assert count(primary) == 21
    settled(primary, replica)


@pytest.mark.parametrize("mode", MODES)
def test_no_commit_on_the_primary_fails_because_a_replica_takes_the_lock(cluster: Cluster, mode: str) -> None:
    """One that is under way is waited for."""
    primary, replica = cluster.pair()
    begin(primary, mode)
    wait_same_position(primary, replica, "app.db")
    written, over = [0], threading.Event()

    def write() -> None:
        with contextlib.closing(primary.connect("app.db", timeout_s=60)) as connection:
            connection.execute(f"pragma journal_mode={mode}")
            connection.execute("pragma synchronous=full")
            while not over.is_set():
                connection.execute("update counter set n = n + 1")
                written[0] += 1

    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            write()
        except BaseException as error:
            errors.append(error)

    writer = threading.Thread(target=guarded)
    writer.start()
    try:
        for _ in range(TURNS):
            before = written[0]
            wait_until(lambda before=before: written[0] > before + 5 or errors, "it writes")
            with pylitefs.halt(replica.mount / "app.db"):
                increment(replica, "replica")
    finally:
        over.set()
        writer.join()
    assert not errors
    assert count(primary) == written[0] + TURNS
    settled(primary, replica)


@pytest.mark.parametrize("mode", MODES)
def test_a_long_transaction_on_the_primary_is_waited_for(cluster: Cluster, mode: str) -> None:
    primary, replica = cluster.pair()
    begin(primary, mode)
    wait_same_position(primary, replica, "app.db")
    took: list[str] = []

    def take() -> None:
        with pylitefs.halt(replica.mount / "app.db"):
            took.append("taken")
            increment(replica, "replica")

    with contextlib.closing(primary.connect("app.db")) as connection:
        connection.execute("pragma synchronous=full")
        connection.execute("begin immediate")
        connection.execute("update counter set n = n + 10")
        taker = threading.Thread(target=take)
        taker.start()
        time.sleep(1.5)
        assert not took
        connection.execute("commit")
    taker.join()
    assert took and count(primary) == 11
    settled(primary, replica)


def test_a_connection_from_an_earlier_lock_writes_under_the_next(cluster: Cluster) -> None:
    primary, replica = cluster.pair()
    begin(primary)
    wait_same_position(primary, replica, "app.db")
    with pylitefs.halt(replica.mount / "app.db"):
        kept = replica.connect("app.db", timeout_s=0)
        kept.execute("update counter set n = n + 1")
    with contextlib.closing(kept):
        with pytest.raises(sqlite3.OperationalError, match=r"locked|I/O"):  # where it began before others were kept out
            kept.execute("update counter set n = n + 1")
        increment(primary, "primary")
        wait_same_position(primary, replica, "app.db")
        assert kept.execute("select n from counter").fetchone() == (2,)
        with pylitefs.halt(replica.mount / "app.db"):
            kept.execute("update counter set n = n + 1")
        assert count(primary) == 3
    settled(primary, replica)


LIKE_LITEFS_GO = """
import fcntl, os, sqlite3, struct, sys, time
path, how = sys.argv[1:3]
print("opening", flush=True)
fd = os.open(path + "-lock", os.O_RDWR | os.O_CREAT, 0o666)
fcntl.fcntl(fd, 38, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 72, 1, 0))
if os.fork() == 0:
    os.close(fd)  # no end of the lock: the parent has it
    os._exit(0)
os.wait()
db = sqlite3.connect(path, isolation_level=None)
db.execute("update counter set n = n + 1")
if how == "unlock":
    fcntl.fcntl(fd, 38, struct.pack("hhqqi4x", fcntl.F_UNLCK, 0, 72, 1, 0))
    os.close(fd)
    print("done", flush=True)
elif how == "die":
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("how", ["unlock", "exit", "die"])
def test_the_sequence_of_litefs_clients(cluster: Cluster, how: str) -> None:
    primary, replica = cluster.pair()
    begin(primary)
    wait_same_position(primary, replica, "app.db")
    command = [sys.executable, "-c", LIKE_LITEFS_GO, str(replica.mount / "app.db"), how]
    done = subprocess.run(command, timeout=60, check=False)
    assert done.returncode == (-9 if how == "die" else 0)
    increment(primary, "primary")
    assert count(primary) == 2
    settled(primary, replica)


def test_litefs_run(cluster: Cluster) -> None:
    primary, replica = cluster.pair()
    begin(primary)
    wait_same_position(primary, replica, "app.db")
    path = str(replica.mount / "app.db")
    program = f"import sqlite3; sqlite3.connect({path!r}, isolation_level=None).execute('update counter set n = 5')"
    done = replica.litefs("run", "-with-halt-lock-on", path, "--", sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr
    assert count(primary) == 5
    done = primary.litefs("run", "-with-halt-lock-on", str(primary.mount / "app.db"), "--", "true")
    assert done.returncode == 0, done.stderr
    done = replica.litefs("run", "-with-halt-lock-on", str(replica.mount / "none.db"), "--", "true")
    assert done.returncode == 1 and "no such database" in done.stderr
    settled(primary, replica)


def test_the_lock_file(cluster: Cluster) -> None:
    primary, replica = cluster.pair()
    begin(primary)
    wait_same_position(primary, replica, "app.db")
    lock = replica.mount / "app.db-lock"
    assert lock.name not in os.listdir(replica.mount)
    assert lock.read_bytes() == b""
    with pytest.raises(OSError):
        os.open(replica.mount / "none.db-lock", os.O_RDWR)
    with open(lock, "w"), open(lock, "r+b"):  # one lock for both
        with pytest.raises(OSError):
            os.unlink(replica.mount / "app.db")
        increment(replica, "replica")
    assert count(primary) == 1


def test_the_lock_of_a_database_that_was_not_there_yet(cluster: Cluster) -> None:
    """The kernel remembers what does not exist."""
    primary, replica = cluster.pair()
    for node in (primary, replica):
        with pytest.raises(pylitefs.HaltFailed, match="no such database"), pylitefs.halt(node.mount / "app.db"):
            pass
    begin(primary)
    wait_same_position(primary, replica, "app.db")
    for node in (primary, replica):
        with pylitefs.halt(node.mount / "app.db"):
            increment(node, node.name)
    assert count(primary) == 2


def test_an_open_that_waits_can_be_interrupted(cluster: Cluster) -> None:
    """A process that waits for the lock can be killed at once, and does not get it afterwards."""
    primary, first, second = trio(cluster)
    with pylitefs.halt(first.mount / "app.db"):
        command = [sys.executable, "-c", LIKE_LITEFS_GO, str(second.mount / "app.db"), "exit"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as waiting:
            assert waiting.stdout is not None and waiting.stdout.readline() == b"opening\n"
            waiting.kill()
            assert waiting.wait(5) == -9
    increment(primary, "primary")
    assert count(primary) == 1
    settled(primary, first, second)


class Incrementer(threading.Thread):
    """Increments under one lock until that fails; `acknowledged` is the last number whose FULL commit returned."""

    def __init__(self, node: Node) -> None:
        super().__init__(daemon=True)
        self.node, self.acknowledged, self.problem = node, 0, ""
        self.fd = os.open(node.mount / "app.db-lock", os.O_RDWR)

    def run(self) -> None:
        try:
            with contextlib.closing(self.node.connect("app.db", timeout_s=1)) as connection:
                connection.execute("pragma synchronous=full")
                while True:
                    n = self.acknowledged + 1
                    connection.execute("insert into log values ('under the lock', ?)", (n,))
                    self.acknowledged = n
                    time.sleep(0.002)
        except sqlite3.Error as error:
            self.problem = str(error)
        finally:
            with contextlib.suppress(OSError):
                os.close(self.fd)


def logged(node: Node) -> list[int]:
    with contextlib.closing(node.connect("app.db")) as connection:
        return [n for (n,) in connection.execute("select n from log where who = 'under the lock' order by n")]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("victim", ["holder", "primary"])
def test_kill_9(cluster: Cluster, victim: str) -> None:
    """What was acknowledged with FULL is there. The one that is killed comes back, and all are equal."""
    primary, replica = cluster.pair()
    begin(primary)
    wait_same_position(primary, replica, "app.db")
    client = Incrementer(replica)
    client.start()
    wait_until(lambda: client.acknowledged >= 20, "some commits")
    node = replica if victim == "holder" else primary
    node.kill()
    client.join(40)
    assert not client.is_alive() and client.problem
    node.start()
    wait_until(lambda: increment(primary, "primary") is None, "the primary is written to")
    settled(primary, replica)
    found = logged(primary)
    assert found == list(range(1, len(found) + 1)) and len(found) >= client.acknowledged
    with pylitefs.halt(replica.mount / "app.db", timeout_s=20):
        increment(replica, "replica")
    settled(primary, replica)


@pytest.mark.usefixtures("short")
def test_a_holder_that_was_stopped_for_too_long(cluster: Cluster) -> None:
    """Its lock expires: others write, and what it says afterwards is not acknowledged."""
    primary, replica = cluster.pair()
    begin(primary)
    wait_same_position(primary, replica, "app.db")
    client = Incrementer(replica)
    client.start()
    wait_until(lambda: client.acknowledged >= 10, "some commits")
    replica.pause()
    acknowledged = client.acknowledged
    increment(primary, "primary")  # waits for the lock to expire
    replica.resume()
    client.join(30)
    assert not client.is_alive() and client.problem
    assert client.acknowledged <= acknowledged + 1
    settled(primary, replica)
    found = logged(primary)
    assert found == list(range(1, len(found) + 1)) and len(found) >= client.acknowledged
    wait_until(lambda: pylitefs.halt(replica.mount / "app.db").__enter__(), "the lock is to be had again")


@pytest.mark.usefixtures("short")
def test_a_holder_that_was_away_for_longer_than_the_log_reaches(cluster: Cluster) -> None:
    """The primary had not got its last commits, and went on without them: they are in lost/."""
    primary, replica = cluster.pair()
    primary.stop()
    primary.config["data"] |= {"retention": "100ms", "retention-monitor-interval": "100ms"}
    primary.start()
    begin(primary)
    wait_same_position(primary, replica, "app.db")
    before = int(replica.position("app.db").split("/")[0], 16)
    lock = os.open(replica.mount / "app.db-lock", os.O_RDWR)
    primary.pause()
    for _ in range(3):
        increment(replica, "not sent")
    assert json.loads(replica.get("/positions"))["positions"]["app.db"][1] == before, "it claims what it alone has"
    replica.kill()
    with contextlib.suppress(OSError):
        os.close(lock)
    primary.resume()
    for _ in range(5):
        increment(primary, "primary")  # the first waits for the lock to expire
    log = primary.data / "dbs" / "app.db" / "ltx"
    wait_until(lambda: len(list(log.glob("*.ltx"))) == 1, "the log is cut off")
    replica.start()
    settled(primary, replica)
    assert count(replica) == 5
    (branch,) = branches(str(replica.data), "app.db")
    assert branch.transactions == 3 and branch.path("tip.db") is not None


LARGE_BYTES = 6 << 20


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("mode", MODES)
def test_a_large_transaction(cluster: Cluster, mode: str) -> None:
    """It goes through files. One that is larger than the primary takes is refused, with a line that says so."""
    primary, replica = cluster.pair()
    begin(primary, mode)
    wait_same_position(primary, replica, "app.db")
    with pylitefs.halt(replica.mount / "app.db"), contextlib.closing(replica.connect("app.db")) as connection:
        connection.execute("insert into log values (randomblob(?), 1)", (LARGE_BYTES,))
    settled(primary, replica)
    primary.stop()
    primary.config["http"]["max-import-size"] = "4MB"
    primary.start()
    wait_until(lambda: increment(primary, "primary") is None and replica.healthy(), "they are connected again")
    wait_same_position(primary, replica, "app.db")
    with (
        pytest.raises(pylitefs.HaltLost),
        pylitefs.halt(replica.mount / "app.db"),
        contextlib.closing(replica.connect("app.db")) as connection,
    ):
        connection.execute("pragma synchronous=full")
        with pytest.raises(sqlite3.OperationalError, match="disk I/O error"):
            connection.execute("insert into log values (randomblob(?), 2)", (LARGE_BYTES,))
    assert "http.max-import-size" in replica.log_text()
    wait_until(lambda: increment(primary, "primary") is None, "the primary is written to")
    settled(primary, replica)
    with contextlib.closing(primary.connect("app.db")) as connection:
        sizes = connection.execute("select length(who) from log where n < 3 and typeof(who) = 'blob'").fetchall()
    assert sizes == [(LARGE_BYTES,)]


STOP_AND_WRITE = """
import os, signal, sqlite3, sys
os.kill(int(sys.argv[2]), signal.SIGSTOP)
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("pragma synchronous=normal")
db.execute("update counter set n = n + 1")
os._exit(0)
"""


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("by", ["library", "command"])
def test_who_has_written_under_a_lock_that_was_lost_is_told(cluster: Cluster, by: str) -> None:
    """The primary stands still, so it does not get what was committed; when it goes on it takes it."""
    primary, replica = cluster.pair()
    begin(primary)
    wait_same_position(primary, replica, "app.db")
    assert primary.process is not None
    path = str(replica.mount / "app.db")
    program = [sys.executable, "-c", STOP_AND_WRITE, path, str(primary.process.pid)]
    if by == "library":
        with pytest.raises(pylitefs.HaltLost, match="may be missing"), pylitefs.halt(path):
            subprocess.run(program, check=True, timeout=60)
    else:
        done = replica.litefs("run", "-with-halt-lock-on", path, "--", *program)
        assert done.returncode == 1 and "may be missing" in done.stderr
    primary.resume()
    wait_until(lambda: count(primary) == 1, "the primary has it")
    settled(primary, replica)
