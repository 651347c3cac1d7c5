"""The replication protocol: what a primary and a replica say to each other. One message is one WebSocket frame.

    0  1  type code, see `MESSAGES`
    1  .  the fields of that message in the order of its class (kinds and limits: `stream_fields`), nothing after them

No message is longer than `MAX_MESSAGE`. Each type may come from one side only, or from both. Messages stand alone:
nothing in one decides how another is read. A torn message does not exist (the WebSocket delivers whole ones); a
short one is `TruncatedError`, anything else wrong `FormatError`.

    replica                              primary
    HELLO, DATABASES…            ──▶
                                 ◀──     WELCOME, or ERROR
                                 ◀──     per database: LTX | LTX_BEGIN LTX_DATA… LTX_END, in TXID order without a
                                         hole; or SNAPSHOT_BEGIN SNAPSHOT_PAGES… LTX… SNAPSHOT_END
                                 ◀──     READY once every database was brought to the primary's position
    ACK, HEARTBEAT               ◀─▶     HEARTBEAT
    RESYNC CHECKSUMS…            ◀──     SEND_CHECKSUMS: the replica's copy does not fit, send me what differs from it
    RESYNC CHECKSUMS…            ──▶     (also unasked: what came cannot be applied) a snapshot follows
    LTX… TAIL_END                ◀──     GIVE_BACK: transactions that the primary has lost, or never got
    PAGES                        ◀──     ASK_PAGES: pages that the primary's disk has damaged
    ACK                          ◀──     ASK_DURABLE: make this durable at once

Everything that is said belongs to the epoch of the WELCOME: a side that learns of a later one ends the connection with
STALE_EPOCH. Positions carry the epoch of their last transaction.
Databases interleave freely; within one the order is strict. A RESYNC has a number, and the replica ignores what
comes for that database until the SNAPSHOT_BEGIN with that number. A snapshot is a scan of pages, each as of some moment
between its start and its end position, then the log between the two, then the end position to verify the result
by. Zero pages and commit 0: a deleted database.

HELLO and WELCOME begin with the protocol version. Of another version only that number is read; ERROR keeps its
layout for ever.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from pylitefs.errors import FormatError
from pylitefs.formats.cursor import Cursor
from pylitefs.formats.stream_fields import (
    MAX_ENTRIES,
    U16,
    U32,
    U64,
    At,
    Chunk,
    ClusterId,
    Code,
    Epochs,
    FileSize,
    Flag,
    History,
    Hostname,
    Name,
    Names,
    PageSize,
    Pgno,
    Positions,
    Reason,
    Text,
    Txid,
    WholeFile,
    kinds_of,
    list_of,
    record,
    rest,
)
from pylitefs.formats.stream_pages import AskPages, Pages, SnapshotPages

PROTOCOL_VERSION: Final = 5

MAX_MESSAGE: Final = 1_100_000  # bytes
MAX_CHECKSUMS: Final = 16 * 1024  # page checksums in one message
CHECKSUM_TYPE: Final = np.dtype(">u8")


class Sender(enum.Flag):
    """Who may send a message."""

    REPLICA = enum.auto()
    PRIMARY = enum.auto()
    BOTH = REPLICA | PRIMARY


@dataclass(frozen=True, slots=True)
class Error:
    """The last message before the connection is closed."""

    CODE: ClassVar[int] = 1
    code: Code
    text: Text


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Sent every second. `timestamp_ms` is the sender's clock; from the primary, `positions` are those that moved since
    the last one."""

    CODE: ClassVar[int] = 2
    timestamp_ms: U64
    positions: Positions = ()


@dataclass(frozen=True, slots=True)
class Hello:
    """The replica's first message. No `databases_wanted`: all. No `cluster_id`: any. `epoch`: the highest seen."""

    CODE: ClassVar[int] = 10
    protocol: U16
    cluster_id: ClusterId = ""
    node_id: U64 = 0
    hostname: Hostname = ""
    epoch: U64 = 0
    databases_wanted: Names = ()


