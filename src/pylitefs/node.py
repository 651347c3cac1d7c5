"""The parts of a running node that change with its role: whom it follows, and who follows it.

    static lease     the role is fixed: `start_primary`, or `start_replica`
    any engine       `start_member`: `cluster.leadership` calls `promote`, `demote` and `follow` for as long as it runs

`Node` implements `cluster.leadership.Node`. Everything here runs on the event loop; what blocks goes to a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pylitefs.cluster.candidate import Settings
from pylitefs.cluster.election import INFO_CLUSTER_ID, Positions, position_map
from pylitefs.cluster.halting import Halting
from pylitefs.cluster.halts import HaltLocks
from pylitefs.cluster.leadership import Leadership
from pylitefs.cluster.lease_port import Engine, Leader, Member
from pylitefs.cluster.office import RETRY_S
from pylitefs.cluster.ports import Link
from pylitefs.cluster.primary import Replicas
from pylitefs.cluster.recovery_wait import RecoveryWait
from pylitefs.cluster.replica import Replica
from pylitefs.cluster.roles import NodeIdentity, Refused
from pylitefs.cluster.sync_gate import Mode, SyncGate, SyncRules, log_heads
from pylitefs.cluster.tasks import blocking, cancel, supervised, watched
from pylitefs.config import Config
from pylitefs.engine.files import publish_file
from pylitefs.engine.store import Store
from pylitefs.errors import (
    FormatError,
    LitefsError,
    Unavailable,
)
from pylitefs.events import Event
from pylitefs.formats.ltx.format import Position
from pylitefs.formats.stream_fields import ErrorCode
from pylitefs.http.peers import Peers
from pylitefs.http.replication import client_session, connector
from pylitefs.mistaken import mistaken
from pylitefs.role_hooks import RoleHooks
from pylitefs.status import ReplicaInfo

log = logging.getLogger("litefs")

PAUSE_S = 2.0  # to find a moment without a writer
LAST_S = 2.0  # for what was committed last to reach the others, while nobody can write
CLOSE_S = 0.1  # for replicas to hear that this node leads no more; one that does not answer is not waited for
ENTER_S = 5.0  # who connects while this node takes office waits so long for it, rather than to come again


class Node:
    """One node. `mounted` must be true before it takes part in elections."""

    def __init__(self, config: Config, store: Store, port: int) -> None:
        lease = config.lease
        self.node_id = read_node_id(config.data.dir)
        self.hostname = lease.own_hostname
        self.url = "" if lease.is_static else lease.own_url(port)
        self.identity = NodeIdentity(self.node_id, self.hostname)
        self.instance = secrets.token_hex(8)
        self.ready = asyncio.Event()  # took office, or has everything that the primary had
        self.config = config
        self.store = store
        self._hooks = RoleHooks(config.lease, f"{self.node_id:016X}")
        self.is_fit = True
        self.gate: SyncGate | None = None
        self._gating: asyncio.Task[None] | None = None
        self._begun = False  # a promotion, that has to be undone
        self._passed_on = False  # the lease, to a node that has everything
        self._entered = asyncio.Event()  # replicas are served, or will not be
        self._replicas: Replicas | None = None
        self._replica: Replica | None = None
        self.following: Leader | None = None
        self._follower: asyncio.Task[None] | None = None
        self.leadership: Leadership | None = None
        self._engine: Engine | None = None
        self.engine_name = "static"
        self._http = client_session()
        self.peers = Peers(self._http, self.node_id)
        self.halts = HaltLocks(store)
        self.halting = Halting(store, self.peers, lambda: self.primary_url, self.reconnect)
        store.lock_files = self.halting
        self._running: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[Any]] = set()

    # --- start and stop -----------------------------------------------------------------------------------------

    async def start_primary(self, recovery: RecoveryWait | None) -> None:
        """Static lease: this is the primary."""
        await blocking(self.store.ensure_cluster_id)
        self._open_gate()
        await blocking(self.store.begin_epoch, self.store.seen_epoch)
        await self._open_replicas(self.store.epoch, recovery)
        self.ready.set()

    async def _begin_anew(self, seen: int) -> None:
        """Static lease: what the configuration says counts, and replicas follow nobody of an earlier epoch."""
        await blocking(self.store.begin_epoch, seen)
        if self._replicas is not None:
            self._replicas.epoch = self.store.epoch

    async def start_replica(self, hostname: str, url: str) -> None:
        """Static lease: follow the primary at `url`."""
        self.store.set_primary_info(hostname or url.split("//")[-1])
        await self._follow(Leader(0, hostname, url, 0))

    async def start_member(self, engine: Engine, name: str, settings: Settings) -> None:
        """Take part in the cluster of a lease engine. The databases are recovered, and mounted as on a replica."""
        self._engine, self.engine_name = engine, name
        self.leadership = Leadership(engine, self, settings, changed=self._changed)
        leadership = self.leadership
        work = supervised("taking part in elections", lambda: self._take_part(engine, leadership))
        self._running = asyncio.create_task(work)

    async def _take_part(self, engine: Engine, leadership: Leadership) -> None:
        while True:
            try:
                problem = await mistaken(self.peers, await engine.view(), self.node_id, self.instance, self.url)
            except LitefsError as error:
                problem = str(error)
            if not problem:
                break
            leadership.hold_back(problem)
            await asyncio.sleep(RETRY_S)
        await leadership.run()

    async def stop(self) -> None:
        """Lead no more, follow nobody."""
        if self.leadership is not None:
            await self.leadership.stop("the node is stopping")
        await cancel(self._running)
        await self.halting.close()
        await self.halts.end_all("the node is stopping")
        await self._stop_following("stops")

    async def close(self) -> None:
        """After `stop`, when nothing is mounted any more."""
        await self._hooks.close()
        await self._close_gate(Unavailable("this node is stopping"))
        await self._close_replicas("stops")
        for task in list(self._background):
            await cancel(task)
        if self._engine is not None:
            await self._engine.close()
        await self._http.close()

    # --- what does not change with the role ---------------------------------------------------------------------

    @property
    def is_primary(self) -> bool:
        return self.store.is_primary

    @property
    def cluster_id(self) -> str:
        """Whose data is here; "" where there is none."""
        return (self.store.cluster_id or "") if self.store.has_databases else ""

    @property
    def seen_epoch(self) -> int:
        return self.store.seen_epoch

    def ask_durable(self, node_id: int, heads: Mapping[str, Position]) -> None:
        """Somebody waits until this replica has these."""
        if self._replicas is not None and (session := self._replicas.sessions.get(node_id)) is not None:
            session.ask_durable(heads)

    def infos(self) -> list[ReplicaInfo]:
        return self._replicas.infos() if self._replicas is not None else []

    def unhealthy(self) -> str | None:
        """Why this node does not serve as it should; None if it does."""
        leadership = self.leadership
        if leadership is not None and self.is_primary:
            return None if leadership.leads else "the lease could not be renewed"
        if (problem := self.not_connected) is not None:
            return problem
        if leadership is not None and self._replica is None:
            return leadership.problem or "no primary is known"
        return None

    @property
    def not_connected(self) -> str | None:
        """Why, and since when, this replica is not connected to its primary; None if it is, or has none."""
        state = self._replica.state if self._replica is not None else None
        if state is None or state.connected:
            return None
        return f"not connected to the primary for {self.disconnected_s or 0:.0f} s: {state.problem}"

    @property
    def disconnected_s(self) -> float | None:
        """For how long; None if it is connected, or follows nobody."""
        state = self._replica.state if self._replica is not None else None
        return None if state is None or state.connected else max(0.0, time.time() - state.since_ms / 1000)

    @property
    def lag_txids(self) -> int | None:
        """Not known without the primary."""
        replica = self._replica
        return replica.lag_txids() if replica is not None and replica.state.connected else None

    def primary_positions(self) -> dict[str, tuple[int, int]]:
        """Where the primary is, as it says in heartbeats: (epoch, TXID)."""
        known = self._replica.primary_positions if self._replica is not None else {}
        return {name: (head.epoch, head.txid) for name, head in list(known.items())}

    @property
    def primary_url(self) -> str:
        return self.following.url if self.following is not None else ""

    async def serve(self, link: Link) -> None:
        """A replica has connected."""
        if self._replicas is None and self.leadership is not None and self.leadership.enters:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ENTER_S):
                    await self._entered.wait()
        if self._replicas is not None:
            await self._replicas.serve(link)
            return
        from pylitefs.cluster.channel import Channel
        from pylitefs.formats.stream import Sender

        await Channel(link, Sender.REPLICA).close(Refused(ErrorCode.NOT_PRIMARY, "this node is not the primary"), 1.0)

    def reconnect(self) -> None:
        """A database here is at another position than the primary was told."""
        if self._replica is not None:
            self._replica.reconnect()

    async def send_the_rest(self) -> None:
        """Nobody can write any more: let connected replicas have what was committed last. A moment, no more."""
        if self._replicas is None:
            return
        with contextlib.suppress(LitefsError, OSError, TimeoutError):
            async with asyncio.timeout(LAST_S):
                heads = await asyncio.wrap_future(self.store.flush_all())
                while any(
                    name in heads and progress.in_line and progress.received < heads[name].txid
                    for info in self.infos()
                    for name, progress in info.databases.items()
                ):
                    await asyncio.sleep(0.005)

    # --- leadership.Node ----------------------------------------------------------------------------------------

    def positions(self) -> Positions:
        return dict(self._known_positions())

    def _known_positions(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Of the databases whose content is known to be what their log says."""
        databases = {name: self.store.get(name) for name in self.store.all_names()}
        for name, tombstone in self.store.tombstones().items():  # asked for last: a name may become one meanwhile
            if databases.get(name) is None:
                yield name, (tombstone.position.epoch, tombstone.position.txid)
        for name, database in databases.items():
            if database is not None and database.set_aside_reason is None:
                position, head = database.position, database.log.head
                if self.is_primary:
                    yield name, (database.epoch, position.txid)
                elif position == head:
                    known = database.log.shared()
                    yield name, (known.epoch, known.txid)

    async def promote(self, epoch: int, cluster_id: str) -> str:
        store = self.store
        await self._stop_following("becomes the primary")
        if cluster_id:
            await blocking(store.adopt_cluster_id, cluster_id)
        else:
            await blocking(store.ensure_cluster_id)
        await self._close_replicas("begins another term")
        self._begun, self._passed_on = True, False
        if self.gate is not None and self.gate.is_closed:  # it was refused to write who is in sync
            await self._close_gate(Unavailable("a new term begins"))
        if self.gate is None:
            self._open_gate()
        await blocking(store.promote, epoch)
        store.set_primary_info(None)
        await self._open_replicas(epoch, None)
        self.ready.set()
        self._hooks.changed("primary", epoch, self.url)
        store.events.emit(Event("promoted", None, {"epoch": epoch}))
        return store.cluster_id or ""

    def was_forced(self, epoch: int, txid: int) -> None:
        log.warning(
            "this node was made the primary by force: commits that were acknowledged may be missing",
            extra={"event": "forced", "epoch": epoch},
        )
        self.store.events.emit(Event("forced", None, {"epoch": epoch, "txid": txid}))

    def lead_until(self, until_s: float) -> None:
        self.store.fence.until_s = until_s

    async def demote(self, reason: str) -> None:
        store = self.store
        await self._close_gate(Unavailable(f"this node is not the primary any more: {reason}"))
        begun, self._begun = self._begun, False
        self._entered.set()
        if not begun:
            return
        waiting = await blocking(store.demote, PAUSE_S)
        store.gate = None
        await self.halts.end_all(reason)
        for name in waiting:
            log.warning("%s: a transaction is open since this node ceased to be the primary: not replicated yet", name)
        if self.leadership is not None and self.leadership.remaining_s > 0 and not self._passed_on:
            await self.send_the_rest()
        await self._close_replicas(f"is not the primary any more: {reason}")
        store.events.emit(Event("demoted", None, {"reason": reason}))
        self._hooks.changed("replica", store.epoch, "")

    def passed_on(self, successor: int) -> None:
        self._passed_on = True
        member = self.member(successor)
        if member is not None:
            self._start(self._tell(member.url))

    async def _tell(self, url: str) -> None:
        with contextlib.suppress(LitefsError):
            await self.peers.nudge(url, 1.0)

    async def follow(self, leader: Leader) -> None:
        if leader != self.following:
            await self._stop_following("follows another primary")
            if not leader.url:
                raise Unavailable("the primary has no URL: set lease.advertise-url there")
            self.store.set_primary_info(leader.hostname or leader.url.split("//")[-1])
            await self._follow(leader)

    async def ask(self, member: Member, timeout_s: float) -> Positions:
        answer = await self.peers.positions(member.url, timeout_s)
        if answer.get("node-id") != f"{member.node_id:016X}":
            raise Unavailable(f"{member.url} is the URL of another node too: check lease.advertise-url")
        if answer.get("cluster-id", "") not in ("", member.info.get(INFO_CLUSTER_ID, "")):
            raise Unavailable(f"{member.url} has another cluster id than it has announced")
        return position_map(answer.get("positions"))

    async def confirm(self, member: Member, epoch: int, timeout_s: float) -> str:
        return await self.peers.failsafe(member.url, self.node_id, epoch, timeout_s)

    async def has_promised(self, member: Member, timeout_s: float) -> bool:
        return (await self.peers.positions(member.url, timeout_s)).get("promised") is True

    # --- what a role has ----------------------------------------------------------------------------------------

    def member(self, node_id: int) -> Member | None:
        view = self.leadership.view if self.leadership is not None else None
        return None if view is None else next((one for one in view.members if one.node_id == node_id), None)

    def _changed(self) -> None:
        """What is known of the cluster has changed."""
        if self._replica is not None and self.leadership is not None:
            self._replica.saw_epoch(self.leadership.document.state.epoch)

    def _superseded(self, epoch: int) -> None:
        """A replica has followed a later primary than us."""
        if self.leadership is None:
            log.warning("a replica has followed a primary of epoch %d: this one goes on in a later one", epoch)
            self._start(self._begin_anew(epoch))
            return
        log.error("epoch %d has begun, this node leads in an older one: it steps down", epoch)
        self.leadership.supersede(f"epoch {epoch} has begun")

    def _start(self, work: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        task.add_done_callback(watched)
        return task

    async def _open_replicas(self, epoch: int, recovery: RecoveryWait | None) -> None:
        replicas = Replicas(
            self.store, self.identity, epoch=epoch, recovery=recovery, on_newer_epoch=self._superseded,
            snapshot_timeout_s=self.config.http.snapshot_timeout_s,
        )  # fmt: skip
        replicas.gate = self.gate
        self._replicas = await replicas.__aenter__()
        self._entered.set()

    def _open_gate(self) -> None:
        """Synchronous replication, for one term of office."""
        replication, store, leadership = self.config.replication, self.store, self.leadership
        if not replication.sync:
            return
        limit_s = replication.limit_s
        rules = SyncRules(replication.sync, Mode(replication.mode), 0.0 if math.isinf(limit_s) else limit_s)

        async def change(nodes: frozenset[int]) -> None:
            if leadership is not None:
                await leadership.change_state(lambda state: replace(state, in_sync=nodes))

        def can_lead(node_id: int) -> bool:
            member = self.member(node_id)
            return member is None or member.candidate

        written = leadership.document.state.in_sync if leadership is not None else frozenset()
        self.gate = store.gate = SyncGate(
            rules, lambda: log_heads(store), change, written, can_lead=can_lead, emit=store.events.emit
        )
        self._gating = asyncio.create_task(self.gate.run())

    async def _close_gate(self, error: LitefsError) -> None:
        """All commits that wait for replicas fail; so do those that come until the engine lets go of the gate."""
        gate, self.gate = self.gate, None
        if gate is not None:
            gate.close(error)
            await cancel(self._gating)

    async def _close_replicas(self, why: str) -> None:
        """Tell them; whoever does not listen is told in the background."""
        replicas, self._replicas = self._replicas, None
        self._entered.clear()
        if replicas is not None:
            replicas.farewell = f"the primary {self.identity} {why}"
            await asyncio.wait({self._start(replicas.__aexit__(None, None, None))}, timeout=CLOSE_S)

    async def _follow(self, leader: Leader) -> None:
        self.following = leader
        self._replica = Replica(
            self.store,
            self.identity,
            connector(self._http, leader.url),
            databases=self.config.lease.databases,
            hostname=leader.hostname,
            reconnect_delay_s=self.config.lease.reconnect_delay_s,
        )
        self._follower = asyncio.create_task(self._follow_until_ready(self._replica))

    async def _follow_until_ready(self, replica: Replica) -> None:
        async def told() -> None:
            await replica.ready.wait()
            self.ready.set()

        telling = asyncio.ensure_future(told())
        try:
            await supervised("following the primary", replica.run)
        finally:
            await cancel(telling)

    async def _stop_following(self, why: str) -> None:
        self.following = None
        await self.halting.end_all("this node does not follow that primary any more")
        follower, self._follower = self._follower, None
        if self._replica is not None:
            self._replica.leaving = why
        await cancel(follower)
        self._replica = None


def read_node_id(data_dir: str) -> int:
    """This node's id, from DATA/id; made up and kept durably where there is none. Raises LitefsError."""
    path = os.path.join(data_dir, "id")
    try:
        with open(path) as file:
            text = file.read(64).strip()
        node_id = int(text, 16) if len(text) == 16 else 0
        if not node_id:
            raise FormatError(f"{path} does not hold a node id (16 hex digits): remove it, and the node gets a new one")
        return node_id
    except FileNotFoundError:
        node_id = secrets.randbits(63) + 1
    except ValueError:
        raise FormatError(
            f"{path} does not hold a node id (16 hex digits): remove it, and the node gets a new one"
        ) from None
    except OSError as error:
        raise LitefsError(f"cannot read {path}: {error.strerror}") from None
    try:
        publish_file(path, f"{node_id:016X}\n".encode())
    except OSError as error:
        raise LitefsError(f"cannot write {path}: {error.strerror}") from None
    return node_id
