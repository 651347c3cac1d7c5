"""Requests that may wait for long, and whose caller was killed meanwhile.

The kernel lets a killed process go only when its request is answered. It tells of signals (INTERRUPT), but also of such
as the process handles and goes on after, which must not make an fsync fail; and not of one that came before the request
was sent (io_uring, Linux 6.18). So the callers of what waits for long are looked at.

Only waiting for other nodes is given up (`PatientThen.waits`): what is under way on this node has to come to its end,
because others may go on from what it leaves as soon as the caller is gone.

A caller in another PID namespace (another container of a pod) cannot be seen: its id is 0. There INTERRUPT has to do:
nobody can tell whether the signal was a deadly one, so the request may wait for `UNSEEN_S` more, and fails then.
"""

from __future__ import annotations

import errno
import signal
import threading
import time
from collections import deque
from collections.abc import Callable

from pylitefs.ports import Then

UNSEEN_S = 5.0
_LOOK_S = 0.1
_SIGKILL = 1 << (signal.SIGKILL - 1)
_EARLY = 64
_FLAGS, _EXIT_CODE = 9 - 3, 52 - 3
_PF_EXITING = 0x4  # include/linux/sched.h
_BY_SIGNAL = 0x7F  # as of wait(2)


class Answerable:
    """The continuation of request number `unique` of thread `pid` (0: it cannot be seen), which two may call; the first
    counts. Any thread. Implements `PatientThen`."""

    def __init__(self, patience: Patience, pid: int, unique: int, then: Then) -> None:
        self._patience = patience
        self.pid, self.unique = pid, unique
        self.answered = False
        self.until_s: float | None = None  # monotonic; when a caller that cannot be seen is given up
        self._then = then
        self._lock = threading.Lock()

    def __call__(self, error: BaseException | None) -> None:
        with self._lock:
            if self.answered:
                return
            self.answered = True
        self._then(error)

    def waits(self) -> None:
        self._patience.watch(self)


class Patience:
    """The requests that wait. Any thread."""

    def __init__(self, log: Callable[[str], None] = lambda line: None) -> None:
        self._log = log
        self._early: deque[int] = deque(maxlen=_EARLY)  # requests that were interrupted and did not wait yet
        self._waiting: list[Answerable] = []
        self._lock = threading.Lock()
        self._came = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, request: Answerable) -> None:
        """Answer it as soon as its caller was killed, if nobody else has done so until then."""
        with self._lock:
            if request.answered or self._stopping.is_set():
                return
            if request.unique in self._early:
                self._is_interrupted(request)
            self._waiting.append(request)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="fuse-patience", daemon=True)
                self._thread.start()
        self._came.set()

    def interrupted(self, unique: int) -> None:
        """The kernel says that a signal came for the caller of this request. Of no concern where one can look."""
        with self._lock:
            self._early.append(unique)
            for request in self._waiting:
                if request.unique == unique:
                    self._is_interrupted(request)

    @staticmethod
    def _is_interrupted(request: Answerable) -> None:
        if not request.pid and request.until_s is None:
            request.until_s = time.monotonic() + UNSEEN_S

    def stop(self) -> None:
        with self._lock:
            self._stopping.set()
        self._came.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            self._came.wait()
            if self._stopping.wait(_LOOK_S):
                return
            with self._lock:
                self._waiting = [request for request in self._waiting if not request.answered]
                if not self._waiting and not self._stopping.is_set():
                    self._came.clear()
                waiting = list(self._waiting)
            for request in waiting:
                try:
                    if is_dying(request.pid) if request.pid else _is_over(request.until_s):
                        request(InterruptedError(errno.EINTR, "the caller was killed"))
                except Exception as error:  # the others are looked at all the same
                    self._log(f"a request whose caller was killed could not be answered: {error!r}")


def _is_over(until_s: float | None) -> bool:
    return until_s is not None and time.monotonic() >= until_s


def is_dying(tid: int) -> bool:
    """Whether a thread was killed: the kernel turns every deadly signal into SIGKILL. One that is at its end already
    closes its files; see proc(5) for "flags" and "exit_code" of /proc/TID/stat."""
    try:
        with open(f"/proc/{tid}/status") as status:
            pending = next((line.split()[1] for line in status if line.startswith("SigPnd:")), "0")
        with open(f"/proc/{tid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()  # from the third on
        exits = bool(int(fields[_FLAGS]) & _PF_EXITING)
        return bool(int(pending, 16) & _SIGKILL) or (exits and bool(int(fields[_EXIT_CODE]) & _BY_SIGNAL))
    except (OSError, ValueError, IndexError):
        return False
