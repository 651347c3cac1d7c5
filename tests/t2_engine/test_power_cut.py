"""The power fails at any fsync boundary, and anywhere between: the node starts by itself.

SQLite runs on a VFS that does what the mount does for the engine (its hooks), and both are recorded. From each image
of the disk SQLite alone would recover some committed state; the node must come up with that one or a later one that
SQLite committed too (the log may know more), and its log must fit it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_nodes import Node, check_log, file_checksum, new_primary
from power_cut import POLICIES, Recorder
from recording_vfs import RecordingVfs, library

from pylitefs.engine.database import Database
from pylitefs.engine.stand_in import completes_commit
from pylitefs.formats.sqlite.wal import WalHeader
from pylitefs.ports import FileKind

pytestmark = pytest.mark.skipif(library() is None, reason="Python's sqlite3 has no libsqlite3 of its own")

IMAGES = 40
STAND_IN = "STAND-IN"
"""A database in mode DELETE that goes on in a WAL, see `pylitefs.engine.stand_in`."""


def digest(db: sqlite3.Connection) -> tuple[int, str]:
    """Which committed state this is: (its number, a digest of its rows)."""
    number = int(db.execute("SELECT n FROM counter").fetchone()[0])
    rows = db.execute("SELECT id, v FROM t ORDER BY id").fetchall()
    return number, hashlib.sha256(repr(rows).encode()).hexdigest()


def digest_of(path: Path) -> tuple[int, str]:
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return digest(db)


class Mount:
    """Between SQLite and the recorder: calls the engine where the filesystem's hooks would."""

    def __init__(self, node: Node, recorder: Recorder) -> None:
        self.node, self.recorder = node, recorder
        self.database: Database = node.database()
        self.files = self.database.files
        self.checkpointing = False
        self._folder_synced: set[str] = set()

    def _wal_in_use(self) -> bool:
        return os.path.exists(self.files.wal) and os.path.getsize(self.files.wal) > 0

    def _commit_point(self) -> None:
        self.node.store.capture.commit_point(self.database)

    def created(self, path: str) -> None:
        self.recorder.created(path)
        self._folder_synced.discard(path)
        if path == self.files.wal:
            self.database.wal.created(FileKind.SHM)
            self.database.wal.created(FileKind.WAL)

    def write(self, path: str, data: bytes, offset: int) -> None:
        if path == self.files.database and not self._wal_in_use():
            if self.database.rollback.starts_transaction():
                self._commit_point()
            self.database.rollback.note(offset, len(data))
        if path == self.files.journal and offset == 0 and not any(data[:28]):
            self._commit_point()
        self.recorder.write(path, data, offset)

    def written(self, path: str, offset: int, size: int) -> None:
        if path == self.files.wal and self.database.wal_stands_in:
            fd = os.open(path, os.O_RDONLY)
            try:
                if completes_commit(fd, offset, size):
                    self.recorder.sync(path)
            finally:
                os.close(fd)

    def truncate(self, path: str, size: int) -> None:
        if path == self.files.journal:
            self._commit_point()
        elif path == self.files.wal:
            self.node.flush()
        self.recorder.truncate(path, size)

    def sync(self, path: str) -> None:
        if path == self.files.wal and self.checkpointing:
            self.node.flush()
            self.database.wal.mark_synced()
        self.recorder.sync(path)
        if path in (self.files.wal, self.files.journal) and path not in self._folder_synced:
            self._folder_synced.add(path)
            self.recorder.sync_folder(os.path.dirname(path))

    def delete(self, path: str, sync_folder: bool) -> None:
        if path == self.files.journal:
            self._commit_point()
        elif path == self.files.wal:
            self.node.flush()
            self.database.wal.removed(FileKind.WAL)
            self.database.wal.removed(FileKind.SHM)
        self.recorder.unlink(path)
        if sync_folder:
            self.recorder.sync_folder(os.path.dirname(path))


