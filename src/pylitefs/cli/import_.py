"""`litefs import`."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from urllib.parse import quote

import click

from pylitefs.cli.local_node import url_option
from pylitefs.errors import LitefsError, NotADatabase, UsageError
from pylitefs.formats.names import shown
from pylitefs.http.client import Client, Refused

_UNAVAILABLE = 503


@click.command("import")
@url_option("The primary's API.")
@click.option("-name", "name", default="", metavar="NAME", help="The database to create or replace.  [required]")
@click.argument("path")
def import_(url: str, name: str, path: str) -> None:
    """Create the database NAME from the SQLite file PATH, or replace it, as one transaction.

    The node checks the file first and changes nothing if it is not a sound database. If a journal or a WAL lies
    beside PATH, a consistent copy of the database that they make together is imported.

    \b
    Example:
        $ litefs import -name app.db dump.db
        Import of database "app.db" in 0.031s
    """
    if not name:
        raise UsageError("-name required: name the database to import into")
    if os.path.isdir(path):
        raise UsageError(f"{path} is a directory: name the file to read")
    started_s = time.monotonic()
    client = Client(url)
    with _standalone(path) as source, open(source, "rb") as file:
        try:
            client.import_(name, file)
        except Refused as refusal:
            where = _primary(client) if refusal.status == _UNAVAILABLE else ""
            raise Refused(refusal.status, f'{path} was not imported as "{shown(name)}": {refusal}{where}') from None
    click.echo(f'Import of database "{shown(name)}" in {time.monotonic() - started_s:.3f}s')


def _primary(client: Client) -> str:
    """Where to import instead, if the node that was asked is a replica; to be added to what it said."""
    with contextlib.suppress(LitefsError):
        info = client.info()
        if not info.get("isPrimary") and (url := info.get("primary", {}).get("url")):
            return f" (-url {url})"
    return ""


@contextlib.contextmanager
def _standalone(path: str) -> Iterator[str]:
    """`path` itself, or a temporary copy that includes what its journal or WAL holds."""
    if not any(_size_bytes(path + suffix) for suffix in ("-journal", "-wal")):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="litefs-import-") as directory:
        copy = os.path.join(directory, "database")
        try:
            source = sqlite3.connect(f"file:{quote(os.path.abspath(path))}?mode=rw", uri=True)
            target = sqlite3.connect(copy)
            with contextlib.closing(source), contextlib.closing(target):
                source.backup(target)
        except sqlite3.Error as error:
            raise NotADatabase(f"cannot read {path} with the journal or WAL beside it: {error}") from None
        yield copy


def _size_bytes(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
