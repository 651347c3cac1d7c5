"""What the primary does about one database of one replica. Pure.

replica                            primary's log                        decision
at the primary's position                                               CaughtUp
anywhere                           continues from there                 SendLog
has nothing                        begins with TXID 1, and is smaller   SendLog
                                   than the database
has nothing                        otherwise                            Snapshot
higher TXID, same checksum         the primary is in its recovery wait  AdoptTxid
higher TXID                        the primary is in its recovery wait  AskTail
has a copy                         otherwise                            AskChecksums: only what differs is sent
has a copy                         the primary never had it             SetAside (AskTail in the recovery wait)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from pylitefs.formats.ltx.format import Position
from pylitefs.formats.stream_fields import ResyncReason

NOTHING = Position(0, 0)

LOG_ALLOWANCE_BYTES = 1 << 20
"""A log this much larger than the database is still sent to a replica that has nothing."""


@dataclass(frozen=True)
class View:
    """A database of the primary at one moment. `reaches`: its log continues from the replica's position. `checksum` is
    that of the files, which after a crash need not be what the log ends with."""

    head: Position
    first_txid: int
    reaches: bool
    checksum: int = 0
    log_size_bytes: int = 0
    size_bytes: int = 0


@dataclass(frozen=True)
class CaughtUp:
    pass


@dataclass(frozen=True)
class SendLog:
    """Send the log entries after the replica's position."""


@dataclass(frozen=True)
class Snapshot:
    """Send the whole database."""


@dataclass(frozen=True)
class AskChecksums:
    """Ask for the checksums of the replica's pages, then send a snapshot of what differs."""

    reason: ResyncReason


@dataclass(frozen=True)
class AskTail:
    """Ask for the transactions after `after`, which the primary has lost."""

    after: Position


@dataclass(frozen=True)
class AdoptTxid:
    """Go on from the replica's TXID: the content is the same."""

    position: Position


@dataclass(frozen=True)
class SetAside:
    """Tell the replica to keep its copy aside."""


Decision: TypeAlias = CaughtUp | SendLog | Snapshot | AskChecksums | AskTail | AdoptTxid | SetAside


def decide(theirs: Position, ours: View, recovering: bool) -> Decision:
    """What to do about a replica at `theirs` (TXID 0: it has nothing).

    `recovering`: the primary takes no writes yet and wants back what it lost.
    """
    head = ours.head
    if head.txid == 0:
        return _unknown_here(theirs, recovering)
    if theirs == head:
        return CaughtUp()
    if theirs.txid == 0:
        affordable = ours.log_size_bytes <= ours.size_bytes + LOG_ALLOWANCE_BYTES
        return SendLog() if ours.reaches and affordable else Snapshot()
    if ours.reaches:
        return SendLog()
    if theirs.txid > head.txid:
        if not recovering:
            return AskChecksums(ResyncReason.AHEAD)
        return AdoptTxid(theirs) if theirs.checksum == ours.checksum else AskTail(head)
    if theirs.txid < ours.first_txid - 1 or (ours.first_txid == 0 and theirs.txid < head.txid):
        return AskChecksums(ResyncReason.LOG_TOO_SHORT)
    return AskChecksums(ResyncReason.DIVERGED)


def _unknown_here(theirs: Position, recovering: bool) -> Decision:
    if theirs.txid == 0:
        return CaughtUp()
    return AskTail(NOTHING) if recovering else SetAside()


def branch_point(
    position: Position, history: Iterable[Position], first_txid: int, reaches: Callable[[Position], bool]
) -> int | None:
    """The TXID after which the replica's log holds what the primary's history does not; None if there is no such thing.

    `position` and `history` are the replica's, `first_txid` and `reaches` the primary's log. Where the primary's log no
    longer reaches back to anything the replica has, the two cannot be compared: the replica is taken to be merely old.
    """
    if position.txid == 0 or reaches(position):
        return None
    comparable = False
    for known in sorted({position, *history}, key=lambda known: known.txid, reverse=True):
        if known.txid + 1 < first_txid:
            break
        comparable = True
        if reaches(known):
            return known.txid
    return 0 if comparable else None
