"""Capture in the rollback modes (DELETE, TRUNCATE, PERSIST, MEMORY, OFF).

The journal is not the list of changed pages (a page from the freelist is changed without being journaled), the
writes are. So the database file's writes come to us, and are noted as byte ranges until a commit point: the
journal is unlinked, truncated or its header zeroed (of several databases: the super-journal is unlinked, see
`super_journal`); where there is no journal file, the database is fsynced by who wrote it, or nobody holds a write lock
any more.

Anybody may fsync a database at any moment (`sync FILE`, a backup), also when a transaction has spilled its cache: half
of it stands in the file then. So whose fsync is it? SQLite writes and fsyncs a database through one descriptor, from a
transaction's first page to its end, and nobody else has that: the kernel tells which open file a request came through.
This needs no process id (none is known across PID namespaces), and is right within one process too.

    an fsync of                           is a commit point
    the database, by a handle that wrote  where there is no journal; with one that is hot, where commits wait for
    what is noted                         replicas (see `gated`)
    the database, by another handle       never: what is noted waits for the writer's own fsync, the end of the journal,
                                          or the end of the writer's locks
    the database, where writes pass us    by any handle that can write; who opened it for reading wrote nothing. While a
    by (see below)                        write lock is held it must be that process's, if that can be told
    the journal                           by a handle that can write, if the journal is finished and was hot when the
                                          pages were written: it is theirs, so they are committed, whoever asks. One
                                          that PERSIST has left behind says nothing of the modes MEMORY and OFF

A close, and the look some time after a write, ask for SQLite's locks, which whoever writes has.

A handle that was opened with passthrough (in WAL mode) and now writes in rollback mode leaves no ranges. Then
`suspect` makes the next commit compare the whole database with the checksum table.
"""

from __future__ import annotations

import errno
import os

import numpy as np
from numpy.typing import NDArray

from pylitefs.engine.files import DatabaseFiles
from pylitefs.engine.page_checksums import FileStamp
from pylitefs.errors import FormatError
from pylitefs.formats.sqlite.header import MAGIC, DatabaseHeader

_NONCE = slice(12, 16)
_HEADER_BYTES = 28
_QUIET_S = 0.5


