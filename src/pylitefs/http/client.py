"""A blocking client of a node's API for the command line: the standard library only, so that a command starts fast.

Every failure is a LitefsError of one line: `Unreachable` when there is no answer, `DatabaseNotFound`, or `Refused` with
what the node said; `NotPrimary`, a Refused, knows where the primary is.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any
from urllib.parse import SplitResult, urlencode, urlsplit

from pylitefs.errors import DatabaseNotFound, LitefsError, UsageError

DEFAULT_URL = "http://localhost:20202"
TIMEOUT_S = 15.0  # to connect, and for an answer to a question
TRANSFER_TIMEOUT_S = 600.0  # without a byte while a database is copied, checked or imported
CHANGE_TIMEOUT_S = 60.0  # for a change of the primary: its target may have to catch up
SYNC_TIMEOUT_S = 10.0
_CHUNK_BYTES = 1 << 18
_MAX_ANSWER_BYTES = 64 << 20  # of a JSON document
_MAX_ERROR_BYTES = 4096
_PRIMARY_HEADER = "Litefs-Primary-Url"
_PORT_BY_SCHEME = {"http": 80, "https": 443}

Json = dict[str, Any]


class Unreachable(LitefsError):
    """No answer from the node."""


class Refused(LitefsError):
    """The node answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message or f"the node answered with status {status}")
        self.status = status


class NotPrimary(Refused):
    """Only the primary does that; `primary_url` is where that is, "" if the node does not know."""

    def __init__(self, status: int, message: str, primary_url: str) -> None:
        super().__init__(status, message)
        self.primary_url = primary_url


