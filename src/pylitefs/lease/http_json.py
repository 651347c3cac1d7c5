"""What the engines that speak HTTP and JSON have in common: several servers, deadlines, errors of one line."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import ssl
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from pylitefs.errors import ConfigError, LitefsError, Unavailable

log = logging.getLogger("litefs.lease")

MAX_ANSWER_BYTES = 8 << 20
_MAX_REASON = 200  # characters of what a server says


def tls_context(ca: str = "", cert: str = "", key: str = "", ca_data: str = "") -> ssl.SSLContext:
    """Verifies servers against the file `ca` (or the text `ca_data`), or what the system trusts; shows them `cert`."""
    try:
        context = ssl.create_default_context(cafile=ca or None, cadata=ca_data or None)
        if cert:
            context.load_cert_chain(cert, key or None)
    except (OSError, ValueError) as error:
        names = ", ".join(name for name in (ca, cert, key) if name)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"cannot read the certificates in {names}: {reason.lower()}") from None
    return context


@dataclass(frozen=True)
class Answer:
    """What a server said, whatever its status. `document` is None where the body is not JSON."""

    url: str
    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def document(self) -> Any:
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None

    @property
    def reason(self) -> str:
        """What the server says about it: the field "message" or "error", or the first line of the body."""
        found = self.document
        if isinstance(found, dict):
            for key in ("message", "error"):
                if isinstance(found.get(key), str):
                    return " ".join(found[key].split())[:_MAX_REASON]
        lines = self.body[: 4 * _MAX_REASON].decode("utf-8", "replace").split("\n")
        return " ".join(lines[0].split())[:_MAX_REASON]


class Rejected(Unavailable):
    """A server answered, and said no."""

    def __init__(self, answer: Answer, message: str) -> None:
        super().__init__(message)
        self.answer = answer


class JsonClient:
    """Asks the servers at `urls`, of which any will do; stays with the one that answered last.

    `engine` and `setting` are for messages: what it is, and which keys of litefs.yml lead to it. A request that may be
    sent twice (`again`) goes to the next server when one does not answer; any other only when nothing was sent.
    """

    def __init__(
        self,
        engine: str,
        urls: Sequence[str],
        setting: str,
        timeout_s: float,
        tls: ssl.SSLContext | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.engine = engine
        self.urls = [url.rstrip("/") for url in urls]
        self.timeout_s = timeout_s
        self.headers = dict(headers or {})
        self._setting = setting
        self._tls = tls
        self._session: aiohttp.ClientSession | None = None
        self._current = 0

    async def ask(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        document: Any = None,
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        again: bool = False,
        extra_s: float = 0.0,
    ) -> Answer:
        """The answer, or Unavailable, comes within `timeout_s`, however many servers are asked; `extra_s`: how much
        longer than usual a server may take, because it was asked to wait."""
        if document is not None:
            data = json.dumps(document).encode()
            headers = {"Content-Type": "application/json", **(headers or {})}
        problem = "no server is configured"
        each_s = self.timeout_s / len(self.urls) + extra_s
        now_s = asyncio.get_running_loop().time
        end_s = now_s() + self.timeout_s + extra_s
        fresh = False
        for _ in range(len(self.urls) + again):
            url = self.urls[self._current]
            left_s = min(each_s, end_s - now_s())
            if left_s <= 0:
                break
            try:
                async with asyncio.timeout(left_s), self._request(method, url + path, query, data, headers) as response:
                    return Answer(url, response.status, await _body(response), dict(response.headers))
            except (aiohttp.ClientError, OSError, ValueError) as error:
                problem = self._problem(url, error, left_s)
                if isinstance(error, aiohttp.ServerDisconnectedError) and again and not fresh:
                    fresh = True  # it had closed an idle connection
                    continue
                self._current = (self._current + 1) % len(self.urls)
                if not again and not isinstance(error, aiohttp.ClientConnectorError):
                    break
        raise Unavailable(problem)

    async def watch(
        self,
        method: str,
        path: str,
        judge: Callable[[Any], bool],
        timeout_s: float,
        *,
        query: Mapping[str, str] | None = None,
        document: Any = None,
    ) -> bool:
        """Read an answer that goes on, a JSON document in each line, until `judge` says True; False after `timeout_s`.

        The server must begin to answer within the usual time. The end of the answer is Unavailable.
        """
        url = self.urls[self._current]
        data = None if document is None else json.dumps(document).encode()
        begun = False
        try:
            async with asyncio.timeout(self.timeout_s) as limit:
                async with self._request(method, url + path, query, data, None) as response:
                    if response.status != 200:
                        raise self.unexpected(Answer(url, response.status, await _body(response)))
                    begun = True
                    limit.reschedule(asyncio.get_running_loop().time() + timeout_s)
                    while line := await response.content.readline():
                        if judge(json.loads(line)):
                            return True
            raise aiohttp.ServerDisconnectedError
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if begun and isinstance(error, TimeoutError):
                return False
            self._current = (self._current + 1) % len(self.urls)
            raise Unavailable(self._problem(url, error, self.timeout_s)) from None

    def unexpected(self, answer: Answer) -> Rejected:
        """For an answer that says no."""
        hint = f"check {self._setting}"
        if answer.status in (401, 403):
            hint = f"check the credentials in {self._setting}"
        elif answer.status >= 500:
            hint = "is it healthy, and has it a leader?"
        said = f" ({answer.reason})" if answer.reason else ""
        return Rejected(answer, f"{self.engine} at {answer.url} answered with status {answer.status}{said}: {hint}")

    @contextmanager
    def reading(self, answer: Answer) -> Iterator[None]:
        """Whatever goes wrong within, over a document that is not what was expected, is the server's fault."""
        try:
            yield
        except (KeyError, IndexError, TypeError, AttributeError, ValueError):
            raise Unavailable(
                f"{self.engine} at {answer.url} gave an answer that {self.engine} does not give: check {self._setting}"
            ) from None

    def _request(
        self,
        method: str,
        url: str,
        query: Mapping[str, str] | None,
        data: bytes | None,
        headers: Mapping[str, str] | None,
    ) -> Any:
        if self._session is None:
            connector = aiohttp.TCPConnector(ssl=self._tls if self._tls is not None else True, limit=32)
            self._session = aiohttp.ClientSession(
                connector=connector,
                timeout=aiohttp.ClientTimeout(total=None),
                read_bufsize=1 << 18,
                auto_decompress=True,
                raise_for_status=False,
            )
        sent = {**self.headers, **(headers or {})}
        return self._session.request(method, url, params=query, data=data, headers=sent, allow_redirects=False)

    def _problem(self, url: str, error: Exception, waited_s: float) -> str:
        if isinstance(error, TimeoutError):
            return f"{self.engine} at {url} did not answer within {waited_s:.1f} s: is it healthy, and is the network?"
        if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientConnectorSSLError):
            return f"cannot make a TLS connection to {self.engine} at {url}: {_tls_reason(error)} {self._setting}"
        if isinstance(error, aiohttp.InvalidURL):
            return f"{self.engine}: {url} is not a URL: check {self._setting}"
        cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
        question = "is it running?"
        if isinstance(cause, ConnectionResetError | aiohttp.ServerDisconnectedError):
            reason = "it closed the connection"
            question = "does it speak TLS?" if url.startswith("https:") else "is it running, and without TLS?"
        elif isinstance(cause, OSError) and cause.strerror:  # what asyncio says of a refused connection is less plain
            number = cause.errno or 0
            reason = os.strerror(number) if number > 0 else cause.strerror
        else:
            reason = str(cause) or type(cause).__name__
        reason = " ".join(reason.split())[:_MAX_REASON].lower()
        return f"cannot reach {self.engine} at {url}: {reason}: {question} check {self._setting}"

    async def close(self) -> None:
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()


def _tls_reason(error: aiohttp.ClientConnectorCertificateError | aiohttp.ClientConnectorSSLError) -> str:
    cause = error.certificate_error if isinstance(error, aiohttp.ClientConnectorCertificateError) else error.os_error
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"{cause.verify_message.rstrip('.')}: check the certificates in"
    said = (cause.reason if isinstance(cause, ssl.SSLError) else "") or str(cause)
    return f"{said.replace('_', ' ').lower()}: does it speak TLS? check"


class Afterwards:
    """Work that nobody waits for and whose failure does not matter, such as giving back what would expire anyway. That
    it fails is noted at the level "debug", as it comes from the network; a defect is logged as one."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, LitefsError | OSError | aiohttp.ClientError | TimeoutError):
            log.debug("left to itself: %s", error)
        elif error is not None:
            log.error("a defect: a task has failed", exc_info=error)

    async def cancel(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _body(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_ANSWER_BYTES:
            raise ValueError(f"its answer is longer than {MAX_ANSWER_BYTES} bytes")
    return bytes(body)
