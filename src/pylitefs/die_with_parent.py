"""Becomes another program, which gets SIGTERM should its parent die.

    python -I -S die_with_parent.py PARENT_PID CMD ARG...

A command that litefs supervises must not outlive a killed litefs: its SQLite handles would go on writing to files that
nobody captures any more. The kernel's means is prctl(PR_SET_PDEATHSIG), which is kept across exec. It is set here, in a
process that has exec'ed already, because code between fork and exec of a process with threads may deadlock.

The kernel sends the signal when the *thread* that started us ends: start it from one that lives as long as the process.
Only the standard library; imported by nobody.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> int:
    parent_pid, command = int(arguments[0]), arguments[1:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the line above
        return 128 + signal.SIGTERM
    for ignored_by_python in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored_by_python, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"ERROR: cannot run {command[0]}: {error.strerror}", file=sys.stderr)
        return 127 if isinstance(error, FileNotFoundError) else 126


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
