"""Running the commands of `exec`: all but the last one by one, the last in the background.

As LiteFS does it: the environment is ours, output goes where ours goes, standard input is empty; a command that fails
ends the start; when the last one ends, litefs ends with its status; SIGINT and SIGTERM are handed on to whatever runs
and then waited for, without a limit. Other than there, no command outlives a litefs that is killed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from pylitefs.config_values import ExecCommand
from pylitefs.errors import LitefsError

log = logging.getLogger(__name__)

_WRAPPER = str(Path(__file__).with_name("die_with_parent.py"))
_NO_STATUS = 1  # of a command that a signal killed


class ExecFailed(LitefsError):
    """A command could not be started or failed before the last one was reached."""


def dying_with_us(argv: Sequence[str]) -> list[str]:
    """A command line for `argv` that gets SIGTERM should this process die. Raises ExecFailed if there is no such
    program. To be started by a thread that lives as long as the process."""
    program = shutil.which(argv[0])
    if program is None:
        raise ExecFailed(f"cannot run {argv[0]}: not found, or not executable: check exec in litefs.yml")
    return [sys.executable, "-I", "-S", _WRAPPER, str(os.getpid()), *argv]


class Supervisor:
    """The commands of one run. For the event loop of the main thread."""

    def __init__(self, commands: Sequence[ExecCommand], is_candidate: bool) -> None:
        self._foreground = list(commands[:-1])
        self._last = commands[-1] if commands else None
        self._is_candidate = is_candidate
        self._process: asyncio.subprocess.Process | None = None
        self._in_background = False
        self._stopping = False

    @property
    def has_background(self) -> bool:
        """The last command has been started; `wait` tells how it ends."""
        return self._in_background

    async def run_all(self) -> None:
        """Run all commands but the last and start that one. Raises ExecFailed. Returns early after `stop`."""
        for command in self._foreground:
            if self._wanted(command):
                await self._start(command)
                status = await self._finish()
                if status != 0 and not self._stopping:
                    raise ExecFailed(f"command failed with status {status}: {command.cmd}")
        if self._last is not None and self._wanted(self._last):
            await self._start(self._last)
            self._in_background = True

    async def wait(self) -> int:
        """The exit status of the background command, once it has ended; 1 if a signal killed it. May be called, and
        cancelled, any number of times."""
        if not self._in_background:
            raise ValueError("no command runs in the background")
        return await self._finish()

    def forward(self, signum: int) -> None:
        """Hand a signal on to the command that runs now, if any; do not wait."""
        if self._process is not None and self._process.returncode is None:
            try:
                self._process.send_signal(signum)
            except ProcessLookupError:
                pass

    async def stop(self, signum: int = signal.SIGTERM) -> int | None:
        """Start nothing more, hand `signum` on and wait. The status of the command that ran, None if there was none."""
        self._stopping = True
        if self._process is None:
            return None
        if self._process.returncode is None:
            log.info("waiting for the command to end", extra={"pid": self._process.pid})
            self.forward(signum)
        return await self._finish()

    def _wanted(self, command: ExecCommand) -> bool:
        if self._stopping:
            return False
        if command.if_candidate and not self._is_candidate:
            log.info("command skipped: this node is not a candidate", extra={"command": command.cmd})
            return False
        return True

    async def _start(self, command: ExecCommand) -> None:
        argv = dying_with_us(command.argv)
        log.info("starting command", extra={"command": command.cmd})
        try:
            self._process = await asyncio.create_subprocess_exec(*argv, stdin=asyncio.subprocess.DEVNULL)
        except OSError as error:
            raise ExecFailed(f"cannot run {command.cmd}: {(error.strerror or str(error)).lower()}") from None

    async def _finish(self) -> int:
        assert self._process is not None
        status = await self._process.wait()
        return status if status >= 0 else _NO_STATUS
