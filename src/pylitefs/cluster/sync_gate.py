"""Synchronous replication on the primary: a commit is answered when every in-sync replica holds it durably.

Which replicas are in sync stands in the cluster's shared state, and only those, and the last leader, may be elected.

    Invariant: every node in the set as it is written there holds every commit that was ever acknowledged.

So the set that commits wait for is never smaller than what may be written:

    a node is taken out    first the set without it is written, then commits stop waiting for it
    a node is taken in     first commits wait for it, then it must hold all that is in the log by then, then the set
                           with it is written
    a write fails          either set may stand there: commits wait for both, until a later write succeeds

What has been acknowledged before this node led is held by its own log, as it was elected. A replica that connects
again, or whose copy of a database has to be mended, is taken in only when it holds what was in the logs then. A commit
asks about its own database alone: one database that a replica cannot be sent now (it is set aside here, or is being
mended there) holds up no commit of another one. What is set aside on this node takes no commits and is sent to nobody,
so it does not count for who is in sync, until it is released (`released`).

A commit needs `replicas` nodes in the set. If there are too few, it waits ("wait"; after `timeout_s` it fails, and
SQLite takes it back), or after `timeout_s` those that are missing are taken out, and it is answered ("degrade").
"""

from __future__ import annotations

import asyncio
import enum
import errno
import logging
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from pylitefs.cluster.control import CommitsWait
from pylitefs.cluster.ports import Store
from pylitefs.errors import LitefsError, Unavailable
from pylitefs.events import Event
from pylitefs.ports import Then

log = logging.getLogger("litefs.replication")

NodeSet = frozenset[int]
ChangeInSync = Callable[[NodeSet], Awaitable[None]]
"""Write the set into the shared state; it stands there on return. Unavailable: nobody knows whether it does. Any other
LitefsError: this node does not lead any more."""

_TICK_S = 0.1
_RETRY_S = 0.5
_FLOOR_S = 0.2
_QUIET_S = 10.0
LONG_S = 1.5
"""A commit that has waited for so long is told of: replicas need milliseconds."""
_TOLD_AGAIN_S = 60.0  # where commits wait for long again and again


class Mode(enum.Enum):
    """What a commit does that too few replicas hold."""

    WAIT = "wait"
    DEGRADE = "degrade"


@dataclass(frozen=True)
class SyncRules:
    """`replicas`: 0 switches it off. `timeout_s` 0: no limit. `replace_after_s`: how long a commit waits for a replica
    that is connected before another one takes its place; `take_in_s`: how long one that is taken in may need."""

    replicas: int = 0
    mode: Mode = Mode.WAIT
    timeout_s: float = 0.0
    replace_after_s: float = 2.0
    take_in_s: float = 1.0


@dataclass
class _Replica:
    """What one replica holds durably, by database; `targets` is what it must hold before it is in line."""

    held: dict[str, int] = field(default_factory=dict)
    targets: dict[str, int] = field(default_factory=dict)

    @property
    def in_line(self) -> bool:
        return not self.targets

    def holds(self, name: str, txid: int) -> bool:
        return self.held.get(name, 0) >= txid


@dataclass(frozen=True)
class _Commit:
    name: str
    txid: int
    then: Then
    since_s: float


def log_heads(store: Store) -> dict[str, int]:
    """The TXIDs at the ends of the logs of those databases that can be written and sent. Any thread."""
    databases = [(name, store.get(name)) for name in store.all_names()]
    return {
        name: database.log.head.txid
        for name, database in databases
        if database is not None and database.set_aside_reason is None
    }


class Failure(enum.Enum):
    """Why a commit failed that waited."""

    TIMEOUT = "timeout"
    DEMOTED = "demoted"


