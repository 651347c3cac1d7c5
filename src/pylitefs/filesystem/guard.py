"""Starts and stops the mount guard (see `pylitefs.mount_guard`)."""

from __future__ import annotations

import os
import subprocess
import sys

from pylitefs import mount_guard
from pylitefs.errors import MountError


class MountGuard:
    """Must be started by the main thread: the kernel tells the guard when the thread that started it dies."""

    def __init__(self, mount_dir: str) -> None:
        command = [sys.executable, "-I", "-S", mount_guard.__file__, str(os.getpid()), os.path.realpath(mount_dir)]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
            )
        except OSError as error:
            raise MountError(f"cannot start the mount guard: {error.strerror}") from None
        assert self._process.stdout is not None
        self._process.stdout.readline()  # it listens now

    def stop(self) -> None:
        """After the mount was taken down in good order."""
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
