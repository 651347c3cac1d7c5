"""Several processes in one, each on an event loop and a clock of its own, in virtual time that they share.

`World.run` lets every process do what it has to do now, in random order, and then puts the time forward to what comes
next. A process that is paused (SIGSTOP) does nothing at all meanwhile, also what its own timers would have done, and
finds its clock put forward afterwards; one that was killed does nothing any more.

What processes say to each other goes through `World.carry`: it takes a random time, now and then a long one, and does
not arrive where the way is cut, or where nobody is left to get it.

The loops are asyncio's in what tasks, futures, timeouts and locks need of one, and nothing else: a run is thousands of
times faster than the time it covers.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from asyncio import events
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from typing import Any, TypeVar

T = TypeVar("T")
_TICK_S = 1e-6
_CANCELS = 5  # asyncio.wait_for of Python 3.11 swallows a cancellation that comes with its result
_STALLS_S = (0.2, 0.9, 2.0, 5.0)


class _Handle:
    """A call that is to come."""

    __slots__ = ("_args", "_call", "_context", "is_cancelled")

    def __init__(self, call: Callable[..., object], args: tuple[Any, ...], context: Context | None) -> None:
        self._call, self._args, self._context = call, args, context
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True

    def cancelled(self) -> bool:
        return self.is_cancelled

    def run(self) -> None:
        if self.is_cancelled:
            return
        if self._context is None:
            self._call(*self._args)
        else:
            self._context.run(self._call, *self._args)


class Loop(asyncio.AbstractEventLoop):
    """One process's. Its clock goes at `rate` and began at `offset_s`."""

    def __init__(self, world: World, rate: float, offset_s: float) -> None:
        self._world, self.rate, self.offset_s = world, rate, offset_s
        self._ready: list[_Handle] = []
        self._late: list[_Handle] = []  # came due while it could not run
        self._is_queued = False
        self._runs = True

    def time(self) -> float:
        return self._world.now_s * self.rate + self.offset_s

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Of what nobody asked for: `Process.spawn` looks at what counts."""

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, work: Coroutine[Any, Any, Any], **_named: Any) -> asyncio.Task[Any]:  # type: ignore[override]
        return asyncio.Task(work, loop=self)

    def call_soon(self, call: Callable[..., object], *args: Any, context: Context | None = None) -> _Handle:  # type: ignore[override]
        handle = _Handle(call, args, context or copy_context())
        self.due(handle)
        return handle

    def call_later(  # type: ignore[override]
        self, delay_s: float, call: Callable[..., object], *args: Any, context: Context | None = None
    ) -> _Handle:
        return self.call_at(self.time() + delay_s, call, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when_s: float, call: Callable[..., object], *args: Any, context: Context | None = None
    ) -> _Handle:
        handle = _Handle(call, args, context or copy_context())
        self._world.push((when_s - self.offset_s) / self.rate, self, handle)
        return handle

    def due(self, handle: _Handle) -> None:
        self._ready.append(handle)
        self._queue()

    def timer(self, handle: _Handle) -> None:
        """A timer's time has come."""
        if self._runs:
            self.due(handle)
        else:
            self._late.append(handle)

    def _queue(self) -> None:
        if self._runs and not self._is_queued and self._ready:
            self._is_queued = True
            self._world.ready.append(self)

    def runs(self, runs: bool) -> None:
        self._runs = runs
        if runs:
            late, self._late = self._late, []
            self._ready += late
            self._queue()

    def step(self) -> None:
        """Everything that is to be done now, but not what comes of it."""
        self._is_queued = False
        if not self._runs:
            return
        ready, self._ready = self._ready, []
        events._set_running_loop(self)
        try:
            for handle in ready:
                handle.run()
        finally:
            events._set_running_loop(None)
        self._queue()


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

    def pause(self) -> None:
        self.paused = True
        self.loop.runs(False)

    def go_on(self) -> None:
        self.paused = False
        self.loop.runs(self.alive)

    def kill(self) -> None:
        """Not a line of it is run any more."""
        self.alive = False
        self.loop.runs(False)
        self._tasks |= asyncio.all_tasks(self.loop)  # or the garbage collector would end them

    def clean(self) -> None:
        """After the end of the world: let its tasks end, so that nothing complains."""
        self.loop.runs(True)
        for task in asyncio.all_tasks(self.loop):
            task.cancel()


