"""A node of `role_daemon` that is interleaved with applications: what they do happens between any two steps of it.

The command "sweep" runs a scenario of `SCENARIOS` with `harness.interleaver`: the daemon's worker is followed while an
application does something, and another one comes in, opens the database, and commits, before the step of the schedule.
Both are processes of their own and use the mount. They have a moment for it; where they have to wait for the daemon
that goes on, as it would. Afterwards nobody asks for anything, and the log must come to be what SQLite sees.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "t2_engine"), str(Path(__file__).parent)]

import role_daemon  # noqa: E402
from engine_nodes import replay  # noqa: E402
from sqlite_process import SqliteProcess  # noqa: E402

from harness.interleaver import Action, Steps  # noqa: E402
from pylitefs.engine import (  # noqa: E402
    batches,
    capture,
    checkpoints,
    commit_hooks,
    commit_points,
    hooks,
    live_files,
    naming,
    registry,
    renaming,
    replacement,
    rollback_capture,
    wal_capture,
    wal_view,
)

MODULES: list[ModuleType] = [
    batches, capture, checkpoints, commit_hooks, commit_points, hooks, live_files, naming, registry, renaming,
    replacement, rollback_capture, wal_capture, wal_view,
]  # fmt: skip
LOADED_S = 10.0  # a machine under load may take so long; what is lost is never found
Rows = list[tuple[Any, ...]]


class App:
    """An application with one database of the mount. From any thread: one thing after the other."""

    def __init__(self, mount: str, name: str, mode: str) -> None:
        self.mount, self.name, self.mode = mount, name, mode
        self._lock = threading.Lock()
        self._sql: SqliteProcess | None = None

    def __call__(self, *statements: str) -> Rows:
        with self._lock:
            return self._run(*statements)

    def _run(self, *statements: str) -> Rows:
        if self._sql is None:
            self._sql = SqliteProcess(os.path.join(self.mount, self.name))
            for text in ("busy_timeout = 5000", f"journal_mode = {self.mode}", "wal_autocheckpoint = 0"):
                self._sql(f"PRAGMA {text}")
        rows: Rows = []
        for sql in statements:
            rows = self._sql(sql)
        return rows

    def close(self) -> None:
        """The last handle: SQLite checkpoints, and removes its files."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._sql is not None:
            self._sql.close()
            self._sql.stop()
            self._sql = None

    def command(self, *words: str, then: str | None = None) -> None:
        """The database is closed; a program of the shell does something with its file; then another one opens it."""
        with self._lock:
            self._close()
            subprocess.run(words, check=True, timeout=30, cwd=self.mount)
            if then is not None:
                self.name = then
            self._run(CREATE, INSERT)

    def kill(self) -> None:
        if self._sql is not None:
            self._sql.kill()


CREATE = "CREATE TABLE IF NOT EXISTS t (id INTEGER PRIMARY KEY, v BLOB)"
OF_OTHER = "INSERT INTO t (v) VALUES (x'6f74686572')"  # "other"
INSERT = "INSERT INTO t (v) VALUES (randomblob(60))"


def checkpoint(app: App) -> Action:
    return lambda: app("PRAGMA wal_checkpoint(RESTART)", INSERT)


def truncate(app: App) -> Action:
    return lambda: app("PRAGMA wal_checkpoint(TRUNCATE)", INSERT)


def last_close(app: App) -> Action:
    def close_and_open() -> None:
        app.close()
        app(INSERT)

    return close_and_open


def drop(app: App) -> Action:
    """Removed, and made again under the same name."""
    return lambda: app.command("rm", app.name)


def drop_open(app: App) -> Action:
    """The same while an application still has it open, which goes on with a file without a name."""

    def work() -> None:
        for suffix in ("", "-wal", "-shm", "-journal"):
            with contextlib.suppress(FileNotFoundError):
                subprocess.run(["rm", "-f", app.name + suffix], check=True, timeout=30, cwd=app.mount)
        app.close()
        app(CREATE, INSERT)

    return work


def rename(app: App) -> Action:
    def work() -> None:
        try:
            app.command("mv", app.name, "moved.db", then="moved.db")
        except subprocess.CalledProcessError:  # the other one has it open, or is about to, in WAL mode
            assert app.mode == "WAL"
            app(INSERT)

    return work


def rename_open(app: App) -> Action:
    """The same while the application itself has it open, and goes on with it."""

    def work() -> None:
        moved = subprocess.run(["mv", app.name, "moved.db"], check=False, timeout=30, cwd=app.mount).returncode == 0
        assert moved == (app.mode == "DELETE")
        if moved:
            app.close()
            app.name = "moved.db"
        app(INSERT)

    return work


def rename_over(app: App) -> Action:
    """Another file takes its name."""

    def work() -> None:
        new = os.path.join(app.mount, "new.tmp")
        other = SqliteProcess(new)
        for sql in (CREATE, INSERT, INSERT, INSERT):
            other(sql)
        other.close()
        other.stop()
        try:
            app.command("mv", "new.tmp", app.name)
        except subprocess.CalledProcessError:  # the other one has it open, or is about to, in WAL mode
            assert app.mode == "WAL"
            subprocess.run(["rm", "new.tmp"], check=True, timeout=30, cwd=app.mount)
            app(INSERT)

    return work


SCENARIOS: dict[str, Callable[[App], Action]] = {
    "checkpoint": checkpoint, "truncating checkpoint": truncate, "last close": last_close, "drop": drop,
    "drop while open": drop_open, "rename": rename, "rename while open": rename_open, "rename over it": rename_over,
}  # fmt: skip


