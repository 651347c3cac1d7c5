"""The first and the last thing that is done to every database: recovery, and leaving it in order."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil

from pylitefs.engine.database import Database
from pylitefs.engine.files import SUFFIX_OF, publish_file
from pylitefs.engine.incoming import give_back
from pylitefs.engine.leftovers import is_held_elsewhere, normalise, remove_wal
from pylitefs.engine.naming import Naming
from pylitefs.engine.recovery import (
    Outcome,
    Recovered,
    record_difference,
    recover,
)
from pylitefs.engine.registry import DEFAULT_PAGE_SIZE, Registry
from pylitefs.engine.rollback_capture import journal_in_use
from pylitefs.errors import FormatError, LitefsError, PositionMismatch
from pylitefs.formats.ltx.format import Position
from pylitefs.ports import FileKind

log = logging.getLogger("litefs.store")

_BUSY_RETRY_S = 0.5


class Startup:
    """Recovery of all databases. `started_unclean`: some were not left in order."""

    def __init__(self, registry: Registry, naming: Naming) -> None:
        self._registry, self._naming = registry, naming
        self._unsettled: dict[str, Recovered] = {}
        self.started_unclean = False
        self._same_boot = False
        self._boot = ""

    def _prepare(self) -> list[str]:
        """Make the folders, read what the last run left; returns the names of the databases that are there."""
        registry = self._registry
        for folder in (registry.databases_dir, registry.plain_dir):
            os.makedirs(folder, exist_ok=True)
        registry.read_cluster_id()
        for leftover in os.scandir(registry.data_dir):
            if leftover.name.endswith(".tmp"):
                os.unlink(leftover.path)
        self._read_boot()
        self._naming.finish_promotions()
        return sorted(item.name for item in os.scandir(registry.databases_dir) if item.is_dir())

    def load(self) -> None:
        """Recover every database (see `recovery`). Nothing is mounted yet. One that cannot be read is set aside."""
        for name in self._prepare():
            if self._registry.is_name(name):
                self._load_one(self._registry.get_or_create(name))
            else:
                log.warning(
                    "%s: not a name for a database, left alone", os.path.join(self._registry.databases_dir, name)
                )

    def _load_one(self, database: Database) -> bool:
        """True unless an old process still holds its files."""
        database.set_aside_reason = None
        try:
            found = recover(database, super_journal_dirs=[self._registry.plain_dir], same_boot=self._same_boot)
        except (FormatError, OSError) as error:
            database.set_aside_reason = str(error)
            database.page_size, database.commit = database.page_size or DEFAULT_PAGE_SIZE, max(1, database.commit)
            log.error("%s: set aside, read-only: %s", database.name, error)
            database.emit("setAside", reason=str(error))
            return True
        for path in found.dropped:
            database.emit("corruptLog", path=path)
        if found.outcome is Outcome.BUSY:
            database.page_size, database.commit = DEFAULT_PAGE_SIZE, 1  # it exists, and may not be created anew
            if not database.is_busy:
                database.is_busy = True
                who = holders(os.path.join(self._registry.options.mount_dir, database.name))
                database.emit("busyAfterCrash", reason=f"held open through a mount whose litefs died: restart {who}")
            database.set_aside_reason = "still open in a process of an earlier mount"
            return False
        if found.outcome not in (Outcome.CLEAN, Outcome.EMPTY):
            self.started_unclean = True
            database.emit("recovered", outcome=found.outcome.value, txid=database.position.txid)
        if found.outcome is Outcome.DIFFERS and self._registry.is_primary:
            self._unsettled[database.name] = found
        return True

    def retry_busy(self) -> None:
        """Databases that an old process held: recover them once it has let go. On the worker."""
        waiting = [database for database in self._registry.databases.values() if database.is_busy]
        for database in waiting:
            if self._load_one(database):
                self.settle()
                database.is_busy = False
                if self._registry.notifier is not None:
                    for suffix in SUFFIX_OF.values():
                        self._registry.notifier.invalidate_entry(database.name + suffix)
                database.emit("recovered", outcome="released", txid=database.position.txid)
        if any(database.is_busy for database in waiting):
            self._registry.worker.call_later(_BUSY_RETRY_S, self.retry_busy)

    def settle(self) -> None:
        """Primary: nobody gives anything back any more; what the files hold is recorded as it is."""
        for name, found in self._unsettled.items():
            database = self._registry.databases[name]
            try:
                if os.path.exists(database.files.database):
                    record_difference(database, found.previous)
                else:
                    self._record_missing(database)
                remove_wal(database.files)
            except (LitefsError, OSError) as error:
                database.set_aside_reason = str(error)
                database.emit("setAside", reason=str(error))
        self._unsettled.clear()

    def _record_missing(self, database: Database) -> None:
        """The file is gone, and the log does not hold all of it: it was removed."""
        database.position, database.commit = database.log.head, 0
        self._naming.record_drop(database)
        database.emit("lost", reason="the database file was missing at the start", folder=database.files.ltx)

    def give_back(self, name: str, data: bytes | str) -> Position:
        """Primary, before it takes writes: a transaction it had lost (an LTX file, or the path of one)."""
        database = self._registry.find(name)
        path = database.log.temporary()
        if isinstance(data, bytes):
            with open(path, "wb") as file:
                file.write(data)
        else:
            shutil.copyfile(data, path)
        try:
            found = self._unsettled.get(name)
            position = give_back(database, path, found.wal_end if found is not None else None)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        self._unsettled.pop(name, None)
        remove_wal(database.files)
        return position

    def adopt_txid(self, name: str, position: Position) -> Position:
        """Primary, before it takes writes: a replica has exactly this content at a higher TXID; take that over."""
        database = self._registry.find(name)
        if database.position.checksum != position.checksum or database.log.head.txid >= position.txid:
            raise PositionMismatch(f"{name}: {position} is not the state here, {database.position}")
        if name in self._unsettled:
            record_difference(database, self._unsettled.pop(name).previous, position.txid)
        return database.position

    def _read_boot(self) -> None:
        """Find out whether the machine was restarted since this node last ran (then unsynced writes may be lost)."""
        with open("/proc/sys/kernel/random/boot_id") as file:
            self._boot = file.read().strip()
        with contextlib.suppress(FileNotFoundError), open(os.path.join(self._registry.data_dir, "boot")) as file:
            self._same_boot = file.read(64).strip() == self._boot

    def note_boot(self) -> None:
        """All databases are recovered: from now on only what this boot writes counts."""
        if not self._same_boot:
            publish_file(os.path.join(self._registry.data_dir, "boot"), f"{self._boot}\n".encode())
            self._same_boot = True

    def leave_in_order(self, database: Database) -> bool:
        """Nothing is mounted any more. Capture what is not in the log yet, from the files themselves (an application
        that was cut off may have committed to the WAL without telling the wal-index), and leave one plain file. True
        if the log and the file are now the same state for certain."""
        files = database.files
        if database.is_busy or database.set_aside_reason is not None:
            return False
        if any(is_held_elsewhere(files.backing(kind)) for kind in (FileKind.DATABASE, FileKind.WAL, FileKind.SHM)):
            return False
        self._registry.capture.forget_files(database)
        if self._registry.is_primary:
            if database.rollback.pending and not journal_in_use(files.journal):
                self._registry.capture.commit_point(database)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(files.shm)
            self._registry.capture.flush(database)
            normalise(files, [self._registry.plain_dir])
            remove_wal(files)
        return database.failing is None and not os.path.exists(files.wal) and not journal_in_use(files.journal)


def holders(path: str) -> str:
    """Processes that have a database of the mount open, for a person: "PID (COMMAND), …"."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if int(pid) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            links = (os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd"))
            if any(link.removesuffix("-wal").removesuffix("-shm") == path for link in links):
                with open(f"/proc/{pid}/comm") as file:
                    found.append(f"{pid} ({file.read().strip()})")
    return ", ".join(found) or "the programs that use it"
