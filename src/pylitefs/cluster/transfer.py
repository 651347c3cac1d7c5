"""Log entries on their way out: small ones whole, large ones in pieces, long runs of small ones merged."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from pylitefs.cluster.ports import Log, LogEntry, SnapshotReader
from pylitefs.errors import FormatError
from pylitefs.formats.ltx.compact import compact
from pylitefs.formats.ltx.decoder import Reader
from pylitefs.formats.ltx.format import HEADER_SIZE, TRAILER_SIZE, Header, Position, Trailer
from pylitefs.formats.stream import Ltx, LtxBegin, LtxData, LtxEnd, Message
from pylitefs.formats.stream_fields import MAX_CHUNK
from pylitefs.formats.stream_pages import MAX_PAGES_SIZE, SnapshotPages

COMPACT_MIN = 16
"""Log entries of one database that wait, at least, before they are merged: below it sending them singly is faster."""

COMPACT_MAX = 256

T = TypeVar("T")
Send = Callable[[Message], Awaitable[None]]
Ready = Callable[[], Awaitable[None]]
"""Waits until there is room for what is read next."""


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
        return Position(self.header.max_txid, self.trailer.post_apply_checksum, self.header.epoch)

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


class _LargeEntry:
    """An open log entry, read piece by piece. What the page cache has, as it has of an entry that was just written, is
    read where one stands: to hand 30 µs of copying to a thread costs several times that."""

    def __init__(self, entry: LogEntry, blocking: Blocking, ready: Ready | None) -> None:
        """FileNotFoundError if it has left the log."""
        self._entry, self._blocking, self._ready = entry, blocking, ready
        self._fd = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self._fd)

    async def ends(self) -> Ends:
        """BadLogEntry."""
        entry = self._entry
        try:
            size_bytes = os.fstat(self._fd).st_size
            if size_bytes != entry.size_bytes:
                raise FormatError(f"{entry.path}: {size_bytes} bytes instead of {entry.size_bytes}")
            head = await self.read(HEADER_SIZE, 0)
            return Ends.of(entry, head, await self.read(TRAILER_SIZE, size_bytes - TRAILER_SIZE))
        except FormatError as error:
            raise BadLogEntry(str(error)) from None

    async def read(self, size: int, offset: int) -> bytes:
        """`size` bytes at most; none at the end of the file. OSError."""
        if self._ready is not None:
            await self._ready()
            if _is_cached(self._fd, offset) and _is_cached(self._fd, offset + size - 1):
                return os.pread(self._fd, size, offset)
        return await self._blocking(os.pread, self._fd, size, offset)


def _is_cached(fd: int, offset: int) -> bool:
    """Whether the page cache has this byte of a file."""
    try:
        return os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except OSError:  # EAGAIN: it has not; EOPNOTSUPP: the file system cannot tell
        return False


async def send_entry(
    send: Send,
    blocking: Blocking,
    name: str,
    entry: LogEntry,
    check: Callable[[Ends], None] = lambda ends: None,
    ready: Ready | None = None,
) -> Ends:
    """Send one log entry. `check` sees its ends before anything is sent, and again before every piece; what it raises
    comes out here, as do FileNotFoundError and BadLogEntry (both before anything was sent). With `ready`, pieces that
    are in the page cache are read without `blocking`, after `ready`."""
    if entry.size_bytes <= MAX_CHUNK:
        data, ends = read_whole(entry)  # of the page cache, in 20 µs: cheaper than to hand it to a thread
        check(ends)
        await send(Ltx(name, data))
        return ends
    with contextlib.closing(_LargeEntry(entry, blocking, ready)) as file:
        ends = await file.ends()
        check(ends)
        await send(LtxBegin(name, entry.min_txid, entry.max_txid, entry.size_bytes))
        offset = 0
        while offset < entry.size_bytes:
            try:
                data = await file.read(min(entry.size_bytes - offset, MAX_CHUNK), offset)
            except OSError:
                data = b""
            check(ends)
            if not data:
                await send(LtxEnd(name, whole=False))
                raise BadLogEntry(f"{entry.path}: it cannot be read to its end")
            offset += len(data)
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


def next_pages(name: str, reader: SnapshotReader) -> list[SnapshotPages] | None:
    """The next pages of a snapshot, packed. Blocking."""
    chunk = reader.next_chunk()
    if chunk is None:
        return None
    step = max(1, MAX_PAGES_SIZE // reader.page_size) if reader.page_size else 1
    return [SnapshotPages.of(name, reader.page_size, chunk[at : at + step]) for at in range(0, len(chunk), step)]
