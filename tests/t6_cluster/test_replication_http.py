"""Replication over real HTTP on loopback: the real engine on both nodes (nothing is mounted) and real SQLite data."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from pylitefs.cluster.backoff import Backoff
from pylitefs.cluster.channel import Timings
from pylitefs.cluster.ports import LinkClosed
from pylitefs.cluster.primary import Replicas
from pylitefs.cluster.replica import Replica
from pylitefs.cluster.roles import NodeIdentity
from pylitefs.engine.store import Store
from pylitefs.errors import ProtocolError
from pylitefs.formats import stream
from pylitefs.formats.stream import PROTOCOL_VERSION, Sender
from pylitefs.formats.stream_fields import ErrorCode
from pylitefs.http.replication import PATH, SUBPROTOCOL, client_session, connector, handler

sys.path.append(str(Path(__file__).parent.parent / "t4_simulation"))
from real_nodes import Application, open_store

FAST = Timings(heartbeat_s=0.05, deadline_s=2.0, handshake_s=2.0, durable_s=0.05)


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.primary = open_store(folder / "primary", is_primary=True)
        self.replica = open_store(folder / "replica", is_primary=False)
        self.url = ""
        self.replicas: Replicas
        self.follower: Replica

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with Replicas(self.primary, NodeIdentity(1, "db1"), timings=FAST) as self.replicas:
            app = web.Application()
            app.router.add_get(PATH, handler(self.replicas.serve))
            runner = web.AppRunner(app)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.url = "http://{}:{}".format(*runner.addresses[0][:2])
            async with client_session() as session:
                self.follower = Replica(
                    self.replica,
                    NodeIdentity(2, "db2"),
                    connector(session, self.url),
                    timings=FAST,
                    backoff=Backoff(0.01, 0.1),
                )
                task = asyncio.ensure_future(self.follower.run())
                try:
                    yield
                finally:
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
            await runner.cleanup()

    async def until(self, condition: Callable[[], object]) -> None:
        try:
            async with asyncio.timeout(20):
                while not condition():
                    await asyncio.sleep(0.005)
        except TimeoutError:
            state = self.follower.state
            raise AssertionError(f"did not happen; replica: {state}; primary: {self.replicas.infos()}") from None

    async def until_equal(self) -> None:
        """Same positions, the same bytes, and SQLite has nothing to complain of."""

        def positions(store: Store) -> dict[str, object]:
            return {name: store.find(name).position for name in store.names()}

        await self.until(lambda: positions(self.primary) == positions(self.replica))
        for name in self.primary.names():
            copies = []
            for store in (self.primary, self.replica):
                path = self.folder / f"copy-{store.is_primary}"
                await asyncio.to_thread(store.find(name).copy_to, str(path))
                copies.append(path.read_bytes())
                with contextlib.closing(sqlite3.connect(path)) as db:
                    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert copies[0] == copies[1]

    def close(self) -> None:
        self.primary.close(clean=True)
        self.replica.close(clean=True)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.close()


def test_two_nodes_over_http(cluster: Cluster) -> None:
    async def go() -> None:
        first = Application(cluster.primary, "a.db")
        async with cluster.running():
            await cluster.until_equal()
            second = Application(cluster.primary, "b.db")
            for _ in range(20):
                first.insert()
                second.insert(5000)
            await cluster.until_equal()
            first.insert(3_000_000)
            await cluster.until_equal()
            first.run("DELETE FROM t")
            first.run("VACUUM")
            await cluster.until_equal()
            cluster.primary.worker.submit(cluster.primary.naming.drop, second.database).result()
            await cluster.until(lambda: cluster.replica.names() == ["a.db"])
            head = first.database.position.txid
            await cluster.until(lambda: cluster.replicas.progress("a.db")[2].durable == head)
            info = cluster.replicas.infos()[0]
            assert info.hostname == "db2" and info.address.startswith("127.0.0.1:")

    asyncio.run(go())


def test_a_replica_that_was_away_catches_up_or_gets_what_differs(cluster: Cluster) -> None:
    async def go() -> None:
        app = Application(cluster.primary, "a.db")
        async with cluster.running():
            app.insert(200_000)
            await cluster.until_equal()
        for _ in range(30):
            app.insert()
        async with cluster.running():
            await cluster.until_equal()
        resyncs = []
        cluster.replica.events.subscribe(lambda event: resyncs.append(event) if event.type == "resync" else None)
        for _ in range(3):
            app.insert()
        app.database.log.retain(0, 1)
        async with cluster.running():
            await cluster.until_equal()
            app.insert()
            await cluster.until_equal()
        assert len(resyncs) == 1 and 0 < resyncs[0].data["pages"] < 10

    asyncio.run(go())


def test_what_is_no_replica_is_turned_away(cluster: Cluster) -> None:
    hello = stream.pack(stream.Hello(PROTOCOL_VERSION, cluster.primary.cluster_id or "", 9, "x"))

    async def says(session: aiohttp.ClientSession, *frames: bytes | str) -> stream.Message | None:
        """The primary's last message to a peer that sends these frames."""
        last = None
        async with session.ws_connect(cluster.url + PATH, protocols=(SUBPROTOCOL,), max_msg_size=0) as socket:
            for frame in frames:
                await (socket.send_str(frame) if isinstance(frame, str) else socket.send_bytes(frame))
            async with asyncio.timeout(5):
                async for message in socket:
                    if message.type is aiohttp.WSMsgType.BINARY:
                        last = stream.unpack(message.data, Sender.PRIMARY)
        return last

    async def go() -> None:
        async with cluster.running(), aiohttp.ClientSession() as session:
            async with session.get(cluster.url + PATH) as response:
                assert response.status == 426
            await cluster.until(cluster.follower.ready.is_set)
            for frames in ((b"rubbish",), ("text",), (hello, b"\x0b\x01\x00", b"\xff"), (hello, hello)):
                answer = await says(session, *frames)
                assert isinstance(answer, stream.Error) and answer.code is ErrorCode.PROTOCOL
            await says(session, bytes(stream.MAX_MESSAGE + 1))  # the WebSocket layer itself cuts this off
            await cluster.until(lambda: list(cluster.replicas.sessions) == [2])

    asyncio.run(go())


def test_a_replica_says_why_it_cannot_connect(unused_port: int) -> None:
    async def other(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        return socket

    async def go() -> None:
        app = web.Application()
        app.router.add_get("/else" + PATH, other)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", unused_port).start()
        base = f"http://127.0.0.1:{unused_port}"
        async with client_session() as session:
            with pytest.raises(ProtocolError, match="status 404"):
                await connector(session, base)()
            with pytest.raises(ProtocolError, match="not a pylitefs primary"):
                await connector(session, base + "/else")()
            await runner.cleanup()
            with pytest.raises(LinkClosed, match="connection refused"):
                await connector(session, base)()

    asyncio.run(go())


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
