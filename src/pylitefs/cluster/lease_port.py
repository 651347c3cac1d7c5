"""The port of lease engines: who is the primary, decided by a service that the operator already trusts.

An engine keeps four things about one cluster: the *leader* (a lease that ends by itself), a small *state* document that
everybody shares, the *members* (entries that end by themselves), and nothing else. It does not decide who should be the
primary (`cluster.election` does) and does not know what the state means.

What an implementer guarantees, and `tests/contract/test_lease_contract.py` asks of every one of them:

- At no time do two nodes hold a lease that is valid by `now_s` of its holder.
- `acquire` sets leader and state in one step, so that every acquisition can raise the epoch that the state keeps.
- An engine that cannot be reached, or does not answer, is Unavailable after the engine's timeout: never a hang.
- Clocks of different machines are never compared. An engine without a time to live of its own (a bucket, Kubernetes)
  takes a lease as expired only after it has itself seen the record unchanged for the TTL and a margin
  (`lease.observed`).

An operator who deletes the lease by hand takes it from its holder before the TTL; until its next renewal the holder
does not know. Epochs (which everything carries) protect the data then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pylitefs.errors import LitefsError

ABSENT = ""
"""The version of a document that does not exist."""

MAX_STATE_BYTES = 64 << 10
"""Of the state document: an annotation in Kubernetes has room for 256 KiB in all, a value in Consul for 512 KiB."""

Clock = Callable[[], float]


def now_s() -> float:
    """The clock that leases are counted by. Unlike time.monotonic() it goes on while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Conflict(LitefsError):
    """The state document has changed since it was read: read it again."""


class LeaseLost(Conflict):
    """The lease is not ours any more: it has expired, somebody else took it, or it was deleted."""


@dataclass(frozen=True)
class Leader:
    """Who holds the lease. `node_id` and `epoch` are 0 where the holder is a node of LiteFS."""

    node_id: int
    hostname: str
    url: str
    epoch: int


@dataclass(frozen=True)
class Member:
    """One node's entry in the registry. `info` is whatever JSON the nodes tell each other, such as positions."""

    node_id: int
    hostname: str = ""
    url: str = ""
    candidate: bool = True
    priority: int = 0
    tags: Mapping[str, str] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Versioned:
    """The shared document, and what to give back to change it."""

    data: bytes = b""
    version: str = ABSENT


@dataclass(frozen=True)
class View:
    """Everything an engine knows, at one moment. `leader` is None when nobody holds a lease that has not expired.

    Members are in the order of their ids. `token` is the engine's own; two views are equal when nothing has changed.
    """

    leader: Leader | None
    state: Versioned
    members: tuple[Member, ...]
    token: str = field(default="", compare=False, repr=False)


@dataclass(frozen=True)
class Held:
    """A lease that was acquired or renewed. It is ours while `now_s()` is below `valid_until_s`, which was counted from
    before the request was sent. `state` is the document as `acquire` wrote it. `token` is the engine's own."""

    leader: Leader
    ttl_s: float
    valid_until_s: float
    state: Versioned = field(compare=False, default_factory=Versioned)
    token: str = field(compare=False, repr=False, default="")


class Engine(Protocol):
    """One cluster's lease, state and members. Every call may raise Unavailable; its text says what to do."""

    @property
    def min_ttl_s(self) -> float:
        """No lease can be shorter; `acquire` refuses it."""

    async def view(self) -> View:
        """What is true now: a linearizable read where the engine has one."""

    async def acquire(self, leader: Leader, ttl_s: float, state: bytes, version: str) -> Held | None:
        """In one step: nobody holds the lease and the state is still at `version` → `leader` has it, and the state is
        `state`. None: it is held, or somebody was quicker. After Unavailable the lease may be taken until its TTL ends
        or the same engine object acquires again."""

    async def renew(self, held: Held) -> Held:
        """Hold it for another TTL. LeaseLost when it is not ours any more."""

    async def release(self, held: Held) -> None:
        """Give it up: the next `acquire` succeeds at once. Does nothing if it is not ours any more."""

    async def update(self, state: bytes, version: str, held: Held | None = None) -> Versioned:
        """Replace the state if it is still at `version`, else Conflict; with `held` only while the lease is ours, else
        LeaseLost, in one step with it. After Unavailable it may have been replaced or not: read it again."""

    async def announce(self, member: Member, ttl_s: float) -> None:
        """Set this node's entry, which ends `ttl_s` from now unless it is set again."""

    async def withdraw(self, node_id: int) -> None:
        """Remove an entry; does nothing if there is none."""

    async def wait(self, view: View, timeout_s: float) -> bool:
        """Return True soon after something differs from `view`, False when nothing did for `timeout_s`."""

    async def close(self) -> None:
        """Let go of connections. Leases and entries stay until they end. Never raises."""
