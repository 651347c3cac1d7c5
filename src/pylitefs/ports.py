"""The seams of the program: who may ask what of whom.

    filesystem ──FileHooks──▶ engine          FUSE requests that concern a database
    engine     ──Notifier───▶ filesystem      what the kernel must forget
    cluster    ──Store/Database (engine)      concrete classes: the engine is below it

Each port says what an implementer guarantees. Only the composition root (`daemon`) joins them.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable


class FileKind(enum.Enum):
    """What a name in the mount stands for."""

    DATABASE = "database"
    WAL = "wal"
    SHM = "shm"
    JOURNAL = "journal"
    PLAIN = "plain"  # any other file: local to this node, not replicated
    POSITION = "pos"  # NAME-pos
    LOCK = "lock"  # NAME-lock: open for writing, it is the HALT lock
    PRIMARY = ".primary"
    LAG = ".lag"


SUFFIXES: dict[str, FileKind] = {
    "-wal": FileKind.WAL,
    "-shm": FileKind.SHM,
    "-journal": FileKind.JOURNAL,
    "-pos": FileKind.POSITION,
    "-lock": FileKind.LOCK,
}
VIRTUAL_KINDS = frozenset({FileKind.POSITION, FileKind.LOCK, FileKind.PRIMARY, FileKind.LAG})
VIRTUAL_SUFFIXES = tuple(suffix for suffix, kind in SUFFIXES.items() if kind in VIRTUAL_KINDS)
SIDE_KINDS = frozenset({FileKind.WAL, FileKind.SHM, FileKind.JOURNAL})


@dataclass(frozen=True)
class FileRef:
    """A name of the mount, resolved. `database` is the database's name (None for plain files and the
    two dot files); `path` is the backing file, which need not exist (None for virtual files)."""

    name: str
    kind: FileKind
    database: str | None
    path: str | None


Then = Callable[[BaseException | None], None]
"""Continuation of a request: called exactly once, from any thread, with None to go on or an error
(an OSError's errno, or a LitefsError, is what the caller of the system call gets)."""


class Moved(NamedTuple):
    """A database was renamed: what it had up to its TXID `after` is what `name` has at its TXID `txid`."""

    name: str
    txid: int
    after: int


@runtime_checkable
class PatientThen(Protocol):
    """A continuation whose request may be given up while other nodes are waited for: when its caller was killed it is
    answered with EINTR, as if the wait had failed then. What continues it later is ignored."""

    def __call__(self, error: BaseException | None) -> None: ...

    def waits(self) -> None:
        """From now on nothing but other nodes is waited for; nothing of the request is under way on this one. Any
        thread."""


class LockOpening(Protocol):
    """One open of NAME-lock for writing, by an application. Any thread."""

    def cancel(self) -> None:
        """The caller of open(2) was interrupted: `then` is called soon, if it was not yet."""

    def flush(self, last: bool, then: Then) -> None:
        """A close(2) of one descriptor of it, `last` if no process is known to have another one of this file. It
        returns when `then` is called: when what was committed here is safe on the primary."""

    def release(self) -> None:
        """The last descriptor of this open is gone. Called once, also after `cancel` if `then` came with None."""


class LockFiles(Protocol):
    """HALT locks, as the engine's hooks see them."""

    def open(self, name: str, then: Then) -> LockOpening:
        """The database's lock file is being opened for writing: `then` when this node may write it, or why not."""


class FileHooks(Protocol):
    """What the filesystem asks of the engine.

    All methods are called on FUSE threads. An implementer never touches the mount in the calling thread
    and never waits for anything that needs another FUSE request; what must wait is finished later, by
    calling `then` from another thread. `pid` is the id of the caller's thread, 0 if unknown.
    """

    def resolve(self, name: str) -> FileRef:
        """Which file a name of the mount stands for; never fails: an unknown name is PLAIN."""

    def names(self) -> list[str]:
        """All names to list in the root directory, virtual ones included (only files that exist)."""

    def virtual_content(self, ref: FileRef, then: Callable[[bytes | BaseException], None]) -> None:
        """Content of a virtual file, as of now (a position is a barrier: it covers every commit that
        returned before the question). FileNotFoundError where it does not exist at the moment."""

    def virtual_size(self, ref: FileRef) -> int | None:
        """Size in bytes of a virtual file for getattr, without a barrier; None if it does not exist."""

    def writable(self, ref: FileRef) -> bool:
        """Whether applications may write this file: not that of a database on a replica."""

    def may_open(self, ref: FileRef, flags: int, by_daemon: bool, then: Then) -> None:
        """Before OPEN. On a replica, a writing open of a DATABASE, WAL or JOURNAL fails with EROFS (not for the
        daemon's own opens) and the database is made ready for readers first."""

    def open_lock(self, ref: FileRef, then: Then) -> LockOpening:
        """Before OPEN of a LOCK file for writing, see `LockFiles`."""

    def may_create(self, ref: FileRef, by_daemon: bool, then: Then) -> None:
        """Before CREATE of a file that does not exist."""

    def created(self, ref: FileRef) -> None:
        """After CREATE (or MKNOD) made the empty backing file, before it is opened and the caller is answered."""

    def wants_write_hook(self, ref: FileRef) -> bool:
        """True if writes to this file must come to `write`: a database in rollback mode (or a new file). Asked
        when the first handle of an inode is opened; the answer holds until its last handle is released."""

    def wants_wal_writes(self, ref: FileRef) -> bool:
        """True if the writes of this handle must come to `write` though the file is passed through. Asked for each
        handle that an application opens for writing."""

    def opened(self, ref: FileRef, handle: int, pid: int, *, writable: bool, hooked: bool, by_daemon: bool) -> None:
        """After a handle was opened or created. `hooked`: its writes come to `write` (False: passthrough). `handle`: as
        of `write`."""

    def write(self, ref: FileRef, fd: int, data: memoryview, offset: int, handle: int) -> int:
        """A write that was not passed through; writes to `fd` (the backing file) and takes note. `handle`: the number
        of the open file it came through, never used twice. Raises OSError."""

    def is_commit(self, ref: FileRef, fd: int, offset: int, size: int) -> bool:
        """After an application's `write`: whether it was the last one of a commit that no fsync will follow. The
        filesystem then does as if one had come, before the write is answered."""

    def before_truncate(self, ref: FileRef, size_bytes: int, then: Then, by_daemon: bool) -> None:
        """Before SETATTR(size), which the filesystem performs in `then`. On a replica only the daemon itself may
        shorten the files of a database."""

    def after_truncate(self, ref: FileRef, size_bytes: int) -> None: ...

    def before_fsync(self, ref: FileRef, then: Then) -> None:
        """Before the backing file is fsynced, which the filesystem does in `then`."""

    def after_fsync(self, ref: FileRef, then: Then, handle: int) -> None:
        """After it was fsynced, before the caller is answered, in `then`. `handle`: as of `write`; 0 if it was opened
        for reading only."""

    def fsync_failed(self, ref: FileRef) -> None:
        """Instead of `after_fsync`: the caller is told of the error."""

    def before_unlink(self, ref: FileRef, by_daemon: bool, then: Then) -> None:
        """Before UNLINK of any file; for a DATABASE the engine itself drops it (removes all its files)
        and the filesystem, in `then`, unlinks nothing but forgets its nodes. On a replica only the daemon itself may
        remove files of a database."""

    def unlinked(self, ref: FileRef) -> None:
        """After UNLINK was done, before the caller is answered. Raises OSError."""

    def before_rename(self, old: FileRef, new: FileRef, then: Then) -> None:
        """RENAME. If neither is a database or part of one, and `old` has no SQLite header, calls `then(None)` and the
        filesystem renames the backing files itself. Otherwise the engine performs the whole rename before calling
        `then` and `renamed_by_engine` tells so."""

    def renamed_by_engine(self, old: FileRef, new: FileRef) -> bool:
        """Whether `before_rename` did the rename itself (asked in `then`)."""

    def released(self, ref: FileRef, handle: int, last: bool, by_daemon: bool) -> None:
        """After a handle was released (asynchronously to the application's close). `last`: none is open any more."""

    def overwritten(self, ref: FileRef) -> None:
        """After `released`, of an application's handle that was for writing alone (O_WRONLY): SQLite never has one."""

    def flushed(self, ref: FileRef, then: Then, handle: int) -> None:
        """Before close(2) returns, for hooked handles only (FLUSH); a plain file that turned out to be a database is
        imported here, so that `cp app.db MOUNT/` has done its work when it returns. `handle`: as of `write`."""


class CommitGate(Protocol):
    """What a commit waits for before it is acknowledged (synchronous replication). Any thread."""

    @property
    def active(self) -> bool:
        """Whether there is anything to wait for."""

    def wait(self, name: str, txid: int, then: Then) -> None:
        """Call `then` exactly once: with None when enough replicas hold the database's transactions up to `txid`
        durably, or with the error that the caller of the commit gets. It may be called at once, or on any thread,
        the event loop's too: it must be quick."""


class Notifier(Protocol):
    """What the engine tells the kernel through the filesystem. Safe from any thread that is not a FUSE thread.
    Errors of the kind "not cached" are not errors."""

    def invalidate_file(self, name: str) -> None:
        """Drop cached data and attributes of MOUNT/name."""

    def changed(self, name: str) -> None:
        """What MOUNT/name leads to may be another file than before, at another place, or none: look again. To be called
        *after* every change that the engine makes (not only if there was something, and not before), the last time when
        the change is complete. Handles that are open keep their file."""

    def move(self, old: str, new: str, do: Callable[[], None], *, anew: bool = False) -> None:
        """Rename MOUNT/old to MOUNT/new: `do` does it on the disk, and nothing but that. Who looks up a name meanwhile
        waits. `changed` has to be called for both afterwards. `anew`: no application has MOUNT/old open; who is about
        to open it by its old name meanwhile, does not get it."""

    def is_open(self, name: str) -> bool:
        """Whether an application has MOUNT/name open. One that has just closed it may count for a moment."""
