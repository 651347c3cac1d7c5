"""The power fails, or a process dies, in a transaction over two attached databases (rollback modes).

What makes it one transaction is the super-journal: both journals name it, and its unlink is the commit. Here it lies
where the mount keeps it, in the folder of plain files, and each database in a folder of its own. After any cut SQLite
alone would find both databases with the transaction or both without; so must the node, and so must the two logs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_nodes import Node, check_log, file_checksum, make_sqlite, replay
from power_cut import POLICIES, Recorder
from recording_vfs import RecordingVfs, library

from pylitefs.engine.database import Database
from pylitefs.engine.super_journal import super_journal_of

pytestmark = pytest.mark.skipif(library() is None, reason="Python's sqlite3 has no libsqlite3 of its own")

NAMES = ("a", "b")
IMAGES = 42
State = tuple[int, int]
"""How many transactions over both databases, and how many of one's own, it has seen."""


def state_of(db: sqlite3.Connection, schema: str) -> tuple[State, str]:
    both, own = db.execute(f"SELECT n, own FROM {schema}.counter").fetchone()
    rows = db.execute(f"SELECT id, v FROM {schema}.t ORDER BY id").fetchall()
    return (both, own), hashlib.sha256(repr(rows).encode()).hexdigest()


class Mount:
    """What the mount does with the files of two databases, and with a super-journal. `early`: as if that
    lay outside of the mount, each database is recorded at its fsync already."""

    def __init__(self, node: Node, recorder: Recorder, *, early: bool) -> None:
        self.node, self.recorder, self.early = node, recorder, early
        self.databases = {os.path.dirname(node.database(name).files.database): node.database(name) for name in NAMES}
        self._new: set[str] = set()  # files whose name was not made durable yet
        self._changed: set[str] = set()

    def _database(self, path: str) -> Database:
        return self.databases[os.path.dirname(path)]

    def _place(self, path: str) -> str:
        """SQLite sees the super-journal beside the first database; the mount has it among the plain files."""
        if "-mj" in os.path.basename(path):
            return os.path.join(self.node.store.plain_dir, os.path.basename(path))
        return path

    def _commit_point(self, path: str) -> None:
        self.node.store.capture.commit_point(self._database(path))

    def _sync_names(self) -> None:
        """FSYNCDIR: all folders in which names have changed."""
        for folder in sorted(self._changed):
            self.recorder.sync_folder(folder)
        self._changed.clear()

    def created(self, path: str) -> None:
        self.recorder.created(self._place(path))
        self._new.add(path)
        self._changed.add(os.path.dirname(self._place(path)))

    def write(self, path: str, data: bytes, offset: int) -> None:
        if path.endswith("/database"):
            rollback = self._database(path).rollback
            if rollback.starts_transaction():
                self._commit_point(path)
            rollback.note(offset, len(data))
        elif path.endswith("-journal") and offset == 0 and not any(data[:28]):
            self._commit_point(path)
        self.recorder.write(self._place(path), data, offset)

    def truncate(self, path: str, size: int) -> None:
        # To another size it is no commit: in PERSIST mode the end of an old, longer journal is cut off behind the name
        # of the super-journal, before the transaction is committed (writeSuperJournal in pager.c).
        if path.endswith("-journal") and size == 0:
            self._commit_point(path)
        self.recorder.truncate(self._place(path), size)

    def sync(self, path: str) -> None:
        self.recorder.sync(self._place(path))
        if path.endswith("/database") and self.early:
            self._commit_point(path)
        if path in self._new:
            self._new.discard(path)
            self._sync_names()

    def delete(self, path: str, sync_folder: bool) -> None:
        if path.endswith("-journal"):
            self._commit_point(path)
        elif "-mj" in path:
            for database in self.databases.values():
                if os.path.basename(super_journal_of(database.files.journal) or "") == os.path.basename(path):
                    self._commit_point(database.files.database)
        self.recorder.unlink(self._place(path))
        self._new.discard(path)
        self._changed.add(os.path.dirname(self._place(path)))
        if sync_folder:
            self._sync_names()


