"""An engine in memory for tests of replication: pages in a dict, but real LTX files in a real log and a real worker."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from pylitefs.engine.epochs import Lines
from pylitefs.engine.loan import Loan
from pylitefs.engine.ltx_log import EMPTY, LtxLog, Pin
from pylitefs.engine.tombstones import Tombstone, Tombstones
from pylitefs.engine.worker import Worker
from pylitefs.errors import ClusterMismatch, FormatError, PositionMismatch
from pylitefs.events import Event, EventBus
from pylitefs.formats.ltx.checksum import database_checksum, page_checksum
from pylitefs.formats.ltx.decoder import Ltx, decode
from pylitefs.formats.ltx.encoder import encode
from pylitefs.formats.ltx.format import CHECKSUM_FLAG, Header, Position
from pylitefs.ports import Moved

T = TypeVar("T")
PAGE = 512
CLUSTER = "LFSC0123456789ABCDEF"
Faults = Callable[[str], None]
"""Called with the name of what is about to be done on disk; may raise OSError."""


class FakeDatabase:
    moves: tuple[Moved, ...] = ()

    def __init__(self, store: FakeStore, name: str) -> None:
        self.store, self.name = store, name
        self.folder = Path(store.data_dir) / name
        self.folder.mkdir(exist_ok=True)
        self.log = LtxLog(str(self.folder / "ltx"))
        self.log.open(verify=True)
        self.pages: dict[int, bytes] = {}
        self.commit = 0
        self.page_size = PAGE
        self.position = EMPTY
        self.set_aside_reason: str | None = None
        self.is_damaged = False
        self.demoted = False
        self.loan: Loan | None = None
        self.durable_txid = 0
        self.lost: list[tuple[int, int]] = []
        self.kept_pages: set[bytes] = set()
        for entry in self.log.entries():
            self._install(decode(Path(entry.path).read_bytes()))

    @property
    def size_bytes(self) -> int:
        return self.commit * self.page_size

    @property
    def captures(self) -> bool:
        return self.store.is_primary and not self.demoted

    # --- writing ----------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        return self.log.head.epoch

    def write(self, pages: dict[int, bytes], commit: int | None = None) -> Position:
        """A transaction of the application."""
        while self.demoted:
            time.sleep(0.001)  # SQLite's busy timeout
        return self.store.worker.submit(self._write, pages, commit).result()

    def _write(self, pages: dict[int, bytes], commit: int | None) -> Position:
        size = max(self.commit, *pages) if commit is None else commit
        after = {number: page for number, page in {**self.pages, **pages}.items() if number <= size}
        header = Header(
            flags=0,
            page_size=self.page_size,
            commit=size,
            min_txid=self.position.txid + 1,
            max_txid=self.position.txid + 1,
            timestamp_ms=int(time.time() * 1000),
            pre_apply_checksum=self.position.checksum,
            epoch=self.store.epoch,
        )
        data = encode(header, sorted(pages.items()), checksum_of(after, size))
        return self._take(data)

    def drop(self) -> Position:
        return self.write({}, 0)

    def has_moved(self, moved: Moved) -> None:
        self.moves = (*self.moves, moved)

    def _take(self, data: bytes) -> Position:
        ltx = decode(data)
        self._log(data, ltx)
        self._install(ltx)
        self.store.events.emit(Event("tx", self.name, {"txid": self.position.txid}))
        return self.position

    def _log(self, data: bytes, ltx: Ltx) -> None:
        self.store.fault("log")
        path = self.log.temporary()
        Path(path).write_bytes(data)
        self.log.publish(path, ltx.header, ltx.trailer.post_apply_checksum)

    def _install(self, ltx: Ltx) -> None:
        self.commit, self.page_size = ltx.header.commit, ltx.header.page_size
        self.pages = {number: page for number, page in self.pages.items() if number <= self.commit} | dict(ltx.pages)
        self.position = Position(ltx.header.max_txid, ltx.trailer.post_apply_checksum, ltx.header.epoch)

    def forget_log(self) -> None:
        """Retention: everything but the newest entry."""
        self.log.retain(0, 1)

    # --- replication ------------------------------------------------------------------------------------------------

    def flush(self) -> Future[Position]:
        return self.store.worker.submit(lambda: self.position)

    def page_checksums(self) -> npt.NDArray[np.uint64]:
        return np.array([page_checksum(n, self.pages[n]) for n in range(1, self.commit + 1)], dtype=np.uint64)

    def file_checksums(self) -> npt.NDArray[np.uint64]:
        return self.page_checksums()

    def snapshot(self, known: npt.NDArray[np.uint64] | None) -> FakeReader:
        return FakeReader(self, known)

    def apply(self, data: bytes, *, spare_readers: bool = False) -> Position:
        ltx = decode(data)
        if ltx.header.pre_apply_position != self.position:
            raise PositionMismatch(f"{ltx.header.pre_apply_position} is not {self.position}")
        return self._take(data)

    def receive(self, min_txid: int, max_txid: int) -> FakeIncoming:
        return FakeIncoming(self)

    def resync(self, page_size: int, keep_branch_after: int | None) -> FakeResync:
        return FakeResync(self, page_size, keep_branch_after)

    def log_durable(self) -> int | None:
        return None

    def durable(self) -> int:
        self.durable_txid = self.position.txid
        return self.durable_txid


def checksum_of(pages: dict[int, bytes], commit: int) -> int:
    sums = np.array([page_checksum(number, pages[number]) for number in range(1, commit + 1)], dtype=np.uint64)
    return database_checksum(sums)


class FakeReader:
    def __init__(self, database: FakeDatabase, known: npt.NDArray[np.uint64] | None) -> None:
        self.database, self.known = database, known
        self.start = database.flush().result()
        self.pin: Pin = database.log.pin(self.start.txid)
        self.page_size, self.commit = database.page_size, database.commit
        self.next = 1

    def next_chunk(self) -> list[tuple[int, bytes]] | None:
        if self.next > self.commit:
            return None
        first, self.next = self.next, self.next + 4
        time.sleep(0.0005)
        chunk = []
        for number in range(first, min(self.next, self.commit + 1)):
            page = self.database.pages.get(number)
            known = self.known[number - 1] if self.known is not None and number <= len(self.known) else 0
            if page is not None and page_checksum(number, page) != known:
                chunk.append((number, page))
        self.database.store.pages_sent += len(chunk)
        return chunk

    def close(self) -> None:
        self.pin.close()


class FakeIncoming:
    def __init__(self, database: FakeDatabase) -> None:
        self.database, self.data = database, bytearray()

    def write(self, data: bytes) -> None:
        self.database.store.fault("write")
        self.data += data

    def finish(self, *, spare_readers: bool = False) -> Position:
        return self.database.apply(bytes(self.data))

    def abort(self) -> None:
        self.data.clear()


class FakeResync:
    def __init__(self, database: FakeDatabase, page_size: int, keep: int | None) -> None:
        self.database, self.page_size, self.keep = database, page_size, keep
        self.received: dict[int, bytes] = {}

    def pages(self, pages: list[tuple[int, bytes]]) -> None:
        self.database.store.fault("write")
        self.received.update(pages)

    def transaction(self, data: bytes) -> None:
        self.pages(list(decode(data).pages))

    def finish(self, commit: int, position: Position, epochs: Lines) -> Position:
        database = self.database
        pages = {n: p for n, p in {**database.pages, **self.received}.items() if n <= commit}
        if len(pages) != commit or checksum_of(pages, commit) != position.checksum:
            raise FormatError("the snapshot does not add up")
        if self.keep is not None:
            database.lost += [(e.min_txid, e.max_txid) for e in database.log.entries() if e.max_txid > self.keep]
            folder = database.folder / "lost" / str(len(database.lost))
            folder.mkdir(parents=True, exist_ok=True)
            database.log.keep_branch(self.keep, str(folder))
            if database.log.first_txid > self.keep + 1:  # the log does not hold all of it
                database.kept_pages.update(database.pages.values())
        database.pages, database.commit, database.page_size = pages, commit, self.page_size
        database.position = position
        database.log.restart_at(position, epochs)
        database.store.resyncs += 1
        database.store.events.emit(Event("resync", database.name))
        return position

    def abort(self) -> None:
        self.received.clear()


class FakeStore:
    """`fault` is called before everything that writes. Close it: it owns a thread."""

    def __init__(self, data_dir: Path, *, is_primary: bool) -> None:
        self.data_dir = str(data_dir)
        data_dir.mkdir(exist_ok=True)
        self.is_primary = is_primary
        self.epoch = 1
        self.noted_epoch = 0
        self.cluster_id: str | None = CLUSTER if is_primary else None
        self.events = EventBus()
        self.worker = Worker()
        self.worker.start()
        self.fault: Faults = lambda what: None
        self.primary_hostname: str | None = None
        self.lag_ms: int | None = None
        self.resyncs = 0
        self.pages_sent = 0
        self.seen: list[Event] = []
        self.events.subscribe(self.seen.append)
        self.databases: dict[str, FakeDatabase] = {}
        self._tombstones = Tombstones(self.data_dir)
        self._tombstones.load()
        self.needs_drop: Callable[[str], bool] = lambda name: False
        for folder in sorted(data_dir.iterdir()):
            if folder.is_dir():
                self.get_or_create(folder.name)

    def close(self) -> None:
        self.worker.stop()

    def reopened(self, lose: int = 0) -> FakeStore:
        """The store after a crash that lost the newest `lose` log entries of each database."""
        self.close()
        for database in self.databases.values():
            for entry in database.log.entries()[-lose:] if lose else []:
                os.unlink(entry.path)
        again = FakeStore(Path(self.data_dir), is_primary=self.is_primary)
        again.cluster_id, again.epoch, again.noted_epoch = self.cluster_id, self.epoch, self.noted_epoch
        return again

    @property
    def seen_epoch(self) -> int:
        return max([self.noted_epoch, *(database.epoch for database in self.databases.values())])

    def note_epoch(self, epoch: int) -> None:
        self.fault("epoch")
        self.noted_epoch = max(epoch, self.noted_epoch)

    def demote_database(self, name: str, timeout_s: float) -> bool:
        self.databases[name].demoted = True
        self.worker.submit(lambda: None).result()
        return True

    def promote_database(self, name: str) -> None:
        self.databases[name].demoted = False

    def apply_as_primary(self, name: str, data: bytes | str) -> Position:
        assert self.databases[name].demoted
        return self.give_back(name, data)

    @property
    def has_databases(self) -> bool:
        return bool(self.databases) or len(self._tombstones) > 0

    def adopt_cluster_id(self, cluster_id: str) -> None:
        if self.cluster_id not in (None, cluster_id) and self.has_databases:
            raise ClusterMismatch("another cluster")
        self.cluster_id = cluster_id

    def set_primary_info(self, hostname: str | None) -> None:
        self.primary_hostname = hostname

    def set_lag_ms(self, lag_ms: int | None) -> None:
        self.lag_ms = lag_ms

    def all_names(self) -> list[str]:
        return sorted(name for name, database in list(self.databases.items()) if database.position.txid)

    def get(self, name: str) -> FakeDatabase | None:
        return self.databases.get(name)

    def get_or_create(self, name: str) -> FakeDatabase:
        if name not in self.databases:
            database = self.databases[name] = FakeDatabase(self, name)
            tombstone = self._tombstones.get(name)
            if tombstone is not None and database.log.head.txid < tombstone.position.txid:
                database.log.restart_at(tombstone.position, tombstone.epochs, durably=False)
                database.position, database.moves = tombstone.position, tombstone.moves
        return self.databases[name]

    # --- names that were dropped long ago ---------------------------------------------------------------------------

    @property
    def forgetting(self) -> FakeStore:
        return self

    def forget(self, name: str) -> bool:
        """Where the drop is old enough. False if it is needed."""
        return self.worker.submit(self._forget, name).result()

    def _forget(self, name: str) -> bool:
        database = self.databases[name]
        assert not database.commit and database.position == database.log.head
        if self.needs_drop(name):
            return False
        self._tombstones.put({name: Tombstone(database.log.head, database.log.epochs(), database.moves)})
        self._tombstones.save()
        del self.databases[name]
        shutil.rmtree(database.folder)
        return True

    def tombstones(self) -> dict[str, Tombstone]:
        return self._tombstones.copy()

    def tombstone(self, name: str) -> Tombstone | None:
        return self._tombstones.get(name)

    def recall(self, name: str) -> FakeDatabase | None:
        return self.get_or_create(name) if name in self._tombstones else self.get(name)

    def note_dropped(self, name: str, position: Position, epochs: Lines) -> bool:
        if name in self.databases or position.checksum != CHECKSUM_FLAG:
            return False
        self._tombstones.put({name: Tombstone(position, epochs)})
        return True

    def keep_tombstones(self) -> None:
        self._tombstones.save()

    def give_back(self, name: str, data: bytes | str) -> Position:
        return self.get_or_create(name).apply(data if isinstance(data, bytes) else Path(data).read_bytes())

    def adopt_txid(self, name: str, position: Position) -> Position:
        database = self.databases[name]
        if database.position.checksum != position.checksum:
            raise PositionMismatch("another content")
        database.position = position
        database.log.restart_at(position)
        return position

    def rename(self, old: str, new: str) -> None:
        """As `Naming.rename`: the content is recorded under the new name, then the drop under the old one."""
        self.worker.submit(self._rename, self.databases[old], self.get_or_create(new)).result()

    def _rename(self, source: FakeDatabase, target: FakeDatabase) -> None:
        target._write(source.pages, source.commit)
        source.has_moved(Moved(target.name, target.position.txid, source.position.txid))
        source._write({}, 0)

    def set_aside(self, name: str, reason: str) -> None:
        database = self.databases.pop(name, None)
        self._tombstones.put({name: None})
        if database is not None:
            shutil.rmtree(database.folder)
            self.events.emit(Event("lost", name, {"reason": reason}))

    def contents(self) -> dict[str, tuple[Position, dict[int, bytes]]]:
        """Of every name, also those of which only a tombstone is left: that is a database that was dropped."""
        found: dict[str, tuple[Position, dict[int, bytes]]] = {
            name: (stone.position, {}) for name, stone in self._tombstones.copy().items()
        }
        for name in self.all_names():
            found[name] = (self.databases[name].position, dict(self.databases[name].pages))
        return found


def page(rng: random.Random, size: int = PAGE, noise: bool = False) -> bytes:
    """A page that compresses, or one of `noise` that does not."""
    return rng.randbytes(size) if noise else rng.randbytes(16) * (size // 16)
