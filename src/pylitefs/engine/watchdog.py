"""A safety net under the capture: once a second, is there a commit that nobody has been woken for?

The capture is woken by what the kernel tells of writes, and looks again as long as something may follow. If that is
right this finds nothing, ever: whatever it finds is a defect. It is counted, logged, and captured.

A look is one small read for each database that is open (the published header in the wal-index), and takes nothing from
anybody. Only if that has changed, and is not at the cursor, it is looked into, after everything that could still wake
the capture has had its turn: SQLite writes a commit's frames before it publishes the commit, so by then the kernel has
told of them, and either the capture has the commit or its next look is planned.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import NamedTuple

from pylitefs.engine.batches import Cursor
from pylitefs.engine.database import Database
from pylitefs.engine.registry import Registry
from pylitefs.formats.sqlite.wal_index import HEADER_COPY_SIZE

log = logging.getLogger("litefs.watchdog")

_INTERVAL_S = 1.0
_UNSETTLED = 3  # looks in a row at writes in a rollback mode that nobody is about to settle


class Seen(NamedTuple):
    """What a look saw when all of it was captured: `glance` as `WalView.glance`."""

    fd: int
    glance: object
    cursor: Cursor


class Watchdog:
    """On the worker. `hear`: let everything that was told of writes wake the capture, now."""

    def __init__(self, registry: Registry, hear: Callable[[], object]) -> None:
        self._registry, self._hear = registry, hear
        self._seen: dict[str, Seen] = {}  # of open databases
        self._unsettled: dict[str, int] = {}

    def start(self) -> None:
        self._registry.worker.post(self.look)

    def look(self) -> None:
        """One look at all databases, and the next one in a second."""
        self._registry.worker.call_later(_INTERVAL_S, self.look)
        behind = []
        for name, database in list(self._registry.databases.items()):
            seen = self._seen.get(name)
            if not (database.in_use or seen) or not database.captures:
                continue
            try:
                if seen is not None and self._is_as_before(database, seen):
                    if not database.in_use:
                        del self._seen[name]  # it was closed, and this was the last look
                elif not self._is_captured(database):
                    behind.append((database, database.wal.cursor))
            except OSError as error:
                log.debug("%s: not looked at: %s", name, error)
        if behind:
            self._hear()
            self._registry.worker.post(self._judge, behind)

    @staticmethod
    def _is_as_before(database: Database, seen: Seen) -> bool:
        """For most databases, each time, this is all: so it is short."""
        if seen.cursor is not database.wal.cursor:
            return False
        try:  # if the view has another file by now, this is another one too, or none
            return os.pread(seen.fd, HEADER_COPY_SIZE, 0) == seen.glance
        except OSError:
            return False

    def _is_captured(self, database: Database) -> bool:
        """Whether everything that is committed is behind the cursor."""
        self._seen.pop(database.name, None)
        wal = database.wal
        with wal.mutex:
            found, cursor = wal.view.glance(), wal.cursor
            if wal.backlog():
                return False
        if found is None:
            self._look_at_rollback(database)
        elif database.in_use:
            self._seen[database.name] = Seen(*found, cursor)
        return True

    def _judge(self, behind: list[tuple[Database, Cursor]]) -> None:
        for database, cursor in behind:
            try:
                self._judge_one(database, cursor)
            except OSError as error:
                log.debug("%s: not looked at: %s", database.name, error)

    def _judge_one(self, database: Database, cursor: Cursor) -> None:
        wal, capture = database.wal, self._registry.capture
        excused = not database.captures or database.failing is not None or database.set_aside_reason is not None
        excused = excused or database.yields  # it changes hands: `roles` tries until it is captured
        if excused or wal.pending is not None or capture.is_planned(database):
            return
        with wal.mutex:
            if wal.cursor != cursor or not (frames := wal.backlog()):
                return
        self._tell(database, f"{frames} committed frames after {cursor}")
        capture.wake(database)

    def _look_at_rollback(self, database: Database) -> None:
        """Writes in a rollback mode wait for somebody who settles them."""
        capture, name = self._registry.capture, database.name
        waits = capture.has_unseen_writes(database) and not capture.is_settling(database)
        self._unsettled[name] = self._unsettled.get(name, 0) + 1 if waits and database.withheld is None else 0
        if self._unsettled[name] >= _UNSETTLED:
            self._tell(database, "writes in a rollback mode")
            capture.wake_rollback(database)

    def _tell(self, database: Database, what: str) -> None:
        log.warning("%s: a defect of litefs, please report it: nobody was woken for %s", database.name, what)
        database.emit("overlooked", reason=what)
