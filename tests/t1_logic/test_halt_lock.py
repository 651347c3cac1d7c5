"""`pylitefs.halt` and `litefs run -with-halt-lock-on`: real processes, real locks, on plain files.

What the mount does when the lock file is opened is tested where there is a mount.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import pylitefs
from pylitefs import HaltFailed, halt_lock

F_OFD_GETLK = 36
DEADLINE_S = 30.0


@pytest.fixture
def database(tmp_path: Path) -> Path:
    for name in ("app.db", "app.db-lock"):
        (tmp_path / name).touch()
    return tmp_path / "app.db"


def locked_bytes(database: Path) -> tuple[int, int] | None:
    """Start and length of what somebody holds a write lock on, None if nobody does."""
    fields = struct.Struct("hhqqi4x")
    with open(f"{database}-lock", "rb+") as file:
        found = fcntl.fcntl(file, F_OFD_GETLK, fields.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    kind, _, start, length, _ = fields.unpack(found)
    return None if kind == fcntl.F_UNLCK else (start, length)


def wait_until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.005)


def litefs(*args: object) -> list[str]:
    return [sys.executable, "-m", "pylitefs", "run", *map(str, args)]


def run(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(litefs(*args), capture_output=True, text=True, timeout=60)


# --- pylitefs.halt ---------------------------------------------------------------------------------------------------


def test_the_lock_is_litefs_own_and_ends_with_the_block(database: Path) -> None:
    with pylitefs.halt(database) as fd:
        assert locked_bytes(database) == (72, 1)
        assert not os.get_inheritable(fd)  # a program that the block starts must not keep the lock
    assert locked_bytes(database) is None
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)
    with pytest.raises(ZeroDivisionError), pylitefs.halt(str(database)):
        raise ZeroDivisionError
    assert locked_bytes(database) is None


def test_threads_exclude_each_other(database: Path) -> None:
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(20):
            with pylitefs.halt(database, timeout_s=DEADLINE_S):
                inside += 1
                most = max(most, inside)
                time.sleep(0.0005)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_the_deadline(database: Path) -> None:
    with pylitefs.halt(database):
        with pytest.raises(HaltFailed) as caught, pylitefs.halt(database, timeout_s=0.05):
            pass
        assert caught.value.errno == errno.ETIMEDOUT
        expected = (
            f"cannot take the HALT lock of {database}: another process of this machine has not released it within"
        )
        assert str(caught.value).startswith(expected)
    with pylitefs.halt(database, timeout_s=0.05):
        pass


def test_without_a_deadline_it_waits(database: Path) -> None:
    got = threading.Event()

    def wait() -> None:
        with pylitefs.halt(database, timeout_s=None):
            got.set()

    waiter = threading.Thread(target=wait)
    with pylitefs.halt(database):
        waiter.start()
        assert not got.wait(0.1)
    assert got.wait(DEADLINE_S)
    waiter.join()


def test_an_open_that_hangs_is_left_and_closed_when_it_ends(tmp_path: Path) -> None:
    """As the mount's may, while the primary does not answer. Opening a FIFO to write hangs until somebody reads."""
    fifo = tmp_path / "app.db-lock"
    os.mkfifo(fifo)
    real_open, opened = os.open, threading.Event()
    fds: list[int] = []

    def hanging_open(path: str, flags: int) -> int:
        try:
            fds.append(real_open(path, os.O_WRONLY | os.O_CLOEXEC))
            return fds[0]
        finally:
            opened.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halt_lock.os, "open", hanging_open)
        with pytest.raises(HaltFailed, match=r"the primary has not given it within 0\.05 s") as caught:
            halt_lock.take(str(tmp_path / "app.db"), 0.05)
    assert caught.value.errno == errno.ETIMEDOUT
    with open(fifo, "rb") as reader:  # lets the open end
        assert opened.wait(DEADLINE_S)
        assert reader.read() == b""  # ends when the last writer has closed


@pytest.mark.parametrize(
    ("number", "part"),
    [
        (errno.ENOENT, "there is no such database"),
        (errno.EROFS, "see litefs status"),
        (errno.EAGAIN, "another node has it, or there is no primary: try again"),
        (errno.ETIMEDOUT, "the primary did not answer in time"),
        (errno.EACCES, "no permission to write"),
        (errno.ENOTCONN, "the mount is dead"),
        (errno.EMFILE, "too many open files"),
    ],
)
@pytest.mark.parametrize("timeout_s", [None, 5.0])
def test_what_the_mount_says_is_explained(
    monkeypatch: pytest.MonkeyPatch, number: int, part: str, timeout_s: float | None
) -> None:
    def refuse(path: str, flags: int) -> int:
        raise OSError(number, os.strerror(number), path)

    with monkeypatch.context() as patch:
        patch.setattr(halt_lock.os, "open", refuse)
        with pytest.raises(HaltFailed) as caught:
            halt_lock.take("/litefs/app.db", timeout_s)
    assert caught.value.errno == number
    assert str(caught.value).startswith("cannot take the HALT lock of /litefs/app.db: ")
    assert part in str(caught.value)


