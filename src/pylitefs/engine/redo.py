"""Applying a log to the database file at the start, where it is proven that the database is behind.

The result is predicted before anything is written. The pages are written in place, so a note says up to which position
of the log: a start that is cut off leaves the next one the proof, whatever the pages look like then.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from pylitefs.engine.database import Database
from pylitefs.engine.files import publish_file, sync_folder, write_at
from pylitefs.engine.ltx_log import LogEntry
from pylitefs.errors import FormatError
from pylitefs.formats.ltx.checksum import database_checksum, page_checksum
from pylitefs.formats.ltx.decoder import Reader
from pylitefs.formats.ltx.format import CHECKSUM_FLAG, Header, Position

REDO_ENTRIES = 4096
"""How far back the log is looked at."""


def redo(database: Database, may_begin: Callable[[Header], bool] | None) -> bool:
    """Apply the log's newest entries again, from one that `may_begin` and with which the log's head is reached. False
    if there is none; nothing was changed then."""
    entries = _entries(database, may_begin) if may_begin is not None else []
    if entries:
        apply_entries(database, entries)
    return bool(entries)


def _entries(database: Database, may_begin: Callable[[Header], bool]) -> list[LogEntry]:
    chosen: list[LogEntry] = []
    seen: set[int] = set()
    checksum, commit = 0, 0  # of what results, and its size
    known = database.table.values[: database.commit]
    for entry in reversed(database.log.entries()[-REDO_ENTRIES:]):
        reader = Reader(entry.chunks())
        header = reader.header
        if not chosen:
            commit = header.commit
            checksum = database_checksum(known[:commit])
        if header.page_size != database.page_size and not header.is_snapshot:
            return []
        for pgno, page in reader:
            if pgno <= commit and pgno not in seen:
                seen.add(pgno)
                checksum ^= page_checksum(pgno, page) ^ (int(known[pgno - 1]) if pgno <= len(known) else 0)
        chosen.append(entry)
        if may_begin(header) and checksum | CHECKSUM_FLAG == database.log.head.checksum:
            return chosen[::-1]
    return []


def _note_path(database: Database) -> str:
    return os.path.join(database.files.folder, "redo")


def redo_is_noted(database: Database) -> bool:
    """Whether an earlier start was cut off, or failed, while it applied the log up to its head."""
    try:
        with open(_note_path(database)) as file:
            return Position.parse(file.read(64).strip()) == database.log.head
    except (FileNotFoundError, FormatError):
        return False


def forget_redo(database: Database) -> None:
    """Durable: the log may lose its tail, and end where the note says once more."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(_note_path(database))
        sync_folder(database.files.folder)


def apply_entries(database: Database, entries: list[LogEntry]) -> None:
    """Write the pages of the log's newest entries straight into the database file (nobody has it open); idempotent."""
    for entry in entries:  # the log first: once the database is changed, only the log can finish the work
        with open(entry.path, "rb") as file:
            os.fsync(file.fileno())
    sync_folder(database.files.ltx)
    publish_file(_note_path(database), f"{database.log.head}\n".encode())
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
    forget_redo(database)
    database.position = database.log.head
