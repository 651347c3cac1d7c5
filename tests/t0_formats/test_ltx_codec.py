"""Encoder and decoder against files of the Go implementation, against each other, and against damage."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import lz4.block
import lz4.frame
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pylitefs.errors import FormatError, TruncatedError
from pylitefs.formats.ltx import encoder as encoder_module
from pylitefs.formats.ltx.checksum import combine, crc64, page_checksum
from pylitefs.formats.ltx.decoder import Decoder, Ltx, Reader, decode, decode_index, decode_page, verify_stream
from pylitefs.formats.ltx.encoder import Encoder, encode, encode_parts
from pylitefs.formats.ltx.format import CHECKSUM_FLAG, HEADER_FLAG_NO_CHECKSUM, HEADER_SIZE, Header, Trailer, lock_pgno
from pylitefs.formats.ltx.frames import payload_limit
from pylitefs.formats.ltx.index import TAIL_SIZE, index_range

Pages = list[tuple[int, bytes]]

# A snapshot of two pages, 1024 * 81 and 256 * "abcd", written by superfly/ltx 0.5.2.
GO_SNAPSHOT = bytes.fromhex(
    "4c54583100000000000004000000000200000000000000010000000000000001"
    "00000000000003e8000000000000000000000000000000000000000000000000"
    "0000000000000000000000000000000000000000000000000000000000000000"
    "000000000000000100010000001a1f810100ffffffdc000200000200b0818181"
    "81818181818181810000000200010000001b4f616263640400ffffffdc00ec03"
    "c061626364616263646162636400000000000001642402880125000000000000"
    "000008a09639bc718d9c58dc2f8726a386540e"
)
GO_PAGES = [(1, b"\x81" * 1024), (2, b"abcd" * 256)]
# Three pages filled with 91, 82 and 93, compacted from two files by the same version.
GO_COMPACTED = bytes.fromhex(
    "4c54583100000000000004000000000300000000000000010000000000000002"
    "00000000000007d0000000000000000000000000000000000000000000000000"
    "0000000000000000000000000000000000000000000000000000000000000000"
    "000000000000000100010000001a1f910100ffffffdc000200000200b0919191"
    "91919191919191910000000200010000001a1f820100ffffffdc000200000200"
    "b082828282828282828282820000000300010000001a1f930100ffffffdc0002"
    "00000200b093939393939393939393930000000000000164240288012403ac01"
    "2400000000000000000c8a249272ad9f7dea91206f60138b3298"
)


def database_checksum(pages: Pages) -> int:
    total = CHECKSUM_FLAG
    for pgno, page in pages:
        total = combine(total, 0, page_checksum(pgno, page))
    return total


def noise(seed: int, size: int = 512) -> bytes:
    return random.Random(seed).randbytes(size)


def increment(pages: Pages, commit: int = 100, page_size: int = 512) -> bytes:
    return encode(Header(0, page_size, commit, 2, 4, 1000, CHECKSUM_FLAG | 5), pages, CHECKSUM_FLAG | 6)


def snapshot(pages: Pages, page_size: int = 512) -> bytes:
    return encode(Header(0, page_size, len(pages), 1, 9, 1000, 0), pages, database_checksum(pages))


SAMPLE_PAGES: Pages = [(2, noise(1)), (3, bytes(512)), (50, noise(2)[:256] + bytes(256)), (100, b"ab" * 256)]


# --- files of the Go implementation


def test_go_files_decode() -> None:
    assert decode(GO_SNAPSHOT) == Ltx(
        Header(0, 1024, 2, 1, 1, 1000, 0), tuple(GO_PAGES), Trailer(0xA09639BC718D9C58, 0xDC2F8726A386540E)
    )
    ltx = decode(GO_COMPACTED)
    assert ltx.pages == ((1, b"\x91" * 1024), (2, b"\x82" * 1024), (3, b"\x93" * 1024))
    assert str(ltx.post_apply_position) == "0000000000000002/8a249272ad9f7dea"


@pytest.mark.parametrize("file", [GO_SNAPSHOT, GO_COMPACTED])
def test_same_bytes_as_go_given_the_same_lz4_blocks(file: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compressors differ, everything around the blocks must not."""
    header = Header.unpack(file)
    index = decode_index(file[slice_of_index(file)])
    blocks = {}
    pages = []
    for offset, size in index.values():
        pgno, page = decode_page(file[offset : offset + size], header.page_size)
        pages.append((pgno, page))
        blocks[page] = file[offset + 10 : offset + size]
    monkeypatch.setattr(encoder_module, "compress_page", blocks.__getitem__)
    assert encode(header, pages, int.from_bytes(file[-16:-8], "big")) == file


