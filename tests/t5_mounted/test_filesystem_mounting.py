"""Mounting, unmounting, and what daemons leave behind that end in other ways."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounted import PlainMount, needs_root, start_plain, stop_plain

sys.path.insert(0, str(Path(__file__).parent.parent / "t3_filesystem"))
from plain_hooks import PlainHooks

from pylitefs.errors import MountError
from pylitefs.filesystem import mount, rings
from pylitefs.filesystem.device import MAX_WRITE, Device
from pylitefs.filesystem.session import Session

pytestmark = needs_root


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    """A session in this process; nothing here may map a file of the mount."""
    hooks = PlainHooks(str(tmp_path / "data"))
    session = Session(str(tmp_path / "mnt"), str(tmp_path / "data"), hooks)
    session.start()
    try:
        yield session
    finally:
        session.stop()
        assert mount.mount_at(str(tmp_path / "mnt")) is None


def test_sigterm_unmounts(plain_mount: PlainMount) -> None:
    (plain_mount.dir / "f").write_text("x")
    errors = stop_plain(plain_mount)
    assert plain_mount.process.returncode == 0 and errors == ""
    assert mount.mount_at(str(plain_mount.dir)) is None
    assert os.listdir(plain_mount.dir) == []


def test_sigterm_while_files_are_open(plain_mount: PlainMount) -> None:
    with (plain_mount.dir / "f").open("w+b") as file:
        file.write(b"data")
        file.flush()
        errors = stop_plain(plain_mount)
        assert plain_mount.process.returncode == 0 and "open files" in errors
        assert mount.mount_at(str(plain_mount.dir)) is None
        with pytest.raises(OSError, match=r"."):
            os.fsync(file.fileno())
    assert (plain_mount.files / "f").read_bytes() == b"data"


def test_a_killed_daemon_is_cleaned_up_after(plain_mount: PlainMount) -> None:
    (plain_mount.dir / "f").write_text("before")
    plain_mount.process.send_signal(signal.SIGKILL)
    plain_mount.process.wait(20)
    with pytest.raises(OSError):  # not connected, or aborted
        (plain_mount.dir / "f").read_text()
    wait_for_guard(plain_mount)
    for _ in range(2):  # nor does anybody write into the directory below; the guard may be about to end the connection
        with pytest.raises(OSError, match=r"not connected|connection abort") as refused:
            (plain_mount.dir / "f").write_text("after")
    assert refused.value.errno == errno.ENOTCONN
    again = start_plain(plain_mount.dir, plain_mount.data, plain_mount.mode)
    try:
        assert (plain_mount.dir / "f").read_text() == "before"
    finally:
        errors = stop_plain(again)
    assert "removed the mount of a killed litefs" in errors


def test_a_killed_daemon_with_files_still_open(plain_mount: PlainMount) -> None:
    with (plain_mount.dir / "f").open("w") as file:
        file.write("x")
        file.flush()
        plain_mount.process.send_signal(signal.SIGKILL)
        plain_mount.process.wait(20)
        again = start_plain(plain_mount.dir, plain_mount.data, plain_mount.mode)
        try:
            assert (plain_mount.dir / "f").read_text() == "x"
        finally:
            stop_plain(again)


def wait_for_guard(killed: PlainMount) -> None:
    """Until it has done what it does."""
    deadline = time.monotonic() + 20
    words = b"mount_guard.py\0" + str(killed.process.pid).encode() + b"\0"
    while any(words in line for line in map(command_line, os.listdir("/proc"))):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def command_line(process: str) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("told", ["its own mount", "another one"])
def test_a_late_guard_ends_no_mount_but_its_own(plain_mount: PlainMount, told: str) -> None:
    """A guard that comes to run late finds the mount of its daemon's successor at the same place."""
    entry = mount.mount_at(str(plain_mount.dir))
    assert entry is not None
    device = entry.device if told == "its own mount" else "0:999999"
    code = (
        "import os, signal\n"
        "from pylitefs.filesystem.guard import MountGuard\n"
        f"guard = MountGuard({str(plain_mount.dir)!r})\n"
        f"guard.hold(os.open('/dev/null', os.O_RDWR), os.memfd_create('cached'), {device!r})\n"
        "print(guard._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=20, check=False)
    guard = int(done.stdout)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{guard}/cmdline").exists() and Path(f"/proc/{guard}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if told == "another one":
        (plain_mount.dir / "f").write_text("x")
        assert (plain_mount.dir / "f").read_text() == "x"
    else:
        assert plain_mount.process.wait(20) == 0, "it was told of the end"


def test_a_live_daemon_is_left_alone(plain_mount: PlainMount) -> None:
    with pytest.raises(RuntimeError, match="in use by a running litefs"):
        start_plain(plain_mount.dir, plain_mount.data, plain_mount.mode)
    (plain_mount.dir / "f").write_text("x")


def test_unmounting_behind_the_daemons_back(plain_mount: PlainMount) -> None:
    subprocess.run(["umount", plain_mount.dir], check=True, timeout=20)
    assert plain_mount.process.wait(20) == 0


@pytest.mark.parametrize("refused_by", ["io_uring_setup", "the kernel's FUSE"])
def test_a_mount_without_rings_where_they_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused_by: str
) -> None:
    """Containers may forbid io_uring; the kernel, which was told to expect it, would hold back every request."""
    if not rings.enable():
        pytest.skip("the kernel offers no rings that could be refused")

    class Refused(rings.Ring):
        def __init__(self, device_fd: int, stop_fd: int, queue: int, payload_size: int) -> None:
            if refused_by == "io_uring_setup":
                raise OSError(errno.EPERM, "io_uring_setup: Operation not permitted")
            super().__init__(device_fd, stop_fd, queue, 4096)  # too little for a request: EINVAL

    monkeypatch.setattr(rings, "Ring", Refused)
    lines: list[str] = []
    mnt, data = tmp_path / "mnt", tmp_path / "data"
    session = Session(str(mnt), str(data), PlainHooks(str(data)), log=lines.append)
    session.start()
    try:
        assert not session.io_uring
        answered = subprocess.run(["ls", mnt], timeout=20, check=False)
        assert answered.returncode == 0
    finally:
        session.stop()
    assert sum("io_uring cannot be used" in line for line in lines) == 1
    assert mount.mount_at(str(mnt)) is None
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fuse-")]


