"""Writers that are not SQLite, in place and without its locks: whatever a replica shows is an image that somebody has
finished, and it comes to show the last one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster_nodes import Cluster, Node, needs_root, scaled, wait_until

pytestmark = needs_root
NAME = "app.db"
ROWS = 1500
SPLITS = (0.02, 0.35, 0.5, 0.77, 0.99)


def image(path: Path, generation: int, mode: str = "delete", rows: int = ROWS) -> bytes:
    """All rows are of one generation, and an index says so too: of two images no mixture is sound."""
    path.unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"pragma journal_mode={mode}")
        connection.execute("create table t(id integer primary key, generation, filler)")
        connection.execute("create index i on t(generation, id)")
        connection.execute("begin")
        rows_of = ((row, generation, f"{generation}-{row}-" * 8) for row in range(rows))
        connection.executemany("insert into t values (?, ?, ?)", rows_of)
        connection.execute("commit")
    return path.read_bytes()


def generation_of(node: Node) -> int | None:
    """Which image is there; AssertionError if it is none."""
    with contextlib.closing(sqlite3.connect(f"file:{node.mount / NAME}?mode=ro", uri=True)) as connection:
        connection.execute("begin")
        assert connection.execute("pragma integrity_check").fetchall() == [("ok",)]
        found = connection.execute("select distinct generation from t").fetchall()
        assert len(found) == 1, found
        return int(found[0][0])


class Watch:
    """Looks at the replica all the time."""

    def __init__(self, node: Node) -> None:
        self._node, self._stop = node, threading.Event()
        self.wrong: list[str] = []
        self.looks = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            try:
                generation_of(self._node)
                self.looks += 1
            except (sqlite3.OperationalError, OSError):
                continue
            except (sqlite3.DatabaseError, AssertionError) as error:
                self.wrong.append(repr(error))


def pieces(data: bytes, split: float) -> Iterator[tuple[int, bytes]]:
    """In two parts, the first one followed by a rest that is longer than what is taken for silence at first."""
    at = int(len(data) * split)
    yield 0, data[:at]
    time.sleep(0.8)
    yield at, data[at:]


def python(path: Path, data: bytes, split: float, scratch: Path) -> None:
    with open(path, "r+b", buffering=0) as file:
        for offset, piece in pieces(data, split):
            os.pwrite(file.fileno(), piece, offset)
        file.truncate(len(data))


def fsyncing(path: Path, data: bytes, split: float, scratch: Path) -> None:
    with open(path, "r+b", buffering=0) as file:
        for offset, piece in pieces(data, split):
            os.pwrite(file.fileno(), piece, offset)
            os.fsync(file.fileno())


def shared(path: Path, data: bytes, split: float, scratch: Path) -> None:
    """A descriptor that was duplicated is closed halfway, and another process opens and closes the file."""
    with open(path, "r+b", buffering=0) as file:
        for offset, piece in pieces(data, split):
            os.pwrite(file.fileno(), piece, offset)
            os.close(os.dup(file.fileno()))
            subprocess.run(["sh", "-c", 'exec 3<>"$0"; exec 3>&-', str(path)], check=True, timeout=30)


def autosave(path: Path, data: bytes, split: float, scratch: Path) -> None:
    """As sql.js saves: the file is cut off, and written anew in pieces."""
    with open(path, "wb", buffering=0) as file:
        for at in range(0, len(data), 65536):
            file.write(data[at : at + 65536])
            if at <= len(data) * split < at + 65536:
                time.sleep(0.8)


def cp(path: Path, data: bytes, split: float, scratch: Path) -> None:
    source = scratch / "source"
    source.write_bytes(data)
    subprocess.run(["cp", source, path], check=True, timeout=30)


def dd(path: Path, data: bytes, split: float, scratch: Path) -> None:
    process = subprocess.Popen(
        ["dd", f"of={path}", "conv=notrunc", "bs=4096", "iflag=fullblock", "oflag=dsync", "status=none"],
        stdin=subprocess.PIPE,
    )
    assert process.stdin is not None
    for _, piece in pieces(data, split):
        process.stdin.write(piece)
        process.stdin.flush()
    process.stdin.close()
    assert process.wait(30) == 0


def rsync(path: Path, data: bytes, split: float, scratch: Path) -> None:
    if shutil.which("rsync") is None:
        pytest.skip("no rsync here")
    source = scratch / "source"
    source.write_bytes(data)
    rate = max(1, len(data) >> 10)  # KiB a second
    subprocess.run(["rsync", "--inplace", f"--bwlimit={rate}", "-I", source, path], check=True, timeout=60)


TOOLS: dict[str, Callable[[Path, bytes, float, Path], None]] = {
    "python": python, "fsync": fsyncing, "shared": shared, "autosave": autosave, "cp": cp, "dd": dd, "rsync": rsync
}  # fmt: skip


@pytest.mark.parametrize("open_elsewhere", [False, True])
@pytest.mark.parametrize("tool", TOOLS)
def test_no_half_of_an_image(cluster: Cluster, tool: str, open_elsewhere: bool, tmp_path: Path) -> None:
    """`open_elsewhere`: an application has the database open, and does nothing."""
    primary, replica = cluster.pair()
    path = primary.mount / NAME
    path.write_bytes(image(tmp_path / "image", 0))
    wait_until(lambda: replica.databases() == [NAME] and generation_of(replica) == 0, "the first image")
    with contextlib.ExitStack() as stack:
        if open_elsewhere:
            idle = stack.enter_context(contextlib.closing(primary.connect(NAME)))
            assert idle.execute("select count(*) from t").fetchone() == (ROWS,)
        watch = stack.enter_context(Watch(replica))
        splits = SPLITS[: 1 if tool in ("cp", "rsync") else None] * scaled(1)
        for number, split in enumerate(splits, 1):
            TOOLS[tool](path, image(tmp_path / "image", number, rows=ROWS + 100 * (number % 3)), split, tmp_path)
            wait_until(
                lambda number=number: generation_of(replica) == number, f"image {number}, split at {split}", 5.0
            )
    assert not watch.wrong, watch.wrong[:3]
    assert watch.looks


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_a_handle_that_stays_open(cluster: Cluster, mode: str, tmp_path: Path) -> None:
    """What is sound is recorded when it is quiet. Also where the handle passes its writes by us, as one that was opened
    in WAL mode does."""
    primary, replica = cluster.pair()
    path = primary.mount / NAME
    path.write_bytes(image(tmp_path / "image", 0, mode))
    wait_until(lambda: replica.databases() == [NAME] and generation_of(replica) == 0, "the first image")
    with open(path, "r+b", buffering=0) as file:
        for number in range(1, 4):
            os.pwrite(file.fileno(), image(tmp_path / "image", number, mode), 0)
            wait_until(lambda number=number: generation_of(replica) == number, f"image {number}", 5.0)
        os.pwrite(file.fileno(), b"\0" * 4096, 8192)

        def withheld() -> bool:
            return "not sound" in (json.loads(primary.get("/status"))["databases"][0]["withheld"] or "")

        wait_until(withheld, "it is said that this is not replicated", 5.0)
        assert generation_of(replica) == 3
    wait_until(lambda: primary.export(NAME) == replica.export(NAME) == path.read_bytes(), "what it left", 5.0)


@pytest.mark.parametrize("mode", ["memory", "off"])
@pytest.mark.parametrize("synchronous", ["off", "full"])
def test_sqlite_without_a_journal(cluster: Cluster, mode: str, synchronous: str) -> None:
    """Each commit, also of a connection that stays open, and while it goes on writing."""
    primary, replica = cluster.pair()
    with contextlib.closing(primary.connect(NAME)) as connection:
        connection.execute(f"pragma journal_mode={mode}")
        connection.execute(f"pragma synchronous={synchronous}")
        connection.execute("create table t(id integer primary key, data)")

        def count() -> int:
            with contextlib.closing(sqlite3.connect(f"file:{replica.mount / NAME}?mode=ro", uri=True)) as reader:
                return int(reader.execute("select count(*) from t").fetchone()[0])

        for number in range(1, 8):
            connection.execute("insert into t(data) values (randomblob(9000))")
            wait_until(lambda number=number: count() == number, f"row {number}", 2.0)
        stop_s = time.monotonic() + 3
        written, seen = 7, set()
        while time.monotonic() < stop_s:
            connection.execute("insert into t(data) values (1)")
            written += 1
            time.sleep(0.01)
            if written % 20 == 0:
                seen.add(count())
        assert len(seen) > 3, "it is captured while it is being written"
        wait_until(lambda: count() == written, "all rows", 2.0)


def cp_while_open(path: Path, source: Path) -> None:
    subprocess.run(["cp", source, path], check=True, timeout=30)


def dd_while_open(path: Path, source: Path) -> None:
    subprocess.run(["dd", f"if={source}", f"of={path}", "conv=notrunc", "bs=4096", "status=none"], check=True)


def rsync_while_open(path: Path, source: Path) -> None:
    if shutil.which("rsync") is None:
        pytest.skip("no rsync here")
    subprocess.run(["rsync", "--inplace", "-I", source, path], check=True, timeout=60)


@pytest.mark.parametrize("tool", [cp_while_open, dd_while_open, rsync_while_open])
def test_an_image_beside_a_wal_in_use(cluster: Cluster, tool: Callable[[Path, Path], None], tmp_path: Path) -> None:
    """SQLite reads the new file with the WAL's frames on top. If that is sound replicas have it, if not they keep what
    was before, and it is said."""
    primary, replica = cluster.pair()
    path = primary.mount / NAME
    with contextlib.closing(primary.connect(NAME)) as user:
        user.execute("pragma journal_mode=wal")
        user.execute("pragma wal_autocheckpoint=0")
        user.execute("create table a(v)")
        user.execute("create table b(v)")
        user.execute("insert into a values ('old')")
        user.execute("insert into b values (0)")
        user.execute("pragma wal_checkpoint(truncate)")
        shutil.copyfile(path, tmp_path / "backup")
        user.execute("update a set v = 'new'")
        user.execute("pragma wal_checkpoint(truncate)")
        user.execute("insert into b values (1)")
        wait_until(lambda: primary.export(NAME) == replica.export(NAME), "all is there", 5.0)
        tool(path, tmp_path / "backup")

        def of(node: Node) -> list[tuple[object, ...]]:
            with contextlib.closing(sqlite3.connect(f"file:{node.mount / NAME}?mode=ro", uri=True)) as reader:
                return reader.execute("select v from a union all select v from b").fetchall()

        assert of(primary) == [("old",), (0,), (1,)]
        wait_until(lambda: of(replica) == of(primary), "what SQLite reads on the primary", 5.0)
        user.execute("insert into b values (2)")
        wait_until(lambda: of(replica) == [("old",), (0,), (1,), (2,)], "and what follows", 5.0)
        assert json.loads(primary.get("/status"))["databases"][0]["withheld"] is None

        before = of(replica)
        (tmp_path / "torn").write_bytes((tmp_path / "backup").read_bytes()[:4096] + b"\5" * 8192)
        tool(path, tmp_path / "torn")

        def withheld() -> bool:
            return "not sound" in (json.loads(primary.get("/status"))["databases"][0]["withheld"] or "")

        wait_until(withheld, "it is said that this is not replicated", 5.0)
        assert of(replica) == before
        tool(path, tmp_path / "backup")
        wait_until(lambda: not withheld(), "it is sound again", 5.0)
        wait_until(lambda: of(replica) == of(primary) == before, "it is replicated", 5.0)


def test_a_checkpoint_that_shortens_the_file_is_sqlites_own(cluster: Cluster) -> None:
    """After VACUUM: nobody looks at a copy of the database, nor is it said to be withheld."""
    primary, replica = cluster.pair()
    with contextlib.closing(primary.connect(NAME)) as user:
        user.execute("pragma journal_mode=wal")
        user.execute("create table t(v)")
        user.execute("insert into t values (zeroblob(2000000))")
        user.execute("pragma wal_checkpoint(truncate)")
        user.execute("delete from t")
        user.execute("vacuum")
        user.execute("insert into t values (1)")
        user.execute("pragma wal_checkpoint(passive)")
        user.execute("insert into t values (2)")
        primary.connect(NAME).close()  # a handle that could write is released: what is suspected is looked at
        folder = primary.data / "dbs" / NAME
        until_s = time.monotonic() + 1.0
        while time.monotonic() < until_s:
            assert not list(folder.glob("looked-at*"))
            assert json.loads(primary.get("/status"))["databases"][0]["withheld"] is None
        wait_until(lambda: primary.export(NAME) == replica.export(NAME), "all is there", 5.0)


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_an_image_that_comes_some_time_after_the_file_was_emptied(cluster: Cluster, mode: str, tmp_path: Path) -> None:
    """As `ssh host cat app.db > app.db` does it: the shell empties the file first. By then it is no database any more,
    and it is one again when the handle is closed that it was emptied through."""
    primary, replica = cluster.pair()
    (primary.mount / NAME).write_bytes(image(tmp_path / "image", 1, mode))
    wait_until(lambda: NAME in os.listdir(replica.mount) and generation_of(replica) == 1, "the first image")
    with contextlib.closing(sqlite3.connect(primary.mount / NAME)) as connection:
        connection.execute("select count(*) from t").fetchall()
    new = image(tmp_path / "image", 2)
    with open(primary.mount / NAME, "wb", buffering=0) as file:
        wait_until(lambda: NAME not in os.listdir(replica.mount), "it is dropped")
        for at in range(0, len(new), 65536):
            file.write(new[at : at + 65536])
    wait_until(lambda: NAME in os.listdir(replica.mount) and generation_of(replica) == 2, "the second image")
    wait_until(lambda: primary.position(NAME) == replica.position(NAME), "they agree")


@pytest.mark.parametrize("ends", ["reads", "closes"])
def test_a_wal_that_is_taken_away_and_put_back(cluster: Cluster, ends: str) -> None:
    """As with SQLite's `superlock.test`: whoever has all locks replaces the database, empties its WAL, voids the
    wal-index, and puts everything back. The frames are the same ones, but replicas were told in between that what they
    hold is gone."""
    primary, replica = cluster.pair()
    path = primary.mount / NAME

    def rows(node: Node) -> list[int]:
        with contextlib.closing(sqlite3.connect(f"file:{node.mount / NAME}?mode=ro", uri=True)) as reader:
            return [row for (row,) in reader.execute("select v from t")]

    with contextlib.closing(primary.connect(NAME)) as user:
        user.execute("pragma journal_mode=wal")
        user.execute("create table t(v)")
        user.execute("insert into t values (1)")
        user.execute("pragma wal_checkpoint(truncate)")
        user.execute("insert into t values (2)")
        wait_until(lambda: rows(replica) == [1, 2], "all is there", 5.0)
        wal = Path(f"{path}-wal")
        database, frames = path.read_bytes(), wal.read_bytes()
        wal.write_bytes(b"")
        with open(f"{path}-shm", "r+b", buffering=0) as index:
            index.write(bytes(96))
        path.write_bytes(database)
        wait_until(lambda: rows(replica) == [1], "what SQLite would read now", 5.0)
        wal.write_bytes(frames)
        if ends == "reads":
            assert user.execute("select v from t").fetchall() == [(1,), (2,)]
            wait_until(lambda: rows(replica) == [1, 2], "what SQLite reads", 5.0)
    with contextlib.closing(primary.connect(NAME)) as again:
        assert again.execute("select v from t").fetchall() == [(1,), (2,)]
    wait_until(lambda: rows(replica) == [1, 2], "what the last connection has left", 5.0)
    wait_until(lambda: primary.position(NAME) == replica.position(NAME), "they agree")
