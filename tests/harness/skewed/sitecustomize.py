"""For a node whose wall clock jumps while it runs: Python imports this at its start, where it is on PYTHONPATH. The
clock is the machine's and so many seconds as stand in the file that CLOCK_SKEW names, at each moment.
"""

import datetime
import os
import time

_path = os.environ["CLOCK_SKEW"]
_time_ns = time.time_ns


def _skew_s() -> float:
    try:
        with open(_path) as file:
            return float(file.read() or 0)
    except FileNotFoundError:
        return 0.0


def _skewed_ns() -> int:
    return _time_ns() + round(_skew_s() * 1e9)


class _Skewed(datetime.datetime):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> "_Skewed":
        return cls.fromtimestamp(time.time(), tz)


time.time_ns = _skewed_ns
time.time = lambda: _skewed_ns() / 1e9
datetime.datetime = _Skewed  # type: ignore[misc]
