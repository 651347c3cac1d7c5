"""Calls that block, and tasks, from the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

T = TypeVar("T")


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
