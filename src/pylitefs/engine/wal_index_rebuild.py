"""Making a wal-index anew from the frames of its WAL, by the rules of SQLite's own recovery (wal.c, walIndexRecover).

The caller holds SHARED on the database and WRITE and CKPT of -shm, so that nobody writes, checkpoints or recovers
meanwhile. Others may read: whoever has a read slot keeps its mark, and finds the entries of its frames unchanged,
because a region is written in one piece with the values that it has already.

Not every whole transaction of a WAL was committed. A commit whose fsync failed stands there whole, and so does one
whose process was killed in its fsync. SQLite never publishes it, but a recovery that looks at frames only would make it
visible. So what is known to have ended before the last frame (`last`), or to have failed (`failed`), is an argument
here. Where nothing counts the index says nothing of the database's size: SQLite would believe it.
"""

from __future__ import annotations

import os
import struct

import numpy as np

from pylitefs.engine import ofd_locks
from pylitefs.engine.files import DatabaseFiles, write_at
from pylitefs.engine.page_checksums import stamp
from pylitefs.engine.pending import Tail
from pylitefs.engine.wal_view import Committed, WalView
from pylitefs.formats.sqlite.locks import READ_SLOTS, RECOVER, read_lock
from pylitefs.formats.sqlite.wal import WAL_HEADER_SIZE, WalHeader
from pylitefs.formats.sqlite.wal_index import (
    BACKFILL_ATTEMPTED_OFFSET,
    BACKFILL_OFFSET,
    HEADER_COPY_SIZE,
    HEADER_SIZE,
    READMARK_NOT_USED,
    REGION_SIZE,
    HashTables,
    WalIndexHeader,
    read_header,
    read_mark_offset,
)

_U32 = struct.Struct("=I")
_FRAME_END = struct.Struct(">4xI8xII")  # of a frame's header: the commit field and the checksum


def published_frames(shm: int, header: WalHeader | None) -> int | None:
    """How many frames an old wal-index says are committed, if it is sound and belongs to the WAL with this header (or
    says that no frame of it counts any more). None: it does not tell."""
    index = read_header(os.pread(shm, HEADER_SIZE, 0))
    if index is None or not index.page_size:
        return None
    if not index.mx_frame:
        return 0
    return index.mx_frame if header is not None and header.salts == index.salts else None


def rebuild_index(
    files: DatabaseFiles, shm: int, *, last: int | None = None, failed: Tail | None = None, shared: bool = True
) -> bool:
    """Write the whole wal-index into `shm`, a descriptor of the mount's. `last`: frames behind this one do not count;
    it has to end a transaction. `failed`: this one does not count if it is the newest. `shared`: others may use the
    index. False: another process is recovering it now. Raises OSError."""
    if not ofd_locks.try_lock(shm, RECOVER, exclusive=True):
        return False
    view = WalView(files, lambda: False)
    try:
        now = view.committed()
        header = view.wal_header() if stamp(files.wal)[0] > WAL_HEADER_SIZE else None  # as in wal.c
        if failed is not None and now is not None and (now.salts, now.mx_frame) == (failed.salts, failed.last):
            last = failed.first - 1
        _rebuild(view, now, header, shm, last, shared)
    finally:
        view.close()
        ofd_locks.unlock(shm, RECOVER)
    return True


def _rebuild(
    view: WalView, now: Committed | None, header: WalHeader | None, shm: int, last: int | None, shared: bool
) -> None:
    found = now.mx_frame if now is not None else 0
    count = found if last is None else min(found, last)
    pgnos = view.pgnos(1, count) if count else np.zeros(0, dtype=np.uint32)
    sums, page_size, commit = (0, 0), 0, 0  # without frames nothing is said of the database, as in wal.c
    if now is not None and count:
        commit, *ends = _FRAME_END.unpack(view.frame_head(count, now.page_size))
        page_size, sums = now.page_size, (ends[0], ends[1])
    if not shared:
        os.ftruncate(shm, 0)
    os.ftruncate(shm, max(REGION_SIZE, os.fstat(shm).st_size))
    for offset, patch in HashTables().append(pgnos):
        write_at(shm, patch, offset)
    write_at(shm, _U32.pack(0), BACKFILL_OFFSET)
    write_at(shm, _U32.pack(count), BACKFILL_ATTEMPTED_OFFSET)
    write_at(shm, _U32.pack(0), read_mark_offset(0))
    for slot in range(1, READ_SLOTS):
        if ofd_locks.try_lock(shm, read_lock(slot), exclusive=True):
            mark = count if slot == 1 and count else READMARK_NOT_USED
            write_at(shm, _U32.pack(mark), read_mark_offset(slot))
            ofd_locks.unlock(shm, read_lock(slot))
    salts = header.salts if header is not None else (0, 0)
    packed = WalIndexHeader(
        0, header is not None and header.big_endian, page_size, count, commit, sums, salts
    ).pack()  # fmt: skip
    write_at(shm, packed, HEADER_COPY_SIZE)
    write_at(shm, packed, 0)
