"""The log of one database: a folder of LTX files, MIN-MAX.ltx, each a run of whole transactions.

Invariants
- Entries follow one another without a hole: the next one's min_txid is the last one's max_txid + 1, and its
  pre-apply checksum is the last one's post-apply checksum.
- A file gets its final name only when it is complete. It is not fsynced for every transaction (SQLite's
  `synchronous` rules what is durable), so after a power cut the newest files may be torn: `open` drops a
  tail that does not verify, and recovery rebuilds it from the database.
- The newest entry is never removed: it holds the position.

Every method may be called from any thread; only the database's worker adds entries.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType

from pylitefs.engine.epochs import EpochLines, Lines, passed
from pylitefs.engine.files import file_chunks, sync_folder
from pylitefs.engine.loan import Agreed
from pylitefs.engine.spares import LEFTOVER, STORED, Spares, found_again
from pylitefs.errors import FormatError
from pylitefs.formats.ltx.decoder import verify_stream
from pylitefs.formats.ltx.format import (
    CHECKSUM_FLAG,
    HEADER_SIZE,
    TRAILER_SIZE,
    Header,
    Position,
    Trailer,
    file_name,
    parse_file_name,
)

LATE_ENTRIES = 2048
"""So many of the newest entries are verified after a crash: more than a replica has ever promised to hold by its log
alone (see `durable`). A torn one is a hole: those after it were written later, and need not be kept."""
EMPTY = Position(0, 0)


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One file of the log: transactions min_txid..max_txid."""

    min_txid: int
    max_txid: int
    size_bytes: int
    mtime_s: float
    path: str

    def header(self) -> Header:
        """Raises FormatError, OSError."""
        with open(self.path, "rb") as file:
            return Header.unpack(file.read(HEADER_SIZE))

    def trailer(self) -> Trailer:
        with open(self.path, "rb") as file:
            file.seek(-TRAILER_SIZE, os.SEEK_END)
            return Trailer.unpack(file.read(TRAILER_SIZE))

    def chunks(self) -> Iterator[bytes]:
        return file_chunks(self.path)


