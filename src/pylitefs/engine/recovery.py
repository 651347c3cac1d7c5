"""Bringing a database to a known position when the node starts. Nothing is mounted yet.

    1 clean     the checksum table was written by an orderly stop and the files are as they were then:
                ready without reading the database
    2 otherwise roll back a hot journal, copy the WAL's committed frames into the database, compute all page checksums
      equals the head of the log                    ready
      equals an earlier position of the log, or
      the WAL ends within an entry of it            redo from there (the log was ahead of the database)
      anything else, primary                        a difference, to be recorded as a new transaction
      anything else, replica                        unknown position: the primary is asked for what differs
A database that cannot be read is set aside with its reason; the others go on.

While files are still held by a process of an earlier mount (its daemon was killed, the kernel still passes the
process's writes through), nothing is touched: two sets of locks on one file would corrupt it.
"""

from __future__ import annotations

import enum
import logging
import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylitefs.engine.commit_points import file_pages
from pylitefs.engine.database import Database
from pylitefs.engine.files import DatabaseFiles, read_at, sync_folder, write_at
from pylitefs.engine.leftovers import WalEnd, is_held_elsewhere, normalise, remove_wal
from pylitefs.engine.ltx_log import LogEntry
from pylitefs.engine.page_checksums import CleanState, stamp
from pylitefs.engine.rollback_capture import database_size, journal_in_use
from pylitefs.engine.transaction import Change
from pylitefs.errors import FormatError
from pylitefs.formats.ltx.checksum import database_checksum, page_checksum, page_checksums
from pylitefs.formats.ltx.decoder import Reader
from pylitefs.formats.ltx.format import CHECKSUM_FLAG, Header, Position
from pylitefs.ports import FileKind

log = logging.getLogger("litefs.recovery")

_SUM_BYTES = 4 << 20
_REDO_ENTRIES = 4096


class Outcome(enum.Enum):
    CLEAN = "clean"
    VERIFIED = "verified"
    REDONE = "redone"
    DIFFERS = "differs"  # needs `record_difference` (primary) or a resync (replica)
    EMPTY = "empty"  # dropped or never written
    BUSY = "busy"  # an old process still has it open


@dataclass(frozen=True)
class PreviousSums:
    """The page checksums at the log's head, which survived in the table's file."""

    page_size: int
    values: NDArray[np.uint64]


@dataclass
class Recovered:
    """`dropped`: torn log entries that were removed. `previous`: see `record_difference`."""

    outcome: Outcome
    dropped: list[str]
    previous: PreviousSums | None = None
    wal_end: WalEnd | None = None


def recover(database: Database, *, super_journal_dirs: list[str], same_boot: bool = False) -> Recovered:
    """Bring one database to a known state; see the table above. Raises FormatError, OSError if it cannot be read.

    `super_journal_dirs`: where a super-journal named in a rollback journal may lie (base name is looked up there).
    `same_boot`: the machine has not been restarted since the files were last written, so no write was lost.
    """
    files = database.files
    if any(is_held_elsewhere(files.backing(kind)) for kind in (FileKind.DATABASE, FileKind.WAL, FileKind.SHM)):
        database.log.open(verify=False)
        database.position = database.log.head
        return Recovered(Outcome.BUSY, [])
    state = database.table.read_state()
    if state is not None and _is_untouched(files, state):
        dropped = database.log.open(verify=False)
        if not dropped and database.log.head in (state.position, Position(0, 0)):
            database.adopt(state)
            if database.log.head != state.position:
                database.log.restart_at(state.position)
            normalise(files, super_journal_dirs)
            remove_wal(files)
            return Recovered(Outcome.CLEAN if state.commit else Outcome.EMPTY, [])
    found = _recover_unclean(database, state, super_journal_dirs, same_boot)
    if found.outcome is not Outcome.DIFFERS:
        database.unclean()  # so that the next orderly stop writes down what was found out
    return found


def _is_untouched(files: DatabaseFiles, state: CleanState) -> bool:
    return (
        state.clean
        and stamp(files.database) == state.database
        and stamp(files.wal) == state.wal
        and not journal_in_use(files.journal)
    )


def _recover_unclean(
    database: Database, state: CleanState | None, super_journal_dirs: list[str], same_boot: bool
) -> Recovered:
    files = database.files
    dropped = database.log.open(verify=True)
    if state is not None and database.log.head.txid < state.position.txid:
        database.log.restart_at(state.position)  # a position without log entries: from a snapshot
    wal_end = normalise(files, super_journal_dirs)
    database.position = head = database.log.head
    head_header = _head_header(database)
    try:
        size = os.stat(files.database).st_size
    except FileNotFoundError:
        size = 0
    if size == 0:
        remove_wal(files)
        return Recovered(_recover_missing(database, head, head_header), dropped)
    previous = _previous_sums(database, head_header)
    page_size, commit = load_checksums(database)
    checksum = database_checksum(database.table.values[:commit])
    database.page_size, database.commit = page_size, commit
    if head.txid and checksum == head.checksum:
        remove_wal(files)
        return Recovered(Outcome.VERIFIED, dropped)
    if head.txid and _redo(database, checksum, wal_end, same_boot):
        remove_wal(files)
        return Recovered(Outcome.REDONE, dropped)
    database.position = Position(head.txid, checksum)
    return Recovered(Outcome.DIFFERS, dropped, previous, wal_end)


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


