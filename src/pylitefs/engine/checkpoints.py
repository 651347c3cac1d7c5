"""An application's checkpoint, as its fsyncs tell of it: frames must be captured before they can be overwritten.

A checkpoint (wal.c, walCheckpoint) fsyncs the WAL, copies pages to the database, and, if it copied all frames there
are, fsyncs the database and only then notes that all is copied. Frames are overwritten after that note and not before.
So the frames are taken into memory while the checkpoint copies, and the fsync of the database waits for what is left.
A checkpoint that does not get to the end has no such fsync, and its frames stay.

Without a wal-index to look at (`locking_mode=EXCLUSIVE`) nobody can tell how far a checkpoint goes, and every fsync of
the WAL waits. With synchronous=OFF there are no fsyncs: see the gap detector in `wal_capture`.
"""

from __future__ import annotations

from pylitefs.engine.commit_points import finish
from pylitefs.engine.database import Database
from pylitefs.engine.store import Store
from pylitefs.engine.wal_capture import BARRIER_FRAMES
from pylitefs.ports import Then


class Checkpoints:
    """On FUSE threads, on the primary."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def before_wal_fsync(self, database: Database, then: Then) -> None:
        if not database.wal.checkpoint_running():
            then(None)
        elif self._store.capture.checkpoint_begins(database):
            then(None)
            self._store.capture.collect_now(database)
        else:
            self._capture_first(database, then)

    def before_database_fsync(self, database: Database, then: Then) -> None:
        if database.wal.is_awaited():
            self._capture_first(database, then)
        else:
            then(None)

    def _capture_first(self, database: Database, then: Then) -> None:
        if self._store.capture.collect_now(database):
            then(None)
        else:
            self._store.worker.post(self._on_worker, database, then, database=database.name)

    def _on_worker(self, database: Database, then: Then) -> None:
        """A backlog that would take long is protected by the barrier instead, unless the checkpoint wants the WAL to
        itself."""
        wal, capture = database.wal, self._store.capture
        capture.open_shm(database)

        def work() -> None:
            capture.flush_if_possible(database)
            wal.mark_synced()
            capture.let_restart(database)

        def protected(held: bool) -> None:
            if held:
                then(None)
                capture.wake(database)
            else:
                finish(then, work)

        with wal.mutex:
            large = wal.backlog() > BARRIER_FRAMES
        if large and not wal.checkpoint_restarts():
            capture.with_barrier(database, protected)
        else:
            finish(then, work)
