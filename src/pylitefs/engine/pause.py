"""A pause of all writes, before the lease is passed on: opens wait for its end."""

from __future__ import annotations

import threading
from collections.abc import Callable

from pylitefs.engine.continuation import guarded


class Pause:
    """Any thread. `on`: whether there is one."""

    def __init__(self) -> None:
        self.on = False
        self._held: list[Callable[[], object]] = []
        self._lock = threading.Lock()

    def begin(self) -> None:
        with self._lock:
            self.on = True

    def hold(self, again: Callable[[], object]) -> bool:
        """Call `again` at the end of the pause. False, and it is not called, if there is none."""
        with self._lock:
            if self.on:
                self._held.append(again)
            return self.on

    def end(self) -> None:
        with self._lock:
            self.on = False
            held, self._held = self._held, []
        for again in held:
            guarded(again)
