"""One database on this node: its position, log, checksum table and the state of capture or apply.

What changes the position goes through `record` (a transaction of our own) or `accept` (one that was
replicated to us), under the database's lock. Everything else about capture lives in `capture`, about apply
in `apply`.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from pylitefs.engine.durable import log_durable
from pylitefs.engine.epochs import FIRST, Lines
from pylitefs.engine.fence import Fence
from pylitefs.engine.files import DatabaseFiles, sync_folder
from pylitefs.engine.live_files import LiveFiles
from pylitefs.engine.loan import Loan
from pylitefs.engine.ltx_log import EMPTY, LogEntry, LtxLog
from pylitefs.engine.page_checksums import CleanState, PageChecksums, stamp
from pylitefs.engine.proof import Damage, SoundPages
from pylitefs.engine.rollback_capture import RollbackCapture
from pylitefs.engine.shared_wal import SharedWal
from pylitefs.engine.tombstones import Tombstone
from pylitefs.engine.transaction import Change, Pages, ReadPage, TransactionWriter
from pylitefs.engine.wal_capture import WalCapture
from pylitefs.events import Event, EventBus
from pylitefs.formats.ltx.format import Header, Position

if TYPE_CHECKING:
    from pylitefs.engine.incoming import IncomingFile
    from pylitefs.engine.resync import Resync
    from pylitefs.engine.snapshot import SnapshotReader


class Services(Protocol):
    """What the store does for its databases (`store.StoreServices`). `epoch`: of what this node writes."""

    epoch: int

    def flush(self, database: Database) -> Future[Position]: ...
    def compare(self, database: Database) -> Future[Position]: ...
    def snapshot(self, database: Database, known: NDArray[np.uint64] | None) -> SnapshotReader: ...
    def copy_to(self, database: Database, path: str) -> Position: ...
    def file_checksums(self, database: Database) -> NDArray[np.uint64]: ...
    def apply(self, database: Database, data: bytes, *, spare_readers: bool = False) -> Position: ...
    def receive(self, database: Database, min_txid: int, max_txid: int) -> IncomingFile: ...
    def resync(self, database: Database, page_size: int, keep_branch_after: int | None) -> Resync: ...
    def durable(self, database: Database) -> int: ...


class Database(LiveFiles, Damage):
    """All attributes may be read from any thread; `lock` guards position, table, `rollback` and the log's growth."""

    def __init__(self, name: str, files: DatabaseFiles, events: EventBus) -> None:
        super().__init__()
        self.name = name
        self.files = files
        self.events = events
        self.lock = threading.RLock()
        self.position = EMPTY
        self.page_size = 0
        self.commit = 0
        self.timestamp_ms = 0
        self.set_aside_reason: str | None = None  # why it is not replicated, None if all is well
        self.compress = True  # pages in the log
        self.term = 0  # the epoch in which applications of this node were last let in; 0: not since the start
        self.damage: dict[int, int] = {}  # pages that do not match their checksums, not replaced yet: what they have
        self.was_measured = False  # since they were found
        self.sound = SoundPages(files)
        self.is_busy = False  # a process of an earlier mount still has its files open: nobody may touch them
        self.captures = True  # applications write it, and what they commit is recorded; False: only the daemon does
        self.yields = False  # `captures` is to end: nothing may be committed any more
        self.fence = Fence(math.inf)
        self.loan: Loan | None = None  # while this node writes it under a HALT lock
        self.opening = 0  # handles that were let in, and are not open yet
        self.is_open: Callable[[], bool] = lambda: False  # whether an application has the file of this name open
        self.log = LtxLog(files.ltx)
        self._table: PageChecksums | None = None
        self._table_dirty = False
        self._noted = (0, 0)  # size and time of the file when it was known where it stands, see `evidence`
        self.wal = WalCapture(files, self.file_sums_expected)
        self.rollback = RollbackCapture(files)
        self.replica: SharedWal | None = None
        self.upkeep_scheduled = False
        self.applied_s = 0.0  # monotonic time of the last apply
        self.settled_stamp = (0, 0)  # of the file when unseen writes were last looked for
        self.durable_txid = 0  # replica: what is known to be on disk
        self.log_durable_txid = 0  # replica: up to where the log is on disk, from `durable_txid` on
        self.fsync_follows = False  # primary: what is written to the WAL was followed by an fsync that waits, last time
        self._services: Services | None = None
        self.failing: str | None = None  # why the log cannot be written (disk full)
        self.tombstone: Tombstone | None = None  # what was dropped of this name before: positions go on from there
        self.is_forgotten = False  # only a tombstone is left: another object has the name, or will have it

    # -- queries ---------------------------------------------------------------------------------------------

    @property
    def exists(self) -> bool:
        """Whether there is a database now (not dropped, not still empty)."""
        return self.commit > 0

    @property
    def in_use(self) -> bool:
        """Whether an application has the database file open, or is about to: also who opened it when it was a plain
        file, or had another name. With `handles_lock` where it must not change."""
        return self.app_handles > 0 or self.opening > 0 or self.is_open()

    @property
    def may_commit(self) -> bool:
        """Whether a commit of an application may be answered now."""
        return self.captures and not self.yields and self.fence.holds()

    @property
    def epoch(self) -> int:
        """In which epoch the newest transaction was written."""
        return self.log.head.epoch

    @property
    def writing_epoch(self) -> int:
        """The epoch of what is written here. What is recorded late, when another has begun, is of the one in which it
        was committed."""
        if self.loan is not None:
            return self.loan.epoch
        return self.term or (self._services.epoch if self._services is not None else FIRST)

    @property
    def size_bytes(self) -> int:
        return self.page_size * self.commit

    @property
    def table(self) -> PageChecksums:
        """The checksum table; opened when it is first needed. Under the lock."""
        if self._table is None:
            self._table = PageChecksums(self.files.checksums)
            self._table.reserve(self.commit)
        return self._table

    def page_checksums(self) -> NDArray[np.uint64]:
        with self.lock:
            return self.table.values[: self.commit].copy() if self.commit else np.zeros(0, dtype=np.uint64)

    @property
    def is_damaged(self) -> bool:
        return bool(self.damage)

    def file_sums_expected(self) -> NDArray[np.uint64]:
        """What the files are known to hold, damaged pages as they are: what differs from it was written by somebody."""
        sums = self.page_checksums()
        for pgno, found in list(self.damage.items()):
            if pgno <= len(sums):
                sums[pgno - 1] = found
        return sums

    # -- what others ask of a database -------------------------------------------------------------------------

    def serve_by(self, services: Services) -> None:
        self._services = services

    @property
    def _by(self) -> Services:
        assert self._services is not None, "the store did not set this database up"
        return self._services

    def flush(self) -> Future[Position]:
        """Barrier: the position that covers every commit that had returned before the call. Any thread."""
        return self._by.flush(self)

    def compare(self) -> Future[Position]:
        """Record in what the files differ from the log, but for damage that is known: an application wrote it."""
        return self._by.compare(self)

    def snapshot(self, known: NDArray[np.uint64] | None) -> SnapshotReader:
        """Read the whole database while it is being written. Blocking; not on the worker."""
        return self._by.snapshot(self, known)

    def file_checksums(self) -> NDArray[np.uint64]:
        """The checksums of all pages as the files hold them. Blocking; not on the worker."""
        self.was_measured = True
        return self._by.file_checksums(self)

    def copy_to(self, path: str) -> Position:
        """A consistent copy of the database file. Blocking; not on the worker."""
        return self._by.copy_to(self, path)

    def apply(self, data: bytes, *, spare_readers: bool = False) -> Position:
        """Replica, worker: one LTX file. FormatError and PositionMismatch change nothing, nor does ReadersInTheWay."""
        return self._by.apply(self, data, spare_readers=spare_readers)

    def receive(self, min_txid: int, max_txid: int) -> IncomingFile:
        """Replica, worker: a large LTX file in pieces."""
        return self._by.receive(self, min_txid, max_txid)

    def resync(self, page_size: int, keep_branch_after: int | None) -> Resync:
        """Replica, worker: rebuild the primary's state."""
        return self._by.resync(self, page_size, keep_branch_after)

    def durable(self) -> int:
        """Replica, worker: make what was applied durable; its TXID."""
        return self._by.durable(self)

    def log_durable(self) -> int | None:
        """Replica, blocking, any thread: the same by the log alone; None if that would not suffice now."""
        return log_durable(self)

    # -- changes ---------------------------------------------------------------------------------------------

    def record(
        self, change: Change, pages: Pages, read_missing: ReadPage, is_stable: Callable[[], bool], source: str
    ) -> LogEntry | None:
        """Write a transaction of this node into the log and move the position; None if nothing changed. `source` tells
        the listeners of "tx" where it came from: "capture", "import", "repair", "drop".

        Raises UnstableSource, OSError; everything is then as before.
        """
        started = time.monotonic()
        with self.lock:
            if not change.wal_size:  # the database file was written to, and its time may reach the disk later
                self._forget_noted()
            self.unclean()
            writer = TransactionWriter(
                self.log, self.table, self.position, self.page_size, self.commit, change,
                compress=self.compress, epoch=self.writing_epoch,
            )  # fmt: skip
            entry = writer.write(pages, read_missing, is_stable)
            if entry is None:
                return None
            self.position = self.log.head
            self.page_size, self.commit = change.page_size, change.commit
            self.timestamp_ms = writer.header.timestamp_ms
            self.release_if_gone()
            self.announce(writer.header, entry, writer.page_count, source, time.monotonic() - started)
            return entry

    def record_file(self, header: Header, data: bytes, checksum: int) -> None:
        """A whole LTX file that changes nothing but the position, to `checksum`. Raises OSError."""
        path = self.log.temporary()
        with self.lock:
            self.unclean()
            with open(path, "wb") as file:
                file.write(data)
            entry = self.log.publish(path, header, checksum)
            self.position = self.log.head
            self.announce(header, entry, 1, "repair", 0.0)

    def accept(
        self, header: Header, entry: LogEntry, pgnos: NDArray[np.uint32], sums: NDArray[np.uint64], started_s: float
    ) -> None:
        """Move the position over a replicated transaction that is in the log and in the database."""
        with self.lock:
            self.unclean()
            table = self.table
            table.reserve(max(header.commit, self.commit))
            if header.page_size != self.page_size:
                table.values[:] = 0
            if len(pgnos):
                table.values[pgnos - 1] = sums
            if header.commit < self.commit:
                table.values[header.commit : self.commit] = 0
            self.position = self.log.head
            self.page_size, self.commit = header.page_size, header.commit
            self.timestamp_ms = header.timestamp_ms
            self.withhold(None)
            self.log.agreed.end()  # what follows it was the primary's
            self.release_if_gone()
            self.announce(header, entry, len(pgnos), "apply", time.monotonic() - started_s)

    def reposition(
        self, position: Position, page_size: int, commit: int, sums: NDArray[np.uint64], epochs: Lines | None = None
    ) -> None:
        """Start over at a position that came from elsewhere, with the checksums of all pages and its history's epochs
        (None: it is our own history)."""
        with self.lock:
            self.unclean()
            self.log.restart_at(position, epochs)  # first: if it fails, table and position are still the old ones
            self.table.reset()
            self.table.reserve(commit)
            self.table.values[:commit] = sums
            self.position, self.page_size, self.commit = position, page_size, commit
            self.timestamp_ms = int(time.time() * 1000)
            self._noted = (0, 0)
            self.durable_txid = self.log_durable_txid = 0
            self.withhold(None)
            self._write_unclean()
            self.release_if_gone()

    def announce(self, header: Header, entry: LogEntry, pages: int, source: str, seconds: float) -> None:
        """Tell the listeners that the position has moved over an entry."""
        latency = {"latency_s": max(0.0, time.time() - header.timestamp_ms / 1000)} if source == "apply" else {}
        self.emit(
            "tx", **latency, txid=header.max_txid, min_txid=header.min_txid,
            post_apply_checksum=self.position.checksum, page_size=header.page_size, commit=header.commit,
            timestamp_ms=header.timestamp_ms, pages=pages, size_bytes=entry.size_bytes, source=source, seconds=seconds,
        )  # fmt: skip

    # -- stop and start --------------------------------------------------------------------------------------

    def unclean(self) -> None:
        """From now on the table does not describe the files by itself; noted on disk before the first change."""
        if self.is_forgotten:
            raise OSError(errno.ESTALE, f"{self.name}: it was dropped long ago")
        if not self._table_dirty:
            self._table_dirty = True
            self._write_unclean()

    def note_files(self) -> None:
        """The database file is at `position`, and nobody has it open: as long as it is not written to, its size and
        time prove to a later start that it stands there."""
        with self.lock:
            self.sync_log()
            self._table_dirty = True
            self._noted = stamp(self.files.database)
            self._write_unclean()

    def _forget_noted(self) -> None:
        if self._noted != (0, 0):
            self._noted, self._table_dirty = (0, 0), False

    def _write_unclean(self) -> None:
        state = CleanState(self.page_size, self.commit, self.position, clean=False, database=self._noted)
        self.table.write_state(state)

    def close(self, *, clean: bool) -> None:
        """Release everything. `clean`: the log holds everything and no application can change the files any more."""
        with self.lock:
            self._close_now(self.wal.forget_all())
            if self.replica is not None:
                self.replica.close()
                self.replica = None
            if clean and self._table_dirty and (self.exists or not self.log.count):  # else the log says all there is
                stamps = stamp(self.files.database), stamp(self.files.wal)
                self.table.write_state(CleanState(self.page_size, self.commit, self.position, True, *stamps))
                self._table_dirty = False
            if self._table is not None:
                self._table.close()
                self._table = None

    def release_if_gone(self) -> None:
        """A database that was dropped needs no descriptors: there may be thousands of them."""
        with self.lock:
            if not self.commit and self._table is not None:
                self._table.close()
                self._table = None

    def adopt(self, state: CleanState) -> None:
        """Start from what an orderly stop wrote."""
        self.page_size, self.commit, self.position = state.page_size, state.commit, state.position
        self._noted = state.database
        self.table.reserve(state.commit)  # it was opened when the size was not known yet

    def begin_after(self, tombstone: Tombstone) -> None:
        """Nothing is here but that."""
        self.log.restart_at(tombstone.position, tombstone.epochs, durably=False)
        self.position, self.moves = tombstone.position, tombstone.moves

    def set_files(self, files: DatabaseFiles) -> None:
        """The live files are elsewhere now (mounted, unmounted)."""
        self.release_files()
        before = self.wal
        self.files = files
        self.wal = WalCapture(files, self.file_sums_expected)
        self.wal.collected, self.wal.cursor, self.wal.pending = before.collected, before.cursor, before.pending

    def release_files(self) -> None:
        """Close what the capture has open of the live files. How far it has come is kept: what is missed is noticed."""
        with self.wal.mutex:
            self._close_now(self.wal.release())

    @staticmethod
    def _close_now(fds: list[int]) -> None:
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)

    def sync_log(self) -> None:
        """Make the newest log entry and its name durable."""
        entries = self.log.entries()
        if entries:
            with open(entries[-1].path, "rb") as file:
                os.fsync(file.fileno())
            sync_folder(self.files.ltx)

    def emit(self, kind: str, **data: object) -> None:
        self.events.emit(Event(kind, self.name, data))
