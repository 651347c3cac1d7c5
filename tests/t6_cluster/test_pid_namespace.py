"""Nodes in a PID namespace of their own, as in a container: the first process there has to wait for what it did not
start, and applications in other containers cannot be seen."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_sync import NAME, WRITER, GatedNode, count

from cluster_nodes import START_S, Cluster, Node, needs_root, wait_until
from pylitefs.filesystem.dying import UNSEEN_S

pytestmark = needs_root
COMMAND = r"""
import os, signal, subprocess, sys, time
def zombies():
    found = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            found += open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            pass
    return found
def told(text):
    with open(sys.argv[1], "a") as file:
        file.write(text + "\n")
def ends(signum, frame):
    told(f"signal {signum}")
    sys.exit(0)
signal.signal(signal.SIGTERM, ends)
for _ in range(5):  # each leaves a child behind, which ends a little later
    subprocess.run(["sh", "-c", "sleep 0.2 & exit 0"])
time.sleep(0.5)
until = time.monotonic() + 20
while zombies() and time.monotonic() < until:
    time.sleep(0.05)
told(f"zombies {zombies()}")
while True:
    time.sleep(1)
"""


class Contained(GatedNode):
    """In a PID namespace; the mounts are everybody's."""

    def start(self, *, wait: bool = True) -> Node:
        popen = subprocess.Popen

        def contained(words: list[str], **options: object) -> subprocess.Popen[bytes]:
            return popen(["unshare", "--pid", "--fork", "--kill-child", *words], **options)  # type: ignore[call-overload, no-any-return]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(subprocess, "Popen", contained)
            super().start(wait=False)
        if wait:
            wait_until(self.healthy, f"{self.name} is ready\n{self.log_tail()}")
        return self


@pytest.mark.parametrize("io_uring", ["auto", "off"])
def test_a_killed_writer_of_another_container_ends(cluster: Cluster, io_uring: str) -> None:
    primary = Contained(cluster.base, "primary")
    primary.config["fuse"]["io-uring"] = io_uring
    cluster.nodes.append(primary)
    primary.start()
    replica = cluster.node("replica", primary=primary).start()
    wait_until(primary.in_sync, "the replica is in sync")
    with contextlib.closing(primary.connect(NAME)) as other:
        other.execute("pragma journal_mode = wal")
        other.execute("create table t(id integer primary key, data)")
        before = primary.position(NAME)
        replica.pause()
        try:
            writer = subprocess.Popen([sys.executable, "-c", WRITER, str(primary.mount / NAME)], stdout=subprocess.PIPE)
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"begun\n"
            wait_until(lambda: primary.position(NAME) != before, "it waits")
            writer.send_signal(signal.SIGKILL)
            assert writer.wait(UNSEEN_S + START_S) == -signal.SIGKILL, "it waits though it was killed"
            assert writer.stdout.read() == b""
            writer.stdout.close()
        finally:
            replica.resume()
        assert count(other) == 0
        other.execute("insert into t(data) values ('after')")
        assert count(other) == 1
    primary.process and os.kill(child_of(primary.process.pid), signal.SIGTERM)


def child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_the_first_process_of_a_container(tmp_path: Path, how: str) -> None:
    """It waits for orphans, hands signals on, and ends with the daemon; if that is killed its command may end too."""
    config = tmp_path / "litefs.yml"
    config.write_text(
        f"fuse:\n  dir: {tmp_path}/mnt\ndata:\n  dir: {tmp_path}/data\nhttp:\n  addr: 127.0.0.1:0\n"
        "lease:\n  type: static\n  candidate: true\n"
    )
    told = tmp_path / "told"
    (tmp_path / "command.py").write_text(COMMAND)
    words = [sys.executable, "-m", "pylitefs", "mount", "-config", str(config), "--"]
    words += [sys.executable, str(tmp_path / "command.py"), str(told)]
    with open(tmp_path / "log", "wb") as log:
        outside = subprocess.Popen(
            ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *words], stdout=log, stderr=log
        )
    try:
        wait_until(told.exists, "the command has looked", 60)
        assert told.read_text() == "zombies 0\n"
        first = child_of(outside.pid)
        daemon = child_of(first)
        if how == "stopped":
            os.kill(first, signal.SIGTERM)
        else:
            os.kill(daemon, signal.SIGKILL)
        assert outside.wait(60) == (0 if how == "stopped" else 128 + signal.SIGKILL), (tmp_path / "log").read_text()
        assert told.read_text() == f"zombies 0\nsignal {int(signal.SIGTERM)}\n"
    finally:
        outside.kill()
        outside.wait(20)
