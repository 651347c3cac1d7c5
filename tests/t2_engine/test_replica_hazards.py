"""What must not become of a replica's files: without room, while it is set aside, by whoever is not the daemon."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_nodes import copy_of, log_files, rows_of
from limits import largest_file
from sqlite_process import SqliteProcess
from test_apply import Pair, state_of

from pylitefs.engine.database import Database
from pylitefs.engine.hooks import EngineHooks
from pylitefs.engine.shared_wal import SharedWal
from pylitefs.errors import DatabaseBusy, PositionMismatch
from pylitefs.ports import FileKind, FileRef


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path)
    yield made
    made.close()


class Answer:
    """A continuation that keeps what it was called with."""

    def __init__(self) -> None:
        self.given: list[BaseException | None] = []

    def __call__(self, error: BaseException | None) -> None:
        self.given.append(error)

    @property
    def code(self) -> int | None:
        """0 for "go on", None if there is no answer yet."""
        if not self.given:
            return None
        return 0 if self.given[0] is None else getattr(self.given[0], "errno", -1)


def ref_of(pair: Pair, kind: FileKind) -> FileRef:
    suffix = {FileKind.DATABASE: "", FileKind.WAL: "-wal", FileKind.SHM: "-shm"}[kind]
    return FileRef("db" + suffix, kind, "db", pair.target.files.backing(kind))


def asked_while_applying(pair: Pair, by_daemon: bool) -> list[int | None]:
    """What the hooks say to removals and truncations in the middle of a transaction that is being applied."""
    hooks = EngineHooks(pair.replica.store, pair.replica.apply)
    answers: list[Answer] = []
    pages = [(1, Path(pair.source.files.database).read_bytes()[:1024])]

    def interrupted() -> Iterator[tuple[int, bytes]]:
        for kind in (FileKind.DATABASE, FileKind.WAL, FileKind.SHM):
            answers.append(Answer())
            hooks.before_unlink(ref_of(pair, kind), by_daemon, answers[-1])
            answers.append(Answer())
            hooks.before_truncate(ref_of(pair, kind), 0, answers[-1], by_daemon)
        yield from pages

    pair.replica.apply.install(pair.target, interrupted(), 1024, pair.target.commit)
    return [answer.code for answer in answers]


def test_only_the_daemon_removes_and_shortens_while_a_transaction_is_applied(pair: Pair) -> None:
    pair.catch_up()
    assert asked_while_applying(pair, by_daemon=False) == [errno.EROFS] * 6
    assert asked_while_applying(pair, by_daemon=True) == [0] * 6


def test_a_database_that_is_set_aside_keeps_its_wal(pair: Pair) -> None:
    """Its WAL may hold what no other file has: a reader gets what there is, and nothing is begun anew."""
    pair.catch_up()
    pair.insert(5000)
    pair.catch_up()
    pair.replica.apply.let_go(pair.target)
    wal = Path(pair.target.files.wal)
    wal.write_bytes(b"what recovery could not copy")
    pair.target.set_aside_reason = "no space left on device"
    pair.replica.store.start()
    answer = Answer()
    hooks = EngineHooks(pair.replica.store, pair.replica.apply)
    hooks.may_open(ref_of(pair, FileKind.DATABASE), os.O_RDONLY, False, answer)
    pair.replica.store.worker.submit(lambda: None).result()
    assert answer.code == 0
    assert wal.read_bytes() == b"what recovery could not copy"
    data = pair.insert()
    with pytest.raises(PositionMismatch):  # so the primary is asked for a new copy
        pair.replica.store.worker.submit(pair.target.apply, data).result()
    assert wal.read_bytes() == b"what recovery could not copy" and pair.target.replica is None


def test_a_page_size_change_without_room_changes_nothing(pair: Pair) -> None:
    pair.insert(60_000)
    pair.catch_up()
    expected = rows_of(pair.source.files.database)
    pair.write("PRAGMA page_size = 65536", "VACUUM")
    size = os.path.getsize(pair.source.files.database)
    before = state_of(pair.target)[0]
    with largest_file(size - 4096), pytest.raises(OSError):
        pair.catch_up()
    assert state_of(pair.target)[0] == before and len(log_files(pair.target)) == len(log_files(pair.source)) - 1
    assert os.path.getsize(pair.target.files.database) == pair.target.size_bytes
    reader = SqliteProcess(pair.target.files.database)
    try:
        assert reader("SELECT id, v FROM t ORDER BY id") == expected
    finally:
        reader.kill()
    pair.catch_up()
    pair.check()


def test_a_new_file_without_room_leaves_the_wal(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader stays, so the file is to be replaced, which fails: what only the WAL has is still there."""
    pair.catch_up()
    pair.replica.apply.activate(pair.target)
    old = SqliteProcess(pair.target.files.database)
    try:
        old("BEGIN")
        old("SELECT count(*) FROM t")
        pair.insert(60_000)
        pair.catch_up()
        expected = rows_of(pair.source.files.database)
        pair.write("PRAGMA page_size = 65536", "VACUUM")
        with largest_file(os.path.getsize(pair.source.files.database) - 4096), pytest.raises(OSError):
            pair.catch_up()
        assert old("SELECT id, v FROM t ORDER BY id", on="new") == expected
        old.close("new")
        pair.catch_up()
    finally:
        old.kill()
    pair.check()
    assert copy_of(pair.replica, pair.folder / "copy2") == Path(pair.source.files.database).read_bytes()


def test_a_piece_that_could_not_be_taken_is_taken_again(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database cannot be made active for a moment: nothing of the piece counts, and it comes again."""
    pair.catch_up()
    assert pair.replica.apply.rest(pair.target)
    data = pair.insert(400_000)
    held = [OSError(errno.EMFILE, "Too many open files"), DatabaseBusy("another process holds its lock exclusively")]
    activate = pair.replica.apply.activate

    def busy(database: Database) -> SharedWal:
        if held:
            raise held.pop()
        return activate(database)

    monkeypatch.setattr(pair.replica.apply, "activate", busy)
    incoming = pair.target.receive(2, 2)
    pieces = [data[at : at + 150_000] for at in range(0, len(data), 150_000)]
    for _ in range(2):
        with pytest.raises((OSError, DatabaseBusy)):
            incoming.write(pieces[0])
    for piece in pieces:
        incoming.write(piece)
    assert incoming.finish() == pair.source.position
    pair.check()
