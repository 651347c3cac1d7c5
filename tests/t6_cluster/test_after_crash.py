"""A daemon is killed while applications have databases open, passed through, in WAL mode: the next one waits for no
longer than an application holds them.

The kernel holds the files that pass through a mount as long as that mount is there, also when nobody uses them any
more. So the mount that a killed daemon has left must be gone before it is looked whether anybody does.
"""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster_nodes import Cluster, Node, needs_root, wait_until
from pylitefs.filesystem import mount

pytestmark = needs_root
NAMES = ("one.db", "two.db")
BUSY = "busyAfterCrash"

_APPLICATION = """
import sqlite3, sys
found = []
for path in sys.argv[1:]:
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("pragma journal_mode=wal")
    db.execute("create table if not exists t(a)")
    db.execute("insert into t values (1)")
    found.append(db)
    found.append(db.execute("select * from t"))
print("open", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def applications() -> Iterator[list[subprocess.Popen[bytes]]]:
    running: list[subprocess.Popen[bytes]] = []
    yield running
    for process in running:
        process.kill()
        process.wait(10)


def open_all(node: Node) -> subprocess.Popen[bytes]:
    """An application that has all of them open; it reads until it is killed."""
    words = [sys.executable, "-c", _APPLICATION, *(str(node.mount / name) for name in NAMES)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"open\n"
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(10)


def start(cluster: Cluster) -> Node:
    node = cluster.node("primary")
    node.config["lease"]["recovery-wait"] = "100ms"  # there is nobody to wait for
    node.start()
    return node


def rows(node: Node) -> list[int]:
    found = []
    for name in NAMES:
        with contextlib.closing(node.connect(name)) as connection:
            found.append(connection.execute("select count(*) from t").fetchone()[0])
    return found


def write(node: Node) -> None:
    for name in NAMES:
        with contextlib.closing(node.connect(name)) as connection:
            connection.execute("insert into t values (2)")


def test_applications_that_ended_before_the_start(
    cluster: Cluster, applications: list[subprocess.Popen[bytes]]
) -> None:
    """Nobody holds anything: the databases are there at once."""
    node = start(cluster)
    applications.append(open_all(node))
    applications.append(open_all(node))
    node.kill()
    for process in applications:
        end(process)
    node.start()
    assert rows(node) == [2, 2]
    write(node)
    assert BUSY not in node.log_text()


def test_applications_that_end_after_the_start(cluster: Cluster, applications: list[subprocess.Popen[bytes]]) -> None:
    """It is said who holds them; when the last one has gone they are recovered by themselves."""
    node = start(cluster)
    applications.append(open_all(node))
    applications.append(open_all(node))
    node.kill()
    node.start()
    assert [node.log_text().count(f"event={BUSY} database={name}") for name in NAMES] == [1, 1]
    assert str(applications[0].pid) in node.log_text()
    end(applications[0])
    with pytest.raises(OSError, match="busy"):
        (node.mount / NAMES[0]).read_bytes()
    end(applications[1])
    wait_until(lambda: rows(node) == [2, 2], "they are released")
    write(node)


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_another_namespace_has_the_mount_too(
    cluster: Cluster, applications: list[subprocess.Popen[bytes]], how: str
) -> None:
    """As a container or a service does that was started meanwhile: nobody takes it away there."""
    node = start(cluster)
    applications.append(open_all(node))
    words = ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo there; exec sleep 600"]
    other = subprocess.Popen(words, stdout=subprocess.PIPE)
    applications.append(other)
    assert other.stdout is not None and other.stdout.readline() == b"there\n"
    if how == "kill":
        node.kill()
    else:
        node.stop()
    end(applications[0])
    node.start()
    assert rows(node) == [1, 1]
    write(node)
    assert str(node.mount) in Path(f"/proc/{other.pid}/mountinfo").read_text()
    assert BUSY not in node.log_text()


_RETRIES = """
import sqlite3, sys, time
while True:
    try:
        db = sqlite3.connect(sys.argv[1], timeout=0.1)
        db.execute("create table if not exists t(a)")
        db.execute("insert into t values (1)")
        db.commit()
        print("row", flush=True)
        db.close()
    except sqlite3.Error:
        pass
    time.sleep(0.001)
"""


def test_an_application_that_tries_again_keeps_nobody_from_mounting(
    cluster: Cluster, applications: list[subprocess.Popen[bytes]]
) -> None:
    """In the bare directory it would make a new database, commit into that, and the node could not start any more."""
    node = start(cluster)
    path = str(node.mount / "app.db")
    for _ in range(2):
        applications.append(subprocess.Popen([sys.executable, "-c", _RETRIES, path], stdout=subprocess.PIPE))
    output = [process.stdout for process in applications if process.stdout is not None]
    for lines in output:
        assert lines.readline() == b"row\n"
    acknowledged = len(output)
    for _ in range(3):
        node.kill()
        node.start()
    for process, lines in zip(applications, output, strict=True):
        assert lines.readline() == b"row\n"
        process.kill()
        acknowledged += 1 + lines.read().count(b"row\n")
    with contextlib.closing(sqlite3.connect(path, timeout=20)) as db:
        assert db.execute("select count(*) from t").fetchone()[0] >= acknowledged
    assert not list((node.data / "lost").rglob("app.db"))
    covers = [entry for entry in mount.parse_mountinfo(Path("/proc/self/mountinfo").read_text())
              if entry.path == str(node.mount) and entry.source == mount.COVER]  # fmt: skip
    assert len(covers) == 1  # one serves all starts
