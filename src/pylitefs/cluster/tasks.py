"""Calls that block, and tasks, from the event loop.

No task ends in silence: what runs for as long as its node does is `supervised`, what nobody waits for is `watched`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from pylitefs.errors import LitefsError

log = logging.getLogger("litefs")
T = TypeVar("T")

AGAIN_S = (0.1, 0.5, 2.0, 10.0)
"""How long something that failed for no reason that is known rests before it is begun again."""


async def in_thread(call: Callable[..., T], /, *args: Any) -> T:
    """Call it in a thread. Whoever is cancelled meanwhile leaves at once; the thread goes on."""
    return await asyncio.get_running_loop().run_in_executor(None, call, *args)


async def finished(work: Awaitable[T]) -> T:
    """To its end: whoever is cancelled meanwhile hears of that afterwards, for what it does is done, and has to be
    undone by the next who looks."""
    running = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not running.done():
        try:
            await asyncio.wait({running})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not running.cancelled():
            running.exception()
        raise cancelled
    return running.result()


async def blocking(call: Callable[..., T], /, *args: Any) -> T:
    """Call it in a thread, to its end."""
    return await finished(in_thread(call, *args))


async def cancel(task: asyncio.Task[Any] | None) -> None:
    """Cancel it, if there is one, and wait for its end, whatever that is."""
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def supervised(what: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Do `work` to its end. An exception is a defect: it is logged, and the work is begun again after a pause."""
    loop, tries = asyncio.get_running_loop(), 0
    while True:
        began_s = loop.time()
        try:
            return await work()
        except Exception:
            tries = 0 if loop.time() - began_s > 2 * AGAIN_S[-1] else tries
            pause_s = AGAIN_S[min(tries, len(AGAIN_S) - 1)]
            log.exception("a defect: %s has failed, and is begun again in %g s", what, pause_s)
        tries += 1
        await asyncio.sleep(pause_s)


def watched(task: asyncio.Task[Any]) -> None:
    """A done-callback. What such an error means is known to whoever it concerns; any other one is a defect."""
    error = None if task.cancelled() else task.exception()
    if error is not None and not isinstance(error, LitefsError | OSError):
        log.error("a defect: a task has failed", exc_info=error)
