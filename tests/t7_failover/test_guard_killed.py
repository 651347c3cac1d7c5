"""The daemon of a primary is killed, and the mount guard with it, before it could do anything: systemd does so with
`KillMode=mixed`, the kernel at the end of a container. An application in another service goes on committing into files
that nobody replicates. No commit that was answered may be missing in the end without anybody being told."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster_nodes import needs_root, wait_until
from harness.branches import lost_values
from harness.cluster import HaCluster
from harness.nodes import Member

pytestmark = [needs_root, pytest.mark.timeout(150)]
New = Callable[..., HaCluster]
NAME = "app.db"
REFUSED = "unable to open database file"
APPLICATION = """
import sqlite3, sys, time
db = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=0.2)
db.execute("pragma synchronous = normal")
for number in range(1_000_000):
    try:
        db.execute("insert into t values (?)", (f"value {number}.",))
        print(f"value {number}.", flush=True)
    except sqlite3.Error as error:
        print(f"error: {error}", flush=True)
    time.sleep(0.005)
"""


def guards(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"mount_guard" in Path(f"/proc/{child}/cmdline").read_bytes()]


class Application:
    """`answered`: the values whose commit returned; `errors`: what it was told otherwise."""

    def __init__(self, member: Member, log: Path) -> None:
        self._log = log
        with open(log, "wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-c", APPLICATION, str(member.mount / NAME)], stdout=out, stderr=out
            )

    def lines(self) -> list[str]:
        return self._log.read_text().splitlines()

    def answered(self) -> list[str]:
        return [line for line in self.lines() if line.startswith("value ") and line.endswith(".")]

    def wait_for(self, more: int) -> None:
        wanted = len(self.answered()) + more
        wait_until(lambda: len(self.answered()) >= wanted, f"{more} more commits")

    def wait_until_refused(self) -> None:
        """And it stays so."""
        wait_until(lambda: any(REFUSED in line for line in self.lines()[-3:]), "its commits are refused")
        before = len(self.answered())
        time.sleep(0.5)
        assert len(self.answered()) == before, "it was refused, and commits again"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)


@pytest.mark.parametrize("ended_by", ["clean-up", "the next start"])
def test_no_commit_is_answered_and_silently_gone(new_cluster: New, tmp_path: Path, ended_by: str) -> None:
    cluster = new_cluster("directory", databases={})
    cluster.start(2)
    old = cluster.primary()
    with contextlib.closing(old.connect(NAME)) as db:
        db.execute("pragma journal_mode = wal")
        db.execute("create table t (v)")
    application = Application(old, tmp_path / "application")
    try:
        application.wait_for(20)
        assert old.process is not None
        (guard,) = guards(old.process.pid)
        os.kill(guard, signal.SIGKILL)
        old.kill()
        application.wait_for(10)  # the kernel passes them through
        if ended_by == "clean-up":
            done = subprocess.run(
                [sys.executable, "-m", "pylitefs", "clean-up", "-config", str(old.base / "litefs.yml")],
                capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            application.wait_until_refused()
            cluster.wait_primary([old])
            with contextlib.closing(cluster.primary().connect(NAME)) as db:
                db.execute("insert into t values ('of the next primary')")  # so that what is only here fits nowhere
        old.start()
        application.wait_until_refused()
    finally:
        application.kill()
    answered = set(application.answered())
    wait_until(lambda: "outcome=released" in old.log_text(), "the database is served again")
    cluster.wait_settled()
    with contextlib.closing(cluster.primary().connect(NAME)) as db:
        found = {value for (value,) in db.execute("select v from t")}
        assert db.execute("pragma integrity_check").fetchone() == ("ok",)
    if ended_by == "clean-up":
        assert answered - found, "all that was committed here is there: nothing was shown"
    kept = lost_values([old.data], NAME, answered - found)
    assert answered <= found | kept, sorted(answered - found - kept)[:10]
    if answered - found:
        assert "lost" in old.log_text(), "nobody was told"


def test_clean_up_leaves_a_node_alone_that_runs(new_cluster: New) -> None:
    cluster = new_cluster("directory", databases={})
    cluster.start(1)
    node = cluster.primary()
    with contextlib.closing(sqlite3.connect(node.mount / NAME, isolation_level=None)) as db:
        db.execute("pragma journal_mode = wal")
        db.execute("create table t (v)")
        done = subprocess.run(
            [sys.executable, "-m", "pylitefs", "clean-up", "-config", str(node.base / "litefs.yml")],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 1 and "in use by a litefs" in done.stderr
        db.execute("insert into t values (1)")
    assert cluster.primary() is node
