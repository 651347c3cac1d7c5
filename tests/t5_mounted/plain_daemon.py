"""A daemon for tests: mounts DATA at MOUNT with `PlainHooks`, prints "ready passthrough=0|1", ends on SIGTERM.

usage: plain_daemon.py MOUNT DATA cached|passthrough|passthrough-readers
"""

from __future__ import annotations

import collections
import os
import signal
import sys
import threading

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "t3_filesystem"))

from plain_hooks import PlainHooks

from pylitefs.errors import MountError
from pylitefs.filesystem.session import Session


def main() -> int:
    mount_dir, data_dir, mode = sys.argv[1:4]
    sys.setswitchinterval(0.0005)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    hooks = PlainHooks(data_dir)
    hooks.calls = collections.deque(maxlen=1)  # type: ignore[assignment]
    session = Session(
        mount_dir, data_dir, hooks, passthrough=mode.startswith("passthrough"), io_uring=not mode.endswith("readers"),
        allow_other=True, log=lambda line: print(line, file=sys.stderr, flush=True), on_gone=ended.set,
    )  # fmt: skip
    try:
        session.start()
    except MountError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"ready passthrough={int(session.passthrough)}", flush=True)
    while not ended.wait(0.5):
        pass
    session.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