def test_importing_it_costs_little() -> None:
    code = (
        "import sys, pylitefs\n"
        "assert 'pylitefs.halt_lock' not in sys.modules\n"
        "pylitefs.halt\n"
        "print(*sorted(name for name in sys.modules if name.startswith('pylitefs.')))\n"
        "print(*{'asyncio', 'numpy', 'click', 'aiohttp'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["pylitefs.errors pylitefs.halt_lock", ""]
    with pytest.raises(AttributeError, match="has no attribute 'halted'"):
        pylitefs.halted  # noqa: B018


# --- litefs run ------------------------------------------------------------------------------------------------------

SHOW = "import os, sys; sys.exit(0 if os.readlink('/proc/self/fd/3') == sys.argv[1] + '-lock' else 5)"


def test_the_child_has_the_lock_file_as_descriptor_3(database: Path) -> None:
    done = run("-with-halt-lock-on", database, "--", sys.executable, "-c", SHOW, database)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert locked_bytes(database) is None
    plain = run("--", sys.executable, "-c", SHOW, database)
    assert plain.returncode == 1


def test_it_is_held_while_the_child_runs_and_others_wait(database: Path) -> None:
    order = database.parent / "order"
    hold = f"echo first >> {order}; read line; echo first-end >> {order}"
    with subprocess.Popen(litefs("-with-halt-lock-on", database, "--", "sh", "-c", hold), stdin=subprocess.PIPE) as one:
        try:
            wait_until(lambda: order.exists() and order.read_text() != "")
            assert locked_bytes(database) == (72, 1)
            with pytest.raises(HaltFailed), pylitefs.halt(database, timeout_s=0.05):
                pass
            second = ("sh", "-c", f"echo second >> {order}")
            with subprocess.Popen(
                litefs("-v", "-with-halt-lock-on", database, "--", *second), stderr=subprocess.PIPE
            ) as two:
                assert two.stderr is not None
                assert two.stderr.readline().startswith(b"waiting for the HALT lock of ")
                assert one.stdin is not None
                one.stdin.write(b"\n")
                one.stdin.close()
                assert (one.wait(DEADLINE_S), two.wait(DEADLINE_S)) == (0, 0)
        finally:
            one.kill()
    assert order.read_text().split() == ["first", "first-end", "second"]
    assert locked_bytes(database) is None


def test_a_child_that_fails_releases_it(database: Path) -> None:
    done = run("-with-halt-lock-on", database, "--", "sh", "-c", "exit 7")
    assert (done.returncode, done.stderr) == (1, "ERROR: sh exited with status 7\n")
    assert locked_bytes(database) is None
    missing = run("-with-halt-lock-on", database, "--", "/no/such/program")
    assert (missing.returncode, missing.stderr) == (
        1,
        "ERROR: cannot run /no/such/program: no such file or directory\n",
    )
    assert locked_bytes(database) is None


def test_the_child_keeps_it_when_litefs_run_is_killed(database: Path) -> None:
    """Otherwise another node would write while it still does."""
    pid_file = database.parent / "pid"
    script = f"echo $$ > {pid_file}.new; mv {pid_file}.new {pid_file}; exec sleep 60"
    child = 0
    with subprocess.Popen(litefs("-with-halt-lock-on", database, "--", "sh", "-c", script)) as process:
        try:
            wait_until(pid_file.exists)
            child = int(pid_file.read_text())
            process.kill()
            process.wait(DEADLINE_S)
            assert locked_bytes(database) == (72, 1)
        finally:
            process.kill()
            if child:
                os.kill(child, signal.SIGKILL)
    wait_until(lambda: locked_bytes(database) is None)


def test_sigterm_goes_to_the_child_and_the_lock_is_released_after_it(database: Path) -> None:
    ready = database.parent / "ready"
    script = f"trap 'exit 3' TERM; touch {ready}; while :; do sleep 0.05; done"
    with subprocess.Popen(
        litefs("-with-halt-lock-on", database, "--", "sh", "-c", script), stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            wait_until(ready.exists)
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=DEADLINE_S)
        finally:
            process.kill()
    assert (process.returncode, err) == (1, "ERROR: sh exited with status 3\n")
    assert locked_bytes(database) is None


def test_mistakes(database: Path) -> None:
    both = run("-promote", "-with-halt-lock-on", database, "--", "true")
    assert both.returncode == 2
    assert both.stderr == "ERROR: -promote and -with-halt-lock-on are two ways to write: use one of them\n"
    missing = database.parent / "no.db"
    gone = run("-with-halt-lock-on", missing, "--", "true")
    assert (gone.returncode, gone.stderr) == (1, f"ERROR: no such database: {missing}: give its path in the mount\n")
    missing.touch()
    not_in_a_mount = run("-with-halt-lock-on", missing, "--", "true")
    assert not_in_a_mount.returncode == 1
    assert not_in_a_mount.stderr.startswith(f"ERROR: cannot take the HALT lock of {missing}: there is no such database")
