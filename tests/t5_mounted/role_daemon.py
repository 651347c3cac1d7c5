"""A node for tests without a cluster: mounts a store and changes its role as it is told on standard input.

usage: role_daemon.py MOUNT DATA auto|off

One JSON list per line, [command, argument...]; answers with one JSON line, {"ok": ...} or {"error": "..."}.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pylitefs.engine.fence import Fence
from pylitefs.engine.hooks import EngineHooks
from pylitefs.engine.store import Store, StoreOptions
from pylitefs.events import EventBus
from pylitefs.filesystem.guard import MountGuard
from pylitefs.filesystem.session import Session
from pylitefs.formats.ltx.decoder import verify_stream
from pylitefs.ports import Then


class Gate:
    """A `CommitGate`: commits up to `granted` may go on, the others wait or `fail`."""

    def __init__(self) -> None:
        self.active = True
        self._lock = threading.Lock()
        self.granted: float = 0
        self.fails = False
        self.waiting: list[tuple[int, Then]] = []

    def wait(self, name: str, txid: int, then: Then) -> None:
        with self._lock:
            fails, waits = self.fails, not self.fails and txid > self.granted
            if waits:
                self.waiting.append((txid, then))
        if not waits:
            then(OSError(errno.EIO, "no replica") if fails else None)

    def set(self, granted: float | None, *, fails: bool = False) -> None:
        """`granted` None: up to the last one that waits."""
        with self._lock:
            found, self.waiting = self.waiting, []
            if granted is None:
                granted = max([self.granted, *(txid for txid, _ in found)])
            self.granted, self.fails = granted, fails
        for txid, then in found:
            self.wait("", txid, then)


class RoleNode:
    def __init__(self, mount_dir: str, data_dir: str, passthrough: bool) -> None:
        self.mount_dir = os.path.realpath(mount_dir)
        self.events: list[str] = []
        bus = EventBus()
        bus.subscribe(lambda event: self.events.append(f"{event.type} {event.database or ''}".strip()))
        options = StoreOptions(is_primary=False, role_from_marker=True, mount_dir=self.mount_dir)
        self.store = Store(data_dir, bus, options)
        self.store.load()
        self.store.start()
        self.store.worker.submit(self.store.settle).result()
        self.store.note_boot()
        hooks = EngineHooks(self.store, self.store.apply)
        self.session = Session(
            mount_dir, data_dir, hooks, passthrough=passthrough, io_uring=False, allow_other=False,
            log=lambda line: print(line, file=sys.stderr, flush=True), on_gone=lambda: None,
            on_connected=lambda *shown: self.store.worker.submit(self.store.mounted, self.mount_dir, *shown).result(),
        )  # fmt: skip
        self.guard = MountGuard(mount_dir)
        self.session.start()
        self.guard.hold(self.session.device_fd, self.session.cached_fd, self.session.mount_device)
        self.store.worker.submit(self.store.serving).result()
        self.store.start_upkeep()

    # -- commands

    def promote(self, epoch: int, lease_s: float = math.inf) -> None:
        self.lead(lease_s)
        self.store.promote(epoch)

    def lead(self, lease_s: float) -> None:
        self.store.fence.until_s = time.clock_gettime(time.CLOCK_BOOTTIME) + lease_s

    def gate(self, what: str) -> None:
        """Synchronous replication: "shut", "grant" what waits, "open", "fail" what waits, "none"."""
        gate = self.store.gate = self.store.gate or Gate()
        assert isinstance(gate, Gate)
        if what == "none":
            gate.set(math.inf)
            self.store.gate = None
        elif what == "shut":
            gate.set(self.store.find("db").position.txid)
        else:
            gate.set(math.inf if what == "open" else None if what == "grant" else 0, fails=what == "fail")

    def waiting(self) -> int:
        """How many requests wait for the gate."""
        gate = self.store.gate
        return len(gate.waiting) if isinstance(gate, Gate) else 0

    def demote(self, timeout_s: float) -> list[str]:
        return self.store.demote(timeout_s)

    def pause(self, timeout_s: float) -> bool:
        return self.store.pause_writes(timeout_s)

    def resume(self) -> None:
        self.store.resume_writes()

    def demote_database(self, name: str, timeout_s: float) -> bool:
        return self.store.demote_database(name, timeout_s)

    def promote_database(self, name: str) -> None:
        self.store.promote_database(name, None if self.store.is_primary else Fence(math.inf))

    def apply_as_primary(self, name: str, path: str) -> str:
        return str(self.store.worker.submit(self.store.apply_as_primary, name, path).result())

    def apply(self, name: str, path: str) -> str:
        with open(path, "rb") as file:
            data = file.read()
        return str(self.store.worker.submit(lambda: self.store.get_or_create(name).apply(data)).result())

    def position(self, name: str) -> str:
        return str(self.store.flush(self.store.find(name)).result())

    def captures(self, name: str) -> bool:
        return self.store.find(name).captures

    def log(self, name: str) -> list[list[Any]]:
        """Every file of the log, checked: [path, min TXID, max TXID]. They must follow one another."""
        self.position(name)
        found, after = [], None
        for entry in self.store.find(name).log.entries():
            header, trailer = verify_stream(entry.chunks())
            before = header.min_txid - 1, header.pre_apply_checksum
            assert after is None or before == after, f"{entry.path} does not follow"
            after = header.max_txid, trailer.post_apply_checksum
            found.append([entry.path, header.min_txid, header.max_txid])
        return found

    def export(self, name: str, path: str) -> str:
        return str(self.store.find(name).copy_to(path))

    def told(self) -> list[str]:
        return list(self.events)

    def stop(self) -> None:
        self.store.close_doors()
        self.store.roles.stop()
        if not self.store.is_primary:
            self.store.worker.submit(self.store.rest_all).result(timeout=30)
        self.session.stop()
        self.store.worker.submit(self.store.unmounted).result(timeout=60)
        self.store.close(clean=True)
        self.guard.stop()


def main() -> int:
    mount_dir, data_dir, passthrough = sys.argv[1:4]
    sys.setswitchinterval(0.0005)
    node = RoleNode(mount_dir, data_dir, passthrough == "auto")
    print(json.dumps({"ok": node.session.passthrough}), flush=True)
    # As in the daemon: the guard is told when this thread has ended, so it must not wait for our own mount.
    commands = ThreadPoolExecutor(1)
    for line in sys.stdin:
        command, *words = json.loads(line)
        try:
            answer = {"ok": commands.submit(getattr(node, command), *words).result()}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
        if command == "stop":
            break
    return 0


if __name__ == "__main__":
    sys.exit(main())
