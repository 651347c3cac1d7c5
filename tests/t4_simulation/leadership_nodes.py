"""Nodes whose databases are lists, under the real leadership and commit gate, on an engine in memory, in a `World`.

A node has two logs of (epoch, value): FULL, whose commits wait for replicas if `sync` is set, and NORMAL, whose never
do. A commit of FULL goes through the daemon: it is answered if the fence holds before and after. One of NORMAL does
not: it succeeds while the node captures, also when the daemon is stopped or its lease has ended.

Replication is a replica that asks its primary for what follows its position, every POLL_S, and thereby acknowledges
that position. If the logs have parted it keeps its branch, and takes the primary's log.

A replica that asks for the first time, or with another process, joins the gate; one that was silent has left it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from worlds import Process, World

from harness.history import Copy, History, Outcome, Read, Role, Write
from pylitefs.cluster.candidate import Settings
from pylitefs.cluster.election import Positions
from pylitefs.cluster.leadership import Leadership
from pylitefs.cluster.lease_port import Leader, Member
from pylitefs.cluster.sync_gate import SyncGate, SyncRules
from pylitefs.errors import LitefsError, Unavailable
from pylitefs.lease.memory import MemoryEngine, MemoryService

FULL, NORMAL = "full", "normal"
CLUSTER = "LFSC0123456789ABCDEF"
TTL_S = 3.0
POLL_S = 0.05
WRITE_S = 0.12
READ_S = 0.4
STALE_S = 1.0  # a session without a word for so long has ended
ENGINE = "engine"

Entry = tuple[int, str]


class SimNode:
    """One node, over several lives of its process. Implements `cluster.leadership.Node`."""

    def __init__(self, cluster: SimCluster, number: int) -> None:
        self.cluster = cluster
        self.node_id = number
        self.hostname = f"n{number}"
        self.url = f"http://n{number}"
        self.rate = cluster.world.rng.uniform(1 - cluster.drift, 1 + cluster.drift)
        self.logs: dict[str, list[Entry]] = {FULL: [], NORMAL: []}
        self.visible = 0  # of FULL, on the primary: what was answered
        self.kept: dict[str, set[str]] = {FULL: set(), NORMAL: set()}
        self.machine = 0
        self.cluster_id = ""
        self.seen_epoch = 0
        self.captures = False
        self.process: Process | None = None

    # -- life

    def start(self) -> None:
        world = self.cluster.world
        self.process = world.process(self.hostname, self.rate)
        self.captures = self.writes_paused = False
        self.epoch = 0
        self.until_s = 0.0
        self.following: Leader | None = None
        self._follower: asyncio.Task[None] | None = None
        self.acked: dict[int, dict[str, int]] = {}  # of this term: by replica
        self.sessions: dict[int, tuple[Process | None, float]] = {}  # whose, and when it was heard of
        self.gate: SyncGate | None = None
        self._gating: asyncio.Task[None] | None = None
        self.engine = SimEngine(self)
        settings = Settings(ttl_s=TTL_S, sync=self.cluster.sync, failsafe=self.cluster.failsafe)
        self.leadership = Leadership(self.engine, self, settings, clock=self.clock)
        self.process.spawn(self.leadership.run())
        self.process.spawn(self._end_sessions())

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.alive

    def clock(self) -> float:
        assert self.process is not None
        return self.process.loop.time()

    def kill(self) -> None:
        """kill -9. A commit of FULL that had no answer may be found by recovery, or not."""
        assert self.process is not None
        self.process.kill()
        if self.captures and self.cluster.world.rng.random() < 0.5:
            del self.logs[FULL][max(self.visible, self._sent()) :]
        self.captures = False

    def _sent(self) -> int:
        """What a replica may have of FULL: that is in the log on disk, too."""
        return len(self.logs[FULL]) if self.acked else self.visible

    def wipe(self) -> None:
        """The machine is lost; another one takes its place."""
        self.kill()
        self.machine += 1
        for name, log in self.logs.items():
            self.kept[name] |= {value for _, value in log}  # gone with it: not a branch that had to be kept
        self.logs = {FULL: [], NORMAL: []}
        self.visible = self.seen_epoch = 0
        self.cluster_id = ""

    # -- leadership.Node

    @property
    def is_fit(self) -> bool:
        return True

    def positions(self) -> Positions:
        return {name: (log[-1][0], len(log)) for name, log in self.logs.items() if log}

    async def promote(self, epoch: int, cluster_id: str) -> str:
        await self._stop_following()
        await self._takes_a_while()
        self.cluster_id = cluster_id or self.cluster_id or CLUSTER
        self.acked, self.sessions = {}, {}
        await self._close_gate()
        self._open_gate()
        self.epoch = self.seen_epoch = max(self.seen_epoch, epoch)
        self.visible = len(self.logs[FULL])
        self.writes_paused = False
        self.captures = True
        return self.cluster_id

    def was_forced(self, epoch: int, txid: int) -> None:
        raise AssertionError("nobody asked for that")

    def lead_until(self, until_s: float) -> None:
        self.until_s = until_s

    def holds(self) -> bool:
        return self.captures and self.clock() < self.until_s

    async def demote(self, reason: str) -> None:
        await self._close_gate()
        await self._takes_a_while()
        self.captures = False
        self.acked, self.sessions = {}, {}

    def passed_on(self, successor: int) -> None:
        other = self.cluster.nodes[successor]
        if other.runs:
            assert self.process is not None and other.process is not None
            self.cluster.world.send(self.hostname, other.process, other.leadership.nudge)

    async def follow(self, leader: Leader) -> None:
        if leader != self.following:
            await self._stop_following()
            self.following = leader
            assert self.process is not None
            self._follower = self.process.spawn(self._follow(leader))

    async def ask(self, member: Member, timeout_s: float) -> Positions:
        other = self.cluster.nodes[member.node_id]
        return await self._ask(other, other.positions, timeout_s)

    async def confirm(self, member: Member, epoch: int, timeout_s: float) -> str:
        other = self.cluster.nodes[member.node_id]
        return await self._ask(other, lambda: other.leadership.promise(self.node_id, epoch), timeout_s)

    async def _ask(self, other: SimNode, question, timeout_s: float):  # type: ignore[no-untyped-def]
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
        primary = self.cluster.nodes[leader.node_id]
        while True:
            await asyncio.sleep(POLL_S)
            heads = {name: (len(log), log[-1] if log else None) for name, log in self.logs.items()}
            question = partial(primary.feed, self.node_id, leader.epoch, self.seen_epoch, heads)
            with contextlib.suppress(Unavailable):
                answer = await self._ask(primary, question, 1.0)
                if answer is not None and self.following == leader and leader.epoch >= self.seen_epoch:
                    self._apply(leader.epoch, *answer)

    def feed(
        self, replica: int, epoch: int, seen_epoch: int, heads: Mapping[str, tuple[int, Entry | None]]
    ) -> tuple[str, dict[str, tuple[int, list[Entry]]]] | None:
        """On the primary: what follows the replica's position, by database; its first entries are dropped down to the
        number that comes with it. None: refused."""
        if not self.captures or epoch != self.epoch or seen_epoch > self.epoch:
            return None
        answer: dict[str, tuple[int, list[Entry]]] = {}
        held, strayed = {}, []
        for name, (count, last) in heads.items():
            log = self.logs[name]
            if count <= len(log) and (count == 0 or log[count - 1] == last):
                held[name] = count
                answer[name] = (count, log[count : count + 50])
            else:
                strayed.append(name)
                answer[name] = (0, list(log))
        self._heard(replica, held, strayed)
        return self.cluster_id, answer

    def _apply(self, epoch: int, cluster_id: str, answer: Mapping[str, tuple[int, list[Entry]]]) -> None:
        self.seen_epoch = epoch
        self.cluster_id = cluster_id
        for name, (keep, entries) in answer.items():
            log = self.logs[name]
            if keep == 0 and log:
                common = next((at for at, (one, two) in enumerate(zip(log, entries)) if one != two), None)  # noqa: B905
                common = min(len(log), len(entries)) if common is None else common
                self.kept[name] |= {value for _, value in log[common:]}
                log[:] = entries
            elif keep == len(log):
                log.extend(entries)

    # -- commits

    def append(self, name: str, value: str) -> int:
        """What SQLite writes; the length of the log with it."""
        self.logs[name].append((self.epoch, value))
        return len(self.logs[name])

    async def commit(self, number: int) -> bool:
        """The hook at fsync: whether the first `number` entries of FULL may be shown."""
        epoch, gate = self.epoch, self.gate
        if not self.holds():
            return False
        if gate is not None:
            assert self.process is not None
            answer: asyncio.Future[OSError | None] = self.process.loop.create_future()
            gate.wait(FULL, number, lambda error: answer.done() or answer.set_result(error))  # type: ignore[func-returns-value]
            if await answer is not None:
                return False
        if not self.holds() or self.epoch != epoch:
            return False
        self.visible = max(self.visible, number)
        return True

    def _open_gate(self) -> None:
        if not self.cluster.sync:
            return
        leadership = self.leadership

        async def change(nodes: frozenset[int]) -> None:
            await leadership.change_state(lambda state: replace(state, in_sync=nodes))

        def heads() -> dict[str, int]:
            return {name: len(log) for name, log in self.logs.items() if log}

        rules = SyncRules(self.cluster.sync)
        self.gate = SyncGate(rules, heads, change, leadership.document.state.in_sync, clock=self.clock)
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
            for replica, (_, heard_s) in list(self.sessions.items()):
                if self.clock() - heard_s > STALE_S:
                    del self.sessions[replica]
                    self.acked.pop(replica, None)
                    if self.gate is not None:
                        self.gate.left(replica)

    def _heard(self, replica: int, held: dict[str, int], strayed: list[str]) -> None:
        """What a session tells the gate."""
        process = self.cluster.nodes[replica].process
        gate, known = self.gate, self.sessions.get(replica)
        if gate is not None:
            if known is None or known[0] is not process:
                gate.left(replica)
                gate.joined(replica)
            for name in strayed:
                gate.strayed(replica, name)
            for name, count in held.items():
                gate.holds(replica, name, count)
        self.acked[replica] = held
        self.sessions[replica] = (process, self.clock())

    async def hand_over(self, successor: int) -> None:
        """A switchover, as `node_control` makes it."""
        if not self.leadership.leads:
            return
        self.writes_paused = True
        try:
            async with asyncio.timeout(2.0):
                while any(self.acked.get(successor, {}).get(name, 0) < len(log) for name, log in self.logs.items()):
                    await asyncio.sleep(0.02)
            listed = self.leadership.document.state.in_sync
            if listed is None or successor in listed:
                await self.leadership.leave("handed over", successor)
        except (TimeoutError, LitefsError):
            pass
        finally:
            self.writes_paused = False


class SimEngine(MemoryEngine):
    """What a node has of the engine: its way there can be cut in either direction."""

    def __init__(self, node: SimNode) -> None:
        self._node = node
        world = node.cluster.world
        super().__init__(node.cluster.service, timeout_s=0.75, clock=node.clock)
        self.slow_s = lambda: world.latency_s * world.rng.uniform(0.2, 3.0)
        self._there = True

    async def _way(self) -> None:
        name = self._node.hostname
        sender, receiver = (name, ENGINE) if self._there else (ENGINE, name)
        self.cut = not self._node.cluster.world.passes(sender, receiver)
        self._there = not self._there
        try:
            await super()._way()
        except BaseException:
            self._there = True
            raise


class SimCluster:
    """`count` nodes, clients on each, and what they see."""

    def __init__(self, world: World, count: int, *, sync: int = 0, failsafe: bool = False, drift: float = 0.02) -> None:
        self.world, self.sync, self.failsafe, self.drift = world, sync, failsafe, drift
        self.service = MemoryService(clock=lambda: world.now_s)
        self.history = History()
        self.clients = world.process("clients")
        self.nodes = {number: SimNode(self, number) for number in range(1, count + 1)}
        self._count = 0

    def start(self) -> None:
        for node in self.nodes.values():
            node.start()
            for name in (FULL, NORMAL):
                self.clients.spawn(self._write(node, name))
            self.clients.spawn(self._read(node))
        self.writing = True

    async def _write(self, node: SimNode, name: str) -> None:
        rng = self.world.rng
        while True:
            await asyncio.sleep(WRITE_S * rng.uniform(0.3, 1.7))
            if self.writing and node.captures and not node.writes_paused:
                await self._commit(node, name)

    async def _commit(self, node: SimNode, name: str) -> None:
        self._count += 1
        value, start_s = f"{node.hostname}.{name}.{self._count}.", self.world.now_s
        number, epoch = node.append(name, value), node.epoch
        at = len(self.history.writes)
        self.history.writes.append(Write(value, node.hostname, name, start_s, None, "unknown"))
        if name == FULL and not await self._answer(node, number):
            return
        self.history.writes[at] = Write(value, node.hostname, name, start_s, self.world.now_s, "ok")
        if name == FULL:  # it is certain in which epoch
            for at_s in (start_s, self.world.now_s):
                self.history.roles.append(Role(node.hostname, at_s, at_s, True, epoch))

    async def _answer(self, node: SimNode, number: int) -> bool:
        """A process that waits for its fsync: until the daemon answers, or is killed. Whether it was told yes."""
        process = node.process
        assert process is not None
        answer: asyncio.Future[bool] = self.clients.loop.create_future()

        async def hook() -> None:
            found = await node.commit(number)
            if not answer.done():
                answer.set_result(found)

        process.loop.call_soon(lambda: process.spawn(hook()))
        while not answer.done():
            if not process.alive:
                return False
            await asyncio.wait({answer}, timeout=0.1)
        return answer.result()

    async def _read(self, node: SimNode) -> None:
        while True:
            await asyncio.sleep(READ_S * self.world.rng.uniform(0.3, 1.7))
            for name, log in node.logs.items():
                count = node.visible if name == FULL and node.captures else len(log)
                at_s = self.world.now_s
                values = tuple(value for _, value in log[:count])
                reader = f"{node.hostname}.{node.machine}.{name}"
                self.history.reads.append(Read(reader, node.hostname, name, at_s, at_s, values))

    # -- the end

    def leader(self) -> SimNode | None:
        found = [node for node in self.nodes.values() if node.runs and node.holds()]
        return found[0] if len(found) == 1 else None

    def settled(self) -> bool:
        leader = self.leader()
        return leader is not None and all(node.logs == leader.logs for node in self.nodes.values())

    def outcome(self) -> Outcome:
        leader = self.leader()
        assert leader is not None
        copies = {}
        for node in self.nodes.values():
            copies[node.hostname] = {
                name: Copy(str(len(log)), str(hash(tuple(log))), "ok", tuple(value for _, value in log))
                for name, log in node.logs.items()
            }
        lost = {name: frozenset().union(*(node.kept[name] for node in self.nodes.values())) for name in (FULL, NORMAL)}
        return Outcome(leader.hostname, copies, lost, frozenset({FULL} if self.sync else ()), frozenset({FULL}))
