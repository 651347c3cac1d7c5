"""Who has a file open is counted for the database whose file it is, and uncounted from it, whatever it becomes
meanwhile."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_nodes import Node, closing_node, make_sqlite

from harness.interleaver import Steps, sweep
from pylitefs.engine import open_files
from pylitefs.engine.database import Database
from pylitefs.engine.hooks import EngineHooks
from pylitefs.engine.open_files import OpenFiles, process_of_thread
from pylitefs.ports import FileKind, FileRef

HANDLE, OTHER = 7, 8


def open_plain(files: OpenFiles, handle: int = HANDLE, name: str = "a") -> None:
    files.opened(handle, name, None, os.getpid(), writable=True, raw=True)


def counts(database: Database) -> tuple[int, int, int, int]:
    return len(database.users), database.app_handles, database.writers, database.raw_writers


def moves(a: Database, b: Database, files: OpenFiles) -> dict[str, Callable[[], None]]:
    def move() -> None:
        with a.handles_lock, b.handles_lock:
            files.moved(a, b)

    return {
        "becomes a database": lambda: files.became(a),
        "becomes one of another name": lambda: files.became(b, "a"),
        "is renamed": lambda: files.renamed("a", "b"),
        "is moved": lambda: (files.became(a), move())[1],
        "is dropped": lambda: (files.became(a), files.left(a))[1],
        "is emptied": lambda: (files.became(a), files.left(a, plain=True), files.became(a))[2],
    }


@pytest.mark.parametrize("what", list(moves(None, None, None)))  # type: ignore[arg-type]
def test_a_file_that_changes_while_it_is_closed(tmp_path: Path, what: str) -> None:
    with closing_node(Node(tmp_path)) as node:
        a, b = node.store.get_or_create("a"), node.store.get_or_create("b")

        def scenario(steps: Steps) -> None:
            files = OpenFiles()
            open_plain(files)
            steps.actions(steps.aside(moves(a, b, files)[what]))
            with steps.here():
                files.released(HANDLE)
            steps.finish()
            assert counts(a) == counts(b) == (0, 0, 0, 0) and files.released(HANDLE) is None

        sweep(scenario, [open_files])


def test_users_go_with_their_file(tmp_path: Path) -> None:
    with closing_node(Node(tmp_path)) as node:
        a, b, files = node.store.get_or_create("a"), node.store.get_or_create("b"), OpenFiles()
        do = moves(a, b, files)
        open_plain(files)
        do["becomes a database"]()
        files.opened(OTHER, "b", b, 0, writable=False, raw=True)
        assert counts(a) == (1, 1, 1, 1) and counts(b) == (1, 1, 0, 0)
        do["is moved"]()
        assert counts(a) == (0, 0, 0, 0) and counts(b) == (1, 1, 1, 1)
        assert files.has_old_users(b) and not files.has_old_users(a)
        found = files.released(OTHER)
        assert found is not None and found.database is None  # its file has no name any more
        assert not files.has_old_users(b)
        files.left(b, plain=True)
        assert counts(b) == (0, 0, 0, 0)
        files.renamed("b", "a")
        files.became(a)
        assert files.process_of(HANDLE) == os.getpid() and files.process_of(OTHER) == 0
        found = files.released(HANDLE)
        assert found is not None and found.database is a
        assert counts(a) == (0, 0, 0, 0)


def test_a_file_that_has_become_a_database_since_it_was_asked_what_it_is(tmp_path: Path) -> None:
    with closing_node(Node(tmp_path)) as node:
        store = node.store
        hooks = EngineHooks(store, store.apply)
        plain = FileRef("a", FileKind.PLAIN, None, store.plain_path("a"))
        make_sqlite(store.plain_path("a"))
        assert store.import_plain("a")
        hooks.opened(plain, HANDLE, os.getpid(), writable=True, hooked=True, by_daemon=False)
        database = store.get("a")
        assert database is not None and counts(database) == (1, 1, 1, 0)
        hooks.released(plain, HANDLE, True, False)
        assert counts(database) == (0, 0, 0, 0)


def test_the_process_of_a_thread() -> None:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(process_of_thread(threading.get_native_id())))
    thread.start()
    thread.join()
    assert found == [os.getpid()] == [process_of_thread(os.getpid())]
    assert process_of_thread(0) == process_of_thread(1 << 30) == 0
