"""The nodes that this process has heard of, also those that are away now: for people, who know them by host names.

Elections do not ask it: to them a node that is away is none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable
from typing import TypeAlias

from pylitefs.cluster.lease_port import Member
from pylitefs.cluster.state import Document

AWAY_S = 6 * 3600.0
"""How long a node that was here is shown as away, if nothing waits for it."""

MAX_AWAY = 32
"""So many of them: where each node has a new id, as in containers without a disk of their own, they are many."""


Away: TypeAlias = tuple[Member, float | None]
"""A node that is not here, and how many seconds ago it was; None if this process has never seen it."""


class KnownNodes:
    """On the loop. Times are of `clock`, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[int, tuple[Member, float]] = {}  # (as it was, when)

    def saw(self, member: Member) -> None:
        """It is here now."""
        self._seen.pop(member.node_id, None)  # so that the newest are last
        self._seen[member.node_id] = member, self._clock()

    def hostnames(self, document: Document) -> dict[int, str]:
        """By id: of those that were seen, and of those that have led."""
        led = {entry.node_id: entry.hostname for entry in document.history}
        return led | {node_id: member.hostname for node_id, (member, _) in self._seen.items()}

    def away(self, here: Container[int], needed: Iterable[int], document: Document) -> list[Away]:
        """Those that are not `here`. Of those that are not `needed` only who was seen lately."""
        now_s = self._clock()
        old = [node_id for node_id, (_, at_s) in self._seen.items() if now_s - at_s > AWAY_S]
        needed = frozenset(needed)
        for node_id in old:
            if node_id not in needed:
                del self._seen[node_id]
        lately = [node_id for node_id in reversed(self._seen) if node_id not in here and node_id not in needed]
        led = {entry.node_id: entry.hostname for entry in document.history}
        found: list[Away] = []
        for node_id in sorted({*(one for one in needed if one not in here), *lately[:MAX_AWAY]}):
            member, at_s = self._seen.get(node_id, (Member(node_id, led.get(node_id, "")), None))
            found.append((member, None if at_s is None else max(0.0, now_s - at_s)))
        return found
