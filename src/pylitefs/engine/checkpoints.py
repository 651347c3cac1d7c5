"""An application's checkpoint, as its fsyncs tell of it: frames must be captured before they can be overwritten.

A checkpoint (wal.c, walCheckpoint) fsyncs the WAL, copies pages to the database, and, if it copied all frames there
are, fsyncs the database and only then notes that all is copied. Frames are overwritten after that note and not before.
So the frames are taken into memory while the checkpoint copies, and the fsync of the database waits for what is left.
A checkpoint that does not get to the end has no such fsync, and its frames stay.

Without a wal-index to look at (`locking_mode=EXCLUSIVE`) nobody can tell a commit from a checkpoint, nor how far that
goes: then everything is awaited at its end. So an fsync of the WAL never waits, and is never refused: it may be a
commit's. The last fsync of a checkpoint is, while the log cannot be written: SQLite leaves the WAL as it is, and tries
again. With synchronous=OFF there are no fsyncs: see the gap detector in `wal_capture`.
"""

from __future__ import annotations

from pylitefs.engine.commit_points import wal_in_use
from pylitefs.engine.continuation import finish
from pylitefs.engine.database import Database
from pylitefs.engine.gated import GatedCommits
from pylitefs.engine.store import Store
from pylitefs.engine.wal_capture import BARRIER_FRAMES
from pylitefs.ports import Then


class Checkpoints:
    """On FUSE threads, on the primary, where nothing else is said."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.gated = GatedCommits(store)

    def before_wal_fsync(self, database: Database, then: Then) -> None:
        self.gated.before_wal_fsync(database)
        if not database.wal.checkpoint_running():
            then(None)
            return
        self._store.capture.checkpoint_begins(database)
        # On the worker: the thread that answers is on the application's processor, and would hold the checkpoint up.
        self._store.worker.post(self._collect, database, database=database.name)
        then(None)

    def _collect(self, database: Database) -> None:
        self._store.capture.collect_now(database, ends=False)

    def before_database_fsync(self, database: Database, then: Then) -> None:
        wal = database.wal
        awaited = wal.is_awaited() or (not wal.has_index() and wal_in_use(database))
        if not awaited or self._store.capture.collect_now(database):
            then(None)
        else:
            self._store.worker.post(self._on_worker, database, then, database=database.name)

    def _on_worker(self, database: Database, then: Then) -> None:
        """A backlog that would take long is protected by the barrier instead, unless the checkpoint wants the WAL to
        itself."""
        wal, capture = database.wal, self._store.capture

        def work() -> None:
            capture.flush_if_possible(database)
            with wal.mutex:
                wal.mark_synced()
            capture.let_restart(database)

        def protected(held: bool) -> None:
            if held:
                then(None)
                capture.wake(database)
            else:
                finish(then, work)

        try:
            capture.open_shm(database)
            with wal.mutex:
                large = wal.backlog() > BARRIER_FRAMES
        except OSError as error:
            then(error)
            return
        if large and not wal.checkpoint_restarts():
            capture.with_barrier(database, protected)
        else:
            finish(then, work)