class Run:
    """A recorded run of an application on a primary. `states`: what each number's digest is."""

    def __init__(self, folder: Path, mode: str, synchronous: str, seed: int) -> None:
        self.rng = random.Random(seed)
        self.folder = folder
        self.mode, self.synchronous = mode, synchronous
        page_size = self.rng.choice([512, 1024, 4096])
        self.node = new_primary(folder / "node", page_size=page_size, mode="DELETE")
        self._prepare()
        if mode == STAND_IN:
            Path(self.node.database().files.wal).write_bytes(WalHeader.create(page_size, 0, 1, 2).pack())
            self.node.database().wal_stands_in = True
        self.recorder = Recorder(folder / "node" / "dbs")
        self.states: dict[int, str] = {}
        self.mount = Mount(self.node, self.recorder)
        self.vfs = RecordingVfs(f"recorder{id(self)}", self.mount, seed)
        self.database = self.node.database()
        try:
            with self.recorder.recording():
                self._work()
        finally:
            self.vfs.unregister()
            self.node.close(clean=False)
        assert self.vfs.errors == []

    def _prepare(self) -> None:
        database = self.node.database()
        with contextlib.closing(sqlite3.connect(database.files.database)) as db:
            db.execute("CREATE TABLE counter (n INTEGER)")
            db.execute("INSERT INTO counter VALUES (0)")
            db.commit()
            if self.mode == "WAL":
                db.execute("PRAGMA journal_mode = WAL")
        database.rollback.suspect = True
        assert self.node.store.capture.commit_point(database)
        idle = threading.Event()  # the log's next file is made on another thread: the recorder must know of it
        self.node.store.opener.do(idle.set)
        assert idle.wait(10)

    def _connect(self) -> sqlite3.Connection:
        uri = f"file:{self.database.files.database}?vfs={self.vfs._name.decode()}"
        db = sqlite3.connect(uri, uri=True, isolation_level=None)
        if self.mode not in ("WAL", STAND_IN):
            db.execute(f"PRAGMA journal_mode = {self.mode}")
        db.execute(f"PRAGMA synchronous = {self.synchronous}")
        db.execute("PRAGMA wal_autocheckpoint = 0")
        db.execute("PRAGMA cache_size = 5")
        return db

    def _work(self) -> None:
        db = self._connect()
        self._note(db)
        for step in range(40):
            match self.rng.randrange(12):
                case 0:
                    self._checkpoint(db)
                case 1 | 2:
                    self.node.flush()
                    self.recorder.mark(f"captured {digest(db)[0]}")
                case 3:
                    db.execute("BEGIN")
                    db.execute("UPDATE t SET v = randomblob(3000)")
                    db.execute("ROLLBACK")
                case 4 if step % 3 == 0 and self.mode != STAND_IN:
                    self._checkpoint(db)
                    self.mount.checkpointing = True
                    db.close()
                    self.mount.checkpointing = False
                    db = self._connect()
                case 5 if self.rng.random() < 0.3:
                    self.database.log.retain(0, 20_000)
                case 6 if step % 2 == 0:
                    self.recorder.write_back(self.rng.choice([0.5, 0.9, 1.0]), self.rng)
                case _:
                    self._transaction(db)
        self.mount.checkpointing = True
        db.close()

    def _checkpoint(self, db: sqlite3.Connection) -> None:
        if self.mode in ("WAL", STAND_IN):
            self.mount.checkpointing = True
            db.execute(f"PRAGMA wal_checkpoint({self.rng.choice(['PASSIVE', 'FULL', 'RESTART', 'TRUNCATE'])})")
            self.mount.checkpointing = False

    def _transaction(self, db: sqlite3.Connection) -> None:
        db.execute("BEGIN")
        db.execute("UPDATE counter SET n = n + 1")
        match self.rng.randrange(5):
            case 0:
                db.execute("DELETE FROM t WHERE id % 3 = ?", (self.rng.randrange(3),))
            case 1:
                db.execute("UPDATE t SET v = randomblob(?)", (self.rng.randrange(300),))
            case _:
                db.execute("INSERT INTO t (v) VALUES (randomblob(?))", (self.rng.randrange(6000),))
        self.states[len(self.states)] = ""
        number, self.states[number] = digest(db)
        db.execute("COMMIT")
        self.recorder.mark(f"commit {number}")
        self._note(db)

    def _note(self, db: sqlite3.Connection) -> None:
        number, state = digest(db)
        assert self.states.setdefault(number, state) == state
        self.recorder.note_mapped(self.database.files.checksums)

    def marked(self, what: str, count: int) -> int:
        """The number of the last commit that had returned ("commit"), or was in the log ("captured"), by then."""
        marks = [op.path.split() for op in self.recorder.ops[:count] if op.kind == "mark"]
        return max((int(number) for kind, number in marks if kind == what), default=0)


