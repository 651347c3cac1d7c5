"""What the machine around a node lacks: /dev/fuse, a plain disk, file descriptors, room; and how it came onto it."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sandbox import Sandbox, SandboxNode

from cluster_nodes import (
    PASSTHROUGH,
    Cluster,
    Node,
    assert_same_bytes,
    assert_sound,
    needs_root,
    wait_same_position,
    wait_until,
)

pytestmark = needs_root
NAME = "app.db"
ROOT = Path(__file__).parents[2]
BARE_DEV = """
mount -t tmpfs -o mode=755 tmpfs /dev
for device in null:3 zero:5 random:8 urandom:9; do mknod -m 666 /dev/${device%:*} c 1 ${device#*:}; done
"""


def create(connection: sqlite3.Connection, mode: str) -> None:
    assert connection.execute(f"pragma journal_mode={mode}").fetchone() == (mode,)
    connection.execute("create table if not exists t(id integer primary key, data)")


def insert(connection: sqlite3.Connection, rows: int, size_bytes: int = 500) -> None:
    for _ in range(rows):
        connection.execute("insert into t(data) values (randomblob(?))", (size_bytes,))


def count(node: Node, name: str = NAME) -> int:
    with contextlib.closing(node.connect(name)) as connection:
        assert_sound(connection)
        return int(connection.execute("select count(*) from t").fetchone()[0])


def check(primary: Node, replica: Node, rows: int, name: str = NAME) -> None:
    wait_same_position(primary, replica, name)
    assert count(primary, name) == count(replica, name) == rows
    assert_same_bytes([primary, replica], name)


# -- no /dev/fuse ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_user", [False, True], ids=["root", "user"])
def test_no_dev_fuse(cluster: Cluster, as_user: bool) -> None:
    with Sandbox(cluster.base, BARE_DEV, fuse_for_all=False) as sandbox:
        node = SandboxNode(cluster, sandbox, "node", as_user=as_user)
        assert node.refused().startswith("ERROR: /dev/fuse is missing: load the kernel module fuse")
        assert not (node.data / "dbs").exists() or os.listdir(node.data / "dbs") == []


@pytest.mark.parametrize(
    ("device", "mode", "users"), [("10 254", 666, (False, True)), ("10 229", 600, (True,))], ids=["no-driver", "roots"]
)
def test_dev_fuse_that_cannot_be_opened(cluster: Cluster, device: str, mode: int, users: tuple[bool, ...]) -> None:
    """A device without a driver behind it; one that is root's alone."""
    commands = f"mknod -m {mode} {cluster.base}/device c {device}", f"mount --bind {cluster.base}/device /dev/fuse"
    with Sandbox(cluster.base, *commands, fuse_for_all=False) as sandbox:
        for as_user in users:
            node = SandboxNode(cluster, sandbox, f"node{as_user:d}", as_user=as_user)
            assert node.refused().startswith("ERROR: /dev/fuse cannot be opened: ")


# -- overlayfs ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def overlay(base: Path, layers: int) -> Iterator[Path]:
    """A directory on an overlay, on an overlay if `layers` is 2, on a tmpfs (which can be an upper layer anywhere)."""
    base.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", base], check=True, timeout=10)
    mounted = [base]
    try:
        lower = base / "lower"
        lower.mkdir()
        for layer in range(layers):
            upper, work, merged = (base / f"{kind}{layer}" for kind in ("upper", "work", "merged"))
            for path in (upper, work, merged):
                path.mkdir()
            options = f"lowerdir={lower},upperdir={upper},workdir={work}"
            done = subprocess.run(
                ["mount", "-t", "overlay", "-o", options, "overlay", merged],
                capture_output=True,
                timeout=10,
                check=False,
            )
            if done.returncode:
                pytest.skip(f"no overlayfs here: {done.stderr.decode().strip()}")
            mounted.append(merged)
            lower = merged
        yield lower
    finally:
        for path in reversed(mounted):
            subprocess.run(["umount", "-l", path], check=True, timeout=10)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("passthrough", PASSTHROUGH)
def test_data_on_an_overlay(cluster: Cluster, passthrough: str, layers: int) -> None:
    """As a container's own file system. One overlay passes through; two are stacked too deep for the kernel, and the
    node caches by itself."""
    with overlay(cluster.base / "disk", layers) as directory:
        primary = cluster.node("primary")
        replica = cluster.node("replica", primary=primary)
        for node in (primary, replica):
            node.config["data"]["dir"] = str(directory / node.name)
            node.config["lease"]["recovery-wait"] = "0s"
        try:
            primary.start()
            replica.start()
            for mode in ("wal", "delete"):
                with contextlib.closing(primary.connect(f"{mode}.db")) as connection:
                    create(connection, mode)
                    insert(connection, 60)
                    check(primary, replica, 60, f"{mode}.db")
            for node in (primary, replica):
                before = len(node.log_text())
                node.kill()
                node.start()
                if passthrough == "auto":
                    wanted = f"passthrough={layers == 1 and kernel_passes_through()}"
                    wait_until(lambda: wanted in node.log_text()[before:], wanted)  # noqa: B023
                    assert node.log_text()[before:].count("passthrough is off") == (layers == 2)
            with contextlib.closing(primary.connect("wal.db")) as connection:
                insert(connection, 5)
            check(primary, replica, 65, "wal.db")
        finally:
            for node in (replica, primary):
                node.remove()


def kernel_passes_through() -> bool:
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int(minor)) >= (6, 9)


