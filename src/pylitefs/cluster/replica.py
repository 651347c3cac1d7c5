"""The replica's end of replication: it connects to the primary, follows it, and connects again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pylitefs.cluster.acks import Acks
from pylitefs.cluster.applier import Applier
from pylitefs.cluster.backoff import Backoff
from pylitefs.cluster.channel import Channel, TaskSet, Timings, unexpected
from pylitefs.cluster.ports import Database, Link, LinkClosed, Store
from pylitefs.cluster.roles import LASTING, NodeIdentity, Refused, StaleEpoch, accept
from pylitefs.cluster.sink import Applied, Broken, Item, Outcome, Prepared, PrepareResync, Stuck, Unfit, Violation
from pylitefs.cluster.tasks import finished, in_thread, supervised
from pylitefs.cluster.transfer import send_entry
from pylitefs.errors import FormatError, LitefsError
from pylitefs.events import Event
from pylitefs.formats.ltx.format import Header, Position
from pylitefs.formats.names import is_database_name
from pylitefs.formats.stream import (
    PROTOCOL_VERSION,
    AskDurable,
    Databases,
    GiveBack,
    Heartbeat,
    Hello,
    Ltx,
    LtxBegin,
    LtxData,
    LtxEnd,
    Message,
    Ready,
    SendChecksums,
    Sender,
    SetAside,
    SnapshotBegin,
    SnapshotEnd,
    TailEnd,
    Welcome,
    batches,
    checksum_messages,
)
from pylitefs.formats.stream_fields import ErrorCode, ResyncReason
from pylitefs.formats.stream_pages import MAX_PAGES_SIZE, AskPages, Pages, SnapshotPages

log = logging.getLogger("litefs.replication")

IN_FLIGHT_BYTES = 8 << 20
"""What may have arrived and wait to be applied; beyond it the connection is not read."""

DRAIN_S = 1.0
"""How long what has come is applied still when the connection has ended."""

COMPLAIN_EVERY_S = 60.0
CALM_S = 60.0
"""A database that needed no resync for so long gets the next one at once."""

RESYNC_MAX_DELAY_S = 30.0

Connect = Callable[[], Awaitable[Link]]
"""Opens a connection to the primary. LinkClosed or ProtocolError when it cannot."""


@dataclass(frozen=True)
class ReplicaState:
    """What a replica knows about its primary, for status. Times are in ms since 1970."""

    connected: bool
    ready: bool  # every database was brought to the primary's position at least once
    since_ms: int  # of being connected, or not
    problem: str = ""  # why it is not connected
    epoch: int = 0


class Replica:
    """Follows one primary until it is cancelled. `databases`: copy only these; empty: all. `epoch` is the highest it
    knows of: an older primary is not followed, also when this was learned while it was.

    `ready` is set once everything that the primary had has been applied, and stays so.
    """

    def __init__(
        self,
        store: Store,
        node: NodeIdentity,
        connect: Connect,
        *,
        databases: Sequence[str] = (),
        hostname: str = "",
        reconnect_delay_s: float = 1.0,
        timings: Timings | None = None,
        backoff: Backoff | None = None,
    ) -> None:
        self.ready = asyncio.Event()
        self.store = store
        self.node = node
        self.databases = tuple(databases)
        self.hostname = hostname  # what `.primary` shows; empty: what the primary says
        self.timings = timings or Timings()
        self.epoch = store.seen_epoch
        self.as_of_ms: int | None = None  # the primary's clock when everything we have was still all there was
        self.primary_positions: dict[str, Position] = {}  # of the newest heartbeats
        self._connect = connect
        self._backoff = backoff or Backoff(reconnect_delay_s)
        self._session: ReplicaLink | None = None
        self._since_ms = _now_ms()
        self._problem = "connecting"
        self.leaving = "was ended"  # why `run` is cancelled: "stops"; the primary is told
        self._complained: tuple[str, float] = ("", 0.0)

    @property
    def state(self) -> ReplicaState:
        connected = self._session is not None and self._session.welcomed
        return ReplicaState(
            connected, self.ready.is_set(), self._since_ms, "" if connected else self._problem, self.epoch
        )

    def lag_txids(self) -> int:
        """How many transactions, as of the last heartbeat, are still to be applied here."""
        behind = 0
        for name, head in list(self.primary_positions.items()):
            known = self.store.get(name) or self.store.tombstone(name)  # it may have been forgotten since
            behind += (known.position if known is not None else Position(0, 0)).missing(head)
        return behind

    async def run(self) -> None:
        """Connect, follow, connect again: until cancelled."""
        loop = asyncio.get_running_loop()
        clock = asyncio.create_task(supervised("showing the lag", self._show_lag))

        def heard(event: Event) -> None:
            if event.database is None:
                return
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                if event.type == "damaged":
                    loop.call_soon_threadsafe(self._heal, event.database)
                elif event.type == "setAside" or self._is_of_our_own(event):
                    loop.call_soon_threadsafe(self.reconnect)  # the primary was told that it is at another position

        unsubscribe = self.store.events.subscribe(heard)
        try:
            while True:
                await asyncio.sleep(await self._attempt())
        finally:
            unsubscribe()
            clock.cancel()
            await asyncio.gather(clock, return_exceptions=True)

    def _is_of_our_own(self, event: Event) -> bool:
        """Whether a transaction was recorded here that is not sent under a HALT lock: what an application had held back
        when this node ceased to be the primary."""
        database = self.store.get(event.database or "")
        recorded = event.type == "tx" and event.data.get("source", "apply") != "apply"
        return recorded and database is not None and database.loan is None

    def reconnect(self) -> None:
        """Shake hands again: a database here is at another position than the primary was told. On the loop."""
        if self._session is not None:
            self._session.end(LinkClosed("the positions of this node have changed", clean=True))

    def saw_epoch(self, epoch: int) -> None:
        """An epoch has begun, somewhere: an older primary does not count any more. On the loop."""
        if epoch > self.epoch:
            before, self.epoch = self.epoch, epoch
            if self._session is not None:
                self._session.end(StaleEpoch(before, epoch))

    def _heal(self, name: str) -> None:
        if self._session is not None and self._session.welcomed:
            self._session.heal(name)

    async def _attempt(self) -> float:
        """One connection, to its end; the pause before the next, in seconds."""
        session: ReplicaLink | None = None
        try:
            async with asyncio.timeout(self.timings.handshake_s):
                link = await self._connect()
            session = self._session = ReplicaLink(self, link)
            error: Exception = await session.run()
        except TimeoutError:
            error = LinkClosed(f"the primary did not answer within {self.timings.handshake_s:g} s")
        except (LitefsError, OSError) as failure:
            error = failure
        except Exception as failure:
            log.exception("a defect: the connection to the primary has failed")
            error = failure
        finally:
            self._session = None
        return self._after(error, session is not None and session.welcomed)

    def _after(self, error: Exception, welcomed: bool) -> float:
        self._problem = str(error) or type(error).__name__
        if welcomed:
            self._since_ms = _now_ms()
        ended = isinstance(error, LinkClosed) and error.clean
        self._complain("disconnected" if welcomed else "cannot follow the primary", harmless=welcomed and ended)
        if isinstance(error, Refused) and error.code in LASTING:
            return self._backoff.after_refusal()
        if welcomed:
            over = isinstance(error, Refused) and error.code is ErrorCode.STALE_EPOCH  # there is a new primary
            return self._backoff.after_session(over or ended)
        return self._backoff.after_failure()

    def _complain(self, what: str, *, harmless: bool = False) -> None:
        """One line, and the same one at most once a minute. `harmless`: the other side, or this one, ended it in good
        order."""
        line, now = f"{what}: {self._problem}", time.monotonic()
        if line != self._complained[0] or now - self._complained[1] >= COMPLAIN_EVERY_S:
            self._complained = (line, now)
            log.log(logging.INFO if harmless else logging.WARNING, "%s", line)

    def welcomed(self, welcome: Welcome) -> None:
        self.epoch = max(self.epoch, welcome.epoch)
        self._since_ms = _now_ms()
        self._complained = ("", 0.0)
        self.store.set_primary_info(self.hostname or welcome.hostname or None)
        log.info("following the primary %s (%016X)", self.hostname or welcome.hostname, welcome.node_id)

    def show_lag(self) -> None:
        if self.as_of_ms is not None:
            self.store.set_lag_ms(max(0, _now_ms() - self.as_of_ms))

    async def _show_lag(self) -> None:
        """Lag grows while nothing comes, too."""
        while True:
            self.show_lag()
            await asyncio.sleep(self.timings.heartbeat_s)


class ReplicaLink:
    """One connection to the primary."""

    def __init__(self, replica: Replica, link: Link) -> None:
        self.welcomed = False
        self.epoch = replica.epoch  # the primary's, once it has welcomed us: what comes belongs to it
        self._caught_up = False  # READY has come, and everything before it is applied
        self._replica = replica
        self._store = replica.store
        self._timings = replica.timings
        self._channel = Channel(link, Sender.PRIMARY)
        self._tasks = TaskSet()
        self._applier = Applier(replica.store, self._report)
        self._in_flight = 0
        self._room = asyncio.Event()
        self._open: dict[int, None] = {}  # sequence numbers that are not done, in order
        self._marks: deque[tuple[int, Callable[[], None]]] = deque()  # (sequence, what to do when all up to it is done)
        self._resyncs: dict[str, tuple[int, float]] = {}  # name: (how many lately, when the last one)
        self._requests: dict[str, int] = {}  # name: the newest RESYNC
        self._healing: set[str] = set()
        self._acks = Acks(self._store, self._channel, self._timings)

    async def run(self) -> Exception:
        """To the end; the error that it always ends with. Only cancellation comes out."""
        error: Exception = LinkClosed("the connection has ended")
        told: BaseException | None = None
        try:
            await self._handshake()
            for task in (self._receive(), self._heartbeat(), self._acks.run(), self._acks.make_durable()):
                self._tasks.start(task)
            await self._tasks.wait()
        except asyncio.CancelledError as cancelled:
            told = cancelled
            raise
        except Exception as failure:
            error = told = failure
            if not isinstance(failure, (LitefsError, OSError)):
                log.exception("replication failed")
        finally:
            await finished(self._close(told))
        return error

    async def _close(self, told: BaseException | None) -> None:
        """Not to be cut short: what is applied after this node has become the primary would be a second writer."""
        await self._tasks.close()
        await self._applier.drain(DRAIN_S)
        await self._applier.close()
        replica = self._replica
        await self._channel.close(told, self._timings.close_s, f"the replica {replica.node} {replica.leaving}")

    def end(self, reason: Exception) -> None:
        self._tasks.fail(reason)

    # --- handshake --------------------------------------------------------------------------------------------------

    async def _handshake(self) -> None:
        replica, store = self._replica, self._store
        names = [name for name in store.all_names() if is_database_name(name)]
        positions = {
            name: database.log.shared() if database.loan is not None else database.position
            for name in names
            if (database := store.get(name)) is not None
        }
        gone = {
            name: tombstone.position
            for name, tombstone in store.tombstones().items()
            if name not in positions and is_database_name(name)
        }
        positions |= gone
        has_data = any(position.txid for position in positions.values())
        cluster_id = store.cluster_id if store.has_databases else None
        wanted = replica.databases
        told = sorted((name, at) for name, at in positions.items() if at.txid and (not wanted or name in wanted))
        hello = Hello(
            PROTOCOL_VERSION,
            cluster_id or "",
            replica.node.node_id,
            replica.node.hostname,
            replica.epoch,
            wanted,
        )
        try:
            async with asyncio.timeout(self._timings.handshake_s):
                await self._channel.send(hello)
                parts = batches(told)
                for index, part in enumerate(parts):
                    await self._channel.send(Databases(index == len(parts) - 1, part))
                welcome = await self._channel.expect(Welcome, self._timings.handshake_s)
        except TimeoutError:
            raise Refused(ErrorCode.TOO_SLOW, f"no handshake within {self._timings.handshake_s:g} s") from None
        accept(welcome, has_data, replica.node, cluster_id, replica.epoch)
        if cluster_id is None:
            await asyncio.to_thread(store.adopt_cluster_id, welcome.cluster_id)
        await asyncio.to_thread(store.note_epoch, welcome.epoch)  # before anything of that epoch is applied
        self.epoch = welcome.epoch
        self._acks.begin(dict(told), gone, at_once=welcome.sync)
        self._applier.at_once = welcome.sync
        self.welcomed = True
        replica.welcomed(welcome)
        for name in names:
            if (database := store.get(name)) is not None and database.is_damaged:
                self.heal(name)

    # --- what comes -------------------------------------------------------------------------------------------------

    async def _receive(self) -> None:
        deadline_s = self._timings.deadline_s
        while True:
            while self._in_flight > IN_FLIGHT_BYTES:
                self._room.clear()
                await self._room.wait()
            message, size = await self._channel.receive(deadline_s)
            self._handle(message, size)

    def _check_epoch(self, seen: int = 0) -> None:
        """StaleEpoch if a later epoch than the session's is known to have begun."""
        if (latest := max(seen, self._replica.epoch)) > self.epoch:
            raise StaleEpoch(self.epoch, latest)

    def _handle(self, message: Message, size: int) -> None:
        self._check_epoch()
        match message:
            case Ltx(name, data):
                header: Header | None = None
                with contextlib.suppress(FormatError):  # the worker will find it, and knows what to do
                    header = Header.unpack(data)
                    self._check_epoch(header.epoch)
                sequence = self._put(message, size)
                if sequence and header is not None:
                    timestamp_ms = header.timestamp_ms
                    self._acks.received(name, header.max_txid)
                    self._mark(sequence, lambda: self._as_of(timestamp_ms))
            case Heartbeat(timestamp_ms, positions):
                self._replica.primary_positions.update(positions)
                self._mark(self._last, lambda: self._as_of(timestamp_ms))
            case SnapshotEnd(_, position):
                self._check_epoch(position.epoch)
                self._put(message, size)
            case LtxBegin() | LtxData() | LtxEnd() | SnapshotBegin() | SnapshotPages() | SetAside():
                self._put(message, size)
            case SendChecksums(name, reason):
                self._put(PrepareResync(name, reason), 0)
            case GiveBack(name, after, limit_bytes):
                self._tasks.start(self._give_back(name, after, limit_bytes))
            case AskDurable(name, txid):
                self._acks.asked(name, txid)
                if not self._acks.has_applied(name, txid):
                    self._applier.hurry(name, txid)
            case AskPages():
                self._tasks.start(self._send_pages(message))
            case Ready():
                self._mark(self._last, self._is_ready)
            case _:
                raise unexpected(message)

    def _put(self, item: Item, size: int) -> int:
        """Its sequence number; 0 if it was dropped."""
        wanted = self._replica.databases
        if wanted and item.name not in wanted:
            raise Refused(ErrorCode.PROTOCOL, f'the database "{item.name}" was not asked for')
        sequence = self._applier.put(item, size)
        if sequence:
            self._in_flight += size
            self._open[sequence] = None
        return sequence

    # --- what comes of it -------------------------------------------------------------------------------------------

    @property
    def _last(self) -> int:
        return next(reversed(self._open), 0)

    def _mark(self, sequence: int, call: Callable[[], None]) -> None:
        """Call once everything that was received up to `sequence` is done."""
        self._marks.append((sequence, call))
        self._pass_marks()

    def _pass_marks(self) -> None:
        first_open = next(iter(self._open), None)
        while self._marks and (first_open is None or self._marks[0][0] < first_open):
            self._marks.popleft()[1]()

    def _as_of(self, timestamp_ms: int) -> None:
        if self._caught_up:
            self._replica.as_of_ms = timestamp_ms

    def _is_ready(self) -> None:
        self._caught_up = True
        self._replica.ready.set()
        self._replica.as_of_ms = _now_ms()
        self._replica.show_lag()

    def _report(self, outcomes: list[Outcome], done: list[int], freed: int) -> None:
        """From the applier, on the loop."""
        self._in_flight -= freed
        self._room.set()
        for sequence in done:
            self._open.pop(sequence, None)
        for outcome in outcomes:
            match outcome:
                case Applied(name, txid, durable, anew):
                    self._acks.applied(name, txid, durable, anew=anew)
                case Unfit(name, reason, text):
                    self._tasks.start(self._ask_again(name, reason, text))
                case Prepared(message):
                    self._acks.given_up(message.name)
                    self._requests[message.name] = message.request
                    self._tasks.start(self._send_resync(outcome))
                case Stuck(name):
                    self._acks.dropped(name)
                case Broken(error):
                    self._tasks.fail(error)
                case Violation(name, text):
                    self._tasks.fail(Refused(ErrorCode.PROTOCOL, f'database "{name}": {text}'))
        self._pass_marks()
        self._replica.show_lag()
        self._acks.hurry()

    async def _ask_again(self, name: str, reason: Any, text: str) -> None:
        """A database does not fit: ask for what differs, at once the first time, then after a growing pause."""
        now = time.monotonic()
        count, last = self._resyncs.get(name, (0, 0.0))
        count = count + 1 if now - last < CALM_S + RESYNC_MAX_DELAY_S else 1
        self._resyncs[name] = (count, now)
        delay_s = 0.0 if count == 1 else min(RESYNC_MAX_DELAY_S, 2.0 ** (count - 2))
        log.warning("%s: %s; fetching the pages that differ in %g s", name, text, delay_s)
        await asyncio.sleep(delay_s)
        self._put(PrepareResync(name, reason), 0)

    def heal(self, name: str) -> None:
        """Its files hold pages that do not match their checksums: fetch them."""
        self._tasks.start(self._heal(name))

    async def _heal(self, name: str) -> None:
        database = self._store.get(name)
        if database is None or name in self._healing:
            return
        self._healing.add(name)
        try:
            sums = await asyncio.to_thread(database.file_checksums)
        except (LitefsError, OSError) as error:  # it cannot even be read: everything is fetched
            log.warning("%s: cannot be read: %s", name, error)
            sums = np.zeros(0, dtype=np.uint64)
        finally:
            self._healing.discard(name)
        log.warning("%s: pages are damaged; fetching them", name)
        self._put(PrepareResync(name, ResyncReason.LOCAL, sums), 0)

    async def _send_resync(self, prepared: Prepared) -> None:
        message, sums = prepared.message, prepared.checksums
        await self._channel.send(message)
        for part in checksum_messages(message.name, message.request, sums):
            if self._requests[message.name] != message.request:
                return  # there is a newer one, whose checksums count
            await self._channel.send(part)

    async def _give_back(self, name: str, after: Position, limit_bytes: int) -> None:
        """Send what the log has after `after`, which the primary lacks; with a limit, only if it follows exactly."""
        database = self._store.get(name)
        given = False
        # The entry may begin before that position: the primary knows whether its state is one within it.
        entry = None if database is None else database.log.covering(after.txid + 1)
        if database is not None and limit_bytes and not await in_thread(_follows, database, after, limit_bytes):
            entry = None
        if database is not None and entry is not None:
            log.info("%s: giving back what the primary has lost after %s", name, after)
            given = True
            while given and entry is not None:
                try:
                    await send_entry(self._channel.send, in_thread, name, entry)
                except (FormatError, OSError) as error:
                    log.warning("%s: cannot give back: %s", name, error)
                    given = False
                entry = database.log.after(entry.max_txid)
        await self._channel.send(TailEnd(name, given))

    async def _send_pages(self, asked: AskPages) -> None:
        """Those that the primary wants, as far as they are sound here."""
        pages: list[tuple[int, bytes]] = []
        try:
            pages = await in_thread(self._store.sound_pages, asked.name, asked.pgnos)
        except (LitefsError, OSError) as error:
            log.warning("%s: pages that the primary asks for cannot be read: %s", asked.name, error)
        room = MAX_PAGES_SIZE // len(pages[0][1]) if pages else 0
        pgnos = tuple(pgno for pgno, _ in pages[:room])
        data = b"".join(page for _, page in pages[:room])
        await self._channel.send(Pages(asked.name, asked.request, pgnos, data))

    async def _heartbeat(self) -> None:
        while True:
            await self._channel.send(Heartbeat(_now_ms()))
            await asyncio.sleep(self._timings.heartbeat_s)


def _follows(database: Database, after: Position, limit_bytes: int) -> bool:
    """Whether the log goes on from exactly there to where the database is, with no more than so many bytes.
    Blocking."""
    size = sum(entry.size_bytes for entry in database.log.entries() if entry.min_txid > after.txid)
    return size <= limit_bytes and database.log.reaches(after) and database.position == database.log.head


def _now_ms() -> int:
    return int(time.time() * 1000)
