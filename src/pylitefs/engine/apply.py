"""Apply on a replica: transactions from the primary into the log and the live database.

Every transaction is checked before anything is written: it must follow our position, its file must verify, and the
database checksum it leads to is predicted from the checksum table and its own pages. Then the log gets it, then
the WAL (`replica_wal`), then the position moves.

A database is *active* (WAL, wal-index and locks there) while applications have it open or transactions come; idle, it
is checkpointed and rests as one plain file.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from pylitefs import mount_guard
from pylitefs.engine.apply_checks import check, is_set_aside, is_stopping
from pylitefs.engine.building import Building
from pylitefs.engine.continuation import finish, proceed
from pylitefs.engine.database import Database
from pylitefs.engine.files import Permissions, write_at
from pylitefs.engine.ltx_log import LogEntry
from pylitefs.engine.opener import Opener
from pylitefs.engine.replaced_file import let_go, locked_out
from pylitefs.engine.shared_wal import SharedWal
from pylitefs.engine.worker import Worker
from pylitefs.errors import DatabaseBusy, FormatError, ReadersInTheWay
from pylitefs.formats.ltx.checksum import checksums_of
from pylitefs.formats.ltx.decoder import Reader, decode
from pylitefs.formats.ltx.format import CHECKSUM_FLAG, Header, Position, Trailer
from pylitefs.ports import SUFFIXES, Notifier, Then

log = logging.getLogger("litefs.apply")

_CHECKPOINT_FRAMES = 4000
_SETTLE_S = 0.5  # checkpoint after this long without a transaction
_REST_S = 15.0  # let go of a database that nobody uses after this long


class Apply:
    """Apply of all databases. On the worker, unless a method says otherwise."""

    def __init__(self, worker: Worker, opener: Opener, permissions: Permissions) -> None:
        self._worker = worker
        self._opener = opener
        self._permissions = permissions
        self.notifier: Notifier | None = None
        self._opening: dict[str, int] = {}
        self._aside: dict[str, list[Future[None]]] = {}  # databases that are being made active by the opener
        self._lock = threading.Lock()
        self.clear_name: Callable[[str], None] = lambda name: None
        """A database has come to be: files of other kinds that have its name must make room."""
        self.names_wait: Callable[[], bool] = lambda: False
        """Whether requests about names may wait for the worker, which must then not resolve any."""
        self._stopped = False  # the mount is about to go: no database is made active any more

    # -- active and at rest ------------------------------------------------------------------------------------

    def before_open(self, database: Database, then: Then) -> None:
        """An application opens the database: make it active first. FUSE thread."""
        with self._lock:
            self._opening[database.name] = self._opening.get(database.name, 0) + 1

        def work() -> None:
            if database.set_aside_reason is not None or database.captures:  # its WAL is all there is of what it holds
                done(None)
            elif self._stopped:
                done(is_stopping(database))
            elif database.replica is None and (self.names_wait() or self.is_made_active(database)):
                self.activate_aside(database).add_done_callback(lambda made: done(made.exception()))
            else:
                finish(done, lambda: self.activate(database))

        def done(error: BaseException | None) -> None:
            proceed(then, error)
            with self._lock:
                self._opening[database.name] -= 1

        self._worker.post(work, database=database.name)

    def activate(self, database: Database) -> SharedWal:
        """Raises DatabaseBusy, OSError; PositionMismatch for a database that was set aside."""
        if database.set_aside_reason is not None:
            raise is_set_aside(database)
        self._refuse(database)
        if self._stopped:
            raise is_stopping(database)
        if database.replica is None and (self.names_wait() or self.is_made_active(database)):
            self.activate_aside(database)
            raise DatabaseBusy(f"{database.name}: its WAL is being made")
        if database.replica is None:
            database.replica = self._open(database)
            self._later(database)
        return database.replica

    def _open(self, database: Database) -> SharedWal:
        """With the -wal and -shm that are there, if any. What they make of the database must be what the log says."""
        replica = SharedWal(database.files, database.page_size, database.commit, self._permissions.mode)
        replica.open()
        known = database.file_sums_expected()
        if replica.mx_frame and (replica.commit != len(known) or replica.differing(known)):
            replica.close()
            database.set_aside_reason = "its WAL holds something else than its log"
            database.position = Position(database.log.head.txid, CHECKSUM_FLAG, database.log.head.epoch)
            log.error("%s: set aside, read-only: %s", database.name, database.set_aside_reason)
            database.emit("setAside", reason=database.set_aside_reason)
            raise is_set_aside(database)
        return replica

    @staticmethod
    def _refuse(database: Database) -> None:
        if database.captures:
            raise DatabaseBusy(f"{database.name}: applications write to it")

    def activate_aside(self, database: Database) -> Future[None]:
        """As `activate`, where the worker may not: by the opener. Any thread."""
        done: Future[None] = Future()
        with self._lock:
            waiting = self._aside.setdefault(database.name, [])
            waiting.append(done)
            first = len(waiting) == 1
        if first:
            self._worker.post(self._begin_aside, database, database=database.name)
        return done

    def is_made_active(self, database: Database) -> bool:
        """Whether the opener is at it; its names are not ours then."""
        with self._lock:
            return database.name in self._aside

    def _begin_aside(self, database: Database) -> None:
        if database.replica is not None or database.captures or not database.exists:
            self._end_aside(database, None, None)
            return

        def make() -> None:
            replica, error = None, None
            try:
                replica = self._open(database)
            except Exception as caught:
                error = caught
            self._worker.post(self._end_aside, database, replica, error, database=database.name)

        self._opener.do(make)

    def _end_aside(self, database: Database, replica: SharedWal | None, error: Exception | None) -> None:
        if replica is not None and self._stopped:
            replica.retire()
            replica, error = None, is_stopping(database)
        if replica is not None:
            database.replica = replica
            self._later(database)
        with self._lock:
            waiting = self._aside.pop(database.name, [])
        for done in waiting:
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

    def idle(self, database: Database) -> None:
        """The last application closed it. Any thread."""
        self._worker.post(self._later, database, database=database.name)

    def _later(self, database: Database) -> None:
        if not database.upkeep_scheduled:
            database.upkeep_scheduled = True
            self._worker.call_later(_SETTLE_S, self._upkeep, database)

    def _upkeep(self, database: Database) -> None:
        """Checkpoint what has settled; let go of a database at rest."""
        database.upkeep_scheduled = False
        if self.is_unused(database):
            let_go(database, self._opener)
        replica = database.replica
        if replica is None:
            return
        quiet_s = time.monotonic() - database.applied_s
        try:
            if quiet_s >= _SETTLE_S * 0.9 and replica.backfill < replica.mx_frame:
                replica.checkpoint()
            if quiet_s >= _REST_S and self.is_unused(database) and not self.names_wait() and self.rest(database):
                return
        except OSError as error:
            log.warning("%s: checkpoint will be tried again: %s", database.name, error)
        database.upkeep_scheduled = True
        wait = _SETTLE_S if replica.mx_frame or quiet_s < _SETTLE_S else _REST_S / 3
        self._worker.call_later(wait, self._upkeep, database)

    def is_unused(self, database: Database) -> bool:
        """Whether no application has it open, or is about to."""
        with self._lock:
            return not database.in_use and not self._opening.get(database.name)

    def rest(self, database: Database) -> bool:
        """Checkpoint to the end and drop WAL, wal-index and locks. False if a reader still needs them."""
        replica = database.replica
        if replica is None:
            return True
        if not replica.checkpoint() or not replica.remove():
            return False
        database.replica = None
        return True

    def stop(self, databases: Iterable[Database], *, may_rest: bool) -> None:
        """The mount is about to go: no database is made active from now on. One that nobody uses is left as one plain
        file (`may_rest`: the worker may resolve names of the mount). One in use keeps its -wal and -shm: who has a
        snapshot reads on in it, nobody begins to read or to write (`retire`), and the next start finds every commit."""
        self._stopped = True
        for database in databases:
            let_go(database, None)
            replica = database.replica
            if replica is None:
                continue
            with contextlib.suppress(OSError):
                if may_rest and self.is_unused(database) and self.rest(database):
                    continue
                replica.checkpoint()
            replica.retire()
            database.replica = None

    # -- transactions ------------------------------------------------------------------------------------------

    def apply(self, database: Database, data: bytes, *, spare_readers: bool = False) -> Position:
        """One whole LTX file. FormatError, PositionMismatch change nothing; OSError leaves the position as it was.
        `spare_readers`: see `without_readers`."""
        started = time.monotonic()
        with self.without_readers(database, header := Header.unpack(data), spare=spare_readers):
            ltx = decode(data)
            pgnos = np.array([pgno for pgno, _ in ltx.pages], dtype=np.uint32)
            sums = checksums_of(ltx.pages)
            check(database, header, ltx.trailer, pgnos, sums)
            temporary = database.log.temporary()
            try:
                with open(temporary, "wb", buffering=0) as file:
                    write_at(file.fileno(), data, 0)
                return self.commit(database, header, ltx.trailer, temporary, ltx.pages, pgnos, sums, started)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)

    @contextlib.contextmanager
    def without_readers(self, database: Database, header: Header, *, spare: bool) -> Iterator[None]:
        """For a transaction that brings another page size: within, nobody reads the database, and it is rewritten in
        place. If somebody is in a read transaction now: with `spare` ReadersInTheWay, before anything has changed or
        was logged, to be tried again soon; without it the file is to be replaced. Nobody waits here."""
        other = database.exists and header.commit and header.page_size != database.page_size
        if not (other and header.pre_apply_position == database.position):
            yield
            return
        replica = self.activate(database)
        if not replica.lock_readers_out() and spare:
            raise ReadersInTheWay(f"{database.name}: somebody reads it, and it gets another page size")
        try:
            yield
        finally:
            replica.let_readers_in()

    def commit(
        self, database: Database, header: Header, trailer: Trailer, temporary: str,
        pages: Iterable[tuple[int, bytes]], pgnos: NDArray[np.uint32], sums: NDArray[np.uint64], started_s: float,
        live: SharedWal | None = None,
    ) -> Position:  # fmt: skip
        """A checked transaction whose file is `temporary`: into the log, into the database, move the position.
        `live`: has its pages already, in a transaction that is to be finished."""
        self._refuse(database)
        file_before = _inode(database.files.database)
        database.unclean()
        entry = database.log.publish(temporary, header, trailer.post_apply_checksum)
        try:
            if live is not None and live is database.replica:
                live.finish(header.commit)
                self._later(database)
            elif live is not None:  # its WAL was let go of meanwhile: from the file
                self._write(database, header, entry, Reader(entry.chunks()))
            else:
                self._write(database, header, entry, pages)
        except BaseException:
            database.log.take_back(entry, database.position)
            raise
        database.accept(header, entry, pgnos, sums, started_s)
        if _inode(database.files.database) != file_before:
            self.forget_names(database)
        database.applied_s = time.monotonic()
        self._opener.do(database.log.make_spare)
        if header.commit == 0:
            database.emit("drop", txid=header.max_txid)
        return database.position

    def _write(self, database: Database, header: Header, entry: LogEntry, pages: Iterable[tuple[int, bytes]]) -> None:
        if header.commit == 0:
            self._drop_files(database)
        elif not database.exists:
            self._create_files(database, entry)
        elif header.page_size != database.page_size:
            self._change_page_size(database, header, entry)
        else:
            replica = self.activate(database)
            replica.append(self._worker.giving_way(database.name, pages), header.commit)
            if replica.mx_frame - replica.backfill >= _CHECKPOINT_FRAMES:
                with contextlib.suppress(OSError):  # the transaction is visible: a checkpoint can be done later
                    replica.checkpoint()
            self._later(database)

    def _drop_files(self, database: Database) -> None:
        with self._locked_out(database):
            database.remove_live_files()
        self._later(database)

    def forget_names(self, database: Database) -> None:
        """A database came, went or has another file. When it counts as there, or as gone."""
        if database.exists:
            self.clear_name(database.name)
        if self.notifier is not None:
            for suffix in ("", *SUFFIXES):
                self.notifier.changed(database.name + suffix)

    def _create_files(self, database: Database, entry: LogEntry) -> None:
        """The first state of a database that is not here: written aside, then given its name."""
        with Building(database) as building:
            building.write(self._worker.giving_way(database.name, Reader(entry.chunks())), entry.header())
            building.publish(self._permissions)

    def _change_page_size(self, database: Database, header: Header, entry: LogEntry) -> None:
        """Another page size: the entry holds every page. In place where readers are locked out (`without_readers`);
        else the file is replaced, and those readers keep the old state until they open it again."""
        pages, replica = self._worker.giving_way(database.name, Reader(entry.chunks())), database.replica
        if replica is not None and replica.readers_are_out:
            replica.replace(pages, header.page_size, header.commit)
            return
        log.info("%s: its file is replaced, with another page size, beside its readers", database.name)
        with Building(database) as building:
            building.write(pages, header)
            self.replace_files(database, building)

    # -- whole states --------------------------------------------------------------------------------------------

    def install(self, database: Database, pages: Iterable[tuple[int, bytes]], page_size: int, commit: int) -> None:
        """Make `pages` (those that differ) visible as one transaction on top of what is here."""
        if not database.exists or page_size != database.page_size:
            raise FormatError(f"{database.name}: only a database of the same page size can be patched")
        self.activate(database).append(self._worker.giving_way(database.name, pages), commit)
        self._later(database)

    def replace_files(self, database: Database, building: Building) -> None:
        """Put a whole new database file in place. Raises DatabaseBusy, OSError; nothing has changed then."""
        self._refuse(database)
        building.sync()
        with self._locked_out(database):
            building.publish(self._permissions, self.notifier)
        self.forget_names(database)
        self._later(database)

    @contextlib.contextmanager
    def _locked_out(self, database: Database) -> Iterator[None]:
        """The file loses its name within (see `replaced_file`). The log has all that its WAL has. Raises DatabaseBusy,
        OSError."""
        with self._kept_from_it(database) as indexes:
            try:
                yield
                mount_guard.retire_once(indexes)  # before the lock WRITE is given up
            finally:  # also after an error: whichever file has the name by now is opened anew
                replica, database.replica = database.replica, None
                if replica is not None:
                    replica.close()

    def _kept_from_it(self, database: Database) -> contextlib.AbstractContextManager[list[int]]:
        if database.set_aside_reason is None and self.is_unused(database):  # what is set aside is opened unseen
            return contextlib.nullcontext([])
        if self.names_wait():
            raise DatabaseBusy(f"{database.name}: its file cannot be replaced while requests about names wait")
        return locked_out(database, self._opener)

    def let_go(self, database: Database) -> None:
        """Its files lose their name: the WAL is checkpointed where readers allow, and nobody goes on with it."""
        if database.replica is not None:
            with contextlib.suppress(OSError):
                database.replica.checkpoint()
            database.replica.retire()
            database.replica = None

    def remove_files(self, database: Database) -> None:
        self._refuse(database)
        self._drop_files(database)


def _inode(path: str) -> int | None:
    """Which file has this name; None if there is none."""
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return None