# -- file descriptors -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def few_descriptors(node: Node, spare: int) -> Iterator[None]:
    """The node has `spare` descriptors more than it uses now."""
    assert node.process is not None
    pid = node.process.pid
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")) + spare, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(("passthrough", "mode"), [("auto", "wal"), ("off", "wal"), ("auto", "delete")])
def test_the_primary_has_no_descriptors_left(cluster: Cluster, passthrough: str, mode: str) -> None:
    """Files that cannot be opened are an error for their application only: what is open goes on, and is replicated.
    When descriptors are free again, so is the rest."""
    primary, replica = cluster.pair()
    with contextlib.ExitStack() as stack:
        connections: list[sqlite3.Connection] = []
        done: list[int] = []
        problems = set()
        with few_descriptors(primary, 70):
            for number in range(80):
                done.append(0)
                try:
                    connection = stack.enter_context(contextlib.closing(primary.connect(f"{number}.db")))
                    connections.append(connection)
                    create(connection, mode)
                    for _ in range(3):
                        insert(connection, 1)
                        done[number] += 1
                except sqlite3.OperationalError as error:
                    problems.add(error.sqlite_errorname)
                if number - sum(map(bool, done)) > 5:
                    break
            assert problems == {"SQLITE_CANTOPEN"}
            assert primary.log_text().count("Too many open files") == 1, primary.log_text()
            started_s, used_s = time.monotonic(), cpu_s(primary)
            wait_until(lambda: time.monotonic() > started_s + 0.5, "half a second")
            assert cpu_s(primary) - used_s < 0.4, "it is busy with having no descriptors"
            for number, rows in enumerate(done):
                if rows and mode == "wal":  # another mode opens its journal, and natively too that cannot be done
                    insert(connections[number], 1)
                    done[number] += 1
                if rows:
                    check_by_http(primary, replica, f"{number}.db")
        for number, rows in enumerate(done):
            with contextlib.closing(primary.connect(f"{number}.db")) as connection:
                create(connection, mode)
                insert(connection, 1)
                check(primary, replica, rows + 1, f"{number}.db")
    assert primary.healthy() and "Traceback" not in primary.log_text()


def check_by_http(primary: Node, replica: Node, name: str) -> None:
    """As `check`, without opening a file of the primary's mount."""
    wait_until(lambda: primary.info()["databases"][name] == replica.info()["databases"].get(name), f"{name} is there")
    assert_same_bytes([primary, replica], name)


