"""The primary's end of replication: a session for each replica that is connected, and the register of them all."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from pylitefs.cluster.channel import Channel, TaskSet, Timings, unexpected
from pylitefs.cluster.feed import Feed
from pylitefs.cluster.healing import ANSWER_S, Healing
from pylitefs.cluster.moves import Place
from pylitefs.cluster.outlet import NO_PAGES_SIZE, send
from pylitefs.cluster.ports import Database, Link, LinkClosed, Store, Tombstone
from pylitefs.cluster.recovery_wait import RecoveryOutcome, RecoveryWait
from pylitefs.cluster.roles import NodeIdentity, Refused, StaleEpoch, admit
from pylitefs.cluster.sync_gate import SyncGate
from pylitefs.cluster.tasks import finished
from pylitefs.errors import LitefsError
from pylitefs.events import Event
from pylitefs.formats.ltx.format import Position
from pylitefs.formats.names import is_database_name
from pylitefs.formats.stream import (
    PROTOCOL_VERSION,
    Ack,
    AskDurable,
    Checksums,
    Databases,
    Heartbeat,
    Hello,
    Ltx,
    LtxBegin,
    LtxData,
    LtxEnd,
    Message,
    Progress,
    Ready,
    Resync,
    Sender,
    SnapshotBegin,
    SnapshotEnd,
    TailEnd,
    Welcome,
    batches,
)
from pylitefs.formats.stream_fields import ErrorCode
from pylitefs.formats.stream_pages import AskPages, Pages
from pylitefs.status import ReplicaInfo, ReplicaProgress

__all__ = ["RecoveryOutcome", "RecoveryWait", "ReplicaSession", "Replicas"]

log = logging.getLogger("litefs.replication")

MAX_REPLICAS = 64
MAX_CONNECTIONS = 2 * MAX_REPLICAS  # those included that have not said who they are
MAX_DATABASES = 1_000_000  # that a replica may say it has, those included that were dropped
FORGET_BEATS = 60  # heartbeats from one look for feeds that are not needed any more to the next
SNAPSHOTS_AT_ONCE = 2  # for one replica; others of its databases wait for a slot
THREADS = 4

T = TypeVar("T")


class Replicas:
    """The replicas of this node. Everything runs on one asyncio loop, `infos` and `progress` from any thread.

    Use it as an async context manager, one for each term of office; leaving it closes every session in good order, so
    that the replicas look for the new primary at once. `epoch` is the lease's: a replica that has seen a later one is
    refused, and `on_newer_epoch` is told, on the loop. `recovery` is given when the node may have lost transactions.
    """

    def __init__(
        self,
        store: Store,
        node: NodeIdentity,
        *,
        epoch: int = 1,
        recovery: RecoveryWait | None = None,
        timings: Timings | None = None,
        snapshot_timeout_s: float = 0.0,
        on_newer_epoch: Callable[[int], None] = lambda epoch: None,
    ) -> None:
        self.store = store
        self.node = node
        self._epoch = epoch
        self.on_newer_epoch = on_newer_epoch
        self.recovery = recovery
        self.timings = timings or Timings()
        self.snapshot_timeout_s = snapshot_timeout_s
        self.sessions: dict[int, ReplicaSession] = {}
        self.gate: SyncGate | None = None  # synchronous replication; set before any replica connects
        self.farewell = f"the primary {node} stops"  # what is told when this is left in good order
        self._serving: set[asyncio.Task[None]] = set()
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="replication")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._unsubscribe: Callable[[], None] = lambda: None
        self._moved: deque[str] = deque()  # names of databases with a new transaction; filled from any thread
        self._wake_pending = False
        self._closing = False
        self._healing = Healing(store, lambda: self.sessions.values(), self.blocking)

    @property
    def epoch(self) -> int:
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        """A later epoch has begun: what belongs to the one before ends. On the loop."""
        before, self._epoch = self._epoch, max(epoch, self._epoch)
        if self._epoch > before:
            for session in list(self.sessions.values()):
                session.stop(StaleEpoch(before, self._epoch))

    async def __aenter__(self) -> Replicas:
        self._loop = asyncio.get_running_loop()
        self._unsubscribe = self.store.events.subscribe(self._on_event)
        self.store.forgetting.needs_drop = self._needs_newest
        self._healing.begin()
        return self

    async def __aexit__(self, *error: object) -> None:
        self._closing = True
        self._unsubscribe()
        self.store.forgetting.needs_drop = lambda name: False
        serving = list(self._serving)
        for task in serving:
            task.cancel()
        try:
            await self._healing.close()
            await asyncio.gather(*serving, return_exceptions=True)
        finally:
            self._executor.shutdown(wait=False, cancel_futures=True)

    async def serve(self, link: Link) -> None:
        """Run one replica's session to its end. Only cancellation comes out."""
        if len(self._serving) >= MAX_CONNECTIONS:
            busy = Refused(ErrorCode.BUSY, f"the primary has {MAX_CONNECTIONS} connections already")
            await Channel(link, Sender.REPLICA).close(busy, self.timings.close_s)
            return
        task = asyncio.ensure_future(ReplicaSession(self, link).run())
        self._serving.add(task)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            if not self._closing:
                raise
        finally:
            self._serving.discard(task)

    async def blocking(self, call: Callable[..., T], /, *args: Any) -> T:
        """Run a call that blocks in a thread of its own."""
        assert self._loop is not None
        return await self._loop.run_in_executor(self._executor, call, *args)

    # --- what others ask --------------------------------------------------------------------------------------------

    def infos(self) -> list[ReplicaInfo]:
        """The replicas that are connected now, for status and metrics (a `status.Replicas`)."""
        now_ms = int(time.time() * 1000)
        return [session.info(now_ms) for session in list(self.sessions.values())]

    def progress(self, name: str) -> dict[int, ReplicaProgress]:
        """How far each connected replica is with one database, by node id; those that do not copy it are left out."""
        return {
            node_id: feed.standing
            for node_id, session in list(self.sessions.items())
            if (feed := session.feeds.get(name)) is not None
        }

    async def recall(self, name: str) -> Database | None:
        """A database that was dropped long ago is needed again: for all, since each is asked how far it is with it."""
        database = await self.blocking(self.store.recall, name)
        for session in list(self.sessions.values()):
            session.poke(name)
        return database

    def _needs_newest(self, name: str) -> bool:
        """Whether a connected replica does not hold the newest transaction of a database durably. Any thread."""
        database = self.store.get(name)
        txid = database.log.head.txid if database is not None else 0
        return any(progress.durable < txid for progress in self.progress(name).values())

    # --- sessions ---------------------------------------------------------------------------------------------------

    def add(self, session: ReplicaSession) -> None:
        """Refused if there are too many. A session of the same node that is still there is half-open: it is closed."""
        old = self.sessions.get(session.replica_id)
        if old is not None:
            old.stop(Refused(ErrorCode.REPLACED, "the same node has connected again, or a copy of it"))
        elif len(self.sessions) >= MAX_REPLICAS:
            raise Refused(ErrorCode.BUSY, f"the primary has {MAX_REPLICAS} replicas already")
        self.sessions[session.replica_id] = session
        if self.gate is not None:
            self.gate.left(session.replica_id)
            if session.copies_all:
                self.gate.joined(session.replica_id)
        if self.recovery is not None:
            self.recovery.connected(session)
        self._healing.connected()
        self._emit("replicaConnected", session)

    def remove(self, session: ReplicaSession, reason: str) -> None:
        if self.sessions.get(session.replica_id) is session:
            del self.sessions[session.replica_id]
            if self.gate is not None:
                self.gate.left(session.replica_id)
        if self.recovery is not None:
            self.recovery.disconnected(session)
        self._emit("replicaLost", session, reason=reason)

    def _emit(self, kind: str, session: ReplicaSession, **data: object) -> None:
        who = {"node_id": f"{session.replica_id:016X}", "hostname": session.hostname, "address": session.address}
        self.store.events.emit(Event(kind, None, {**who, **data}))

    def _on_event(self, event: Event) -> None:
        """In the emitting thread: a new transaction wakes the loop, once for however many come before it looks."""
        told = {"damaged": self._damaged, "recovered": self._recovered}.get(event.type)
        if told is not None and event.database is not None and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                self._loop.call_soon_threadsafe(told, event.database)
        if event.type != "tx" or event.database is None or self._loop is None:
            return
        self._moved.append(event.database)
        if not self._wake_pending:
            self._wake_pending = True
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                self._loop.call_soon_threadsafe(self._wake)

    def _damaged(self, name: str) -> None:
        if not self._closing:
            self._healing.heal(name)

    def _recovered(self, name: str) -> None:
        """It was set aside, and is not any more: who waits for it has heard of nothing else."""
        if self.gate is not None:
            self.gate.released(name)
        for session in list(self.sessions.values()):
            session.poke(name)

    def _wake(self) -> None:
        self._wake_pending = False  # before looking: an append after this schedules another wake
        names = set()
        while self._moved:
            names.add(self._moved.popleft())
        for session in list(self.sessions.values()):
            for name in names:
                session.poke(name)


