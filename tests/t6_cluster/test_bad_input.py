"""What is wrong with the surroundings of a node gets one clear line, and nothing is changed by it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import pytest

from cluster_nodes import (
    PASSTHROUGH,
    START_S,
    Cluster,
    Node,
    assert_same_bytes,
    assert_sound,
    litefs,
    needs_root,
    wait_same_position,
    wait_until,
)
from pylitefs.filesystem import mount
from pylitefs.formats.stream import PROTOCOL_VERSION
from pylitefs.http.replication import PATH, SUBPROTOCOL

pytestmark = needs_root
NAME = "app.db"


def fill(node: Node, rows: int, name: str = NAME, mode: str = "wal") -> None:
    connection = node.connect(name)
    connection.execute(f"pragma journal_mode={mode}")
    connection.execute("create table if not exists t(id integer primary key, data)")
    for _ in range(rows):
        connection.execute("insert into t(data) values (randomblob(500))")
    connection.close()


def count(node: Node, name: str = NAME) -> int:
    connection = node.connect(name)
    try:
        assert_sound(connection)
        return int(connection.execute("select count(*) from t").fetchone()[0])
    finally:
        connection.close()


def refused(node: Node) -> str:
    """Start a node that must not start: it ends with a failure, and says why in one line, which is returned."""
    before = len(node.log_text())
    node.start(wait=False)
    assert node.process is not None
    status = node.process.wait(START_S)
    said = node.log_text()[before:]
    assert status in (1, 2), said
    errors = [line for line in said.splitlines() if not line.startswith(("pylitefs v", "level="))]
    assert len(errors) == 1 and errors[0].startswith("ERROR: "), said
    return errors[0]


# -- start ----------------------------------------------------------------------------------------------------------


def test_data_directory_and_mount_point_are_one(cluster: Cluster) -> None:
    node = cluster.node("node")
    node.config["data"]["dir"] = str(node.mount)
    assert "fuse.dir" in (error := refused(node)) and "data.dir" in error
    node.config["data"]["dir"] = str(node.mount / "inside")
    assert "fuse.dir" in (error := refused(node)) and "data.dir" in error
    assert not node.mount.exists()


def test_port_in_use(cluster: Cluster) -> None:
    node = cluster.node("node")
    with socket.create_server(("127.0.0.1", node.port)):
        assert f"cannot listen on 127.0.0.1:{node.port}" in refused(node)
    assert not node.data.exists() and not node.mount.exists()
    node.start().stop()


def test_mount_point_not_empty(cluster: Cluster) -> None:
    node = cluster.node("node")
    node.mount.mkdir()
    (node.mount / "precious").write_text("x")
    assert "is not empty" in refused(node)
    assert os.listdir(node.mount) == ["precious"] and mount.mount_at(str(node.mount)) is None
    (node.mount / "precious").unlink()
    node.start().stop()


def test_mount_point_is_a_file(cluster: Cluster) -> None:
    node = cluster.node("node")
    node.mount.write_text("x")
    assert "is not a directory" in refused(node)
    assert node.mount.read_text() == "x"


def test_a_live_daemon_has_the_mount_point_or_the_data(cluster: Cluster) -> None:
    first = cluster.node("first").start()
    fill(first, 5)
    second = cluster.node("second")
    second.config["fuse"]["dir"] = str(first.mount)
    assert "in use by a running litefs" in refused(second)
    third = cluster.node("third")
    third.config["data"]["dir"] = str(first.data)
    assert "in use by another litefs" in refused(third)
    assert first.healthy() and count(first) == 5
    first.stop()


def test_a_killed_node_starts_again(cluster: Cluster) -> None:
    """Its mount is gone soon, or dead and cleaned by the next start; nobody hangs in it."""
    node = cluster.node("node")
    node.config["lease"]["recovery-wait"] = "0s"
    node.start()
    for rows in range(5, 20, 5):
        fill(node, 5)
        node.kill()
        with contextlib.suppress(OSError):
            assert os.listdir(node.mount) == []
        node.start()
        assert count(node) == rows
    node.stop()


def test_damaged_cluster_id(cluster: Cluster) -> None:
    node = cluster.node("node")
    node.data.mkdir()
    (node.data / "clusterid").write_text("LFSCnonsense\n")
    assert "does not hold a cluster id" in refused(node)
    assert (node.data / "clusterid").read_text() == "LFSCnonsense\n"


# -- files ----------------------------------------------------------------------------------------------------------


def set_aside(node: Node, name: str) -> None:
    """The database `name` cannot be used or written; the others can, and the node runs."""
    assert "setAside" in node.log_text() and name in node.log_text()
    connection = node.connect(name)
    with pytest.raises(sqlite3.Error):
        connection.execute("create table x(a)")
    connection.close()
    fill(node, 1)


def test_a_database_directory_without_a_database(cluster: Cluster) -> None:
    """A file that is not SQLite, and one that is cut off: read-only, and left as it was; the others go on."""
    primary, replica = cluster.pair()
    fill(primary, 10)
    wait_same_position(primary, replica, NAME)
    primary.stop()
    contents = {"text.db": b"this is not SQLite\n" * 500, "cut.db": b"SQLite format 3\0" + b"\xff" * 3000}
    for name, content in contents.items():
        (primary.data / "dbs" / name / "ltx").mkdir(parents=True)
        (primary.data / "dbs" / name / "database").write_bytes(content)
    primary.start()
    for name, content in contents.items():
        set_aside(primary, name)
        assert (primary.data / "dbs" / name / "database").read_bytes() == content
    wait_same_position(primary, replica, NAME)
    assert_same_bytes([primary, replica], NAME)
    assert replica.databases() == [NAME]


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x40
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut off": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "a bit of a page": lambda path: flip(path, path.stat().st_size // 2),
    "a bit of the header": lambda path: flip(path, 9),
    "a bit of the trailer": lambda path: flip(path, path.stat().st_size - 3),
    "garbage": lambda path: path.write_bytes(random.Random(1).randbytes(5000)),
}


def wait_all_same(primary: Node, replica: Node, names: list[str], rows: int) -> None:
    for name in names:
        wait_same_position(primary, replica, name)
        assert count(primary, name) == count(replica, name) == rows, name
        assert_same_bytes([primary, replica], name)


@pytest.mark.parametrize("role", ["primary", "replica"])
def test_damaged_log(cluster: Cluster, role: str) -> None:
    """Of each database another entry of the log is damaged, in another way, while the node is down. A new replica
    asks for everything afterwards."""
    primary, replica = cluster.pair()
    names = {f"{which}-{damage}.db".replace(" ", "-"): (which, damage) for which in (0, 3, -1) for damage in DAMAGES}
    for name in names:
        for _ in range(6):
            fill(primary, 1, name)
            wait_same_position(primary, replica, name)  # an entry of its own for each
    node = primary if role == "primary" else replica
    node.kill()
    for name, (which, damage) in names.items():
        entries = sorted((node.data / "dbs" / name / "ltx").glob("*.ltx"))
        assert len(entries) >= 6
        DAMAGES[damage](entries[which])
    node.start()
    for name in names:
        wait_same_position(primary, replica, name, 8)
    wait_all_same(primary, replica, list(names), 6)
    for name in names:
        fill(primary, 2, name)
    late = cluster.node("late", primary=primary).start()
    for other in (replica, late):
        wait_all_same(primary, other, list(names), 8)


@pytest.mark.parametrize("role", ["primary", "replica"])
def test_damaged_side_files(cluster: Cluster, role: str) -> None:
    """What is beside the database is garbage after a kill: it is not believed."""
    primary, replica = cluster.pair()
    names = [f"{kind}.db" for kind in ("checksums", "wal", "shm", "journal")]
    for name in names:
        fill(primary, 10, name)
        wait_same_position(primary, replica, name)
    node = primary if role == "primary" else replica
    node.kill()
    for name in names:
        path = node.data / "dbs" / name / name.removesuffix(".db")
        if name == "checksums.db":
            flip(path, 20)
            flip(path, 4096 + 3)
        else:
            path.write_bytes(random.Random(2).randbytes(9000))
    node.start()
    for name in names:
        fill(primary, 2, name)
    wait_all_same(primary, replica, names, 12)


def test_import_and_export_of_what_is_none(cluster: Cluster, tmp_path: Path) -> None:
    primary, replica = cluster.pair()
    fill(primary, 30)
    position = wait_same_position(primary, replica, NAME)
    content = primary.export(NAME)
    torn = bytearray(content)
    torn[4096:8192] = b"\xff" * 4096
    bad = {"text": b"hello\n" * 1000, "empty": b"", "cut": content[:-4096], "torn": bytes(torn), "odd": content[:-7]}
    for kind, data in bad.items():
        path = tmp_path / f"{kind}.db"
        path.write_bytes(data)
        for name in (NAME, "new.db"):
            done = litefs("import", "-url", primary.url, "-name", name, str(path))
            assert done.returncode == 1 and done.stdout == "", kind
            assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("ERROR: "), done.stderr
    (tmp_path / "good.db").write_bytes(content)
    done = litefs("import", "-url", replica.url, "-name", NAME, str(tmp_path / "good.db"))
    assert done.returncode == 1 and "write on the primary" in done.stderr
    target = tmp_path / "target.db"
    target.write_text("old")
    done = litefs("export", "-url", primary.url, "-name", "unknown.db", str(target))
    assert (done.returncode, done.stderr) == (1, 'ERROR: database not found: "unknown.db"\n')
    assert target.read_text() == "old" and not (tmp_path / "target.db.tmp").exists()
    assert primary.databases() == replica.databases() == [NAME]
    assert primary.position(NAME) == replica.position(NAME) == position
    assert not list(primary.data.glob("transfer-*"))


@pytest.mark.parametrize("passthrough", PASSTHROUGH)
def test_cp_of_a_broken_database_stays_a_plain_file(cluster: Cluster, passthrough: str) -> None:
    """What SQLite reads is replicated, also if the last page is not whole; what it cannot read is said not to be, until
    it is put right."""
    primary, replica = cluster.pair()
    fill(primary, 30)
    wait_same_position(primary, replica, NAME)
    whole = primary.export(NAME)
    broken = whole[:-4196]
    (primary.mount / "half.db").write_bytes(broken)
    (primary.mount / "moved").write_bytes(broken[:-4096])
    os.rename(primary.mount / "moved", primary.mount / "moved.db")
    (primary.mount / "short.db").write_bytes(whole[:-100])
    (primary.mount / "text.db").write_bytes(b"hello")
    fill(primary, 1)
    wait_same_position(primary, replica, NAME)
    wait_same_position(primary, replica, "short.db")
    assert primary.databases() == replica.databases() == [NAME, "short.db"]
    assert count(primary, "short.db") == count(replica, "short.db") == 30
    assert_same_bytes([primary, replica], "short.db")
    assert (primary.mount / "half.db").read_bytes() == broken

    def told() -> dict[str, str]:
        entries = json.loads(primary.get("/status"))["notReplicated"]
        return {entry["name"]: entry["reason"] for entry in entries}

    wait_until(lambda: set(told()) == {"half.db", "moved.db"}, "what is not replicated is said")
    assert "SQLite cannot read it: the file ends after" in told()["half.db"]
    assert "half.db is not replicated: SQLite cannot read it" in primary.log_text()
    (primary.mount / "half.db").write_bytes(whole)
    wait_until(lambda: "half.db" in replica.databases(), "it is whole, and replicated")
    wait_until(lambda: set(told()) == {"moved.db"}, "and that is said")
    primary.stop()
    primary.start()
    wait_until(lambda: set(told()) == {"moved.db"}, "over a restart too")


def test_cp_of_a_database_and_its_wal_in_the_middle_of_a_checkpoint(cluster: Cluster, tmp_path: Path) -> None:
    """The file alone is not whole. SQLite reads it with its WAL, and it is replicated when SQLite has done so."""
    primary, replica = cluster.pair()
    source = tmp_path / "source.db"
    with contextlib.closing(sqlite3.connect(source, isolation_level=None)) as db:
        for sql in ("pragma journal_mode=wal", "create table t(v)", "pragma wal_checkpoint"):
            db.execute(sql)
        db.executemany("insert into t values (?)", [("x" * 900,)] * 20)
        wal, size = Path(f"{source}-wal").read_bytes(), source.stat().st_size
        db.execute("pragma wal_checkpoint")
        (primary.mount / NAME).write_bytes(source.read_bytes()[:size])
        (primary.mount / f"{NAME}-wal").write_bytes(wal)

    def told() -> str:
        entries = json.loads(primary.get("/status"))["notReplicated"]
        return " ".join(entry["reason"] for entry in entries)

    wait_until(lambda: "its -wal may hold the rest: open it with SQLite once" in told(), "it is said")
    with contextlib.closing(primary.connect(NAME)) as db:
        assert db.execute("select count(*) from t").fetchone() == (20,)
    wait_until(lambda: NAME in replica.databases(), "it is replicated")
    wait_same_position(primary, replica, NAME)
    assert count(replica) == 20
    wait_until(lambda: not told(), "that is not said any more")


# -- peers ----------------------------------------------------------------------------------------------------------


def test_another_cluster(cluster: Cluster) -> None:
    """A replica that belongs elsewhere is refused, keeps its data, and serves it."""
    primary, replica = cluster.pair()
    fill(primary, 10)
    wait_same_position(primary, replica, NAME)
    other = cluster.node("other").start()
    fill(other, 3, "other.db")
    replica.stop()
    before = replica.data / "dbs" / NAME / "database"
    content = before.read_bytes()
    replica.config["lease"]["advertise-url"] = other.url
    replica.start(wait=False)
    wait_until(lambda: "cluster" in replica.log_text().split("stopping")[-1], "the replica says why")
    wait_until(lambda: replica.databases() == [NAME], "it is mounted")
    assert not replica.healthy()
    assert count(replica) == 10
    replica.remove()
    assert before.read_bytes() == content
    assert other.databases() == ["other.db"]
    replica.config["lease"]["advertise-url"] = primary.url
    fill(primary, 1)
    replica.start()
    wait_same_position(primary, replica, NAME)
    assert_same_bytes([primary, replica], NAME)


async def say(node: Node, *frames: bytes | str) -> int | None:
    """Send frames as a replica would; the close code of the connection."""
    timeout = aiohttp.ClientTimeout(total=20)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.ws_connect(node.url + PATH, protocols=(SUBPROTOCOL,), autoclose=True) as link,
    ):
        for frame in frames:
            with contextlib.suppress(ConnectionError):
                await (link.send_str(frame) if isinstance(frame, str) else link.send_bytes(frame))
        async with asyncio.timeout(15):
            while not link.closed:
                await link.receive()
        return link.close_code


def raw(node: Node, data: bytes) -> None:
    """Send bytes that are not HTTP; the node closes the connection."""
    with socket.create_connection(("127.0.0.1", node.port), timeout=15) as peer, contextlib.suppress(ConnectionError):
        peer.sendall(data)
        peer.shutdown(socket.SHUT_WR)
        while peer.recv(65536):
            pass


def test_garbage_from_peers(cluster: Cluster) -> None:
    """At the replication endpoint and below HTTP; meanwhile the real replica goes on."""
    primary, replica = cluster.pair()
    fill(primary, 10)
    wait_same_position(primary, replica, NAME)
    generator = random.Random(3)
    hello = bytes([1]) + (PROTOCOL_VERSION + 1).to_bytes(2, "big")
    talks: list[tuple[bytes | str, ...]] = [
        (b"",), ("text",), (b"\0" * 100,), (hello,), (hello, generator.randbytes(3000)), (b"\xff" * 500_000,),
        *((generator.randbytes(generator.randrange(1, 400)),) for _ in range(8)),
        *((bytes([code]) + generator.randbytes(60),) for code in range(8)),
    ]  # fmt: skip
    for talk in talks:
        asyncio.run(say(primary, *talk))
    for data in (b"\0\xff" * 5000, b"A" * 300_000, b"GET / HTTP/9.9", b"POST /import HTTP/1.1\r\nContent-Length: x"):
        raw(primary, data + b"\r\n\r\n")
    fill(primary, 5)
    wait_same_position(primary, replica, NAME)
    assert primary.healthy() and replica.healthy()
    assert count(replica) == 15
    assert "Traceback" not in primary.log_text()


class BadPrimary:
    """A server at which a replica finds something that is no primary: it answers each connection with `answer`."""

    def __init__(self, port: int, answer: bytes) -> None:
        self._server = socket.create_server(("127.0.0.1", port))
        self._server.settimeout(0.2)
        self._answer = answer
        self.calls = 0

    def serve(self, calls: int) -> None:
        deadline_s = time.monotonic() + START_S
        while self.calls < calls and time.monotonic() < deadline_s:
            with contextlib.suppress(TimeoutError):
                peer, _ = self._server.accept()
                with peer, contextlib.suppress(OSError):
                    peer.settimeout(5)
                    peer.recv(65536)
                    peer.sendall(self._answer)
                    self.calls += 1
        self._server.close()
        assert self.calls >= calls, "the replica did not try again"


@pytest.mark.parametrize(
    "answer", [b"\xff" * 4000, b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", b"HTTP/1.1 404 No\r\n\r\n", b""]
)
def test_a_primary_that_is_none(cluster: Cluster, answer: bytes) -> None:
    primary, replica = cluster.pair()
    fill(primary, 10)
    wait_same_position(primary, replica, NAME)
    primary.stop()
    BadPrimary(primary.port, answer).serve(2)
    assert count(replica) == 10
    assert not replica.healthy()
    primary.start()
    fill(primary, 1)
    wait_same_position(primary, replica, NAME)
    assert_same_bytes([primary, replica], NAME)
    assert "Traceback" not in replica.log_text()


# -- disk full ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[None]:
    """A file system of that size at `path`; what fills it is a file "ballast" on it."""
    path.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], check=True, timeout=10)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True, timeout=10)


def use_up(path: Path, leave_bytes: int) -> Path:
    ballast = path / "ballast"
    free = shutil.disk_usage(path).free - leave_bytes
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, free)
    return ballast


def insert_until_full(node: Node, connection: sqlite3.Connection) -> int:
    """Rows that were acknowledged before, if ever, an insert failed."""
    done = 0
    for _ in range(400):
        try:
            connection.execute("insert into t(data) values (randomblob(3000))")
        except sqlite3.OperationalError as error:
            assert "full" in str(error) or "I/O" in str(error), error
            if connection.in_transaction:
                connection.execute("rollback")
            return done
        done += 1
    return done


@pytest.mark.parametrize("mode", ["wal", "delete"])
@pytest.mark.parametrize("passthrough", PASSTHROUGH)
def test_primary_disk_full(cluster: Cluster, passthrough: str, mode: str) -> None:
    """Writers get an error, what was acknowledged stays, and with room again everything goes on by itself."""
    primary = cluster.node("primary")
    with small_disk(primary.data, "8M"):
        try:
            primary.start()
            replica = cluster.node("replica", primary=primary).start()
            fill(primary, 10, mode=mode)
            wait_same_position(primary, replica, NAME)
            ballast = use_up(primary.data, 200_000)
            connection = primary.connect(NAME)
            done = insert_until_full(primary, connection)
            assert done < 400, "the disk was never full"
            assert connection.execute("select count(*) from t").fetchone()[0] >= 10 + done
            ballast.unlink()
            connection.execute("insert into t(data) values ('room again')")
            (rows,) = connection.execute("select count(*) from t").fetchone()
            assert rows >= 11 + done
            wait_same_position(primary, replica, NAME)
            assert count(primary) == count(replica) == rows
            assert_same_bytes([primary, replica], NAME)
            connection.close()
        finally:
            primary.remove()


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_replica_disk_full(cluster: Cluster, mode: str) -> None:
    """The primary does not notice; the replica catches up when there is room, and serves what it has until then."""
    primary = cluster.node("primary").start()
    replica = cluster.node("replica", primary=primary)
    with small_disk(replica.data, "8M"):
        try:
            replica.start()
            fill(primary, 10, mode=mode)
            before = wait_same_position(primary, replica, NAME)
            ballast = use_up(replica.data, 200_000)
            connection = primary.connect(NAME)
            assert insert_until_full(primary, connection) == 400
            wait_until(lambda: "diskFull" in replica.log_text(), "the replica says so")
            assert replica.position(NAME) >= before
            assert 10 <= count(replica) < 410
            ballast.unlink()
            wait_same_position(primary, replica, NAME)
            assert count(replica) == 410
            assert_same_bytes([primary, replica], NAME)
            connection.close()
        finally:
            replica.remove()
