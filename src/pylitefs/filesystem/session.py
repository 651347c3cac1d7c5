"""One mount: mounts, answers the kernel on several threads, unmounts.

`Dispatcher` turns requests into replies and knows nothing of mounts or threads; `Session` runs it.

Threads: readers take requests from /dev/fuse, each into its own buffer. When the last idle one takes a request another
is started, up to `THREADS_MAX`, so that requests waiting for the disk never stop others. Where the kernel can do it
most requests come through `rings` instead, and one reader is left. The notifier has a thread of its own. A handler
never waits for another request: what must wait is finished by whoever calls its `then`.
"""

from __future__ import annotations

import errno
import os
import select
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from pylitefs.errors import FormatError
from pylitefs.filesystem import mount
from pylitefs.filesystem.answers import Answers, ReplySink
from pylitefs.filesystem.device import BUFFER_SIZE, MAX_WRITE, RETRIED, Device, Negotiated
from pylitefs.filesystem.dying import Patience
from pylitefs.filesystem.files import FileRequests, Handler
from pylitefs.filesystem.handles import BackingFiles, Handles
from pylitefs.filesystem.names import NameRequests
from pylitefs.filesystem.notify import KernelNotifier, NotifyTarget
from pylitefs.filesystem.rings import Rings, enable
from pylitefs.filesystem.tree import RootStat, Tree
from pylitefs.filesystem.volume import Request, Volume
from pylitefs.formats.fuse import abi
from pylitefs.formats.fuse.requests import parse_header
from pylitefs.ports import FileHooks, Notifier

THREADS_MAX = 16
STOP_TIMEOUT_S = 5.0

_REFUSED: dict[int, int] = {
    abi.MKDIR: errno.EPERM,
    abi.RMDIR: errno.EPERM,
    abi.SYMLINK: errno.EPERM,
    abi.LINK: errno.EPERM,
    abi.READLINK: errno.EINVAL,
    abi.READDIRPLUS: errno.ENOTSUP,
}
"""Requests with a fixed answer. Every other one without a handler gets ENOSYS, after which the kernel does without it
or no longer asks (locks, extended attributes, OPENDIR, ACCESS, POLL, STATX)."""


_PASSTHROUGH_NEEDS: dict[int, str] = {
    errno.EPERM: "it needs root's privileges (CAP_SYS_ADMIN)",
    errno.ELOOP: "the data directory lies on too many file systems stacked on each other",
}


class Channel(ReplySink, BackingFiles, NotifyTarget, Protocol):
    """What of the device the handlers use."""


class Dispatcher:
    """The handlers of one mount, by opcode."""

    def __init__(
        self,
        hooks: FileHooks,
        channel: Channel,
        data_dir: str,
        log: Callable[[str], None],
        *,
        passthrough: bool,
        expire_only: bool,
        uid: int,
        gid: int,
        debug: bool = False,
    ) -> None:
        self.answers = Answers(channel, log)
        self.handles = Handles(hooks, channel, log, passthrough=passthrough)
        self.tree = Tree(hooks.resolve)
        self.notifier = KernelNotifier(self.tree, channel, log, expire_only=expire_only)
        self.patience = Patience(log)
        root = RootStat(uid, gid)
        volume = Volume(hooks, self.answers, self.handles, self.tree, root, data_dir, self.patience)
        files = FileRequests(volume)
        names = NameRequests(volume, files, self.notifier)
        self._channel = channel
        self._log = log
        self._table: dict[int, Handler] = {**files.table, **names.table, abi.DESTROY: lambda rq: b""}
        if debug:
            self._table = {opcode: self._logged(handler) for opcode, handler in self._table.items()}

    def _logged(self, handler: Handler) -> Handler:
        def run(rq: Request) -> bytes | None:
            body = handler(rq)
            outcome = "later" if body is None else f"{len(body)} bytes"
            self._log(f"fuse: {abi.opcode_name(rq.opcode)} node {rq.nodeid} pid {rq.pid}: {outcome}")
            return body

        return run

    def dispatch(self, rq: Request, size: int) -> None:
        """Handle the request in the first `size` bytes of `rq.data` and answer it, now or later."""
        rq.size = size
        try:
            rq.opcode, rq.unique, rq.nodeid, rq.uid, rq.gid, rq.pid = parse_header(rq.data, size)
        except FormatError as error:
            self.answers.report(0, error)
            return
        handler = self._table.get(rq.opcode)
        if handler is None:
            self._refuse(rq)
            return
        try:
            body = handler(rq)
            if body is not None:
                self._channel.reply(rq.unique, body)
        except BaseException as error:
            code = self.answers.errno_of(rq.opcode, error)
            if abi.OPCODES[rq.opcode].replies:
                self._channel.fail(rq.unique, code)

    def _refuse(self, rq: Request) -> None:
        row = abi.OPCODES.get(rq.opcode)
        if row is None or row.replies:
            self._channel.fail(rq.unique, _REFUSED.get(rq.opcode, errno.ENOSYS))