class Run:
    """A recorded run. `states`: the digest of each state of each database."""

    def __init__(self, folder: Path, mode: str, synchronous: str, seed: int, *, early: bool) -> None:
        self.rng = random.Random(seed)
        self.folder, self.mode, self.synchronous = folder / "node", mode, synchronous
        for name in NAMES:
            path = self.folder / "dbs" / name / "database"
            make_sqlite(str(path), page_size=self.rng.choice([512, 1024, 4096]), mode="DELETE")
            with contextlib.closing(sqlite3.connect(path)) as db:
                db.execute("CREATE TABLE counter (n INTEGER, own INTEGER)")
                db.execute("INSERT INTO counter VALUES (0, 0)")
                db.commit()
        self.node = Node(self.folder)
        self.node.store.settle()
        self.recorder = Recorder(self.folder)
        self.states: dict[tuple[str, State], str] = {}
        self.super_journals = 0
        vfs = RecordingVfs(f"attached{id(self)}", Mount(self.node, self.recorder, early=early), seed)
        try:
            with self.recorder.recording():
                self._work(vfs._name.decode())
        finally:
            vfs.unregister()
            self.node.close(clean=False)
        assert vfs.errors == []
        self.super_journals = sum(op.kind == "unlink" and "-mj" in op.path for op in self.recorder.ops)

    def path(self, name: str) -> Path:
        return self.folder / "dbs" / name / "database"

    def _work(self, vfs: str) -> None:
        db = sqlite3.connect(f"file:{self.path('a')}?vfs={vfs}", uri=True, isolation_level=None)
        db.execute("ATTACH ? AS b", (f"file:{self.path('b')}?vfs={vfs}",))
        for schema in ("main", "b"):
            db.execute(f"PRAGMA {schema}.journal_mode = {self.mode}")
            db.execute(f"PRAGMA {schema}.synchronous = {self.synchronous}")
            db.execute(f"PRAGMA {schema}.cache_size = 5")
        self._note(db)
        for _ in range(14):
            schemas = self.rng.choice([("main", "b"), ("main", "b"), ("b", "main"), ("main",), ("b",)])
            db.execute("BEGIN")
            for schema in schemas:
                counter = "n" if len(schemas) == 2 else "own"
                db.execute(f"UPDATE {schema}.counter SET {counter} = {counter} + 1")
                self._change(db, schema)
            if self.rng.random() < 0.15:
                db.execute("ROLLBACK")
                continue
            self._note(db)
            db.execute("COMMIT")
            for name in NAMES:
                self.recorder.note_mapped(str(self.path(name).with_name("checksums")))
            if self.rng.random() < 0.1:
                self.recorder.write_back(self.rng.choice([0.5, 1.0]), self.rng)
        db.close()

    def _change(self, db: sqlite3.Connection, schema: str) -> None:
        match self.rng.randrange(4):
            case 0:
                db.execute(f"DELETE FROM {schema}.t WHERE id % 3 = ?", (self.rng.randrange(3),))
            case 1:
                db.execute(f"UPDATE {schema}.t SET v = randomblob(?)", (self.rng.randrange(300),))
            case _:
                db.execute(f"INSERT INTO {schema}.t (v) VALUES (randomblob(?))", (self.rng.randrange(6000),))

    def _note(self, db: sqlite3.Connection) -> None:
        for name, schema in zip(NAMES, ("main", "b"), strict=True):
            state, digest = state_of(db, schema)
            self.states[name, state] = digest

    def known(self, db: sqlite3.Connection) -> dict[str, State]:
        """The states in which the two databases are: each was committed, and both have the same common transactions."""
        found: dict[str, State] = {}
        for name, schema in zip(NAMES, ("main", "b"), strict=True):
            assert db.execute(f"PRAGMA {schema}.integrity_check").fetchone() == ("ok",)
            found[name], digest = state_of(db, schema)
            assert self.states.get((name, found[name])) == digest, f"{name}: not a state that SQLite committed"
        assert found["a"][0] == found["b"][0], f"half a transaction: {found}"
        return found

    def sqlite_alone(self, image: Path) -> dict[str, State]:
        """What SQLite recovers by itself. The journals name the super-journal by its path in the run, so it is done
        there."""
        for name in NAMES:
            shutil.rmtree(self.path(name).parent)
            self.path(name).parent.mkdir()
            for suffix in ("", "-journal"):
                with contextlib.suppress(FileNotFoundError):
                    shutil.copyfile(image / "dbs" / name / f"database{suffix}", f"{self.path(name)}{suffix}")
        for super_journal in (image / "files").glob("*-mj*"):
            shutil.copyfile(super_journal, self.path("a").with_name(super_journal.name))
        return self._opened(self.path("a"), self.path("b"))

    def _opened(self, main: Path, other: Path) -> dict[str, State]:
        with contextlib.closing(sqlite3.connect(main)) as db:
            db.execute("ATTACH ? AS b", (str(other),))
            return self.known(db)

    def check_start(self, node: Node, least: dict[str, State]) -> dict[str, State]:
        """Files and logs of both databases say the same, and nothing that SQLite has is missing."""
        copies: list[Path] = []
        for name in NAMES:
            database = node.database(name)
            assert database.set_aside_reason is None
            assert not os.path.exists(database.files.journal)
            assert database.position.checksum == file_checksum(database.files.database)
            check_log(database)
            if database.log.first_txid == 1:
                replayed = node.store.data_dir + f"/replayed-{name}"
                Path(replayed).write_bytes(replay(database))
                copies.append(Path(replayed))
            else:
                copies.append(Path(database.files.database))
        found = self._opened(*(Path(node.database(name).files.database) for name in NAMES))
        assert self._opened(*copies) == found, "the logs say something else"
        for name in NAMES:
            assert found[name] >= least[name]
        return found


