"""Nodes whose databases are lists, under the real leadership and commit gate, in a `World`.

A node has two logs of (epoch, value): FULL, whose commits wait for replicas if `sync` is set, and NORMAL, whose never
do. A commit of FULL goes through the daemon: it is answered if the fence holds before and after. One of NORMAL does
not: it succeeds while the node captures, also when the daemon is stopped or its lease has ended.

Replication is a replica that asks its primary for what follows its position, every POLL_S, and thereby acknowledges
that position, which is durable on its disk by then. If the logs have parted it keeps its branch, and takes the
primary's log. A replica that asks for the first time, or in another session, joins the gate; one that was silent has
left it. What comes from an earlier session, or out of order, does not count.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from sim_engine import SimEngine
from worlds import Process

from pylitefs.cluster.candidate import Settings
from pylitefs.cluster.election import Positions
from pylitefs.cluster.leadership import Leadership
from pylitefs.cluster.lease_port import Leader, Member
from pylitefs.cluster.sync_gate import Mode, SyncGate, SyncRules
from pylitefs.errors import LitefsError, Unavailable

if TYPE_CHECKING:
    from simulated_cluster import SimCluster

T = TypeVar("T")
FULL, NORMAL = "full", "normal"
CLUSTER = "LFSC0123456789ABCDEF"
TTL_S = 3.0
POLL_S = 0.06
STALE_S = 1.0  # a session without a word for so long has ended
TAKE_OVER_S = 15.0
STOPS_S = (0.1, 3.2, 8.0)  # so long a daemon is stopped in the middle of an answer
MACHINES = 100  # a machine that takes another one's place has a node id that is higher by this

Entry = tuple[int, str]
Session = tuple[int, int]  # of which life of the replica's process, and which of its sessions


@dataclass
class Disk:
    """What a machine keeps. `durable`: how much of each log a power cut leaves."""

    node_id: int
    logs: dict[str, list[Entry]] = field(default_factory=lambda: {FULL: [], NORMAL: []})
    durable: dict[str, int] = field(default_factory=lambda: {FULL: 0, NORMAL: 0})
    cluster_id: str = ""
    seen_epoch: int = 0

    def copy(self) -> Disk:
        return copy.deepcopy(self)


@dataclass
class Heard:
    """On the primary: a replica's session, and what was heard in it last."""

    session: Session
    serial: int
    at_s: float
    held: dict[str, int]


