"""`lease.on-promote` and `lease.on-demote`: commands that are run when the role of the node has changed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from typing import Protocol

from pylitefs.cluster.tasks import supervised
from pylitefs.config import ExecCommand

log = logging.getLogger("litefs")


class Settings(Protocol):
    """What is needed of the `lease` section."""

    @property
    def on_promote(self) -> tuple[ExecCommand, ...]: ...
    @property
    def on_demote(self) -> tuple[ExecCommand, ...]: ...


class RoleHooks:
    """Runs the commands of one change after the other, beside everything else; a change waits for the one before. They
    get LITEFS_ROLE, LITEFS_EPOCH, LITEFS_NODE_ID and LITEFS_PRIMARY_URL. The node goes on whatever they return."""

    def __init__(self, settings: Settings, node_id: str) -> None:
        self._settings = settings
        self._node_id = node_id
        self._queue: asyncio.Queue[tuple[tuple[ExecCommand, ...], dict[str, str]]] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    def changed(self, role: str, epoch: int, primary_url: str) -> None:
        """This node has become the "primary" or a "replica"."""
        commands = self._settings.on_promote if role == "primary" else self._settings.on_demote
        if not commands:
            return
        environment = {
            "LITEFS_ROLE": role,
            "LITEFS_EPOCH": str(epoch),
            "LITEFS_NODE_ID": self._node_id,
            "LITEFS_PRIMARY_URL": primary_url,
        }
        self._queue.put_nowait((commands, environment))
        if self._task is None:
            self._task = asyncio.create_task(supervised("lease.on-promote and on-demote", self._run))

    async def close(self) -> None:
        """End the command that runs; what waits is not run."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            commands, environment = await self._queue.get()
            for command in commands:
                await self._run_one(command, environment)

    async def _run_one(self, command: ExecCommand, environment: dict[str, str]) -> None:
        log.info("running", extra={"command": command.cmd, "role": environment["LITEFS_ROLE"]})
        try:
            child = await asyncio.create_subprocess_exec(
                *command.argv, env={**os.environ, **environment}, stdin=asyncio.subprocess.DEVNULL
            )
        except (OSError, ValueError) as error:
            log.error("cannot run %s: %s", command.cmd, error)
            return
        try:
            status = await child.wait()
        except asyncio.CancelledError:
            with contextlib.suppress(ProcessLookupError):
                child.terminate()
            raise
        if status:
            log.error("%s ended with status %d", command.cmd, status)
