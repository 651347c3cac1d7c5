"""`litefs lost`: what a node keeps of transactions that its cluster went on without."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from datetime import datetime

import click

from pylitefs.cli import lost_rows
from pylitefs.cli.command import HELP_FLAGS, Verb
from pylitefs.cli.local_node import LocalNode, find_node
from pylitefs.cli.lost_rows import Comparison, Kind
from pylitefs.engine.lost import BASE, PAGES, TIP, Branch, branches, mark_applied, read_branch
from pylitefs.errors import DatabaseError, FormatError, LitefsError, UsageError
from pylitefs.formats.ltx.decoder import Decoder

_CONFIG = click.option("-config", "config_path", default=None, metavar="PATH", help="The node's configuration file.")
_URL = click.option("-url", "url", default="", metavar="URL", help="The node's API, instead: it runs on this machine.")
_DATA_DIR = click.option("-data-dir", "data_dir", default="", metavar="DIR", help="The data directory, without a file.")
_DB = click.option(
    "-db", "db", default="", metavar="PATH", help="The database to compare with, as applications see it."
)


@click.group(invoke_without_command=True, context_settings={"help_option_names": HELP_FLAGS})
@click.pass_context
def lost(ctx: click.Context) -> None:
    """Show, and bring back, transactions that the cluster went on without.

    When a primary fails before its last transactions reached another node, and comes back after others have written,
    those transactions are a branch that belongs to nobody. The node keeps it: in its data directory, in
    dbs/NAME/lost/TIME. Nothing in there is ever removed by litefs. A BRANCH is given as NAME/TIME, or by its folder.
    These commands run on the node's own machine. They find the node by its configuration file, where `litefs mount`
    looks for it, or else by asking the one that runs; -config, -data-dir or -url names another.

    \b
    Examples:
        $ litefs lost list
        $ litefs lost show app.db/20261120T140312
        $ litefs lost apply app.db/20261120T140312
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
        ctx.exit(2)


@lost.command("list", cls=Verb)
@_CONFIG
@_DATA_DIR
@_URL
@click.option("-json", "as_json", is_flag=True, help="JSON.")
def list_(config_path: str | None, data_dir: str, url: str, as_json: bool) -> None:
    """List the branches and databases that this node keeps.

    \b
    Example:
        $ litefs lost list -data-dir /var/lib/litefs
    """
    found = branches(find_node(config_path, data_dir, url).data_dir)
    if as_json:
        click.echo(json.dumps([_document(branch) for branch in found], indent=2))
        return
    if not found:
        click.echo("nothing was lost")
        return
    rows = [("BRANCH", "EPOCH", "AFTER", "TRANSACTIONS", "SIZE", "KEPT", "")]
    for branch in found:
        after = f"{branch.after.txid:016x}" if branch.after is not None else "the whole database"
        rows.append(
            (branch.name, str(branch.epoch), after, str(branch.transactions), str(branch.size_bytes), _time(branch),
             "applied" if branch.applied else "")
        )  # fmt: skip
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())


@lost.command(cls=Verb)
@_CONFIG
@_DATA_DIR
@_URL
@_DB
@click.option("-limit", "limit", default=20, show_default=True, metavar="N", help="Rows of each table that are shown.")
@click.argument("branch")
def show(config_path: str | None, data_dir: str, url: str, db: str, limit: int, branch: str) -> None:
    """Show the transactions of BRANCH, and which rows they have added, changed and deleted.

    Rows are compared with the database as it is now: through the node's mount, or as its files are while it does not
    run; -db names another copy. A conflict is a row that is neither as it was before the branch nor as in it.

    \b
    Example:
        $ litefs lost show app.db/20261120T140312
    """
    node, found = _find(config_path, data_dir, url, db, branch)
    for name, value in _facts(found):
        click.echo(f"{name:<14} {value}")
    click.echo()
    for path in found.files():
        click.echo(_entry(path))
    tip = found.path(TIP)
    if tip is None:
        what = "only the pages that differ are" if found.path(PAGES) else "no copy of the database is"
        click.echo(f"\nWhich rows differ cannot be told: {what} kept with it.")
        return
    with (
        _now(node, db, found) as now,
        contextlib.closing(lost_rows.connect(now, writable=False)) as connection,
    ):
        _show_rows(Comparison(connection, tip, found.path(BASE)), limit)


