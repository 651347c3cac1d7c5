"""What replication asks of the engine, and of the wire.

[W] marks what runs on the store's worker thread, and nowhere else; everything else here is safe from any thread. What
raises OSError (disk full) has changed nothing and may be called again with the same arguments, except `finish`, which
ends a file or a resync in any case. `engine.store.Store` and `engine.database.Database` are the implementers; tests
have a small one of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from pylitefs.errors import Unavailable
from pylitefs.events import EventBus
from pylitefs.formats.ltx.format import Position
from pylitefs.ports import Moved

T = TypeVar("T")
PageSums = npt.NDArray[np.uint64]
Epochs = tuple[tuple[int, int], ...]


# --- the engine ------------------------------------------------------------------------------------------------------


class Worker(Protocol):
    def submit(self, call: Callable[..., T], /, *args: object, database: str = "") -> Future[T]:
        """Run `call` on the worker, after everything submitted before. `database`: what it is for; it may run while a
        long job of another one waits."""

    def call_later(self, delay_s: float, call: Callable[..., object], /, *args: object, database: str = "") -> object:
        """[W] Run `call` on the worker once `delay_s` seconds have passed. `database`: as of `submit`."""


class Closable(Protocol):
    def close(self) -> None: ...


class LogEntry(Protocol):
    """One LTX file of a log: transactions min_txid..max_txid."""

    @property
    def min_txid(self) -> int: ...
    @property
    def max_txid(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def path(self) -> str: ...


class Log(Protocol):
    """A database's log. An entry may vanish (retention) between any two calls: its file is then FileNotFoundError."""

    @property
    def head(self) -> Position: ...
    @property
    def first_txid(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...
    def entries(self) -> Sequence[LogEntry]: ...
    def after(self, txid: int) -> LogEntry | None:
        """The entry that begins with txid + 1."""

    def covering(self, txid: int) -> LogEntry | None:
        """The entry with min_txid <= txid <= max_txid."""

    def reaches(self, position: Position) -> bool:
        """Whether a receiver at `position` can be brought to the head from this log alone. May read a header."""

    def holds(self, position: Position) -> bool:
        """Whether this log went through `position`; also where the entry that follows is damaged. May read both."""

    def positions(self, limit: int) -> list[Position]:
        """The newest `limit` positions the log passed through, newest first. Reads that many headers."""

    def epochs(self) -> Epochs:
        """(epoch, its first TXID) of the history that led to the head."""

    @property
    def agreed(self) -> Agreed: ...
    def shared(self) -> Position:
        """As far as the log is known to be the primary's history: its head, or what came before the writes under a HALT
        lock that the primary is not known to have."""

    def passed(self, position: Position) -> bool:
        """Whether that history went through `position`, as far as the epochs tell; also where the log does not reach
        back to it."""

    def pin(self, txid: int) -> Closable:
        """Keep retention from removing entries after `txid` until it is closed."""


class SnapshotReader(Protocol):
    """Reads a database while it is being written: pages as of any moment from `start` on. Blocking. DatabaseError
    if a page is damaged, or if the page size has changed."""

    @property
    def start(self) -> Position: ...
    @property
    def page_size(self) -> int: ...
    def next_chunk(self) -> list[tuple[int, bytes]] | None:
        """About 1 MB of (pgno, page); None at the end. The log after `start` stays until `close`."""

    def close(self) -> None: ...


class IncomingFile(Protocol):
    """[W] A large LTX file that arrives in pieces."""

    def write(self, data: bytes, /) -> object: ...
    def finish(self, *, spare_readers: bool = False) -> Position:
        """As `Database.apply`. After ReadersInTheWay it can be called again."""

    def abort(self) -> None: ...


class Resync(Protocol):
    """[W] The primary's state, being assembled beside the local copy; nothing local changes before `finish`."""

    def pages(self, pages: list[tuple[int, bytes]], /) -> object: ...
    def transaction(self, data: bytes, /) -> object: ...
    def finish(self, commit: int, position: Position, epochs: Epochs, /) -> Position:
        """`epochs`: (epoch, its first TXID) of the history. FormatError if the result does not have the checksum of
        `position`; everything is then as before."""

    def abort(self) -> None: ...


class Database(Protocol):
    @property
    def position(self) -> Position: ...
    @property
    def epoch(self) -> int:
        """Of the log's head."""

    @property
    def moves(self) -> tuple[Moved, ...]:
        """Where its content was moved when it was renamed, the last time last."""

    @property
    def captures(self) -> bool:
        """Applications here write it; else only the daemon does."""

    @property
    def loan(self) -> Loan | None:
        """While this node writes it under a HALT lock of the primary's."""

    @property
    def page_size(self) -> int: ...
    @property
    def commit(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def set_aside_reason(self) -> str | None:
        """Why the database cannot be used on this node; None if all is well."""

    @property
    def log(self) -> Log: ...
    def flush(self) -> Future[Position]:
        """Barrier: the position that covers every commit that had returned before the call."""

    def page_checksums(self) -> PageSums:
        """Of all `commit` pages, index pgno - 1."""

    def file_checksums(self) -> PageSums:
        """The same, of what the files really hold. Blocking; neither on the worker nor on the loop."""

    @property
    def damage(self) -> Mapping[int, int]:
        """Pages that are known to be damaged, and the checksums that they have."""

    @property
    def is_damaged(self) -> bool:
        """Pages were found that do not match their checksums, and nothing was done about it yet."""

    def note_healed(self, pgnos: Iterable[int], source: str, /) -> None:
        """These are what they should be again."""

    def snapshot(self, known: PageSums | None, /) -> SnapshotReader:
        """Blocking; neither on the worker nor on the loop. `known`: only pages that differ from these are read out."""

    def apply(self, data: bytes, /, *, spare_readers: bool = False) -> Position:
        """[W] One LTX file: verify, append to the log, apply. FormatError and PositionMismatch change nothing.
        `spare_readers`: ReadersInTheWay, and nothing has changed, if it brings another page size and somebody is in a
        read transaction; else those who have the database open have to open it anew then."""

    def receive(self, min_txid: int, max_txid: int, /) -> IncomingFile:
        """[W]"""

    def resync(self, page_size: int, keep_branch_after: int | None, /) -> Resync:
        """[W] `keep_branch_after`: what the log holds beyond this TXID goes to lost/; None: nothing needs keeping."""

    def durable(self) -> int:
        """[W] Make everything that was applied durable; returns its TXID."""

    def log_durable(self) -> int | None:
        """The same by an fsync of the log alone, which is quicker. None if that would not suffice now. Blocking."""


class Tombstone(Protocol):
    """What is left of a database that was dropped long ago: the position of the drop, and its history's epochs."""

    @property
    def position(self) -> Position: ...
    @property
    def epochs(self) -> Epochs: ...
    @property
    def moves(self) -> tuple[Moved, ...]: ...


class Store(Protocol):
    @property
    def data_dir(self) -> str: ...
    @property
    def cluster_id(self) -> str | None: ...
    @property
    def has_databases(self) -> bool:
        """Whether there is any, or was."""

    @property
    def events(self) -> EventBus: ...
    @property
    def worker(self) -> Worker: ...
    @property
    def is_primary(self) -> bool: ...
    @property
    def seen_epoch(self) -> int:
        """The highest epoch this node has followed or written in."""

    def note_epoch(self, epoch: int, /) -> None:
        """Keep it durably. Blocking. OSError."""

    def adopt_cluster_id(self, cluster_id: str, /) -> None:
        """Keep the id durably. ClusterMismatch if another one is set, and there are databases."""

    def demote_database(self, name: str, timeout_s: float, /) -> bool:
        """On a primary that takes writes: lock the writers of one database out, capture everything. False if a
        transaction is open for too long: writers are kept out until `promote_database`. Blocking."""

    def promote_database(self, name: str, /) -> None:
        """Let the writers in again; not if this node is the primary no more. Blocking."""

    def apply_as_primary(self, name: str, data: bytes | str, /) -> Position:
        """[W] On a demoted database of the primary: append a transaction of somebody else (an LTX file, or the path of
        one) that follows the head. FormatError and PositionMismatch change nothing."""

    def find_damage(self, name: str, /) -> list[int]:
        """Read a whole database: its pages that are not what they should be. Blocking. DatabaseBusy: not now."""

    def sound_pages(self, name: str, pgnos: Sequence[int], /) -> list[tuple[int, bytes]]:
        """Those of these pages that are here as they should be. Blocking."""

    def logged_pages(self, name: str, pgnos: Sequence[int], /) -> list[tuple[int, bytes]]:
        """Those of these pages that the log has as they should be. Blocking."""

    def mend(self, name: str, pages: list[tuple[int, bytes]], /) -> int:
        """[W] On the primary: put pages in the place of damaged ones. Any that are not as they should be are left out;
        how many were written. Unavailable while a process has the database open."""

    def set_primary_info(self, hostname: str | None, /) -> None: ...
    def set_lag_ms(self, lag_ms: int | None, /) -> None: ...
    def all_names(self) -> list[str]:
        """Every database that has a position, deleted ones too."""

    def get(self, name: str, /) -> Database | None: ...
    def get_or_create(self, name: str, /) -> Database: ...
    def tombstones(self) -> Mapping[str, Tombstone]:
        """Of all names that have one; it says nothing where there is a database. Ask for the databases first."""

    def tombstone(self, name: str, /) -> Tombstone | None: ...
    def recall(self, name: str, /) -> Database | None:
        """As `get`; one of which only a tombstone is left is made again from that. Blocking."""

    def note_dropped(self, name: str, position: Position, epochs: Epochs, /) -> bool:
        """[W] On a replica that has nothing of a database which the primary dropped: note where it ended. False if
        there is something of it, or that is not the position of a drop."""

    def keep_tombstones(self) -> None:
        """What was noted is durable. Blocking. OSError."""

    @property
    def forgetting(self) -> Forgetting:
        """Of databases that were dropped, and are old enough."""

    def give_back(self, name: str, data: bytes | str, /) -> Position:
        """[W] On a primary that takes no writes yet: append a transaction (an LTX file, or the path of one) that it had
        lost. FormatError and PositionMismatch change nothing."""

    def adopt_txid(self, name: str, position: Position, /) -> Position:
        """[W] On a primary that takes no writes yet: go on from a higher TXID with the content that is here.
        PositionMismatch if that has another checksum."""

    def set_aside(self, name: str, reason: str, /) -> None:
        """[W] On a replica: keep a database that the primary never had in lost/."""


class Forgetting(Protocol):
    """What the engine keeps of databases that were dropped, and for how long."""

    needs_drop: Callable[[str], bool]
    """Set by the primary's end: whether a connected replica lacks the newest transaction of a database. Called on the
    worker."""


if TYPE_CHECKING:
    from pylitefs.engine.loan import Agreed, Loan
    from pylitefs.engine.store import Store as EngineStore

    def _implements(store: EngineStore) -> Store:
        return store


# --- the wire --------------------------------------------------------------------------------------------------------


class LinkClosed(Unavailable):
    """The connection has ended. `clean`: the other side closed it in good order."""

    def __init__(self, reason: str, clean: bool = False) -> None:
        super().__init__(reason)
        self.clean = clean


class Link(Protocol):
    """A connection that carries whole messages, in order, each at most once.

    After the connection is gone every call raises LinkClosed. A message over the limit raises ProtocolError and closes.
    """

    @property
    def peer(self) -> str:
        """HOST:PORT of the other side."""

    async def send(self, data: bytes) -> None:
        """Waits while the other side does not read (back-pressure). One caller at a time."""

    async def receive(self) -> bytes: ...

    async def close(self) -> None:
        """Send what was accepted, then close; does not take longer than a second. Never raises."""
