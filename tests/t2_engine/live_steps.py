"""Another actor between any two steps of the engine: what it does to a database's live files, call by call."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

_OF_A_PATH = ("open", "unlink", "rename")
_OF_A_FD = ("pwrite", "ftruncate", "fsync", "close")


class LiveSteps:
    """Counts the system calls of this process on files whose path begins with `path`: opens, locks, writes,
    truncations, fsyncs, closes, removals. Before call number `at`, in the thread that makes it, `act` is called."""

    def __init__(self, patch: pytest.MonkeyPatch, path: str, at: int, act: Callable[[], object]) -> None:
        self._path, self._at, self._act = path, at, act
        self._lock = threading.RLock()
        self._enabled = False
        self.count = 0
        self.trace: list[str] = []
        for name in (*_OF_A_PATH, *_OF_A_FD):
            patch.setattr(os, name, self._stepping(name, getattr(os, name)))
        patch.setattr(fcntl, "fcntl", self._stepping("fcntl", fcntl.fcntl))

    def __enter__(self) -> LiveSteps:
        self._enabled = True
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._enabled = False

    def _stepping(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **named: Any) -> Any:
            if self._enabled and self.count < self._at + 3 and args and self._is_live(args[0]):
                self._step(f"{name} {args[0]} {args[1] if name == 'unlink' else ''}")
            return call(*args, **named)

        return step

    def _is_live(self, what: object) -> bool:
        try:
            path = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else os.fspath(what)  # type: ignore[call-overload]
        except (OSError, TypeError):
            return False
        return str(path).startswith(self._path)

    def _step(self, what: str) -> None:
        with self._lock:
            if not self._enabled:
                return
            self.count += 1
            self.trace.append(what)
            if self.count == self._at:
                self._act()
