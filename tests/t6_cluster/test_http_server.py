"""The HTTP server over real connections, with a store made of plain SQLite files."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from fake_store import CLUSTER_ID, FakeStore, make_database, node_info

from pylitefs import errors
from pylitefs.formats.ltx.format import CHECKSUM_FLAG, Position
from pylitefs.formats.names import MAX_NAME
from pylitefs.http import server as http_server
from pylitefs.http.server import HttpServer, Route, build_app, listen
from pylitefs.http.waiting import Waiting
from pylitefs.status import ReplicaInfo, ReplicaProgress

TIMEOUT = aiohttp.ClientTimeout(total=30)


@dataclass(frozen=True)
class HttpSettings:
    max_import_size_bytes: int = 0


@dataclass
class Node:
    store: FakeStore
    server: HttpServer
    port: int
    http: aiohttp.ClientSession

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    async def get(self, path: str, **params: str) -> tuple[int, bytes, Any]:
        async with self.http.get(self.url(path), params=params) as response:
            return response.status, await response.read(), response.headers

    async def post(self, path: str, data: object, **params: str) -> tuple[int, str]:
        async with self.http.post(self.url(path), params=params, data=data) as response:
            return response.status, await response.text()


@asynccontextmanager
async def running(
    store: FakeStore, *routes: Route, max_import_size_bytes: int = 0, **node: object
) -> AsyncIterator[Node]:
    settings = HttpSettings(max_import_size_bytes)
    app = build_app(store, store.list_replicas, settings, node_info(**node), store.import_database, routes)
    sock = listen("127.0.0.1", 0)
    server = HttpServer(app, shutdown_timeout_s=1)
    await server.start(sock)
    async with aiohttp.ClientSession(timeout=TIMEOUT) as session:
        try:
            yield Node(store, server, sock.getsockname()[1], session)
        finally:
            await server.close()


@pytest.fixture
def store(tmp_path: Path) -> FakeStore:
    return FakeStore(tmp_path)


def play(store: FakeStore, scenario: Callable[[Node], Awaitable[None]], *routes: Route, **options: Any) -> None:
    async def go() -> None:
        async with running(store, *routes, **options) as node:
            await scenario(node)

    asyncio.run(go())
    assert store.events.subscriber_count == 0  # the server unsubscribes whatever it subscribed
    assert not [name for name in os.listdir(store.data_dir) if name.startswith("transfer-")]


# --- documents -------------------------------------------------------------------------------------------------------


def test_info_has_litefs_keys_and_ours(store: FakeStore) -> None:
    store.add("app.db")

    async def scenario(node: Node) -> None:
        status, body, headers = await node.get("/info")
        info = json.loads(body)
        assert status == 200
        assert {key: info[key] for key in ("clusterID", "isPrimary", "candidate", "path")} == {
            "clusterID": CLUSTER_ID,
            "isPrimary": True,
            "candidate": True,
            "path": "/litefs",
        }
        assert "primary" not in info
        assert info["nodeID"] == "00112233AABBCCDD"
        assert info["databases"] == {"app.db": {"txid": "0000000000000001", "checksum": "8000000000000001"}}
        assert body.startswith(b'{\n  "clusterID"') and body.endswith(b"}\n")
        assert headers["Litefs-Id"] == "00112233AABBCCDD"
        assert headers["Litefs-Cluster-Id"] == CLUSTER_ID
        assert store.flushes == 1  # the positions are a barrier

    play(store, scenario)


def test_info_on_a_replica_names_the_primary(tmp_path: Path) -> None:
    store = FakeStore(tmp_path, is_primary=False)
    store.cluster_id = None

    async def scenario(node: Node) -> None:
        _, body, headers = await node.get("/info")
        info = json.loads(body)
        assert info["isPrimary"] is False
        assert info["primary"] == {"hostname": "db1"}
        assert "clusterID" not in info
        assert "Litefs-Cluster-Id" not in headers

    play(store, scenario, candidate=False)


def test_a_barrier_that_does_not_come_is_503(store: FakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "BARRIER_TIMEOUT_S", 0.05)
    store.flush_result = Future()

    async def scenario(node: Node) -> None:
        status, body, _ = await node.get("/info")
        assert status == 503
        assert b"busy" in body
        assert (await node.get("/healthz"))[0] == 200

    play(store, scenario)


def test_status_counts_the_lag_of_replicas(store: FakeStore) -> None:
    store.add("a.db").position = Position(10, CHECKSUM_FLAG | 5)
    store.add("b.db").position = Position(4, CHECKSUM_FLAG | 6)
    store.replicas = [
        ReplicaInfo("AA", "10.0.0.2:4711", "live", 0.5, "db2", {"a.db": ReplicaProgress(9, 8, 7)}),
    ]

    async def scenario(node: Node) -> None:
        document = json.loads((await node.get("/status"))[1])
        assert document["node"]["role"] == "primary"
        assert document["primary"] is None
        assert [database["name"] for database in document["databases"]] == ["a.db", "b.db"]
        assert document["databases"][0]["timestamp"] == "2023-11-14T22:13:20.12Z"
        (replica,) = document["replicas"]
        assert replica["lagTXIDs"] == (10 - 8) + 4  # all of b.db, which it has not got yet
        assert replica["databases"]["a.db"] == {
            "received": f"{9:016x}",
            "applied": f"{8:016x}",
            "durable": f"{7:016x}",
        }

    play(store, scenario)


def test_healthz_tells_why_not(store: FakeStore) -> None:
    async def scenario(node: Node) -> None:
        assert (await node.get("/healthz"))[:2] == (503, b"waiting for the primary\n")

    play(store, scenario, unhealthy=lambda: "waiting for\nthe primary")


def test_metrics(store: FakeStore) -> None:
    store.add("app.db")
    store.replicas = [ReplicaInfo("AA", "10.0.0.2:4711", "live", 2.0, "db2", {"app.db": ReplicaProgress(1, 1, 1)})]

    async def scenario(node: Node) -> None:
        store.commit("app.db", 2)
        store.commit("app.db", 3)
        status, body, headers = await node.get("/metrics")
        assert status == 200
        assert headers["Content-Type"].startswith("text/plain")
        lines = set(body.decode().splitlines())
        assert lines >= {
            "litefs_db_count 1.0",
            "litefs_is_primary 1.0",
            "litefs_lag_seconds 0.0",
            'litefs_db_txid{db="app.db"} 3.0',
            'litefs_db_commit_count{db="app.db"} 2.0',
            'litefs_db_ltx_count{db="app.db"} 3.0',
            'litefs_db_ltx_bytes{db="app.db"} 4096.0',
            "litefs_http_stream_count 1.0",
            "litefs_log_written_bytes_total 1000.0",
            "litefs_batch_transactions_count 2.0",
            "litefs_capture_seconds_count 2.0",
            "litefs_apply_seconds_count 0.0",
            'litefs_replica_lag_seconds{replica="AA"} 0.002',
            'litefs_replica_lag_txids{replica="AA"} 2.0',
            'litefs_events_total{type="tx"} 2.0',
        }

    play(store, scenario)


# --- events ----------------------------------------------------------------------------------------------------------


def test_events_are_lines_as_litefs_has_them(store: FakeStore) -> None:
    store.add("app.db")

    async def scenario(node: Node) -> None:
        async with node.http.get(node.url("/events")) as response:
            assert response.headers["Content-Type"] == "application/json"
            assert json.loads(await response.content.readline()) == {"type": "init", "data": {"isPrimary": True}}
            store.commit("app.db", 0x2A)
            event = json.loads(await response.content.readline())
            assert event["type"] == "tx"
            assert event["db"] == "app.db"
            assert {key: event["data"][key] for key in ("txID", "postApplyChecksum", "pageSize", "commit")} == {
                "txID": "000000000000002a",
                "postApplyChecksum": "800000000000002a",
                "pageSize": 4096,
                "commit": 2,
            }
            assert event["data"]["timestamp"] == "2023-11-14T22:13:20.12Z"

    play(store, scenario)


def test_a_slow_consumer_of_events_is_cut_off(store: FakeStore) -> None:
    store.add("app.db")

    async def scenario(node: Node) -> None:
        async with node.http.get(node.url("/events")) as response:
            await response.content.readline()
            for txid in range(2, 3 + http_server.EventStream(store.events)._limit):
                store.commit("app.db", txid)  # more than fit, without giving the loop a chance
            with pytest.raises(aiohttp.ClientError):
                while await response.content.readline():
                    pass
        assert (await node.get("/healthz"))[0] == 200

    play(store, scenario)


def test_open_event_streams_end_with_the_server(store: FakeStore) -> None:
    async def scenario(node: Node) -> None:
        async with node.http.get(node.url("/events")) as response:
            await response.content.readline()
            await node.server.close()
            assert await response.content.read() == b""

    play(store, scenario)


# --- export and import -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_primary", [True, False])
def test_export_is_the_database(tmp_path: Path, is_primary: bool) -> None:
    store = FakeStore(tmp_path, is_primary=is_primary)
    database = store.add("app.db", rows=5000)

    async def scenario(node: Node) -> None:
        status, body, headers = await node.get("/export", name="app.db")
        assert status == 200
        assert body == database.path.read_bytes()
        assert headers["Litefs-Position"] == str(database.position)

    play(store, scenario)


@pytest.mark.parametrize("name", ["../etc", "a/b", "..", ".", "a\0b", "a-wal", "x" * (MAX_NAME + 1), ""])
def test_bad_names_are_refused(store: FakeStore, name: str) -> None:
    async def scenario(node: Node) -> None:
        for status, text in (
            (await node.get("/export", name=name))[:2],
            await node.post("/import", b"x", name=name),
        ):
            assert status == 400
            assert len(text.splitlines()) == 1
        assert store.imported == {}

    play(store, scenario)


def test_export_without_a_name_or_a_database(store: FakeStore) -> None:
    async def scenario(node: Node) -> None:
        assert (await node.get("/export"))[0] == 400
        status, body, _ = await node.get("/export", name="nope.db")
        assert (status, body) == (404, b'database not found: "nope.db"\n')

    play(store, scenario)


def test_import_replaces(store: FakeStore, tmp_path: Path) -> None:
    new = tmp_path / "new"
    make_database(new, rows=2000)

    async def scenario(node: Node) -> None:
        assert await node.post("/import", new.read_bytes(), name="app.db") == (200, "")
        assert store.imported["app.db"] == new.read_bytes()
        assert (await node.get("/export", name="app.db"))[1] == new.read_bytes()

    play(store, scenario)


def bit_flipped(content: bytes) -> bytes:
    damaged = bytearray(content)
    for offset in range(4096, len(damaged), 4096):  # the type byte of every page but the first
        damaged[offset] ^= 0xFF
    return bytes(damaged)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", "empty"),
        (lambda content: b"not a database, only text" * 100, "an SQL dump has to be read with sqlite3 first"),
        (lambda content: content[:50], "it has 50 bytes"),
        (lambda content: content[:-1], "it ends within a page"),
        (lambda content: content[:-4096], "it ends after"),
        (lambda content: bytes(16) + content[16:], "not a SQLite database"),
        (lambda content: content[:16] + b"\x12\x34" + content[18:], "page size"),
        (bit_flipped, "damaged"),
    ],
)
def test_import_of_a_bad_file_changes_nothing(
    store: FakeStore, tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    database = store.add("app.db")
    before = database.path.read_bytes()
    new = tmp_path / "new"
    make_database(new, rows=2000)
    content = damage(new.read_bytes())

    async def scenario(node: Node) -> None:
        status, text = await node.post("/import", content, name="app.db")
        assert status == 400
        assert message in text
        assert store.imported == {}
        assert database.path.read_bytes() == before

    play(store, scenario)


def test_import_of_what_needs_the_applications_functions(store: FakeStore, tmp_path: Path) -> None:
    new = tmp_path / "new"
    connection = sqlite3.connect(new)
    connection.create_function("positive", 1, lambda value: value > 0, deterministic=True)
    connection.create_collation("backwards", lambda left, right: (left < right) - (left > right))
    connection.execute("CREATE TABLE t (x CHECK (positive(x)), y COLLATE backwards)")
    connection.execute("CREATE INDEX i ON t (y)")
    connection.executemany("INSERT INTO t VALUES (?, ?)", [(i + 1, str(i)) for i in range(100)])
    connection.commit()
    connection.close()

    async def scenario(node: Node) -> None:
        assert await node.post("/import", new.read_bytes(), name="app.db") == (200, "")

    play(store, scenario)


def test_import_on_a_replica_is_503(tmp_path: Path) -> None:
    store = FakeStore(tmp_path, is_primary=False)

    async def scenario(node: Node) -> None:
        status, text = await node.post("/import", b"x" * 100_000, name="app.db")
        assert status == 503
        assert "replica" in text

    play(store, scenario)


@pytest.mark.parametrize("chunked", [False, True])
def test_import_over_the_limit_is_413(store: FakeStore, tmp_path: Path, chunked: bool) -> None:
    new = tmp_path / "new"
    make_database(new, rows=2000)
    content = new.read_bytes()

    async def chunks() -> AsyncIterator[bytes]:
        for offset in range(0, len(content), 10_000):
            yield content[offset : offset + 10_000]

    async def scenario(node: Node) -> None:
        status, text = await node.post("/import", chunks() if chunked else content, name="app.db")
        assert status == 413
        assert "max-import-size" in text
        assert store.imported == {}

    play(store, scenario, max_import_size_bytes=50_000)


def test_an_upload_that_breaks_off_leaves_nothing(store: FakeStore) -> None:
    async def scenario(node: Node) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", node.port)
        writer.write(b"POST /import?name=app.db HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + b"S" * 5000)
        await writer.drain()
        while not [name for name in os.listdir(store.data_dir) if name.startswith("transfer-")]:
            await asyncio.sleep(0.01)
        writer.close()
        while [name for name in os.listdir(store.data_dir) if name.startswith("transfer-")]:
            await asyncio.sleep(0.01)
        assert store.imported == {}
        assert reader is not None

    play(store, scenario)


def test_leftovers_of_a_killed_process_are_removed(store: FakeStore) -> None:
    leftover = Path(store.data_dir) / "transfer-abc.tmp"
    leftover.write_bytes(b"x")
    other = Path(store.data_dir) / "transfer-notes.txt"
    other.write_bytes(b"x")

    async def scenario(node: Node) -> None:
        assert not leftover.exists()
        assert other.exists()
        other.unlink()

    play(store, scenario)


# --- errors and limits -----------------------------------------------------------------------------------------------


def test_unknown_paths_and_methods(store: FakeStore) -> None:
    async def scenario(node: Node) -> None:
        status, body, headers = await node.get("/nope")
        assert (status, body, headers["Litefs-Id"]) == (404, b"Not Found\n", "00112233AABBCCDD")
        async with node.http.get(node.url("/import")) as response:
            assert response.status == 405
            assert response.headers["Allow"] == "POST"
            assert await response.text() == "Method Not Allowed\n"

    play(store, scenario)


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (errors.DatabaseNotFound("x"), 404, 'database not found: "x"\n'),
        (errors.ReadOnlyReplica(), 503, "this node is a replica: write on the primary\n"),
        (errors.Unavailable("two\nlines"), 503, "two lines\n"),
        (errors.NotADatabase("no"), 400, "no\n"),
        (errors.TruncatedError("short"), 400, "short\n"),
        (errors.LitefsError("odd"), 500, "odd\n"),
        (OSError(28, "No space left on device"), 507, "the disk of this node is full: No space left on device\n"),
        (ZeroDivisionError("secret"), 500, "internal error: see the log of this node\n"),
    ],
)
def test_errors_are_translated_once(
    store: FakeStore, error: Exception, status: int, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """And only what nobody expects is logged with its stack."""

    async def fail(_request: web.Request) -> web.StreamResponse:
        raise error

    async def scenario(node: Node) -> None:
        assert (await node.get("/extra"))[:2] == (status, text.encode())

    play(store, scenario, Route("GET", "/extra", fail))
    stacks = [record for record in caplog.records if record.exc_info]
    assert bool(stacks) == isinstance(error, ZeroDivisionError)


def test_a_client_that_goes_is_no_defect(store: FakeStore, caplog: pytest.LogCaptureFixture) -> None:
    """Load balancers and scripts do not wait for ever; the log must not have a stack for each of them."""

    async def scenario(node: Node) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", node.port)
        writer.write(b"GET /extra HTTP/1.1\r\nHost: x\r\n\r\n")
        await writer.drain()
        await asyncio.wait_for(steps.get(), 10)
        writer.close()
        await asyncio.wait_for(steps.get(), 10)
        assert (await node.get("/healthz"))[0] == 200

    steps: asyncio.Queue[str] = asyncio.Queue()

    async def wait(request: web.Request) -> web.StreamResponse:
        steps.put_nowait("waits")
        try:
            await Waiting().finish(request, asyncio.sleep(60), 60.0, "late")
        finally:
            steps.put_nowait("ended")
        return web.Response()

    play(store, scenario, Route("GET", "/extra", wait))
    assert [record.message for record in caplog.records if record.exc_info] == []


def test_an_error_in_the_middle_of_an_answer_cuts_the_connection(store: FakeStore) -> None:
    async def fail(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"first half")
        raise errors.LitefsError("oops")

    async def scenario(node: Node) -> None:
        with pytest.raises(aiohttp.ClientError):
            await node.get("/extra")

    play(store, scenario, Route("GET", "/extra", fail))


def test_headers_and_garbage_are_limited(store: FakeStore) -> None:
    async def answer_to(node: Node, request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", node.port)
        writer.write(request)
        answer = await reader.read(100)
        writer.close()
        return answer

    async def scenario(node: Node) -> None:
        long_header = b"GET /info HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 100_000 + b"\r\n\r\n"
        assert (await answer_to(node, long_header)).startswith((b"HTTP/1.0 400", b"HTTP/1.1 400"))
        assert (await answer_to(node, b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")).startswith(
            (b"HTTP/1.0 400", b"HTTP/1.1 400")
        )
        assert (await node.get("/healthz"))[0] == 200

    play(store, scenario)


def test_a_connection_that_asks_for_nothing_is_dropped(store: FakeStore) -> None:
    async def scenario(node: Node) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", node.port)
        writer.write(b"GET /in")
        await writer.drain()
        async with node.http.get(node.url("/events")) as events:  # busy, and stays
            await events.content.readline()
            now_s = time.monotonic()
            node.server.drop_idle(now_s)
            node.server.drop_idle(now_s + http_server.IDLE_TIMEOUT_S + 1)
            assert await asyncio.wait_for(reader.read(), 10) == b""
            store.add("app.db")
            store.commit("app.db", 2)
            assert b'"tx"' in await events.content.readline()
        writer.close()

    play(store, scenario)


def test_a_port_in_use_is_one_clear_line() -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(errors.LitefsError, match=r"already in use.*http\.addr"):
        listen("127.0.0.1", taken.getsockname()[1])
    with listen("", 0) as taken, pytest.raises(errors.LitefsError, match="already in use"):
        listen("", taken.getsockname()[1])
    with pytest.raises(errors.LitefsError, match="cannot listen on"):
        listen("no-such-host.invalid", 1234)
