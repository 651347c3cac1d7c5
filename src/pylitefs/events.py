"""What happens on this node, told to whoever listens: metrics, the log, `GET /events`, replication.

A lower layer emits; it knows nothing of the listeners. `EventBus` is the one place where they meet.

    type              data (besides the database's name)
    init              is_primary, hostname                       first line of a /events stream
    primaryChange     is_primary, hostname                       role or primary changed
    tx                txid, min_txid, post_apply_checksum, page_size, commit, timestamp_ms; and where known
                      source ("capture", "apply", "import", "repair", "drop"), size_bytes (of the log entry),
                      seconds (spent on capture or apply), latency_s (from commit to applied, on a replica)
    drop              txid                                       a database was deleted
    gap               captured transactions were missed; `repair` follows
    overlooked        a defect of litefs: the watchdog found      reason
                      commits that nobody was woken for
    notTakenOver      this node is not the primary any more, and  reason
                      something keeps it from replicating this
    repair            the state was taken over by diff           pages
    resync            a replica fetched the pages that differ    pages, bytes
    setAside          a database cannot be used                  reason
    withheld          what a database's file holds now cannot be recorded: replicas keep the state before  reason
    withheldEnd       it is recorded
    lost              a branch, or a database, was kept in lost/  folder, reason, transactions, epoch, max_txid, to;
                      of a branch also min_txid, after
    damaged           pages do not match their checksums         reason; where known pages (how many)
    healed            they are what they should be again         pages, source ("log", "replica", "primary", "table"; ""
                                                                 where they were written anew)
    scrubbed          every database was read                    databases, bytes, seconds
    snapshotSent      a snapshot went to a replica               node_id, bytes
    replicaConnected, replicaLost                                node_id, address
    promoted, demoted this node is, is no more, the primary      epoch; reason
    forced            … though acknowledged commits may be       epoch, txid (the sum over all databases)
                      missing: an operator wanted it so
    halt, haltEnd     another node has, had a HALT lock here       node_id; position; reason
    haltHeld          this node got a HALT lock                    position
    haltLost          this node lost one                           reason, transactions (not sent)
    synced            a commit that waited for replicas was      txid, seconds (that it waited), failed ("timeout",
                      answered                                   "demoted"; missing if replicas hold it)
    syncDegraded      commits do not wait any more, because      in_sync (how many replicas are)
                      replicas are missing
    syncRestored      they wait again                            in_sync
    corruptLog        a log entry does not verify                path
    diskFull, diskFreed, logFailing, logWorks, busyAfterCrash, recovered
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, TracebackType
from typing import Any

from pylitefs.errors import Unavailable

log = logging.getLogger(__name__)

STREAM_LIMIT = 1024
"""Events that a stream keeps for a slow consumer before it gives up on it (LiteFS's number)."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened. `database` is its name, None for what concerns the node."""

    type: str
    database: str | None = None
    data: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


Callback = Callable[[Event], None]


class EventBus:
    """Hands every event to every subscriber, in the thread that emits it. Thread-safe.

    Subscribers must be fast. One that raises is logged and does not stop the others or the emitter. Events of one
    thread arrive in order; those of different threads in any.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callbacks: tuple[Callback, ...] = ()

    def emit(self, event: Event) -> None:
        for callback in self._callbacks:  # a tuple is never changed: no lock needed to walk it
            try:
                callback(event)
            except Exception:
                log.exception("subscriber failed", extra={"event": event.type})

    def subscribe(self, callback: Callback) -> Callable[[], None]:
        """Call `callback` for every event from now on; the result ends that, and may be called more than once.

        An emit that has begun in another thread may still reach the callback once after that.
        """
        entry: Callback = lambda event: callback(event)  # noqa: E731 - an identity of its own per subscription
        with self._lock:
            self._callbacks = (*self._callbacks, entry)

        def unsubscribe() -> None:
            with self._lock:
                self._callbacks = tuple(known for known in self._callbacks if known is not entry)

        return unsubscribe

    @property
    def subscriber_count(self) -> int:
        return len(self._callbacks)


class SlowConsumer(Unavailable):
    def __init__(self, limit: int) -> None:
        super().__init__(f"events are read too slowly: more than {limit} are waiting")


class EventStream:
    """A bounded queue of a bus's events for one consumer on an asyncio loop. Use it as a context manager.

    Once more than `limit` events wait, the stream ends: what waits is dropped, `overflowed` is set (so that a
    consumer which is stuck in a write can be woken) and `next_batch` raises SlowConsumer.
    """

    def __init__(self, bus: EventBus, limit: int = STREAM_LIMIT) -> None:
        self.overflowed = asyncio.Event()
        self._bus = bus
        self._limit = limit
        self._lock = threading.Lock()  # guards the next four; emitters hold it for an append
        self._waiting: deque[Event] = deque()
        self._wake_pending = False
        self._full = False
        self._closed = False
        self._wakeup = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._unsubscribe: Callable[[], None] = lambda: None

    def __enter__(self) -> EventStream:
        self._loop = asyncio.get_running_loop()
        self._unsubscribe = self._bus.subscribe(self._put)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the subscription. Loop thread only."""
        self._unsubscribe()
        with self._lock:
            self._closed = True
            self._waiting.clear()

    async def next_batch(self, timeout_s: float | None = None) -> list[Event]:
        """All events that wait, in order; an empty list at the latest after `timeout_s`. Raises SlowConsumer."""
        try:
            await asyncio.wait_for(self._wakeup.wait(), timeout_s)
        except TimeoutError:
            return []
        self._wakeup.clear()
        with self._lock:
            if self._full:
                raise SlowConsumer(self._limit)
            batch = list(self._waiting)
            self._waiting.clear()
            self._wake_pending = False
        return batch

    def _put(self, event: Event) -> None:
        with self._lock:
            if self._full or self._closed:
                return
            if len(self._waiting) >= self._limit:
                self._full = True
                self._waiting.clear()
            else:
                self._waiting.append(event)
                if self._wake_pending:
                    return
            self._wake_pending = True
            full, loop = self._full, self._loop
        assert loop is not None
        try:
            loop.call_soon_threadsafe(self._wake, full)
        except RuntimeError:  # the loop was closed meanwhile
            pass

    def _wake(self, full: bool) -> None:
        self._wakeup.set()
        if full:
            self.overflowed.set()
