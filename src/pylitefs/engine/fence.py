"""Until when this node may tell an application that its commit is there.

The end of the lease is a time of CLOCK_BOOTTIME, which goes on while the machine sleeps and while the daemon is stopped
(SIGSTOP). So it is asked by the clock, right before an answer, and not by what some other thread has noted.
"""

from __future__ import annotations

import math
import time


class Fence:
    """`until_s`: CLOCK_BOOTTIME in seconds; infinite where the role is fixed, 0.0 where this node is not the primary.
    Set and asked by any thread."""

    __slots__ = ("until_s",)

    def __init__(self, until_s: float = 0.0) -> None:
        self.until_s = until_s

    def holds(self) -> bool:
        until_s = self.until_s
        return until_s == math.inf or time.clock_gettime(time.CLOCK_BOOTTIME) < until_s
