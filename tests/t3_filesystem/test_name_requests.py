"""Names, attributes and virtual files: requests as the kernel sends them, without a mount."""

from __future__ import annotations

import errno
import os
import stat
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_kernel import ROOT, Kernel, raises

from pylitefs.errors import ReadOnlyReplica
from pylitefs.formats.fuse import abi
from pylitefs.ports import Then

# -- names


def test_a_name_that_does_not_exist_is_remembered(kernel: Kernel) -> None:
    body = kernel.ask(abi.LOOKUP, b"a.db-journal\0")
    assert struct.unpack_from("=QQQ", body) == (0, 0, 3600)


def test_virtual_names_are_never_remembered(kernel: Kernel) -> None:
    for name in (".primary", "a.db-pos"):
        with raises(errno.ENOENT):
            kernel.look_up(name)
    kernel.create("a.db")
    body = kernel.ask(abi.LOOKUP, b"a.db-pos\0")
    assert struct.unpack_from("=QQ", body, 16) == (0, 0)


def test_long_names(kernel: Kernel) -> None:
    kernel.create("n" * 255)
    with raises(errno.ENAMETOOLONG):
        kernel.create("n" * 256)
    with raises(errno.ENAMETOOLONG):
        kernel.look_up("é" * 128)


def test_names_that_are_not_utf8(kernel: Kernel) -> None:
    name = os.fsdecode(b"caf\xe9")
    node, *_ = kernel.create(name)
    assert kernel.look_up(name) == node
    assert name in kernel.names()


def test_create_makes_the_file_as_the_caller_asked(kernel: Kernel) -> None:
    old = os.umask(0o077)
    try:
        node, *_ = kernel.create("f", mode=0o664)
    finally:
        os.umask(old)
    found = kernel.attr(node)
    assert (stat.S_IMODE(found["mode"]), found["uid"], found["nlink"]) == (0o664, os.getuid(), 1)


def test_create_of_what_the_engine_has_made_meanwhile_opens_it(kernel: Kernel) -> None:
    Path(kernel.hooks.directory, "f").write_bytes(b"content")
    with raises(errno.EEXIST):
        kernel.create("f", os.O_RDWR | os.O_EXCL)
    node, fh, _, _ = kernel.create("f")
    assert kernel.read(node, fh) == b"content"
    assert kernel.calls("may_create") == [] and kernel.calls("may_open") == [("f",)]
    node, fh, _, _ = kernel.create("f", os.O_RDWR | os.O_TRUNC)
    assert kernel.read(node, fh) == b"" and kernel.calls("after_truncate") == [("f", 0)]


def test_a_continuation_answers_its_own_request_long_after(kernel: Kernel) -> None:
    Path(kernel.hooks.directory, "f").write_bytes(b"content")
    held: list[Then] = []
    kernel.hooks.may_open = lambda ref, flags, by_daemon, then: held.append(then)  # type: ignore[method-assign]
    body = abi.CREATE_IN.pack(os.O_RDWR | os.O_TRUNC, 0o644, 0, 0) + b"f\0"
    unique = kernel.send(abi.CREATE, body)
    kernel.ask(abi.STATFS)
    held[0](None)
    (fh, _, _) = abi.OPEN_OUT.unpack_from(kernel.channel.bodies[unique], abi.ENTRY_OUT.size)
    assert kernel.read(kernel.look_up("f"), fh) == b""


def test_mknod(kernel: Kernel) -> None:
    body = abi.MKNOD_IN.pack(stat.S_IFREG | 0o600, 0, 0, 0) + b"f\0"
    node = struct.unpack_from("=Q", kernel.ask(abi.MKNOD, body))[0]
    assert kernel.attr(node)["size"] == 0 and kernel.calls("may_create") == [("f",)]
    with raises(errno.EEXIST):
        kernel.ask(abi.MKNOD, body)
    with raises(errno.EPERM):
        kernel.ask(abi.MKNOD, abi.MKNOD_IN.pack(stat.S_IFIFO | 0o600, 0, 0, 0) + b"fifo\0")


