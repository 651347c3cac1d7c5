"""LTX files that come from another node: large ones in pieces, and those that a replica gives back."""

from __future__ import annotations

import contextlib
import os
import time
from array import array

import numpy as np

from pylitefs.engine.apply import Apply, check, file_chunks, predict
from pylitefs.engine.database import Database
from pylitefs.engine.files import write_at
from pylitefs.engine.leftovers import WalEnd
from pylitefs.engine.recovery import apply_entries
from pylitefs.engine.replica_wal import RUN_FRAMES, ReplicaWal
from pylitefs.engine.transaction import runs
from pylitefs.errors import FormatError, PositionMismatch
from pylitefs.formats.ltx.checksum import checksums_of
from pylitefs.formats.ltx.decoder import Decoder, Reader
from pylitefs.formats.ltx.format import Header, Position


class IncomingFile:
    """A large LTX file that arrives in pieces. While it comes it is checked, kept for the log and, where the database
    is here already, appended to its WAL as a transaction that nobody sees; `finish` commits it."""

    def __init__(self, apply: Apply, database: Database, min_txid: int, max_txid: int) -> None:
        self._apply, self._database = apply, database
        self._span = (min_txid, max_txid)
        self._path = database.log.temporary()
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self._decoder = Decoder()
        self._pgnos = array("I")
        self._sums = array("Q")
        self._offset = 0
        self._started_s = time.monotonic()
        self._live: ReplicaWal | None = None  # has our transaction open

    def write(self, data: bytes) -> None:
        """Raises FormatError; OSError (then the same piece may be written again)."""
        write_at(self._fd, data, self._offset)
        self._offset += len(data)
        pages = self._decoder.feed(data)
        if self._live is None and not self._pgnos and self._decoder.header is not None:
            self._live = self._begin(self._decoder.header)
        self._pgnos.extend([pgno for pgno, _ in pages])
        self._sums.frombytes(checksums_of(pages).tobytes())
        if self._live is not None:
            self._append(self._live, pages)

    def _begin(self, header: Header) -> ReplicaWal | None:
        database = self._database
        if not (database.exists and header.commit and header.page_size == database.page_size):
            return None
        if header.pre_apply_position != database.position:
            return None
        live = self._apply.activate(database)
        live.begin()
        return live

    def _append(self, live: ReplicaWal, pages: list[tuple[int, bytes]]) -> None:
        try:
            live.extend(pages)
        except OSError:  # no room: `finish` does it from the file, when there is
            live.roll_back()
            self._live = None

    def finish(self) -> Position:
        """Verify, log, apply. FormatError and PositionMismatch change nothing."""
        try:
            trailer = self._decoder.finish()
            header = self._decoder.header
            assert header is not None
            if (header.min_txid, header.max_txid) != self._span:
                raise FormatError("LTX file: its header does not have the announced transactions")
            pgnos = np.frombuffer(self._pgnos, dtype=np.uint32) if self._pgnos else np.zeros(0, dtype=np.uint32)
            sums = np.frombuffer(self._sums, dtype=np.uint64) if self._sums else np.zeros(0, dtype=np.uint64)
            check(self._database, header, trailer, pgnos, sums)
            pages = () if self._live is not None else Reader(file_chunks(self._path))
            position = self._apply.commit(
                self._database, header, trailer, self._path, pages, pgnos, sums, self._started_s, self._live
            )
            self._live = None
            return position
        finally:
            self.abort()

    def abort(self) -> None:
        if self._live is not None:
            with contextlib.suppress(OSError):
                self._live.roll_back()
            self._live = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)


def give_back(database: Database, path: str, wal_end: WalEnd | None) -> Position:
    """Primary, before it takes writes: a transaction it had lost comes back from a replica (LTX file at `path`, which
    is taken over). It must begin exactly where the database stands, or the database's WAL must have ended within it: a
    database that is ahead of the replica is never taken back. PositionMismatch, FormatError change nothing."""
    pgnos, sums = array("I"), array("Q")
    reader = Reader(file_chunks(path))
    for run in runs(reader, RUN_FRAMES):
        pgnos.extend([pgno for pgno, _ in run])
        sums.frombytes(checksums_of(run).tobytes())
    header, trailer = reader.header, reader.trailer
    if trailer is None:
        raise FormatError("LTX file has no trailer")
    position = database.position
    follows = header.pre_apply_checksum == position.checksum or (wal_end is not None and wal_end.is_within(header))
    numbers, values = np.array(pgnos, dtype=np.uint32), np.array(sums, dtype=np.uint64)
    fits = predict(database, header, numbers, values) == trailer.post_apply_checksum
    if not (follows and fits) or header.page_size != database.page_size or header.max_txid <= database.log.head.txid:
        raise PositionMismatch(f"{database.name}: {header.max_txid:016x} cannot be given back to {position}")
    database.unclean()
    entry = database.log.publish(path, header, trailer.post_apply_checksum)
    apply_entries(database, [entry])
    return database.position
