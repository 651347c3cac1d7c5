"""Whether a transaction of the primary fits a replica's database, and how it is refused."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pylitefs.engine.database import Database
from pylitefs.errors import DatabaseBusy, PositionMismatch
from pylitefs.formats.ltx.format import CHECKSUM_FLAG, Header, Trailer


def check(
    database: Database, header: Header, trailer: Trailer, pgnos: NDArray[np.uint32], sums: NDArray[np.uint64]
) -> None:
    """Whether a transaction follows our position and leads where it says. Raises PositionMismatch."""
    if database.set_aside_reason is not None:
        raise is_set_aside(database)
    position = database.position
    follows = header.min_txid == position.txid + 1
    if not follows or (position.txid and header.pre_apply_checksum != position.checksum):
        raise PositionMismatch(
            f"{database.name}: a transaction for position {header.pre_apply_position} does not fit {position}"
        )
    if header.has_checksums and predict(database, header, pgnos, sums) != trailer.post_apply_checksum:
        raise PositionMismatch(
            f"{database.name}: transaction {header.max_txid:016x} would not lead to the checksum it states"
        )


def is_set_aside(database: Database) -> PositionMismatch:
    return PositionMismatch(f"{database.name}: it was set aside ({database.set_aside_reason}), only a new copy helps")


def is_stopping(database: Database) -> DatabaseBusy:
    return DatabaseBusy(f"{database.name}: this node is stopping")


def predict(database: Database, header: Header, pgnos: NDArray[np.uint32], sums: NDArray[np.uint64]) -> int:
    """The database checksum after a transaction, from the checksum table."""
    reduce = np.bitwise_xor.reduce
    if not database.exists or header.page_size != database.page_size:
        return (int(reduce(sums)) if len(sums) else 0) | CHECKSUM_FLAG
    with database.lock:
        values = database.table.values
        checksum = database.position.checksum
        known = pgnos[pgnos <= database.commit] - 1
        checksum ^= int(reduce(values[known])) if len(known) else 0
        checksum ^= int(reduce(sums)) if len(sums) else 0
        if header.commit < database.commit:
            checksum ^= int(reduce(values[header.commit : database.commit]))
    return checksum | CHECKSUM_FLAG
