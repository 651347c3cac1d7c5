"""Opens and closes files of our own mount, in a thread of its own.

The kernel holds the lock of the mount's root directory while an application's unlink, create or rename waits for
us. Whoever resolves a name of the mount then waits too. So the worker, for which such requests wait, never opens a
file there: it asks this thread, and goes on; nobody waits for this thread but its own callbacks.
Closing is done here as well, because close(2) of a FUSE file may send a request.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence

from pylitefs.engine.continuation import guarded

log = logging.getLogger("litefs.engine")

Opened = Callable[[list[int] | None], object]


class Opener:
    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="opener", daemon=True)
        self._started = False

    def start(self) -> None:
        self._started = True
        self._thread.start()

    def stop(self) -> None:
        if self._started:
            self._queue.put(None)
            self._thread.join(timeout=5)

    def open(self, paths: Sequence[str], flags: int, opened: Opened) -> None:
        """Open all `paths`; `opened` gets the descriptors, in this thread, or None if one of them cannot be opened."""
        self._queue.put(lambda: opened(self._open_all(paths, flags)))

    def close(self, fds: Sequence[int]) -> None:
        self._queue.put(lambda: self._close_all(fds))

    def do(self, job: Callable[[], object]) -> None:
        """Do some other small disk work aside."""
        self._queue.put(job)

    @staticmethod
    def _close_all(fds: Sequence[int]) -> None:
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)

    def _open_all(self, paths: Sequence[str], flags: int) -> list[int] | None:
        fds: list[int] = []
        try:
            for path in paths:
                fds.append(os.open(path, flags | os.O_CLOEXEC))
        except Exception as error:
            self._close_all(fds)
            if not isinstance(error, OSError):
                log.exception("%s cannot be opened", paths)
            return None
        return fds

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            guarded(job)
