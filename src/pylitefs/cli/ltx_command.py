"""`litefs ltx`: look into transaction files and check them. Files are read in pieces, never whole."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import BinaryIO

import click

from pylitefs.cli.command import HELP_FLAGS, Verb
from pylitefs.errors import FormatError
from pylitefs.formats.ltx.checksum import CHECKSUM_FLAG, database_checksum, page_checksums
from pylitefs.formats.ltx.decoder import Decoder
from pylitefs.formats.ltx.format import HEADER_SIZE, PAGE_HEADER_SIZE, Header, Trailer, parse_file_name
from pylitefs.formats.ltx.frames import END_OF_PAGES, MAX_FRAME_SIZE, frame_layout
from pylitefs.formats.sqlite.header import HEADER_SIZE as DATABASE_HEADER_SIZE
from pylitefs.formats.sqlite.header import DatabaseHeader

_CHUNK_BYTES = 1 << 20
_FRAME_HEAD_BYTES = 32  # enough for `frame_layout`

_FILES = click.argument("files", nargs=-1, required=True, metavar="FILE...")


@click.group(invoke_without_command=True, context_settings={"help_option_names": HELP_FLAGS})
@click.pass_context
def ltx(ctx: click.Context) -> None:
    """Look into transaction files (LTX) and check them.

    A database's files are in the data directory, in dbs/NAME/ltx; their names are the first and the last transaction
    in them. Files of Litestream 0.5 can be read too.

    \b
    Examples:
        $ litefs ltx verify /var/lib/litefs/dbs/app.db/ltx/*.ltx
        $ litefs ltx dump 0000000000000002-0000000000000002.ltx
        $ litefs ltx checksum app.db
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
        ctx.exit(2)


@ltx.command(cls=Verb)
@_FILES
def dump(files: tuple[str, ...]) -> int:
    """Print what is in each FILE: header, page table, trailer.

    The page table has a page's number, and the offset and size in bytes of its frame in the file. A damaged file is
    printed as far as it can be read; the error follows and the exit status is 1.

    \b
    Example:
        $ litefs ltx dump 0000000000000002-0000000000000002.ltx
    """
    return _each(files, _dump)


@ltx.command(cls=Verb)
@_FILES
def verify(files: tuple[str, ...]) -> int:
    """Read each FILE to its end and check everything in it.

    Prints one line for each file. The exit status is 1 if one of them is damaged, incomplete or cannot be read.

    \b
    Example:
        $ litefs ltx verify *.ltx
        0000000000000001-0000000000000001.ltx: ok, TXID 0000000000000001, 24 pages, snapshot
        0000000000000002-0000000000000007.ltx: ok, TXIDs 0000000000000002-0000000000000007, 5 pages
    """
    return _each(files, _verify)


@ltx.command(cls=Verb)
@_FILES
def checksum(files: tuple[str, ...]) -> int:
    """Print the checksum and the number of pages of each SQLite database FILE.

    It is the checksum that LTX files and `NAME-pos` show. It is of the FILE alone: what a WAL beside it holds is not
    in it, and standard error says so. Take it of a database that nobody is writing to.

    \b
    Example:
        $ litefs ltx checksum app.db
        b765dce8249e9b4b 2 app.db
    """
    return _each(files, _checksum)


def _each(files: tuple[str, ...], action: Callable[[str], None]) -> int:
    """Do `action` for every file; one line on standard error for each that fails. The exit status."""
    failed = False
    for path in files:
        try:
            action(path)
        except BrokenPipeError:
            raise
        except FormatError as error:
            failed = _complain(path, str(error))
        except OSError as error:
            failed = _complain(path, error.strerror or str(error))
    return 1 if failed else 0


def _complain(path: str, message: str) -> bool:
    sys.stdout.flush()  # what was printed of this file comes first
    click.echo(f"ERROR: {path}: {message}", err=True)
    return True


def _read(path: str) -> tuple[Header, int, Trailer]:
    """(header, number of pages, trailer) of a file that is whole and correct; FormatError otherwise."""
    decoder = Decoder()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            decoder.feed(chunk)
    trailer, header = decoder.finish(), decoder.header
    assert header is not None
    named = parse_file_name(os.path.basename(path))
    if named is not None and named != (header.min_txid, header.max_txid):
        raise FormatError(f"holds TXIDs {_txids(header)}, which its name does not say")
    return header, decoder.page_count, trailer


def _verify(path: str) -> None:
    header, page_count, _ = _read(path)
    several = "s" if header.max_txid > header.min_txid else ""
    pages = f"{page_count} page{'' if page_count == 1 else 's'}"
    click.echo(f"{path}: ok, TXID{several} {_txids(header)}, {pages}{', snapshot' if header.is_snapshot else ''}")


def _txids(header: Header) -> str:
    """As in the file's name."""
    last = f"-{header.max_txid:016x}" if header.max_txid > header.min_txid else ""
    return f"{header.min_txid:016x}{last}"


def _dump(path: str) -> None:
    with open(path, "rb") as file:
        header = Header.unpack(file.read(HEADER_SIZE))
        click.echo(_header_text(path, header))
        click.echo(f"{'pgno':>10} {'offset':>14} {'size':>7}")
        for pgno, offset, size in _frames(file, header.page_size):
            sys.stdout.write(f"{pgno:>10} {offset:>14} {size:>7}\n")
    _, page_count, trailer = _read(path)
    click.echo(f"{page_count} pages\n")
    click.echo(f"post-apply checksum  {trailer.post_apply_checksum:016x}")
    click.echo(f"file checksum        {trailer.file_checksum:016x}")


def _header_text(path: str, header: Header) -> str:
    try:
        written = datetime.fromtimestamp(header.timestamp_ms / 1000, UTC)
        time = written.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):
        time = "not a date"
    rows = [
        ("file", path),
        ("flags", f"0x{header.flags:08x}"),
        ("page size", f"{header.page_size}"),
        ("commit", f"{header.commit} pages"),
        ("min TXID", f"{header.min_txid:016x} ({header.min_txid})"),
        ("max TXID", f"{header.max_txid:016x} ({header.max_txid})"),
        ("timestamp", f"{time} ({header.timestamp_ms})"),
        ("pre-apply checksum", f"{header.pre_apply_checksum:016x}"),
        ("WAL offset, size", f"{header.wal_offset}, {header.wal_size}"),
        ("WAL salts", f"{header.wal_salt1:08x} {header.wal_salt2:08x}"),
        ("epoch", f"{header.epoch}"),
    ]
    return "".join(f"{name:<20} {value}\n" for name, value in rows)


def _frames(file: BinaryIO, page_size: int) -> Iterator[tuple[int, int, int]]:
    """(pgno, offset, size in bytes) of every frame, by stepping from header to header."""
    offset = HEADER_SIZE
    while True:
        file.seek(offset)
        head = file.read(_FRAME_HEAD_BYTES)
        if head[:PAGE_HEADER_SIZE] == END_OF_PAGES:
            return
        layout = frame_layout(head, 0, page_size)
        assert layout.size <= MAX_FRAME_SIZE
        yield layout.pgno, offset, layout.size
        offset += layout.size


def _checksum(path: str) -> None:
    total, page_count = CHECKSUM_FLAG, 0
    with open(path, "rb") as file:
        head = file.read(DATABASE_HEADER_SIZE)
        if head:
            page_size = DatabaseHeader.unpack(head).page_size
            file.seek(0)
            while chunk := file.read(_CHUNK_BYTES):
                total ^= database_checksum(page_checksums(page_count + 1, chunk, page_size)) ^ CHECKSUM_FLAG
                page_count += len(chunk) // page_size
    click.echo(f"{total:016x} {page_count} {path}")
    wal = f"{path}-wal"
    if os.path.exists(wal) and os.path.getsize(wal):
        click.echo(f"note: {wal} may hold transactions that are not in this checksum", err=True)
