"""Nodes for tests that need real processes: start `litefs mount`, wait, stop, kill, and never leave a mount behind.

A test that hangs in the kernel because a daemon is stuck cannot be interrupted by a signal; so every cluster has a
watchdog that kills its daemons, by their ids, before pytest's own time limit. The hung call then fails with ENOTCONN.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from ports import free_port
from pylitefs.filesystem import mount

needs_root = pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="needs root and /dev/fuse")
PASSTHROUGH = ["auto", "off"]
SCALE = float(os.environ.get("PYLITEFS_TEST_SCALE", "1"))
PATIENCE = float(os.environ.get("PYLITEFS_TEST_PATIENCE", "1"))  # on a busy machine: how much longer to wait
START_S = 30.0 * PATIENCE  # for a node to become ready, and for everything else one waits for
WATCHDOG_S = 100.0 * max(1.0, SCALE)
PRIMARY_NAME = "prim.example"
_LOG_TAIL = 60  # lines of each node's log shown with a failure


def scaled(count: int) -> int:
    """How often to do something: `count` times PYLITEFS_TEST_SCALE, at least once."""
    return max(1, round(count * SCALE))


def pairwise(*few: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Parameters, chosen so that any two of their values meet; all combinations with PYLITEFS_TEST_SCALE=2."""
    if SCALE < 2:
        return list(few)
    return list(itertools.product(*(dict.fromkeys(column) for column in zip(*few, strict=True))))


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = START_S) -> None:
    """Ask again and again until `condition` holds; its last value, or error, is told on failure."""
    deadline_s = time.monotonic() + timeout_s
    pause_s = 0.001
    while True:
        try:
            seen = condition()
        except (OSError, sqlite3.Error) as error:
            seen, told = None, repr(error)
        else:
            told = repr(seen)
        if seen:
            return
        if time.monotonic() > deadline_s:
            raise AssertionError(f"not within {timeout_s:.0f} s: {what} (last: {told})")
        time.sleep(pause_s)
        pause_s = min(0.05, pause_s * 1.5)


