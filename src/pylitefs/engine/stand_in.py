"""A WAL that stands in for a rollback mode.

A database in a rollback mode (by its header) is served through a WAL while the daemon writes it, and goes on in that
WAL when this node is promoted, or takes a HALT lock, while applications have it open. In a WAL, `synchronous=NORMAL`
has no fsync at a commit, but in the database's own mode it has: there a commit that returned is durable, and waits for
replicas. So a handle on such a WAL that can write is opened so that its writes come to us (see `wants_wal_writes` in
`ports`), and the write after which a commit frame is whole is treated as the fsync of a FULL commit is: fsynced, gated,
fenced. SQLite publishes the commit in the wal-index only after that write has returned. With `synchronous=FULL` the
fsync comes as well; the commit is in the log and with the replicas then, so it does not wait again.

    the application is killed                 left                            what counts
    between a frame's header and its page     a frame with a wrong checksum   nothing: no reader counts that frame
    while the last write of a commit waits    a whole commit, not published   as with a FULL commit, see `pending`

`StandIns` ends that state: connections that cannot write leave the WAL behind when they close. Then SQLite itself, in a
process of its own, opens the database and closes it, which copies the WAL into the database and removes it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from pathlib import Path

from pylitefs.engine.database import Database
from pylitefs.engine.worker import Worker
from pylitefs.errors import FormatError
from pylitefs.formats.sqlite.wal import (
    FRAME_HEADER_SIZE,
    WAL_HEADER_SIZE,
    WalHeader,
    frame_offset,
    scan_frames,
)
from pylitefs.ports import FileKind

log = logging.getLogger("litefs.capture")

_PROGRAM = str(Path(__file__).parents[1] / "close_wal.py")
_SETTLE_S = 0.05  # the last handle is released after the close has returned; another may follow at once
_LOOK_S = 0.05
_STOP_S = 30.0
_AGAIN_S = (1.0, 5.0, 30.0, 300.0)  # after it was in vain (a full disk)
_COMMIT = slice(4, 8)  # of a frame's header: not zero in a commit frame
_CHECKSUM = slice(16, 24)


def completes_commit(wal_fd: int, offset: int, size: int) -> bool:
    """Whether a frame that a write touched is now a whole commit frame: the checksums of the WAL up to it are right.
    `offset`, `size`: of the write, in bytes. Raises OSError."""
    try:
        header = WalHeader.unpack(os.pread(wal_fd, WAL_HEADER_SIZE, 0))
    except FormatError:
        return False
    first = max(0, offset - WAL_HEADER_SIZE) // header.frame_size + 1
    last = max(0, offset + size - 1 - WAL_HEADER_SIZE) // header.frame_size + 1
    return any(_is_commit_frame(wal_fd, header, number) for number in range(first, last + 1))


def _is_commit_frame(wal_fd: int, header: WalHeader, number: int) -> bool:
    at = frame_offset(number, header.page_size)
    head = os.pread(wal_fd, FRAME_HEADER_SIZE, at)
    if len(head) < FRAME_HEADER_SIZE or not any(head[_COMMIT]):
        return False
    before = header.checksum1, header.checksum2
    if number > 1:
        checksum = os.pread(wal_fd, FRAME_HEADER_SIZE, at - header.frame_size)[_CHECKSUM]
        before = int.from_bytes(checksum[:4], "big"), int.from_bytes(checksum[4:], "big")
    return scan_frames(header, os.pread(wal_fd, header.frame_size, at), *before).committed == 1


class StandIns:
    """Has databases go back to their own mode when nobody has them open any more. On the worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._stopping = False
        self._vain: dict[str, int] = {}  # tries without success
        self._planned: set[str] = set()

    def closed(self, database: Database) -> None:
        """The last application has closed it. Any thread."""
        if database.wal_stands_in:
            self._worker.post(self._plan, database, _SETTLE_S, database=database.name)

    def _plan(self, database: Database, delay_s: float) -> None:
        if database.name not in self._planned and database.name not in self._processes:
            self._planned.add(database.name)
            self._worker.call_later(delay_s, self._begin, database)

    def _is_wanted(self, database: Database) -> bool:
        with database.handles_lock:
            unused = not database.in_use
        return unused and database.wal_stands_in and database.may_commit and database.exists

    def _begin(self, database: Database) -> None:
        self._planned.discard(database.name)
        if self._stopping or not self._is_wanted(database):
            return
        path = database.files.live(FileKind.DATABASE)
        try:
            self._processes[database.name] = subprocess.Popen(
                [sys.executable, "-I", "-S", _PROGRAM, path], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        except OSError as error:
            log.warning("%s: it stays in WAL mode for now: %s", database.name, error)
            return
        self._worker.call_later(_LOOK_S, self._look, database)

    def _look(self, database: Database) -> None:
        if self._processes[database.name].poll() is None:
            self._worker.call_later(_LOOK_S, self._look, database)
            return
        del self._processes[database.name]
        if not self._is_wanted(database):
            self._vain.pop(database.name, None)
            return
        times = self._vain.get(database.name, 0)
        self._vain[database.name] = times + 1
        self._plan(database, _AGAIN_S[min(times, len(_AGAIN_S) - 1)])

    def stop(self) -> None:
        """Before the mount goes: nobody of ours has a file of it open. Not on the worker: they need it."""
        for process in self._worker.submit(self._end).result(_STOP_S):
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2.0)

    def _end(self) -> list[subprocess.Popen[bytes]]:
        """None is started any more; those there are."""
        self._stopping = True
        return list(self._processes.values())
