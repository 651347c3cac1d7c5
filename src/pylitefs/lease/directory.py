"""A directory that all nodes share as lease engine: for tests, for several nodes on one machine, and for NFS.

`lease.record` has the format; each cell is a file, replaced by rename, compared and swapped under flock(2). Whatever
the lock stands on decides how much this is worth: on one machine it is as good as the kernel; Linux' NFS client takes
flock to the server (NFSv4, or v3 with lockd, and not mounted with `nolock` or `local_lock`). A node that is stopped,
not killed, in the few microseconds in which it has the lock holds up the others until it goes on, or until the server
gives it up.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from pylitefs.cluster.lease_port import ABSENT, Clock, now_s
from pylitefs.errors import ConfigError, Unavailable
from pylitefs.lease.record import MAX_RECORD_BYTES, Cell, Changed, RecordEngine

T = TypeVar("T")

_LOCK = ".lock"
_TEMPORARY = ".tmp-"
_MAX_STUCK = 8
_POLL_S = 0.1  # to look costs little here


def open_directory(url: str, timeout_s: float = 2.0, clock: Clock = now_s) -> RecordEngine:
    """An engine in the directory of `url`, file:///PATH; it must exist. ConfigError for what is not such a URL."""
    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost") or not os.path.isabs(path):
        raise ConfigError(f'"{url}" is not the URL of a directory: expected something like file:///mnt/shared/litefs')
    return RecordEngine(DirectoryCells(path, timeout_s), timeout_s, clock)


class DirectoryCells:
    """`lease.record.Cells` in a directory. A cell's version is the digest of what it holds, which never repeats."""

    def __init__(self, path: str, timeout_s: float) -> None:
        self._path = path
        self._timeout_s = timeout_s
        self._stuck = 0
        self.where = f"the shared directory {path}"

    async def read(self, name: str) -> Cell | None:
        return await self._run(lambda: self._read(name))

    async def read_all(self) -> Mapping[str, Cell]:
        return await self._run(self._read_all)

    async def write(self, name: str, data: bytes, version: str | None) -> None:
        await self._run(lambda: self._write(name, data, version))

    async def remove(self, name: str) -> None:
        await self._run(lambda: self._remove(name))

    async def pause(self, timeout_s: float, poll_s: float) -> bool:
        await asyncio.sleep(min(timeout_s, poll_s, _POLL_S))
        return False

    async def close(self) -> None:
        pass

    # --- what blocks

    def _read(self, name: str) -> Cell | None:
        try:
            with open(self._file(name), "rb") as file:
                data = file.read(MAX_RECORD_BYTES)
        except FileNotFoundError:
            os.stat(self._path)  # raises when it is the directory that is missing
            return None
        return Cell(data, hashlib.sha256(data).hexdigest())

    def _read_all(self) -> Mapping[str, Cell]:
        names = [name.replace("%", "/") for name in os.listdir(self._path) if not name.startswith(".")]
        cells = {name: self._read(name) for name in names}
        return {name: cell for name, cell in cells.items() if cell is not None}

    def _write(self, name: str, data: bytes, version: str | None) -> None:
        """The file is on the disk before the lock is taken, so that little happens under it."""
        temporary = os.path.join(self._path, _TEMPORARY + secrets.token_hex(8))
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            with self._locked():
                if version is not None:
                    cell = self._read(name)
                    if (cell.version if cell else ABSENT) != version:
                        raise Changed
                os.rename(temporary, self._file(name))
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        self._sync()

    def _remove(self, name: str) -> None:
        with self._locked():
            try:
                os.unlink(self._file(name))
            except FileNotFoundError:
                os.stat(self._path)
        self._sync()

    def _file(self, name: str) -> str:
        return os.path.join(self._path, name.replace("/", "%"))

    def _sync(self) -> None:
        fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """flock is tried, not waited for, so that a thread does not stay behind. Closing gives it up."""
        end_s = time.monotonic() + self._timeout_s * 0.8
        fd = os.open(os.path.join(self._path, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end_s:
                        raise TimeoutError("another node holds its lock") from None
                    time.sleep(0.005)
            yield
        finally:
            os.close(fd)

    async def _run(self, work: Callable[[], T]) -> T:
        """On a thread of its own: a network file system may hang for good, and a pool's threads would be waited for."""
        if self._stuck >= _MAX_STUCK:
            raise Unavailable(f"{self.where} hangs: is the file system mounted, and its server there?")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._stuck += 1

        def finish(result: T | None, error: BaseException | None) -> None:
            self._stuck -= 1
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def run() -> None:
            result, error = None, None
            try:
                result = work()
            except BaseException as caught:
                error = caught
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(finish, result, error)

        threading.Thread(target=run, name="lease-directory", daemon=True).start()
        try:
            return await future
        except OSError as error:
            raise Unavailable(
                f"{self.where} cannot be used: {error.strerror or error}: does it exist, may this node write there, "
                "and is its server up?"
            ) from None
