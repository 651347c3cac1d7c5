"""The worker's part in a change of who writes a database, see `roles`: what does not say otherwise runs there."""

from __future__ import annotations

import contextlib
import logging
import os

from pylitefs.engine import ofd_locks
from pylitefs.engine.batches import Cursor
from pylitefs.engine.database import Database
from pylitefs.engine.fence import Fence
from pylitefs.engine.grip import Grip
from pylitefs.engine.page_checksums import stamp
from pylitefs.engine.registry import Registry
from pylitefs.engine.rollback_capture import journal_in_use
from pylitefs.engine.shared_wal import SharedWal
from pylitefs.engine.transaction import UnstableSource
from pylitefs.engine.wal_capture import WalCapture
from pylitefs.errors import FormatError
from pylitefs.formats.sqlite.header import DatabaseHeader
from pylitefs.formats.sqlite.wal_index import HEADER_SIZE, read_header

log = logging.getLogger("litefs.role")


def in_use(database: Database) -> bool:
    """Whether an application has it open, or is about to. Any thread."""
    with database.handles_lock:
        return database.app_handles > 0 or database.opening > 0


def sync_applied(registry: Registry, *databases: Database) -> None:
    """Before the marker: from then on the files count, and what was durable by the log alone must be in them. Not on
    the worker. Raises OSError."""

    def work(database: Database) -> None:
        if database.replica is not None:
            database.replica.sync()

    active = [database for database in databases if database.replica is not None]
    for done in [registry.worker.submit(work, database, database=database.name) for database in active]:
        done.result()


def hand_over(registry: Registry, database: Database, fence: Fence) -> bool:
    """Applications write from now on. The capture goes on right behind the daemon's last frame. False: not now, it is
    just being made active."""
    if registry.is_primary:
        database.log.agreed.end()  # all that it has is history from now on
    if database.captures:
        with contextlib.suppress(OSError, UnstableSource):  # what was committed until now is of the epoch before
            registry.capture.flush(database)
        with database.handles_lock:
            database.fence, database.yields, database.term = fence, False, registry.epoch
        return True
    if registry.apply.is_made_active(database):
        return False
    replica, fds = database.replica, []
    database.wal_stands_in = _stands_in(database)
    wal = WalCapture(database.files, database.file_sums_expected)
    if stamp(database.files.wal)[0]:
        wal.doubt()  # unless it is ours, and known
    if replica is not None:
        try:
            end, descriptors = replica.hand_over()
        except OSError as error:
            log.warning("%s: its WAL could not be passed on, it will be compared: %s", database.name, error)
            replica.close()
        else:
            wal.cursor, fds = Cursor(end.salts, end.mx_frame, end.change), list(descriptors)
    with database.lock:
        database.rollback.clear()
    database.replica, database.wal = None, wal
    with database.handles_lock:
        database.fence, database.captures, database.yields, database.term = fence, True, False, registry.epoch
    if fds:  # now, and not before: who waits for WRITE goes on. The locks of -shm before SHARED
        for fd in reversed(fds):
            ofd_locks.unlock(fd, 0, 0)
        wal.use_shm(fds.pop())  # else nobody could tell at first what is published, where only the mount shows it
        registry.opener.close(fds)
    return True


def _stands_in(database: Database) -> bool:
    """Whether applications that go on in the daemon's WAL have a database in a rollback mode. Page 1 tells: the newest,
    which may be in the WAL only."""
    if database.replica is None:
        return bool(stamp(database.files.wal)[0]) and database.journal_mode == "rollback"
    try:
        return DatabaseHeader.unpack(database.replica.read_page(1)).journal_mode == "rollback"
    except (FormatError, OSError):
        return True


def yield_at_rest(registry: Registry, database: Database) -> bool:
    """Nobody has it open, and nothing but the file is there: the log gets what it lacks, and that is all. False if
    that is not so. Raises OSError, UnstableSource."""
    files = database.files
    whole = database.exists and not database.is_busy and database.set_aside_reason is None
    if whole:
        if in_use(database) or stamp(files.wal)[0] or journal_in_use(files.journal):
            return False
        if not capture_rest(registry, database, None):
            return False
    with database.wal.mutex:
        with database.handles_lock:
            if whole and (database.app_handles or database.opening):
                return False
            database.captures = database.yields = False
        _forget_capture(registry, database)
    return True


def capture_rest(registry: Registry, database: Database, grip: Grip | None, index: int = -1) -> bool:
    """Writers are kept out (by `grip`, or because nobody has it open): the log gets what was committed. `index`: a
    descriptor of the mount's -shm, where only that one shows its bytes; it is taken over. False if a file is just
    being copied over it. Raises OSError, UnstableSource."""
    wal, capture = database.wal, registry.capture
    if index >= 0:
        if wal.shm_fd < 0:
            wal.use_shm(index)
        else:
            registry.opener.close([index])
    if capture.is_foreign(database):
        return False
    if not stamp(database.files.wal)[0]:
        with wal.mutex, database.lock:
            if wal.in_doubt:  # there is no WAL any more, so the file tells
                database.rollback.suspect = True
            capture.commit_point(database)
            if wal.in_doubt and not database.rollback.pending:
                registry.opener.close(wal.forget_all())
    elif database.rollback.suspect:  # nothing settles that while there is a WAL: compare the file and the WAL as one
        with wal.mutex:
            wal.doubt()
            capture.flush(database)
            if not wal.in_doubt:
                with database.lock:
                    database.rollback.suspect = False
    capture.flush(database)
    with wal.mutex:
        if wal.pending is not None and grip is not None and grip.is_wal:  # and who holds WRITE does not publish it
            wal.pending.gone = True
            capture.flush(database)
    return not database.rollback.pending


def go_on(registry: Registry, database: Database, grip: Grip) -> None:
    """Everything is captured: the daemon writes from now on. Raises OSError, FormatError, UnstableSource; nothing has
    changed then, and the grip holds."""
    wal, files = database.wal, database.files
    replica = SharedWal(files, database.page_size, database.commit, os.stat(files.database).st_mode & 0o777)
    with wal.mutex:
        if wal.in_doubt or wal.pending is not None or len(wal.collected) or database.failing is not None:
            raise UnstableSource
        if grip.is_wal:
            found = read_header(os.pread(grip.shm, HEADER_SIZE, 0))
            if found is not None and found.mx_frame:
                if (wal.cursor.salts, wal.cursor.frame) != (found.salts, found.mx_frame):
                    raise UnstableSource
                if (found.page_size, found.page_count) != (database.page_size, database.commit):
                    raise UnstableSource
            replica.adopt(grip.descriptors(), holds_checkpoint=grip.holds_checkpoint)
        else:
            replica.begin_with(grip.descriptors())
        with database.lock:
            database.rollback.clear()
        with database.handles_lock:
            database.captures = database.yields = False
        database.replica, database.durable_txid = replica, 0
        _forget_capture(registry, database)
    grip.hand_over()
    registry.apply.idle(database)


def _forget_capture(registry: Registry, database: Database) -> None:
    registry.capture.forget(database)
    fds = database.wal.forget_all()
    database.wal = WalCapture(database.files, database.file_sums_expected)
    registry.opener.close(fds)


def wake_all(registry: Registry) -> None:
    """What was written while nobody listened has woken nobody: look for it."""
    for database in list(registry.databases.values()):
        wake(registry, database)


def wake(registry: Registry, database: Database) -> None:
    """The same for one database, in its WAL and in its file."""
    if database.captures and database.exists:
        registry.capture.wake(database)
        if registry.capture.has_unseen_writes(database):
            registry.capture.wake_rollback(database)
