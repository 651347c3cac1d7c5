"""What nodes ask each other over HTTP. The other end is `cluster_routes` and `halts`.

Every call has a deadline and ends by it. An answer is read up to a limit and checked before anything of it is used: a
peer may be another program, an older version, or lie. Errors are one line each: DatabaseNotFound (404), Ineligible
(409, 413), NotPrimary (421, with the URL of the primary if it knows it), and Unavailable for everything else.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime
from typing import IO, Any
from urllib.parse import urlencode

import aiohttp

from pylitefs.cluster.control import HaltLock, MemberView
from pylitefs.errors import DatabaseNotFound, Ineligible, NotPrimary, Unavailable
from pylitefs.formats.ltx.format import Position
from pylitefs.formats.names import is_database_name
from pylitefs.http.cluster_documents import members_from
from pylitefs.http.errors import PRIMARY_HEADER
from pylitefs.http.halts import EPOCH_HEADER, ID_HEADER
from pylitefs.http.queries import MAX_LOCK_ID
from pylitefs.http.replication import plain_error

MAX_ANSWER_BYTES = 8 << 20
MAX_LINE_BYTES = 4096
_MAX_URL = 2048
_MAX_NUMBER = (1 << 64) - 1
_MAX_SHOWN = 300  # characters of what a peer says
_SERVER_MARGIN = 0.9
"""The part of a deadline that the other end is given, so that it can still say why it missed it."""


class _Answer:
    """Status, the headers that count, and the body."""

    def __init__(self, url: str, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.url, self.status, self.headers, self.body = url, status, headers, body

    @property
    def line(self) -> str:
        """What an error says, fit to be shown."""
        return _shown(self.body[:MAX_LINE_BYTES].decode("utf-8", "replace"))

    def document(self) -> dict[str, Any]:
        try:
            found = json.loads(self.body)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise self.strange("not a JSON object")
        return found

    def strange(self, what: str) -> Unavailable:
        return Unavailable(f"the node at {self.url} gives a strange answer ({what}): is it of another version?")


class Peers:
    """The other nodes, over one session. `node_id` is this node's, for HALT locks."""

    def __init__(self, session: aiohttp.ClientSession, node_id: int = 0) -> None:
        self._session = session
        self._node_id = node_id

    # --- elections ---------------------------------------------------------------------------------------------------

    async def positions(self, url: str, timeout_s: float) -> dict[str, Any]:
        """{"node-id", "cluster-id", "epoch", "positions": {name: [epoch, txid]}}, checked."""
        answer = await self._ask("GET", url, "/positions", {}, timeout_s)
        document = answer.document()
        if not isinstance(document.get("cluster-id"), str):
            raise answer.strange("no cluster id")
        if not _is_number(document.get("epoch")):
            raise answer.strange("no epoch")
        positions = document.get("positions")
        if not isinstance(positions, dict) or not all(map(_is_position_entry, positions.items())):
            raise answer.strange("no positions")
        return document

    async def members(self, url: str, timeout_s: float) -> tuple[MemberView, ...]:
        """What that node knows of the cluster's nodes."""
        answer = await self._ask("GET", url, "/cluster", {}, timeout_s)
        try:
            return members_from(answer.document())
        except ValueError as error:
            raise answer.strange(str(error)) from None

    async def failsafe(self, url: str, leader_id: int, epoch: int, timeout_s: float) -> str:
        """Why that node does not promise to let nobody else lead; empty if it does, and follows this primary."""
        query = {"leader": f"{leader_id:016X}", "epoch": str(epoch)}
        try:
            await self._ask("POST", url, "/failsafe", query, timeout_s, MAX_LINE_BYTES)
        except Ineligible as refusal:
            return str(refusal) or "it refuses"
        return ""

    async def nudge(self, url: str, timeout_s: float) -> None:
        """Tell it to look at the lease engine."""
        await self._ask("POST", url, "/nudge", {}, timeout_s, MAX_LINE_BYTES)

    # --- the primary -------------------------------------------------------------------------------------------------

    async def position(self, url: str, name: str, timeout_s: float) -> Position:
        """One that covers every commit acknowledged before the question."""
        query = {"db": name, "timeout": _seconds(timeout_s * _SERVER_MARGIN)}
        return _position_of(await self._ask("GET", url, "/position", query, timeout_s, name=name))

    async def handoff(self, url: str, node_id: int | None, timeout_s: float) -> None:
        """Have the primary pass its lease to `node_id` (None: the best replica); returns when that is the primary."""
        await self._change(url, "/handoff", node_id, timeout_s)

    async def promote(self, url: str, node_id: int | None, timeout_s: float, force: bool = False) -> None:
        """Have that node make itself (None), or another one, the primary; returns when it is."""
        await self._change(url, "/promote", node_id, timeout_s, {"force": "true"} if force else {})

    async def _change(
        self, url: str, path: str, node_id: int | None, timeout_s: float, more: Mapping[str, str] | None = None
    ) -> None:
        query = {"timeout": _seconds(timeout_s * _SERVER_MARGIN), **(more or {})}
        if node_id is not None:
            query["nodeID"] = f"{node_id:016X}"
        await self._ask("POST", url, path, query, timeout_s, MAX_LINE_BYTES)

    # --- HALT locks --------------------------------------------------------------------------------------------------

    async def halt(self, url: str, name: str, lock_id: int, timeout_s: float) -> HaltLock:
        """Take the lock; again with the same id after an error: the same lock."""
        query = {"name": name, "id": str(lock_id)}
        return _lock_of(await self._ask("POST", url, "/halt", query, timeout_s, name=name), lock_id)

    async def renew(self, url: str, name: str, lock_id: int, epoch: int, timeout_s: float) -> HaltLock:
        query = {"name": name, "id": str(lock_id)}
        return _lock_of(await self._ask("PUT", url, "/halt", query, timeout_s, name=name, epoch=epoch), lock_id)

    async def release(self, url: str, name: str, lock_id: int, timeout_s: float) -> None:
        query = {"name": name, "id": str(lock_id)}
        await self._ask("DELETE", url, "/halt", query, timeout_s, MAX_LINE_BYTES, name=name)

    async def transaction(
        self, url: str, name: str, lock_id: int, epoch: int, data: bytes | IO[bytes], timeout_s: float
    ) -> Position:
        """Send an LTX file that was written under the lock; returns when the primary has it durably. After Unavailable
        it may have it or not: sent again it is applied once."""
        query = {"name": name, "lockID": str(lock_id)}
        answer = await self._ask("POST", url, "/tx", query, timeout_s, name=name, epoch=epoch, data=data)
        return _position_of(answer)

    # --- asking ------------------------------------------------------------------------------------------------------

    async def _ask(
        self,
        method: str,
        url: str,
        path: str,
        query: Mapping[str, str],
        timeout_s: float,
        max_bytes: int = MAX_ANSWER_BYTES,
        *,
        name: str = "",
        epoch: int | None = None,
        data: bytes | IO[bytes] | None = None,
    ) -> _Answer:
        """The answer with status 200; any other one is raised."""
        base = _checked_url(url)
        headers = {"Accept-Encoding": "identity"}
        if self._node_id:
            headers[ID_HEADER] = f"{self._node_id:016X}"
        if epoch is not None:
            headers[EPOCH_HEADER] = str(epoch)
        try:
            async with asyncio.timeout(timeout_s):
                async with self._request(method, base + path, query, headers, data) as response:
                    body = await _body(response, max_bytes if response.status == 200 else MAX_LINE_BYTES)
                    answer = _Answer(base, response.status, dict(response.headers), body)
        except TimeoutError:
            raise Unavailable(f"the node at {base} did not answer within {timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise Unavailable(f"cannot ask the node at {base}: {_shown(plain_error(error))}") from None
        if "Litefs-Id" not in response.headers:
            raise Unavailable(f"{base} does not answer like a litefs node (status {answer.status}): is the URL right?")
        if answer.status == 200:
            if len(answer.body) > max_bytes:
                raise answer.strange("too long")
            return answer
        raise _error_of(answer, name)

    @asynccontextmanager
    async def _request(
        self,
        method: str,
        url: str,
        query: Mapping[str, str],
        headers: Mapping[str, str],
        data: bytes | IO[bytes] | None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        target = f"{url}?{urlencode(query, errors='surrogateescape')}"
        async with self._session.request(
            method, target, headers=headers, data=data, allow_redirects=False
        ) as response:
            if "Content-Encoding" in response.headers:
                raise ValueError("its answer is compressed, which was not asked for")
            try:
                yield response
            finally:
                if not response.content.is_eof():
                    response.close()  # what is left of it is not waited for


async def _body(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """At most one byte more than `max_bytes`."""
    body = bytearray()
    while len(body) <= max_bytes:
        chunk = await response.content.read(max_bytes + 1 - len(body))
        if not chunk:
            break
        body += chunk
    return bytes(body)


def _error_of(answer: _Answer, name: str) -> Exception:
    if answer.status == 404 and name:
        return DatabaseNotFound(name)
    if answer.status in (409, 413):
        return Ineligible(answer.line)
    if answer.status == 421:
        try:
            primary_url = _checked_url(answer.headers.get(PRIMARY_HEADER, ""))
        except Unavailable:
            primary_url = ""
        return NotPrimary(answer.line, primary_url)
    return Unavailable(answer.line or f"the node at {answer.url} answered with status {answer.status}")


def _checked_url(url: str) -> str:
    """Where a node says it is, which goes into requests and messages. Raises Unavailable."""
    scheme, _, rest = url.partition("://")
    if scheme not in ("http", "https") or not rest or len(url) > _MAX_URL or not url.isascii() or not url.isprintable():
        raise Unavailable(f"not the URL of a node: {url[:_MAX_SHOWN]!a}: check lease.advertise-url there")
    return url.rstrip("/")


def _position_of(answer: _Answer) -> Position:
    document = answer.document()
    epoch = document.get("epoch", 0)  # 0: an older version does not say
    if not _is_number(epoch):
        raise answer.strange("no epoch")
    return replace(_position(answer, document.get("txid"), document.get("postApplyChecksum")), epoch=epoch)


def _position(answer: _Answer, txid: object, checksum: object) -> Position:
    if isinstance(txid, str) and isinstance(checksum, str):
        try:
            return Position.parse(f"{txid}/{checksum}")
        except ValueError:
            pass
    raise answer.strange("no position")


def _lock_of(answer: _Answer, lock_id: int) -> HaltLock:
    document = answer.document()
    found, pos, epoch, expires = (document.get(key) for key in ("id", "pos", "epoch", "expires"))
    if found != lock_id or not 1 <= lock_id <= MAX_LOCK_ID or not isinstance(pos, dict) or not _is_number(epoch):
        raise answer.strange("no HALT lock")
    if not _is_number(pos.get("Epoch")):
        raise answer.strange("no epoch")
    position = replace(_position(answer, pos.get("TXID"), pos.get("PostApplyChecksum")), epoch=pos["Epoch"])
    try:
        expires_ms = round(datetime.fromisoformat(str(expires)).timestamp() * 1000)
    except (ValueError, OverflowError, OSError):
        raise answer.strange("no time") from None
    assert isinstance(epoch, int)
    return HaltLock(lock_id, position, epoch, expires_ms)


def _is_position_entry(item: tuple[object, object]) -> bool:
    name, value = item
    return (
        isinstance(name, str)
        and is_database_name(name)
        and isinstance(value, list)
        and len(value) == 2
        and all(map(_is_number, value))
    )


def _is_number(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_NUMBER


def _seconds(value_s: float) -> str:
    return f"{value_s:.3f}"


def _shown(text: str) -> str:
    """One short line of what another program says."""
    line = " ".join(text.split())[:_MAX_SHOWN]
    return "".join(character if character.isprintable() else "?" for character in line)
