"""A daemon without privileges: it mounts through fusermount3, caches instead of passing through, and is otherwise the
same. Daemon and applications are one user in a sandbox."""

from __future__ import annotations

import errno
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sandbox import TIMEOUT_S, USER_ID, Sandbox, SandboxNode

from cluster_nodes import Cluster, Node, assert_same_bytes, needs_root, wait_until

pytestmark = [
    needs_root,
    pytest.mark.skipif(shutil.which("fusermount3") is None, reason="fusermount3 is missing: install the package fuse3"),
]
T3 = Path(__file__).parents[1] / "t3_filesystem"
FUSECTL = "mount -t fusectl none /sys/fs/fuse/connections"
NO_FUSECTL = "umount /sys/fs/fuse/connections 2>/dev/null || true"

WRITE = """
import sqlite3, sys
path, mode, rows = sys.argv[1:]
connection = sqlite3.connect(path, isolation_level=None)
assert connection.execute(f"pragma journal_mode={mode}").fetchone() == (mode,)
connection.execute("create table if not exists t(id integer primary key, data)")
for _ in range(int(rows)):
    connection.execute("insert into t(data) values (randomblob(600))")
print(connection.execute("select count(*) from t").fetchone()[0])
"""
READ = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
assert connection.execute("pragma integrity_check").fetchall() == [("ok",)]
print(connection.execute("select count(*) from t").fetchone()[0])
try:
    connection.execute("delete from t")
except sqlite3.Error as error:
    print(error)
"""
HOLD = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("begin immediate")
connection.execute("insert into t(data) values ('never')")
print("open", flush=True)
sys.stdin.readline()
try:
    connection.execute("commit")
except sqlite3.Error as error:
    print(error)
"""
STUCK_DAEMON = """
import os, sys, threading
mount_dir, data_dir, t3 = sys.argv[1:]
sys.path.insert(0, t3)
from plain_hooks import PlainHooks
from pylitefs.filesystem.guard import MountGuard
from pylitefs.filesystem.session import Session

hooks, waiting, kept = PlainHooks(data_dir), threading.Semaphore(0), []
def before_fsync(ref, then):
    kept.append(then)
    waiting.release()
hooks.before_fsync = before_fsync
session, guard = Session(mount_dir, data_dir, hooks), MountGuard(mount_dir)
session.start()
guard.hold(session.device_fd, session.cached_fd, session.mount_device)
def use_own_mount():
    os.fsync(os.open(mount_dir + "/own", os.O_CREAT | os.O_RDWR))
threading.Thread(target=use_own_mount, daemon=True).start()
waiting.acquire()
print("stuck", flush=True)
sys.stdin.readline()
"""
FSYNC = """
import os, sys
fd = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR)
print("open", flush=True)
try:
    os.fsync(fd)
except OSError as error:
    print(error.errno)
"""


@pytest.fixture
def sandbox(cluster: Cluster) -> Iterator[Sandbox]:
    with Sandbox(cluster.base) as made:
        yield made


def write(node: SandboxNode, name: str, rows: int, mode: str = "wal") -> int:
    return int(node.sandbox.python(WRITE, node.mount / name, mode, str(rows)))


def check(primary: SandboxNode, replica: Node, name: str) -> None:
    wait_until(lambda: position(replica, name) == position(primary, name) != "", f"{name} is on {replica.name}")
    assert_same_bytes([primary, replica], name)


def position(node: Node, name: str) -> str:
    found = node.info()["databases"].get(name)
    return f"{found['txid']}/{found['checksum']}" if found else ""


def test_mount_write_and_replicate(cluster: Cluster, sandbox: Sandbox) -> None:
    """To a replica of the same user and to one of root's. Passthrough is not asked for in vain again and again."""
    primary = SandboxNode(cluster, sandbox, "primary").start()
    (line,) = sandbox.mounts(primary.mount)
    assert f"user_id={USER_ID}," in line and "allow_other" not in line
    said = [line for line in primary.log_text().splitlines() if "passthrough is off" in line]
    assert len(said) == 1 and "privileges" in said[0], primary.log_text()
    assert "passthrough=False" in primary.log_text()
    replica = SandboxNode(cluster, sandbox, "replica", primary=primary).start()
    roots = cluster.node("roots", primary=primary).start()
    for rows, mode in enumerate(("wal", "delete", "truncate", "persist"), 30):
        assert write(primary, f"{mode}.db", rows, mode) == rows
        check(primary, replica, f"{mode}.db")
        check(primary, roots, f"{mode}.db")
        said = sandbox.python(READ, replica.mount / f"{mode}.db").splitlines()
        assert said == [str(rows), "attempt to write a readonly database"]
    txid = int(position(primary, "wal.db").split("/")[0], 16)
    assert txid >= 30 + 1, "commits were missed: the wal-index was not read where it is"
    assert primary.log_text().count("passthrough is off") == 1
    for node in (roots, replica, primary):
        assert "Traceback" not in node.log_text()
        node.stop()


def test_stop_while_files_are_open(cluster: Cluster, sandbox: Sandbox) -> None:
    """SIGTERM ends the node though an application has a transaction open; what it never committed is not there."""
    node = SandboxNode(cluster, sandbox, "node")
    node.config["lease"]["recovery-wait"] = "0s"
    node.start()
    write(node, "app.db", 5)
    application = sandbox.start_python(HOLD, node.mount / "app.db")
    try:
        assert application.stdout is not None and application.stdout.readline() == "open\n"
        node.stop()
        assert "has open files" in node.log_text()
        said, errors = application.communicate("\n", timeout=TIMEOUT_S)
        assert errors == "" and "I/O" in said
    finally:
        application.kill()
        application.communicate()
    node.start()
    assert write(node, "app.db", 1) == 6
    node.stop()


