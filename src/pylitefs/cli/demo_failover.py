"""`litefs demo -cluster`: three nodes elect their primary; it is killed, comes back, and the lease is handed over."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pylitefs.cli.demo_cluster import START_TIMEOUT_S, Cluster, DemoFailed, Node, free_ports
from pylitefs.cli.demo_workload import DATABASE, check_line, compare
from pylitefs.errors import LitefsError
from pylitefs.supervise import dying_with_us

_NAMES = ("node-1", "node-2", "node-3")
_TTL_S = 3
_RATE_PER_S = 50
_REFRESH_S = 0.25
_BUSY_S = 0.02  # nobody else writes: the primary is changing
_KILL_AT, _RESTART_AT, _HAND_OVER_AT = 0.2, 0.55, 0.8  # parts of the time


class ElectingCluster(Cluster):
    """Nodes with an engine: etcd, run for the demo, or a directory."""

    def __init__(self, keep: bool) -> None:
        super().__init__(_NAMES, keep)
        self._etcd: subprocess.Popen[bytes] | None = None
        self._etcd_url = ""

    @property
    def engine(self) -> str:
        return f"etcd at {self._etcd_url}" if self._etcd_url else "a shared directory (no program etcd here)"

    def lease_of(self, node: Node) -> str:
        if self._etcd_url:
            section = f"  type: etcd\n  etcd:\n    urls: [{self._etcd_url}]\n    ttl: {_TTL_S}s\n"
        else:
            url = (self.directory / "lease").as_uri()
            section = f'  type: object-store\n  object-store:\n    url: "{url}"\n    ttl: {_TTL_S}s\n'
        return (
            f'lease:\n{section}  hostname: "{node.name}"\n  advertise-url: "{node.url}"\n'
            "replication:\n  sync: 1\n  mode: wait\n"
        )

    def start(self) -> None:
        (self.directory / "lease").mkdir()
        self._start_etcd()
        super().start()

    def _start_etcd(self) -> None:
        program = shutil.which("etcd") or shutil.which("etcd", path=os.path.dirname(sys.executable))
        if program is None:
            return
        client, peer = free_ports(2)
        url, peer_url = f"http://127.0.0.1:{client}", f"http://127.0.0.1:{peer}"
        command = [
            program, "--data-dir", str(self.directory / "etcd"), "--log-level", "error",
            "--listen-client-urls", url, "--advertise-client-urls", url, "--listen-peer-urls", peer_url,
            "--initial-advertise-peer-urls", peer_url, "--initial-cluster", f"default={peer_url}",
        ]  # fmt: skip
        with open(self.directory / "etcd.log", "ab") as log:
            self._etcd = subprocess.Popen(
                dying_with_us(command), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "ETCD_UNSUPPORTED_ARCH": os.uname().machine},
            )  # fmt: skip
        until_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < until_s and self._etcd.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=1.0):
                self._etcd_url = url
                return
            time.sleep(0.05)
        raise DemoFailed(f"etcd does not start: see {self.directory}/etcd.log (-keep keeps it)")

    def _stop(self) -> list[str]:
        problems = super()._stop()
        if self._etcd is not None and self._etcd.poll() is None:
            self._etcd.terminate()
            try:
                self._etcd.wait(10)
            except subprocess.TimeoutExpired:
                self._etcd.kill()
                self._etcd.wait()
        return problems

    def find_primary(self) -> Node | None:
        """Whoever says so of itself."""
        for node in self.nodes:
            if node.process is not None and node.process.poll() is None and _answers(f"{node.url}/primary"):
                return node
        return None


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=0.5):
            return True
    except OSError:
        return False


class Client(threading.Thread):
    """An application that writes wherever the primary is, a transaction at a time, and remembers what was committed."""

    def __init__(self, cluster: ElectingCluster) -> None:
        super().__init__(name="client", daemon=True)
        self._cluster = cluster
        self._ended = threading.Event()
        self.committed: list[int] = []
        self.where = ""
        self.gap_s = 0.0  # since the last commit
        self.longest_gap_s = 0.0
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            number, last_s = 0, time.monotonic()
            while not self._ended.is_set():
                node = self._cluster.find_primary()
                if node is None:
                    self.gap_s = time.monotonic() - last_s
                    time.sleep(0.01)
                    continue
                with contextlib.suppress(sqlite3.Error), contextlib.closing(_connect(node.mount_dir / DATABASE)) as db:
                    self.where = node.name
                    while not self._ended.is_set():
                        number += 1  # also where it is not known what came of the one before
                        db.execute("INSERT INTO visit VALUES (?, ?)", (number, node.name))
                        self.committed.append(number)
                        now_s = time.monotonic()
                        self.gap_s = now_s - last_s
                        self.longest_gap_s, last_s = max(self.longest_gap_s, self.gap_s), now_s
                        self._ended.wait(1 / _RATE_PER_S)
                self.where = ""
                self.gap_s = time.monotonic() - last_s
        except Exception as error:
            self.error = error

    def take_longest_gap_s(self) -> float:
        """Since it was asked the last time."""
        gap_s, self.longest_gap_s = max(self.longest_gap_s, self.gap_s), 0.0
        return gap_s

    def stop(self) -> None:
        self._ended.set()
        if self.is_alive():
            self.join()


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, timeout=_BUSY_S)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("CREATE TABLE IF NOT EXISTS visit (id INTEGER PRIMARY KEY, node TEXT)")
    except sqlite3.Error:
        db.close()
        raise
    return db


def play_failover(console: Console, cluster: ElectingCluster, seconds: int) -> bool:
    """Start, write, kill, hand over, compare. Whether nothing that was committed is missing."""
    console.print(f"starting three nodes in {cluster.directory}", markup=False)
    cluster.start()
    console.print(f"lease: {cluster.engine}, ttl {_TTL_S} s; every commit waits for a second node", markup=False)
    seconds = max(seconds, 12)
    client = Client(cluster)
    try:
        client.start()
        _until(lambda: len(client.committed) > _RATE_PER_S // 2, "the first commits", client)
        _show(console, cluster, client, seconds)
    finally:
        client.stop()
    if client.error is not None:
        raise DemoFailed(f"the client failed: {client.error}")
    console.print(f"{len(client.committed):,} transactions were acknowledged; comparing the copies")
    return _compare(console, cluster, client.committed)


def _show(console: Console, cluster: ElectingCluster, client: Client, seconds: int) -> None:
    started_s = time.monotonic()
    story: list[Text] = []
    killed: Node | None = None
    steps = [(_KILL_AT, "kill"), (_RESTART_AT, "restart"), (_HAND_OVER_AT, "hand over"), (1.0, "end")]
    with contextlib.ExitStack() as stack:
        live = stack.enter_context(Live(console=console, auto_refresh=False)) if console.is_terminal else None

        def tell(text: str) -> None:
            story.append(Text(f"{time.monotonic() - started_s:5.1f} s  {text}"))
            if live is None:
                console.print(story[-1], soft_wrap=True)

        while steps:
            if client.error is not None:
                return
            if time.monotonic() - started_s >= steps[0][0] * seconds:
                _, step = steps.pop(0)
                if step == "kill":
                    client.take_longest_gap_s()
                    killed = cluster.find_primary()
                    if killed is not None:
                        _kill(killed)
                        tell(f"kill -9 {killed.name}, the primary")
                elif step == "restart" and killed is not None:
                    gap_s = client.take_longest_gap_s()
                    tell(f"{client.where or 'nobody'} has taken over: no commit for {gap_s:.2f} s")
                    killed.start()
                    tell(f"{killed.name} starts again")
                elif step == "hand over":
                    client.take_longest_gap_s()
                    tell(_hand_over(cluster))
                elif step == "end":
                    tell(f"no commit for {client.take_longest_gap_s() * 1000:.0f} ms while the lease was handed over")
            if live is not None:
                live.update(_render(cluster, client, story), refresh=True)
            time.sleep(_REFRESH_S)


def _kill(node: Node) -> None:
    assert node.process is not None
    os.kill(node.process.pid, signal.SIGKILL)
    node.process.wait()


def _hand_over(cluster: ElectingCluster) -> str:
    primary = cluster.find_primary()
    others = [node for node in cluster.nodes if node is not primary and node.status() is not None]
    if primary is None or not others:
        return "no handover: there is no primary, or nobody else"
    try:
        primary.client.handoff()
    except LitefsError as error:
        return f"no handover: {error}"
    now = cluster.find_primary()
    return f"litefs handoff: from {primary.name} to {now.name if now else 'somebody'}"


def _render(cluster: ElectingCluster, client: Client, story: list[Text]) -> RenderableType:
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, header_style="dim")
    for heading in ("node", "role", "txid"):
        table.add_column(heading, no_wrap=True)
    for node in cluster.nodes:
        status = node.status() if node.process is not None and node.process.poll() is None else None
        role = Text("dead", style="bold red") if status is None else Text(str(status["node"]["role"]))
        if status is not None and status["node"]["role"] == "primary":
            role.stylize("bold green")
        found = [db["txid"] for db in (status or {}).get("databases", []) if db["name"] == DATABASE]
        table.add_row(Text(node.name, style="bold"), role, found[0] if found else "")
    gap = Text(f"  last commit {client.gap_s:.1f} s ago", style="bold red") if client.gap_s > 0.5 else Text("")
    return Group(Text(), table, Text(), Text(f"{len(client.committed):,} commits acknowledged") + gap, *story)


def _compare(console: Console, cluster: ElectingCluster, committed: list[int]) -> bool:
    primary = cluster.find_primary()
    if primary is None:
        raise DemoFailed("there is no primary at the end")
    with contextlib.closing(sqlite3.connect(primary.mount_dir / DATABASE)) as db:
        rows = {row[0] for row in db.execute("SELECT id FROM visit")}
    missing = sorted(set(committed) - rows)
    what = Text("  ok     " if not missing else "  FAILED ", style="green" if not missing else "bold red")
    text = f"all {len(committed):,} are there" if not missing else f"{len(missing)} are missing: {missing[:5]}"
    console.print(what + Text(f"{'acknowledged':<16}", style="bold") + Text(text))
    checks = compare(cluster, len(rows))
    for check in checks:
        console.print(check_line(check), soft_wrap=True)
    return not missing and all(check.passed for check in checks)


def _until(condition: Callable[[], bool], what: str, client: Client) -> None:
    until_s = time.monotonic() + START_TIMEOUT_S
    while not condition():
        if client.error is not None:
            raise DemoFailed(f"the client failed: {client.error}")
        if time.monotonic() > until_s:
            raise DemoFailed(f"{what} did not come within {START_TIMEOUT_S:.0f} s")
        time.sleep(0.05)
