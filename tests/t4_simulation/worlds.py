"""Several processes in one, each on an event loop and a clock of its own, in virtual time that they share.

`World.run` lets every process do what it has to do now, in random order, and then puts the time forward to when the
next of them has something to do. A process that is paused (SIGSTOP) does nothing at all meanwhile, also what its own
timers would have done, and finds its clock put forward afterwards; one that was killed does nothing any more.

What processes say to each other goes through `World.send`: it takes a random time, and does not arrive where the way
is cut, or where nobody is left to get it. What they share otherwise (a `MemoryService`) is as if it were elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import random
import selectors
from asyncio import events
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
_TICK_S = 1e-6
_CANCELS = 5  # asyncio.wait_for of Python 3.11 swallows a cancellation that comes with its result


class _Selector(selectors.DefaultSelector):
    """Never waits, and nothing comes from outside. After the end, time passes as fast as it is asked for."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def select(self, timeout: float | None = None) -> list[Any]:
        if self._world.is_over and timeout:
            self._world.now_s += timeout + _TICK_S
        return []


class Loop(asyncio.SelectorEventLoop):
    """One process's. Its clock goes at `rate` and began at `offset_s`."""

    def __init__(self, world: World, rate: float, offset_s: float) -> None:
        self._world, self.rate, self.offset_s = world, rate, offset_s
        super().__init__(_Selector(world))
        self._clock_resolution = _TICK_S

    def time(self) -> float:
        return self._world.now_s * self.rate + self.offset_s

    def next_s(self) -> float | None:
        """When there is something to do next, in the world's time; None: never."""
        while self._scheduled and self._scheduled[0]._cancelled:
            heapq.heappop(self._scheduled)._scheduled = False
        if self._ready:
            return self._world.now_s
        return (self._scheduled[0]._when - self.offset_s) / self.rate if self._scheduled else None

    def step(self) -> None:
        events._set_running_loop(self)
        try:
            self._run_once()
        finally:
            events._set_running_loop(None)


class Process:
    """`rate`: how fast its clock goes."""

    def __init__(self, world: World, name: str, rate: float = 1.0) -> None:
        self.world, self.name = world, name
        self.loop = Loop(world, rate, world.rng.uniform(100.0, 1000.0))
        self.paused = False
        self.alive = True
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """An error in it is the world's."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None and not self.world.is_over:
            self.world.failures.append(task.exception())

    def kill(self) -> None:
        """Not a line of it is run any more."""
        self.alive = False
        self._tasks |= asyncio.all_tasks(self.loop)  # or the garbage collector would end them
        self.world.dead.append(self)

    def clean(self) -> None:
        """After the end of the world: let its tasks end, so that nothing complains."""

        async def end() -> None:
            for _ in range(_CANCELS):
                tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
                for task in tasks:
                    task.cancel()
                if tasks:
                    await asyncio.wait(tasks, timeout=10.0)  # of the world's time
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task._log_destroy_pending = False  # of a dead process, waiting for what another life of it has
                left.append(task)

        left: list[asyncio.Task[Any]] = []
        self.loop.run_until_complete(end())
        for task in left:  # not by the garbage collector: Python 3.11 stumbles where that comes while it compiles
            coroutine = task.get_coro()
            assert isinstance(coroutine, Coroutine)
            with contextlib.suppress(RuntimeError):
                coroutine.close()
        self.loop.close()


class World:
    """The time, the processes, and the ways between them, by a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.is_over = False
        self.processes: list[Process] = []
        self.dead: list[Process] = []
        self.failures: list[BaseException | None] = []
        self.cuts: set[tuple[str, str]] = set()
        self.latency_s = 0.002
        self.loss = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def process(self, name: str, rate: float = 1.0) -> Process:
        made = Process(self, name, rate)
        self.processes.append(made)
        return made

    def at(self, when_s: float, call: Callable[[], None]) -> None:
        """The world itself does something, whatever the processes do."""
        self._count += 1
        heapq.heappush(self._events, (when_s, self._count, call))

    def run(self, until_s: float) -> None:
        while self.now_s < until_s and not self.failures:
            while self._events and self._events[0][0] <= self.now_s:
                heapq.heappop(self._events)[2]()
            if self._step_all():
                continue
            times = [self._events[0][0]] if self._events else []
            times += [when for one in self.processes if not one.paused and (when := one.loop.next_s()) is not None]
            self.now_s = min(until_s, max(self.now_s, min(times, default=until_s)) + _TICK_S)
        if self.failures:
            failure = self.failures[0]
            assert failure is not None
            raise failure

    def _step_all(self) -> bool:
        """Whether any of the processes had something to do now."""
        self.processes = [one for one in self.processes if one.alive]
        ready = []
        for one in self.processes:
            if not one.paused and (when := one.loop.next_s()) is not None and when <= self.now_s:
                ready.append(one)
        if len(ready) > 1:
            self.rng.shuffle(ready)
        for one in ready:
            if one.alive and not one.paused:
                one.loop.step()
        return bool(ready)

    # -- messages

    def latency(self) -> float:
        return self.latency_s * self.rng.uniform(0.2, 3.0)

    def passes(self, sender: str, receiver: str) -> bool:
        return (sender, receiver) not in self.cuts and self.rng.random() >= self.loss

    def send(self, sender: str, receiver: Process, call: Callable[[], None]) -> None:
        """`call` runs at `receiver` a little later, or never."""
        if self.passes(sender, receiver.name):
            self.at(self.now_s + self.latency(), lambda: self._deliver(sender, receiver, call))

    def _deliver(self, sender: str, receiver: Process, call: Callable[[], None]) -> None:
        if receiver.alive and (sender, receiver.name) not in self.cuts:
            receiver.loop.call_soon(call)

    async def ask(self, sender: Process, receiver: Process, question: Callable[[], T], timeout_s: float) -> T:
        """What `receiver` answers. TimeoutError if nothing comes back."""
        answer: asyncio.Future[T] = sender.loop.create_future()

        def arrived() -> None:
            found = question()
            self.send(receiver.name, sender, lambda: answer.done() or answer.set_result(found))  # type: ignore[arg-type,func-returns-value]

        self.send(sender.name, receiver, arrived)
        async with asyncio.timeout(timeout_s):
            return await answer

    def close(self) -> None:
        self.is_over = True
        for one in {*self.processes, *self.dead}:
            one.clean()