def test_stop_twice_and_from_several_threads(tmp_path: Path) -> None:
    session = Session(str(tmp_path / "mnt"), str(tmp_path / "data"), PlainHooks(str(tmp_path / "data")))
    session.stop()
    session = Session(str(tmp_path / "mnt"), str(tmp_path / "data"), PlainHooks(str(tmp_path / "data")))
    session.start()
    before = threading.active_count()
    stoppers = [threading.Thread(target=session.stop) for _ in range(3)]
    for stopper in stoppers:
        stopper.start()
    for stopper in stoppers:
        stopper.join(20)
    assert mount.mount_at(str(tmp_path / "mnt")) is None
    assert threading.active_count() < before


def test_stop_releases_what_is_open(tmp_path: Path) -> None:
    hooks = PlainHooks(str(tmp_path / "data"))
    session = Session(str(tmp_path / "mnt"), str(tmp_path / "data"), hooks)
    session.start()
    with (tmp_path / "mnt" / "a.db").open("wb"):
        session.stop()
    assert ("released", "a.db", True, False, True, True) in hooks.calls or (
        "released", "a.db", True, True, True, True) in hooks.calls  # fmt: skip
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fuse-")]


@pytest.mark.parametrize("hook", ["before_fsync", "after_fsync"])
def test_stop_while_a_request_is_never_answered(tmp_path: Path, hook: str) -> None:
    hooks = PlainHooks(str(tmp_path / "data"))
    held: list[object] = []
    setattr(hooks, hook, lambda ref, then: held.append(then))
    session = Session(str(tmp_path / "mnt"), str(tmp_path / "data"), hooks)
    session.start()
    code = f"import os; os.fsync(os.open({str(tmp_path / 'mnt' / 'f')!r}, os.O_CREAT | os.O_RDWR))"
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not held and time.monotonic() < deadline:
        time.sleep(0.01)
    session.stop()
    assert child.wait(20) != 0
    assert mount.mount_at(str(tmp_path / "mnt")) is None
    assert "fuse-patience" not in [thread.name for thread in threading.enumerate()]
    for then in held:
        then(None)  # type: ignore[operator]


