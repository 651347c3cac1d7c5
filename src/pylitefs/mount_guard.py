"""Ends what a killed daemon has left: python -I -S mount_guard.py DAEMON_PID MOUNT_DIR [DATA_DIR [retire]]

A process that is killed while one of its threads waits for an answer from its own mount cannot end: the thread waits
for the FUSE connection, the connection for the last descriptor of /dev/fuse, the descriptor for the thread. All that
use the mount hang with it. And the kernel goes on to pass writes through: a process that has a database open in WAL
mode could commit into files that nobody replicates any more. This little program waits beside the daemon; the kernel
signals it when the daemon's main thread dies (PR_SET_PDEATHSIG). Then, in this order:

1. With `retire` (where another node takes over) it locks writers out: each wal-index gets a version that SQLite does
   not know ("unable to open database file"). A commit that is just being made writes the right one back, so that is
   done again until it stays.
2. It has the kernel forget the cached pages of database files. In a rollback mode SQLite asks with stat(2) whether a
   journal or a WAL stands beside a database, and takes any error for "no" (unixAccess of os_unix.c): with the
   connection's end it would read the bare file, with half of a transaction or an old state of a replica. So no page
   of it may be left to read. Until the connection ends, nobody gets an error: requests wait. That is why the guard has
   a second descriptor of /dev/fuse, which keeps the connection alive until here.
3. It ends the connection, so that everybody gets an error and can go on: it writes to the connection's `abort` in
   fusectl, which its owner may do, where that is mounted; as root it asks for an unmount by force of a mount that is
   in use, which aborts only; else it answers in the daemon's place, with an error, until the daemon's threads are
   gone. (The descriptor lies in the socket that is its standard input until then.) A request that the daemon had read
   is known to nobody, but requests have numbers: those before the newest are all answered.

4. It has the kernel let go of the files that passed through: a connection keeps them, also when nobody has them open
   any more, until its last mount has gone, and another mount namespace (a container, a service of systemd) may have
   one of its own that nobody takes away. To the next daemon they would be in use for as long.

The mount stays, dead, until the next start or `litefs clean-up` takes it away. In the bare directory below it an
application would make a new database, which nobody replicates and which keeps the next litefs from mounting.

It is often killed itself a moment later (systemd, KillMode=mixed; the end of a container). So writers are locked out at
once, with nothing to be loaded or waited for. `litefs clean-up` and the next start do what it did not come to.

Once it has mounted, the daemon also tells which mount it is: the path alone may by then show that of its successor.
Whoever has DATA_DIR/lock is the successor, unless the daemon itself still lives: then nothing here is ours any more.

It imports nothing of the package and little of the standard library: it runs as long as the node.
"""

import ctypes
import errno
import fcntl
import os
import select
import signal
import socket
import struct
import sys
import time

PR_SET_PDEATHSIG = 1
MNT_FORCE = 1
DIED = signal.SIGUSR1
RETIRE = "retire"
ANSWER_S = 10.0
_LOOK_MS = 20
_BUFFER_SIZE = 1 << 20  # for any request: a smaller buffer is refused
_INTERRUPT = 36
_NO_REPLY = frozenset({2, 42})  # FORGET, BATCH_FORGET
_STEP = 2  # from one request's number to the next
_WAL_INDEX_VERSION, _RETIRED = 3007000, 1
_HEADER_SIZE = 48  # of a wal-index; it is there twice
_RETIRE_S, _STAYS_S, _PAUSE_S = 2.0, 0.1, 0.001
_OLDER_MAX = 1_000_000  # requests; about a second
_INVAL_INODE = 2  # FUSE_NOTIFY_INVAL_INODE
_THREADS_S, _FORGET_S = 0.1, 1.0
_BACKING_OPEN, _BACKING_CLOSE = 0x4010E501, 0x4004E502  # ioctls of /dev/fuse, FUSE_DEV_IOC_BACKING_...
_BACKING_MAX = 10_000_000


def main(daemon_pid: int, mount_dir: str, data_dir: str = "", what: str = "") -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)  # the daemon gets these, and ends us when it is done
    signal.pthread_sigmask(signal.SIG_BLOCK, {DIED})
    databases = open_databases(data_dir) if what == RETIRE else -1
    lock = open_lock(data_dir) if data_dir else -1
    libc.prctl(PR_SET_PDEATHSIG, DIED)
    if os.getppid() == daemon_pid:
        print("ready", flush=True)
        signal.sigwait({DIED})
    if lock >= 0 and is_followed(lock, daemon_pid):
        return
    indexes = open_indexes(databases) if databases >= 0 else []
    retire_once(indexes)
    end(libc, mount_dir, daemon_pid, indexes, lock)