@lost.command(cls=Verb)
@_CONFIG
@_DATA_DIR
@_URL
@_DB
@click.option("-write", "write", is_flag=True, help="Do it; without it the SQL is printed.")
@click.option("-force", "force", is_flag=True, help="Overwrite rows that were changed since, too.")
@click.option("-again", "again", is_flag=True, help="Also if it was applied before.")
@click.argument("branch")
def apply(
    config_path: str | None, data_dir: str, url: str, db: str, write: bool, force: bool, again: bool, branch: str
) -> None:
    """Do to the database what BRANCH has done: print the SQL, or with -write execute it as one transaction.

    Only rows that are still as they were before the branch are touched; others are conflicts, which are counted and
    left alone, or with -force overwritten. The database is that in the node's mount, or -db. Write on the primary, or
    on a replica under `litefs run -with-halt-lock-on`. The branch itself stays as it is, and is marked.

    \b
    Examples:
        $ litefs lost apply app.db/20261120T140312
        $ litefs lost apply -write -db /litefs/app.db /var/lib/litefs/dbs/app.db/lost/20261120T140312
    """
    node, found = _find(config_path, data_dir, url, db, branch)
    tip = found.path(TIP)
    if tip is None:
        raise LitefsError(f"{found.name}: which rows it has changed cannot be told: no copy of the database is kept")
    if not write:
        with (
            _now(node, db, found) as now,
            contextlib.closing(lost_rows.connect(now, writable=False)) as connection,
        ):
            _print_sql(Comparison(connection, tip, found.path(BASE)), force)
        return
    if found.applied and not again:
        raise LitefsError(f"{found.name} was applied before: look at it with `litefs lost show`, or give -again")
    target = db or _mounted(node, found)
    if not target:
        raise UsageError("-db required: name the database in the primary's mount (no mount of this node is known)")
    with contextlib.closing(lost_rows.connect(target, writable=True)) as connection:
        counts = lost_rows.write(connection, tip, found.path(BASE), force=force)
    mark_applied(found, os.path.abspath(target), counts)
    click.echo(_counted(counts))
    left = counts[Kind.CONFLICT.value]
    if left:
        click.echo(f"conflicts were {'overwritten' if force else 'left alone'}: {left}")


# --- which branch, and compared with what -----------------------------------------------------------------------------


def _find(config_path: str | None, data_dir: str, url: str, db: str, branch: str) -> tuple[LocalNode, Branch]:
    if os.path.isdir(branch):
        folder = os.path.abspath(branch)
        found = read_branch(folder, _database_of(branch))
        if found is None:
            raise LitefsError(f"{branch}: no lost transactions are in this folder")
        data_dir = data_dir or _data_dir_of(folder)
        return LocalNode(data_dir) if db else find_node(config_path, data_dir, url), found
    node = find_node(config_path, data_dir, url)
    name, _, _ = branch.rpartition("/")
    known = branches(node.data_dir, name) if name and "/" not in name else []
    for each in known:
        if each.name == branch:
            return node, each
    raise LitefsError(f"{branch}: there is no such branch: see `litefs lost list`")


def _database_of(folder: str) -> str:
    """DATA/dbs/NAME/lost/TIME."""
    return os.path.basename(os.path.dirname(os.path.dirname(os.path.abspath(folder))))


def _data_dir_of(folder: str) -> str:
    return os.path.abspath(os.path.join(folder, *[os.pardir] * 4))


def _mounted(node: LocalNode, branch: Branch) -> str:
    """The database in the node's mount, if that is known and mounted; else nothing."""
    if node.mount_dir and os.path.ismount(node.mount_dir):
        return os.path.join(node.mount_dir, branch.database)
    return ""


