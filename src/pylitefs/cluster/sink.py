"""The messages about one database, applied in order on a replica's worker, and what comes of each."""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from pylitefs.cluster.ends import OwnFile, ends_of, is_here
from pylitefs.cluster.ports import Epochs, IncomingFile, PageSums, Resync, Store
from pylitefs.errors import DatabaseBusy, FormatError, LitefsError, PositionMismatch, ReadersInTheWay, Unavailable
from pylitefs.events import Event
from pylitefs.formats import stream
from pylitefs.formats.ltx.decoder import Decoder, small_chunks
from pylitefs.formats.ltx.format import Position
from pylitefs.formats.stream import Ltx, LtxBegin, LtxData, LtxEnd, SetAside, SnapshotBegin, SnapshotEnd
from pylitefs.formats.stream_fields import MAX_HISTORY, ResyncReason
from pylitefs.formats.stream_pages import SnapshotPages

log = logging.getLogger("litefs.replication")


@dataclass(frozen=True)
class PrepareResync:
    """Not from the wire: describe the local copy for a RESYNC; what comes before the answer to it is void. `sums`: its
    page checksums, if those that it should have are not to be believed."""

    name: str
    reason: ResyncReason
    sums: PageSums | None = None


Item: TypeAlias = (
    Ltx | LtxBegin | LtxData | LtxEnd | SnapshotBegin | SnapshotPages | SnapshotEnd | SetAside | PrepareResync
)


# --- what comes of a message ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Applied:
    """The database is at `txid`, visible to readers. `durable`: up to where it is durable as well; 0: not looked at.
    `anew`: what was there before, if anything, was replaced, and is nothing that this one came from."""

    name: str
    txid: int
    durable: int = 0
    anew: bool = False


@dataclass(frozen=True)
class Unfit:
    """What came cannot be applied; everything is void until a snapshot comes."""

    name: str
    reason: ResyncReason
    text: str


@dataclass(frozen=True)
class Prepared:
    """Ready to be sent: RESYNC and the page checksums."""

    message: stream.Resync
    checksums: PageSums


@dataclass(frozen=True)
class Stuck:
    """The database cannot be written now; what has come for it, and what comes, is dropped."""

    name: str


@dataclass(frozen=True)
class Violation:
    """The primary has broken the protocol: the connection must end."""

    name: str
    text: str


@dataclass(frozen=True)
class Broken:
    """A defect: what is queued cannot be relied on, and the connection must end. The next one begins anew."""

    error: Exception


Outcome: TypeAlias = Applied | Unfit | Prepared | Stuck | Violation | Broken


class _Disorder(Exception):
    """A message that cannot come at this point."""


# --- one database ---------------------------------------------------------------------------------------------------


