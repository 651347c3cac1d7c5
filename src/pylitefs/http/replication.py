"""Replication over HTTP: one WebSocket for each replica, opened by the replica at `PATH` of the primary's HTTP server.

Frames are binary, one message each, not compressed (pages are already). WebSocket pings are not used: the protocol has
heartbeats. The kernel holds back little (TCP_NOTSENT_LOWAT), so that what a session sends next is decided late, when
there is room for it, and a small transaction does not queue behind megabytes of another database's snapshot.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable

import aiohttp
from aiohttp import WSMsgType, web

from pylitefs.cluster.ports import Link, LinkClosed
from pylitefs.cluster.replica import Connect
from pylitefs.errors import ProtocolError
from pylitefs.formats.stream import MAX_MESSAGE

log = logging.getLogger("litefs.replication")

PATH = "/replicate"
SUBPROTOCOL = "pylitefs"
CONNECT_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 1.0
TCP_NOTSENT_LOWAT = 25  # linux/tcp.h; the socket module of Python 3.11 does not have it
NOT_SENT_BYTES = 128 * 1024  # that the kernel takes beyond what it can send

_CLOSING = frozenset({WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED})


class WebSocketLink:
    """A `cluster.ports.Link` over either end of a WebSocket."""

    def __init__(self, websocket: web.WebSocketResponse | aiohttp.ClientWebSocketResponse[bool]) -> None:
        self._socket = websocket
        self._peer = _address(websocket.get_extra_info("peername"))
        self._raw: socket.socket | None = websocket.get_extra_info("socket")
        _tune(self._raw)

    @property
    def peer(self) -> str:
        return self._peer

    async def send(self, data: bytes) -> None:
        try:
            await self._socket.send_bytes(data)
        except (ConnectionError, RuntimeError, aiohttp.ClientError) as error:
            raise LinkClosed(f"the connection to {self._peer} was lost: {error}") from None
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            raise LinkClosed(f"{self._peer} does not read") from None

    async def receive(self) -> bytes:
        while True:
            try:
                message = await self._socket.receive()
            except (ConnectionError, RuntimeError, aiohttp.ClientError) as error:
                raise LinkClosed(f"the connection to {self._peer} was lost: {error}") from None
            if message.type is WSMsgType.BINARY:
                data: bytes = message.data
                return data
            if message.type in _CLOSING:
                clean = self._socket.close_code in (1000, 1001)
                raise LinkClosed(f"{self._peer} {'closed' if clean else 'dropped'} the connection", clean)
            if message.type is WSMsgType.ERROR:
                raise self._broken(message.data)
            if message.type is WSMsgType.TEXT:
                raise ProtocolError(f"{self._peer} sent text")
            # a ping or pong of something in between: not ours to answer

    def _broken(self, error: object) -> Exception:
        if isinstance(error, aiohttp.WebSocketError):
            return ProtocolError(f"{self._peer} broke the WebSocket protocol: {error}")
        return LinkClosed(f"the connection to {self._peer} was lost: {error}")

    async def close(self) -> None:
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                try:
                    await self._socket.close()
                except Exception as error:  # whatever aiohttp makes of a connection that is gone
                    log.debug("closing the connection to %s: %r", self._peer, error)
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
        finally:
            if self._raw is not None:  # what a peer does not read would keep the connection open: end it all the same
                with contextlib.suppress(OSError):
                    self._raw.shutdown(socket.SHUT_RDWR)


def _is_cancelled() -> bool:
    """Whether a CancelledError is meant. In aiohttp a send that was cancelled while it waited leaves a cancelled future
    behind, and everything that is sent on that connection later stumbles over it."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


# --- the primary's end ----------------------------------------------------------------------------------------------


def handler(serve: Callable[[Link], Awaitable[None]]) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """The aiohttp handler for GET `PATH`; `serve` is `cluster.primary.Replicas.serve`."""

    async def replicate(request: web.Request) -> web.StreamResponse:
        websocket = web.WebSocketResponse(
            timeout=CLOSE_TIMEOUT_S,
            autoping=False,
            protocols=(SUBPROTOCOL,),
            compress=False,
            max_msg_size=MAX_MESSAGE,
        )
        if not websocket.can_prepare(request).ok:
            raise web.HTTPUpgradeRequired(text="this is where replicas connect: a WebSocket is expected\n")
        await websocket.prepare(request)
        await serve(WebSocketLink(websocket))
        return websocket

    return replicate


# --- the replica's end ----------------------------------------------------------------------------------------------


def connector(session: aiohttp.ClientSession, url: str) -> Connect:
    """How a replica connects to the primary at `url` (its base, such as http://10.0.0.1:20202)."""
    address = url.rstrip("/") + PATH

    async def connect() -> Link:
        try:
            websocket = await session.ws_connect(
                address,
                protocols=(SUBPROTOCOL,),
                timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_TIMEOUT_S),
                autoping=False,
                compress=0,
                max_msg_size=MAX_MESSAGE,
            )
        except aiohttp.WSServerHandshakeError as error:
            raise ProtocolError(
                f"{address} answered with HTTP status {error.status}: is it the HTTP address of a pylitefs primary?"
            ) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise LinkClosed(f"cannot connect to {address}: {plain_error(error)}") from None
        if websocket.protocol != SUBPROTOCOL:
            await websocket.close()
            raise ProtocolError(f"{address} is not a pylitefs primary")
        return WebSocketLink(websocket)

    return connect


def client_session() -> aiohttp.ClientSession:
    """A session for `connector`: no limit on the whole request (it lasts for days), one on connecting."""
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
        connector=aiohttp.TCPConnector(force_close=True),
    )


def plain_error(error: BaseException) -> str:
    """Why a connection failed, as a part of a line."""
    if isinstance(error, aiohttp.ClientConnectorError):
        number = error.os_error.errno
        return os.strerror(number).lower() if number else str(error.os_error).lower()
    return str(error) or type(error).__name__


def _address(peer: object) -> str:
    if not isinstance(peer, tuple) or len(peer) < 2:
        return "unknown"
    host = f"[{peer[0]}]" if ":" in str(peer[0]) else peer[0]
    return f"{host}:{peer[1]}"


def _tune(sock: socket.socket | None) -> None:
    """Send at once, buffer little."""
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, NOT_SENT_BYTES)
