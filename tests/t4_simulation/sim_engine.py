"""A lease engine for nodes in a `World`: requests and answers are lost, late, or there twice.

A request that had no answer in time may have been done, or be done later. One that is there twice (whatever sent it
again had lost the first answer) is answered by what the second one came to.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from worlds import Process, World

from pylitefs.cluster.lease_port import ABSENT, Held, Leader, LeaseLost, Member, Versioned, View
from pylitefs.errors import LitefsError, Unavailable
from pylitefs.lease.memory import MemoryService

T = TypeVar("T")
ENGINE = "engine"
TIMEOUT_S = 0.75


class SimService(MemoryService):
    """`terms`: who acquired the lease, and when. `deleted`: the epochs whose lease an operator deleted, and when.
    `written` is called when the state has changed."""

    def __init__(self, world: World, written: Callable[[], None]) -> None:
        super().__init__(clock=lambda: world.now_s)
        self._world = world
        self._written = written
        self._looks: dict[Callable[[], None], None] = {}
        self.terms: list[tuple[float, Leader]] = []
        self.deleted: dict[int, float] = {}

    def acquire(self, leader: Leader, ttl_s: float, state: bytes, version: str) -> Held | None:
        held = super().acquire(leader, ttl_s, state, version)
        if held is not None:
            self.terms.append((self._world.now_s, leader))
            self._written()
        return held

    def update(self, state: bytes, version: str, held: Held | None) -> Versioned:
        found = super().update(state, version, held)
        self._written()
        return found

    def drop(self) -> None:
        """An operator deletes the lease."""
        leader = self.view().leader
        if leader is not None:
            self.deleted[leader.epoch] = self._world.now_s
            self.delete_lease()

    def _changed(self) -> str:
        for look in list(self._looks):
            self._world.after(0.0, look)
        return super()._changed()

    def watch(self, view: View, timeout_s: float, then: Callable[[bool], None]) -> None:
        """`then` hears once whether something differs from `view`, before `timeout_s` are over."""
        end_s = self._world.now_s + timeout_s

        def look() -> None:
            if look not in self._looks:
                return
            changed = self.view() != view
            if changed or self._world.now_s >= end_s:
                del self._looks[look]
                then(changed)

        def at_ends() -> None:
            """A lease or an entry ends without anybody's doing."""
            look()
            if look in self._looks:
                ends = [until_s for _, until_s in self._members.values()] + ([self._lease[2]] if self._lease else [])
                self._world.at(min([end_s, *(one for one in ends if one > self._world.now_s)]), at_ends)

        self._looks[look] = None
        at_ends()


class SimEngine:
    """What a process has of it: a `cluster.lease_port.Engine`. `doubles`: how many of its requests are there twice."""

    min_ttl_s = 0.001

    def __init__(self, service: SimService, process: Process, doubles: float) -> None:
        self._service, self._process, self._doubles = service, process, doubles

    async def _ask(self, request: Callable[[], T]) -> T:
        world = self._process.world

        def arrive(answered: Callable[[T | LitefsError], None]) -> None:
            try:
                answered(request())
            except LitefsError as error:
                answered(error)

        def arrives(answered: Callable[[T | LitefsError], None]) -> None:
            if self._doubles and world.rng.random() < self._doubles:
                arrive(lambda found: None)
                world.after(world.latency(), lambda: arrive(answered))
            else:
                arrive(answered)

        return await self._call(arrives, TIMEOUT_S)

    async def _call(self, arrives: Callable[[Callable[[T | LitefsError], None]], None], timeout_s: float) -> T:
        process, world = self._process, self._process.world
        answer: asyncio.Future[T | LitefsError] = process.loop.create_future()

        def answered(found: T | LitefsError) -> None:
            world.send(ENGINE, process, lambda: answer.done() or answer.set_result(found))  # type: ignore[func-returns-value]

        world.carry(process.name, ENGINE, lambda: arrives(answered))
        try:
            async with asyncio.timeout(timeout_s):
                found = await answer
        except TimeoutError:
            raise Unavailable("the lease engine did not answer: the simulation has cut it off") from None
        if isinstance(found, LitefsError):
            raise found
        return found

    async def view(self) -> View:
        return await self._ask(self._service.view)

    async def acquire(self, leader: Leader, ttl_s: float, state: bytes, version: str) -> Held | None:
        start_s = self._process.loop.time()
        held = await self._ask(lambda: self._service.acquire(leader, ttl_s, state, version))
        return None if held is None else replace(held, valid_until_s=start_s + ttl_s)

    async def renew(self, held: Held) -> Held:
        start_s = self._process.loop.time()
        if start_s >= held.valid_until_s:
            raise LeaseLost("the lease has expired")
        renewed = await self._ask(lambda: self._service.renew(held))
        return replace(renewed, valid_until_s=start_s + held.ttl_s)

    async def release(self, held: Held) -> None:
        await self._ask(lambda: self._service.release(held))

    async def update(self, state: bytes, version: str = ABSENT, held: Held | None = None) -> Versioned:
        return await self._ask(lambda: self._service.update(state, version, held))

    async def announce(self, member: Member, ttl_s: float) -> None:
        await self._ask(lambda: self._service.set_member(member, ttl_s))

    async def withdraw(self, node_id: int) -> None:
        await self._ask(lambda: self._service.remove_member(node_id))

    async def wait(self, view: View, timeout_s: float) -> bool:
        return await self._call(lambda answered: self._service.watch(view, timeout_s, answered), timeout_s + TIMEOUT_S)

    async def close(self) -> None:
        pass