class World:
    """The time, the processes, and the ways between them, by a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.is_over = False
        self.ready: list[Loop] = []
        self.processes: list[Process] = []
        self.failures: list[BaseException | None] = []
        self.cuts: set[tuple[str, str]] = set()
        self.latency_s = 0.002
        self.loss = 0.0
        self.stalls = 0.0  # how many of the messages take long
        self.late_s: dict[tuple[str, str], float] = {}  # how much longer all take on some ways
        self._queue: list[tuple[float, int, Loop | None, _Handle]] = []
        self._count = 0

    def process(self, name: str, rate: float = 1.0) -> Process:
        made = Process(self, name, rate)
        self.processes.append(made)
        return made

    def push(self, when_s: float, loop: Loop | None, handle: _Handle) -> None:
        self._count += 1
        heapq.heappush(self._queue, (max(when_s, self.now_s) + _TICK_S, self._count, loop, handle))

    def at(self, when_s: float, call: Callable[[], object]) -> None:
        """The world itself does something, whatever the processes do."""
        self.push(when_s, None, _Handle(call, (), None))

    def after(self, delay_s: float, call: Callable[[], object]) -> None:
        self.at(self.now_s + delay_s, call)

    def run(self, until_s: float) -> None:
        queue, ready = self._queue, self.ready
        while not self.failures:
            if ready:
                ready.pop(self.rng.randrange(len(ready)) if len(ready) > 1 else 0).step()
                continue
            if not queue or queue[0][0] > until_s:
                self.now_s = max(self.now_s, until_s)
                return
            when_s, _, loop, handle = heapq.heappop(queue)
            if handle.is_cancelled:
                continue
            self.now_s = when_s
            if loop is None:
                handle.run()
            else:
                loop.timer(handle)
        failure = self.failures[0]
        assert failure is not None
        raise failure

    # -- messages

    def latency(self) -> float:
        late_s = self.rng.choice(_STALLS_S) if self.stalls and self.rng.random() < self.stalls else 0.0
        return late_s + self.latency_s * self.rng.uniform(0.2, 3.0)

    def carry(self, sender: str, receiver: str, call: Callable[[], object]) -> None:
        """`call` happens at `receiver` a little later, or never."""
        way = sender, receiver
        if way not in self.cuts and (not self.loss or self.rng.random() >= self.loss):
            self.after(self.latency() + self.late_s.get(way, 0.0), lambda: way in self.cuts or call())

    def send(self, sender: str, receiver: Process, call: Callable[[], object]) -> None:
        """`call` runs in the process `receiver` a little later, or never."""
        self.carry(sender, receiver.name, lambda: receiver.alive and receiver.loop.call_soon(call))

    async def ask(self, sender: Process, receiver: Process, question: Callable[[], T], timeout_s: float) -> T:
        """What `receiver` answers. TimeoutError if nothing comes back."""
        answer: asyncio.Future[T] = sender.loop.create_future()

        def arrived() -> None:
            found = question()
            self.send(receiver.name, sender, lambda: answer.done() or answer.set_result(found))  # type: ignore[func-returns-value]

        self.send(sender.name, receiver, arrived)
        async with asyncio.timeout(timeout_s):
            return await answer

    def close(self) -> None:
        self.is_over = True
        self.failures.clear()
        self._queue = [entry for entry in self._queue if entry[2] is not None]
        heapq.heapify(self._queue)
        for _ in range(_CANCELS):
            for one in self.processes:
                one.clean()
            self.run(self.now_s + 10.0)
