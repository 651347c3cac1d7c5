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


def is_sound_with_wal(path: str, wal: str, scratch: str) -> bool:
    """The same of what SQLite reads where a WAL lies beside the file: asked of a copy, `scratch`, which goes."""
    try:
        shutil.copyfile(path, scratch)
        shutil.copyfile(wal, f"{scratch}-wal")
        return _passes(f"file:{quote(scratch)}")
    finally:
        for suffix in ("", "-wal", "-shm", "-journal"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(scratch + suffix)


def _passes(uri: str) -> bool:
    until_s = time.monotonic() + _TIME_S
    try:
        connection = sqlite3.connect(uri, uri=True, isolation_level=None)
        with contextlib.closing(connection):
            connection.set_progress_handler(lambda: time.monotonic() > until_s, _STEPS_BETWEEN_LOOKS)
            return bool(connection.execute("PRAGMA integrity_check(1)").fetchone() == ("ok",))
    except sqlite3.Error:  # damaged, took too long, or its schema needs what only its application has
        return False
