"""`litefs sync`."""

from __future__ import annotations

import json
import re

import click

from pylitefs.cli.local_node import url_option
from pylitefs.config_values import ValueProblem, parse_duration_s
from pylitefs.errors import UsageError
from pylitefs.http.client import Client


@click.command()
@url_option("The node's API.")
@click.option("-txid", "txid", default="", metavar="HEX", help="Wait for this TXID, as in NAME-pos, and ask nobody.")
@click.option("-timeout", "timeout", default="10s", show_default=True, metavar="DURATION", help="How long to wait.")
@click.option("-json", "as_json", is_flag=True, help="For programs.")
@click.argument("name")
def sync(url: str, txid: str, timeout: str, as_json: bool, name: str) -> int:
    """Wait until this node has everything that the primary had in the database NAME when the command began.

    What is read from the database here afterwards is at least as new as any commit that had returned, on any node,
    before the command was started. Prints the position, TXID/CHECKSUM as in NAME-pos.

    \b
    Examples:
        $ litefs sync app.db && sqlite3 /litefs/app.db 'SELECT count(*) FROM orders'
        $ litefs sync app.db -txid 1a2bc -timeout 500ms
    """
    position = Client(url).sync(name, parse_txid(txid) if txid else None, parse_timeout_s(timeout))
    if as_json:
        click.echo(json.dumps(position, indent=2))
    else:
        click.echo(f"{position.get('txid')}/{position.get('postApplyChecksum')}")
    return 0


def parse_txid(text: str) -> int:
    """Of a TXID, or of a whole position."""
    match = re.fullmatch(r"([0-9A-Fa-f]{1,16})(/[0-9A-Fa-f]{16})?", text)
    if match is None:
        raise UsageError(f"-txid {text}: expected up to 16 hexadecimal digits, as in NAME-pos")
    return int(match[1], 16)


def parse_timeout_s(text: str) -> float:
    try:
        timeout_s = parse_duration_s(text)
    except ValueProblem:
        timeout_s = 0.0
    if timeout_s <= 0:
        raise UsageError(f'-timeout {text}: expected a duration such as "10s" or "500ms"')
    return timeout_s
