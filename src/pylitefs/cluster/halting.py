"""HALT locks of other nodes' databases: what opening and closing NAME-lock does on a replica.

    the first open      POST /halt ▸ wait until this node is exactly where the primary stands ▸ it captures the database
    a commit            is recorded in the log, as on a primary, and sent: POST /tx, in order
    its fsync (FULL)    is answered when the primary has the commit durably: until then nobody sees it (`Gate`)
    while it is open    PUT /halt, three times within the lock's time
    a close             waits until the primary has everything that was committed
    the last close      writers are locked out ▸ everything is captured and sent ▸ DELETE /halt

If the lock is lost (its time is over, the primary has changed, or refuses) nothing is acknowledged any more, the
database is only applied to again, and what the primary does not have is kept in lost/ by the next handshake.

All opens of one database share one lock; byte 72 of the file, which the kernel looks after, lets them write in turn.
Everything runs on the event loop but what `ports.LockFiles` offers, which is for any thread.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable

from pylitefs.cluster.halts import TTL_S
from pylitefs.cluster.hold import Hold, Peers, Share, State, WriterStore
from pylitefs.errors import Unavailable
from pylitefs.events import Event
from pylitefs.ports import Then

log = logging.getLogger("litefs.halt")

OPEN_S = 10.0
"""How long open(2) waits for the lock, and close(2) for the primary to have everything."""


class Opening(Share):
    """One open of NAME-lock (`ports.LockOpening`). Any thread."""

    def __init__(self, halting: Halting, name: str, then: Then) -> None:
        super().__init__(name, then)
        self._halting = halting

    def cancel(self) -> None:
        self._halting.call(self._halting.give_up, self, InterruptedError(errno.EINTR, "interrupted"))

    def flush(self, last: bool, then: Then) -> None:
        if self.hold is None or not self._halting.call(self.hold.flush, self, last, then):
            then(None)

    def release(self) -> None:
        if self.hold is not None:
            self._halting.call(self.hold.remove, self)


class Halting:
    """Implements `ports.LockFiles`. One for the life of a node, made on its loop.

    `primary_url`: where the primary is, "" if that is not known. `reconnect`: shake hands with it again.
    """

    def __init__(
        self, store: WriterStore, peers: Peers, primary_url: Callable[[], str], reconnect: Callable[[], None],
        *, ttl_s: float = TTL_S, open_s: float = OPEN_S,
    ) -> None:  # fmt: skip
        self.store, self.peers, self.primary_url, self.reconnect = store, peers, primary_url, reconnect
        self.ttl_s, self.open_s = ttl_s, open_s
        self._loop = asyncio.get_running_loop()
        self._holds: dict[str, Hold] = {}
        self._closed = False
        self._unsubscribe = store.events.subscribe(self._heard)

    # --- any thread -------------------------------------------------------------------------------------------------

    def open(self, name: str, then: Then) -> Opening:
        """An application opens NAME-lock for writing."""
        opening = Opening(self, name, then)
        if not self.call(self._open, opening):
            opening.answer(Unavailable("this node is stopping"))
        return opening

    def call(self, call: Callable[..., object], *args: object) -> bool:
        """On the loop, soon; False if that has ended."""
        try:
            self._loop.call_soon_threadsafe(call, *args)
        except RuntimeError:
            return False
        return True

    def _heard(self, event: Event) -> None:
        hold = self._holds.get(event.database or "")
        if hold is not None:
            self.call(hold.moved.set)
        elif event.type == "primaryChange":
            self.call(self._look_at_primary)

    # --- the loop ---------------------------------------------------------------------------------------------------

    def _open(self, opening: Opening) -> None:
        if self._closed:
            opening.answer(Unavailable("this node is stopping"))
        elif self.store.is_primary:
            opening.answer(None)
        else:
            late = OSError(errno.ETIMEDOUT, f"no HALT lock within {self.open_s:g} s")
            opening.timer = self._loop.call_later(self.open_s, self.give_up, opening, late)
            self._share(opening)

    def _share(self, opening: Share) -> None:
        hold = self._holds.get(opening.name)
        if hold is None:
            hold = self._holds[opening.name] = Hold(self, opening.name)
            hold.task.add_done_callback(self._ended)
        hold.add(opening)

    def _ended(self, task: asyncio.Task[Hold]) -> None:
        hold = next(hold for hold in self._holds.values() if hold.task is task)
        del self._holds[hold.name]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: the HALT lock ended with an error", hold.name, exc_info=error)
        for opening in hold.next:
            if not opening.waits:
                continue
            if self._closed or self.store.is_primary:
                opening.answer(Unavailable("this node is stopping") if self._closed else None)
            else:
                self._share(opening)

    def give_up(self, opening: Share, error: BaseException) -> None:
        """An open is not waited for any more."""
        if opening.waits:
            opening.answer(error)
            hold = self._holds.get(opening.name)
            if hold is not None:
                hold.remove(opening)

    def _look_at_primary(self) -> None:
        for hold in list(self._holds.values()):
            hold.look_at_primary()

    async def close(self) -> None:
        """Before the mount goes: give every lock back, with all that was committed."""
        self._closed = True
        for hold in list(self._holds.values()):
            hold.give_back()
        tasks = [hold.task for hold in self._holds.values()]
        if tasks:
            await asyncio.wait(tasks, timeout=self.open_s)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._unsubscribe()

    async def end_all(self, reason: str) -> None:
        """This node is about to become the primary itself, or to follow another one: without the old one's locks."""
        holds = list(self._holds.values())
        for hold in holds:
            hold.end_now(reason)
        await asyncio.gather(*(hold.task for hold in holds), return_exceptions=True)

    def held(self) -> list[str]:
        """The databases whose lock this node has."""
        return sorted(name for name, hold in self._holds.items() if hold.state is State.HELD)
