"""The JSON documents of `/cluster`, `/history`, `/sync`, `/halt` and what nodes ask each other, from values. Pure.

As everywhere, node ids are 16 upper-case hex digits, TXIDs and checksums 16 lower-case ones. Epochs are numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from pylitefs.cluster.control import AWAY, FAILOVER, ClusterView, CommitsWait, HaltLock, HistoryEntry, MemberView
from pylitefs.formats.ltx.format import Position
from pylitefs.status import ClusterNumbers, Json, rfc3339

_MAX_MEMBERS = 1000
_MAX_TEXT = 2048
_LAST_MS = 253_402_300_799_999  # of the year 9999: what comes from another node may be anything


def node_id_text(node_id: int) -> str:
    return f"{node_id:016X}"


def cluster_document(view: ClusterView) -> Json:
    return {
        "nodeID": node_id_text(view.node_id),
        "isPrimary": view.is_primary,
        "clusterID": view.cluster_id,
        "epoch": view.epoch,
        "primary": None if view.primary is None else member_document(view.primary),
        "members": [member_document(member) for member in view.members],
        "paused": view.paused,
        "sync": view.sync,
        "inSync": None if view.in_sync is None else [node_id_text(node_id) for node_id in view.in_sync],
        "commitsWait": None if view.commits_wait is None else _commits_wait(view.commits_wait),
        "history": history_document(view),
        "engine": view.engine,
        "problem": view.problem,
    }


def _commits_wait(waiting: CommitsWait) -> Json:
    return {"count": waiting.count, "seconds": round(waiting.seconds, 3), "reason": waiting.reason}


def member_document(member: MemberView) -> Json:
    return {
        "nodeID": node_id_text(member.node_id),
        "hostname": member.hostname,
        "url": member.url,
        "role": member.role,
        "state": member.state,
        "candidate": member.candidate,
        "priority": member.priority,
        "tags": dict(member.tags),
        "positions": {
            name: {"epoch": epoch, "txid": f"{txid:016x}"} for name, (epoch, txid) in sorted(member.positions.items())
        },
        "lagMs": _finite(member.lag_ms),
        "lagTXIDs": member.lag_txids,
        "inSync": member.in_sync,
        "seenSeconds": _finite(member.seen_s),
    }


def members_from(document: Json) -> tuple[MemberView, ...]:
    """Of a `cluster_document`; ValueError for what is none."""
    members = document.get("members")
    if not isinstance(members, list) or len(members) > _MAX_MEMBERS:
        raise ValueError("no members")
    try:
        return tuple(_member_from(member) for member in members)
    except (TypeError, KeyError, AttributeError):
        raise ValueError("no members") from None


def _member_from(document: Json) -> MemberView:
    shown = MemberView(
        node_id=_number(document["nodeID"]),
        hostname=document["hostname"],
        url=document["url"],
        role=document["role"],
        state=document["state"],
        candidate=document["candidate"],
        priority=document["priority"],
        tags={str(key): str(value) for key, value in document["tags"].items()},
        positions={name: (at["epoch"], _number(at["txid"])) for name, at in document["positions"].items()},
        lag_ms=document["lagMs"],
        lag_txids=document["lagTXIDs"],
        in_sync=document["inSync"],
        seen_s=document["seenSeconds"],
    )
    texts = shown.hostname, shown.url, shown.role, shown.state
    counts = shown.priority, *(epoch for epoch, _ in shown.positions.values())
    measures = shown.lag_ms, shown.lag_txids, shown.seen_s
    if (
        not all(type(text) is str and len(text) <= _MAX_TEXT for text in texts)
        or not all(type(count) is int for count in counts)
        or not all(measure is None or type(measure) in (int, float) for measure in measures)
        or not (type(shown.candidate) is bool and type(shown.in_sync) is bool)
    ):
        raise ValueError("a strange member")
    return shown


def _number(text: str) -> int:
    """Of 16 hex digits."""
    if len(text) != 16 or not text.isalnum():
        raise ValueError("a strange number")
    return int(text, 16)


def history_document(view: ClusterView) -> list[Json]:
    """Oldest first."""
    return [_entry(entry) for entry in view.history]


def _entry(entry: HistoryEntry) -> Json:
    return {
        "epoch": entry.epoch,
        "nodeID": node_id_text(entry.node_id),
        "hostname": entry.hostname,
        "txid": f"{entry.txid:016x}",
        "reason": entry.reason,
        "time": rfc3339(min(max(0, entry.time_ms), _LAST_MS)),
    }


def position_answer(name: str, position: Position) -> Json:
    """Of `/sync`, `/position` and `/tx`."""
    return {
        "name": name,
        "txid": f"{position.txid:016x}",
        "postApplyChecksum": f"{position.checksum:016x}",
        "epoch": position.epoch,
    }


def halt_document(lock: HaltLock) -> Json:
    """As LiteFS answers, and the epochs: of the position's transaction, and in which the lock was taken."""
    position = lock.position
    return {
        "id": lock.id,
        "pos": {
            "TXID": f"{position.txid:016x}",
            "PostApplyChecksum": f"{position.checksum:016x}",
            "Epoch": position.epoch,
        },
        "expires": rfc3339(min(max(0, lock.expires_ms), _LAST_MS)),
        "epoch": lock.epoch,
    }


def numbers(view: ClusterView, is_primary: bool, lease_left_s: float, failovers: int) -> ClusterNumbers:
    """What metrics show."""
    return ClusterNumbers(
        role="primary" if is_primary else "replica",
        epoch=view.epoch,
        lease_left_s=max(0.0, lease_left_s) if is_primary else None,
        members=sum(1 for member in view.members if member.state != AWAY),
        seen_s=_seen_s(view),
        in_sync=None if view.in_sync is None else len(view.in_sync),
        in_sync_connected=_connected(view) if is_primary and view.in_sync is not None else None,
        sync=view.sync,
        commits_wait=0 if view.commits_wait is None else view.commits_wait.count,
        paused=view.paused,
        problem=bool(view.problem),
        failovers=failovers,
    )


def _connected(view: ClusterView) -> int:
    """How many of those in sync are connected to this node, the primary."""
    in_sync = set(view.in_sync or ()) - {view.node_id}
    return sum(1 for member in view.members if member.node_id in in_sync and member.seen_s == 0.0)


def failovers_after(view: ClusterView, epoch: int) -> tuple[int, int]:
    """How many changes of the primary after `epoch` nobody had asked for; the latest epoch of the history."""
    new = [entry for entry in view.history if entry.epoch > epoch]
    return sum(entry.reason == FAILOVER for entry in new), max([epoch, *(entry.epoch for entry in new)])


def _seen_s(view: ClusterView) -> Mapping[str, float]:
    return {node_id_text(member.node_id): member.seen_s for member in view.members if member.seen_s is not None}


def _finite(value: float | None) -> float | None:
    """JSON has no infinity."""
    return None if value is None or not math.isfinite(value) else round(value, 3)
