"""Fields of replication messages: how each is written, and the limit it is read against.

    u8 u16 u32 u64   big-endian                          flag      u8, 0 or 1
    text             varint length, then UTF-8           position  u64 txid, u64 checksum, u64 epoch
    list             varint count, then the items        rest      raw bytes up to the end of the message
    name             varint length, then the bytes of a file name that a database can have (`formats.names`)

A field is an annotated type: `Annotated[int, kind]`, whose `Kind` packs and reads it. Both directions check the same
limits; a count or length is checked before anything is allocated. Anything wrong, also in packing: `FormatError`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, TypeAlias, get_type_hints

from pylitefs.errors import FormatError
from pylitefs.formats import names
from pylitefs.formats.cursor import Cursor, pack_bytes, pack_uvarint
from pylitefs.formats.ltx.format import HEADER_SIZE, TRAILER_SIZE, Position, is_page_size

MAX_CHUNK: Final = 512 * 1024  # bytes of an LTX file in one message; a larger file is sent in pieces
MAX_HOSTNAME: Final = 255
MAX_CLUSTER_ID: Final = 64
MAX_TEXT: Final = 1000
MAX_FILTER: Final = 1000  # names
MAX_ENTRIES: Final = 1000  # databases in one message
MAX_HISTORY: Final = 1024  # positions
MAX_EPOCHS: Final = 1024  # of one database's history
MAX_FILE_SIZE: Final = 1 << 44  # bytes of an LTX file; it goes to disk as it comes
MIN_FILE_SIZE: Final = HEADER_SIZE + TRAILER_SIZE


class ErrorCode(enum.IntEnum):
    """Why a side closes the connection. The text beside it is for people."""

    UNKNOWN = 0  # a code of a later version
    SHUTTING_DOWN = 1  # an orderly stop: connect again at once
    VERSION = 2
    CLUSTER_MISMATCH = 3
    FOREIGN = 4  # the replica has data but no cluster id
    SELF = 5  # both ends are the same node
    NOT_PRIMARY = 6
    STALE_EPOCH = 7
    REPLACED = 8  # the same node has connected again
    BUSY = 9  # too many replicas
    PROTOCOL = 10  # bytes or an order of messages that break the protocol
    TOO_SLOW = 11  # a deadline has passed
    INTERNAL = 12


class ResyncReason(enum.IntEnum):
    """Why a replica's copy cannot be continued from the log."""

    UNKNOWN = 0
    LOG_TOO_SHORT = 1  # the primary's log no longer reaches back to it
    DIVERGED = 2  # it has transactions that the primary has not
    AHEAD = 3  # the same, and more of them than the primary
    MISMATCH = 4  # what came does not follow the replica's position
    BAD_TRANSACTION = 5  # what came is damaged
    BAD_SNAPSHOT = 6  # the snapshot did not lead to the primary's state
    BAD_LOG = 7  # the primary's log is damaged
    LOCAL = 8  # the replica's own copy cannot be used as it is


@dataclass(frozen=True)
class Kind:
    """How a field is written and read."""

    pack: Callable[[Any], bytes]
    read: Callable[[Cursor], Any]


def kinds_of(record: type) -> tuple[tuple[str, Kind], ...]:
    """(name, kind) of every field of a dataclass whose fields are annotated with kinds, in order."""
    hints = get_type_hints(record, include_extras=True)
    return tuple((name, hint.__metadata__[0]) for name, hint in hints.items() if hasattr(hint, "__metadata__"))


def number(size: int, low: int = 0, high: int | None = None) -> Kind:
    """An integer of `size` bytes within low..high."""
    limit = (1 << 8 * size) - 1 if high is None else high

    def check(value: int) -> int:
        if not low <= value <= limit:
            raise FormatError(f"{value} is not in the range from {low} to {limit}")
        return value

    read = {1: Cursor.u8, 2: Cursor.u16, 4: Cursor.u32, 8: Cursor.u64}[size]
    return Kind(lambda value: check(value).to_bytes(size, "big"), lambda cursor: check(read(cursor)))


def text(limit: int) -> Kind:
    """At most `limit` bytes of UTF-8. What cannot be written so, as in a file name that is part of it, is escaped."""

    def pack(value: str) -> bytes:
        raw = value.encode("utf-8", "backslashreplace")
        if len(raw) > limit:
            raise FormatError(f"a text of {len(raw)} bytes, at most {limit} are allowed")
        return pack_bytes(raw)

    return Kind(pack, lambda cursor: cursor.string(limit))


def choice(values: type[enum.IntEnum], unknown: enum.IntEnum) -> Kind:
    """One byte; a number that this version does not know is read as `unknown`."""
    known = {int(value): value for value in values}
    return Kind(lambda value: bytes((int(value),)), lambda cursor: known.get(cursor.u8(), unknown))