class Session:
    """A mounted directory. `start` returns when it can be used; `stop` may be called at any time and more than once,
    but not by the engine's hooks or `on_gone`.

    `hooks` is the engine. `passthrough` asks for it; whether it is used tells the property of that name. `uid` and
    `gid` own the root directory and the virtual files. `log` gets one line per event. `on_gone` is called, on a
    thread of the session, if somebody else unmounts the directory; `on_connected` by `start`, before any request is
    answered, with `passthrough` and the notifier (twice if it has to begin anew).
    """

    def __init__(
        self,
        mount_dir: str,
        data_dir: str,
        hooks: FileHooks,
        *,
        passthrough: bool = True,
        io_uring: bool = True,
        allow_other: bool = False,
        uid: int | None = None,
        gid: int | None = None,
        threads: int = 3,
        debug: bool = False,
        log: Callable[[str], None] = lambda line: None,
        on_gone: Callable[[], None] = lambda: None,
        on_connected: Callable[[bool, KernelNotifier], None] = lambda passthrough, notifier: None,
    ) -> None:
        self._mount_dir = mount_dir
        self._data_dir = os.path.realpath(data_dir)
        self._hooks = hooks
        self._want_passthrough = passthrough
        self._want_io_uring = io_uring
        self._allow_other = allow_other
        self._uid = os.geteuid() if uid is None else uid
        self._gid = os.getegid() if gid is None else gid
        self._thread_count = threads
        self._debug = debug
        self._log = log
        self._on_gone = on_gone
        self._on_connected = on_connected
        self._lock = threading.Lock()  # starting and stopping
        self._unmounting = False  # by us
        self._stopping = False  # readers end after the request they have
        self._idle: deque[None] = deque()
        self._threads: list[threading.Thread] = []
        self._threads_lock = threading.Lock()
        self._path = ""
        self._mount_device = ""
        self._device: Device | None = None
        self._dispatcher: Dispatcher | None = None
        self._rings: Rings | None = None
        self._rings_stop_fd = -1

    @property
    def passthrough(self) -> bool:
        """Whether newly opened files are passed through to their backing files."""
        return self._dispatcher is not None and self._dispatcher.handles.passthrough

    @property
    def io_uring(self) -> bool:
        """Whether requests come through io_uring."""
        return self._rings is not None

    @property
    def device_fd(self) -> int:
        """The descriptor of /dev/fuse, while mounted."""
        if self._device is None:
            raise RuntimeError("the session is not started")
        return self._device.fd

    @property
    def cached_fd(self) -> int:
        """The descriptor of the list of cached databases (`cached_databases`), while mounted."""
        return self._running().handles.cached.share()

    @property
    def mount_device(self) -> str:
        """The mount's device number as in /proc/self/mountinfo, "major:minor", while mounted."""
        return self._mount_device

    @property
    def notifier(self) -> Notifier:
        return self._running().notifier

    def drain_notifications(self, timeout_s: float) -> bool:
        """Wait until the kernel has heard all that `notifier` was told so far."""
        return self._running().notifier.drain(timeout_s)

    def _running(self) -> Dispatcher:
        if self._dispatcher is None:
            raise RuntimeError("the session is not started")
        return self._dispatcher

    # -- starting

    def start(self) -> None:
        """Mount. MountError, with nothing left behind, if that is not possible."""
        with self._lock:
            if self._device is not None or self._stopping:
                raise RuntimeError("a session is started once")
            self._path = mount.prepare(self._mount_dir, self._log)
            io_uring = self._want_io_uring and mount.can_abort() and enable()
            try:
                self._connect(io_uring=io_uring)
            except OSError as error:
                if not io_uring:
                    raise
                self._log(f"io_uring cannot be used, fsyncs take longer: {error.strerror}")
                self._connect(io_uring=False)
            for _ in range(1 if self._rings else self._thread_count):
                self._add_thread()

    def _connect(self, *, io_uring: bool) -> None:
        """Mount, and agree with the kernel on how to go on. OSError, with nothing left behind, if rings are refused."""
        device, below = self._mount()
        dispatcher: Dispatcher | None = None
        try:
            if found := os.listdir(below):  # made since it was `prepare`d: nobody would ever see it again
                raise mount.not_empty(self._path, found)
            entry = mount.mount_at(self._path)
            self._mount_device = entry.device if entry else ""
            depth = 2 if mount.fs_type_of(self._data_dir) == "overlay" else 1
            agreed = device.negotiate(
                passthrough=self._want_passthrough, max_stack_depth=depth, io_uring=io_uring
            )
            dispatcher = Dispatcher(
                self._hooks, device, self._data_dir, self._log,
                passthrough=self._want_passthrough and self._passes_through(device, agreed),
                expire_only=agreed.expire_only, uid=self._uid, gid=self._gid, debug=self._debug,
            )  # fmt: skip
            dispatcher.notifier.start()
            self._on_connected(dispatcher.handles.passthrough, dispatcher.notifier)
            if agreed.io_uring:
                rings = Rings(device.fd, BUFFER_SIZE, device.awaited, dispatcher.dispatch, self._log, self._path)
                rings.start()
                self._rings, self._rings_stop_fd = rings, rings.stop_fd
        except BaseException:
            mount.detach(self._path)
            device.close()
            if dispatcher is not None:
                dispatcher.notifier.stop(STOP_TIMEOUT_S)
            raise
        finally:
            os.close(below)
        self._device, self._dispatcher = device, dispatcher

    def _mount(self) -> tuple[Device, int]:
        """The device, and a descriptor of the directory below the mount."""
        below = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return Device(mount.mount(self._path, allow_other=self._allow_other, max_read=MAX_WRITE)), below
        except BaseException:
            os.close(below)
            raise

    def _passes_through(self, device: Device, agreed: Negotiated) -> bool:
        """Whether the kernel accepts files of the data directory as backing files. Known before anything is opened,
        because the engine reads a wal-index where its current bytes are."""
        if not agreed.passthrough:
            self._log("passthrough is off, files are cached (slower): it needs Linux 6.9 or newer")
            return False
        try:
            with tempfile.TemporaryFile(dir=self._data_dir) as probe:
                device.backing_close(device.backing_open(probe.fileno()))
        except OSError as error:
            reason = _PASSTHROUGH_NEEDS.get(error.errno or 0, error.strerror)
            self._log(f"passthrough is off, files are cached (slower): {reason}")
            return False
        return True

    def _add_thread(self) -> None:
        with self._threads_lock:
            if self._stopping or len(self._threads) >= THREADS_MAX:
                return
            thread = threading.Thread(target=self._serve, name=f"fuse-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
        try:
            thread.start()
        except RuntimeError:  # no more threads are allowed: those that are there go on
            with self._threads_lock:
                self._threads.remove(thread)

    def _serve(self) -> None:
        device, dispatch, idle = self._device, self._running().dispatch, self._idle
        if device is None:  # stopped before this thread came to run
            return
        fd, readv = device.fd, os.readv
        buffer = bytearray(BUFFER_SIZE)
        buffers, rq = [buffer], Request(buffer)
        poll = self._poll_beside_rings(fd)
        while not self._stopping:
            idle.append(None)
            try:
                if poll is not None and self._rings_stop_fd in dict(poll.poll()):
                    return
                size = readv(fd, buffers)
            except OSError as error:
                if error.errno in RETRIED:
                    continue
                if error.errno != errno.ENODEV:
                    self._log(f"reading {mount.DEVICE} failed: {error.strerror}")
                self._lost()
                return
            finally:
                idle.pop()
            if not idle:
                self._add_thread()
            dispatch(rq, size)

    def _poll_beside_rings(self, fd: int) -> select.poll | None:
        """With rings a reader has little to do, and nothing to wake up on when it has to end: it waits for both."""
        if self._rings is None:
            return None
        os.set_blocking(fd, False)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.register(self._rings_stop_fd, select.POLLIN)
        return poll

    def _lost(self) -> None:
        """The mount is gone. If nobody here asked for that, tell so, once."""
        with self._threads_lock:
            if self._unmounting or self._stopping:
                return
            self._stopping = True
        self._log(f"{self._path} was unmounted by someone else")
        self._on_gone()

    # -- stopping

    def stop(self) -> None:
        """Unmount, wait for the threads, release what applications left open."""
        if threading.current_thread() in self._threads:
            raise RuntimeError("a FUSE thread cannot stop its own session")
        with self._lock:
            device, dispatcher = self._device, self._dispatcher
            if device is None or dispatcher is None:
                self._stopping = True
                return
            self._device = None
            self._unmounting = True
            if not mount.unmount(self._path, self._mount_device):
                self._log(f"{self._path} has open files: they end with the mount")
                self._end_busy_mount(device)
            mount.uncover(self._path)
            self._stopping = True
            until_s = time.monotonic() + STOP_TIMEOUT_S
            if self._rings is not None:
                self._rings.stop(until_s)
            for thread in list(self._threads):
                thread.join(max(0.0, until_s - time.monotonic()))
            dispatcher.patience.stop()
            device.close()
            dispatcher.notifier.stop(STOP_TIMEOUT_S)
            dispatcher.handles.release_all()
            dispatcher.handles.cached.close()

    def _end_busy_mount(self, device: Device) -> None:
        """Take a mount with open files out of the namespace, and end its connection while we still answer: a thread of
        ours may wait for it too (the opener, the notifier), would keep /dev/fuse open for good, and so the connection.
        Before that the kernel forgets what it has cached of databases, for the reason in `mount_guard`.

        Where it cannot be ended it lives on as long as its files are open, and would keep our threads reading: each is
        sent a request to wake up on (nothing else interrupts the read of /dev/fuse).
        """
        try:
            root = os.open(self._path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            root = -1
        try:
            self._stopping = True
            handles, notifier = self._running().handles, self._running().notifier
            handles.ending = True
            notifier.forget_pages(handles.cached.numbers())
            notifier.drain(STOP_TIMEOUT_S)
            ended = mount.end(self._path, self._mount_device)
            device.give_up()
            if ended or root < 0 or self._rings is not None:
                return
            for _ in list(self._threads):
                waker = threading.Thread(target=_ask, args=(root,), name="fuse-wake", daemon=True)
                waker.start()
                waker.join(STOP_TIMEOUT_S / THREADS_MAX)
        finally:
            if root >= 0:
                os.close(root)


def _ask(root: int) -> None:
    try:
        os.statvfs(root)
    except OSError:
        pass