class SyncGate:
    """Implements `ports.CommitGate`. One for each time that this node leads; `run` it on the loop, where everything
    else happens too but `wait` and the properties, which are for any thread."""

    def __init__(
        self,
        rules: SyncRules,
        heads: Callable[[], dict[str, int]],
        change_in_sync: ChangeInSync,
        written: Iterable[int] | None,
        *,
        can_lead: Callable[[int], bool] = lambda node: True,
        clock: Callable[[], float] = time.monotonic,
        emit: Callable[[Event], None] = lambda event: None,
    ) -> None:
        """`heads`: the TXIDs at the ends of the logs now (`log_heads`). `written`: the set in the shared state, without
        this node. `can_lead`: nodes that cannot be elected are in the set only where there are too few others.
        `emit`: told of each commit that was answered, and when commits do, or do not, wait any more; any thread."""
        self.rules = rules
        self._emit = emit
        self._heads = heads
        self._change = change_in_sync
        self._can_lead = can_lead
        self._clock = clock
        self._lock = threading.Lock()  # guards all below; nothing is waited for, and nobody called, under it
        self._replicas: dict[int, _Replica] = {}  # connected ones that copy every database
        self._known = written is not None
        self._possible: list[NodeSet] = [frozenset(written or ())]  # what may be written: one, if that is known
        self._required: NodeSet = self._possible[0]
        self._commits: dict[str, deque[_Commit]] = {}
        self._closed: Exception | None = None
        self._wake = asyncio.Event()
        self._retry_at_s = 0.0
        self._floors: tuple[dict[str, int], dict[str, int]] = {}, {}  # the ends of the logs a moment ago, and later
        self._floors_s = float("-inf")
        self._complained_s = float("-inf")
        self._stalled_since_s: float | None = None  # since when commits wait, if the log has told of it
        self._told_s = float("-inf")  # when it did so last

    # --- for the engine: any thread ---------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        return self.rules.replicas > 0

    @property
    def is_closed(self) -> bool:
        return self._closed is not None

    @property
    def in_sync(self) -> NodeSet:
        """The set, as it is written for certain."""
        with self._lock:
            return frozenset.intersection(*self._possible)

    @property
    def waiting(self) -> int:
        """How many commits wait."""
        with self._lock:
            return sum(map(len, self._commits.values()))

    def stalled(self) -> CommitsWait | None:
        """The commits that wait, once the first of them has waited for LONG_S."""
        with self._lock:
            first_s = min((queue[0].since_s for queue in self._commits.values() if queue), default=float("inf"))
            seconds = self._clock() - first_s
            if seconds < LONG_S:
                return None
            return CommitsWait(sum(map(len, self._commits.values())), seconds, self._missing())

    def _missing(self) -> str:
        """What commits wait for. Under the lock."""
        needed, connected = self.rules.replicas, len(self._replicas)
        if connected < needed:
            return f"{connected} of {needed} replicas connected (replication.sync: {needed})"
        if len(self._possible) > 1:
            return "which replicas are in sync could not be written down"
        if sum(replica.in_line for replica in self._replicas.values()) < needed:
            return "replicas are connected, but have not caught up yet"
        late = sorted(self._lacking(self._clock() - LONG_S) & (self._required or self._replicas.keys()))
        return f"no answer from {', '.join(f'{node:016X}' for node in late)}" if late else "no replica is in sync yet"

    def wait(self, name: str, txid: int, then: Then) -> None:
        commit = _Commit(name, txid, then, self._clock())
        with self._lock:
            error = self._closed
            wait = self.active and error is None and not self._may_answer(name, txid)
            if wait:
                self._commits.setdefault(name, deque()).append(commit)
        if error is not None:
            self._fail([commit], Failure.DEMOTED, error)
        elif not wait:
            self._answer([commit])

    # --- for the sessions: on the loop ------------------------------------------------------------------------------

    def joined(self, node_id: int) -> None:
        """A replica has connected that copies every database."""
        heads = self._heads()
        with self._lock:
            self._replicas[node_id] = _Replica(targets=heads)
        self._wake.set()

    def left(self, node_id: int) -> None:
        with self._lock:
            self._replicas.pop(node_id, None)
        self._wake.set()

    def strayed(self, node_id: int, name: str) -> None:
        """The replica's copy of a database has turned out not to be what it said: it is sent anew. There is nothing to
        hold if this node has none of that name, or has it set aside."""
        txid = self._heads().get(name, 0)
        with self._lock:
            replica = self._replicas.get(node_id)
            if replica is not None:
                replica.held.pop(name, None)
                replica.targets.pop(name, None)
                if txid:
                    replica.targets[name] = txid
        self._wake.set()

    def released(self, name: str) -> None:
        """A database of this node is not set aside any more: who is in sync must hold what is in its log."""
        txid = self._heads().get(name, 0)
        with self._lock:
            for replica in self._replicas.values():
                if not replica.holds(name, txid):
                    replica.targets[name] = txid
        self._wake.set()

    def holds(self, node_id: int, name: str, txid: int) -> None:
        """The replica has acknowledged to hold this much of our history durably."""
        with self._lock:
            replica = self._replicas.get(node_id)
            if replica is None:
                return
            replica.held[name] = max(txid, replica.held.get(name, 0))
            target = replica.targets.get(name)
            if target is not None and txid >= target:
                del replica.targets[name]
                if replica.in_line:
                    self._wake.set()
            ready = self._take_ready([name])
        self._answer(ready)

    # --- the set: on the loop ---------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep the set; until cancelled, or this node leads no more."""
        try:
            while self._closed is None:
                try:
                    await self.step()
                except Exception:  # a defect; commits that wait must not wait for ever because of it
                    log.exception("the in-sync replicas cannot be seen to, trying again")
                    await asyncio.sleep(_RETRY_S)
                try:
                    async with asyncio.timeout(_TICK_S):
                        await self._wake.wait()
                except TimeoutError:
                    pass
                self._wake.clear()
        finally:
            self.close(Unavailable("this node is not the primary any more"))

    def close(self, error: Exception) -> None:
        """Every commit that waits, or comes, fails. Any thread."""
        with self._lock:
            self._closed = self._closed or error
            commits, self._commits = self._commits, {}
        self._fail([commit for queue in commits.values() for commit in queue], Failure.DEMOTED, error)

    async def step(self) -> None:
        """Look once: is the set to be changed, does a commit wait for too long?"""
        if not self.active or self._closed is not None:
            return
        self._tell_of_stall()
        if self._clock() >= self._floors_s + _FLOOR_S:
            self._floors, self._floors_s = (self._floors[1], self._heads()), self._clock()
        if self._clock() >= self._retry_at_s:
            wanted = self._wanted()
            if wanted is not None:
                await self._write(wanted)
        self._expire()

    def _tell_of_stall(self) -> None:
        """In the log, once until no commit waits for long any more."""
        stalled, now_s = self.stalled(), self._clock()
        if stalled is None and self._stalled_since_s is not None:
            log.info("commits do not wait for replicas any more, after %.0f s", now_s - self._stalled_since_s)
            self._stalled_since_s = None
        elif stalled is not None and self._stalled_since_s is None and now_s >= self._told_s + _TOLD_AGAIN_S:
            self._stalled_since_s, self._told_s = now_s - stalled.seconds, now_s
            rules = self.rules
            end = {
                Mode.WAIT: f"They fail after {rules.timeout_s:g} s" if rules.timeout_s else "They wait without a limit",
                Mode.DEGRADE: f"They go on without after {rules.timeout_s:g} s",
            }[rules.mode]
            log.warning("%s. %s (replication.timeout): start the replicas, or see litefs status", stalled, end)

    def _wanted(self) -> NodeSet | None:
        """The set that should be written; None if that is what is."""
        rules, now_s = self.rules, self._clock()
        with self._lock:
            current = self._possible[-1]
            in_line = {node for node, replica in self._replicas.items() if replica.in_line}
            slow = self._lacking(now_s - rules.replace_after_s)
            good = [node for node in sorted(current) if node in in_line and node not in slow]
            fresh = [node for node in sorted(in_line - current) if node not in slow and self._keeps_up(node)]
            chosen = sorted(good + fresh, key=lambda node: not self._can_lead(node))[: rules.replicas]
            others = sorted(current - set(chosen), key=lambda node: (node not in self._replicas, node))
            if rules.mode is Mode.DEGRADE and rules.timeout_s:
                late = self._lacking(now_s - rules.timeout_s)
                others = [node for node in others if node not in late]
            wanted = frozenset(chosen + others[: max(0, rules.replicas - len(chosen))])
            is_so = self._known and self._possible == [wanted]
            return None if is_so or (not self._known and self._too_small(wanted)) else wanted

    def _keeps_up(self, node: int) -> bool:
        """Whether a replica holds all that was in the logs a moment ago: it is not taken in to be waited for."""
        return all(self._replicas[node].holds(name, txid) for name, txid in self._floors[0].items())

    def _lacking(self, before_s: float) -> set[int]:
        """Nodes that something that has waited since before then waits for."""
        found: set[int] = set()
        for name, queue in self._commits.items():
            if queue and queue[0].since_s <= before_s:
                txid = queue[0].txid
                found |= {node for node, replica in self._replicas.items() if not replica.holds(name, txid)}
                found |= {node for node in self._required if node not in self._replicas}
        return found

    def _too_small(self, nodes: NodeSet) -> bool:
        return self.rules.mode is Mode.WAIT and len(nodes) < self.rules.replicas

    async def _write(self, wanted: NodeSet) -> None:
        with self._lock:
            added = wanted.difference(*self._possible)  # commits wait for the others already
            self._required = wanted.union(*self._possible)
        if not await self._have_caught_up(added):
            with self._lock:
                self._required = self._possible[0].union(*self._possible)
                ready = self._take_ready(list(self._commits))
            self._answer(ready)
            self._retry_at_s = self._clock() + _RETRY_S
            return
        with self._lock:
            if wanted not in self._possible:
                self._possible.append(wanted)
        try:
            await self._change(wanted)
        except Unavailable as error:
            self._retry_at_s = self._clock() + _RETRY_S
            self._complain(f"the in-sync replicas cannot be written down: {error}")
            return
        except LitefsError as error:
            self.close(error)
            return
        with self._lock:
            before = self._possible[0]
            self._known, self._possible, self._required = True, [wanted], wanted
            ready = self._take_ready(list(self._commits))
        if before != wanted:
            log.info("in-sync replicas: %s", ", ".join(f"{node:016X}" for node in sorted(wanted)) or "none")
            self._tell_of_set(before, wanted)
        self._answer(ready)

    def _tell_of_set(self, before: NodeSet, now: NodeSet) -> None:
        enough, was_enough = (len(nodes) >= self.rules.replicas for nodes in (now, before))
        if self.rules.mode is Mode.DEGRADE and enough != was_enough:
            self._emit(Event("syncRestored" if enough else "syncDegraded", None, {"in_sync": len(now)}))

    async def _have_caught_up(self, added: NodeSet) -> bool:
        """Whether these hold all that is in the logs now, before long. Commits wait for them already."""
        heads, until_s = self._heads(), self._clock() + self.rules.take_in_s

        def holds_all(node: int) -> bool:
            replica = self._replicas.get(node)
            return replica is not None and all(replica.holds(name, txid) for name, txid in heads.items())

        while True:
            with self._lock:
                if self._closed is not None or not all(node in self._replicas for node in added):
                    return False
                if all(holds_all(node) for node in added):
                    return True
            if self._clock() >= until_s:
                return False
            self._expire()
            await asyncio.sleep(0.002)

    # --- commits ----------------------------------------------------------------------------------------------------

    def _may_answer(self, name: str, txid: int) -> bool:
        """Under the lock."""
        if not self._known or any(self._too_small(nodes) for nodes in self._possible):
            return False
        replicas = self._replicas
        return all(node in replicas and replicas[node].holds(name, txid) for node in self._required)

    def _take_ready(self, names: Iterable[str]) -> list[_Commit]:
        """Take out the commits that may be answered. Under the lock."""
        ready: list[_Commit] = []
        for name in names:
            queue = self._commits.get(name)
            while queue and self._may_answer(name, queue[0].txid):
                ready.append(queue.popleft())
            if queue is not None and not queue:
                del self._commits[name]
        return ready

    def _expire(self) -> None:
        rules = self.rules
        if not rules.timeout_s or rules.mode is not Mode.WAIT:
            return
        before_s = self._clock() - rules.timeout_s
        late: list[_Commit] = []
        with self._lock:
            missing = self._lacking(before_s) & self._required
            for name in list(self._commits):
                queue = self._commits[name]
                while queue and queue[0].since_s <= before_s:
                    late.append(queue.popleft())
                if not queue:
                    del self._commits[name]
        if late:
            who = ", ".join(f"{node:016X}" for node in sorted(missing)) or "too few are in sync"
            self._complain(f"{len(late)} commits failed: no replica held them within {rules.timeout_s:g} s ({who})")
            self._fail(late, Failure.TIMEOUT, Unavailable(f"not replicated within {rules.timeout_s:g} s"))

    def _answer(self, commits: list[_Commit]) -> None:
        self._tell(commits, None, {})

    def _fail(self, commits: list[_Commit], why: Failure, error: Exception) -> None:
        self._tell(commits, OSError(errno.EIO, str(error)), {"failed": why.value})

    def _tell(self, commits: list[_Commit], error: OSError | None, more: dict[str, str]) -> None:
        now_s = self._clock()
        for commit in commits:
            log.debug("%s: transaction %d is answered: %s", commit.name, commit.txid, error or "it is held")
            try:
                commit.then(error)
            except Exception:
                log.exception("a commit could not be answered")
            data = {"txid": commit.txid, "seconds": max(0.0, now_s - commit.since_s), **more}
            self._emit(Event("synced", commit.name, data))

    def _complain(self, line: str) -> None:
        if self._clock() - self._complained_s >= _QUIET_S:
            self._complained_s = self._clock()
            log.warning("%s", line)

