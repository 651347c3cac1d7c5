"""DATA/primary: which databases applications may have written to without the log knowing it yet.

    {"epoch": 7, "databases": null}        this node is the primary: all
    {"epoch": 7, "databases": ["a.db"]}    these only: a role that is being given up, or a HALT lock's

Durable before the first write can be accepted. It goes when the log has everything, and is on the disk. A start that
finds it takes what the files of these databases hold for the truth, as a primary with a fixed role does: what the log
lacks is recorded as a transaction, and so can be kept (`lost/`) where the cluster has gone on without it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable

from pylitefs.engine.files import publish_file, sync_folder


class Marker:
    """`names`: None for all databases. Not thread-safe."""

    def __init__(self, data_dir: str) -> None:
        self._path = os.path.join(data_dir, "primary")
        self.names: frozenset[str] | None = frozenset()
        self.epoch = 0  # in which they were written to, 0 if unknown

    def load(self) -> None:
        """One that is damaged stands for all: then nothing is taken for granted."""
        self.names, self.epoch = frozenset(), 0
        with contextlib.suppress(FileNotFoundError), open(self._path, "rb") as file:
            self.names = None
            with contextlib.suppress(ValueError, TypeError, KeyError):
                document = json.loads(file.read())
                names, self.epoch = document["databases"], int(document["epoch"])
                self.names = None if names is None else frozenset(map(str, names))

    def covers(self, name: str) -> bool:
        return self.names is None or name in self.names

    def write(self, epoch: int, names: Iterable[str] | None) -> None:
        """Durable on return; no names at all: removed. Raises OSError."""
        kept = None if names is None else frozenset(names)
        if kept is not None and not kept:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
                sync_folder(os.path.dirname(self._path))
        elif kept != self.names or not os.path.exists(self._path):
            document = {"epoch": epoch, "databases": None if kept is None else sorted(kept)}
            publish_file(self._path, json.dumps(document).encode() + b"\n")
        self.names, self.epoch = kept, epoch
