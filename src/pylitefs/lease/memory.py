"""A lease engine in memory, for several nodes in one process: simulations and tests.

`MemoryService` is the engine's server, `MemoryEngine` what one node has of it. Time is the event loop's, so a loop with
virtual time makes leases expire as fast as the simulation runs. `cut` and `slow_s` are what simulations do to a node.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace

from pylitefs.cluster.lease_port import ABSENT, Clock, Conflict, Held, Leader, LeaseLost, Member, Versioned, View
from pylitefs.errors import Unavailable
from pylitefs.lease import documents

WHERE = "the lease engine in memory"


def loop_time_s() -> float:
    return asyncio.get_running_loop().time()


class MemoryService:
    """The state of one cluster, for all its engines. Every operation is one step of the loop."""

    def __init__(self, clock: Clock = loop_time_s) -> None:
        self._clock = clock
        self._revision = 0
        self._lease: tuple[Leader, str, float] | None = None  # who, which acquisition, until when
        self._state = Versioned()
        self._members: dict[int, tuple[Member, float]] = {}
        self._watchers: set[asyncio.Event] = set()

    def view(self) -> View:
        now = self._clock()
        members = tuple(member for _, (member, until_s) in sorted(self._members.items()) if now < until_s)
        return View(self._lease[0] if self._lease and now < self._lease[2] else None, self._state, members)

    def acquire(self, leader: Leader, ttl_s: float, state: bytes, version: str) -> Held | None:
        if self.view().leader is not None or self._state.version != version:
            return None
        token = self._changed()
        self._state = Versioned(state, token)
        until_s = self._clock() + ttl_s
        self._lease = leader, token, until_s
        return Held(leader, ttl_s, until_s, self._state, token)

    def holds(self, held: Held) -> bool:
        return self._lease is not None and self._lease[1] == held.token and self._clock() < self._lease[2]

    def renew(self, held: Held) -> Held:
        if not self.holds(held):
            raise LeaseLost("the lease is not ours any more: it has expired, or was taken or deleted")
        until_s = self._clock() + held.ttl_s
        self._lease = held.leader, held.token, until_s
        return replace(held, valid_until_s=until_s)

    def release(self, held: Held) -> None:
        if self.holds(held):
            self.delete_lease()

    def delete_lease(self) -> None:
        """What an operator may do."""
        self._lease = None
        self._changed()

    def update(self, state: bytes, version: str, held: Held | None) -> Versioned:
        if held is not None and not self.holds(held):
            raise LeaseLost("the lease is not ours any more: it has expired, or was taken or deleted")
        if self._state.version != version:
            raise Conflict("the cluster's state was changed by another node: read it again")
        self._state = Versioned(state, self._changed())
        return self._state

    def set_member(self, member: Member, ttl_s: float) -> None:
        self._members[member.node_id] = member, self._clock() + ttl_s
        self._changed()

    def remove_member(self, node_id: int) -> None:
        if self._members.pop(node_id, None):
            self._changed()

    def _changed(self) -> str:
        for watcher in self._watchers:
            watcher.set()
        self._revision += 1
        return str(self._revision)

    async def wait(self, view: View, timeout_s: float) -> bool:
        end_s = self._clock() + timeout_s
        watcher = asyncio.Event()
        self._watchers.add(watcher)
        try:
            while self.view() == view:
                now = self._clock()
                if now >= end_s:
                    return False
                ends = [until_s for _, until_s in self._members.values()]
                if self._lease:
                    ends.append(self._lease[2])
                next_s = min([end_s, *(until_s for until_s in ends if until_s > now)])
                watcher.clear()
                try:
                    # Never less than what a loop counts as the same moment, or virtual time would stand still.
                    await asyncio.wait_for(watcher.wait(), max(next_s - now, 0.001))
                except TimeoutError:
                    pass
            return True
        finally:
            self._watchers.discard(watcher)


class MemoryEngine:
    """A `cluster.lease_port.Engine` on `service`. `cut`: it cannot reach it; requests fail after `timeout_s`. `slow_s`:
    how long a request takes on its way there, and again on its way back."""

    min_ttl_s = 0.001

    def __init__(self, service: MemoryService, timeout_s: float = 2.0, clock: Clock = loop_time_s) -> None:
        self._service = service
        self._timeout_s = timeout_s
        self._clock = clock
        self.cut = False
        self.slow_s: Callable[[], float] = float  # a random delay, in simulations

    async def view(self) -> View:
        await self._way()
        view = self._service.view()
        await self._way()
        return view

    async def acquire(self, leader: Leader, ttl_s: float, state: bytes, version: str) -> Held | None:
        documents.check_ttl(ttl_s, self.min_ttl_s, WHERE)
        documents.check_state(state)
        start_s = self._clock()
        await self._way()
        held = self._service.acquire(leader, ttl_s, state, version)
        await self._way()
        return replace(held, valid_until_s=start_s + ttl_s) if held else None

    async def renew(self, held: Held) -> Held:
        start_s = self._clock()
        if start_s >= held.valid_until_s:
            raise LeaseLost(f"the lease has expired: it was not renewed for {held.ttl_s:g} s")
        await self._way()
        renewed = self._service.renew(held)
        await self._way()
        return replace(renewed, valid_until_s=start_s + held.ttl_s)

    async def release(self, held: Held) -> None:
        await self._way()
        self._service.release(held)

    async def update(self, state: bytes, version: str = ABSENT, held: Held | None = None) -> Versioned:
        documents.check_state(state)
        await self._way()
        written = self._service.update(state, version, held)
        await self._way()
        return written

    async def announce(self, member: Member, ttl_s: float) -> None:
        documents.check_ttl(ttl_s, self.min_ttl_s, WHERE)
        await self._way()
        self._service.set_member(member, ttl_s)

    async def withdraw(self, node_id: int) -> None:
        await self._way()
        self._service.remove_member(node_id)

    async def wait(self, view: View, timeout_s: float) -> bool:
        await self._way()
        changed = await self._service.wait(view, timeout_s)
        await self._way()
        return changed

    async def close(self) -> None:
        pass

    async def _way(self) -> None:
        """One way of a request, to the service or back."""
        delay_s = self.slow_s()
        if self.cut or delay_s >= self._timeout_s:
            await asyncio.sleep(min(self._timeout_s, math.inf if self.cut else delay_s))
            raise Unavailable(f"{WHERE} did not answer within {self._timeout_s:g} s: it was cut off by the simulation")
        await asyncio.sleep(delay_s)
