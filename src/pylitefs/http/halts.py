"""HALT locks over HTTP, as LiteFS has them: a node that holds one writes a database of the primary from elsewhere.

    POST    /halt  ?name=DATABASE&id=N         take it; again with the same id: the same lock
    PUT     /halt  ?name=DATABASE&id=N         hold it for another while
    DELETE  /halt  ?name=DATABASE&id=N         let go of it
    POST    /tx    ?name=DATABASE&lockID=N     a transaction, an LTX file, that was written under it

Every request names its node in the header Litefs-Id. Litefs-Epoch is the epoch in which the lock was taken: another
one than the primary's is refused, 409 if it is over, 421 if this primary is. /tx needs it, the others may have it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Coroutine
from typing import Any

from aiohttp import web

from pylitefs.cluster.control import Control, Halts
from pylitefs.cluster.tasks import blocking
from pylitefs.errors import Ineligible, NotPrimary, UsageError
from pylitefs.formats.ltx.format import Position
from pylitefs.http.cluster_documents import halt_document, position_answer
from pylitefs.http.queries import checked_name, name_in, parse_epoch, parse_lock_id, parse_node_id
from pylitefs.http.route import Route, json_answer
from pylitefs.http.transfers import check_size, read_chunk, temporary_file, write_all
from pylitefs.http.waiting import Waiting

EPOCH_HEADER = "Litefs-Epoch"
ID_HEADER = "Litefs-Id"
HALT_TIMEOUT_S = 30.0
SMALL_TIMEOUT_S = 30.0  # for the first megabyte of a transaction to arrive
TRANSACTION_TIMEOUT_S = 120.0  # to apply it, once it is here; not cut off then
MEMORY_BYTES = 1 << 20
"""A larger transaction is received into a file."""
MAX_TRANSACTIONS = 8
"""In files at the same time; others wait."""


class HaltRoutes:
    """The routes of one node. `node_id` is its own, as text."""

    def __init__(
        self, halts: Halts, control: Control, waiting: Waiting, data_dir: str, node_id: str, max_body_bytes: int
    ) -> None:
        self._halts = halts
        self._control = control
        self._waiting = waiting
        self._data_dir = data_dir
        self._node_id = int(node_id, 16)
        self._max_body_bytes = max_body_bytes
        self._slots = asyncio.Semaphore(MAX_TRANSACTIONS)
        self.routes = (
            Route("POST", "/halt", self.acquire),
            Route("PUT", "/halt", self.renew),
            Route("DELETE", "/halt", self.release),
            Route("POST", "/tx", self.transaction),
        )

    async def acquire(self, request: web.Request) -> web.Response:
        name, lock_id, caller = self._lock_of(request, "id")
        late = f'the HALT lock of "{name}" was not to be had within {HALT_TIMEOUT_S:g} s'
        work = self._halts.acquire(name, lock_id, caller)
        return json_answer(halt_document(await self._waiting.finish(request, work, HALT_TIMEOUT_S, late)))

    async def renew(self, request: web.Request) -> web.Response:
        name, lock_id, _ = self._lock_of(request, "id")
        work = self._halts.renew(name, lock_id)
        lock = await self._waiting.finish(request, work, HALT_TIMEOUT_S, "not renewed in time")
        return json_answer(halt_document(lock))

    async def release(self, request: web.Request) -> web.Response:
        name, lock_id, _ = self._lock_of(request, "id")
        work = self._halts.release(name, lock_id)
        await self._waiting.finish(request, work, HALT_TIMEOUT_S, "not released in time", goes_on=True)
        return web.Response()

    async def transaction(self, request: web.Request) -> web.Response:
        name, lock_id, _ = self._lock_of(request, "lockID")
        epoch = parse_epoch(request.headers.get(EPOCH_HEADER), EPOCH_HEADER)
        check_size(request.content_length or 0, self._max_body_bytes)
        async with asyncio.timeout(SMALL_TIMEOUT_S):
            data, more = await self._receive_start(request)
        if not more:
            self._check_epoch(epoch)  # it may have changed while we read
            return await self._apply(request, name, self._halts.transaction(name, lock_id, epoch, bytes(data)))
        async with self._slots:
            with contextlib.ExitStack() as stack:
                path = stack.enter_context(temporary_file(self._data_dir))
                await self._receive_rest(request, path, data)
                self._check_epoch(epoch)
                work = self._apply_file(name, lock_id, epoch, path, stack.pop_all())
            return await self._apply(request, name, work)

    # --- parts -------------------------------------------------------------------------------------------------------

    def _lock_of(self, request: web.Request, key: str) -> tuple[str, int, int]:
        """(database, lock id, caller) of a request, whose epoch must be ours."""
        name = checked_name(name_in(request.rel_url.raw_query_string))
        lock_id = parse_lock_id(request.query, key)
        caller = parse_node_id(request.headers.get(ID_HEADER), ID_HEADER)
        if caller == self._node_id:
            raise UsageError("a node cannot take a HALT lock from itself: Litefs-Id is this node's")
        if EPOCH_HEADER in request.headers:
            self._check_epoch(parse_epoch(request.headers[EPOCH_HEADER], EPOCH_HEADER))
        return name, lock_id, caller

    def _check_epoch(self, epoch: int) -> None:
        view = self._control.view()
        if epoch < view.epoch:
            raise Ineligible(f"epoch {epoch} is over, this is {view.epoch}: the HALT lock has ended, take it again")
        if epoch > view.epoch:
            raise NotPrimary(f"this node is still in epoch {view.epoch}, not {epoch}: ask the primary")

    async def _receive_start(self, request: web.Request) -> tuple[bytearray, bool]:
        """What fits into memory, and whether there is more."""
        data = bytearray()
        while len(data) <= MEMORY_BYTES:
            chunk = await read_chunk(request)
            if not chunk:
                return data, False
            data += chunk
            check_size(len(data), self._max_body_bytes)
        return data, True

    async def _receive_rest(self, request: web.Request, path: str, start: bytearray) -> None:
        fd = await blocking(os.open, path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            await blocking(write_all, fd, start)
            received = len(start)
            start.clear()
            while chunk := await read_chunk(request):
                received += len(chunk)
                check_size(received, self._max_body_bytes)
                await blocking(write_all, fd, chunk)
        finally:
            os.close(fd)

    async def _apply(self, request: web.Request, name: str, work: Coroutine[Any, Any, Position]) -> web.Response:
        """Not cut off once it has begun."""
        late = "the transaction may have been applied or not: ask for the position"
        position = await self._waiting.finish(request, work, TRANSACTION_TIMEOUT_S, late, goes_on=True)
        return json_answer(position_answer(name, position))

    async def _apply_file(self, name: str, lock_id: int, epoch: int, path: str, file: contextlib.ExitStack) -> Position:
        with file:
            return await self._halts.transaction(name, lock_id, epoch, path)
