"""`litefs status`."""

from __future__ import annotations

import json
import sys
import time

import click
from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pylitefs.cli.cluster_view import head_rows, members_of, render_members
from pylitefs.cli.forms import console, format_duration, format_ms, format_size, table
from pylitefs.cli.local_node import url_option
from pylitefs.errors import LitefsError
from pylitefs.formats.names import shown
from pylitefs.http.client import Client, Json

__all__ = ["format_duration", "format_ms", "format_size", "render", "status"]

_WATCH_INTERVAL_S = 1.0
_NAMED = 3  # databases in one line
_HEARTBEAT = "  [dim](without writes up to 1 s)[/]"


@click.command()
@url_option("The node's API.")
@click.option("-json", "as_json", is_flag=True, help="For programs; with -watch one line per second.")
@click.option("-watch", "watch", is_flag=True, help="Show it again every second until Ctrl-C.")
def status(url: str, as_json: bool, watch: bool) -> int:
    """Show a node with its databases, and the whole cluster as this node knows it.

    Of every member: its role, the epoch of its newest data, its state, how many transactions it is behind, its lag,
    whether commits wait for it (sync), and its tags; "*" is the node that answers. The lag is how old the state may be
    that is shown there: as the primary speaks once a second, it goes up to a second where nothing is written. How far
    members are behind is known to the primary, which every other node asks. "away" is a node that is not there and
    was within the last 6 hours, or that commits wait for. TXIDs and checksums are hexadecimal, as in NAME-pos and in
    the names of the log's files.

    \b
    Examples:
        $ litefs status
        $ litefs status -url http://db2:20202 -watch
        $ litefs status -json | jq '.databases[].txid'
        $ litefs status -json | jq '.cluster.members[] | {hostname, role, lagMs}'
    """
    client = Client(url)
    if watch:
        try:
            _watch(client, as_json)
        except KeyboardInterrupt:
            pass
        return 0
    document = client.status()
    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        console().print(render(document))
    return 0


def _watch(client: Client, as_json: bool) -> None:
    """Until interrupted. A node that does not answer is shown as such: it may be restarting."""
    if as_json or not sys.stdout.isatty():
        while True:
            document = client.status()
            if as_json:
                click.echo(json.dumps(document, separators=(",", ":")))
            else:
                console().print(render(document))
            time.sleep(_WATCH_INTERVAL_S)
    with Live(console=console(), auto_refresh=False, screen=True) as live:
        while True:
            try:
                shown: RenderableType = render(client.status())
            except LitefsError as error:
                shown = Text(str(error), style="red")
            live.update(Group(shown, Text("\nCtrl-C to end", style="dim")), refresh=True)
            time.sleep(_WATCH_INTERVAL_S)


# --- rendering -------------------------------------------------------------------------------------------------------


def render(document: Json) -> RenderableType:
    """The document of `/status` for people; fits 80 columns."""
    cluster = document.get("cluster")
    databases = _databases(document["databases"], document.get("notReplicated", []))
    parts: list[RenderableType] = [_head(document), databases]
    if cluster is not None and len(members_of(cluster)) > 1:
        parts.append(render_members(cluster))
    elif document["node"]["role"] == "primary":
        parts.append(_replicas(document["replicas"]))
    return Group(*parts)


def _head(document: Json) -> Table:
    node, primary = document["node"], document["primary"]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    role = "[bold green]primary[/]" if node["role"] == "primary" else "[bold cyan]replica[/]"
    grid.add_row("node", f"{role}  {_join(escape(node['hostname'] or ''), node['id'])}")
    if primary is not None:
        where = _join(escape(primary["hostname"] or ""), escape(primary["url"] or ""))
        grid.add_row("primary", where or "[yellow]not known[/]")
        lag_ms = document["lagMs"]
        grid.add_row("lag", "[yellow]never connected[/]" if lag_ms is None else format_ms(lag_ms) + _HEARTBEAT)
    grid.add_row("cluster", node["clusterID"] or "[yellow]not known yet[/]")
    cluster = document.get("cluster")
    for label, text in head_rows(cluster) if cluster is not None else ():
        grid.add_row(label, text)
    how = {True: "  [dim](passthrough)[/]", False: "  [dim](cached)[/]", None: ""}[node["passthrough"]]
    grid.add_row("mount", escape(node["mountDir"]) + how)
    grid.add_row("data", escape(node["dataDir"]))
    grid.add_row("up", f"{format_duration(node['uptimeSeconds'])}  [dim]pylitefs {node['version']}[/]")
    problems = [node["problem"], cluster["problem"] if cluster is not None else ""]
    for problem in dict.fromkeys(problems):
        if problem:
            grid.add_row("problem", f"[bold red]{escape(problem)}[/]")
    return grid


def _databases(databases: list[Json], not_replicated: list[Json]) -> RenderableType:
    rows = []
    for database in databases:
        rows.append(
            [
                escape(shown(database["name"])),
                database["txid"],
                database["checksum"],
                format_size(database["sizeBytes"]),
                _journal(database),
                format_size(database["logSizeBytes"]),
            ]
        )
    aside = [(database["name"], database["setAside"]) for database in databases if database["setAside"]]
    aside += [(entry["name"], entry["reason"]) for entry in not_replicated]
    problems = [Text(f"{shown(name)} is not replicated: {reason}", style="red") for name, reason in aside]
    if not rows:
        return Group(_note("no databases yet"), *problems)
    problems += [
        Text(f"{shown(database['name'])} is not replicated as it is now: {database['withheld']}", style="red")
        for database in databases
        if database.get("withheld")
    ]
    problems += [
        Text(f"{shown(database['name'])} waits, its log cannot be written: {database['failing']}", style="red")
        for database in databases
        if database.get("failing")
    ]
    for version in sorted({database["sqliteVersion"] for database in databases if database["mayCorruptWAL"]}):
        names = [d["name"] for d in databases if d["mayCorruptWAL"] and d["sqliteVersion"] == version]
        bug = "a rare bug before 3.51.3 can corrupt a WAL: upgrade SQLite there"
        problems.append(Text(f"{_listed(names)} was written by SQLite {version}: {bug}", "yellow"))
    return Group(table(["~database", "txid", "checksum", ">size", "journal", ">log"], rows), *problems)


def _listed(names: list[str]) -> str:
    """Not more than a few."""
    more = len(names) - _NAMED
    return ", ".join(map(shown, names[:_NAMED])) + (f" and {more} more" if more > 0 else "")


def _journal(database: Json) -> str:
    """The journal mode, and in WAL mode how much stands in the WAL."""
    size_bytes = database["walSizeBytes"] if database["journalMode"] == "wal" else 0
    return str(database["journalMode"]) + (f", {format_size(size_bytes)}" if size_bytes else "")


def _replicas(replicas: list[Json]) -> RenderableType:
    rows = []
    for replica in replicas:
        behind, lag_ms = replica["lagTXIDs"], replica["lagMs"]
        rows.append(
            [
                escape(replica["hostname"] or replica["nodeID"]),
                escape(replica["address"]),
                escape(replica["state"]),
                f"[yellow]{behind:,} tx[/]" if behind else "[green]0 tx[/]",
                "-" if lag_ms is None else format_ms(lag_ms),
            ]
        )
    return table(["~replica", "address", "state", ">behind", ">lag"], rows) if rows else _note("no replicas connected")


def _note(text: str) -> Text:
    return Text(f"\n{text}", style="dim")


def _join(*words: str) -> str:
    return "  ".join(word for word in words if word)
