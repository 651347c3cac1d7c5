"""The engine's one worker thread: capture, apply, checkpoints and every other disk work of the databases.

Jobs run one after the other in the order of submission, so what only the worker touches needs no lock.
Between jobs it runs timers and watches file descriptors (inotify).

A job that takes long on one database (a transaction of gigabytes) calls `give_way` now and then: jobs and timers of
other databases are done in between, so that no application waits for another's database and none is left behind. Jobs
without a database, and those of the same one, keep their order and wait.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
log = logging.getLogger("litefs.worker")


def not_done(result: Future[Any], job: Future[Any]) -> None:
    """When a job that was to answer `result`, which cannot be cancelled, is over: whether the worker ended before."""
    if job.cancelled():
        result.set_exception(CancelledError())


class Timer:
    """A call that can be cancelled. `database`: as a job's."""

    __slots__ = ("args", "call", "cancelled", "database", "due_s")

    def __init__(self, due_s: float, call: Callable[..., object], args: tuple[Any, ...], database: str) -> None:
        self.due_s, self.call, self.args, self.database, self.cancelled = due_s, call, args, database, False

    def cancel(self) -> None:
        self.cancelled = True


_MAX_NESTING = 4
_JOBS_S = 0.01  # then timers and descriptors have their turn
_GIVE_WAY_ITEMS = 256


class Job(NamedTuple):
    """What to do, the database it is for ("" for the whole node), and what to do if that will never be."""

    run: Callable[[], None]
    database: str
    abandon: Callable[[], object] = bool


