"""A bounded reader over bytes that somebody else wrote, and the matching writers.

Fixed-width integers are big-endian. Variable-length ones are LEB128 as in Go's `encoding/binary` and in protobuf:
seven bits a byte, least significant first, bit 7 set on all but the last, at most ten bytes for 64 bits.
A *counted* field (`bytes`, `string`) is its length as such a varint, then that many bytes. Every counted field is
read against a limit given by the caller, checked before a byte of it is touched, so that no length found in the
input decides how much is allocated.

Whatever the input is, only `FormatError` is raised; `TruncatedError` when it ends too early.
"""

from __future__ import annotations

import struct
from typing import TypeAlias

from pylitefs.errors import FormatError, TruncatedError

Buffer: TypeAlias = bytes | bytearray | memoryview
_Bytes: TypeAlias = bytes  # `Cursor.bytes` hides the builtin inside the class

MAX_UVARINT_SIZE = 10  # bytes of a 64-bit value
_U64_MAX = (1 << 64) - 1
_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")


class Cursor:
    """Reads forward through `data`, never past its end.

    `offset` is the index of the next unread byte, `remaining` the number of bytes still there.
    A read that fails leaves the cursor where that read began.
    """

    __slots__ = ("_data", "_end", "offset")

    def __init__(self, data: Buffer) -> None:
        view = memoryview(data)
        self._data = view if view.format == "B" and view.ndim == 1 else view.cast("B")
        self._end = len(self._data)
        self.offset = 0

    @property
    def remaining(self) -> int:
        return self._end - self.offset

    def _advance(self, count: int) -> int:
        """Step over `count` bytes and return where they begin."""
        start = self.offset
        if count < 0 or count > self._end - start:
            raise TruncatedError(f"{count} bytes expected at offset {start}, only {self._end - start} are left")
        self.offset = start + count
        return start

    def u8(self) -> int:
        return self._data[self._advance(1)]

    def u16(self) -> int:
        value: int = _U16.unpack_from(self._data, self._advance(2))[0]
        return value

    def u32(self) -> int:
        value: int = _U32.unpack_from(self._data, self._advance(4))[0]
        return value

    def u64(self) -> int:
        value: int = _U64.unpack_from(self._data, self._advance(8))[0]
        return value

    def uvarint(self) -> int:
        """An unsigned integer below 2^64. Longer spellings than needed are accepted, as Go does."""
        start = self.offset
        value = 0
        for index in range(MAX_UVARINT_SIZE):
            at = start + index
            if at >= self._end:
                raise TruncatedError(f"the varint at offset {start} does not end")
            byte = self._data[at]
            value |= (byte & 0x7F) << (7 * index)
            if byte < 0x80:
                if value > _U64_MAX:
                    break
                self.offset = at + 1
                return value
        raise FormatError(f"the varint at offset {start} does not fit in 64 bits")

    def take(self, count: int) -> _Bytes:
        """Exactly `count` raw bytes; the caller has bounded `count`."""
        start = self._advance(count)
        return self._data[start : start + count].tobytes()

    def bytes(self, limit: int) -> _Bytes:
        """A counted field of at most `limit` bytes."""
        start = self.offset
        count = self.uvarint()
        if count > limit:
            self.offset = start
            raise FormatError(f"a field of {count} bytes at offset {start}, at most {limit} are allowed")
        try:
            return self.take(count)
        except TruncatedError:
            self.offset = start
            raise

    def string(self, limit: int) -> str:
        """A counted field of at most `limit` bytes that holds UTF-8."""
        start = self.offset
        raw = self.bytes(limit)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self.offset = start
            raise FormatError(f"the text at offset {start} is not UTF-8") from None

    def expect_end(self) -> None:
        if self.remaining:
            raise FormatError(f"{self.remaining} unexpected bytes after offset {self.offset}")


def pack_uvarint(value: int) -> bytes:
    """`value` (0 to 2^64 - 1) in its shortest spelling; the counterpart of `Cursor.uvarint`."""
    if not 0 <= value <= _U64_MAX:
        raise FormatError(f"{value} does not fit in 64 unsigned bits")
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def pack_bytes(data: Buffer) -> bytes:
    """The counterpart of `Cursor.bytes`."""
    raw = bytes(data)
    return pack_uvarint(len(raw)) + raw


def pack_string(text: str) -> bytes:
    """The counterpart of `Cursor.string`."""
    return pack_bytes(text.encode("utf-8"))
