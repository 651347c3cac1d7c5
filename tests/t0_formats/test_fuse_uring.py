"""The memory that FUSE over io_uring shares with the kernel: layouts against the kernel's headers."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pylitefs.formats.fuse import abi, uring

U64 = st.integers(0, (1 << 64) - 1)
U32 = st.integers(0, (1 << 32) - 1)


@given(U32.filter(lambda fd: fd < 1 << 31), st.sampled_from([uring.REGISTER, uring.COMMIT_AND_FETCH]),
       st.integers(0, (1 << 16) - 1), U64, U64, U64)  # fmt: skip
def test_a_command(fd: int, command: int, queue: int, commit_id: int, iovecs: int, user_data: int) -> None:
    """struct io_uring_sqe and, in its last 80 bytes, struct fuse_uring_cmd_req."""
    sqe = uring.pack_command(fd, command, queue, commit_id, iovecs, user_data)
    assert len(sqe) == uring.SQE_SIZE
    assert sqe[0] == 46  # IORING_OP_URING_CMD
    assert struct.unpack_from("=i", sqe, 4) == (fd,)
    assert struct.unpack_from("=I", sqe, 8) == (command,)
    assert struct.unpack_from("=QI", sqe, 16) == (iovecs, 2 if iovecs else 0)
    assert struct.unpack_from("=Q", sqe, 32) == (user_data,)
    assert struct.unpack_from("=QQH", sqe, 48) == (0, commit_id, queue)
    assert not any(sqe[66:]) and not any(sqe[1:4])


def test_a_poll() -> None:
    sqe = uring.pack_poll(7, 99)
    assert len(sqe) == uring.SQE_SIZE and sqe[0] == 6  # IORING_OP_POLL_ADD
    assert struct.unpack_from("=i", sqe, 4) == (7,)
    assert struct.unpack_from("=I", sqe, 28) == (1,)  # POLLIN
    assert struct.unpack_from("=Q", sqe, 32) == (99,)


def test_the_entry_has_room_for_every_fixed_body() -> None:
    """fuse_uring_req_header: in_out and op_in of 128 bytes each, then fuse_uring_ent_in_out of 32."""
    assert (uring.BODY_AT, uring.ENTRY_AT, uring.HEADERS_SIZE) == (128, 256, 288)
    assert uring.PAYLOAD_SIZE_AT == uring.ENTRY_AT + 16
    assert all(row.body_size <= uring.ENTRY_AT - uring.BODY_AT for row in abi.OPCODES.values())


@pytest.mark.parametrize("entries", [1, 4])
def test_offsets(entries: int) -> None:
    """struct io_uring_params: entries and flags, then struct io_sqring_offsets at 40 and io_cqring_offsets at 80."""
    params = bytearray(uring.PARAMS_SIZE)
    struct.pack_into("=2I", params, 0, entries, 2 * entries)
    struct.pack_into("=7I", params, 40, 0, 4, 16, 24, 36, 32, 64 + 2 * entries * 16)
    struct.pack_into("=6I", params, 80, 8, 12, 20, 28, 44, 64)
    at = uring.parse_params(bytes(params))
    assert (at.sq_tail, at.sq_mask, at.sq_entries) == (4, 16, entries)
    assert (at.cq_head, at.cq_tail, at.cq_mask, at.cqes) == (8, 12, 20, 64)
    assert at.size == 64 + 2 * entries * 16 + 4 * entries
