"""Whether a database may be renamed, or another one may take its name, and what the content is then.

SQLite finds -wal, -shm and -journal by the name that it opened a database by. So a connection that goes on when the
file has another name, or none, would commit where nobody looks: into a WAL of the old name, beside others who write the
same file, or into the WAL of the file that has this name now, which is torn by it: also one in a rollback mode, because
SQLite goes on in WAL mode as soon as it finds a -wal (pager.c, pagerOpenWalIfPresent; with an empty file it removes
that). Natively too rows are lost so. Therefore a rename is refused (EBUSY)

    the database is in WAL mode            while any application has it, its -wal or its -shm open, or is about to
    the one that has the new name is, or   the same of that one; it may be a plain file that is in the way
    the one that gets it
    the database is in a rollback mode     while a journal stands there that could still take pages back

With both in a rollback mode a connection may stay: it reads on, and SQLite itself refuses to write to a file that has
lost its name (SQLITE_READONLY_DBMOVED). It may still take the journal of who has the name now for its own, as natively.
The answer holds until the file has its new name, because it is given anew where nobody is let in
(`Database.handles_lock`). Who finds the file by its old name even then, as the kernel does until the rename is
answered, is told that it has gone (`anew` in `ports.Notifier.move`).
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import time
from collections.abc import Callable

from pylitefs.engine.capture import Capture
from pylitefs.engine.commit_points import wal_in_use
from pylitefs.engine.database import Database
from pylitefs.engine.plain_files import BeingTakenOver
from pylitefs.engine.registry import Registry
from pylitefs.engine.transaction import UnstableSource, wait_stable
from pylitefs.errors import FormatError
from pylitefs.formats.names import shown
from pylitefs.formats.sqlite.header import HEADER_SIZE, DatabaseHeader
from pylitefs.ports import SUFFIXES, Notifier

log = logging.getLogger("litefs.store")

_ATTEMPTS = 8
_CLOSED_S = 0.5  # the kernel tells of a close(2) after it has returned
_LOOK_AGAIN_S = 0.005


def needs_its_name(database: Database) -> bool:
    """Whether those who have it open would go on with files of its old name: in WAL mode."""
    return database.journal_mode == "wal" or database.wal_stands_in or wal_in_use(database)


def _comes_in_wal_mode(source: Database | str) -> bool:
    if isinstance(source, Database):
        return needs_its_name(source)
    try:
        with open(source, "rb") as file:
            return DatabaseHeader.unpack(file.read(HEADER_SIZE)).is_wal
    except (OSError, FormatError):
        return False


def _problem(source: Database | str, target: Database | None, notifier: Notifier | None) -> str | None:
    wal, in_use = _comes_in_wal_mode(source), None
    if isinstance(source, Database):
        if source.rollback.journal_in_use():
            return "a transaction in it has not ended, or has to be rolled back: open it once"
        if source.opening or (wal and _is_used(source, notifier)):
            in_use = source
    if target is not None and (wal or needs_its_name(target)) and _is_used(target, notifier):
        in_use = in_use or target
    if in_use is None:
        return None
    return (
        f"an application has {shown(in_use.name)} open; SQLite would go on to write to files of this name: "
        "close it first"
    )


def _is_used(database: Database, notifier: Notifier | None) -> bool:
    names = [database.name + suffix for suffix in SUFFIXES]
    return database.in_use or (notifier is not None and any(notifier.is_open(name) for name in names))


def check_unused(source: Database | str, target: Database | None, notifier: Notifier | None) -> None:
    """`source` (a database, or the path of a plain file) may get the name of `target`; else OSError (EBUSY)."""
    if (problem := _problem(source, target, notifier)) is not None:
        raise OSError(errno.EBUSY, problem)


def when_unused(registry: Registry, old: str, new: str, rename: Callable[[], object]) -> None:
    """`rename`, which checks that by itself. Those who have just closed it may still count as users, and those who open
    it in a rollback mode are about to be out of the way: give them a moment. A plain file may have been taken over
    since the kernel has looked it up: then once more. One that is being taken over is waited for: that needs nothing of
    the mount, whose directory the kernel has locked meanwhile. Blocking, not on the worker. Raises what `rename`
    raises; a refusal (EBUSY) is in the log, too."""
    again = True
    while True:
        registry.plain_files.wait(old, new)
        found = registry.get(old)
        source = found if found is not None and found.exists else registry.plain_path(old)
        try:
            _when_unused(source, registry.get(new), registry.notifier, rename)
            return
        except BeingTakenOver:
            continue
        except FileNotFoundError:
            if not again:
                raise
            again = False


def _when_unused(
    source: Database | str, target: Database | None, notifier: Notifier | None, rename: Callable[[], object]
) -> None:
    until_s = time.monotonic() + _CLOSED_S
    while True:
        while _problem(source, target, notifier) is not None and time.monotonic() < until_s:
            time.sleep(_LOOK_AGAIN_S)
        try:
            rename()
            return
        except OSError as error:
            if error.errno != errno.EBUSY or isinstance(error, BeingTakenOver):
                raise
            if time.monotonic() >= until_s:
                name = source.name if isinstance(source, Database) else os.path.basename(source)
                log.warning("%s is not renamed: %s", shown(name), error.strerror)
                raise


def record_content(database: Database, capture: Capture) -> None:
    """Other files have its names: what they hold is one transaction, with what is committed in a WAL that came along
    (which a file alone need not be whole without: a checkpoint may be under way). On the worker. Raises OSError."""
    wal = database.wal
    for attempt in range(_ATTEMPTS):  # a wal-index that only the mount shows was made since: all that is whole counts
        try:
            committed = wal.view.committed()
            if committed is None and wal_in_use(database):
                raise UnstableSource  # somebody makes the wal-index, at this moment
            batch = wal.diff(committed) if committed is not None and committed.mx_frame else None
            if batch is None:
                break
            stable = functools.partial(wal.is_stable, batch)
            database.record(batch.change, batch.pages, batch.read_missing, stable, "import")
            wal.advance(batch)
            return
        except UnstableSource:
            wait_stable(attempt)
    database.rollback.suspect = True
    capture.commit_point(database, "import")
