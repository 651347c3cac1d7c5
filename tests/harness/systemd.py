"""A real systemd: PID 1 of namespaces of its own, with a cgroup of its own, and no units but those it is given.

It sees the machine's files, and mounts that are made in it are not the machine's. When its PID 1 is killed everything
in it ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType

from cluster_nodes import wait_until

SYSTEMD = Path("/lib/systemd/systemd")
_INNER = """
set -e
mount --make-rprivate /
mount -t cgroup2 none /sys/fs/cgroup
mount -t tmpfs none /run
exec env container=test SYSTEMD_UNIT_PATH={units} SYSTEMD_GENERATOR_PATH={nothing} \
    SYSTEMD_ENVIRONMENT_GENERATOR_PATH={nothing} SYSTEMD_LOG_TARGET=console {systemd} --system --unit=test.target
"""


def cgroup_root() -> Path | None:
    """Where the unified hierarchy is mounted."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, path, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(path)
    return None


def can_run() -> bool:
    tools = all(shutil.which(tool) for tool in ("unshare", "nsenter", "systemctl"))
    return os.geteuid() == 0 and SYSTEMD.exists() and tools and cgroup_root() is not None


class Systemd:
    """A context. Units are files in `units`; write them before `__enter__`."""

    def __init__(self, base: Path) -> None:
        self.units, self._nothing, self._log = base / "units", base / "nothing", base / "systemd.log"
        self.units.mkdir(parents=True)
        self._nothing.mkdir()
        root = cgroup_root()
        assert root is not None
        self._cgroup = root / f"pylitefs-test-{os.getpid()}-{time.monotonic_ns()}"

    def __enter__(self) -> Systemd:
        (self.units / "test.target").write_text("[Unit]\nDefaultDependencies=no\n")
        self._cgroup.mkdir()
        script = _INNER.format(units=self.units, nothing=self._nothing, systemd=SYSTEMD)
        join = f'echo $$ > {self._cgroup}/cgroup.procs; exec "$@"'
        own = [f"--{kind}" for kind in ("mount", "pid", "mount-proc", "cgroup", "ipc", "uts")]
        unshare = ["unshare", *own, "--fork", "--kill-child"]
        with open(self._log, "wb") as log:
            self._outside = subprocess.Popen(
                ["sh", "-c", join, "sh", *unshare, "sh", "-c", script], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            wait_until(self._children, "the namespaces are made")
            wait_until(lambda: self.systemctl("is-active", "test.target") == "active", "systemd runs")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError, IndexError):
            os.kill(self._first(), signal.SIGKILL)
        self._outside.kill()
        self._outside.wait(20)
        until_s = time.monotonic() + 10
        while self._cgroup.exists() and time.monotonic() < until_s:
            for folder in sorted(self._cgroup.rglob("*/"), reverse=True):
                with contextlib.suppress(OSError):
                    folder.rmdir()
            with contextlib.suppress(OSError):
                self._cgroup.rmdir()
            time.sleep(0.02)

    def _children(self) -> list[int]:
        pid = self._outside.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def _first(self) -> int:
        return self._children()[0]

    def run(self, *words: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """A command inside."""
        return subprocess.run(
            ["nsenter", "-t", str(self._first()), "-m", "-p", "-C", *words],
            capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip

    def systemctl(self, *words: str) -> str:
        done = self.run("systemctl", *words)
        return (done.stdout + done.stderr).strip()

    def log(self) -> str:
        return self._log.read_text(errors="replace")
