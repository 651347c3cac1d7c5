"""The view of a WAL must not mix what it learned from two sources."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest
from engine_nodes import NamedFiles

from pylitefs.engine.transaction import UnstableSource
from pylitefs.engine.wal_view import WalView
from pylitefs.formats.sqlite.wal_index import REGION_SIZE


def test_a_wal_index_that_appears_later_is_not_taken_for_the_frames_that_were_scanned(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "database", isolation_level=None)
    connection.execute("pragma journal_mode=wal")
    connection.execute("create table t(a)")
    connection.execute("insert into t values (1)")
    os.rename(tmp_path / "database-shm", tmp_path / "aside")
    view = WalView(NamedFiles("db", str(tmp_path)))
    scanned = view.committed()
    assert scanned is not None and scanned.change is None and scanned.mx_frame > 0
    (tmp_path / "database-shm").write_bytes(bytes(REGION_SIZE))  # made by a new connection, not filled yet
    assert view.pgnos(1, scanned.mx_frame).all()
    assert view.committed() is None
    with pytest.raises(UnstableSource):
        view.pgnos(1, scanned.mx_frame)
    view.close()
    connection.close()
