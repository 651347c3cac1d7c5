"""Endpoints that load balancers poll: GET or HEAD, 200 or 503, one line that says why. The names are Patroni's.

    /primary, /leader   this node is the primary and its lease is valid
    /replica            a replica that is connected, has caught up, and keeps every `lag=`
    /read-only          may serve reads: the primary, or a replica that keeps every `lag=`; connected or not without one
    /sync-standby       as /replica, and commits wait for it
    /readiness          mounted, and the primary or following it, within every `lag=`
    /liveness           the process works: its engine has answered within `LIVENESS_DEADLINE_S`

With `db=NAME` the same for one database: 404 if there is none, 503 if it was set aside. `lag=10s` is a time and
`lag=100tx` a number of transactions; a lag that is not known is too large. Nothing waits here, nothing is written to
the log, and only transactions and /sync-standby look at more than a few variables: many may ask every 100 ms.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from aiohttp import web

from pylitefs.cluster.control import ClusterView, Control
from pylitefs.cluster.election import lag
from pylitefs.errors import LitefsError
from pylitefs.http.errors import Handler, status_and_text
from pylitefs.http.queries import LagLimit, checked_name, lag_limits, name_in
from pylitefs.http.route import Route
from pylitefs.status import FencedStoreView, NodeInfo

LIVENESS_DEADLINE_S = 30.0
PULSE_INTERVAL_S = 1.0
VIEW_AGE_S = 0.05
"""How old a view of the cluster may be that answers a health check."""

Ping = Callable[[], "Future[Any]"]
"""Gives the engine's worker something trivial to do."""
Check = Callable[[str | None, Sequence[LagLimit]], str]
"""Why not, about a database or the node; "" if all is well."""


class Pulse:
    """Whether the engine answers. Asked again at the next look, once it has answered; a look does not wait."""

    def __init__(self, ping: Ping, deadline_s: float = LIVENESS_DEADLINE_S) -> None:
        self._ping = ping
        self._deadline_s = deadline_s
        self._pending: Future[Any] | None = None
        self._asked_s = float("-inf")

    def problem(self, now_s: float) -> str:
        if self._pending is not None and self._pending.done():
            self._pending = None
        if self._pending is None:
            if now_s - self._asked_s >= PULSE_INTERVAL_S:
                self._asked_s = now_s
                try:
                    self._pending = self._ping()
                except (OSError, RuntimeError):
                    return "the engine is stopped"
            return ""
        waited_s = now_s - self._asked_s
        return f"the engine has not answered for {waited_s:.0f} s" if waited_s > self._deadline_s else ""


