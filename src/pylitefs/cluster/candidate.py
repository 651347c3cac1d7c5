"""What `leadership` must know of a node, and asks of it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from pylitefs.cluster.election import Positions
from pylitefs.cluster.lease_port import Leader, Member


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


@dataclass
class Leaving:
    """A wish to end the term of office. `successor` (0: nobody) must have everything that was ever committed."""

    reason: str
    successor: int
    done: asyncio.Future[None]


class Node(Protocol):
    """What a node does when its role changes. Everything runs on the event loop, one call at a time, but `ask` and
    `confirm`. `promote` may raise LitefsError or OSError: the lease is let go of then."""

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
