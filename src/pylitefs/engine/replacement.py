"""A file takes the place of a database's (`mv new.db app.db`), with all that belongs to it.

The old -wal must never lie beside the new file where anybody could open them: SQLite, or our own recovery, would copy
its frames into it. And as long as the old file has the name, its -wal has to be there. Two renames are not one, so
the exchange is done where no file of the mount can be opened (`Notifier.move`), and noted before, so that a start
after a crash does the rest. `DATA/dbs/NAME/replacing`, JSON: `inode`, of the file that takes the place; `source`, the
name of the database that it was, or null; `sides`, the inodes of that one's side files.

A -shm does not come along: nobody has it open (see `renaming`), so who opens the database next makes it anew, and
counts all that is whole in the WAL. What the old one says is less where all that used it were killed while a commit
waited in its fsync.

    left by a crash after            | the next start, before anything is recovered
    the note is durable              | the database has another inode: both are as they were, the note goes
    the file has its new name        | the inode is the noted one: as below
    … the old side files are gone    | those that are there and are not the source's go, the source's take their place
    … the source's have their place  | the same; DATA/dbs/SOURCE/moved says that the source is gone, then the note goes
    the new content is recorded      | the same
    the source's drop is recorded    | the same
    the note is gone                 | nothing

Where the new content cannot be recorded, and no database had the name, the exchange is taken back, the side files
first: a crash in between does it again.

With `moved`, the source's drop is recorded when everything is recovered (where the files are the truth), then it goes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable

from pylitefs.engine.files import DatabaseFiles, publish_file, sync_folder
from pylitefs.ports import SIDE_KINDS, FileKind


class Replacement:
    """`path` is the new file, `source` the files of the database that it belongs to (None: it is a plain file)."""

    def __init__(self, files: DatabaseFiles, path: str, source: DatabaseFiles | None) -> None:
        self._files, self._path, self._source = files, path, source

        sides = [] if source is None else [_inode(source.backing(kind)) for kind in SIDE_KINDS]
        self._sides = [inode for inode in sides if inode is not None]

    def note(self) -> None:
        """Durable on return. Raises OSError."""
        source = None if self._source is None else self._source.name
        note = {"inode": _inode(self._path), "source": source, "sides": self._sides}
        publish_file(_note_path(self._files), json.dumps(note).encode())

    def exchange(self) -> None:
        """Quick: where nobody can open a file meanwhile. Raises OSError, and nothing is changed then."""
        os.rename(self._path, self._files.database)
        _take_side_files(self._files, self._source, self._sides)

    def undo(self) -> None:
        """After `exchange`, where no database had the name before: all is as it was. As quick. Raises OSError."""
        assert self._source is not None
        for kind in SIDE_KINDS:
            if _inode(self._files.backing(kind)) in self._sides:
                os.rename(self._files.backing(kind), self._source.backing(kind))
        os.rename(self._files.database, self._path)

    def finish(self) -> None:
        _forget_note(self._files)


def finish_replacement(files: DatabaseFiles, files_of: Callable[[str], DatabaseFiles]) -> None:
    """Before anything is recovered: do the rest of an exchange that a crash has cut off. Raises OSError."""
    try:
        with open(_note_path(files), "rb") as file:
            note = json.loads(file.read(4096))
        inode, source, sides = note["inode"], note["source"], note["sides"]
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError):  # it never became durable, so nothing was exchanged
        _forget_note(files)
        return
    if inode and _inode(files.database) == inode:
        where = None if source is None else files_of(source)
        _take_side_files(files, where, sides)
        if where is not None:
            publish_file(_moved_path(where), b"")
    _forget_note(files)


def was_moved(files: DatabaseFiles) -> bool:
    """Whether a crash came when its files had got another database's name."""
    return os.path.exists(_moved_path(files))


def forget_moved(files: DatabaseFiles) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(_moved_path(files))
        sync_folder(files.folder)


def _moved_path(files: DatabaseFiles) -> str:
    return os.path.join(files.folder, "moved")


def _take_side_files(files: DatabaseFiles, source: DatabaseFiles | None, sides: list[int]) -> None:
    """`sides`: the inodes of the source's: those may have been moved already."""
    for kind in SIDE_KINDS:
        if _inode(files.backing(kind)) not in sides:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(files.backing(kind))
        if source is not None and _inode(source.backing(kind)) in sides:
            if kind is FileKind.SHM:
                os.unlink(source.backing(kind))
            else:
                os.rename(source.backing(kind), files.backing(kind))


def _inode(path: str) -> int | None:
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return None


def _forget_note(files: DatabaseFiles) -> None:
    with contextlib.suppress(FileNotFoundError):
        sync_folder(files.folder)
        os.unlink(_note_path(files))


def _note_path(files: DatabaseFiles) -> str:
    return os.path.join(files.folder, "replacing")


def link_file(path: str, target: str) -> None:
    """`target` is a second name of the file `path`, whatever it was before; where there are no second names, its only
    one. Raises OSError."""
    try:
        if os.path.samefile(path, target):
            return
        os.unlink(target)
    except FileNotFoundError:
        pass
    try:
        os.link(path, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        os.rename(path, target)
