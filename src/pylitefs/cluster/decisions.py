"""What the primary does about one database of one replica. Pure, but for `view_of`.

A position is (epoch, TXID, checksum). The same TXID and checksum in another epoch need not be the same content (see
`Position`): the checksums of the pages tell, and if all are equal nothing is sent.

replica                            primary                              decision
of a later epoch than the lease                                         Stale: it is the primary that is behind
at the primary's position                                               CaughtUp
anywhere                           its log continues from there         SendLog
has nothing                        its log begins with TXID 1, and is   SendLog
                                   smaller than the database
has nothing                        otherwise; or dropped it             Snapshot (then without a page)
higher TXID, earlier epoch         wrote in a later one: they parted    AskChecksums: only what differs is sent
higher TXID, same checksum         is in its recovery wait              AdoptTxid
higher TXID                        is in its recovery wait              AskTail
higher TXID                        takes writes, and takes back         AskTail (what follows exactly)
has a copy                         otherwise                            AskChecksums
has a copy                         never had it                         SetAside (AskTail in the recovery wait)
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from pylitefs.cluster.ports import Database
from pylitefs.formats.ltx.format import Position
from pylitefs.formats.stream_fields import Epochs, ResyncReason

NOTHING = Position(0, 0)

LOG_ALLOWANCE_BYTES = 1 << 20
"""A log this much larger than the database is still sent to a replica that has nothing."""


@dataclass(frozen=True)
class View:
    """A database of the primary at one moment. `reaches`: its log continues from the replica's position. `checksum` is
    that of the files, which after a crash need not be what the log ends with. `epoch` is the lease's, None if nothing
    is known of any."""

    head: Position
    first_txid: int
    reaches: bool
    checksum: int = 0
    log_size_bytes: int = 0
    size_bytes: int = 0
    epoch: int | None = None


def view_of(database: Database | None, theirs: Position, epoch: int) -> View:
    """For a replica at `theirs`. Blocking: whether the log reaches so far is read from a file."""
    if database is None:
        return View(NOTHING, 0, False, epoch=epoch)
    log = database.log
    return View(
        log.head, log.first_txid, log.reaches(theirs), database.position.checksum, log.size_bytes, database.size_bytes,
        epoch,
    )  # fmt: skip


class Taking(enum.Enum):
    """Which transactions the primary takes from a replica."""

    NOTHING = "nothing"
    LOST = "lost"  # it takes no writes yet, and wants back what it lost
    NEXT = "next"  # it takes writes, and what follows its head exactly


@dataclass(frozen=True)
class Stale:
    """This node must step down: a later epoch has begun."""

    epoch: int


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
    """Ask for the transactions after `after`, which the primary has lost, or never got."""

    after: Position


@dataclass(frozen=True)
class AdoptTxid:
    """Go on from the replica's TXID: the content is the same."""

    position: Position


@dataclass(frozen=True)
class SetAside:
    """Tell the replica to keep its copy aside."""


Decision: TypeAlias = Stale | CaughtUp | SendLog | Snapshot | AskChecksums | AskTail | AdoptTxid | SetAside


def decide(theirs: Position, ours: View, taking: Taking) -> Decision:
    """What to do about a replica at `theirs` (TXID 0: it has nothing)."""
    head, recovering = ours.head, taking is Taking.LOST
    if ours.epoch is not None and theirs.txid and theirs.epoch > ours.epoch:
        return Stale(theirs.epoch)
    if head.txid == 0:
        return _unknown_here(theirs, recovering)
    if theirs.is_at(head):
        return CaughtUp()
    if theirs.txid == 0:
        affordable = ours.size_bytes > 0 and ours.log_size_bytes <= ours.size_bytes + LOG_ALLOWANCE_BYTES
        return SendLog() if ours.reaches and affordable else Snapshot()
    if ours.reaches:
        return SendLog()
    if theirs.txid > head.txid:
        if taking is Taking.NOTHING or theirs.epoch < head.epoch:
            return AskChecksums(ResyncReason.AHEAD)
        return AdoptTxid(theirs) if recovering and theirs.checksum == ours.checksum else AskTail(head)
    if theirs.txid < ours.first_txid - 1 or (ours.first_txid == 0 and theirs.txid < head.txid):
        return AskChecksums(ResyncReason.LOG_TOO_SHORT)
    return AskChecksums(ResyncReason.DIVERGED)


def _unknown_here(theirs: Position, recovering: bool) -> Decision:
    if theirs.txid == 0:
        return CaughtUp()
    return AskTail(NOTHING) if recovering else SetAside()


class History(Protocol):
    """The primary's log, and what it knows of the time before."""

    @property
    def head(self) -> Position: ...
    @property
    def first_txid(self) -> int: ...
    def holds(self, position: Position) -> bool: ...
    def passed(self, position: Position) -> bool: ...
    def epochs(self) -> Epochs: ...


def branch_point(position: Position, history: Iterable[Position], epochs: Epochs, ours: History) -> int | None:
    """The TXID after which the replica's log holds what the primary's history does not; None if there is no such thing.

    `position`, `history` and `epochs` are the replica's. Where the primary's log no longer reaches back to anything the
    replica has, the epochs tell: within one, one node has written one chain. Only in the first epoch a node whose role
    is fixed may have written two, in an earlier version; then what the log shows to be different counts.
    """
    if position.txid == 0 or ours.holds(position):
        return None
    first_txid = ours.first_txid or ours.head.txid + 1  # of a log that is empty the position is all there is
    differs = position.txid + 1  # from here on, or earlier
    for known in sorted({position, *history}, key=lambda known: known.txid, reverse=True):
        if known.txid + 1 >= first_txid:
            if ours.holds(known):
                return known.txid
            differs = known.txid
        elif ours.passed(known) and (differs > position.txid or known.epoch > 1):
            return known.txid if known != position else None
    parting = _parting(epochs, ours)
    return parting if parting < min(differs, position.txid) else 0


def _parting(theirs: Epochs, history: History) -> int:
    """Up to where two histories are the same for certain, by their epochs alone; 0 if nothing is certain."""
    ours = history.epochs()
    common = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(theirs, ours, strict=False))))
    if not common:
        return 0
    return min([history.head.txid, *(lines[common][1] - 1 for lines in (theirs, ours) if common < len(lines))])