class Worker:
    def __init__(self, name: str = "engine") -> None:
        self._jobs: deque[Job] = deque()
        self._in_way: list[str] = []  # databases whose long jobs gave way, innermost last
        self._timers: list[tuple[float, int, Timer]] = []
        self._count = itertools.count()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._wake, select.POLLIN)
        self._readers: dict[int, Callable[[], object]] = {}
        self._patient = {self._wake}  # descriptors that wait for the end of long jobs
        self._asleep = False
        self._stopping = self._ended = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Finish what was submitted, then end. Timers that are not due are dropped. Who submits something later, and
        waits for it, is told that it was cancelled."""
        if self._thread.is_alive():
            self.submit(self._end)
            self._thread.join()
        self._ended = True
        self._abandon()
        with contextlib.suppress(OSError):
            os.close(self._wake)

    def _end(self) -> None:
        self._stopping = True

    @property
    def is_current(self) -> bool:
        return threading.current_thread() is self._thread

    def submit(self, call: Callable[..., T], *args: object, database: str = "") -> Future[T]:
        """Run a call on the worker; any thread. The future has its result or exception. `database`: see `give_way`."""
        future: Future[T] = Future()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(call(*args))
            except BaseException as error:
                future.set_exception(error)

        self._post(Job(job, database, future.cancel))
        return future

    def post(self, call: Callable[..., object], *args: object, database: str = "") -> None:
        """As `submit` where nobody waits: an exception is logged."""
        self._post(Job(lambda: self._guarded(call, args), database))

    def give_way(self, database: str) -> None:
        """Called from a long job of `database`: do what is to be done for other databases meanwhile."""
        if not self.is_current or len(self._in_way) >= _MAX_NESTING:
            return
        self._in_way.append(database)
        try:
            blocked = frozenset(self._in_way)
            self._run_timers(blocked)
            self._run_ready(self._poll.poll(0), self._patient)
            kept: list[Job] = []
            while self._jobs:
                job = self._jobs.popleft()
                if job.database and job.database not in blocked:
                    job.run()
                else:
                    kept.append(job)
                    # What was submitted later for this database must not overtake it; a job of the node stops all.
                    if not job.database:
                        break
            self._jobs.extendleft(reversed(kept))
        finally:
            self._in_way.pop()

    def is_in_way(self, database: str) -> bool:
        """Whether a long job of this database is under way, and has given way to the caller's."""
        return database in self._in_way

    def giving_way(self, database: str, items: Iterable[T]) -> Iterator[T]:
        """`items` as they are; between stretches of a long job of `database` others get their turn."""
        for number, item in enumerate(items, 1):
            yield item
            if number % _GIVE_WAY_ITEMS == 0:
                self.give_way(database)

    def _abandon(self) -> None:
        while self._jobs:
            with contextlib.suppress(IndexError):  # another thread has come here too
                self._jobs.popleft().abandon()

    def _post(self, job: Job) -> None:
        self._jobs.append(job)
        if self._ended:
            self._abandon()
        if self._asleep:
            with contextlib.suppress(OSError):
                os.eventfd_write(self._wake, 1)

    def call_later(self, delay_s: float, call: Callable[..., object], *args: object, database: str = "") -> Timer:
        """Run a call on the worker after a time. From the worker thread, or before it was started. `database`: see
        `give_way`."""
        timer = Timer(time.monotonic() + delay_s, call, args, database)
        heapq.heappush(self._timers, (timer.due_s, next(self._count), timer))
        return timer

    def watch(self, fd: int, ready: Callable[[], object], *, in_long_jobs: bool = False) -> None:
        """Call `ready` on the worker whenever `fd` is readable. `in_long_jobs`: also while one gives way; then it must
        ask `is_in_way`."""
        self._readers[fd] = ready
        (self._patient.discard if in_long_jobs else self._patient.add)(fd)
        self._poll.register(fd, select.POLLIN)

    def unwatch(self, fd: int) -> None:
        if self._readers.pop(fd, None) is not None:
            self._poll.unregister(fd)

    # -- the thread ------------------------------------------------------------------------------------------

    def _guarded(self, call: Callable[..., object], args: tuple[Any, ...]) -> None:
        try:
            call(*args)
        except Exception:
            log.exception("a background job failed: %s", getattr(call, "__qualname__", call))

    def _run(self) -> None:
        while not (self._stopping and not self._jobs):
            self._run_jobs()
            self._run_timers()
            self._wait()

    def _run_jobs(self) -> None:
        """Those that are here now, for a while: jobs that submit themselves again must not keep timers and descriptors
        away."""
        until_s = time.monotonic() + _JOBS_S
        for _ in range(len(self._jobs)):
            if not self._jobs or time.monotonic() > until_s:  # they were done by one that gave way, or take long
                break
            self._jobs.popleft().run()

    def _run_timers(self, blocked: frozenset[str] | None = None) -> None:
        """Those that are due now. What they ask for again waits for the jobs: an application may wait for one, and what
        is looked at need not come to rest before it has gone on. `blocked`: only those of other databases."""
        now_s = time.monotonic()
        kept = []
        while self._timers and self._timers[0][0] <= now_s:
            item = heapq.heappop(self._timers)
            timer = item[2]
            if blocked is not None and (not timer.database or timer.database in blocked):
                kept.append(item)
            elif not timer.cancelled:
                self._guarded(timer.call, timer.args)
        for item in kept:
            heapq.heappush(self._timers, item)

    def _wait(self) -> None:
        self._asleep = True
        if self._jobs or self._stopping:
            timeout_ms = 0.0
        elif self._timers:
            timeout_ms = max(0.0, (self._timers[0][0] - time.monotonic()) * 1000)
        else:
            timeout_ms = -1.0
        if 0.0 < timeout_ms < 1.0 and max(self._readers, default=self._wake) < 1024:
            # poll(2) knows whole milliseconds only
            ready, _, _ = select.select([self._wake, *self._readers], [], [], timeout_ms / 1000)
            events = [(fd, select.POLLIN) for fd in ready]
        else:
            events = self._poll.poll(timeout_ms)
        self._asleep = False
        self._run_ready(events, set())

    def _run_ready(self, events: list[tuple[int, int]], later: set[int]) -> None:
        for fd, _ in events:
            if fd in later:
                continue
            if fd == self._wake:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
            elif fd in self._readers:
                self._guarded(self._readers[fd], ())
