"""Which node is which, and who talks to whom."""

from __future__ import annotations

from dataclasses import dataclass

from pylitefs.errors import ProtocolError
from pylitefs.formats.stream import PROTOCOL_VERSION as VERSION
from pylitefs.formats.stream import Error, Hello, Welcome
from pylitefs.formats.stream_fields import ErrorCode


@dataclass(frozen=True)
class NodeIdentity:
    """What a node says about itself in the handshake. `node_id` is 64 bits, never 0; it may be new at every start."""

    node_id: int
    hostname: str = ""

    def __str__(self) -> str:
        return f"{self.hostname} ({self.node_id:016X})" if self.hostname else f"{self.node_id:016X}"


class Refused(ProtocolError):
    """One side will not talk to the other. `code` says why, to the other side too."""

    def __init__(self, code: ErrorCode, text: str) -> None:
        super().__init__(text)
        self.code = code

    @property
    def message(self) -> Error:
        return Error(self.code, str(self).encode("utf-8", "replace")[:900].decode("utf-8", "ignore"))


LASTING = frozenset(
    {
        ErrorCode.VERSION,
        ErrorCode.CLUSTER_MISMATCH,
        ErrorCode.FOREIGN,
        ErrorCode.SELF,
        ErrorCode.REPLACED,
        ErrorCode.BUSY,
    }
)
"""Refusals that trying again soon does not change. Another node may become the primary at any moment."""


class StaleEpoch(Refused):
    """Epoch `seen` has begun: what belongs to an earlier one does not count any more."""

    def __init__(self, primary: int, seen: int) -> None:
        super().__init__(ErrorCode.STALE_EPOCH, _epoch_text(primary, seen))
        self.seen = seen


def admit(hello: Hello, has_data: bool, node: NodeIdentity, cluster_id: str, epoch: int) -> None:
    """The primary's rule: raise Refused unless this replica may follow.

    `has_data`: the replica has databases of its own.
    """
    if hello.protocol != VERSION:
        raise Refused(ErrorCode.VERSION, _version_text("the primary", VERSION, "the replica", hello.protocol))
    if hello.node_id == node.node_id:
        raise Refused(ErrorCode.SELF, "the node has connected to itself: lease.advertise-url must be the primary's URL")
    if hello.cluster_id and hello.cluster_id != cluster_id:
        raise Refused(ErrorCode.CLUSTER_MISMATCH, _cluster_text(cluster_id, hello.cluster_id))
    if not hello.cluster_id and has_data:
        raise Refused(ErrorCode.FOREIGN, _foreign_text(cluster_id))
    if hello.epoch > epoch:
        raise StaleEpoch(epoch, hello.epoch)


def accept(welcome: Welcome, has_data: bool, node: NodeIdentity, cluster_id: str | None, epoch: int) -> None:
    """The replica's rule: raise Refused unless it may follow this primary.

    `epoch` is the highest one the replica has seen.
    """
    if welcome.protocol != VERSION:
        raise Refused(ErrorCode.VERSION, _version_text("the replica", VERSION, "the primary", welcome.protocol))
    if welcome.node_id == node.node_id:
        raise Refused(ErrorCode.SELF, "the node has connected to itself: lease.advertise-url must be the primary's URL")
    if not welcome.cluster_id:
        raise Refused(ErrorCode.PROTOCOL, "the primary has no cluster id")
    if cluster_id and cluster_id != welcome.cluster_id:
        raise Refused(ErrorCode.CLUSTER_MISMATCH, _cluster_text(welcome.cluster_id, cluster_id))
    if not cluster_id and has_data:
        raise Refused(ErrorCode.FOREIGN, _foreign_text(welcome.cluster_id))
    if welcome.epoch < epoch:
        raise StaleEpoch(welcome.epoch, epoch)


def _version_text(this: str, ours: int, other: str, theirs: int) -> str:
    older = this if ours < theirs else other
    return f"{this} speaks replication protocol {ours}, {other} {theirs}: upgrade {older}"


def _cluster_text(primary: str, replica: str) -> str:
    return (
        f'the primary belongs to cluster "{primary}", this replica to "{replica}": correct lease.advertise-url, '
        "or give the replica an empty data directory"
    )


def _foreign_text(primary: str) -> str:
    return (
        f'the replica has databases of its own and no cluster id, the primary belongs to cluster "{primary}": '
        "import them on the primary and give the replica an empty data directory"
    )


def _epoch_text(primary: int, seen: int) -> str:
    return f"the primary is of epoch {primary}, but epoch {seen} has begun: it must step down"
