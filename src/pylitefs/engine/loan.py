"""A database of the primary's that this node writes, under a HALT lock (see `cluster.hold`)."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pylitefs.engine.files import publish_file
from pylitefs.formats.ltx.format import Position
from pylitefs.ports import CommitGate

if TYPE_CHECKING:
    from pylitefs.engine.registry import Registry

log = logging.getLogger("litefs.halt")


@dataclass(frozen=True, slots=True)
class Loan:
    """`epoch`: the primary's, of what is written here. `gate`: what commits wait for, instead of the store's gate."""

    epoch: int
    gate: CommitGate


class Agreed:
    """As far as the primary is known to have what is written here under a HALT lock. What the log has beyond that may
    be a branch, though it is of the primary's own epoch.

    DATA/dbs/NAME/ltx/agreed, "LOCK_EPOCH EPOCH TXID/CHECKSUM" and a newline: while the lock is held, and after one that
    was lost until the database is in line again. Durable before the first commit under the lock; later it may be
    behind, which claims too little.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._epoch = 0
        self.position: Position | None = None
        self.recorded_after: int | None = None
        """What the log has beyond this TXID was recorded at the start, in the place of what the log had lost. It has
        TXIDs of an epoch in which others may have got something else under them."""

    def load(self) -> None:
        self.position = None
        with contextlib.suppress(FileNotFoundError), open(self._path) as file:
            try:
                epoch, of, position = file.read(128).split()
                at = Position.parse(position)
                self._epoch, self.position = int(epoch), Position(at.txid, at.checksum, int(of))
            except ValueError:
                log.warning("%s is damaged: nothing of that log counts as known to others", self._path)
                self._epoch, self.position = 1 << 63, Position(0, 0)

    def begin(self, epoch: int, position: Position) -> None:
        """A lock of that epoch begins. Durable. Raises OSError."""
        self._epoch = epoch
        publish_file(self._path, self._line(position))
        self.position = position

    def note(self) -> None:
        """Where it stands now, for the next start if only the process ends."""
        position = self.position
        with contextlib.suppress(OSError), open(self._path, "rb+", buffering=0) as file:
            if position is not None:
                file.write(self._line(position))

    def end(self) -> None:
        """All of the log is history. A crash may bring the file back."""
        self.recorded_after = None
        if self.position is not None:
            self.position = None
            with contextlib.suppress(OSError):
                os.unlink(self._path)

    def limit(self, head: Position) -> Position:
        """As far as a log that ends there is known to be history. What was written in a later epoch came after it."""
        agreed = self.position
        return head if agreed is None or agreed.txid >= head.txid or self._epoch < head.epoch else agreed

    def _line(self, position: Position) -> bytes:
        return f"{self._epoch:<20} {position.epoch:<20} {position}\n".encode()


def epoch_of_loans(registry: Registry) -> int:
    """The newest epoch of what applications write on a node that is not the primary."""
    loans = [database.loan for database in list(registry.databases.values())]
    return max([registry.epoch, *(loan.epoch for loan in loans if loan is not None)])
