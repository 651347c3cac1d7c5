"""Liveness: after the last write, with nobody asking, all nodes are in the same state within `LIVE_S`.

What is looked at must not be noticed by a node: what lies in its data directory (`silent.py`), or, in the simulations,
its memory. Asking a node for its position makes it look, and what it had overlooked is found: the question hides the
fault. Nor may anything be written in between: the next commit brings the one before with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

LIVE_S = 1.0
_TURN_S = 0.01


async def silence(states: Callable[[], Mapping[str, object]]) -> float:
    """Until all nodes are in one state, or AssertionError; how many seconds that took. They are counted in turns of the
    event loop, so that a machine that has no time for it gives it more."""
    for turn in range(round(LIVE_S / _TURN_S)):
        await asyncio.sleep(_TURN_S)
        found = states()
        if all(state == next(iter(found.values())) for state in found.values()):
            return turn * _TURN_S
    raise AssertionError(f"SILENT not the same {LIVE_S:g} s after the last write, with nobody asking: {states()}")
