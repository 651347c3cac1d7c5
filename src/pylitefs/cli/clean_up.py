"""`litefs clean-up`: end what a daemon that was killed has left, for the program that started it."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import time

import click

from pylitefs import mount_guard
from pylitefs.config import load
from pylitefs.errors import LitefsError
from pylitefs.filesystem.mount import take_away_dead

_LOCK_WAIT_S = 5.0  # a daemon that was killed may take a moment to end
_LOCK_LOOK_S = 0.02


@click.command("clean-up")
@click.option("-config", "config_path", default=None, metavar="PATH", help="Configuration file.")
@click.option("-keep-mount", is_flag=True, help="Leave the dead mount: who opens a file in it gets an error.")
def clean_up(config_path: str | None, keep_mount: bool) -> None:
    """End what a node that was killed has left: applications that still have a database open cannot commit to it any
    more, where another node takes over (not with a static lease), and its dead mount is taken away.

    The first a killed litefs does itself, by a small program that waits beside it; the next start does both. This is
    for those who kill that program too: docs/litefs.service has it in ExecStopPost, with -keep-mount, because in the
    bare directory below applications would make new databases until the next start. It does nothing where a node runs,
    or was stopped in order.

    \b
    Example:
        $ litefs clean-up -config /etc/litefs.yml
    """
    environ = {"HOSTNAME": socket.gethostname(), **os.environ}
    config, _ = load(config_path, expand_env=True, environ=environ)
    data_dir = os.path.realpath(config.data.dir)
    lock = mount_guard.open_lock(data_dir)
    try:
        if lock >= 0:
            _wait_for_lock(lock, data_dir)
        databases = mount_guard.open_databases(data_dir)
        if databases >= 0 and not config.lease.is_static:
            mount_guard.retire(mount_guard.open_indexes(databases))
        if keep_mount:
            device = mount_guard.device_of(os.path.realpath(config.fuse.dir))
            if device is not None:
                mount_guard.cut(ctypes.CDLL(None, use_errno=True), config.fuse.dir, device)
        else:
            take_away_dead(config.fuse.dir, click.echo)
    finally:
        if lock >= 0:
            os.close(lock)


def _wait_for_lock(lock: int, data_dir: str) -> None:
    """Until no daemon has the data directory; none can have it then before this process ends. Raises LitefsError."""
    until_s = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until_s:
                raise LitefsError(
                    f"the data directory {data_dir} is in use by a litefs: there is nothing to clean up"
                ) from None
            time.sleep(_LOCK_LOOK_S)
