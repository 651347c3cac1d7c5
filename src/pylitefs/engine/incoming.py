"""LTX files that come from another node: large ones in pieces, and those that a replica gives back."""

from __future__ import annotations

import contextlib
import os
import time
from array import array

import numpy as np

from pylitefs.engine.apply import Apply
from pylitefs.engine.apply_checks import check, predict
from pylitefs.engine.database import Database
from pylitefs.engine.evidence import Standing, counts_on, standing
from pylitefs.engine.files import file_chunks, write_at
from pylitefs.engine.recovery import Recovered
from pylitefs.engine.redo import apply_entries, redo_is_noted
from pylitefs.engine.replica_wal import RUN_FRAMES
from pylitefs.engine.shared_wal import SharedWal
from pylitefs.engine.transaction import runs
from pylitefs.errors import FormatError, PositionMismatch, ReadersInTheWay
from pylitefs.formats.ltx.checksum import checksums_of
from pylitefs.formats.ltx.decoder import Decoder, Reader, small_chunks
from pylitefs.formats.ltx.format import HEADER_SIZE, Header, Position


class IncomingFile:
    """A large LTX file that arrives in pieces. While it comes it is checked, kept for the log and, where the database
    is here already, appended to its WAL as a transaction that nobody sees; `finish` commits it."""

    def __init__(self, apply: Apply, database: Database, min_txid: int, max_txid: int) -> None:
        self._apply, self._database = apply, database
        self._span = (min_txid, max_txid)
        self._path = database.log.temporary(follows=False)
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self._pin = database.log.pin(database.log.head.txid)  # also of one that was dropped: it is in use
        self._decoder = Decoder()
        self._pgnos = array("I")
        self._sums = array("Q")
        self._offset = 0
        self._head = b""  # the file's header, as far as it has come
        self._started_s = time.monotonic()
        self._live: SharedWal | None = None  # has our transaction open

    def write(self, data: bytes) -> None:
        """Raises FormatError; OSError, DatabaseBusy (then the same piece may be written again)."""
        if self._offset < HEADER_SIZE <= self._offset + len(data):  # before anything of it counts: it may fail
            self._live = self._live or self._begin(Header.unpack(self._head + data[: HEADER_SIZE - self._offset]))
        write_at(self._fd, data, self._offset)
        self._head += data[: max(0, HEADER_SIZE - self._offset)]
        self._offset += len(data)
        for piece in small_chunks((data,)):
            pages = self._decoder.feed(piece)
            self._pgnos.extend([pgno for pgno, _ in pages])
            self._sums.frombytes(checksums_of(pages).tobytes())
            if self._live is not None:
                self._append(self._live, pages)

    def _begin(self, header: Header) -> SharedWal | None:
        database = self._database
        if not (database.exists and header.commit and header.page_size == database.page_size):
            return None
        if header.pre_apply_position != database.position:
            return None
        live = self._apply.activate(database)
        live.begin()
        return live

    def _append(self, live: SharedWal, pages: list[tuple[int, bytes]]) -> None:
        try:
            live.extend(pages)
        except OSError:  # no room: `finish` does it from the file, when there is
            live.roll_back()
            self._live = None

    def finish(self, *, spare_readers: bool = False) -> Position:
        """Verify, log, apply. FormatError and PositionMismatch change nothing. `spare_readers`: see
        `Apply.without_readers`; after ReadersInTheWay all is as before, and it can be called again."""
        try:
            position = self._finish(spare_readers)
        except ReadersInTheWay:
            raise
        except BaseException:
            self.abort()
            raise
        self.abort()
        return position

    def _finish(self, spare_readers: bool) -> Position:
        trailer = self._decoder.finish()
        header = self._decoder.header
        assert header is not None
        if (header.min_txid, header.max_txid) != self._span:
            raise FormatError("LTX file: its header does not have the announced transactions")
        pgnos = np.frombuffer(self._pgnos, dtype=np.uint32) if self._pgnos else np.zeros(0, dtype=np.uint32)
        sums = np.frombuffer(self._sums, dtype=np.uint64) if self._sums else np.zeros(0, dtype=np.uint64)
        check(self._database, header, trailer, pgnos, sums)
        pages = () if self._live is not None else Reader(file_chunks(self._path))
        with self._apply.without_readers(self._database, header, spare=spare_readers):
            position = self._apply.commit(
                self._database, header, trailer, self._path, pages, pgnos, sums, self._started_s, self._live
            )
        self._live = None
        return position

    def abort(self) -> None:
        if self._live is not None:
            with contextlib.suppress(OSError):
                self._live.roll_back()
            self._live = None
        self._pin.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)


def give_back(database: Database, path: str, found: Recovered) -> Position:
    """Primary, before it takes writes: a transaction it had lost comes back from a replica (LTX file at `path`, which
    is taken over). It must be proven that the database is behind it: one that is ahead of the replica is never taken
    back. PositionMismatch, FormatError change nothing."""
    pgnos, sums = array("I"), array("Q")
    page_1 = b""
    reader = Reader(file_chunks(path))
    for run in runs(reader, RUN_FRAMES):
        if run[0][0] == 1:
            page_1 = run[0][1]
        pgnos.extend([pgno for pgno, _ in run])
        sums.frombytes(checksums_of(run).tobytes())
    header, trailer = reader.header, reader.trailer
    if trailer is None:
        raise FormatError("LTX file has no trailer")
    position, head = database.position, database.log.head
    numbers, values = np.array(pgnos, dtype=np.uint32), np.array(sums, dtype=np.uint64)
    fits = predict(database, header, numbers, values) == trailer.post_apply_checksum
    fits = fits and header.page_size == (database.page_size if database.exists else header.page_size)
    if not fits or header.max_txid <= head.txid or not _follows(database, header, page_1, found):
        raise PositionMismatch(f"{database.name}: {header.max_txid:016x} cannot be given back to {position}")
    database.unclean()
    entry = database.log.publish(path, header, trailer.post_apply_checksum)
    try:
        apply_entries(database, [entry])
    except OSError:
        if not redo_is_noted(database):  # nothing was written yet
            database.log.take_back(entry, head)
        raise
    found.not_ahead = True
    database.announce(header, entry, len(numbers), "repair", 0.0)  # other replicas may lack it
    return database.position


def _follows(database: Database, header: Header, page_1: bytes, found: Recovered) -> bool:
    """Whether it is proven that the database has not seen the end of this entry; see `evidence`."""
    if found.not_ahead and header.pre_apply_position == database.log.head:
        return True
    if standing([header], found.wal_end) is Standing.BEHIND:
        return True
    transactions = header.max_txid - header.min_txid + 1
    return header.pre_apply_checksum == database.position.checksum and counts_on(
        database.first_bytes(), page_1, transactions
    )