def list_of(kind: Kind, limit: int) -> Kind:
    """A tuple of at most `limit` items."""

    def check(count: int) -> int:
        if count > limit:
            raise FormatError(f"a list of {count}, at most {limit} are allowed")
        return count

    def pack(values: Sequence[Any]) -> bytes:
        return pack_uvarint(check(len(values))) + b"".join(map(kind.pack, values))

    return Kind(pack, lambda cursor: tuple(kind.read(cursor) for _ in range(check(cursor.uvarint()))))


def pair(first: Kind, second: Kind) -> Kind:
    return Kind(
        lambda value: first.pack(value[0]) + second.pack(value[1]),
        lambda cursor: (first.read(cursor), second.read(cursor)),
    )


def record(make: type) -> Kind:
    """A dataclass whose fields are annotated with kinds."""
    kinds = kinds_of(make)
    return Kind(
        lambda value: b"".join(kind.pack(getattr(value, name)) for name, kind in kinds),
        lambda cursor: make(*[kind.read(cursor) for _, kind in kinds]),
    )


def rest(limit: int, unit: int = 1, least: int = 1) -> Kind:
    """Everything to the end of the message: `least` to `limit` bytes, a multiple of `unit`."""

    def check(size: int) -> int:
        if not least <= size <= limit or size % unit:
            raise FormatError(f"{size} bytes of data; {least} to {limit} in units of {unit} are allowed")
        return size

    def pack(data: bytes) -> bytes:
        check(len(data))
        return data

    return Kind(pack, lambda cursor: cursor.take(check(cursor.remaining)))


def _check_name(name: str) -> str:
    if not names.is_database_name(name):
        raise FormatError(f"not a database name: {name[:80]!a}")
    return name


def _check_page_size(value: int) -> int:
    if value and not is_page_size(value):
        raise FormatError(f"{value} is not a SQLite page size")
    return value


def _read_flag(cursor: Cursor) -> bool:
    value = cursor.u8()
    if value > 1:
        raise FormatError(f"{value} is not a flag")
    return bool(value)


_NAME: Final = Kind(
    lambda name: pack_bytes(names.to_bytes(_check_name(name))),
    lambda cursor: _check_name(names.from_bytes(cursor.bytes(names.MAX_NAME))),
)
_U32: Final = number(4)
_U64: Final = number(8)
_POSITION: Final = Kind(
    lambda value: _U64.pack(value.txid) + _U64.pack(value.checksum) + _U64.pack(value.epoch),
    lambda cursor: Position(cursor.u64(), cursor.u64(), cursor.u64()),
)
_PAGE_SIZE: Final = Kind(
    lambda value: _U32.pack(_check_page_size(value)), lambda cursor: _check_page_size(cursor.u32())
)

U16: TypeAlias = Annotated[int, number(2)]
U32: TypeAlias = Annotated[int, _U32]
U64: TypeAlias = Annotated[int, _U64]
Txid: TypeAlias = Annotated[int, number(8, low=1)]
Pgno: TypeAlias = Annotated[int, number(4, low=1)]
FileSize: TypeAlias = Annotated[int, number(8, low=MIN_FILE_SIZE, high=MAX_FILE_SIZE)]
Flag: TypeAlias = Annotated[bool, Kind(lambda value: bytes((bool(value),)), _read_flag)]
Name: TypeAlias = Annotated[str, _NAME]
Code: TypeAlias = Annotated[ErrorCode, choice(ErrorCode, ErrorCode.UNKNOWN)]
Reason: TypeAlias = Annotated[ResyncReason, choice(ResyncReason, ResyncReason.UNKNOWN)]
Text: TypeAlias = Annotated[str, text(MAX_TEXT)]
Hostname: TypeAlias = Annotated[str, text(MAX_HOSTNAME)]
ClusterId: TypeAlias = Annotated[str, text(MAX_CLUSTER_ID)]
PageSize: TypeAlias = Annotated[int, _PAGE_SIZE]  # bytes, or 0 for "no database"
At: TypeAlias = Annotated[Position, _POSITION]
Names: TypeAlias = Annotated[tuple[str, ...], list_of(_NAME, MAX_FILTER)]
Positions: TypeAlias = Annotated[tuple[tuple[str, Position], ...], list_of(pair(_NAME, _POSITION), MAX_ENTRIES)]
Epochs: TypeAlias = Annotated[tuple[tuple[int, int], ...], list_of(pair(_U64, _U64), MAX_EPOCHS)]
History: TypeAlias = Annotated[tuple[Position, ...], list_of(_POSITION, MAX_HISTORY)]
Chunk: TypeAlias = Annotated[bytes, rest(MAX_CHUNK)]
WholeFile: TypeAlias = Annotated[bytes, rest(MAX_CHUNK, least=MIN_FILE_SIZE)]
