"""The HTTP server of a node: LiteFS's API, metrics and health, and whatever routes it is given beside them.

    GET   /info        who this node is, and the position of every database (a barrier)
    GET   /status      what `litefs status` shows (a barrier)
    GET   /events      newline-delimited JSON, endless
    GET   /export      ?name=DATABASE: a consistent copy
    POST  /import      ?name=DATABASE: create or replace; on the primary
    GET   /metrics     Prometheus
    GET   /healthz     200 "ok", or 503 and the reason
    GET   /debug/vars  positions without a barrier
    …     the cluster's, see `cluster_routes`

Every answer carries Litefs-Id and, once it is known, Litefs-Cluster-Id. An error is a status and one line of text.
Limits: request lines and headers 8 KiB each (aiohttp), bodies 64 KiB except an import's, `MAX_CONNECTIONS`, and
`IDLE_TIMEOUT_S` for a connection that asks for nothing. There is no authentication: the port belongs into a
private network, as LiteFS's does.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from pylitefs.cluster.tasks import supervised
from pylitefs.errors import LitefsError, Unavailable
from pylitefs.events import EventStream
from pylitefs.formats.ltx.format import Position
from pylitefs.http.cluster_routes import ClusterRoutes
from pylitefs.http.errors import ErrorTranslator, Handler
from pylitefs.http.route import Route as Route
from pylitefs.http.route import json_answer
from pylitefs.http.transfers import SEND_TIMEOUT_S, Importer, Transfers
from pylitefs.observability.metrics import Metrics
from pylitefs.status import (
    NodeInfo,
    Replicas,
    StoreView,
    debug_document,
    event_line,
    info_document,
    init_event,
    status_document,
)

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 << 10
MAX_CONNECTIONS = 512
MAX_EVENT_STREAMS = 64
BARRIER_TIMEOUT_S = 10.0
IDLE_TIMEOUT_S = 45.0  # a connection without a request; aiohttp itself ends kept-alive ones after 30 s
_SWEEP_INTERVAL_S = 5.0
_LOOK_INTERVAL_S = 5.0  # how soon an event stream without events sees that its consumer is gone


class HttpSettings(Protocol):
    """What is needed of the `http` section of the configuration."""

    @property
    def max_import_size_bytes(self) -> int: ...


class Api:
    """The handlers of one node's own routes."""

    def __init__(
        self,
        store: StoreView,
        replicas: Replicas,
        config: HttpSettings,
        node: NodeInfo,
        importer: Importer,
        cluster: ClusterRoutes | None,
    ) -> None:
        self._store = store
        self._cluster = cluster
        self._replicas = replicas
        self._node = node
        self._metrics = Metrics(store, replicas)
        self._transfers = Transfers(store, importer, config.max_import_size_bytes)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="http")  # answers that read many files' sizes
        self._streams = 0
        self._stopping = asyncio.Event()
        self.routes = (
            Route("GET", "/info", self.info),
            Route("GET", "/status", self.status),
            Route("GET", "/events", self.events),
            Route("GET", "/export", self._transfers.export),
            Route("POST", "/import", self._transfers.import_),
            Route("GET", "/metrics", self.metrics),
            *(Route(method, path, self.healthz) for path in ("/healthz", "/health") for method in ("GET", "HEAD")),
            Route("GET", "/debug/vars", self.debug_vars),
        )

    async def on_startup(self, _app: web.Application) -> None:
        self._transfers.remove_leftovers()

    async def on_shutdown(self, _app: web.Application) -> None:
        """Ends what would not end by itself; ordinary requests may finish."""
        self._stopping.set()
        self._transfers.close()

    async def on_cleanup(self, _app: web.Application) -> None:
        self._metrics.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def on_prepare(self, _request: web.Request, response: web.StreamResponse) -> None:
        """Before the head of an answer is sent."""
        response.headers["Litefs-Id"] = self._node.node_id
        if self._store.cluster_id:
            response.headers["Litefs-Cluster-Id"] = self._store.cluster_id

    # --- handlers ----------------------------------------------------------------------------------------------------

    async def info(self, _request: web.Request) -> web.Response:
        positions = await self._barrier()
        return json_answer(info_document(self._store, self._node, positions, time.time()))

    async def status(self, _request: web.Request) -> web.Response:
        await self._barrier()
        replicas = self._replicas()
        cluster = await self._cluster.fresh_document() if self._cluster is not None else None
        loop = asyncio.get_running_loop()
        document = await loop.run_in_executor(
            self._thread, status_document, self._store, self._node, replicas, time.time(), cluster
        )
        return json_answer(document)

    async def metrics(self, _request: web.Request) -> web.Response:
        numbers = self._cluster.numbers() if self._cluster is not None else None
        body = await asyncio.get_running_loop().run_in_executor(self._thread, self._metrics.expose, numbers)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def healthz(self, _request: web.Request) -> web.Response:
        problem = "this node is stopping" if self._stopping.is_set() else self._node.unhealthy()
        if problem is not None:
            return web.Response(status=503, text=f"{' '.join(problem.split())}\n")
        return web.Response(text="ok\n")

    async def debug_vars(self, _request: web.Request) -> web.Response:
        return json_answer(debug_document(self._store, self._node))

    async def events(self, request: web.Request) -> web.StreamResponse:
        if self._streams >= MAX_EVENT_STREAMS:
            raise Unavailable(f"{MAX_EVENT_STREAMS} event streams are open already")
        self._streams += 1
        try:
            return await self._stream_events(request)
        finally:
            self._streams -= 1

    async def _stream_events(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json", "Cache-Control": "no-store"})
        with EventStream(self._store.events) as stream:
            await response.prepare(request)
            await response.write(event_line(init_event(self._store)))
            writing = asyncio.ensure_future(self._write_events(request, response, stream))
            ends = [asyncio.ensure_future(stream.overflowed.wait()), asyncio.ensure_future(self._stopping.wait())]
            try:
                await asyncio.wait([writing, *ends], return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in [writing, *ends]:
                    task.cancel()
                await asyncio.gather(writing, *ends, return_exceptions=True)
            if stream.overflowed.is_set() and request.transport is not None:
                log.info("event stream ended: its reader is too slow", extra={"peer": request.remote})
                request.transport.abort()
        return response

    async def _write_events(self, request: web.Request, response: web.StreamResponse, stream: EventStream) -> None:
        """Until the consumer is gone or too slow."""
        while request.transport is not None and not request.transport.is_closing():
            batch = await stream.next_batch(_LOOK_INTERVAL_S)
            if batch:
                lines = b"".join(event_line(event) for event in batch)
                await asyncio.wait_for(response.write(lines), SEND_TIMEOUT_S)

    async def _barrier(self) -> dict[str, Position]:
        """Positions that cover every commit that had returned before the request."""
        future = asyncio.wrap_future(self._store.flush_all())
        try:
            return await asyncio.wait_for(asyncio.shield(future), BARRIER_TIMEOUT_S)
        except TimeoutError:
            raise Unavailable(f"this node is busy: no position within {BARRIER_TIMEOUT_S:.0f} s") from None


def build_app(
    store: StoreView,
    replicas: Replicas,
    config: HttpSettings,
    node: NodeInfo,
    importer: Importer,
    extra_routes: Iterable[Route] = (),
    cluster: ClusterRoutes | None = None,
) -> web.Application:
    """The application of one node. Call it on the event loop; run it with `HttpServer`.

    `importer` is described where its type is. `extra_routes`: for example the replication endpoint; their errors are
    translated and their answers get the headers; what takes long in them must end by itself at shutdown. `cluster`
    brings its routes, and what /status and /metrics tell of the cluster.
    """
    api = Api(store, replicas, config, node, importer, cluster)
    app = web.Application(client_max_size=MAX_BODY_BYTES)
    ErrorTranslator().install(app)
    for route in (*api.routes, *(cluster.routes if cluster is not None else ()), *extra_routes):
        app.router.add_route(route.method, route.path, route.handler)
    app.on_response_prepare.append(api.on_prepare)
    app.on_startup.append(api.on_startup)
    app.on_shutdown.append(api.on_shutdown)
    if cluster is not None:
        app.on_shutdown.append(cluster.on_shutdown)
    app.on_cleanup.append(api.on_cleanup)
    return app


_BACKLOG = 128  # connections that wait to be accepted


# --- sockets ---------------------------------------------------------------------------------------------------------


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; an empty host means all interfaces, both IP versions where the machine has them.

    Opened early, so that a port in use ends the start before anything is mounted. Raises LitefsError.
    """
    shown = f"{f'[{host}]' if ':' in host else host}:{port}"
    try:
        if not host and socket.has_dualstack_ipv6():
            try:
                return _prepared(socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True))
            except OSError as error:
                if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):  # IPv6 may be switched off
                    raise
        if not host:
            return _prepared(socket.create_server(("", port)))
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return _prepared(socket.create_server(address[:2], family=family))
    except (OSError, OverflowError, UnicodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        hint = "is another litefs running? stop it, or set http.addr to a free port"
        raise LitefsError(f"cannot listen on {shown}: {reason.lower()}: {hint}") from None


def _without_traceback(record: logging.LogRecord) -> bool:
    """What is not HTTP, or beyond a limit, is the peer's mistake: one line, where aiohttp logs a traceback."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError):
        record.msg, record.args, record.exc_info = f"bad HTTP request: {type(error).__name__}", (), None
        record.levelno, record.levelname = logging.WARNING, "WARNING"
    return True


def _prepared(sock: socket.socket) -> socket.socket:
    sock.setblocking(False)
    return sock


class HttpServer:
    """Runs an application on listening sockets."""

    def __init__(self, app: web.Application, *, shutdown_timeout_s: float = 3.0) -> None:
        app.middlewares.append(self._count)
        logging.getLogger("aiohttp.server").addFilter(_without_traceback)
        self._active: set[asyncio.BaseTransport] = set()  # connections with a request in work
        self._idle_since: dict[asyncio.BaseTransport, float] = {}
        self._sweeper: asyncio.Task[None] | None = None
        self._runner = web.AppRunner(
            app, access_log=None, handle_signals=False, keepalive_timeout=30, shutdown_timeout=shutdown_timeout_s
        )

    async def start(self, *sockets: socket.socket) -> None:
        """Serve on `sockets`, which are closed by `close`."""
        await self._runner.setup()
        for sock in sockets:
            # asyncio accepts `backlog` connections in a row, and with no descriptor left fails as often
            await web.SockSite(self._runner, sock, backlog=1).start()
            sock.listen(_BACKLOG)
        self._sweeper = asyncio.create_task(supervised("dropping idle connections", self._sweep))

    async def close(self) -> None:
        """Stop listening, let requests finish for a moment, then cut them off. May be called twice."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
            self._sweeper = None
        await self._runner.cleanup()

    @web.middleware
    async def _count(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        transport = request.transport
        if transport is None:
            return await handler(request)
        self._active.add(transport)
        try:
            return await handler(request)
        finally:
            self._active.discard(transport)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_INTERVAL_S)
            self.drop_idle(time.monotonic())

    def drop_idle(self, now_s: float) -> None:
        """Cut connections that have sent no whole request for long; at once when there are too many."""
        server = self._runner.server
        if server is None:
            return
        transports: set[asyncio.BaseTransport] = {
            handler.transport for handler in server.connections if handler.transport is not None
        }
        idle = transports - self._active
        self._idle_since = {transport: self._idle_since.get(transport, now_s) for transport in idle}
        limit_s = IDLE_TIMEOUT_S if len(transports) <= MAX_CONNECTIONS else 0.0
        for transport, since_s in self._idle_since.items():
            if now_s - since_s >= limit_s and isinstance(transport, asyncio.WriteTransport):
                transport.abort()