class Client:
    """One node's API at `url` (scheme, host and port; a path is ignored). Raises UsageError for what is not a URL."""

    def __init__(self, url: str = DEFAULT_URL, timeout_s: float = TIMEOUT_S) -> None:
        self.url = url
        self._parts = _split(url)
        self._timeout_s = timeout_s

    def info(self) -> Json:
        return self._document("/info")

    def status(self) -> Json:
        return self._document("/status")

    def export(self, name: str, file: IO[bytes]) -> int:
        """Write a copy of the database to `file`; its size in bytes. Raises DatabaseNotFound."""
        with self._request("GET", "/export", query={"name": name}, timeout_s=TRANSFER_TIMEOUT_S) as response:
            expected = response.length
            received = 0
            while chunk := self._read(response, _CHUNK_BYTES, TRANSFER_TIMEOUT_S):
                file.write(chunk)
                received += len(chunk)
            if expected is not None and received != expected:
                raise Unreachable(f"the node at {self.url} stopped sending after {received} of {expected} bytes")
        return received

    def import_(self, name: str, file: IO[bytes]) -> None:
        """Create or replace the database by what `file` holds from its position on."""
        with self._request(
            "POST", "/import", query={"name": name}, timeout_s=TRANSFER_TIMEOUT_S, body=file
        ) as response:
            self._read(response, _MAX_ERROR_BYTES, TRANSFER_TIMEOUT_S)

    # --- the cluster

    def cluster(self) -> Json:
        """What this node knows of its cluster: members, primary, epoch, history."""
        return self._document("/cluster")

    def history(self) -> list[Json]:
        """Every change of the primary that is remembered, the oldest first."""
        found = self.cluster().get("history")
        return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []

    def promote(self, node_id: str | None = None, *, force: bool = False) -> None:
        """Make that node (16 hex digits; None: the one at `url`) the primary; returns when it is. Refused with status
        409: it may not be, and why. `force`: where nobody is, also one that may lack acknowledged commits."""
        self._change("/promote", node_id, {"force": "true"} if force else {})

    def handoff(self, node_id: str | None = None) -> None:
        """Pass the lease on, to that node or to the best replica; returns when that is the primary."""
        self._change("/handoff", node_id)

    def pause(self) -> None:
        """No automatic failover any more, in the whole cluster."""
        self._change("/pause")

    def resume(self) -> None:
        self._change("/resume")

    def sync(self, name: str, txid: int | None = None, timeout_s: float = SYNC_TIMEOUT_S) -> Json:
        """Wait until the node has applied `txid` (None: all that the primary has); the position it has then. Raises
        DatabaseNotFound; Refused when `timeout_s` has passed."""
        query = {"db": name, "timeout": f"{timeout_s:.3f}"} | ({} if txid is None else {"txid": f"{txid:016x}"})
        with self._request("GET", "/sync", query=query, timeout_s=timeout_s + self._timeout_s) as response:
            return self._object(response, timeout_s)

    def _change(self, path: str, node_id: str | None = None, more: Mapping[str, str] | None = None) -> None:
        """POST, and once more to the primary if this node says that only that can do it."""
        query = dict(more or {}) | ({} if node_id is None else {"nodeID": node_id})
        try:
            self._post(path, query)
        except NotPrimary as refusal:
            if not refusal.primary_url or _split(refusal.primary_url).netloc == self._parts.netloc:
                raise
            Client(refusal.primary_url, self._timeout_s)._post(path, query)

    def _post(self, path: str, query: Mapping[str, str]) -> None:
        with self._request("POST", path, query=query, timeout_s=CHANGE_TIMEOUT_S) as response:
            self._read(response, _MAX_ERROR_BYTES, CHANGE_TIMEOUT_S)

    # --- requests

    def _document(self, path: str) -> Json:
        with self._request("GET", path, timeout_s=self._timeout_s) as response:
            return self._object(response, self._timeout_s)

    def _object(self, response: http.client.HTTPResponse, timeout_s: float) -> Json:
        body = self._read(response, _MAX_ANSWER_BYTES + 1, timeout_s)
        try:
            if len(body) > _MAX_ANSWER_BYTES:
                raise ValueError("too long")
            document = json.loads(body)
            if not isinstance(document, dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise Refused(200, f"{self.url} does not answer like a litefs node ({error}): is the URL right?") from None
        return document

    def _read(self, response: http.client.HTTPResponse, size_bytes: int, timeout_s: float) -> bytes:
        try:
            return response.read(size_bytes)
        except (OSError, http.client.HTTPException) as error:
            raise _no_answer(self.url, error, timeout_s) from None

    @contextmanager
    def _request(
        self,
        method: str,
        path: str,
        *,
        timeout_s: float,
        query: Mapping[str, str] | None = None,
        body: IO[bytes] | None = None,
    ) -> Iterator[http.client.HTTPResponse]:
        """Send a request and give its answer, if that is a 200."""
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._parts.hostname or "", self._parts.port, timeout=self._timeout_s)
        target = path + ("?" + urlencode(query, errors="surrogateescape") if query else "")
        try:
            try:
                connection.connect()
                connection.sock.settimeout(timeout_s)
                _send(connection, method, target, body)
                response = connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                raise _no_answer(self.url, error, timeout_s) from None
            if response.status != 200:
                raise self._refusal(response, path, query or {}, timeout_s)
            yield response
        finally:
            connection.close()

    def _refusal(
        self, response: http.client.HTTPResponse, path: str, query: Mapping[str, str], timeout_s: float
    ) -> LitefsError:
        line = " ".join(self._read(response, _MAX_ERROR_BYTES, timeout_s).decode("utf-8", "replace").split())
        status = response.status
        if not response.getheader("Litefs-Id"):
            line = f"{self.url} does not answer like a litefs node (status {status}): is the URL right?"
        elif status == 404 and (name := query.get("name") or query.get("db")) is not None:
            return DatabaseNotFound(name)
        elif status in (404, 405):
            line = f"the node at {self.url} has no {path}: its version is older than this command's"
        elif status == 421:
            return NotPrimary(status, line, response.getheader(_PRIMARY_HEADER) or "")
        return Refused(status, line)


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"not a URL: {url}: {error}") from None
    if parts.scheme not in _PORT_BY_SCHEME or not parts.hostname or port == 0:
        raise UsageError(f"not the URL of a node: {url}: expected something like {DEFAULT_URL}")
    return parts


def _send(connection: http.client.HTTPConnection, method: str, target: str, body: IO[bytes] | None) -> None:
    try:
        connection.request(method, target, body=body, headers=_length_header(body))
    except (BrokenPipeError, ConnectionResetError):
        if body is None:  # otherwise the node may have refused the body before its end: its answer says why
            raise


def _length_header(body: IO[bytes] | None) -> dict[str, str]:
    if body is None:
        return {}
    remaining = os.fstat(body.fileno()).st_size - body.tell()
    return {"Content-Length": str(remaining), "Content-Type": "application/octet-stream"}


def _no_answer(url: str, error: Exception, timeout_s: float) -> Unreachable:
    """One line for a connection that failed, with what to do."""
    if isinstance(error, ConnectionRefusedError):
        return Unreachable(
            f"cannot reach the litefs node at {url}: is it running? (start it with: litefs mount; "
            "another address is given with -url)"
        )
    if isinstance(error, socket.gaierror):
        return Unreachable(f"cannot reach the litefs node at {url}: its host name cannot be resolved: check -url")
    if isinstance(error, TimeoutError):
        return Unreachable(f"the litefs node at {url} did not answer within {timeout_s:.0f} s: is it overloaded?")
    if isinstance(error, http.client.BadStatusLine) and not isinstance(error, http.client.RemoteDisconnected):
        return Unreachable(f"{url} does not answer like a litefs node: is the URL right?")
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return Unreachable(f"lost the connection to the litefs node at {url}: {reason.lower()}")
