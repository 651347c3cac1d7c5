"""What a node keeps of transactions that its cluster went on without: DATA/dbs/NAME/lost/, never emptied by us.

    lost/TIME/branch         what it is, as JSON (see `Branch`); TIME is YYYYMMDDTHHMMSS in local time
    lost/TIME/MIN-MAX.ltx    the transactions, as they were in the log
    lost/TIME/pages          as an LTX file: the pages that differed from the state the node took over then. Where the
                             log does not hold the whole branch, or the database is too large for the next two
    lost/TIME/tip.db         the database with them, and
    lost/TIME/base.db        before them: only where the database is small enough, and the log had what it takes
    lost/TIME/database wal journal ltx/    instead of these: a whole database that the primary never had
    lost/TIME/applied        a JSON line for each time that `litefs lost apply` wrote it back

A branch is durable here before the database is set back. What is kept is linked, not moved: if setting back fails, the
log is as before, and the next try finds the same folder.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pylitefs.engine.database import Database
from pylitefs.engine.files import new_folder, publish_file, sync_folder, write_at
from pylitefs.engine.ltx_log import LogEntry
from pylitefs.engine.snapshot import DamagedPages, SnapshotReader, copy_to
from pylitefs.errors import DatabaseError, FormatError
from pylitefs.formats.ltx.checksum import database_checksum, page_checksums
from pylitefs.formats.ltx.decoder import Reader
from pylitefs.formats.ltx.encoder import Encoder
from pylitefs.formats.ltx.format import CHECKSUM_FLAG, Header, Position, parse_file_name

log = logging.getLogger("litefs.lost")

INFO, APPLIED, PAGES, TIP, BASE = "branch", "applied", "pages", "tip.db", "base.db"
COPY_MAX_BYTES = 256 << 20
"""A larger database is not copied; its transactions are kept all the same."""

LOOK_BACK_BYTES = 64 << 20
"""So much of the log is searched for the pages that a branch has changed."""

_INFO_SIZE = 64 << 10


@dataclass(frozen=True)
class Branch:
    """One folder in lost/. `after` and `to` are the positions it begins and ends at, `after` None for a whole database;
    `epoch` that of its newest transaction; `transactions` how many there are."""

    folder: str
    database: str
    after: Position | None
    to: Position
    epoch: int
    transactions: int
    time_ms: int
    reason: str
    size_bytes: int
    applied: bool

    @property
    def name(self) -> str:
        """How the command line calls it."""
        return f"{self.database}/{os.path.basename(self.folder)}"

    def path(self, name: str) -> str | None:
        """One of its files, if it is there."""
        path = os.path.join(self.folder, name)
        return path if os.path.exists(path) else None

    def files(self) -> list[str]:
        """Its LTX files, in order."""
        return sorted(item.path for item in os.scandir(self.folder) if parse_file_name(item.name) is not None)


# --- keeping ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """A whole database elsewhere: its position, and the checksums of its pages."""

    position: Position
    page_size: int
    sums: NDArray[np.uint64]


def keep_branch(database: Database, after_txid: int, new: State) -> str | None:
    """[W] Keep what this node has beyond a TXID, durably, before it becomes `new`; its folder, None if there is
    nothing. What the log does not hold is kept as the pages that differ. Raises OSError."""
    entries, head = database.log.beyond(after_txid), database.log.head
    if head.txid <= after_txid:
        return None
    before = entries[0].header().pre_apply_position if entries else Position(after_txid, 0)
    is_whole = before.txid <= after_txid
    transactions = head.txid - after_txid
    reason = f"the primary went on without it, to {new.position}"
    again = _kept_before(database, head)
    folder = again or new_folder(database.files.lost)
    write_info(folder, database.name, before, head, transactions, reason)
    database.log.keep_branch(after_txid, folder)
    sync_folder(database.files.lost)
    sync_folder(database.files.folder)
    try:
        has_tip = _keep_states(database, entries, folder)
    except (OSError, DatabaseError, FormatError) as error:  # a help for people; the transactions are safe
        log.warning("%s: only the transactions are kept in %s: %s", database.name, folder, error)
        has_tip = False
    if not (is_whole and has_tip):
        try:
            _keep_pages(database, new, folder)
        except DatabaseError as error:
            log.warning("%s: the pages are not kept in %s: %s", database.name, folder, error)
        except OSError:
            if not is_whole:
                raise
    if again is not None:
        return folder
    database.emit(
        "lost", folder=folder, reason=reason, min_txid=head.txid - transactions + 1, max_txid=head.txid,
        transactions=transactions, epoch=head.epoch,
        after=str(before), to=str(head),
    )  # fmt: skip
    return folder


def write_info(folder: str, name: str, after: Position | None, to: Position, transactions: int, reason: str) -> None:
    """Say what a folder in lost/ is. Raises OSError."""
    info = {
        "database": name,
        "after": str(after) if after is not None else None,
        "to": str(to),
        "epoch": to.epoch,
        "transactions": transactions,
        "timeMs": int(time.time() * 1000),
        "reason": reason,
    }
    publish_file(os.path.join(folder, INFO), f"{json.dumps(info)}\n".encode())


def _kept_before(database: Database, head: Position) -> str | None:
    """The folder of a try that failed later."""
    for branch in _in(database.files.lost, database.name)[-1:]:
        if branch.to == head and branch.epoch == head.epoch and branch.after is not None and not branch.applied:
            return branch.folder
    return None


def _keep_pages(database: Database, new: State, folder: str) -> None:
    """Raises OSError, DatabaseError."""
    if not database.exists or database.set_aside_reason is not None:
        return
    header = Header(
        flags=0, page_size=database.page_size, commit=database.commit, min_txid=new.position.txid + 1,
        max_txid=new.position.txid + 1, timestamp_ms=int(time.time() * 1000), pre_apply_checksum=new.position.checksum,
        epoch=database.epoch,
    )  # fmt: skip
    encoder = Encoder(header)
    same = new.page_size == database.page_size
    reader = SnapshotReader(database, new.sums if same else None)
    try:
        with _put_in_place(os.path.join(folder, PAGES)) as path, open(path, "wb") as file:
            file.write(encoder.begin())
            while (pages := _sound(reader)) is not None:
                file.writelines(encoder.page(pgno, page) for pgno, page in pages)
            file.write(encoder.finish(database.position.checksum))
            file.flush()
            os.fsync(file.fileno())
    finally:
        reader.close()
    sync_folder(folder)


def _sound(reader: SnapshotReader) -> list[tuple[int, bytes]] | None:
    """The next pages, without those that the disk has changed."""
    first = reader.next_pgno
    try:
        return reader.next_chunk()
    except DamagedPages as error:  # it has told
        others = [pgno for pgno in range(first, reader.next_pgno) if pgno not in error.pages]
        return [(pgno, page) for pgno in others if (page := reader.page(pgno)) is not None]


def _keep_states(database: Database, entries: list[LogEntry], folder: str) -> bool:
    """The database with the branch and, where the log has the pages, without it: what rows differ can then be told."""
    size = database.size_bytes
    disk = os.statvfs(folder)
    if not database.exists or database.set_aside_reason is not None or database.position != database.log.head:
        return False
    if size > COPY_MAX_BYTES or disk.f_bavail * disk.f_frsize < 3 * size + COPY_MAX_BYTES:
        return False
    tip = os.path.join(folder, TIP)
    with _put_in_place(tip) as path:
        copy_to(database, path)
    with contextlib.suppress(_Unknown), _put_in_place(os.path.join(folder, BASE)) as path:
        _take_back(database, entries, tip, path)
    return True


class _Unknown(Exception):
    """The log does not have all that it takes."""


@contextlib.contextmanager
def _put_in_place(path: str) -> Iterator[str]:
    """A file to write, which gets its name if nothing is raised."""
    temporary = f"{path}.tmp"
    try:
        yield temporary
        os.rename(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _take_back(database: Database, entries: list[LogEntry], tip: str, path: str) -> None:
    """A copy of `tip` without these entries at `path`; _Unknown if that cannot be had. Proven by its checksum."""
    wanted: set[int] = set()
    if not entries:
        raise _Unknown
    for entry in entries:
        reader = Reader(entry.chunks())
        if reader.header.page_size != database.page_size or reader.header.is_snapshot:
            raise _Unknown
        wanted.update(pgno for pgno, _ in reader)
    before = entries[0].header().pre_apply_position
    earlier = [entry for entry in database.log.entries() if entry.max_txid <= before.txid]
    commit = earlier[-1].header().commit if earlier else database.commit
    wanted = {pgno for pgno in wanted if pgno <= commit}
    with open(tip, "rb") as source, open(path, "wb") as target:
        while data := source.read(1 << 20):
            target.write(data)
        target.truncate(commit * database.page_size)
        left = LOOK_BACK_BYTES
        for entry in reversed(earlier):
            left -= entry.size_bytes
            if not wanted or left < 0:
                break
            for pgno, page in Reader(entry.chunks()):
                if pgno in wanted:
                    wanted.discard(pgno)
                    target.flush()
                    write_at(target.fileno(), page, (pgno - 1) * database.page_size)
    if wanted or file_checksum(path, database.page_size) != before.checksum:
        raise _Unknown


def file_checksum(path: str, page_size: int) -> int:
    """The database checksum of a file."""
    total, pgno = CHECKSUM_FLAG, 1
    with open(path, "rb") as file:
        while data := file.read(max(1, (1 << 20) // page_size) * page_size):
            total ^= database_checksum(page_checksums(pgno, data, page_size)) ^ CHECKSUM_FLAG
            pgno += len(data) // page_size
    return total


# --- looking ----------------------------------------------------------------------------------------------------------


def branches(data_dir: str, name: str | None = None) -> list[Branch]:
    """Everything in the lost/ folders of a data directory, by database and age. What is incomplete is left out."""
    root = os.path.join(data_dir, "dbs")
    names = [name] if name is not None else sorted(os.listdir(root)) if os.path.isdir(root) else []
    return [branch for each in names for branch in _in(os.path.join(root, each, "lost"), each)]


def _in(lost: str, name: str) -> list[Branch]:
    found = []
    if os.path.isdir(lost):
        for item in sorted(os.scandir(lost), key=lambda item: item.name):
            if item.is_dir() and (branch := read_branch(item.path, name)) is not None:
                found.append(branch)
    return found


def read_branch(folder: str, name: str = "") -> Branch | None:
    """What is in one folder; None if nothing is."""
    spans = [span for item in os.scandir(folder) if (span := parse_file_name(item.name)) is not None]
    whole = os.path.isdir(os.path.join(folder, "ltx")) or os.path.exists(os.path.join(folder, "database"))
    if not spans and not whole and not os.path.exists(os.path.join(folder, PAGES)):
        return None
    info: dict[str, Any] = _read_info(folder)
    first, last = min(spans, default=(1, 0))[0], max((high for _, high in spans), default=0)
    size_bytes = sum(os.lstat(os.path.join(top, each)).st_size for top, _, files in os.walk(folder) for each in files)
    begin = None if whole else Position(first - 1, 0)
    try:
        return Branch(
            folder=folder,
            database=str(info.get("database") or name),
            after=Position.parse(str(info["after"])) if info.get("after") else begin,
            to=Position.parse(str(info["to"])) if info.get("to") else Position(last, 0),
            epoch=int(info.get("epoch") or 0),
            transactions=int(info.get("transactions") or last - first + 1),
            time_ms=int(info.get("timeMs") or os.stat(folder).st_mtime * 1000),
            reason=str(info.get("reason") or ""),
            size_bytes=size_bytes,
            applied=os.path.exists(os.path.join(folder, APPLIED)),
        )
    except (TypeError, ValueError):
        raise FormatError(f"{os.path.join(folder, INFO)} does not say what is kept there: remove that file") from None


def _read_info(folder: str) -> dict[str, Any]:
    """What `write_info` wrote; nothing for a folder of an earlier version."""
    path = os.path.join(folder, INFO)
    try:
        with open(path, "rb") as file:
            info = json.loads(file.read(_INFO_SIZE))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise FormatError(f"{path} is not JSON: remove it, the transactions beside it can be read without") from None
    return info if isinstance(info, dict) else {}


def mark_applied(branch: Branch, target: str, counts: dict[str, int]) -> None:
    """Note that a branch was written back."""
    done = {"timeMs": int(time.time() * 1000), "target": target, **counts}
    with open(os.path.join(branch.folder, APPLIED), "a") as file:
        file.write(f"{json.dumps(done)}\n")
        file.flush()
        os.fsync(file.fileno())
    sync_folder(branch.folder)
