"""strict-verify: read a database again after its position moved, and compare every page with its checksum.

For tests and for the suspicious: it reads the whole database each time. What does not match is an event ("damaged")
and a log line; nothing is changed.
"""

from __future__ import annotations

import logging
import queue
import threading
from typing import Protocol

from pylitefs.engine.continuation import guarded
from pylitefs.engine.database import Database
from pylitefs.engine.snapshot import SnapshotReader
from pylitefs.errors import LitefsError
from pylitefs.events import Event, EventBus

log = logging.getLogger("litefs.verify")


class Databases(Protocol):
    """Where the verifier finds them (the store)."""

    events: EventBus

    def get(self, name: str) -> Database | None: ...


class Verifier:
    """A thread of its own; several moves of one database in a row are verified once."""

    def __init__(self, store: Databases) -> None:
        self._store = store
        self._moved: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._waiting: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="verify", daemon=True)

    def start(self) -> None:
        self._store.events.subscribe(self._on_event)
        self._thread.start()

    def _on_event(self, event: Event) -> None:
        if event.type == "tx" and event.database and event.database not in self._waiting:
            self._waiting.add(event.database)
            self._moved.put(event.database)

    def _run(self) -> None:
        while True:
            name = self._moved.get()
            self._waiting.discard(name)
            database = self._store.get(name)
            if database is not None and database.exists:
                guarded(self._one, database)

    @staticmethod
    def _one(database: Database) -> None:
        try:
            verify(database)
        except (LitefsError, OSError) as error:
            log.error("%s: %s", database.name, error)
            if not database.is_damaged:  # else it has said so itself
                database.emit("damaged", reason=str(error))


def verify(database: Database) -> None:
    """Read every page; raises DatabaseError if some do not match the checksums of the log's head. Blocking."""
    reader = SnapshotReader(database, None)
    try:
        while reader.next_chunk() is not None:
            pass
    finally:
        reader.close()
