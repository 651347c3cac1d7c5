"""The first and the last thing that is done to every database: recovery, and leaving it in order."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import time

from pylitefs.engine import takeover
from pylitefs.engine.database import Database
from pylitefs.engine.files import publish_file
from pylitefs.engine.incoming import give_back
from pylitefs.engine.leftovers import is_in_use, normalise, remove_wal, retire_index
from pylitefs.engine.naming import Naming
from pylitefs.engine.recovery import Circumstances, Outcome, Recovered, begin_branch, record_difference, recover
from pylitefs.engine.redo import redo_is_noted
from pylitefs.engine.registry import DEFAULT_PAGE_SIZE, Registry
from pylitefs.engine.replacement import forget_moved
from pylitefs.engine.rollback_capture import journal_in_use
from pylitefs.engine.soundness import remove_copy
from pylitefs.engine.transaction import UnstableSource
from pylitefs.errors import FormatError, LitefsError, PositionMismatch, Unavailable
from pylitefs.formats.ltx.format import CHECKSUM_FLAG, Position
from pylitefs.formats.names import is_database_name, shown
from pylitefs.ports import SUFFIXES

log = logging.getLogger("litefs.store")

_BUSY_RETRY_S = 0.5
_RELEASE_S = 2.0  # the kernel lets go of the files of a killed daemon when the mount guard has ended its mount
_RELEASE_LOOK_S = 0.02
_DISK_RETRY_S = 30.0  # at most, between two tries of what the disk refuses
_STOPPED = "stopped"
_BOOT_SIZE = 64  # bytes of DATA/boot at most


class Startup:
    """Recovery of all databases. `started_unclean`: the node was not stopped in order, or some of them were not left
    in order."""

    def __init__(self, registry: Registry, naming: Naming) -> None:
        self._registry, self._naming = registry, naming
        self._unsettled: dict[str, Recovered] = {}  # what was found where the files are the truth, until `settle`
        self._unknown: dict[str, tuple[Recovered, Position]] = {}  # replica: at no position of its log, and where
        self._put_off: dict[str, tuple[int, float]] = {}  # the disk refused: (how often, when to try again)
        self.started_unclean = False
        self._same_boot = False
        self._boot = ""
        self._noted_boot = False

    def is_open(self, name: str) -> bool:
        """Whether it is not settled yet what the start has found of this database."""
        return name in self._unsettled or name in self._unknown or name in self._put_off

    def _prepare(self) -> list[str]:
        """Make the folders, read what the last run left; returns the names of the databases that are there."""
        registry = self._registry
        for folder in (registry.databases_dir, registry.plain_dir):
            os.makedirs(folder, exist_ok=True)
        registry.read_cluster_id()
        registry.read_epoch()
        registry.read_tombstones()
        registry.marker.load()
        for leftover in os.scandir(registry.data_dir):
            if leftover.name.endswith(".tmp"):
                os.unlink(leftover.path)
        self._read_boot()
        self._naming.finish_promotions()
        return sorted(item.name for item in os.scandir(registry.databases_dir) if item.is_dir())

    def load(self) -> None:
        """Recover every database (see `recovery`). Nothing is mounted yet. One that cannot be read is set aside."""
        names = self._prepare()
        released_by_s = time.monotonic() + (_RELEASE_S if self.started_unclean else 0.0)
        for name in names:
            if is_database_name(name):
                database = self._registry.get_or_create(name)
                remove_copy(database.files.folder)
                while is_in_use(database.files) and time.monotonic() < released_by_s:
                    time.sleep(_RELEASE_LOOK_S)
                self._load_one(database)
            else:
                folder = os.path.join(self._registry.databases_dir, name)
                log.warning("%s: not a name for a database, left alone", shown(folder))

    def _load_one(self, database: Database) -> bool:
        """True unless it has to be tried again: an old process still holds its files, or the disk fails."""
        is_truth = self._registry.is_primary or self._registry.marker.covers(database.name)
        if not self._registry.is_primary:
            database.term = self._registry.marker.epoch  # of what is recorded now, if anything
        start = Circumstances([self._registry.plain_dir], self._same_boot, is_truth)
        try:
            found = recover(database, start)
        except FormatError as error:
            self._set_aside(database, error)
            return True
        except OSError as error:
            self._try_later(database, error)
            return False
        for path in found.dropped:
            database.emit("corruptLog", path=path)
        if found.outcome is Outcome.BUSY:
            if not database.is_busy:
                who = holders(os.path.join(self._registry.options.mount_dir, database.name))
                database.emit("busyAfterCrash", reason=f"held open through a mount whose litefs died: restart {who}")
            self._keep_away(database, "still open in a process of an earlier mount")
            if self._registry.options.role_from_marker:  # another node may be the primary by now
                retire_index(database.files)
            return False
        if found.outcome not in (Outcome.CLEAN, Outcome.EMPTY):
            self.started_unclean = True
            database.emit("recovered", outcome=found.outcome.value, txid=database.position.txid)
        database.release_if_gone()
        if is_truth:
            self._unsettled[database.name] = found
        else:
            remove_wal(database.files)
            forget_moved(database.files)  # the primary says whether it is there
            if self._registry.options.role_from_marker and found.outcome is Outcome.DIFFERS:
                self._unknown[database.name] = found, database.position
        return True

    def _set_aside(self, database: Database, error: LitefsError) -> None:
        """It is served as it is, read-only. What it holds is at no position of the log, whatever that says."""
        database.position = Position(database.log.head.txid, CHECKSUM_FLAG)
        database.page_size, database.commit = database.page_size or DEFAULT_PAGE_SIZE, max(1, database.commit)
        database.set_aside_reason = str(error)
        log.error("%s: set aside, read-only: %s", database.name, error)
        database.emit("setAside", reason=str(error))

    def _keep_away(self, database: Database, reason: str) -> None:
        """Nobody may use it before it was recovered: without its WAL it would miss rows that were committed."""
        database.page_size, database.commit = DEFAULT_PAGE_SIZE, 1  # it exists, and may not be created anew
        database.is_busy = True
        database.set_aside_reason = reason

    def _try_later(self, database: Database, error: OSError) -> None:
        """The disk is full, or fails: nothing is wrong with the database."""
        times, _ = self._put_off.get(database.name, (0, 0.0))
        self._put_off[database.name] = (times + 1, time.monotonic() + min(_DISK_RETRY_S, _BUSY_RETRY_S * 2**times))
        if not times:
            log.error("%s: cannot be recovered now, will be tried again: %s", database.name, error)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                database.emit("diskFull", error=str(error))
            else:
                database.emit("setAside", reason=f"it will be tried again: {error}")
        self._unsettled.pop(database.name, None)
        database.position = database.log.head
        self._keep_away(database, f"cannot be recovered now: {error}")

    def retry_busy(self) -> None:
        """Databases that an old process held, or the disk refused: recover them once that is over. On the worker; from
        now on, because the disk may refuse later too."""
        self._registry.worker.call_later(_BUSY_RETRY_S, self.retry_busy)
        self.look_again()

    def look_again(self, *, at_once: bool = False) -> None:
        """Those that are due, or all `at_once`. The reason why one is set aside stands until its recovery has ended:
        whoever looked earlier would take what is there by then for the whole database."""
        for database in list(self._registry.databases.values()):
            if not database.is_busy:
                continue
            if self._put_off.get(database.name, (0, 0.0))[1] > time.monotonic() and not at_once:
                continue
            reason = database.set_aside_reason
            if self._load_one(database) and self._settle_one(database):
                self._put_off.pop(database.name, None)
                if database.set_aside_reason is reason:  # else it cannot be read, as is known by now
                    database.set_aside_reason = None
                database.is_busy = False
                takeover.wake(self._registry, database)
                if self._registry.notifier is not None:
                    for suffix in ("", *SUFFIXES):
                        self._registry.notifier.changed(database.name + suffix)
                database.emit("recovered", outcome="released", txid=database.position.txid)

    def settle_promoted(self) -> None:
        """A replica becomes the primary: what the files hold is recorded also where nobody has told what is missing."""
        for name, (found, position) in self._unknown.items():
            database = self._registry.databases.get(name)
            if database is not None and database.position == position != database.log.head:
                self._unsettled[name] = found
        self._unknown.clear()
        self.settle()

    def settle(self) -> None:
        """Nobody gives anything back any more: what the files hold is recorded as it is, where they are the truth."""
        for name in list(self._unsettled):
            self._settle_one(self._registry.databases[name])

    def _settle_one(self, database: Database) -> bool:
        """False if the disk refuses, and it will be tried again."""
        found = self._unsettled.pop(database.name, None)
        if found is None:
            return True
        try:
            if self._naming.finish_move(database):
                return True
            if found.outcome is Outcome.WITHHELD:
                self._registry.capture.commit_point(database)
            elif not found.not_ahead and found.outcome is not Outcome.CLEAN:
                database.log.agreed.recorded_after = database.log.head.txid
                if found.outcome is Outcome.VERIFIED:
                    begin_branch(database)
                elif os.path.exists(database.files.database):
                    record_difference(database, found.previous)
                else:
                    raise Unavailable(_missing(database))
                database.note_files()
            if self._registry.mount_dir is None or database.is_busy:  # nobody can open it
                remove_wal(database.files)
        except OSError as error:
            self._try_later(database, error)
            return False
        except LitefsError as error:
            self._set_aside(database, error)
        return True

    def give_back(self, name: str, data: bytes | str) -> Position:
        """Primary, before it takes writes: a transaction it had lost (an LTX file, or the path of one). A database that
        is not here at all begins with its first one."""
        is_new = self._registry.get(name) is None
        database = self._registry.get_or_create(name)
        try:
            if database.set_aside_reason is not None:
                raise Unavailable(f"{name}: {database.set_aside_reason}")
            return self._give_back(database, data)
        finally:
            if is_new and not database.exists:
                self._registry.forget(database)

    def _give_back(self, database: Database, data: bytes | str) -> Position:
        path = database.log.temporary(follows=False)
        if isinstance(data, bytes):
            with open(path, "wb") as file:
                file.write(data)
        else:
            shutil.copyfile(data, path)
        found = self._unsettled.get(database.name) or Recovered(
            Outcome.EMPTY, [], not_ahead=not database.exists
        )
        try:
            position = give_back(database, path, found)
        except OSError as error:
            if redo_is_noted(database):  # it was begun: the next recovery does the rest
                self._try_later(database, error)
            raise
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        self._unsettled[database.name] = found
        self._registry.set_owner(database.files.database)
        database.note_files()
        remove_wal(database.files)
        return position

    def adopt_txid(self, name: str, position: Position) -> Position:
        """Primary, before it takes writes: a replica has exactly this content at a higher TXID; take that over."""
        database = self._registry.find(name)
        if database.position.checksum != position.checksum or database.log.head.txid >= position.txid:
            raise PositionMismatch(f"{name}: {position} is not the state here, {database.position}")
        found = self._unsettled.get(name)
        if found is not None and found.outcome is Outcome.DIFFERS and not found.not_ahead:
            before, database.term = database.term, position.epoch  # it is what was committed then
            try:
                record_difference(database, found.previous, position.txid)
            finally:
                database.term = before
            found.outcome = Outcome.VERIFIED  # but not proven to have seen nothing more
        return database.position

    def _read_boot(self) -> None:
        """Find out how this node last ran. If it was not stopped in order and the machine was restarted since, unsynced
        writes may be lost, and with them whole databases, of which nothing here could tell."""
        with open("/proc/sys/kernel/random/boot_id") as file:
            self._boot = file.read().strip()
        with contextlib.suppress(FileNotFoundError), open(self._boot_path) as file:
            boot, _, state = file.read(_BOOT_SIZE).strip().partition(" ")
            self._same_boot = boot == self._boot
            self.started_unclean = state != _STOPPED

    @property
    def _boot_path(self) -> str:
        return os.path.join(self._registry.data_dir, "boot")

    def note_boot(self) -> None:
        """All databases are recovered: from now on only what this boot writes counts."""
        self._write_boot(self._boot)
        self._same_boot = self._noted_boot = True

    def note_stop(self) -> None:
        """The node stops in order, and everything is on the disk. Not if it had not come to `note_boot`."""
        if self._noted_boot:
            self._write_boot(f"{self._boot} {_STOPPED}")

    def _write_boot(self, text: str) -> None:
        """On a full disk in the old one's place (one sector), or not at all: then the next start takes nothing for
        granted."""
        try:
            publish_file(self._boot_path, f"{text}\n".encode())
        except OSError:
            try:
                with open(self._boot_path, "r+b", buffering=0) as file:
                    file.write(text.encode().ljust(_BOOT_SIZE - 1) + b"\n")
                    os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(self._boot_path)

    def leave_in_order(self, database: Database) -> bool:
        """Nothing is mounted any more. Capture what is not in the log yet, from the files themselves (an application
        that was cut off may have committed to the WAL without telling the wal-index), and leave one plain file. True
        if the log and the file are now the same state for certain. What was found at the start and not settled stays
        as it is."""
        files = database.files
        if database.is_busy or database.set_aside_reason is not None or database.name in self._unsettled:
            return False
        if database.is_damaged and not self._registry.is_primary:
            return False  # the next start reads all pages, and the primary sends those that differ
        database.release_files()
        if is_in_use(files):
            return False
        if database.captures:
            if database.rollback.pending and not journal_in_use(files.journal):
                self._registry.capture.commit_point(database)
            try:
                self._registry.capture.flush(database)  # with the wal-index, which tells whether anything was missed
                database.release_files()
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(files.shm)
                self._registry.capture.flush(database)
            except UnstableSource:
                return False
            database.release_files()
            normalise(files, [self._registry.plain_dir])
            remove_wal(files)
            if database.wal.in_doubt or database.rollback.pending:
                return False
        return database.failing is None and not os.path.exists(files.wal) and not journal_in_use(files.journal)


def _missing(database: Database) -> str:
    """The file is gone and the log does not hold all of it. That is no reason to remove the replicas' copies too."""
    files = database.files
    return (
        f"its file {files.database} is missing: stop litefs, put a copy there (litefs export, on a replica) and start "
        f"again; or remove {files.folder} if it is to go"
    )


def holders(path: str) -> str:
    """Processes that have a database of the mount open, for a person: "PID (COMMAND), …"."""
    names, found = {path}, []
    alone = "/" + os.path.basename(path)  # so the kernel calls it when its mount was taken away
    if not os.path.exists(alone):
        names.add(alone)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if int(pid) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            links = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
            if any(name + suffix in links for name in names for suffix in ("", "-wal", "-shm")):
                with open(f"/proc/{pid}/comm") as file:
                    found.append(f"{pid} ({file.read().strip()})")
    return ", ".join(found) or "the programs that use it"
