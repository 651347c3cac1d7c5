"""Scrub: every page of every database is read now and then, slowly, and compared with its checksum.

So a page that the disk has changed is noticed while the log, or another node, still has the right one, and not by the
application, or by the replica that becomes the primary. What is done about it: see `damage`, and on a replica
`cluster.replica`. Pages that the kernel has in its cache are read from there: what is in use is not read from the disk.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from pylitefs.engine.continuation import guarded
from pylitefs.engine.database import Database
from pylitefs.engine.snapshot import DamagedPages, SnapshotReader
from pylitefs.errors import LitefsError
from pylitefs.events import Event, EventBus

log = logging.getLogger("litefs.scrub")

FIRST_S = 600.0
"""A node that was just started has other things to do."""

_CHUNKS = 16  # read in one go, while which the log keeps what was written since


class Databases(Protocol):
    """Where the scrubber finds them (the store)."""

    events: EventBus

    def names(self) -> list[str]: ...
    def get(self, name: str) -> Database | None: ...


class Scrubber:
    """A thread of its own. `rate`: bytes per second, 0 for no limit."""

    def __init__(self, store: Databases, interval_s: float, rate: int) -> None:
        self._store, self._interval_s, self._rate = store, interval_s, rate
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scrub", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """On return nothing is read any more. The worker must still run."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def _run(self) -> None:
        pause_s = min(FIRST_S, self._interval_s)
        while not self._stopped.wait(pause_s):
            began_s = time.monotonic()
            guarded(self._all)
            pause_s = max(0.1, self._interval_s - (time.monotonic() - began_s))

    def _all(self) -> None:
        began_s, total, count = time.monotonic(), 0, 0
        for name in self._store.names():
            database = self._store.get(name)
            if database is None or not database.exists or database.set_aside_reason is not None:
                continue
            try:
                total += self._one(database)
                count += 1
            except (LitefsError, OSError) as error:  # in the next round
                log.info("%s: not read to the end: %s", name, error)
            if self._stopped.is_set():
                return
        data = {"databases": count, "bytes": total, "seconds": time.monotonic() - began_s}
        self._store.events.emit(Event("scrubbed", None, data))

    def _one(self, database: Database) -> int:
        """Bytes read. Raises LitefsError, OSError."""
        pgno, total = 1, 0
        while pgno <= database.commit and not self._stopped.is_set():
            reader = SnapshotReader(database, None, pgno)
            try:
                for _ in range(_CHUNKS):
                    with contextlib.suppress(DamagedPages), self._witness(database, pgno, reader):  # it has told
                        if reader.next_chunk() is None:
                            break
                    size = (reader.next_pgno - pgno) * reader.page_size
                    pgno, total = reader.next_pgno, total + size
                    if self._stopped.wait(size / self._rate if self._rate else 0):
                        break
            finally:
                reader.close()
        return total

    @staticmethod
    @contextlib.contextmanager
    def _witness(database: Database, first: int, reader: SnapshotReader) -> Iterator[None]:
        """What is read within, and right, proves later that the disk has changed it, if nobody has written it since."""
        state, before = database.sound.begin(), reader.expected(first, reader.run)
        yield
        if state is not None:
            after = reader.expected(first, reader.run)
            database.sound.note(state, first, np.where(before == after, after, np.uint64(0)))
