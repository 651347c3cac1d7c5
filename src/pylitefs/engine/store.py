"""The engine of one node as the others see it: databases by name, mounted or not, from start to stop."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial

from pylitefs.engine import damage, takeover
from pylitefs.engine.database import Database
from pylitefs.engine.files import sync_filesystem
from pylitefs.engine.forgetting import Forgetting
from pylitefs.engine.inotify import DirectoryWatch
from pylitefs.engine.naming import Naming
from pylitefs.engine.plain_imports import PlainImports
from pylitefs.engine.registry import Registry, StoreOptions
from pylitefs.engine.roles import Roles
from pylitefs.engine.scrubber import Scrubber
from pylitefs.engine.stand_in import StandIns
from pylitefs.engine.startup import Startup
from pylitefs.engine.transaction import UnstableSource
from pylitefs.engine.unreadable import Unreadable
from pylitefs.engine.verifier import Verifier
from pylitefs.engine.watchdog import Watchdog
from pylitefs.errors import LitefsError, Unavailable
from pylitefs.events import Event, EventBus
from pylitefs.formats.ltx.format import HEADER_SIZE, Header, Position
from pylitefs.ports import Notifier

log = logging.getLogger("litefs.store")

_CHUNK_BYTES = 1 << 20
_RETRY_S = 1.0
_WATCH_PAUSE_S = 0.001
_ANY = "/"  # no database's name: what is done for it need not wait for the end of another's long job


class Store(Registry):
    """All databases of this node. `naming`: what becomes of names."""

    def __init__(self, data_dir: str, events: EventBus, options: StoreOptions) -> None:
        super().__init__(data_dir, events, options)
        self.naming = Naming(self)
        self.plain_imports = PlainImports(self, self.naming)
        self.capture.emptied = self.naming.emptied
        self.apply.clear_name = self.naming.clear_name
        self._startup = Startup(self, self.naming)
        self.forgetting = Forgetting(self, self._startup.is_open)
        self.is_closing = False  # see `close_doors`
        self.primary_hostname: str | None = None
        self.lag_ms: int | None = None
        self._scrubber: Scrubber | None = None
        self._watch: DirectoryWatch | None = None
        self.stand_ins = StandIns(self.worker)
        self.unreadable = Unreadable(self)
        self.roles = Roles(self, settle=self._startup.settle_promoted, watch=self._watch_or_not, told=self._told_role)
        self.promote, self.demote = self.roles.promote, self.roles.demote
        self.promote_database, self.demote_database = self.roles.promote_database, self.roles.demote_database
        self.pause_writes, self.resume_writes = self.roles.pause_writes, self.roles.resume_writes

    def load(self) -> None:
        """Recover every database (see `recovery`). Nothing is mounted yet. One that cannot be read is set aside."""
        self._startup.load()

    @property
    def started_unclean(self) -> bool:
        return self._startup.started_unclean

    def settle(self) -> None:
        """Nobody gives anything back any more: what the files hold is recorded as it is, on a primary, and for what
        this node wrote when it last was one. On the worker."""
        self._startup.settle()
        if not self.is_primary:
            if self.worker.is_current:  # which must not wait for a change of role
                self.roles.go_on_later()
            else:
                self.roles.unmark()

    def apply_as_primary(self, name: str, data: bytes | str) -> Position:
        """A transaction of somebody else (an LTX file, or the path of one) for a database that was demoted here. On the
        worker. FormatError, PositionMismatch change nothing; DatabaseBusy, OSError: to be tried again."""
        database = self.known(name)
        if isinstance(data, bytes):
            return database.apply(data)
        with open(data, "rb") as file:
            header = Header.unpack(file.read(HEADER_SIZE))
            incoming = database.receive(header.min_txid, header.max_txid)
            file.seek(0)
            try:
                while chunk := file.read(_CHUNK_BYTES):
                    incoming.write(chunk)
                return incoming.finish()
            finally:
                incoming.abort()

    def find_damage(self, name: str) -> list[int]:
        """Read a whole database; its pages that are not what they should be. Blocking, not for the worker."""
        return damage.find_damage(self.find(name))

    def sound_pages(self, name: str, pgnos: Sequence[int]) -> list[tuple[int, bytes]]:
        """Those of these pages that are here as they should be. Blocking, not for the worker."""
        database = self.get(name)
        return damage.sound_pages(database, pgnos) if database is not None else []

    def logged_pages(self, name: str, pgnos: Sequence[int]) -> list[tuple[int, bytes]]:
        """Those of these pages that the log has as they should be. Blocking."""
        return damage.logged_pages(self.find(name), pgnos)

    def mend(self, name: str, pages: list[tuple[int, bytes]]) -> int:
        """Put right pages in the place of damaged ones, while nobody has the file open. On the worker."""
        if not (self.is_primary and self.fence.holds()):
            raise Unavailable("this node is not the primary any more")
        written = damage.mend(self.find(name), pages)
        if self.notifier is not None:
            self.notifier.invalidate_file(name)
        return written

    def note_boot(self) -> None:
        """All databases are recovered: from now on only what this boot writes counts."""
        self._startup.note_boot()

    def give_back(self, name: str, data: bytes | str) -> Position:
        """Primary, before it takes writes: a transaction it had lost (an LTX file, or the path of one)."""
        return self._startup.give_back(name, data)

    def adopt_txid(self, name: str, position: Position) -> Position:
        """Primary, before it takes writes: a replica has exactly this content at a higher TXID; take that over."""
        return self._startup.adopt_txid(name, position)

    def import_plain(self, name: str, *, leave_journal: bool = False) -> bool:
        """A plain file of this name is a whole database: take it over as one. Any thread. False if it is not one."""
        return self.naming.import_plain(name, leave_journal=leave_journal)

    def set_aside(self, name: str, reason: str) -> None:
        """Keep a database that the primary does not know out of the way. On the worker."""
        self.naming.set_aside(name, reason)

    def mounted(self, mount_dir: str, passthrough: bool, notifier: Notifier) -> None:
        """From now on applications see the files under `mount_dir`. On the worker, before any request is answered: who
        is served first must meet the locks that are taken there."""
        self.mount_dir, self.passthrough, self.notifier = mount_dir, passthrough, notifier
        self.apply.notifier = notifier
        with self.lock:
            for database in self.databases.values():
                database.set_files(self.files_of(database.name))

    def serving(self) -> None:
        """Requests are answered. On the worker."""
        self._watch_or_not()

    def _watch_or_not(self) -> None:
        """Hear of what applications write, as long as there is something for them to write. On the worker."""
        wanted = self.mount_dir is not None and self.captures_any
        if wanted and self._watch is None:
            assert self.mount_dir is not None
            self._watch = DirectoryWatch(self.mount_dir)
            self.worker.watch(self._watch.fd, self._written, in_long_jobs=True)
            self._look_at_all()  # what was written before has woken nobody
        elif not wanted and self._watch is not None:
            self.worker.unwatch(self._watch.fd)
            self._watch.close()
            self._watch = None

    def _told_role(self) -> None:
        """The node's role has changed. What the mount shows of it changes too."""
        self.primary_hostname, self.lag_ms = None, None
        self.events.emit(Event("primaryChange", None, {"is_primary": self.is_primary, "hostname": None}))
        if self.notifier is not None:
            self.notifier.changed(".primary")
            for name in self.names():
                self.notifier.changed(name)

    def _written(self) -> None:
        """Files of the mount were written to: look at them."""
        if self._watch is None:
            return
        pauses = self._hear()
        # A busy writer would wake us for every write: look away for a moment, events are kept meanwhile.
        self.worker.unwatch(self._watch.fd)
        pause_s = max(_WATCH_PAUSE_S, min(pauses, default=0.0))
        self.worker.call_later(pause_s, self._watch_again, self._watch, database=_ANY)

    def _hear(self) -> list[float]:
        """Look at what was written to, as far as the kernel has told of it; how long that may take for each WAL."""
        names = self._watch.read() if self._watch is not None else set()
        if names is None:
            self._look_at_all()
        return [pause_s for name in names or () if (pause_s := self._look_at(name)) is not None]

    def _look_at_all(self) -> None:
        """Events were lost, or nobody listened: look at every file, plain ones too."""
        try:
            takeover.wake_all(self)
            for name in os.listdir(self.plain_dir):
                self._look_at(name)
        except Exception:
            log.exception("what was written could not be looked at, it will be tried again")
            self.worker.call_later(_RETRY_S, self._look_at_all)

    def _look_at(self, name: str) -> float | None:
        """A file of the mount was written to. Of a WAL: how long it may take until it is looked at, in seconds. What
        goes wrong here is tried again, and keeps nobody from looking at the other files."""
        try:
            return self._look_at_file(name)
        except Exception:
            log.exception("%s: it could not be looked at, it will be tried again", name)
            self.worker.call_later(_RETRY_S, self._look_at, name)
            return None

    def _look_at_file(self, name: str) -> float | None:
        if name.endswith("-wal"):
            database = self.databases.get(name[:-4])
            if database is not None and database.exists and database.captures:
                return self.capture.wake(database)
            return None
        base = name.removesuffix("-journal")
        database = self.databases.get(base)
        if database is not None and database.captures and self.capture.has_unseen_writes(database):
            self.capture.wake_rollback(database)
        elif (database is None or not database.exists) and self.is_primary:
            if self.is_plain_database(base):
                self.plain_imports.wake(base)
            else:
                self.unreadable.look(base)
        return None

    def _watch_again(self, watch: DirectoryWatch) -> None:
        if self._watch is watch:
            self.worker.watch(self._watch.fd, self._written, in_long_jobs=True)

    def unmounted(self) -> None:
        """Applications see the files no more. On the worker."""
        unsure = [database for database in list(self.databases.values()) if not self._is_captured(database)]
        self.mount_dir, self.notifier, self.apply.notifier = None, None, None
        self._watch_or_not()
        with self.lock:
            for database in self.databases.values():
                database.set_files(self.files_of(database.name))
                if database.captures and not self.passthrough and not database.is_busy:
                    with contextlib.suppress(FileNotFoundError):  # its pages may be older: the frames tell
                        os.unlink(database.files.shm)
            for database in unsure:
                with database.wal.mutex:
                    database.wal.doubt()

    def _is_captured(self, database: Database) -> bool:
        """Take what is committed, and notice what was missed, while it is known how far the capture had come."""
        if database.captures and self.passthrough:  # else only the mount has shown what the wal-index says
            try:
                self.capture.flush(database)
            except (OSError, UnstableSource):
                return False
        return True

    def flush(self, database: Database) -> Future[Position]:
        """The position after everything that was committed before the call."""
        return database.flush()

    def flush_all(self) -> Future[dict[str, Position]]:
        """The positions of all databases, each a barrier. One whose log cannot be written keeps the position it has."""
        databases = [database for name in self.all_names() if (database := self.get(name)) is not None]
        result: Future[dict[str, Position]] = Future()
        result.set_running_or_notify_cancel()  # who waited for it may give up: it is answered all the same
        found: dict[str, Position] = {}
        lock = threading.Lock()

        def done(name: str, position: Future[Position]) -> None:
            database = self.databases.get(name)
            with lock:
                failed = position.cancelled() or position.exception() is not None
                found[name] = (database.position if database else Position(0, 0)) if failed else position.result()
                if len(found) == len(databases):
                    result.set_result(dict(found))

        if not databases:
            result.set_result({})
        for database in databases:
            self.flush(database).add_done_callback(partial(done, database.name))
        return result

    def set_primary_info(self, hostname: str | None) -> None:
        changed = hostname != self.primary_hostname
        self.primary_hostname = hostname
        if changed:
            self.events.emit(Event("primaryChange", None, {"is_primary": self.is_primary, "hostname": hostname}))
            if self.notifier is not None:
                self.notifier.changed(".primary")

    def set_lag_ms(self, lag_ms: int | None) -> None:
        self.lag_ms = lag_ms

    def start_upkeep(self) -> None:
        """Begin what is done now and then: retention, and waiting for files that old processes hold."""
        if self.options.retention_interval_s > 0:
            self.worker.post(self.worker.call_later, self.options.retention_interval_s, self._retain)
        self.worker.post(self._startup.retry_busy)
        Watchdog(self, self._hear).start()
        if self.options.strict_verify:
            Verifier(self).start()
        if self.options.scrub_interval_s > 0:
            self._scrubber = Scrubber(self, self.options.scrub_interval_s, self.options.scrub_rate)
            self._scrubber.start()

    def _retain(self) -> None:
        self.worker.call_later(self.options.retention_interval_s, self._retain)
        for database in list(self.databases.values()):
            with contextlib.suppress(OSError):
                database.log.retain(max(0.0, self.options.retention_s), self.options.max_log_size_bytes)
        try:
            self.forgetting.forget_old()
        except OSError as error:
            log.warning("dropped databases cannot be forgotten now: %s", error)

    def start(self) -> None:
        """Start the worker and its helper."""
        self.worker.start()
        self.opener.start()
        self.forgetting.start()

    def close_doors(self) -> None:
        """Before unmounting: no application is let into a database any more (EBUSY). Any thread."""
        self.is_closing = True
        self.capture.end_soon()

    def rest_all(self) -> None:
        """Replica, before unmounting, with the doors closed: leave every database as one file where nobody uses it, and
        as it is otherwise. On the worker."""
        self.apply.stop(list(self.databases.values()), may_rest=not self.captures_any)

    def close(self, *, clean: bool) -> None:
        """Stop the worker and release all databases. `clean`: nobody can write to them any more."""
        if self._scrubber is not None:
            self._scrubber.stop()
        self.roles.stop()
        self.worker.stop()
        self.forgetting.stop()
        self.opener.stop()
        orderly = {}
        for database in self.databases.values():
            with contextlib.suppress(OSError, LitefsError):
                orderly[database.name] = clean and self._startup.leave_in_order(database)
        with contextlib.suppress(OSError):
            self.keep_tombstones()
        sync_filesystem(self.data_dir)  # a table that says "clean" must not outlive what it describes
        for database in self.databases.values():
            with contextlib.suppress(OSError):
                database.close(clean=orderly.get(database.name, False))
        if clean:
            with contextlib.suppress(OSError):
                self._startup.note_stop()
                if all(orderly.get(database.name) for database in self.databases.values() if database.exists):
                    self.marker.write(self.epoch, ())


__all__ = ["Store", "StoreOptions"]
