"""Bringing a database to a known position when the node starts. Nothing is mounted yet.

Clean: the checksum table was written by an orderly stop and the files are as they were then. The database is not read.
Otherwise the files are brought to what SQLite itself would see, all page checksums are computed, and:

    found                                    done                  why nothing is lost that was committed
    the database equals the log's head       ready                 the same pages
    a hot journal, and the database as it    the journal goes      the log has that transaction whole: it was synced,
    is equals the log's head                                       and only the unlink was missing
    another hot journal                      rolled back, go on    as SQLite does
    the WAL proves that the database is      redo                  the log's head is later (see `evidence`)
    behind the log's head
    no WAL, and the database was not         redo                  what the log has since came by a WAL that did not
    written to since we noted where it                             reach the disk
    stands
    a note that the log was being applied    redo                  an earlier start was cut off
    no database file or an empty one, and    redo                  nothing else is there
    the log begins with TXID 1
    no WAL, or one the log does not know     difference recorded   when the last connection closes, the database is
                                                                   synced and the WAL removed; the log's tail is not
                                                                   synced. So the database is behind in no such case,
                                                                   and may be ahead: the files win
    no restart of the machine since          difference recorded   the files have every write, the log may lack some
    a table that says "clean", and other     difference recorded   somebody has put them there
    files than it says
    … and SQLite could not read the file,    withheld              what an application left is served as it is; replicas
    or it is empty                           (empty: dropped)      keep the log's head until there is a database again
    a replica, equal to an earlier position  redo                  every position of its log was the primary's, which
                                                                   sends what follows
    a replica, anything else                 position unknown      the primary sends what differs

A redo takes the log's newest entries, back to where its result, which is predicted, is the log's head. A difference is
recorded as a transaction, when no replica can give anything back any more (`Startup.settle`). What the files prove is
kept until then: a start that is cut off leaves the next one as much as it had.

While files are still held by a process of an earlier mount (its daemon was killed, the kernel still passes the
process's writes through), nothing is touched: two sets of locks on one file would corrupt it.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylitefs.engine.commit_points import file_pages
from pylitefs.engine.database import Database
from pylitefs.engine.evidence import Standing, WalEnd, standing
from pylitefs.engine.files import DatabaseFiles, read_at
from pylitefs.engine.leftovers import forget_journal, is_in_use, normalise, remove_wal
from pylitefs.engine.ltx_log import LogEntry
from pylitefs.engine.page_checksums import CleanState, stamp
from pylitefs.engine.redo import REDO_ENTRIES, forget_redo, redo, redo_is_noted
from pylitefs.engine.rollback_capture import database_size, journal_in_use, whole_size
from pylitefs.engine.super_journal import is_undecided
from pylitefs.engine.transaction import Change
from pylitefs.errors import FormatError
from pylitefs.formats.ltx.checksum import database_checksum, page_checksums
from pylitefs.formats.ltx.decoder import Reader
from pylitefs.formats.ltx.encoder import encode
from pylitefs.formats.ltx.format import CHECKSUM_FLAG, Header, Position

log = logging.getLogger("litefs.recovery")

_SUM_BYTES = 4 << 20


class Outcome(enum.Enum):
    CLEAN = "clean"
    VERIFIED = "verified"
    REDONE = "redone"
    DIFFERS = "differs"  # needs `record_difference` (primary) or a resync (replica)
    EMPTY = "empty"  # dropped or never written
    BUSY = "busy"  # an old process still has it open
    WITHHELD = "withheld"  # primary: applications left what is no database; it stands at the log's head


@dataclass(frozen=True)
class PreviousSums:
    """The page checksums at the log's head, which survived in the table's file."""

    page_size: int
    values: NDArray[np.uint64]


@dataclass
class Recovered:
    """`dropped`: torn log entries that were removed. `previous`: see `record_difference`. `not_ahead`: the database
    equals the log's head, and it is proven that it has seen nothing that comes later."""

    outcome: Outcome
    dropped: list[str]
    previous: PreviousSums | None = None
    wal_end: WalEnd | None = None
    not_ahead: bool = False


