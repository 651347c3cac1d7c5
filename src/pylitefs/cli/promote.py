"""`litefs promote` and `litefs handoff`: change the primary on purpose."""

from __future__ import annotations

import json
import time

import click

from pylitefs.cli.cluster_view import find_member, full_name, node_of
from pylitefs.cli.forms import format_ms
from pylitefs.errors import LitefsError
from pylitefs.http.client import DEFAULT_URL, Client, Json

_NEWS_WITHIN_S = 5.0
_POLL_S = 0.05


@click.command()
@click.option("-url", "url", default=DEFAULT_URL, show_default=True, metavar="URL", help="The API of any node.")
@click.option("-node", "node", default="", metavar="NODE", help="Which one; that at -url if it is not given.")
@click.option("-json", "as_json", is_flag=True, help="For programs.")
def promote(url: str, node: str, as_json: bool) -> int:
    """Make a node the primary, by a switchover.

    Writes are held up, the new primary is brought to the same position, the lease passes, and writes go on there: no
    committed transaction is lost. Returns when it is done. It fails, and changes nothing, if the node is no candidate
    or cannot catch up in time.

    NODE is a host name, a URL, or an id or its beginning, as `litefs status` shows them.

    \b
    Examples:
        $ litefs promote
        $ litefs promote -node db2
        $ litefs promote -url http://db3:20202 -node 3FA9
    """
    client = Client(url)
    cluster = client.cluster()
    target = find_member(cluster, node) if node else node_of(cluster)
    if is_primary(cluster, target):
        return _tell(target, cluster["epoch"], None, as_json)
    start_s = time.monotonic()
    client.promote(target["nodeID"] if node else None)
    return _changed(client, cluster, target, time.monotonic() - start_s, as_json)


@click.command()
@click.option("-url", "url", default=DEFAULT_URL, show_default=True, metavar="URL", help="The API of any node.")
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
