"""What lies in the mount is what SQLite wrote there, and nothing else; and who writes a database file without its WAL
(a copy over it, a container that was given the one file) is replicated like anybody.

The oracle is SQLite itself: the same steps on the plain file system, file by file.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster_nodes import (
    PASSTHROUGH,
    Cluster,
    Node,
    assert_same_bytes,
    assert_sound,
    needs_root,
    pairwise,
    wait_same_position,
    wait_until,
)
from pylitefs.formats.sqlite.wal import FRAME_HEADER_SIZE, WAL_HEADER_SIZE

pytestmark = needs_root
NAME = "app.db"
SIDES = ("", "-wal", "-shm", "-journal")
HEADER_BYTES = 136  # of a wal-index: what SQLite writes into it before there is a frame

_CLIENT = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=10)
for line in sys.stdin:
    try:
        print(db.execute(line).fetchall(), flush=True)
    except sqlite3.Error as error:
        print(repr(error), flush=True)
"""


class Process:
    """A process of its own with a connection: it can be killed."""

    def __init__(self, path: Path, within: str = "") -> None:
        """`within`: a shell command that is run first, in a mount namespace of its own."""
        words = [sys.executable, "-c", _CLIENT, str(path)]
        if within:
            words = ["unshare", "--mount", "--", "sh", "-c", f'{within} && exec "$@"', "sh", *words]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, sql: str) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(sql.replace("\n", " ") + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def kill(self) -> None:
        self._process.kill()
        self._end()

    def close(self) -> None:
        """The connection is closed as it should be."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._end()

    def _end(self) -> None:
        self._process.wait(30)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


@contextlib.contextmanager
def process(path: Path, within: str = "") -> Iterator[Process]:
    made = Process(path, within)
    try:
        yield made
    finally:
        made.kill()


def make(path: Path, rows: int, mode: str, table: str = "t") -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute(f"pragma journal_mode={mode}")
        db.execute(f"create table {table}(id integer primary key, v text)")
        with db:
            db.execute("begin")
            db.executemany(f"insert into {table} values(?,?)", ((i, f"{i:06} " * 20) for i in range(rows)))


def contents(path: Path) -> dict[str, bytes | None]:
    """The files of the database; of a WAL the pages in it, as its salts are random; of its index what does not
    depend on them (nothing but the header is there before there is a frame)."""
    found: dict[str, bytes | None] = {}
    for suffix in SIDES:
        try:
            found[suffix] = Path(f"{path}{suffix}").read_bytes()
        except FileNotFoundError:
            found[suffix] = None
    wal, shm = found["-wal"], found["-shm"]
    if wal:
        size = int.from_bytes(wal[8:12], "big") + FRAME_HEADER_SIZE
        frames = [wal[at : at + size] for at in range(WAL_HEADER_SIZE, len(wal), size)]
        found["-wal"] = b"".join(frame[:8] + frame[FRAME_HEADER_SIZE:] for frame in frames)
    if shm is not None:
        fixed = b"" if wal else shm[:24] + shm[48:72] + shm[96:HEADER_BYTES]  # without salts and checksums
        found["-shm"] = len(shm).to_bytes(8, "big") + fixed
    journal = found["-journal"]
    if journal:  # it has a random number too
        found["-journal"] = len(journal).to_bytes(8, "big") + bytes([any(journal[:28])])
    return found


def steps(path: Path, mode: str) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """What applications do, and what lies there after each."""
    make(path, 300, mode)
    yield "made and closed", contents(path)
    with process(path) as app:
        app("select count(*) from t")
        yield "opened and read", contents(path)
    yield "killed", contents(path)
    with process(path) as app:
        assert app("select count(*) from t") == "[(300,)]"
        yield "opened after the kill, and read", contents(path)
        app("pragma wal_checkpoint(passive)")
        yield "a checkpoint without a frame", contents(path)
        app("pragma wal_checkpoint(truncate)")
        yield "one that truncates", contents(path)
        app.close()
        yield "closed, the last one", contents(path)
    with process(path) as app, process(path) as other:
        other("select count(*) from t")
        app("insert into t values(1000, 'one')")
        yield "a row", contents(path)
        app("pragma wal_checkpoint(passive)")
        yield "copied", contents(path)
        app("insert into t values(1001, 'two')")
        yield "the WAL begun anew", contents(path)
        app("begin")
        app("update t set v = 'x' where id < 100")
        app("rollback")
        yield "rolled back", contents(path)
        other.kill()
        app("pragma wal_checkpoint(truncate)")
        yield "truncated", contents(path)
        app("pragma user_version = 7")
        yield "a frame in a truncated WAL", contents(path)
        app.kill()
        yield "killed after a commit", contents(path)
    with process(path) as app:
        app("select count(*) from t")
        yield "recovered", contents(path)
        app.close()
        yield "closed after recovery", contents(path)


@pytest.mark.parametrize("mode", ["wal", "delete", "truncate", "persist"])
@pytest.mark.parametrize("passthrough", PASSTHROUGH)
def test_files_are_what_sqlite_itself_leaves(cluster: Cluster, passthrough: str, mode: str, tmp_path: Path) -> None:
    """Read in the mount and in the data directory, with a replica attached."""
    primary, replica = cluster.pair()
    folder = primary.data / "dbs" / NAME
    plain = tmp_path / "plain"
    plain.mkdir()
    native = steps(plain / NAME, mode)
    for what, mine in steps(primary.mount / NAME, mode):
        wanted_what, wanted = next(native)
        assert wanted_what == what
        for suffix in SIDES:
            same(mine[suffix], wanted[suffix], f"{what}: {NAME}{suffix}")
        kept = dict(zip(SIDES, (folder / kind for kind in ("database", "wal", "shm", "journal")), strict=True))
        for suffix, path in kept.items():
            size = None if mine[suffix] is None else os.stat(f"{primary.mount / NAME}{suffix}").st_size
            assert (path.stat().st_size if path.exists() else None) == size, f"{what}: {path}"
    assert next(native, None) is None
    wait_same_position(primary, replica, NAME)
    assert_same_bytes([primary, replica], NAME)


def same(mine: bytes | None, wanted: bytes | None, what: str) -> None:
    if mine != wanted:
        sizes = [None if content is None else len(content) for content in (mine, wanted)]
        raise AssertionError(f"{what}: not what it is natively (bytes here, natively: {sizes})")


def is_right(node: Node, rows: int, table: str = "t") -> None:
    with contextlib.closing(node.connect(NAME)) as db:
        assert_sound(db)
        assert db.execute(f"select count(*) from {table}").fetchone() == (rows,)


def becomes_right(primary: Node, replica: Node, rows: int, table: str = "t") -> None:
    """On both nodes, at one position, by itself."""

    def told() -> bool:
        with contextlib.closing(replica.connect(NAME)) as db:
            return bool(db.execute(f"select count(*) from {table}").fetchone() == (rows,))

    is_right(primary, rows, table)
    wait_until(told, f"{rows} rows of {table} on the replica")
    wait_same_position(primary, replica, NAME)
    is_right(replica, rows, table)
    assert_same_bytes([primary, replica], NAME)


@pytest.mark.parametrize(
    ("passthrough", "mode", "left"),
    pairwise(
        ("auto", "wal", "killed"), ("off", "wal", "open"), ("off", "delete", "killed"), ("auto", "delete", "open")
    ),
)
def test_a_backup_is_copied_over_it(
    cluster: Cluster, passthrough: str, mode: str, left: str, tmp_path: Path
) -> None:
    """`sqlite3 P/app.db`, a SELECT, killed or left open; `cp backup.db P/app.db`; open."""
    primary, replica = cluster.pair()
    make(primary.mount / NAME, 100, "wal", "old")
    backup = tmp_path / "backup.db"
    make(backup, 5000, mode)
    with process(primary.mount / NAME) as app:
        assert app("select count(*) from old") == "[(100,)]"
        if left == "killed":
            app.kill()
        subprocess.run(["cp", backup, primary.mount / NAME], check=True)
        becomes_right(primary, replica, 5000)
    is_right(primary, 5000)
    with contextlib.closing(primary.connect(NAME)) as db:
        db.execute("insert into t values (100000, 'afterwards')")
    becomes_right(primary, replica, 5001)


def in_place(path: Path, content: Path) -> None:
    subprocess.run(["dd", f"if={content}", f"of={path}", "bs=64k", "conv=notrunc,fsync", "status=none"], check=True)
    os.truncate(path, content.stat().st_size)


def over_it(path: Path, content: Path) -> None:
    shutil.copyfile(content, path)


@pytest.mark.parametrize("restore", [over_it, in_place], ids=["cp", "dd"])
def test_a_restore_while_nobody_has_it_open(
    cluster: Cluster, restore: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    """After an application was killed that had read only."""
    primary, replica = cluster.pair()
    make(primary.mount / NAME, 700, "wal")
    backup = tmp_path / "backup.db"
    make(backup, 200, "wal")
    with process(primary.mount / NAME) as app:
        app("select count(*) from t")
    restore(primary.mount / NAME, backup)
    becomes_right(primary, replica, 200)


@pytest.mark.parametrize("ends", ["closed", "killed"])
@pytest.mark.parametrize("passthrough", PASSTHROUGH)
def test_a_container_has_only_the_file(cluster: Cluster, passthrough: str, ends: str, tmp_path: Path) -> None:
    """`mount --bind P/app.db`: its -wal is elsewhere. It inserts, while a reader has the database open in the mount,
    which closes afterwards. Both nodes look for damage all the time."""
    primary, replica = cluster.node("primary"), None
    primary.config["data"] |= {"scrub-interval": "200ms", "scrub-rate": 0}
    primary.start()
    replica = cluster.node("replica", primary=primary)
    replica.config["data"] |= {"scrub-interval": "200ms", "scrub-rate": 0}
    replica.start()
    make(primary.mount / NAME, 100, "wal")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / NAME).touch()
    bind = f"mount --bind '{primary.mount / NAME}' '{inside / NAME}'"
    with process(primary.mount / NAME) as reader:
        assert reader("select count(*) from t") == "[(100,)]"
        with process(inside / NAME, bind) as container:
            for number in range(500):
                assert container(f"insert into t values ({1000 + number}, 'from the container')") == "[]"
            if ends == "killed":  # its WAL stays where it is: the next one of its kind finds it
                container.kill()
                with process(inside / NAME, bind) as again:
                    assert again("pragma wal_checkpoint(truncate)") == "[(0, 0, 0)]"
                    again.close()
            else:
                assert container("pragma wal_checkpoint(truncate)") == "[(0, 0, 0)]"
                container.close()
        reader.close()
    becomes_right(primary, replica, 600)
    assert "healed" not in primary.log_text()
