"""Transactions over several databases (ATTACH) in the rollback modes.

SQLite writes a super-journal beside its main database: NAME-mjXXXXXX9XX, the paths of the journals of all databases
that are written, each with a NUL behind it. Each of these journals names the super-journal in its trailer, its
database is written and fsynced, and then the super-journal is unlinked: that is the commit, of all of them at once.
What becomes of the journals afterwards SQLite does not care about: it ignores every error (vdbeaux.c, vdbeCommit). So
the unlink of the super-journal is where a commit is recorded, waits for replicas, and can be refused.
"""

from __future__ import annotations

import os
import re

from pylitefs.formats.names import from_bytes
from pylitefs.formats.sqlite.journal import JOURNAL_HEADER_SIZE, read_super_journal_name

_NAME = re.compile(r"-mj[0-9A-F]{6}9[0-9A-F]{2}\Z")
_JOURNAL = "-journal"
_MAX_BYTES = 1 << 20


def members(path: str) -> list[str]:
    """The names of the databases whose journals a super-journal lists; [] if a file is none. In which folder they are
    does not matter: a journal that belongs to it names it. Raises OSError."""
    if not _NAME.search(path):
        return []
    try:
        with open(path, "rb") as file:
            journals = [os.path.basename(from_bytes(raw)) for raw in file.read(_MAX_BYTES).split(b"\0")]
    except FileNotFoundError:
        return []
    return list(dict.fromkeys(name.removesuffix(_JOURNAL) for name in journals if name.endswith(_JOURNAL)))


def super_journal_of(journal: str) -> str | None:
    """The path of the super-journal, as the application sees it, that a journal in use names; None if it names none.
    Raises OSError."""
    try:
        fd = os.open(journal, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        if not any(os.pread(fd, JOURNAL_HEADER_SIZE, 0)):
            return None
        return read_super_journal_name(lambda offset, size: os.pread(fd, size, offset), os.fstat(fd).st_size)
    finally:
        os.close(fd)


def exists(super_journal: str, folders: list[str]) -> bool:
    """Whether it is there, by its path or by its base name in one of `folders`: its transaction is not committed."""
    base = os.path.basename(super_journal)
    return any(os.path.exists(os.path.join(folder, base)) for folder in folders) or os.path.exists(super_journal)


def is_undecided(journal: str, folders: list[str]) -> bool:
    """Whether a journal belongs to a transaction over several databases that is not committed. Raises OSError."""
    named = super_journal_of(journal)
    return named is not None and exists(named, folders)
