"""The nodes of `litefs demo`: real daemons of this program, in temporary directories."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pylitefs.errors import LitefsError, MountError
from pylitefs.http.client import Client
from pylitefs.supervise import dying_with_us

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 15.0
_POLL_S = 0.05
_QUESTION_TIMEOUT_S = 3.0


class DemoFailed(LitefsError):
    pass


def check_requirements() -> None:
    """Raise MountError, in one line, where nothing can be mounted."""
    if not os.path.exists("/dev/fuse"):
        raise MountError("no /dev/fuse: load the module (modprobe fuse), or give the container the device")
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        raise MountError("not root and no fusermount3: run the demo as root, or install the package fuse3")
    if os.geteuid() == 0 and not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise MountError("/dev/fuse cannot be opened: give the container the device and CAP_SYS_ADMIN")


@dataclass
class Node:
    """One daemon with its own directory."""

    name: str
    directory: Path
    port: int
    process: subprocess.Popen[bytes] | None = None
    client: Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = Client(self.url, _QUESTION_TIMEOUT_S)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def mount_dir(self) -> Path:
        return self.directory / "mount"

    @property
    def log_file(self) -> Path:
        return self.directory / "log"

    def write_config(self, lease: str) -> None:
        """`lease`: that section of litefs.yml, and others."""
        for directory in (self.mount_dir, self.directory / "data"):
            directory.mkdir(parents=True)
        (self.directory / "litefs.yml").write_text(
            f'fuse:\n  dir: "{self.mount_dir}"\n'
            f'data:\n  dir: "{self.directory / "data"}"\n'
            f'http:\n  addr: "127.0.0.1:{self.port}"\n'
            f"log:\n  timestamp: true\n{lease}"
        )

    def start(self) -> None:
        """Start the daemon. It is stopped when this process dies; Ctrl-C on the terminal does not reach it."""
        config = str(self.directory / "litefs.yml")
        command = [sys.executable, "-m", "pylitefs", "mount", "-no-expand-env", "-config", config]
        with open(self.log_file, "ab") as log:
            self.process = subprocess.Popen(
                dying_with_us(command), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def wait_ready(self) -> None:
        """Return once it is mounted and answers; raise DemoFailed with the end of its log otherwise."""
        assert self.process is not None
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            if self.process.poll() is not None:
                raise DemoFailed(f"{self.name} ended with status {self.process.returncode}: {self.last_words()}")
            if is_mounted(self.mount_dir) and self.status() is not None:
                return
            time.sleep(_POLL_S)
        raise DemoFailed(f"{self.name} is not ready after {START_TIMEOUT_S:.0f} s: {self.last_words()}")

    def status(self) -> dict[str, Any] | None:
        """Its `/status`; None while it does not answer."""
        try:
            return self.client.status()
        except LitefsError:
            return None

    def last_words(self) -> str:
        lines = self.log_file.read_text(errors="replace").strip().splitlines() if self.log_file.exists() else []
        return lines[-1] if lines else "it wrote no log"


class Cluster:
    """A primary and replicas under one temporary directory. A context manager: whatever was started is stopped, and
    unmounted; the directory is removed unless it is to be kept."""

    def __init__(self, names: Sequence[str], keep: bool) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="litefs-demo-"))
        self._keep = keep
        ports = free_ports(len(names))
        self.nodes = [Node(name, self.directory / name, port) for name, port in zip(names, ports, strict=True)]
        self.primary, self.replicas = self.nodes[0], self.nodes[1:]

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def lease_of(self, node: Node) -> str:
        """The section `lease` of a node: here the first one is the primary, and stays it."""
        candidate = "true" if node is self.primary else "false"
        return (
            f'lease:\n  type: "static"\n  candidate: {candidate}\n'
            f'  hostname: "{self.primary.name}"\n  advertise-url: "{self.primary.url}"\n'
        )

    def start(self) -> None:
        for node in self.nodes:
            node.write_config(self.lease_of(node))
        for node in self.nodes:
            node.start()
        for node in self.nodes:
            node.wait_ready()

    def stop(self) -> list[str]:
        """End the daemons, clean up, and tell what did not go as it should. Ctrl-C does not interrupt this."""
        before = {signum: signal.signal(signum, signal.SIG_IGN) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            return self._stop()
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _stop(self) -> list[str]:
        problems = []
        running = [node for node in self.nodes if node.process is not None and node.process.poll() is None]
        for node in running:
            assert node.process is not None
            node.process.terminate()
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        for node in running:
            assert node.process is not None
            try:
                status = node.process.wait(max(0.1, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                node.process.kill()
                node.process.wait()
                problems.append(f"{node.name} did not stop within {STOP_TIMEOUT_S:.0f} s and was killed")
            else:
                if status != 0:
                    problems.append(f"{node.name} ended with status {status}: {node.last_words()}")
        for node in self.nodes:
            if is_mounted(node.mount_dir):
                problems.append(f"{node.name} left its mount behind")
                _unmount(node.mount_dir)
        if not self._keep and not any(is_mounted(node.mount_dir) for node in self.nodes):
            shutil.rmtree(self.directory, ignore_errors=True)
        return problems


def is_mounted(directory: Path) -> bool:
    """Whether something is mounted there, dead or alive."""
    escaped = str(directory).replace("\\", "\\134").replace(" ", "\\040").replace("\t", "\\011").replace("\n", "\\012")
    with open("/proc/self/mounts") as mounts:
        return any(line.split(" ")[1] == escaped for line in mounts)


def _unmount(directory: Path) -> None:
    command = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
    subprocess.run([*command, str(directory)], stderr=subprocess.DEVNULL, check=False)


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, all different."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports
