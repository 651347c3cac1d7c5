"""More of everything than usual: peers that are too slow, many replicas, large databases."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import filecmp
import json
import logging
import os
import random
import shutil
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from aiohttp import web

from cluster_nodes import (
    SCALE,
    START_S,
    Cluster,
    Node,
    assert_same_bytes,
    assert_sound,
    needs_root,
    scaled,
    wait_same_position,
    wait_until,
)
from pylitefs.cluster import outlet
from pylitefs.cluster.channel import Timings
from pylitefs.cluster.primary import Replicas
from pylitefs.cluster.roles import NodeIdentity
from pylitefs.formats.stream import PROTOCOL_VERSION, Databases, Heartbeat, Hello, pack
from pylitefs.http.replication import PATH, SUBPROTOCOL, handler

sys.path.append(str(Path(__file__).parent.parent / "t4_simulation"))
from real_nodes import Application, open_store


class SlowPeer:
    """A replica, byte for byte, on a bare socket: it says what it is told to say, and reads nothing but the answer to
    the handshake."""

    def __init__(self, port: int, cluster_id: str, node_id: int) -> None:
        self.messages = [
            pack(Hello(PROTOCOL_VERSION, cluster_id, node_id, f"slow-{node_id}")),
            pack(Databases(True, ())),
        ]
        self.closed = threading.Event()
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.settimeout(20)
        self.socket.connect(("127.0.0.1", port))
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall(
            f"GET {PATH} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n"
            f"Sec-WebSocket-Protocol: {SUBPROTOCOL}\r\n\r\n".encode()
        )
        head = b""
        while b"\r\n\r\n" not in head:
            head += self._some(1)
        assert head.startswith(b"HTTP/1.1 101 ")

    def _some(self, size: int) -> bytes:
        data = self.socket.recv(size)
        assert data, "the primary has closed the connection"
        return data

    def join(self) -> None:
        for message in self.messages:
            self.socket.sendall(frame(message))
        self._some(2)  # of WELCOME

    def heartbeat(self) -> None:
        self.socket.sendall(frame(pack(Heartbeat(int(time.time() * 1000)))))

    def beat_until_cut_off(self) -> bool:
        """Or until it is closed here; False if nothing happens for long."""
        until_s = time.monotonic() + START_S
        with contextlib.suppress(ConnectionError):
            while not self.closed.is_set():
                self.heartbeat()
                time.sleep(0.05)
                if time.monotonic() > until_s:
                    return False
        return True

    def drip_until_cut_off(self, data: bytes) -> None:
        """Send byte by byte."""
        with contextlib.suppress(ConnectionError):
            for at in range(len(data)):
                self.socket.sendall(data[at : at + 1])
                time.sleep(0.05)
            raise AssertionError("all of it was taken")

    def close(self) -> None:
        self.closed.set()
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def frame(message: bytes) -> bytes:
    """A masked binary WebSocket frame (RFC 6455, 5.2); a mask of zeros changes nothing."""
    if len(message) < 126:
        return bytes([0x82, 0x80 | len(message)]) + bytes(4) + message
    return bytes([0x82, 0x80 | 126]) + struct.pack(">H", len(message)) + bytes(4) + message


# --- peers that do not read ------------------------------------------------------------------------------------------


def memory_mib(node: Node) -> float:
    assert node.process is not None
    with open(f"/proc/{node.process.pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


@needs_root
def test_replicas_that_do_not_read_cost_little(cluster: Cluster) -> None:
    """Transactions of 200 KB in each of 40 databases wait for five such replicas: they wait on the disk. The writer and
    the real replica go on; the one that does not even send is cut off after the deadline."""
    primary, replica = cluster.pair()
    names = [f"{number}.db" for number in range(40)]
    writers = [primary.connect(name) for name in names]
    for writer in writers:
        writer.execute("pragma journal_mode=wal")
        writer.execute("create table t(id integer primary key, data)")

    def write(rounds: int) -> None:
        for _ in range(rounds):
            for writer in writers:
                writer.execute("insert into t(data) values (randomblob(200000))")
        for name in names:
            wait_same_position(primary, replica, name)

    write(1)
    before = memory_mib(primary)
    cluster_id = primary.info()["clusterID"]
    peers = [SlowPeer(primary.port, cluster_id, 100 + number) for number in range(5)]
    for peer in peers:
        peer.join()
    beating = [threading.Thread(target=peer.beat_until_cut_off, daemon=True) for peer in peers[1:]]
    for thread in beating:
        thread.start()
    write(2)
    wait_until(lambda: "nothing was heard for 5 s" in primary.log_text(), "the silent one is cut off")
    assert peers[0].beat_until_cut_off(), "its connection is still open"
    write(1)
    grown = memory_mib(primary) - before
    for peer in peers:
        peer.close()
    for writer in writers:
        writer.close()
    complaints = [line for line in primary.log_text().splitlines() if "event=replicaLost" in line]
    assert [line for line in complaints if "nothing was heard" in line] == complaints[:1]
    assert grown < 5 * 8, f"{grown:.0f} MiB; all of it would be {5 * 40 * 0.2:.0f} MiB more"


FAST = Timings(heartbeat_s=0.05, deadline_s=2.0, handshake_s=2.0, close_s=0.2, durable_s=0.05)


class ServingPrimary:
    """A primary with the real engine behind a real socket, on a thread of its own; nothing is mounted."""

    def __init__(self, folder: Path) -> None:
        self.store = open_store(folder, is_primary=True)
        self.port = 0
        self.replicas: Replicas
        self._ready = threading.Event()
        self._stop: Callable[[], object] = lambda: None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    async def _serve(self) -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._stop = lambda: loop.call_soon_threadsafe(stop.set)
        async with Replicas(self.store, NodeIdentity(1, "db1"), timings=FAST) as self.replicas:
            app = web.Application()
            app.router.add_get(PATH, handler(self.replicas.serve))
            runner = web.AppRunner(app)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.port = runner.addresses[0][1]
            self._ready.set()
            await stop.wait()
            await runner.cleanup()

    def __enter__(self) -> ServingPrimary:
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()
        self._thread.join(20)
        self.store.close(clean=True)

    def peer(self, node_id: int = 9) -> SlowPeer:
        return SlowPeer(self.port, self.store.cluster_id or "", node_id)


@pytest.fixture
def primary(tmp_path: Path) -> Iterator[ServingPrimary]:
    with ServingPrimary(tmp_path) as serving:
        yield serving


def ends_of(primary: ServingPrimary) -> list[str]:
    """Why replicas that had joined left, as the primary's events say from now on."""
    ends: list[str] = []
    primary.store.events.subscribe(
        lambda event: ends.append(str(event.data["reason"])) if event.type == "replicaLost" else None
    )
    return ends


