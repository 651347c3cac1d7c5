"""`litefs history`."""

from __future__ import annotations

import json

import click

from pylitefs.cli.cluster_view import render_history
from pylitefs.cli.forms import console
from pylitefs.cli.local_node import url_option
from pylitefs.http.client import Client


@click.command()
@url_option("The API of any node.")
@click.option("-json", "as_json", is_flag=True, help="For programs.")
def history(url: str, as_json: bool) -> int:
    """Show the changes of the primary: epoch, node, where the data was, when, and why.

    The engine keeps the last ones. The TXID is the sum of those of all databases, hexadecimal.

    \b
    Examples:
        $ litefs history
        $ litefs history -json | jq '.[-1].reason'
    """
    entries = Client(url).history()
    if as_json:
        click.echo(json.dumps(entries, indent=2))
    else:
        console().print(render_history(entries))
    return 0
