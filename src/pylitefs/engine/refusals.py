"""What keeps the daemon from taking a database over: told when it lasts, until it ends."""

from __future__ import annotations

import logging
import time

from pylitefs.engine.database import Database

log = logging.getLogger("litefs.role")

_TELL_S = 1.0  # longer than an ordinary transaction takes
_AGAIN_S = 10.0


class Refusals:
    """Of all databases. Used under `Roles._one`."""

    def __init__(self) -> None:
        self._since: dict[str, tuple[float, float]] = {}  # when it began, and when it is to be told next

    def note(self, database: Database, reason: str) -> bool:
        """It was tried, and cannot be done now. True if it is time to tell, and to try something else."""
        now_s = time.monotonic()
        since_s, next_s = self._since.setdefault(database.name, (now_s, now_s + _TELL_S))
        if now_s < next_s:
            return False
        self._since[database.name] = (since_s, now_s + (_AGAIN_S if now_s - since_s > 2 * _TELL_S else _TELL_S))
        log.warning("%s: not taken over for %.0f s, so not replicated: %s", database.name, now_s - since_s, reason)
        if now_s - since_s < 2 * _TELL_S:
            database.emit("notTakenOver", reason=reason)
        return True

    def clear(self, name: str | None = None) -> None:
        """It is not wanted any more, or (None) nothing is."""
        if name is None:
            self._since.clear()
        else:
            self._since.pop(name, None)

    def over(self, name: str) -> None:
        """It was done."""
        since = self._since.pop(name, None)
        if since is not None and time.monotonic() - since[0] > _TELL_S:
            log.info("%s: taken over after %.1f s", name, time.monotonic() - since[0])
