"""The cluster over HTTP: what load balancers, operators and the other nodes ask (see `cluster.control`).

    GET, HEAD  /primary /replica /read-only /sync-standby /readiness /liveness   see `health`
    GET        /cluster     all nodes: roles, positions, lag, epoch
    GET        /history     the changes of the primary, oldest first
    GET        /sync        ?db=NAME[&txid=HEX][&timeout=T]: answers when this node has that transaction, or everything
                            the primary had when it was asked; 504 when it has not in time
    POST       /promote     [?nodeID=HEX][&force=true] make this node, or that one, the primary; by force, where there
                            is none, also one that may lack acknowledged commits
    POST       /handoff     [?nodeID=HEX] on the primary: pass the lease to that node, or to the best replica
    POST       /pause       no automatic failover any more; /resume ends that
    GET        /position    ?db=NAME: on the primary, a position that covers every acknowledged commit
    GET        /positions   where this node is, for elections
    POST       /failsafe    ?leader=HEX&epoch=N: 200 if this node follows that primary and promises to wait, else 409
    POST       /nudge       look at the lease engine now
    …          /halt /tx    see `halts`

/promote and /handoff answer when it is done: 200, 409 if that node may not become the primary, 503 if it did not work,
504 if it has taken longer than `timeout` (and may still succeed). What only the primary can do is 421 elsewhere, with
the URL of the primary in a header.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from aiohttp import web

from pylitefs.cluster.control import Control, Halts
from pylitefs.cluster.lease_port import now_s
from pylitefs.errors import NotPrimary, ReadOnlyReplica, Unavailable
from pylitefs.http.cluster_documents import (
    cluster_document,
    failovers_after,
    history_document,
    node_id_text,
    numbers,
    position_answer,
)
from pylitefs.http.halts import HaltRoutes
from pylitefs.http.health import Health, Ping
from pylitefs.http.queries import (
    checked_name,
    flag,
    name_in,
    optional_node_id,
    optional_txid,
    parse_epoch,
    parse_node_id,
    timeout_s,
)
from pylitefs.http.route import Route, json_answer, line_answer
from pylitefs.http.waiting import Waiting
from pylitefs.status import ClusterNumbers, FencedStoreView, Json, NodeInfo

SYNC_TIMEOUT_S = 30.0
POSITION_TIMEOUT_S = 10.0
CHANGE_TIMEOUT_S = 50.0  # of the primary; the command line gives up after 60 s
MAX_TIMEOUT_S = 3600.0
MAX_SYNCS = 256
"""Requests of /sync and /position that wait at the same time."""


class ClusterRoutes:
    """The routes of one node, for `server.build_app`, which also shows `document` and `numbers`. Make it on the loop.

    `ping` gives the engine's worker something trivial to do, for /liveness; a job of a database that does not exist is
    done while a long one of another gives way. Without `halts` there is neither /halt nor /tx. `max_body_bytes` limits
    /tx (0: no limit).
    """

    def __init__(
        self,
        control: Control,
        store: FencedStoreView,
        node: NodeInfo,
        ping: Ping,
        halts: Halts | None = None,
        max_body_bytes: int = 0,
    ) -> None:
        self._control = control
        self._store = store
        self._waiting = Waiting()
        self._syncs = 0
        self._failovers = self._counted_epoch = 0
        self.routes = (
            *Health(control, store, node, ping).routes,
            Route("GET", "/cluster", self.cluster),
            Route("GET", "/history", self.history),
            Route("GET", "/sync", self.sync),
            Route("POST", "/promote", self.promote),
            Route("POST", "/handoff", self.handoff),
            Route("POST", "/pause", self.pause),
            Route("POST", "/resume", self.resume),
            Route("GET", "/position", self.position),
            Route("GET", "/positions", self.positions),
            Route("POST", "/failsafe", self.failsafe),
            Route("POST", "/nudge", self.nudge),
        )
        if halts is not None:
            self.routes += HaltRoutes(
                halts, control, self._waiting, store.data_dir, node.node_id, max_body_bytes
            ).routes

    def document(self) -> Json:
        """The document of /cluster."""
        return cluster_document(self._control.view())

    async def fresh_document(self) -> Json:
        """… for people, who may wait for it."""
        await self._control.refresh()
        return self.document()

    def numbers(self) -> ClusterNumbers:
        """What metrics show."""
        view = self._control.view()
        new, self._counted_epoch = failovers_after(view, self._counted_epoch)
        self._failovers += new  # the history forgets
        return numbers(view, self._store.is_primary, self._store.fence.until_s - now_s(), self._failovers)

    async def on_shutdown(self, _app: web.Application) -> None:
        """Ends what would not end by itself."""
        self._waiting.close()

    # --- what is known -----------------------------------------------------------------------------------------------

    async def cluster(self, _request: web.Request) -> web.Response:
        return json_answer(await self.fresh_document())

    async def history(self, _request: web.Request) -> web.Response:
        return json_answer(history_document(self._control.view()))

    async def positions(self, _request: web.Request) -> web.Response:
        return json_answer(self._control.positions())

    # --- positions ---------------------------------------------------------------------------------------------------

    async def sync(self, request: web.Request) -> web.Response:
        name = checked_name(name_in(request.rel_url.raw_query_string, "db"), "db")
        txid = optional_txid(request.query)
        limit_s = timeout_s(request.query, SYNC_TIMEOUT_S, MAX_TIMEOUT_S)
        late = f'"{name}" has not reached that position within {limit_s:g} s: see the lag in litefs status'
        with _Counted(self):
            position = await self._waiting.finish(request, self._control.sync(name, txid, limit_s), limit_s, late)
        return json_answer(position_answer(name, position))

    async def position(self, request: web.Request) -> web.Response:
        name = checked_name(name_in(request.rel_url.raw_query_string, "db"), "db")
        limit_s = timeout_s(request.query, POSITION_TIMEOUT_S, MAX_TIMEOUT_S)
        late = f'no position of "{name}" within {limit_s:g} s: this node is busy, or cannot renew its lease'
        with _Counted(self):
            try:
                position = await self._waiting.finish(request, self._control.fresh_position(name), limit_s, late)
            except ReadOnlyReplica:
                primary = self._control.view().primary
                raise NotPrimary(primary_url=primary.url if primary is not None else "") from None
        return json_answer(position_answer(name, position))

    # --- changes -----------------------------------------------------------------------------------------------------

    async def promote(self, request: web.Request) -> web.Response:
        node_id = optional_node_id(request.query)
        await self._change(request, self._control.promote, node_id, flag(request.query, "force"))
        return line_answer("this node is the primary" if node_id is None else f"{node_id_text(node_id)} is the primary")

    async def handoff(self, request: web.Request) -> web.Response:
        node_id = optional_node_id(request.query)
        await self._change(request, self._control.handoff, node_id)
        return line_answer(
            "another node is the primary" if node_id is None else f"{node_id_text(node_id)} is the primary"
        )

    async def _change(self, request: web.Request, call: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        limit_s = timeout_s(request.query, CHANGE_TIMEOUT_S, MAX_TIMEOUT_S)
        late = f"not done within {limit_s:g} s, and still under way: litefs status shows how it ends"
        await self._waiting.finish(request, call(*args), limit_s, late, goes_on=True)

    async def pause(self, request: web.Request) -> web.Response:
        await self._pause(request, True)
        return line_answer("paused: no automatic failover until litefs resume")

    async def resume(self, request: web.Request) -> web.Response:
        await self._pause(request, False)
        return line_answer("resumed: automatic failover is on")

    async def _pause(self, request: web.Request, paused: bool) -> None:
        limit_s = timeout_s(request.query, SYNC_TIMEOUT_S, MAX_TIMEOUT_S)
        late = f"the lease engine has not taken it within {limit_s:g} s: litefs status shows whether it has since"
        await self._waiting.finish(request, self._control.pause(paused), limit_s, late, goes_on=True)

    async def failsafe(self, request: web.Request) -> web.Response:
        leader_id = parse_node_id(request.query.get("leader"), "leader")
        epoch = parse_epoch(request.query.get("epoch"), "epoch=")
        limit_s = timeout_s(request.query, POSITION_TIMEOUT_S, MAX_TIMEOUT_S)
        confirming = self._control.confirm_failsafe(leader_id, epoch)
        refusal = await self._waiting.finish(request, confirming, limit_s, f"no promise within {limit_s:g} s")
        if refusal:
            return line_answer(refusal, 409)
        return line_answer("ok")

    async def nudge(self, _request: web.Request) -> web.Response:
        self._control.nudge()
        return line_answer("ok")


class _Counted:
    """One of at most `MAX_SYNCS` that wait."""

    def __init__(self, routes: ClusterRoutes) -> None:
        self._routes = routes

    def __enter__(self) -> None:
        if self._routes._syncs >= MAX_SYNCS:
            raise Unavailable(f"{MAX_SYNCS} requests wait for positions already")
        self._routes._syncs += 1

    def __exit__(self, *_error: object) -> None:
        self._routes._syncs -= 1
