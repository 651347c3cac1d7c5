"""Who writes a database changes while applications have it open: they do (*captures*), or the daemon does (*applies*).

apply -> capture (`promote`), on the worker. If nobody has it open it is checkpointed, and one plain file. Else -wal and
-shm stay as they are, the capture begins right behind what is published, and the daemon gives up its locks.

capture -> apply (`demote`). From the first moment on nothing is committed any more (`Fence`, `Database.yields`). Then a
`Grip` keeps writers out, taken by the calling thread, because that may resolve names of the mount; the worker captures
what there is; and the daemon goes on with the same -wal and -shm. Who is in the middle of a transaction, or has the
database for itself (`locking_mode=EXCLUSIVE`), keeps it from happening: it is tried again in the background, and until
it is done nothing is applied to that database (EBUSY). What lasts is told (`refusals`). Once a grip holds everything
nothing may: the files are the truth then, and are compared where they do not fit what is known of them.

The steps of one database, and what a crash after each leaves (`marker` covers it from before the first to the last):
    writers kept out        the files of a database in use: the next start records what the log lacks
    captured                the log has everything
    adopted                 a WAL of whole transactions, as any replica's
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from pylitefs.engine import takeover
from pylitefs.engine.continuation import guarded
from pylitefs.engine.database import Database
from pylitefs.engine.fence import Fence
from pylitefs.engine.grip import SPIN_S, Grip, patiently
from pylitefs.engine.loan import epoch_of_loans
from pylitefs.engine.off_worker import OffWorkerLock
from pylitefs.engine.pause import Pause
from pylitefs.engine.refusals import Refusals
from pylitefs.engine.registry import Registry
from pylitefs.engine.transaction import UnstableSource
from pylitefs.errors import LitefsError
from pylitefs.ports import Then

log = logging.getLogger("litefs.role")
T = TypeVar("T")

_AGAIN_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


class Roles:
    """One change at a time. Methods block, and are called from a thread that is neither the worker nor a FUSE thread,
    unless they say otherwise."""

    def __init__(
        self, registry: Registry, *, settle: Callable[[], object], watch: Callable[[], None], told: Callable[[], None]
    ) -> None:
        """`settle`: record what the start has found. `watch`: hear of what is written, or stop to, as the role is now.
        Both on the worker. `told`: the node's role has changed, any thread."""
        self._registry = registry
        self._settle, self._watch, self._told = settle, watch, told
        self._one = OffWorkerLock(registry.worker)
        self._grips: dict[str, Grip] = {}
        self._wanted: set[str] = set()  # whose capture is to end
        self._refusals = Refusals()
        self._retrying = False
        self._stopped = threading.Event()
        self.pause = Pause()

    def _on_worker(self, call: Callable[..., T], *args: object, database: str = "") -> T:
        return self._registry.worker.submit(call, *args, database=database).result()

    # -- opens (FUSE threads) ------------------------------------------------------------------------------------

    def let_in(self, database: Database, *, writing: bool, then: Then, again: Callable[[], object] | None) -> None:
        """An application opens a database that captures, or for writing one that does not. `again`: ask once more, when
        a pause has ended; None: it need not wait for that."""
        with database.handles_lock:
            if again is not None and writing and database.captures and self.pause.hold(again):
                return
            refused = writing and not database.may_commit and not self.is_lent(database)
            gone = again is not None and not refused and not database.captures  # since it was asked whether it does
            if not refused and not gone:
                database.opening += 1
        if gone and again is not None:
            again()
            return
        if refused:
            then(OSError(errno.EROFS, os.strerror(errno.EROFS)))
            return
        try:
            then(None)
        finally:
            with database.handles_lock:
                database.opening -= 1

    def is_lent(self, database: Database) -> bool:
        """Whether this is the primary, and another node writes the database (HALT lock) or is about to: it may be
        opened for writing, which is SQLITE_BUSY for the time being, because the daemon holds the locks."""
        registry = self._registry
        return registry.is_primary and registry.fence.holds() and (database.yields or not database.captures)

    # -- apply -> capture ----------------------------------------------------------------------------------------

    def promote(self, epoch: int) -> None:
        """All databases: this node is the primary. Raises OSError; nothing has changed then."""
        with self._one:
            registry = self._registry
            registry.note_epoch(epoch)
            takeover.sync_applied(registry, *list(registry.databases.values()))
            registry.marker.write(epoch, None)
            registry.epoch = epoch
            self._wanted.clear()
            self._refusals.clear()
            self._drop_grips()
            self._on_worker(self._promote_all)
            while not self._on_worker(self._hand_over_all):
                time.sleep(SPIN_S)
            self.pause.end()
            self._told()

    def _promote_all(self) -> None:
        registry = self._registry
        self._settle()
        if not registry.captures_any:  # else the worker must not resolve names of the mount
            for database in list(registry.databases.values()):
                if not takeover.in_use(database):
                    with contextlib.suppress(OSError):
                        registry.apply.rest(database)
        with registry.lock:
            registry.is_primary = True

    def _hand_over_all(self) -> bool:
        """[W] All databases together, as soon as they can be."""
        registry = self._registry
        done = [
            takeover.hand_over(registry, database, registry.fence) for database in list(registry.databases.values())
        ]
        self._watch()
        takeover.wake_all(registry)
        return all(done)

    def promote_database(self, name: str, fence: Fence | None = None) -> None:
        """One database: on the holder of its HALT lock (`fence`: until when), or on the primary that has it back.
        Raises DatabaseNotFound, OSError."""
        with self._one:
            registry, database = self._registry, self._registry.known(name)
            if fence is None and not registry.is_primary:
                return  # it had it back too late: by now all of them are taken over
            takeover.sync_applied(registry, database)
            if not registry.is_primary:
                names = {other.name for other in list(registry.databases.values()) if other.captures}
                registry.marker.write(epoch_of_loans(registry), names | {name})
            self._wanted.discard(name)
            self._refusals.clear(name)
            self._drop_grip(name)

            def work() -> bool:
                done = takeover.hand_over(registry, database, fence or registry.fence)
                self._watch()
                takeover.wake_all(registry)
                return done

            while not self._on_worker(work):  # the opener is making it active
                time.sleep(SPIN_S)
            self._told_one(name)

    # -- capture -> apply ----------------------------------------------------------------------------------------

    def demote(self, timeout_s: float) -> list[str]:
        """All databases; nothing is committed any more from the first moment on. The names of those that could not be
        taken over in time: that goes on in the background, and nothing is applied to them until then."""
        registry = self._registry
        registry.fence.until_s = 0.0
        with self._one:
            with registry.lock:
                registry.is_primary = False
                found = [database for database in registry.databases.values() if database.captures]
            for database in found:
                self._cut_off(database)
            left = self._take_over_all(timeout_s)
            self.pause.end()
            self._told()
            self.go_on_later()
            return left

    def demote_database(self, name: str, timeout_s: float) -> bool:
        """One database; False if that was not possible in time, or goes on in the background: `promote_database` then,
        or wait. On the primary nothing is urgent: the transaction that is under way may end, and be answered; on who
        ends a HALT lock it may not. Raises DatabaseNotFound."""
        with self._one:
            until_s, database = time.monotonic() + timeout_s, self._registry.known(name)
            if database.withheld is not None and self._registry.is_primary:
                return False  # nobody else has, or can be given, what is in its file

            def wanted() -> list[Database]:
                urgent = not self._registry.is_primary or not database.may_commit or self._stopped.is_set()
                return [] if urgent or not database.exists else [database]

            if database.captures:
                if self._grip_all(wanted, until_s):
                    self._drop_grip(name)
                    return False
                self._cut_off(database)
            left = self._take_over_all(until_s - time.monotonic())
            if name not in left and database.exists and self._registry.captures_any:
                with contextlib.suppress(LitefsError, OSError):
                    self._registry.apply.activate_aside(database).result()
            self._told_one(name)
            self.go_on_later()
            return name not in left

    def _cut_off(self, database: Database) -> None:
        with database.handles_lock:
            database.yields = True
        self._wanted.add(database.name)

    def _take_over_all(self, timeout_s: float) -> list[str]:
        """Try until nothing is wanted any more, or for so long; what is left."""
        until_s, pause_s = time.monotonic() + timeout_s, SPIN_S
        while True:
            for name in sorted(self._wanted):
                if self._take_over(name):
                    self._wanted.discard(name)
            if not self._wanted or time.monotonic() >= until_s or self._stopped.is_set():
                break
            time.sleep(pause_s)
            pause_s = min(0.02, 1.5 * pause_s)
        self._on_worker(self._watch)
        return sorted(self._wanted)

    def _take_over(self, name: str) -> bool:
        """One try. True when only the daemon writes it. Writers that are kept out stay so until it has come to that."""
        database = self._registry.databases.get(name)
        if database is None or not database.captures:
            self._drop_grip(name)
        if database is None or not database.captures or not (reason := self._why_not(database)):
            self._refusals.over(name)
            return True
        grip = self._grips.get(name)
        if self._refusals.note(database, reason) and grip is not None:
            grip = self._try_otherwise(database, grip)
        if grip is not None and grip.holds_writers:
            grip.unseal()  # those who only read go on
        else:
            self._drop_grip(name)
        return False

    def _why_not(self, database: Database) -> str:
        """Take it over; what is in the way, "" if it was done."""
        try:
            if not database.exists:  # it was dropped while it was held
                self._drop_grip(database.name)
            at_rest, name = takeover.yield_at_rest, database.name
            if name not in self._grips and self._on_worker(at_rest, self._registry, database, database=name):
                return ""
            return self._with_grip(database)
        except (OSError, UnstableSource, LitefsError) as error:
            return str(error) or "its files and the capture of them do not agree yet"
        except Exception as error:
            log.exception("%s: cannot be taken over now, will be tried again", database.name)
            return repr(error)

    def _with_grip(self, database: Database) -> str:
        grip, registry = self._grip_of(database), self._registry
        if not (patiently(grip.take, grip) and patiently(grip.seal, grip)):
            return grip.who_is_in_the_way()
        if not takeover.is_quiet(registry, database):
            return "somebody writes its file in place, and as it is now it is not sound"
        index = grip.open_index() if grip.is_wal and not database.files.reads_shm_directly else -1
        reason = self._on_worker(takeover.capture_rest, registry, database, grip, index, database=database.name)
        if reason and not grip.is_wal and takeover.may_give_up(registry, database):
            self._on_worker(takeover.yield_content, registry, database, database=database.name)
            self._drop_grip(database.name)
            return ""
        if reason:
            return reason
        if not grip.is_wal and not grip.make_wal():
            return "another process holds its wal-index"
        self._on_worker(takeover.go_on, registry, database, grip, database=database.name)
        del self._grips[database.name]
        return ""

    def _try_otherwise(self, database: Database, grip: Grip) -> Grip | None:
        """It lasts. Nobody is in the way of a grip that holds all, so what is known of the files is wrong: have them
        compared. A grip on files that have no name any more is one on others."""
        if grip.is_stale():
            self._drop_grip(database.name)
            return None
        if grip.is_sealed:
            self._on_worker(takeover.compare_anew, database, database=database.name)
        return grip

    def _grip_of(self, database: Database) -> Grip:
        if database.name not in self._grips:
            self._grips[database.name] = Grip(database, self._registry.plain_dir)
        return self._grips[database.name]

    def _drop_grip(self, name: str) -> None:
        grip = self._grips.pop(name, None)
        if grip is not None:
            grip.release()

    def _drop_grips(self) -> None:
        for name in list(self._grips):
            self._drop_grip(name)

    # -- in the background ---------------------------------------------------------------------------------------

    def go_on_later(self) -> None:
        """Take over what is left, then do without the marker."""
        if not self._retrying:
            self._retrying = True
            threading.Thread(target=self._go_on, name="role", daemon=True).start()

    def _go_on(self) -> None:
        step = 0
        while True:
            with self._one:
                if self._wanted and not self._stopped.is_set():
                    guarded(self._take_over_all, 0.0)
                if not self._wanted or self._stopped.is_set():
                    self._retrying = False
                    break
            if step == 0:
                self.unmark()
            self._stopped.wait(_AGAIN_S[min(step, len(_AGAIN_S) - 1)])
            step += 1
        self.unmark()

    def unmark(self) -> None:
        """Note which databases the log may be behind of, if any. Not on the primary."""
        with contextlib.suppress(OSError):
            if takeover.may_unmark(self._registry):
                with self._one:
                    if not self._registry.is_primary and not self._stopped.is_set():
                        takeover.unmark(self._registry)

    # -- a pause -------------------------------------------------------------------------------------------------

    def pause_writes(self, timeout_s: float) -> bool:
        """Keep all writers out, and capture everything. False, and all goes on, if that takes longer."""
        with self._one:
            until_s = time.monotonic() + timeout_s
            for database in takeover.captured(self._registry):
                with contextlib.suppress(OSError):
                    if takeover.in_use(database):
                        self._grip_of(database).prepare()
            self.pause.begin()
            try:
                reason = self._grip_all(lambda: takeover.captured(self._registry), until_s)
                reason = reason or takeover.capture_all(self._registry, self._grips, until_s)
            except (OSError, LitefsError, UnstableSource) as error:
                reason = str(error) or repr(error)
            if not reason:
                return True
            log.warning("writes cannot be paused: %s", reason)
            self.resume_writes()
            return False

    def _grip_all(self, wanted: Callable[[], list[Database]], until_s: float) -> str:
        """Keep the writers of these databases out, as soon as none is in a transaction; what is in the way, if that is
        not so until then."""
        while True:
            reasons = [self._try_grip(database) for database in wanted() if takeover.in_use(database)]
            if not any(reasons):
                return ""
            if time.monotonic() >= until_s:
                return next(filter(None, reasons))
            time.sleep(SPIN_S)

    def _try_grip(self, database: Database) -> str:
        grip = self._grip_of(database)
        try:
            if grip.take() and database.opening == 0:
                return ""
            return f"{database.name}: {grip.who_is_in_the_way()}"
        except OSError as error:
            grip.release()
            return f"{database.name}: {error}"

    def resume_writes(self) -> None:
        """End a pause without a change of the role."""
        with self._one:
            self._drop_grips()
            self.pause.end()

    # -- the end -------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Before the mount goes, or after it: let go of everything. The next start does what is left."""
        self._stopped.set()
        with self._one:
            self._wanted.clear()
            self._drop_grips()
            self.pause.end()

    def _told_one(self, name: str) -> None:
        """Whether it can be written shows in its permissions."""
        if self._registry.notifier is not None:
            self._registry.notifier.changed(name)
