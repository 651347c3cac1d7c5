"""`litefs run`."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from types import FrameType

import click

from pylitefs import halt_lock
from pylitefs.cli.local_node import url_option
from pylitefs.errors import LitefsError, UsageError
from pylitefs.http.client import Client, Json, Refused

LOCK_FD = 3
"""The child's descriptor of the lock file, as LiteFS has it."""

_PRIMARY_WITHIN_S = 10.0  # after the node has said that it is
_POLL_S = 0.05


@click.command(context_settings={"allow_interspersed_args": False}, options_metavar="[flags] --")
@url_option("The node's API.")
@click.option("-promote", "promote", is_flag=True, help="Make this node the primary first, by a switchover.")
@click.option("-if-candidate", "if_candidate", is_flag=True, help="Do nothing, successfully, on a non-candidate.")
@click.option(
    "-with-halt-lock-on",
    "halt_path",
    default="",
    metavar="PATH",
    help="Hold the HALT lock of this database, a path in the mount, so that CMD can write to it here.",
)
@click.option("-v", "verbose", is_flag=True, help="Say what is done.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="CMD [ARG]...")
def run(url: str, promote: bool, if_candidate: bool, halt_path: str, verbose: bool, command: tuple[str, ...]) -> int:
    """Run CMD where and when it can write: on the primary, or on a replica that holds a database's HALT lock.

    With -promote this node becomes the primary before CMD starts, and stays it. With -with-halt-lock-on it stays what
    it is: while CMD runs, no other node can write to that database, and what CMD commits goes to the primary. It waits
    for as long as another process or node has the lock. CMD finds the lock file as descriptor 3; whoever keeps that
    open, keeps the lock.

    The exit status is 0 if CMD succeeds and 1 if it fails, whatever its own status was (as LiteFS has it).

    \b
    Examples:
        $ litefs run -promote -if-candidate -- python manage.py migrate
        $ litefs run -with-halt-lock-on /litefs/app.db -- sqlite3 /litefs/app.db 'DELETE FROM sessions'
    """
    if promote and halt_path:
        raise UsageError("-promote and -with-halt-lock-on are two ways to write: use one of them")
    if not command:
        raise UsageError('no command: write it after "--", as in: litefs run -- CMD ARG')

    def say(text: str) -> None:
        if verbose:
            click.echo(text, err=True)

    if promote or if_candidate:
        client = Client(url)
        info = client.info()
        if if_candidate and not info.get("candidate"):
            click.echo("node is not a candidate, skipping execution", err=True)
            return 0
        if promote and not info.get("isPrimary"):
            say("making this node the primary")
            become_primary(client, info)
    if not halt_path:
        say(f"running: {' '.join(command)}")
        return run_child(command)
    say(f"waiting for the HALT lock of {halt_path}")
    with halted(halt_path) as fd:
        say(f"running: {' '.join(command)}")
        return run_child(command, fd)


def become_primary(client: Client, info: Json) -> None:
    """Return when the node is the primary. Raises LitefsError."""
    try:
        client.promote()
    except Refused as refusal:
        where = (info.get("primary") or {}).get("hostname")
        hint = f" (the primary is {where})" if where and where not in str(refusal) else ""
        raise LitefsError(f"cannot promote this node: {refusal}{hint}") from None
    end_s = time.monotonic() + _PRIMARY_WITHIN_S
    while not client.info().get("isPrimary"):
        if time.monotonic() > end_s:
            raise LitefsError("this node was made the primary, but is not: another took its place: see litefs history")
        time.sleep(_POLL_S)


@contextlib.contextmanager
def halted(path: str) -> Iterator[int]:
    """Hold the HALT lock of the database at `path`, however long that takes to get."""
    if not os.path.exists(path):
        raise LitefsError(f"no such database: {path}: give its path in the mount")
    with halt_lock.halt(path, timeout_s=None) as fd:
        yield fd


def run_child(command: tuple[str, ...], lock_fd: int | None = None) -> int:
    """Run it with our terminal and wait; SIGTERM is handed on, and Ctrl-C reaches it from the terminal. `lock_fd` is
    its descriptor LOCK_FD."""
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def hand_on(signum: int, _frame: FrameType | None) -> None:
        if child is None:
            early.append(signum)
        else:
            child.send_signal(signum)

    # Before it is started, as it may be sooner than we; and no SIG_IGN, which it would inherit.
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda signum, frame: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, hand_on),
    }
    try:
        child = subprocess.Popen(command) if lock_fd is None else _with_lock(command, lock_fd)
        for signum in early:
            child.send_signal(signum)
        status = child.wait()
    except OSError as error:
        raise LitefsError(f"cannot run {command[0]}: {(error.strerror or str(error)).lower()}") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if status == 0:
        return 0
    how = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
    raise LitefsError(f"{command[0]} {how}")


def _with_lock(command: tuple[str, ...], lock_fd: int) -> subprocess.Popen[bytes]:
    """Start it with the lock file as LOCK_FD; whatever has that number here keeps it."""
    if lock_fd == LOCK_FD:
        return subprocess.Popen(command, pass_fds=(LOCK_FD,))
    try:
        kept: int | None = os.dup(LOCK_FD)
    except OSError:
        kept = None
    try:
        os.dup2(lock_fd, LOCK_FD)
        return subprocess.Popen(command, pass_fds=(LOCK_FD,))
    finally:
        if kept is None:
            os.close(LOCK_FD)
        else:
            os.dup2(kept, LOCK_FD, inheritable=False)
            os.close(kept)
