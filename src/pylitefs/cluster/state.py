"""The document that all nodes of a cluster share in the lease engine, see `lease_port`.

    {"format": 1, "cluster-id": "LFSC…", "epoch": 7, "has-data": true, "last-leader": "16 hex digits", "paused": false,
     "in-sync": null or ["16 hex digits", …], "voters": as that, "handoff-to": "" or "16 hex digits",
     "positions": {"NAME": [epoch, txid], …} or [[[epoch, count], …], sum of the TXIDs],
     "history": [{"epoch": 7, "node": "16 hex digits", "hostname": "…", "txid": 12, "reason": "…", "time": ms}, …]}

Only the leader writes it, in one step with proof that it still leads; but anybody may set `paused`. It has at most
`MAX_STATE_BYTES`: of too many databases only the positions' total is in it; the history ends after `HISTORY` entries.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from pylitefs.cluster.control import HistoryEntry
from pylitefs.cluster.election import ClusterState, known_from, told, total
from pylitefs.cluster.lease_port import MAX_STATE_BYTES
from pylitefs.errors import FormatError

FORMAT = 1
HISTORY = 100
_MAX_TEXT = 200  # characters of a host name or a reason


@dataclass(frozen=True)
class Document:
    """`state` is what elections read, `history` the newest changes of the primary, oldest first."""

    state: ClusterState = field(default_factory=ClusterState)
    history: tuple[HistoryEntry, ...] = ()

    def with_state(self, **changes: Any) -> Document:
        return replace(self, state=replace(self.state, **changes))

    def with_entry(self, entry: HistoryEntry) -> Document:
        return replace(self, history=(*self.history, entry)[-HISTORY:])

    def pack(self) -> bytes:
        """At most MAX_STATE_BYTES; what matters least is left out first."""
        shorter: list[Callable[[Document], Document]] = [
            lambda document: document,
            lambda document: document.with_state(positions=total(document.state.positions)),
            lambda document: replace(document, history=document.history[-10:]),
            lambda document: replace(document, history=()),
        ]
        document = self
        for shorten in shorter:
            document = shorten(document)
            data = document._encode()
            if len(data) <= MAX_STATE_BYTES:
                return data
        raise FormatError("the cluster's state is too large for its lease engine")

    def _encode(self) -> bytes:
        state = self.state
        document = {
            "format": FORMAT,
            "cluster-id": state.cluster_id,
            "epoch": state.epoch,
            "has-data": state.has_data,
            "last-leader": _hex(state.last_leader),
            "paused": state.paused,
            "in-sync": None if state.in_sync is None else [_hex(node_id) for node_id in sorted(state.in_sync)],
            "voters": None if state.voters is None else [_hex(node_id) for node_id in sorted(state.voters)],
            "handoff-to": _hex(state.handoff_to),
            "positions": told(state.positions),
            "history": [
                {
                    "epoch": entry.epoch,
                    "node": _hex(entry.node_id),
                    "hostname": entry.hostname[:_MAX_TEXT],
                    "txid": entry.txid,
                    "reason": entry.reason[:_MAX_TEXT],
                    "time": entry.time_ms,
                }
                for entry in self.history
            ],
        }
        return json.dumps(document, separators=(",", ":")).encode()

    @classmethod
    def unpack(cls, data: bytes) -> Document:
        """The empty document for nothing. Raises FormatError for what is none of this version: nobody may lead then."""
        if not data:
            return cls()
        try:
            fields = json.loads(data)
            if not isinstance(fields, dict) or fields.get("format") != FORMAT:
                raise ValueError
            in_sync, voters = fields["in-sync"], fields["voters"]
            state = ClusterState(
                cluster_id=_text(fields["cluster-id"]),
                epoch=_number(fields["epoch"]),
                has_data=fields["has-data"] is True,
                last_leader=_id(fields["last-leader"]),
                paused=fields["paused"] is True,
                in_sync=None if in_sync is None else frozenset(_id(node_id) for node_id in in_sync),
                voters=None if voters is None else frozenset(_id(node_id) for node_id in voters),
                positions=known_from(fields["positions"]),
                handoff_to=_id(fields["handoff-to"]),
            )
            return cls(state, tuple(_entry(entry) for entry in fields["history"])[-HISTORY:])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise FormatError(
                "the cluster's state in the lease engine was not written by this version of litefs: upgrade this node, "
                "or give the cluster another key"
            ) from None


def _entry(fields: Any) -> HistoryEntry:
    return HistoryEntry(
        _number(fields["epoch"]),
        _id(fields["node"]),
        _text(fields["hostname"]),
        _number(fields["txid"]),
        _text(fields["reason"]),
        _number(fields["time"]),
    )


def _hex(node_id: int) -> str:
    return f"{node_id:016x}" if node_id else ""


def _id(value: Any) -> int:
    text = _text(value)
    if text and len(text) != 16:
        raise ValueError
    return int(text, 16) if text else 0


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise ValueError
    return value
