"""Requests about an open or known file: OPEN to RELEASE, data, attributes.

GETATTR, OPEN, FSYNC and RELEASE are what a database in WAL mode still asks us (reads, writes and locks stay in the
kernel), so they take the shortest way: one unpack, dictionary look-ups, the system call, one pack.
"""

from __future__ import annotations

import ctypes
import os
import stat
import threading
from collections import deque
from collections.abc import Callable
from errno import EACCES, EBADF, EINTR, EOPNOTSUPP, EPERM, ESTALE

from pylitefs.filesystem.dying import Answerable
from pylitefs.filesystem.handles import Handle
from pylitefs.filesystem.openers import is_interrupted, is_open_anywhere
from pylitefs.filesystem.tree import Node
from pylitefs.filesystem.volume import FOREVER_S, Request, Volume
from pylitefs.formats.fuse import abi, replies, requests
from pylitefs.ports import FileKind, LockOpening, Then

_FALLOCATE_MODES = (0, 1)  # extend; 1: FALLOC_FL_KEEP_SIZE
WRITING = os.O_WRONLY | os.O_RDWR
_VIRTUAL_FLAGS = abi.FOPEN_DIRECT_IO | abi.FOPEN_NOFLUSH
_SETID = stat.S_ISUID | stat.S_ISGID
_OWNER = abi.FATTR_UID | abi.FATTR_GID
_INTERRUPTS = 64
_TIMES = abi.FATTR_ATIME | abi.FATTR_MTIME
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

Handler = Callable[[Request], bytes | None]


