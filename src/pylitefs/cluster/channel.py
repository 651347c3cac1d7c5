"""Messages over a link, for either end, and the tasks that live as long as it does."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from pylitefs.cluster.ports import Link, LinkClosed
from pylitefs.cluster.roles import Refused
from pylitefs.errors import FormatError, ProtocolError
from pylitefs.formats.stream import Error, Message, Sender, pack, unpack
from pylitefs.formats.stream_fields import ErrorCode

M = TypeVar("M")


@dataclass(frozen=True)
class Timings:
    """Seconds. A heartbeat goes out every `heartbeat_s`, also while nothing else is said, so a side that hears nothing
    for `deadline_s` while it listens gives the connection up."""

    heartbeat_s: float = 1.0
    deadline_s: float = 5.0
    handshake_s: float = 10.0
    close_s: float = 1.0
    durable_s: float = 1.0  # how often a replica makes what it applied durable
    ack_s: float = 0.005  # how often it acknowledges at most


class RefusedByPeer(Refused):
    """The other side has sent an ERROR."""


class Channel:
    """`peer` is what the other side is: what may come from there."""

    def __init__(self, link: Link, peer: Sender) -> None:
        self._link = link
        self._peer = peer
        self._sending = asyncio.Lock()

    @property
    def address(self) -> str:
        return self._link.peer

    async def send(self, message: Message) -> None:
        """Send in turn: whoever waits longest is next, which is what makes the databases share a connection fairly.

        LinkClosed; FormatError if the message breaks a limit (nothing is sent then).
        """
        data = pack(message)
        async with self._sending:
            await self._link.send(data)

    async def receive(self, deadline_s: float) -> tuple[Message, int]:
        """The next message and its size in bytes. LinkClosed; Refused for silence, garbage, or an ERROR of the peer."""
        try:
            async with asyncio.timeout(deadline_s):
                data = await self._link.receive()
        except TimeoutError:
            raise Refused(ErrorCode.TOO_SLOW, f"nothing was heard for {deadline_s:g} s") from None
        except ProtocolError as error:
            raise Refused(ErrorCode.PROTOCOL, str(error)) from None
        try:
            message = unpack(data, self._peer)
        except FormatError as error:
            raise Refused(ErrorCode.PROTOCOL, f"bad message: {error}") from None
        if isinstance(message, Error):
            if message.code is ErrorCode.SHUTTING_DOWN:
                raise LinkClosed(message.text, clean=True)
            raise RefusedByPeer(message.code, message.text)
        return message, len(data)

    async def expect(self, kind: type[M], deadline_s: float) -> M:
        """The next message, which must be of this kind. Refused if it is not."""
        message, _ = await self.receive(deadline_s)
        if not isinstance(message, kind):
            raise unexpected(message)
        return message

    async def close(self, error: BaseException | None, close_s: float, farewell: str = "it was ended") -> None:
        """Tell the other side why, if it can be told, and close. Never raises. `farewell`: who leaves, and why, where
        nothing has failed (CancelledError)."""
        reason: Error | None = None
        if isinstance(error, Refused) and not isinstance(error, RefusedByPeer):
            reason = error.message
        elif isinstance(error, asyncio.CancelledError):
            reason = Error(ErrorCode.SHUTTING_DOWN, farewell)
        elif error is not None and not isinstance(error, (LinkClosed, Refused)):
            reason = Error(ErrorCode.INTERNAL, "an internal error; see the log of the other node")
        if reason is not None:
            try:
                async with asyncio.timeout(close_s):
                    await self.send(reason)
            except (LinkClosed, TimeoutError):
                pass
        await self._link.close()


def unexpected(message: Message) -> Refused:
    return Refused(ErrorCode.PROTOCOL, f"unexpected {type(message).__name__}")


class TaskSet:
    """Tasks of one connection: the first that fails ends them all."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._closed = False

    def start(self, coroutine: Coroutine[Any, Any, None]) -> bool:
        """False, and nothing happens, if the set is closed."""
        if self._closed:
            coroutine.close()
            return False
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return True

    def fail(self, error: BaseException) -> None:
        if not self._failure.done():
            self._failure.set_exception(error)

    async def wait(self) -> None:
        """Until a task fails, or `fail` is called; raises that error. A task that simply ends ends nothing else."""
        await self._failure

    async def close(self) -> None:
        """Cancel what still runs and wait until it has ended."""
        self._closed = True
        if not self._failure.done():
            self._failure.cancel()
        elif not self._failure.cancelled():
            self._failure.exception()  # seen: asyncio need not report it
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error)