def test_stop_while_threads_of_ours_wait_for_the_mount(tmp_path: Path) -> None:
    """An unlink that is never answered keeps the root's lock. The notifier waits for it in a write to /dev/fuse, and
    the opener in the kernel's way to a name: both keep the connection from ending by itself."""
    hooks = PlainHooks(str(tmp_path / "data"))
    held: list[object] = []
    hooks.before_unlink = lambda ref, by_daemon, then: held.append(then)  # type: ignore[method-assign]
    session = Session(str(tmp_path / "mnt"), str(tmp_path / "data"), hooks)
    session.start()
    for name in ("f", "g"):
        (tmp_path / "mnt" / name).write_text("x")
    child = subprocess.Popen(
        [sys.executable, "-c", f"import os; os.unlink({str(tmp_path / 'mnt' / 'f')!r})"], stderr=subprocess.DEVNULL
    )

    def wait_until(what: Callable[[], object]) -> None:
        deadline = time.monotonic() + 20
        while not what():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    wait_until(lambda: held)
    errors: list[int | None] = []

    def open_one() -> None:
        try:
            os.close(os.open(tmp_path / "mnt" / "new", os.O_CREAT | os.O_RDWR))
        except OSError as error:
            errors.append(error.errno)

    assert session._dispatcher is not None
    notifier = session._dispatcher.notifier
    notifier.changed("g")
    wait_until(lambda: not notifier._queue)
    opener = threading.Thread(target=open_one, daemon=True)
    opener.start()
    time.sleep(0.2)
    session.stop()
    assert child.wait(20) != 0
    opener.join(20)
    assert errors and not notifier._thread.is_alive()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fuse-")]
    assert mount.mount_at(str(tmp_path / "mnt")) is None


def test_a_request_that_waits_does_not_stop_others(session: Session, tmp_path: Path) -> None:
    hooks = session._hooks
    assert isinstance(hooks, PlainHooks)
    go_on = threading.Event()
    in_time: list[bool] = []
    before_fsync = hooks.before_fsync

    def wait(ref: object, then: object) -> None:
        in_time.append(go_on.wait(20))
        before_fsync(ref, then)  # type: ignore[arg-type]

    hooks.before_fsync = wait  # type: ignore[method-assign, assignment]
    files = [(tmp_path / "mnt" / f"f{index}").open("wb") for index in range(8)]
    syncing = [threading.Thread(target=os.fsync, args=(file.fileno(),)) for file in files]
    for thread in syncing:
        thread.start()
    try:
        (tmp_path / "mnt" / "other").write_text("not blocked")
        assert (tmp_path / "mnt" / "other").read_text() == "not blocked"
    finally:
        go_on.set()
        for thread in syncing:
            thread.join(20)
        for file in files:
            file.close()
    assert in_time == [True] * 8


def test_what_the_engine_changes_is_seen_once_it_is_told(session: Session, tmp_path: Path) -> None:
    shown, files = tmp_path / "mnt", tmp_path / "data" / "files"
    assert not (shown / "new").exists()
    assert "new" not in os.listdir(shown)
    (files / "new").write_text("by the engine")
    session.notifier.changed("new")
    assert session.drain_notifications(10)
    assert (shown / "new").read_text() == "by the engine"
    assert "new" in os.listdir(shown)

    (files / "never-looked-up").touch()
    session.notifier.changed("never-looked-up")
    assert session.drain_notifications(10)
    assert "never-looked-up" in os.listdir(shown)

    assert (shown / "new").stat().st_size == 13
    (files / "new").write_text("longer than before")
    session.notifier.invalidate_file("new")
    assert session.drain_notifications(10)
    assert (shown / "new").stat().st_size == 18
    assert (shown / "new").read_text() == "longer than before"

    with (shown / "new").open() as file:
        (files / "new").unlink()
        session.notifier.changed("new")
        assert session.drain_notifications(10)
        assert not (shown / "new").exists()
        assert "new" not in os.listdir(shown)
        assert file.read() == "longer than before"
        assert os.fstat(file.fileno()).st_nlink == 0


def test_a_listing_that_was_made_before_a_change_is_not_kept(session: Session, tmp_path: Path) -> None:
    """It is told of the name first, for which it waits until the directory is not read any more; so it does not keep a
    listing that comes after it was told to forget what it has."""
    shown, files = tmp_path / "mnt", tmp_path / "data" / "files"
    (files / "gone").touch()
    hooks, made, go_on = session._hooks, threading.Event(), threading.Event()
    assert isinstance(hooks, PlainHooks)
    names = hooks.names

    def slowly() -> list[str]:
        found = names()
        made.set()
        assert go_on.wait(20)
        return found

    hooks.names = slowly  # type: ignore[method-assign]
    found: list[str] = []
    lister = threading.Thread(target=lambda: found.extend(os.listdir(shown)))
    lister.start()
    try:
        assert made.wait(20)
        hooks.names = names  # type: ignore[method-assign]
        (files / "gone").unlink()
        session.notifier.changed("gone")
        session.drain_notifications(0.1)
    finally:
        go_on.set()
        lister.join(20)
    assert session.drain_notifications(10)
    assert "gone" in found and "gone" not in os.listdir(shown)


