"""Leader and member as JSON, as every engine stores them. Pure.

leader    {"hostname": "a", "advertise-url": "http://…", "node-id": "…16 hex", "epoch": 7}    the first two are LiteFS's
member    {"node-id", "hostname", "advertise-url", "candidate", "priority", "tags": {…}, "info": {…}}
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from pylitefs.cluster.lease_port import MAX_STATE_BYTES, Leader, Member
from pylitefs.errors import LitefsError, UsageError


def check_state(state: bytes) -> bytes:
    """The state itself, if every engine can keep it."""
    if len(state) > MAX_STATE_BYTES:
        raise LitefsError(f"the cluster's state has {len(state)} bytes: lease engines keep {MAX_STATE_BYTES} at most")
    return state


def check_ttl(ttl_s: float, min_ttl_s: float, engine: str) -> float:
    if not math.isfinite(ttl_s) or ttl_s < min_ttl_s:
        raise UsageError(f"a lease of {ttl_s:g} s is too short for {engine}: the least is {min_ttl_s:g} s")
    return ttl_s


def hex_id(node_id: int) -> str:
    return f"{node_id:016x}"


def leader_fields(leader: Leader) -> dict[str, Any]:
    return {
        "hostname": leader.hostname,
        "advertise-url": leader.url,
        "node-id": hex_id(leader.node_id),
        "epoch": leader.epoch,
    }


def member_fields(member: Member) -> dict[str, Any]:
    return {
        "node-id": hex_id(member.node_id),
        "hostname": member.hostname,
        "advertise-url": member.url,
        "candidate": member.candidate,
        "priority": member.priority,
        "tags": dict(member.tags),
        "info": dict(member.info),
    }


def encode(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":"), sort_keys=True).encode()


def decode(data: bytes | str) -> dict[str, Any]:
    """The object in `data`; empty if there is none."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def part(fields: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The object under `key`; empty if there is none."""
    found = fields.get(key)
    return found if isinstance(found, dict) else {}


def leader_from(fields: Mapping[str, Any]) -> Leader:
    """Whatever is missing or strange is 0 or "": the lease is held all the same."""
    return Leader(_id(fields), _text(fields, "hostname"), _text(fields, "advertise-url"), _number(fields, "epoch"))


def member_from(fields: Mapping[str, Any]) -> Member | None:
    """None where it is no entry of ours."""
    node_id = _id(fields)
    if not node_id:
        return None
    return Member(
        node_id,
        _text(fields, "hostname"),
        _text(fields, "advertise-url"),
        fields.get("candidate") is True,
        _number(fields, "priority"),
        {key: str(value) for key, value in part(fields, "tags").items()},
        part(fields, "info"),
    )


def ttl_from(fields: Mapping[str, Any]) -> float | None:
    """The time to live that a record states; None if it states none that makes sense."""
    ttl = fields.get("ttl")
    if isinstance(ttl, int | float) and not isinstance(ttl, bool) and 0 < ttl < 1e6:
        return float(ttl)
    return None


def _id(fields: Mapping[str, Any]) -> int:
    try:
        return int(_text(fields, "node-id") or "0", 16)
    except ValueError:
        return 0


def _text(fields: Mapping[str, Any], key: str) -> str:
    value = fields.get(key, "")
    return value if isinstance(value, str) else ""


def _number(fields: Mapping[str, Any], key: str) -> int:
    value = fields.get(key, 0)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
