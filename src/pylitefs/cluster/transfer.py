"""Log entries on their way out: small ones whole, large ones in pieces, long runs of small ones merged."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol, TypeVar

from pylitefs.cluster.ports import Log, LogEntry
from pylitefs.errors import FormatError
from pylitefs.formats.ltx.compact import compact
from pylitefs.formats.ltx.decoder import Reader
from pylitefs.formats.ltx.format import HEADER_SIZE, TRAILER_SIZE, Header, Position, Trailer
from pylitefs.formats.stream import Ltx, LtxBegin, LtxData, LtxEnd, Message
from pylitefs.formats.stream_fields import MAX_CHUNK

COMPACT_MIN = 16
"""Log entries of one database that wait, at least, before they are merged: below it sending them singly is faster."""

COMPACT_MAX = 256

T = TypeVar("T")
Send = Callable[[Message], Awaitable[None]]


class Blocking(Protocol):
    """Runs a call off the loop thread."""

    def __call__(self, call: Callable[..., T], /, *args: Any) -> Awaitable[T]: ...


class BadLogEntry(FormatError):
    """A log entry of this node is not what it should be."""


@dataclass(frozen=True)
class Ends:
    """The first and last bytes of an LTX file, decoded."""

    header: Header
    trailer: Trailer

    @property
    def before(self) -> Position:
        return self.header.pre_apply_position

    @property
    def after(self) -> Position:
        return Position(self.header.max_txid, self.trailer.post_apply_checksum)

    @classmethod
    def of(cls, entry: LogEntry, head: bytes, tail: bytes) -> Ends:
        """FormatError unless they belong to `entry`."""
        ends = cls(Header.unpack(head), Trailer.unpack(tail))
        if (ends.header.min_txid, ends.header.max_txid) != (entry.min_txid, entry.max_txid):
            raise FormatError(f"{entry.path}: it holds other transactions than its name says")
        return ends


def read_whole(entry: LogEntry) -> tuple[bytes, Ends]:
    """A small entry. FileNotFoundError if it has left the log; BadLogEntry."""
    with open(entry.path, "rb") as file:
        data = file.read(MAX_CHUNK + 1)
    try:
        if len(data) != entry.size_bytes:
            raise FormatError(f"{entry.path}: {len(data)} bytes instead of {entry.size_bytes}")
        return data, Ends.of(entry, data[:HEADER_SIZE], data[-TRAILER_SIZE:])
    except FormatError as error:
        raise BadLogEntry(str(error)) from None


def open_large(entry: LogEntry) -> tuple[BinaryIO, Ends]:
    """A large entry, open at its beginning. As `read_whole`."""
    file = open(entry.path, "rb")  # noqa: SIM115 - the caller closes it
    try:
        head = file.read(HEADER_SIZE)
        file.seek(-TRAILER_SIZE, 2)
        tail = file.read(TRAILER_SIZE)
        if file.tell() != entry.size_bytes:
            raise FormatError(f"{entry.path}: {file.tell()} bytes instead of {entry.size_bytes}")
        file.seek(0)
        return file, Ends.of(entry, head, tail)
    except FormatError as error:
        file.close()
        raise BadLogEntry(str(error)) from None
    except BaseException:
        file.close()
        raise


async def send_entry(
    send: Send, blocking: Blocking, name: str, entry: LogEntry, check: Callable[[Ends], None] = lambda ends: None
) -> Ends:
    """Send one log entry. `check` sees its ends before anything is sent, and again before every piece; what it raises
    comes out here, as do FileNotFoundError and BadLogEntry (both before anything was sent)."""
    if entry.size_bytes <= MAX_CHUNK:
        data, ends = read_whole(entry)  # of the page cache, in 20 µs: cheaper than to hand it to a thread
        check(ends)
        await send(Ltx(name, data))
        return ends
    file, ends = await blocking(open_large, entry)
    with contextlib.closing(file):
        check(ends)
        await send(LtxBegin(name, entry.min_txid, entry.max_txid, entry.size_bytes))
        left = entry.size_bytes
        while left:
            try:
                data = await blocking(file.read, min(left, MAX_CHUNK))
            except OSError:
                data = b""
            check(ends)
            if not data:
                await send(LtxEnd(name, whole=False))
                raise BadLogEntry(f"{entry.path}: it cannot be read to its end")
            left -= len(data)
            await send(LtxData(name, data))
        await send(LtxEnd(name, whole=True))
    return ends


def small_run(log: Log, first: LogEntry) -> list[LogEntry]:
    """`first` and the small entries that follow it, at most MAX_CHUNK bytes: so their merger fits a message too."""
    run, size = [first], first.size_bytes
    while len(run) < COMPACT_MAX:
        entry = log.after(run[-1].max_txid)
        if entry is None or size + entry.size_bytes > MAX_CHUNK:
            break
        size += entry.size_bytes
        run.append(entry)
    return run


def merge(entries: Sequence[LogEntry], before: Position) -> tuple[bytes, Ends] | None:
    """One LTX file with the effect of all `entries`; blocking. None if they cannot be merged: send them singly.

    They are merged up to where the database is deleted or its page size changes, which a receiver must see happen.
    """
    files: list[bytes] = []
    page_size = 0
    try:
        for entry in entries:
            data, ends = read_whole(entry)
            header = ends.header
            if header.commit == 0 or not header.has_checksums or (page_size and header.page_size != page_size):
                break
            page_size = header.page_size
            files.append(data)
        if len(files) < COMPACT_MIN:
            return None
        merged = b"".join(compact([Reader([data]) for data in files]))
        ends = Ends(Header.unpack(merged), Trailer.unpack(merged[-TRAILER_SIZE:]))
    except (FormatError, OSError):
        return None
    if ends.before != before or len(merged) > MAX_CHUNK:
        return None
    return merged, ends
