"""Transactions that a replica has and the primary has not: taken in, in one of two ways.

A primary that takes no writes yet has perhaps lost them, and takes each as it comes (`recovery_wait`). One that takes
writes takes only what follows its head exactly. That is collected first, and not more than LIMIT_BYTES of it; then the
writers of this one database are locked out for a moment, and if none of them was faster, it is appended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import BinaryIO

from pylitefs.cluster.outlet import Outlet
from pylitefs.cluster.ports import Store
from pylitefs.cluster.roles import Refused
from pylitefs.errors import DatabaseBusy, FormatError, LitefsError, PositionMismatch, Unavailable
from pylitefs.formats.ltx.decoder import verify_stream
from pylitefs.formats.ltx.format import Header, Position, Trailer
from pylitefs.formats.stream import Ltx, LtxBegin, LtxData, LtxEnd, Message, TailEnd
from pylitefs.formats.stream_fields import ErrorCode

log = logging.getLogger("litefs.replication")

LIMIT_BYTES = 64 << 20
LIMIT_FILES = 10_000
RECEIVE_S = 30.0
"""How long the replica may take to send it."""

LOCK_S = 0.5
"""How long a transaction of the application is waited for."""

APPEND_S = 2.0
"""How long the writers may be locked out; what is not appended then is asked for once more."""

_LOOK_S = 0.02
_CHUNK_BYTES = 1 << 20

Take = Callable[[bytes | str], Awaitable[object]]
"""One LTX file, as bytes or as the path of a file that goes when the call is over."""


class TooMuch(LitefsError):
    """More than is taken while applications wait."""


async def adopt(outlet: Outlet, name: str, position: Position) -> bool:
    """Go on from the TXID of a replica whose content is the same. False if that cannot be."""
    store = outlet.store
    try:
        await asyncio.wrap_future(store.worker.submit(store.adopt_txid, name, position))
    except (LitefsError, OSError) as error:
        log.warning("%s: the replica's TXID cannot be adopted: %s", name, error)
    database = store.get(name)
    return database is not None and database.log.head.txid >= position.txid


class TailReceiver:
    """Takes in the transactions that one replica gives back for one database."""

    def __init__(self, outlet: Outlet, queue: asyncio.Queue[Message], take: Take) -> None:
        self._outlet, self._queue, self._hand_on = outlet, queue, take
        self._problem: str | None = None
        self._file: BinaryIO | None = None
        self._left = 0

    async def run(self) -> str | None:
        """Until the replica has sent its last; what went wrong, or None. After a problem the rest is thrown away."""
        try:
            while not isinstance(message := await self._queue.get(), TailEnd):
                if self._problem is None:
                    await self._take(message)
            return self._problem if message.given else self._problem or "its log does not go on from there"
        finally:
            self._forget_file()

    async def _take(self, message: Message) -> None:
        try:
            match message:
                case Ltx(_, data):
                    await self._hand_on(data)
                case LtxBegin(_, _, _, size):
                    self._forget_file()
                    self._left = size
                    self._file = await self._outlet.blocking(temporary, self._outlet.store.data_dir)
                case LtxData(_, data) if self._file is not None and len(data) <= self._left:
                    self._left -= len(data)
                    await self._outlet.blocking(self._file.write, data)
                case LtxEnd(_, whole) if self._file is not None:
                    if not whole or self._left:
                        raise FormatError("a transaction came in part only")
                    await self._outlet.blocking(self._file.flush)
                    await self._hand_on(self._file.name)
                    self._forget_file()
                case _:
                    raise Refused(ErrorCode.PROTOCOL, f"{type(message).__name__} out of order")
        except (LitefsError, OSError) as error:
            if isinstance(error, Refused):
                raise
            self._problem = str(error)

    def _forget_file(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._file.name)
            self._file = None


def temporary(folder: str) -> BinaryIO:
    """A file for one transaction; what a crash leaves of it begins with "give-back-" and ends with ".tmp"."""
    handle, path = tempfile.mkstemp(prefix="give-back-", suffix=".tmp", dir=folder)
    os.close(handle)
    return open(path, "wb")


class NextTransactions:
    """What follows the head of a primary that takes writes. Use it as a context manager: its files go with it."""

    def __init__(self, outlet: Outlet, name: str, after: Position) -> None:
        self._outlet, self._name, self._after = outlet, name, after
        self._paths: list[str] = []
        self._size_bytes = 0
        self._is_appending = False

    def __enter__(self) -> NextTransactions:
        return self

    def __exit__(self, *error: object) -> None:
        if not self._is_appending:  # else its thread, which cannot be stopped, removes them
            _remove(self._paths)

    async def collect(self, queue: asyncio.Queue[Message]) -> str | None:
        """Until the replica has sent its last; what went wrong, or None."""
        try:
            async with asyncio.timeout(RECEIVE_S):
                return await TailReceiver(self._outlet, queue, self._keep).run()
        except TimeoutError:
            raise Refused(ErrorCode.TOO_SLOW, f"it has not given back its transactions in {RECEIVE_S:g} s") from None

    async def _keep(self, data: bytes | str) -> None:
        size = len(data) if isinstance(data, bytes) else await self._outlet.blocking(os.path.getsize, data)
        self._size_bytes += size
        if self._size_bytes > LIMIT_BYTES or len(self._paths) >= LIMIT_FILES:
            raise TooMuch(f"more than {LIMIT_BYTES >> 20} MB")
        self._paths.append(await self._outlet.blocking(_copy, self._outlet.store.data_dir, data))

    async def append(self) -> None:
        """Append what was collected. Unavailable if a transaction of the application is open (try again);
        PositionMismatch if the database has moved; FormatError, OSError."""
        self._is_appending = True
        await self._outlet.blocking(
            _append, self._outlet.store, self._name, self._after, self._paths, self._outlet.epoch
        )


def _copy(folder: str, data: bytes | str) -> str:
    with temporary(folder) as file:
        try:
            if isinstance(data, bytes):
                file.write(data)
            else:
                with open(data, "rb") as source:
                    while chunk := source.read(_CHUNK_BYTES):
                        file.write(chunk)
        except OSError:
            _remove([file.name])
            raise
        return file.name


def _remove(paths: Sequence[str]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            os.unlink(path)


@contextlib.contextmanager
def writers_out(store: Store, name: str) -> Iterator[None]:
    """On a primary that takes writes: nobody but the daemon writes this database. Unavailable if that is not possible
    now. Blocking, in a thread that goes on to its end whatever happens: so the writers are let in again."""
    before = store.get(name)
    if before is not None and not before.captures:
        raise Unavailable(f"{name}: another node holds its HALT lock")
    try:
        if not store.demote_database(name, LOCK_S):
            raise Unavailable(f"{name}: a transaction is open")
        yield
    finally:
        store.promote_database(name)


def _append(store: Store, name: str, after: Position, paths: Sequence[str], epoch: int) -> None:
    try:
        drops = _check_chain(after, paths, epoch)
        if all(drops):
            raise PositionMismatch(f"{name}: it was dropped there; its rows may be nowhere else, so it stays")
        last = max(at for at, is_drop in enumerate(drops) if not is_drop)
        until_s = time.monotonic() + LOCK_S + APPEND_S
        with writers_out(store, name):
            database = store.get(name)
            if database is None or not database.log.head.is_at(after):
                raise PositionMismatch(f"{name}: it was written to since {after}")
            for at, path in enumerate(paths[: last + 1]):
                if time.monotonic() > until_s and not (at and drops[at - 1]):
                    break
                _apply(store, name, path, until_s)
    finally:
        _remove(paths)


def _apply(store: Store, name: str, path: str, until_s: float) -> None:
    """As soon as nobody is in its way (who reads a database that gets another page size)."""
    while True:
        try:
            store.worker.submit(store.apply_as_primary, name, path).result()
            return
        except DatabaseBusy:
            if time.monotonic() > until_s:
                raise
        time.sleep(_LOOK_S)


def _check_chain(after: Position, paths: Sequence[str], epoch: int) -> list[bool]:
    """Before anybody waits for it: whole files, each following the one before, of no later epoch than ours. Which of
    them are drops: a database that was renamed ends with one, and this node may know its content by the old name only.
    """
    at, drops = after, []
    for path in paths:
        with open(path, "rb") as file:
            header, trailer = verify_stream(iter(lambda: file.read(_CHUNK_BYTES), b""))
        at = _next(at, header, trailer, epoch)
        drops.append(not header.commit)
    return drops


def _next(at: Position, header: Header, trailer: Trailer, epoch: int) -> Position:
    if header.pre_apply_position != at or not header.has_checksums:
        raise PositionMismatch(f"a transaction for position {header.pre_apply_position} does not follow {at}")
    if not at.epoch <= header.epoch <= epoch:
        raise PositionMismatch(f"a transaction of epoch {header.epoch} does not follow one of epoch {at.epoch}")
    return Position(header.max_txid, trailer.post_apply_checksum, header.epoch)