class _Waiting:
    """An open of a lock file that is under way. What is to happen to its `LockOpening` may come up before there is one:
    the engine may answer before it has returned it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._opening: LockOpening | None = None
        self._then: list[Callable[[], object]] = []

    def set(self, opening: LockOpening) -> None:
        with self._lock:
            self._opening = opening
            then, self._then = self._then, []
        for call in then:
            call()

    def when_open(self, call: Callable[[], object]) -> None:
        with self._lock:
            if self._opening is None:
                self._then.append(call)
                return
        call()

    def opening(self) -> LockOpening:
        assert self._opening is not None
        return self._opening

    def cancel(self) -> None:
        self.opening().cancel()


class _NoOpening:
    """Of an open that was interrupted before it began."""

    def cancel(self) -> None: ...

    def flush(self, last: bool, then: Then) -> None:
        then(None)

    def release(self) -> None: ...


_NO_OPENING = _NoOpening()


class FileRequests:
    """Handlers by opcode in `table`."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._patience = volume.patience
        self._hooks = volume.hooks
        self._handles = volume.handles
        self._open = volume.handles.open
        self._nodes = volume.tree.nodes
        self._waiting: dict[int, _Waiting] = {}  # opens of lock files, by the number of their request
        self._waiting_lock = threading.Lock()
        self._interrupted: deque[int] = deque(maxlen=_INTERRUPTS)  # of requests that have not come yet, or do not wait
        self.table: dict[int, Handler] = {
            abi.OPEN: self._open_file,
            abi.READ: self._read,
            abi.WRITE: self._write,
            abi.FSYNC: self._fsync,
            abi.FLUSH: self._flush,
            abi.INTERRUPT: self._interrupt,
            abi.RELEASE: self._release,
            abi.GETATTR: self._getattr,
            abi.SETATTR: self._setattr,
            abi.FALLOCATE: self._fallocate,
            abi.STATFS: self._statfs,
        }

    def _handle(self, fh: int) -> Handle:
        handle = self._open.get(fh)
        if handle is None:
            raise OSError(EBADF, "no such handle")
        return handle

    # -- opening and closing

    def _open_file(self, rq: Request) -> bytes | None:
        volume = self._volume
        node = volume.node(rq.nodeid)
        flags = requests.parse_open(rq.data)
        writable = flags & WRITING != 0
        if node.virtual:
            if writable and node.ref.kind is FileKind.LOCK:
                self._open_lock(rq, node)
                return None
            if writable:
                raise OSError(EACCES, f"{node.name} is read-only")
            return replies.pack_open(self._handles.open_virtual(node), _VIRTUAL_FLAGS)
        by_daemon = volume.by_daemon(rq.pid)
        unique = rq.unique

        def act() -> None:
            if node.moved:
                raise OSError(ESTALE, "the file has another name")
            opened = self.open_handle(node, writable, by_daemon, rq.pid)
            self._open[opened[0]].write_only = flags & os.O_WRONLY != 0 and not by_daemon
            if not volume.answers.sink.reply(unique, replies.pack_open(*opened)):
                self._handles.release(opened[0])

        self._hooks.may_open(volume.ref(node), flags, by_daemon, volume.after(rq, act))
        return None

    def _open_lock(self, rq: Request, node: Node) -> None:
        """It may take long, and the caller can be interrupted meanwhile."""
        unique, answers, unseen = rq.unique, self._volume.answers, not rq.pid
        waiting = _Waiting()
        with self._waiting_lock:
            self._waiting[unique] = waiting
            interrupted = unique in self._interrupted or is_interrupted(rq.pid)

        def act() -> None:
            fh = self._handles.open_virtual(node, waiting.opening(), unseen=unseen)
            if not answers.sink.reply(unique, replies.pack_open(fh, abi.FOPEN_DIRECT_IO)):
                self._handles.release(fh)

        answer = self._volume.after(rq, act)

        def then(error: BaseException | None) -> None:
            self._waiting.pop(unique, None)
            waiting.when_open(lambda: answer(error))

        if interrupted:
            then(InterruptedError(EINTR, "interrupted"))
            waiting.set(_NO_OPENING)
        else:
            waiting.set(self._hooks.open_lock(node.ref, then))

    def _interrupt(self, rq: Request) -> None:
        """Only what can be given up halfway heeds it, see also `dying`. There is no answer. It may overtake its
        request."""
        unique = requests.parse_interrupt(rq.data)
        with self._waiting_lock:
            waiting = self._waiting.get(unique)
            if waiting is None:
                self._interrupted.append(unique)
        if waiting is not None:
            waiting.when_open(waiting.cancel)
        self._patience.interrupted(unique)

    def open_handle(self, node: Node, writable: bool, by_daemon: bool, pid: int) -> tuple[int, int, int]:
        """A handle on the backing file of `node`, which a name or an earlier handle leads to. One descriptor serves all
        handles, without the caller's O_APPEND, O_DIRECT and O_SYNC: the kernel has turned them into offsets and FSYNC
        requests."""

        def open_fd(for_writing: bool) -> int:
            flags = os.O_RDWR if for_writing else os.O_RDONLY
            if node.name is None and node.fd >= 0:
                return os.open(f"/proc/self/fd/{node.fd}", flags | os.O_CLOEXEC)
            return self._volume.open(node, flags)

        return self._handles.open_node(node, open_fd, writable, by_daemon, pid)

    def _flush(self, rq: Request) -> bytes | None:
        fh = requests.parse_handle(rq.data)
        handle = self._handle(fh)
        node = handle.node
        if handle.lock is not None:
            handle.lock.flush(not self._is_open_elsewhere(node), self._volume.after(rq, lambda: b""))
            return None
        if not node.hooked:
            return b""
        self._hooks.flushed(self._volume.ref(node), self._volume.patiently(rq, lambda: b""), fh)
        return None

    def _is_open_elsewhere(self, node: Node) -> bool:
        """Whether any process may have a lock file open. Where one that opened it cannot be seen, it may: then
        the lock is given back when its last descriptor is gone, which the kernel tells of, and nobody waits for it.
        """
        handles = [other for other in list(self._open.values()) if other.node.ref.name == node.ref.name]
        return any(other.unseen for other in handles) or is_open_anywhere(node.ref.name, node.ino)

    def _release(self, rq: Request) -> bytes:
        fh = requests.parse_handle(rq.data)
        handle = self._handle(fh)
        self._handles.release(fh)
        if handle.write_only:
            self._hooks.overwritten(self._volume.ref(handle.node))
        return b""

    # -- data

    def _read(self, rq: Request) -> bytes | None:
        fh, offset, size = requests.parse_read(rq.data)
        handle = self._handle(fh)
        if not handle.node.virtual:
            self._handles.check_alive(handle.node)
            return os.pread(handle.node.fd, size, offset)
        return self._read_virtual(rq, handle, offset, size)

    def _read_virtual(self, rq: Request, handle: Handle, offset: int, size: int) -> bytes | None:
        """What a virtual file said when this handle read its beginning; a position says it anew each time."""
        ref = handle.node.ref
        if handle.content is not None and (offset or ref.database is None):
            return handle.content[offset : offset + size]
        unique, opcode, answers = rq.unique, rq.opcode, self._volume.answers

        def content(found: bytes | BaseException) -> None:
            if isinstance(found, BaseException):
                answers.fail(unique, opcode, found)
            else:
                handle.content = found
                answers.sink.reply(unique, found[offset : offset + size])

        self._hooks.virtual_content(ref, content)
        return None

    def _write(self, rq: Request) -> bytes | None:
        fh, offset, data, clear_setid = requests.parse_write(rq.data, rq.size)
        handle = self._handle(fh)
        node = handle.node
        self._handles.check_alive(node)
        if clear_setid:
            _clear_setid(node.fd, os.fstat(node.fd))
        with data:
            if node.hooked or handle.direct:
                ref = self._volume.ref(node)
                written = self._hooks.write(ref, node.fd, data, offset, fh)
                if not handle.by_daemon and self._hooks.is_commit(ref, node.fd, offset, written):
                    answered = self._volume.after(rq, lambda: replies.pack_write(written))
                    self._sync(rq, node, fh, os.fdatasync, answered)
                    return None
                return replies.pack_write(written)
            done = 0
            while done < len(data):
                done += os.pwrite(node.fd, data[done:], offset + done)
            return replies.pack_write(done)

    def _fsync(self, rq: Request) -> None:
        fh, data_only = requests.parse_fsync(rq.data)
        fsync = os.fdatasync if data_only else os.fsync
        handle = self._handle(fh)
        self._sync(rq, handle.node, fh if handle.writable else 0, fsync, self._volume.after(rq, lambda: b""))

    def _sync(self, rq: Request, node: Node, handle: int, fsync: Callable[[int], None], answered: Then) -> None:
        """Have a file fsynced, and what it waits for beside that; then `answered`, on any thread. `handle`: see
        `FileHooks.after_fsync`."""
        ref = self._volume.tree.refresh(node) if node.stale else node.ref
        hooks, pid, unique = self._hooks, rq.pid, rq.unique

        def act() -> None:
            try:
                fsync(node.fd)
            except OSError:
                hooks.fsync_failed(ref)
                raise
            then = Answerable(self._patience, pid, unique, answered)
            try:
                hooks.after_fsync(ref, then, handle)
            except BaseException as error:
                then(error)
            if ref.kind is FileKind.WAL and not then.answered:
                then.waits()  # its frames are written, and whether they count is decided by what is done next

        hooks.before_fsync(ref, self._volume.after(rq, act))

    def _fallocate(self, rq: Request) -> bytes:
        request = requests.parse_fallocate(rq.data)
        if request.mode not in _FALLOCATE_MODES:
            raise OSError(EOPNOTSUPP, "this mode of fallocate is not supported")
        node = self._handle(request.fh).node
        if _libc.fallocate(node.fd, request.mode, request.offset, request.length):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return b""

    # -- attributes

    def _getattr(self, rq: Request) -> bytes:
        if rq.nodeid == abi.ROOT_ID:
            root = self._volume.root
            return replies.pack_attr(abi.ROOT_ID, root, root.st_mode, 2, FOREVER_S)
        node = self._nodes.get(rq.nodeid)
        if node is None:
            raise OSError(ESTALE, "no such node")
        return self._volume.attr_body(node)

    def _setattr(self, rq: Request) -> bytes | None:
        request = requests.parse_setattr(rq.data)
        if rq.nodeid == abi.ROOT_ID:
            return self._setattr_root(request)
        volume = self._volume
        node = volume.node(rq.nodeid)
        if node.virtual and node.ref.kind is FileKind.LOCK:
            return volume.attr_body(node)  # O_TRUNC, touch: nothing to change
        if node.virtual:
            raise OSError(EPERM, f"{node.name} is read-only")
        if not request.valid & abi.FATTR_SIZE:
            self._change(node, request)
            return volume.attr_body(node)
        ref = volume.ref(node)

        def act() -> bytes:
            self._truncate(node, request.size_bytes)
            self._hooks.after_truncate(ref, request.size_bytes)
            self._change(node, request)
            return volume.attr_body(node)

        by_daemon = volume.by_daemon(rq.pid)
        self._hooks.before_truncate(ref, request.size_bytes, volume.patiently(rq, act), by_daemon)
        return None

    def _setattr_root(self, request: requests.Setattr) -> bytes:
        """Times may be set; they are kept in memory. Owner and mode come from the configuration and stay what they
        are, without an error, as in LiteFS: rsync -a and tar set them for "." whenever they copy a directory here."""
        root = self._volume.root
        valid = request.valid
        if valid & abi.FATTR_ATIME:
            root.st_atime_ns = request.atime_ns
        if valid & abi.FATTR_MTIME:
            root.touch()
            if not valid & abi.FATTR_MTIME_NOW:
                root.st_mtime_ns = request.mtime_ns
        return replies.pack_attr(abi.ROOT_ID, root, root.st_mode, 2, FOREVER_S)

    def _truncate(self, node: Node, size_bytes: int) -> None:
        with node.lock:
            if node.fd >= 0 and node.writable:
                os.ftruncate(node.fd, size_bytes)
                return
        fd = self._volume.open(node, os.O_WRONLY)
        try:
            os.ftruncate(fd, size_bytes)
        finally:
            os.close(fd)

    def _change(self, node: Node, request: requests.Setattr) -> None:
        """Owner, mode and times of the backing file. A change to what already is, as SQLite makes as root for its
        side files at each open, is not one."""
        with node.lock:
            if node.fd >= 0:
                _change_file(node.fd, os.fstat(node.fd), request)
                return
        now = self._volume.lstat(node)
        self._volume.on_path(node, lambda path: _change_file(path, now, request))

    def _statfs(self, rq: Request) -> bytes:
        return replies.pack_statfs(os.statvfs(self._volume.data_dir))