class Health:
    """The answers of one node. Call it on the event loop."""

    def __init__(self, control: Control, store: FencedStoreView, node: NodeInfo, ping: Ping) -> None:
        self._control = control
        self._store = store
        self._node = node
        self._pulse = Pulse(ping)
        self._view: ClusterView | None = None
        self._view_s = 0.0
        checks: dict[str, Check] = {
            "/primary": self._not_primary,
            "/leader": self._not_primary,
            "/replica": self._not_replica,
            "/read-only": self._not_readable,
            "/sync-standby": self._not_in_sync,
            "/readiness": self._not_ready,
            "/liveness": self._not_alive,
        }
        self.routes = tuple(
            Route(method, path, self._handler(check)) for path, check in checks.items() for method in ("GET", "HEAD")
        )

    def _handler(self, check: Check) -> Handler:
        async def answer(request: web.Request) -> web.Response:
            try:
                name = name_in(request.rel_url.raw_query_string, "db")
                name = None if name is None else checked_name(name, "db")
                limits = lag_limits(request.query.getall("lag", []))
                if name is not None and (problem := self._database_problem(name)):
                    status, text = problem
                else:
                    text = check(name, limits)
                    status = 503 if text else 200
            except LitefsError as error:  # answered here: what comes ten times a second is not written to the log
                status, text = status_and_text(error)
            line = " ".join(text.split()) or self._role()
            return web.Response(status=status, text=f"{line}\n", headers={"Cache-Control": "no-store"})

        return answer

    # --- what is asked -----------------------------------------------------------------------------------------------

    def _role(self) -> str:
        if self._store.is_primary:
            return "primary"
        lag_ms = self._store.lag_ms
        return "replica" if lag_ms is None else f"replica, lag {lag_ms} ms"

    def _database_problem(self, name: str) -> tuple[int, str] | None:
        database = self._store.get(name)
        if database is not None and database.set_aside_reason is not None:
            return 503, f"the database is set aside: {database.set_aside_reason}"
        if database is None or not database.commit:  # of one that was dropped something is left for a while
            return 404, f'database not found: "{name}"'
        return None

    def _not_primary(self, _name: str | None, _limits: Sequence[LagLimit]) -> str:
        if not self._store.is_primary:
            return "this node is a replica"
        return self._not_mounted() or self._lease_problem()

    def _not_replica(self, name: str | None, limits: Sequence[LagLimit]) -> str:
        if self._store.is_primary:
            return "this node is the primary"
        return self._not_following() or self._lag_problem(name, limits)

    def _not_readable(self, name: str | None, limits: Sequence[LagLimit]) -> str:
        if problem := self._not_mounted():
            return problem
        if self._store.is_primary:
            return self._lease_problem() if limits else ""
        if limits:
            return self._lag_problem(name, limits)
        if self._store.lag_ms is None and not self._store.names():
            return "this replica has no data yet"
        return ""

    def _not_in_sync(self, name: str | None, limits: Sequence[LagLimit]) -> str:
        if problem := self._not_replica(name, limits):
            return problem
        view = self._recent_view()
        if view.in_sync is None:
            return "replication is asynchronous"
        return "" if view.node_id in view.in_sync else "commits do not wait for this replica"

    def _not_ready(self, name: str | None, limits: Sequence[LagLimit]) -> str:
        if self._store.is_primary:
            return self._not_primary(name, limits)
        return self._not_replica(name, limits)

    def _not_alive(self, _name: str | None, _limits: Sequence[LagLimit]) -> str:
        return self._pulse.problem(time.monotonic())

    # --- what it follows from ----------------------------------------------------------------------------------------

    def _not_mounted(self) -> str:
        return "not mounted (starting or stopping)" if self._node.passthrough() is None else ""

    def _lease_problem(self) -> str:
        return "" if self._store.fence.holds() else "this node's lease has ended"

    def _not_following(self) -> str:
        if problem := self._not_mounted() or self._node.unhealthy():
            return problem
        return "" if self._node.caught_up() else "this replica has not caught up yet"

    def _lag_problem(self, name: str | None, limits: Sequence[LagLimit]) -> str:
        for limit in limits:
            if limit.transactions is not None:
                behind = None if self._not_following() else self._behind(name)
                if behind is None:
                    return "it is not known how many transactions this replica is behind"
                if behind > limit.transactions:
                    return f"{behind} transactions behind, more than {limit}"
            elif limit.lag_ms is not None:
                lag_ms = self._store.lag_ms
                if lag_ms is None:
                    return "the lag of this replica is not known"
                if lag_ms > limit.lag_ms:
                    return f"lag {lag_ms} ms, more than {limit}"
        return ""

    def _behind(self, name: str | None) -> int | None:
        """Transactions that the primary has and this replica has not; None if that is not known."""
        view = self._recent_view()
        me = next((member for member in view.members if member.node_id == view.node_id), None)
        if name is None and me is not None and me.lag_txids is not None:
            return me.lag_txids
        if view.primary is None or (name is not None and name not in view.primary.positions):
            return None
        behind = 0
        for known, best in view.primary.positions.items():
            if name is None or known == name:
                epoch = me.positions.get(known, best)[0] if me is not None else best[0]
                behind += lag({known: (epoch, self._txid(known))}, {known: best})
        return behind

    def _txid(self, name: str) -> int:
        """Where this node is, also with a database that was dropped."""
        known = self._store.get(name) or self._store.tombstone(name)
        return known.position.txid if known is not None else 0

    def _recent_view(self) -> ClusterView:
        now_s = time.monotonic()
        if self._view is None or now_s - self._view_s > VIEW_AGE_S:
            self._view, self._view_s = self._control.view(), now_s
        return self._view
