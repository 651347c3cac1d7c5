"""A database file that is written beside the live one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from pylitefs.engine.database import Database
from pylitefs.engine.files import Permissions, sync_folder, write_at
from pylitefs.formats.ltx.format import Header
from pylitefs.ports import FileKind


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

    def publish(self, permissions: Permissions) -> None:
        permissions.give(self.fd)
        self.sync()
        files = self._database.files
        for kind in (FileKind.JOURNAL, FileKind.WAL, FileKind.SHM):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(files.backing(kind))
        os.rename(self.path, files.database)
        sync_folder(files.folder)

    def __enter__(self) -> Building:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
