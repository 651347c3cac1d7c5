"""SQLite's wal-index: NAME-shm, shared memory that finds the newest frame of a page. Integers are in the host's
byte order: the file never leaves the machine and may be rebuilt from the WAL at any time.

    offset  size
      0      48   header, first copy
     48      48   header, second copy: written first, so two equal copies are one consistent state
     96       4   nBackfill: so many frames are checkpointed into the database
    100    5 x 4  aReadMark: readers on slot i use frames up to this one; 0xffffffff: slot not in use
    120       8   lock bytes, see `locks`; never written
    128       4   nBackfillAttempted: so many may be partly checkpointed
    132       4   unused

One copy of the header:

      0       4   version 3007000
      4       4   unused
      8       4   iChange, one more at each commit
     12       1   isInit, 1 when the wal-index is usable
     13       1   1 if the WAL's checksums are over big-endian words
     14       2   page size, 1 for 65536
     16       4   mxFrame: frames 1..mxFrame are committed
     20       4   nPage: size of the database in pages
     24       8   checksum of frame mxFrame
     32       8   salts, copied as the bytes of the WAL header, so big-endian on every host
     40       8   checksum of bytes 0..39, as in the WAL, over words of the host

Then regions of 32 KiB. Each has the page numbers of its frames (4 bytes each; 4062 of them in region 0, after the
136 bytes above, and 4096 in the others), and 8192 hash slots of 2 bytes: a slot holds 1 + the position of a frame
in the region, or 0. A page starts at slot pgno * 383 mod 8192 and takes the first free one. A region is zeroed when
its first frame is entered, so what is behind mxFrame in it or in later regions means nothing.

A torn header shows as two copies that differ, or a wrong checksum: then read again, or recover from the WAL.
Source: sqlite.org/walformat.html, section 2; wal.c (WalIndexHdr, WalCkptInfo, walIndexAppend, walCleanupHash).
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from sys import byteorder
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pylitefs.errors import FormatError, TruncatedError
from pylitefs.formats.sqlite.header import Buffer, valid_page_size
from pylitefs.formats.sqlite.wal import wal_checksum

REGION_SIZE = 32768
HEADER_SIZE = 136
HEADER_COPY_SIZE = 48
HASH_SLOTS = 8192
PAGES_FIRST = 4062
PAGES_REST = 4096
READMARK_NOT_USED = 0xFFFFFFFF
VERSION = 3007000

CHECKPOINT_INFO_OFFSET = 96
CHECKPOINT_INFO_SIZE = 40
BACKFILL_OFFSET = 96
BACKFILL_ATTEMPTED_OFFSET = 128

_HOST_IS_BIG = byteorder == "big"
_COVERED = struct.Struct("=IIIBBHII2I")
_SALTS = struct.Struct(">2I")
_PAIR = struct.Struct("=2I")
_CHECKPOINT = struct.Struct("=I5I8xI4x")
_SLOTS_OFFSET = PAGES_REST * 4
_MULTIPLIER = 383
_SLOT_MASK = HASH_SLOTS - 1
_ALL_FREE = list(range(HASH_SLOTS))
# One more write costs about as much as so many bytes more in one.
_MERGE_SLOTS = 512
_MAX_SLOT_RUNS = 3
_FEW = 48

assert _COVERED.size + _SALTS.size + _PAIR.size == HEADER_COPY_SIZE
assert _CHECKPOINT.size == CHECKPOINT_INFO_SIZE == HEADER_SIZE - CHECKPOINT_INFO_OFFSET
assert HEADER_SIZE + PAGES_FIRST * 4 == _SLOTS_OFFSET
assert _SLOTS_OFFSET + HASH_SLOTS * 2 == REGION_SIZE
assert array("I").itemsize == 4 and array("H").itemsize == 2

Patch = tuple[int, bytes]


@dataclass(frozen=True, slots=True)
class WalIndexHeader:
    """What is committed. `frame_checksum` belongs to frame `mx_frame`; `salts` equal those of the `WalHeader`."""

    change: int
    big_endian_checksum: bool
    page_size: int
    mx_frame: int
    page_count: int
    frame_checksum: tuple[int, int]
    salts: tuple[int, int]
    is_init: bool = True

    def pack(self, version: int = VERSION) -> bytes:
        """One copy, HEADER_COPY_SIZE bytes, with its checksum. With another `version` SQLite refuses the database
        (SQLITE_CANTOPEN): a sound header that it does not know, so that it does not make it anew."""
        size = (self.page_size & 0xFF00) | (self.page_size >> 16)
        body = _COVERED.pack(
            version, 0, self.change, self.is_init, self.big_endian_checksum, size, self.mx_frame, self.page_count,
            *self.frame_checksum,
        ) + _SALTS.pack(*self.salts)  # fmt: skip
        return body + _PAIR.pack(*wal_checksum(body, 0, 0, _HOST_IS_BIG))

    @classmethod
    def unpack(cls, data: Buffer) -> WalIndexHeader:
        """Decode and check one copy. TruncatedError; FormatError for a wrong checksum, version or page size."""
        if len(data) < HEADER_COPY_SIZE:
            raise TruncatedError(f"a wal-index header has {HEADER_COPY_SIZE} bytes, not {len(data)}")
        if wal_checksum(data[:40], 0, 0, _HOST_IS_BIG) != _PAIR.unpack_from(data, 40):
            raise FormatError("the checksum of the wal-index header is wrong")
        version, _, change, init, big, size, mx_frame, page_count, sum0, sum1 = _COVERED.unpack_from(data)
        if version != VERSION:
            raise FormatError(f"unknown wal-index version {version}")
        if init > 1 or big > 1:
            raise FormatError("a flag of the wal-index header is neither 0 nor 1")
        page_size = (size & 0xFE00) + ((size & 1) << 16)
        if (mx_frame or page_size) and not valid_page_size(page_size):
            raise FormatError(f"{page_size} is not a SQLite page size")
        salts = _SALTS.unpack_from(data, _COVERED.size)
        return cls(change, big == 1, page_size, mx_frame, page_count, (sum0, sum1), (salts[0], salts[1]), init == 1)


RETIRED_VERSION = 1
"""Of a wal-index that nobody is to use any more, see `WalIndexHeader.pack`."""


def read_header(data: Buffer) -> WalIndexHeader | None:
    """The header from the start of the file (96 bytes or more), or None if it is torn, damaged or not yet written.

    `page_size` may be 0 when recovery found no WAL; then `mx_frame` is 0 too.
    """
    first = bytes(data[:HEADER_COPY_SIZE])
    if len(first) < HEADER_COPY_SIZE or first != data[HEADER_COPY_SIZE : 2 * HEADER_COPY_SIZE]:
        return None
    try:
        header = WalIndexHeader.unpack(first)
    except FormatError:
        return None
    return header if header.is_init else None


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """How far checkpoints went and which slots readers use. All are frame numbers.

    Other processes change single fields of it at any time: write one field (`read_mark_offset`), never all.
    """

    backfill: int
    read_marks: tuple[int, int, int, int, int]
    backfill_attempted: int

    def pack(self) -> bytes:
        """CHECKPOINT_INFO_SIZE bytes for offset CHECKPOINT_INFO_OFFSET of a file that nobody else uses yet."""
        return _CHECKPOINT.pack(self.backfill, *self.read_marks, self.backfill_attempted)

    @classmethod
    def unpack(cls, data: Buffer) -> CheckpointInfo:
        """Decode the bytes from CHECKPOINT_INFO_OFFSET on. TruncatedError if they are too few."""
        if len(data) < CHECKPOINT_INFO_SIZE:
            raise TruncatedError(f"the checkpoint info has {CHECKPOINT_INFO_SIZE} bytes, not {len(data)}")
        backfill, m0, m1, m2, m3, m4, attempted = _CHECKPOINT.unpack_from(data)
        return cls(backfill, (m0, m1, m2, m3, m4), attempted)


def read_mark_offset(slot: int) -> int:
    """Byte offset in the file of aReadMark[slot], 0 <= slot < 5."""
    return CHECKPOINT_INFO_OFFSET + 4 + 4 * slot


def region_of(frame: int) -> int:
    """Which region, from 0, has the entry of frame `frame`, from 1."""
    return (frame + PAGES_REST - PAGES_FIRST - 1) // PAGES_REST


def _frames_before(region: int) -> int:
    """iZero: how many frames are entered in earlier regions."""
    return PAGES_FIRST + (region - 1) * PAGES_REST if region else 0


def _pgno_offset(frame: int) -> int:
    region = region_of(frame)
    start = region * REGION_SIZE if region else HEADER_SIZE
    return start + 4 * (frame - 1 - _frames_before(region))


def pgno_locations(first_frame: int, last_frame: int) -> list[tuple[int, int]]:
    """Where the page numbers of these frames (both included) are: (byte offset, how many), one per region."""
    found: list[tuple[int, int]] = []
    frame = first_frame
    while frame <= last_frame:
        end = min(last_frame, _frames_before(region_of(frame) + 1))
        found.append((_pgno_offset(frame), end - frame + 1))
        frame = end + 1
    return found


def latest_frames(pgnos: NDArray[Any], first_frame: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Each page once with its newest frame, ordered by page number: (pgnos, frames), both uint32 (n,).

    pgnos: (k,), the page numbers of frames `first_frame`, `first_frame` + 1, ...
    """
    count = len(pgnos)
    if count <= _FEW:  # a dictionary is quicker than arrays for a small transaction
        newest_of = dict(zip(pgnos.tolist(), range(first_frame, first_frame + count), strict=True))
        order = sorted(newest_of)
        return np.array(order, dtype=np.uint32), np.array([newest_of[p] for p in order], dtype=np.uint32)
    keys = pgnos.astype(np.uint64) << np.uint64(32)
    keys |= np.arange(first_frame, first_frame + count, dtype=np.uint64)
    keys.sort()
    pages = (keys >> np.uint64(32)).astype(np.uint32)
    newest = np.ones(count, dtype=np.bool_)
    np.not_equal(pages[:-1], pages[1:], out=newest[:-1])
    return pages[newest], (keys[newest] & np.uint64(0xFFFFFFFF)).astype(np.uint32)


