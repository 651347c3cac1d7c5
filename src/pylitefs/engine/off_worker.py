"""A lock whose holders wait for the worker, and that the worker therefore must not wait for."""

from __future__ import annotations

import threading

from pylitefs.engine.worker import Worker


class OffWorkerLock:
    """Reentrant; a context manager. RuntimeError on the worker, where it could be a deadlock."""

    def __init__(self, worker: Worker) -> None:
        self._worker, self._lock = worker, threading.RLock()

    def __enter__(self) -> None:
        if self._worker.is_current:
            raise RuntimeError("the worker must not wait for a change of role, which waits for the worker")
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()
