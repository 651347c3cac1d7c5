"""What the HTTP API asks about the cluster, and of it.

`Control` is what a node offers; `node.Node` is the implementer. All errors are LitefsErrors whose one line says what to
do: `Unavailable` where trying again may help, `Ineligible` where it does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pylitefs.formats.ltx.format import Position

FAILOVER = "failover"
"""The reason in the history of a change that nobody had asked for."""

FORCED = "forced: acknowledged commits may be missing"
"""… and of `litefs promote -force`, where it was needed."""


AWAY = "away"
"""The state of a node that is known, and is not there."""

NOT_CONNECTED = "not connected"
"""The state of this node, if it is a replica whose primary does not answer."""


@dataclass(frozen=True)
class MemberView:
    """One node as this one knows it. `lag_ms` and `lag_txids` are None where they are not known; `seen_s` is how long
    ago it was last heard of, in seconds, 0 for one that is connected; `positions` is (epoch, txid) by database."""

    node_id: int
    hostname: str = ""
    url: str = ""
    role: str = "replica"  # "primary", "replica"
    state: str = ""  # on the primary: "live", "catch-up", "snapshot", ...; AWAY, NOT_CONNECTED; "" where not known
    candidate: bool = True
    priority: int = 0
    tags: Mapping[str, str] = field(default_factory=dict)
    positions: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    lag_ms: float | None = None
    lag_txids: int | None = None
    in_sync: bool = False
    seen_s: float | None = None


@dataclass(frozen=True)
class HistoryEntry:
    """One change of the primary. `txid` is the sum of the TXIDs of all databases; `time_ms` since 1970."""

    epoch: int
    node_id: int
    hostname: str
    txid: int
    reason: str
    time_ms: int


@dataclass(frozen=True)
class CommitsWait:
    """Commits that wait for replicas for longer than replicas need: how many, since when the first, and for what."""

    count: int
    seconds: float
    reason: str

    def __str__(self) -> str:
        commits = "1 commit waits" if self.count == 1 else f"{self.count:,} commits wait"
        return f"{commits} for replicas since {self.seconds:.0f} s: {self.reason}"


@dataclass(frozen=True)
class ClusterView:
    """What this node knows of its cluster. `engine` names the lease engine and `problem` says what is wrong with it, or
    why there is no primary; "" if all is well."""

    node_id: int
    is_primary: bool
    cluster_id: str
    epoch: int
    primary: MemberView | None
    members: tuple[MemberView, ...]
    paused: bool = False
    sync: int = 0  # how many replicas a commit waits for
    in_sync: tuple[int, ...] | None = None
    commits_wait: CommitsWait | None = None
    history: tuple[HistoryEntry, ...] = ()
    engine: str = "static"
    problem: str = ""


class Control(Protocol):
    """Everything runs on the event loop."""

    def view(self) -> ClusterView:
        """What is known now, without asking anybody."""

    async def refresh(self) -> None:
        """Before a `view` for people, ask for what this node cannot know: only the primary knows how far all nodes are,
        and with a static lease who they are. Takes a second at most."""

    async def promote(self, node_id: int | None, force: bool = False) -> None:
        """Make `node_id` (None: this node) the primary by a switchover, and return when it is. With `force`, and only
        where nobody holds the lease, also one that may lack acknowledged commits."""

    async def handoff(self, node_id: int | None) -> None:
        """On the primary: pass the lease to `node_id` (None: the best replica), and return when that is the primary."""

    async def pause(self, paused: bool) -> None:
        """Switch automatic failover off, or on again, for the whole cluster."""

    async def fresh_position(self, name: str) -> Position:
        """On the primary: a position that covers every commit acknowledged before the question, while it is certain
        that no other node has become the primary. DatabaseNotFound, Unavailable, NotPrimary."""

    async def sync(self, name: str, txid: int | None, timeout_s: float) -> Position:
        """Wait until this node has applied `txid` (None: everything the primary had when asked); where it stands then.
        Unavailable after `timeout_s`."""

    async def confirm_failsafe(self, leader_id: int, epoch: int) -> str:
        """The primary cannot reach its engine: "" if this node follows it, and promises to let nobody else lead for the
        lease's time; otherwise why not."""

    def positions(self) -> dict[str, Any]:
        """For an election among the nodes: {"node-id", "instance", "cluster-id", "epoch", "promised" (failsafe: not to
        lead), "positions": {name: [epoch, txid]}}."""

    def nudge(self) -> None:
        """Another node says that something has changed in the lease engine: look now."""


@dataclass(frozen=True)
class HaltLock:
    """The right to write one database from another node. Whoever holds it starts at `position`, in the primary's
    `epoch`; it ends at `expires_ms` (since 1970, the primary's clock) unless it is renewed."""

    id: int
    position: Position
    epoch: int
    expires_ms: int


class Halts(Protocol):
    """HALT locks of the primary's databases. Everything runs on the event loop; each call ends by itself.

    DatabaseNotFound; NotPrimary on a replica; DatabaseBusy or Unavailable when it cannot be had in time; Ineligible for
    a lock that is not held (any more), and for a transaction that was written in another epoch. `lock_id` is a positive
    63-bit number that the holder chose.
    """

    async def acquire(self, name: str, lock_id: int, node_id: int) -> HaltLock:
        """Stop writers of the database here, and let `node_id` write it. Again with the same id: the same lock. Not
        held after it was cancelled."""

    async def renew(self, name: str, lock_id: int) -> HaltLock:
        """Hold it for another while."""

    async def release(self, name: str, lock_id: int) -> None:
        """Let go of it; does nothing if it is not held."""

    async def transaction(self, name: str, lock_id: int, epoch: int, data: bytes | str) -> Position:
        """Apply a transaction that the holder has written, and return when it is durable here; again with one that was
        applied already: nothing happens. `data`: an LTX file, or the path of one, which may be moved away."""