@dataclass(frozen=True)
class Circumstances:
    """Of a start. `super_journal_dirs`: where a super-journal named in a rollback journal may lie (its base name is
    looked up there). `same_boot`: the machine has not been restarted since the files were last written, so no write was
    lost. `is_primary`: what the files hold is the truth."""

    super_journal_dirs: list[str]
    same_boot: bool = False
    is_primary: bool = True


def recover(database: Database, start: Circumstances) -> Recovered:
    """Bring one database to a known state; see the table above. Raises FormatError, OSError if it cannot be read."""
    files = database.files
    if is_in_use(files):
        _open_log(database, verify=False, tidy=False)
        database.position = database.log.head
        return Recovered(Outcome.BUSY, [])
    state = database.table.read_state()
    if state is not None and _is_untouched(files, state):
        dropped = _open_log(database, verify=False)
        if not dropped and (database.log.head == state.position or _is_beyond_log(database, state.position)):
            database.adopt(state)
            if database.log.head != state.position:
                database.log.restart_at(state.position)
            normalise(files, start.super_journal_dirs)
            remove_wal(files)
            return Recovered(Outcome.CLEAN if state.commit else Outcome.EMPTY, [], not_ahead=not state.commit)
    found = _recover_unclean(database, state, start)
    forget_redo(database)
    if found.outcome is Outcome.EMPTY:
        return found  # there is no file, and nothing to note about it: of dropped names there may be many
    if found.not_ahead:
        database.note_files()
    elif found.outcome is not Outcome.DIFFERS:
        database.unclean()  # so that the next orderly stop writes down what was found out
    return found


def _open_log(database: Database, *, verify: bool, tidy: bool = True) -> list[str]:
    """Where it does not come to the tombstone of its name, it is what is left of a database that was being forgotten,
    or the log of one that was made again is lost: it begins there."""
    dropped = database.log.open(verify=verify, tidy=tidy)
    if database.tombstone is not None and _is_before(database.log.head, database.tombstone.position):
        database.begin_after(database.tombstone)
    return dropped


def _is_before(position: Position, other: Position) -> bool:
    return (max(position.epoch, 1), position.txid) < (max(other.epoch, 1), other.txid)


def _is_beyond_log(database: Database, position: Position) -> bool:
    """Whether a position came from elsewhere (a snapshot), and the log has no entries since."""
    if database.log.count:
        return False
    return database.tombstone is None or not _is_before(position, database.tombstone.position)


def _is_untouched(files: DatabaseFiles, state: CleanState) -> bool:
    return (
        state.clean
        and (state.database[0] > 0 or not state.commit)  # else somebody had removed it before the stop
        and stamp(files.database) == state.database
        and stamp(files.wal) == state.wal
        and not journal_in_use(files.journal)
    )


