"""What becomes of a database when another file gets its name, and what a crash leaves of it."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from crash_steps import Crash, Steppable
from engine_nodes import NamedFiles, Node, check_log, closing_node, make_sqlite, new_primary, replay, rows_of

from pylitefs.engine import commit_points, naming, renaming, replacement
from pylitefs.engine.capture import Capture
from pylitefs.engine.database import Database
from pylitefs.engine.transaction import TransactionWriter
from pylitefs.ports import FileKind, FileRef

WAIT_S = 10


_COMMIT = """
import os, sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("PRAGMA wal_autocheckpoint = 0")
db.executemany("INSERT INTO t (v) VALUES (?)", [(sys.argv[2].encode(),)] * 5)
os._exit(0)
"""


def commit_to_wal(path: str, value: str) -> None:
    """Rows that stay in the WAL, because their process ended without closing the database."""
    subprocess.run([sys.executable, "-c", _COMMIT, path, value], check=True, timeout=WAIT_S)
    assert os.path.getsize(path + "-wal") > 5 * 4096


def rename(node: Node, old: str, new: str) -> None:
    def ref(name: str) -> FileRef:
        database = node.store.get(name)
        if database is not None and database.exists:
            return FileRef(name, FileKind.DATABASE, name, database.files.database)
        return FileRef(name, FileKind.PLAIN, None, node.store.plain_path(name))

    node.store.worker.submit(node.store.naming.rename, ref(old), ref(new)).result(WAIT_S)


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> list[str]:
    """The process ends before the `step`th change to a file that `naming` or `replacement` makes. Which it made."""
    steps = Steppable(step, "rename", "unlink", "link")
    monkeypatch.setattr(naming, "os", steps)
    monkeypatch.setattr(replacement, "os", steps)
    for module, name in ((replacement, "publish_file"), (TransactionWriter, "write")):
        monkeypatch.setattr(module, name, steps.wrap(name, getattr(module, name)))
    return steps.made


def refusing(code: int) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return call


def contents(node: Node) -> dict[str, set[bytes]]:
    """The databases that there are, and what their rows say."""
    found = {}
    for name in node.store.names():
        database = node.store.get(name)
        assert database is not None and database.set_aside_reason is None, database
        check_log(database)
        found[name] = {bytes(row[1]) for row in rows_of(database.files.database)}  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("source", ["database", "plain"])
def test_a_crash_leaves_the_old_database_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """Both with rows in their WALs. The old one's WAL must not get into the new one, nor either be lost."""
    for step in itertools.count():
        base = tmp_path / str(step)
        node = new_primary(base)
        commit_to_wal(node.database("db").files.database, "old")
        node.flush("db")
        plain = node.store.plain_path("new")
        make_sqlite(plain)
        if source == "database":
            assert node.store.import_plain("new")
            commit_to_wal(node.database("new").files.database, "new")
            node.flush("new")
        else:
            with contextlib.closing(sqlite3.connect(plain)) as db:
                db.execute("INSERT INTO t (v) VALUES (?)", (b"new",))
                db.commit()
        made: list[str] = []
        with monkeypatch.context() as patch:
            made = crash_at(patch, step)
            with contextlib.suppress(Crash):
                rename(node, "new", "db")
        ended = len(made) < step
        node.close(clean=False)
        with closing_node(Node(base)) as again:
            again.store.settle()
            found = contents(again)
            values = found["db"]
            where = f"crash before step {step}, after {made}: {found}"
            assert values in ({bytes(100), b"old"}, {bytes(100), b"new"}), where
            if b"old" in values:
                rest = found.get("new") or {bytes(row[1]) for row in rows_of(plain)}  # type: ignore[arg-type]
                assert rest == {bytes(100), b"new"}, where
            elif ended:
                assert "new" not in found, where
            assert not os.path.exists(os.path.join(again.store.databases_dir, "db", "replacing")), where
        if ended:
            break
    assert step > 4


