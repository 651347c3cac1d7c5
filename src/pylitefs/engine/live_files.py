"""What the files of a database say by themselves, and how they come and go."""

from __future__ import annotations

import os
import threading

from pylitefs.engine.files import DatabaseFiles
from pylitefs.engine.open_files import OpenFile
from pylitefs.engine.page_checksums import stamp
from pylitefs.errors import FormatError
from pylitefs.formats.sqlite.header import HEADER_SIZE, DatabaseHeader
from pylitefs.ports import FileKind, Moved

MOVES_MAX = 64


class LiveFiles:
    """The part of a `Database` that is about its files only. Any thread."""

    files: DatabaseFiles
    wal_stands_in = False  # applications write it in a WAL, but its mode is a rollback mode, see `stand_in`
    moves: tuple[Moved, ...] = ()
    """When it was renamed, in this run of the daemon: the newest MOVES_MAX, the last one last. Replaced as a whole."""

    withheld: str | None = None
    """Why what the database file holds is not in the log, and on no replica; None if all is well."""

    lock_fd = -1
    """A descriptor of the mount's database file, to ask who holds SQLite's locks; -1: none, -2: it is being opened."""

    def __init__(self) -> None:
        self.locked_out: list[int] = []
        """Of files that had its names before, see `replaced_file`."""
        self.handles_lock = threading.Lock()
        """Guards the next 4, and `opening`; `Database.lock` may be held for long by a large transaction."""
        self.users: dict[int, OpenFile] = {}
        """What applications have open of its database file, by handle, see `open_files`."""
        self.app_handles = 0
        """Open handles of the database file, not counting the daemon's own."""
        self.writers = 0
        """Of these, those that are open for writing."""
        self.raw_writers = 0
        """Of these, those whose writes pass us by."""

    def emit(self, kind: str, **data: object) -> None:
        raise NotImplementedError

    def has_moved(self, moved: Moved) -> None:
        self.moves = (*self.moves[1 - MOVES_MAX :], moved)

    def withhold(self, reason: str | None) -> None:
        """The database file holds what cannot be recorded, or (None) does not any more. Any thread."""
        if reason != self.withheld:
            self.withheld = reason
            if reason is None:
                self.emit("withheldEnd")
            else:
                self.emit("withheld", reason=reason)

    @property
    def wal_size_bytes(self) -> int:
        return stamp(self.files.wal)[0]

    @property
    def journal_mode(self) -> str:
        """ "wal" or "rollback", as page 1 says."""
        header = self._header()
        return "rollback" if header is None else header.journal_mode

    @property
    def sqlite_version(self) -> int:
        """SQLITE_VERSION_NUMBER of the library that last changed page 1 in the file, 0 if unknown."""
        header = self._header()
        return 0 if header is None else header.sqlite_version

    def _header(self) -> DatabaseHeader | None:
        try:
            return DatabaseHeader.unpack(self.first_bytes())
        except FormatError:
            return None

    def first_bytes(self) -> bytes:
        """The 100 bytes of the header in the database file; nothing if it cannot be read."""
        try:
            with open(self.files.database, "rb") as file:
                return file.read(HEADER_SIZE)
        except OSError:
            return b""

    def begin_empty(self) -> None:
        os.makedirs(self.files.folder, exist_ok=True)
        os.makedirs(self.files.ltx, exist_ok=True)

    def remove_live_files(self) -> None:
        """Remove database, journal, WAL and -shm (the drop of the database); the log stays."""
        self.wal_stands_in = False
        for kind in (FileKind.DATABASE, FileKind.JOURNAL, FileKind.WAL, FileKind.SHM):
            try:
                os.unlink(self.files.backing(kind))
            except FileNotFoundError:
                continue
