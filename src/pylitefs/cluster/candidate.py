"""What `leadership` must know of a node, and asks of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from pylitefs.cluster.election import Positions
from pylitefs.cluster.lease_port import Leader, Member, View
from pylitefs.errors import LitefsError

log = logging.getLogger("litefs.lease")

ASK_S = 0.7  # for an answer of another node
RENEWALS = 3  # in the life of a lease
MARGIN = 0.1  # of the TTL, at most MAX_MARGIN_S: the last moments in which nothing is acknowledged any more
MAX_MARGIN_S = 0.5


@dataclass(frozen=True)
class Settings:
    """The `lease` section as far as it matters here. `sync`: how many replicas must have a commit."""

    ttl_s: float = 10.0
    candidate: bool = True
    priority: int = 0
    tags: Mapping[str, str] = field(default_factory=dict)
    maximum_lag: int | None = None
    failsafe: bool = False
    sync: int = 0

    @property
    def renewal_s(self) -> float:
        """From one renewal of the lease, or of the node's entry, to the next."""
        return self.ttl_s / RENEWALS

    @property
    def margin_s(self) -> float:
        return min(MAX_MARGIN_S, self.ttl_s * MARGIN)

    @property
    def ask_s(self) -> float:
        """How long to wait for another node's answer."""
        return min(ASK_S, self.ttl_s / 4)


class Nudge(asyncio.Event):
    """Ends a pause: there is something to look at."""

    async def pause(self, delay_s: float) -> None:
        """Until then, or a nudge."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self.wait()
        self.clear()


@dataclass
class Leaving:
    """A wish to end the term of office. `successor` (0: nobody) must have everything that was ever committed."""

    reason: str
    successor: int
    done: asyncio.Future[None]


class Node(Protocol):
    """What a node does when its role changes. Everything runs on the event loop, one call at a time, but `ask`,
    `confirm` and `has_promised`. `promote` may raise LitefsError or OSError: the lease is let go of then."""

    node_id: int
    hostname: str
    url: str

    @property
    def cluster_id(self) -> str: ...
    @property
    def is_fit(self) -> bool:
        """Whether it could take writes now (its disk is not full)."""

    @property
    def seen_epoch(self) -> int:
        """The highest epoch this node knows of: the next one is higher, also where the engine has lost its memory."""

    def positions(self) -> Positions:
        """Where every database is: (epoch, txid)."""

    async def promote(self, epoch: int, cluster_id: str) -> str:
        """Take writes; the cluster's id, which is made up if `cluster_id` is "". The fence is opened afterwards. On a
        node that is the primary already a new term begins."""

    def was_forced(self, epoch: int, txid: int) -> None:
        """At an operator's word this node has taken the lease though acknowledged commits may be missing: tell those
        who listen. `txid` is the sum over all databases."""

    def lead_until(self, until_s: float) -> None:
        """By `now_s`: until then commits may be acknowledged; 0.0: no more."""

    async def demote(self, reason: str) -> None:
        """Take no more writes. Never raises."""

    def passed_on(self, successor: int) -> None:
        """The lease is free for the member `successor`: tell it."""

    async def follow(self, leader: Leader) -> None: ...
    async def ask(self, member: Member, timeout_s: float) -> Positions:
        """Where another node is. Raises LitefsError."""

    async def confirm(self, member: Member, epoch: int, timeout_s: float) -> str:
        """Failsafe: "" if that node follows us and promises not to lead. Raises LitefsError."""

    async def has_promised(self, member: Member, timeout_s: float) -> bool:
        """Failsafe: whether that node has promised a leader not to take the lease. Raises LitefsError."""


async def ask_all(node: Node, view: View, timeout_s: float) -> dict[int, Positions]:
    """The positions of those other members that answer."""
    others = [member for member in view.members if member.node_id != node.node_id and member.url]

    async def one(member: Member) -> tuple[int, Positions] | None:
        try:
            return member.node_id, await node.ask(member, timeout_s)
        except (LitefsError, OSError) as error:
            log.debug("%s does not answer: %s", member.url, error)
            return None

    answers = await asyncio.gather(*(one(member) for member in others))
    return dict(answer for answer in answers if answer is not None)
