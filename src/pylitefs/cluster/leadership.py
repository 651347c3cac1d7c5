"""One node's part in the choice of the primary: looks at the engine, takes the lease, holds it, and lets it go.

    looking    somebody leads: follow. Nobody does: ask the members where they are, and let `election` decide
    leading    renew the lease three times in its life; whoever wants it gone asks (`hand_over`, `stop`)
    leaving    fence first (no commit is acknowledged any more), then demote, then release

The lease counts by our own clock from before the request that got it, less a margin: what is acknowledged while
`Node.lead_until` says so is acknowledged by the only leader. `election` is pure; here are the clock and the calls.

*Failsafe*: where the engine cannot be reached the leader stays it for as long as everybody who may lead confirms, again
and again, that it follows this leader and will not take the lease itself for the lease's time. Who may lead stands in
the shared state (`voters`): a node that the leader does not know cannot be elected.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pylitefs.cluster import election
from pylitefs.cluster.candidate import Leaving, Node, Settings
from pylitefs.cluster.control import HistoryEntry
from pylitefs.cluster.election import Acquire, ClusterState, Follow, Positions, Rules, Self, StandAside, Wait
from pylitefs.cluster.lease_port import Clock, Conflict, Engine, Held, Leader, LeaseLost, Member, View, now_s
from pylitefs.cluster.shared_state import SharedState
from pylitefs.cluster.state import Document
from pylitefs.errors import LitefsError, Unavailable

log = logging.getLogger("litefs.lease")

RETRY_S = 0.3
LOOK_S = 0.1  # between looks while nobody leads
ASK_S = 0.7  # for an answer of another node
RENEWALS = 3  # in the life of a lease
MARGIN = 0.1  # of the TTL, at most MAX_MARGIN_S: the last moments in which nothing is acknowledged any more
MAX_MARGIN_S = 0.5
LONG_WAIT_S = 30.0
UNFIT_S = 10.0  # a node that could not take office is no candidate for so long
_CHANGES = 10


class Leadership:
    """Runs until cancelled. `changed` is called, on the loop, whenever what is known of the cluster has changed."""

    def __init__(
        self,
        engine: Engine,
        node: Node,
        settings: Settings,
        *,
        clock: Clock = now_s,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._node = node
        self._settings = settings
        self._rules = Rules(settings.maximum_lag, min(1.0, settings.ttl_s / 4))
        self._clock = clock
        self._changed = changed
        self.held: Held | None = None
        self._shared = SharedState(engine, changed)
        self.problem = "looking at the lease engine for the first time"
        self._leaderless_since_s: float | None = None
        self._nudge = asyncio.Event()
        self._leaving: Leaving | None = None
        self._promised_until_s = self._unfit_until_s = 0.0
        self._acquiring = False
        self._forced = False
        self._stopping = False
        self._in_failsafe = self._superseded = False
        self._started_s = clock()
        self._voters: dict[int, Member] = {}  # no fewer than in the shared state
        self._in_office = asyncio.Event()  # promoted, and the fence is open

    @property
    def view(self) -> View | None:
        """The newest one; None before the first."""
        return self._shared.view

    @property
    def document(self) -> Document:
        return self._shared.document

    @property
    def leads(self) -> bool:
        """Whether commits may be acknowledged now."""
        return self._in_office.is_set() and self.held is not None and self._clock() < self._deadline_s

    @property
    def remaining_s(self) -> float:
        return max(0.0, self._deadline_s - self._clock()) if self.held is not None else 0.0

    @property
    def _deadline_s(self) -> float:
        return 0.0 if self.held is None else self.held.valid_until_s - self._margin_s

    @property
    def _is_candidate(self) -> bool:
        return self._settings.candidate and self._node.is_fit and self._clock() >= self._unfit_until_s

    @property
    def _ask_s(self) -> float:
        """How long to wait for another node's answer."""
        return min(ASK_S, self._settings.ttl_s / 4)

    @property
    def _margin_s(self) -> float:
        return min(MAX_MARGIN_S, self._settings.ttl_s * MARGIN)

    # --- what others ask ----------------------------------------------------------------------------------------

    def nudge(self) -> None:
        """Look at the engine at once."""
        self._nudge.set()

    async def leave(self, reason: str, successor: int = 0) -> None:
        """Let go of the lease and return when that is done. With a `successor` it is either passed on, or this node
        stays in office and Unavailable says why."""
        if self.held is None:
            return
        pending = self._leaving
        if pending is not None and pending.successor and not successor and not pending.done.done():
            pending.done.set_exception(Unavailable(f"the lease was not passed on: {reason}"))
        if pending is None or pending.done.done():
            pending = self._leaving = Leaving(reason, successor, asyncio.get_running_loop().create_future())
            pending.done.add_done_callback(lambda done: done.cancelled() or done.exception())
            self.nudge()
        try:
            await asyncio.shield(pending.done)
        except asyncio.CancelledError:
            if successor and pending.successor:  # writes go on from here: nobody can have everything
                pending.done.cancel()
            raise

    def supersede(self, reason: str) -> None:
        """A later epoch has begun: acknowledge nothing more, and leave."""
        self._superseded = True
        self._node.lead_until(0.0)
        if self.held is not None:
            pending, self._leaving = self._leaving, Leaving(reason, 0, asyncio.get_running_loop().create_future())
            if pending is not None and not pending.done.done():
                pending.done.set_exception(Unavailable(f"the lease was not passed on: {reason}"))
            self.nudge()

    def _open_fence(self) -> None:
        if not self._superseded:
            self._node.lead_until(self._deadline_s)

    async def stop(self, reason: str) -> None:
        """Let go of the lease for good, and leave the cluster's register."""
        self._stopping = True
        try:
            await self.leave(reason)
        except Unavailable:  # of a handover that was under way, and has failed
            await self.leave(reason)
        with contextlib.suppress(LitefsError):
            await self._engine.withdraw(self._node.node_id)

    async def take(self) -> None:
        """Become the leader where there is none and automatic failover is paused."""
        self._forced = True
        self.nudge()

    def take_no_more(self) -> None:
        """`take` has not come to anything."""
        self._forced = False

    async def wait_in_office(self) -> None:
        await self._in_office.wait()

    def promise(self, leader_id: int, epoch: int) -> str:
        """The leader cannot reach the engine: promise not to take the lease for its time. "" or why not."""
        view = self.view
        if self.held is not None or self._acquiring:
            return "this node has taken the lease, or is about to"
        if view is not None and view.leader is not None and view.leader.node_id != leader_id:
            return f"node {view.leader.node_id:016x} holds the lease"
        if epoch < self.document.state.epoch:
            return f"epoch {self.document.state.epoch} has begun"
        self._promised_until_s = self._clock() + self._settings.ttl_s
        return ""

    async def change_state(self, change: Callable[[ClusterState], ClusterState]) -> None:
        """As the leader: replace the shared state by what `change` makes of it. Unavailable; LeaseLost."""
        await self._shared.change(change, lambda: self.held)

    async def pause(self, paused: bool) -> None:
        """Automatic failover off, or on again, for all nodes. Unavailable."""
        await self._shared.pause(paused)

    # --- the loop -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        announcer = asyncio.create_task(self._announce())
        try:
            while True:
                try:
                    await self._look()
                except LitefsError as error:
                    self._has_problem(str(error))
                    await self._pause(RETRY_S)
                except Exception as error:  # the lease was let go of; whatever it is, the node must not be without
                    log.exception("the lease cannot be seen to")
                    self._has_problem(f"{type(error).__name__}: {error}")
                    await self._pause(self._settings.ttl_s)
        finally:
            announcer.cancel()
            await asyncio.gather(announcer, return_exceptions=True)

    async def _pause(self, delay_s: float) -> None:
        """Until then, or a nudge."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._nudge.wait()
        self._nudge.clear()

    def _has_problem(self, text: str) -> None:
        if text != self.problem:
            self.problem = text
            if text:
                log.warning("%s", text)
            self._changed()

    async def _look(self) -> None:
        """One look at the engine, and what follows from it."""
        view = await self._shared.look()
        node, state = self._node, self.document.state
        leaderless = view.leader is None or view.leader.node_id == node.node_id
        if not leaderless:
            self._leaderless_since_s = None
        elif self._leaderless_since_s is None:
            self._leaderless_since_s = self._clock()
        reachable = await self._ask_all(view) if leaderless and state.handoff_to != node.node_id else {}
        me = Self(node.node_id, node.cluster_id, node.positions(), self._is_candidate, self._settings.priority)
        if self._forced and leaderless:
            state = replace(state, paused=False, voters=None)
        since_s = self._clock() if self._leaderless_since_s is None else self._leaderless_since_s
        decision = election.decide(view, state, me, reachable, self._rules, self._clock(), since_s)
        match decision:
            case Follow(leader):
                self._forced = False
                self._has_problem("")
                await node.follow(leader)
                await self._wait_for_change(view, LONG_WAIT_S)
            case Acquire():
                if self._stopping or self._clock() < self._promised_until_s or self._may_have_promised(state):
                    await self._wait_for_change(view, LOOK_S * 5)
                elif not await self._try_to_lead(view, state, reachable):
                    await self._pause(LOOK_S)
            case Wait(_, text, _):
                self._has_problem(f"no primary: {text}")
                await self._wait_for_change(view, LOOK_S)
            case StandAside(_, text):
                self._has_problem(text)
                await self._wait_for_change(view, LOOK_S * 10)

    def _may_have_promised(self, state: ClusterState) -> bool:
        """Failsafe: whether this node may have promised something before it was restarted."""
        asked = state.voters is not None and state.last_leader != self._node.node_id
        return asked and not self._forced and self._clock() < self._started_s + self._settings.ttl_s

    async def _wait_for_change(self, view: View, timeout_s: float) -> None:
        """Until something differs from `view`, or a nudge."""
        waiting = asyncio.ensure_future(self._engine.wait(view, timeout_s))
        nudged = asyncio.ensure_future(self._nudge.wait())
        try:
            await asyncio.wait({waiting, nudged}, return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                waiting.result()
        finally:
            for task in (waiting, nudged):
                task.cancel()
            await asyncio.gather(waiting, nudged, return_exceptions=True)
            self._nudge.clear()

    async def _ask_all(self, view: View) -> dict[int, Positions]:
        """The positions of those members that answer."""
        others = [member for member in view.members if member.node_id != self._node.node_id and member.url]

        async def one(member: Member) -> tuple[int, Positions] | None:
            try:
                return member.node_id, await self._node.ask(member, self._ask_s)
            except (LitefsError, OSError) as error:
                log.debug("%s does not answer: %s", member.url, error)
                return None

        answers = await asyncio.gather(*(one(member) for member in others))
        return dict(answer for answer in answers if answer is not None)

    # --- to lead ------------------------------------------------------------------------------------------------

    async def _try_to_lead(self, view: View, state: ClusterState, reachable: Mapping[int, Positions]) -> bool:
        """One term of office, from the acquisition to its end; False if the lease could not be had."""
        self._acquiring = True
        epochs = [epoch for positions in reachable.values() for epoch, _ in positions.values()]
        try:
            held = await self._acquire(view, state, max(state.epoch, self._node.seen_epoch, *epochs, 0) + 1)
        finally:
            self._acquiring = False
        if held is None:
            return False
        self._forced = False
        reason = "the node is stopping"
        try:
            reason = await self._serve(held)
        finally:
            await self._leave_office(reason)
        return True

    async def _acquire(self, view: View, state: ClusterState, epoch: int) -> Held | None:
        node, settings = self._node, self._settings
        reason = "handed over" if state.handoff_to == node.node_id else "forced" if self._forced else "failover"
        if not state.epoch:
            reason = "first primary"
        in_sync = frozenset() if state.in_sync is None else state.in_sync - {node.node_id}
        positions = node.positions()
        document = replace(
            self.document,
            state=replace(
                state,
                epoch=epoch,
                cluster_id=state.cluster_id or node.cluster_id,
                has_data=state.has_data or any(txid for _, txid in positions.values()),
                last_leader=node.node_id,
                in_sync=in_sync if settings.sync else None,
                positions=positions,
                handoff_to=0,
                voters=frozenset([node.node_id, *(member.node_id for member in view.members)])
                if settings.failsafe
                else None,
                paused=self.document.state.paused,
            ),
        ).with_entry(
            HistoryEntry(
                epoch, node.node_id, node.hostname, sum(txid for _, txid in positions.values()), reason, _now_ms()
            )
        )
        leader = Leader(node.node_id, node.hostname, node.url, epoch)
        held = await self._engine.acquire(leader, settings.ttl_s, document.pack(), view.state.version)
        if held is not None:
            self.held = held
            self._superseded = False
            self._shared.saw(replace(view, leader=leader, state=held.state), document)
            self._voters = {member.node_id: member for member in view.members}
            log.info("this node holds the lease", extra={"epoch": epoch, "reason": reason})
        return held

    async def _serve(self, held: Held) -> str:
        """A term of office; why it ended."""
        node = self._node
        promoting = asyncio.ensure_future(node.promote(held.leader.epoch, self.document.state.cluster_id))
        try:
            while not promoting.done():  # may take long: the lease is kept meanwhile
                await asyncio.wait({promoting}, timeout=self._settings.ttl_s / RENEWALS)
                if not promoting.done() and (reason := await self._renew()):
                    return reason
            cluster_id = promoting.result()
        except Exception as error:
            surprising = not isinstance(error, LitefsError | OSError)
            log.error("this node cannot become the primary: %s", error, exc_info=error if surprising else None)
            self._unfit_until_s = self._clock() + UNFIT_S
            return f"it could not become the primary: {error}"
        finally:
            promoting.cancel()
            await asyncio.gather(promoting, return_exceptions=True)
        self._open_fence()
        self._in_office.set()
        self._has_problem("")
        if cluster_id != self.document.state.cluster_id:
            await self.change_state(lambda state: replace(state, cluster_id=cluster_id))
        return await self._hold()

    async def _hold(self) -> str:
        """Renew until there is a reason to end."""
        next_s = self._clock() + self._settings.ttl_s / RENEWALS
        while True:
            first = not self.document.state.has_data  # others must not wait for a node with data once this one has some
            await self._pause(min(LOOK_S if first else LONG_WAIT_S, max(0.0, next_s - self._clock())))
            leaving = self._leaving
            if leaving is not None and not leaving.done.done() and await self._may_leave(leaving):
                return leaving.reason
            if self._clock() < next_s:
                if not (first and self._node.positions()):
                    continue
            else:
                next_s = self._clock() + self._settings.ttl_s / RENEWALS
                if reason := await self._renew():
                    return reason
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.ttl_s / (2 * RENEWALS)):
                    await self._keep_house()

    async def _may_leave(self, leaving: Leaving) -> bool:
        """Where there is a successor: write down who is to lead, and release the lease. Nobody can write here any more,
        so nobody need wait for us. False: we lead still."""
        held = self.held
        assert held is not None
        if not leaving.successor:
            return True
        self._node.lead_until(0.0)
        try:
            await self.change_state(
                lambda state: replace(
                    state,
                    handoff_to=leaving.successor,
                    positions=self._node.positions(),
                    in_sync=None if state.in_sync is None else state.in_sync | {self._node.node_id},
                )
            )
            if leaving.done.done():
                raise Unavailable("it was given up")
        except LitefsError as error:
            return await self._take_back(leaving, error)
        with contextlib.suppress(LitefsError):  # it ends by itself
            await self._engine.release(held)
        self._node.passed_on(leaving.successor)
        return True

    async def _take_back(self, leaving: Leaving, error: LitefsError) -> bool:
        """A handover that failed may stand in the shared state, and would count for a later failover too. True: that
        cannot be changed, so we leave; the successor has everything still."""
        try:
            async with asyncio.timeout(self._settings.ttl_s / RENEWALS):
                await self.change_state(lambda state: replace(state, handoff_to=0))
        except (LitefsError, TimeoutError):
            return True
        if not leaving.done.done():
            leaving.done.set_exception(Unavailable(f"the lease was not passed on: {error}"))
        self._open_fence()
        return False

    async def _renew(self) -> str:
        """Renew the lease, again and again while the engine does not answer; "" or why it is lost."""
        while True:
            assert self.held is not None
            try:
                spare_s = self._ask_s if self._settings.failsafe else 0.0
                async with asyncio.timeout(max(0.05, self._deadline_s - self._clock() - spare_s)):
                    self.held = await self._engine.renew(self.held)
            except LeaseLost as error:
                return await self._new_term(str(error))
            except (Unavailable, TimeoutError) as error:
                text = str(error) or "the lease engine does not answer"
                self._has_problem(f"the lease cannot be renewed: {text}")
                left_s = self._deadline_s - self._clock()
                if left_s < self._settings.ttl_s / 2 and await self._failsafe(min(self._ask_s, left_s)):
                    return ""
                left_s = self._deadline_s - self._clock()
                if left_s < RETRY_S:
                    await asyncio.sleep(max(0.0, left_s))
                    return f"the lease could not be renewed: {text}"
                await asyncio.sleep(RETRY_S)
                if self._leaving is not None and not self._leaving.successor:
                    return self._leaving.reason
                continue
            self._has_problem("")
            self._in_failsafe = False
            if self._in_office.is_set():
                self._open_fence()
            return ""

    async def _new_term(self, why: str) -> str:
        """The lease has ended in the engine. If every node has kept to us meanwhile (failsafe), a new term begins."""
        if not self._in_failsafe:
            return why
        view, state = await self._shared.look(), self.document.state
        ours = self.held is not None and state.epoch == self.held.leader.epoch
        if view.leader is not None or not ours or await self._acquire(view, state, state.epoch + 1) is None:
            return why
        assert self.held is not None
        await self._node.promote(self.held.leader.epoch, self.document.state.cluster_id)
        self._in_failsafe = False
        self._open_fence()
        return ""

    async def _failsafe(self, limit_s: float) -> bool:
        """Whether all members that are known confirm that we lead; then we do for another TTL."""
        held = self.held
        if not self._settings.failsafe or held is None or limit_s <= 0:
            return False
        start_s = self._clock()
        others = [member for member in self._voters.values() if member.node_id != self._node.node_id]

        async def confirmed(member: Member) -> bool:
            try:
                why_not = await self._node.confirm(member, held.leader.epoch, limit_s)
            except (LitefsError, OSError) as error:
                why_not = str(error)
            if why_not:
                log.warning("failsafe: %s does not confirm: %s", member.hostname or member.url, why_not)
            return not why_not

        if not all(await asyncio.gather(*(confirmed(member) for member in others))):
            return False
        self.held = replace(held, valid_until_s=start_s + held.ttl_s)
        self._in_failsafe = True
        if self._in_office.is_set():
            self._open_fence()
        log.warning("failsafe: the lease engine cannot be reached, but every member follows this node")
        return True

    async def _keep_house(self) -> None:
        """What the leader sees to at each renewal."""
        try:
            view = await self._shared.look()
        except Unavailable:
            return
        if view.leader is None or self.held is None or view.leader.epoch != self.held.leader.epoch:
            return  # the next renewal will tell
        state, positions = self.document.state, self._node.positions()
        has_data = any(txid for _, txid in positions.values())
        stale = self._settings.maximum_lag is not None and state.positions != positions
        try:
            if (has_data and not state.has_data) or stale:
                await self.change_state(lambda state: replace(state, has_data=True, positions=positions))
            await self._know(view)
        except (Unavailable, Conflict) as error:
            log.debug("the state was not written: %s", error)
        if not has_data and not state.has_data and self._leaving is None:
            me = Self(self._node.node_id, self._node.cluster_id, positions)
            if other := election.gives_way_to(view, state, me, await self._ask_all(view)):
                done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                done.add_done_callback(lambda done: done.exception())
                self._leaving = Leaving(f"{other.hostname or other.url} has data", other.node_id, done)
                self.nudge()

    async def _know(self, view: View) -> None:
        """Let those lead who are members now; they are asked from before that is written, or to after."""
        if not self._settings.failsafe:
            return
        members = {member.node_id: member for member in view.members}
        wanted = frozenset([self._node.node_id, *members])
        if self.document.state.voters == wanted and self._voters.keys() == members.keys():
            self._voters = members  # perhaps with another URL
            return
        self._voters |= members
        await self.change_state(lambda state: replace(state, voters=wanted))
        self._voters = members

    async def _leave_office(self, reason: str) -> None:
        """Fence, demote, release; in that order, whatever happens."""
        node, held, leaving = self._node, self.held, self._leaving
        node.lead_until(0.0)
        log.info("leaving office", extra={"reason": reason})
        try:
            await node.demote(reason)
            if held is not None:  # if it was passed on, this does nothing
                with contextlib.suppress(LitefsError):
                    await self._engine.release(held)
        finally:
            self.held = self._leaving = None
            self._in_failsafe = False
            self._in_office.clear()
            self._leaderless_since_s = None
            if leaving is not None and not leaving.done.done():
                leaving.done.set_result(None)
            self._changed()

    # --- the register -------------------------------------------------------------------------------------------

    async def _announce(self) -> None:
        """Keep this node's entry among the members."""
        node, settings = self._node, self._settings
        while True:
            info: dict[str, Any] = election.announced(node.positions(), node.cluster_id)
            member = Member(
                node.node_id, node.hostname, node.url, self._is_candidate, settings.priority, dict(settings.tags), info
            )
            try:
                await self._engine.announce(member, settings.ttl_s)
            except LitefsError as error:
                log.debug("this node could not be announced: %s", error)
                await asyncio.sleep(RETRY_S)
            else:
                await asyncio.sleep(settings.ttl_s / RENEWALS)


def _now_ms() -> int:
    return int(time.time() * 1000)
