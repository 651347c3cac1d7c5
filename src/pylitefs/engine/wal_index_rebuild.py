"""Making a wal-index anew from the frames of its WAL, by the rules of SQLite's own recovery (wal.c, walIndexRecover).

The caller holds SHARED on the database and WRITE and CKPT of -shm, so that nobody writes, checkpoints or recovers
meanwhile. Others may read: whoever has a read slot keeps its mark, and finds the entries of its frames unchanged,
because a region is written in one piece with the values that it has already.

Not every whole transaction of a WAL was committed. A commit whose fsync failed stands there whole, and so does one
whose process was killed in its fsync. SQLite never publishes it, but a recovery that looks at frames only would make it
visible. So what is known to have ended before the last frame is an argument here (`last`).
"""

from __future__ import annotations

import os
import struct

import numpy as np

from pylitefs.engine import ofd_locks
from pylitefs.engine.files import DatabaseFiles, write_at
from pylitefs.engine.wal_view import WalView
from pylitefs.formats.sqlite.locks import READ_SLOTS, RECOVER, read_lock
from pylitefs.formats.sqlite.wal import WalHeader
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
    files: DatabaseFiles, shm: int, page_size: int, commit: int, last: int | None = None, *, shared: bool = True
) -> bool:
    """Write the whole wal-index into `shm`, a descriptor of the mount's. `page_size` and `commit` (in pages): what the
    database is where the WAL has nothing. `last`: frames behind this one do not count; it has to end a transaction.
    `shared`: others may use the index. False: another process is recovering it now. Raises OSError."""
    if not ofd_locks.try_lock(shm, RECOVER, exclusive=True):
        return False
    try:
        _rebuild(files, shm, page_size, commit, last, shared)
    finally:
        ofd_locks.unlock(shm, RECOVER)
    return True


def _rebuild(files: DatabaseFiles, shm: int, page_size: int, commit: int, last: int | None, shared: bool) -> None:
    view = WalView(files, lambda: False)
    try:
        now, header = view.committed(), view.wal_header()
        found = now.mx_frame if now is not None else 0
        count = found if last is None else min(found, last)
        pgnos = view.pgnos(1, count) if count else np.zeros(0, dtype=np.uint32)
        sums = (now.s0, now.s1) if now is not None and count == found else (0, 0)
        if count:
            assert now is not None
            commit, *ends = _FRAME_END.unpack(view.frame_head(count, now.page_size))
            page_size, sums = now.page_size, (ends[0], ends[1])
        elif header is not None:
            sums = header.checksum1, header.checksum2
    finally:
        view.close()
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
