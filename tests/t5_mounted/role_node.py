"""Nodes whose role is changed by the test (`role_daemon.py`), and applications that go on meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from cluster_nodes import assert_nothing_overlooked
from pylitefs.filesystem import mount

DAEMON = Path(__file__).with_name("role_daemon.py")
OPENER = Path(__file__).parents[1] / "harness" / "opener.py"
WRITER = Path(__file__).with_name("role_writer.py")


class RoleNode:
    """One daemon. Any command of `role_daemon.RoleNode` is a method here."""

    PROGRAM = DAEMON

    def __init__(self, base: Path, passthrough: str = "auto") -> None:
        self.mount, self.data, self.passthrough = base / "mnt", base / "data", passthrough
        self.mount.mkdir(parents=True, exist_ok=True)
        self.data.mkdir(exist_ok=True)
        self.errors = base / "errors"
        self.start()

    def start(self) -> None:
        with open(self.errors, "ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(self.PROGRAM), str(self.mount), str(self.data), self.passthrough],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1,
            )  # fmt: skip
        assert self._answer() is (self.passthrough == "auto")

    def __getattr__(self, command: str) -> Any:
        def call(*words: object) -> Any:
            self.tell(command, *words)
            return self._answer()

        return call

    def tell(self, command: str, *words: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([command, *words]) + "\n")
        self.process.stdin.flush()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the node has ended: {self.errors.read_text()[-3000:]}"
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["ok"]

    answer = _answer

    def file(self, name: str = "db") -> str:
        return str(self.mount / name)

    def pause_process(self) -> None:
        """Stopped on return: a thread on another processor runs on for a moment, and may answer a request."""
        self.process.send_signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self.process.pid}/task")
        while any((task / "stat").read_text().rpartition(")")[2].split()[0] not in "TtDZX" for task in tasks.iterdir()):
            time.sleep(0.001)

    def resume_process(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)
        self.unmount()

    def unmount(self) -> None:
        path = str(self.mount)
        while mount.mount_at(path) is not None and mount.detach(path):
            pass

    def end(self) -> None:
        with contextlib.suppress(Exception):
            self.resume_process()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        self.unmount()

    def __enter__(self) -> RoleNode:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
        if error is None:
            assert_nothing_overlooked("the node", self.errors.read_text())


class Writer:
    """A process that inserts values of its own into table t, for ever, in a journal mode; what was acknowledged is in
    `acknowledged`. It opens the database anew after an error, if it is not told to `keep` its connection."""

    def __init__(self, path: str, log: Path, name: str, *pragmas: str, keep: bool = False) -> None:
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-E", str(WRITER), path, str(log), name, "keep" if keep else "anew", *pragmas],
            stdin=subprocess.PIPE,
        )

    def acknowledged(self) -> list[str]:
        if not self.log.exists():
            return []
        return [line for line in self.log.read_text().splitlines(keepends=False) if line]

    def wait_for(self, count: int, timeout_s: float = 20.0) -> None:
        """Until so many more were acknowledged."""
        wanted = len(self.acknowledged()) + count
        until_s = time.monotonic() + timeout_s
        while len(self.acknowledged()) < wanted:
            assert time.monotonic() < until_s, f"only {len(self.acknowledged())} of {wanted} commits"
            time.sleep(0.01)

    def stop(self) -> None:
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)


class Opener:
    """A process that opens, reads, checks and closes a database without end, see `harness/opener.py`."""

    def __init__(self, path: str, log: Path, kind: str) -> None:
        self.log = log
        log.touch()
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-E", str(OPENER), path, str(log), kind], stdin=subprocess.PIPE
        )

    def found(self) -> list[str]:
        return self.log.read_text().splitlines()

    def wait_for(self, line: str, timeout_s: float = 20.0) -> None:
        until_s = time.monotonic() + timeout_s
        while line not in self.found():
            assert time.monotonic() < until_s, f"{line!r} was not seen: {self.found()[-5:]}"
            time.sleep(0.01)

    def stop(self) -> list[str]:
        """What it found that must not be."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
        return [line for line in self.found() if line.startswith("BAD")]


def needs_mount() -> bool:
    return os.geteuid() == 0 and os.path.exists("/dev/fuse")
