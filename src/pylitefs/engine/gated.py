"""Synchronous replication: an fsync that makes a commit durable is answered when replicas hold the commit too.

    journal mode                 the commit is recorded, and waits, at       if it fails
    WAL                          the fsync of the WAL: the commit is whole   SQLite takes it back, see `pending`
                                 in it, and not published yet
    WAL, EXCLUSIVE locking       the same; there is nothing to publish       the same
    WAL, for a rollback mode     the write that makes the commit whole, see  the same
                                 `stand_in`: nothing but that need follow
    DELETE, TRUNCATE, PERSIST    the fsync of the database, before the       SQLite rolls back, and what that writes is
                                 journal goes (synchronous=OFF: when it      recorded when the journal goes
                                 goes)
    ... several databases        the end of their super-journal              the same, in each of them
    MEMORY, OFF                  the fsync of the database                   the same, as far as SQLite can
    a new database               its file's fsync; where there is none, the  the same: the file is empty then, and the
                                 journal's end, or the close                 name is dropped

The backing fsync runs beside the replication. A commit in WAL mode that is not fsynced (synchronous=NORMAL) never
waits. The end of a rollback of something that has waited does not wait again: its journal is the same, as the nonce
in it tells.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from typing import TYPE_CHECKING

from pylitefs.engine import ofd_locks
from pylitefs.engine.continuation import proceed
from pylitefs.engine.database import Database
from pylitefs.engine.pending import Pending, Tail, Wait
from pylitefs.engine.rollback_capture import journal_head
from pylitefs.engine.transaction import Change, UnstableSource
from pylitefs.engine.wal_compare import WalPages
from pylitefs.engine.wal_view import index_in_use
from pylitefs.formats.sqlite.locks import SHARED_FIRST, SHARED_SIZE
from pylitefs.formats.sqlite.wal import frame_offset
from pylitefs.ports import CommitGate, FileKind, PatientThen, Then

if TYPE_CHECKING:
    from pylitefs.engine.store import Store

log = logging.getLogger("litefs.capture")

_TRIES = 50
_AGAIN_S = 0.001
_WATCH_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_NONCE = slice(12, 16)


class GatedCommits:
    """Of all databases, on the primary."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waits: dict[str, Wait] = {}  # of the newest fsync of each WAL
        self._nonces: dict[str, bytes] = {}  # of the journal whose transaction waited last

    def gate_of(self, database: Database) -> CommitGate | None:
        """The gate, while there is one that commits wait for: the database's own (HALT lock), or everybody's."""
        gate = database.loan.gate if database.loan is not None else self._store.gate
        return gate if gate is not None and gate.active else None

    # -- WAL mode: on FUSE threads ---------------------------------------------------------------------------

    def before_wal_fsync(self, database: Database) -> None:
        """Begin to look for the commit that this fsync makes durable."""
        if self.gate_of(database) is None:
            self._waits.pop(database.name, None)
            return
        wait = self._waits[database.name] = Wait()
        self._store.worker.post(self._find, database, wait, _TRIES, database=database.name)

    def after_wal_fsync(self, database: Database, then: Then) -> None:
        """The disk has it: answer when replicas have it too. A later fsync's wait stands for an earlier one's."""
        wait = self._waits.get(database.name)
        if wait is None:
            then(None)
            return

        def answer(error: BaseException | None) -> None:
            wait.told(failed=error is not None)
            then(error)
            if error is not None:
                self._store.worker.post(self._store.capture.wake, database, database=database.name)

        wait.then(answer)

    def wal_fsync_failed(self, database: Database) -> None:
        """Instead of `after_wal_fsync`."""
        wait = self._waits.get(database.name)
        if wait is not None:
            wait.told(failed=True)

    # -- WAL mode: on the worker -----------------------------------------------------------------------------

    def _find(self, database: Database, wait: Wait, tries: int) -> None:
        gate = self.gate_of(database)
        try:
            txid = self._take(database, wait)
            if txid is None or gate is None:
                wait.done(None)
            else:
                gate.wait(database.name, txid, wait.done)
        except UnstableSource:
            hidden = database.wal.view.index_is_hidden()  # it is being opened: for as long as that takes
            if tries or hidden:
                self._store.worker.call_later(
                    _AGAIN_S, self._find, database, wait, tries - (not hidden), database=database.name
                )
            else:
                wait.done(OSError(errno.EIO, f"{database.name}: its WAL cannot be read in peace"))
        except OSError as error:
            wait.done(error)
        except Exception as error:
            log.exception("%s: a commit could not be taken", database.name)
            wait.done(OSError(errno.EIO, str(error)))

    def _take(self, database: Database, wait: Wait) -> int | None:
        """Take the commit that is not published into the log; the TXID to wait for, None if there is no commit."""
        wal, capture = database.wal, self._store.capture
        capture.open_shm(database)
        with wal.mutex:
            capture.flush(database)
            if not wal.view.has_index():
                return database.position.txid  # what is whole counts as committed
            if wal.is_checkpoint_only():
                return None
            tail, pending = wal.unpublished(), wal.pending
            waits = [wait]
            if pending is not None:
                if tail is not None and tail.first == pending.tail.first and pending.tail.stands(wal.view):
                    waits = pending.waits
                    waits.append(wait)
                    if tail.last == pending.tail.last:
                        return pending.txid
                else:
                    self._taken_back(database, pending)
            return None if tail is None else self._record(database, tail, waits)

    def _record(self, database: Database, tail: Tail, waits: list[Wait]) -> int:
        wal, worker = database.wal, self._store.worker
        before = wal.view.committed()
        if before is None:
            raise UnstableSource
        pages = WalPages(wal.view)
        database.record(
            Change(tail.page_size, tail.commit),
            worker.giving_way(database.name, wal.view.frame_pages(tail.pgnos, tail.numbers, tail.page_size)),
            pages.reader(before), lambda: tail.stands(wal.view), "capture",
        )  # fmt: skip
        wal.collected.commit = None
        txid = database.position.txid
        wal.pending = Pending(tail, txid, before.salts, waits)
        database.fsync_follows = True
        self._store.opener.do(database.log.make_spare)
        worker.call_later(_WATCH_S[0], self._watch, database, wal.pending, 1)
        return txid

    def _taken_back(self, database: Database, pending: Pending) -> None:
        """It will not come to be any more: have the log say so."""
        if database.wal.pending is pending:
            pending.gone = True
            self._store.capture.flush(database)

    def _watch(self, database: Database, pending: Pending, step: int) -> None:
        """See to it until it is decided: a writer that was killed leaves nothing else to notice it by."""
        wal, opener = database.wal, self._store.opener
        pending.quiet = False
        if wal.pending is not pending:
            return
        self._store.worker.call_later(_WATCH_S[min(step, len(_WATCH_S) - 1)], self._watch, database, pending, step + 1)
        with contextlib.suppress(OSError):  # the next look tells of it
            self._store.capture.flush_if_possible(database)
        if wal.pending is not pending or not wal.nobody_writes():
            return

        def opened(fds: list[int] | None) -> None:
            self._store.worker.post(self._decide, database, pending, fds, database=database.name)

        opener.open([database.files.live(FileKind.DATABASE)], 0, opened)

    def _decide(self, database: Database, pending: Pending, fds: list[int] | None) -> None:
        wal = database.wal
        if fds is None:
            return
        try:
            with wal.mutex:
                if not index_in_use(wal.shm_fd):
                    return  # all were killed: who opens it next makes the wal-index anew, and counts what is whole
                if wal.nobody_writes() and ofd_locks.write_locked(fds[0], SHARED_FIRST, SHARED_SIZE) is None:
                    self._store.capture.flush(database)  # published, perhaps, before the locks were let go
                    self._taken_back(database, pending)
        except (OSError, UnstableSource):
            pass  # looked at again
        finally:
            self._store.opener.close(fds)

    def wal_goes(self, database: Database, size_bytes: int = 0) -> None:
        """The WAL is about to be removed or cut off by somebody who has it to himself, and was captured."""
        wal = database.wal
        with wal.mutex:
            pending = wal.pending
            if pending is not None and frame_offset(pending.tail.last + 1, pending.tail.page_size) > size_bytes:
                try:
                    self._taken_back(database, pending)
                except UnstableSource:
                    wal.doubt()

    # -- rollback modes: any thread --------------------------------------------------------------------------

    def may_commit_here(self, database: Database) -> bool:
        """Whether what was written is to be recorded at the database's fsync, with the journal still there. Under the
        database's lock."""
        return self.gate_of(database) is not None and not database.rollback.suspect

    def after_commit(
        self, database: Database, recorded: bool, then: Then, *, caller: Then | None, on_worker: bool = False
    ) -> None:
        """A transaction was `recorded` at a commit point: go on when replicas have it. `on_worker`: there, because
        what follows takes long. `caller`: the request's own continuation, which `then` leads to; None: the request
        is not given up halfway."""
        gate = self.gate_of(database)
        if gate is None or not recorded:
            then(None)
            return

        def on_the_worker(error: BaseException | None) -> None:
            self._store.worker.post(proceed, then, error, database=database.name)

        try:
            nonce = journal_head(database.files.journal)[_NONCE]
            if any(nonce) and self._nonces.get(database.name) == nonce:
                then(None)  # it was rolled back
                return
            self._nonces[database.name] = nonce
            if isinstance(caller, PatientThen):
                caller.waits()
            gate.wait(database.name, database.position.txid, on_the_worker if on_worker else then)
        except Exception as error:
            proceed(then, error)
