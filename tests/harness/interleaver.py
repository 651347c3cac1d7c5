"""Systematic interleaving: another actor does something between any two steps of the code under test.

A *step* is one line of Python in the modules that are watched, on the threads that are followed. The actor's actions
are plain calls (publish a commit, drop a database, renew a lease, demote, checkpoint). They run on the thread that is
followed, right before a step, so a schedule is nothing but step numbers and every run of it is the same:

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


class Steps:
    """One run of a scenario by one schedule. `schedule`: before which steps the actions happen, in ascending order."""

    def __init__(self, modules: Iterable[ModuleType], schedule: Sequence[int]) -> None:
        self._files = {module.__file__ for module in modules}
        self._schedule = list(schedule)
        self._actions: list[Action] = []
        self._next = 0  # of the actions
        self._lock = threading.RLock()
        self._error: BaseException | None = None
        self.count = 0  # steps taken so far
        self.places: list[str] = []  # where the actions happened

    # -- what a scenario says --------------------------------------------------------------------------------

    def actions(self, *actions: Action) -> None:
        """What happens at the steps of the schedule, one action each, in this order. An action without a step in the
        schedule happens with the one before it."""
        self._actions = list(actions)
        self._schedule += [self._schedule[-1] if self._schedule else 0] * (len(actions) - len(self._schedule))

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
    most_steps: int = 5000,
) -> int:
    """Run a scenario with its actions at every step once, then `pairs` times with each of its (first) `actions` at a
    step of its own. Returns the number of steps. AssertionError with the schedule and its places, if one fails."""
    steps = 0
    while _run(scenario, modules, [steps]).was_in_time:
        steps += 1
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
