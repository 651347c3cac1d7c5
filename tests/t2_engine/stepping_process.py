"""A real SQLite in a process of its own that stops before every fsync until it is told how that goes.

So a test stands in for the filesystem: it sees the files as they are at the fsync, and answers success or an error.
"""

from __future__ import annotations

import os
import pickle
import random
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

CHILD = r"""
import pickle, sqlite3, struct, sys
sys.path.insert(0, sys.argv[1])
from recording_vfs import RecordingVfs
source, sink = sys.stdin.buffer, sys.stdout.buffer

def tell(*message):
    data = pickle.dumps(message)
    sink.write(struct.pack("=I", len(data)) + data)
    sink.flush()

def hear():
    head = source.read(4)
    if len(head) < 4:
        raise SystemExit
    return pickle.loads(source.read(struct.unpack("=I", head)[0]))

class Listener:
    def created(self, path): pass
    def write(self, path, data, offset): pass
    def truncate(self, path, size): pass
    def delete(self, path, sync_folder):
        tell("delete", path)
        if not hear(): raise OSError
    def sync(self, path):
        tell("sync", path)
        if not hear(): raise OSError

vfs = RecordingVfs("stepping", Listener(), int(sys.argv[3]))
connections = {}
while True:
    connection, sql, values = hear()
    try:
        if sql is None:
            connections.pop(connection).close()
            answer = []
        else:
            if connection not in connections:
                connections[connection] = sqlite3.connect(
                    "file:" + sys.argv[2] + "?vfs=stepping", uri=True, timeout=0, isolation_level=None)
            answer = connections[connection].execute(sql, values).fetchall()
    except sqlite3.Error as error:
        answer = str(error)
    tell("done", answer)
"""


class SteppingProcess:
    """`start` a statement, then `event` after `event`: ("sync", path), ("delete", path) to be answered, or ("done",
    rows or the text of the error)."""

    def __init__(self, path: str) -> None:
        here = str(Path(__file__).parent)
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", CHILD, here, path, str(random.randrange(1 << 30))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def _say(self, message: object) -> None:
        assert self._process.stdin is not None
        data = pickle.dumps(message)
        self._process.stdin.write(struct.pack("=I", len(data)) + data)
        self._process.stdin.flush()

    def event(self) -> tuple[str, Any]:
        assert self._process.stdout is not None
        head = self._process.stdout.read(4)
        assert len(head) == 4, "the SQLite process died"
        what, value = pickle.loads(self._process.stdout.read(struct.unpack("=I", head)[0]))
        return str(what), value

    def start(self, sql: str | None, *values: object, on: str = "main") -> tuple[str, Any]:
        """Begin a statement (None: close the connection); the first event."""
        self._say((on, sql, values))
        return self.event()

    def answer(self, ok: bool) -> tuple[str, Any]:
        """How the fsync, or the removal, went; the next event."""
        self._say(ok)
        return self.event()

    def run(self, sql: str | None, *values: object, on: str = "main") -> Any:
        """A statement with all its fsyncs; its rows. RuntimeError for SQLite's errors."""
        what, value = self.start(sql, *values, on=on)
        while what != "done":
            what, value = self.answer(True)
        if isinstance(value, str):
            raise RuntimeError(value)
        return value

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self.stop()

    def stop(self) -> None:
        if self._process.stdin is not None and not self._process.stdin.closed:
            try:
                self._process.stdin.close()
            except BrokenPipeError:
                pass
        self._process.wait(timeout=20)
        if self._process.stdout is not None and not self._process.stdout.closed:
            self._process.stdout.close()


def is_wal(event: tuple[str, Any]) -> bool:
    return event[0] == "sync" and os.path.basename(event[1]).endswith("-wal")
