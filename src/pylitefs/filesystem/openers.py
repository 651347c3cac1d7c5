"""What /proc tells of those who use lock files. It asks nothing of the mount."""

from __future__ import annotations

import os

_HALT_BYTE = "72"


def is_open_anywhere(name: str, ino: int) -> bool:
    """Whether any process has a lock file of this name open, in whatever directory: another mount namespace may show
    ours elsewhere. Of processes that do not let us see their files it counts whether anybody has locked byte 72; where
    /proc does not list all processes nobody can tell, which counts as open. Processes of another PID namespace, that
    is of another container, are not to be seen here at all.

    Used at FLUSH, when the descriptor that is being closed is no longer in its process's table, but holds its lock yet.
    """
    end = f"/{name}"
    if is_proc_filtered():
        return True
    all_seen = True
    for process in os.listdir("/proc"):
        if process.isdecimal():
            try:
                for number in os.listdir(f"/proc/{process}/fd"):
                    if _target(f"/proc/{process}/fd/{number}").endswith(end):
                        return True
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended
            except OSError:
                all_seen = False
    return not all_seen and _is_locked(ino)


def is_proc_filtered(mountinfo: str = "/proc/self/mountinfo") -> bool:
    """Whether /proc is mounted so that other users' processes are not listed (`hidepid`, see proc(5)), and concerns
    us."""
    if os.geteuid() == 0:
        return False
    with open(mountinfo, errors="surrogateescape") as file:
        options = [line.split()[-1].split(",") for line in file if line.split()[4] == "/proc"]
    hides = {option.partition("=")[2] for option in (options[-1] if options else []) if option.startswith("hidepid=")}
    return bool(hides & {"2", "4", "invisible", "ptraceable"})


def is_interrupted(pid: int) -> bool:
    """Whether a signal waits for this thread that would end its wait. Through io_uring the kernel does not tell of one
    that came before we were handed the request (Linux 6.18); of one that comes later it does, by INTERRUPT."""
    pending = blocked = 0
    try:
        with open(f"/proc/{pid}/status") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key in ("SigPnd", "ShdPnd"):
                    pending |= int(value, 16)
                elif key in ("SigBlk", "SigIgn"):
                    blocked |= int(value, 16)
    except (OSError, ValueError):
        return False
    return pending & ~blocked != 0


def _target(link: str) -> str:
    try:
        return os.readlink(link)
    except FileNotFoundError:
        return ""


def _is_locked(ino: int) -> bool:
    """Whether there is such a lock on any file with this inode number: see proc_locks(5)."""
    with open("/proc/locks") as file:
        return any(line.split()[-3].endswith(f":{ino}") and line.split()[-2] == _HALT_BYTE for line in file)
