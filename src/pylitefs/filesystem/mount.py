"""Putting the mount into the namespace and taking it out again.

As root: mount(2). Otherwise the setuid helper fusermount3, which mounts for us and sends the descriptor of /dev/fuse
over a socket (SCM_RIGHTS). A mount whose daemon was killed answers ENOTCONN; `prepare` takes such a mount away if it
is ours (source "litefs" in /proc/self/mountinfo) and refuses to touch anything else.

Errors are `MountError`, one line each.
"""

from __future__ import annotations

import array
import ctypes
import errno
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pylitefs.errors import MountError
from pylitefs.formats.names import shown

FSNAME = "litefs"
COVER = "litefs-cover"
DEVICE = "/dev/fuse"
FUSECTL = "/sys/fs/fuse/connections"
HELPER = "fusermount3"
PROBE_TIMEOUT_S = 2.0
HELPER_TIMEOUT_S = 20.0
BUSY_RETRIES = 10
BUSY_PAUSE_S = 0.05
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MNT_FORCE, MNT_DETACH = 1, 2
_NAMES_SHOWN = 5
_STACKED_MAX = 32  # mounts of killed daemons on top of each other

_MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT = 429, 430, 431, 432  # the same on every machine

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]


@dataclass(frozen=True)
class MountEntry:
    """A line of /proc/self/mountinfo. `device` is st_dev as "major:minor"."""

    device: str
    path: str
    fs_type: str
    source: str

    @property
    def ours(self) -> bool:
        return self.fs_type.split(".")[0] == "fuse" and self.source == FSNAME


def parse_mountinfo(text: str) -> list[MountEntry]:
    """The mounts of /proc/<pid>/mountinfo, oldest first (proc(5)); lines that are not understood are left out."""
    entries = []
    for line in text.split("\n"):  # and at nothing else: names may hold any other character
        fields = line.split(" ")
        if "-" not in fields[6:] or len(fields) < 10:
            continue
        tail = fields[fields.index("-", 6) + 1 :]
        if len(tail) >= 2:
            entries.append(MountEntry(fields[2], _unescape(fields[4]), tail[0], _unescape(tail[1])))
    return entries


def _unescape(field: str) -> str:
    """Spaces, tabs, newlines and backslashes stand in mountinfo as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _mounts() -> list[MountEntry]:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        return parse_mountinfo(file.read())


def mount_at(path: str) -> MountEntry | None:
    """The mount that one sees at `path` (a real path), if a filesystem is mounted right there."""
    found = [entry for entry in _mounts() if entry.path == path]
    return found[-1] if found else None


def fs_type_of(path: str) -> str:
    """Type of the filesystem a path lies on, "" if it cannot be told."""
    return _mount_of(path).fs_type


def is_inside(path: str) -> bool:
    """Whether a path lies in a mounted directory of litefs."""
    return _mount_of(path).ours


def _mount_of(path: str) -> MountEntry:
    real = os.path.realpath(path)
    best = MountEntry("", "", "", "")
    for entry in _mounts():
        inside = real == entry.path or real.startswith(entry.path.rstrip("/") + "/")
        if inside and len(entry.path) >= len(best.path):
            best = entry
    return best


def prepare(mount_dir: str, log: Callable[[str], None]) -> str:
    """Make `mount_dir` ready to be mounted on: made if missing, stale mounts of ours taken away.

    Returns its real path. MountError if it is no directory, not empty, or in use by a live daemon.
    """
    path, _ = find_dead(mount_dir, log)
    try:
        os.makedirs(path, exist_ok=True)
    except FileExistsError:
        raise MountError(f"mount point {mount_dir} is not a directory: choose another fuse.dir") from None
    except OSError as error:
        raise MountError(f"mount point {mount_dir} cannot be created: {error.strerror}") from error
    try:
        found = os.listdir(path)
    except OSError as error:
        raise MountError(f"mount point {mount_dir} cannot be read: {error.strerror}") from error
    if found:
        raise not_empty(mount_dir, found)
    return path


def not_empty(mount_dir: str, found: Iterable[str]) -> MountError:
    """It says what is there: an application that went on while litefs was stopped has perhaps made a database of its
    own, and whoever just removes that removes the only copy of what it committed."""
    names = sorted(map(shown, found))
    listed = ", ".join(names[:_NAMES_SHOWN]) + (", …" if len(names) > _NAMES_SHOWN else "")
    return MountError(
        f"mount point {mount_dir} is not empty: move its files away or choose another fuse.dir. Made there while "
        f"nothing was mounted, and so on no other node (what a database holds has to be merged by hand): {listed}"
    )


def take_away_dead(mount_dir: str, log: Callable[[str], None]) -> str:
    """Take mounts of killed daemons away from `mount_dir`; its real path. MountError if one cannot be removed, or a
    live daemon uses it."""
    return find_dead(mount_dir, log, covers=False)[0]


def find_dead(mount_dir: str, log: Callable[[str], None], *, covers: bool = True) -> tuple[str, bool]:
    """`take_away_dead`, and whether there was one. `covers`: with a cover (see there) in its place, which stays."""
    parent, name = os.path.split(os.path.abspath(mount_dir))
    path = os.path.join(os.path.realpath(parent), name)
    if os.path.islink(path):
        path = os.path.realpath(path)
    found = False
    for _ in range(_STACKED_MAX):
        entry = mount_at(path)
        if entry is None or (covers and entry.source == COVER) or not _clean(path, entry, log, covers=covers):
            break
        found = True
    return path, found


def cover(path: str, *, beneath: bool = False) -> bool:
    """Mount a small read-only file system at `path`, for the time after a dead mount; ours is mounted on top of it. In
    the bare directory an application that tries again would make a new database, which nobody replicates and which
    keeps the node from mounting. `beneath`: below the mount that is there still, so that there is no moment between
    (Linux 6.5). False if that cannot be done: not as root, not here, or the directory has something in it already."""
    if os.geteuid() != 0:
        return False
    fds: list[int] = []
    try:
        fds.append(os.open(path, (os.O_PATH if beneath else os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC))
        fds.append(_syscall(_FSOPEN, b"tmpfs", 1))
        for key, value in (b"source", COVER.encode()), (b"size", b"4k"), (b"mode", b"555"):
            _syscall(_FSCONFIG, fds[1], 1, key, value, 0)
        _syscall(_FSCONFIG, fds[1], 6, None, None, 0)
        fds.append(_syscall(_FSMOUNT, fds[1], 1, MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC))
        _syscall(_MOVE_MOUNT, fds[2], b"", -100, os.fsencode(path), 0x4 | (0x200 if beneath else 0))
        if beneath or not os.listdir(fds[0]):
            return True
        detach(path)
        return False
    except OSError:
        return False
    finally:
        for fd in fds:
            os.close(fd)


def _syscall(number: int, *args: object) -> int:
    """One of mount_setattr(2)'s family, which the C library may not have yet. Raises OSError."""
    result = int(_libc.syscall(ctypes.c_long(number), *args))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def uncover(mount_dir: str) -> None:
    """If it is covered still."""
    path = os.path.realpath(mount_dir)
    while (entry := mount_at(path)) is not None and entry.source == COVER and detach(path):
        pass


