"""Pages that the disk has changed: finding them, and putting the right ones in their place.

A page is damaged if it does not have the checksum of the table, and no transaction explains that (see `snapshot`). The
same checksum tells which bytes are right, wherever they come from: this node's log, or another node at any position.
Until they are back, `Database.damage` keeps what was found, so that a comparison of the whole database (*repair by
diff*) does not take it for what an application has written.

Where applications write, a page counts as damaged only if it is proven that none of them wrote it (`proof`). The right
bytes are put in its place in the file, and only while nobody has that open: so nobody can write it meanwhile, whatever
way, and nobody has the damaged page in a cache. What is replaced still has the very bytes that were found.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterable

from pylitefs.engine.database import Database
from pylitefs.engine.files import read_at, write_at
from pylitefs.engine.ltx_log import LogEntry
from pylitefs.engine.proof import TICK_S, alone_with, stands_alone, still_alone
from pylitefs.engine.snapshot import DamagedPages, SnapshotReader
from pylitefs.errors import FormatError, Unavailable
from pylitefs.formats.ltx.checksum import database_checksum, page_checksum
from pylitefs.formats.ltx.decoder import decode_index, decode_page, index_range
from pylitefs.formats.ltx.index import TAIL_SIZE

log = logging.getLogger("litefs.damage")

Pages = list[tuple[int, bytes]]


def find_damage(database: Database) -> list[int]:
    """Read the whole database: which pages are damaged. Blocking; not for the worker. DatabaseBusy: not now."""
    found: dict[int, int] = {}
    reader = SnapshotReader(database, None)
    try:
        while True:
            try:
                if reader.next_chunk() is None:
                    break
            except DamagedPages as error:
                found |= error.pages
    finally:
        reader.close()
    if found and _table_was_wrong(database, found):
        found = {}
    database.note_healed(database.damage.keys() - found, "")
    return sorted(found)


def _table_was_wrong(database: Database, found: dict[int, int]) -> bool:
    """Whether it is the table that is damaged: it does not add up to the position, and with what the pages have it
    does. It is mended then."""
    with database.lock:
        values = database.table.values[: database.commit]
        if database_checksum(values) == database.position.checksum:
            return False
        mended = values.copy()
        for pgno, checksum in found.items():
            mended[pgno - 1 : pgno] = checksum
        if database_checksum(mended) != database.position.checksum:
            return False
        values[:] = mended
    log.warning("%s: the table of page checksums was damaged, the pages are sound", database.name)
    database.note_healed(database.damage, "")
    database.emit("healed", pages=len(found), source="table")
    return True


def wanted_sums(database: Database, pgnos: Iterable[int]) -> dict[int, int]:
    """The checksums that these pages should have; those that are no pages are left out."""
    with database.lock:
        sums = database.table.values[: database.commit]
        return {pgno: int(sums[pgno - 1]) for pgno in pgnos if 0 < pgno <= len(sums)}


def sound_pages(database: Database, pgnos: Iterable[int]) -> Pages:
    """Those of these pages that are what they should be. Blocking; not for the worker."""
    if not database.exists or database.set_aside_reason is not None:
        return []
    reader = SnapshotReader(database, None)
    try:
        read = [(pgno, reader.page(pgno)) for pgno in pgnos]
    finally:
        reader.close()
    return [(pgno, page) for pgno, page in read if page is not None]


def logged_pages(database: Database, pgnos: Iterable[int]) -> Pages:
    """Those of these pages that the log has, as they should be. Blocking."""
    wanted = wanted_sums(database, pgnos)
    found: dict[int, bytes] = {}
    with database.log.pin(0):
        for entry in reversed(database.log.entries()):
            if len(found) == len(wanted):
                break
            with contextlib.suppress(FormatError, OSError):
                for pgno, page in _pages_of(entry, wanted.keys() - found.keys(), database.page_size):
                    if page_checksum(pgno, page) == wanted[pgno]:
                        found[pgno] = page
    return sorted(found.items())


def _pages_of(entry: LogEntry, wanted: set[int], page_size: int) -> Pages:
    """Raises FormatError, OSError."""
    with open(entry.path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        offset, length = index_range(os.pread(file.fileno(), TAIL_SIZE, max(0, size - TAIL_SIZE)), size)
        index = decode_index(os.pread(file.fileno(), length, offset))
        return [
            decode_page(os.pread(file.fileno(), index[pgno][1], index[pgno][0]), page_size)
            for pgno in sorted(wanted & index.keys())
        ]


def mend(database: Database, pages: Pages) -> int:
    """Put these pages in the place of the damaged ones, while nobody has the file open; those that are not what they
    should be are left out. How many were written. Unavailable: not now. Raises OSError. On the worker."""
    with database.wal.mutex, database.lock:  # before the lease: who has one of these may be about to open the file
        if not (database.captures and database.exists and stands_alone(database.files)):
            raise Unavailable(f"{database.name}: it is in use")
        database.wal.view.close()
        size, wanted = database.page_size, wanted_sums(database, (pgno for pgno, _ in pages))
        right = [(pgno, page) for pgno, page in sorted(pages) if page_checksum(pgno, page) == wanted.get(pgno)]
        try:
            with alone_with(database.files.database) as fd:
                written = 0
                for pgno, page in right:
                    there = read_at(fd, size, (pgno - 1) * size)
                    if page_checksum(pgno, there) == database.damage.get(pgno) and still_alone(fd):
                        write_at(fd, page, (pgno - 1) * size)
                        written += 1
                os.fsync(fd)
                time.sleep(TICK_S)  # who writes it next leaves another time
        except Unavailable:
            raise Unavailable(
                f"{database.name}: damaged pages are replaced when no process has it open: close it everywhere, once"
            ) from None
    return written