def open_databases(data_dir: str) -> int:
    """The folder of all databases; -1 if there is none."""
    try:
        return os.open(os.path.join(data_dir, "dbs"), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return -1


def open_lock(data_dir: str) -> int:
    """The file that a daemon holds locked as long as it has the data directory; -1 if there is none."""
    try:
        return os.open(os.path.join(data_dir, "lock"), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return -1


def is_followed(lock: int, daemon_pid: int) -> bool:
    """Whether another daemon has the data directory by now. If not, and the lock could be had, none can have it before
    this process ends."""
    for _ in range(2):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
        except OSError:
            if lives(daemon_pid):
                return False
    return True


def open_indexes(databases: int) -> list[int]:
    """The wal-index of every database in the folder `databases`."""
    found = []
    try:
        names = os.listdir(databases)
    except OSError:
        return []
    for name in names:
        try:
            found.append(os.open(f"{name}/shm", os.O_RDWR | os.O_CLOEXEC, dir_fd=databases))
        except OSError:
            continue
    return found


def retire(indexes: list[int]) -> None:
    """Until it stays."""
    until = time.monotonic() + _RETIRE_S
    stays_since = time.monotonic()
    while indexes and stays_since + _STAYS_S > time.monotonic() < until:
        if retire_once(indexes):
            stays_since = time.monotonic()
        time.sleep(_PAUSE_S)


def retire_once(indexes: list[int]) -> int:
    """How many there were to retire. Those that cannot be read are taken from the list."""
    count = 0
    for fd in list(indexes):
        try:
            header = os.pread(fd, _HEADER_SIZE, 0)
            if len(header) == _HEADER_SIZE and struct.unpack_from("=I", header)[0] == _WAL_INDEX_VERSION:
                retired = retired_header(header)
                os.pwrite(fd, retired, _HEADER_SIZE)
                os.pwrite(fd, retired, 0)
                count += 1
        except OSError:  # a disk that fails: the mount has to go all the same
            indexes.remove(fd)
    return count


def retired_header(header: bytes) -> bytes:
    """With a checksum that is right (walChecksumBytes of wal.c, in the machine's byte order): where it is not, SQLite
    makes the header anew."""
    body = struct.pack("=I", _RETIRED) + header[4:40]
    s0 = s1 = 0
    for first, second in struct.iter_unpack("=II", body):
        s0 = (s0 + first + s1) & 0xFFFFFFFF
        s1 = (s1 + second + s0) & 0xFFFFFFFF
    return body + struct.pack("=II", s0, s1)


def end(libc: ctypes.CDLL, mount_dir: str, daemon_pid: int, indexes: list[int], lock: int) -> None:
    """Abort the connection of the mount; the mount stays, dead. `indexes`: those that were retired. `lock`: any file of
    the data directory, or -1."""
    device = device_of(mount_dir)
    told, fds = told_by_daemon()
    if device is None or told not in ("", device):
        retire(indexes)
        return
    forget_pages(fds, daemon_pid, indexes)
    aborted = cut(libc, mount_dir, device)
    release_files(fds, lock)
    retire(indexes)
    if not aborted:
        answer_for(daemon_pid, mount_dir, fds)


def forget_pages(fds: list[int], daemon_pid: int, indexes: list[int]) -> None:
    """Of the cached databases, when none of the daemon's threads answers any more. `fds`: /dev/fuse, and the list of
    inode numbers. `indexes`: those that were retired, and stay so.

    In another process, because the kernel lets it wait for a page that is just being read, of which nobody tells it
    any more. Then the connection ends first, and the rest is forgotten right after."""
    if len(fds) < 2:
        return
    until = time.monotonic() + _THREADS_S
    while lives(daemon_pid) and time.monotonic() < until:
        retire_once(indexes)
        time.sleep(_PAUSE_S)
    device, cached = fds
    pid = os.fork()
    if pid == 0:
        try:
            for (inode,) in struct.iter_unpack("=Q", os.pread(cached, os.fstat(cached).st_size & ~7, 0)):
                try:
                    os.write(device, struct.pack("=IiQQqq", 40, _INVAL_INODE, 0, inode, 0, 0))
                except OSError:
                    pass  # the kernel knows it no more
        finally:
            os._exit(0)
    until = time.monotonic() + _FORGET_S
    while os.waitpid(pid, os.WNOHANG) == (0, 0) and time.monotonic() < until:
        retire_once(indexes)
        time.sleep(_PAUSE_S)


def release_files(fds: list[int], file: int) -> None:
    """Those that the kernel keeps to pass them through. They have numbers in a row, so the next one tells how many
    there may be; `file` is registered to get that. Nothing where this process may not pass files through."""
    if not fds or file < 0:
        return
    try:
        last = fcntl.ioctl(fds[0], _BACKING_OPEN, bytearray(struct.pack("=iIQ", file, 0, 0)), True)
    except OSError:
        return
    for number in range(last, max(0, last - _BACKING_MAX), -1):
        try:
            fcntl.ioctl(fds[0], _BACKING_CLOSE, struct.pack("=I", number))
        except OSError:
            pass  # it was closed long ago


def device_of(mount_dir: str) -> str | None:
    """The device number, as "major:minor", of our mount that one sees at `mount_dir`; None if there is none."""
    for char in "\\ \t\n":
        mount_dir = mount_dir.replace(char, f"\\{ord(char):03o}")
    device = None
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for line in file:
            fields = line.split(" ")
            if fields[4] == mount_dir:
                device = fields[2] if fields[fields.index("-", 6) + 2] == "litefs" else None
    return device


def told_by_daemon() -> tuple[str, list[int]]:
    """Its mount's device number, and descriptors of /dev/fuse and of the list of cached databases; nothing if it died
    before it had a mount."""
    try:
        channel = socket.socket(fileno=os.dup(0))
        channel.setblocking(False)  # recv_fds of the standard library ignores its flags: MSG_DONTWAIT would wait
        text, fds, _, _ = socket.recv_fds(channel, 64, 2)
    except OSError:
        return "", []
    return text.decode("ascii"), list(fds)


def cut(libc: ctypes.CDLL, mount_dir: str, device: str) -> bool:
    """End the connection of the mount at `mount_dir` and leave the mount; False if this process may not."""
    if abort(device):
        return True
    try:
        hold = os.open(mount_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)  # in use, it is aborted, not taken away
    except OSError:
        return False
    try:
        return libc.umount2(os.fsencode(mount_dir), MNT_FORCE) == 0 or ctypes.get_errno() == errno.EBUSY
    finally:
        os.close(hold)


def abort(device: str) -> bool:
    try:
        with open(f"/sys/fs/fuse/connections/{device.partition(':')[2]}/abort", "w") as file:
            file.write("1")
        return True
    except OSError:
        return False


def answer_for(daemon_pid: int, mount_dir: str, fds: list[int]) -> None:
    """Fail all requests that the daemon has not answered and those that come, until none of its threads is left."""
    if not fds:
        return
    device = fds[0]
    poll = select.poll()
    poll.register(device, select.POLLIN)
    asked, newest = False, 0
    deadline = time.monotonic() + ANSWER_S
    while lives(daemon_pid) and time.monotonic() < deadline:
        if not poll.poll(_LOOK_MS):
            if not asked:
                asked = True
                ask(device, mount_dir)
            continue
        try:
            opcode, unique = struct.unpack_from("=4xIQ", os.read(device, _BUFFER_SIZE))
        except OSError as error:
            if error.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                continue
            break  # the connection has ended
        if opcode == _INTERRUPT:
            fail(device, unique & ~1)  # the request that it concerns
            continue
        if opcode not in _NO_REPLY:
            fail(device, unique)
        if not newest:
            newest = unique
            for older in range(newest - _STEP, max(0, newest - _STEP * _OLDER_MAX), -_STEP):
                fail(device, older)
    os.close(device)


def ask(device: int, mount_dir: str) -> None:
    """Send the mount a request, from another process, so that there is a newest one."""
    if os.fork() == 0:
        try:
            os.close(device)
            os.statvfs(mount_dir)
        finally:
            os._exit(0)


def fail(device: int, unique: int) -> None:
    try:
        os.write(device, struct.pack("=IiQ", 16, -errno.ECONNABORTED, unique))
    except OSError:
        pass  # it was answered before


def lives(pid: int) -> bool:
    """Whether the process has a thread that has not ended."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return False
    return any(state_of(pid, thread) not in b"ZX" for thread in threads)


def state_of(pid: int, thread: str) -> bytes:
    """The letter of proc(5), Z for a thread that has ended meanwhile."""
    try:
        with open(f"/proc/{pid}/task/{thread}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0]
    except OSError:
        return b"Z"


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:5])
