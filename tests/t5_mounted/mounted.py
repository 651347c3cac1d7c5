"""Daemons of the mounted tier: start one, end it, unmount what it leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from pylitefs.filesystem import mount

DAEMON = Path(__file__).with_name("plain_daemon.py")
needs_root = pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="needs root and /dev/fuse")


@dataclass
class PlainMount:
    """`dir` is the mount, `data` the directory whose `files/` it shows."""

    dir: Path
    data: Path
    mode: str
    process: subprocess.Popen[str]

    @property
    def files(self) -> Path:
        return self.data / "files"


def start_plain(mount_dir: Path, data_dir: Path, mode: str) -> PlainMount:
    process = subprocess.Popen(
        [sys.executable, str(DAEMON), str(mount_dir), str(data_dir), mode],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    said = process.stdout.readline()
    if not said.startswith("ready"):
        _, errors = process.communicate(timeout=20)
        raise RuntimeError(errors.strip())
    return PlainMount(mount_dir, data_dir, mode, process)


def stop_plain(mounted: PlainMount) -> str:
    """End the daemon (it may be dead already) and unmount. What it wrote to standard error."""
    mounted.process.terminate()
    try:
        _, errors = mounted.process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        mounted.process.kill()
        _, errors = mounted.process.communicate()
    while mount.mount_at(str(mounted.dir)) is not None and mount.detach(str(mounted.dir)):
        pass
    return errors
