"""How a request that waits is continued: whatever goes wrong on the way, it is answered and the log says why."""

from __future__ import annotations

import logging
from collections.abc import Callable

from pylitefs.ports import Then

log = logging.getLogger("litefs.engine")


def proceed(then: Then, error: BaseException | None) -> None:
    """Continue a request. If that raises, `then` is called once more, with what it raised: a request that is never
    answered hangs for ever, and of two answers the kernel ignores the second. Raises nothing."""
    try:
        then(error)
    except Exception as raised:
        log.exception("a request could not be continued")
        if error is None:
            guarded(then, raised)


def finish(then: Then, work: Callable[[], object]) -> None:
    """Do `work`, then continue a request with how it went."""
    error: BaseException | None = None
    try:
        work()
    except BaseException as caught:
        error = caught
    proceed(then, error)


def guarded(call: Callable[..., object], *args: object) -> None:
    """Call it. What it raises is logged, and ends nothing."""
    try:
        call(*args)
    except Exception:
        log.exception("%s failed", getattr(call, "__qualname__", call))
