"""Nodes that would be taken for one another: two with one id, or two at one URL.

An id stands for one log. Where a data directory was copied, or a configuration, the cluster would believe one node's
promises and positions of the other: a node begins only when nobody answers with its id elsewhere, and nobody else at
its own URL. Nodes that do not answer are not seen; and of two that begin at the same moment neither sees the other.
"""

from __future__ import annotations

from typing import Any

from pylitefs.cluster.lease_port import View
from pylitefs.errors import LitefsError
from pylitefs.http.peers import Peers

ASK_S = 1.0


async def mistaken(peers: Peers, view: View, node_id: int, instance: str, url: str) -> str:
    """What is wrong, and what to do; "" if nothing is. `instance` tells this process from a copy of it."""
    found = await _who_is_at(peers, url)
    if found.get("node-id", f"{node_id:016X}") != f"{node_id:016X}":
        return (
            f"lease.advertise-url is {url}, and another node answers there ({found['node-id']}): give each node a URL "
            "of its own"
        )
    for member in view.members:
        if member.node_id == node_id and member.url not in ("", url):
            found = await _who_is_at(peers, member.url)
            if found.get("node-id") == f"{node_id:016X}" and found.get("instance") != instance:
                return (
                    f"the node at {member.url} has the same id as this one ({node_id:016X}): if this data directory is "
                    "a copy of its, stop this node, remove the file id in it, and start again"
                )
    return ""


async def _who_is_at(peers: Peers, url: str) -> dict[str, Any]:
    """Empty if no node answers."""
    try:
        return await peers.positions(url, ASK_S)
    except LitefsError:
        return {}