def test_a_replica_that_reads_nothing_is_cut_off(primary: ServingPrimary, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if its heartbeats say that it is alive; the log that its snapshot held on to can be shortened again."""
    ends = ends_of(primary)
    monkeypatch.setattr(outlet, "STALL_S", 0.5)
    app = Application(primary.store, "a.db")
    app.insert(12_000_000)
    app.insert()
    app.database.log.retain(0, 1)
    peer = primary.peer()
    peer.join()
    beating = threading.Thread(target=peer.beat_until_cut_off)
    beating.start()
    wait_until(lambda: app.database.log._pins, "its snapshot has begun")
    app.insert()
    app.insert()
    beating.join()
    assert peer.beat_until_cut_off(), "its connection is still open"
    wait_until(lambda: not primary.replicas.sessions and not app.database.log._pins, "the session has ended")
    app.database.log.retain(0, 1)
    assert app.database.log.count == 1
    assert ends == ["too slow: it has not taken what was sent for 0.5 s"]
    peer.close()


@pytest.mark.parametrize("joined", [False, True])
def test_a_replica_that_sends_byte_by_byte_is_cut_off(
    primary: ServingPrimary, joined: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "litefs.replication")
    ends = ends_of(primary)  # of who had joined; of others only the log tells
    peer = primary.peer()
    if joined:
        peer.join()
    peer.drip_until_cut_off(frame(peer.messages[0]) * 100)
    wait_until(lambda: (ends or caplog.records) and not primary.replicas.sessions, "the session has ended")
    told = [record.getMessage().split(": ", 1)[1] for record in caplog.records]
    assert (ends, told) == (["nothing was heard for 2 s"], []) if joined else ([], ["no handshake within 2 s"])
    peer.close()


# --- snapshots of what is being written ------------------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize(("passthrough", "mode"), [("auto", "delete"), ("off", "memory")])
def test_a_snapshot_waits_for_a_transaction_in_the_file(cluster: Cluster, passthrough: str, mode: str) -> None:
    """A transaction that has written pages early stays open while a replica joins: the replica gets the other
    database at once, and this one when the transaction has ended."""
    primary = cluster.node("primary").start()
    for name in ("open.db", "other.db"):
        writer = primary.connect(name)
        writer.execute(f"pragma journal_mode={mode}")
        writer.execute("create table t(id integer primary key, data)")
        writer.execute("insert into t(data) values (randomblob(300000))")
        for _ in range(5):  # now a snapshot is less than the log
            writer.execute("update t set data = randomblob(300000)")
        writer.close()
    writer = primary.connect("open.db")
    writer.execute("pragma cache_size=5")
    if mode == "memory":
        writer.execute("pragma journal_mode=memory")
    before = primary.data.joinpath("dbs/open.db/database").read_bytes()
    writer.execute("begin")
    writer.execute("update t set data = randomblob(300000)")
    assert primary.data.joinpath("dbs/open.db/database").read_bytes() != before, "nothing was written early"
    replica = cluster.node("replica", primary=primary).start(wait=False)
    wait_until(lambda: "other.db" in replica.databases(), "the other database is there")
    wait_same_position(primary, replica, "other.db")
    assert "open.db" not in replica.databases() and "ready role" not in replica.log_text()
    time.sleep(3)  # longer than a page that does not match its checksum is looked at again
    writer.execute("commit")
    wait_until(lambda: "ready role" in replica.log_text(), "the replica has everything")
    wait_same_position(primary, replica, "open.db")
    assert_same_bytes([primary, replica], "open.db")
    assert "level=ERROR" not in primary.log_text()
    writer.close()


# --- many replicas ---------------------------------------------------------------------------------------------------


class Writers(threading.Thread):
    """One application that writes four databases until it is stopped, at a pace that leaves room for others."""

    MODES = ("wal", "delete", "wal", "persist")

    def __init__(self, primary: Node, seed: int) -> None:
        super().__init__(daemon=True)
        self.names = [f"{number}-{mode}.db" for number, mode in enumerate(self.MODES)]
        self.commits = 0
        self.problem: Exception | None = None
        self._rng = random.Random(seed)
        self._halt = threading.Event()
        self._connections = [primary.connect(name) for name in self.names]
        for connection, mode in zip(self._connections, self.MODES, strict=True):
            connection.execute(f"pragma journal_mode={mode}")
            connection.execute("pragma wal_autocheckpoint=100")
            connection.execute("create table t(id integer primary key, data)")

    def run(self) -> None:
        try:
            while not self._halt.is_set():
                self._transaction(self._rng.choice(self._connections))
                self.commits += 1
                time.sleep(0.005)
        except Exception as error:
            self.problem = error

    def _transaction(self, connection: sqlite3.Connection) -> None:
        connection.execute("begin immediate")
        match self._rng.randrange(10):
            case 0:
                connection.execute("delete from t where id % 4 = ?", (self._rng.randrange(4),))
            case 1:
                connection.execute("update t set data = randomblob(500) where id % 7 = ?", (self._rng.randrange(7),))
            case 2:
                connection.execute("insert into t(data) values (randomblob(600000))")
            case _:
                connection.execute("insert into t(data) values (randomblob(?))", (self._rng.randrange(3000),))
        connection.execute("commit")

    def stop(self) -> None:
        self._halt.set()
        self.join(20)
        assert not self.is_alive(), "the writer hangs"
        for connection in self._connections:
            connection.close()
        assert self.problem is None, self.problem


@needs_root
def test_eight_replicas_come_and_go_while_a_writer_runs(cluster: Cluster) -> None:
    """By seed: they start, stop, are killed and are paused; in the end all eight have the primary's bytes."""
    seed = int(os.environ.get("PYLITEFS_TEST_SEED", "1"))
    print(f"PYLITEFS_TEST_SEED={seed}")
    rng = random.Random(seed)
    primary = cluster.node("primary")
    primary.config["data"]["max-log-size"] = "2M"  # who was away for long gets the pages that differ
    primary.start()
    replicas = [cluster.node(f"replica-{number}", primary=primary) for number in range(8)]
    running: list[Node] = []
    writers = Writers(primary, seed)
    writers.start()

    def more_commits(count: int) -> None:
        goal = writers.commits + count
        wait_until(lambda: writers.commits >= goal or writers.problem, "commits go on")

    for replica in replicas[:4]:
        running.append(replica.start(wait=False))
    for _ in range(scaled(12)):
        more_commits(rng.randrange(5, 60))
        waiting = [replica for replica in replicas if replica not in running]
        node = rng.choice(running) if running else None
        match rng.randrange(6):
            case 0 if node is not None:
                wait_until(node.healthy, f"{node.name} is ready")
                node.stop()
                running.remove(node)
            case 1 if node is not None:
                wait_until(node.healthy, f"{node.name} is ready")
                node.kill()
                running.remove(node)
            case 2 if node is not None:
                node.pause()
                more_commits(30)
                node.resume()
            case _ if waiting:
                running.append(rng.choice(waiting).start(wait=False))
    for replica in replicas:
        if replica not in running:
            replica.start(wait=False)
    for replica in replicas:
        wait_until(replica.healthy, f"{replica.name} is ready")
    more_commits(20)
    writers.stop()
    for name in writers.names:
        for replica in replicas:
            wait_same_position(primary, replica, name)
        content = assert_same_bytes([primary, *replicas], name)
        copy = cluster.base / "copy.db"
        copy.write_bytes(content)
        with contextlib.closing(sqlite3.connect(copy)) as connection:
            assert_sound(connection)
    assert len(json.loads(primary.get("/status"))["replicas"]) == 8
    for node in (primary, *replicas):
        assert "level=ERROR" not in node.log_text() and "Traceback" not in node.log_text()


# --- transactions over two databases ---------------------------------------------------------------------------------

ATTACHED = ("a.db", "b.db")
WRITER = """
import sqlite3, sys
first, second, mode = sys.argv[1:]
c = sqlite3.connect(first, timeout=20, isolation_level=None)
c.execute("attach ? as other", (second,))
for schema in ("main", "other"):
    c.execute(f"pragma {schema}.journal_mode={mode}")
    c.execute(f"pragma {schema}.cache_size=5")
while True:
    c.execute("begin immediate")
    for schema in ("main", "other"):
        c.execute(f"update {schema}.counter set n = n + 1")
        c.execute(f"delete from {schema}.t where id % 5 = abs(random()) % 5")
        c.execute(f"insert into {schema}.t(data) values (randomblob(abs(random()) % 20000))")
    c.execute("commit")
    print(c.execute("select n from main.counter").fetchone()[0], flush=True)
"""


def create_attached(primary: Node, mode: str) -> None:
    for name in ATTACHED:
        connection = primary.connect(name)
        connection.execute(f"pragma journal_mode={mode}")
        connection.execute("create table t(id integer primary key, data)")
        connection.execute("create table counter(n)")
        connection.execute("insert into counter values (0)")
        connection.close()


def counters(node: Node) -> list[int]:
    found = []
    for name in ATTACHED:
        connection = node.connect(name)
        assert_sound(connection)
        found.append(connection.execute("select n from counter").fetchone()[0])
        connection.close()
    return found


@needs_root
@pytest.mark.parametrize(("passthrough", "mode"), [("auto", "delete"), ("auto", "persist"), ("off", "truncate")])
def test_kill9_within_transactions_over_two_databases(cluster: Cluster, passthrough: str, mode: str) -> None:
    """Of the daemon, and of the application: both databases have each transaction or neither, here and there."""
    primary, replica = cluster.pair()
    create_attached(primary, mode)
    arguments = [sys.executable, "-c", WRITER, *(str(primary.mount / name) for name in ATTACHED), mode]
    acknowledged = 0
    for kill_application in (False, True) * scaled(2):
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(7):
                line = writer.stdout.readline()
                assert line, writer.stderr and writer.stderr.read()
                acknowledged = int(line)
            (writer if kill_application else primary).kill()
            acknowledged = max([acknowledged, *map(int, writer.stdout.read().split())])
            writer.kill()
        if not kill_application:
            primary.start()
        first, second = counters(primary)
        assert first == second and acknowledged <= first <= acknowledged + 1
        for name in ATTACHED:
            wait_same_position(primary, replica, name)
            assert_same_bytes([primary, replica], name)
        assert counters(replica) == [first, second]


@needs_root
@pytest.mark.parametrize("mode", ["delete", "truncate", "persist"])
def test_a_transaction_over_two_databases_is_one_of_each(cluster: Cluster, mode: str) -> None:
    """In PERSIST mode the end of an old, longer journal is cut off before the commit. That is no commit."""
    primary, replica = cluster.pair()
    create_attached(primary, mode)
    connection = primary.connect(ATTACHED[0])
    connection.execute("attach ? as other", (str(primary.mount / ATTACHED[1]),))
    for schema in ("main", "other"):
        connection.execute(f"pragma {schema}.journal_mode={mode}")
        connection.execute(f"insert into {schema}.t(data) values (zeroblob(1000))")
        for _ in range(8):
            connection.execute(f"insert into {schema}.t(data) select data from {schema}.t")
        connection.execute(f"pragma {schema}.cache_size=5")
    for _ in range(3):
        for schema in ("main", "other"):
            connection.execute(f"update {schema}.t set data = randomblob(1000)")  # a long journal
        before = [int(primary.position(name).split("/")[0], 16) for name in ATTACHED]
        connection.execute("begin")
        for schema in ("main", "other"):
            connection.execute(f"update {schema}.t set data = randomblob(1000) where id > 128")
            connection.execute(f"update {schema}.counter set n = n + 1")
        connection.execute("commit")
        after = [int(primary.position(name).split("/")[0], 16) for name in ATTACHED]
        assert after == [txid + 1 for txid in before]
    connection.close()
    for name in ATTACHED:
        wait_same_position(primary, replica, name)
        assert_same_bytes([primary, replica], name)


# --- databases above 1 GiB -------------------------------------------------------------------------------------------

GIB = 1 << 30
LARGE = "large.db"
SLOW_DISK_S = 150.0  # some 5 GB are written


@needs_root
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("mode", "late"), [("delete", False), ("delete", True), ("wal", True)])
def test_a_database_above_1_gib(cluster: Cluster, mode: str, late: bool) -> None:
    """The lock page at 1 GiB, which SQLite never uses, is neither in the log nor missed in a copy: in one large
    transaction, in small ones, in a snapshot. Zeros compress well, so that the log stays small."""
    if late and SCALE < 2:
        pytest.skip("takes half a minute; PYLITEFS_TEST_SCALE=2 runs it too")
    if shutil.disk_usage(cluster.base).free < 10 * GIB:
        pytest.skip("needs 10 GiB of disk")
    primary = cluster.node("primary")
    primary.config["data"] |= {"max-log-size": "1M", "retention-monitor-interval": "500ms"}
    primary.start()
    replica = cluster.node("replica", primary=primary).start()
    connection = primary.connect(LARGE)
    connection.execute("pragma page_size=65536")
    connection.execute(f"pragma journal_mode={mode}")
    connection.execute("create table t(id integer primary key, data)")
    wait_same_position(primary, replica, LARGE)
    connection.execute("begin")
    for _ in range(11):
        connection.execute("insert into t(data) values (zeroblob(98000000))")
    connection.execute("commit")
    assert connection.execute("pragma page_count").fetchone()[0] > GIB // 65536
    for _ in range(4):
        connection.execute("insert into t(data) values (randomblob(300000))")
    wait_same_position(primary, replica, LARGE, SLOW_DISK_S)
    connection.execute("update t set data = randomblob(400000) where id > 11")
    connection.close()
    nodes = [primary, replica]
    if late:
        wait_until(lambda: len(list((primary.data / "dbs" / LARGE / "ltx").glob("*.ltx"))) < 3, "the log is cut")
        nodes.append(cluster.node("late", primary=primary).start())
    for node in nodes[1:]:
        wait_same_position(primary, node, LARGE, SLOW_DISK_S)
        reader = node.connect(LARGE)
        assert_sound(reader)
        found = reader.execute("select count(*), sum(length(data)) from t").fetchone()
        assert found == (15, 11 * 98_000_000 + 4 * 400_000)
        reader.close()
    for node in reversed(nodes):
        assert "level=ERROR" not in node.log_text()
        node.stop()
    files = [node.data / "dbs" / LARGE / "database" for node in nodes]
    assert files[0].stat().st_size > GIB
    for path in files:
        assert not path.with_name("wal").exists()
        assert filecmp.cmp(files[0], path, shallow=False)
    for node in nodes:
        shutil.rmtree(node.data)
