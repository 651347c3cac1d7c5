"""FUSE over io_uring (Linux 6.14): the shared memory of one ring, and of one entry on it.

The server registers entries, each for the queue of one processor. The kernel puts a request of a process that runs on
this processor into one of them and completes it; the server puts the answer in the same place and submits the entry
again, which commits the answer and waits for the next request. Only FORGET and INTERRUPT come through /dev/fuse.

An entry: two buffers, given to the kernel as an iovec array.

    headers   0    128  fuse_in_header, for the answer fuse_out_header
              128  128  the fixed part of the request's body
              256  8    flags
              264  8    commit id: what the answer is submitted with
              272  4    size of the payload in bytes, of request and answer
              276  12   reserved
    payload             the rest of the request's body, for the answer all of it

A submission (with IORING_SETUP_SQE128): 128 bytes, the command of 24 bytes at its offset 48:

    0   1  opcode                      48  8  flags
    4   4  descriptor                  56  8  commit id
    8   4  what to do (cmd_op)         64  2  queue: the processor's number
    16  8  address of the iovecs
    24  4  how many (2)
    32  8  user data, comes back in the completion

Sources: linux/fuse.h, linux/io_uring.h.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

SYS_SETUP: Final = 425
SYS_ENTER: Final = 426
ENTER_GETEVENTS: Final = 1
SETUP_SQE128: Final = 1 << 10
OFF_SQ_RING: Final = 0
OFF_SQES: Final = 0x10000000
PARAMS_SIZE: Final = 120
SQE_SIZE: Final = 128
CQE: Final = struct.Struct("=QiI")  # user data, result, flags

_PARAMS = struct.Struct("=3I")  # entries wanted, of completions, flags
_OP_POLL_ADD, _OP_URING_CMD = 6, 46
_POLLIN = 1
_SQE = struct.Struct("=BBHiIIQIIQ")
_COMMAND = struct.Struct("=QQH")
_COMMAND_AT = 48
COMMIT_ID_AT: Final = _COMMAND_AT + 8  # in a submission

REGISTER: Final = 1
COMMIT_AND_FETCH: Final = 2

HEADERS_SIZE: Final = 288
BODY_AT: Final = 128
ENTRY: Final = struct.Struct("=QQI")  # flags, commit id, size of the payload
ENTRY_AT: Final = 256
PAYLOAD_SIZE_AT: Final = 272


class Offsets(NamedTuple):
    """Where the parts of the two rings are in their mapping; sizes are in entries."""

    sq_tail: int
    sq_mask: int
    sq_array: int
    sq_entries: int
    cq_head: int
    cq_tail: int
    cq_mask: int
    cqes: int
    size: int


def pack_params() -> bytes:
    return _PARAMS.pack(0, 0, SETUP_SQE128).ljust(PARAMS_SIZE, b"\0")


def parse_params(data: bytes) -> Offsets:
    """What io_uring_setup filled in."""
    sq_entries, cq_entries = struct.unpack_from("=2I", data, 0)
    _, sq_tail, sq_mask, _, _, _, sq_array = struct.unpack_from("=7I", data, 40)
    cq_head, cq_tail, cq_mask, _, _, cqes = struct.unpack_from("=6I", data, 80)
    size = max(sq_array + 4 * sq_entries, cqes + CQE.size * cq_entries)
    return Offsets(sq_tail, sq_mask, sq_array, sq_entries, cq_head, cq_tail, cq_mask, cqes, size)


def pack_command(fd: int, command: int, queue: int, commit_id: int, iovecs: int, user_data: int) -> bytes:
    """A submission that registers an entry (`iovecs`: address of its two buffers) or answers and waits."""
    head = _SQE.pack(_OP_URING_CMD, 0, 0, fd, command, 0, iovecs, 2 if iovecs else 0, 0, user_data)
    return head.ljust(_COMMAND_AT, b"\0") + _COMMAND.pack(0, commit_id, queue).ljust(SQE_SIZE - _COMMAND_AT, b"\0")


def pack_poll(fd: int, user_data: int) -> bytes:
    """A submission that completes when `fd` can be read."""
    return _SQE.pack(_OP_POLL_ADD, 0, 0, fd, 0, 0, 0, 0, _POLLIN, user_data).ljust(SQE_SIZE, b"\0")