def test_an_unlinked_file_works_on_while_it_is_open(kernel: Kernel) -> None:
    node, fh, _, _ = kernel.create("f")
    kernel.write(node, fh, b"still here")
    kernel.unlink("f")
    assert kernel.read(node, fh) == b"still here"
    assert kernel.attr(node)["nlink"] == 0
    kernel.setattr(node, abi.FATTR_SIZE, size=5)
    assert kernel.attr(node)["size"] == 5
    again, _, _ = kernel.open(node)
    assert kernel.read(node, again) == b"still"
    kernel.release(node, again)
    other, *_ = kernel.create("f")
    assert other != node and kernel.attr(other)["size"] == 0
    kernel.release(node, fh)
    with raises(errno.ESTALE):
        kernel.open(node)


def test_rename_keeps_nodes_and_replaced_files_keep_their_handles(kernel: Kernel) -> None:
    first, first_fh, _, _ = kernel.create("a")
    second, second_fh, _, _ = kernel.create("b")
    kernel.write(first, first_fh, b"first")
    kernel.write(second, second_fh, b"second")
    kernel.rename("a", "b")
    assert kernel.look_up("b") == first
    assert kernel.look_up("a") == 0
    assert kernel.read(second, second_fh) == b"second" and kernel.attr(second)["nlink"] == 0
    kernel.release(first, first_fh)
    assert kernel.attr(first)["size"] == 5
    assert kernel.open(first)
    kernel.send(abi.FORGET, abi.FORGET_IN.pack(2), first)
    assert kernel.look_up("b") not in (first, second)


def test_rename_flags(kernel: Kernel) -> None:
    kernel.create("a")
    kernel.create("b")
    with raises(errno.EEXIST):
        kernel.rename("a", "b", abi.RENAME_NOREPLACE)
    with raises(errno.EINVAL):
        kernel.rename("a", "b", 2)
    kernel.rename("a", "c", abi.RENAME_NOREPLACE)
    assert sorted(kernel.names()) == [".", "..", ".lag", "b", "c"]


def test_rename_by_the_engine_is_not_done_again(kernel: Kernel) -> None:
    node, *_ = kernel.create("a.db")

    def rename(old: object, new: object, then: Callable[[None], None]) -> None:
        paths = [os.path.join(kernel.hooks.directory, name) for name in ("a.db", "b.db")]
        kernel.dispatcher.notifier.move("a.db", "b.db", lambda: os.rename(*paths))
        then(None)

    kernel.hooks.before_rename = rename  # type: ignore[method-assign, assignment]
    kernel.hooks.renamed_by_engine = lambda old, new: True  # type: ignore[method-assign]
    kernel.rename("a.db", "b.db")
    assert kernel.look_up("b.db") == node


def test_a_file_that_moves_anew_is_not_opened_by_its_old_name(kernel: Kernel) -> None:
    """Until RENAME is answered the kernel has the old name's entry, which leads to the old node."""
    node, fh, _, _ = kernel.create("a.db")
    notifier, paths = kernel.dispatcher.notifier, [os.path.join(kernel.hooks.directory, name) for name in ("a.db", "b")]
    assert notifier.is_open("a.db") and not notifier.is_open("b")
    kernel.release(node, fh)
    assert not notifier.is_open("a.db")
    by_daemon, _, _ = kernel.open(node, pid=os.getpid())
    assert not notifier.is_open("a.db")
    notifier.move("a.db", "b", lambda: os.rename(*paths), anew=True)
    with raises(errno.ESTALE):
        kernel.open(node)
    assert kernel.look_up("a.db") == 0
    moved = kernel.look_up("b")
    assert moved not in (0, node)
    kernel.open(moved)
    assert notifier.is_open("b") and not notifier.is_open("a.db")
    kernel.release(node, by_daemon)


def test_a_moved_backing_file_keeps_its_node(kernel: Kernel, tmp_path: Path) -> None:
    node, fh, _, _ = kernel.create("plain")
    kernel.write(node, fh, b"data")
    target = str(tmp_path / "elsewhere")
    os.rename(os.path.join(kernel.hooks.directory, "plain"), target)
    kernel.hooks.moved["plain"] = target
    kernel.dispatcher.notifier.changed("plain")
    kernel.release(node, fh)
    assert kernel.attr(node)["size"] == 4
    again, _, _ = kernel.open(node)
    assert kernel.read(node, again) == b"data"
    assert kernel.look_up("plain") == node


