"""What a node tells about itself: the documents behind `/info`, `/status`, `/events` and `/debug/vars`. Pure.

TXIDs and checksums are 16 lower-case hex digits in JSON, for a 64-bit number does not survive JavaScript. `/info` and
`/events` have LiteFS's keys (camel case) and ours beside them.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from pylitefs.events import Event, EventBus
from pylitefs.formats.ltx.format import Position

Json = dict[str, Any]


# --- what is described -----------------------------------------------------------------------------------------------


class LogView(Protocol):
    """What is shown of a database's log."""

    @property
    def count(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...


class DatabaseView(Protocol):
    """What is shown of a database (`engine.database.Database`)."""

    @property
    def name(self) -> str: ...
    @property
    def position(self) -> Position: ...
    @property
    def page_size(self) -> int: ...
    @property
    def commit(self) -> int: ...
    @property
    def timestamp_ms(self) -> int: ...
    @property
    def log(self) -> LogView: ...
    @property
    def journal_mode(self) -> str: ...
    @property
    def wal_size_bytes(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def sqlite_version(self) -> int: ...
    @property
    def set_aside_reason(self) -> str | None: ...
    @property
    def withheld(self) -> str | None: ...
    @property
    def failing(self) -> str | None: ...
    def copy_to(self, path: str) -> Position: ...


class StoreView(Protocol):
    """What is shown of a node's databases (`engine.store.Store`)."""

    @property
    def data_dir(self) -> str: ...
    @property
    def cluster_id(self) -> str | None: ...
    @property
    def events(self) -> EventBus: ...
    @property
    def is_primary(self) -> bool: ...
    @property
    def primary_hostname(self) -> str | None: ...
    @property
    def lag_ms(self) -> int | None: ...
    def names(self) -> list[str]: ...
    def not_replicated(self) -> dict[str, str]: ...
    def get(self, name: str) -> DatabaseView | None: ...
    def flush_all(self) -> Future[dict[str, Position]]: ...


class FenceView(Protocol):
    """Until when this node may write (`engine.fence.Fence`), by CLOCK_BOOTTIME: inf without an end, 0 on a replica."""

    @property
    def until_s(self) -> float: ...
    def holds(self) -> bool: ...


class TombstoneView(Protocol):
    """Where a database ended that was dropped long ago (`engine.tombstones.Tombstone`)."""

    @property
    def position(self) -> Position: ...


class FencedStoreView(StoreView, Protocol):
    """A store whose role can change (`engine.store.Store`)."""

    @property
    def fence(self) -> FenceView: ...
    def tombstone(self, name: str) -> TombstoneView | None: ...


@dataclass(frozen=True)
class ClusterNumbers:
    """What metrics show of the cluster."""

    role: str  # "primary", "replica"
    epoch: int
    lease_left_s: float | None  # inf: without an end; None: not the primary
    members: int
    seen_s: Mapping[str, float] = field(default_factory=dict)  # by member: how long ago it was last heard of
    in_sync: int | None = None  # None: replication is asynchronous
    in_sync_connected: int | None = None  # None: that, or this node is not the primary
    sync: int = 0
    commits_wait: int = 0  # for longer than replicas need
    paused: bool = False
    problem: bool = False
    failovers: int = 0  # in the whole cluster, as far as is remembered


@dataclass(frozen=True)
class NodeInfo:
    """This process. `started_s` is seconds since 1970; `unhealthy` gives the reason why it does not serve, or None."""

    node_id: str  # 16 upper-case hex digits
    version: str
    mount_dir: str
    candidate: bool
    started_s: float
    hostname: str = ""
    primary_url: Callable[[], str] = field(default=lambda: "")  # on a replica: where it connects to
    passthrough: Callable[[], bool | None] = field(default=lambda: None)  # None: not mounted yet
    unhealthy: Callable[[], str | None] = field(default=lambda: None)
    caught_up: Callable[[], bool] = field(default=lambda: True)  # a replica has had all that its primary had, once


@dataclass(frozen=True)
class ReplicaProgress:
    """TXIDs of one database up to which a replica has received, applied and made durable; all 0 where its copy is not
    `in_line`: it is not known to be a state that the primary's database went through."""

    received: int
    applied: int
    durable: int
    in_line: bool = True


@dataclass(frozen=True)
class ReplicaInfo:
    """One connected replica, as the primary sees it."""

    node_id: str
    address: str  # HOST:PORT of its end of the connection
    state: str  # "snapshot", "catch-up", "live", ...
    lag_ms: float | None = None
    hostname: str = ""
    databases: Mapping[str, ReplicaProgress] = field(default_factory=dict)


Replicas = Callable[[], Sequence[ReplicaInfo]]
"""The replicas that are connected right now; empty on a replica. Callable from any thread."""


def lag_txids(replica: ReplicaInfo, heads: Mapping[str, int]) -> int:
    """How many transactions of all databases together `replica` has still to apply; `heads`: the primary's TXIDs."""
    return sum(
        max(0, txid - (replica.databases[name].applied if name in replica.databases else 0))
        for name, txid in heads.items()
    )


# --- documents -------------------------------------------------------------------------------------------------------


def info_document(store: StoreView, node: NodeInfo, positions: Mapping[str, Position], now_s: float) -> Json:
    """`/info`: LiteFS's keys first. The keys clusterID and primary are absent when they are not known."""
    document: Json = {}
    if store.cluster_id:
        document["clusterID"] = store.cluster_id
    document |= {"isPrimary": store.is_primary, "candidate": node.candidate, "path": node.mount_dir}
    if not store.is_primary and store.primary_hostname:
        document["primary"] = {"hostname": store.primary_hostname}
        if url := node.primary_url():
            document["primary"]["url"] = url
    return document | {
        "nodeID": node.node_id,
        "version": node.version,
        "uptimeSeconds": max(0, int(now_s - node.started_s)),
        "databases": {name: position_document(position) for name, position in sorted(positions.items())},
    }


def position_document(position: Position) -> Json:
    return {"txid": f"{position.txid:016x}", "checksum": f"{position.checksum:016x}"}


def status_document(
    store: StoreView, node: NodeInfo, replicas: Sequence[ReplicaInfo], now_s: float, cluster: Json | None = None
) -> Json:
    """`/status`: what `litefs status` shows and `litefs status -json` prints. `cluster`: the document of `/cluster`."""
    databases = [database_document(found) for name in sorted(store.names()) if (found := store.get(name)) is not None]
    heads = {document["name"]: int(document["txid"], 16) for document in databases}
    return {
        "node": {
            "id": node.node_id,
            "hostname": node.hostname,
            "version": node.version,
            "role": "primary" if store.is_primary else "replica",
            "candidate": node.candidate,
            "clusterID": store.cluster_id,
            "mountDir": node.mount_dir,
            "dataDir": store.data_dir,
            "passthrough": node.passthrough(),
            "uptimeSeconds": max(0, int(now_s - node.started_s)),
            "problem": node.unhealthy(),
        },
        "primary": None if store.is_primary else {"hostname": store.primary_hostname, "url": node.primary_url()},
        "lagMs": None if store.is_primary else store.lag_ms,
        "databases": databases,
        "notReplicated": [{"name": name, "reason": why} for name, why in sorted(store.not_replicated().items())],
        "replicas": [replica_document(replica, heads) for replica in replicas],
        "cluster": cluster,
    }


def database_document(database: DatabaseView) -> Json:
    position = database.position
    return {
        "name": database.name,
        **position_document(position),
        "sizeBytes": database.size_bytes,
        "pageSize": database.page_size,
        "commit": database.commit,
        "timestamp": rfc3339(database.timestamp_ms) if database.timestamp_ms else None,
        "journalMode": database.journal_mode,
        "walSizeBytes": database.wal_size_bytes,
        "logSizeBytes": database.log.size_bytes,
        "logFiles": database.log.count,
        "sqliteVersion": version_text(database.sqlite_version),  # of the library that wrote to it last
        "mayCorruptWAL": database.journal_mode == "wal" and 0 < database.sqlite_version < WAL_RESET_FIXED_IN,
        "setAside": database.set_aside_reason,  # why it is not replicated; null if all is well
        "failing": database.failing,  # why the log cannot be written (a full disk): replicas wait; null if it can be
        "withheld": database.withheld,  # why replicas have the state before what its file holds; null if all is well
    }


WAL_RESET_FIXED_IN = 3051003
"""SQLite 3.7.0 to 3.51.2 can corrupt a WAL database when two connections checkpoint at once (sqlite.org/wal.html)."""


def version_text(number: int) -> str | None:
    """SQLITE_VERSION_NUMBER as "3.51.3"; None if the database does not say."""
    return f"{number // 1000000}.{number // 1000 % 1000}.{number % 1000}" if number else None


def replica_document(replica: ReplicaInfo, heads: Mapping[str, int]) -> Json:
    return {
        "nodeID": replica.node_id,
        "hostname": replica.hostname,
        "address": replica.address,
        "state": replica.state,
        "lagTXIDs": lag_txids(replica, heads),
        "lagMs": None if replica.lag_ms is None else round(replica.lag_ms, 3),
        "databases": {
            name: {
                "received": f"{progress.received:016x}",
                "applied": f"{progress.applied:016x}",
                "durable": f"{progress.durable:016x}",
            }
            for name, progress in sorted(replica.databases.items())
            if name in heads
        },
    }


def debug_document(store: StoreView, node: NodeInfo) -> Json:
    """`/debug/vars`, as far as LiteFS's keys mean something here."""
    databases = {
        name: {"name": name, **position_document(found.position)}
        for name in sorted(store.names())
        if (found := store.get(name)) is not None
    }
    return {"store": {"isPrimary": store.is_primary, "candidate": node.candidate, "dbs": databases}}


# --- events ----------------------------------------------------------------------------------------------------------

_HEX_WORDS = ("txid", "checksum")


def init_event(store: StoreView) -> Event:
    """The first event of every stream: the role as it is now."""
    data: Json = {"is_primary": store.is_primary}
    if not store.is_primary and store.primary_hostname:
        data["hostname"] = store.primary_hostname
    return Event("init", None, data)


def event_line(event: Event) -> bytes:
    """An event as one line of `/events`: {"type":T,"db":NAME?,"data":{...}}."""
    document: Json = {"type": event.type}
    if event.database is not None:
        document["db"] = event.database
    document["data"] = dict(_json_item(key, value) for key, value in event.data.items() if value is not None)
    return json.dumps(document, separators=(",", ":"), default=str).encode() + b"\n"


def _json_item(key: str, value: object) -> tuple[str, object]:
    if key == "timestamp_ms" and isinstance(value, int):
        return "timestamp", rfc3339(value)
    if key.endswith(_HEX_WORDS) and isinstance(value, int):
        value = f"{value:016x}"
    elif key.endswith("node_id") and isinstance(value, int):
        value = f"{value:016X}"
    first, *rest = key.split("_")
    words = ["ID" if word == "id" else "TxID" if word == "txid" else word.capitalize() for word in rest]
    return ("txID" if first == "txid" else first) + "".join(words), value


def rfc3339(timestamp_ms: int) -> str:
    """UTC, as Go prints it: no trailing zeros in the fraction of a second."""
    seconds, milliseconds = divmod(timestamp_ms, 1000)
    text = (datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=seconds)).isoformat()
    fraction = f".{milliseconds:03d}".rstrip("0") if milliseconds else ""
    return f"{text}{fraction}Z"