@contextlib.contextmanager
def _now(node: LocalNode, db: str, branch: Branch) -> Iterator[str]:
    """The database as it is now: named, in the mount, or a copy of the files of a node that does not run."""
    path = db or _mounted(node, branch)
    if path:
        yield path
        return
    with (
        _stopped(node.data_dir, branch),
        tempfile.TemporaryDirectory(prefix="litefs-lost-") as folder,
    ):
        files = os.path.dirname(os.path.dirname(branch.folder))
        copy = os.path.join(folder, "now.db")
        try:
            shutil.copyfile(os.path.join(files, "database"), copy)
        except OSError as error:
            raise DatabaseError(f"{files}/database: {error.strerror}: name a copy of the database with -db") from None
        for kind in ("wal", "journal"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(os.path.join(files, kind), f"{copy}-{kind}")
        lost_rows.connect(copy, writable=True).close()  # as SQLite recovers it
        yield copy


@contextlib.contextmanager
def _stopped(data_dir: str, branch: Branch) -> Iterator[None]:
    """Nobody writes the files meanwhile."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(FileNotFoundError):
            lock = stack.enter_context(open(os.path.join(data_dir, "lock"), "rb"))
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"litefs runs on {data_dir}: give its -config or -url, or name with -db {branch.database} in "
                    "its mount"
                ) from None
        yield


# --- what is printed --------------------------------------------------------------------------------------------------


def _document(branch: Branch) -> dict[str, object]:
    return {
        "branch": branch.name,
        "database": branch.database,
        "folder": branch.folder,
        "epoch": branch.epoch,
        "after": str(branch.after) if branch.after is not None else None,
        "to": str(branch.to),
        "transactions": branch.transactions,
        "sizeBytes": branch.size_bytes,
        "timeMs": branch.time_ms,
        "reason": branch.reason,
        "applied": branch.applied,
    }


def _facts(branch: Branch) -> list[tuple[str, str]]:
    return [
        ("branch", branch.name),
        ("folder", branch.folder),
        ("after", str(branch.after) if branch.after is not None else "the whole database"),
        ("to", str(branch.to)),
        ("epoch", str(branch.epoch)),
        ("transactions", str(branch.transactions)),
        ("kept", _time(branch)),
        ("reason", branch.reason),
        ("applied", "yes" if branch.applied else "no"),
    ]


def _time(branch: Branch) -> str:
    return datetime.fromtimestamp(branch.time_ms / 1000).astimezone().isoformat(timespec="seconds")


def _entry(path: str) -> str:
    """One log entry; damage is said, not raised: the others may be whole."""
    decoder = Decoder()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                decoder.feed(chunk)
        decoder.finish()
    except FormatError as error:
        return f"{os.path.basename(path)}: {error}"
    header = decoder.header
    assert header is not None
    when = datetime.fromtimestamp(header.timestamp_ms / 1000).astimezone().isoformat(timespec="milliseconds")
    txids = f"TXID {header.min_txid:016x} to {header.max_txid:016x}"
    return f"{txids}  {when}  epoch {header.epoch}  {decoder.page_count} pages"


def _show_rows(comparison: Comparison, limit: int) -> None:
    if not comparison.has_base:
        click.echo(
            "\nHow the database was before the branch is not known: rows that it does not have now are shown as added."
        )
    for item in comparison.missing():
        click.echo(f"\n{item.sql};")
    counts = {kind.value: 0 for kind in Kind}
    shown: dict[str, int] = {}
    for change in comparison.changes():
        counts[change.kind.value] += 1
        name = change.table.name
        shown[name] = shown.get(name, 0) + 1
        if shown[name] == 1:
            click.echo(f"\n{name} ({', '.join(change.table.selected)})")
        if shown[name] <= limit:
            row = change.tip if change.tip is not None else change.now or ()
            click.echo(f"  {change.kind.value:<13} {_row(row)}")
            if change.kind is Kind.CONFLICT:
                click.echo(f"  {'now':<13} {_row(change.now) if change.now is not None else 'no such row'}")
    for name, count in shown.items():
        if count > limit:
            click.echo(f"\n{name}: {count - limit} more rows (-limit)")
    for reason in comparison.skipped:
        click.echo(f"\nnot compared: {reason}")
    click.echo(f"\n{_counted(counts)}")


def _row(row: tuple[object, ...]) -> str:
    values = [lost_rows.literal(value) for value in row]
    return ", ".join(value if len(value) <= 60 else f"{value[:57]}..." for value in values)


def _print_sql(comparison: Comparison, force: bool) -> None:
    click.echo("BEGIN;")
    for item in comparison.missing():
        click.echo(f"{item.sql};")
    counts = {kind.value: 0 for kind in Kind}
    for change in sorted(comparison.changes(), key=lambda change: change.kind is not Kind.DELETED):
        counts[change.kind.value] += 1
        statement = change.statement()
        if statement is not None:
            left = "" if force or change.kind is not Kind.CONFLICT else "-- conflict, left alone: "
            text = lost_rows.text_of(*statement)
            click.echo(left + (text.replace("\n", "\n-- ") if left else text))
    click.echo("COMMIT;")
    for reason in comparison.skipped:
        click.echo(f"-- not compared: {reason}")
    click.echo(f"-- {_counted(counts)}")


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in counts.items())