def _recover_missing(database: Database, head: Position, header: Header | None) -> Outcome:
    """There is no database file. Right after a drop; otherwise it is lost, unless the log has all of it."""
    database.table.reset()
    database.page_size, database.commit = (header.page_size if header else 0), 0
    if head.txid == 0 or (header is not None and header.commit == 0):
        return Outcome.EMPTY
    fd = os.open(database.files.database, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    os.close(fd)
    assert header is not None or database.log.count == 0
    if header is not None:
        database.page_size = header.page_size
        if _redo(database, CHECKSUM_FLAG, None, False):
            return Outcome.REDONE
    os.unlink(database.files.database)
    database.position = Position(head.txid, CHECKSUM_FLAG)  # nothing is here, whatever the log says
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


# -- journal and WAL -----------------------------------------------------------------------------------------


# -- redo ----------------------------------------------------------------------------------------------------


def _redo(database: Database, checksum: int, wal_end: WalEnd | None, same_boot: bool) -> bool:
    """Apply the newest log entries again if the database (its checksum, where its WAL ended) is provably behind the
    log; False if it is not. What results is predicted before anything is written."""
    entries = _redo_entries(database, checksum, wal_end, same_boot)
    if entries:
        apply_entries(database, entries)
    return bool(entries)


def _redo_entries(
    database: Database, checksum: int, wal_end: WalEnd | None, same_boot: bool
) -> list[LogEntry]:
    newest: dict[int, int] = {}
    chosen: list[LogEntry] = []
    last: Header | None = None
    for entry in reversed(database.log.entries()[-_REDO_ENTRIES:]):
        reader = Reader(entry.chunks())
        last = last or reader.header
        if reader.header.page_size != database.page_size and not reader.header.is_snapshot:
            return []
        for pgno, page in reader:
            newest.setdefault(pgno, page_checksum(pgno, page))
        chosen.append(entry)
        if _is_behind(database, reader.header, checksum, wal_end, same_boot):
            reaches = _predicted(database, newest, last.commit) == database.log.head.checksum
            return chosen[::-1] if reaches else []
    return []


def _is_behind(database: Database, header: Header, checksum: int, wal_end: WalEnd | None, same_boot: bool) -> bool:
    """Whether the database stands right before this entry, or within it, and not somewhere after the log's head.

    Equal checksums alone do not prove it in WAL mode: a row that is changed back gives the same pages. There the
    WAL's end decides, and that a killed process (`same_boot`) takes nothing of what it wrote with it: only a power
    cut does.
    """
    if header.is_snapshot and not database.commit:
        return True
    if header.wal_size and wal_end is not None and wal_end.salts == (header.wal_salt1, header.wal_salt2):
        return wal_end.offset < header.wal_offset + header.wal_size and (
            wal_end.is_within(header) or header.pre_apply_checksum == checksum
        )
    return header.pre_apply_checksum == checksum and not (header.wal_size and same_boot)


def _predicted(database: Database, newest: dict[int, int], commit: int) -> int:
    """The database checksum after these pages were written and the database has `commit` pages."""
    values = np.zeros(commit, dtype=np.uint64)
    known = min(commit, len(database.table.values))
    values[:known] = database.table.values[:known]
    for pgno, checksum in newest.items():
        if pgno <= commit:
            values[pgno - 1] = checksum
    return database_checksum(values)


def apply_entries(database: Database, entries: list[LogEntry]) -> None:
    """Write the pages of log entries straight into the database file (nobody has it open); idempotent."""
    for entry in entries:  # the log first: once the database is changed, only the log can finish the work
        with open(entry.path, "rb") as file:
            os.fsync(file.fileno())
    sync_folder(database.files.ltx)
    fd = os.open(database.files.database, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        for entry in entries:
            reader = Reader(entry.chunks())
            header = reader.header
            table = database.table
            table.reserve(header.commit)
            for pgno, page in reader:
                write_at(fd, page, (pgno - 1) * header.page_size)
                table.values[pgno - 1] = page_checksum(pgno, page)
            table.values[header.commit :] = 0
            os.ftruncate(fd, header.commit * header.page_size)
            database.page_size, database.commit = header.page_size, header.commit
            database.timestamp_ms = header.timestamp_ms
        os.fsync(fd)
    finally:
        os.close(fd)
    database.position = database.log.head


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
            page_size, commit = database_size(os.pread(fd, 100, 0), os.fstat(fd).st_size)
            database.record(
                Change(page_size, commit, count), file_pages(fd, page_size, commit),
                lambda pgno: read_at(fd, page_size, (pgno - 1) * page_size), lambda: True, "repair",
            )  # fmt: skip
        finally:
            os.close(fd)
