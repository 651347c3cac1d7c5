"""The mount as a local disk, for any program, in both modes."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mounted import PlainMount

NOBODY = 65534


def as_nobody(code: Callable[[], int]) -> int:
    """Run `code` in a child without privileges; its exit status."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            status = code()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def errno_of(action: Callable[[], object]) -> int:
    try:
        action()
    except OSError as error:
        return error.errno or -1
    return 0


def test_files_are_made_read_listed_and_removed(plain_mount: PlainMount) -> None:
    path = plain_mount.dir / "note.txt"
    path.write_text("hello\n")
    assert path.read_text() == "hello\n"
    assert (plain_mount.files / "note.txt").read_text() == "hello\n"
    with path.open("a") as file:
        file.write("world\n")
    assert path.read_text() == "hello\nworld\n"
    assert sorted(os.listdir(plain_mount.dir)) == [".lag", "note.txt"]
    path.unlink()
    assert not path.exists() and not (plain_mount.files / "note.txt").exists()
    assert os.listdir(plain_mount.dir) == [".lag"]


def test_big_files_survive_whole(plain_mount: PlainMount) -> None:
    data = os.urandom(1 << 20) * 9 + b"tail"
    path = plain_mount.dir / "big"
    path.write_bytes(data)
    assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(data).digest()
    assert (plain_mount.files / "big").read_bytes() == data
    with path.open("r+b") as file:
        file.seek(4_000_001)
        file.write(b"patched")
    assert path.read_bytes()[4_000_001:4_000_008] == b"patched"
    assert path.stat().st_size == len(data)


def test_sparse_writes_and_truncation(plain_mount: PlainMount) -> None:
    path = plain_mount.dir / "sparse"
    with path.open("w+b") as file:
        file.seek(1 << 20)
        file.write(b"end")
        file.flush()
        assert os.fstat(file.fileno()).st_size == (1 << 20) + 3
        file.truncate(10)
        assert os.fstat(file.fileno()).st_size == 10
        file.truncate(5000)
        file.seek(0)
        assert file.read() == bytes(5000)
    os.truncate(path, 3)
    assert path.read_bytes() == bytes(3)
    path.write_bytes(b"")
    assert path.stat().st_size == 0


def test_an_unlinked_file_lives_as_long_as_it_is_open(plain_mount: PlainMount) -> None:
    path = plain_mount.dir / "gone"
    with path.open("w+b") as file:
        file.write(b"still")
        file.flush()
        path.unlink()
        assert not path.exists()
        path.write_bytes(b"another")
        file.seek(0)
        assert file.read() == b"still"
        assert os.fstat(file.fileno()).st_nlink == 0
        assert os.fstat(file.fileno()).st_ino != path.stat().st_ino
    assert path.read_bytes() == b"another"


def test_rename(plain_mount: PlainMount) -> None:
    a, b = plain_mount.dir / "a", plain_mount.dir / "b"
    a.write_bytes(b"a")
    b.write_bytes(b"b")
    with b.open("rb") as old, a.open("r+b") as moved:
        inode = a.stat().st_ino
        a.rename(b)
        assert old.read() == b"b"
        moved.write(b"A")
        moved.flush()
        assert b.stat().st_ino == inode
    assert b.read_bytes() == b"A" and not a.exists()
    assert sorted(os.listdir(plain_mount.files)) == ["b"]
    assert sorted(os.listdir(plain_mount.dir)) == [".lag", "b"]


def test_times_modes_and_owners(plain_mount: PlainMount) -> None:
    path = plain_mount.dir / "f"
    path.touch()
    os.utime(path, ns=(1_000_000_001, 2_000_000_002))
    assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (1_000_000_001, 2_000_000_002)
    os.utime(path)
    assert abs(path.stat().st_mtime - time.time()) < 60
    path.chmod(0o4755)
    assert stat.S_IMODE(path.stat().st_mode) == 0o4755
    os.chown(path, NOBODY, NOBODY)
    assert (path.stat().st_uid, path.stat().st_gid) == (NOBODY, NOBODY)
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    backing = (plain_mount.files / "f").stat()
    assert (backing.st_uid, stat.S_IMODE(backing.st_mode)) == (NOBODY, 0o755)
    os.utime(plain_mount.dir, ns=(1, 2))


def test_writes_by_others_take_set_uid_away(plain_mount: PlainMount) -> None:
    path = plain_mount.dir / "f"
    path.write_bytes(b"data")
    os.chown(path, NOBODY, NOBODY)
    path.chmod(0o4777)

    def write() -> int:
        with path.open("r+b") as file:
            file.write(b"x")
        return 0

    assert as_nobody(write) == 0
    assert stat.S_IMODE((plain_mount.files / "f").stat().st_mode) == 0o777
    assert stat.S_IMODE(path.stat().st_mode) == 0o777


def test_an_unprivileged_user(plain_mount: PlainMount) -> None:
    secret = plain_mount.dir / "secret"
    secret.write_text("root's")
    secret.chmod(0o600)
    shared = plain_mount.dir / "shared"
    shared.write_text("everybody's")
    shared.chmod(0o644)

    def code() -> int:
        assert errno_of(lambda: secret.open()) == errno.EACCES
        assert shared.read_text() == "everybody's"
        assert errno_of(lambda: shared.open("a")) == errno.EACCES
        assert errno_of(lambda: shared.chmod(0o666)) == errno.EPERM
        assert errno_of(lambda: os.chown(shared, NOBODY, NOBODY)) == errno.EPERM
        os.umask(0o027)
        mine = plain_mount.dir / "mine"
        mine.write_text("mine")
        found = mine.stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (NOBODY, NOBODY, 0o640)
        mine.chmod(0o600)
        mine.rename(plain_mount.dir / "mine2")
        (plain_mount.dir / "mine2").unlink()
        return 0

    assert as_nobody(code) == 0


