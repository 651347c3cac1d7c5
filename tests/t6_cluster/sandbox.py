"""A mount namespace of its own, in which the machine looks otherwise: /dev/fuse open to all users or missing, another
/etc/fuse.conf, directories that other users may not enter opened for them. What is mounted in it is seen by nobody
outside and ends with it.

Programs in it run as `user`, who has no privileges, or as root. The test itself stays outside: it looks at a mount in
the sandbox through programs, and at nodes over HTTP.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

import pylitefs
from cluster_nodes import Cluster, Node, wait_until

USER_ID = 65534  # nobody: has an entry in passwd everywhere, as fusermount3 wants
TIMEOUT_S = 30.0
_NEEDED = ("unshare", "nsenter", "setpriv", "mount")


class Sandbox:
    """A context; `base` is a directory that its user may enter."""

    def __init__(self, base: Path, *commands: str, fuse_for_all: bool = True) -> None:
        missing = [name for name in _NEEDED if shutil.which(name) is None]
        if missing:
            pytest.skip(f"{', '.join(missing)} of util-linux missing")
        self.nodes: list[Node] = []
        self._base = base / "sandbox"
        self._base.mkdir()
        self._kept = Path(tempfile.mkdtemp(prefix="pylitefs-"))
        needed = [Path(sys.prefix), Path(sys.base_prefix), Path(pylitefs.__file__).parents[1], base]
        lines = _opened(needed, self._kept)
        if fuse_for_all:
            node = shlex.quote(str(self._base / "fuse"))
            lines += [f"mknod -m 666 {node} c 10 229", f"mount --bind {node} /dev/fuse"]
        script = "\n".join([*lines, *commands, "echo made", "exec cat"])
        self._holder = subprocess.Popen(
            ["unshare", "-m", "--propagation", "private", "sh", "-ec", script],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> Sandbox:
        assert self._holder.stdout is not None and self._holder.stderr is not None
        if self._holder.stdout.readline() != "made\n":
            said = self._holder.stderr.read().strip()
            self._end()
            pytest.skip(f"this machine allows no such mount namespace: {said}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in reversed(self.nodes):
            node.remove()
        self._end()

    def _end(self) -> None:
        self._holder.kill()
        self._holder.communicate()
        shutil.rmtree(self._kept)

    def words(self, words: Iterable[str | Path], *, as_user: bool = True) -> list[str]:
        """The command line that runs `words` inside."""
        inside = ["nsenter", "-t", str(self._holder.pid), "-m", "--"]
        if as_user:
            ids = [f"--reuid={USER_ID}", f"--regid={USER_ID}", "--clear-groups", "--inh-caps=-all"]
            inside += ["setpriv", *ids, "--"]
        return [*inside, *map(str, words)]

    def run(
        self, *words: str | Path, as_user: bool = True, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.words(words, as_user=as_user), capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **(env or {})},
        )  # fmt: skip

    def python(self, code: str, *words: str | Path, as_user: bool = True) -> str:
        """What a Python program prints; it must end well."""
        done = self.run(sys.executable, "-c", code, *words, as_user=as_user)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start_python(self, code: str, *words: str | Path, as_user: bool = True) -> subprocess.Popen[str]:
        """A Python program with pipes. The test must end it."""
        return subprocess.Popen(
            self.words([sys.executable, "-c", code, *words], as_user=as_user),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def mounts(self, path: Path) -> list[str]:
        """The lines of mountinfo for what is mounted at `path`, inside."""
        done = self.run("cat", "/proc/self/mountinfo", as_user=False)
        return [line for line in done.stdout.splitlines() if line.split(" ")[4] == str(path)]


class SandboxNode(Node):
    """A node whose daemon runs in a sandbox."""

    def __init__(self, cluster: Cluster, sandbox: Sandbox, name: str, *, as_user: bool = True, **more: Any) -> None:
        super().__init__(cluster.base, name, **more)
        self.sandbox = sandbox
        self.as_user = as_user
        self.path = os.environ.get("PATH", os.defpath)
        if as_user:
            os.chown(self.base, USER_ID, USER_ID)
        cluster.nodes.append(self)
        sandbox.nodes.append(self)

    def start(self, *, wait: bool = True) -> SandboxNode:
        assert self.process is None or self.process.poll() is not None
        path = self.base / "litefs.yml"
        path.write_text(json.dumps(self.config))
        words = ["env", f"PATH={self.path}", "PYTHONDONTWRITEBYTECODE=1", sys.executable, "-m", "pylitefs"]
        words += ["mount", "-config", str(path)]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self.sandbox.words(words, as_user=self.as_user), stdout=log, stderr=log)
        if wait:
            wait_until(self.healthy, f"{self.name} is ready\n{self.log_tail()}")
        return self

    def stop(self) -> None:
        super().stop()
        assert self.sandbox.mounts(self.mount) == [], f"{self.name} left its mount"

    def unmount(self) -> None:
        for _ in self.sandbox.mounts(self.mount):
            self.sandbox.run("umount", "-f", self.mount, as_user=False)
            self.sandbox.run("umount", "-l", self.mount, as_user=False)

    def refused(self) -> str:
        """Start a node that must not start: it ends with a failure, and says why in one line, which is returned."""
        before = len(self.log_text())
        self.start(wait=False)
        assert self.process is not None
        status = self.process.wait(TIMEOUT_S)
        said = self.log_text()[before:]
        assert status in (1, 2), said
        errors = [line for line in said.splitlines() if not line.startswith(("pylitefs v", "level=INFO"))]
        assert len(errors) == 1 and errors[0].startswith("ERROR: "), said
        assert self.sandbox.mounts(self.mount) == []
        return errors[0]


def _opened(paths: list[Path], keep: Path) -> list[str]:
    """Commands that let other users come to `paths` below a closed directory such as /root: an empty one covers it, in
    which only these are found again. `keep` is an empty directory."""
    closed: dict[Path, list[Path]] = {}
    for path in paths:
        for parent in reversed([path, *path.parents]):
            if not parent.stat().st_mode & stat.S_IXOTH or _is_pytests(parent):
                closed.setdefault(parent, []).append(path)
                break
    lines = []
    for number, (parent, inside) in enumerate(closed.items()):
        kept = keep / str(number)
        kept.mkdir()
        lines += [
            f"mount --bind {shlex.quote(str(parent))} {kept}",
            f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(parent))}",
        ]
        for path in inside:
            there = shlex.quote(str(path))
            source = shlex.quote(str(kept / path.relative_to(parent)))
            lines += [f"mkdir -p {there}", f"mount --bind {source} {there}"]
        lines.append(f"umount -l {kept}")
    return lines


def _is_pytests(path: Path) -> bool:
    """Another run of pytest closes this directory whenever it starts."""
    return path.parent == Path(tempfile.gettempdir()) and path.name.startswith("pytest-of-")
