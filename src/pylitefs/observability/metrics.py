"""The numbers behind `/metrics`.

Names are LiteFS's where the meaning is the same; the rest is ours. What is a state (positions, sizes, lag) is read when
Prometheus asks; what is counted comes from the event bus. Nothing here is called by the code that is measured.

LiteFS's counters of page writes per file kind are missing, because here the kernel carries the pages.
LiteFS names its counters without the suffix `_total`, which this client library insists on: they are exposed untyped.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric, UntypedMetricFamily
from prometheus_client.registry import Collector

from pylitefs import __version__
from pylitefs.events import Event
from pylitefs.formats.names import shown
from pylitefs.status import ClusterNumbers, Replicas, StoreView, lag_txids

_LATENCY_BUCKETS_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)
_WORK_BUCKETS_S = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.25, 1, 5)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)

_SYNC_FAILURES = ("timeout", "demoted")
_LOCAL_SOURCES = frozenset(["capture", "import", "repair", "drop"])  # transactions made on this node


class Metrics:
    """All metrics of a node, in a registry of their own. `close` ends the subscription to the bus."""

    def __init__(self, store: StoreView, replicas: Replicas) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self._commit_to_apply = Histogram(
            "litefs_commit_to_apply_seconds",
            "From the commit on the primary to readers on this replica",
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._batch = Histogram(
            "litefs_batch_transactions", "Transactions in one log entry", buckets=_BATCH_BUCKETS, registry=registry
        )
        self._capture = Histogram(
            "litefs_capture_seconds", "Work to capture one log entry", buckets=_WORK_BUCKETS_S, registry=registry
        )
        self._apply = Histogram(
            "litefs_apply_seconds", "Work to apply one log entry", buckets=_WORK_BUCKETS_S, registry=registry
        )
        self._sync_wait = Histogram(
            "litefs_sync_wait_seconds",
            "How long commits waited for replicas (replication.sync), also those that failed",
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._sync_failures = Counter(
            "litefs_sync_failed_commits", "Commits that failed while they waited for replicas", ["reason"],
            registry=registry,
        )  # fmt: skip
        for reason in _SYNC_FAILURES:
            self._sync_failures.labels(reason)  # shown before it happens
        self._log_bytes = Counter("litefs_log_written_bytes", "Bytes written to the log", registry=registry)
        self._counted = {
            event_type: Counter(name, text, registry=registry)
            for event_type, (name, text) in {
                "gap": ("litefs_gaps", "Times that captured transactions were missed"),
                "overlooked": (
                    "litefs_overlooked", "Commits that nobody was woken for, found by the watchdog: a defect of litefs"
                ),
                "repair": ("litefs_repairs", "Gaps and doubts repaired by diff"),
                "resync": ("litefs_resyncs", "Times this replica fetched the pages that differ"),
                "snapshotSent": ("litefs_snapshots_sent", "Snapshots sent to replicas"),
                "damaged": ("litefs_damage_found", "Times that pages did not match their checksums"),
                "lost": ("litefs_branches_lost", "Branches moved to lost/"),
                "primaryChange": ("litefs_primary_changes", "Times that the role or the primary changed, as seen here"),
                "promoted": ("litefs_promotions", "Times this node became the primary"),
                "syncDegraded": ("litefs_sync_degraded", "Times that commits ceased to wait for missing replicas"),
                "demoted": ("litefs_demotions", "Times this node ceased to be the primary"),
            }.items()
        }
        self._lost = Counter("litefs_lost_transactions", "Transactions moved to lost/", registry=registry)
        self._healed = Counter("litefs_pages_healed", "Damaged pages that were replaced", registry=registry)
        self._scrubbed = Counter("litefs_scrubbed_bytes", "Read to look for damaged pages", registry=registry)
        self._events = Counter("litefs_events", "Events by type", ["type"], registry=registry)
        self._per_database = _PerDatabase()
        self._state = _StateCollector(store, replicas, self._per_database)
        registry.register(self._state)
        ProcessCollector(registry=registry)
        self._unsubscribe: Callable[[], None] = store.events.subscribe(self._on_event)

    def close(self) -> None:
        self._unsubscribe()

    def expose(self, cluster: ClusterNumbers | None = None) -> bytes:
        """The Prometheus text format. Reads the store; not for the event loop's thread, nor for two at a time."""
        self._state.cluster = cluster
        return generate_latest(self.registry)

    def _on_event(self, event: Event) -> None:
        self._events.labels(event.type).inc()
        if event.type in self._counted:
            self._counted[event.type].inc()
        if event.type == "scrubbed":
            self._scrubbed.inc(event.data.get("bytes") or 0)
        if event.type == "healed":
            self._healed.inc(event.data.get("pages") or 0)
        if event.type == "lost":
            self._lost.inc(event.data.get("transactions") or 0)
        if event.type == "synced":
            self._sync_wait.observe(event.data["seconds"])
            if "failed" in event.data:
                self._sync_failures.labels(event.data["failed"]).inc()
        if event.type == "tx" and event.database is not None:
            self._on_transaction(event, event.database)

    def _on_transaction(self, event: Event, database: str) -> None:
        data = event.data
        count = data["txid"] - data.get("min_txid", data["txid"]) + 1
        source, seconds = data.get("source"), data.get("seconds")
        self._batch.observe(count)
        self._log_bytes.inc(data.get("size_bytes") or 0)
        if source in _LOCAL_SOURCES:
            self._per_database.committed(database, count)
        if seconds is not None:
            (self._apply if source == "apply" else self._capture).observe(seconds)
        if (latency_s := data.get("latency_s")) is not None:
            latency_s = max(0.0, latency_s)  # two machines' clocks
            self._commit_to_apply.observe(latency_s)
            self._per_database.applied(database, latency_s)