def test_what_is_not_supported_says_so(plain_mount: PlainMount) -> None:
    root = plain_mount.dir
    (root / "f").touch()
    assert errno_of(lambda: (root / "d").mkdir()) == errno.EPERM
    assert errno_of(lambda: (root / "l").symlink_to("f")) == errno.EPERM
    assert errno_of(lambda: os.link(root / "f", root / "l")) == errno.EPERM
    assert errno_of(lambda: os.mkfifo(root / "p")) == errno.EPERM
    assert errno_of(lambda: os.setxattr(root / "f", "user.x", b"y")) == errno.EOPNOTSUPP
    assert errno_of(lambda: (root / ("n" * 256)).touch()) == errno.ENAMETOOLONG
    assert errno_of(lambda: (root / ".lag").open("r+b")) in (errno.EACCES, errno.EPERM)
    assert errno_of(lambda: (root / ".lag").unlink()) == errno.EPERM
    assert errno_of(lambda: (root / ".primary").touch()) == errno.EPERM
    (root / "g").touch()  # CREATE still works after all that
    assert (root / "g").exists()


def test_names_that_are_not_utf8(plain_mount: PlainMount) -> None:
    name = os.fsencode(plain_mount.dir) + b"/caf\xe9 \n"
    with open(name, "wb") as file:
        file.write(b"x")
    assert b"caf\xe9 \n" in os.listdir(os.fsencode(plain_mount.dir))
    os.unlink(name)


def test_a_long_listing(plain_mount: PlainMount) -> None:
    names = {f"file-{index:04}" for index in range(700)}
    for name in names:
        (plain_mount.files / name).touch()
    assert set(os.listdir(plain_mount.dir)) - {".lag"} == names
    for name in list(names)[::2]:
        (plain_mount.dir / name).unlink()
        names.discard(name)
    assert set(os.listdir(plain_mount.dir)) - {".lag"} == names


def test_statfs(plain_mount: PlainMount) -> None:
    shown, real = os.statvfs(plain_mount.dir), os.statvfs(plain_mount.data)
    assert (shown.f_blocks, shown.f_frsize, shown.f_namemax) == (real.f_blocks, real.f_frsize, 255)


def test_virtual_files(plain_mount: PlainMount) -> None:
    database = plain_mount.dir / "a.db"
    position = plain_mount.dir / "a.db-pos"
    assert not position.exists()
    database.touch()
    first, second = position.read_bytes(), position.read_bytes()
    assert len(first) == 34 and first != second
    assert position.stat().st_size == 34
    with position.open("rb", buffering=0) as file:
        a = file.read(100)
        file.seek(0)
        assert file.read(100) != a
    database.unlink()
    assert not position.exists()


SHARED_COUNTER = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
for _ in range(200):
    fcntl.lockf(fd, fcntl.LOCK_EX)
    value = int(os.pread(fd, 20, 0) or b"0")
    os.pwrite(fd, b"%d" % (value + 1), 0)
    fcntl.lockf(fd, fcntl.LOCK_UN)
"""


def test_many_processes_with_locks(plain_mount: PlainMount) -> None:
    path = plain_mount.dir / "counter"
    path.write_bytes(b"0")
    children = [subprocess.Popen([sys.executable, "-c", SHARED_COUNTER, str(path)]) for _ in range(4)]
    assert [child.wait(60) for child in children] == [0] * 4
    assert path.read_bytes() == b"800"


MAP = """
import mmap, os, sys
with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 0) as map:
    assert map[:5] == b"hello", map[:5]
    map[100000:100006] = b"mapped"
    map.flush()
    os.pwrite(file.fileno(), b"HELLO", 0)
    assert map[:5] == b"HELLO", map[:5]
"""


def test_shared_mappings(plain_mount: PlainMount) -> None:
    path = plain_mount.dir / "mapped"
    path.write_bytes(b"hello".ljust(200_000, b"\0"))
    subprocess.run([sys.executable, "-c", MAP, str(path)], check=True, timeout=60)
    data = (plain_mount.files / "mapped").read_bytes()
    assert data[:5] == b"HELLO" and data[100_000:100_006] == b"mapped"


def test_fallocate_and_fsync(plain_mount: PlainMount) -> None:
    with (plain_mount.dir / "f").open("w+b") as file:
        os.posix_fallocate(file.fileno(), 0, 100_000)
        assert os.fstat(file.fileno()).st_size == 100_000
        os.fsync(file.fileno())
        os.fdatasync(file.fileno())
    directory = os.open(plain_mount.dir, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


@pytest.mark.parametrize("command", [["cp", "-a"], ["rsync", "-a"], ["tar"]])
def test_copying_tools(plain_mount: PlainMount, tmp_path: Path, command: list[str]) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    source = tmp_path / "source"
    source.mkdir()
    for index in range(5):
        (source / f"f{index}").write_bytes(os.urandom(100_000 * index))
        os.utime(source / f"f{index}", ns=(10**18 + index, 10**18 + index))
    if command[0] == "tar":
        packed = subprocess.run(["tar", "-C", source, "-c", "."], check=True, capture_output=True, timeout=60).stdout
        subprocess.run(["tar", "-C", plain_mount.dir, "-x"], input=packed, check=True, timeout=60)
    elif command[0] == "cp":
        subprocess.run([*command, *source.iterdir(), plain_mount.dir], check=True, timeout=60)
    else:
        subprocess.run([*command, f"{source}/", f"{plain_mount.dir}/"], check=True, timeout=60)
    for file in source.iterdir():
        copy = plain_mount.dir / file.name
        assert copy.read_bytes() == file.read_bytes()
        assert int(copy.stat().st_mtime) == int(file.stat().st_mtime)
