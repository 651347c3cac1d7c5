"""Two engines in one process: a primary beside a real SQLite, a replica that applies its log, and deaths by seed.

A death is a `KillPoint`, raised instead of the n-th call of os.rename, os.pwrite, os.writev, os.fsync, os.unlink or
os.ftruncate that the engine makes: whatever it would have done after it does not happen. Files stay as they are, memory
is gone. A node that was killed starts again and goes on. In the end caught-up replicas are byte-identical.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "t2_engine"))

from engine_nodes import Node, check_log, copy_of, file_checksum, new_primary, rows_of
from sqlite_process import SqliteProcess

from pylitefs.errors import FormatError, PositionMismatch

STEPS = ("rename", "pwrite", "writev", "fsync", "unlink", "ftruncate")


class KillPoint(BaseException):
    """The process dies here. Not an Exception: nothing that handles errors may handle it."""


class Killer:
    """Dies at the n-th call of the named steps on a file below `folder`; then at every further call, so that nothing is
    tidied up by code that runs while the exception passes through it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self._left, self.fired = "", -1, ""
        for name in STEPS:
            monkeypatch.setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(what: Any, *args: Any, **kwargs: Any) -> Any:
            if self._folder:
                path = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else os.path.abspath(what)
                if path.startswith(self._folder):
                    self._left -= 1
                    if self._left <= 0:
                        self.fired = self.fired or f"{name} {os.path.basename(path)}"
                        raise KillPoint(self.fired)
            return original(what, *args, **kwargs)

        return call

    @contextlib.contextmanager
    def armed(self, folder: Path, after: int) -> Iterator[None]:
        """Within: die at the call number `after`. Use `fired` to see whether it came to that."""
        self._folder, self._left, self.fired = f"{folder}/", after, ""
        try:
            yield
        except KillPoint:
            pass
        finally:
            self._folder = ""


