"""The first process of a container: it starts the daemon as its child and does what the kernel asks of PID 1.

Processes whose parents have ended become children of PID 1, which has to wait for them, or they stay as zombies. The
daemon waits for those only that it started. So where `litefs mount` is PID 1 it forks first: the child goes on as the
daemon, the parent does nothing but this:

- SIGTERM and SIGINT are handed on to the daemon, which hands them on to the command of `exec`
- whatever ends is waited for
- when the daemon ends, so does this process, with its status, and the kernel kills what is left. If a signal has killed
  the daemon, what it started (the mount guard, the command of `exec`) gets `GRACE_S` to end by itself.
"""

from __future__ import annotations

import os
import signal
import time

GRACE_S = 5.0
_LOOK_S = 0.05
_FORWARDED = frozenset({signal.SIGTERM, signal.SIGINT})


def run_as_child() -> None:
    """Returns in the child, at once if this is not PID 1. To be called before there are threads."""
    if os.getpid() != 1:
        return
    waited_for = _FORWARDED | {signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, waited_for)
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    status = None
    while status is None:
        signum = signal.sigwait(waited_for)
        if signum in _FORWARDED:
            os.kill(child, signum)
        status = _reap().get(child)
    if os.WIFSIGNALED(status):
        _wait_for_the_rest()
    os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


def _reap() -> dict[int, int]:
    """Wait for all that have ended: their statuses."""
    found: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if not pid:
            return found
        found[pid] = status


def _wait_for_the_rest() -> None:
    until_s = time.monotonic() + GRACE_S
    while time.monotonic() < until_s:
        try:
            if not os.waitpid(-1, os.WNOHANG)[0]:
                time.sleep(_LOOK_S)
        except ChildProcessError:
            return
