"""Requests through io_uring instead of read(2) and write(2) on /dev/fuse.

A request is handled on the processor it was made on: where the kernel would wake a thread on another one, which in a
virtual machine has to be started first (50 to 65 µs measured, 10 to 15 µs this way), the application's thread just
gives way. One system call answers a request and waits for the next.

Each thread has a ring of its own with one entry, and stays on the entry's processor. When few of a processor are idle
another is started. A request that is answered later holds its thread until then: a queue has no other place for it.

A request that finds no idle entry waits in its queue, and only an entry that is committed takes it from there, not one
that is new (`fuse_uring_do_register`, Linux 6.14 to 6.18). So a new thread is sent a request to commit (`_nudge`): else
requests that wait for each other through the engine could wait for ever.

The kernel must allow it (`/sys/module/fuse/parameters/enable_uring`, off by default; root may switch it on). Once it is
agreed on, the kernel holds every request back until each processor has an entry: a mount whose rings cannot be made, as
in a container that may not use io_uring, has to be given up for one without.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

from pylitefs.filesystem.volume import Request
from pylitefs.formats.fuse import abi, uring

SWITCH = "/sys/module/fuse/parameters/enable_uring"
POSSIBLE_CPUS = "/sys/devices/system/cpu/possible"
MAX_CPUS = 16  # with more of them, so many threads cost more than they save
_MAX_PER_CPU = 256
_START_PER_CPU = 3
_SCARCE_S = 0.001
_STOP_S = 5.0  # for the threads of a start that failed
_FEW_IDLE = 2
_STOP, _FUSE = 1, 2  # user data
_HEADER_SIZE = abi.IN_HEADER.size
_DATA_SIZE = 8192  # of a request, at first
_POLL, _REGISTER, _ANSWER = 0, 1, 2  # where these submissions stand, ready
_U32 = struct.Struct("=I")
_pack_u32, _unpack_u32 = _U32.pack_into, _U32.unpack_from
_pack_u64 = struct.Struct("=Q").pack_into
_unpack_unique = struct.Struct("=Q").unpack_from
_unpack_entry, _unpack_cqe = uring.ENTRY.unpack_from, uring.CQE.unpack_from
_pack_out = abi.OUT_HEADER.pack_into
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_syscall = _libc.syscall


def possible_cpus() -> int:
    """How many queues the kernel has: every processor that might ever be there."""
    with open(POSSIBLE_CPUS) as file:
        return int(file.read().strip().rpartition("-")[2]) + 1


def enable() -> bool:
    """Whether the kernel offers it, after asking it to."""
    try:
        if possible_cpus() > MAX_CPUS:
            return False
        with open(SWITCH) as file:
            if file.read().strip() == "Y":
                return True
        with open(SWITCH, "w") as file:
            file.write("Y")
    except (OSError, ValueError):
        return False
    return True


class Ring:
    """One io_uring instance with one FUSE entry on it. Used by one thread."""

    def __init__(self, device_fd: int, stop_fd: int, queue: int, payload_size: int) -> None:
        params = ctypes.create_string_buffer(uring.pack_params(), uring.PARAMS_SIZE)
        self._fd = _libc.syscall(uring.SYS_SETUP, 4, params)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), f"io_uring_setup: {os.strerror(ctypes.get_errno())}")
        try:
            self._at = at = uring.parse_params(params.raw)
            self._ring = mmap.mmap(self._fd, at.size, mmap.MAP_SHARED, offset=uring.OFF_SQ_RING)
            self._sqes = mmap.mmap(self._fd, at.sq_entries * uring.SQE_SIZE, mmap.MAP_SHARED, offset=uring.OFF_SQES)
        except BaseException:
            os.close(self._fd)
            raise
        self._sq_mask, self._cq_mask = self._word(at.sq_mask), self._word(at.cq_mask)
        self._tail = self._head = self._unsubmitted = 0
        # Anonymous mappings: what is not used takes no memory.
        self._headers = mmap.mmap(-1, mmap.PAGESIZE)
        self._payload = mmap.mmap(-1, payload_size)
        addresses = [ctypes.addressof(ctypes.c_char.from_buffer(buffer)) for buffer in (self._headers, self._payload)]
        self._iovecs = (ctypes.c_uint64 * 4)(addresses[0], uring.HEADERS_SIZE, addresses[1], payload_size)
        self._commit_id = 0
        iovecs = ctypes.addressof(self._iovecs)
        for slot, sqe in enumerate(
            (
                uring.pack_poll(stop_fd, _STOP),
                uring.pack_command(device_fd, uring.REGISTER, queue, 0, iovecs, _FUSE),
                uring.pack_command(device_fd, uring.COMMIT_AND_FETCH, queue, 0, 0, _FUSE),
            )
        ):
            self._sqes[slot * uring.SQE_SIZE : (slot + 1) * uring.SQE_SIZE] = sqe
        self._add(_POLL)
        self._add(_REGISTER)

    def _word(self, offset: int) -> int:
        word: int = _U32.unpack_from(self._ring, offset)[0]
        return word

    def _add(self, slot: int) -> None:
        """Queue the submission that stands in a slot."""
        tail = self._tail
        _pack_u32(self._ring, self._at.sq_array + 4 * (tail & self._sq_mask), slot)
        self._tail = tail = (tail + 1) & 0xFFFFFFFF
        _pack_u32(self._ring, self._at.sq_tail, tail)
        self._unsubmitted += 1

    def wait(self) -> bool:
        """Submit, and wait for a request. False: it is time to end. OSError if the kernel refused the entry."""
        ring, at = self._ring, self._at
        while True:
            head = self._head
            if head == _unpack_u32(ring, at.cq_tail)[0]:
                self._enter(1)
                continue
            user_data, result, _ = _unpack_cqe(ring, at.cqes + uring.CQE.size * (head & self._cq_mask))
            self._head = head = (head + 1) & 0xFFFFFFFF
            _pack_u32(ring, at.cq_head, head)
            if user_data == _STOP:
                return False
            if result < 0:
                raise OSError(-result, f"FUSE over io_uring: {os.strerror(-result)}")
            return True

    def register(self) -> None:
        """Let the kernel have the entry, without waiting for a request. OSError if it does not take it."""
        self._enter(0)
        if self._head != self._word(self._at.cq_tail):
            user_data, result, _ = _unpack_cqe(self._ring, self._at.cqes)  # the first there is
            if user_data == _FUSE and result < 0:
                raise OSError(-result, f"FUSE over io_uring: {os.strerror(-result)}")

    def _enter(self, completions: int) -> None:
        flags = uring.ENTER_GETEVENTS if completions else 0
        done = _syscall(uring.SYS_ENTER, self._fd, self._unsubmitted, completions, flags, None, 0)
        if done >= 0:
            self._unsubmitted -= done
        elif ctypes.get_errno() in (errno.EAGAIN, errno.EBUSY, errno.ENOMEM):
            time.sleep(_SCARCE_S)  # the kernel lacks something for a moment; nobody else can take this entry's requests
        elif ctypes.get_errno() != errno.EINTR:
            raise OSError(ctypes.get_errno(), f"io_uring_enter: {os.strerror(ctypes.get_errno())}")

    def take(self, data: bytearray) -> int:
        """Put the request together in `data` as /dev/fuse would have it; its size."""
        headers = self._headers
        _, self._commit_id, payload_size = _unpack_entry(headers, uring.ENTRY_AT)
        size: int = _unpack_u32(headers, 0)[0]
        if size > len(data):
            data.extend(bytes(size - len(data)))
        body_end = size - payload_size
        data[:_HEADER_SIZE] = headers[:_HEADER_SIZE]
        data[_HEADER_SIZE:body_end] = headers[uring.BODY_AT : uring.BODY_AT + body_end - _HEADER_SIZE]
        if payload_size:
            data[body_end:size] = self._payload[:payload_size]
        return size

    def answer(self, unique: int, code: int, body: bytes) -> None:
        """Commit with the next `wait`."""
        size = len(body)
        _pack_out(self._headers, 0, abi.OUT_HEADER.size + size, -code, unique)
        if size:
            self._payload[:size] = body
        _pack_u32(self._headers, uring.PAYLOAD_SIZE_AT, size)
        _pack_u64(self._sqes, _ANSWER * uring.SQE_SIZE + uring.COMMIT_ID_AT, self._commit_id)
        self._add(_ANSWER)

    def close(self) -> None:
        """Take the entry back from the kernel (each mapping has a descriptor of its own). Its memory must stay."""
        self._ring.close()
        self._sqes.close()
        os.close(self._fd)


class Answer:
    """The answer to a request that a ring's thread is waiting for."""

    __slots__ = ("_given", "body", "code")

    def __init__(self) -> None:
        self._given = threading.Lock()
        self._given.acquire()
        self.code, self.body = 0, b""

    def give(self, code: int, body: bytes) -> None:
        """Any thread, once for each request."""
        self.code, self.body = code, body
        self._given.release()

    def wait(self) -> None:
        self._given.acquire()


