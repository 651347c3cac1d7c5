"""Commits in WAL mode that the test publishes when it likes.

A commit is done by a real SQLite, and then unpublished: the wal-index header, whose store raises no event, is put back
to what it was. So the files are as they are between SQLite's write of the frames, which wakes the capture, and its
store to shared memory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from engine_nodes import Node, check_log, new_primary, replay, rows_of
from sqlite_process import SqliteProcess

from pylitefs.engine.database import Database
from pylitefs.engine.wal_capture import WalCapture
from pylitefs.formats.sqlite.wal_index import HEADER_COPY_SIZE

LOADED_S = 10.0  # a machine under load may take so long; what is lost is never found


def until(condition: Callable[[], bool], otherwise: str = "it does not come to that") -> None:
    until_s = time.monotonic() + LOADED_S
    while not condition():
        assert time.monotonic() < until_s, otherwise
        time.sleep(0.0005)


class Silent:
    """A primary and an application that has its database open, in WAL mode."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.node: Node = new_primary(folder / "node")
        self.database: Database = self.node.database()
        self.worker, self.capture = self.node.store.worker, self.node.store.capture
        self.open()
        self.awake()
        until(lambda: self.database.wal.shm_fd >= 0)  # the opener is done, and wakes nobody any more

    @property
    def wal(self) -> WalCapture:
        return self.database.wal

    def open(self) -> None:
        """An application, in a process of its own."""
        self.sql = SqliteProcess(self.database.files.database)
        self.sql("PRAGMA wal_autocheckpoint = 0")
        self.sql("SELECT count(*) FROM t")

    def take_back(self) -> None:
        """Another application writes the next commit over one that was not published."""
        self.sql.kill()
        self.open()
        self.commit()()

    def agrees(self, before: int) -> None:
        """The log gets to what SQLite sees, by itself; it was at TXID `before`."""

        def same() -> bool:
            with self.database.lock:
                image = replay(self.database)
            (self.folder / "replayed").write_bytes(image)
            return rows_of(self.folder / "replayed") == self.sql("SELECT id, v FROM t ORDER BY id")

        until(same, f"the log is not what SQLite sees, from TXID {before} on")

    def commit(self, sql: str = "INSERT INTO t (v) VALUES (randomblob(50))") -> Callable[[], None]:
        """Write the frames of a commit; call the result to publish it."""
        shm = os.open(self.database.files.shm, os.O_RDWR | os.O_CLOEXEC)
        before = os.pread(shm, 2 * HEADER_COPY_SIZE, 0)
        self.sql(sql)
        after = os.pread(shm, 2 * HEADER_COPY_SIZE, 0)
        os.pwrite(shm, before, 0)

        def publish() -> None:
            os.pwrite(shm, after, 0)
            os.close(shm)

        return publish

    def rested(self) -> None:
        """The last look is long ago, so the next wake-up looks at once."""
        self.worker.submit(self.capture.forget, self.database, database=self.database.name).result()

    def awake(self) -> None:
        """What the kernel tells of a write to the WAL."""
        self.worker.submit(self.capture.wake, self.database, database=self.database.name).result()

    def has(self, txid: int) -> None:
        """The log gets to this transaction by itself."""
        until(lambda: self.database.position.txid >= txid, f"TXID {txid} is never captured")
        assert self.database.position.txid == txid

    def check(self) -> None:
        """The log replayed is what SQLite sees."""
        check_log(self.database)
        (self.folder / "replayed").write_bytes(replay(self.database))
        assert rows_of(self.folder / "replayed") == self.sql("SELECT id, v FROM t ORDER BY id")

    def close(self) -> None:
        self.sql.kill()
        self.node.close(clean=False)