def test_killed_while_a_dead_mount_stays(cluster: Cluster, sandbox: Sandbox) -> None:
    """kill -9, also of the guard: the mount that is left is dead, and the next start takes it away."""
    node = SandboxNode(cluster, sandbox, "node")
    node.config["lease"]["recovery-wait"] = "0s"
    node.start()
    write(node, "app.db", 20)
    assert node.process is not None
    (guard,) = subprocess.run(
        ["pgrep", "-P", str(node.process.pid), "-f", "mount_guard"], capture_output=True, text=True, check=True
    ).stdout.split()
    subprocess.run(["kill", "-9", guard], check=True)
    node.kill()
    assert len(sandbox.mounts(node.mount)) == 1
    assert "not connected" in sandbox.run("ls", node.mount).stderr
    node.start()
    assert "removed the mount of a killed litefs" in node.log_text()
    assert len(sandbox.mounts(node.mount)) == 1
    assert write(node, "app.db", 1) == 21
    node.stop()


@pytest.mark.parametrize("fusectl", [FUSECTL, NO_FUSECTL], ids=["fusectl", "no-fusectl"])
def test_killed(cluster: Cluster, fusectl: str) -> None:
    """The mount is dead at once, and nobody makes files below it; both roles start again and agree."""
    with Sandbox(cluster.base, fusectl) as sandbox:
        primary = SandboxNode(cluster, sandbox, "primary")
        primary.config["lease"]["recovery-wait"] = "0s"
        primary.start()
        replica = SandboxNode(cluster, sandbox, "replica", primary=primary).start()
        rows = write(primary, "app.db", 40)
        for node in (replica, primary):
            node.kill()
            wait_until(lambda node=node: is_dead(sandbox, node.mount), f"the mount of {node.name} is dead")
            node.start()
        assert write(primary, "app.db", 1) == rows + 1
        check(primary, replica, "app.db")
        replica.stop()
        primary.stop()


@pytest.mark.parametrize("as_user", [True, False], ids=["user", "root"])
@pytest.mark.parametrize("fusectl", [FUSECTL, NO_FUSECTL], ids=["fusectl", "no-fusectl"])
def test_killed_while_it_waits_for_its_own_mount(cluster: Cluster, fusectl: str, as_user: bool) -> None:
    """The worst moment: a thread of the daemon and an application wait for answers that nobody can give any more."""
    with Sandbox(cluster.base, fusectl) as sandbox:
        base = cluster.base / "node"
        mount_dir = base / "mnt with\tspaces"
        for path in (base, mount_dir, base / "data"):
            path.mkdir()
            shutil.chown(path, USER_ID, USER_ID)
        daemon = sandbox.start_python(STUCK_DAEMON, mount_dir, base / "data", T3, as_user=as_user)
        application = None
        try:
            assert daemon.stdout is not None
            assert daemon.stdout.readline() == "stuck\n"
            application = sandbox.start_python(FSYNC, mount_dir / "theirs", as_user=as_user)
            assert application.stdout is not None and application.stdout.readline() == "open\n"
            daemon.kill()
            daemon.wait(10)
            said, errors = application.communicate(timeout=10)
            assert errors == "" and int(said) in (errno.ECONNABORTED, errno.ECANCELED, errno.ENOTCONN, errno.EIO)
            wait_until(lambda: is_dead(sandbox, mount_dir, as_user), "the mount is dead")
            assert len(sandbox.mounts(escaped(mount_dir))) == 1
        finally:
            for _ in sandbox.mounts(escaped(mount_dir)):
                sandbox.run("umount", "-f", mount_dir, as_user=False)
                sandbox.run("umount", "-l", mount_dir, as_user=False)
            for process in (daemon, application):
                if process is not None:
                    process.kill()
                    process.communicate()


def is_dead(sandbox: Sandbox, mount_dir: Path, as_user: bool = True) -> bool:
    return "not connected" in sandbox.run("ls", mount_dir, as_user=as_user).stderr


def escaped(path: Path) -> Path:
    """As mountinfo shows it."""
    return Path(re.sub(r"[ \t]", lambda found: f"\\{ord(found[0]):03o}", str(path)))


def test_what_fusermount3_refuses(cluster: Cluster, sandbox: Sandbox) -> None:
    """One line each, which says what it said."""
    node = SandboxNode(cluster, sandbox, "node")
    node.config["fuse"]["allow-other"] = True
    assert "user_allow_other" in node.refused()
    del node.config["fuse"]["allow-other"]
    node.mount.mkdir(exist_ok=True)
    shutil.chown(node.mount, 0, 0)
    assert "no write access to mountpoint" in node.refused()
    shutil.chown(node.mount, USER_ID, USER_ID)
    node.start().stop()


def test_no_fusermount3(cluster: Cluster, sandbox: Sandbox) -> None:
    node = SandboxNode(cluster, sandbox, "node")
    node.path = "/nowhere"
    assert "only root may mount without fusermount3" in node.refused()
    assert sys.executable and not sandbox.mounts(node.mount)
