"""What a FUSE request means that may be the end of a transaction: fsyncs, and journals that go.

A commit is answered only while `Database.may_commit`, asked once more right before the answer. One that comes later
fails with EIO, and SQLite rolls it back. That must be possible: a rollback ends as a commit does, and what tells them
apart is whether the pages are as the log has them.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable

from pylitefs.engine.checkpoints import Checkpoints
from pylitefs.engine.commit_points import wal_in_use
from pylitefs.engine.continuation import finish, proceed
from pylitefs.engine.database import Database
from pylitefs.engine.page_checksums import stamp
from pylitefs.engine.rollback_capture import journal_in_use
from pylitefs.engine.shown import Shown
from pylitefs.engine.stand_in import completes_commit
from pylitefs.engine.store import Store
from pylitefs.engine.super_journal import members, super_journal_of
from pylitefs.formats.names import shown
from pylitefs.ports import FileKind, FileRef, Then

_LARGE_BYTES = 8 << 20  # a commit of more than this leaves the FUSE thread


def cut_off(name: str) -> OSError:
    return OSError(errno.EIO, f"{name}: this node is not the primary any more, nothing can be committed")


def if_held(database: Database, then: Then) -> Then:
    """`then`; with an error if nothing may be committed any more when it comes to that."""

    def answer(error: BaseException | None) -> None:
        then(cut_off(database.name) if error is None and not database.may_commit else error)

    return answer


class CommitHooks(Shown):
    """On FUSE threads."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._checkpoints = Checkpoints(store)
        self._gated = self._checkpoints.gated
        self._early: set[str] = set()  # databases whose commit is in the log, and its journal still there
        # Super-journals that are about to go: whose, and the nonces of the journals.
        self._decided: dict[str, list[tuple[Database, bytes]]] = {}

    # -- helpers -----------------------------------------------------------------------------------------------

    def _database(self, ref: FileRef) -> Database | None:
        return None if ref.database is None else self._store.get(ref.database)

    def _capturing(self, ref: FileRef) -> Database | None:
        """The database of a file, if applications write it."""
        database = self._database(ref)
        return database if database is not None and database.captures else None

    def _plain(self, name: str) -> str:
        return os.path.join(self._store.plain_dir, name)

    @property
    def _may_make(self) -> bool:
        """Whether a new database may come to be."""
        return self._store.is_primary and self._store.fence.holds() and not self._store.roles.pause.on

    @staticmethod
    def _in_thread(work: Callable[[], object], then: Then) -> None:
        threading.Thread(target=finish, args=(then, work), name="commit", daemon=True).start()

    # -- who has a database open -----------------------------------------------------------------------------------

    def _check_still_plain(self, ref: FileRef) -> None:
        """A plain file was opened for writing. If it has become a database since that was allowed, and is not written
        here any more, nobody has seen that it is open: the kernel asks again. From now on it is seen to be open."""
        database = self._store.get(ref.name)
        if database is not None:
            with database.handles_lock:
                if database.exists and not database.captures:
                    raise OSError(errno.ESTALE, f"{shown(ref.name)} is a database now")

    # -- fsync -------------------------------------------------------------------------------------------------

    def fsync_failed(self, ref: FileRef) -> None:
        database = self._database(ref) if ref.kind is FileKind.WAL else None
        if database is not None and database.captures:
            database.wal.fsync_failed()
            self._gated.wal_fsync_failed(database)

    def before_fsync(self, ref: FileRef, then: Then) -> None:
        database = self._capturing(ref)
        if database is not None and not database.may_commit and self._is_commit(database, ref):
            self.fsync_failed(ref)
            then(cut_off(database.name))
        elif database is not None and ref.kind is FileKind.WAL:
            self._checkpoints.before_wal_fsync(database, then)
        elif database is not None and ref.kind is FileKind.DATABASE:
            self._checkpoints.before_database_fsync(database, then)
        else:
            then(None)

    def _is_commit(self, database: Database, ref: FileRef) -> bool:
        """Whether an fsync may be that of a commit. The database's is not if the pages are as the log has them: then
        it was rolled back. A journal beside it makes no difference: what follows may be a super-journal's end."""
        if ref.kind is not FileKind.DATABASE or wal_in_use(database):
            return True
        return not self._store.capture.is_as_logged(database)

    def after_fsync(self, ref: FileRef, then: Then, handle: int) -> None:
        database = self._capturing(ref)
        if database is not None and ref.kind is FileKind.WAL:

            def answer(error: BaseException | None) -> None:
                if error is None and not database.may_commit:
                    self.fsync_failed(ref)
                if_held(database, then)(error)

            self._gated.after_wal_fsync(database, answer)
            return
        if database is not None and not database.may_commit:
            then(cut_off(database.name) if self._is_commit(database, ref) else None)
            return
        recorded = False
        if database is not None and ref.kind in (FileKind.DATABASE, FileKind.JOURNAL) and not wal_in_use(database):
            is_database = ref.kind is FileKind.DATABASE
            with database.lock:
                if is_database and database.raw_writers:
                    database.rollback.suspect = True
                is_commit = not database.rollback.journal_in_use()
                by_writer = self._is_by_writer(database, ref, handle)
                if is_database and is_commit and database.rollback.pending and self._store.capture.is_foreign(database):
                    by = self._store.open_files.process_of(handle) if by_writer else None
                    self._foreign_synced(database, then, by)
                    return
                early = is_database and not is_commit and self._commits_here(database)
                if database.rollback.pending and by_writer and (is_commit or early):
                    recorded = self._store.capture.commit_point(database)
                    if recorded and not is_commit:
                        self._early.add(database.name)
        if database is None:
            self._plain_synced(ref, then, handle)
        else:
            self._gated.after_commit(database, recorded, if_held(database, then) if recorded else then, caller=then)

    def _commits_here(self, database: Database) -> bool:
        """Whether a transaction is recorded at the fsync of its database, with the journal still there. One over
        several databases is, where its super-journal's end is not seen: nothing that comes later can be waited for, or
        refused. Under the database's lock."""
        if super_journal_of(database.files.journal) is not None:
            return self._is_decided_elsewhere(database)
        return self._gated.may_commit_here(database)

    def _is_decided_elsewhere(self, database: Database) -> bool:
        """Whether the super-journal that the journal names lies outside of the mount, so that its end is not seen."""
        named = super_journal_of(database.files.journal)
        return named is not None and not os.path.exists(self._plain(os.path.basename(named)))

    @staticmethod
    def _is_by_writer(database: Database, ref: FileRef, handle: int) -> bool:
        """Whether an fsync may be that of who wrote what is noted: `rollback_capture` has the table. Under the
        database's lock."""
        rollback = database.rollback
        if ref.kind is FileKind.JOURNAL:
            return handle != 0 and (rollback.has_journal or database.raw_writers > 0)
        return rollback.is_by(handle) or (handle != 0 and database.raw_writers > 0)

    # -- a WAL that stands in for a rollback mode ----------------------------------------------------------------

    def wants_wal_writes(self, ref: FileRef) -> bool:
        database = self._database(ref) if ref.kind is FileKind.WAL else None
        if database is None:
            return False
        return database.wal_stands_in or (not database.captures and database.journal_mode == "rollback")

    def is_commit(self, ref: FileRef, fd: int, offset: int, size: int) -> bool:
        database = self._capturing(ref) if ref.kind is FileKind.WAL else None
        return database is not None and database.wal_stands_in and completes_commit(fd, offset, size)

    # -- writers that are not SQLite -----------------------------------------------------------------------------

    def overwritten(self, ref: FileRef) -> None:
        database = self._capturing(ref) if ref.kind is FileKind.DATABASE else None
        if database is not None and wal_in_use(database):
            database.rollback.suspect = database.rollback.overwritten = True
            self._store.worker.post(self._store.capture.settle, database, 0, True, database=database.name)

    @staticmethod
    def _has_unseen_content(database: Database) -> bool:
        """A handle whose writes pass us by is released: whether the file was written to by who is not SQLite. The last
        user removes the WAL, and then it is known which size and time the file has. Where that has not been, because it
        was killed or may not write, the whole file is looked at once."""
        with_wal = wal_in_use(database) and database.app_handles
        return not with_wal and stamp(database.files.database) != database.settled_stamp

    def _database_truncated(self, database: Database, size_bytes: int) -> None:
        with database.lock:
            if not database.rollback.journal_in_use() and not wal_in_use(database):
                self._store.capture.note_write(database)
            if database.raw_writers or not size_bytes:
                database.rollback.suspect = True
                database.rollback.overwritten |= not size_bytes
            elif not wal_in_use(database):
                database.rollback.note(size_bytes, 0)

    def _foreign_synced(self, database: Database, then: Then, by: int | None) -> None:
        """An fsync that may be of a commit of SQLite, in the journal modes MEMORY and OFF, or of somebody who writes in
        place."""

        def settled(error: BaseException | None) -> None:
            if error is None:
                self._gated.after_commit(database, True, if_held(database, then), caller=then, on_worker=True)
            else:
                then(error)

        self._store.capture.settle_later(database, settled, ended=True, synced_by=by)

    def _before_wal(self, ref: FileRef, then: Then) -> None:
        """SQLite makes a WAL, see `record_before_wal`. What cannot be recorded then is looked for later."""
        database = self._capturing(ref) if ref.kind is FileKind.WAL else None
        if database is None or not self._store.capture.has_unseen_writes(database):
            then(None)
        else:
            self._in_thread(lambda: self._store.capture.record_before_wal(database), lambda error: then(None))

    # -- commit points -----------------------------------------------------------------------------------------

    def _commit(self, database: Database, then: Then, *, caller: Then | None = None) -> None:
        """The journal goes away, or the super-journal that it names: the transaction is committed, or rolled back (then
        no page has changed). `caller`: the request's own continuation, if `then` is another one."""
        if database.rollback.journal_is_committed():
            then(None)
            return
        with database.lock:
            if database.raw_writers and not wal_in_use(database):
                database.rollback.suspect = True
            large = database.rollback.suspect and database.size_bytes > _LARGE_BYTES

        def commit() -> None:
            try:
                recorded = self._commit_now(database)
            except BaseException as error:
                then(error)
            else:
                answer = if_held(database, then) if recorded else then
                self._gated.after_commit(database, recorded, answer, caller=caller or then, on_worker=True)

        if large:
            threading.Thread(target=commit, name="commit", daemon=True).start()
        else:
            commit()

    def _commit_now(self, database: Database) -> bool:
        """Raises OSError: it must not be. The end of what was rolled back may; whether it was, the pages tell."""
        if database.rollback.journal_is_committed():
            return False
        was_early = database.name in self._early
        self._early.discard(database.name)
        if not database.may_commit:
            refused = was_early and not self._is_decided_elsewhere(database)
            if refused or not self._store.capture.is_as_logged(database):
                raise cut_off(database.name)
            return False
        return self._store.capture.commit_point(database)

    # -- commit points of several databases -----------------------------------------------------------------------

    def _plain_goes(self, ref: FileRef, then: Then) -> None:
        if ref.name.endswith("-journal"):
            self._plain_commit(ref, then, leave_journal=True)
        else:
            self._super_journal_goes(ref, then)

    def _super_journal_goes(self, ref: FileRef, then: Then) -> None:
        """A plain file goes. If it is a super-journal, that commits what is under way in all databases whose journals
        name it: each is recorded and waits for replicas, and all of them must be allowed to commit."""
        self._decided.pop(ref.name, None)
        names = [name for name in members(self._plain(ref.name)) if self._belongs(name, ref.name)]
        left = iter(names)

        def step(error: BaseException | None) -> None:
            name = next(left, None) if error is None else None
            database = None if name is None else self._store.get(name)
            if error is not None:
                then(error)
            elif name is None:
                finish(then, decide)
            elif database is not None and database.exists:
                self._commit(database, next_step, caller=then)
            else:
                self._take_over(name, next_step)

        def next_step(error: BaseException | None) -> None:
            try:
                step(error)
            except Exception as raised:
                proceed(then, raised)

        def decide() -> None:
            found = [database for name in names if (database := self._store.get(name)) is not None and database.exists]
            for database in found:
                if not database.may_commit:
                    raise cut_off(database.name)
            if found:
                self._decided[ref.name] = [(database, database.rollback.nonce()) for database in found]

        step(None)

    def _belongs(self, name: str, super_journal: str) -> bool:
        """Whether the journal of a database, or of a file that becomes one, names this super-journal."""
        database = self._store.get(name)
        is_database = database is not None and database.exists
        journal = database.files.journal if database is not None and is_database else self._plain(name + "-journal")
        return os.path.basename(super_journal_of(journal) or "") == super_journal

    def _super_journal_gone(self, ref: FileRef) -> None:
        """It was unlinked: the journals of its databases count no more."""
        for database, nonce in self._decided.pop(ref.name, ()):
            with database.lock:
                database.rollback.super_journal_gone(nonce)

    # -- files that become databases -----------------------------------------------------------------------------

    def _plain_synced(self, ref: FileRef, then: Then, handle: int) -> None:
        """A file that is no database yet was fsynced. Where commits wait for replicas its first transaction does so
        here, with the journal still there, as those that follow (see `gated`)."""
        hot = ref.kind is FileKind.PLAIN and journal_in_use(self._plain(ref.name + "-journal"))
        gate = self._store.gate
        ungated = hot and (gate is None or not gate.active)
        is_writer = self._store.plain_writes.is_writer(ref.name, handle)
        if ref.kind is not FileKind.PLAIN or not self._store.is_primary or ungated or not is_writer:
            then(None)
        else:
            self._take_over(ref.name, then)

    def _plain_commit(self, ref: FileRef, then: Then, *, leave_journal: bool) -> None:
        """The journal of a file that is no database yet goes away: it may have become one."""
        base = ref.name.removesuffix("-journal")
        if base != ref.name and (self._store.is_primary or journal_in_use(self._plain(ref.name))):
            self._take_over(base, then, leave_journal=leave_journal)
        else:
            then(None)

    def _import_base(self, journal: str) -> None:
        """A plain file's journal was invalidated in place (PERSIST, EXCLUSIVE). Raises OSError."""
        base = journal.removesuffix("-journal")
        if self._may_make:
            self._store.import_plain(base)
        elif journal_in_use(self._plain(journal)) and self._store.is_plain_database(base):
            raise cut_off(base)

    def _take_over(
        self, name: str, then: Then, *, leave_journal: bool = False, at_rest: bool = False
    ) -> None:
        """If a plain file holds a database, it becomes one: a commit like any other, which is refused where nothing may
        be committed, and waits for replicas. `at_rest`: it is not SQLite's commit that makes it one."""
        if not self._store.is_plain_database(name):
            then(None)
        elif not self._may_make:
            then(cut_off(name))
        else:
            args = (name, then, leave_journal, at_rest)
            threading.Thread(target=self._import, args=args, name="import", daemon=True).start()

    def _import(self, name: str, then: Then, leave_journal: bool, at_rest: bool) -> None:
        try:
            if at_rest:
                imported = self._store.plain_imports.at_rest(name)
            else:
                imported = self._store.import_plain(name, leave_journal=leave_journal)
        except BaseException as error:
            then(error)
            return
        database = self._store.get(name)
        if not imported or database is None:
            then(None)
            return

        def answer(error: BaseException | None) -> None:
            if error is not None and leave_journal:  # it stays, and takes the transaction back
                self._store.plain_imports.take_journal(database)
            then(error)

        # A journal that was left must be taken along at the very moment in which the request fails.
        caller = None if leave_journal else then
        self._gated.after_commit(database, True, if_held(database, answer), caller=caller, on_worker=True)
