"""Handles, io modes, continuations and errors: requests as the kernel sends them, without a mount."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator

import pytest
from fake_kernel import Kernel, raises
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pylitefs.errors import DatabaseBusy, DatabaseNotFound, NotADatabase, ReadOnlyReplica, Unavailable
from pylitefs.filesystem import volume
from pylitefs.filesystem.volume import Request
from pylitefs.formats.fuse import abi
from pylitefs.ports import FileKind

# -- io modes


def test_passthrough_shares_one_backing_file_until_the_last_release(kernel: Kernel) -> None:
    node, first, flags, backing = kernel.create("a.db")
    assert flags == abi.FOPEN_PASSTHROUGH | abi.FOPEN_NOFLUSH
    second = kernel.open(node, os.O_RDONLY)
    assert second[1:] == (flags, backing)
    kernel.release(node, first)
    assert list(kernel.channel.backing) == [backing]
    kernel.release(node, second[0])
    assert kernel.channel.backing == {}
    assert [call[3] for call in kernel.calls("released")] == [False, True]


def test_a_wish_for_the_write_hook_holds_until_the_last_release(kernel: Kernel) -> None:
    wish = [True]
    kernel.hooks.wants_write_hook = lambda ref: wish[0]  # type: ignore[method-assign]
    node, fh, flags, backing = kernel.create("a.db")
    assert (flags & abi.FOPEN_PASSTHROUGH, backing) == (0, 0)
    wish[0] = False
    again, flags, _ = kernel.open(node)
    assert flags & abi.FOPEN_PASSTHROUGH == 0
    kernel.write(node, again, b"data", 8)
    assert kernel.calls("write") == [("a.db", 8, 4)]
    kernel.release(node, fh)
    kernel.release(node, again)
    assert kernel.open(node)[1] & abi.FOPEN_PASSTHROUGH


def test_pages_cached_before_a_passthrough_open_are_not_kept(kernel: Kernel) -> None:
    wish = [True]
    kernel.hooks.wants_write_hook = lambda ref: wish[0]  # type: ignore[method-assign]
    node, fh, flags, _ = kernel.create("a.db")
    assert flags & abi.FOPEN_KEEP_CACHE
    kernel.release(node, fh)
    wish[0] = False
    fh, flags, _ = kernel.open(node)
    assert flags & abi.FOPEN_KEEP_CACHE == 0
    kernel.release(node, fh)
    wish[0] = True
    assert kernel.open(node)[1] & abi.FOPEN_KEEP_CACHE == 0
    assert kernel.open(node)[1] & abi.FOPEN_KEEP_CACHE


@pytest.mark.parametrize("code", [errno.EPERM, errno.ELOOP, errno.EOPNOTSUPP, errno.ENOTTY])
def test_refused_passthrough_is_given_up_for_good_with_one_line(kernel: Kernel, code: int) -> None:
    kernel.channel.backing_error = OSError(code, os.strerror(code))
    for name in ("a.db", "b.db", "c"):
        assert kernel.create(name)[2] & abi.FOPEN_PASSTHROUGH == 0
    kernel.channel.backing_error = None
    assert kernel.create("d.db")[2] & abi.FOPEN_PASSTHROUGH == 0
    assert len(kernel.log) == 1 and "passthrough is off" in kernel.log[0]


def test_no_descriptors_left_costs_only_this_file_its_passthrough(kernel: Kernel) -> None:
    kernel.channel.backing_error = OSError(errno.EMFILE, "too many open files")
    node, fh, flags, _ = kernel.create("a.db")
    assert flags & abi.FOPEN_PASSTHROUGH == 0
    kernel.write(node, fh, b"x")
    assert kernel.calls("write") == [("a.db", 0, 1)]
    kernel.channel.backing_error = None
    assert kernel.create("b.db")[2] & abi.FOPEN_PASSTHROUGH


def test_cached_mode_hooks_databases_and_their_logs_only(cached: Kernel) -> None:
    for name, hooked in (("a.db", True), ("a.db-wal", True), ("a.db-journal", True), ("a.db-shm", False),
                         ("note", False), ("note-hooked", True)):  # fmt: skip
        node, fh, flags, _ = cached.create(name)
        assert (flags & abi.FOPEN_NOFLUSH == 0) == hooked, name
        before = len(cached.calls("write"))
        assert cached.write(node, fh, b"hello", 3) == 5
        assert (len(cached.calls("write")) > before) == hooked, name
        assert cached.read(node, fh, 5, 3) == b"hello"


def test_flush_reaches_the_engine_for_hooked_handles(cached: Kernel) -> None:
    node, fh, _, _ = cached.create("a.db")
    cached.ask(abi.FLUSH, abi.FLUSH_IN.pack(fh, 0, 0, 0), node)
    plain, plain_fh, _, _ = cached.create("note")
    cached.ask(abi.FLUSH, abi.FLUSH_IN.pack(plain_fh, 0, 0, 0), plain)
    assert cached.calls("flushed") == [("a.db",)]


def test_a_handle_the_kernel_no_longer_wants_is_released(kernel: Kernel) -> None:
    node, fh, _, _ = kernel.create("a.db")
    kernel.release(node, fh)
    kernel.channel.waiting = False
    kernel.open(node)
    assert kernel.dispatcher.handles.open == {} and kernel.channel.backing == {}


@pytest.mark.parametrize("unlinked", [False, True])
def test_a_file_opened_for_reading_is_opened_again_to_write(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, unlinked: bool
) -> None:
    """As when the daemon may not write a file of mode 0444 that is then made writable."""
    node, fh, _, _ = kernel.create("f")
    kernel.write(node, fh, b"data")
    kernel.release(node, fh)
    real, refused = volume.open_backing, [True]

    def open_backing(path: str, flags: int) -> int:
        if flags & os.O_RDWR and refused[0]:
            raise PermissionError(errno.EACCES, "mode 0444")
        return real(path, flags)

    monkeypatch.setattr(volume, "open_backing", open_backing)
    with raises(errno.EACCES):
        kernel.open(node, os.O_RDWR)
    reader, _, _ = kernel.open(node, os.O_RDONLY)
    refused[0] = False
    if unlinked:
        kernel.unlink("f")
    writer, _, _ = kernel.open(node, os.O_WRONLY)
    assert kernel.write(node, writer, b"DA") == 2
    assert kernel.read(node, reader) == b"DAta"
    before = len(os.listdir("/proc/self/fd"))
    kernel.release(node, reader)
    kernel.release(node, writer)
    assert len(os.listdir("/proc/self/fd")) == before - 2


def test_no_descriptor_is_leaked(kernel: Kernel) -> None:
    before = set(os.listdir("/proc/self/fd"))
    for index in range(5):
        node, fh, _, _ = kernel.create(f"f{index}")
        other, _, _ = kernel.open(node)
        kernel.unlink(f"f{index}")
        kernel.release(node, fh)
        kernel.release(node, other)
    assert set(os.listdir("/proc/self/fd")) == before


def test_who_opens_is_told_by_thread(kernel: Kernel) -> None:
    kernel.create("mine", pid=os.getpid())
    thread_id: list[int] = []
    stay = threading.Event()
    thread = threading.Thread(target=lambda: (thread_id.append(threading.get_native_id()), stay.wait(10)))
    thread.start()
    while not thread_id:
        pass
    try:
        kernel.create("my-thread", pid=thread_id[0])
    finally:
        stay.set()
        thread.join()
    kernel.create("parent", pid=os.getppid())
    assert [call[3] for call in kernel.calls("opened")] == [True, True, False]


# -- continuations and errors


def test_fsync_asks_before_and_tells_after(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(os, "fdatasync", lambda fd: order.append("data"))
    monkeypatch.setattr(os, "fsync", lambda fd: order.append("all"))
    for name in ("a.db-wal", "slow.db-wal"):
        node, fh, _, _ = kernel.create(name)
        kernel.ask(abi.FSYNC, abi.FSYNC_IN.pack(fh, abi.FSYNC_FDATASYNC, 0), node)
        kernel.ask(abi.FSYNC, abi.FSYNC_IN.pack(fh, 0, 0), node)
    assert order == ["data", "all"] * 2
    assert kernel.calls("before_fsync") == kernel.calls("after_fsync")


def test_a_refused_fsync_does_not_sync(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    node, fh, _, _ = kernel.create("a.db-wal")
    kernel.hooks.errors["before_fsync"] = OSError(errno.EIO, "lease lost")
    with raises(errno.EIO):
        kernel.ask(abi.FSYNC, abi.FSYNC_IN.pack(fh, 0, 0), node)
    assert synced == [] and kernel.calls("after_fsync") == []


def test_a_failed_fsync_is_reported(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "fsync", fail)
    node, fh, _, _ = kernel.create("slow.db-wal")
    with raises(errno.ENOSPC):
        kernel.ask(abi.FSYNC, abi.FSYNC_IN.pack(fh, 0, 0), node)
    assert kernel.calls("after_fsync") == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (ReadOnlyReplica(), errno.EROFS),
        (DatabaseBusy("busy"), errno.EBUSY),
        (DatabaseNotFound("x"), errno.ENOENT),
        (Unavailable("starting"), errno.EAGAIN),
        (NotADatabase("no"), errno.EIO),
        (ValueError("a bug"), errno.EIO),
        (OSError(errno.ENOSYS, "would switch CREATE off"), errno.EIO),
    ],
)
@pytest.mark.parametrize("name", ["a.db", "slow.db"])
def test_errors_of_the_engine_become_errno(kernel: Kernel, error: Exception, code: int, name: str) -> None:
    kernel.hooks.errors["may_create"] = error
    with raises(code):
        kernel.create(name)
    assert not os.path.exists(kernel.hooks.resolve(name).path or "")


def test_an_unexpected_error_is_logged_once(kernel: Kernel) -> None:
    def broken(ref: object) -> bool:
        raise KeyError("bug")

    kernel.hooks.wants_write_hook = broken  # type: ignore[method-assign, assignment]
    for index in range(3):
        with raises(errno.EIO):
            kernel.create(f"f{index}")
    assert len(kernel.log) == 1 and "CREATE" in kernel.log[0] and "KeyError" in kernel.log[0]


@pytest.mark.parametrize("opcode", [abi.GETXATTR, abi.SETXATTR, abi.LISTXATTR, abi.REMOVEXATTR, abi.GETLK, abi.SETLK,
                                    abi.POLL, abi.IOCTL, abi.LSEEK, abi.COPY_FILE_RANGE, abi.BMAP, abi.OPENDIR,
                                    abi.ACCESS, abi.STATX, abi.TMPFILE, 999])  # fmt: skip
def test_what_the_kernel_may_do_alone_is_enosys(kernel: Kernel, opcode: int) -> None:
    with raises(errno.ENOSYS):
        kernel.ask(opcode, bytes(64))


@pytest.mark.parametrize("opcode", [abi.MKDIR, abi.RMDIR, abi.SYMLINK, abi.LINK])
def test_what_is_not_supported_is_eperm(kernel: Kernel, opcode: int) -> None:
    with raises(errno.EPERM):
        kernel.ask(opcode, bytes(8) + b"name\0target\0")


def test_forget_is_never_answered(kernel: Kernel) -> None:
    unique = kernel.send(abi.FORGET, abi.FORGET_IN.pack(1), node=99)
    garbage = kernel.send(abi.BATCH_FORGET, abi.BATCH_FORGET_IN.pack(1000, 0))
    answered = kernel.channel.bodies.keys() | kernel.channel.errors.keys()
    assert not {unique, garbage} & answered


# -- anything


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    kernel = Kernel(tmp_path_factory.mktemp("data"))
    kernel.create("a.db")
    kernel.create("note")
    yield kernel


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([*abi.OPCODES, 0, 53, 4096]), st.integers(0, 5), st.binary(max_size=150))
def test_any_request_gets_exactly_one_answer(shared: Kernel, opcode: int, node: int, body: bytes) -> None:
    """FakeChannel refuses a second answer; a request too short for its opcode is dropped with a line in the log."""
    if opcode == abi.FALLOCATE:
        body = body[:24] + bytes(8)  # not for terabytes
    if opcode == abi.SETATTR:
        body = body[:16] + b"\0\0\1" + bytes(100)
    known = abi.OPCODES.get(opcode)
    unique = shared.send(opcode, body, node)
    answers = (unique in shared.channel.bodies) + (unique in shared.channel.errors)
    if known is not None and not known.replies:
        assert answers == 0
    elif known is None or len(body) >= known.body_size:
        assert answers == 1
    assert not any(call for call in shared.log if "KeyError" in call or "AttributeError" in call), shared.log


@given(st.binary(max_size=100))
def test_any_bytes_are_survived(shared: Kernel, raw: bytes) -> None:
    rq = Request(bytearray(raw) + bytearray(8192))
    shared.dispatcher.dispatch(rq, len(raw))


def test_resolve_kinds_of_the_test_engine(kernel: Kernel) -> None:
    assert kernel.hooks.resolve("a.db-wal").kind is FileKind.WAL
