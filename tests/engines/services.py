"""Real lease engines for tests: each a process on a port of its own, with its data in a directory of its own.

A `Service` can be stopped (SIGSTOP), killed and started again. It listens on the loopback, or at the `Place` that is
given: a host in a network namespace.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ports import free_port

ENGINES = Path(__file__).parent
START_S = 40.0
CLONE_NEWNET = 0x40000000
BUCKET = "leases"
BUCKET_HEADERS = {"Authorization": "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request"}
BUCKET_OPTIONS = {"region": "us-east-1", "access_key_id": "test", "secret_access_key": "test"}
_LIBC = ctypes.CDLL(None, use_errno=True)


def program(name: str) -> str:
    """The engine's program, or the test is skipped, loudly; in continuous integration it fails."""
    sys.path.insert(0, str(ENGINES))
    try:
        from fetch import CannotFetch, obtain

        return obtain(name)
    except CannotFetch as error:
        missing(f"{name} cannot be had here: {error}")
    finally:
        sys.path.remove(str(ENGINES))


def missing(text: str) -> None:
    if os.environ.get("PYLITEFS_ENGINES") == "required":
        pytest.fail(text)
    print(f"\n*** NOT TESTED: {text}", file=sys.stderr)
    pytest.skip(text)


@dataclass(frozen=True)
class Place:
    """Where a process runs: in the network namespace of the process `holder`, or where we are (None). `address` is what
    it listens on, and is reached at."""

    address: str = "127.0.0.1"
    holder: int | None = None

    def words(self, words: list[str]) -> list[str]:
        """The command line that runs `words` there, in the same process."""
        return words if self.holder is None else ["nsenter", f"--net=/proc/{self.holder}/ns/net", "--", *words]

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Sockets that this thread makes meanwhile are there, and stay there."""
        if self.holder is None:
            yield
            return
        with open("/proc/thread-self/ns/net") as ours, open(f"/proc/{self.holder}/ns/net") as theirs:
            _set_namespace(theirs.fileno())
            try:
                yield
            finally:
                _set_namespace(ours.fileno())


HERE = Place()


def _set_namespace(fd: int) -> None:
    """setns(2): of the calling thread only."""
    if _LIBC.setns(fd, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def port_at(place: Place) -> int:
    with place.entered():
        return free_port(place.address)


class Service:
    """A process that is an engine. `folder` is its own."""

    def __init__(
        self,
        folder: Path,
        command: list[str],
        ready: Callable[[], bool],
        port: int,
        scheme: str = "http",
        place: Place = HERE,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port = port
        self.place = place
        self.url = f"{scheme}://{place.address}:{port}"
        self._command = place.words(command)
        self._ready = ready
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=self.folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        end_s = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError), self.place.entered():
                if self._ready():
                    return
            if self._process.poll() is not None or time.monotonic() > end_s:
                said = (self.folder / "log").read_text(errors="replace")[-2000:]
                self.kill()
                raise RuntimeError(f"{self._command[0]} does not start:\n{said}")
            time.sleep(0.05)

    def pause(self) -> None:
        """Until all its threads stand still: the signal takes its time to reach them."""
        self._signal(signal.SIGSTOP)
        assert self._process is not None
        tasks = Path(f"/proc/{self._process.pid}/task")
        end_s = time.monotonic() + START_S
        while any((task / "stat").read_text().rpartition(")")[2].split()[0] not in "tTZX" for task in tasks.iterdir()):
            assert time.monotonic() < end_s, "it does not stop"
            time.sleep(0.002)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def __enter__(self) -> Service:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def answers(url: str, expected: Callable[[bytes], bool] = bool) -> Callable[[], bool]:
    def ready() -> bool:
        with urllib.request.urlopen(url, timeout=2) as response:
            return expected(response.read())

    return ready


def etcd(
    folder: Path,
    *options: str,
    ready: Callable[[], bool] | None = None,
    scheme: str = "http",
    place: Place = HERE,
) -> Service:
    port, peer = port_at(place), port_at(place)
    url, peer_url = f"{scheme}://{place.address}:{port}", f"http://{place.address}:{peer}"
    command = [program("etcd"), "--name=one", f"--data-dir={folder}/data", f"--listen-client-urls={url}"]
    command += [f"--advertise-client-urls={url}", f"--listen-peer-urls={peer_url}"]
    command += [f"--initial-advertise-peer-urls={peer_url}", f"--initial-cluster=one={peer_url}", *options]
    ready = ready or answers(f"{url}/health", lambda body: b"true" in body)
    return Service(folder, command, ready, port, scheme, place)


def consul(folder: Path, settings: dict[str, object] | None = None, place: Place = HERE) -> Service:
    """A single server that keeps its data, so that it can be killed and started again."""
    names = ("http", "dns", "grpc", "serf_lan", "serf_wan", "server", "https")
    ports = {name: port_at(place) if name in ("http", "serf_lan", "server") else -1 for name in names}
    given: dict[str, object] = {
        "server": True, "bootstrap": True, "data_dir": f"{folder}/data", "bind_addr": place.address, "ports": ports,
        "client_addr": place.address, "disable_update_check": True, "node_name": "one", "leave_on_terminate": False,
        "performance": {"raft_multiplier": 1}, **(settings or {}),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "consul.json").write_text(json.dumps(given))
    command = [program("consul"), "agent", f"-config-file={folder}/consul.json"]
    port = ports["http"]
    ready = answers(f"http://{place.address}:{port}/v1/status/leader", lambda body: b":" in body)
    return Service(folder, command, ready, port, place=place)


def s3(folder: Path, place: Place = HERE) -> Service:
    """moto; its buckets are in memory, so the one of the tests is made whenever it starts."""
    try:
        import moto.server  # noqa: F401
    except ImportError:
        missing('moto is not installed: pip install -e ".[dev]"')
    port = port_at(place)

    def ready() -> bool:
        request("PUT", f"http://{place.address}:{port}/{BUCKET}", headers=BUCKET_HEADERS)
        return True

    command = [sys.executable, str(ENGINES / "s3_server.py"), str(port), place.address]
    return Service(folder, command, ready, port, place=place)


def kubernetes(folder: Path, cert: tuple[str, str] | None = None, place: Place = HERE) -> Service:
    """Our own API server; the token it accepts is in FOLDER/tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokens").write_text("secret\n")
    port = port_at(place)

    def ready() -> bool:
        with socket.create_connection((place.address, port), timeout=2):
            return True

    command = [sys.executable, str(ENGINES / "kubernetes_api.py"), place.address, str(port), str(folder / "tokens")]
    return Service(folder, [*command, *(cert or ())], ready, port, "https" if cert else "http", place)


def request(method: str, url: str, document: object = None, headers: dict[str, str] | None = None) -> bytes:
    """What an operator's tool would send."""
    data = None if document is None else json.dumps(document).encode()
    asked = urllib.request.Request(url, data=data, method=method, headers=headers or {})
    with urllib.request.urlopen(asked, timeout=10) as response:
        return bytes(response.read())


def base64_text(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