@pytest.mark.parametrize("links", [True, False])
def test_an_import_that_a_crash_cuts_off_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """Also where the file system has no hard links."""
    for step in itertools.count():
        base = tmp_path / str(step)
        node = Node(base)
        make_sqlite(node.store.plain_path("a.db"), mode="DELETE")
        with monkeypatch.context() as patch:
            made = crash_at(patch, step)
            if not links:
                patch.setattr(os, "link", refusing(errno.EPERM))
            with contextlib.suppress(Crash):
                node.store.import_plain("a.db")
        node.close(clean=False)
        with closing_node(Node(base)) as again:
            again.store.settle()
            assert contents(again) == {"a.db": {bytes(100)}}, f"crash before step {step}, after {made}"
            assert os.listdir(again.store.plain_dir) == []
        if len(made) < step:
            break
    assert step > 1


@pytest.mark.parametrize("links", [True, False])
def test_an_import_that_fails_leaves_the_plain_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    with closing_node(Node(tmp_path)) as node:
        plain = Path(node.store.plain_path("a.db"))
        make_sqlite(str(plain), mode="DELETE")
        before = plain.read_bytes()
        with monkeypatch.context() as patch:
            if not links:
                patch.setattr(os, "link", refusing(errno.EPERM))
            patch.setattr(TransactionWriter, "write", refusing(errno.ENOSPC))
            with pytest.raises(OSError, match="No space"):
                node.store.import_plain("a.db")
        assert plain.read_bytes() == before and node.store.names() == []
        assert not os.path.exists(node.store.files_of("a.db").database)
        assert node.store.import_plain("a.db") and node.store.names() == ["a.db"]
        assert not plain.exists()


@pytest.mark.parametrize("mode", ["DELETE", "WAL"])
def test_a_rename_that_cannot_be_recorded_leaves_the_database_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Under a name that nobody had before it would be found nowhere."""
    with closing_node(new_primary(tmp_path, mode=mode)) as node:
        before, value = node.flush("db"), "more"
        if mode == "WAL":
            commit_to_wal(node.database("db").files.database, value)
            before = node.flush("db")
        with monkeypatch.context() as patch:
            patch.setattr(TransactionWriter, "write", refusing(errno.ENOSPC))
            with pytest.raises(OSError, match="No space"):
                rename(node, "db", "other")
        assert node.store.names() == ["db"] and node.flush("db") == before
        there = contents(node)
        assert there == {"db": {bytes(100), value.encode()} if mode == "WAL" else {bytes(100)}}
        rename(node, "db", "other")
        assert contents(node) == {"other": there["db"]}


@pytest.mark.parametrize("now", ["taken over", "being taken over", "gone"])
def test_a_plain_file_that_is_no_longer_there_costs_no_database(tmp_path: Path, now: str) -> None:
    """It was a plain file when the kernel looked it up; a moment later it is a database of its own, or nothing."""
    with closing_node(new_primary(tmp_path, rows=7, mode="DELETE")) as node:
        naming = node.store.naming
        make_sqlite(node.store.plain_path("new.db"), rows=1, mode="DELETE")
        old = FileRef("new.db", FileKind.PLAIN, None, node.store.plain_path("new.db"))
        new = FileRef("db", FileKind.DATABASE, "db", node.database("db").files.database)

        def renamed() -> None:
            node.store.worker.submit(naming.rename, old, new).result(WAIT_S)

        if now == "taken over":
            assert node.store.import_plain("new.db")
            renamed()
            assert contents(node) == {"db": {bytes(100)}} and len(rows_of(node.database("db").files.database)) == 1
        elif now == "gone":
            os.unlink(node.store.plain_path("new.db"))
            with pytest.raises(FileNotFoundError):
                renamed()
            assert len(rows_of(node.database("db").files.database)) == 7
        else:
            with node.store.plain_files.alone_with("new.db"), pytest.raises(OSError, match="being taken over"):
                renamed()
            assert len(rows_of(node.database("db").files.database)) == 7
            renamed()
            assert len(rows_of(node.database("db").files.database)) == 1
        node.flush("db")
        assert node.store.names() == ["db"]


def test_a_rename_waits_for_a_file_that_is_being_taken_over_however_long_that_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if that begins when the rename has found nobody at it."""
    with closing_node(new_primary(tmp_path)) as node, contextlib.ExitStack() as taking_over:
        plain_files, tried = node.store.plain_files, list[bool]()
        make_sqlite(node.store.plain_path("new.db"), mode="DELETE")
        wait = plain_files.wait

        def waits(*names: str) -> None:
            wait(*names)
            if not tried:
                taking_over.enter_context(plain_files.alone_with("new.db"))

        def try_to_rename() -> None:
            try:
                rename(node, "new.db", "other.db")
            finally:
                tried.append(True)
                taking_over.close()

        monkeypatch.setattr(renaming, "_CLOSED_S", 0.0)
        monkeypatch.setattr(plain_files, "wait", waits)
        renaming.when_unused(node.store, "new.db", "other.db", try_to_rename)
        assert len(tried) == 2 and sorted(contents(node)) == ["db", "other.db"]


