"""What the store does for its databases: ties capture, apply, snapshots and resync to one database object."""

from __future__ import annotations

import errno
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from pylitefs.engine.apply import Apply
from pylitefs.engine.capture import Capture
from pylitefs.engine.commit_points import wal_in_use
from pylitefs.engine.database import Database
from pylitefs.engine.durable import durable
from pylitefs.engine.epochs import FIRST
from pylitefs.engine.incoming import IncomingFile
from pylitefs.engine.resync import Resync
from pylitefs.engine.snapshot import SnapshotReader, copy_to, file_checksums
from pylitefs.formats.ltx.format import Position


class StoreServices:
    """Implements `database.Services`."""

    def __init__(self, capture: Capture, apply: Apply) -> None:
        self.capture = capture
        self.applier = apply
        self.epoch = FIRST  # of what is written here

    def flush(self, database: Database) -> Future[Position]:
        if database.captures:
            return self.capture.flush_later(database)
        done: Future[Position] = Future()
        done.set_result(database.position)
        return done

    def compare(self, database: Database) -> Future[Position]:
        """Something was written that neither a hook nor the WAL has told of. Any thread."""
        if wal_in_use(database):
            with database.wal.mutex:
                database.wal.doubt()
        else:
            with database.lock:
                database.rollback.suspect = True
        return self.flush(database)

    def snapshot(self, database: Database, known: NDArray[np.uint64] | None) -> SnapshotReader:
        return SnapshotReader(database, known)

    def copy_to(self, database: Database, path: str) -> Position:
        return copy_to(database, path)

    def file_checksums(self, database: Database) -> NDArray[np.uint64]:
        return file_checksums(database)

    def apply(self, database: Database, data: bytes, *, spare_readers: bool = False) -> Position:
        _free(database)
        return self.applier.apply(database, data, spare_readers=spare_readers)

    def receive(self, database: Database, min_txid: int, max_txid: int) -> IncomingFile:
        _free(database)
        return IncomingFile(self.applier, database, min_txid, max_txid)

    def resync(self, database: Database, page_size: int, keep_branch_after: int | None) -> Resync:
        _free(database)
        return Resync(self.applier, database, page_size, keep_branch_after)

    def durable(self, database: Database) -> int:
        return durable(database)


def _free(database: Database) -> None:
    """Nobody may write to a database that a process of an earlier mount still has open, or that applications still
    write to: to be tried again."""
    if database.captures:
        raise OSError(errno.EBUSY, f"{database.name}: applications write to it")
    if database.is_busy:
        raise OSError(errno.EBUSY, f"{database.name}: {database.set_aside_reason or 'busy'}")
