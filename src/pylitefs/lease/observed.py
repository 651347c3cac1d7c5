"""When something that cannot expire by itself counts as expired.

A holder that is alive changes a mark in its record at every renewal, and counts its validity from before that write.
Who sees the same mark for the TTL and a margin, counted from after it was first read, therefore knows that the
holder's validity is over; no two clocks are compared, only their speed (this is how Kubernetes' leader election
works). The margin allows for clocks of different speed. A compare-and-swap against the record that was seen closes
the gap between looking and taking.
"""

from __future__ import annotations

from collections.abc import Iterable

from pylitefs.cluster.lease_port import Clock


def margin_s(ttl_s: float) -> float:
    return min(0.5, max(0.1, ttl_s * 0.05))


class Observed:
    """What one node has seen of records by name. `clock` goes on while the machine is suspended."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._seen: dict[str, tuple[str, float]] = {}

    def remaining_s(self, name: str, mark: str, ttl_s: float) -> float:
        """The record was just read and has `mark`: how long until it counts as expired; 0 or less: it does."""
        now_s = self._clock()
        known, since_s = self._seen.get(name, (None, now_s))
        if known != mark:
            since_s = now_s
            self._seen[name] = (mark, now_s)
        return since_s + ttl_s + margin_s(ttl_s) - now_s

    def keep_only(self, names: Iterable[str]) -> None:
        """Forget records that are no more."""
        gone = self._seen.keys() - set(names)
        for name in gone:
            del self._seen[name]
