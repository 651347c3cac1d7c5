"""Daemons without the time that Python takes to load: for runs that start thousands.

    with Forks() as forks:
        process = forks.start(["mount", "-config", "litefs.yml"], folder, log)   # behaves as a subprocess.Popen

`litefs mount` spends four fifths of the processor time of a start on loading Python and its libraries. So a process
loads what a daemon loads, does nothing with it, and forks for each start; the child goes on as `litefs` with its
arguments. From there on all is as ever: a process of its own, with its mount, its threads, and its mount guard.

The children are the forking process's: it tells their exit statuses. It ends, and so do they (SIGTERM), when nobody
holds its socket any more.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any


class Forked:
    """One child: what tests use of `subprocess.Popen`."""

    def __init__(self, forks: Forks, pid: int, words: list[str]) -> None:
        self._forks, self.pid, self.args = forks, pid, words
        self._pidfd = os.pidfd_open(pid)  # it stays a zombie until we ask for its status: the number is its own
        self.returncode: int | None = None
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        return self._ended(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        status = self._ended(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return status

    def _ended(self, timeout_s: float | None) -> int | None:
        if self.returncode is None:
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            if not poll.poll(None if timeout_s is None else timeout_s * 1000):
                return None
            with self._lock:
                if self.returncode is None:
                    self.returncode = self._forks.status_of(self.pid)
                    os.close(self._pidfd)
        return self.returncode

    def send_signal(self, signum: int) -> None:
        with self._lock:
            if self.returncode is None:
                try:
                    signal.pidfd_send_signal(self._pidfd, signum)
                except ProcessLookupError:
                    pass

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Forks:
    """The forking process. A context; from any thread."""

    def __enter__(self) -> Forks:
        ours, theirs = socket.socketpair()
        with theirs:
            words = [sys.executable, __file__, str(theirs.fileno())]
            self._process = subprocess.Popen(words, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self._socket, self._answers, self._lock = ours, ours.makefile("r"), threading.Lock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._answers.close()
        self._socket.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, **question: Any) -> int:
        with self._lock:
            self._socket.sendall(json.dumps(question).encode() + b"\n")
            return int(self._answers.readline())

    def start(self, words: list[str], folder: Path, log: Path) -> Forked:
        """`litefs WORDS` in a folder, which writes to the end of `log`."""
        pid = self._ask(words=words, folder=str(folder), log=str(log))
        return Forked(self, pid, ["litefs", *words])

    def status_of(self, pid: int) -> int:
        """Of a child that has ended, as `Popen.returncode` has it."""
        return self._ask(pid=pid)


# -- the forking process


def serve(channel: socket.socket) -> list[str] | None:
    """In the forking process until its last user has gone: None. In each child at once: its arguments."""
    children: set[int] = set()
    with channel.makefile("r") as questions:
        for line in questions:
            question = json.loads(line)
            if "pid" in question:
                pid = question["pid"]
                children.discard(pid)
                answer = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            elif answer := os.fork():
                children.add(answer)
            else:
                channel.close()
                os.chdir(question["folder"])
                log = os.open(question["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                os.dup2(log, 1)
                os.dup2(log, 2)
                os.close(log)
                words: list[str] = question["words"]
                return words
            channel.sendall(f"{answer}\n".encode())
    _end(children)
    return None


def _end(children: set[int]) -> None:
    for signum, wait_s in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
        for pid in children:
            os.kill(pid, signum)
        until_s = time.monotonic() + wait_s
        while children and time.monotonic() < until_s:
            children -= {pid for pid in children if os.waitpid(pid, os.WNOHANG)[0]}
            time.sleep(0.02)


def main() -> None:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as `litefs mount` does, and a thread would not be forked
    from pylitefs import daemon  # noqa: F401
    from pylitefs.cli import main as litefs
    from pylitefs.cli import mount  # noqa: F401
    from pylitefs.lease import consul, directory, etcd, kubernetes, object_store  # noqa: F401

    words = serve(socket.socket(fileno=int(sys.argv[1])))
    if words is not None:
        sys.argv = ["litefs", *words]
        litefs.main()


if __name__ == "__main__":
    main()
