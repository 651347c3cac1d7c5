"""Plain files that begin as a database and are none, because SQLite could not read them: a copy that was cut off, or a
damaged one. They are not replicated, and that is said (event, log, `litefs status`).

A copy that is still being made looks the same. So such a file is looked at again when nothing was written to it for a
time, which is longer for hidden names: rsync and others write `.NAME.XXXXXX` first, and rename it.
"""

from __future__ import annotations

from pylitefs.engine.page_checksums import FileStamp, stamp
from pylitefs.engine.registry import Registry
from pylitefs.engine.rollback_capture import journal_in_use, why_unreadable

_QUIET_S = 1.0
_HIDDEN_QUIET_S = 15.0


class Unreadable:
    """Those of one node."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._watched: set[str] = set()

    def look(self, name: str) -> None:
        """A plain file was written to, or has got its name, on a primary. On the worker."""
        path = self._registry.plain_path(name)
        if name not in self._watched and why_unreadable(path) is not None:
            self._watched.add(name)
            delay_s = _HIDDEN_QUIET_S if name.startswith(".") else _QUIET_S
            self._registry.worker.call_later(delay_s, self._look_again, name, stamp(path))

    def _look_again(self, name: str, seen: FileStamp) -> None:
        self._watched.discard(name)
        path = self._registry.plain_path(name)
        if stamp(path) != seen or journal_in_use(path + "-journal"):
            self.look(name)
        elif self._registry.is_primary and (reason := why_unreadable(path)) is not None:
            said = f"SQLite cannot read it: {reason}"
            if stamp(path + "-wal")[0]:  # a copy of a database whose checkpoint was cut off
                said = f"{reason}; its -wal may hold the rest: open it with SQLite once, and close it"
            self._registry.tell_not_replicated(name, said)
