"""How a request is answered, whenever and on whatever thread: the one place where errors become errno.

A handler returns the body of its reply, or None if the reply comes later through `Answers.after`.
"""

from __future__ import annotations

import errno
import math
import resource
import time
import traceback
from collections.abc import Callable
from typing import Protocol

from pylitefs.errors import DatabaseBusy, DatabaseNotFound, LitefsError, ReadOnlyReplica, Unavailable
from pylitefs.formats.fuse.abi import opcode_name
from pylitefs.ports import Then

_USED_UP = frozenset({errno.EMFILE, errno.ENFILE})
_QUIET_S = 60.0

Act = Callable[[], bytes | None]
"""The rest of a request: returns the body of its reply, or None if it has arranged for the reply itself."""

_ERRNO: tuple[tuple[type[LitefsError], int], ...] = (
    (ReadOnlyReplica, errno.EROFS),
    (DatabaseBusy, errno.EBUSY),
    (DatabaseNotFound, errno.ENOENT),
    (Unavailable, errno.EAGAIN),
)


class ReplySink(Protocol):
    """The part of the device that answers requests. False: the kernel no longer waits for this one."""

    def reply(self, unique: int, body: bytes) -> bool: ...

    def fail(self, unique: int, code: int) -> bool: ...


class Answers:
    """Replies of one mount. An error nobody expected is EIO for the caller and one line in the log per place."""

    def __init__(self, sink: ReplySink, log: Callable[[str], None]) -> None:
        self.sink = sink
        self._log = log
        self._seen: set[str] = set()
        self._used_up_s = -math.inf

    def after(self, unique: int, opcode: int, act: Act) -> Then:
        """The continuation to give to a hook: goes on with `act` and answers, or answers with the error."""

        def then(error: BaseException | None) -> None:
            if error is None:
                try:
                    body = act()
                    if body is not None:
                        self.sink.reply(unique, body)
                    return
                except BaseException as raised:
                    error = raised
            self.fail(unique, opcode, error)

        return then

    def fail(self, unique: int, opcode: int, error: BaseException) -> None:
        self.sink.fail(unique, self.errno_of(opcode, error))

    def errno_of(self, opcode: int, error: BaseException) -> int:
        if isinstance(error, OSError) and error.errno:
            if error.errno in _USED_UP:
                self._tell_used_up(error)
            # ENOSYS would switch the operation off for the whole mount: fsync would then do nothing
            return errno.EIO if error.errno == errno.ENOSYS else error.errno
        for kind, code in _ERRNO:
            if isinstance(error, kind):
                return code
        self.report(opcode, error)
        return errno.EIO

    def _tell_used_up(self, error: OSError) -> None:
        """Say so once, and again if it comes back after a minute without."""
        before, self._used_up_s = self._used_up_s, time.monotonic()
        if self._used_up_s - before > _QUIET_S:
            limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            self._log(f"files cannot be opened: {error.strerror} (limit {limit}): raise it (ulimit -n, LimitNOFILE=)")

    def report(self, opcode: int, error: BaseException) -> None:
        """Log an error nobody expected, once for each place it comes from."""
        frames = traceback.extract_tb(error.__traceback__)
        place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "an engine hook"
        line = f"{opcode_name(opcode)} failed with {type(error).__name__} at {place}"
        if line not in self._seen:
            self._seen.add(line)
            self._log(f"{line}: {error}")
