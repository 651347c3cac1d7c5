"""Starts and stops the mount guard (see `pylitefs.mount_guard`)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from pylitefs import mount_guard
from pylitefs.errors import MountError


class MountGuard:
    """Must be started by the main thread: the kernel tells the guard when the thread that started it dies."""

    def __init__(self, mount_dir: str, data_dir: str = "", *, retires: bool = False) -> None:
        """`data_dir`: the daemon's, which it holds locked; "" if there is no lock. `retires`: another node takes over
        when the daemon is killed, so nothing can be committed here then."""
        command = [sys.executable, "-I", "-S", mount_guard.__file__, str(os.getpid()), os.path.realpath(mount_dir)]
        command += [data_dir, mount_guard.RETIRE if retires else ""]
        self._channel, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = subprocess.Popen(
                    command, stdin=theirs.fileno(), stdout=subprocess.PIPE, start_new_session=True
                )
        except OSError as error:
            self._channel.close()
            raise MountError(f"cannot start the mount guard: {error.strerror}") from None
        assert self._process.stdout is not None
        self._process.stdout.readline()  # it listens now

    def hold(self, device_fd: int, cached_fd: int, mount_device: str) -> None:
        """Tell it which mount is ours, and give it a descriptor of /dev/fuse, should the daemon be killed, and the list
        of cached databases (`cached_databases`)."""
        socket.send_fds(self._channel, [mount_device.encode("ascii")], [device_fd, cached_fd])

    def stop(self) -> None:
        """After the mount was taken down in good order."""
        self._process.kill()
        self._process.wait()
        self._channel.close()
        if self._process.stdout is not None:
            self._process.stdout.close()
