"""A database that the primary never had goes to lost/ with all that belongs to it, whenever the process ends."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import sqlite3
from pathlib import Path

import pytest
from crash_steps import Crash, Steppable
from engine_nodes import Node, closing_node, new_primary
from test_naming import commit_to_wal

from pylitefs.engine import aside

ROWS = 3 + 5


def ends_at(monkeypatch: pytest.MonkeyPatch, step: int) -> list[str]:
    """The process ends before the `step`th change to a file. Which were made."""
    steps = Steppable(step, "rename", "unlink", "makedirs")
    monkeypatch.setattr(aside, "os", steps)
    monkeypatch.setattr(aside, "publish_file", steps.wrap("publish_file", aside.publish_file))
    return steps.made


def rows_in_lost(folder: Path, copy: Path) -> dict[str, int]:
    """How many rows each database there has, with the WAL that lies beside it."""
    found = {}
    for path in folder.glob("dbs/db/lost/*/database"):
        shutil.copyfile(path, copy)
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(path.with_name("wal"), f"{copy}-wal")
        with contextlib.closing(sqlite3.connect(copy)) as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            found[path.parent.name] = db.execute("SELECT count(*) FROM t").fetchone()[0]
    return found


@pytest.mark.parametrize("has_log", [True, False])
@pytest.mark.parametrize("becomes", ["replica", "primary"])
def test_a_crash_while_a_database_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, becomes: str, has_log: bool
) -> None:
    """With rows that only its WAL has. Until it is noted all is as before, and after the next start it is gone as a
    whole, not known to the node as anything, and whole in one folder."""
    for step in itertools.count():
        folder = tmp_path / str(step)
        node = new_primary(folder)
        commit_to_wal(node.database().files.database, "mine")
        node.flush()
        if not has_log:
            node.database().log.retain(0, 1)
        with monkeypatch.context() as patch:
            made = ends_at(patch, step)
            with contextlib.suppress(Crash):
                node.store.set_aside("db", "a test")
        ended = len(made) < step
        node.close(clean=False)
        where = f"crash before step {step}, after {made}"
        with closing_node(Node(folder, is_primary=becomes == "primary")) as again:
            again.store.settle()
            lost = rows_in_lost(folder, tmp_path / f"{step}.db")
            if not made:
                assert again.database().exists and not lost, where
                continue
            assert list(lost.values()) == [ROWS], f"{where}: {lost}"
            assert len(os.listdir(folder / "dbs/db/lost")) == 1, where
            database = again.database()
            assert not database.exists and database.set_aside_reason is None, where
            assert database.position.txid == 0 and again.store.names() == again.store.all_names() == [], where
            assert not (folder / "dbs/db/aside").exists(), where
        if ended:
            break
    assert step > 4
