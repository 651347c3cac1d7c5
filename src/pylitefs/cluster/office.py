"""A term of office: this node holds the lease, from the acquisition to the release.

    entering   the node is promoted; the lease is renewed meanwhile, and nothing is acknowledged
    leading    renew the lease three times in its life; whoever wants it gone asks (`leave`, `supersede`)
    leaving    fence first (no commit is acknowledged any more), then demote, then release

The lease counts by our own clock from before the request that got it, less a margin: what is acknowledged while
`Node.lead_until` says so is acknowledged by the only leader.

*Failsafe*: where the engine cannot be reached the leader stays it for as long as everybody who may lead confirms, again
and again, that it follows this leader and will not take the lease itself for the lease's time. Who may lead stands in
the shared state (`voters`): a node that the leader does not know cannot be elected.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from pylitefs.cluster import election
from pylitefs.cluster.candidate import RENEWALS, Leaving, Node, Nudge, Settings, ask_all
from pylitefs.cluster.control import FAILOVER, FORCED, HistoryEntry
from pylitefs.cluster.election import ClusterState, Self, Total
from pylitefs.cluster.lease_port import Clock, Conflict, Engine, Held, Leader, LeaseLost, Member, View
from pylitefs.cluster.shared_state import SharedState
from pylitefs.errors import LitefsError, Unavailable

log = logging.getLogger("litefs.lease")

RETRY_S = 0.3
LONG_WAIT_S = 30.0
LOOK_S = 0.1  # between looks at whether an empty leader has data by now
UNFIT_S = 10.0  # a node that could not take office is no candidate for so long


class Office:
    """What a node does with the lease while it has it."""

    def __init__(
        self, engine: Engine, node: Node, settings: Settings, shared: SharedState, nudge: Nudge, clock: Clock
    ) -> None:
        self._engine = engine
        self._node = node
        self._settings = settings
        self._shared = shared
        self._nudge = nudge
        self._clock = clock
        self.held: Held | None = None
        self._until_s = 0.0  # what the node was told last
        self.unfit_until_s = 0.0
        self._leaving: Leaving | None = None
        self._in_failsafe = self._superseded = False
        self._voters: dict[int, Member] = {}  # no fewer than in the shared state
        self._entered = asyncio.Event()  # promoted, and the fence is open

    @property
    def leads(self) -> bool:
        """Whether commits may be acknowledged now."""
        return self._clock() < self._until_s

    @property
    def enters(self) -> bool:
        """Whether the lease is held, and the promotion has not ended."""
        return self.held is not None and not self._entered.is_set() and self._leaving is None

    @property
    def remaining_s(self) -> float:
        return max(0.0, self._deadline_s - self._clock()) if self.held is not None else 0.0

    @property
    def _deadline_s(self) -> float:
        return 0.0 if self.held is None else self.held.valid_until_s - self._settings.margin_s

    # --- what others ask ----------------------------------------------------------------------------------------

    async def leave(self, reason: str, successor: int = 0) -> None:
        """Let go of the lease and return when that is done. With a `successor` it is either passed on, or this node
        stays in office and Unavailable says why."""
        if self.held is None:
            return
        pending = self._leaving
        if pending is not None and pending.successor and not successor and not pending.done.done():
            pending.done.set_exception(Unavailable(f"the lease was not passed on: {reason}"))
        if pending is None or pending.done.done():
            pending = self._wish_to_leave(reason, successor)
        try:
            await asyncio.shield(pending.done)
        except asyncio.CancelledError:
            if successor and pending.successor:  # writes go on from here: nobody can have everything
                pending.done.cancel()
            raise

    def supersede(self, reason: str) -> None:
        """A later epoch has begun: acknowledge nothing more, and leave."""
        self._superseded = True
        self._lead_until(0.0)
        if self.held is not None:
            pending = self._leaving
            self._wish_to_leave(reason, 0)
            if pending is not None and not pending.done.done():
                pending.done.set_exception(Unavailable(f"the lease was not passed on: {reason}"))

    def _wish_to_leave(self, reason: str, successor: int) -> Leaving:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.add_done_callback(lambda done: done.cancelled() or done.exception())  # whoever cares waits for it
        self._leaving = Leaving(reason, successor, done)
        self._nudge.set()
        return self._leaving

    async def wait_entered(self) -> None:
        await self._entered.wait()

    # --- the term -----------------------------------------------------------------------------------------------

    async def acquire(self, view: View, epoch: int, reason: str) -> bool:
        """Take the lease, as of `view`. False: it could not be had. Unavailable: nobody knows. Where the reason is
        FORCED only this node is in sync with what begins now."""
        node, settings, state = self._node, self._settings, self._shared.document.state
        in_sync: frozenset[int] = frozenset()
        if state.in_sync is not None and reason != FORCED:  # the last leader holds all it has acknowledged
            in_sync = (state.in_sync | {state.last_leader}) - {node.node_id}
        positions = node.positions()
        txid = sum(txid for _, txid in positions.values())
        ours = node.cluster_id if txid and not state.has_data else ""  # what led without data was no cluster yet
        document = replace(
            self._shared.document,
            state=replace(
                state,
                epoch=epoch,
                cluster_id=ours or state.cluster_id or node.cluster_id,
                has_data=state.has_data or any(txid for _, txid in positions.values()),
                last_leader=node.node_id,
                in_sync=in_sync if settings.sync else None,
                positions=positions,
                handoff_to=0,
                voters=frozenset([node.node_id, *(member.node_id for member in view.members)])
                if settings.failsafe
                else None,
            ),
        ).with_entry(HistoryEntry(epoch, node.node_id, node.hostname, txid, reason, _now_ms()))
        leader = Leader(node.node_id, node.hostname, node.url, epoch)
        held = await self._engine.acquire(leader, settings.ttl_s, document.pack(), view.state.version)
        if held is None:
            return False
        self.held = held
        self._superseded = False
        self._shared.saw(replace(view, leader=leader, state=held.state), document)
        self._voters = {member.node_id: member for member in view.members}
        log.info("this node holds the lease", extra={"epoch": epoch, "reason": reason})
        if reason == FORCED:
            node.was_forced(epoch, txid)
        return True

    async def serve(self) -> None:
        """From a lease that was acquired to its end."""
        reason = "the node is stopping"
        try:
            reason = await self._serve()
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise
        finally:
            await self._end(reason)

    def _open_fence(self) -> None:
        if not self._superseded:
            self._lead_until(self._deadline_s)

    def _lead_until(self, until_s: float) -> None:
        self._until_s = until_s
        self._node.lead_until(until_s)

    async def _serve(self) -> str:
        """Why the term has ended."""
        assert self.held is not None
        promoting = asyncio.ensure_future(self._node.promote(self.held.leader.epoch, self._state.cluster_id))
        try:
            while not promoting.done():  # may take long: the lease is kept meanwhile
                await asyncio.wait({promoting}, timeout=self._settings.renewal_s)
                if not promoting.done() and (reason := await self._renew()):
                    return reason
            cluster_id = promoting.result()
        except Exception as error:
            surprising = not isinstance(error, LitefsError | OSError)
            log.error("this node cannot become the primary: %s", error, exc_info=error if surprising else None)
            self.unfit_until_s = self._clock() + UNFIT_S
            return f"it could not become the primary: {error}"
        finally:
            promoting.cancel()
            await asyncio.gather(promoting, return_exceptions=True)
        self._open_fence()
        self._entered.set()
        self._shared.has_problem("")
        if cluster_id != self._state.cluster_id:
            await self._change(lambda state: replace(state, cluster_id=cluster_id))
        return await self._hold()

    @property
    def _state(self) -> ClusterState:
        return self._shared.document.state

    async def _change(self, change: Callable[[ClusterState], ClusterState]) -> None:
        await self._shared.change(change, lambda: self.held)

    async def _hold(self) -> str:
        """Renew until there is a reason to end."""
        next_s = self._clock() + self._settings.renewal_s
        while True:
            first = not self._state.has_data  # others must not wait for a node with data once this one has some
            await self._nudge.pause(min(LOOK_S if first else LONG_WAIT_S, max(0.0, next_s - self._clock())))
            leaving = self._leaving
            if leaving is not None and not leaving.done.done() and await self._may_leave(leaving):
                return leaving.reason
            if self._clock() < next_s:
                if not (first and self._node.positions()):
                    continue
            else:
                next_s = self._clock() + self._settings.renewal_s
                if reason := await self._renew():
                    return reason
            await self._unless_nudged(self._keep_house(), self._settings.ttl_s / (2 * RENEWALS))

    async def _unless_nudged(self, work: Coroutine[Any, Any, None], timeout_s: float) -> None:
        """What can be done later. Writes may be paused while somebody wishes that this node leaves."""
        tasks = [asyncio.ensure_future(work), asyncio.ensure_future(self._nudge.wait())]
        try:
            await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _may_leave(self, leaving: Leaving) -> bool:
        """Where there is a successor: write down who is to lead, and release the lease. Nobody can write here any more,
        so nobody need wait for us. False: we lead still."""
        held = self.held
        assert held is not None
        if not leaving.successor:
            return True
        self._lead_until(0.0)
        try:
            await self._change(
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
            async with asyncio.timeout(self._settings.renewal_s):
                await self._change(lambda state: replace(state, handoff_to=0))
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
                spare_s = self._settings.ask_s if self._settings.failsafe else 0.0
                async with asyncio.timeout(max(0.05, self._deadline_s - self._clock() - spare_s)):
                    self.held = await self._engine.renew(self.held)
            except LeaseLost as error:
                return await self._new_term(str(error))
            except (Unavailable, TimeoutError) as error:
                text = str(error) or "the lease engine does not answer"
                self._shared.has_problem(f"the lease cannot be renewed: {text}")
                left_s = self._deadline_s - self._clock()
                if left_s < self._settings.ttl_s / 2 and await self._failsafe(min(self._settings.ask_s, left_s)):
                    return ""
                left_s = self._deadline_s - self._clock()
                if left_s < RETRY_S:
                    await asyncio.sleep(max(0.0, left_s))
                    return f"the lease could not be renewed: {text}"
                await asyncio.sleep(RETRY_S)
                if self._leaving is not None and not self._leaving.successor:
                    return self._leaving.reason
                continue
            self._shared.has_problem("")
            self._in_failsafe = False
            if self._entered.is_set():
                self._open_fence()
            return ""

    async def _new_term(self, why: str) -> str:
        """The lease has ended in the engine. If every node has kept to us meanwhile (failsafe), a new term begins."""
        if not (self._in_failsafe and self._entered.is_set()):  # one promotion at a time
            return why
        view, state = await self._shared.look(), self._state
        ours = self.held is not None and state.epoch == self.held.leader.epoch
        if view.leader is not None or not ours or not await self.acquire(view, state.epoch + 1, FAILOVER):
            return why
        assert self.held is not None
        await self._node.promote(self.held.leader.epoch, self._state.cluster_id)
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
        if self._entered.is_set():
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
        state, positions = self._state, self._node.positions()
        has_data = any(txid for _, txid in positions.values())
        written = state.positions == (election.total(positions) if isinstance(state.positions, Total) else positions)
        stale = self._settings.maximum_lag is not None and not written
        try:
            if (has_data and not state.has_data) or stale:
                await self._change(lambda state: replace(state, has_data=True, positions=positions))
            await self._know(view)
        except (Unavailable, Conflict) as error:
            log.debug("the state was not written: %s", error)
        leaving = self._leaving
        if not has_data and not state.has_data and (leaving is None or leaving.done.done()):
            answers = await ask_all(self._node, view, self._settings.ask_s)
            me = Self(self._node.node_id, self._node.cluster_id, self._node.positions())  # perhaps it has data by now
            if other := election.gives_way_to(view, state, me, answers):
                self._wish_to_leave(f"{other.hostname or other.url} has data", other.node_id)

    async def _know(self, view: View) -> None:
        """Let those lead who are members now; they are asked from before that is written, or to after. Not while this
        node leads by promises: whoever has not been asked for one could be elected."""
        if not self._settings.failsafe or self._in_failsafe:
            return
        members = {member.node_id: member for member in view.members}
        wanted = frozenset([self._node.node_id, *members])
        if self._state.voters == wanted and self._voters.keys() == members.keys():
            self._voters = members  # perhaps with another URL
            return
        self._voters |= members
        await self._change(lambda state: replace(state, voters=wanted))
        self._voters = members

    async def _end(self, reason: str) -> None:
        """Fence, demote, release; in that order, whatever happens."""
        node, held = self._node, self.held
        self._lead_until(0.0)
        log.info("leaving office", extra={"reason": reason})
        try:
            await node.demote(reason)
            if held is not None:  # if it was passed on, this does nothing
                with contextlib.suppress(LitefsError):
                    await self._engine.release(held)
        finally:
            leaving, self._leaving = self._leaving, None  # perhaps one that came while the node was demoted
            self.held = None
            self._in_failsafe = False
            self._entered.clear()
            if leaving is not None and not leaving.done.done():
                leaving.done.set_result(None)


def _now_ms() -> int:
    return int(time.time() * 1000)
