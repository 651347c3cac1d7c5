"""The two ends of an LTX file tell whether a log has come through the state that it leads to."""

from __future__ import annotations

import os

from pylitefs.cluster.ports import Database, Log
from pylitefs.errors import FormatError, PositionMismatch
from pylitefs.formats.ltx.format import HEADER_SIZE, TRAILER_SIZE, Header, Position, Trailer


def ends_of(data: bytes | str) -> tuple[Header, Trailer]:
    """The first and the last of an LTX file, or of the file at a path. Blocking. FormatError, OSError."""
    if isinstance(data, bytes):
        return Header.unpack(data[:HEADER_SIZE]), Trailer.unpack(data[-TRAILER_SIZE:])
    with open(data, "rb") as file:
        head = file.read(HEADER_SIZE)
        file.seek(-min(TRAILER_SIZE, os.fstat(file.fileno()).st_size), os.SEEK_END)
        return Header.unpack(head), Trailer.unpack(file.read())


def has_transaction(log: Log, header: Header, trailer: Trailer) -> bool:
    """Whether a log has come through the very state that this transaction leads to."""
    entry = log.covering(header.max_txid)
    if entry is None or entry.max_txid != header.max_txid:
        return False
    try:
        return ends_of(entry.path)[1].post_apply_checksum == trailer.post_apply_checksum
    except (FormatError, OSError):
        return False


def is_here(database: Database, data: bytes) -> bool:
    """Whether the transactions of an LTX file, of which the ends are enough, are in the log already."""
    try:
        header, trailer = ends_of(data)
    except FormatError:
        return False
    return 0 < header.max_txid <= database.position.txid and has_transaction(database.log, header, trailer)


class OwnFile:
    """[W] An `IncomingFile` of transactions that seem to be here: the primary has them from this node."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._head, self._tail = b"", b""

    def write(self, data: bytes, /) -> None:
        self._head += data[: HEADER_SIZE - len(self._head)]
        self._tail = (self._tail + data)[-TRAILER_SIZE:]

    def finish(self, *, spare_readers: bool = False) -> Position:
        if not is_here(self._database, self._head + self._tail):
            raise PositionMismatch(f"transactions that did not lead to {self._database.position}")
        return Position(Header.unpack(self._head).max_txid, 0)

    def abort(self) -> None: ...
