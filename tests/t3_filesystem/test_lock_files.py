"""NAME-lock: opened for writing it is held by the engine until its last descriptor is gone."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
from fake_kernel import Kernel

from pylitefs.filesystem.openers import is_open_anywhere, is_proc_filtered
from pylitefs.formats.fuse import abi


@pytest.fixture
def lock(kernel: Kernel) -> int:
    node, fh, *_ = kernel.create("held.db", mode=0o640)
    kernel.release(node, fh)
    return kernel.look_up("held.db-lock")


def test_it_is_empty_and_for_those_who_may_write_the_database(kernel: Kernel, lock: int) -> None:
    found = kernel.attr(lock)
    assert found["size"] == 0 and stat.S_IMODE(found["mode"]) == 0o640
    assert "held.db-lock" not in kernel.names()
    kernel.open(lock, os.O_RDONLY)
    assert kernel.calls("open_lock") == []


def test_an_open_is_answered_when_the_engine_has_the_lock(kernel: Kernel) -> None:
    kernel.create("b.db")
    lock = kernel.look_up("b.db-lock")
    opened = kernel.open(lock, os.O_RDWR)
    assert kernel.calls("open_lock") and not opened[1] & abi.FOPEN_NOFLUSH
    kernel.ask(abi.FLUSH, abi.FLUSH_IN.pack(opened[0], 0, 0, 0), lock)
    assert kernel.calls("lock_flush") == [("b.db-lock", True)]
    assert kernel.calls("lock_release") == []
    kernel.release(lock, opened[0])
    assert kernel.calls("lock_release") == [("b.db-lock",)]


def test_whether_a_close_is_the_last_where_nobody_can_see_it(kernel: Kernel) -> None:
    """An opener in another PID namespace (its id is 0) may have handed it on to others."""
    kernel.create("b.db")
    lock = kernel.look_up("b.db-lock")
    unseen, seen = kernel.open(lock, os.O_RDWR, pid=0)[0], kernel.open(lock, os.O_RDWR)[0]
    for fh in (unseen, seen):
        kernel.ask(abi.FLUSH, abi.FLUSH_IN.pack(fh, 0, 0, 0), lock)
    kernel.release(lock, unseen)
    kernel.ask(abi.FLUSH, abi.FLUSH_IN.pack(seen, 0, 0, 0), lock)
    assert kernel.calls("lock_flush") == [("b.db-lock", False)] * 2 + [("b.db-lock", True)]


def test_whether_all_processes_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mountinfo"
    root = "22 1 8:1 / / rw - ext4 /dev/sda rw"
    for options, uid, filtered in [
        ("rw", 1000, False), ("rw,hidepid=invisible", 1000, True), ("rw,hidepid=4", 1000, True),
        ("rw,hidepid=1", 1000, False), ("rw,hidepid=2", 0, False),
    ]:  # fmt: skip
        mounts.write_text(f"{root}\n23 22 0:5 / /proc rw,nosuid shared:5 - proc proc {options}\n")
        monkeypatch.setattr(os, "geteuid", lambda uid=uid: uid)
        assert is_proc_filtered(str(mounts)) == filtered, options


def test_a_refusal_is_the_answer(kernel: Kernel) -> None:
    kernel.create("b.db")
    kernel.hooks.errors["open_lock_answer"] = OSError(errno.ETIMEDOUT, "late")
    lock = kernel.look_up("b.db-lock")
    unique = kernel.send(abi.OPEN, abi.OPEN_IN.pack(os.O_RDWR, 0), lock)
    assert kernel.channel.errors[unique] == errno.ETIMEDOUT


def test_who_waits_can_be_interrupted(kernel: Kernel, lock: int) -> None:
    unique = kernel.send(abi.OPEN, abi.OPEN_IN.pack(os.O_RDWR, 0), lock)
    assert unique not in kernel.channel.errors
    kernel.send(abi.INTERRUPT, abi.INTERRUPT_IN.pack(unique + 1000), 0)
    assert unique not in kernel.channel.errors
    kernel.send(abi.INTERRUPT, abi.INTERRUPT_IN.pack(unique), 0)
    assert kernel.channel.errors[unique] == errno.EINTR


def test_an_interrupt_may_overtake_its_request(kernel: Kernel, lock: int) -> None:
    unique = kernel.send(abi.INTERRUPT, abi.INTERRUPT_IN.pack(kernel.send(abi.STATFS) + 4), 0) + 2
    assert kernel.send(abi.OPEN, abi.OPEN_IN.pack(os.O_RDWR, 0), lock) == unique
    assert kernel.channel.errors[unique] == errno.EINTR
    assert kernel.calls("open_lock") == []


def test_truncating_it_changes_nothing(kernel: Kernel, lock: int) -> None:
    kernel.setattr(lock, abi.FATTR_SIZE)
    assert kernel.attr(lock)["size"] == 0


def test_who_has_a_file_open(tmp_path: object) -> None:
    path = os.path.join(str(tmp_path), "some.db-lock")
    with open(path, "w") as file:
        assert is_open_anywhere("some.db-lock", 1)
        assert not is_open_anywhere("other.db-lock", os.fstat(file.fileno()).st_ino)
    assert not is_open_anywhere("some.db-lock", 1)