def put_away(mount_dir: str, folder: str, *, everything: bool) -> list[str]:
    """Move what an application may have left where nothing was mounted to `folder`: a -wal, -shm or -journal without
    its database. SQLite makes them by name, also when the mount has gone since it opened the database, and they would
    be in the way of the next mount. Returns the new paths; nothing is moved where there is anything else, but with
    `everything`, for a directory that was below a mount until just now. OSError."""
    path = os.path.realpath(mount_dir)
    if not os.path.isdir(path) or mount_at(path) is not None:
        return []
    names = sorted(os.listdir(path))
    sides = all(name.endswith(("-wal", "-shm", "-journal")) and os.path.isfile(f"{path}/{name}") for name in names)
    if not sides and not everything:
        return []
    moved = []
    for name in names:
        os.makedirs(folder, exist_ok=True)
        moved.append(shutil.move(os.path.join(path, name), os.path.join(folder, name)))
    return moved


def _clean(path: str, entry: MountEntry, log: Callable[[str], None], *, covers: bool) -> bool:
    """Take away the mount at `path` if its daemon is dead. True if it was, and there may be another below."""
    if entry.source == COVER:
        return detach(path)
    if not entry.fs_type.startswith("fuse"):
        return False
    alive = _alive(path)
    if not entry.ours:
        if alive:
            return False
        raise MountError(f'mount point {path} is a dead mount of "{entry.source}": unmount it with: umount -l {path}')
    if alive:
        raise MountError(f"mount point {path} is in use by a running litefs: stop it or choose another fuse.dir")
    if covers and not any(other.path == path and other.source == COVER for other in _mounts()):  # else it is there
        cover(path, beneath=True)
    if not detach(path):
        raise MountError(f"the mount of a killed litefs at {path} cannot be removed: run umount -l {path}")
    log(f"removed the mount of a killed litefs at {path}")
    return True


def _alive(path: str) -> bool:
    """Whether somebody answers for the mount at `path`; a daemon that hangs counts as alive.

    statvfs is the question that the kernel never answers from its caches.
    """
    dead = threading.Event()

    def ask() -> None:
        try:
            os.statvfs(path)
        except OSError as error:
            if error.errno in (errno.ENOTCONN, errno.ECONNABORTED, errno.ENODEV):
                dead.set()

    probe = threading.Thread(target=ask, name="fuse-probe", daemon=True)
    probe.start()
    probe.join(PROBE_TIMEOUT_S)
    return not dead.is_set()


