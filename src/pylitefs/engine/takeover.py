"""The worker's part in a change of who writes a database, see `roles`: what does not say otherwise runs there."""

from __future__ import annotations

import contextlib
import logging
import os
import time

from pylitefs.engine import ofd_locks
from pylitefs.engine.batches import Cursor
from pylitefs.engine.database import Database
from pylitefs.engine.fence import Fence
from pylitefs.engine.files import new_folder, sync_filesystem
from pylitefs.engine.grip import Grip
from pylitefs.engine.loan import epoch_of_loans
from pylitefs.engine.lost import write_info
from pylitefs.engine.page_checksums import stamp
from pylitefs.engine.registry import Registry
from pylitefs.engine.rollback_capture import database_size, journal_in_use
from pylitefs.engine.shared_wal import SharedWal
from pylitefs.engine.transaction import UnstableSource
from pylitefs.engine.wal_capture import WalCapture
from pylitefs.errors import FormatError
from pylitefs.formats.ltx.format import CHECKSUM_FLAG, Position
from pylitefs.formats.sqlite.header import DatabaseHeader
from pylitefs.formats.sqlite.wal_index import HEADER_SIZE, read_header

log = logging.getLogger("litefs.role")

_LOOK_AGAIN_S = 0.01
WITHHELD = "SQLite cannot read what an application left in its file"
"""How the reason begins why a database is set aside that was `withheld` when this node ceased to be the primary."""


def in_use(database: Database) -> bool:
    """Whether an application has it open, or is about to. Any thread."""
    with database.handles_lock:
        return database.in_use


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
    _take_content_back(database)
    database.settled_stamp = stamp(database.files.database)  # what an application writes from now on counts
    with database.handles_lock:
        database.fence, database.captures, database.yields, database.term = fence, True, False, registry.epoch
    if fds:  # now, and not before: who waits for WRITE goes on. The locks of -shm before SHARED
        for fd in reversed(fds):
            ofd_locks.unlock(fd, 0, 0)
        wal.use_shm(fds.pop())  # else nobody could tell at first what is published, where only the mount shows it
        registry.opener.close(fds)
    return True


def _take_content_back(database: Database) -> None:
    """Undo `_give_up_content`: it is the primary's own again, and no copy has replaced it."""
    with database.lock:
        if (database.set_aside_reason or "").startswith(WITHHELD):
            database.set_aside_reason, database.position = None, database.log.head
            database.rollback.suspect = True


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
        if capture_rest(registry, database, None) and not may_give_up(registry, database):
            return False
    with database.wal.mutex:
        with database.handles_lock:
            if whole and database.in_use:
                return False
            database.captures = database.yields = False
        _forget_capture(registry, database)
    if whole and database.rollback.pending:
        _give_up_content(database)
    return True


def may_give_up(registry: Registry, database: Database) -> bool:
    """After `capture_rest` has told of something: whether it is that SQLite cannot read the file, and there is, or will
    be, a primary to get a copy from."""
    return database.withheld is not None and not registry.is_primary


def yield_content(registry: Registry, database: Database) -> None:
    """Nobody else reads or writes it (EXCLUSIVE is held), and what is in its file SQLite cannot read: the log has
    nothing to get from it. Raises OSError."""
    with database.wal.mutex:
        with database.handles_lock:
            database.captures = database.yields = False
        _forget_capture(registry, database)
    _give_up_content(database)


def _give_up_content(database: Database) -> None:
    """What an application left in the file is no state of the log, so the primary has to send a copy; the file stays as
    it is until then, and is kept in lost/. `hand_over` takes it back. Raises OSError."""
    head, reason = database.log.head, database.withheld or ""
    with database.lock:
        database.rollback.clear()
        database.position = Position(head.txid, CHECKSUM_FLAG, head.epoch)
        database.set_aside_reason = f"{WITHHELD}: {reason}"
    database.emit("setAside", reason=database.set_aside_reason)
    folder = new_folder(database.files.lost)
    os.link(database.files.database, os.path.join(folder, "database"))
    write_info(folder, database.name, None, head, 0, database.set_aside_reason)
    known = {"transactions": 0, "max_txid": head.txid, "epoch": head.epoch, "to": str(head)}
    database.emit("lost", folder=folder, reason=database.set_aside_reason, **known)


def is_quiet(registry: Registry, database: Database) -> bool:
    """Before `capture_rest`, not on the worker: whether nobody is in the middle of writing the file without SQLite's
    locks, as far as that can be known (see `in_place`). Raises OSError."""
    return not registry.capture.is_foreign(database) or registry.capture.is_ready(database)


