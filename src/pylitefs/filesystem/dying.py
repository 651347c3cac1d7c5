"""Requests that may wait for long, and whose caller was killed meanwhile.

The kernel lets a killed process go only when its request is answered. It tells of signals (INTERRUPT), but also of such
as the process handles and goes on after, which must not make an fsync fail; and not of one that came before the request
was sent (io_uring, Linux 6.18). So the callers of what waits for long are looked at.
"""

from __future__ import annotations

import contextlib
import errno
import signal
import threading
import time

from pylitefs.ports import Then

_LOOK_S = 0.1
_SIGKILL = 1 << (signal.SIGKILL - 1)


class Answerable:
    """The continuation of one request, which two may call; the first counts."""

    def __init__(self, waiting: set[Answerable], pid: int, then: Then) -> None:
        self.pid = pid
        self.since_s = time.monotonic()
        self._waiting = waiting
        self._then = then
        self._lock = threading.Lock()
        self._answered = False

    def __call__(self, error: BaseException | None) -> None:
        with self._lock:
            if self._answered:
                return
            self._answered = True
        self._waiting.discard(self)
        self._then(error)


class Patience:
    """The requests that wait. Any thread."""

    def __init__(self) -> None:
        self._waiting: set[Answerable] = set()
        self._thread: threading.Thread | None = None
        self._came = threading.Event()
        self._lock = threading.Lock()

    def of(self, pid: int, then: Then) -> Then:
        """`then`, to be called when the request of this thread can be answered; it may be called once more."""
        waiting = Answerable(self._waiting, pid, then)
        if pid:
            self._waiting.add(waiting)
            if not self._came.is_set():
                self._watch()
        return waiting

    def _watch(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="fuse-patience", daemon=True)
                self._thread.start()
        self._came.set()

    def _run(self) -> None:
        while True:
            self._came.wait()
            time.sleep(_LOOK_S)
            self._came.clear()
            before_s = time.monotonic() - _LOOK_S
            with contextlib.suppress(RuntimeError):  # changed while it was copied: next time
                for waiting in list(self._waiting):
                    if waiting.since_s <= before_s and is_dying(waiting.pid):
                        waiting(InterruptedError(errno.EINTR, "the caller was killed"))
            if self._waiting:
                self._came.set()


def is_dying(tid: int) -> bool:
    """Whether a thread was killed: the kernel turns every deadly signal into SIGKILL."""
    try:
        with open(f"/proc/{tid}/status") as status:
            pending = next(line for line in status if line.startswith("SigPnd:"))
    except (OSError, StopIteration):
        return False
    return bool(int(pending.split()[1], 16) & _SIGKILL)