class DirtyRanges:
    """Byte ranges that were written, merged where they follow one another."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []

    def __bool__(self) -> bool:
        return bool(self._ranges)

    def add(self, offset: int, size: int) -> None:
        end = offset + size
        if self._ranges:
            first, last = self._ranges[-1]
            if first <= offset <= last:
                self._ranges[-1] = (first, max(last, end))
                return
        self._ranges.append((offset, end))

    def pgnos(self, page_size: int, commit: int) -> NDArray[np.uint32]:
        """The pages that the ranges touch, ascending, none beyond `commit`."""
        if not self._ranges:
            return np.zeros(0, dtype=np.uint32)
        parts = [
            np.arange(first // page_size + 1, (last + page_size - 1) // page_size + 1, dtype=np.uint32)
            for first, last in self._ranges
        ]
        pgnos = np.unique(np.concatenate(parts))
        return pgnos[pgnos <= commit]

    def clear(self) -> None:
        self._ranges.clear()


class RollbackCapture:
    """What is known about one database's writes since its last commit. Guarded by the database's lock."""

    def __init__(self, files: DatabaseFiles) -> None:
        self._files = files
        self.dirty = DirtyRanges()
        self.suspect = False
        self.overwritten = False  # by who is not SQLite, beside a WAL in use: SQLite itself cuts a file off there, too
        self.writes = 0  # how many were noted
        self._writers: set[int] = set()  # the handles that those came through which are not recorded yet
        self.foreign = False  # some of them were perhaps not SQLite's, see `in_place`; and for that:
        self.quiet_s = _QUIET_S
        self.seen: tuple[int, FileStamp] = (0, (0, 0))  # what was there when it was last looked at, and since when
        self.seen_s = 0.0
        self.looked: tuple[int, FileStamp] = (0, (0, 0))  # what was found to be sound, or not
        self.has_journal = False  # at the last write there was one that could undo it
        self._nonce = b""
        self._committed = b""  # nonce of a journal whose super-journal has gone, see `super_journal`

    @property
    def pending(self) -> bool:
        return bool(self.dirty) or self.suspect

    def clear(self) -> None:
        self.dirty.clear()
        self.suspect = self.foreign = self.overwritten = False
        self._writers.clear()
        self.quiet_s = _QUIET_S

    def journal_in_use(self) -> bool:
        """Whether a journal stands there that could still roll the database back."""
        head = journal_head(self._files.journal)
        return _in_use(head) and head[_NONCE] != self._committed

    def journal_is_committed(self) -> bool:
        """Whether a journal stands there whose transaction was committed by the end of its super-journal."""
        head = journal_head(self._files.journal)
        return _in_use(head) and head[_NONCE] == self._committed

    def nonce(self) -> bytes:
        """What tells the journal that stands there from others; for `super_journal_gone`."""
        return journal_head(self._files.journal)[_NONCE]

    def super_journal_gone(self, nonce: bytes) -> None:
        """The transaction of the journal with this nonce is committed, whatever becomes of the journal."""
        self._committed = nonce

    def journal_is_finished(self) -> bool:
        """Whether a journal stands there that was invalidated: its transaction is committed (or rolled back)."""
        head = journal_head(self._files.journal)
        return len(head) == _HEADER_BYTES and not any(head)

    def own_journal_is_finished(self) -> bool:
        """`journal_is_finished`, of the transaction that wrote the pages that are noted."""
        return self.has_journal and self.journal_is_finished()

    def is_by(self, handle: int) -> bool:
        """Whether what is noted came through this handle, or part of it."""
        return handle in self._writers

    def starts_transaction(self) -> bool:
        """Called before a write: whether the journal is another one than at the writes noted so far, which means that
        those were committed (PERSIST, or EXCLUSIVE locking, where the header's zeroing was not seen)."""
        nonce = journal_head(self._files.journal)[_NONCE]
        self.has_journal = any(nonce)
        new = bool(self.dirty) and self.has_journal and nonce != self._nonce and any(self._nonce)
        if nonce:
            self._nonce = nonce
        return new

    def note(self, offset: int, size: int, handle: int = 0) -> None:
        """A write, or a truncation (`handle` 0: another write of the same transaction tells whose it is)."""
        self.writes += 1
        if handle:
            self._writers.add(handle)
        self.dirty.add(offset, size)


def journal_head(path: str) -> bytes:
    """The first 28 bytes of a journal; empty if there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENAMETOOLONG):  # of a file whose name leaves no room for "-journal"
            return b""
        raise
    try:
        return os.pread(fd, _HEADER_BYTES, 0)
    finally:
        os.close(fd)


def journal_in_use(path: str) -> bool:
    """Whether a transaction of this journal may still be under way, or has to be rolled back."""
    return _in_use(journal_head(path))


def _in_use(head: bytes) -> bool:
    return len(head) >= _HEADER_BYTES and any(head)


def database_size(head: bytes, file_size: int) -> tuple[int, int]:
    """(page size, number of pages) of a database by the rule of SQLite: the header's count if it is valid, else the
    file's size. Raises FormatError if `head` is not a database header."""
    header = DatabaseHeader.unpack(head)
    if header.page_count_valid:
        return header.page_size, header.page_count
    return header.page_size, _pages(file_size, header.page_size)


def whole_size(head: bytes, file_size: int) -> tuple[int, int]:
    """`database_size` of a file that SQLite can read. As there, a page that the file ends within is filled up with
    zeros, and what comes after the last page does not count. FormatError if the file ends before its last page begins:
    SQLite calls that malformed."""
    page_size, commit = database_size(head, file_size)
    found = _pages(file_size, page_size)
    if found < commit:
        raise FormatError(f"the file ends after {found} of the {commit} pages that its header tells of")
    return page_size, commit


def _pages(file_size: int, page_size: int) -> int:
    """How many pages a file has, also if it ends within one (pager.c, pagerPagecount)."""
    return -(-file_size // page_size)


def is_complete_database(path: str) -> bool:
    """Whether a file is a whole SQLite database (a copy that is still being written is not)."""
    try:
        with open(path, "rb") as file:
            whole_size(file.read(100), os.fstat(file.fileno()).st_size)
    except (FormatError, OSError):
        return False
    return True


def why_unreadable(path: str) -> str | None:
    """Why SQLite cannot read a file that begins as a database does; None if it can, or the file is something else."""
    try:
        with open(path, "rb") as file:
            head = file.read(100)
            if head.startswith(MAGIC):
                whole_size(head, os.fstat(file.fileno()).st_size)
    except FormatError as error:
        return str(error)
    except OSError:
        pass
    return None