def mount(path: str, *, allow_other: bool, max_read: int) -> int:
    """Mount at `path` (from `prepare`). The descriptor of /dev/fuse, on which the kernel's INIT waits."""
    options = ["default_permissions", f"max_read={max_read}"] + ["allow_other"] * allow_other
    if os.geteuid() == 0:
        return _mount_directly(path, options)
    if shutil.which(HELPER) is None:
        raise MountError(f"only root may mount without {HELPER}: run litefs as root or install the package fuse3")
    return mount_by_helper(path, options)


def _open_device() -> int:
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise MountError(
            f"{DEVICE} is missing: load the kernel module fuse (modprobe fuse), or give the container --device {DEVICE}"
        ) from None
    except PermissionError as error:
        hint = f"let its users open it (chmod 666 {DEVICE}), or run litefs as root"
        raise MountError(f"{DEVICE} cannot be opened: {error.strerror}: {hint}") from error
    except OSError as error:
        raise MountError(f"{DEVICE} cannot be opened: {error.strerror}") from error


def _mount_directly(path: str, options: list[str]) -> int:
    fd = _open_device()
    data = ",".join([f"fd={fd}", "rootmode=40000", f"user_id={os.getuid()}", f"group_id={os.getgid()}", *options])
    if _libc.mount(FSNAME.encode(), os.fsencode(path), b"fuse", MS_NOSUID | MS_NODEV, data.encode()) == 0:
        return fd
    code = ctypes.get_errno()
    os.close(fd)
    if code == errno.EPERM:
        raise MountError(f"mounting at {path} is not permitted: in a container give it --cap-add SYS_ADMIN")
    raise MountError(f"mounting at {path} failed: {os.strerror(code)}")


def mount_by_helper(path: str, options: list[str]) -> int:
    """Mount through fusermount3 (mount.fuse3(8)): it finds one end of a socket in _FUSE_COMMFD and sends the
    descriptor of /dev/fuse through it."""
    os.close(_open_device())  # the helper opens it with our rights, and says less
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        command = [HELPER, "-o", ",".join([f"fsname={FSNAME}", *options]), "--", path]
        try:
            done = subprocess.run(
                command, env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())}, pass_fds=[theirs.fileno()],
                capture_output=True, timeout=HELPER_TIMEOUT_S, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise MountError(f"{HELPER} failed: {error}") from error
        if done.returncode != 0:
            said = " ".join(done.stderr.decode(errors="replace").split()) or f"exit status {done.returncode}"
            raise MountError(f"mounting at {path} failed: {said}")
        ours.settimeout(HELPER_TIMEOUT_S)
        return _receive_fd(ours)


def _receive_fd(channel: socket.socket) -> int:
    fds = array.array("i")
    try:
        _, control, _, _ = channel.recvmsg(1, socket.CMSG_LEN(fds.itemsize))
    except OSError as error:
        raise MountError(f"{HELPER} sent no descriptor: {error}") from error
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS and len(data) >= fds.itemsize:
            fds.frombytes(data[: fds.itemsize])
            os.set_inheritable(fds[0], False)
            return fds[0]
    raise MountError(f"{HELPER} sent no descriptor")


def can_abort() -> bool:
    """Whether the connection of a killed daemon can be ended from outside, so that nobody has to answer for it (see
    `pylitefs.mount_guard`)."""
    return os.geteuid() == 0 or fs_type_of(FUSECTL) == "fusectl"


def _umount(path: str, *, lazy: bool) -> int:
    """0 or an errno."""
    if os.geteuid() == 0:
        result = _libc.umount2(os.fsencode(path), MNT_DETACH if lazy else 0)
        return ctypes.get_errno() if result else 0
    try:
        done = subprocess.run(
            [HELPER, "-u", *(["-z"] if lazy else []), "--", path],
            capture_output=True, timeout=HELPER_TIMEOUT_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return errno.EIO
    return errno.EBUSY if done.returncode else 0


def detach(path: str) -> bool:
    """Take the mount at `path` out of the namespace at once, even if files on it are open."""
    return _umount(path, lazy=True) == 0


def end(path: str, device: str) -> bool:
    """End the connection of our mount at `path`, whose files are in use, and take it out of the namespace. Every
    request that waits, or comes later, fails. `device`: the mount's MountEntry.device. False if the connection may
    live on: only root may end it, or who finds fusectl mounted."""
    if os.geteuid() == 0:
        if _libc.umount2(os.fsencode(path), MNT_FORCE | MNT_DETACH) == 0:
            return True
        detach(path)
        return False
    detach(path)
    try:
        with open(os.path.join(FUSECTL, device.partition(":")[2], "abort"), "w") as file:
            file.write("1")
    except OSError:
        return False
    return True


def unmount(path: str, device: str) -> bool:
    """Unmount our mount at `path` if it is still there (`device`: its MountEntry.device), waiting a moment for files
    to be closed. False if it is busy: then `end`."""
    for attempt in range(BUSY_RETRIES):
        entry = mount_at(path)
        if entry is None or entry.device != device:
            return True
        if _umount(path, lazy=False) == 0:
            return True
        if attempt < BUSY_RETRIES - 1:
            time.sleep(BUSY_PAUSE_S)
    return False