class Pair:
    def __init__(self, folder: Path, seed: int, killer: Killer) -> None:
        self.folder, self.killer = folder, killer
        self.rng = random.Random(seed)
        self.primary = new_primary(folder / "primary", page_size=self.rng.choice([512, 1024, 4096]))
        self.replica = Node(folder / "replica", is_primary=False)
        self.sql: SqliteProcess | None = None
        self.deaths: list[str] = []

    # -- the application -------------------------------------------------------------------------------------

    def application(self) -> SqliteProcess:
        if self.sql is None:
            self.sql = SqliteProcess(self.primary.database().files.database)
            self.sql("PRAGMA wal_autocheckpoint = 0")
            self.sql("PRAGMA synchronous = OFF")
        return self.sql

    def work(self) -> None:
        sql, rng = self.application(), self.rng
        match rng.randrange(10):
            case 0:
                sql("DELETE FROM t WHERE id % 3 = ?", rng.randrange(3))
            case 1:
                sql("UPDATE t SET v = randomblob(?) WHERE id % 4 = 1", rng.randrange(1, 900))
            case 2:
                sql("VACUUM")
            case 3:
                sql(f"PRAGMA wal_checkpoint({rng.choice(['PASSIVE', 'RESTART', 'TRUNCATE'])})")
            case 4:
                sql("INSERT INTO t (v) VALUES (randomblob(?))", rng.randrange(100_000))
            case _:
                sql("INSERT INTO t (v) VALUES (randomblob(?))", rng.randrange(3000))

    # -- the two nodes ---------------------------------------------------------------------------------------

    def capture(self) -> None:
        self.primary.store.capture.flush(self.primary.database())

    def ship(self, limit: int) -> None:
        """Give the replica some of what it lacks, as the stream would; or every page where the log does not reach."""
        source, target = self.primary.database(), self.replica.database()
        for _ in range(limit):
            if target.position == source.position:
                return
            entry = source.log.after(target.position.txid)
            try:
                if entry is None:
                    raise PositionMismatch("the log does not reach back")
                data = Path(entry.path).read_bytes()
                if self.rng.random() < 0.3:
                    incoming = target.receive(entry.min_txid, entry.max_txid)
                    for at in range(0, len(data), 5000):
                        incoming.write(data[at : at + 5000])
                    incoming.finish()
                else:
                    target.apply(data)
            except (PositionMismatch, FormatError):
                self.resync()

    def resync(self) -> None:
        source, target = self.primary.database(), self.replica.database()
        copy = self.folder / "snapshot"
        position = source.copy_to(str(copy))
        data, size = copy.read_bytes(), source.page_size
        resync = target.resync(size, None)
        try:
            resync.pages([(at // size + 1, data[at : at + size]) for at in range(0, len(data), size)])
            resync.finish(len(data) // size, position)
        finally:
            resync.abort()

    def upkeep(self) -> None:
        target = self.replica.database()
        if target.replica is not None and self.rng.random() < 0.5:
            target.replica.checkpoint()
        elif target.exists:
            self.replica.apply.rest(target)

    # -- deaths ----------------------------------------------------------------------------------------------

    def risk(self, node: str, work: Callable[[], object]) -> None:
        """Do some work of a node, which may die in the middle of it, and again while it is started again."""
        folder = self.folder / node
        with self.killer.armed(folder, self.rng.randrange(1, 60)):
            work()
        for after in (self.rng.randrange(1, 30), self.rng.randrange(1, 60), 1 << 60):
            if not self.killer.fired:
                return
            self.deaths.append(f"{node}: {self.killer.fired}")
            with self.killer.armed(folder, after):
                self.restart(node)

    def restart(self, node: str) -> None:
        if node == "primary":
            # The mount goes with the daemon, and the application with the mount.
            if self.sql is not None:
                self.sql.kill()
                self.sql = None
            abandon(self.primary)
            self.primary = Node(self.folder / node)
            self.primary.store.settle()
        else:
            abandon(self.replica)
            self.replica = Node(self.folder / node, is_primary=False)

    # -- the end ---------------------------------------------------------------------------------------------

    def check(self) -> None:
        self.capture()
        self.ship(1000)
        source, target = self.primary.database(), self.replica.database()
        assert source.position == target.position
        check_log(source)
        check_log(target)
        assert self.replica.apply.rest(target)
        image = copy_of(self.primary, self.folder / "copy")
        assert Path(target.files.database).read_bytes() == image
        assert file_checksum(target.files.database) == target.position.checksum
        assert rows_of(self.folder / "copy") == self.application()("SELECT id, v FROM t ORDER BY id")

    def close(self) -> None:
        if self.sql is not None:
            self.sql.kill()
        abandon(self.primary)
        abandon(self.replica)


def abandon(node: Node) -> None:
    """The process is gone: its descriptors and locks with it, nothing is written any more."""
    if not node.closed:
        node.closed = True
        node.store.close(clean=False)


@pytest.fixture
def pair(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    made = Pair(tmp_path, request.param, Killer(monkeypatch))
    yield made
    made.close()


@pytest.mark.parametrize("pair", range(12), indirect=True)
def test_caught_up_replicas_are_identical_whatever_died(pair: Pair) -> None:
    for _ in range(4):
        for _ in range(12):
            pair.work()
            match pair.rng.randrange(6):
                case 0 | 1:
                    pair.risk("primary", pair.capture)
                case 2 | 3:
                    pair.risk("replica", lambda: pair.ship(pair.rng.randrange(1, 4)))
                case 4:
                    pair.risk("replica", pair.upkeep)
                case 5 if pair.rng.random() < 0.2:
                    pair.primary.database().log.retain(0, 1)
        pair.check()
    assert pair.deaths, "no death in this run: it shows nothing"


def test_the_deaths_are_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulation reaches what it is meant to reach: else it proves nothing."""
    killer = Killer(monkeypatch)
    found = set()
    for step in range(1, 30):
        pair = Pair(tmp_path / str(step), step, killer)
        pair.work()
        pair.capture()
        for node, work in (("primary", pair.capture), ("replica", lambda: pair.ship(9))):  # noqa: B023
            pair.work()
            with killer.armed(pair.folder / node, step):
                work()
            if killer.fired:
                found.add(f"{node} {killer.fired.split()[0]}")
                killer.fired = ""
                pair.restart(node)
        pair.check()
        pair.close()
    assert {"primary rename", "primary writev", "replica rename", "replica pwrite", "replica fsync"} <= found