class Rings:
    """All rings of a mount. `awaited`: where the device looks up who waits for the answer to a request (by `unique`).
    `log` gets a line if a ring ends before its time."""

    def __init__(
        self, device_fd: int, payload_size: int, awaited: dict[int, Answer],
        dispatch: Callable[[Request, int], None], log: Callable[[str], None], root: str,
    ) -> None:  # fmt: skip
        """`root`: the mounted directory."""
        self._root = root
        self._device_fd, self._payload_size, self._awaited = device_fd, payload_size, awaited
        self._dispatch, self._log = dispatch, log
        self.stop_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._stopping = False
        self._idle: list[deque[None]] = [deque() for _ in range(possible_cpus())]
        self._count = [0] * len(self._idle)
        self._threads: list[threading.Thread] = []
        self._begun: SimpleQueue[OSError | None] = SimpleQueue()  # how it went, of the first ones
        self._rings: list[Ring] = []  # kept: the kernel may still write to the memory of one that was closed

    def start(self) -> None:
        """OSError if they cannot be had; the mount is then of no use."""
        try:
            queues = [queue for queue in range(len(self._idle)) for _ in range(_START_PER_CPU)]
            begun = sum(self._add(queue, first=True) for queue in queues)
            for _ in range(begun):  # those that serve already may have added others
                if (error := self._begun.get()) is not None:
                    raise error
            if begun < len(queues):
                raise OSError(errno.EAGAIN, "threads for io_uring cannot be started")
        except BaseException:
            self.stop(time.monotonic() + _STOP_S)
            raise

    def _add(self, queue: int, *, first: bool = False) -> bool:
        """Whether there is one more. `first`: one of those that `start` waits for."""
        with self._lock:
            if self._stopping or self._count[queue] >= _MAX_PER_CPU:
                return False
            self._count[queue] += 1
            thread = threading.Thread(
                target=self._serve,
                args=(queue, first),
                name=f"fuse-{queue}.{self._count[queue]}",
                daemon=True,
            )
            self._threads.append(thread)
        try:
            thread.start()
        except RuntimeError:  # no more threads are allowed: those that are there go on
            with self._lock:
                self._count[queue] -= 1
                self._threads.remove(thread)
            return False
        return True

    def _serve(self, queue: int, first: bool) -> None:
        with contextlib.suppress(OSError):  # it may be offline
            os.sched_setaffinity(0, {queue})
        error: OSError | None = None
        try:
            ring = Ring(self._device_fd, self.stop_fd, queue, self._payload_size)
            self._rings.append(ring)
            ring.register()
        except OSError as refused:
            error = refused
        if first:
            self._begun.put(error)
        if error is not None:
            return
        try:
            if not first:
                self._start_nudge(queue)
            self._serve_ring(ring, queue)
        except OSError as ended:
            if ended.errno not in (errno.ENOTCONN, errno.ENODEV) and not self._stopping:
                self._log(f"a thread of the mount ends: {ended}")
        finally:
            ring.close()

    def _serve_ring(self, ring: Ring, queue: int) -> None:
        data = bytearray(_DATA_SIZE)
        rq, dispatch, awaited, idle, answer = Request(data), self._dispatch, self._awaited, self._idle[queue], Answer()
        idle.append(None)
        while ring.wait():
            idle.pop()
            if len(idle) < _FEW_IDLE:
                self._add(queue)
            size = ring.take(data)
            unique = _unpack_unique(data, 8)[0]
            awaited[unique] = answer
            dispatch(rq, size)
            answer.wait()
            ring.answer(unique, answer.code, answer.body)
            idle.append(None)

    def _start_nudge(self, queue: int) -> None:
        with contextlib.suppress(RuntimeError):  # no more threads are allowed
            threading.Thread(target=self._nudge, args=(queue,), name="fuse-nudge", daemon=True).start()

    def _nudge(self, queue: int) -> None:
        """Make a request on this processor, for the idle entry to take and to commit."""
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, {queue})
            os.statvfs(self._root)

    def __del__(self) -> None:
        os.close(self.stop_fd)

    def stop(self, until_s: float) -> None:
        """End the threads after the requests they have. The entries go back to the kernel. A thread whose request has
        no answer by `until_s` (time.monotonic) is left alone."""
        with self._lock:
            self._stopping = True
            threads = list(self._threads)
        with contextlib.suppress(OSError):
            os.eventfd_write(self.stop_fd, 1)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, until_s - time.monotonic()))