@dataclass(frozen=True, slots=True)
class Databases:
    """What the replica has; as many of these as it takes, the last one marked."""

    CODE: ClassVar[int] = 11
    last: Flag
    positions: Positions


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a replica is with one database, in TXIDs: `received` is held in memory at least, `applied` is visible to
    its readers, `durable` survives a power cut there."""

    name: Name
    received: U64
    applied: U64
    durable: U64


@dataclass(frozen=True, slots=True)
class Ack:
    CODE: ClassVar[int] = 12
    entries: Annotated[tuple[Progress, ...], list_of(record(Progress), MAX_ENTRIES)]


@dataclass(frozen=True, slots=True)
class Resync:
    """The replica's copy of a database: `commit` pages of `page_size` bytes (both 0 if it has none), at `position`.

    `history` are positions that its log passed through, newest first, `epochs` (epoch, its first TXID) of what led
    there. CHECKSUMS for all its pages follow, if any.
    """

    CODE: ClassVar[int] = 13
    name: Name
    request: U32
    reason: Reason
    page_size: PageSize
    commit: U32
    position: At
    history: History = ()
    epochs: Epochs = ()


@dataclass(frozen=True, slots=True)
class Checksums:
    """Page checksums of consecutive pages from `first_pgno` on (0 for the lock page)."""

    CODE: ClassVar[int] = 14
    name: Name
    request: U32
    first_pgno: Pgno
    data: Annotated[bytes, rest(8 * MAX_CHECKSUMS, unit=8, least=8)]

    @property
    def array(self) -> npt.NDArray[np.uint64]:
        return np.frombuffer(self.data, CHECKSUM_TYPE).astype(np.uint64)


@dataclass(frozen=True, slots=True)
class TailEnd:
    """The answer to GIVE_BACK is complete. `given` is false if the replica's log does not reach back to there."""

    CODE: ClassVar[int] = 15
    name: Name
    given: Flag


@dataclass(frozen=True, slots=True)
class Ltx:
    """A whole LTX file of at most MAX_CHUNK bytes."""

    CODE: ClassVar[int] = 20
    name: Name
    data: WholeFile


@dataclass(frozen=True, slots=True)
class LtxBegin:
    """An LTX file of `size` bytes follows in LTX_DATA messages, then LTX_END."""

    CODE: ClassVar[int] = 21
    name: Name
    min_txid: Txid
    max_txid: Txid
    size: FileSize


@dataclass(frozen=True, slots=True)
class LtxData:
    CODE: ClassVar[int] = 22
    name: Name
    data: Chunk


@dataclass(frozen=True, slots=True)
class LtxEnd:
    """`whole` is false if the sender could not read its file to the end: forget it."""

    CODE: ClassVar[int] = 23
    name: Name
    whole: Flag


@dataclass(frozen=True, slots=True)
class Welcome:
    """The primary's answer to HELLO. `epoch` is that of its lease. `sync`: its commits wait for the replicas."""

    CODE: ClassVar[int] = 30
    protocol: U16
    cluster_id: ClusterId = ""
    node_id: U64 = 0
    hostname: Hostname = ""
    epoch: U64 = 0
    sync: Flag = False


@dataclass(frozen=True, slots=True)
class SendChecksums:
    """The replica's copy does not fit: it is to answer with RESYNC."""

    CODE: ClassVar[int] = 31
    name: Name
    reason: Reason


@dataclass(frozen=True, slots=True)
class SnapshotBegin:
    """`request` is the RESYNC it answers, 0 if none. What the replica's log holds beyond `keep_branch_after` exists
    nowhere else and is to be kept aside, if `has_branch`."""

    CODE: ClassVar[int] = 32
    name: Name
    request: U32
    page_size: PageSize
    start: At
    has_branch: Flag = False
    keep_branch_after: U64 = 0


@dataclass(frozen=True, slots=True)
class SnapshotEnd:
    """The result: `commit` pages at `position`. `epochs` are (epoch, its first TXID) of the history that led there."""

    CODE: ClassVar[int] = 34
    name: Name
    position: At
    commit: U32
    epochs: Epochs = ()


@dataclass(frozen=True, slots=True)
class GiveBack:
    """The primary is at `after` and lacks what comes then. `limit_bytes` 0: it takes no writes yet, and wants whatever
    may fit. Otherwise it takes writes: only what follows exactly, and not more bytes than that."""

    CODE: ClassVar[int] = 35
    name: Name
    after: At
    limit_bytes: U64 = 0


