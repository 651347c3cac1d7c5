"""What the primary is told of a replica's progress.

Received and applied at once, then at most every `ack_s`; durable every `durable_s`. A primary whose commits wait for
its replicas says so in the WELCOME: then every transaction is made durable right after it was applied, by an fsync of
the log (see `engine.durable`), and acknowledged at once. What arrives during an fsync is in the next one. Where
something else waits for one transaction the primary asks for that one (ASK_DURABLE).
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Container

from pylitefs.cluster.channel import Channel, Timings
from pylitefs.cluster.ports import Store
from pylitefs.errors import LitefsError
from pylitefs.formats.ltx.format import Position
from pylitefs.formats.stream import Ack, Progress, batches

log = logging.getLogger("litefs.replication")

SYNCING_MAX = 4


class Acks:
    """Of one connection. Everything on the loop; the fsyncs on other threads."""

    def __init__(self, store: Store, channel: Channel, timings: Timings) -> None:
        self._store, self._channel, self._timings = store, channel, timings
        self._received: dict[str, int] = {}
        self._applied: dict[str, int] = {}
        self._durable: dict[str, int] = {}
        self._rounds: Counter[str] = Counter()  # how often a copy became another: an fsync of the one before is void
        self._changed: set[str] = set()
        self._undurable: set[str] = set()
        self._syncing: set[str] = set()  # are being made durable
        self._wake = asyncio.Event()
        self._at_once = False  # the primary's commits wait for us
        self._asked: dict[str, int] = {}  # up to which TXID the primary waits for it to be durable
        self._no_pause = False
        self._urgent: set[str] = set()
        self._urgent_came = asyncio.Event()

    def begin(self, positions: dict[str, Position], gone: Container[str] = (), *, at_once: bool = False) -> None:
        """What the replica has from before the connection: applied, and to be made durable soon. `gone`: those of which
        only a tombstone is left. Whether a restart knows of that or not, it has nothing of them: they are durable."""
        self._at_once = at_once
        for name, position in positions.items():
            self._received[name] = self._applied[name] = position.txid
            if name in gone:
                self._durable[name] = position.txid
                self._changed.add(name)
            else:
                self._undurable.add(name)
        if at_once:
            self._hurry(*self._undurable)
        self.hurry()

    def asked(self, name: str, txid: int) -> None:
        """The primary waits until this is durable up to `txid`, which may be still to come."""
        if self._durable.get(name, 0) < txid:
            self._asked[name] = max(txid, self._asked.get(name, 0))
            if self._is_urgent(name):
                self._hurry(name)

    def has_applied(self, name: str, txid: int) -> bool:
        return self._applied.get(name, 0) >= txid

    def _is_urgent(self, name: str) -> bool:
        asked = self._asked.get(name)
        return self._at_once or (asked is not None and self._applied.get(name, 0) >= asked)

    def _hurry(self, *names: str) -> None:
        self._urgent.update(names)
        self._urgent_came.set()

    def received(self, name: str, txid: int) -> None:
        self._received[name] = txid

    def applied(self, name: str, txid: int, durable: int = 0, *, anew: bool = False) -> None:
        """`durable`: up to where it is already. `anew`: in the place of another copy, or of none."""
        anew = anew or txid < self._applied.get(name, 0)
        if anew:
            self._rounds[name] += 1
        self._received[name] = txid if anew else max(txid, self._received.get(name, 0))
        self._applied[name] = txid
        self._durable[name] = 0 if anew else min(txid, self._durable.get(name, 0))
        self._changed.add(name)
        self._undurable.add(name)
        if durable:
            self._is_durable(name, durable, self._rounds[name])
            self._no_pause = True
        elif self._is_urgent(name):
            self._hurry(name)

    def dropped(self, name: str) -> None:
        """What was received and not applied is not held any more."""
        self._received[name] = self._applied.get(name, 0)
        self._changed.add(name)

    def given_up(self, name: str) -> None:
        """The copy is to be mended, which the primary is told next: what is acknowledged from now on is the result."""
        self._rounds[name] += 1
        self._received[name] = self._applied[name] = self._durable[name] = 0
        self._changed.discard(name)
        self._undurable.discard(name)
        self._urgent.discard(name)

    def hurry(self) -> None:
        """Send what is new as soon as the pace allows."""
        if self._changed:
            self._wake.set()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        next_s = 0.0
        while True:
            await self._wake.wait()
            if (pause_s := next_s - loop.time()) > 0 and not self._no_pause:
                await asyncio.sleep(pause_s)
            self._wake.clear()
            self._no_pause = False
            changed, self._changed = self._changed, set()
            if changed:
                for part in batches(sorted(changed)):  # each as it is when it is sent: what was given up is told before
                    await self._channel.send(Ack(tuple(map(self._progress, part))))
                next_s = loop.time() + self._timings.ack_s

    def _progress(self, name: str) -> Progress:
        told = Progress(name, self._received.get(name, 0), self._applied.get(name, 0), self._durable.get(name, 0))
        if self._at_once:
            log.debug("%s: told the primary: applied %d, durable %d", name, told.applied, told.durable)
        return told

    async def make_durable(self) -> None:
        """A few databases at a time, so that their transactions get in between and none waits for a stuck one."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._urgently())
            running: set[asyncio.Task[None]] = set()
            while True:
                await asyncio.sleep(self._timings.durable_s)
                for name in sorted(self._undurable - self._syncing):
                    if len(running) >= SYNCING_MAX:
                        _, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    self._undurable.discard(name)
                    self._syncing.add(name)
                    running.add(group.create_task(self._make_durable(name)))
                running = {task for task in running if not task.done()}

    async def _make_durable(self, name: str) -> None:
        try:
            await self._all_of(name)
        except (OSError, LitefsError) as error:
            log.warning("%s: cannot be made durable now: %s", name, error)
            self._undurable.add(name)
        finally:
            self._syncing.discard(name)

    async def _all_of(self, name: str) -> None:
        database, round_ = self._store.get(name), self._rounds[name]
        if database is None:  # it was dropped long ago
            await asyncio.wrap_future(self._store.worker.submit(self._store.keep_tombstones))
            self._is_durable(name, self._applied.get(name, 0), round_)
        else:
            txid = await asyncio.wrap_future(self._store.worker.submit(database.durable, database=name))
            self._is_durable(name, txid, round_)

    def _is_durable(self, name: str, txid: int, round_: int) -> None:
        if self._rounds[name] == round_:
            self._durable[name] = max(self._durable.get(name, 0), min(txid, self._applied.get(name, txid)))
            if self._durable[name] >= self._asked.get(name, math.inf):
                del self._asked[name]
            self._changed.add(name)
            self._wake.set()

    # --- at once ----------------------------------------------------------------------------------------------------

    async def _urgently(self) -> None:
        slots = asyncio.Semaphore(SYNCING_MAX)
        busy: set[str] = set()

        async def make(name: str) -> None:
            try:
                async with slots:
                    self._urgent.discard(name)
                    await self._log_of(name)
            except (OSError, LitefsError) as error:
                log.warning("%s: cannot be made durable now: %s", name, error)
                await asyncio.sleep(self._timings.durable_s)
                self._urgent.add(name)
            finally:
                busy.discard(name)
                self._urgent_came.set()

        async with asyncio.TaskGroup() as group:
            while True:
                await self._urgent_came.wait()
                self._urgent_came.clear()
                for name in sorted(self._urgent - busy):
                    busy.add(name)
                    group.create_task(make(name))

    async def _log_of(self, name: str) -> None:
        database, round_ = self._store.get(name), self._rounds[name]
        txid = await asyncio.to_thread(database.log_durable) if database is not None else None
        self._no_pause = True
        if txid is None:
            await self._all_of(name)
        else:
            self._is_durable(name, txid, round_)
