"""A plain file becomes a database while others open it, lock it and write to it."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
from engine_nodes import Node, check_log, file_checksum, make_sqlite, rows_of

from pylitefs.engine import plain_imports
from pylitefs.engine.hooks import EngineHooks
from pylitefs.engine.transaction import TransactionWriter
from pylitefs.ports import FileKind, FileRef

HANDLE = 7
PAGE = 4096


class Plain:
    """A primary with one plain file "db", opened as an application does."""

    def __init__(self, folder: Path, mode: str) -> None:
        self.node = Node(folder)
        self.path = self.node.store.plain_path("db")
        make_sqlite(self.path, mode=mode)
        self.hooks = EngineHooks(self.node.store, self.node.store.apply)
        self.fd = os.open(self.path, os.O_RDWR)
        self.ref = FileRef("db", FileKind.PLAIN, None, self.path)
        self.hooks.opened(self.ref, HANDLE, 0, writable=True, hooked=True, by_daemon=False)

    def write(self, fill: bytes = b"x") -> None:
        """To the last page, as a request that began when the file was a plain one."""
        self.hooks.write(self.ref, self.fd, memoryview(fill * 100), os.fstat(self.fd).st_size - 100, HANDLE)

    def import_it(self) -> bool:
        """As it is done on a mount, which is the plain folder here."""
        self.node.store.mount_dir = self.node.store.plain_dir
        try:
            return self.node.store.plain_imports.at_rest("db")
        finally:
            self.node.store.mount_dir = None

    def close(self) -> None:
        os.close(self.fd)
        self.node.close(clean=False)


@pytest.fixture
def plain(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Plain]:
    made = Plain(tmp_path / "node", getattr(request, "param", "DELETE"))
    yield made
    made.close()


def record(plain: Plain) -> None:
    """What is noted is recorded, as the look after a write does it."""
    database = plain.node.database()
    assert database.rollback.pending
    database.rollback.foreign = False
    plain.node.store.capture.commit_point(database)


@pytest.mark.parametrize("moment", ["before it is read", "while it is read", "when it was read", "when it is recorded"])
def test_a_write_at_any_moment_is_in_the_log(plain: Plain, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the file stays plain, and the next look takes it over."""
    store, database = plain.node.store, plain.node.store.get_or_create("db")
    real_write, real_point = TransactionWriter.write, store.capture.commit_point

    def at(when: str) -> None:
        if when == moment:
            plain.write()

    def write(self: TransactionWriter, pages: Any, read_missing: Any, is_stable: Callable[[], bool]) -> Any:
        def read() -> Iterator[tuple[int, bytes]]:
            for number, page in enumerate(list(pages)):
                if number == 1:
                    at("while it is read")
                yield page
            at("when it was read")

        return real_write(self, read(), read_missing, is_stable)

    def commit_point(database: Any, source: str = "capture", **how: Any) -> bool:
        at("before it is read")
        result = real_point(database, source, **how)
        at("when it is recorded")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(TransactionWriter, "write", write)
        patch.setattr(store.capture, "commit_point", commit_point)
        taken = store.import_plain("db")
    assert taken is (moment == "when it is recorded")
    if taken:
        record(plain)
    else:
        assert os.path.exists(plain.path) and not database.exists and store.import_plain("db")
    assert database.position.checksum == file_checksum(database.files.database)
    check_log(database)


