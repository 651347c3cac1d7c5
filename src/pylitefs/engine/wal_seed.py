"""A fresh WAL that begins with one frame: page 1 as it is.

As long as a WAL is empty its index has no database size, and SQLite asks the file's size at every read transaction.
Through FUSE that question is a round trip whenever the file was read since (the kernel then holds the access time for
stale), and reads are three times slower until the first write. One frame that changes nothing gives the index the size.

It is a transaction like any other to SQLite: recovery finds it when the wal-index is made, a checkpoint copies page 1
onto itself. It is written before the CREATE of the -wal is answered, so before anybody can use the file; not if the
database's header does not describe the file as it is.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass

from pylitefs.engine.files import DatabaseFiles, write_at
from pylitefs.errors import FormatError
from pylitefs.formats.sqlite.header import HEADER_SIZE, DatabaseHeader
from pylitefs.formats.sqlite.wal import WalHeader, encode_frames


@dataclass(frozen=True)
class Seed:
    """What was written: the WAL's salts. The one frame holds nothing new."""

    salts: tuple[int, int]


def seed(files: DatabaseFiles) -> Seed | None:
    """Write header and frame into the empty -wal; None (and nothing written) where it would not be right or fails."""
    try:
        with open(files.database, "rb") as database:
            header = DatabaseHeader.unpack(database.read(HEADER_SIZE))
            size = os.fstat(database.fileno()).st_size
            whole = header.page_count_valid and size == header.page_count * header.page_size
            if not (header.is_wal and whole) or os.path.exists(files.journal):
                return None
            database.seek(0)
            page = database.read(header.page_size)
        wal = WalHeader.create(header.page_size, 0, secrets.randbits(32), secrets.randbits(32))
        frames, _, _ = encode_frames(wal, [1], [page], header.page_count, wal.checksum1, wal.checksum2)
        fd = os.open(files.wal, os.O_WRONLY | os.O_CLOEXEC)
        try:
            write_at(fd, wal.pack() + frames, 0)
        except OSError:
            os.ftruncate(fd, 0)
            return None
        finally:
            os.close(fd)
    except (FormatError, OSError):
        return None
    return Seed(wal.salts)
