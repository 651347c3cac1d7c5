"""Names whose database was dropped so long ago that nothing else is left of them.

    DATA/tombstones    one line a name, JSON: ["NAME", TXID, EPOCH, [[epoch, its first TXID], ...]]; the last line of a
                       name counts. TXID 0: this node knows nothing of the name any more

A tombstone says where a database ended: the position of the drop (the checksum is that of no pages) and the epochs of
its history, see `epochs`. A database that is made again under the name goes on from there, so no position comes twice;
an election and a replica that was away are told of it as of any other database.

A line is durable before the folder in dbs/ goes (`forgetting`), and stays for ever, also when the name comes back: then
the log has a later position, and the line says nothing. Lines are appended. One that is torn had not become durable, so
its folder is there still; the next time that something is written the whole file is, without it.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from pylitefs.engine.epochs import Lines
from pylitefs.engine.files import publish_file, write_at
from pylitefs.formats.ltx.format import CHECKSUM_FLAG, Position
from pylitefs.ports import Moved

log = logging.getLogger("litefs.store")

_SPARE_LINES = 1000  # so many lines that do not count, and as many as count, are left in the file


@dataclass(frozen=True, slots=True)
class Tombstone:
    """`moves`: where its content was moved when it was renamed, as long as this daemon runs."""

    position: Position
    epochs: Lines = ()
    moves: tuple[Moved, ...] = ()


class Tombstones:
    """Of one node; any thread. `put` counts at once, and is durable after `save`."""

    def __init__(self, data_dir: str) -> None:
        self._path = os.path.join(data_dir, "tombstones")
        self._lock = threading.Lock()  # guards the next two
        self._stones: dict[str, Tombstone] = {}
        self._unsaved: dict[str, Tombstone | None] = {}
        self._saving = threading.Lock()  # guards the next two
        self._lines = 0  # in the file
        self._must_rewrite = False
        self.epoch = 0  # the latest of any

    def __len__(self) -> int:
        return len(self._stones)

    def __contains__(self, name: str) -> bool:
        return name in self._stones

    def get(self, name: str) -> Tombstone | None:
        return self._stones.get(name)

    def copy(self) -> dict[str, Tombstone]:
        with self._lock:
            return dict(self._stones)

    def put(self, stones: Mapping[str, Tombstone | None]) -> None:
        """None: the name is not known any more."""
        with self._lock:
            for name, stone in stones.items():
                if self._stones.get(name) != stone:
                    self._unsaved[name] = stone
                    self._set(name, stone)

    def _set(self, name: str, stone: Tombstone | None) -> None:
        if stone is None:
            self._stones.pop(name, None)
        else:
            self._stones[name] = stone
            self.epoch = max(self.epoch, stone.position.epoch)

    def load(self) -> None:
        """What is damaged does not count. Raises OSError."""
        try:
            with open(self._path, "rb") as file:
                data = file.read()
        except FileNotFoundError:
            return
        lines = data.split(b"\n")
        self._must_rewrite = bool(lines.pop())
        try:
            entries = json.loads(b"[" + b",".join(lines) + b"]")
        except ValueError:
            entries = [_parsed(line) for line in lines]
        self._lines = len(lines)
        for entry in entries:
            try:
                name, txid, epoch, epochs = entry
                if not isinstance(name, str) or type(txid) is not int or type(epoch) is not int:
                    raise ValueError
                stone = Tombstone(Position(txid, CHECKSUM_FLAG, epoch), tuple((at, of) for at, of in epochs))
            except (ValueError, TypeError):
                log.warning("%s: a line is damaged: a name is not known any more", self._path)
                self._must_rewrite = True
                continue
            self._set(name, stone if txid else None)

    def save(self) -> None:
        """What was put is durable. Blocking. Raises OSError, and nothing is lost then."""
        with self._saving:
            with self._lock:
                if not self._unsaved:
                    return
                unsaved, self._unsaved = self._unsaved, {}
                too_long = self._lines + len(unsaved) > 2 * len(self._stones) + _SPARE_LINES
                rewrite = self._must_rewrite or too_long or not self._lines
                written = dict(self._stones) if rewrite else unsaved
            data = b"".join(_line(name, stone) for name, stone in written.items())
            try:
                if rewrite:
                    publish_file(self._path, data)
                    self._lines, self._must_rewrite = 0, False
                else:
                    self._append(data)
            except BaseException:
                with self._lock:
                    self._unsaved = unsaved | self._unsaved
                raise
            self._lines += len(written)

    def _append(self, data: bytes) -> None:
        self._must_rewrite = True  # if it does not come to its end
        fd = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            write_at(fd, data, os.fstat(fd).st_size)
            os.fsync(fd)
        finally:
            os.close(fd)
        self._must_rewrite = False


def _line(name: str, stone: Tombstone | None) -> bytes:
    entry = [name, 0, 0, []] if stone is None else [name, stone.position.txid, stone.position.epoch, stone.epochs]
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


def _parsed(line: bytes) -> object:
    try:
        return json.loads(line)
    except ValueError:
        return None
