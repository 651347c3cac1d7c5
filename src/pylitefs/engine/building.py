"""A database file that is written beside the live one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from pylitefs.engine.database import Database
from pylitefs.engine.files import Permissions, sync_folder, write_at
from pylitefs.engine.replacement import Replacement
from pylitefs.formats.ltx.format import Header
from pylitefs.ports import SIDE_KINDS, FileKind, Notifier


class Building:
    """A database file that is written beside the live one, to be given its name when it is complete."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.path = os.path.join(database.files.folder, "database.new")
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)

    def write(self, pages: Iterable[tuple[int, bytes]], header: Header) -> None:
        for pgno, page in pages:
            write_at(self.fd, page, (pgno - 1) * header.page_size)
        os.ftruncate(self.fd, header.commit * header.page_size)

    def sync(self) -> None:
        """After it nothing that `publish` does needs room on the disk."""
        os.fsync(self.fd)

    def publish(self, permissions: Permissions, notifier: Notifier | None = None) -> None:
        """Give it the database's name. The -wal of a file that had it goes in the same moment, where nobody can open a
        file of the mount; it is noted before, so that a start after a crash does the rest. Raises OSError."""
        permissions.give(self.fd)
        self.sync()
        files = self._database.files
        if any(os.path.lexists(files.backing(kind)) for kind in (FileKind.DATABASE, *SIDE_KINDS)):
            replacement = Replacement(files, self.path, None)
            replacement.note()
            if notifier is not None:
                notifier.move("", self._database.name, replacement.exchange)
            else:
                replacement.exchange()
            replacement.finish()
        else:
            os.rename(self.path, files.database)
        sync_folder(files.folder)

    def __enter__(self) -> Building:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
