"""Ends a mount whose daemon was killed: python -I -S mount_guard.py DAEMON_PID MOUNT_DIR

A process that is killed while one of its threads waits for an answer from its own mount cannot end: the thread waits
for the FUSE connection, the connection for the last descriptor of /dev/fuse, the descriptor for the thread. All that
use the mount hang with it. This little program waits beside the daemon; the kernel signals it when the daemon's main
thread dies (PR_SET_PDEATHSIG), and it aborts the connection, so that everybody gets an error and can go on.

It imports nothing of the package and little of the standard library: it runs as long as the node.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
MNT_FORCE, MNT_DETACH = 1, 2
DIED = signal.SIGUSR1


def main(daemon_pid: int, mount_dir: str) -> None:
    libc = ctypes.CDLL(None)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)  # the daemon gets these, and ends us when it is done
    signal.pthread_sigmask(signal.SIG_BLOCK, {DIED})
    libc.prctl(PR_SET_PDEATHSIG, DIED)
    if os.getppid() == daemon_pid:
        print("ready", flush=True)
        signal.sigwait({DIED})
    end(libc, mount_dir)


def end(libc: ctypes.CDLL, mount_dir: str) -> None:
    """Abort the connection of the mount, then take it away."""
    device = None
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields = line.split()
            if fields[4] == mount_dir.replace(" ", "\\040") and fields[fields.index("-") + 2] == "litefs":
                device = fields[2]
    if device is None:
        return
    try:  # for those who are not root
        with open(f"/sys/fs/fuse/connections/{device.partition(':')[2]}/abort", "w") as file:
            file.write("1")
    except OSError:
        pass
    path = os.fsencode(mount_dir)
    if libc.umount2(path, MNT_FORCE) != 0:
        libc.umount2(path, MNT_DETACH)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