def test_a_write_that_is_under_way(plain: Plain, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was begun before the file is read, and reaches it afterwards."""
    store = plain.node.store
    with store.plain_writes.one("db", HANDLE):
        assert not store.import_plain("db")
    assert store.import_plain("db")


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("locked", "a process has it locked: close it there"),
        ("journal", "a process died in a transaction and has left its journal: open it once with SQLite"),
        ("written", "a process goes on writing to it without SQLite's locks"),
    ],
)
def test_it_is_told_why_a_file_is_not_taken_over(
    plain: Plain, what: str, told: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What to do differs. It is tried again, for nobody tells when it has changed."""
    store = plain.node.store
    planned: list[int] = []
    monkeypatch.setattr(store.plain_imports, "wake", lambda name, tries: planned.append(tries))
    monkeypatch.setattr(store, "mount_dir", store.plain_dir)
    with contextlib.ExitStack() as stack:
        if what == "locked":
            writer = stack.enter_context(contextlib.closing(sqlite3.connect(plain.path, isolation_level=None)))
            writer.execute("BEGIN IMMEDIATE")
        elif what == "journal":
            Path(plain.path + "-journal").write_bytes(bytes.fromhex("d9d505f920a163d7") + bytes(1016))
        else:
            stack.enter_context(store.plain_writes.one("db", HANDLE))
        store.plain_imports._try("db", plain_imports._TELL_TRIES - 1)
    monkeypatch.setattr(store, "mount_dir", None)
    assert [record.getMessage() for record in caplog.records if told in record.getMessage()], caplog.text
    store.worker.submit(lambda: None).result()
    assert planned == [plain_imports._TELL_TRIES]


def test_a_removed_file_of_that_name_is_closed_for_the_last_time_during_a_write(plain: Plain) -> None:
    """What is known of the name is the new file's: that can be taken over when the write has ended."""
    store = plain.node.store
    with store.plain_writes.one("db", HANDLE):
        store.plain_writes.forget("db")
        assert not store.import_plain("db")
    assert store.plain_writes.is_writer("db", HANDLE) and not store.plain_writes.is_writer("db", HANDLE + 1)
    assert store.import_plain("db")


def test_a_write_that_began_when_the_file_was_plain(plain: Plain) -> None:
    store = plain.node.store
    assert store.import_plain("db")
    plain.write()
    record(plain)
    assert store.get_or_create("db").position.checksum == file_checksum(store.get_or_create("db").files.database)


@pytest.mark.parametrize("plain", ["DELETE", "WAL"], indirect=True)
@pytest.mark.parametrize("begin", ["BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"])
def test_somebody_writes(plain: Plain, begin: str) -> None:
    """He has a lock, and no journal yet. His commit is what takes the file over."""
    with contextlib.closing(sqlite3.connect(plain.path, isolation_level=None)) as db:
        db.execute(begin)
        assert not plain.import_it() and os.path.exists(plain.path)
        db.execute("COMMIT")
    assert plain.import_it()
    assert len(rows_of(plain.node.database().files.database)) == 3


@pytest.mark.parametrize("plain", ["DELETE", "WAL"], indirect=True)
def test_nobody_begins_to_write_meanwhile(plain: Plain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers in a rollback mode are not disturbed."""
    is_wal = plain.node.store.capture is not None and Path(plain.path).read_bytes()[18] == 2
    seen: list[str] = []
    real = plain.node.store.naming.import_plain

    def meanwhile(name: str, **how: bool) -> bool:
        with contextlib.closing(sqlite3.connect(plain.path, isolation_level=None, timeout=0)) as db:
            for words in ("SELECT * FROM t", "INSERT INTO t (v) VALUES (x'01')"):
                try:
                    db.execute(words).fetchall()
                    seen.append("done")
                except sqlite3.OperationalError as error:
                    seen.append(str(error))
        return real(name, **how)

    monkeypatch.setattr(plain.node.store.naming, "import_plain", meanwhile)
    assert plain.import_it()
    assert seen == ["database is locked" if is_wal else "done", "database is locked"]
    with contextlib.closing(sqlite3.connect(plain.node.database().files.database, timeout=0)) as db:
        db.execute("INSERT INTO t (v) VALUES (x'02')")  # the locks are gone
        db.commit()


def test_another_thread_of_ours_takes_it_over(plain: Plain, monkeypatch: pytest.MonkeyPatch) -> None:
    """The look after a write has the locks when the handle is closed: that is answered when the file is a database."""
    real, begun, go_on = plain.node.store.naming.import_plain, threading.Event(), threading.Event()

    def slow(name: str, **how: bool) -> bool:
        begun.set()
        assert go_on.wait(10)
        return real(name, **how)

    monkeypatch.setattr(plain.node.store.naming, "import_plain", slow)
    plain.node.store.mount_dir = plain.node.store.plain_dir
    with ThreadPoolExecutor(2) as pool:
        try:
            look = pool.submit(plain.node.store.plain_imports.at_rest, "db")
            assert begun.wait(10)
            close = pool.submit(plain.node.store.plain_imports.at_rest, "db")
            assert not wait([close], 0.2).done
        finally:
            go_on.set()
        assert look.result(10) and not close.result(10)
    plain.node.store.mount_dir = None
    assert plain.node.database().exists


def test_a_journal_of_a_process_that_died(plain: Plain) -> None:
    """SQLite rolls it back, and makes a database of the file by that."""
    Path(plain.path + "-journal").write_bytes(b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7" + bytes(504))
    assert not plain.import_it()


def test_a_file_that_may_not_be_written(plain: Plain, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_RDWR and path == plain.path:
            raise PermissionError(13, "Permission denied")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    assert plain.import_it()


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("becomes", ["a database", "a plain file"])
def test_a_listing_while_it_changes(plain: Plain, becomes: str, before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right before or after the databases are asked for."""
    store, real = plain.node.store, plain.node.store.names
    if becomes == "a plain file":
        assert store.import_plain("db")

    def change() -> None:
        if becomes == "a database":
            assert store.import_plain("db")
        else:
            os.truncate(store.get_or_create("db").files.database, 0)
            store.naming.emptied(store.get_or_create("db"))

    def names() -> list[str]:
        if before:
            change()
        found = real()
        if not before:
            change()
        return found

    monkeypatch.setattr(store, "names", names)
    assert "db" in plain.hooks.names()