class _PerDatabase:
    """What is counted per database. Shown only for databases that exist, so that dropped names do not pile up there."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._commits: defaultdict[str, int] = defaultdict(int)
        self._latency_s: dict[str, float] = {}

    def committed(self, name: str, count: int) -> None:
        with self._lock:
            self._commits[name] += count

    def applied(self, name: str, latency_s: float) -> None:
        with self._lock:
            self._latency_s[name] = latency_s

    def read(self, name: str) -> tuple[int, float]:
        """(transactions committed here, seconds from commit to apply of the last one applied)."""
        with self._lock:
            return self._commits.get(name, 0), self._latency_s.get(name, 0.0)

    def forget_dropped(self, store: StoreView) -> None:
        """Forget the databases that are gone."""
        with self._lock:
            counted = {*self._commits, *self._latency_s}
        for name in counted.difference(store.names()):  # asked after: a new database is never among them
            with self._lock:
                self._commits.pop(name, None)
                self._latency_s.pop(name, None)


class _Labelled(Protocol):
    def add_metric(self, labels: list[str], value: float) -> None: ...


class _StateCollector(Collector):
    """Reads the store and the replicas at scrape time."""

    def __init__(self, store: StoreView, replicas: Replicas, counted: _PerDatabase) -> None:
        self._store = store
        self._replicas = replicas
        self._counted = counted
        self.cluster: ClusterNumbers | None = None

    def describe(self) -> list[Metric]:
        return []  # nothing is read when this is registered

    def collect(self) -> Iterator[Metric]:
        store, names = self._store, self._store.names()
        yield InfoMetricFamily("litefs", "This program", {"version": __version__})
        yield GaugeMetricFamily("litefs_db_count", "Databases", len(names))
        yield GaugeMetricFamily("litefs_is_primary", "1 on the primary", int(store.is_primary))
        lag_s = 0.0 if store.is_primary or store.lag_ms is None else store.lag_ms / 1000
        yield GaugeMetricFamily("litefs_lag_seconds", "How far this replica is behind; 0 on the primary", lag_s)
        yield GaugeMetricFamily("litefs_subscriber_count", "Listeners to events", store.events.subscriber_count)
        yield from self._databases(names)
        yield from self._connected()
        if self.cluster is not None:
            yield from _cluster(self.cluster)

    def _databases(self, names: list[str]) -> Iterator[Metric]:
        txid = GaugeMetricFamily("litefs_db_txid", "TXID of the database", labels=["db"])
        count = GaugeMetricFamily("litefs_db_ltx_count", "Files in the log", labels=["db"])
        size = GaugeMetricFamily("litefs_db_ltx_bytes", "Bytes in the log", labels=["db"])
        pages = GaugeMetricFamily("litefs_db_size_bytes", "Bytes of the database", labels=["db"])
        wal = GaugeMetricFamily("litefs_db_wal_size_bytes", "Bytes of the WAL", labels=["db"])
        commits = UntypedMetricFamily("litefs_db_commit_count", "Transactions committed here", labels=["db"])
        lag = GaugeMetricFamily("litefs_db_lag_seconds", "Commit to apply of the last transaction", labels=["db"])
        self._counted.forget_dropped(self._store)
        for name in names:
            database = self._store.get(name)
            if database is None:
                continue
            committed, latency_s = self._counted.read(name)
            label = [shown(name)]
            values: list[tuple[_Labelled, float]] = [
                (txid, database.position.txid),
                (count, database.log.count),
                (size, database.log.size_bytes),
                (pages, database.size_bytes),
                (wal, database.wal_size_bytes),
                (commits, committed),
                (lag, 0.0 if self._store.is_primary else latency_s),
            ]
            for family, value in values:
                family.add_metric(label, value)
        yield from (txid, count, size, pages, wal, commits, lag)

    def _connected(self) -> Iterator[Metric]:
        replicas = self._replicas()
        heads = {name: found.position.txid for name in self._store.names() if (found := self._store.get(name))}
        yield GaugeMetricFamily("litefs_http_stream_count", "Connected replicas", len(replicas))
        seconds = GaugeMetricFamily("litefs_replica_lag_seconds", "Lag of a connected replica", labels=["replica"])
        behind = GaugeMetricFamily("litefs_replica_lag_txids", "Transactions not yet applied", labels=["replica"])
        for replica in replicas:
            behind.add_metric([replica.node_id], lag_txids(replica, heads))
            if replica.lag_ms is not None:
                seconds.add_metric([replica.node_id], replica.lag_ms / 1000)
        yield from (seconds, behind)


def _cluster(numbers: ClusterNumbers) -> Iterator[Metric]:
    role = GaugeMetricFamily("litefs_role", "1 for the role of this node", labels=["role"])
    for name in ("primary", "replica"):
        role.add_metric([name], int(numbers.role == name))
    yield role
    yield GaugeMetricFamily("litefs_epoch", "Epoch of the lease, as far as this node knows", numbers.epoch)
    if numbers.lease_left_s is not None:
        yield GaugeMetricFamily(
            "litefs_lease_remaining_seconds", "Until the lease must be renewed", numbers.lease_left_s
        )
    yield CounterMetricFamily("litefs_failovers", "Takeovers from a lost primary, in the cluster", numbers.failovers)
    yield GaugeMetricFamily("litefs_members", "Nodes of the cluster", numbers.members)
    seen = GaugeMetricFamily("litefs_member_seen_seconds", "Since a node was last heard of", labels=["member"])
    for member, seconds in numbers.seen_s.items():
        seen.add_metric([member], seconds)
    yield seen
    yield GaugeMetricFamily("litefs_sync_replicas", "Replicas that a commit waits for", numbers.sync)
    if numbers.in_sync is not None:
        yield GaugeMetricFamily(
            "litefs_in_sync_members", "Nodes that have all acknowledged commits, connected or not", numbers.in_sync
        )
    if numbers.in_sync_connected is not None:
        yield GaugeMetricFamily(
            "litefs_in_sync_replicas_connected", "In-sync replicas that are connected now", numbers.in_sync_connected
        )
    yield GaugeMetricFamily(
        "litefs_commits_waiting", "Commits that wait for replicas, once one has for 1.5 s", numbers.commits_wait
    )
    yield GaugeMetricFamily("litefs_paused", "1 while automatic failover is paused", int(numbers.paused))
    yield GaugeMetricFamily("litefs_cluster_problem", "1 while /cluster tells of a problem", int(numbers.problem))
