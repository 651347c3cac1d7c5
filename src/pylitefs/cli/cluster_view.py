"""What the commands say about a cluster, from the document of `/cluster`: names of nodes, members, history."""

from __future__ import annotations

import datetime
import re
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.text import Text

from pylitefs.cli.forms import format_duration, format_ms, table
from pylitefs.cluster.control import AWAY, NOT_CONNECTED, CommitsWait
from pylitefs.errors import UsageError

Json = dict[str, Any]

_SHORT_ID = 8  # digits: enough to tell the nodes of one cluster apart
_UNHEARD_S = 5.0  # a member that was not heard of for longer is shown as such


# --- names -----------------------------------------------------------------------------------------------------------


def members_of(cluster: Json) -> list[Json]:
    """Every node that the document knows, each once."""
    found = {member["nodeID"]: member for member in cluster["members"]}
    if cluster["primary"] is not None:
        found.setdefault(cluster["primary"]["nodeID"], cluster["primary"])
    return list(found.values())


def find_member(cluster: Json, name: str) -> Json:
    """The one node that `name` means: a host name, a URL, or an id or its beginning. Raises UsageError."""
    members = members_of(cluster)
    wanted, digits = name.rstrip("/"), name.upper()
    is_id = re.fullmatch(r"[0-9A-Fa-f]{1,16}", name) is not None
    for matches in (
        [member for member in members if member["nodeID"] == digits],
        [member for member in members if member["hostname"] == name],
        [member for member in members if wanted and member["url"].rstrip("/") == wanted],
        [member for member in members if is_id and member["nodeID"].startswith(digits)],
    ):
        if len(matches) == 1:
            return matches[0]
        if matches:
            ids = ", ".join(member["nodeID"] for member in matches)
            raise UsageError(f"{name} is the name of {len(matches)} nodes: give one of their ids: {ids}")
    known = ", ".join(full_name(member) for member in members) or "none"
    raise UsageError(f"no node of the cluster is called {name}: known are {known}")


def node_of(cluster: Json) -> Json:
    """The member that answered."""
    for member in members_of(cluster):
        if member["nodeID"] == cluster["nodeID"]:
            return member
    return {"nodeID": cluster["nodeID"], "hostname": "", "url": ""}


def full_name(member: Json) -> str:
    """ "db1 (0123456789ABCDEF)", or the id alone."""
    return f"{member['hostname']} ({member['nodeID']})" if member["hostname"] else str(member["nodeID"])


def short_names(members: list[Json]) -> dict[str, str]:
    """By id: the host name where no other node has it, else with the beginning of the id."""
    names = {}
    for member in members:
        hostname, node_id = member["hostname"], member["nodeID"]
        alone = sum(other["hostname"] == hostname for other in members) == 1
        names[node_id] = hostname if hostname and alone else f"{hostname} {node_id[:_SHORT_ID]}".strip()
    return names


# --- members ---------------------------------------------------------------------------------------------------------


def head_rows(cluster: Json) -> list[tuple[str, str]]:
    """(label, markup) for the head of `litefs status`."""
    engine = escape(cluster["engine"])
    static = "  [dim]the configuration names the primary[/]"
    rows = [("lease", engine + (static if _is_static(cluster) else f"  [dim]epoch {cluster['epoch']:,}[/]"))]
    if cluster["paused"]:
        rows.append(("failover", "[bold yellow]paused[/]  [dim]litefs resume switches it on again[/]"))
    if cluster["sync"]:
        rows.append(("sync", _sync_row(cluster)))
    if waiting := cluster.get("commitsWait"):
        wait = CommitsWait(waiting["count"], waiting["seconds"], waiting["reason"])
        rows.append(("waiting", f"[bold red]{escape(str(wait))}[/]"))
    return rows


def _is_static(cluster: Json) -> bool:
    """Its epochs are times, which say nothing to people."""
    return bool(cluster["engine"] == "static")