class ReplicaSession:
    """One replica, from its HELLO to the end of the connection. An `Outlet` for its feeds."""

    def __init__(self, replicas: Replicas, link: Link) -> None:
        self.replica_id = 0
        self.hostname = ""
        self.epoch = replicas.epoch  # what is said here belongs to it
        self.connected_ms = int(time.time() * 1000)
        self.feeds: dict[str, Feed] = {}
        self.store = replicas.store
        self.recovery = replicas.recovery
        self.snapshot_timeout_s = replicas.snapshot_timeout_s
        self.snapshot_slots = asyncio.Semaphore(SNAPSHOTS_AT_ONCE)
        self._replicas = replicas
        self._timings = replicas.timings
        self._channel = Channel(link, Sender.REPLICA)
        self._tasks = TaskSet()
        self._wanted: frozenset[str] = frozenset()  # empty: all
        self._unexamined: set[str] = set()
        self._behind: set[str] = set()  # of the first pass
        self._ready = False
        self._announced: dict[str, tuple[Position, int]] = {}  # by the heartbeats so far; with the epoch
        self._moved: set[str] = set()
        self._asked: dict[int, asyncio.Future[list[tuple[int, bytes]]]] = {}  # requests for pages
        self._requests = 0
        self._dropped: dict[str, Position] = {}  # where the replica is with names that need no feed,
        self._acks: dict[str, Progress] = {}  # and what it has acknowledged of them
        self._telling = ""  # a name of which the replica is being told that it was dropped
        self._held_back: dict[str, set[Feed]] = {}  # feeds that wait for what the replica holds of another database
        self._asked_durable: dict[str, int] = {}  # up to which TXID it was asked to make that durable at once

    @property
    def address(self) -> str:
        return self._channel.address

    @property
    def copies_all(self) -> bool:
        return not self._wanted

    async def run(self) -> None:
        """To the end; every error ends here, and is told to the replica, the log and the events."""
        error: BaseException | None = None
        known = False
        try:
            positions = await self._handshake()
            await self._recall(positions)
            self._replicas.add(self)
            known = True
            self._begin(positions)
            await self._tasks.wait()
        except asyncio.CancelledError as cancelled:
            error = cancelled
        except Exception as failure:
            error = failure
        reason = self._replicas.farewell if isinstance(error, asyncio.CancelledError) else _reason(error)
        if isinstance(error, Exception) and not isinstance(error, LitefsError):
            log.error("a defect: replica %s: %s", self.address, reason, exc_info=error)
        elif not known:  # else `replicaLost` says it
            log.info("replica %s not let in: %s", f"{self.hostname} {self.address}".strip(), reason)
        if isinstance(error, StaleEpoch) and error.seen > self._replicas.epoch:
            self._replicas.on_newer_epoch(error.seen)
        if known:  # before anything that waits, and could be cancelled
            self._replicas.remove(self, reason)
        await finished(self._close(error))
        if isinstance(error, asyncio.CancelledError):
            raise error

    async def _close(self, error: BaseException | None) -> None:
        await self._tasks.close()
        await self._channel.close(error, self._timings.close_s, self._replicas.farewell)

    def stop(self, error: Refused) -> None:
        self._tasks.fail(error)

    def info(self, now_ms: int) -> ReplicaInfo:
        feeds = list(self.feeds.items())
        lags = [feed.lag_ms(self._head(name).txid, now_ms) for name, feed in feeds]
        states = {feed.state for _, feed in feeds} - {"live"}
        return ReplicaInfo(
            node_id=f"{self.replica_id:016X}",
            address=self.address,
            state=min(states, default="live" if self._ready else "connecting"),
            lag_ms=max(lags, default=0),
            hostname=self.hostname,
            databases={name: feed.standing for name, feed in feeds},
        )

    # --- for the feeds ----------------------------------------------------------------------------------------------

    async def send(self, message: Message) -> None:
        await self._channel.send(message)

    async def blocking(self, call: Callable[..., T], /, *args: Any) -> T:
        return await self._replicas.blocking(call, *args)

    async def database(self, name: str) -> Database | None:
        if (database := self.store.get(name)) is not None or self.store.tombstone(name) is None:
            return database
        return await self._replicas.recall(name)

    def start(self, coroutine: Coroutine[Any, Any, None]) -> bool:
        return self._tasks.start(coroutine)

    def poke(self, name: str) -> None:
        """This database has changed."""
        if self._wanted and name not in self._wanted:
            return
        if name == self._telling:  # it is looked at when that is done
            return
        feed = self.feeds.get(name)
        if feed is None:
            if not is_database_name(name):
                return
            feed = self.feeds[name] = Feed(self, name, self._dropped.pop(name, Position(0, 0)))
            if (progress := self._acks.pop(name, None)) is not None:
                feed.acknowledged(progress)
        self._moved.add(name)
        feed.poke()

    def examined(self, name: str) -> None:
        self._unexamined.discard(name)
        if not self._unexamined and self.recovery is not None:
            self.recovery.examined(self)

    def caught_up(self, name: str) -> None:
        self._behind.discard(name)
        if not self._behind and not self._ready:
            self._ready = True
            self._tasks.start(self._channel.send(Ready()))

    @property
    def _gate(self) -> SyncGate | None:
        """What the replica's acknowledgements are for; a copy of some databases only does not count."""
        return None if self._wanted else self._replicas.gate

    def copies(self, name: str) -> bool:
        return is_database_name(name) and (not self._wanted or name in self._wanted)

    def lacks(self, place: Place, feed: Feed) -> bool:
        name = place.name
        if name not in self.feeds:  # the event that tells of it is under way
            self.poke(name)
        if (other := self.feeds.get(name)) is not None:
            passed = place.last is not None and other.sent.txid > place.last
            if other.standing.durable >= place.first and not passed:
                return False
            if self._asked_durable.get(name, 0) < place.first <= other.sent.txid:  # else when it is sent
                self._asked_durable[name] = place.first
                self._tasks.start(self._channel.send(AskDurable(name, place.first)))
        self._held_back.setdefault(name, set()).add(feed)
        return True

    def ask_durable(self, heads: Mapping[str, Position]) -> None:
        """Somebody waits until the replica has these; what it has applied already is left out."""
        for name, feed in list(self.feeds.items()):
            if name in heads and feed.standing.applied < heads[name].txid:
                self._tasks.start(self._channel.send(AskDurable(name, heads[name].txid)))

    def holds(self, name: str, txid: int) -> None:
        for feed in self._held_back.pop(name, ()):
            feed.poke()
        if (gate := self._gate) is not None and self._replicas.sessions.get(self.replica_id) is self:
            gate.holds(self.replica_id, name, txid)

    def strayed(self, name: str) -> None:
        if (gate := self._gate) is not None and self._replicas.sessions.get(self.replica_id) is self:
            gate.strayed(self.replica_id, name)

    async def ask_pages(self, name: str, pgnos: Sequence[int]) -> list[tuple[int, bytes]]:
        """For `Healing`. LitefsError, TimeoutError."""
        self._requests += 1
        request = self._requests
        answer = self._asked[request] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(ANSWER_S):
                await self._channel.send(AskPages(name, request, tuple(pgnos)))
                pages: list[tuple[int, bytes]] = await answer
                return pages
        finally:
            del self._asked[request]

    # --- the session ------------------------------------------------------------------------------------------------

    async def _handshake(self) -> dict[str, Position]:
        """The replica's positions. Refused."""
        timings = self._timings
        try:
            async with asyncio.timeout(timings.handshake_s):
                hello = await self._channel.expect(Hello, timings.handshake_s)
                positions: dict[str, Position] = {}
                last = hello.protocol != PROTOCOL_VERSION
                while not last:
                    part = await self._channel.expect(Databases, timings.handshake_s)
                    positions.update(part.positions)
                    last = part.last
                    if len(positions) > MAX_DATABASES or not (part.positions or last):
                        raise Refused(ErrorCode.PROTOCOL, "too many databases, or an empty list of them")
                self.replica_id, self.hostname = hello.node_id, hello.hostname
                self._admit(hello, positions)
                self._wanted = frozenset(hello.databases_wanted)
                node = self._replicas.node
                await self._channel.send(
                    Welcome(
                        PROTOCOL_VERSION,
                        self.store.cluster_id or "",
                        node.node_id,
                        node.hostname,
                        self.epoch,
                        self._gate is not None and self._gate.active,
                    )
                )
        except TimeoutError:
            raise Refused(ErrorCode.TOO_SLOW, f"no handshake within {timings.handshake_s:g} s") from None
        return positions

    def _admit(self, hello: Hello, positions: dict[str, Position]) -> None:
        cluster_id = self.store.cluster_id
        if not self.store.is_primary or not cluster_id:
            raise Refused(ErrorCode.NOT_PRIMARY, "this node is not the primary: correct lease.advertise-url")
        has_data = any(position.txid for position in positions.values())
        admit(hello, has_data, self._replicas.node, cluster_id, self.epoch)
        self._check_epoch(max((position.epoch for position in positions.values()), default=0))

    def _check_epoch(self, seen: int = 0) -> None:
        """StaleEpoch if a later epoch than the session's is known to have begun."""
        if (latest := max(seen, self._replicas.epoch)) > self.epoch:
            raise StaleEpoch(self.epoch, latest)

    def _begin(self, positions: dict[str, Position]) -> None:
        """Start to serve: a feed for every database that either side has. Of those that were dropped so long ago that
        only a tombstone is left most need none: the replica has the drop, or has nothing and is told in short."""
        here = set(self.store.all_names())
        gone = {name: tombstone for name, tombstone in self.store.tombstones().items() if name not in here}
        for name in {*here, *positions}:
            theirs = positions.get(name, Position(0, 0))
            if name in gone and theirs.is_at(gone[name].position):
                self._dropped[name] = theirs
            elif is_database_name(name) and (not self._wanted or name in self._wanted):
                self.feeds[name] = Feed(self, name, theirs)
        untold = {name: tombstone for name, tombstone in gone.items() if name not in positions}
        self._tasks.start(self._tell_dropped(untold))
        self._unexamined = set(self.feeds)
        self._behind = set(self.feeds)
        self._moved = set(self.feeds)
        self._tasks.start(self._receive())
        self._tasks.start(self._heartbeat())
        if not self.feeds:
            self.examined("")
            self.caught_up("")
        for feed in list(self.feeds.values()):
            feed.poke()

    async def _recall(self, positions: dict[str, Position]) -> None:
        """Where the replica has something else than a database that was dropped long ago, that one is needed again: to
        be sent, and to be counted among what the replica lacks."""
        for name, tombstone in self.store.tombstones().items():
            if name in positions and not positions[name].is_at(tombstone.position):
                await self.database(name)

    async def _tell_dropped(self, gone: dict[str, Tombstone]) -> None:
        """The replica has nothing of these: an empty snapshot each, which it only takes note of."""
        for name, tombstone in gone.items():
            if name in self.feeds or not is_database_name(name) or (self._wanted and name not in self._wanted):
                continue
            self._telling = name
            await send(self, SnapshotBegin(name, 0, NO_PAGES_SIZE, tombstone.position))
            await send(self, SnapshotEnd(name, tombstone.position, 0, tombstone.epochs))
            self._telling = ""
            self._dropped[name] = tombstone.position
            if self.store.get(name) is not None:
                self.poke(name)

    def _forget_feeds(self) -> None:
        """Those of databases that were dropped long ago, where the replica has that."""
        for name, feed in list(self.feeds.items()):
            if self.store.get(name) is None and feed.rests:
                self._dropped[name], self._acks[name] = feed.sent, feed.progress
                del self.feeds[name]
                self._announced.pop(name, None)

    async def _heartbeat(self) -> None:
        for beat in itertools.count(1):
            if beat % FORGET_BEATS == 0:
                self._forget_feeds()
            moved, self._moved = self._moved, set()
            heads = {name: self._head(name) for name in moved}
            changed = [(name, head) for name, head in heads.items() if self._announced.get(name) != (head, head.epoch)]
            self._announced |= {name: (head, head.epoch) for name, head in changed}
            for part in batches(sorted(changed, key=lambda item: item[0])):
                await self._channel.send(Heartbeat(int(time.time() * 1000), part))
            await asyncio.sleep(self._timings.heartbeat_s)

    def _head(self, name: str) -> Position:
        database = self.store.get(name)
        return database.log.head if database is not None else Position(0, 0)

    async def _receive(self) -> None:
        deadline_s = self._timings.deadline_s
        while True:
            message, _ = await self._channel.receive(deadline_s)
            await self._handle(message)

    async def _handle(self, message: Message) -> None:
        self._check_epoch()
        match message:
            case Ack(entries):
                for progress in entries:
                    if (feed := self.feeds.get(progress.name)) is not None:
                        feed.acknowledged(progress)
                    elif progress.name in self._dropped or progress.name == self._telling:
                        self._acks[progress.name] = progress
            case Heartbeat():
                pass  # that it came is what counts
            case Pages():
                if message.request > self._requests:
                    raise Refused(ErrorCode.PROTOCOL, "pages that nobody has asked for")
                pages = message.pages()
                if (asked := self._asked.get(message.request)) is not None and not asked.done():
                    asked.set_result(pages)
            case Resync(name):
                self._check_epoch(message.position.epoch)
                self._feed(name).resync(message)
            case Checksums(name):
                self._feed(name).checksums(message)
            case Ltx(name) | LtxBegin(name) | LtxData(name) | LtxEnd(name) | TailEnd(name):
                await self._feed(name).tail(message)
            case _:
                raise unexpected(message)

    def _feed(self, name: str) -> Feed:
        if name in self._dropped:
            self.poke(name)
        feed = self.feeds.get(name)
        if feed is None:
            raise Refused(ErrorCode.PROTOCOL, f'the database "{name[:80]}" is not part of this session')
        return feed


def _reason(error: BaseException | None) -> str:
    if isinstance(error, (LinkClosed, Refused)):
        return str(error)
    return f"{type(error).__name__}: {error}"