class SimNode:
    """One node, over several lives of its process. Implements `cluster.leadership.Node`."""

    def __init__(self, cluster: SimCluster, number: int) -> None:
        self.cluster = cluster
        self.number = number
        self.hostname = f"n{number}"
        self.url = f"http://n{number}"
        self.rate = 1 + cluster.setup.drift * cluster.world.rng.choice((-1, -1, 0, 1))
        self.candidate = number not in cluster.setup.witnesses
        self.priority = cluster.world.rng.choice((0, 0, 0, 1))
        self.disk = Disk(number)
        self.visible = 0  # of FULL, on the primary: what was answered
        self.kept: dict[str, set[str]] = {FULL: set(), NORMAL: set()}
        self.disks = 0  # how often what was shown here has gone, and not into a branch
        self.lives = 0
        self.captures = False
        self.disk_full = False
        self.process: Process | None = None

    @property
    def node_id(self) -> int:
        return self.disk.node_id

    @property
    def logs(self) -> dict[str, list[Entry]]:
        return self.disk.logs

    @property
    def cluster_id(self) -> str:
        return self.disk.cluster_id

    @property
    def seen_epoch(self) -> int:
        return self.disk.seen_epoch

    # -- life

    def start(self) -> None:
        world, setup = self.cluster.world, self.cluster.setup
        self.process = world.process(self.hostname, self.rate)
        self.lives += 1
        self.captures = self.writes_paused = False
        self.epoch = 0
        self.until_s = 0.0
        self.following: Leader | None = None
        self._follower: asyncio.Task[None] | None = None
        self._sessions_made = 0
        self.heard: dict[int, Heard] = {}  # of this term: by replica
        self.gate: SyncGate | None = None
        self._gating: asyncio.Task[None] | None = None
        settings = Settings(
            ttl_s=TTL_S, candidate=self.candidate, priority=self.priority, maximum_lag=setup.maximum_lag,
            failsafe=setup.failsafe, sync=setup.sync,
        )  # fmt: skip
        engine = SimEngine(self.cluster.service, self.process, setup.doubles)
        self.leadership = Leadership(engine, self, settings, clock=self.process.loop.time)
        self.process.spawn(self.leadership.run())
        self.process.spawn(self._end_sessions())

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.alive

    @property
    def acts(self) -> bool:
        return self.process is not None and self.process.alive and not self.process.paused

    def clock(self) -> float:
        assert self.process is not None
        return self.process.loop.time()

    def kill(self) -> None:
        """kill -9. A commit of FULL that had no answer may be found by recovery, or not."""
        assert self.process is not None
        self.cluster.kills += 1
        self.process.kill()
        if self.captures and self.cluster.world.rng.random() < 0.5:
            self._cut_off(FULL, max(self.visible, self._sent()))
        self.captures = False

    def _sent(self) -> int:
        """What a replica may have of FULL: that is in the log on disk, too."""
        return len(self.logs[FULL]) if self.heard else self.visible

    def _cut_off(self, name: str, count: int) -> None:
        """What stands behind is gone: not a branch that had to be kept."""
        self.kept[name].update(value for _, value in self.logs[name][count:])
        del self.logs[name][count:]
        self.disk.durable[name] = min(count, self.disk.durable[name])

    def cut_power(self) -> None:
        self.kill()
        self._count_disk()
        for name in self.logs:
            self._cut_off(name, self.disk.durable[name])

    def _count_disk(self) -> None:
        self.disks += 1
        self.cluster.cuts += 1
        self.cluster.history.cuts.setdefault(self.hostname, []).append(self.cluster.world.now_s)

    def lose_machine(self) -> None:
        """The machine is lost with its disk; another one takes its place."""
        self.put(Disk(self.node_id + MACHINES))

    def put(self, disk: Disk) -> None:
        """Another disk than the one that was there."""
        self.kill()
        self._count_disk()
        for name in self.logs:
            self._cut_off(name, 0)
        self.disk = disk
        self.visible = 0

    # -- leadership.Node

    @property
    def is_fit(self) -> bool:
        return not self.disk_full

    def positions(self) -> Positions:
        return {name: (log[-1][0], len(log)) for name, log in self.logs.items() if log}

    async def promote(self, epoch: int, cluster_id: str) -> str:
        await self._stop_following()
        await self._takes_a_while()
        if self.disk_full:
            raise OSError("no space left on device")
        self.disk.cluster_id = cluster_id or self.cluster_id or CLUSTER
        self.heard = {}
        await self._close_gate()
        self._open_gate()
        self.epoch = self.disk.seen_epoch = max(self.seen_epoch, epoch)
        self.visible = len(self.logs[FULL])
        self.disk.durable[FULL] = self.visible
        self.writes_paused = False
        self.captures = True
        return self.cluster_id

    def was_forced(self, epoch: int, txid: int) -> None:
        """The operators of the simulation know."""

    def lead_until(self, until_s: float) -> None:
        self.until_s = until_s

    def holds(self) -> bool:
        return self.captures and self.clock() < self.until_s

    async def demote(self, reason: str) -> None:
        await self._close_gate()
        await self._takes_a_while()
        self.captures = False
        self.heard = {}

    def passed_on(self, successor: int) -> None:
        other = self.cluster.at(successor)
        if other.runs:
            assert other.process is not None
            self.cluster.world.send(self.hostname, other.process, other.leadership.nudge)

    async def follow(self, leader: Leader) -> None:
        if leader != self.following:
            await self._stop_following()
            self.following = leader
            assert self.process is not None
            self._follower = self.process.spawn(self._follow(leader))

    async def ask(self, member: Member, timeout_s: float) -> Positions:
        """By the URL, so that what has taken a machine's place answers for it."""
        other = self.cluster.at(member.node_id)
        return await self.question(other, other.positions, timeout_s)

    async def confirm(self, member: Member, epoch: int, timeout_s: float) -> str:
        other = self.cluster.at(member.node_id)
        return await self.question(other, lambda: other.confirms(self.node_id, epoch), timeout_s)

    async def has_promised(self, member: Member, timeout_s: float) -> bool:
        other = self.cluster.at(member.node_id)
        return await self.question(other, lambda: other.leadership.has_promised, timeout_s)

    def confirms(self, leader_id: int, epoch: int) -> str:
        if self.following is None or self.following.node_id != leader_id:
            return "it does not follow"
        return self.leadership.promise(leader_id, epoch)

    async def question(self, other: SimNode, question: Callable[[], T], timeout_s: float) -> T:
        if not other.runs:
            raise Unavailable(f"{other.hostname} refuses the connection")
        assert self.process is not None and other.process is not None
        try:
            return await self.cluster.world.ask(self.process, other.process, question, timeout_s)
        except TimeoutError:
            raise Unavailable(f"{other.hostname} does not answer") from None

    async def _takes_a_while(self) -> None:
        await asyncio.sleep(self.cluster.world.rng.choice((0.001, 0.01, 0.3)))

    # -- replication

    async def _stop_following(self) -> None:
        self.following = None
        follower, self._follower = self._follower, None
        if follower is not None:
            follower.cancel()
            await asyncio.gather(follower, return_exceptions=True)

    async def _follow(self, leader: Leader) -> None:
        primary = self.cluster.at(leader.node_id)
        self._sessions_made += 1
        session, serial = (self.lives, self._sessions_made), 0
        while True:
            await self._write_out()
            await asyncio.sleep(POLL_S)
            serial += 1
            heads = {name: (len(log), log[-1] if log else None) for name, log in self.logs.items()}
            question = partial(
                primary.feed, (self.node_id, session, serial), leader.epoch, self.seen_epoch, self.disk.durable, heads
            )
            with contextlib.suppress(Unavailable):
                answer = await self.question(primary, question, 1.0)
                if answer is not None and self.following == leader and leader.epoch >= self.seen_epoch:
                    self._apply(leader.epoch, *answer)

    async def _write_out(self) -> None:
        """fsync."""
        counts = {name: len(log) for name, log in self.logs.items()}
        if counts != self.disk.durable:
            await asyncio.sleep(self.cluster.fsync_s())
            self.disk.durable = {name: min(count, len(self.logs[name])) for name, count in counts.items()}

    def feed(
        self,
        sender: tuple[int, Session, int],
        epoch: int,
        seen_epoch: int,
        durable: Mapping[str, int],
        heads: Mapping[str, tuple[int, Entry | None]],
    ) -> tuple[str, dict[str, tuple[int, list[Entry]]]] | None:
        """On the primary: what follows the replica's position, by database; its first entries are dropped down to the
        number that comes with it. None: refused."""
        if self.captures and seen_epoch > self.epoch:
            self.leadership.supersede(f"epoch {seen_epoch} has begun")
        replica, session, serial = sender
        known = self.heard.get(replica)
        if not self.captures or epoch != self.epoch or seen_epoch > self.epoch:
            return None
        if known is not None and (session, serial) <= (known.session, known.serial):
            return None
        answer: dict[str, tuple[int, list[Entry]]] = {}
        held, strayed = {}, []
        for name, (count, last) in heads.items():
            log = self.logs[name]
            if count <= len(log) and (count == 0 or log[count - 1] == last):
                held[name] = min(count, durable[name])
                answer[name] = (count, log[count : count + 50])
            else:
                strayed.append(name)
                answer[name] = (0, list(log))
        self._heard(replica, Heard(session, serial, self.clock(), held), strayed)
        return self.cluster_id, answer

    def _apply(self, epoch: int, cluster_id: str, answer: Mapping[str, tuple[int, list[Entry]]]) -> None:
        if self.disk_full:
            return
        self.disk.seen_epoch = epoch
        self.disk.cluster_id = cluster_id
        for name, (keep, entries) in answer.items():
            log = self.logs[name]
            if keep == 0 and log:
                common = next((at for at, (one, two) in enumerate(zip(log, entries)) if one != two), None)  # noqa: B905
                common = min(len(log), len(entries)) if common is None else common
                if common < len(log):
                    self.cluster.saw(self, name)
                    self.kept[name] |= {value for _, value in log[common:]}
                    self.disk.durable[name] = min(common, self.disk.durable[name])
                log[:] = entries
            elif keep == len(log):
                log.extend(entries)

    # -- commits

    def append(self, name: str, value: str) -> int:
        """What SQLite writes; the length of the log with it."""
        self.logs[name].append((self.epoch, value))
        return len(self.logs[name])

    async def commit(self, number: int) -> float | None:
        """The hook at fsync: whether the first `number` entries of FULL may be shown, and if so the world's time when
        that was certain."""
        epoch, gate, world = self.epoch, self.gate, self.cluster.world
        if not self.holds():
            return None
        if gate is not None:
            assert self.process is not None
            answer: asyncio.Future[OSError | None] = self.process.loop.create_future()
            gate.wait(FULL, number, lambda error: answer.done() or answer.set_result(error))  # type: ignore[func-returns-value]
            if await answer is not None:
                return None
        if self.cluster.setup.slow_disks:
            await asyncio.sleep(self.cluster.fsync_s())
        if not self.holds() or self.epoch != epoch:
            return None
        at_s = world.now_s
        self.disk.durable[FULL] = max(self.disk.durable[FULL], number)
        if self.cluster.setup.gaps and not self.cluster.calm and world.rng.random() < 0.1:
            await self._is_stopped_here()
        self.visible = max(self.visible, number)
        return at_s

    async def _is_stopped_here(self) -> None:
        """SIGSTOP between the check and the answer."""
        process, world = self.process, self.cluster.world
        assert process is not None
        process.pause()
        world.after(world.rng.choice(STOPS_S), process.go_on)
        await asyncio.sleep(0)

    def _open_gate(self) -> None:
        setup = self.cluster.setup
        if not setup.sync:
            return
        leadership = self.leadership

        async def change(nodes: frozenset[int]) -> None:
            await leadership.change_state(lambda state: replace(state, in_sync=nodes))

        def heads() -> dict[str, int]:
            return {name: len(log) for name, log in self.logs.items() if log}

        def can_lead(node_id: int) -> bool:
            return self.cluster.at(node_id).candidate

        rules, written = SyncRules(setup.sync, Mode(setup.mode), setup.timeout_s), leadership.document.state.in_sync
        self.gate = SyncGate(rules, heads, change, written, can_lead=can_lead, clock=self.clock)
        assert self.process is not None
        self._gating = self.process.spawn(self.gate.run())

    async def _close_gate(self) -> None:
        gate, self.gate = self.gate, None
        if gate is not None and self._gating is not None:
            gate.close(Unavailable("this node is not the primary any more"))
            self._gating.cancel()
            await asyncio.gather(self._gating, return_exceptions=True)

    async def _end_sessions(self) -> None:
        while True:
            await asyncio.sleep(0.2)
            for replica, heard in list(self.heard.items()):
                if self.clock() - heard.at_s > STALE_S:
                    del self.heard[replica]
                    if self.gate is not None:
                        self.gate.left(replica)

    def _heard(self, replica: int, heard: Heard, strayed: list[str]) -> None:
        """What a session tells the gate."""
        gate, known = self.gate, self.heard.get(replica)
        if gate is not None:
            if known is None or known.session != heard.session:
                gate.left(replica)
                gate.joined(replica)
            for name in strayed:
                gate.strayed(replica, name)
            for name, count in heard.held.items():
                gate.holds(replica, name, count)
        self.heard[replica] = heard

    # -- what operators do, as `node_control` does it

    async def hand_over(self, successor: int) -> None:
        """A switchover."""
        if not self.leadership.leads or not self.cluster.at(successor).candidate:
            return
        self.writes_paused = True
        try:
            async with asyncio.timeout(2.0):
                while self._misses(successor):
                    await asyncio.sleep(0.02)
            await self.leadership.leave("handed over", successor)
        except (TimeoutError, LitefsError):
            pass
        finally:
            self.writes_paused = False

    def _misses(self, successor: int) -> bool:
        heard = self.heard.get(successor)
        return heard is None or any(heard.held.get(name, 0) < len(log) for name, log in self.logs.items())

    async def take_over(self, force: bool = False) -> None:
        """`litefs promote` here."""
        leadership, view = self.leadership, self.leadership.view
        leader = view.leader if view is not None else None
        if not self.candidate or leadership.leads:
            return
        others = leader is not None and leader.node_id != self.node_id
        with contextlib.suppress(LitefsError, TimeoutError):
            if leader is not None and others:
                primary = self.cluster.at(leader.node_id)
                await self.question(primary, lambda: primary.order(primary.hand_over(self.node_id)), 1.0)
            async with asyncio.timeout(TAKE_OVER_S):
                await (leadership.wait_in_office() if others else leadership.take(force=force))

    def order(self, work: object) -> asyncio.Task[None]:
        assert self.process is not None
        return self.process.spawn(work)  # type: ignore[arg-type]

    async def set_paused(self, paused: bool) -> None:
        with contextlib.suppress(LitefsError):
            await self.leadership.pause(paused)

    async def stop(self) -> None:
        """SIGTERM."""
        if self.leadership.leads and self.heard:
            await self.hand_over(self.cluster.world.rng.choice(sorted(self.heard)))
        await self.leadership.stop("the node is stopping")
        self.captures = False
        self.cluster.world.after(0.0, self.kill)

    async def watch_disk(self) -> None:
        """The primary's disk is full: another one takes over."""
        if self.leadership.leads and self.heard:
            await self.hand_over(self.cluster.world.rng.choice(sorted(self.heard)))

    # -- fresh reads

    def fresh_position(self, name: str) -> tuple[int, int] | None:
        """On the primary: the epoch and the number of its last entry. None: refused."""
        return self._position(name) if self.captures and self.leadership.leads else None

    def _position(self, name: str) -> tuple[int, int]:
        log = self.logs[name]
        return log[-1][0] if log else 0, len(log)

    async def fresh(self, name: str) -> tuple[str, ...] | None:
        """`litefs sync`, and a read after it; None: refused."""
        wanted: tuple[int, int] | None
        if self.captures:
            wanted = self.fresh_position(name)
        elif self.following is None:
            return None
        else:
            primary = self.cluster.at(self.following.node_id)
            try:
                wanted = await self.question(primary, lambda: primary.fresh_position(name), 1.0)
            except Unavailable:
                return None
        until_s = self.clock() + 3.0
        while wanted is not None and self.clock() < until_s:
            epoch, number = self._position(name)
            if epoch >= wanted[0] and number >= wanted[1]:
                return self.shown(name)
            await asyncio.sleep(0.05)
        return None

    def shown(self, name: str) -> tuple[str, ...]:
        """What a reader sees."""
        count = self.visible if name == FULL and self.captures else len(self.logs[name])
        return tuple(value for _, value in self.logs[name][:count])
