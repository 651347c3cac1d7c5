"""`litefs promote` and `litefs handoff`: change the primary on purpose."""

from __future__ import annotations

import json
import sys
import time

import click

from pylitefs.cli.cluster_view import find_member, full_name, members_of, node_of, short_names
from pylitefs.cli.forms import format_ms
from pylitefs.cli.local_node import url_option
from pylitefs.errors import LitefsError, UsageError
from pylitefs.http.client import Client, Json

_NEWS_WITHIN_S = 5.0
_POLL_S = 0.05


@click.command()
@url_option("The API of any node.")
@click.option("-node", "node", default="", metavar="NODE", help="Which one; that at -url if it is not given.")
@click.option("-force", "force", is_flag=True, help="Where there is no primary: also one that may lack commits.")
@click.option("-yes", "yes", is_flag=True, help="With -force: do not ask.")
@click.option("-json", "as_json", is_flag=True, help="For programs.")
def promote(url: str, node: str, force: bool, yes: bool, as_json: bool) -> int:
    """Make a node the primary, by a switchover.

    Writes are held up, the new primary is brought to the same position, the lease passes, and writes go on there: no
    committed transaction is lost. Returns when it is done. It fails, and changes nothing, if the node is no candidate
    or cannot catch up in time.

    With `replication.sync` only a node that is known to have every acknowledged commit can be elected. Where all of
    those are lost for good, -force makes the node the primary with what it has (also one that is further behind than
    `lease.maximum-lag`). It is refused while a primary holds the lease, and while a node answers that has more.

    NODE is a host name, a URL, or an id or its beginning, as `litefs status` shows them.

    \b
    Examples:
        $ litefs promote
        $ litefs promote -node db2
        $ litefs promote -url http://db3:20202 -node 3FA9
        $ litefs promote -force -node db3
    """
    if yes and not force:
        raise UsageError("-yes says yes to what -force asks: add -force")
    client = Client(url)
    cluster = client.cluster()
    target = find_member(cluster, node) if node else node_of(cluster)
    if is_primary(cluster, target):
        return _tell(target, cluster["epoch"], None, as_json)
    if force and not yes:
        _confirm(cluster, target)
    start_s = time.monotonic()
    client.promote(target["nodeID"] if node else None, force=force)
    return _changed(client, cluster, target, time.monotonic() - start_s, as_json)


@click.command()
@url_option("The API of any node.")
@click.option("-node", "node", default="", metavar="NODE", help="To which one; the best replica if it is not given.")
@click.option("-json", "as_json", is_flag=True, help="For programs.")
def handoff(url: str, node: str, as_json: bool) -> int:
    """Make the primary pass its lease on, for example before its machine is taken down.

    As `litefs promote`, but the primary is asked, and chooses the replica itself if none is named. A clean stop
    (SIGTERM) does the same.

    NODE is a host name, a URL, or an id or its beginning, as `litefs status` shows them.

    \b
    Examples:
        $ litefs handoff
        $ litefs handoff -node db2
    """
    client = Client(url)
    cluster = client.cluster()
    target = find_member(cluster, node) if node else None
    if target is not None and is_primary(cluster, target):
        return _tell(target, cluster["epoch"], None, as_json)
    primary = cluster["primary"]
    if not cluster["isPrimary"] and primary is not None and primary["url"]:
        client = Client(primary["url"])
    start_s = time.monotonic()
    client.handoff(None if target is None else target["nodeID"])
    return _changed(client, cluster, target, time.monotonic() - start_s, as_json)


def is_primary(cluster: Json, member: Json) -> bool:
    primary = cluster["primary"]
    return primary is not None and bool(primary["nodeID"] == member["nodeID"])


def _confirm(cluster: Json, target: Json) -> None:
    """Ask whoever is at the terminal."""
    if not sys.stdin.isatty():
        raise UsageError("-force may lose acknowledged commits: add -yes where nobody can be asked")
    names = short_names(members_of(cluster)) | {entry["nodeID"]: entry["hostname"] for entry in cluster["history"]}
    holders = dict.fromkeys([*(cluster["inSync"] or ()), *(entry["nodeID"] for entry in cluster["history"][-1:])])
    known = ", ".join(names.get(node_id) or node_id for node_id in holders) or "no node"
    click.echo(
        f"{full_name(target)} becomes the primary with what it has. Known to have every acknowledged commit: {known}.\n"
        "What only they have is gone, unless one comes back: it gives that back, or keeps it in lost/ (litefs lost).",
        err=True,
    )
    if not click.confirm("Go on?", err=True):
        raise LitefsError("nothing was changed")


def _changed(client: Client, before: Json, target: Json | None, duration_s: float, as_json: bool) -> int:
    """Wait until the node that was asked knows of the change, which took `duration_s`, and tell it."""
    end_s = time.monotonic() + _NEWS_WITHIN_S
    while True:
        cluster = client.cluster()
        primary = cluster["primary"]
        if primary is not None and cluster["epoch"] > before["epoch"]:
            return _tell(primary, cluster["epoch"], duration_s, as_json)
        if time.monotonic() > end_s:
            if target is None:
                raise LitefsError("the lease was passed on, but this node has not heard to whom: see litefs status")
            return _tell(target, None, duration_s, as_json)
        time.sleep(_POLL_S)


def _tell(primary: Json, epoch: int | None, duration_s: float | None, as_json: bool) -> int:
    """`duration_s` is None where nothing had to be changed."""
    if as_json:
        document = {
            "nodeID": primary["nodeID"],
            "hostname": primary["hostname"],
            "url": primary["url"],
            "epoch": epoch,
            "changed": duration_s is not None,
            "durationMs": None if duration_s is None else round(duration_s * 1000, 3),
        }
        click.echo(json.dumps(document, indent=2))
        return 0
    how = "already" if duration_s is None else "now"
    parts = [f"{full_name(primary)} is the primary {how}"]
    if epoch is not None:
        parts.append(f"epoch {epoch}")
    if duration_s is not None:
        parts.append(f"in {format_ms(duration_s * 1000)}")
    click.echo(", ".join(parts))
    return 0
