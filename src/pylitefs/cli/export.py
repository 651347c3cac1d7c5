"""`litefs export`."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import click

from pylitefs.cli.local_node import url_option
from pylitefs.engine.leftovers import is_held_elsewhere
from pylitefs.errors import UsageError
from pylitefs.filesystem.mount import is_inside
from pylitefs.formats.names import shown
from pylitefs.http.client import Client


@click.command()
@url_option("The node's API.")
@click.option("-name", "name", default="", metavar="NAME", help="The database to copy.  [required]")
@click.argument("path")
def export(url: str, name: str, path: str) -> None:
    """Write a consistent copy of the database NAME to the file PATH, from any node and while it is in use.

    A file at PATH is replaced, once the copy is complete; not if a process has it open, or if it has a WAL or journal
    with anything in it, or if it is one of litefs' own (see `litefs import`).

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
    """Replace `path` by a copy of the database, durably; on failure nothing has changed. Nothing else is removed."""
    temporary = f"{path}.tmp"
    _may_replace(path)
    try:
        with open(temporary, "wb") as file:
            client.export(name, file)
            file.flush()
            os.fsync(file.fileno())
        _may_replace(path)  # it took a while
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


def _may_replace(path: str) -> None:
    """UsageError if a file at `path` is a database that is in use: who has it open would go on in a file that has no
    name, and what stands in its WAL would be put on top of the copy."""
    folder = os.path.realpath(os.path.dirname(path) or ".")
    if is_inside(folder):
        raise UsageError(f"{path} is in a mounted directory of litefs: name a file outside, or use litefs import")
    for parent in (folder, *map(str, Path(folder).parents)):
        if os.path.isdir(os.path.join(parent, "dbs")) and os.path.exists(os.path.join(parent, "clusterid")):
            raise UsageError(f"{path} is in a data directory of litefs: name a file outside")
    for suffix in ("-wal", "-journal"):
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path + suffix).st_size:
                raise UsageError(
                    f"{path}{suffix} belongs to the database that is there: open and close it with sqlite3, or name "
                    "another file"
                )
    if any(is_held_elsewhere(path + suffix) for suffix in ("", "-wal", "-shm")):
        raise UsageError(f"{path} is open in a process: close it, or name another file")