def capture_rest(registry: Registry, database: Database, grip: Grip | None, index: int = -1) -> str:
    """Writers are kept out (by `grip`, or because nobody has it open): so the files are the truth, and the log gets
    what it lacks, whatever is known of how that came to be there. What is in the way, "" if nothing is. `index`: a
    descriptor of the mount's -shm, where only that one shows its bytes; it is taken over. Raises OSError,
    UnstableSource."""
    wal, capture = database.wal, registry.capture
    if index >= 0:
        if wal.shm_fd < 0:
            wal.use_shm(index)
        else:
            registry.opener.close([index])
    if capture.is_foreign(database) and not capture.is_unchanged(database):
        return "somebody writes its file in place, without SQLite's locks"
    has_wal = stamp(database.files.wal)[0] > 0
    with wal.mutex:
        if has_wal:
            if database.rollback.pending:  # nothing else settles that beside a WAL: both are compared as one
                wal.doubt()
                database.rollback.clear()
            _flush_all(registry, database, grip)
        if not has_wal or (wal.in_doubt and wal.view.wal_header() is None):  # nothing counts but the file
            with database.lock:
                database.rollback.suspect |= wal.in_doubt
                capture.commit_point(database)
                if wal.in_doubt and not database.rollback.pending:
                    registry.opener.close(wal.forget_all())
        if not has_wal:
            _flush_all(registry, database, grip)
    if database.rollback.pending or wal.in_doubt:
        return database.withheld or "its file or its WAL cannot be read yet"
    database.withhold(None)
    return ""


def captured(registry: Registry) -> list[Database]:
    """Those that applications write, and that nothing is wrong with. Any thread."""
    return [
        database
        for database in list(registry.databases.values())
        if database.captures and database.exists and not database.is_busy and database.set_aside_reason is None
    ]


def capture_all(registry: Registry, grips: dict[str, Grip], until_s: float) -> str:
    """Writers are kept out: all logs get what they lack. What is in the way, "" if nothing is; what SQLite cannot read
    is not. Not on the worker. Raises OSError."""
    for database in captured(registry):
        while reason := _try_to_capture(registry, database, grips.get(database.name)):
            if time.monotonic() >= until_s:
                return f"{database.name}: {reason}"
            time.sleep(_LOOK_AGAIN_S)
    return ""


def _try_to_capture(registry: Registry, database: Database, grip: Grip | None) -> str:
    """One try of `capture_all`."""
    if not is_quiet(registry, database):
        return "somebody writes its file in place, without SQLite's locks"
    try:
        reason = registry.worker.submit(capture_rest, registry, database, grip, database=database.name).result()
    except UnstableSource as error:
        return str(error) or "its WAL cannot be read in peace"
    return "" if database.withheld is not None else reason


def _flush_all(registry: Registry, database: Database, grip: Grip | None) -> None:
    """What is in the WAL. Whoever holds WRITE keeps a commit that waited for replicas from being published any more;
    its writer may have been killed in between, so it is taken back, and is not in the way of a comparison. With
    `wal.mutex`."""
    wal, capture = database.wal, registry.capture
    holds_write = grip is not None and grip.is_wal is True and grip.holds_writers
    try:
        capture.flush(database)
    except UnstableSource:
        if wal.pending is None or not holds_write:
            raise
        wal.pending.gone = True
        capture.flush(database)
    if wal.pending is not None and holds_write:
        wal.pending.gone = True
        capture.flush(database)


def _is_as_large(database: Database) -> bool:
    """Whether the database file has as many pages as the log says."""
    with open(database.files.database, "rb") as file:
        found = database_size(file.read(100), os.fstat(file.fileno()).st_size)
    return found == (database.page_size, database.commit)


def compare_anew(database: Database) -> None:
    """Its files and what the capture knows of them do not come to agree: the next pass compares them with the log."""
    with database.wal.mutex:
        if database.wal.pending is not None:
            database.wal.pending.gone = True
        database.wal.doubt()


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
            if (found is None or not found.mx_frame) and not _is_as_large(database):
                wal.doubt()  # it was written to, and its WAL removed, where we could not see it
                raise UnstableSource(f"{database.name}: its file is larger or smaller than its log says")
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


def may_unmark(registry: Registry) -> bool:
    """Whether something is marked. The log and the files are on the disk then, before nothing tells that they may
    differ. Not on the worker. Raises OSError."""
    if registry.marker.names == frozenset():
        return False
    if not registry.captures_any:
        sync_filesystem(registry.data_dir)
    return True


def unmark(registry: Registry) -> None:
    """Mark only those databases which the log may still be behind of. Not on the worker. Raises OSError."""
    names = {
        database.name
        for database in list(registry.databases.values())
        if database.captures or (database.is_busy and registry.marker.covers(database.name))
    }
    registry.marker.write(epoch_of_loans(registry), names)