@pytest.mark.parametrize(
    ("header", "pgnos", "post", "file_checksum"),
    [
        (Header(0, 512, 16, 2, 3, 1000, CHECKSUM_FLAG | 1), [2, 5, 9, 16], CHECKSUM_FLAG | 2, 0xE27F4C18F0DA2C10),
        (Header(0, 512, 6, 1, 4, 1000, 0), range(1, 7), CHECKSUM_FLAG | 3, 0xD926967672F7CA53),
    ],
)
def test_file_checksums_of_go(
    header: Header, pgnos: list[int], post: int, file_checksum: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known checksums of superfly/ltx (encoder_golden_test.go). Its compressor makes 31 bytes of each of these pages;
    the file checksum covers that size, not the block."""
    monkeypatch.setattr(encoder_module, "compress_page", lambda page: bytes(31))
    encoder = Encoder(header)
    encoder.begin()
    for pgno in pgnos:
        encoder.page(pgno, bytes(pgno + i % 7 for i in range(512)))
    encoder.finish(post)
    assert encoder.trailer == Trailer(post, file_checksum)


def slice_of_index(file: bytes) -> slice:
    offset, size = index_range(file[-TAIL_SIZE:], len(file))
    return slice(offset, offset + size)


# --- the page frames of ltx 0.5.0 and 0.5.1


def old_file(header: Header, pages: Pages, post: int) -> bytes:
    """As those versions wrote it: no size, an LZ4 frame of 64 KiB blocks with a content checksum."""
    out, index, crc = header.pack(), b"", crc64(header.pack())
    for pgno, page in pages:
        head = struct.pack(">IH", pgno, 0)
        frame = head + lz4.frame.compress(
            page, block_size=lz4.frame.BLOCKSIZE_MAX64KB, block_linked=False, content_checksum=True, store_size=False
        )
        crc = crc64(page, crc64(head, crc))
        index += b"".join(encode_varint(n) for n in (pgno, len(out), len(frame)))
        out += frame
    tail = bytes(6) + index + b"\0" + struct.pack(">QQ", len(index) + 1, post)
    return out + tail + struct.pack(">Q", crc64(tail, crc) | CHECKSUM_FLAG)


def encode_varint(value: int) -> bytes:
    low = b""
    while value > 127:
        low += bytes([value % 128 + 128])
        value //= 128
    return low + bytes([value])


@pytest.mark.parametrize("page_size", [512, 4096, 65536])
def test_old_frames_are_read(page_size: int) -> None:
    pages = [(1, noise(3, page_size)), (2, bytes(page_size)), (3, b"abcdefgh" * (page_size // 8))]
    file = old_file(Header(0, page_size, 3, 1, 1, 5, 0), pages, database_checksum(pages))
    assert decode(file).pages == tuple(pages)
    assert feed_all(file, 1) == pages
    for pgno, (offset, size) in decode_index(file[slice_of_index(file)]).items():
        assert decode_page(file[offset : offset + size], page_size) == pages[pgno - 1]


def test_damaged_old_frames() -> None:
    pages = [(7, noise(4)), (8, b"x" * 512)]
    file = old_file(Header(0, 512, 9, 2, 2, 5, CHECKSUM_FLAG | 1), pages, CHECKSUM_FLAG | 2)
    check_damage(file, pages, seed=1)


def test_old_frame_has_one_block_and_one_shape() -> None:
    frame = struct.pack(">IH", 1, 0) + bytes.fromhex("04224d186440a7") + struct.pack("<I", 1 << 31 | 512)
    frame += noise(1) + bytes(4) + b"hash"
    assert decode_page(frame, 512) == (1, noise(1))
    damaged = bytearray(frame)
    damaged[-5] = 1
    with pytest.raises(FormatError, match="more than one block"):
        decode_page(damaged, 512)
    for at in range(6, 13):
        damaged = bytearray(frame)
        damaged[at] ^= 0x10
        with pytest.raises(FormatError, match="neither"):
            decode_page(damaged, 512)
    for size in (0, payload_limit(512) + 1, 1 << 31, 1 << 31 | 511, 1 << 31 | 513):
        with pytest.raises(FormatError, match="cannot be one page"):
            decode_page(frame[:13] + struct.pack("<I", size) + frame[17:], 512)


# --- round trips


@st.composite
def files(draw: st.DrawFn) -> tuple[Header, Pages, int]:
    page_size = draw(st.sampled_from([512, 1024]))
    is_snapshot = draw(st.booleans())
    flags = draw(st.sampled_from([0, HEADER_FLAG_NO_CHECKSUM]))
    commit = draw(st.integers(0, 8)) if is_snapshot else draw(st.integers(0, 2**32 - 1))
    if is_snapshot:
        pgnos = list(range(1, commit + 1))
    elif commit == 0:
        pgnos = []
    else:
        numbers = st.integers(1, min(commit, 200)) | st.integers(1, commit)
        pgnos = sorted(draw(st.sets(numbers, max_size=8)) - {lock_pgno(page_size)})
    content = st.integers(0, 10).map(lambda n: noise(n, page_size)) | st.binary(min_size=1, max_size=9).map(
        lambda b: (b * page_size)[:page_size]
    )
    pages = [(pgno, draw(content)) for pgno in pgnos]
    pre = 0 if is_snapshot or flags else draw(st.integers(0, 2**63)) | CHECKSUM_FLAG
    post = database_checksum(pages) if is_snapshot or not commit else draw(st.integers(0, 2**63)) | CHECKSUM_FLAG
    first = 1 if is_snapshot else draw(st.integers(2, 2**64 - 1))
    last = draw(st.integers(first, 2**64 - 1))
    return Header(flags, page_size, commit, first, last, 1000, pre), pages, 0 if flags else post


@given(files())
@settings(max_examples=150, deadline=None)
def test_round_trip(case: tuple[Header, Pages, int]) -> None:
    header, pages, post = case
    file = encode(header, pages, post)
    ltx = decode(file)
    assert (ltx.header, list(ltx.pages), ltx.trailer.post_apply_checksum) == (header, pages, post)
    assert verify_stream([file[:70], file[70:]]) == (header, ltx.trailer)
    assert b"".join(encode_parts(header, pages, post)) == file
    index = decode_index(file[slice_of_index(file)])
    assert list(index) == [pgno for pgno, _ in pages]
    assert [decode_page(file[at : at + size], header.page_size) for at, size in index.values()] == pages


def feed_all(file: bytes, step: int) -> Pages:
    decoder = Decoder()
    pages: Pages = []
    for start in range(0, len(file), step):
        pages += decoder.feed(memoryview(file)[start : start + step])
        assert (decoder.header is None) == (start + step < HEADER_SIZE)
    assert decoder.finish() == Trailer.unpack(file[-16:])
    assert decoder.page_count == len(pages)
    return pages


@pytest.mark.parametrize("step", [1, 2, 7, 99, 100, 101, 512, 10_000])
def test_pieces_give_the_same_pages(step: int) -> None:
    assert feed_all(increment(SAMPLE_PAGES), step) == SAMPLE_PAGES
    assert feed_all(GO_SNAPSHOT, step) == GO_PAGES


def test_reader_gives_header_before_pages_and_trailer_after() -> None:
    file = increment(SAMPLE_PAGES)

    def chunks() -> Iterator[bytes]:
        yield from (file[at : at + 64] for at in range(0, len(file), 64))

    reader = Reader(chunks())
    assert reader.header == Header.unpack(file)
    assert reader.trailer is None
    assert list(reader) == SAMPLE_PAGES
    assert reader.trailer == Trailer.unpack(file[-16:])
    with pytest.raises(TruncatedError):
        Reader([file[:99]])
    with pytest.raises(TruncatedError):
        verify_stream([file[:-1]])


def test_many_pages_with_long_numbers() -> None:
    """More pages than the short varints cover; sizes and offsets of three and more bytes."""
    pages = [(pgno, pgno.to_bytes(4, "big") * 128) for pgno in range(16_000, 17_000)] + [(2**32 - 1, noise(9))]
    file = increment(pages, commit=2**32 - 1)
    assert decode(file).pages == tuple(pages)


# --- special files


def test_deleted_database() -> None:
    file = encode(Header(0, 4096, 0, 8, 8, 0, CHECKSUM_FLAG | 7), [], CHECKSUM_FLAG)
    assert len(file) == 100 + 6 + 1 + 8 + 16
    assert decode(file).pages == ()
    with pytest.raises(FormatError, match="deleted"):
        encode(Header(0, 4096, 0, 8, 8, 0, CHECKSUM_FLAG | 7), [], CHECKSUM_FLAG | 1)
    with pytest.raises(FormatError, match="outside"):
        encode(Header(0, 4096, 0, 8, 8, 0, CHECKSUM_FLAG | 7), [(1, bytes(4096))], CHECKSUM_FLAG)


def test_without_checksums() -> None:
    header = Header(HEADER_FLAG_NO_CHECKSUM, 512, 1, 1, 1, 0, 0)
    assert decode(encode(header, [(1, noise(1))], 0)).trailer.post_apply_checksum == 0
    with pytest.raises(FormatError, match="without checksums"):
        encode(header, [(1, noise(1))], CHECKSUM_FLAG)


def test_snapshot_checksum_is_verified() -> None:
    pages = [(1, noise(1)), (2, noise(2))]
    wrong = encode(Header(0, 512, 2, 1, 1, 0, 0), pages, database_checksum(pages) ^ 1)
    with pytest.raises(FormatError, match="database checksum"):
        decode(wrong)


def test_snapshot_around_the_lock_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one is a gigabyte in; the rule is the same for one that is near."""
    for module in ("encoder", "decoder", "format"):
        monkeypatch.setattr(f"pylitefs.formats.ltx.{module}.lock_pgno", lambda page_size: 4)
    pages = [(pgno, noise(pgno)) for pgno in (1, 2, 3, 5, 6)]
    header = Header(0, 512, 6, 1, 1, 0, 0)
    assert decode(encode(header, pages, database_checksum(pages))).pages == tuple(pages)
    assert decode(encode(replace(header, commit=4), pages[:3], database_checksum(pages[:3]))).pages == tuple(pages[:3])
    with pytest.raises(FormatError, match="lock page"):
        encode(header, [*pages[:3], (4, noise(4))], CHECKSUM_FLAG)
    with pytest.raises(FormatError, match="page 5 first"):
        encode(header, [*pages[:3], (6, noise(4))], CHECKSUM_FLAG)


LOCK = lock_pgno(512)


@pytest.mark.parametrize(
    ("is_snapshot", "commit", "pgnos"),
    [
        (False, 9, [0]),
        (False, 9, [-1]),
        (False, 9, [10]),
        (False, 9, [3, 3]),
        (False, 9, [3, 2]),
        (False, LOCK + 1, [LOCK]),
        (True, 3, [2]),
        (True, 3, [1, 3]),
        (True, 3, [1, 2]),
        (True, 3, []),
        (True, 2, [1, 2, 3]),
    ],
)
def test_encoder_and_decoder_refuse_the_same_pages(is_snapshot: bool, commit: int, pgnos: list[int]) -> None:
    header = Header(0, 512, commit, 1 if is_snapshot else 2, 2, 0, 0 if is_snapshot else CHECKSUM_FLAG | 1)
    pages = [(pgno, noise(1)) for pgno in pgnos]
    post = database_checksum([page for page in pages if page[0] > 0])
    with pytest.raises(FormatError):
        encode(header, pages, post)
    if all(pgno > 0 for pgno in pgnos):
        with pytest.raises(FormatError):
            decode(old_file(header, pages, post))


def test_encoder_refuses_wrong_sizes_and_wrong_order_of_calls() -> None:
    encoder = Encoder(Header(0, 512, 9, 2, 2, 0, CHECKSUM_FLAG | 1))
    for early in (lambda: encoder.page(1, bytes(512)), lambda: encoder.finish(CHECKSUM_FLAG)):
        with pytest.raises(RuntimeError):
            early()
    total = len(encoder.begin())
    with pytest.raises(RuntimeError):
        encoder.begin()
    with pytest.raises(FormatError, match="511"):
        encoder.page(1, bytes(511))
    total += len(encoder.page(1, memoryview(bytes(512))))
    total += len(encoder.finish(CHECKSUM_FLAG))
    assert (encoder.size_bytes, encoder.page_count) == (total, 1)
    for late in (lambda: encoder.page(2, bytes(512)), lambda: encoder.finish(CHECKSUM_FLAG)):
        with pytest.raises(RuntimeError):
            late()


# --- damage


def test_every_truncation() -> None:
    for file in (increment(SAMPLE_PAGES), snapshot(GO_PAGES, 1024), GO_SNAPSHOT):
        for size in range(len(file)):
            with pytest.raises(TruncatedError):
                decode(file[:size])


def test_holes_from_a_torn_write() -> None:
    """Blocks of a file that never reached the disk read as zeros."""
    pages = [(pgno, noise(pgno, 4096)) for pgno in range(1, 9)]
    file = snapshot(pages, 4096)
    for start in range(0, len(file), 512):
        with pytest.raises(FormatError):
            decode(file[:start] + bytes(len(file[start : start + 512])) + file[start + 512 :])


def check_damage(file: bytes, pages: Pages, seed: int) -> None:
    """Flip bits: FormatError and nothing else, or, in an LZ4 block, the very same pages."""
    bits = range(len(file) * 8)
    for bit in random.Random(seed).sample(bits, min(4000, len(bits))):
        damaged = bytearray(file)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            ltx = decode(damaged)
        except FormatError:
            continue
        assert ltx.pages == tuple(pages)
        assert ltx.trailer == Trailer.unpack(file[-16:])
        assert any(at <= bit // 8 < at + size for at, size in decode_index(file[slice_of_index(file)]).values())


def test_bit_flips() -> None:
    check_damage(increment(SAMPLE_PAGES), SAMPLE_PAGES, seed=2)
    check_damage(GO_SNAPSHOT, GO_PAGES, seed=3)


def test_every_bit_of_a_file_without_matches_counts() -> None:
    """Noise does not compress: a block of it is one run of literals. All that LZ4 ignores there is the match length
    in the low half of the run's first byte."""
    file = increment([(1, noise(1)), (2, noise(2))])
    starts_of_blocks = [offset + 10 for offset, _ in decode_index(file[slice_of_index(file)]).values()]
    ignored = {start * 8 + bit for start in starts_of_blocks for bit in range(4)}
    for bit in set(range(len(file) * 8)) - ignored:
        damaged = bytearray(file)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            decode(damaged)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_spliced_garbage(data: st.DataObject) -> None:
    file = increment(SAMPLE_PAGES)
    at = data.draw(st.integers(0, len(file)))
    cut = data.draw(st.integers(0, 20))
    garbage = data.draw(st.binary(max_size=20))
    spliced = file[:at] + garbage + file[at + cut :]
    try:
        assert decode(spliced).pages == tuple(SAMPLE_PAGES)
    except FormatError:
        assert spliced != file


@given(st.binary(max_size=200), st.booleans())
@settings(deadline=None)
def test_garbage(data: bytes, with_header: bool) -> None:
    header = Header(0, 512, 9, 2, 2, 0, CHECKSUM_FLAG | 1).pack()
    with pytest.raises(FormatError):
        decode(header + data if with_header else data)
    for call in (lambda: decode_page(data, 512), lambda: decode_index(data), lambda: index_range(data[:24], 1000)):
        with suppress(FormatError):
            call()


def test_single_frame_must_be_whole_and_alone() -> None:
    file = increment(SAMPLE_PAGES)
    offset, size = decode_index(file[slice_of_index(file)])[50]
    assert decode_page(file[offset : offset + size], 512) == SAMPLE_PAGES[2]
    for length in range(size):
        with pytest.raises(TruncatedError):
            decode_page(file[offset : offset + length], 512)
    with pytest.raises(FormatError, match="1 bytes too many"):
        decode_page(file[offset : offset + size + 1], 512)
    for page_size in (0, 256, 1024, 131072):
        with pytest.raises(FormatError):
            decode_page(file[offset : offset + size], page_size)


def test_errors_are_final_and_bytes_after_the_end_are_one() -> None:
    file = increment(SAMPLE_PAGES)
    with pytest.raises(FormatError, match="after the trailer"):
        decode(file + b"\0")
    decoder = Decoder()
    decoder.feed(file)
    with pytest.raises(FormatError, match="after the trailer"):
        decoder.feed(b"\0")
    for call in (lambda: decoder.feed(b""), decoder.finish):
        with pytest.raises(FormatError, match="after an error"):
            call()


def test_claimed_sizes_are_limited() -> None:
    header = Header(0, 512, 9, 2, 2, 0, CHECKSUM_FLAG | 1).pack()
    for size in (0, payload_limit(512) + 1, 2**31, 2**32 - 1):
        frame = struct.pack(">IHI", 1, 1, size)
        with pytest.raises(FormatError, match="cannot be one page"):
            Decoder().feed(header + frame)
        with pytest.raises(FormatError, match="cannot be one page"):
            decode_page(frame, 512)
    assert payload_limit(512) == 512 + 2 + 16


@pytest.mark.parametrize("content", [bytes(511), bytes(513), bytes(65536), b""])
def test_block_must_hold_exactly_one_page(content: bytes) -> None:
    block = lz4.block.compress(content, store_size=False)
    frame = struct.pack(">IHI", 1, 1, len(block)) + block
    with pytest.raises(FormatError):
        decode_page(frame, 512)
    with pytest.raises(FormatError):
        Decoder().feed(Header(0, 512, 9, 2, 2, 0, CHECKSUM_FLAG | 1).pack() + frame + bytes(40))


def test_other_versions_are_named() -> None:
    header = Header(0, 512, 9, 2, 2, 0, CHECKSUM_FLAG | 1).pack()
    version_2 = header + struct.pack(">I", 1) + lz4.frame.compress(bytes(512))
    with pytest.raises(FormatError, match="another format version"):
        decode(version_2)
    version_1 = bytearray(header)
    version_1[7] = 1
    with pytest.raises(FormatError, match="another format version"):
        decode(version_1)


@pytest.mark.parametrize(
    "entries",
    [
        [(2, 100, 30), (2, 130, 30)],
        [(3, 100, 30), (2, 130, 30)],
        [(1, 101, 30)],
        [(1, 100, 30), (2, 131, 30)],
        [(1, 100, 10)],
        [(1, 100, 10**6)],
        [(2**32, 100, 30)],
    ],
)
def test_index_rules(entries: list[tuple[int, int, int]]) -> None:
    good = b"".join(encode_varint(n) for n in (1, 100, 30, 2, 130, 30)) + b"\0"
    assert decode_index(good) == {1: (100, 30), 2: (130, 30)}
    bad = b"".join(encode_varint(n) for entry in entries for n in entry) + b"\0"
    for data in (bad, good + b"\0", good[:-1]):
        with pytest.raises(FormatError):
            decode_index(data)


def test_index_range_rules() -> None:
    tail = struct.pack(">Q", 50) + bytes(16)
    assert index_range(tail, 200) == (126, 50)
    for data, size in ((tail, 173), (tail[1:], 200), (bytes(24), 200), (b"\xff" * 24, 2**40)):
        with pytest.raises(FormatError):
            index_range(data, size)
