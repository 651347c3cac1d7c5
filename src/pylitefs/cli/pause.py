"""`litefs pause` and `litefs resume`: automatic failover off and on."""

from __future__ import annotations

import json

import click

from pylitefs.cli.local_node import url_option
from pylitefs.http.client import Client


@click.command()
@url_option("The API of any node.")
@click.option("-json", "as_json", is_flag=True, help="For programs.")
def pause(url: str, as_json: bool) -> int:
    """Switch automatic failover off in the whole cluster, for example while its network is worked on.

    Replication and writes go on. If the primary fails or loses its lease, no other node takes its place until
    `litefs resume`; `litefs promote` and `litefs handoff` work all the same.

    \b
    Example:
        $ litefs pause
    """
    Client(url).pause()
    return _tell("automatic failover is paused in the whole cluster: litefs resume switches it on again", as_json, True)


@click.command()
@url_option("The API of any node.")
@click.option("-json", "as_json", is_flag=True, help="For programs.")
def resume(url: str, as_json: bool) -> int:
    """Switch automatic failover on again after `litefs pause`.

    \b
    Example:
        $ litefs resume
    """
    Client(url).resume()
    return _tell("automatic failover is on", as_json, False)


def _tell(text: str, as_json: bool, paused: bool) -> int:
    click.echo(json.dumps({"paused": paused}) if as_json else text)
    return 0
