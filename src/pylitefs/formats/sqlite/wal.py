"""SQLite's write-ahead log: NAME-wal. All stored integers are big-endian.

Header, 32 bytes:

    offset  size
     0       4   magic 0x377f0682 (checksum over little-endian words) or 0x377f0683 (big-endian words)
     4       4   format version 3007000
     8       4   page size in bytes, also 65536 as itself
    12       4   checkpoint sequence number, one more at each restart of the log
    16       4   salt-1, one more at each restart
    20       4   salt-2, random at each restart
    24       8   checksum of bytes 0..23

Frames follow, numbered from 1, each 24 bytes and a page:

     0       4   page number
     4       4   size of the database in pages after the commit, in the last frame of a transaction; else 0
     8       8   the header's salts
    16       8   checksum over the header's first 24 bytes, then bytes 0..7 and the page of every frame up to this one
    24       n   page

A frame counts if its salts are the header's, its page number is not 0, its checksum continues the chain, and
a frame with a commit size follows (or is) that counts too. Frames of an earlier round stay behind the newest
ones: their salts differ. A torn write breaks the checksum there and ends the log at the last commit before.

The checksum of words x0, x1, ... is s0 += x[i] + s1; s1 += x[i+1] + s0 (mod 2**32). One step is linear in
(s0, s1), with M = [[1,1],[1,2]], so n words are one product with constant weights, and the state they start
from only goes through M**(n/2). That is what `FrameChecksums` does, without a loop over words.
Source: sqlite.org/fileformat2.html, section 4; wal.c (walChecksumBytes, walEncodeFrame, walDecodeFrame).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pylitefs.errors import FormatError, TruncatedError
from pylitefs.formats.sqlite.header import Buffer, valid_page_size

WAL_HEADER_SIZE = 32
FRAME_HEADER_SIZE = 24
VERSION = 3007000
MAGIC_LE = 0x377F0682
MAGIC_BE = 0x377F0683

_HEADER = struct.Struct(">8I")
_FRAME = struct.Struct(">6I")
_CHECKSUM = struct.Struct(">II")
_MASK = 0xFFFFFFFF
_FRAME_HEADER_WORDS = FRAME_HEADER_SIZE // 4
# So many bytes of frames are summed at a time: they stay in the second-level cache between the two passes.
_CHUNK_BYTES = 1 << 18

assert _HEADER.size == WAL_HEADER_SIZE
assert _FRAME.size == FRAME_HEADER_SIZE

Words = NDArray[np.uint32]
Bytes2D = NDArray[np.uint8]


def wal_checksum(data: Buffer, s0: int = 0, s1: int = 0, big_endian: bool = False) -> tuple[int, int]:
    """Continue the checksum (s0, s1) over `data`, a multiple of 8 bytes; for headers, not for pages.

    Raises FormatError for another length.
    """
    if len(data) % 8:
        raise FormatError(f"a WAL checksum covers a multiple of 8 bytes, not {len(data)}")
    words = struct.unpack(f"{'>' if big_endian else '<'}{len(data) // 4}I", data)
    for i in range(0, len(words), 2):
        s0 = (s0 + words[i] + s1) & _MASK
        s1 = (s1 + words[i + 1] + s0) & _MASK
    return s0, s1


@dataclass(frozen=True, slots=True)
class WalHeader:
    """The header of a -wal file. Its two checksums are where the chain of the frames starts."""

    big_endian: bool
    page_size: int
    checkpoint_seq: int
    salt1: int
    salt2: int
    checksum1: int
    checksum2: int

    @classmethod
    def create(
        cls, page_size: int, checkpoint_seq: int, salt1: int, salt2: int, big_endian: bool = False
    ) -> WalHeader:
        """A header with its checksum computed. FormatError if the page size is none of SQLite's."""
        if not valid_page_size(page_size):
            raise FormatError(f"{page_size} is not a SQLite page size")
        bare = cls(big_endian, page_size, checkpoint_seq, salt1, salt2, 0, 0)
        checksums = wal_checksum(bare.pack()[:24], 0, 0, big_endian)
        return cls(big_endian, page_size, checkpoint_seq, salt1, salt2, *checksums)

    @property
    def magic(self) -> int:
        return MAGIC_BE if self.big_endian else MAGIC_LE

    @property
    def salts(self) -> tuple[int, int]:
        return self.salt1, self.salt2

    @property
    def frame_size(self) -> int:
        """Bytes from one frame to the next."""
        return FRAME_HEADER_SIZE + self.page_size

    def pack(self) -> bytes:
        """The WAL_HEADER_SIZE bytes as they are stored."""
        return _HEADER.pack(
            self.magic, VERSION, self.page_size, self.checkpoint_seq, *self.salts, self.checksum1, self.checksum2
        )

    @classmethod
    def unpack(cls, data: Buffer) -> WalHeader:
        """Decode and check the first WAL_HEADER_SIZE bytes. TruncatedError, FormatError."""
        if len(data) < WAL_HEADER_SIZE:
            raise TruncatedError(f"a WAL header has {WAL_HEADER_SIZE} bytes, not {len(data)}")
        magic, version, page_size, sequence, salt1, salt2, checksum1, checksum2 = _HEADER.unpack_from(data)
        if magic not in (MAGIC_LE, MAGIC_BE):
            raise FormatError(f"not a WAL: its magic is {magic:#010x}")
        if version != VERSION:
            raise FormatError(f"unknown WAL version {version}")
        if not valid_page_size(page_size):
            raise FormatError(f"{page_size} is not a SQLite page size")
        header = cls(magic == MAGIC_BE, page_size, sequence, salt1, salt2, checksum1, checksum2)
        if wal_checksum(data[:24], 0, 0, header.big_endian) != (checksum1, checksum2):
            raise FormatError("the checksum of the WAL header is wrong")
        return header