def test_a_file_that_moves_before_it_is_told_is_found(kernel: Kernel, tmp_path: Path) -> None:
    node, fh, _, _ = kernel.create("plain")
    kernel.release(node, fh)
    target = str(tmp_path / "elsewhere")
    os.rename(os.path.join(kernel.hooks.directory, "plain"), target)
    kernel.hooks.moved["plain"] = target
    assert kernel.attr(node)["size"] == 0
    assert kernel.open(node)


def test_a_name_that_leads_to_another_file_has_another_node(kernel: Kernel) -> None:
    """Whether it was told or not: POSIX locks are by node, and a file whose locks are taken elsewhere is not safe."""
    path = Path(kernel.hooks.directory, "a.db")
    old, fh, _, _ = kernel.create("a.db")
    kernel.write(old, fh, b"old")
    idle = kernel.look_up("a.db")
    path.with_name("new").write_bytes(b"new!")
    path.with_name("new").rename(path)
    new = kernel.look_up("a.db")
    assert new != old == idle
    again, _, _ = kernel.open(new)
    assert kernel.read(old, fh) == b"old" and kernel.read(new, again) == b"new!"
    kernel.dispatcher.notifier.changed("a.db")  # too late, and again
    kernel.dispatcher.notifier.changed("a.db")
    assert kernel.look_up("a.db") == new and kernel.attr(new)["nlink"] == 1 and kernel.attr(old)["nlink"] == 0


def test_a_node_never_opens_another_file_of_its_name(kernel: Kernel) -> None:
    path = Path(kernel.hooks.directory, "a.db")
    node, fh, _, _ = kernel.create("a.db")
    kernel.release(node, fh)
    path.with_name("new").write_bytes(b"new!")
    path.with_name("new").rename(path)
    for ask in (lambda: kernel.open(node), lambda: kernel.attr(node), lambda: kernel.setattr(node, abi.FATTR_SIZE)):
        with raises(errno.ESTALE):
            ask()
    assert path.read_bytes() == b"new!"
    path.unlink()
    with raises(errno.ESTALE):  # the kernel looks the name up again, and finds what there is
        kernel.open(node)


def test_nobody_opens_a_file_while_names_are_moved(kernel: Kernel) -> None:
    """Else a process could read the old database without its WAL, or put the old WAL into the new database."""
    directory = Path(kernel.hooks.directory)
    old = kernel.look_up("a.db") or kernel.create("a.db")[0]
    new, fh, _, _ = kernel.create("b.db")
    kernel.release(new, fh)
    began, go_on = threading.Event(), threading.Event()

    def exchange() -> None:
        began.set()
        assert go_on.wait(10)
        (directory / "b.db").rename(directory / "a.db")

    moving = threading.Thread(target=kernel.dispatcher.notifier.move, args=("b.db", "a.db", exchange))
    moving.start()
    assert began.wait(10)
    found: list[int] = []
    asking = threading.Thread(target=lambda: found.append(kernel.look_up("a.db")))
    asking.start()
    time.sleep(0.05)
    assert found == []
    go_on.set()
    moving.join()
    asking.join()
    assert found == [new] != [old]


def test_nodes_live_as_long_as_the_kernel_knows_them(kernel: Kernel) -> None:
    node, fh, _, _ = kernel.create("f")
    kernel.release(node, fh)
    assert kernel.look_up("f") == node
    kernel.send(abi.FORGET, abi.FORGET_IN.pack(1), node)
    assert kernel.attr(node)["ino"] == node
    kernel.send(abi.BATCH_FORGET, abi.BATCH_FORGET_IN.pack(1, 0) + abi.FORGET_ONE.pack(node, 1))
    with raises(errno.ESTALE):
        kernel.attr(node)
    assert kernel.look_up("f") not in (0, node)


def test_dropping_a_database_takes_its_side_files_along(kernel: Kernel) -> None:
    nodes = {name: kernel.create(name)[0] for name in ("a.db", "a.db-wal", "a.db-shm")}
    kernel.unlink("a.db")
    assert kernel.look_up("a.db-wal") == 0
    assert all(kernel.attr(node)["nlink"] == 0 for node in nodes.values())
    assert kernel.names() == [".", "..", ".lag"]