def sqlite_alone(image: Path, folder: Path) -> tuple[int, str]:
    """The state that SQLite recovers from the image, on a copy."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for suffix in ("", "-wal", "-journal"):
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(image / f"database{suffix}", folder / f"database{suffix}")
    return digest_of(folder / "database")


def started(folder: Path) -> Node:
    (folder / "boot").write_text("the boot before\n")
    node = Node(folder)
    node.store.settle()
    return node


def check_start(run: Run, node: Node, least: int) -> tuple[int, str]:
    """The node stands at a state that was committed, at `least` this one, and its log says the same."""
    database = node.database()
    assert database.set_aside_reason is None
    files = database.files
    assert not any(os.path.exists(path) for path in (files.wal, files.shm, files.journal))
    assert database.position.checksum == file_checksum(files.database)
    check_log(database)
    number, state = digest_of(Path(files.database))
    assert run.states[number] == state, "not a state that SQLite committed"
    assert number >= least, f"state {number}, but {least} was safe"
    return number, state


# Not NORMAL in the rollback modes: there a power cut may damage the database of SQLite alone too.
CASES = [
    ("WAL", "NORMAL", 0), ("WAL", "NORMAL", 1), ("WAL", "NORMAL", 2), ("WAL", "FULL", 3), ("WAL", "FULL", 4),
    ("DELETE", "FULL", 5), ("DELETE", "EXTRA", 6), ("TRUNCATE", "FULL", 7), ("PERSIST", "FULL", 8),
    ("PERSIST", "EXTRA", 9), (STAND_IN, "NORMAL", 10), (STAND_IN, "NORMAL", 11), (STAND_IN, "FULL", 12),
]  # fmt: skip


@pytest.mark.parametrize(("mode", "synchronous", "seed"), CASES)
def test_every_image_starts(tmp_path: Path, mode: str, synchronous: str, seed: int) -> None:
    run = Run(tmp_path / "run", mode, synchronous, seed)
    rng = random.Random(seed)
    for number, (count, policy) in enumerate(chosen(run, rng)):
        folder = tmp_path / f"image{number}"
        run.recorder.image(count, rng, policy, folder / "dbs")
        if rng.random() < 0.5:
            (folder / "dbs" / "db" / "database-shm").write_bytes(rng.randbytes(32768))
        least, state = sqlite_alone(folder / "dbs" / "db", tmp_path / "alone")
        assert run.states[least] == state, "the model of the disk is wrong: SQLite itself fails"
        if synchronous == "EXTRA" or (mode == "WAL" and synchronous == "FULL") or mode == STAND_IN:
            assert least >= run.marked("commit", count)
        node = started(folder)
        if policy == "log first":
            least = max(least, run.marked("captured", count))
        recovered = check_start(run, node, least)
        position = node.database().position
        node.close(clean=False)
        again = started(folder)
        assert check_start(run, again, least) == recovered and again.database().position == position
        again.close(clean=True)
        shutil.rmtree(folder)


def chosen(run: Run, rng: random.Random) -> Iterator[tuple[int, str]]:
    boundaries = run.recorder.boundaries()
    for number in range(IMAGES):
        policy = POLICIES[number % len(POLICIES)]
        anywhere = rng.randint(0, len(run.recorder.ops))
        yield (rng.choice(boundaries) if number % 3 else anywhere), policy


@pytest.mark.parametrize(("mode", "synchronous", "seed"), [CASES[0], CASES[3], CASES[5]])
def test_the_power_fails_again_during_recovery(tmp_path: Path, mode: str, synchronous: str, seed: int) -> None:
    run = Run(tmp_path / "run", mode, synchronous, seed)
    rng = random.Random(seed)
    for number in range(12):
        first, second = tmp_path / f"first{number}", tmp_path / f"second{number}"
        run.recorder.image(rng.choice(run.recorder.boundaries()), rng, rng.choice(POLICIES), first / "dbs")
        least, _ = sqlite_alone(first / "dbs" / "db", tmp_path / "alone")
        recorder = Recorder(first / "dbs")
        with recorder.recording():
            node = started(first)
            node.close(clean=rng.random() < 0.5)
        recorder.image(rng.choice(recorder.boundaries()), rng, rng.choice(POLICIES), second / "dbs")
        node = started(second)
        check_start(run, node, least)
        node.close(clean=False)