class Node:
    """One daemon: `mount` is its directory for applications, `data` its own. Files are below `base`."""

    def __init__(self, base: Path, name: str, *, passthrough: str = "auto", primary: Node | None = None) -> None:
        self.name = name
        self.base = base / name
        self.mount = self.base / "mnt"
        self.data = self.base / "data"
        self.log = self.base / "log"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.is_primary = primary is None
        self.process: subprocess.Popen[bytes] | None = None
        lease: dict[str, Any] = {"type": "static", "candidate": primary is None}
        if primary is not None:
            lease |= {"hostname": PRIMARY_NAME, "advertise-url": primary.url, "reconnect-delay": "100ms"}
        self.config: dict[str, dict[str, Any]] = {
            "data": {"dir": str(self.data)},
            "fuse": {"dir": str(self.mount), "passthrough": passthrough, "io-uring": passthrough},
            "http": {"addr": f"127.0.0.1:{self.port}"},
            "lease": lease,
        }
        self.base.mkdir(parents=True)

    # -- running

    def start(self, *, wait: bool = True) -> Node:
        """Start the daemon. With `wait`, it is mounted, and connected if it is a replica, on return."""
        assert self.process is None or self.process.poll() is not None
        path = self.base / "litefs.yml"
        path.write_text(json.dumps(self.config))  # JSON is YAML
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pylitefs", "mount", "-config", str(path)], stdout=log, stderr=log, cwd=self.base
            )
        if wait:
            wait_until(self.healthy, f"{self.name} is ready\n{self.log_tail()}")
        return self

    def healthy(self) -> bool:
        """True if /healthz says so. AssertionError if the daemon has ended."""
        assert self.process is not None
        status = self.process.poll()
        assert status is None, f"{self.name} ended with status {status}:\n{self.log_tail()}"
        try:
            return self.get("/healthz") is not None
        except urllib.error.HTTPError:
            return False

    def stop(self) -> None:
        """SIGTERM; the daemon must end by itself, with status 0, and leave no mount."""
        assert self.process is not None
        self.process.terminate()
        status = self.process.wait(START_S)
        assert status == 0, f"{self.name} ended with status {status}:\n{self.log_tail()}"
        assert mount.mount_at(str(self.mount)) is None, f"{self.name} left its mount"

    def kill(self) -> None:
        """SIGKILL. The daemon must end at once, also when it was just using its own mount."""
        assert self.process is not None
        self.process.kill()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.unmount()
            raise AssertionError(f"{self.name} was killed and does not end: it waits for its own mount") from None

    def pause(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def remove(self) -> None:
        """Whatever state it is in: end the daemon and unmount."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.unmount()
        if self.process is not None:
            self.process.wait(10)

    def unmount(self) -> None:
        """By force: requests that wait for a daemon in vain fail, also those of a daemon that waits for itself."""
        path = str(self.mount)
        while mount.mount_at(path) is not None:
            subprocess.run(["umount", "-f", path], stderr=subprocess.DEVNULL, timeout=10, check=False)
            if mount.mount_at(path) is not None and not mount.detach(path):
                break

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def log_tail(self) -> str:
        return "\n".join(self.log_text().splitlines()[-_LOG_TAIL:])

    # -- asking

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=START_S) as response:
            body: bytes = response.read()
            return body

    def info(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.get("/info"))
        return document

    def export(self, name: str) -> bytes:
        return self.get(f"/export?name={name}")

    def position(self, name: str) -> str:
        """What NAME-pos says; on the primary this covers every commit that has returned."""
        return (self.mount / f"{name}-pos").read_text().strip()

    def connect(self, name: str, *, timeout_s: float = 10.0) -> sqlite3.Connection:
        """A connection without implicit transactions, usable from any thread."""
        return sqlite3.connect(
            self.mount / name, timeout=timeout_s, isolation_level=None, check_same_thread=False, cached_statements=0
        )

    def names(self) -> list[str]:
        return sorted(os.listdir(self.mount))

    def databases(self) -> list[str]:
        """The names of what is a database here."""
        return sorted(name[:-4] for name in os.listdir(self.mount) if name.endswith("-pos"))

    def litefs(self, *words: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        return litefs(*words, timeout_s=timeout_s)


def assert_nothing_overlooked(name: str, log: str) -> None:
    """The watchdog's finding anything is a defect, whatever else went well (`engine/watchdog.py`)."""
    found = [line for line in log.splitlines() if "nobody was woken for" in line]
    assert not found, f"{name} was not woken for a commit:\n" + "\n".join(found)


def litefs(*words: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run the command; what it printed is in the result."""
    return subprocess.run(
        [sys.executable, "-m", "pylitefs", *words], capture_output=True, text=True, timeout=timeout_s, check=False
    )


class Cluster:
    """A context that ends every node it made, and tells their logs when the test fails."""

    def __init__(self, base: Path, passthrough: str = "auto") -> None:
        self.base = base
        self.passthrough = passthrough
        self.nodes: list[Node] = []
        self._watchdog = threading.Timer(WATCHDOG_S, self._hung)
        self._watchdog.daemon = True
        self.was_hung = False

    def __enter__(self) -> Cluster:
        for parent in (self.base, *self.base.parents):  # other users are let in
            if parent == Path("/tmp"):
                break
            with contextlib.suppress(OSError):
                parent.chmod(0o755)
        self._watchdog.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in reversed(self.nodes):
            node.remove()
        self._watchdog.cancel()
        if error is None:
            for node in self.nodes:
                assert_nothing_overlooked(node.name, node.log_text())

    def _hung(self) -> None:
        self.was_hung = True
        for node in self.nodes:
            if node.process is not None and node.process.poll() is None:
                node.process.kill()
            node.unmount()

    def node(self, name: str, *, primary: Node | None = None, passthrough: str | None = None) -> Node:
        """A node that is not started yet."""
        node = Node(self.base, name, passthrough=passthrough or self.passthrough, primary=primary)
        self.nodes.append(node)
        return node

    def pair(self) -> tuple[Node, Node]:
        """A primary and a replica, running."""
        primary = self.node("primary").start()
        return primary, self.node("replica", primary=primary).start()

    def logs(self) -> Iterator[tuple[str, str]]:
        if self.was_hung:
            yield "watchdog", f"the daemons were killed after {WATCHDOG_S:.0f} s: one of them hung"
        for node in self.nodes:
            yield f"log of {node.name}", node.log_tail()


# -- comparing ------------------------------------------------------------------------------------------------------


def wait_same_position(primary: Node, replica: Node, name: str, timeout_s: float = START_S) -> str:
    """Wait until the replica has everything that is committed on the primary now; the position."""
    position = primary.position(name)

    def reached() -> str:
        seen = replica.position(name)
        return seen if seen == position else Seen(seen)

    wait_until(reached, f"{name} at {position} on {replica.name}", timeout_s)
    return position


class Seen(str):
    """A value that is not the one that was waited for."""

    def __bool__(self) -> bool:
        return False


def dump(connection: sqlite3.Connection) -> dict[str, list[Any]]:
    """Every row of every table, by table, and the schema."""
    schema = connection.execute("select type, name, sql from sqlite_schema order by type, name").fetchall()
    found: dict[str, list[Any]] = {"": schema}
    for kind, table, _ in schema:
        if kind == "table" and not table.startswith("sqlite_"):
            found[table] = connection.execute(f'select rowid, * from "{table}" order by rowid').fetchall()
    return found


def assert_sound(connection: sqlite3.Connection) -> None:
    assert connection.execute("pragma integrity_check").fetchall() == [("ok",)]


def assert_same_bytes(nodes: Sequence[Node], name: str) -> bytes:
    """Exports of one database from every node are identical."""
    first, *others = [node.export(name) for node in nodes]
    for node, other in zip(nodes[1:], others, strict=True):
        assert len(first) == len(other), f"{name}: {len(first)} bytes on {nodes[0].name}, {len(other)} on {node.name}"
        if first != other:
            page_size = int.from_bytes(first[16:18], "big")
            page_size = 65536 if page_size == 1 else page_size
            pages = [
                at // page_size + 1
                for at in range(0, len(first), page_size)
                if first[at : at + page_size] != other[at : at + page_size]
            ]
            raise AssertionError(f"{name}: pages {pages[:20]} differ between {nodes[0].name} and {node.name}")
    return first