@pytest.mark.parametrize(("passthrough", "mode", "spare"), [("auto", "wal", 2), ("off", "delete", 12)])
def test_the_replica_has_no_descriptors_left(cluster: Cluster, passthrough: str, mode: str, spare: int) -> None:
    """The primary does not notice; the replica says so, and catches up when it has some again."""
    primary, replica = cluster.pair()
    with few_descriptors(replica, spare):
        for number in range(12):
            with contextlib.closing(primary.connect(f"{number}.db")) as connection:
                create(connection, mode)
                insert(connection, 5)
        wait_until(lambda: "Too many open files" in replica.log_text(), "it says why")
    for number in range(12):
        check(primary, replica, 5, f"{number}.db")
    assert replica.healthy() and "Traceback" not in replica.log_text()


def cpu_s(node: Node) -> float:
    assert node.process is not None
    fields = Path(f"/proc/{node.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# -- no room --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(path: Path, size: str = "6M") -> Iterator[None]:
    path.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], check=True, timeout=10)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True, timeout=10)


def fill_up(path: Path) -> Path:
    """No block is left."""
    ballast = path / "ballast"
    with open(ballast, "ab", buffering=0) as file:
        for size in (1 << 16, 4096):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    return ballast


def errors_of_inserts(connection: sqlite3.Connection) -> tuple[int, str]:
    """How many inserts were acknowledged before one failed, and how."""
    for done in range(200):
        try:
            insert(connection, 1, 3000)
        except sqlite3.OperationalError as error:
            if connection.in_transaction:
                connection.execute("rollback")
            return done, error.sqlite_errorname
    raise AssertionError("the disk was never full")


@pytest.mark.parametrize("mode", ["wal", "delete", "truncate", "persist", "memory"])
def test_the_disk_is_full(cluster: Cluster, mode: str, tmp_path: Path) -> None:
    """An application gets what it gets on any full disk; also after the node was killed and started there."""
    native_dir = tmp_path / "native"
    primary = cluster.node("primary")
    primary.config["lease"]["recovery-wait"] = "0s"
    with small_disk(native_dir), small_disk(primary.data):
        with contextlib.closing(sqlite3.connect(native_dir / NAME, isolation_level=None)) as native:
            create(native, mode)
            insert(native, 5)
            fill_up(native_dir)
            _, expected = errors_of_inserts(native)
        assert expected == "SQLITE_FULL"
        try:
            primary.start()
            replica = cluster.node("replica", primary=primary).start()
            with contextlib.closing(primary.connect(NAME)) as connection:
                create(connection, mode)
                insert(connection, 5)
                wait_same_position(primary, replica, NAME)
                ballast = fill_up(primary.data)
                done, error = errors_of_inserts(connection)
                assert error == expected
                assert connection.execute("select count(*) from t").fetchone() == (5 + done,)
                assert primary.healthy()
            primary.kill()
            primary.start()
            assert count(primary) == 5 + done
            ballast.unlink()
            with contextlib.closing(primary.connect(NAME)) as connection:
                insert(connection, 3)
            check(primary, replica, 8 + done)
            assert "Traceback" not in primary.log_text()
            primary.stop()
        finally:
            primary.remove()


@pytest.mark.parametrize("passthrough", PASSTHROUGH)
def test_no_room_to_import(cluster: Cluster, passthrough: str, tmp_path: Path) -> None:
    """There is room for a database that is copied in, but not for the log: the copy fails, what was copied can still be
    seen, and becomes a database with its next commit."""
    source = tmp_path / "source.db"
    with contextlib.closing(sqlite3.connect(source, isolation_level=None)) as connection:
        create(connection, "delete")
        insert(connection, 25, 100_000)
    primary = cluster.node("primary")
    with small_disk(primary.data, "10M"):
        try:
            primary.start()
            replica = cluster.node("replica", primary=primary).start()
            ballast = primary.data / "ballast"
            ballast.write_bytes(bytes(6_200_000))
            done = subprocess.run(["cp", source, primary.mount / NAME], capture_output=True, timeout=30, check=False)
            assert b"No space left on device" in done.stderr
            assert (primary.mount / NAME).read_bytes() == source.read_bytes()
            assert primary.databases() == [] and primary.healthy()
            ballast.unlink()
            with contextlib.closing(primary.connect(NAME)) as connection:
                insert(connection, 1)
            check(primary, replica, 26)
            assert primary.databases() == [NAME]
        finally:
            primary.remove()