@dataclass(frozen=True, slots=True)
class SetAside:
    """The primary has never had this database. It says nothing more of it until the replica has acknowledged TXID 0:
    what was acknowledged before speaks of the copy that is set aside."""

    CODE: ClassVar[int] = 36
    name: Name


@dataclass(frozen=True, slots=True)
class Ready:
    """Every database has been brought to the position it had when the replica connected, or later."""

    CODE: ClassVar[int] = 37


@dataclass(frozen=True, slots=True)
class AskDurable:
    """Something else waits until the replica holds this database durably up to `txid`: it is to make it durable, and to
    acknowledge that, as soon as it has applied so much."""

    CODE: ClassVar[int] = 39
    name: Name
    txid: Txid


LtxMessage: TypeAlias = Ltx | LtxBegin | LtxData | LtxEnd
FromReplica: TypeAlias = Error | Heartbeat | Hello | Databases | Ack | Resync | Checksums | TailEnd | Pages | LtxMessage
FromPrimary: TypeAlias = (
    Error
    | Heartbeat
    | Welcome
    | SendChecksums
    | SnapshotBegin
    | SnapshotPages
    | SnapshotEnd
    | GiveBack
    | SetAside
    | Ready
    | AskPages
    | AskDurable
    | LtxMessage
)
Message: TypeAlias = FromReplica | FromPrimary

_SENDERS: Final[tuple[tuple[Sender, tuple[type[Message], ...]], ...]] = (
    (Sender.BOTH, (Error, Heartbeat, Ltx, LtxBegin, LtxData, LtxEnd)),
    (Sender.REPLICA, (Hello, Databases, Ack, Resync, Checksums, TailEnd, Pages)),
    (
        Sender.PRIMARY,
        (
            Welcome, SendChecksums, SnapshotBegin, SnapshotPages, SnapshotEnd, GiveBack, SetAside, Ready, AskPages,
            AskDurable,
        ),
    ),
)
MESSAGES: Final[dict[int, tuple[type[Message], Sender]]] = {
    message.CODE: (message, sender) for sender, messages in _SENDERS for message in messages
}
_KINDS: Final = {message: kinds_of(message) for message, _ in MESSAGES.values()}
assert len(MESSAGES) == sum(len(messages) for _, messages in _SENDERS)


def pack(message: Message) -> bytes:
    """The bytes of one message. FormatError if it breaks a limit."""
    data = b"".join(
        [bytes((message.CODE,)), *(kind.pack(getattr(message, name)) for name, kind in _KINDS[type(message)])]
    )
    if len(data) > MAX_MESSAGE:
        raise FormatError(f"a {type(message).__name__} of {len(data)} bytes")
    return data


def unpack(data: bytes, sender: Sender) -> Message:
    """The message in `data`, which came from `sender`. FormatError if it is not one."""
    if len(data) > MAX_MESSAGE:
        raise FormatError(f"a message of {len(data)} bytes, at most {MAX_MESSAGE} are allowed")
    cursor = Cursor(data)
    code = cursor.u8()
    message, allowed = MESSAGES.get(code, (None, Sender(0)))
    if message is None:
        raise FormatError(f"unknown message type {code}")
    if not sender & allowed:
        raise FormatError(f"{message.__name__} from the wrong side")
    values = []
    for name, kind in _KINDS[message]:
        values.append(kind.read(cursor))
        if name == "protocol" and values[0] != PROTOCOL_VERSION:
            return message(*values)
    cursor.expect_end()
    return message(*values)


def batches(items: Iterable[Any], size: int = MAX_ENTRIES) -> list[tuple[Any, ...]]:
    """`items` in tuples of at most `size`; at least one, which may be empty."""
    values = tuple(items)
    return [values[at : at + size] for at in range(0, len(values), size)] or [()]


def checksum_messages(name: str, request: int, checksums: npt.NDArray[np.uint64]) -> Iterable[Checksums]:
    """All of a database's page checksums (index pgno - 1) in messages."""
    for at in range(0, len(checksums), MAX_CHECKSUMS):
        yield Checksums(name, request, at + 1, checksums[at : at + MAX_CHECKSUMS].astype(CHECKSUM_TYPE).tobytes())