def frame_offset(frame_no: int, page_size: int) -> int:
    """Byte offset in the file of the header of frame `frame_no`, counted from 1."""
    return WAL_HEADER_SIZE + (frame_no - 1) * (FRAME_HEADER_SIZE + page_size)


def page_offset(frame_no: int, page_size: int) -> int:
    """Byte offset in the file of the page of frame `frame_no`, counted from 1."""
    return frame_offset(frame_no, page_size) + FRAME_HEADER_SIZE


def _weights(pairs: int) -> tuple[Words, tuple[int, int, int, int]]:
    """The checksum of `pairs` pairs of words as a matrix (2, 2 * pairs), and M**pairs by rows."""
    table = np.zeros((2, 2 * pairs), dtype=np.uint32)
    a, b, c, d = 1, 0, 0, 1
    for pair in range(pairs - 1, -1, -1):
        # A pair (x, y) adds (x, x + y), which then passes through the steps of all later pairs.
        table[:, 2 * pair] = (a + b) & _MASK, (c + d) & _MASK
        table[:, 2 * pair + 1] = b, d
        a, b, c, d = (a + b) & _MASK, (a + 2 * b) & _MASK, (c + d) & _MASK, (c + 2 * d) & _MASK
    return table, (a, b, c, d)


class FrameChecksums:
    """Checksums of whole frames of one page size and byte order. Stateless; take it from `frame_checksums`.

    Measured: 0.4 µs for a 4 KiB page in runs, about 4 µs for a single one; integer loops of numpy, no BLAS and
    so no threads.
    """

    def __init__(self, page_size: int, big_endian: bool = False) -> None:
        if not valid_page_size(page_size):
            raise FormatError(f"{page_size} is not a SQLite page size")
        self.page_size = page_size
        self._dtype = np.dtype(">u4" if big_endian else "<u4")
        covered, self._step = _weights((8 + page_size) // 8)
        self._header_weights = np.ascontiguousarray(covered[:, :2])
        # A frame as it lies in the file: the salts and the checksum between number and page weigh nothing.
        gap = np.zeros((2, _FRAME_HEADER_WORDS - 2), dtype=np.uint32)
        self._frame_weights = np.ascontiguousarray(np.hstack((covered[:, :2], gap, covered[:, 2:])))
        self._page_weights = np.ascontiguousarray(covered[:, 2:])

    def _product(self, data: NDArray[Any], weights: Words) -> Words:
        """Rows of bytes (k, 4 * n) times weights (2, n): uint32 (k, 2)."""
        words = data.view(self._dtype)
        count = len(words)
        if count == 1:
            row = words[0].astype(np.uint32, copy=False)
            return np.array([[row.dot(weights[0]), row.dot(weights[1])]], dtype=np.uint32)
        out = np.empty((count, 2), dtype=np.uint32)
        rows = max(1, _CHUNK_BYTES // (4 * words.shape[1]))
        for start in range(0, count, rows):
            part = words[start : start + rows].astype(np.uint32, copy=False)
            np.einsum("ij,kj->ik", part, weights, out=out[start : start + rows])
        return out

    def frame_sums(self, frames: Bytes2D) -> Words:
        """What each frame of uint8 (k, frame size) adds to the chain: uint32 (k, 2)."""
        return self._product(frames, self._frame_weights)

    def advance(self, state: Words, sums: Words) -> Words:
        """The checksums after frames that add `sums`, when those before them are `state`; both uint32 (k, 2)."""
        a, b, c, d = self._step
        out = sums.copy()
        out[:, 0] += state[:, 0] * np.uint32(a) + state[:, 1] * np.uint32(b)
        out[:, 1] += state[:, 0] * np.uint32(c) + state[:, 1] * np.uint32(d)
        return out

    def accumulate(self, sums: Words, s0: int, s1: int) -> Words:
        """The checksum after each frame, uint32 (k, 2), for frames that add `sums` after the state (s0, s1)."""
        a, b, c, d = self._step
        chain: list[tuple[int, int]] = []
        for add0, add1 in sums.tolist():
            s0, s1 = (a * s0 + b * s1 + add0) & _MASK, (c * s0 + d * s1 + add1) & _MASK
            chain.append((s0, s1))
        return np.array(chain, dtype=np.uint32).reshape(-1, 2)

    def chain(self, headers8: NDArray[Any], pages: Bytes2D, s0: int, s1: int) -> Words:
        """The checksum after each of k frames, uint32 (k, 2), after the state (s0, s1).

        headers8: the first 8 bytes of each frame as stored, uint8 (k, 8) or any (k, 2) of 4-byte words.
        pages: uint8 (k, page size).
        """
        sums = self._product(np.ascontiguousarray(headers8).view(np.uint8), self._header_weights)
        sums += self._product(pages, self._page_weights)
        return self.accumulate(sums, s0, s1)


@lru_cache(maxsize=16)
def frame_checksums(page_size: int, big_endian: bool = False) -> FrameChecksums:
    """The shared `FrameChecksums` of this page size and byte order."""
    return FrameChecksums(page_size, big_endian)


def encode_frames(
    header: WalHeader, pgnos: Sequence[int], pages: Sequence[Buffer] | Bytes2D, commit: int, s0: int, s1: int
) -> tuple[bytearray, int, int]:
    """Frames in a row, ready for one write at `frame_offset(first frame)`, and the checksum after them.

    pages: as many buffers of `page_size` bytes as `pgnos`, or uint8 (k, page size). commit: size of the database
    in pages, stored in the last frame; 0 if the transaction goes on in a later run. (s0, s1): the checksum of
    the frame before, or the header's. FormatError if lengths do not fit or a page number is out of range.
    """
    count, page_size, frame_size = len(pgnos), header.page_size, header.frame_size
    if len(pages) != count:
        raise FormatError(f"{count} page numbers for {len(pages)} pages")
    if not count:
        return bytearray(), s0, s1
    if not (min(pgnos) > 0 and max(pgnos) <= _MASK and 0 <= commit <= _MASK):
        raise FormatError("a page number or commit size is out of range")
    out = bytearray(count * frame_size)
    frames = np.frombuffer(out, dtype=np.uint8).reshape(count, frame_size)
    if isinstance(pages, np.ndarray):
        if pages.shape != (count, page_size):
            raise FormatError(f"pages of shape {pages.shape} for {count} pages of {page_size} bytes")
        frames[:, FRAME_HEADER_SIZE:] = pages
    else:
        view, offset = memoryview(out), FRAME_HEADER_SIZE
        for page in pages:
            if len(page) != page_size:
                raise FormatError(f"a page of {len(page)} bytes in a WAL with pages of {page_size}")
            view[offset : offset + page_size] = page
            offset += frame_size
    sums = frame_checksums(page_size, header.big_endian)
    if count == 1:  # the usual small transaction: no arrays for one header
        _FRAME.pack_into(out, 0, pgnos[0], commit, *header.salts, 0, 0)
        last0, last1 = sums.accumulate(sums.frame_sums(frames), s0, s1)[0].tolist()
        _CHECKSUM.pack_into(out, 16, last0, last1)
        return out, last0, last1
    words = frames.view(">u4")
    words[:, 0] = pgnos
    words[-1, 1] = commit
    words[:, 2:4] = header.salts
    chain = sums.accumulate(sums.frame_sums(frames), s0, s1)
    words[:, 4:6] = chain
    return out, int(chain[-1, 0]), int(chain[-1, 1])


@dataclass(frozen=True, slots=True)
class Scan:
    """What a run of frames holds, up to the first one that does not count.

    pgnos, commits: uint32 (count,), the fields of the valid frames. (s0, s1): the checksum after the last valid
    frame. committed: how many of them go up to and including the last commit frame; (committed_s0, committed_s1)
    is the checksum there, and (s0, s1) as they were passed in if `committed` is 0.
    """

    pgnos: Words
    commits: Words
    count: int
    s0: int
    s1: int
    committed: int
    committed_s0: int
    committed_s1: int


def scan_frames(header: WalHeader, buf: Buffer, s0: int, s1: int) -> Scan:
    """Check the whole frames in `buf`, which follow a frame whose checksum is (s0, s1), or the WAL header.

    Bytes after the last whole frame are left out. Call again with the result's (s0, s1) and the next frames.
    """
    words_per_frame = header.frame_size // 4
    count = len(buf) // header.frame_size
    stored = np.frombuffer(buf, dtype=">u4", count=count * words_per_frame).reshape(count, words_per_frame)
    head = stored[:, :_FRAME_HEADER_WORDS].astype(np.uint32)
    fits = (head[:, 2] == header.salt1) & (head[:, 3] == header.salt2) & (head[:, 0] != 0)
    count = _leading(fits)
    # Each frame is checked against the stored checksum before it, so no frame waits for the one before.
    state = np.empty((count, 2), dtype=np.uint32)
    state[:1] = s0, s1
    state[1:] = head[: max(count - 1, 0), 4:6]
    sums = frame_checksums(header.page_size, header.big_endian)
    rows = max(1, 4 * _CHUNK_BYTES // header.frame_size)
    valid = 0
    while valid < count:  # in parts, so that garbage after a broken frame costs little
        end = min(count, valid + rows)
        expected = sums.advance(state[valid:end], sums.frame_sums(stored[valid:end].view(np.uint8)))
        good = _leading((expected == head[valid:end, 4:6]).all(axis=1))
        valid += good
        if valid < end:
            break
    pgnos, commits = head[:valid, 0].copy(), head[:valid, 1].copy()
    last = np.flatnonzero(commits)
    committed = int(last[-1]) + 1 if len(last) else 0
    return Scan(pgnos, commits, valid, *_checksum_at(head, valid, s0, s1),
                committed, *_checksum_at(head, committed, s0, s1))  # fmt: skip


def _leading(flags: NDArray[np.bool_]) -> int:
    """How many True stand before the first False."""
    return len(flags) if flags.all() else int(flags.argmin())


def _checksum_at(head: Words, count: int, s0: int, s1: int) -> tuple[int, int]:
    """The stored checksum of the last of `count` frames; (s0, s1) for none."""
    return (int(head[count - 1, 4]), int(head[count - 1, 5])) if count else (s0, s1)