def test_a_listing_in_small_pieces_has_every_name_once(kernel: Kernel) -> None:
    expected = {f"name-{index:03}" for index in range(100)}
    for name in expected:
        Path(kernel.hooks.directory, name).touch()
    found = kernel.names(size=200)
    assert len(found) == len(set(found)) == 103 and set(found) >= expected


def test_a_listing_survives_changes_and_other_readers(kernel: Kernel) -> None:
    for index in range(50):
        Path(kernel.hooks.directory, f"name-{index:03}").touch()
    body = kernel.ask(abi.READDIR, abi.READ_IN.pack(0, 0, 1000, 0, 0, 0, 0))
    found, at, offset = [], 0, 0
    while at < len(body):
        _, offset, length, _ = abi.DIRENT.unpack_from(body, at)
        found.append(body[at + 24 : at + 24 + length].decode())
        at += 24 + (length + 7 & ~7)
    os.unlink(os.path.join(kernel.hooks.directory, "name-001"))
    Path(kernel.hooks.directory, "aaa").touch()
    kernel.names()  # somebody else's listing
    body = kernel.ask(abi.READDIR, abi.READ_IN.pack(0, offset, 100000, 0, 0, 0, 0))
    at = 0
    while at < len(body):
        _, _, length, _ = abi.DIRENT.unpack_from(body, at)
        found.append(body[at + 24 : at + 24 + length].decode())
        at += 24 + (length + 7 & ~7)
    assert len(found) == len(set(found))
    assert {f"name-{index:03}" for index in range(50)} <= set(found)


def test_fsyncdir_syncs_the_directories_that_changed(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    broken = [True]

    def fsync(fd: int) -> None:
        if broken[0]:
            raise OSError(errno.EIO, "bad disk")
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))

    kernel.create("f")
    monkeypatch.setattr(os, "fsync", fsync)
    with raises(errno.EIO):
        kernel.ask(abi.FSYNCDIR, abi.FSYNC_IN.pack(0, 0, 0))
    broken[0] = False
    kernel.ask(abi.FSYNCDIR, abi.FSYNC_IN.pack(0, 0, 0))
    assert sorted(synced) == sorted([kernel.hooks.directory, str(kernel.data)])
    kernel.ask(abi.FSYNCDIR, abi.FSYNC_IN.pack(0, 0, 0))
    assert len(synced) == 2
    kernel.unlink("f")
    kernel.ask(abi.FSYNCDIR, abi.FSYNC_IN.pack(0, 0, 0))
    assert synced[2:] == [kernel.hooks.directory]


# -- attributes


def test_setattr(kernel: Kernel) -> None:
    node, fh, _, _ = kernel.create("f")
    kernel.setattr(node, abi.FATTR_MODE, mode=0o100640)
    kernel.setattr(node, abi.FATTR_MTIME, mtime=100, mnsec=5)
    found = kernel.attr(node)
    assert (stat.S_IMODE(found["mode"]), found["mtime"], found["mtimensec"]) == (0o640, 100, 5)
    kernel.release(node, fh)
    kernel.setattr(node, abi.FATTR_SIZE | abi.FATTR_ATIME, size=77, atime=9)
    found = kernel.attr(node)
    assert (found["size"], found["atime"]) == (77, 9)
    assert kernel.calls("before_truncate") == [("f",)] and kernel.calls("after_truncate") == [("f", 77)]


def test_a_refused_truncation_changes_nothing(kernel: Kernel) -> None:
    node, fh, _, _ = kernel.create("f")
    kernel.write(node, fh, b"data")
    kernel.hooks.errors["before_truncate"] = ReadOnlyReplica()
    with raises(errno.EROFS):
        kernel.setattr(node, abi.FATTR_SIZE, size=0)
    assert kernel.attr(node)["size"] == 4