# -- rsync ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync is missing: install the package rsync")
@pytest.mark.parametrize("passthrough", PASSTHROUGH)
@pytest.mark.parametrize("how", [[], ["--inplace"], ["--inplace", "--no-whole-file"]], ids=" ".join)
def test_rsync(cluster: Cluster, passthrough: str, how: list[str], tmp_path: Path) -> None:
    """A new database, then over it: with other rows, with fewer pages, and with nothing changed."""
    primary, replica = cluster.pair()
    source = tmp_path / NAME
    for step, rows in enumerate((200, 260, 20, 20)):
        if step < 3:
            source.unlink(missing_ok=True)
            with contextlib.closing(sqlite3.connect(source, isolation_level=None)) as connection:
                create(connection, "delete")
                insert(connection, rows)
            os.utime(source, (1_700_000_000 + step, 1_700_000_000 + step))
        done = subprocess.run(
            ["rsync", "-a", *how, source, f"{primary.mount}/"], capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 0, done.stderr
        check(primary, replica, rows)
        assert primary.export(NAME) == source.read_bytes()
    assert primary.databases() == replica.databases() == [NAME]
    assert [name for name in primary.names() if name.startswith(f".{NAME}.")] == []
    with contextlib.closing(primary.connect(NAME)) as connection:
        create(connection, "wal")
        insert(connection, 7)
    check(primary, replica, 27)


# -- installing -----------------------------------------------------------------------------------------------------


def test_pip_install(tmp_path: Path) -> None:
    """`pip install .` into a fresh environment; the libraries are those of this one."""
    source, place = tmp_path / "source", tmp_path / "venv"
    source.mkdir()
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True, timeout=60)
    pip = [sys.executable, "-m", "pip", "--python", place / "bin/python", "--disable-pip-version-check", "install"]
    done = subprocess.run([*pip, "--no-deps", source], capture_output=True, text=True, timeout=100, check=False)
    if done.returncode and any(words in done.stderr for words in ("No matching distribution", "No module named pip")):
        pytest.skip(f"pip cannot build here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    (site,) = place.glob("lib/python*/site-packages")
    assert (site / "pylitefs" / "mount_guard.py").exists() and (site / "pylitefs" / "py.typed").exists()
    libraries = {
        str(Path(module.__file__ or "").parents[1]) for module in map(__import__, ("aiohttp", "click", "numpy"))
    }
    (site / "libraries.pth").write_text("\n".join(libraries))

    def run(*words: str, cwd: Path = tmp_path) -> tuple[int, str, str]:
        command = [str(place / "bin/litefs"), *words]
        environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        made = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, cwd=cwd, env=environ)
        return made.returncode, made.stdout, made.stderr

    status, said, errors = run("version")
    assert (status, errors) == (0, "") and said.startswith("pylitefs v")
    status, said, errors = run("--help")
    assert status == 2 and errors == "" and "replicate" in said
    mistakes = [
        ("bogus",), ("mount", "-config", "nowhere.yml"), ("mount", "-config", "."), ("mount", "-bogus"), ("mount", "x"),
        ("status", "-url", "http://127.0.0.1:1"), ("status", "-url", "ftp://x"), ("export", "-name", NAME),
        ("import", "-name", NAME, "nowhere.db"), ("ltx", "dump", "nowhere"), ("run",), ("run", "--", "./nowhere"),
    ]  # fmt: skip
    for words in mistakes:
        status, said, errors = run(*words)
        assert status in (1, 2) and errors.startswith("ERROR: ") and len(errors.splitlines()) == 1, (words, errors)
