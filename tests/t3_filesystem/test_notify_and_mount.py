"""The notification queue, the table of mounts, and what is refused before anything is mounted."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from plain_hooks import PlainHooks

from pylitefs.errors import MountError
from pylitefs.filesystem import mount
from pylitefs.filesystem.notify import KernelNotifier
from pylitefs.filesystem.tree import Node, Tree
from pylitefs.formats.fuse import abi, replies


class SlowKernel:
    """Holds the first notification until told to go on."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.go_on = threading.Event()
        self.busy = threading.Event()

    def notify(self, message: bytes) -> bool:
        self.busy.set()
        assert self.go_on.wait(10)
        self.heard.append(message)
        return False


def notifier_and_tree(tmp_path: Path, kernel: SlowKernel) -> tuple[KernelNotifier, Tree, PlainHooks]:
    hooks = PlainHooks(str(tmp_path))
    tree = Tree(hooks.resolve)
    notifier = KernelNotifier(tree, kernel, lambda line: None, expire_only=True)
    notifier.start()
    return notifier, tree, hooks


def find(tree: Tree, hooks: PlainHooks, name: str) -> Node:
    Path(hooks.directory, name).touch()
    found = tree.find(name)
    assert found is not None
    return found[0]


def test_waiting_notifications_are_sent_once_and_in_order(tmp_path: Path) -> None:
    kernel = SlowKernel()
    notifier, tree, hooks = notifier_and_tree(tmp_path, kernel)
    first, second = find(tree, hooks, "first"), find(tree, hooks, "second")
    notifier.invalidate_file("first")
    assert kernel.busy.wait(10)
    for _ in range(100):
        notifier.invalidate_file("first")
        notifier.invalidate_file("second")
    assert not notifier.drain(0.05)
    kernel.go_on.set()
    assert notifier.drain(10)
    notifier.stop(10)
    inval = [replies.notify_inval_inode(node.ino, 0, 0) for node in (first, second)]
    assert kernel.heard == [inval[0], *inval]


def test_unknown_files_need_no_notification(tmp_path: Path) -> None:
    kernel = SlowKernel()
    kernel.go_on.set()
    notifier, _, _ = notifier_and_tree(tmp_path, kernel)
    notifier.invalidate_file("unknown")
    assert notifier.drain(10) and kernel.heard == []
    notifier.stop(10)


def test_names_the_engine_changes_also_change_the_listing(tmp_path: Path) -> None:
    kernel = SlowKernel()
    kernel.go_on.set()
    notifier, tree, hooks = notifier_and_tree(tmp_path, kernel)
    node = find(tree, hooks, "gone")
    Path(hooks.directory, "gone").unlink()
    notifier.changed("new")
    notifier.changed("gone")
    notifier.drain(10)
    notifier.stop(10)
    listing = replies.notify_inval_inode(abi.ROOT_ID, 0, 0)
    assert set(kernel.heard) == {
        replies.notify_inval_entry(abi.ROOT_ID, "new", True),
        replies.notify_inval_entry(abi.ROOT_ID, "gone", False),
        replies.notify_inval_inode(node.ino, -1, 0),
        listing,
    }
    assert node.name is None and "gone" not in tree.names


def test_a_stopped_notifier_takes_no_more(tmp_path: Path) -> None:
    kernel = SlowKernel()
    kernel.go_on.set()
    notifier, _, _ = notifier_and_tree(tmp_path, kernel)
    notifier.stop(10)
    notifier.changed("x")
    assert notifier.drain(1) and kernel.heard == []


def test_mountinfo() -> None:
    text = (
        "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
        "42 22 0:39 / /mnt/a\\040b rw,nosuid - fuse litefs rw,user_id=0\n"
        "43 22 0:40 / /mnt/c rw shared:7 master:1 - fuse.sshfs host:/x rw\n"
        "nonsense\n"
    )
    entries = mount.parse_mountinfo(text)
    assert [entry.path for entry in entries] == ["/", "/mnt/a b", "/mnt/c"]
    assert [entry.ours for entry in entries] == [False, True, False]
    assert entries[1].device == "0:39"


def test_the_type_of_a_filesystem() -> None:
    assert mount.fs_type_of("/proc/self") == "proc"


def ignore(line: str) -> None:
    pass


def test_a_missing_mount_point_is_made(tmp_path: Path) -> None:
    assert mount.prepare(str(tmp_path / "a" / "b"), ignore) == str(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_a_mount_point_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert mount.prepare(str(tmp_path / "link"), ignore) == str(tmp_path / "real")


def test_a_mount_point_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(MountError) as caught:
            mount.prepare(str(path), ignore)
        assert "\n" not in str(caught.value) and "mount point" in str(caught.value)


def test_a_mount_point_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MountError, match="not empty"):
        mount.prepare(str(tmp_path), ignore)
    assert (tmp_path / "file").exists()


def test_no_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mount, "DEVICE", str(tmp_path / "fuse"))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(MountError, match="modprobe fuse"):
        mount.mount(str(tmp_path), allow_other=False, max_read=4096)


def test_neither_root_nor_helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MountError, match="fusermount3"):
        mount.mount(str(tmp_path), allow_other=False, max_read=4096)


def test_what_the_helper_says_is_passed_on_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper = tmp_path / "fusermount3"
    helper.write_text("#!/bin/sh\necho 'fusermount3: mount failed:' >&2\necho 'Permission denied' >&2\nexit 1\n")
    helper.chmod(0o755)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(mount, "DEVICE", os.devnull)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(MountError, match="fusermount3: mount failed: Permission denied") as caught:
        mount.mount(str(tmp_path), allow_other=False, max_read=4096)
    assert "\n" not in str(caught.value)
