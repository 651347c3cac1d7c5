"""Errors as HTTP answers: a status and one line of plain text. The only place that knows both."""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable

from aiohttp import web

from pylitefs import errors

log = logging.getLogger(__name__)

STATUS_OF_ERROR: tuple[tuple[type[BaseException], int], ...] = (  # the first that fits
    (errors.DatabaseNotFound, 404),
    (errors.NotADatabase, 400),
    (errors.FormatError, 400),
    (errors.UsageError, 400),
    (errors.ReadOnlyReplica, 503),
    (errors.DatabaseBusy, 503),
    (errors.NotPrimary, 421),
    (errors.Unavailable, 503),
    (errors.PositionMismatch, 409),
    (errors.Ineligible, 409),
    (errors.ClusterMismatch, 409),
    (errors.ProtocolError, 400),
    (TimeoutError, 408),
    (errors.LitefsError, 500),
)
_DISK_FULL = frozenset([errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
_OF_FULL_DISK = 507
_CLIENT_GONE = 499  # what web servers write down for it; HTTP has no number
_MAX_LINE = 500  # characters: a name that a peer sent may be in it
PRIMARY_HEADER = "Litefs-Primary-Url"
"""Of an answer 421: the node to ask instead."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class HttpProblem(errors.LitefsError):
    """A request that is refused for HTTP's own reasons, with the status to answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class ErrorTranslator:
    """Answers with a line of text when a handler fails. Once an answer has begun, its connection is cut instead."""

    def __init__(self) -> None:
        self._begun: dict[int, bool] = {}  # by identity, for the requests that are in a handler

    def install(self, app: web.Application) -> None:
        app.middlewares.append(self._translate)
        app.on_response_prepare.append(self._note_begun)

    async def _note_begun(self, request: web.Request, _response: web.StreamResponse) -> None:
        if id(request) in self._begun:
            self._begun[id(request)] = True

    @web.middleware
    async def _translate(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self._begun[id(request)] = False
        try:
            return await handler(request)
        except web.HTTPException as refusal:
            if refusal.status < 400:
                raise
            headers = {"Allow": refusal.headers["Allow"]} if "Allow" in refusal.headers else {}
            status, text = refusal.status, refusal.reason
        except Exception as error:
            if isinstance(error, ConnectionError) and (request.transport is None or request.transport.is_closing()):
                return _unanswered(request)  # the client has gone
            status, text = status_and_text(error)
            headers = _headers(error)
            _write_down(request, status, error)
        finally:
            begun = self._begun.pop(id(request))
        if begun:
            return _unanswered(request)  # never text in the middle of a database
        return web.Response(status=status, text=f"{text}\n", headers=headers)


def _unanswered(request: web.Request) -> web.StreamResponse:
    """The connection is cut. What is returned cannot be sent any more; an exception would be logged as a defect."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=_CLIENT_GONE)


def status_and_text(error: BaseException) -> tuple[int, str]:
    """The answer to a request that failed with `error`."""
    text = " ".join(_printable(str(error)).split())[:_MAX_LINE]
    if isinstance(error, HttpProblem):
        return error.status, text
    for kind, status in STATUS_OF_ERROR:
        if isinstance(error, kind):
            return status, text or "timed out"
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return _OF_FULL_DISK, f"the disk of this node is full: {error.strerror}"
    return 500, "internal error: see the log of this node"


def _printable(text: str) -> str:
    """Without the surrogates of file names."""
    return text.encode("utf-8", "backslashreplace").decode()


def _headers(error: BaseException) -> dict[str, str]:
    url = error.primary_url if isinstance(error, errors.NotPrimary) else ""
    return {PRIMARY_HEADER: url} if url and url.isascii() and url.isprintable() else {}


def _write_down(request: web.Request, status: int, error: Exception) -> None:
    fields = {"method": request.method, "path": request.path, "status": status, "peer": request.remote}
    if isinstance(error, errors.LitefsError | TimeoutError) or status == _OF_FULL_DISK:  # no defect of ours
        log.info("request failed: %s", " ".join(str(error).split()) or "timed out", extra=fields)
    else:
        log.error("request failed", exc_info=error, extra=fields)