def started(folder: Path) -> Node:
    (folder / "boot").write_text("the boot before\n")
    (folder / "files").mkdir(exist_ok=True)
    node = Node(folder)
    node.store.settle()
    return node


def chosen(run: Run, rng: random.Random) -> Iterator[tuple[int, str]]:
    """Cuts at fsyncs, around what happens to super-journals and journals, and anywhere."""
    ops = run.recorder.ops
    around = [
        index + after
        for index, op in enumerate(ops)
        for after in (0, 1, 2, 3)
        if "-mj" in op.path or (op.kind in ("link", "unlink") and op.path.endswith("-journal"))
    ]
    for number in range(IMAGES):
        place = (rng.choice(around or [0]), rng.choice(run.recorder.boundaries()), rng.randint(0, len(ops)))[number % 3]
        yield min(place, len(ops)), POLICIES[rng.randrange(len(POLICIES))]


CASES = [
    ("DELETE", "FULL", 0), ("DELETE", "FULL", 1), ("DELETE", "EXTRA", 2), ("TRUNCATE", "FULL", 3),
    ("PERSIST", "FULL", 4), ("PERSIST", "EXTRA", 5),
]  # fmt: skip


@pytest.mark.parametrize("early", [False, True], ids=["", "early"])
@pytest.mark.parametrize(("mode", "synchronous", "seed"), CASES)
def test_both_have_the_transaction_or_neither(
    tmp_path: Path, mode: str, synchronous: str, seed: int, early: bool
) -> None:
    run = Run(tmp_path / "run", mode, synchronous, seed, early=early)
    assert run.super_journals > 3
    rng = random.Random(seed)
    for number, (count, policy) in enumerate(chosen(run, rng)):
        folder = tmp_path / f"image{number}"
        run.recorder.image(count, rng, policy, folder)
        least = run.sqlite_alone(folder)
        node = started(folder)
        recovered = run.check_start(node, least)
        node.close(clean=False)
        again = started(folder)
        assert run.check_start(again, least) == recovered
        again.close(clean=True)
        shutil.rmtree(folder)