def _recover_unclean(database: Database, state: CleanState | None, start: Circumstances) -> Recovered:
    files = database.files
    dropped = _open_log(database, verify=True)
    if state is not None and (
        database.log.head.txid < state.position.txid
        or (not database.log.count and _is_before(database.log.head, state.position))
    ):
        database.log.restart_at(state.position)  # a position without log entries: from a snapshot
    head_header = _head_header(database)
    previous = _previous_sums(database, head_header)
    _keep_what_the_log_has(database, head_header, start)
    is_as_noted = state is not None and not state.clean and stamp(files.database) == state.database
    wal_end = normalise(files, start.super_journal_dirs)
    database.position = head = database.log.head
    files_count = start.same_boot or (state is not None and state.clean)
    if start.is_primary and files_count and previous is not None and not _is_readable(files.database):
        _withhold(database, previous)
        return Recovered(Outcome.WITHHELD, dropped, previous, wal_end)
    if stamp(files.database)[0] == 0:
        remove_wal(files)  # of another file, or of none
        outcome = _recover_missing(database, head, head_header, state)
        return Recovered(outcome, dropped, not_ahead=outcome is not Outcome.DIFFERS)
    page_size, commit = load_checksums(database)
    checksum = database_checksum(database.table.values[:commit])
    database.page_size, database.commit = page_size, commit
    proven = standing(_newest_headers(database), wal_end)
    if state is not None and is_as_noted and wal_end is None:
        proven = Standing.BEHIND if checksum == state.position.checksum else Standing.UNKNOWN
    if head.txid and checksum == head.checksum:
        return Recovered(Outcome.VERIFIED, dropped, None, wal_end, start.same_boot or proven is not Standing.UNKNOWN)
    if files_count:
        proven = Standing.UNKNOWN
    if head.txid and redo(database, _is_start_of_redo(database, checksum, proven, start)):
        return Recovered(Outcome.REDONE, dropped, None, wal_end, not_ahead=True)
    database.position = Position(head.txid, checksum, head.epoch)
    return Recovered(Outcome.DIFFERS, dropped, previous, wal_end)


def _is_readable(path: str) -> bool:
    """Whether SQLite finds a database in the file, or there is none. Raises OSError."""
    try:
        with open(path, "rb") as file:
            whole_size(file.read(100), os.fstat(file.fileno()).st_size)
    except FileNotFoundError:
        return True
    except FormatError:
        return False
    return True


def _withhold(database: Database, previous: PreviousSums) -> None:
    """It stays at the log's head, and its next commit point looks at the whole file."""
    database.table.reset()
    database.table.reserve(len(previous.values))
    database.table.values[: len(previous.values)] = previous.values
    database.page_size, database.commit = previous.page_size, len(previous.values)
    database.rollback.suspect = True


def _previous_sums(database: Database, header: Header | None) -> PreviousSums | None:
    """A killed daemon leaves its table in the page cache, in step with the log; only the checksum can tell."""
    if header is None or header.commit == 0:
        return None
    table = database.table
    table.reserve(header.commit)
    values = table.values[: header.commit].copy()
    if database_checksum(values) != database.log.head.checksum:
        return None
    return PreviousSums(header.page_size, values)


def _head_header(database: Database) -> Header | None:
    entries = database.log.entries()
    return entries[-1].header() if entries else None


def _newest_headers(database: Database) -> Iterator[Header]:
    for entry in reversed(database.log.entries()[-REDO_ENTRIES:]):
        yield entry.header()


def _keep_what_the_log_has(database: Database, header: Header | None, start: Circumstances) -> None:
    """A hot journal whose transaction is the log's head, and whole in the database: its removal is the commit. With a
    super-journal it is not: the other databases of the transaction may lack it, and SQLite takes it back in all."""
    files = database.files
    if header is None or header.wal_size or not journal_in_use(files.journal) or stamp(files.wal)[0]:
        return
    if is_undecided(files.journal, start.super_journal_dirs):
        return
    with contextlib.suppress(FormatError, FileNotFoundError):
        if _has_pages(database, database.log.entries()[-1]):
            page_size, commit = load_checksums(database)
            equal = database_checksum(database.table.values[:commit]) == database.log.head.checksum
            if equal and stamp(files.database)[0] == page_size * commit:  # else pages were begun behind the old end
                forget_journal(files)


def _has_pages(database: Database, entry: LogEntry) -> bool:
    """Whether the database file has every page of an entry as the entry has it."""
    fd = os.open(database.files.database, os.O_RDONLY | os.O_CLOEXEC)
    try:
        reader = Reader(entry.chunks())
        size = reader.header.page_size
        return all(os.pread(fd, size, (pgno - 1) * size) == page for pgno, page in reader)
    finally:
        os.close(fd)