def test_a_backing_file_that_moves_keeps_its_inode(session: Session, tmp_path: Path) -> None:
    hooks = session._hooks
    assert isinstance(hooks, PlainHooks)
    shown = tmp_path / "mnt" / "plain"
    with shown.open("w+b") as file:
        file.write(b"data")
        file.flush()
        inode = shown.stat().st_ino
        target = tmp_path / "data" / "moved"
        os.rename(tmp_path / "data" / "files" / "plain", target)
        hooks.moved["plain"] = str(target)
        session.notifier.changed("plain")
        file.write(b" more")
        file.flush()
        with shown.open("rb") as again:
            assert again.read() == b"data more"
        assert shown.stat().st_ino == inode
    assert target.read_bytes() == b"data more"


def test_opens_by_the_daemon_itself_are_known(session: Session, tmp_path: Path) -> None:
    hooks = session._hooks
    assert isinstance(hooks, PlainHooks)
    (tmp_path / "mnt" / "mine").touch()
    thread = threading.Thread(target=(tmp_path / "mnt" / "threads").touch)
    thread.start()
    thread.join()
    subprocess.run(["touch", tmp_path / "mnt" / "theirs"], check=True, timeout=20)
    by_daemon = {call[1]: call[4] for call in hooks.calls if call[0] == "opened"}
    assert by_daemon == {"mine": True, "threads": True, "theirs": False}


def test_a_dead_mount_of_another_program_is_not_touched(tmp_path: Path) -> None:
    path = str(tmp_path / "mnt")
    os.mkdir(path)
    fd = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0".encode()
    assert mount._libc.mount(b"sshfs", os.fsencode(path), b"fuse", 0, options) == 0
    os.close(fd)
    try:
        with pytest.raises(MountError, match='dead mount of "sshfs"'):
            mount.prepare(path, lambda line: None)
        assert mount.mount_at(path) is not None
    finally:
        mount.detach(path)


def test_what_is_made_just_before_the_mount_is_not_hidden_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An application that did not wait for the daemon: its rows would be nowhere, and nobody would be told."""
    path, mounting = tmp_path / "mnt", mount.mount

    def made_before(*args: object, **kwargs: object) -> int:
        (path / "app.db").touch()
        return mounting(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(mount, "mount", made_before)
    hooks = PlainHooks(str(tmp_path / "data"))
    with pytest.raises(MountError, match=r"is not empty: .* on no other node .*: app\.db$"):
        Session(str(path), str(tmp_path / "data"), hooks).start()
    assert mount.mount_at(str(path)) is None and os.listdir(path) == ["app.db"]
    monkeypatch.undo()
    (path / "app.db").unlink()
    session = Session(str(path), str(tmp_path / "data"), hooks)
    session.start()
    session.stop()


def test_the_helper_mounts_too(tmp_path: Path) -> None:
    path = mount.prepare(str(tmp_path / "mnt"), lambda line: None)
    device = Device(mount.mount_by_helper(path, ["default_permissions", f"max_read={MAX_WRITE}"]))
    try:
        entry = mount.mount_at(path)
        assert entry is not None and entry.ours
        assert device.negotiate(passthrough=False, max_stack_depth=1).minor >= 31
    finally:
        mount.detach(path)
        device.close()
    assert mount.mount_at(path) is None


def test_a_late_reply_after_the_end_hits_no_other_file(tmp_path: Path) -> None:
    path = mount.prepare(str(tmp_path / "mnt"), lambda line: None)
    device = Device(mount.mount(path, allow_other=False, max_read=MAX_WRITE))
    mount.detach(path)
    device.close()
    other = os.open(tmp_path / "other", os.O_CREAT | os.O_RDWR)
    device.reply(2, b"late")
    device.fail(2, errno.EIO)
    assert os.fstat(other).st_size == 0 and other != device.fd
    os.close(other)
