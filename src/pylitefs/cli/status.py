"""`litefs status`."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pylitefs.errors import LitefsError
from pylitefs.http.client import DEFAULT_URL, Client

Json = dict[str, Any]

_WATCH_INTERVAL_S = 1.0
_PLAIN_WIDTH = 120  # columns when nobody's terminal sets them


@click.command()
@click.option("-url", "url", default=DEFAULT_URL, show_default=True, metavar="URL", help="The node's API.")
@click.option("-json", "as_json", is_flag=True, help="For programs; with -watch one line per second.")
@click.option("-watch", "watch", is_flag=True, help="Show it again every second until Ctrl-C.")
def status(url: str, as_json: bool, watch: bool) -> int:
    """Show a node: its role, its databases, and on the primary its replicas with their lag.

    TXIDs and checksums are hexadecimal, as in NAME-pos and in the names of the log's files.

    \b
    Examples:
        $ litefs status
        $ litefs status -watch
        $ litefs status -json | jq '.databases[].txid'
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
        _console().print(render(document))
    return 0


def _console() -> Console:
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=_PLAIN_WIDTH)


def _watch(client: Client, as_json: bool) -> None:
    """Until interrupted. A node that does not answer is shown as such: it may be restarting."""
    if as_json or not sys.stdout.isatty():
        while True:
            document = client.status()
            if as_json:
                click.echo(json.dumps(document, separators=(",", ":")))
            else:
                _console().print(render(document))
            time.sleep(_WATCH_INTERVAL_S)
    with Live(console=_console(), auto_refresh=False, screen=True) as live:
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
    parts: list[RenderableType] = [_head(document), _databases(document["databases"])]
    if document["node"]["role"] == "primary":
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
        grid.add_row("lag", "[yellow]never connected[/]" if lag_ms is None else format_ms(lag_ms))
    grid.add_row("cluster", node["clusterID"] or "[yellow]not known yet[/]")
    how = {True: "  [dim](passthrough)[/]", False: "  [dim](cached)[/]", None: ""}[node["passthrough"]]
    grid.add_row("mount", escape(node["mountDir"]) + how)
    grid.add_row("data", escape(node["dataDir"]))
    grid.add_row("up", f"{format_duration(node['uptimeSeconds'])}  [dim]pylitefs {node['version']}[/]")
    if node["problem"]:
        grid.add_row("problem", f"[bold red]{escape(node['problem'])}[/]")
    return grid


def _databases(databases: list[Json]) -> RenderableType:
    rows = []
    for database in databases:
        in_wal_mode = database["journalMode"] == "wal"
        rows.append(
            [
                escape(database["name"]),
                short_txid(database["txid"]),
                database["checksum"],
                format_size(database["sizeBytes"]),
                "wal" if in_wal_mode else "rollback",
                format_size(database["walSizeBytes"]) if in_wal_mode else "-",
                format_size(database["logSizeBytes"]),
            ]
        )
    if not rows:
        return _note("no databases yet")
    problems = [
        Text(f"{database['name']} is not replicated: {database['setAside']}", style="red")
        for database in databases
        if database["setAside"]
    ]
    old = sorted({d["sqliteVersion"] for d in databases if d["mayCorruptWAL"]})
    if old:
        problems.append(
            Text(f"written by SQLite {', '.join(old)}: before 3.51.3 several checkpointers can corrupt a WAL", "yellow")
        )
    return Group(_table("database >txid checksum >size mode >wal >log", rows), *problems)


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
    return _table("replica address state >behind >lag", rows) if rows else _note("no replicas connected")


def _note(text: str) -> Text:
    return Text(f"\n{text}", style="dim")


def _table(headings: str, rows: list[list[str]]) -> RenderableType:
    """Columns named by `headings`, ">" for those aligned right. Only the first is folded on a narrow terminal."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for index, heading in enumerate(headings.split()):
        widest = max(Text.from_markup(row[index]).cell_len for row in rows)
        table.add_column(
            heading.lstrip(">"),
            justify="right" if heading.startswith(">") else "left",
            overflow="fold",
            no_wrap=index > 0,
            min_width=max(widest, len(heading.lstrip(">"))) if index else 4,
            style="" if index else "bold",
        )
    for row in rows:
        table.add_row(*row)
    return Group(Text(), table)


def _join(*words: str) -> str:
    return "  ".join(word for word in words if word)


def short_txid(txid: str) -> str:
    """A TXID of 16 hex digits without its leading zeros."""
    return txid.lstrip("0") or "0"


def format_size(size_bytes: int) -> str:
    """Four significant characters at most and a unit of 1024: 0 B, 999 B, 1.5 KB, 12 MB."""
    size, unit = float(size_bytes), "B"
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1024
    return f"{size:.1f} {unit}" if unit != "B" and size < 9.95 else f"{size:.0f} {unit}"


def format_ms(lag_ms: float) -> str:
    """0.42 ms, 12 ms, 3.1 s, 5 m 2 s."""
    if lag_ms < 1000:
        return f"{lag_ms:.2f} ms" if lag_ms < 10 else f"{lag_ms:.0f} ms"
    return f"{lag_ms / 1000:.1f} s" if lag_ms < 60_000 else format_duration(int(lag_ms / 1000))


def format_duration(duration_s: int) -> str:
    """The two largest units: 45 s, 3 m 20 s, 2 d 4 h."""
    parts: list[tuple[int, str]] = []
    for size_s, unit in ((86400, "d"), (3600, "h"), (60, "m"), (1, "s")):
        count, duration_s = divmod(duration_s, size_s)
        if count or parts:
            parts.append((count, unit))
    return " ".join(f"{count} {unit}" for count, unit in parts[:2] if count) or "0 s"
