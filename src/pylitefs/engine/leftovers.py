"""What SQLite leaves beside a database when it is cut off: a hot journal, a WAL, files held by a lost process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from pylitefs import mount_guard
from pylitefs.engine.evidence import WalEnd
from pylitefs.engine.files import DatabaseFiles, sync_folder, write_at
from pylitefs.engine.proof import is_alone
from pylitefs.engine.super_journal import exists
from pylitefs.engine.wal_view import WalView
from pylitefs.errors import FormatError
from pylitefs.formats.sqlite.journal import is_hot_header, read_super_journal_name, records
from pylitefs.formats.sqlite.wal import frame_offset
from pylitefs.formats.sqlite.wal_index import latest_frames

Read = Callable[[int, int], bytes]


def is_held_elsewhere(path: str) -> bool:
    """Whether any process (or the kernel, for a FUSE file that outlived its daemon) has the file open.

    A write lease is granted only for a file that nobody else has open (fcntl(2), F_SETLEASE).
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return is_alone(fd) is False  # where leases are not supported it cannot be told
    finally:
        os.close(fd)


def is_in_use(files: DatabaseFiles) -> bool:
    """Whether anybody else has a file of the database open that writers share."""
    return any(is_held_elsewhere(path) for path in (files.database, files.wal, files.shm))


def retire_index(files: DatabaseFiles) -> None:
    """Processes that still have a database of an earlier mount open cannot commit to it any more (SQLITE_CANTOPEN)."""
    with contextlib.suppress(OSError), open(files.shm, "r+b", buffering=0) as index:
        mount_guard.retire_once([index.fileno()])


def normalise(files: DatabaseFiles, super_journal_dirs: list[str]) -> WalEnd | None:
    """Bring the database file to the committed state: hot journal rolled back and removed, WAL copied in.

    The WAL stays until `remove_wal`: should the start be cut off, the next one finds the same evidence.
    """
    roll_back(files, super_journal_dirs)
    wal_end = checkpoint_wal(files)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(files.shm)
    return wal_end


def remove_wal(files: DatabaseFiles) -> None:
    """The WAL's frames are in the database, and what it told about the log is not needed any more."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(files.wal)
        sync_folder(files.folder)


def forget_journal(files: DatabaseFiles) -> None:
    """The transaction of this journal is in the database and stays there."""
    os.unlink(files.journal)
    sync_folder(files.folder)


def roll_back(files: DatabaseFiles, super_journal_dirs: list[str]) -> bool:
    """Play a hot journal back and remove it; True if the database was changed."""
    if not os.path.exists(files.journal):
        return False
    changed = False
    with contextlib.suppress(FileNotFoundError):
        fd = os.open(files.database, os.O_RDWR | os.O_CLOEXEC)
        try:
            changed = play_back(files, super_journal_dirs, fd)
            os.fsync(fd)
        finally:
            os.close(fd)
    forget_journal(files)
    return changed


def play_back(files: DatabaseFiles, super_journal_dirs: list[str], fd: int) -> bool:
    """Undo in `fd`, the database, what a hot journal is about; the journal stays, and the database is not fsynced. True
    if something was changed."""
    try:
        journal = os.open(files.journal, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        size = os.fstat(journal).st_size

        def read(offset: int, count: int) -> bytes:
            return os.pread(journal, count, offset)

        if not is_hot_header(read(0, 28)):
            return False
        super_journal = read_super_journal_name(read, size)
        if super_journal is not None and not exists(super_journal, super_journal_dirs):
            return False
        return _play_back(fd, read, size)
    finally:
        os.close(journal)


def _play_back(fd: int, read: Read, size: int) -> bool:
    try:
        rollback = records(read, size)
    except FormatError:
        return False
    os.ftruncate(fd, rollback.initial_pages * rollback.page_size)
    for pgno, page in rollback:
        if pgno <= rollback.initial_pages:
            write_at(fd, page, (pgno - 1) * rollback.page_size)
    return True


def checkpoint_wal(files: DatabaseFiles) -> WalEnd | None:
    """Copy the committed frames of a WAL that nobody uses into the database. Returns where they ended."""
    if not os.path.exists(files.wal):
        return None
    with contextlib.suppress(FileNotFoundError):
        os.unlink(files.shm)  # without an index the frames themselves are the truth
    view = WalView(files)
    end = None
    try:
        now = view.committed()
        if now is not None and now.page_size:
            end = WalEnd(now.salts, frame_offset(now.mx_frame + 1, now.page_size))
        if now is not None and now.mx_frame and os.path.exists(files.database):
            with open(files.wal, "rb") as wal:
                os.fsync(wal.fileno())
            fd = os.open(files.database, os.O_RDWR | os.O_CLOEXEC)
            try:
                pgnos, numbers = latest_frames(view.pgnos(1, now.mx_frame), 1)
                inside = pgnos <= now.commit
                for pgno, page in view.frame_pages(pgnos[inside], numbers[inside], now.page_size):
                    write_at(fd, page, (pgno - 1) * now.page_size)
                os.ftruncate(fd, now.commit * now.page_size)
                os.fsync(fd)
            finally:
                os.close(fd)
    finally:
        view.close()
    return end
