"""What the HTTP API asks of a node about its cluster (`cluster.control.Control`), switchover included."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pylitefs.cluster.control import AWAY, NOT_CONNECTED, ClusterView, CommitsWait, MemberView
from pylitefs.cluster.decisions import NOTHING
from pylitefs.cluster.election import Positions, Total, positions_of
from pylitefs.cluster.known_nodes import KnownNodes
from pylitefs.cluster.leadership import Leadership
from pylitefs.cluster.lease_port import Leader, Member
from pylitefs.cluster.state import Document
from pylitefs.cluster.tasks import blocking
from pylitefs.engine.epochs import FIRST
from pylitefs.engine.reserve import Reserve
from pylitefs.errors import DatabaseNotFound, Ineligible, LitefsError, NotPrimary, Unavailable
from pylitefs.events import Event
from pylitefs.formats.ltx.format import Position
from pylitefs.node import LAST_S, PAUSE_S, Node
from pylitefs.status import ReplicaInfo, ReplicaProgress

log = logging.getLogger("litefs")

NO_DOCUMENT = Document()  # with a static lease

CATCH_UP_S = 10.0  # for a successor, while writes go on
LEAVE_S = 4.0  # the same at a stop, in tries that are
_LEAVE_TRY_S = 0.5  # so long
REFRESH_S = 1.0  # the primary is asked no more often, and given no longer, to say how far the others are
FORGET_S = 30.0  # and what it has said is shown for so long with a static lease, where nobody else knows the members
_RECENT_S = 3.0  # and with an engine
DISK_S = 0.5  # between two looks at the room on the disk
_ASK_AFTER_S = 0.05  # what the successor lacks still is asked for
TAKE_OVER_S = 15.0  # for a successor to become the primary
_ANSWER_S = 0.3  # for a successor, before writes are paused
_NEAR_TXIDS = 200  # a successor that is so near is waited for with writes paused


def _away(member: Member, seen_s: float | None, in_sync: bool) -> MemberView:
    return MemberView(
        member.node_id, member.hostname, member.url, state=AWAY, candidate=member.candidate, priority=member.priority,
        tags=member.tags, in_sync=in_sync, seen_s=seen_s,
    )  # fmt: skip


class NodeControl:
    """Of one node. Switchovers run one at a time."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._store = node.store
        self._switching = asyncio.Lock()
        self._reserve = Reserve(node.store.data_dir)
        self._told: tuple[MemberView, ...] = ()  # by the primary, at this URL
        self._told_by = ""
        self._told_s = self._asked_s = -math.inf
        self._known = KnownNodes()  # the replicas, with a static lease
        node.store.events.subscribe(self._heard)

    def _heard(self, event: Event) -> None:
        if event.type in ("replicaConnected", "replicaLost"):
            data = event.data
            member = Member(int(data["node_id"], 16), data["hostname"], f"//{data['address']}", candidate=False)
            self._known.saw(member)

    async def watch_disk(self) -> None:
        """Until cancelled: a node whose disk is full is no candidate, and as the primary passes the lease on."""
        node = self._node
        while True:
            full = await blocking(self._reserve.is_full)
            if full and node.is_fit:
                log.warning("the disk of %s is full: this node cannot be the primary", node.store.data_dir)
            node.is_fit = not full
            if not full:
                await blocking(self._reserve.keep)
            elif node.leadership is not None and node.leadership.leads:
                await blocking(self._reserve.use)
                with contextlib.suppress(LitefsError, OSError):
                    await asyncio.shield(self._hand_over(0, "the disk of the primary is full", catch_up_s=LAST_S))
            await asyncio.sleep(DISK_S)

    async def leave(self) -> None:
        """The node is about to stop: pass the lease to the best replica. As long as one answers that could have it, it
        is tried again while writes go on: what nobody else has would not be in the next primary's history."""
        leadership, until_s = self._node.leadership, time.monotonic() + LEAVE_S
        while leadership is not None and leadership.leads and leadership.view is not None:
            others = [one for one in leadership.view.members if one.candidate and one.node_id != self._node.node_id]
            alive = any(await asyncio.gather(*(self._answers(other, {}) for other in others)))
            try:  # everything it waits for has a limit of its own
                await self._hand_over(0, "the primary was stopped", catch_up_s=_LEAVE_TRY_S if alive else 0.0)
                return
            except LitefsError as error:
                if not alive or time.monotonic() >= until_s:
                    log.warning("stopping, and no other node is known to have what was committed here: %s", error)
                    return

    def view(self) -> ClusterView:
        leadership = self._node.leadership
        connected = {int(info.node_id, 16): info for info in self._node.infos()}
        if leadership is None:
            return self._static_view(connected)
        state, view = leadership.document.state, leadership.view
        leader = view.leader if view is not None and not leadership.has_lost_office else None
        in_sync = state.in_sync or frozenset()
        members = [] if view is None else [
            self._shown(member, leader, connected.get(member.node_id), member.node_id in in_sync)
            for member in view.members
        ]  # fmt: skip
        primary = None if leader is None else next((one for one in members if one.node_id == leader.node_id), None)
        if leader is not None and primary is None:
            primary = MemberView(leader.node_id, leader.hostname, leader.url, "primary")
        here = {self._node.node_id, *(member.node_id for member in members)}
        here |= set() if leader is None else {leader.node_id}
        away = leadership.known.away(here, {*in_sync, state.last_leader} - {0}, leadership.document)
        members += [_away(member, seen_s, member.node_id in in_sync) for member, seen_s in away]
        return ClusterView(
            node_id=self._node.node_id,
            is_primary=self._store.is_primary,
            cluster_id=self._node.cluster_id or state.cluster_id,
            epoch=state.epoch,
            primary=primary,
            members=tuple(members),
            paused=state.paused,
            sync=self._node.config.replication.sync,
            in_sync=None if state.in_sync is None else tuple(sorted(state.in_sync)),
            commits_wait=self._commits_wait(),
            history=leadership.document.history,
            engine=self._node.engine_name,
            problem=leadership.problem,
        )

    def _commits_wait(self) -> CommitsWait | None:
        gate = self._node.gate
        return None if gate is None else gate.stalled()

    def _static_view(self, connected: Mapping[int, ReplicaInfo]) -> ClusterView:
        me = MemberView(
            self._node.node_id, self._node.hostname, self._node.url, "primary" if self._store.is_primary else "replica",
            candidate=self._node.config.lease.candidate, positions=self._that_exist(self._node.positions()), seen_s=0.0,
        )  # fmt: skip
        gate = self._node.gate
        in_sync = None if gate is None else tuple(sorted(gate.in_sync))
        if self._store.is_primary:
            primary: MemberView | None = me
            others = [
                self._with_progress(
                    MemberView(
                        node_id, info.hostname, f"//{info.address}", candidate=False, seen_s=0.0,
                        in_sync=node_id in (in_sync or ()),
                    ),
                    info,
                )
                for node_id, info in connected.items()
            ]  # fmt: skip
            away = self._known.away({me.node_id, *connected}, in_sync or (), NO_DOCUMENT)
            others += [_away(member, seen_s, member.node_id in (in_sync or ())) for member, seen_s in away]
        else:
            me, primary, others = self._static_replica_view(me)
        return ClusterView(
            self._node.node_id, self._store.is_primary, self._node.cluster_id, self._store.epoch, primary,
            (me, *others), sync=self._node.config.replication.sync, in_sync=in_sync,
            commits_wait=self._commits_wait(), problem=self._node.unhealthy() or "",
        )  # fmt: skip

    def _static_replica_view(self, me: MemberView) -> tuple[MemberView, MemberView | None, list[MemberView]]:
        """This node, the primary, and all but this node, as the primary has told."""
        age_s = time.monotonic() - self._told_s
        told = {
            member.node_id: replace(member, seen_s=None if member.seen_s is None else member.seen_s + age_s)
            for member in (self._told if age_s < FORGET_S else ())
        }
        mine = told.pop(me.node_id, me)
        me = self._or_not_connected(
            replace(
                me, state=mine.state, in_sync=mine.in_sync, lag_ms=self._store.lag_ms, lag_txids=self._node.lag_txids
            )
        )
        leader = self._node.following
        primary = None if leader is None else MemberView(
            leader.node_id, leader.hostname, leader.url, "primary", seen_s=self._node.disconnected_s
        )  # fmt: skip
        for member in told.values():
            if primary is not None and member.role == "primary":
                seen_s = member.seen_s if primary.seen_s is None else primary.seen_s
                primary = replace(
                    member, hostname=primary.hostname or member.hostname, url=primary.url, seen_s=seen_s
                )
                told[member.node_id] = primary
        return me, primary, list(told.values())

    async def refresh(self) -> None:
        url, now_s = self._node.primary_url, time.monotonic()
        if url and now_s - self._asked_s > REFRESH_S:
            self._asked_s = now_s
            with contextlib.suppress(LitefsError):
                self._told = await self._node.peers.members(url, REFRESH_S)
                self._told_by, self._told_s = url, now_s

    def _as_told(self, shown: MemberView) -> MemberView:
        """How far it is, which the primary knows; what it is stands in the engine."""
        if self._told_by == self._node.primary_url and time.monotonic() - self._told_s < _RECENT_S:
            for told in self._told:
                if told.node_id == shown.node_id and shown.role == told.role == "replica":
                    if shown.node_id == self._node.node_id:
                        return replace(shown, state=told.state)
                    return replace(
                        shown, state=told.state, lag_ms=told.lag_ms, lag_txids=told.lag_txids, positions=told.positions
                    )
        return shown

    def _shown(self, member: Member, leader: Leader | None, info: ReplicaInfo | None, in_sync: bool) -> MemberView:
        leads = leader is not None and leader.node_id == member.node_id
        mine = member.node_id == self._node.node_id
        positions = self._node.positions() if mine else positions_of(member)
        if isinstance(positions, Total):  # too many databases to be announced
            positions = self._node.primary_positions() if leads else {}
        positions = self._that_exist(positions)
        shown = MemberView(
            member.node_id,
            member.hostname,
            member.url,
            "primary" if leads else "replica",
            candidate=member.candidate,
            priority=member.priority,
            tags=member.tags,
            positions=positions,
            in_sync=in_sync,
            seen_s=0.0 if info is not None or mine else None,
            lag_ms=self._store.lag_ms if mine else None,
            lag_txids=self._node.lag_txids if mine else None,
        )
        if info is not None:
            return self._with_progress(shown, info)
        return self._or_not_connected(self._as_told(shown)) if mine else self._as_told(shown)

    def _or_not_connected(self, me: MemberView) -> MemberView:
        return me if self._node.not_connected is None else replace(me, state=NOT_CONNECTED)

    def _that_exist(self, positions: Positions) -> Positions:
        """Without databases that were dropped, as far as this node has heard of it."""
        return {name: at for name, at in positions.items() if at[1] != self._dropped_at(name)}

    def _dropped_at(self, name: str) -> int:
        """The TXID of the drop; 0 for a database that is there, or of which nothing is known."""
        known = self._store.get(name)
        if known is not None:
            return 0 if known.commit else known.position.txid
        tombstone = self._store.tombstone(name)
        return 0 if tombstone is None else tombstone.position.txid

    def _with_progress(self, shown: MemberView, info: ReplicaInfo) -> MemberView:
        positions, behind = {}, 0
        for name, progress in info.databases.items():
            database = self._store.get(name)
            if database is not None:
                positions[name] = (database.epoch, progress.applied)
                behind += max(0, database.position.txid - progress.applied)
        return replace(
            shown, state=info.state, lag_ms=info.lag_ms, lag_txids=behind, positions=self._that_exist(positions)
        )

    async def promote(self, node_id: int | None, force: bool = False) -> None:
        leadership = self._by_engine()
        leader = leadership.view.leader if leadership.view is not None else None
        if force and leader is not None and (leader.node_id != self._node.node_id or leadership.leads):
            raise Ineligible(
                f"{leader.hostname or leader.url} holds the lease, so nothing has to be forced: use litefs promote, "
                "or wait until its lease has ended"
            )
        if node_id is not None and node_id != self._node.node_id:
            if leader is None:
                await self._promote_there(node_id, force)
            else:
                await self._ask_primary(node_id)
            return
        if self._store.is_primary and leadership.leads:
            return
        if not self._node.config.lease.candidate:
            raise Ineligible("this node cannot become the primary: lease.candidate is false")
        others = leader is not None and leader.node_id != self._node.node_id
        if others:
            await self._ask_primary(self._node.node_id)
        try:
            async with asyncio.timeout(TAKE_OVER_S):
                await (leadership.wait_in_office() if others else leadership.take(force=force))
        except TimeoutError:
            raise Unavailable(f"this node has not become the primary: {leadership.problem or 'try again'}") from None

    async def _promote_there(self, node_id: int, force: bool) -> None:
        """Nobody leads: let that node take the lease."""
        member = self._node.member(node_id)
        if member is None:
            raise Ineligible(f"node {node_id:016X} is not running, or cannot reach the lease engine: see litefs status")
        await self._node.peers.promote(member.url, None, TAKE_OVER_S + LAST_S, force)

    async def _ask_primary(self, node_id: int) -> None:
        leadership = self._by_engine()
        leader = leadership.view.leader if leadership.view is not None else None
        if leader is None:
            raise Unavailable(f"there is no primary to hand over: {leadership.problem}")
        if leader.node_id == self._node.node_id:
            await self.handoff(node_id)
            return
        await self._node.peers.handoff(leader.url, node_id, CATCH_UP_S + PAUSE_S + LAST_S + TAKE_OVER_S)

    async def handoff(self, node_id: int | None) -> None:
        leadership = self._by_engine()
        if not leadership.leads:
            leader = leadership.view.leader if leadership.view is not None else None
            if leader is None or leader.node_id == self._node.node_id:
                raise Unavailable(f"there is no primary at present: {leadership.problem or 'one is about to be'}")
            raise NotPrimary(f"this node is not the primary: {leader.hostname or leader.url} is", leader.url)
        if node_id == self._node.node_id:
            return
        successor = await self._hand_over(node_id or 0, "handed over", catch_up_s=CATCH_UP_S)
        try:
            async with asyncio.timeout(TAKE_OVER_S):
                while not self._follows(successor):
                    await asyncio.sleep(0.005)
        except TimeoutError:
            raise Unavailable("the lease was passed on, but that node has not taken it: see litefs status") from None

    def _follows(self, node_id: int) -> bool:
        """Whether that node has let us in as the primary. That it holds the lease does not mean that it serves."""
        leader = self._node.following
        return leader is not None and leader.node_id == node_id and self._node.unhealthy() is None

    async def _hand_over(self, node_id: int, reason: str, *, catch_up_s: float) -> int:
        """A switchover up to the moment when this node is not the primary any more; the successor's id."""
        async with self._switching:
            self._refuse_without_engine()
            info = await self._successor(node_id, catch_up_s)
            self._refuse_without_engine()
            async with self._node.halts.paused(PAUSE_S):
                await self._pass_on(info, reason)
            return int(info.node_id, 16)

    def _refuse_without_engine(self) -> None:
        """Nobody could take the lease: to let go of it would end writes that failsafe allows. Raises Unavailable."""
        if problem := self._by_engine().problem:
            raise Unavailable(f"nothing has changed: {problem}")

    async def _pass_on(self, info: ReplicaInfo, reason: str) -> None:
        """Pause writes, and pass the lease to a replica that has everything then. Unavailable."""
        try:
            if not await blocking(self._store.pause_writes, PAUSE_S):
                raise Unavailable("a transaction stays open, so writes could not be paused: nothing has changed")
            heads = await asyncio.wrap_future(self._store.flush_all())
            async with asyncio.timeout(LAST_S):
                ask_s = time.monotonic() + _ASK_AFTER_S
                while self._missing(info.node_id, heads):
                    if time.monotonic() >= ask_s:  # it may wait for readers of a database that gets another page size
                        self._node.ask_durable(int(info.node_id, 16), heads)
                        ask_s = math.inf
                    await asyncio.sleep(0.001)
            await self._by_engine().leave(reason, int(info.node_id, 16))
        except TimeoutError:
            raise Unavailable(f"{info.hostname or info.node_id} does not keep up: nothing has changed") from None
        finally:
            if self._store.is_primary:
                await blocking(self._store.resume_writes)

    async def _successor(self, node_id: int, catch_up_s: float) -> ReplicaInfo:
        """The replica that is to take over, once it is near. Ineligible, Unavailable."""
        leadership = self._by_engine()
        until_s = time.monotonic() + catch_up_s
        silent: dict[int, str] = {}  # by node id: why a replica that is near did not answer when it was last asked
        while True:
            members = {member.node_id: member for member in leadership.view.members} if leadership.view else {}
            able = []
            for info in self._node.infos():
                number = int(info.node_id, 16)
                member = members.get(number)
                if node_id and number != node_id:
                    continue
                if member is None or not member.candidate:
                    if node_id and member is not None:  # else it has not been seen in the register yet
                        raise Ineligible(f"{info.hostname or info.node_id} cannot become the primary: no candidate")
                    continue
                able.append((self._behind(info), -member.priority, number, info))
            for behind, _, number, info in sorted(able, key=lambda one: one[:3]):
                if behind <= _NEAR_TXIDS and await self._answers(members[number], silent):
                    return info
            if time.monotonic() > until_s:
                if able:
                    behind, _, number, info = min(able, key=lambda one: one[:3])
                    if behind == math.inf:
                        why = "is not in line with this node yet"
                    elif behind <= _NEAR_TXIDS:
                        why = f"cannot be asked ({silent[number]})"
                    else:
                        why = f"is {behind:.0f} transactions behind"
                    raise Unavailable(f"{info.hostname or info.node_id} {why}: try again later")
                if node_id:
                    raise Ineligible(f"node {node_id:016X} is not connected to the primary")
                raise Unavailable("no replica is connected that could take over")
            await asyncio.sleep(0.02)

    async def _answers(self, member: Member, silent: dict[int, str]) -> bool:
        """Whether it is alive: one that hangs may be connected still, and have everything. If it is not, `silent` gets
        the reason under its id; a reason is logged once."""
        try:
            await self._node.ask(member, _ANSWER_S)
            return True
        except LitefsError as error:
            if silent.get(member.node_id) != str(error):
                log.info("%s cannot take over: it cannot be asked: %s", member.hostname or member.url, error)
            silent[member.node_id] = str(error)
            return False

    def _behind(self, info: ReplicaInfo) -> float:
        """How many transactions a replica has not applied; inf where its copy of a database is not one of our history
        (`Feed.standing`), for nobody knows how long it takes to mend."""
        behind = 0.0
        for name in self._store.all_names():
            database, progress = self._store.get(name), info.databases.get(name)
            if database is not None and (txid := database.position.txid):
                behind += max(0, txid - progress.applied) if progress is not None and progress.in_line else math.inf
        return behind

    def _missing(self, node_id: str, heads: Mapping[str, Position]) -> bool:
        """Whether that replica has not applied everything up to `heads` (durably, where acknowledged commits must
        survive). Unavailable if it has left."""
        durably = self._node.gate is not None
        for info in self._node.infos():
            if info.node_id == node_id:
                nothing = ReplicaProgress(0, 0, 0)
                for name, head in heads.items():
                    if self._store.get(name) is None:  # it was dropped, and who is connected has that
                        continue
                    progress = info.databases.get(name, nothing)
                    if min(progress.applied, progress.durable if durably else head.txid) < head.txid:
                        return True
                return False
        raise Unavailable("the replica that was to take over has left: nothing has changed")

    async def pause(self, paused: bool) -> None:
        await self._by_engine().pause(paused)

    async def fresh_position(self, name: str) -> Position:
        leadership = self._node.leadership
        if not self._store.is_primary:
            raise NotPrimary("this node is not the primary", self._node.primary_url)
        database = self._store.get(name)
        if database is None or not database.position.txid:
            raise DatabaseNotFound(name)
        position = await asyncio.wrap_future(self._store.flush(database))
        if leadership is not None and not leadership.leads:
            raise Unavailable("this node does not know whether it is still the primary")
        return position

    async def sync(self, name: str, txid: int | None, timeout_s: float) -> Position:
        epoch = 0  # of the primary's newest transaction: a branch of this node may be longer than the primary's log
        try:
            async with asyncio.timeout(timeout_s):
                if self._store.is_primary:
                    position = await self.fresh_position(name)
                    if txid is None or position.txid >= txid:
                        return position
                elif txid is None:
                    if not self._node.primary_url:
                        raise Unavailable("no primary is known at present")
                    wanted = await self._node.peers.position(self._node.primary_url, name, timeout_s)
                    txid, epoch = wanted.txid, wanted.epoch
                return await self._reached(name, txid, epoch)
        except TimeoutError:
            database = self._store.get(name)
            here = database.position.txid if database is not None else 0
            what = f"{txid:016x}" if txid is not None else "the primary's position"
            raise Unavailable(
                f"{name} has not reached {what} within {timeout_s:g} s: it stands at {here:016x}"
            ) from None

    async def _reached(self, name: str, txid: int, epoch: int) -> Position:
        loop, moved = asyncio.get_running_loop(), asyncio.Event()

        def heard(event: Event) -> None:
            if event.database == name:
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(moved.set)

        stop: Callable[[], None] = self._store.events.subscribe(heard)
        try:
            while True:
                moved.clear()
                database = self._store.get(name)
                position = database.position if database is not None else NOTHING
                if position.txid >= txid and max(position.epoch, FIRST) >= epoch:
                    return position
                await moved.wait()
        finally:
            stop()

    async def confirm_failsafe(self, leader_id: int, epoch: int) -> str:
        if self._node.leadership is None:
            return "this node has a static lease"
        if self._node.following is None or self._node.following.node_id != leader_id:
            return "this node does not follow that primary"
        return self._node.leadership.promise(leader_id, epoch)

    def nudge(self) -> None:
        """The lease is free, or something else has changed in the engine."""
        if self._node.leadership is not None:
            self._node.leadership.nudge()

    def positions(self) -> dict[str, Any]:
        return {
            "node-id": f"{self._node.node_id:016X}",
            "instance": self._node.instance,
            "cluster-id": self._node.cluster_id,
            "epoch": self._store.epoch,
            "promised": self._node.leadership is not None and self._node.leadership.has_promised,
            "positions": {name: list(position) for name, position in self._node.positions().items()},
        }

    def _by_engine(self) -> Leadership:
        if self._node.leadership is None:
            raise Ineligible(
                "static lease: the configuration names the primary: to change it stop all nodes, set lease.candidate "
                "and lease.advertise-url on each, and start them again"
            )
        return self._node.leadership