class Sink:
    """[W] Applies the messages about one database, in order."""

    def __init__(self, store: Store, name: str) -> None:
        self.name = name
        self._store = store
        self._request = 0
        self._void = False  # nothing counts until SNAPSHOT_BEGIN with `_request`
        self._incoming: IncomingFile | None = None
        self._left = 0  # bytes that the file in `_incoming` or `_decoder` still has to get
        self._resync: Resync | None = None
        self._begun: SnapshotBegin | None = None  # of a database of which nothing is here: perhaps it was dropped
        self._page_size = 0
        self._decoder: Decoder | None = None  # a large log entry within a snapshot
        self.spares_readers = False  # of a database that gets another page size: ReadersInTheWay comes of `take` then

    def take(self, item: Item) -> Outcome | None:
        """What came of it; None if there is nothing to tell.

        OSError, DatabaseBusy, Unavailable: nothing has happened, try again."""
        try:
            return self._take(item)
        except _Disorder:
            self.abort()
            return Violation(self.name, f"{type(item).__name__} out of order")
        except (DatabaseBusy, Unavailable, OSError):
            raise
        except PositionMismatch as error:
            return self._unfit(ResyncReason.MISMATCH, error)
        except FormatError as error:
            bad = ResyncReason.BAD_SNAPSHOT if self._resync is not None else ResyncReason.BAD_TRANSACTION
            return self._unfit(bad, error)
        except LitefsError as error:
            return self._unfit(ResyncReason.LOCAL, error)
        except Exception as error:
            log.exception("%s: cannot apply %s", self.name, type(item).__name__)
            return self._unfit(ResyncReason.LOCAL, error)

    def abort(self) -> None:
        """Forget what is incomplete."""
        incoming, self._incoming = self._incoming, None
        resync, self._resync = self._resync, None
        self._decoder = self._begun = None
        for part in (incoming, resync):
            if part is not None:
                with contextlib.suppress(OSError, LitefsError):
                    part.abort()

    def missed(self) -> Unfit:
        """Something that came for it was dropped."""
        return self._unfit(ResyncReason.LOCAL, Unavailable("it can be written again, and has missed transactions"))

    def _unfit(self, reason: ResyncReason, error: Exception) -> Unfit:
        self.abort()
        self._void = True
        return Unfit(self.name, reason, str(error))

    def _take(self, item: Item) -> Outcome | None:
        match item:
            case PrepareResync(_, reason, sums):
                return self._prepare(reason, sums)
            case SetAside():
                return self._set_aside()
            case SnapshotBegin():
                self._begin_snapshot(item)
            case SnapshotEnd(_, position, 0) if self._begun and not self._void and self._is_gone(item):
                return Applied(self.name, position.txid, anew=True)
            case _ if self._void:
                pass
            case _ if self._begun is not None:
                self._make_ready(self._begun)
                self._begun = None
                return self._take(item)
            case Ltx(_, data):
                return self._whole_file(data)
            case LtxBegin():
                self._begin_file(item)
            case LtxData(_, data):
                self._more_of_file(data)
            case LtxEnd(_, whole):
                return self._end_file(whole)
            case SnapshotPages():
                self._take_pages(item)
            case SnapshotEnd():
                return self._end_snapshot(item)
        return None

    # --- transactions -----------------------------------------------------------------------------------------------

    def _whole_file(self, data: bytes) -> Outcome | None:
        if self._in_file:
            raise _Disorder
        if self._resync is not None:
            self._resync.transaction(data)
            return None
        database = self._store.get_or_create(self.name)
        if is_here(database, data):
            return Applied(self.name, ends_of(data)[0].max_txid)
        return Applied(self.name, database.apply(data, spare_readers=self.spares_readers).txid)

    @property
    def _in_file(self) -> bool:
        return self._incoming is not None or self._decoder is not None

    def _begin_file(self, item: LtxBegin) -> None:
        if self._in_file:
            raise _Disorder
        if self._resync is not None:
            self._decoder = Decoder()
        else:
            database = self._store.get_or_create(self.name)
            is_own = 0 < item.max_txid <= database.position.txid
            self._incoming = OwnFile(database) if is_own else database.receive(item.min_txid, item.max_txid)
        self._left = item.size

    def _more_of_file(self, data: bytes) -> None:
        if not self._in_file or len(data) > self._left:
            raise _Disorder
        if self._incoming is not None:
            self._incoming.write(data)
        elif self._decoder is not None and self._resync is not None:
            for piece in small_chunks((data,)):
                self._resync.pages(self._decoder.feed(piece))
        self._left -= len(data)

    def _end_file(self, whole: bool) -> Outcome | None:
        if not self._in_file or (whole and self._left):
            raise _Disorder
        if not whole:
            self.abort()
            self._void = True  # the primary asks for our checksums next
            return None
        if (incoming := self._incoming) is not None:
            outcome = self._finish(lambda: incoming.finish(spare_readers=self.spares_readers))
            self._incoming = None
            return outcome
        assert self._decoder is not None
        self._decoder.finish()
        self._decoder = None
        return None

    # --- snapshots --------------------------------------------------------------------------------------------------

    def _prepare(self, reason: ResyncReason, sums: PageSums | None) -> Prepared:
        database = self._store.get(self.name)
        position, page_size = Position(0, 0), 0
        history: list[Position] = []
        epochs: Epochs = ()
        if database is not None:
            history, epochs = database.log.positions(MAX_HISTORY - 1), database.log.epochs()
        if database is not None and database.set_aside_reason is not None:
            position, sums = database.log.head, None  # its files are of no use, but what its log has may be a branch
        elif database is not None:
            position, page_size = database.position, database.page_size
            sums = database.page_checksums() if sums is None else sums
        self.abort()
        self._void = True
        self._request += 1
        if sums is None or not len(sums):
            page_size, sums = 0, _NO_SUMS
        message = stream.Resync(
            self.name, self._request, reason, page_size, len(sums), position, tuple(history), epochs
        )
        return Prepared(message, sums)

    def _begin_snapshot(self, item: SnapshotBegin) -> None:
        if self._void and item.request != self._request:
            return
        self.abort()
        self._void = False
        if self._store.get(self.name) is None:
            self._begun = item
        else:
            self._make_ready(item)

    def _is_gone(self, item: SnapshotEnd) -> bool:
        """The snapshot is that of a database that was dropped, and there is nothing of it here."""
        if not self._store.note_dropped(self.name, item.position, item.epochs):
            return False
        self._begun = None
        return True

    def _make_ready(self, item: SnapshotBegin) -> None:
        """For what the snapshot brings."""
        database = self._store.get_or_create(self.name)
        keep = item.keep_branch_after if item.has_branch else None
        shared = database.log.shared()
        if shared != database.log.head:  # rather too much than too little: an epoch does not tell these apart
            keep = shared.txid if keep is None else min(keep, shared.txid)
        recorded = database.log.agreed.recorded_after
        if recorded is not None:
            keep = recorded if keep is None else min(keep, recorded)
        self._resync = database.resync(item.page_size, keep)
        self._page_size = item.page_size

    def _take_pages(self, item: SnapshotPages) -> None:
        if self._resync is None or self._in_file:
            raise _Disorder
        if item.page_size != self._page_size:
            raise FormatError(f"pages of {item.page_size} bytes in a snapshot with pages of {self._page_size}")
        self._resync.pages(item.pages())

    def _end_snapshot(self, item: SnapshotEnd) -> Outcome:
        if self._resync is None or self._in_file:
            raise _Disorder
        resync, self._resync = self._resync, None
        try:
            return self._finish(lambda: resync.finish(item.commit, item.position, item.epochs), anew=True)
        except FormatError as error:
            return self._unfit(ResyncReason.BAD_SNAPSHOT, error)

    def _finish(self, finish: Callable[[], Position], *, anew: bool = False) -> Outcome:
        """The end of something that came in pieces. It cannot be tried again, but for ReadersInTheWay: what is missing
        is fetched anew."""
        try:
            return Applied(self.name, finish().txid, anew=anew)
        except ReadersInTheWay:
            raise
        except (OSError, DatabaseBusy, Unavailable) as error:
            if is_disk_full(error):
                self._store.events.emit(Event("diskFull", self.name, {"error": str(error)}))
            return self._unfit(ResyncReason.LOCAL, error)

    def _set_aside(self) -> Applied:
        self.abort()
        self._store.set_aside(self.name, "the primary does not have this database")
        self._void = False
        return Applied(self.name, 0, anew=True)


_NO_SUMS: PageSums = np.zeros(0, dtype=np.uint64)


def is_disk_full(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