def _change_file(file: int | str, now: os.stat_result, request: requests.Setattr) -> None:
    valid = request.valid
    uid = request.uid if valid & abi.FATTR_UID else now.st_uid
    gid = request.gid if valid & abi.FATTR_GID else now.st_gid
    if (uid, gid) != (now.st_uid, now.st_gid) or (now.st_mode & _SETID and valid & _OWNER):
        os.chown(file, uid, gid)
    if valid & abi.FATTR_MODE and request.mode & 0o7777 != now.st_mode & 0o7777:
        os.chmod(file, request.mode & 0o7777)
    elif valid & abi.FATTR_KILL_SUIDGID:
        _clear_setid(file, now)
    if valid & _TIMES:
        atime = request.atime_ns if valid & abi.FATTR_ATIME else now.st_atime_ns
        mtime = request.mtime_ns if valid & abi.FATTR_MTIME else now.st_mtime_ns
        os.utime(file, ns=(atime, mtime))


def _clear_setid(file: int | str, now: os.stat_result) -> None:
    """Set-uid goes with a write or truncation, set-gid if the group may execute (HANDLE_KILLPRIV_V2: the kernel asks
    us to, instead of asking for the mode before every chown)."""
    mode = now.st_mode & 0o7777 & ~stat.S_ISUID
    if mode & stat.S_IXGRP:
        mode &= ~stat.S_ISGID
    if mode != now.st_mode & 0o7777:
        os.chmod(file, mode)
