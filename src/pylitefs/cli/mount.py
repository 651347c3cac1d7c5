"""`litefs mount`."""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import shlex
import signal
import socket

import click

from pylitefs import pid_one
from pylitefs.cli.command import words_after_dashes
from pylitefs.cli.version import version_string
from pylitefs.config import ExecCommand, load
from pylitefs.errors import LitefsError
from pylitefs.observability import logging as logs

log = logging.getLogger("litefs")


@click.command(options_metavar="[flags]")
@click.option("-config", "config_path", default=None, metavar="PATH", help="Configuration file.")
@click.option("-no-expand-env", "no_expand_env", is_flag=True, help="Do not expand ${VARIABLES} in it.")
@click.option("-skip-unmount", "skip_unmount", is_flag=True, help="Refuse to start where a stale mount was left.")
@click.option("-fuse.debug", "fuse_debug", is_flag=True, help="Log every FUSE request.")
@click.option("-debug", "debug", is_flag=True, help="Log more.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- CMD [ARG]...]")
@click.pass_context
def mount(
    ctx: click.Context,
    config_path: str | None,
    no_expand_env: bool,
    skip_unmount: bool,
    fuse_debug: bool,
    debug: bool,
    command: tuple[str, ...],
) -> int:
    """Mount the directory and replicate the databases in it, until SIGTERM or SIGINT.

    CMD is run when the node is ready, instead of `exec` in the configuration; when it ends, so does the node, with
    its exit status.

    \b
    Example:
        $ litefs mount -config /etc/litefs.yml -- python app.py
    """
    words = words_after_dashes(ctx)
    if words is None and command:
        raise click.UsageError(f'unexpected argument {command[0]!r}: a command goes after "--"', ctx)
    environ = dict(os.environ)
    environ.setdefault("HOSTNAME", socket.gethostname())
    config, path = load(config_path, expand_env=not no_expand_env, environ=environ)
    config = config.with_overrides(fuse_debug=fuse_debug, log_debug=debug)
    if words:
        config = dataclasses.replace(config, exec=(ExecCommand(shlex.join(words)),))
    if skip_unmount and os.path.ismount(config.fuse.dir):
        raise LitefsError(f"{config.fuse.dir} is a mount point already: unmount it, or leave -skip-unmount away")
    pid_one.run_as_child()
    logs.set_up(config.log)
    click.echo(version_string())
    if config_path is None:
        click.echo(f"config file read from {path}")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's threads are not used, their buffers cost memory
    gc.disable()  # nothing of what is loaded is garbage: looking for some takes a sixth of the time
    from pylitefs import daemon  # after the configuration is known to be good: it loads the heavy libraries

    gc.enable()
    try:
        return daemon.run(config)
    except LitefsError as error:
        if config.exit_on_error:
            raise
        click.echo(f"ERROR: {error}", err=True)
        log.info("waiting for a signal (exit-on-error is false)")
        signal.sigwait({signal.SIGTERM, signal.SIGINT})
        return 1
