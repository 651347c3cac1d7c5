"""The cluster's HTTP routes and the client that nodes use, over real connections; the cluster behind them is a fake."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from fake_control import ME, OTHER, FakeControl, FakeHalts, FencedStore, a_view
from fake_store import CLUSTER_ID, node_info

from pylitefs import errors
from pylitefs.cluster.control import HistoryEntry
from pylitefs.cluster.lease_port import now_s
from pylitefs.engine.tombstones import Tombstone
from pylitefs.events import Event
from pylitefs.formats.ltx.format import CHECKSUM_FLAG, Position
from pylitefs.http import cluster_routes, halts, health, peers, waiting
from pylitefs.http.cluster_documents import cluster_document, members_from
from pylitefs.http.cluster_routes import ClusterRoutes
from pylitefs.http.peers import Peers
from pylitefs.http.server import HttpServer, Route, build_app, listen

LIMIT_S = 20.0


@dataclass(frozen=True)
class HttpSettings:
    max_import_size_bytes: int = 0


@dataclass
class Node:
    store: FencedStore
    control: FakeControl
    halts: FakeHalts
    server: HttpServer
    url: str
    http: aiohttp.ClientSession
    pings: list[Future[Any]]
    peers: Peers = field(init=False)

    def __post_init__(self) -> None:
        self.peers = Peers(self.http, OTHER)

    async def ask(self, method: str, path: str, **options: Any) -> tuple[int, str, Any]:
        async with self.http.request(method, self.url + path, **options) as response:
            return response.status, await response.text(), response.headers

    async def get(self, path: str, **options: Any) -> tuple[int, str]:
        return (await self.ask("GET", path, **options))[:2]

    async def status(self, path: str) -> int:
        """Of a health check; HEAD says the same, without a body."""
        status, text, headers = await self.ask("GET", path)
        assert text.count("\n") == 1 and text.endswith("\n")
        head, body, head_headers = await self.ask("HEAD", path)
        assert (head, body) == (status, "")
        assert head_headers["Content-Length"] == headers["Content-Length"] == str(len(text.encode()))
        assert head_headers["Cache-Control"] == "no-store"
        return status


@asynccontextmanager
async def running(store: FencedStore, *, max_body_bytes: int = 0, **node: Any) -> AsyncIterator[Node]:
    info = node_info(**({"passthrough": lambda: True} | node))
    control, fake_halts, pings = FakeControl(store), FakeHalts(), []

    def ping() -> Future[Any]:
        pings.append(Future())
        return pings[-1]

    routes = ClusterRoutes(control, store, info, ping, fake_halts, max_body_bytes)
    app = build_app(store, store.list_replicas, HttpSettings(), info, store.import_database, cluster=routes)
    sock = listen("127.0.0.1", 0)
    server = HttpServer(app, shutdown_timeout_s=1)
    await server.start(sock)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        try:
            yield Node(store, control, fake_halts, server, url, session, pings)
        finally:
            await server.close()


def play(store: FencedStore, scenario: Callable[[Node], Awaitable[None]], **options: Any) -> None:
    async def go() -> None:
        async with running(store, **options) as node:
            await scenario(node)

    asyncio.run(go())
    assert not [name for name in os.listdir(store.data_dir) if name.startswith("transfer-")]


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.fixture
def primary(tmp_path: Path) -> FencedStore:
    store = FencedStore(tmp_path)
    store.add("app.db").position = Position(10, CHECKSUM_FLAG | 10, 7)
    return store


@pytest.fixture
def replica(tmp_path: Path) -> FencedStore:
    store = FencedStore(tmp_path, is_primary=False)
    store.add("app.db").position = Position(10, CHECKSUM_FLAG | 10, 7)
    return store


# --- health checks ---------------------------------------------------------------------------------------------------

ON_PRIMARY = {
    "/primary": 200, "/leader": 200, "/replica": 503, "/read-only": 200, "/sync-standby": 503, "/readiness": 200,
    "/liveness": 200, "/health": 200, "/healthz": 200,
}  # fmt: skip
ON_REPLICA = ON_PRIMARY | {"/primary": 503, "/leader": 503, "/replica": 200}


async def statuses(node: Node, query: str = "") -> dict[str, int]:
    found = {}
    for path in ON_PRIMARY:
        if not path.startswith("/health"):
            found[path] = await node.status(path + query)
        else:
            found[path] = (await node.ask("GET", path))[0]
            assert (await node.ask("HEAD", path))[:2] == (found[path], "")
    return found


def test_health_of_a_primary(primary: FencedStore) -> None:
    async def scenario(node: Node) -> None:
        assert await statuses(node) == ON_PRIMARY
        assert await statuses(node, "?db=app.db&lag=1s") == ON_PRIMARY
        primary.fence.until_s = now_s() - 0.001  # the lease has ended, and nobody has noticed yet
        lost = {"/primary": 503, "/leader": 503, "/readiness": 503}
        assert await statuses(node) == ON_PRIMARY | lost
        assert await statuses(node, "?lag=1h") == ON_PRIMARY | lost | {"/read-only": 503}
        assert "lease" in (await node.get("/primary"))[1]

    play(primary, scenario)


def test_health_of_a_replica(replica: FencedStore) -> None:
    async def scenario(node: Node) -> None:
        assert await statuses(node) == ON_REPLICA
        assert await statuses(node, "?db=app.db") == ON_REPLICA
        node.control.changes = {"in_sync": (OTHER, ME)}
        await asyncio.sleep(2 * health.VIEW_AGE_S)
        assert await statuses(node) == ON_REPLICA | {"/sync-standby": 200}
        node.control.changes = {"in_sync": None}
        await asyncio.sleep(2 * health.VIEW_AGE_S)
        assert (await node.get("/sync-standby")) == (503, "replication is asynchronous\n")

    play(replica, scenario)


@pytest.mark.parametrize(
    ("lag", "status"),
    [
        ("lag=7ms", 200), ("lag=6ms", 503), ("lag=10s", 200), ("lag=0", 503),  # it is 7 ms
        ("lag=2tx", 200), ("lag=1tx", 503), ("lag=2tx&lag=1ms", 503), ("lag=1h&lag=100tx", 200),  # and 12 - 10
    ],
)  # fmt: skip
@pytest.mark.parametrize("db", ["", "&db=app.db"])
def test_lag_is_limited(replica: FencedStore, lag: str, status: int, db: str) -> None:
    async def scenario(node: Node) -> None:
        for path in ("/replica", "/read-only", "/readiness"):
            assert await node.status(f"{path}?{lag}{db}") == status

    play(replica, scenario)


def test_a_lag_that_is_not_known_is_too_large(replica: FencedStore) -> None:
    replica.lag_ms = None
    replica.add("new.db")  # of which the primary has not told yet

    async def scenario(node: Node) -> None:
        assert await node.status("/replica") == 200
        assert await node.status("/replica?lag=1h") == 503
        assert await node.status("/replica?lag=100tx&db=new.db") == 503
        node.control.changes = {"primary": None}
        await asyncio.sleep(2 * health.VIEW_AGE_S)
        assert await node.status("/replica?lag=100tx") == 503

    play(replica, scenario)


def test_a_database_that_was_dropped_is_not_one_that_is_lacking(replica: FencedStore) -> None:
    """Neither while something is left of it, nor when it was forgotten; a health check that asks for it gets 404."""
    dropped = replica.add("dropped.db")
    dropped.path.write_bytes(b"")
    dropped.position = Position(5, CHECKSUM_FLAG)
    replica.tombstones["forgotten.db"] = Tombstone(Position(3223, CHECKSUM_FLAG), ())

    async def scenario(node: Node) -> None:
        me, primary, *_ = a_view(replica).members
        positions = {"app.db": (7, 1), "dropped.db": (7, 5), "forgotten.db": (7, 3223)}
        node.control.changes = {
            "primary": replace(primary, positions=positions), "members": (replace(me, lag_txids=None), primary),
        }  # fmt: skip
        assert await node.status("/replica?lag=0tx") == 200
        for name in ("dropped.db", "forgotten.db"):
            for query in (f"db={name}", f"db={name}&lag=100tx"):
                assert await node.status(f"/replica?{query}") == 404

    play(replica, scenario)


def test_without_its_primary_a_replica_serves_what_it_has(replica: FencedStore) -> None:
    async def scenario(node: Node) -> None:
        expected = ON_REPLICA | dict.fromkeys(("/replica", "/readiness", "/sync-standby", "/health", "/healthz"), 503)
        assert await statuses(node) == expected
        assert await node.status("/read-only?lag=1s") == 200  # 7 ms: it was lost just now
        assert await node.status("/read-only?lag=100tx") == 503  # nobody knows

    play(replica, scenario, unhealthy=lambda: "not connected to the\nprimary")


def test_starting_nodes_are_not_ready(replica: FencedStore, tmp_path: Path) -> None:
    async def catching_up(node: Node) -> None:
        assert await statuses(node) == ON_REPLICA | dict.fromkeys(("/replica", "/readiness"), 503)

    async def not_mounted(node: Node) -> None:
        closed = dict.fromkeys(("/replica", "/readiness", "/read-only"), 503)
        assert await statuses(node) == ON_REPLICA | closed
        node.store.is_primary, node.store.fence.until_s = True, float("inf")
        assert await node.status("/primary") == 503

    async def empty(node: Node) -> None:
        assert await node.status("/read-only") == 503

    play(replica, catching_up, caught_up=lambda: False)
    play(replica, not_mounted, passthrough=lambda: None)
    bare = FencedStore(tmp_path, is_primary=False)
    bare.lag_ms = None
    play(bare, empty)


def test_health_of_a_database(primary: FencedStore) -> None:
    primary.add("odd.db").set_aside_reason = "malformed"

    async def scenario(node: Node) -> None:
        for path in ("/primary", "/read-only", "/readiness", "/replica", "/sync-standby", "/liveness"):
            assert await node.status(f"{path}?db=nope.db") == 404
            assert await node.status(f"{path}?db=odd.db") == 503
            for bad in ("db=", "db=..", "db=a%2Fb", "lag=x", "lag=", "lag=1s&lag=-1s"):
                assert await node.status(f"{path}?{bad}") == 400, (path, bad)
        assert (await node.ask("POST", "/primary"))[0] == 405

    play(primary, scenario)


def test_liveness_is_the_engines_pulse() -> None:
    pings: list[Future[None]] = []

    def ping() -> Future[None]:
        pings.append(Future())
        return pings[-1]

    pulse = health.Pulse(ping, deadline_s=30)
    assert pulse.problem(0.0) == ""
    assert pulse.problem(29.0) == ""
    assert "31 s" in pulse.problem(31.0)
    pings[0].set_result(None)
    assert pulse.problem(31.1) == ""  # asked again
    assert len(pings) == 2
    pings[1].set_exception(OSError())  # an answer, all the same
    assert pulse.problem(31.2) == ""
    assert len(pings) == 2  # not so soon
    assert pulse.problem(40.0) == ""
    assert len(pings) == 3
    assert "engine" in pulse.problem(71.0)

    def stopped() -> Future[None]:
        raise OSError("closed")

    assert "stopped" in health.Pulse(stopped).problem(0.0)


def test_a_stuck_engine_fails_liveness_only(primary: FencedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health.Pulse.__init__, "__defaults__", (0.0,))

    async def scenario(node: Node) -> None:
        assert (await node.get("/liveness"))[0] == 200  # the first one asks
        assert await node.status("/liveness") == 503
        assert await node.status("/primary") == 200
        node.pings[0].set_result(None)
        assert await node.status("/liveness") == 200

    play(primary, scenario)


def test_many_pollers_cost_little(replica: FencedStore, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    async def scenario(node: Node) -> None:
        async def poll(path: str) -> set[int]:
            return {(await node.get(path))[0] for _ in range(40)}

        paths = ("/primary", "/replica?lag=10s", "/replica?db=gone.db", "/replica?lag=1x", "/liveness", "/readiness")
        found = await asyncio.gather(*(poll(path) for path in paths for _ in range(4)))
        assert [max(codes) for codes in found[::4]] == [503, 200, 404, 400, 200, 200]
        assert node.control.views == 0
        assert len(node.pings) == 1
        assert node.store.flushes == 0
        await asyncio.gather(*(poll("/replica?lag=100tx") for _ in range(10)))
        assert 0 < node.control.views < 400

    play(replica, scenario)
    assert not [record for record in caplog.records if record.name.startswith("pylitefs.http")]


def test_slow_clients_do_not_stop_pollers(primary: FencedStore) -> None:
    async def scenario(node: Node) -> None:
        port = int(node.url.rsplit(":", 1)[1])
        slow = [await asyncio.open_connection("127.0.0.1", port) for _ in range(50)]
        for _, writer in slow:
            writer.write(b"GET /primary HTTP/1.1\r\nHost: x\r\nX-Slow: ")  # and no more
            await writer.drain()
        assert await node.status("/primary") == 200
        for _, writer in slow:
            writer.write(b"1\r\n\r\n")
        for reader, writer in slow:
            assert (await asyncio.wait_for(reader.readline(), LIMIT_S)).startswith(b"HTTP/1.1 200")
            writer.close()

    play(primary, scenario)


# --- documents -------------------------------------------------------------------------------------------------------


def test_cluster_document(primary: FencedStore) -> None:
    async def scenario(node: Node) -> None:
        document = json.loads((await node.get("/cluster"))[1])
        assert {key: document[key] for key in document if key not in ("members", "primary", "history")} == {
            "nodeID": "00112233AABBCCDD", "isPrimary": True, "clusterID": CLUSTER_ID, "epoch": 7, "paused": False,
            "sync": 1, "inSync": ["000000000000000B"], "engine": "etcd", "problem": "",
            "commitsWait": {"count": 2, "seconds": 3.142, "reason": "0 of 1 replicas connected"},
        }  # fmt: skip
        me, other, third = document["members"]
        assert document["primary"] == me
        assert other == {
            "nodeID": "000000000000000B", "hostname": "db2", "url": "http://db2:20202", "role": "replica",
            "state": "live", "candidate": False, "priority": 3, "tags": {"zone": "a"},
            "positions": {"app.db": {"epoch": 7, "txid": "000000000000000c"}}, "lagMs": 1.235, "lagTXIDs": 2,
            "inSync": True, "seenSeconds": 0.0,
        }  # fmt: skip
        assert (third["lagMs"], third["seenSeconds"]) == (None, 12.346)  # JSON has no infinity
        history = json.loads((await node.get("/history"))[1])
        assert history == document["history"]
        assert history[1] == {
            "epoch": 7, "nodeID": "00112233AABBCCDD", "hostname": "db1", "txid": "00000000000000ff",
            "reason": "failover", "time": "2023-11-14T22:13:20.12Z",
        }  # fmt: skip
        assert json.loads((await node.get("/status"))[1])["cluster"] == document

    play(primary, scenario)


def test_the_role_is_that_of_the_moment(primary: FencedStore) -> None:
    following = [""]

    async def scenario(node: Node) -> None:
        assert json.loads((await node.get("/info"))[1])["isPrimary"] is True
        primary.is_primary, primary.primary_hostname, following[0] = False, "db2", "http://db2:20202"
        info = json.loads((await node.get("/info"))[1])
        assert (info["isPrimary"], info["primary"]) == (False, {"hostname": "db2", "url": "http://db2:20202"})
        status = json.loads((await node.get("/status"))[1])
        assert status["node"]["role"] == "replica"
        assert status["primary"] == {"hostname": "db2", "url": "http://db2:20202"}

    play(primary, scenario, primary_url=lambda: following[0])


REASONS = [(7, "failover"), (8, "handed over"), (9, "failover"), (10, "failover")]


def test_metrics_of_the_cluster(primary: FencedStore) -> None:
    async def scenario(node: Node) -> None:
        for kind in ("promoted", "demoted", "promoted"):
            primary.events.emit(Event(kind, None, {"epoch": 7}))
        for seconds, more in ((0.0015, {}), (0.004, {}), (2.0, {"failed": "timeout"})):
            primary.events.emit(Event("synced", "app.db", {"txid": 1, "seconds": seconds, **more}))
        primary.events.emit(Event("syncDegraded", None, {"in_sync": 0}))
        lines = set((await node.get("/metrics"))[1].splitlines())
        assert lines >= {
            'litefs_role{role="primary"} 1.0',
            'litefs_role{role="replica"} 0.0',
            "litefs_epoch 7.0",
            "litefs_lease_remaining_seconds +Inf",
            "litefs_members 3.0",
            'litefs_member_seen_seconds{member="000000000000000C"} 12.34567',
            "litefs_sync_replicas 1.0",
            "litefs_in_sync_members 1.0",
            "litefs_in_sync_replicas_connected 1.0",
            'litefs_sync_wait_seconds_bucket{le="0.002"} 1.0',
            'litefs_sync_wait_seconds_bucket{le="0.005"} 2.0',
            "litefs_sync_wait_seconds_count 3.0",
            'litefs_sync_failed_commits_total{reason="timeout"} 1.0',
            'litefs_sync_failed_commits_total{reason="demoted"} 0.0',
            "litefs_sync_degraded_total 1.0",
            "litefs_commits_waiting 2.0",
            "litefs_paused 0.0",
            "litefs_cluster_problem 0.0",
            "litefs_failovers_total 1.0",
            "litefs_promotions_total 2.0",
            "litefs_demotions_total 1.0",
        }
        primary.is_primary = False
        history = tuple(HistoryEntry(epoch, OTHER, "db2", 1, reason, 0) for epoch, reason in REASONS)
        node.control.changes = {"history": history}  # the first ones are forgotten
        text = (await node.get("/metrics"))[1]
        assert "litefs_failovers_total 3.0" in text
        assert "litefs_lease_remaining_seconds" not in text
        assert 'litefs_role{role="replica"} 1.0' in text

    play(primary, scenario)


# --- changes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/promote", ("promote", None)),
        ("/promote?nodeID=000000000000000B", ("promote", 11)),
        ("/promote?force=true", ("promote", None, "force")),
        ("/promote?force=false", ("promote", None)),
        ("/handoff", ("handoff", None)),
        ("/handoff?nodeID=b", ("handoff", 11)),
        ("/pause", ("pause", True)),
        ("/resume", ("pause", False)),
        ("/failsafe?leader=B&epoch=7", ("failsafe", 11, 7)),
        ("/nudge", ("nudge",)),
    ],
)
def test_changes(primary: FencedStore, path: str, asked: tuple[Any, ...]) -> None:
    async def scenario(node: Node) -> None:
        status, text, _ = await node.ask("POST", path)
        assert (status, text.count("\n")) == (200, 1)
        assert node.control.asked == [asked]
        assert (await node.ask("GET", path))[0] == 405

    play(primary, scenario)


@pytest.mark.parametrize(
    "path",
    [
        "/promote?nodeID=", "/promote?nodeID=xyz", "/handoff?nodeID=0", "/handoff?nodeID=11112222333344445",
        "/promote?timeout=soon", "/pause?timeout=-1", "/failsafe", "/failsafe?leader=B", "/failsafe?leader=B&epoch=x",
        "/failsafe?leader=-1&epoch=1", "/promote?force=1", "/promote?force=",
    ],
)  # fmt: skip
def test_bad_requests_ask_nothing(primary: FencedStore, path: str) -> None:
    async def scenario(node: Node) -> None:
        status, text, _ = await node.ask("POST", path)
        assert (status, text.count("\n")) == (400, 1)
        assert node.control.asked == []

    play(primary, scenario)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.Ineligible("not a candidate"), 409),
        (errors.Unavailable("the target lags"), 503),
        (errors.LitefsError("odd"), 500),
        (errors.NotPrimary("ask db2", "http://db2:20202"), 421),
    ],
)
def test_changes_that_fail(primary: FencedStore, error: Exception, status: int) -> None:
    async def scenario(node: Node) -> None:
        node.control.fails = error
        for path in ("/promote", "/handoff?nodeID=B", "/pause"):
            assert (await node.ask("POST", path))[:2] == (status, f"{error}\n")

    play(primary, scenario)


def test_a_change_is_not_cut_off_by_a_deadline_or_a_client_that_goes(
    primary: FencedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "GRACE_S", 0.0)
    monkeypatch.setattr(waiting, "LOOK_INTERVAL_S", 0.02)

    async def scenario(node: Node) -> None:
        node.control.hangs = True
        status, text, _ = await node.ask("POST", "/handoff?timeout=50ms")
        assert status == 504 and "under way" in text
        request = asyncio.ensure_future(node.ask("POST", "/promote"))
        await until(lambda: len(node.control.asked) == 2)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        assert await node.status("/primary") == 200
        node.control.finish.set()
        await asyncio.sleep(0.05)
        assert node.control.cut_off == 0

    play(primary, scenario)


def test_failsafe_is_refused_with_the_reason(replica: FencedStore) -> None:
    async def scenario(node: Node) -> None:
        node.control.refusal = "this node follows\nanother one"
        assert (await node.ask("POST", "/failsafe?leader=B&epoch=7"))[:2] == (409, "this node follows another one\n")
        assert await node.peers.failsafe(node.url, ME, 7, LIMIT_S) == "this node follows another one"
        node.control.refusal = ""
        assert await node.peers.failsafe(node.url, ME, 8, LIMIT_S) == ""
        assert node.control.asked[-1] == ("failsafe", ME, 8)

    play(replica, scenario)


# --- positions -------------------------------------------------------------------------------------------------------

AT_10 = {"name": "app.db", "txid": "000000000000000a", "postApplyChecksum": "800000000000000a", "epoch": 7}


def test_sync(replica: FencedStore) -> None:
    async def scenario(node: Node) -> None:
        assert json.loads((await node.get("/sync?db=app.db"))[1]) == AT_10
        assert json.loads((await node.get("/sync?db=app.db&txid=0A&timeout=2.5"))[1]) == AT_10
        assert node.control.asked == [
            ("sync", "app.db", None, cluster_routes.SYNC_TIMEOUT_S),
            ("sync", "app.db", 10, 2.5),
        ]
        assert await node.get("/sync?db=nope.db") == (404, 'database not found: "nope.db"\n')
        for bad in ("", "?db=", "?db=a/b", "?db=app.db&txid=z", "?db=app.db&timeout=x"):
            assert (await node.get("/sync" + bad))[0] == 400

    play(replica, scenario)


def test_a_sync_that_is_late_is_504(replica: FencedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "GRACE_S", 0.05)

    async def scenario(node: Node) -> None:
        node.control.fails = errors.Unavailable("no primary is known")
        assert (await node.get("/sync?db=app.db&timeout=1h"))[0] == 503  # before the deadline
        assert await node.get("/sync?db=app.db&timeout=0") == (504, "no primary is known\n")
        node.control.fails = TimeoutError()
        assert (await node.get("/sync?db=app.db"))[0] == 504
        node.control.hangs = True  # it misses even its own deadline
        status, text = await node.get("/sync?db=app.db&timeout=10ms")
        assert status == 504 and "app.db" in text and text.count("\n") == 1
        assert node.control.cut_off == 1

    play(replica, scenario)


def test_a_sync_ends_with_its_client_and_with_the_node(replica: FencedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "LOOK_INTERVAL_S", 0.02)
    monkeypatch.setattr(cluster_routes, "MAX_SYNCS", 3)

    async def scenario(node: Node) -> None:
        node.control.hangs = True
        waits = [asyncio.ensure_future(node.get("/sync?db=app.db&timeout=1h")) for _ in range(3)]
        await until(lambda: len(node.control.asked) == 3)
        assert (await node.get("/sync?db=app.db"))[0] == 503  # too many
        waits[0].cancel()
        await until(lambda: node.control.cut_off == 1)
        await node.server.close()
        assert node.control.cut_off == 3
        for wait in waits[1:]:
            assert await wait == (503, "this node is stopping\n")

    play(replica, scenario)


def test_position_is_the_primarys(primary: FencedStore) -> None:
    async def scenario(node: Node) -> None:
        assert json.loads((await node.get("/position?db=app.db"))[1]) == AT_10
        position = await node.peers.position(node.url, "app.db", LIMIT_S)
        assert (position, position.epoch) == (Position(10, CHECKSUM_FLAG | 10), 7)
        with pytest.raises(errors.DatabaseNotFound):
            await node.peers.position(node.url, "nope.db", LIMIT_S)
        primary.is_primary, node.control.fails = False, errors.ReadOnlyReplica()
        status, text, headers = await node.ask("GET", "/position?db=app.db")
        assert (status, text.count("\n"), headers["Litefs-Primary-Url"]) == (421, 1, "http://db2:20202")
        with pytest.raises(errors.NotPrimary) as caught:
            await node.peers.position(node.url, "app.db", LIMIT_S)
        assert caught.value.primary_url == "http://db2:20202"

    play(primary, scenario)


def test_a_header_is_never_made_of_what_another_node_says(primary: FencedStore) -> None:
    async def scenario(node: Node) -> None:
        node.control.fails = errors.NotPrimary("no", "http://x\r\nSet-Cookie: a=b")
        status, _, headers = await node.ask("GET", "/position?db=app.db")
        assert status == 421
        assert "Litefs-Primary-Url" not in headers and "Set-Cookie" not in headers

    play(primary, scenario)


# --- the client of the nodes -----------------------------------------------------------------------------------------


def test_peers(primary: FencedStore) -> None:
    async def scenario(node: Node) -> None:
        document = await node.peers.positions(node.url, LIMIT_S)
        assert document["positions"] == {"app.db": [7, 10]}
        await node.peers.nudge(node.url, LIMIT_S)
        await node.peers.handoff(node.url, OTHER, LIMIT_S)
        await node.peers.handoff(node.url + "/", None, LIMIT_S)
        await node.peers.promote(node.url, None, LIMIT_S)
        await node.peers.promote(node.url, None, LIMIT_S, force=True)
        assert node.control.asked == [
            ("nudge",), ("handoff", OTHER), ("handoff", None), ("promote", None), ("promote", None, "force"),
        ]  # fmt: skip
        for error in (errors.Ineligible("no\x1b[31m candidate"), errors.Unavailable("later")):
            node.control.fails = error
            with pytest.raises(type(error)) as caught:
                await node.peers.handoff(node.url, OTHER, LIMIT_S)
            assert str(caught.value) == str(error).replace("\x1b", "?")

    play(primary, scenario)


def test_no_question_hangs(primary: FencedStore) -> None:
    async def scenario(node: Node) -> None:
        node.control.hangs = True
        with pytest.raises(errors.Unavailable, match="did not answer within 0"):
            await node.peers.handoff(node.url, OTHER, 0.1)
        for url in (
            "",
            "db1:20202",
            "//10.0.0.1:20202",
            "ftp://db1",
            "http://",
            "http://a\nb",
            "http://é",
            "http://[",
            "http://a:99999999",
        ):
            with pytest.raises(errors.Unavailable) as caught:
                await node.peers.positions(url, LIMIT_S)
            assert "\n" not in str(caught.value)
        sock = listen("127.0.0.1", 0)
        free = sock.getsockname()[1]
        sock.close()
        with pytest.raises(errors.Unavailable, match="refused"):
            await node.peers.nudge(f"http://127.0.0.1:{free}", LIMIT_S)

    play(primary, scenario)


BAD_POSITIONS = [
    {}, [], "x", {"node-id": "A"},
    {"cluster-id": 1, "epoch": 1, "positions": {}}, {"cluster-id": "", "epoch": -1, "positions": {}},
    {"cluster-id": "", "epoch": True, "positions": {}}, {"cluster-id": "", "epoch": 1, "positions": []},
    *({"cluster-id": "", "epoch": 1, "positions": {"a": value}} for value in (
        1, [1], [1, 2, 3], [1, -1], [1.5, 2], ["1", 2], [True, 1], [1, 1 << 64], None,
    )),
    {"cluster-id": "", "epoch": 1, "positions": {"": [1, 1]}},
    {"cluster-id": "", "epoch": 1, "positions": {"a" * 300: [1, 1]}},
]  # fmt: skip


def test_a_peer_that_lies_about_positions(primary: FencedStore) -> None:
    async def scenario(node: Node) -> None:
        for bad in BAD_POSITIONS:
            node.control.announced = bad
            with pytest.raises(errors.Unavailable, match="strange"):
                await node.peers.positions(node.url, LIMIT_S)

    play(primary, scenario)


def test_a_peer_that_lies_about_members(primary: FencedStore) -> None:
    """What it says is believed whole or not at all, whatever it is."""
    view = a_view(primary)
    good = json.loads(json.dumps(cluster_document(view)))
    told = members_from(good)
    assert [(member.node_id, member.role) for member in told] == [(one.node_id, one.role) for one in view.members]
    assert [member.positions for member in told] == [member.positions for member in view.members]
    for key in good["members"][0]:
        for value in (None, "x", -1.5, [], {"a": 1}, {"a": {"epoch": "1", "txid": "1"}}, "x" * 9999, float("nan")):
            bad = {**good, "members": [{**good["members"][0], key: value}]}
            with contextlib.suppress(ValueError):
                (member,) = members_from(bad)
                json.dumps(cluster_document(replace(view, members=(member,))), allow_nan=False)
    for bad in ({}, {"members": {}}, {"members": [1]}, {"members": [{}]}, {"members": good["members"][:1] * 2000}):
        with pytest.raises(ValueError, match="members"):
            members_from(bad)

    async def scenario(node: Node) -> None:
        assert await node.peers.members(node.url, LIMIT_S) == told

    play(primary, scenario)


def strange(
    status: int, body: bytes, headers: dict[str, str]
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def answer(_request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, body=body, headers=headers)

    return answer


@pytest.mark.parametrize(
    ("status", "body", "headers"),
    [
        (200, b"{}", {}),  # no node of ours
        (200, b"\xff", {"Litefs-Id": "B"}),
        (200, b"[" * 100_000, {"Litefs-Id": "B"}),
        (200, b'{"txid": "1", "postApplyChecksum": "2"}', {"Litefs-Id": "B"}),
        (200, b'{"txid": 1, "postApplyChecksum": 2}', {"Litefs-Id": "B"}),
        (200, json.dumps(AT_10 | {"epoch": -1}).encode(), {"Litefs-Id": "B"}),
        (200, b" " * (peers.MAX_ANSWER_BYTES + 1), {"Litefs-Id": "B"}),
        (200, b"x", {"Litefs-Id": "B", "Content-Encoding": "gzip"}),
        (302, b"", {"Litefs-Id": "B", "Location": "/elsewhere"}),
        (404, b"", {}),
        (421, b"", {"Litefs-Id": "B", "Litefs-Primary-Url": "file:///etc/passwd"}),
        (500, b"x" * 1_000_000, {"Litefs-Id": "B"}),
        (503, b"\xff\x00\n\n", {"Litefs-Id": "B"}),
    ],
)
def test_strange_answers(status: int, body: bytes, headers: dict[str, str]) -> None:
    async def go() -> None:
        app = web.Application()
        app.router.add_route("*", "/{any:.*}", strange(status, body, headers))
        server, sock = HttpServer(app, shutdown_timeout_s=1), listen("127.0.0.1", 0)
        await server.start(sock)
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        try:
            async with aiohttp.ClientSession() as session:
                with pytest.raises(errors.Unavailable) as caught:
                    await Peers(session).position(url, "app.db", LIMIT_S)
                assert str(caught.value).isprintable() and len(str(caught.value)) < 600
                assert getattr(caught.value, "primary_url", "") == ""
        finally:
            await server.close()

    asyncio.run(go())


def test_an_answer_that_never_ends() -> None:
    async def drip(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Litefs-Id": "B"})
        await response.prepare(request)
        while True:
            await response.write(b" ")
            await asyncio.sleep(0.01)

    async def go() -> None:
        app = web.Application()
        app.router.add_route("*", "/{any:.*}", drip)
        server, sock = HttpServer(app, shutdown_timeout_s=0.1), listen("127.0.0.1", 0)
        await server.start(sock)
        try:
            async with aiohttp.ClientSession() as session:
                with pytest.raises(errors.Unavailable, match="did not answer"):
                    await Peers(session).positions(f"http://127.0.0.1:{sock.getsockname()[1]}", 0.2)
        finally:
            await server.close()

    asyncio.run(go())


# --- HALT locks ------------------------------------------------------------------------------------------------------

CALLER = {"Litefs-Id": f"{OTHER:016X}"}


def test_halt_as_litefs_answers(primary: FencedStore) -> None:
    async def scenario(node: Node) -> None:
        query = "/halt?name=app.db&id=9223372036854775807"
        for _ in range(2):  # the same id: the same lock
            status, text, _ = await node.ask("POST", query, headers=CALLER)
            assert status == 200
            assert json.loads(text) == {
                "id": 9223372036854775807,
                "pos": {"TXID": "0000000000000005", "PostApplyChecksum": "8000000000000005", "Epoch": 0},
                "expires": "2023-11-14T22:13:20.12Z",
                "epoch": 7,
            }
        assert node.halts.locks == {"app.db": (9223372036854775807, OTHER)}
        assert (await node.ask("POST", "/halt?name=app.db&id=1", headers=CALLER))[0] == 409
        assert (await node.ask("PUT", query, headers=CALLER))[0] == 200
        assert (await node.ask("DELETE", query, headers=CALLER))[:2] == (200, "")
        assert (await node.ask("DELETE", query, headers=CALLER))[:2] == (200, "")
        assert (await node.ask("PUT", query, headers=CALLER))[0] == 409
        assert node.halts.locks == {}

    play(primary, scenario)


@pytest.mark.parametrize(
    ("query", "headers", "status"),
    [
        ("?id=1", CALLER, 400),
        ("?name=app.db", CALLER, 400),
        *((f"?name=app.db&id={bad}", CALLER, 400) for bad in ("0", "-1", "x", "1.5", str(2**63), "9" * 500)),
        ("?name=app.db&id=1", {}, 400),
        ("?name=app.db&id=1", {"Litefs-Id": "no"}, 400),
        ("?name=app.db&id=1", {"Litefs-Id": f"{ME:016X}"}, 400),  # ourselves
        ("?name=app.db&id=1", CALLER | {"Litefs-Epoch": "x"}, 400),
        ("?name=app.db&id=1", CALLER | {"Litefs-Epoch": "6"}, 409),
        ("?name=app.db&id=1", CALLER | {"Litefs-Epoch": "8"}, 421),
    ],
)
def test_halt_refuses(primary: FencedStore, query: str, headers: dict[str, str], status: int) -> None:
    async def scenario(node: Node) -> None:
        for method in ("POST", "PUT", "DELETE"):
            found, text, _ = await node.ask(method, f"/halt{query}", headers=headers)
            assert (found, text.count("\n")) == (status, 1)
        found, text, _ = await node.ask("POST", "/tx" + query.replace("id=", "lockID="), headers=headers, data=b"LTX1")
        assert (found, text.count("\n")) == (status, 1)
        assert (node.halts.locks, node.halts.received) == ({}, [])

    play(primary, scenario)


@pytest.mark.parametrize("size", [100, halts.MEMORY_BYTES, halts.MEMORY_BYTES + 1, 5 << 20])
def test_a_transaction_arrives_whole(primary: FencedStore, tmp_path: Path, size: int) -> None:
    data = b"LTX1" + os.urandom(size - 4)
    (tmp_path / "file.ltx").write_bytes(data)

    async def scenario(node: Node) -> None:
        lock = await node.peers.halt(node.url, "app.db", 5, LIMIT_S)
        assert (lock.position, lock.epoch, lock.expires_ms) == (Position(5, CHECKSUM_FLAG | 5), 7, 1_700_000_000_120)
        assert await node.peers.renew(node.url, "app.db", 5, 7, LIMIT_S) == lock
        after = Position(6, CHECKSUM_FLAG | 6)
        assert await node.peers.transaction(node.url, "app.db", 5, 7, data, LIMIT_S) == after
        with open(tmp_path / "file.ltx", "rb") as file:
            assert await node.peers.transaction(node.url, "app.db", 5, 7, file, LIMIT_S) == after
        assert node.halts.received == [data, data]
        assert len(node.halts.paths) == (2 if size > halts.MEMORY_BYTES else 0)
        with pytest.raises(errors.Ineligible):
            await node.peers.transaction(node.url, "app.db", 5, 6, data, LIMIT_S)
        with pytest.raises(errors.Ineligible):
            await node.peers.transaction(node.url, "app.db", 6, 7, data, LIMIT_S)
        with pytest.raises(errors.Ineligible):  # what does not follow
            await node.peers.transaction(node.url, "app.db", 5, 7, b"?" * size, LIMIT_S)
        await node.peers.release(node.url, "app.db", 5, LIMIT_S)
        assert node.halts.locks == {}
        assert len(node.halts.received) == 2

    play(primary, scenario)


@pytest.mark.parametrize("size", [1000, 3 << 20])
def test_a_transaction_that_breaks_off_is_not_applied(primary: FencedStore, size: int) -> None:
    async def scenario(node: Node) -> None:
        await node.peers.halt(node.url, "app.db", 5, LIMIT_S)
        reader, writer = await asyncio.open_connection("127.0.0.1", int(node.url.rsplit(":", 1)[1]))
        head = "POST /tx?name=app.db&lockID=5 HTTP/1.1\r\nHost: x\r\nLitefs-Id: B\r\nLitefs-Epoch: 7\r\n"
        writer.write(f"{head}Content-Length: {size + 1}\r\n\r\n".encode() + b"LTX1" * (size // 4))
        await writer.drain()
        await asyncio.sleep(0.1)
        writer.close()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await asyncio.wait_for(reader.readexactly(1), LIMIT_S)
        assert await node.status("/primary") == 200
        await until(lambda: not [name for name in os.listdir(primary.data_dir) if name.startswith("transfer-")])
        assert node.halts.received == []

    play(primary, scenario)


def test_a_transaction_has_a_limit(primary: FencedStore) -> None:
    async def scenario(node: Node) -> None:
        await node.peers.halt(node.url, "app.db", 5, LIMIT_S)

        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(40):
                yield b"LTX1" * 25_000

        for data in (b"LTX1" * 500_001, pieces()):
            headers = CALLER | {"Litefs-Epoch": "7"}
            try:
                found = (await node.ask("POST", "/tx?name=app.db&lockID=5", headers=headers, data=data))[0]
            except aiohttp.ClientConnectionError:
                found = 413  # the answer came while the rest was being sent
            assert found == 413
        assert node.halts.received == []

    play(primary, scenario, max_body_bytes=2_000_000)


def test_a_file_stays_while_it_is_applied(primary: FencedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "LOOK_INTERVAL_S", 0.02)
    data = b"LTX1" * 500_000

    async def scenario(node: Node) -> None:
        await node.peers.halt(node.url, "app.db", 5, LIMIT_S)
        node.halts.slow = asyncio.Event()
        sending = asyncio.ensure_future(node.peers.transaction(node.url, "app.db", 5, 7, data, LIMIT_S))
        await until(lambda: node.halts.begun)
        sending.cancel()  # the holder has gone
        await asyncio.gather(sending, return_exceptions=True)
        await asyncio.sleep(0.1)  # the server has seen it
        assert [name for name in os.listdir(primary.data_dir) if name.startswith("transfer-")]
        node.halts.slow.set()
        await until(lambda: node.halts.received)
        assert node.halts.received == [data]

    play(primary, scenario)


BAD_LOCKS = [
    {"id": 6}, {"pos": None}, {"epoch": "7"}, {"expires": "tomorrow"}, {"expires": 5},
    {"pos": {"TXID": "5", "PostApplyChecksum": "6", "Epoch": 1}}, {"pos": {}},
    {"pos": {"TXID": "0" * 16, "PostApplyChecksum": "8" + "0" * 15}},
]  # fmt: skip


@pytest.mark.parametrize("change", BAD_LOCKS, ids=str)
def test_a_primary_that_lies_about_a_lock(change: dict[str, Any]) -> None:
    good = {
        "id": 5, "pos": {"TXID": "0" * 16, "PostApplyChecksum": "8" + "0" * 15, "Epoch": 6},
        "expires": "2023-11-14T22:13:20Z", "epoch": 7,
    }  # fmt: skip

    async def go() -> None:
        app = web.Application()
        document = [good]

        async def answer(_request: web.Request) -> web.StreamResponse:
            return web.json_response(document[0], headers={"Litefs-Id": "B"})

        app.router.add_route("POST", "/halt", answer)
        server, sock = HttpServer(app, shutdown_timeout_s=1), listen("127.0.0.1", 0)
        await server.start(sock)
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        try:
            async with aiohttp.ClientSession() as session:
                assert (await Peers(session).halt(url, "a", 5, LIMIT_S)).position.epoch == 6
                document[0] = good | change
                with pytest.raises(errors.Unavailable, match="strange"):
                    await Peers(session).halt(url, "a", 5, LIMIT_S)
        finally:
            await server.close()

    asyncio.run(go())


def test_without_halts_there_is_no_such_route(primary: FencedStore) -> None:
    async def go() -> None:
        info = node_info()
        routes = ClusterRoutes(FakeControl(primary), primary, info, Future)
        paths = {route.path for route in routes.routes}
        assert "/sync" in paths and not paths & {"/halt", "/tx"}
        assert len({(route.method, route.path) for route in routes.routes}) == len(routes.routes)
        assert all(isinstance(route, Route) for route in routes.routes)

    asyncio.run(go())
