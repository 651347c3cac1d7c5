"""Systematic interleaving: another actor does something between any two steps of the code under test.

A *step* is one line of Python in the modules that are watched, on the threads that are followed. The actor's actions
are plain calls (publish a commit, drop a database, renew a lease, demote, checkpoint). They run on the thread that is
followed (or see `aside`), right before a step, so a schedule is nothing but step numbers, and can be run again:

    def scenario(steps: Steps) -> None:
        world = ...                                   # what was there before
        steps.actions(write_frames, publish)          # happen in this order, at the steps of the schedule
        with steps.on_worker(node.store.worker):      # or: with steps.here():
            node.store.worker.submit(node.store.capture.wake, world.database).result()
        steps.finish()                                # those that are still to come happen now
        world.check()                                 # raises AssertionError

    sweep(scenario, [capture, wal_capture, wal_view])

`sweep` runs the scenario with all actions before step 0, before step 1, ... until the code has fewer steps than that
(every point once), then with random combinations of points (by seed). A failure tells the schedule and the places in
the source where the actions happened. Nothing in the product knows of this: it is done with `sys.settrace`, which is
blind while an action runs. Coroutines are followed too, also those that had begun before.
"""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any

from pylitefs.engine.worker import Worker

Action = Callable[[], object]

_MOMENT_S = 0.03
_LIMIT_S = 30.0


class Steps:
    """One run of a scenario by one schedule. `schedule`: before which steps the actions happen, in ascending order."""

    def __init__(self, modules: Iterable[ModuleType], schedule: Sequence[int]) -> None:
        self._files = {module.__file__ for module in modules}
        self._schedule = list(schedule)
        self._actions: list[Action] = []
        self._next = 0  # of the actions
        self._lock = threading.RLock()
        self._threads: list[threading.Thread] = []
        self._error: BaseException | None = None
        self.count = 0  # steps taken so far
        self.places: list[str] = []  # where the actions happened

    # -- what a scenario says --------------------------------------------------------------------------------

    def actions(self, *actions: Action) -> None:
        """What happens at the steps of the schedule, one action each, in this order. An action without a step in the
        schedule happens with the one before it."""
        self._actions = list(actions)
        self._schedule += [self._schedule[-1] if self._schedule else 0] * (len(actions) - len(self._schedule))

    def aside(self, action: Action) -> Action:
        """The action, in a thread of its own: for actors that take locks, which the followed thread may hold. It has a
        moment for it; if it has to wait, the code under test goes on, and `finish` waits for it."""

        def begin() -> None:
            thread = threading.Thread(target=self._guarded, args=(action,), daemon=True)
            self._threads.append(thread)
            thread.start()
            thread.join(_MOMENT_S)

        return begin

    @contextmanager
    def here(self) -> Iterator[None]:
        """Follow the calling thread."""
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            yield
        finally:
            sys.settrace(before)

    @contextmanager
    def on_worker(self, worker: Worker) -> Iterator[None]:
        """Follow the engine's worker: its jobs, timers and what it watches."""
        worker.submit(sys.settrace, self._trace).result()
        try:
            yield
        finally:
            worker.submit(sys.settrace, None).result()

    @contextmanager
    def in_new_threads(self) -> Iterator[None]:
        """Follow threads that are started meanwhile."""
        threading.settrace(self._trace)
        try:
            yield
        finally:
            threading.settrace(None)  # type: ignore[arg-type]

    def finish(self) -> None:
        """What has not happened yet happens now. Raises what an action raised."""
        with self._lock:
            while self._next < len(self._actions):
                self._act("the end")
        for thread in self._threads:
            thread.join(_LIMIT_S)
            assert not thread.is_alive(), "an action does not come to its end"
        with self._lock:
            if self._error is not None:
                raise self._error

    @property
    def was_in_time(self) -> bool:
        """Whether the first action happened between two steps."""
        return bool(self.places) and self.places[0] != "the end"

    # -- following -------------------------------------------------------------------------------------------

    def _trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._line if frame.f_code.co_filename in self._files else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            with self._lock:
                step, self.count = self.count, self.count + 1
                while self._next < len(self._actions) and self._schedule[self._next] <= step:
                    code = frame.f_code
                    self._act(f"{os.path.basename(code.co_filename)}:{frame.f_lineno} ({code.co_qualname})")
        return self._line

    def _act(self, place: str) -> None:
        action, self._next = self._actions[self._next], self._next + 1
        self.places.append(place)
        self._guarded(action)

    def _guarded(self, action: Action) -> None:
        try:
            action()
        except BaseException as error:
            self._error = self._error or error


Scenario = Callable[[Steps], None]


def sweep(
    scenario: Scenario,
    modules: Sequence[ModuleType],
    *,
    pairs: int = 0,
    actions: int = 2,
    seed: int = 0,
    stride: int = 1,
    most_steps: int = 5000,
) -> int:
    """Run a scenario with its actions at every step once (every `stride`th, where a run is slow: from another one at
    each seed), then `pairs` times with each of its (first) `actions` at a step of its own. Returns the number of steps.
    An exception of the scenario is raised with a note of the schedule and its places."""
    steps = seed % stride
    while _run(scenario, modules, [steps]).was_in_time:
        steps += stride
        assert steps <= most_steps, "the code under test does not come to an end"
    assert steps, "the code under test took no step in these modules"
    chance = random.Random(seed)
    for _ in range(pairs):
        _run(scenario, modules, sorted(chance.randrange(steps + 1) for _ in range(actions)))
    return steps


def _run(scenario: Scenario, modules: Sequence[ModuleType], schedule: Sequence[int]) -> Steps:
    steps = Steps(modules, schedule)
    try:
        scenario(steps)
    except BaseException as error:
        error.add_note(f"schedule {list(schedule)}: actions happened before {', '.join(steps.places) or 'nothing'}")
        raise
    return steps
