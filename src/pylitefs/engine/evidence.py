"""Where a database stands in its history: what the files prove after a crash, and what they do not.

Equal checksums prove nothing: a row that is changed and changed back gives the same pages. What proves it:

The WAL on the disk. Before a checkpoint copies anything, SQLite fsyncs the WAL, its header and, at the first fsync of
a WAL file, its name (wal.c; pager.c for the journal). So the database file holds no frame that is not in the WAL on
the disk, or in an earlier generation of it, and nothing at all of a later generation. An entry of the log says which
frames of which generation (salts) it holds; the entries are in the order of the commits. But what other nodes have
written, and this one has appended to its own WAL (as a replica in between, for the holder of a HALT lock, given back),
has the salts of theirs: an entry with other salts need not be of another generation here. Hence, of the newest entry of
the generation on the disk:

    the WAL ends before its end     the database has not all of it
    the WAL ends where it ends      the database stands right there, and has nothing of what comes after it
    the WAL ends behind its end     nothing: what follows may be of another node, and what the log has lost

and of an entry whose first salt is 1 to 16 more (SQLite counts it up at each restart of a WAL): it is of a later
generation, and the database has nothing of it.

The file's time. The checksum table notes what size and time the database file had when the node knew where it stood,
durably and before the first change of a run. If both are the same and there is no WAL, no checkpoint went by: it stands
where it stood then. (Journalling file systems keep the order of names, sizes and times: where the unlink or the
truncation of a WAL has survived, so has the time of the checkpoint before it. A WAL that was begun anew is written in
place and tells nothing of that, so there must be none. A journal that is kept is written in place too: so the note
is taken back, durably, before the first transaction in a rollback mode is recorded.)

SQLite's change counter, for an entry that begins with just these pages, in the rollback modes: page 1 counts the
transactions, so the pages never come again. (With EXCLUSIVE locking it does not count, and proves nothing.)

None of it holds with synchronous=OFF, where a power cut may damage the database anyway.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from pylitefs.errors import FormatError
from pylitefs.formats.ltx.format import Header
from pylitefs.formats.sqlite.header import DatabaseHeader

_U32 = 1 << 32
_GENERATIONS = 16


@dataclass(frozen=True)
class WalEnd:
    """Where the WAL's committed frames ended when the node was started: the offset after the last one, in bytes."""

    salts: tuple[int, int]
    offset: int


class Standing(enum.Enum):
    """Where a database stands, compared with the end of a log: BEHIND it, AT it or behind, or nothing is proven."""

    BEHIND = "behind"
    AT = "at"
    UNKNOWN = "unknown"


def standing(newest_first: Iterable[Header], end: WalEnd | None) -> Standing:
    """What the WAL on the disk proves about entries of a log, the newest of them first."""
    if end is None:
        return Standing.UNKNOWN
    newest = True
    for header in newest_first:
        if header.wal_size and (header.wal_salt1, header.wal_salt2) == end.salts:
            entry_end = header.wal_offset + header.wal_size
            if end.offset < entry_end:
                return Standing.BEHIND
            if end.offset > entry_end:
                return Standing.UNKNOWN
            return Standing.AT if newest else Standing.BEHIND
        if header.wal_size and 0 < (header.wal_salt1 - end.salts[0]) % _U32 <= _GENERATIONS:
            return Standing.BEHIND
        newest = False
    return Standing.UNKNOWN


def counts_on(before: bytes, after: bytes, transactions: int) -> bool:
    """Whether page 1 tells that the second state comes at most so many transactions after the first (rollback modes).
    `before`, `after`: the first 100 bytes of the database, or nothing."""
    try:
        old, new = DatabaseHeader.unpack(before), DatabaseHeader.unpack(after)
    except FormatError:
        return False
    if old.is_wal or new.is_wal:
        return False
    return 0 < (new.change_counter - old.change_counter) % _U32 <= transactions
