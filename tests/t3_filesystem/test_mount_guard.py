"""The mount guard as a program beside a daemon that is killed."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

from pylitefs import mount_guard
from pylitefs.filesystem.cached_databases import CachedDatabases

DAEMON = """
import os, subprocess, sys
guard = subprocess.Popen([sys.executable, "-I", "-S", *sys.argv[1:2], str(os.getpid()), *sys.argv[2:]], stdin=0,
                         stdout=subprocess.PIPE, start_new_session=True)
guard.stdout.readline()
print(guard.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_daemon_that_is_killed_before_it_has_told_which_mount_is_its_own(tmp_path: Path) -> None:
    """One of its threads may wait for the mount for ever, and with it the daemon's end of the socket stays open: the
    guard does not wait there for a word, since it is what would free the thread."""
    ours, theirs = socket.socketpair()
    with ours, theirs:  # `ours` stays open, as in a thread that cannot end
        words = [sys.executable, "-c", DAEMON, mount_guard.__file__, str(tmp_path / "mnt"), str(tmp_path / "data")]
        daemon = subprocess.Popen(words, stdin=theirs.fileno(), stdout=subprocess.PIPE)
        assert daemon.stdout is not None
        with daemon.stdout:
            guard = os.pidfd_open(int(daemon.stdout.readline()))
        try:
            daemon.wait(30)
            assert select.select([guard], [], [], 30)[0], "the guard waits"
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(guard, signal.SIGKILL)
            os.close(guard)


def test_which_databases_are_cached_is_shared() -> None:
    """Also those from before it was shared, each once."""
    cached = CachedDatabases()
    cached.add(7)
    fd = cached.share()
    assert cached.share() == fd
    for ino in (9, 7, 8, 9):
        cached.add(ino)
    assert os.pread(fd, 100, 0) == struct.pack("=3Q", 7, 9, 8)
    assert cached.numbers() == [7, 9, 8] and 8 in cached and 6 not in cached
    cached.close()
    cached.add(6)  # of a mount that is gone
    assert 6 in cached