def _is_start_of_redo(
    database: Database, checksum: int, proven: Standing, start: Circumstances
) -> Callable[[Header], bool] | None:
    """What tells that a redo may begin with an entry; None if there must not be one."""
    if proven is Standing.BEHIND or redo_is_noted(database):
        return lambda header: True
    return None if start.is_primary else lambda header: header.pre_apply_checksum == checksum


def _recover_missing(database: Database, head: Position, header: Header | None, state: CleanState | None) -> Outcome:
    """There is no database file. Right after a drop; otherwise it is lost, unless the log has all of it."""
    by_snapshot = (  # the state of one whose file was found to be missing has no page size
        header is None and state is not None and state.position == head and state.page_size > 0 == state.commit
    )
    database.table.reset()
    database.page_size, database.commit = (header.page_size if header else 0), 0
    begins = database.tombstone is not None and header is None and head == database.tombstone.position
    if head.txid == 0 or begins or by_snapshot or (header is not None and header.commit == 0):
        return Outcome.EMPTY
    if header is not None:
        database.page_size = header.page_size
        if redo(database, lambda header: header.is_snapshot):
            return Outcome.REDONE
    database.position = Position(head.txid, CHECKSUM_FLAG, head.epoch)  # nothing is here, whatever the log says
    return Outcome.DIFFERS


def load_checksums(database: Database) -> tuple[int, int]:
    """Compute every page's checksum from the database file into the table: (page size, commit)."""
    fd = os.open(database.files.database, os.O_RDONLY | os.O_CLOEXEC)
    try:
        page_size, commit = database_size(os.pread(fd, 100, 0), os.fstat(fd).st_size)
        if commit == 0:
            raise FormatError(f"{database.name}: the file is shorter than its first page")
        table = database.table
        table.reset()
        table.reserve(commit)
        run = max(1, _SUM_BYTES // page_size)
        for first in range(1, commit + 1, run):
            count = min(run, commit - first + 1)
            data = read_at(fd, count * page_size, (first - 1) * page_size)
            table.values[first - 1 : first - 1 + count] = page_checksums(first, data, page_size)
        return page_size, commit
    finally:
        os.close(fd)


def record_difference(database: Database, previous: PreviousSums | None, txid: int | None = None) -> None:
    """Primary: what the files hold is the truth. Record how it differs from the log's head as a transaction, up to
    `txid` (a replica's, if it has exactly this state) or the next one. Without `previous` the entry holds every
    page."""
    head = database.log.head
    count = 1 if txid is None else max(1, txid - head.txid)
    with database.lock:
        database.table.reset()
        database.position, database.commit = head, 0
        if previous is not None:
            database.table.reserve(len(previous.values))
            database.table.values[: len(previous.values)] = previous.values
            database.page_size, database.commit = previous.page_size, len(previous.values)
        fd = os.open(database.files.database, os.O_RDONLY | os.O_CLOEXEC)
        try:
            page_size, commit = whole_size(os.pread(fd, 100, 0), os.fstat(fd).st_size)
            database.record(
                Change(page_size, commit, count), file_pages(fd, page_size, commit),
                lambda pgno: read_at(fd, page_size, (pgno - 1) * page_size), lambda: True, "repair",
            )  # fmt: skip
        finally:
            os.close(fd)


def begin_branch(database: Database) -> None:
    """Primary: the database equals the log's head, but has perhaps seen more, which came back to the same pages and is
    lost from the log. Take the next TXID for the same content: what a replica has under it is no continuation."""
    with database.lock:
        head = database.log.head
        header = Header(
            flags=0, page_size=database.page_size, commit=database.commit, min_txid=head.txid + 1,
            max_txid=head.txid + 1, timestamp_ms=int(time.time() * 1000), pre_apply_checksum=head.checksum,
            epoch=database.writing_epoch,
        )  # fmt: skip
        with open(database.files.database, "rb") as file:
            page = file.read(database.page_size)
        database.record_file(header, encode(header, [(1, page)], head.checksum), head.checksum)
