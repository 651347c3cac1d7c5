"""Empty files in a log's folder, made ahead of time: creating a file is what takes longest when an entry is written.

Where entries are made durable one by one (see `durable`) they are in store, N.next, with names that are durable
already. Between two fsyncs of the folder such files get their final names, in order, each after an entry that is
there, and no other name changes that counts. So a power cut can only take final names away, the newest first, from
files that are whole if they were synced: `found_again` gives them back, and making an entry durable takes one fsync, of
the file.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import deque
from collections.abc import Iterable

from pylitefs.engine.files import file_chunks, sync_folder
from pylitefs.errors import FormatError
from pylitefs.formats.ltx.decoder import verify_stream
from pylitefs.formats.ltx.format import Header, Position

STORED = ".next"
LEFTOVER = ".tmp"

_COUNT, _LEAST = 16, 4  # as many are made by one fsync of the folder, and when there are fewer than these


class Spares:
    """Of one log. `take` is for whoever writes an entry, `changed` under the log's lock; `make` is the opener's, and
    `sync` for any thread."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._numbers = itertools.count(1)
        self._ready: deque[str] = deque()
        self._stores = False
        self._changes = 1  # of names, but for those that only give one in store its final name
        self._synced = 0  # so many of them are durable

    def new_name(self, suffix: str = LEFTOVER) -> str:
        return os.path.join(self._folder, f"{next(self._numbers)}{suffix}")

    def take(self) -> str:
        """A name to write to; the file may be there, and is empty then."""
        with contextlib.suppress(IndexError):
            return self._ready.popleft()
        return self.new_name()

    def changed(self, source: str = "") -> None:
        """Files of the log have gone, or one has got its name, which was `source` ("" where there is no entry that it
        follows: it would not be found again); called right afterwards."""
        self._changes += not source.endswith(STORED)

    def make(self) -> None:
        """See to it that there are some; in store only if an entry was made durable since the last time."""
        if len(self._ready) >= (_LEAST if self._stores else 1):
            return
        stores, self._stores = self._stores, False
        paths = [self.new_name(STORED if stores else LEFTOVER) for _ in range(_COUNT if stores else 1)]
        try:
            for path in paths:
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))
            if stores:
                sync_folder(self._folder)
        except OSError:  # who writes an entry will see; until then nothing stays that takes room
            self._stores |= stores
            for path in paths:
                with contextlib.suppress(OSError):
                    os.unlink(path)
        else:
            self._ready.extend(paths)

    def sync(self, paths: Iterable[str]) -> None:
        """Make entries durable, and their names where need be. Raises OSError; FileNotFoundError if one has gone."""
        self._stores, changes = True, self._changes
        for path in paths:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fdatasync(fd)
            finally:
                os.close(fd)
        if self._synced < changes:  # who comes in meanwhile does it as well, and is not answered before it is done
            sync_folder(self._folder)
            self._synced = max(changes, self._synced)


def found_again(stored: Iterable[str], head: Position) -> list[tuple[Header, str]]:
    """Those of the files in store that are whole entries and follow the log's head, one after the other."""
    whole = []
    for path in stored:
        with contextlib.suppress(FormatError, OSError):
            whole.append((*verify_stream(file_chunks(path)), path))
    found = []
    for header, trailer, path in sorted(whole, key=lambda item: item[0].min_txid):
        if (header.min_txid - 1, header.pre_apply_checksum) == (head.txid, head.checksum):
            found.append((header, path))
            head = Position(header.max_txid, trailer.post_apply_checksum)
    return found
