"""A whole database, which the primary never had, is put into a folder of lost/ with all that belongs to it.

That is several renames: a WAL must not stay behind without its database. So it is noted before, and a start after a
crash does the rest. `DATA/dbs/NAME/aside`: the name of the folder in lost/.

    left by a crash after     | the next start, before anything is recovered
    the folder and its info   | the database as before, and a folder in lost/ with nothing in it but that
    the note is durable       | what has not been moved is, the page-checksum table goes, then the note
    some of it was moved      | the same
    the note is gone          | nothing
"""

from __future__ import annotations

import contextlib
import os

from pylitefs.engine.files import DatabaseFiles, publish_file, sync_folder
from pylitefs.ports import FileKind

_KINDS = (FileKind.DATABASE, FileKind.WAL, FileKind.JOURNAL)


def put_aside(files: DatabaseFiles, folder: str) -> None:
    """`folder`: one in `files.lost`. Raises OSError."""
    publish_file(_note_path(files), os.fsencode(os.path.basename(folder)))
    finish_aside(files)


def finish_aside(files: DatabaseFiles) -> None:
    """Do what is noted, if anything is. Raises OSError."""
    try:
        with open(_note_path(files), "rb") as file:
            folder = os.path.join(files.lost, os.fsdecode(file.read()))
    except FileNotFoundError:
        return
    os.makedirs(folder, exist_ok=True)
    for path, item in [(files.backing(kind), kind.value) for kind in _KINDS] + [(files.ltx, "ltx")]:
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, os.path.join(folder, item))
    with contextlib.suppress(FileNotFoundError):
        os.unlink(files.checksums)  # else it says that a database was here
    sync_folder(folder)
    sync_folder(files.folder)
    os.unlink(_note_path(files))


def _note_path(files: DatabaseFiles) -> str:
    return os.path.join(files.folder, "aside")
