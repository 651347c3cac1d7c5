"""The processes of a measurement: daemons, and one driver (`workloads.py`) per directory.

The program that measures never touches a mount itself: if a daemon hangs, so does whoever asks it. A driver that does
not answer in time is given up, its daemons are killed by their ids, and that metric fails; the others go on.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pylitefs.supervise import dying_with_us

START_S = 60.0
STOP_S = 60.0
HERE = Path(__file__).resolve().parent


class BenchError(Exception):
    """One metric could not be measured."""


class Driver:
    """An application in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        command = [sys.executable, str(HERE / "workloads.py"), str(directory)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    def send(self, command: str, **named: object) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"command": command, **named}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise BenchError(f"the driver in {self.directory} is gone") from None

    def receive(self, timeout_s: float = 120.0) -> Any:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], timeout_s)[0]:
            raise BenchError(f"no answer from {self.directory} within {timeout_s:.0f} s")
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"the driver in {self.directory} died"}
        if "error" in answer:
            raise BenchError(answer["error"])
        return answer["ok"]

    def ask(self, command: str, *, wait_s: float = 120.0, **named: object) -> Any:
        self.send(command, **named)
        return self.receive(wait_s)

    def stop(self) -> None:
        """End the driver, and its children if it does not end by itself: they are the group that it leads."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)


@dataclass(frozen=True)
class Usage:
    """What the kernel has counted for a process."""

    cpu_s: float
    rss_bytes: int
    peak_rss_bytes: int
    write_bytes: int  # pages made dirty, less what was deleted before it reached the disk

    @classmethod
    def of(cls, pid: int) -> Usage:
        process = Path(f"/proc/{pid}")
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        counts = dict(line.split(": ") for line in (process / "io").read_text().splitlines())
        cpu_ns = 0
        for schedstat in process.glob("task/*/schedstat"):
            with contextlib.suppress(OSError):
                cpu_ns += int(schedstat.read_text().split()[0])
        return cls(
            cpu_ns / 1e9,
            int(status["VmRSS"].split()[0]) * 1024,
            int(status["VmHWM"].split()[0]) * 1024,
            int(counts["write_bytes"]),
        )


class Node:
    """One daemon."""

    def __init__(self, base: Path, name: str, passthrough: str, primary: Node | None = None, sync: int = 0) -> None:
        self.name = name
        self.base = base / name
        self.mount = self.base / "mount"
        self.data = self.base / "data"
        self.log = self.base / "log"
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        for directory in (self.mount, self.data):
            directory.mkdir(parents=True)
        lease: dict[str, object] = {"type": "static", "candidate": primary is None}
        if primary is not None:
            url = f"http://127.0.0.1:{primary.port}"
            lease |= {"hostname": "primary", "advertise-url": url, "reconnect-delay": "100ms"}
        config = {
            "data": {"dir": str(self.data)},
            "fuse": {"dir": str(self.mount), "passthrough": passthrough},
            "http": {"addr": f"127.0.0.1:{self.port}"},
            "lease": lease,
            "replication": {"sync": sync},
        }
        self.config = self.base / "litefs.yml"
        self.config.write_text(json.dumps(config))  # JSON is YAML

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def usage(self) -> Usage:
        return Usage.of(self.pid)

    def start(self, program: tuple[str, ...] = ("-m", "pylitefs"), within_s: float = START_S) -> None:
        """Start and wait until it serves. `program`: what Python runs instead of the daemon itself."""
        words = [sys.executable, *program, "mount", "-no-expand-env", "-config", str(self.config)]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                dying_with_us(words), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.base
            )
        self._wait_healthy(within_s)

    def _wait_healthy(self, within_s: float) -> None:
        assert self.process is not None
        limit_s = time.monotonic() + within_s
        while time.monotonic() < limit_s:
            if self.process.poll() is not None:
                raise BenchError(f"{self.name} ended with status {self.process.returncode}: {self.last_words()}")
            with contextlib.suppress(OSError):
                if self.get("/healthz"):
                    return
            time.sleep(0.01)
        raise BenchError(f"{self.name} is not ready after {within_s:.0f} s: {self.last_words()}")

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=START_S) as response:
            body: bytes = response.read()
            return body

    def txids(self, path: str = "/info") -> dict[str, int]:
        """Positions by database. On the primary they cover every commit that has returned."""
        databases = json.loads(self.get(path))["databases"]
        return {name: int(position["txid"], 16) for name, position in databases.items()}

    def log_size_bytes(self) -> int:
        """What the transaction log takes: the sizes of its files, and the page-checksum tables."""
        sizes = [path.stat().st_size for path in self.data.glob("dbs/*/ltx/*.ltx")]
        return sum(sizes) + sum(path.stat().st_size for path in self.data.glob("dbs/*/checksums"))

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        return lines[-1] if lines else "it wrote no log"

    def stop(self) -> None:
        """SIGTERM; killed if it does not end. Nothing stays mounted."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        while is_mounted(self.mount):
            words = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
            if subprocess.run([*words, str(self.mount)], stderr=subprocess.DEVNULL, check=False).returncode != 0:
                break

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()


class Pair:
    """A primary, a replica attached to it, and a directory on the same disk beside them; a context manager."""

    def __init__(self, parent: Path, passthrough: str, sync: int = 0) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="litefs-bench-", dir=parent))
        self.primary = Node(self.base, "primary", passthrough, sync=sync)
        self.replica = Node(self.base, "replica", passthrough, self.primary)
        self.native_dir = self.base / "native"
        self.native_dir.mkdir()
        self._drivers: list[Driver] = []

    def start(
        self, primary: tuple[str, ...] = ("-m", "pylitefs"), replica: tuple[str, ...] = ("-m", "pylitefs")
    ) -> Pair:
        self.primary.start(primary)
        self.replica.start(replica)
        self.native = self._driver(self.native_dir)
        self.ours = self._driver(self.primary.mount)
        self.copy = self._driver(self.replica.mount)
        return self

    def _driver(self, directory: Path) -> Driver:
        driver = Driver(directory)
        self._drivers.append(driver)
        return driver

    @property
    def cpu_s(self) -> float:
        """What both daemons have used."""
        return self.primary.usage.cpu_s + self.replica.usage.cpu_s

    def native_second(self) -> Driver:
        """Another application in the native directory, for measurements that need two at once."""
        return self._driver(self.native_dir)

    def __enter__(self) -> Pair:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        if kind is not None and issubclass(kind, BenchError):  # perhaps a hang in the kernel: let go of the waiting
            self.primary.kill()
            self.replica.kill()
        self.stop()

    def stop(self) -> None:
        for driver in self._drivers:
            driver.stop()
        self.replica.stop()
        self.primary.stop()
        if not any(is_mounted(node.mount) for node in (self.primary, self.replica)):
            shutil.rmtree(self.base, ignore_errors=True)

    def catch_up(self, timeout_s: float = 60.0) -> None:
        """Return when the replica is where the primary is."""
        wanted = self.primary.txids()
        limit_s = time.monotonic() + timeout_s
        while (seen := self.replica.txids()) != wanted:
            if time.monotonic() > limit_s:
                raise BenchError(f"the replica is at {seen} after {timeout_s:.0f} s, the primary at {wanted}")
            time.sleep(0.01)


def is_mounted(directory: Path) -> bool:
    with open("/proc/self/mounts") as mounts:
        return any(line.split(" ")[1] == str(directory) for line in mounts)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