def test_a_rename_is_one_transaction_with_the_wal(tmp_path: Path) -> None:
    """And comes before the drop of the old name: no moment has neither."""
    with closing_node(new_primary(tmp_path)) as node:
        commit_to_wal(node.database("db").files.database, "in the WAL")
        rename(node, "db", "other")
        told = [(event.database, event.data["source"]) for event in node.events if event.type == "tx"]
        assert told[-2:] == [("other", "import"), ("db", "drop")]
        assert node.database("other").position.txid == 1
        assert contents(node) == {"other": {bytes(100), b"in the WAL"}}


@pytest.mark.parametrize("directly", [True, False])
def test_a_rename_is_one_transaction_with_the_wal_also_if_somebody_opens_it_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directly: bool
) -> None:
    """As soon as it has its new name. For a moment nobody can tell what is committed: he makes the wal-index. And where
    only the mount shows that, it cannot be opened before the rename is done (not `directly`)."""
    monkeypatch.setattr(NamedFiles, "reads_shm_directly", property(lambda _: directly))
    with closing_node(new_primary(tmp_path)) as node, contextlib.ExitStack() as stack:
        commit_to_wal(node.database("db").files.database, "in the WAL")
        really = Capture.replaced

        def replaced(capture: Capture, database: Database) -> None:
            really(capture, database)
            if database.name == "other":
                if not directly:
                    opens(database.files.database)
                    return
                Path(database.files.shm).touch()
                wait = renaming.wait_stable
                monkeypatch.setattr(renaming, "wait_stable", lambda attempt: (opens(database.files.database), wait(0)))

        def opens(path: str) -> None:
            db = stack.enter_context(contextlib.closing(sqlite3.connect(path, check_same_thread=False)))
            assert db.execute("SELECT count(*) FROM t").fetchone() == (8,)

        monkeypatch.setattr(Capture, "replaced", replaced)
        rename(node, "db", "other")
        told = [(event.database, event.data["source"]) for event in node.events if event.type == "tx"]
        assert told[-2:] == [("other", "import"), ("db", "drop")]
        (tmp_path / "replayed").write_bytes(replay(node.database("other")))
        assert len(rows_of(tmp_path / "replayed")) == 8


def test_a_file_that_sqlite_cannot_read_is_renamed_too(tmp_path: Path) -> None:
    with closing_node(new_primary(tmp_path, mode="DELETE", rows=100)) as node:
        database = node.database("db")
        os.truncate(database.files.database, 4096)
        database.rollback.suspect = True
        assert not node.store.capture.commit_point(database) and database.withheld
        rename(node, "db", "other")
        assert node.store.names() == [] and os.path.getsize(node.store.plain_path("other")) == 4096
        assert not database.exists and database.withheld is None


def test_an_old_plain_file_never_replaces_a_database(tmp_path: Path) -> None:
    """It may come back with a power cut, or have been made on a replica before the database came."""
    node = new_primary(tmp_path, rows=7, mode="DELETE")
    make_sqlite(node.store.plain_path("db"), rows=1, mode="DELETE")
    assert not node.store.import_plain("db")
    node.close()
    with closing_node(Node(tmp_path)) as again:
        again.store.settle()
        assert len(rows_of(again.database("db").files.database)) == 7
        assert len(rows_of(again.store.plain_path("db.local-1"))) == 1
        assert os.listdir(again.store.plain_dir) == ["db.local-1"]


