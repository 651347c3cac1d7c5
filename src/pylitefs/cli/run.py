"""`litefs run`."""

from __future__ import annotations

import signal
import subprocess
from types import FrameType

import click

from pylitefs.errors import LitefsError, UsageError
from pylitefs.http.client import DEFAULT_URL, Client


@click.command(context_settings={"allow_interspersed_args": False}, options_metavar="[flags] --")
@click.option("-url", "url", default=DEFAULT_URL, show_default=True, metavar="URL", help="The node's API.")
@click.option("-promote", "promote", is_flag=True, help="Run only as the primary; with a static lease that is fixed.")
@click.option("-if-candidate", "if_candidate", is_flag=True, help="Do nothing, successfully, on a non-candidate.")
@click.option("-with-halt-lock-on", "halt_path", default="", metavar="PATH", help="Not supported yet.")
@click.option("-v", "verbose", is_flag=True, help="Say what is done.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="CMD [ARG]...")
def run(url: str, promote: bool, if_candidate: bool, halt_path: str, verbose: bool, command: tuple[str, ...]) -> int:
    """Run CMD if this node has the role that is asked for.

    The exit status is 0 if CMD succeeds and 1 if it fails, whatever its own status was (as LiteFS has it).

    \b
    Example:
        $ litefs run -promote -- python manage.py migrate
    """
    if halt_path:
        raise UsageError("-with-halt-lock-on is not supported by this version: run the command on the primary")
    if not command:
        raise UsageError('no command: write it after "--", as in: litefs run -- CMD ARG')
    if promote or if_candidate:
        info = Client(url).info()
        if if_candidate and not info.get("candidate"):
            click.echo("node is not a candidate, skipping execution", err=True)
            return 0
        if promote and not info.get("isPrimary"):
            raise LitefsError(
                "cannot promote this node: static lease: the primary is fixed "
                f"({(info.get('primary') or {}).get('hostname') or 'at present unknown'}): run the command there"
            )
    if verbose:
        click.echo(f"running: {' '.join(command)}", err=True)
    return run_child(command)


def run_child(command: tuple[str, ...]) -> int:
    """Run it with our terminal and wait; SIGTERM is handed on, and Ctrl-C reaches it from the terminal."""
    try:
        child = subprocess.Popen(command)
    except OSError as error:
        raise LitefsError(f"cannot run {command[0]}: {(error.strerror or str(error)).lower()}") from None

    def hand_on(signum: int, _frame: FrameType | None) -> None:
        child.send_signal(signum)

    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, hand_on),
    }
    try:
        status = child.wait()
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if status == 0:
        return 0
    how = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
    raise LitefsError(f"{command[0]} {how}")
