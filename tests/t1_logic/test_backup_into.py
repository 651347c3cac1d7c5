"""The program that replaces a database's content by SQLite's own backup."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from pylitefs import backup_into


def make(path: Path, rows: int, mode: str) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute(f"PRAGMA journal_mode = {mode}")
        db.execute("CREATE TABLE t (id)")
        db.executemany("INSERT INTO t VALUES (?)", ((number,) for number in range(rows)))


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
def test_it_gives_up_while_somebody_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    """What was refused is not done later."""
    monkeypatch.setattr(backup_into, "TIMEOUT_S", 0.05)
    source, target = tmp_path / "source.db", tmp_path / "target.db"
    make(source, 3, "DELETE")
    make(target, 7, mode)
    with contextlib.closing(sqlite3.connect(target, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        assert backup_into.main(str(source), str(target)) == 1
        assert "database is locked" in capsys.readouterr().err
        writer.execute("ROLLBACK")
        assert writer.execute("SELECT count(*) FROM t").fetchone() == (7,)
        assert backup_into.main(str(source), str(target)) == 0
        assert writer.execute("SELECT count(*) FROM t").fetchone() == (3,)