def test_changing_the_owner_to_what_it_is_needs_no_privilege(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(errno.EPERM, "not root")

    node, *_ = kernel.create("f")
    monkeypatch.setattr(os, "chown", refuse)
    kernel.setattr(node, abi.FATTR_UID | abi.FATTR_GID, uid=os.getuid(), gid=os.getgid())
    with raises(errno.EPERM):
        kernel.setattr(node, abi.FATTR_UID, uid=os.getuid() + 1)


def test_setid_goes_with_a_write(cached: Kernel) -> None:
    node, fh, _, _ = cached.create("f", mode=0o6775)
    body = abi.WRITE_IN.pack(fh, 0, 1, abi.WRITE_KILL_SUIDGID, 0, 0, 0) + b"x"
    cached.ask(abi.WRITE, body, node)
    assert stat.S_IMODE(cached.attr(node)["mode"]) == 0o775


def test_a_database_of_a_replica_looks_read_only(kernel: Kernel) -> None:
    node, *_ = kernel.create("a.db", mode=0o666)
    side, *_ = kernel.create("a.db-shm", mode=0o666)
    kernel.hooks.is_primary = False
    assert stat.S_IMODE(kernel.attr(node)["mode"]) == 0o444
    assert stat.S_IMODE(kernel.attr(side)["mode"]) == 0o666
    assert stat.S_IMODE(kernel.attr(ROOT)["mode"]) == 0o777


def test_the_root_keeps_owner_and_mode(kernel: Kernel) -> None:
    kernel.setattr(ROOT, abi.FATTR_MODE | abi.FATTR_UID | abi.FATTR_MTIME, mode=0o40755, uid=77, mtime=5)
    found = kernel.attr(ROOT)
    assert (found["mode"], found["uid"], found["mtime"]) == (0o40777, 0, 5)


def test_statfs_is_the_data_directory(kernel: Kernel) -> None:
    values = abi.STATFS_OUT.unpack(kernel.ask(abi.STATFS))
    expected = os.statvfs(kernel.data)
    assert (values[0], values[7], values[6]) == (expected.f_blocks, expected.f_frsize, 255)


def test_fallocate(kernel: Kernel) -> None:
    node, fh, _, _ = kernel.create("f")
    kernel.ask(abi.FALLOCATE, abi.FALLOCATE_IN.pack(fh, 0, 5000, 0, 0), node)
    assert kernel.attr(node)["size"] == 5000
    kernel.ask(abi.FALLOCATE, abi.FALLOCATE_IN.pack(fh, 0, 9000, 1, 0), node)
    assert kernel.attr(node)["size"] == 5000
    with raises(errno.EOPNOTSUPP):
        kernel.ask(abi.FALLOCATE, abi.FALLOCATE_IN.pack(fh, 0, 5000, 3, 0), node)


# -- virtual files


@pytest.mark.parametrize("name", ["a.db", "slow.db"])
def test_a_position_is_read_anew_from_its_beginning(kernel: Kernel, name: str) -> None:
    kernel.create(name)
    node = kernel.look_up(f"{name}-pos")
    fh, flags, _ = kernel.open(node, os.O_RDONLY)
    assert flags & abi.FOPEN_DIRECT_IO
    first = kernel.read(node, fh)
    assert len(first) == 34 and kernel.read(node, fh, 10, 30) == first[30:]
    assert kernel.read(node, fh, 100, 34) == b""
    assert kernel.read(node, fh) != first
    assert kernel.attr(node)["size"] == 34 and stat.S_IMODE(kernel.attr(node)["mode"]) == 0o444


def test_lag_is_captured_per_open(kernel: Kernel) -> None:
    node = kernel.look_up(".lag")
    fh, _, _ = kernel.open(node, os.O_RDONLY)
    assert kernel.read(node, fh) == kernel.read(node, fh)
    other, _, _ = kernel.open(node, os.O_RDONLY)
    assert kernel.read(node, other) != kernel.read(node, fh)
    kernel.release(node, fh)
    kernel.release(node, other)
    assert kernel.dispatcher.handles.open == {}


def test_virtual_files_cannot_be_changed(kernel: Kernel) -> None:
    kernel.create("note")
    node = kernel.look_up(".lag")
    with raises(errno.EACCES):
        kernel.open(node, os.O_RDWR)
    for attempt in (
        lambda: kernel.unlink(".lag"),
        lambda: kernel.rename(".lag", "x"),
        lambda: kernel.rename("note", "a.db-pos"),
        lambda: kernel.create(".primary"),
        lambda: kernel.setattr(node, abi.FATTR_SIZE, size=0),
    ):
        with raises(errno.EPERM):
            attempt()
