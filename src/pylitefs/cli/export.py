"""`litefs export`."""

from __future__ import annotations

import contextlib
import os
import time

import click

from pylitefs.errors import UsageError
from pylitefs.formats.names import shown
from pylitefs.http.client import DEFAULT_URL, Client


@click.command()
@click.option("-url", "url", default=DEFAULT_URL, show_default=True, metavar="URL", help="The node's API.")
@click.option("-name", "name", default="", metavar="NAME", help="The database to copy.  [required]")
@click.argument("path")
def export(url: str, name: str, path: str) -> None:
    """Write a consistent copy of the database NAME to the file PATH, from any node and while it is in use.

    PATH and the journal and WAL files beside it are replaced, once the copy is complete.

    \b
    Example:
        $ litefs export -name app.db backup.db
        Export of database "app.db" in 0.016s
    """
    if not name:
        raise UsageError("-name required: name the database to export")
    if os.path.isdir(path):
        raise UsageError(f"{path} is a directory: name the file to write")
    started_s = time.monotonic()
    export_to(Client(url), name, path)
    click.echo(f'Export of database "{shown(name)}" in {time.monotonic() - started_s:.3f}s')


def export_to(client: Client, name: str, path: str) -> None:
    """Replace `path` by a copy of the database, durably; on failure nothing has changed."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            client.export(name, file)
            file.flush()
            os.fsync(file.fileno())
        for suffix in ("-journal", "-wal", "-shm"):  # they belong to what was there before
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path + suffix)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