def test_dropped_names_keep_no_descriptors(tmp_path: Path) -> None:
    """On any node: there may be thousands of them."""
    with closing_node(Node(tmp_path / "primary")) as node, closing_node(
        Node(tmp_path / "replica", is_primary=False)
    ) as replica:

        def open_files() -> list[str]:
            found = []
            for fd in os.listdir("/proc/self/fd"):
                with contextlib.suppress(OSError):
                    found.append(os.readlink(f"/proc/self/fd/{fd}"))
            return [path for path in found if str(tmp_path) in path]

        before = open_files()
        for number in range(5):
            name = f"{number}.db"
            make_sqlite(node.store.plain_path(name))
            assert node.store.import_plain(name)
            database = node.database(name)
            node.store.worker.submit(node.store.naming.drop, database).result(WAIT_S)
            for entry in database.log.entries():
                replica.database(name).apply(Path(entry.path).read_bytes())
            assert replica.database(name).position == database.position
        node.store.worker.submit(lambda: None).result(WAIT_S)
        assert node.store.names() == replica.store.names() == []
        spare = [path for path in open_files() if path not in before and "/ltx/" not in path]
        assert spare == []
        for number in range(5):  # and they can be made again
            make_sqlite(node.store.plain_path(f"{number}.db"))
            assert node.store.import_plain(f"{number}.db")
            newest = node.database(f"{number}.db").log.entries()[-1]
            assert replica.database(f"{number}.db").apply(Path(newest.path).read_bytes()).txid == 3
        assert contents(node) == {f"{number}.db": {bytes(100)} for number in range(5)}
        assert len(replica.store.names()) == 5


def test_a_drop_of_what_was_never_here_costs_no_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new replica hears of every name that was ever dropped. What follows it is as on any other replica, though."""
    with closing_node(Node(tmp_path / "primary")) as node:
        make_sqlite(node.store.plain_path("db"))
        node.store.note_epoch(5)
        assert node.store.import_plain("db")
        database = node.database("db")
        node.store.worker.submit(node.store.naming.drop, database).result(WAIT_S)
        gone = database.position
        synced: list[int] = []
        real = os.fsync
        with closing_node(Node(tmp_path / "replica", is_primary=False)) as replica:
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", lambda fd: (synced.append(fd), real(fd)))
                assert replica.store.note_dropped("db", gone, database.log.epochs())
            assert synced == [] and os.listdir(replica.store.databases_dir) == []
            assert replica.database().position == gone and not replica.database().exists
            assert replica.database().log.epochs() == database.log.epochs() == ((5, 1),)
            make_sqlite(node.store.plain_path("db"))
            assert node.store.import_plain("db")
            data = Path(database.log.entries()[-1].path).read_bytes()
            assert replica.database().apply(data) == database.position
        with closing_node(Node(tmp_path / "replica", is_primary=False)) as again:
            assert again.database().position == database.position
            assert again.database().log.epochs() == database.log.epochs()
            assert contents(again) == {"db": {bytes(100)}}


@pytest.mark.parametrize("clean", [True, False])
def test_a_start_knows_what_was_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean: bool) -> None:
    """Without work for each of them, and its TXIDs go on."""
    node = new_primary(tmp_path)
    node.store.worker.submit(node.store.naming.drop, node.database()).result(WAIT_S)
    node.store.note_boot()
    node.close(clean=clean)
    synced: list[int] = []
    real = os.fsync
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: (synced.append(fd), real(fd)))
        again = Node(tmp_path)
    with closing_node(again):
        again.store.settle()
        assert synced == [] and again.store.names() == []
        assert again.database().position.txid == 2
        make_sqlite(again.store.plain_path("db"))
        assert again.store.import_plain("db")
        assert again.database().position.txid == 3
        check_log(again.database())


def test_a_stop_does_not_wait_for_a_large_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it was about is a plain file still, and the next start imports it. A small one is taken in time."""
    node = new_primary(tmp_path, mode="DELETE")
    make_sqlite(node.store.plain_path("large"), rows=2000, mode="DELETE")
    make_sqlite(node.store.plain_path("small"), mode="DELETE")
    node.store.close_doors()
    assert node.store.import_plain("small")
    monkeypatch.setattr(commit_points, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 60))
    with pytest.raises(OSError, match="litefs stops"):
        node.store.import_plain("large")
    node.close()
    assert os.path.exists(node.store.plain_path("large"))
    monkeypatch.undo()
    with closing_node(Node(tmp_path)) as again:
        again.store.settle()
        assert set(contents(again)) == {"db", "large", "small"}
