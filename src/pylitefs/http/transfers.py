"""Whole databases over HTTP: `GET /export` and `POST /import`.

An export is a consistent copy, made beside the databases in a file that has no name any more when its first byte is
sent. An import is received into a file of its own, checked there, and only then handed over; whatever goes wrong
before that changes nothing. What a killed process left behind is removed at the next start.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from urllib.parse import quote

from aiohttp import web

from pylitefs.errors import DatabaseNotFound, FormatError, NotADatabase, ReadOnlyReplica, Unavailable
from pylitefs.formats.sqlite.header import HEADER_SIZE, MAGIC, DatabaseHeader
from pylitefs.http.errors import HttpProblem
from pylitefs.http.queries import checked_name, name_in
from pylitefs.status import StoreView

log = logging.getLogger(__name__)

Importer = Callable[[str, str], object]
"""(name, path): replace the database `name` by the checked SQLite file at `path`, which may be moved away.

Called on a thread of its own; blocks until the transaction is in the log. Raises LitefsError."""

SEND_TIMEOUT_S = 60.0  # for one chunk to leave or to arrive: a peer that is slower is cut off
_CHUNK_BYTES = 1 << 18
_MAX_TRANSFERS = 4
_PREFIX, _SUFFIX = "transfer-", ".tmp"
_STEPS_BETWEEN_LOOKS = 100_000  # virtual machine steps of SQLite: some milliseconds
_MISSING = re.compile(r"no such (collation sequence|function): (\S+)")

T = TypeVar("T")


class Transfers:
    """Exports and imports of one store, a few at a time."""

    def __init__(self, store: StoreView, importer: Importer, max_import_size_bytes: int) -> None:
        self._store = store
        self._importer = importer
        self._max_size_bytes = max_import_size_bytes  # 0: no limit
        self._threads = ThreadPoolExecutor(_MAX_TRANSFERS, thread_name_prefix="transfer")
        self._closing = threading.Event()
        self._slots = asyncio.Semaphore(_MAX_TRANSFERS)

    def remove_leftovers(self) -> None:
        """Remove what a process that was killed during a transfer left in the data directory."""
        with os.scandir(self._store.data_dir) as entries:
            for entry in entries:
                if entry.name.startswith(_PREFIX) and entry.name.endswith(_SUFFIX) and entry.is_file():
                    os.unlink(entry.path)

    def close(self) -> None:
        """Stop checking what is being imported; new transfers fail."""
        self._closing.set()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, function: Callable[..., T], *args: object) -> T:
        """Call it on a thread. Not left before the thread is done, for it uses our files."""
        future = asyncio.get_running_loop().run_in_executor(self._threads, function, *args)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise

    # --- export ------------------------------------------------------------------------------------------------------

    async def export(self, request: web.Request) -> web.StreamResponse:
        name = checked_name(name_in(request.rel_url.raw_query_string))
        async with self._slots:
            fd, position = await self._in_thread(self._copy, name)
            try:
                response = web.StreamResponse(
                    headers={"Content-Type": "application/octet-stream", "Litefs-Position": position}
                )
                response.content_length = os.fstat(fd).st_size
                await response.prepare(request)
                while chunk := await self._in_thread(os.read, fd, _CHUNK_BYTES):
                    await asyncio.wait_for(response.write(chunk), SEND_TIMEOUT_S)
                await asyncio.wait_for(response.write_eof(), SEND_TIMEOUT_S)
            finally:
                os.close(fd)
        return response

    def _copy(self, name: str) -> tuple[int, str]:
        """A nameless file with a consistent copy of the database, and its position as text."""
        if name not in self._store.names():
            raise DatabaseNotFound(name)
        database = self._store.get(name)
        if database is None:
            raise DatabaseNotFound(name)
        with temporary_file(self._store.data_dir) as path:
            position = database.copy_to(path)
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC), str(position)

    # --- import ------------------------------------------------------------------------------------------------------

    async def import_(self, request: web.Request) -> web.StreamResponse:
        name = checked_name(name_in(request.rel_url.raw_query_string))
        if not self._store.is_primary:
            raise ReadOnlyReplica
        self._check_size(request.content_length or 0)
        async with self._slots:
            with temporary_file(self._store.data_dir) as path:
                await self._receive(request, path)
                await self._in_thread(check_database, path, self._closing.is_set)
                if not self._store.is_primary:  # it may have changed while we read
                    raise ReadOnlyReplica
                await self._in_thread(self._importer, name, path)
        log.info("database imported", extra={"database": name})
        return web.Response()

    async def _receive(self, request: web.Request, path: str) -> None:
        received = 0
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            while chunk := await read_chunk(request):
                received += len(chunk)
                self._check_size(received)
                await self._in_thread(write_all, fd, chunk)
        finally:
            os.close(fd)

    def _check_size(self, size_bytes: int) -> None:
        check_size(size_bytes, self._max_size_bytes)


# --- receiving -------------------------------------------------------------------------------------------------------


async def read_chunk(request: web.Request) -> bytes:
    """The next piece of a body, empty at its end. TimeoutError when none comes, an error when the body breaks off."""
    return await asyncio.wait_for(request.content.read(_CHUNK_BYTES), SEND_TIMEOUT_S)


def check_size(size_bytes: int, max_size_bytes: int) -> None:
    """Refuse a body above the limit of the configuration; 0: none."""
    if max_size_bytes and size_bytes > max_size_bytes:
        raise HttpProblem(413, f"larger than {max_size_bytes} bytes, the limit of this node (http.max-import-size)")


@contextlib.contextmanager
def temporary_file(data_dir: str) -> Iterator[str]:
    """An empty file on the file system of the databases; its name is gone at the end, whatever happens."""
    fd, path = tempfile.mkstemp(prefix=_PREFIX, suffix=_SUFFIX, dir=data_dir)
    os.close(fd)
    try:
        yield path
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def write_all(fd: int, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


# --- checking a file that wants to become a database -----------------------------------------------------------------


def check_database(path: str, cancelled: Callable[[], bool] = lambda: False) -> None:
    """Raise NotADatabase unless the file is a whole, sound SQLite database that needs no other file.

    Checks the header, the size, and everything that `PRAGMA quick_check` does. Opened as immutable, so that neither
    a journal nor a WAL is looked for, and nothing is written. Raises Unavailable soon after `cancelled` says so.
    """
    size_bytes = os.path.getsize(path)
    with open(path, "rb") as file:
        prefix = file.read(HEADER_SIZE)
    if len(prefix) < HEADER_SIZE:
        raise NotADatabase(f"not a SQLite database: it has {len(prefix)} bytes" if prefix else "it is empty")
    try:
        header = DatabaseHeader.unpack(prefix)
    except FormatError as error:
        hint = "" if prefix.startswith(MAGIC) else " (an SQL dump has to be read with sqlite3 first)"
        raise NotADatabase(f"{error}{hint}") from None
    if size_bytes % header.page_size:
        raise NotADatabase(
            f"not a whole SQLite database: it ends within a page ({size_bytes} bytes, pages of {header.page_size}): "
            "copy it again"
        )
    if header.page_count_valid and header.page_count * header.page_size > size_bytes:
        raise NotADatabase(
            f"not a whole SQLite database: it ends after {size_bytes // header.page_size} of its {header.page_count} "
            "pages: copy it again"
        )
    problem = _quick_check(path, cancelled)
    if problem is not None:
        raise NotADatabase(
            f"a damaged SQLite database ({problem}): was it copied while it was in use? sqlite3 FILE '.backup COPY' "
            "makes a sound copy"
        )


def _quick_check(path: str, cancelled: Callable[[], bool]) -> str | None:
    """The first thing that is wrong with the database, None if nothing is."""
    connection = sqlite3.connect(f"file:{quote(path)}?mode=ro&immutable=1", uri=True, isolation_level=None)
    try:
        connection.set_progress_handler(cancelled, _STEPS_BETWEEN_LOOKS)
        connection.execute("PRAGMA cell_size_check = ON")
        for _ in range(64):
            try:
                row = connection.execute("PRAGMA quick_check(1)").fetchone()
            except sqlite3.DatabaseError as error:
                if cancelled():
                    raise Unavailable("this node is stopping") from None
                if not _stand_in(connection, str(error)):
                    return str(error)
            else:
                return None if row == ("ok",) else str(row[0] if row else "no result")
        return "too many unknown functions"
    finally:
        connection.close()


def _stand_in(connection: sqlite3.Connection, message: str) -> bool:
    """Define what an application defines for itself and the schema uses, if that is what `message` misses."""
    match = _MISSING.search(message)
    if match is None:
        return False
    if match[1] == "function":
        connection.create_function(match[2].removesuffix("()"), -1, lambda *_: None, deterministic=True)
    else:
        connection.create_collation(match[2], lambda left, right: (left > right) - (left < right))
    return True