class HashTables:
    """The page numbers and hash tables as the only WAL writer knows them, to write them without reading.

    Every change returns patches, (offset in the file, bytes), to be written in their order and before the header
    that makes the frames visible. A patch may rewrite entries of earlier frames with what they already hold, which
    no reader can notice.
    """

    def __init__(self) -> None:
        self._pgnos = array("I")
        self._slots = array("H")
        # The first slot that may be free, from each slot on: a union-find forest. Hot pages make runs of
        # thousands of slots, which would otherwise be walked again for each frame.
        self._free: list[int] = []
        self._newest: dict[int, int] = {}
        self._newest_upto = 0
        self.clear()

    @classmethod
    def from_pgnos(cls, pgnos: Iterable[int] | NDArray[Any]) -> HashTables:
        """The tables that SQLite has after frames 1.. of these pages. Nothing is to be written for them; if the
        last writer may have left more frames behind, write the patches of `truncate(mx_frame)`."""
        tables = cls()
        values = pgnos.tolist() if isinstance(pgnos, np.ndarray) else list(pgnos)
        kept = _frames_before(region_of(len(values))) if values else 0
        _check_pgnos(values)
        tables._pgnos.extend(values[:kept])  # only the last region can get more entries
        tables.append(values[kept:])
        return tables

    @property
    def mx_frame(self) -> int:
        """How many frames are entered."""
        return len(self._pgnos)

    def clear(self) -> None:
        """Forget all frames, for a restart of the WAL. The file may stay: the next frame zeroes region 0."""
        self._pgnos = array("I")
        self._newest = {}
        self._newest_upto = 0
        self._slots, self._free = array("H"), []  # made when the first frame of a region comes

    def append(self, pgnos: Sequence[int] | NDArray[Any]) -> list[Patch]:
        """Enter frames mx_frame + 1, ... of these pages. FormatError, and no change, for an impossible page number."""
        values: Sequence[int] = pgnos.tolist() if isinstance(pgnos, np.ndarray) else pgnos
        _check_pgnos(values)
        patches: list[Patch] = []
        done = 0
        while done < len(values):
            frame = len(self._pgnos) + 1
            region = region_of(frame)
            room = _frames_before(region + 1) - frame + 1
            run = values[done : done + room]
            patches += self._append_run(region, frame, run)
            done += len(run)
        return patches

    def truncate(self, mx_frame: int) -> list[Patch]:
        """Forget the frames after `mx_frame`; its whole region is written anew, without any traces of others.

        For frames that were not committed: ours, or (with the present mx_frame) those of a writer that died.
        """
        if mx_frame > len(self._pgnos):
            raise FormatError(f"cannot go back to frame {mx_frame}: only {len(self._pgnos)} are entered")
        if mx_frame == 0:
            self.clear()
            return []
        del self._pgnos[mx_frame:]
        self._newest, self._newest_upto = {}, 0
        region = region_of(mx_frame)
        first = _frames_before(region)
        self._new_region()
        self._enter(self._pgnos[first:].tolist(), 1)
        return [self._region_patch(region)]

    def lookup(self, pgno: int, mx_frame: int | None = None) -> int:
        """The newest frame of page `pgno` among frames 1..mx_frame (default: all); 0 if there is none."""
        count = len(self._pgnos)
        if self._newest_upto < count:
            self._newest.update((pgno, frame) for frame, pgno in self._frames_after(self._newest_upto))
            self._newest_upto = count
        frame = self._newest.get(pgno, 0)
        if mx_frame is None or frame <= mx_frame:
            return frame
        older = np.flatnonzero(np.frombuffer(self._pgnos[: max(mx_frame, 0)], dtype=np.uint32) == pgno)
        return int(older[-1]) + 1 if len(older) else 0

    def _frames_after(self, frame: int) -> Iterable[tuple[int, int]]:
        return enumerate(self._pgnos[frame:], frame + 1)

    def latest_frames(self, first: int, last: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """As the function of this name, of frames first..last (both included)."""
        return latest_frames(np.array(self._pgnos[first - 1 : last], dtype=np.uint32), first)

    def _new_region(self) -> None:
        self._slots = array("H", bytes(2 * HASH_SLOTS))
        self._free = _ALL_FREE[:]

    def _append_run(self, region: int, frame: int, run: Sequence[int]) -> list[Patch]:
        """Enter frames that all belong to `region`."""
        position = frame - _frames_before(region)
        if position == 1:
            self._new_region()
        self._pgnos.extend(run)
        touched = self._enter(run, position)
        if position == 1:
            return [self._region_patch(region)]
        pgnos = self._pgnos[frame - 1 : frame - 1 + len(run)]
        return [(_pgno_offset(frame), pgnos.tobytes()), *self._slot_patches(region, touched)]

    def _enter(self, run: Sequence[int], position: int) -> list[int]:
        """Take a slot for each page, for the positions in the region from `position` on; the slots taken."""
        slots, free = self._slots, self._free
        touched: list[int] = []
        for pgno in run:
            key = pgno * _MULTIPLIER & _SLOT_MASK
            slot = free[key]
            if slot != key:
                while free[slot] != slot:
                    slot = free[slot]
                while key != slot:
                    free[key], key = slot, free[key]
            slots[slot] = position
            free[slot] = (slot + 1) & _SLOT_MASK
            touched.append(slot)
            position += 1
        return touched

    def _slot_patches(self, region: int, touched: list[int]) -> list[Patch]:
        """Few writes that cover the slots: one for each cluster, or a single one when they are scattered."""
        touched.sort()
        runs: list[list[int]] = []
        for slot in touched:
            if runs and slot - runs[-1][1] <= _MERGE_SLOTS:
                runs[-1][1] = slot
            elif len(runs) == _MAX_SLOT_RUNS:
                runs = [[touched[0], touched[-1]]]
                break
            else:
                runs.append([slot, slot])
        base = region * REGION_SIZE + _SLOTS_OFFSET
        return [(base + 2 * low, self._slots[low : high + 1].tobytes()) for low, high in runs]

    def _region_patch(self, region: int) -> Patch:
        """The whole region: the file reaches to its end afterwards, as readers map regions whole."""
        pgnos = self._pgnos[_frames_before(region) :].tobytes()
        start = 0 if region else HEADER_SIZE
        body = pgnos + bytes(_SLOTS_OFFSET - start - len(pgnos)) + self._slots.tobytes()
        return region * REGION_SIZE + start, body


def _check_pgnos(pgnos: Sequence[int]) -> None:
    if len(pgnos) and not (min(pgnos) > 0 and max(pgnos) <= 0xFFFFFFFF):
        raise FormatError("a page number is out of range")
