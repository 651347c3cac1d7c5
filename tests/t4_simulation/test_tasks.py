"""What is cancelled while a thread works for it: some leave at once, some see it through."""

from __future__ import annotations

import asyncio
import threading

import pytest

from pylitefs.cluster.tasks import blocking, cancel, in_thread


async def test_a_call_that_is_seen_through() -> None:
    """However often it is cancelled; what the thread did is done when that is heard of, also if it has failed."""
    for failure in (None, OSError("no")):
        may_end, done = threading.Event(), []

        def work(failure: OSError | None = failure, may_end: threading.Event = may_end, done: list[int] = done) -> None:
            may_end.wait()
            done.append(1)
            if failure is not None:
                raise failure

        task = asyncio.ensure_future(blocking(work))
        for _ in range(3):
            await asyncio.sleep(0.01)
            task.cancel()
        await asyncio.sleep(0.01)
        assert not task.done()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert done == [1]
    with pytest.raises(OSError, match="no"):
        await blocking(work)
    assert await blocking(sum, [1, 2]) == 3


async def test_a_call_that_is_left() -> None:
    may_end = threading.Event()
    task = asyncio.ensure_future(in_thread(may_end.wait))
    await asyncio.sleep(0.01)
    await cancel(task)
    assert task.cancelled() and not may_end.is_set()
    may_end.set()
    await cancel(None)
