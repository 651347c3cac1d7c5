"""Waiting for something within a request: not beyond a deadline, nor when the client has gone or the node stops."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from aiohttp import web

from pylitefs.errors import LitefsError, NotPrimary, Unavailable
from pylitefs.http.errors import HttpProblem

log = logging.getLogger(__name__)
T = TypeVar("T")

LOOK_INTERVAL_S = 1.0
"""How soon it is seen that the client has gone."""
GRACE_S = 1.0
"""For what has a deadline of its own to say itself that it has passed."""


class Waiting:
    """What the requests of one node wait for. Call it on the event loop."""

    def __init__(self) -> None:
        self._stopping: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._going_on: set[asyncio.Task[Any]] = set()

    def close(self) -> None:
        """Every wait ends now, with Unavailable."""
        if not self._stopping.done():
            self._stopping.set_result(None)

    async def finish(
        self, request: web.Request, work: Coroutine[Any, Any, T], timeout_s: float, late: str, *, goes_on: bool = False
    ) -> T:
        """The result of `work`, which has a deadline of its own, `timeout_s`, and may miss it by `GRACE_S`.

        504 when it does not come in time, with the error's line or `late`. `goes_on`: the work is not cut off when the
        deadline passes, the client goes, or the node stops: half of it would be worse.
        """
        if self._stopping.done():
            work.close()
            raise Unavailable("this node is stopping")
        task = asyncio.ensure_future(work)
        self._going_on.add(task)
        task.add_done_callback(self._ended)
        clock = asyncio.get_running_loop().time
        deadline_s = clock() + timeout_s
        try:
            while not task.done():
                if self._stopping.done():
                    raise Unavailable("this node is stopping")
                if request.transport is None or request.transport.is_closing():
                    raise ConnectionResetError("the client has gone")
                if (left_s := deadline_s + GRACE_S - clock()) <= 0:
                    raise HttpProblem(504, late)
                ends: set[asyncio.Future[Any]] = {task, self._stopping}
                await asyncio.wait(ends, timeout=min(left_s, LOOK_INTERVAL_S), return_when=asyncio.FIRST_COMPLETED)
            if task.cancelled():
                raise Unavailable("this node has changed its role meanwhile: try again")
            return task.result()
        except TimeoutError:
            raise HttpProblem(504, late) from None
        except Unavailable as error:
            if task.done() and clock() >= deadline_s and not isinstance(error, NotPrimary):
                raise HttpProblem(504, str(error) or late) from None
            raise
        finally:
            if not goes_on:
                task.cancel()
            elif not task.done():
                task.add_done_callback(_tell)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._going_on.discard(task)
        if not task.cancelled():
            task.exception()  # was told to whoever waited


def _tell(task: asyncio.Task[Any]) -> None:
    """Nobody waited for it any more."""
    error = None if task.cancelled() else task.exception()
    if isinstance(error, LitefsError | TimeoutError):
        log.warning("a request failed after its client had gone: %s", error)
    elif error is not None:
        log.error("a request failed after its client had gone", exc_info=error)
