"""Which epochs this node has seen, and which ones led to a database's state.

    DATA/epoch                  the highest epoch that this node has followed or written in: decimal and newline
    DATA/dbs/NAME/ltx/epochs    "EPOCH TXID" a line: the first transaction of each epoch in this database's history, in
                                order; epochs up to 1 have no line

Within an epoch one node writes, and what it writes is one chain. So a position with its epoch is part of a history if
that epoch has a line there, and the position comes before the next line. The log says so by checksums as far as it
reaches back; the lines say it for ever.

A line is durable before the first transaction of its epoch is in the log. What a crash leaves behind is a line beyond
the log's head, which does not count.
"""

from __future__ import annotations

import contextlib
import os
import threading
from bisect import bisect_right

from pylitefs.engine.files import publish_file
from pylitefs.errors import FormatError
from pylitefs.formats.ltx.format import Position
from pylitefs.formats.stream_fields import MAX_EPOCHS

Lines = tuple[tuple[int, int], ...]
"""(epoch, its first TXID), both ascending."""

FIRST = 1
"""The epoch of every history that says nothing else."""


def passed(lines: Lines, head: Position, position: Position) -> bool:
    """Whether a history with these lines went through `position`, as far as epochs and TXIDs tell."""
    if position.txid > head.txid:
        return False
    at = bisect_right(lines, position.epoch, key=lambda line: line[0]) - 1
    if at < 0:  # before the first line there is: nothing is known but how far it goes
        return position.txid < lines[0][1] if lines else position.epoch <= FIRST
    if lines[at][0] != position.epoch or position.txid < lines[at][1]:
        return False
    return at + 1 == len(lines) or position.txid < lines[at + 1][1]


class EpochLines:
    """The lines of one log. Under the log's lock."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lines: Lines = ()
        self.unsaved = False  # they are not in the file yet

    def load(self) -> None:
        """FormatError if the file is not ours."""
        self._lines = ()
        with contextlib.suppress(FileNotFoundError), open(self._path) as file:
            try:
                self._lines = tuple((int(epoch), int(txid)) for epoch, txid in map(str.split, file))
            except ValueError:
                raise FormatError(f"{self._path}: not lines of an epoch and a TXID: remove it") from None

    def up_to(self, txid: int) -> Lines:
        """Those that count in a history that has come to `txid`."""
        return tuple(line for line in self._lines if line[1] <= txid)

    def begin(self, epoch: int, txid: int) -> None:
        """A transaction of another epoch than the one before comes next; durable. Raises OSError."""
        before = self.up_to(txid - 1)
        if epoch > FIRST and (not before or before[-1][0] < epoch):
            self.replace((*before, (epoch, txid)))
        elif self.unsaved:
            self.replace(self._lines)

    def replace(self, lines: Lines, *, durably: bool = True) -> None:
        """The history of somebody else; durable, or only with the next transaction. Raises OSError."""
        lines = tuple(lines)[-MAX_EPOCHS:]
        changed = lines != self._lines or self.unsaved
        if durably and changed:
            publish_file(self._path, "".join(f"{epoch} {txid}\n" for epoch, txid in lines).encode())
        self._lines, self.unsaved = lines, changed and not durably


class SeenEpoch:
    """DATA/epoch. An older primary is not followed again, whatever happens to this node in between."""

    def __init__(self, data_dir: str) -> None:
        self._path = os.path.join(data_dir, "epoch")
        self.value = 0
        self._lock = threading.Lock()

    def load(self) -> None:
        """FormatError if the file is damaged."""
        with contextlib.suppress(FileNotFoundError), open(self._path) as file:
            text = file.read(32).strip()
            if not text.isdecimal() or not text.isascii():
                raise FormatError(f"{self._path} does not hold an epoch (a number): remove it if the cluster is sound")
            self.value = int(text)

    def note(self, epoch: int) -> None:
        """Durable on return, before anything of that epoch is done here. Any thread: that of a session that has ended
        may still be at an earlier epoch. Raises OSError."""
        with self._lock:
            if epoch > self.value:
                publish_file(self._path, f"{epoch}\n".encode())
                self.value = epoch