class SweptNode(role_daemon.RoleNode):
    def sweep(self, kind: str, mode: str, pairs: int, seed: int, stride: int) -> int:
        """Returns the number of steps."""
        try:
            steps = self._sweep(kind, mode, seed % stride, stride)
            chance = random.Random(seed)
            for _ in range(pairs):
                self._run(kind, mode, [0, *sorted(chance.randrange(steps) for _ in range(2))])
            return steps
        except Exception as error:
            raise RuntimeError("\n".join([repr(error), *getattr(error, "__notes__", [])])) from error

    def _sweep(self, kind: str, mode: str, first: int, stride: int) -> int:
        """What the scenario is about begins at once; another application comes in at each `stride`th step. In a pair it
        leaves again, at a step of its own."""
        at = first
        while self._run(kind, mode, [0, at]).places[1] != "the end":
            at += stride
        return at

    def _run(self, kind: str, mode: str, schedule: list[int]) -> Steps:
        steps = Steps(MODULES, schedule)
        try:
            self._scenario(steps, kind, mode, leaves=len(schedule) > 2)
        except BaseException as error:
            error.add_note(f"schedule {schedule}: actions happened before {', '.join(steps.places) or 'nothing'}")
            raise
        return steps

    def _scenario(self, steps: Steps, kind: str, mode: str, *, leaves: bool) -> None:
        store, worker, done = self.store, self.store.worker, threading.Event()
        app, other = App(self.mount_dir, NAME, mode), App(self.mount_dir, NAME, mode)
        told: list[int] = []  # the other one's commit was acknowledged

        def work() -> None:
            try:
                SCENARIOS[kind](app)()
            finally:
                done.set()

        def come_in() -> None:
            with contextlib.suppress(RuntimeError):  # the file may have left its name under it
                other(CREATE, OF_OTHER)
                told.append(1)

        def leave() -> None:
            with contextlib.suppress(RuntimeError):
                other.close()

        try:
            app(CREATE, INSERT)
            self._agree("at the beginning", [NAME])
            app(INSERT)
            steps.actions(steps.aside(work), steps.aside(come_in), *[steps.aside(leave)] * leaves)
            with steps.on_worker(worker):
                worker.submit(store.capture.wake, store.find(NAME), database=NAME).result()
                assert done.wait(LOADED_S), f"{kind}: it does not come to an end"
                worker.submit(int).result()
            steps.finish()
            self._agree("at the end", sorted({app.name, *(name for name in (NAME,) if self._is_there(name))}))
            if told and kind in KEEPS_ALL:
                logs = [self._logged(name) for name in self.store.names() if self.store.find(name).exists]
                assert any(b"other" in repr(rows).encode() for rows in logs), f"its commit is in none of {logs}"
            unwanted = WRONG | ({"gap"} if kind in KEEPS_ITS_FILES else set())
            assert not (wrong := [event for event in self.events if event.split()[0] in unwanted]), wrong
        finally:
            app.kill()
            other.kill()
            for name in os.listdir(self.mount_dir):
                if not name.endswith(("-pos", "-lock")) and not name.startswith("."):
                    subprocess.run(["rm", "-f", name], check=False, timeout=30, cwd=self.mount_dir)

    def _is_there(self, name: str) -> bool:
        return name in os.listdir(self.mount_dir)

    def _agree(self, when: str, names: list[str]) -> None:
        """With nobody asking, the log of each name comes to be what SQLite sees in its files, and there are no others.
        A file that was only opened is no database yet, and has no log."""
        until_s = time.monotonic() + LOADED_S
        while True:
            known = {name for name in self.store.names() if self.store.find(name).exists}
            seen = {name: self._seen(name) for name in known}
            if known <= set(names) and seen and seen == {name: self._logged(name) for name in known}:
                return
            if time.monotonic() > until_s:
                logged = {name: self._logged(name) for name in known}
                raise AssertionError(f"{when}: names {names}, SQLite sees {seen}, the log says {logged}")
            time.sleep(0.002)

    def _seen(self, name: str) -> object:
        """In a copy of the files, as they lie in the data directory."""
        folder, copy = Path(self.store.data_dir, "dbs", name), Path(self.store.data_dir, "seen.db")
        for kind in ("database", "wal", "journal"):
            target = Path(str(copy) + {"database": "", "wal": "-wal", "journal": "-journal"}[kind])
            target.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(folder / kind, target)
        return _rows(copy)

    def _logged(self, name: str) -> object:
        database = self.store.find(name)
        with database.lock:
            image = bytearray(replay(database))
        image[18:20] = b"\1\1"  # else SQLite wants a WAL
        path = Path(self.store.data_dir, "replayed")
        path.write_bytes(image)
        return _rows(path)


def _rows(path: Path) -> object:
    try:
        with contextlib.closing(sqlite3.connect(path)) as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            return db.execute("SELECT id, v FROM t ORDER BY id").fetchall()
    except (sqlite3.Error, AssertionError) as error:
        return repr(error)


NAME = "app.db"
KEEPS_ITS_FILES = {"checkpoint", "truncating checkpoint", "last close"}  # no WAL is taken from under anybody
KEEPS_ALL = {*KEEPS_ITS_FILES, "rename", "rename while open"}  # no commit goes with a file that is removed
WRONG = {"overlooked", "lost", "setAside", "damaged", "corruptLog"}

if __name__ == "__main__":
    role_daemon.RoleNode = SweptNode  # type: ignore[misc]
    sys.exit(role_daemon.main())
