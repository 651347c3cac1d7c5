"""A node of a cluster with a real lease engine: `litefs mount` as a process, and what can happen to it.

Beside what `cluster_nodes.Node` can do: it may run on another host (a `Place`), its data directory may be on a disk of
its own (`disks.py`) that can be filled, or lose what was not synced, and its clocks may differ: CLOCK_BOOTTIME and
CLOCK_MONOTONIC by a time namespace (`offset_s`, from the start), and the wall clock, for which Linux has none, by what
its Python is told (`skew`, at any time).
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any, cast

from cluster_nodes import START_S, Node, wait_until
from engines.services import HERE, Place, port_at
from harness import disks
from harness.disks import RamDisk, RealDisk
from harness.forks import Forks
from harness.history import Copy
from pylitefs.filesystem import mount
from pylitefs.supervise import dying_with_us

ASK_S = 2.0
DISK_BYTES = 64 << 20
SKEWED = Path(__file__).with_name("skewed")


class Member(Node):
    """One node. `lease`, `replication` and `data` are sections of litefs.yml; hostname, URL, folder are filled in.
    `forks`: whom to start it by; then it has no clock of its own."""

    def __init__(
        self,
        base: Path,
        name: str,
        lease: dict[str, Any],
        *,
        place: Place = HERE,
        replication: dict[str, Any] | None = None,
        disk: type[RamDisk] | None = None,
        disk_bytes: int = DISK_BYTES,
        offset_s: int = 0,
        passthrough: str = "auto",
        data: dict[str, Any] | None = None,
        forks: Forks | None = None,
    ) -> None:
        self.name = name
        self.forks = forks
        self.base = base / name
        self.mount = self.base / "mnt"
        self.log = self.base / "log"
        self.place = place
        self.data = self.base / "disk" / "data"
        self.data.parent.mkdir(parents=True)
        self.disk = disk(self.data.parent, disk_bytes) if disk is not None else None
        self.offset_s = offset_s
        self.process: subprocess.Popen[bytes] | None = None
        self.port = port_at(place)
        self.url = f"http://{place.address}:{self.port}"
        self.stopped = False  # by SIGSTOP
        self.ended = False  # by a test, or told to
        self.killed_s: list[float] = []
        self.cut_s: list[float] = []  # its power, or its disk
        self.dark_s: list[tuple[float, float]] = []  # its disk was cut off, and its applications still ran
        self.after_cut: list[str] = []  # what its logs held then, see `evidence.logs_on_disk`
        self.config = {
            "data": {"dir": str(self.data), **(data or {})},
            "fuse": {"dir": str(self.mount), "passthrough": passthrough},
            "http": {"addr": f"{place.address}:{self.port}"},
            "lease": {"hostname": name, "advertise-url": self.url, "reconnect-delay": "100ms", **lease},
            "log": {"timestamp": True, "debug": bool(disk is not None or os.environ.get("PYLITEFS_TEST_DEBUG"))},
        }
        if replication:
            self.config["replication"] = replication
        if self.disk is not None:
            self.disk.attach()

    # -- running

    def start(self, *, wait: bool = True) -> Member:
        """With `wait`, it is mounted on return, and its HTTP server answers; nothing is said about its role."""
        assert self.process is None or self.process.poll() is not None
        path = self.base / "litefs.yml"
        path.write_text(json.dumps(self.config))  # JSON is YAML
        if self.forks is not None:
            process = self.forks.start(["mount", "-config", str(path)], self.base, self.log)
            self.process = cast("subprocess.Popen[bytes]", process)
        else:
            self._execute(path)
        self.stopped = self.ended = False
        if wait:
            wait_until(self.serves, f"{self.name} is mounted and answers\n{self.log_tail()}")
        return self

    def _execute(self, path: Path) -> None:
        words = [sys.executable, "-m", "pylitefs", "mount", "-config", str(path)]
        if self.offset_s:
            words = ["unshare", "--time", f"--boottime={self.offset_s}", f"--monotonic={self.offset_s}", "--", *words]
        words = self.place.words(words)
        if threading.current_thread() is threading.main_thread():  # else it would end with the thread
            words = dying_with_us(words)
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.base, env=self._environment()
            )

    def _environment(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(SKEWED), os.environ.get("PYTHONPATH")]))
        return {**os.environ, "PYTHONPATH": path, "CLOCK_SKEW": str(self.base / "skew")}

    def serves(self) -> bool:
        assert self.process is not None
        status = self.process.poll()
        assert status is None, f"{self.name} ended with status {status}:\n{self.log_tail()}"
        return mount.mount_at(str(self.mount)) is not None and self.role() is not None

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def pause(self) -> None:
        super().pause()
        self.stopped = True

    def resume(self) -> None:
        super().resume()
        self.stopped = False

    def terminate(self) -> None:
        """SIGTERM, without waiting."""
        assert self.process is not None
        self.ended = True
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.ended = True
        super().kill()
        self.killed_s.append(time.monotonic())
        self.stopped = False

    def lose_power(self) -> None:
        """The daemon and its disk; its applications have to be killed too. `start` when they are."""
        assert isinstance(self.disk, RealDisk), f"{self.name} has no disk that can be cut off"
        self.kill()
        self.cut_s.append(time.monotonic())
        self.disk.cut_off()
        self.unmount()
        self.disk.detach()

    def fail_disk(self) -> None:
        """Its disk answers with EIO; the daemon goes on. It has to be restarted: `lose_power`."""
        assert isinstance(self.disk, RealDisk), f"{self.name} has no disk that can be cut off"
        self.cut_s.append(time.monotonic())
        self.disk.cut_off()

    def plug_in(self) -> None:
        """The disk is there again, as the power left it; and the machine is one that was started anew."""
        assert isinstance(self.disk, RealDisk)
        self.disk.wait_released()
        self.disk.attach()
        boot = self.data / "boot"
        if boot.exists() and (text := boot.read_text()):
            boot.write_text(str(uuid.uuid4()) + text[36:])

    def remove(self) -> None:
        super().remove()
        if self.disk is not None:
            self.disk.detach()

    # -- its surroundings

    def fill(self) -> None:
        """Not a byte is left on its disk."""
        assert self.disk is not None, f"{self.name} has no disk of its own"
        disks.fill(self.filler)

    def empty(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.filler.unlink()

    @property
    def filler(self) -> Path:
        return self.data.with_name("filler")

    def skew(self, seconds: float) -> None:
        """Its wall clock is so far from the machine's from now on."""
        new = self.base / "skew.new"
        new.write_text(str(seconds))
        new.replace(self.base / "skew")

    # -- asking

    def request(
        self, path: str, method: str = "GET", body: bytes | None = None, timeout_s: float = START_S
    ) -> tuple[int, bytes]:
        """Asked on its own host, as a cut network does not stop it. OSError."""
        with self.place.entered():
            made = socket.create_connection((self.place.address, self.port), timeout_s)
        connection = http.client.HTTPConnection(self.place.address, self.port, timeout=timeout_s)
        connection.sock = made
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, response.read()
        except http.client.HTTPException as error:
            raise OSError(f"{self.url}{path}: {error!r}") from None
        finally:
            connection.close()

    def get(self, path: str) -> bytes:
        status, body = self.request(path)
        if status != 200:
            raise OSError(f"{self.name} {path}: {status} {body.decode(errors='replace').strip()}")
        return body

    def post(self, path: str, timeout_s: float = START_S) -> str:
        """OSError with its text when it refuses."""
        status, body = self.request(path, "POST", b"", timeout_s)
        text = body.decode(errors="replace").strip()
        if status not in (200, 202, 204):
            raise OSError(f"{self.name} {path}: {status} {text}")
        return text

    def role(self) -> tuple[bool, int] | None:
        """Whether it is the primary with a valid lease, and the epoch it knows; None if it does not answer."""
        try:
            document = json.loads(self.request("/cluster", timeout_s=ASK_S)[1])
            return bool(document["isPrimary"]) and self.takes_writes(), int(document["epoch"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def takes_writes(self) -> bool:
        """By the endpoint for load balancers."""
        try:
            return self.request("/primary", "HEAD", timeout_s=ASK_S)[0] == 200
        except OSError:
            return False

    def cluster(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.get("/cluster"))
        return document

    def positions(self) -> dict[str, str]:
        """TXID and checksum by database; on the primary they cover every commit that has returned."""
        found = json.loads(self.get("/info"))["databases"]
        return {name: f"{position['txid']}/{position['checksum']}" for name, position in found.items()}

    def copy(self, name: str) -> Copy:
        """What there is now. Nothing may be writing."""
        position = self.positions()[name]
        connection = self.connect(name)
        try:
            integrity = "; ".join(text for (text,) in connection.execute("pragma integrity_check"))
            values = tuple(value for (value,) in connection.execute("select value from log order by seq"))
        except sqlite3.Error as error:
            what = f"{name} cannot be read on {self.name}: {error} ({error.sqlite_errorname})"
            raise AssertionError(f"{what}\n{self.log_tail()}") from error
        finally:
            connection.close()
        return Copy(position, hashlib.sha256(self.export(name)).hexdigest()[:16], integrity, values)


def wait_for(condition: Any, what: str, members: list[Member], timeout_s: float = START_S) -> float:
    """Wait, and tell the ends of all logs on failure. How long it took."""
    start_s = time.monotonic()
    try:
        wait_until(condition, what, timeout_s)
    except AssertionError as error:
        logs = "\n".join(f"--- {member.name}\n" + "\n".join(member.log_tail().splitlines()[-15:]) for member in members)
        raise AssertionError(f"{error}\n{logs}") from None
    return time.monotonic() - start_s
