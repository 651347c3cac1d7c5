"""Real SQLite connections in a process of their own.

POSIX locks belong to a process: the engine and SQLite in one process would not see each other's locks, and closing a
file in one would drop the other's. So whatever needs SQLite's locks runs it out here.
"""

from __future__ import annotations

import pickle
import struct
import subprocess
import sys
from typing import Any

_CHILD = r"""
import pickle, sqlite3, struct, sys
connections = {}
source, sink = sys.stdin.buffer, sys.stdout.buffer
while True:
    head = source.read(4)
    if len(head) < 4:
        break
    connection, path, sql, values = pickle.loads(source.read(struct.unpack("=I", head)[0]))
    try:
        if sql is None:
            if connection in connections:  # else it could not be opened
                connections.pop(connection).close()
            answer = []
        else:
            if connection not in connections:
                connections[connection] = sqlite3.connect(path, timeout=0, isolation_level=None)
            if isinstance(values, list):
                connections[connection].executemany(sql, values)
                answer = []
            else:
                answer = connections[connection].execute(sql, values).fetchall()
    except sqlite3.Error as error:
        answer = str(error)
    data = pickle.dumps(answer)
    sink.write(struct.pack("=I", len(data)) + data)
    sink.flush()
"""


class SqliteProcess:
    """One process with any number of connections to one database; in autocommit mode, without a busy timeout."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __call__(self, sql: str | None, *values: object, on: str = "main") -> list[tuple[Any, ...]]:
        """Run a statement on the connection called `on` (opened when first used). RuntimeError for SQLite's errors."""
        return self._ask(on, sql, values)

    def many(self, sql: str, rows: list[tuple[object, ...]]) -> None:
        self._ask("main", sql, rows)

    def _ask(self, on: str, sql: str | None, values: object) -> list[tuple[Any, ...]]:
        assert self._process.stdin is not None and self._process.stdout is not None
        data = pickle.dumps((on, self.path, sql, values))
        self._process.stdin.write(struct.pack("=I", len(data)) + data)
        self._process.stdin.flush()
        head = self._process.stdout.read(4)
        assert len(head) == 4, "the SQLite process died"
        answer = pickle.loads(self._process.stdout.read(struct.unpack("=I", head)[0]))
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return list(answer)

    def close(self, on: str = "main") -> None:
        self._ask(on, None, ())

    def kill(self) -> None:
        """kill -9: nothing is checkpointed, no file is removed."""
        self._process.kill()
        self.stop()

    def stop(self) -> None:
        """Orderly end; connections that are still open are left to the process's exit."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            try:
                self._process.stdin.close()
            except BrokenPipeError:
                pass
        self._process.wait(timeout=20)
        if self._process.stdout is not None:
            self._process.stdout.close()