class Pin:
    """Keeps retention from removing entries after a TXID; a context manager."""

    def __init__(self, log: LtxLog, txid: int) -> None:
        self._log, self.txid = log, txid

    def close(self) -> None:
        self._log._pins.discard(self)

    def __enter__(self) -> Pin:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class LtxLog:
    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.head = EMPTY
        self.size_bytes = 0
        self._entries: list[LogEntry] = []
        self._lock = threading.Lock()
        self._pins: set[Pin] = set()
        self._spares = Spares(folder)
        self._epochs = EpochLines(os.path.join(folder, "epochs"))
        self.agreed = Agreed(os.path.join(folder, "agreed"))

    # -- start -----------------------------------------------------------------------------------------------

    def open(self, *, verify: bool, tidy: bool = True) -> list[str]:
        """List the folder and find the head. `verify`: also check the newest entries byte by byte (after a crash).
        `tidy`: remove what is of no use; not before it is known whether that was a crash.

        Returns the names of the files that were dropped because they are torn, or do not follow the others.
        """
        os.makedirs(self.folder, exist_ok=True)
        self._epochs.load()
        self.agreed.load()
        found: list[LogEntry] = []
        stored: list[str] = []
        useless: list[str] = []
        for item in os.scandir(self.folder):
            span = parse_file_name(item.name)
            if span is None:
                if item.name.endswith(STORED):
                    stored.append(item.path)
                elif item.name.endswith(LEFTOVER):
                    useless.append(item.path)
                continue
            status = item.stat()
            found.append(LogEntry(*span, status.st_size, status.st_mtime, item.path))
        found.sort(key=lambda entry: (entry.max_txid, entry.min_txid))
        kept, dropped = self._chain(found, verify)
        useless += [entry.path for entry in dropped]
        self._remove(useless if tidy else ())
        if kept and verify:
            kept += self._name_again(stored, kept[-1])
        self._remove(stored if tidy else ())
        self._entries = kept
        self.size_bytes = sum(entry.size_bytes for entry in kept)
        self.head = EMPTY
        if kept:
            newest = kept[-1]
            self.head = Position(newest.max_txid, newest.trailer().post_apply_checksum, newest.header().epoch)
        return [os.path.basename(entry.path) for entry in dropped]

    @staticmethod
    def _remove(paths: Iterable[str]) -> None:
        for path in paths:
            with contextlib.suppress(OSError):
                os.unlink(path)

    def _chain(self, found: list[LogEntry], verify: bool) -> tuple[list[LogEntry], list[LogEntry]]:
        """Walk back from the newest: drop torn files at the end, and stop at the first hole."""
        dropped: list[LogEntry] = []
        while found and not self._is_whole(found[-1], verify):
            dropped.append(found.pop())
        first = len(found)
        next_header: Header | None = None
        while first > 0:
            entry = found[first - 1]
            late = len(found) - first < LATE_ENTRIES
            if verify and late and not self._is_whole(entry, verify):
                # A hole in what was written lately: what comes after it cannot be trusted to follow.
                dropped += found[first - 1 :]
                del found[first - 1 :]
                next_header = None
                first = len(found)
                continue
            try:
                header, trailer = entry.header(), entry.trailer()
            except (FormatError, OSError):
                break
            if next_header is not None and (
                entry.max_txid + 1 != next_header.min_txid
                or trailer.post_apply_checksum != next_header.pre_apply_checksum
            ):
                break
            next_header = header
            first -= 1
            if not verify and len(found) - first >= 2:
                first = self._names_chain(found, first)
                break
        return found[first:], dropped + found[:first]

    def _name_again(self, stored: list[str], newest: LogEntry) -> Iterator[LogEntry]:
        """What follows the newest entry, and has lost its name in a power cut. Raises OSError."""
        head = Position(newest.max_txid, newest.trailer().post_apply_checksum)
        for header, path in found_again(stored, head):
            target = os.path.join(self.folder, file_name(header.min_txid, header.max_txid))
            os.rename(path, target)
            status = os.stat(target)
            yield LogEntry(header.min_txid, header.max_txid, status.st_size, status.st_mtime, target)

    @staticmethod
    def _names_chain(found: list[LogEntry], first: int) -> int:
        """After an orderly stop the names are enough: go back while they follow one another."""
        while first > 0 and found[first - 1].max_txid + 1 == found[first].min_txid:
            first -= 1
        return first

    @staticmethod
    def _is_whole(entry: LogEntry, verify: bool) -> bool:
        try:
            if verify:
                header, _ = verify_stream(entry.chunks())
            else:
                header = entry.header()
                entry.trailer().validate(header)
        except (FormatError, OSError):
            return False
        return (header.min_txid, header.max_txid) == (entry.min_txid, entry.max_txid)

    # -- queries ---------------------------------------------------------------------------------------------

    @property
    def first_txid(self) -> int:
        with self._lock:
            return self._entries[0].min_txid if self._entries else 0

    @property
    def count(self) -> int:
        return len(self._entries)

    def entries(self) -> list[LogEntry]:
        with self._lock:
            return list(self._entries)

    def covering(self, txid: int) -> LogEntry | None:
        """The entry with min_txid <= txid <= max_txid."""
        with self._lock:
            at = bisect_right(self._entries, txid, key=lambda entry: entry.min_txid) - 1
            if at >= 0 and self._entries[at].max_txid >= txid:
                return self._entries[at]
            return None

    def after(self, txid: int) -> LogEntry | None:
        """The entry that begins with txid + 1."""
        entry = self.covering(txid + 1)
        return entry if entry is not None and entry.min_txid == txid + 1 else None

    def reaches(self, position: Position) -> bool:
        """Whether a receiver at `position` can be brought to the head from this log alone. Also by its epoch: two nodes
        that parted may come to the same checksum."""
        if not self.passed(position) and position.txid:
            return False
        if position == self.head:
            return True
        entry = self.after(position.txid)
        if entry is None:
            return False
        try:
            return entry.header().pre_apply_checksum == position.checksum
        except (FormatError, OSError):
            return False

    def holds(self, position: Position) -> bool:
        """Whether this log went through `position`; also where the entry that follows is damaged."""
        if self.reaches(position):
            return True
        entry = self.covering(position.txid)
        if entry is None or entry.max_txid != position.txid or not self.passed(position):
            return False
        try:
            return entry.trailer().post_apply_checksum == position.checksum
        except (FormatError, OSError):
            return False

    def positions(self, limit: int) -> list[Position]:
        """The newest `limit` positions this log passed through, newest first."""
        found = []
        for entry in reversed(self.entries()[-limit:]):
            with contextlib.suppress(FormatError, OSError):
                found.append(Position(entry.max_txid, entry.trailer().post_apply_checksum, entry.header().epoch))
        return found

    def epochs(self) -> Lines:
        """(epoch, its first TXID) of the history that led to the head; epochs up to 1 are left out."""
        with self._lock:
            return self._epochs.up_to(self.head.txid)

    def shared(self) -> Position:
        """As far as this log is known to be the primary's history: its head, but for what was written under a HALT lock
        that was lost."""
        return self.agreed.limit(self.head)

    def passed(self, position: Position) -> bool:
        """Whether the history that led to the head went through `position`, as far as the epochs tell; also where the
        log no longer reaches back to it."""
        with self._lock:
            return passed(self._epochs.up_to(self.head.txid), self.head, position)

    # -- changes ---------------------------------------------------------------------------------------------

    def pin(self, txid: int) -> Pin:
        pin = Pin(self, txid)
        self._pins.add(pin)
        return pin

    @property
    def is_pinned(self) -> bool:
        return bool(self._pins)

    def temporary(self, *, follows: bool = True) -> str:
        """A name for a file that is being written; leftovers are removed at the next start. `follows`: what is written
        is known to follow the head, so a start after a power cut may take it for the next entry."""
        return self._spares.take() if follows else self._spares.new_name()

    def make_spare(self) -> None:
        """Make the next temporary file ahead of time, on the opener's thread."""
        self._spares.make()

    def sync(self, entries: list[LogEntry]) -> None:
        """Make entries durable, and that they are found: all before them are, or are among them. Any thread. Raises
        OSError; FileNotFoundError if one of them has gone."""
        self._spares.sync([entry.path for entry in entries])

    def publish(self, temporary: str, header: Header, post_apply_checksum: int) -> LogEntry:
        """Give a complete file its name and make it the head. The caller has checked that it follows."""
        path = os.path.join(self.folder, file_name(header.min_txid, header.max_txid))
        size = os.stat(temporary).st_size
        if header.epoch != self.head.epoch or self._epochs.unsaved:
            with self._lock:
                self._epochs.begin(header.epoch, header.min_txid)
        os.rename(temporary, path)
        entry = LogEntry(header.min_txid, header.max_txid, size, time.time(), path)
        with self._lock:
            if header.is_snapshot or (self._entries and self._entries[-1].max_txid + 1 != header.min_txid):
                self._drop(self._entries)
                self._entries = []
            self._spares.changed(temporary if self._entries else "")  # only what follows an entry is found again
            self._entries.append(entry)
            self.size_bytes += entry.size_bytes
            self.head = Position(header.max_txid, post_apply_checksum or CHECKSUM_FLAG, header.epoch)
        return entry

    def take_back(self, entry: LogEntry, position: Position) -> None:
        """Undo `publish` of the newest entry, which could not be applied; `position` is the head again."""
        with self._lock:
            if self._entries and self._entries[-1] is entry:
                self._entries.pop()
                self._drop([entry])
                self.head = position

    def _drop(self, entries: list[LogEntry]) -> None:
        self.size_bytes -= sum(entry.size_bytes for entry in entries)
        self._remove(entry.path for entry in entries)
        self._spares.changed()

    def beyond(self, after_txid: int) -> list[LogEntry]:
        """The entries that go beyond a TXID."""
        return [entry for entry in self.entries() if entry.max_txid > after_txid]

    def keep_branch(self, after_txid: int, folder: str) -> list[str]:
        """Keep the entries that go beyond `after_txid` in `folder` too, durably: a branch that is about to be left. The
        log is as before: whatever comes next may fail. Returns the new paths. Raises OSError."""
        kept = []
        for entry in self.beyond(after_txid):
            target = os.path.join(folder, os.path.basename(entry.path))
            with contextlib.suppress(FileExistsError):  # from a try before
                try:
                    os.link(entry.path, target)
                except PermissionError:  # a file system without hard links
                    shutil.copyfile(entry.path, target)
            with open(target, "rb") as file:
                os.fsync(file.fileno())
            kept.append(target)
        if kept:
            sync_folder(folder)
        return kept

    def restart_at(self, position: Position, epochs: Lines | None = None, *, durably: bool = True) -> None:
        """Begin an empty log at a position that came from elsewhere (a snapshot): all entries are removed. `epochs`: of
        the history that led there; None: it is our own. Not `durably`: a restart forgets them, but with the next entry
        they are durable. Raises OSError, and nothing has changed then."""
        with self._lock:
            if epochs is not None:
                self._epochs.replace(epochs, durably=durably)
            self._drop(self._entries)
            self._entries = []
            self.head = position
            if epochs is not None:
                self.agreed.end()

    def retain(self, older_than_s: float, max_bytes: int, now_s: float | None = None) -> int:
        """Remove entries older than a time, then the oldest while the log is larger than `max_bytes` (0 means: no
        such limit). Pinned entries and the newest stay. Returns how many were removed."""
        limit = (time.time() if now_s is None else now_s) - older_than_s
        with self._lock:
            pinned = min((pin.txid for pin in tuple(self._pins)), default=None)
            total, remove = self.size_bytes, 0
            for entry in self._entries[:-1]:
                too_old = older_than_s > 0 and entry.mtime_s < limit
                too_large = max_bytes > 0 and total > max_bytes
                if not (too_old or too_large) or (pinned is not None and entry.max_txid > pinned):
                    break
                total -= entry.size_bytes
                remove += 1
            gone, self._entries = self._entries[:remove], self._entries[remove:]
            self._drop(gone)
            return remove
