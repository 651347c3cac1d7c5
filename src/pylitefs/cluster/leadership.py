"""One node's part in the choice of the primary: looks at the engine, and takes the lease where that is right.

    looking    somebody leads: follow. Nobody does: ask the members where they are, and let `election` decide
    leading    see `office`

`election` is pure; here are the clock and the calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pylitefs.cluster import election
from pylitefs.cluster.candidate import Node, Nudge, Settings, ask_all
from pylitefs.cluster.control import FAILOVER, FORCED
from pylitefs.cluster.election import Acquire, ClusterState, Follow, Positions, Rules, Self, StandAside, Wait, Why
from pylitefs.cluster.known_nodes import KnownNodes
from pylitefs.cluster.lease_port import Clock, Engine, Member, View, now_s
from pylitefs.cluster.office import LONG_WAIT_S, LOOK_S, RETRY_S, Office
from pylitefs.cluster.shared_state import SharedState
from pylitefs.cluster.state import Document
from pylitefs.errors import Ineligible, LitefsError, Unavailable

log = logging.getLogger("litefs.lease")

LEAST_PATIENCE_S = 3.0
"""After a lease has ended somebody takes it within a second or two. Only later, and not before another TTL is over, is
it a warning that nobody does because acknowledged commits could be missing."""


@dataclass
class _Wanted:
    """An operator wants this node as the leader, where there is none. `refused` gets the reason why it must not be."""

    force: bool
    refused: asyncio.Future[None]

    def refuse(self, error: LitefsError) -> None:
        if not self.refused.done():
            self.refused.set_exception(error)


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
        self._shared = SharedState(engine, changed)
        self._nudge = Nudge()
        self._office = Office(engine, node, settings, self._shared, self._nudge, clock)
        self._leaderless_since_s: float | None = None
        self._promised_until_s = 0.0
        self._acquiring = False
        self._wanted: _Wanted | None = None
        self._stopping = self._takes_part = False
        self._started_s = clock()

    @property
    def view(self) -> View | None:
        """The newest one; None before the first."""
        return self._shared.view

    @property
    def document(self) -> Document:
        return self._shared.document

    @property
    def known(self) -> KnownNodes:
        return self._shared.known

    @property
    def has_lost_office(self) -> bool:
        """Whether this node stands in `view` as the leader, and is not any more, nor about to be."""
        leader = self.view.leader if self.view is not None else None
        mine = leader is not None and leader.node_id == self._node.node_id
        return mine and not (self.leads or self.enters or self._acquiring)

    @property
    def problem(self) -> str:
        """What is wrong with the engine, or why nobody leads; "" if all is well."""
        return self._shared.problem

    @property
    def leads(self) -> bool:
        """Whether commits may be acknowledged now."""
        return self._office.leads

    @property
    def enters(self) -> bool:
        """Whether this node has the lease, and takes office."""
        return self._office.enters

    @property
    def remaining_s(self) -> float:
        """Of the lease, while this node has it."""
        return self._office.remaining_s

    @property
    def _is_candidate(self) -> bool:
        return self._settings.candidate and self._node.is_fit and self._clock() >= self._office.unfit_until_s

    # --- what others ask ----------------------------------------------------------------------------------------

    def hold_back(self, why: str) -> None:
        """It cannot `run` yet."""
        self._shared.has_problem(why)

    def nudge(self) -> None:
        """Look at the engine at once."""
        self._nudge.set()

    async def leave(self, reason: str, successor: int = 0) -> None:
        """Let go of the lease, see `Office.leave`."""
        await self._office.leave(reason, successor)

    def supersede(self, reason: str) -> None:
        """A later epoch has begun: acknowledge nothing more, and leave."""
        self._office.supersede(reason)

    async def stop(self, reason: str) -> None:
        """Let go of the lease for good, and leave the cluster's register."""
        self._stopping = True
        try:
            await self.leave(reason)
        except Unavailable:  # of a handover that was under way, and has failed
            await self.leave(reason)
        if self._takes_part:  # else the entry is of a node that this one is a copy of
            with contextlib.suppress(LitefsError):
                await self._engine.withdraw(self._node.node_id)

    async def take(self, *, force: bool = False) -> None:
        """Become the leader where there is none, also while automatic failover is paused, and with `force` also where
        acknowledged commits may be missing here. Returns in office. Ineligible says why it must not be; whoever does
        not want to wait cancels this."""
        wanted = self._wanted = _Wanted(force, asyncio.get_running_loop().create_future())
        self.nudge()
        entering = asyncio.ensure_future(self.wait_in_office())
        try:
            await asyncio.wait({entering, wanted.refused}, return_when=asyncio.FIRST_COMPLETED)
            if wanted.refused.done():
                wanted.refused.result()
        finally:
            entering.cancel()
            wanted.refused.cancel()
            if self._wanted is wanted:
                self._wanted = None

    async def wait_in_office(self) -> None:
        await self._office.wait_entered()

    def promise(self, leader_id: int, epoch: int) -> str:
        """The leader cannot reach the engine: promise not to take the lease for its time. "" or why not."""
        view = self.view
        if self._office.held is not None or self._acquiring:
            return "this node has taken the lease, or is about to"
        if view is not None and view.leader is not None and view.leader.node_id != leader_id:
            return f"node {view.leader.node_id:016X} holds the lease"
        if epoch < self.document.state.epoch:
            return f"epoch {self.document.state.epoch} has begun"
        self._promised_until_s = self._clock() + self._settings.ttl_s
        return ""

    @property
    def has_promised(self) -> bool:
        """Failsafe: whether this node has promised a leader not to take the lease, or may have before it was restarted,
        whoever wants it to lead."""
        now_s, state = self._clock(), self.document.state
        asked = self.view is None or (state.voters is not None and state.last_leader != self._node.node_id)
        return now_s < self._promised_until_s or (asked and now_s < self._started_s + self._settings.ttl_s)

    async def change_state(self, change: Callable[[ClusterState], ClusterState]) -> None:
        """As the leader: replace the shared state by what `change` makes of it. Unavailable; LeaseLost."""
        await self._shared.change(change, lambda: self._office.held)

    async def pause(self, paused: bool) -> None:
        """Automatic failover off, or on again, for all nodes. Unavailable."""
        await self._shared.pause(paused)

    # --- the loop -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        self._takes_part = True
        announcer = asyncio.create_task(self._announce())
        try:
            while True:
                try:
                    await self._look()
                except LitefsError as error:
                    self._shared.has_problem(str(error))
                    await self._nudge.pause(RETRY_S)
                except Exception as error:  # the lease was let go of; whatever it is, the node must not be without
                    log.exception("the lease cannot be seen to")
                    self._shared.has_problem(f"{type(error).__name__}: {error}")
                    await self._nudge.pause(self._settings.ttl_s)
        finally:
            announcer.cancel()
            await asyncio.gather(announcer, return_exceptions=True)

    async def _look(self) -> None:
        """One look at the engine, and what follows from it."""
        wanted = self._wanted  # before the look: what is seen is newer than the wish
        view = await self._shared.look()
        node, state = self._node, self.document.state
        leaderless = view.leader is None or view.leader.node_id == node.node_id
        if not leaderless:
            self._leaderless_since_s = None
        elif self._leaderless_since_s is None:
            self._leaderless_since_s = self._clock()
        me = Self(node.node_id, node.cluster_id, node.positions(), self._is_candidate, self._settings.priority)
        asked = leaderless and not election.takes_over(state, me)
        reachable = await ask_all(node, view, self._settings.ask_s) if asked else {}
        if wanted is not None and leaderless:
            if other := await self._bound(view) if state.voters is not None else "":
                text = f"{other} follows a primary that leads on without the lease engine (lease.failsafe), or did"
                wanted.refuse(Unavailable(f"{text}: try again in {self._settings.ttl_s:g} s"))
                wanted = None
            else:
                state = replace(state, paused=False, voters=None)
        if asked:  # that took time
            me = replace(me, cluster_id=node.cluster_id, positions=node.positions(), candidate=self._is_candidate)
        if wanted is not None:
            me = replace(me, priority=election.WANTED)
        decide = election.decide_forced if wanted is not None and wanted.force else election.decide
        since_s = self._clock() if self._leaderless_since_s is None else self._leaderless_since_s
        state = replace(state, hostnames=self.known.hostnames(self.document))
        decision = decide(view, state, me, reachable, self._rules, self._clock(), since_s)
        match decision:
            case Follow(leader):
                if wanted is not None:
                    wanted.refuse(Unavailable(f"{leader.hostname or leader.url} is the primary now: try again"))
                self._shared.has_problem("")
                await node.follow(leader)
                await self._wait_for_change(view, LONG_WAIT_S)
            case Acquire(forced):
                if self._stopping or self.has_promised:
                    await self._wait_for_change(view, LOOK_S * 5)
                elif not await self._try_to_lead(view, reachable, self._reason(wanted is not None, forced)):
                    await self._nudge.pause(LOOK_S)
            case Wait(why, text, _):
                level = logging.INFO if why is Why.HANDOFF else logging.WARNING
                self._shared.has_problem(f"no primary: {text}", level)
                await self._wait_for_change(view, LOOK_S)
            case StandAside(_, text, at_first):
                if wanted is not None:
                    wanted.refuse(Ineligible(text))
                if at_first and self._clock() < since_s + max(LEAST_PATIENCE_S, self._settings.ttl_s):
                    self._shared.has_problem(at_first, logging.INFO)
                else:
                    self._shared.has_problem(text)
                await self._wait_for_change(view, LOOK_S * 10)

    async def _bound(self, view: View) -> str:
        """Failsafe: who of those that answer has promised a leader not to take the lease; "" if nobody has."""
        if self._clock() < self._promised_until_s:
            return "this node"
        for member in view.members:
            if member.node_id != self._node.node_id and member.url:
                with contextlib.suppress(LitefsError, OSError):
                    if await self._node.has_promised(member, self._settings.ask_s):
                        return member.hostname or member.url
        return ""

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

    def _reason(self, wanted: bool, forced: bool) -> str:
        """For the history."""
        state = self.document.state
        if forced:
            return FORCED
        if not state.epoch:
            return "first primary"
        return "handed over" if state.handoff_to == self._node.node_id else "promoted" if wanted else FAILOVER

    async def _try_to_lead(self, view: View, reachable: Mapping[int, Positions], reason: str) -> bool:
        """One term of office, from the acquisition to its end; False if the lease could not be had."""
        state = self.document.state
        epochs = [epoch for positions in reachable.values() for epoch, _ in positions.values()]
        self._acquiring = True
        try:
            acquired = await self._office.acquire(view, max(state.epoch, self._node.seen_epoch, *epochs, 0) + 1, reason)
        finally:
            self._acquiring = False
        if not acquired:
            return False
        try:
            await self._office.serve()
        finally:
            self._leaderless_since_s = None
            self._changed()
        return True

    # --- the register -------------------------------------------------------------------------------------------

    async def _announce(self) -> None:
        """Keep this node's entry among the members."""
        node, settings = self._node, self._settings
        while True:
            try:
                info: dict[str, Any] = election.announced(node.positions(), node.cluster_id)
                member = Member(
                    node.node_id, node.hostname, node.url, self._is_candidate,
                    settings.priority, dict(settings.tags), info,
                )  # fmt: skip
                await self._engine.announce(member, settings.ttl_s)
            except LitefsError as error:
                log.debug("this node could not be announced: %s", error)
                await asyncio.sleep(RETRY_S)
            except Exception:  # whatever it is: a node that nobody knows cannot be elected, nor waited for
                log.exception("this node cannot be announced")
                await asyncio.sleep(settings.renewal_s)
            else:
                await asyncio.sleep(settings.renewal_s)
