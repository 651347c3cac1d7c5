"""How servers are asked: in turn, and all of them together within the time that one question may take."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from pylitefs.errors import Unavailable
from pylitefs.lease.http_json import JsonClient
from pylitefs.lease.object_store import open_bucket

TIMEOUT_S = 0.4
Reply = Callable[[int, asyncio.StreamWriter], Awaitable[None]]


class Server:
    """Counts the requests it gets; `reply` answers the n-th."""

    def __init__(self, reply: Reply) -> None:
        self.asked = 0
        self._reply = reply
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            self.asked += 1
            await self._reply(self.asked, writer)
        writer.close()


async def hang(_number: int, _writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(60)


async def hang_up_once(number: int, writer: asyncio.StreamWriter) -> None:
    if number > 1:
        await answer(number, writer)


async def hang_up(_number: int, _writer: asyncio.StreamWriter) -> None:
    pass


async def answer(_number: int, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
    await writer.drain()


@asynccontextmanager
async def serving(*replies: Reply) -> AsyncIterator[tuple[JsonClient, list[Server]]]:
    async with contextlib.AsyncExitStack() as stack:
        servers = [Server(reply) for reply in replies]
        for server in servers:
            listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
            stack.callback(listener.close)
            server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        client = JsonClient("etcd", [server.url for server in servers], "lease.etcd", TIMEOUT_S)
        stack.push_async_callback(client.close)
        yield client, servers


@pytest.mark.parametrize("again", [False, True])
async def test_a_server_that_hangs_is_not_waited_for_twice(again: bool) -> None:
    async with serving(hang) as (client, servers):
        with pytest.raises(Unavailable, match="did not answer"):
            await client.ask("GET", "/", again=again)
        assert servers[0].asked == 1


async def test_servers_that_hang_share_the_time() -> None:
    async with serving(hang, hang) as (client, servers):
        with pytest.raises(Unavailable, match="did not answer"):
            await client.ask("GET", "/", again=True)
        assert [server.asked for server in servers] == [1, 1]


async def test_another_server_answers_for_one_that_hangs() -> None:
    async with serving(hang, answer) as (client, servers):
        assert (await client.ask("GET", "/", again=True)).url == servers[1].url


async def test_a_connection_that_was_closed_is_opened_again() -> None:
    async with serving(hang_up_once) as (client, servers):
        assert (await client.ask("GET", "/", again=True)).status == 200
        assert servers[0].asked == 2


@pytest.mark.parametrize("reply", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
async def test_a_server_without_tls_is_told_from_one_that_does_not_run(reply: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(reply)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(Unavailable, match=r"^[^\[\n]*does it speak TLS\? check lease\.etcd$"):
            await asked_once(f"https://127.0.0.1:{port}")
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:\d+: connection refused: is it running\? check lease\.etcd$"):
        await asked_once(f"http://127.0.0.1:{port}")


async def asked_once(url: str) -> None:
    client = JsonClient("etcd", [url], "lease.etcd", TIMEOUT_S)
    try:
        await client.ask("GET", "/")
    finally:
        await client.close()


async def test_a_bucket_that_cannot_be_reached_says_the_same_every_time() -> None:
    """What the library says has times in it: the log would have a line for every attempt."""
    async with serving(hang_up) as (_, servers):
        options = {"endpoint": servers[0].url, "access_key_id": "a", "secret_access_key": "b"}
        engine = open_bucket("s3://b/x", options, TIMEOUT_S)
        said = set()
        for _ in range(5):
            with pytest.raises(Unavailable) as caught:
                await engine.view()
            said.add(str(caught.value))
        assert len(said) == 1, said
        assert servers[0].asked == 5
