"""SQLite's lock bytes: which byte ranges its connections lock with fcntl, and what each lock means.

Database file (os_unix.c). The bytes lie in the lock page, which never holds data:

    offset               length  lock
    0x40000000                1  PENDING    keeps new readers out while a writer waits for the old ones
    0x40000001                1  RESERVED   one connection means to write (rollback modes only)
    0x40000002              510  SHARED     read lock: reading; write lock (EXCLUSIVE): alone on the file

-shm file (wal.c). The bytes are inside the header of the wal-index, but only locked, never written:

    120  WRITE     the single writer: append to the WAL, change the wal-index
    121  CKPT      the single checkpointer
    122  RECOVER   rebuilding the wal-index from the WAL
    123  READ0     reading the database file only, ignoring the WAL
    124  READ1 .. 127  READ4   reading at most up to aReadMark[i]; exclusive: changing that mark
    128  DMS       "dead man switch": shared by everybody who has the file mapped; whoever gets it
                   exclusively is alone and truncates the file

Rule of wal.c: whoever holds a lock byte of -shm also holds SHARED on the database file. Otherwise the last
connection to close could take EXCLUSIVE, and delete a WAL that it was not able to checkpoint in full.
Source: sqlite.org/walformat.html ("WAL Locks"), os_unix.c (PENDING_BYTE and UNIX_SHM_BASE), wal.c (WAL_*_LOCK).
"""

from __future__ import annotations

from enum import IntEnum

from pylitefs.errors import FormatError

SHARED_SIZE = 510
READ_SLOTS = 5


class DatabaseLock(IntEnum):
    """Offset of a lock in the database file. All are one byte, SHARED_FIRST is `SHARED_SIZE` bytes."""

    PENDING = 0x40000000
    RESERVED = 0x40000001
    SHARED_FIRST = 0x40000002


class ShmLock(IntEnum):
    """Offset of a one-byte lock in the -shm file."""

    WRITE = 120
    CKPT = 121
    RECOVER = 122
    READ0 = 123
    READ1 = 124
    READ2 = 125
    READ3 = 126
    READ4 = 127
    DMS = 128


PENDING = DatabaseLock.PENDING
RESERVED = DatabaseLock.RESERVED
SHARED_FIRST = DatabaseLock.SHARED_FIRST

WRITE = ShmLock.WRITE
CKPT = ShmLock.CKPT
RECOVER = ShmLock.RECOVER
READ0 = ShmLock.READ0
READ1 = ShmLock.READ1
READ2 = ShmLock.READ2
READ3 = ShmLock.READ3
READ4 = ShmLock.READ4
DMS = ShmLock.DMS


def read_lock(slot: int) -> ShmLock:
    """The lock byte that guards aReadMark[slot], 0 <= slot < READ_SLOTS. FormatError otherwise."""
    if not 0 <= slot < READ_SLOTS:
        raise FormatError(f"read slot {slot} does not exist: a wal-index has {READ_SLOTS}")
    return ShmLock(ShmLock.READ0 + slot)
