"""A database of the primary's that this node writes, under a HALT lock (see `cluster.hold`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pylitefs.formats.ltx.format import Position
from pylitefs.ports import CommitGate

if TYPE_CHECKING:
    from pylitefs.engine.registry import Registry


@dataclass(frozen=True, slots=True)
class Loan:
    """`epoch`: the primary's, of what is written here. `gate`: what commits wait for, instead of the store's gate.
    `agreed`: as far as the primary is known to have it."""

    epoch: int
    gate: CommitGate
    agreed: Position


def epoch_of_loans(registry: Registry) -> int:
    """The newest epoch of what applications write on a node that is not the primary."""
    loans = [database.loan for database in list(registry.databases.values())]
    return max([registry.epoch, *(loan.epoch for loan in loans if loan is not None)])