def _sync_row(cluster: Json) -> str:
    needed = "1 replica" if cluster["sync"] == 1 else f"{cluster['sync']} replicas"
    if cluster["inSync"] is None:  # a replica with a static lease does not know
        return f"FULL commits wait for {needed}"
    members = members_of(cluster)
    names, away = short_names(members), {member["nodeID"] for member in members if member["state"] == AWAY}
    in_sync = [names.get(node_id, node_id) + (" (away)" if node_id in away else "") for node_id in cluster["inSync"]]
    colour = "green" if len(set(cluster["inSync"]) - away) >= cluster["sync"] else "yellow"
    return f"FULL commits wait for {needed}  [{colour}]in sync: {escape(', '.join(in_sync) or 'none')}[/]"


def render_members(cluster: Json) -> RenderableType:
    """One row for each node of the cluster, the primary first; fits 80 columns."""
    members = sorted(members_of(cluster), key=lambda member: member["role"] != "primary")
    if not members:
        return Text("\nno members known", style="dim")
    names = short_names(members)
    rows = [_member_row(member, names[member["nodeID"]], cluster) for member in members]
    used = [index for index in range(len(rows[0])) if index < 2 or any(row[index] for row in rows)]
    headings = ["~member", "role", ">epoch", "state", ">behind", ">lag", "sync", "~notes"]
    return table([headings[index] for index in used], [[row[index] for index in used] for row in rows])


def _member_row(member: Json, name: str, cluster: Json) -> list[str]:
    is_primary = member["role"] == "primary"
    here = member["nodeID"] == cluster["nodeID"]
    epoch = max((position["epoch"] for position in member["positions"].values()), default=None)
    behind, lag_ms = member["lagTXIDs"], member["lagMs"]
    if is_primary or behind is None:
        behind_text = ""
    else:
        behind_text = f"[yellow]{behind:,} tx[/]" if behind else "[green]0 tx[/]"
    sync = ""
    if cluster["sync"] and not is_primary:
        sync = "[green]yes[/]" if member["inSync"] else "[yellow]no[/]"
    return [
        f"{escape(name)}{' [cyan]*[/]' if here else ''}",
        "[bold green]primary[/]" if is_primary else "[cyan]replica[/]",
        "" if epoch is None or _is_static(cluster) else f"{epoch:,}",
        f"[red]{escape(member['state'])}[/]" if member["state"] in (AWAY, NOT_CONNECTED) else escape(member["state"]),
        behind_text,
        "" if is_primary or lag_ms is None else format_ms(lag_ms),
        sync,
        _notes(member, here),
    ]


def _notes(member: Json, here: bool) -> str:
    """What is not as it is with most nodes, and the tags."""
    notes = []
    seen_s = member["seenSeconds"]
    if not here and seen_s is not None and seen_s >= _UNHEARD_S:
        notes.append(f"[red]not heard of for {format_duration(int(seen_s))}[/]")
    if not member["candidate"]:
        notes.append("no candidate")
    if member["priority"]:
        notes.append(f"priority {member['priority']}")
    notes.extend(escape(f"{name}={value}") for name, value in sorted(member["tags"].items()))
    return ", ".join(notes)


# --- history ---------------------------------------------------------------------------------------------------------


def render_history(entries: list[Json]) -> RenderableType:
    """One row for each change of the primary, the oldest first."""
    if not entries:
        return Text("no change of the primary is remembered", style="dim")
    members = [{"nodeID": entry["nodeID"], "hostname": entry["hostname"]} for entry in entries]
    names = short_names(list({member["nodeID"]: member for member in members}.values()))
    rows = [
        [
            f"{entry['epoch']:,}",
            escape(names[entry["nodeID"]]),
            entry["txid"],
            local_time(entry["time"]),
            escape(entry["reason"]),
        ]
        for entry in entries
    ]
    return table([">epoch", "~primary", "txid", "since", "~reason"], rows, blank=False)


def local_time(text: str) -> str:
    """A time as JSON has it, "2026-01-02T03:04:05.678Z", in this machine's zone; as it is if it is none."""
    try:
        return datetime.datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError):
        return escape(text)
