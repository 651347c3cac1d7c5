"""Whether a database file is sound by itself, asked of SQLite: an image that is half written is not, as a rule.

It is opened as immutable: nothing is locked or written, and neither journal nor WAL is looked for. With a WAL a copy of
both is opened, whose WAL SQLite recovers.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import time
from urllib.parse import quote

from pylitefs.engine.files import read_at
from pylitefs.engine.rollback_capture import whole_size
from pylitefs.errors import FormatError

_STEPS_BETWEEN_LOOKS = 100_000  # virtual machine steps of SQLite: some milliseconds
_COPY = "looked-at"
_TIME_S = 2.0
"""Longer than this nobody waits for the answer, and it is "not known"."""


def is_sound(path: str) -> bool:
    """Whether it is certain that the file passes `PRAGMA integrity_check`. Blocking, for up to some seconds; not for
    the worker. Raises OSError."""
    with open(path, "rb", buffering=0) as file:
        try:
            whole_size(read_at(file.fileno(), 100, 0), file.seek(0, 2))
        except FormatError:
            return False
    return _passes(f"file:{quote(path)}?mode=ro&immutable=1")


def is_sound_with_wal(path: str, wal: str, folder: str) -> bool:
    """The same of what SQLite reads where a WAL lies beside the file: asked of a copy in `folder`, which goes."""
    scratch = os.path.join(folder, _COPY)
    try:
        shutil.copyfile(path, scratch)
        shutil.copyfile(wal, f"{scratch}-wal")
        return _passes(f"file:{quote(scratch)}")
    finally:
        remove_copy(folder)


def remove_copy(folder: str) -> None:
    """Also what a look has left that was cut off. What cannot be removed is in nobody's way."""
    for suffix in ("", "-wal", "-shm", "-journal"):
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(folder, _COPY + suffix))


def _passes(uri: str) -> bool:
    until_s = time.monotonic() + _TIME_S
    try:
        connection = sqlite3.connect(uri, uri=True, isolation_level=None)
        with contextlib.closing(connection):
            connection.set_progress_handler(lambda: time.monotonic() > until_s, _STEPS_BETWEEN_LOOKS)
            return bool(connection.execute("PRAGMA integrity_check(1)").fetchone() == ("ok",))
    except sqlite3.Error:  # damaged, took too long, or its schema needs what only its application has
        return False
