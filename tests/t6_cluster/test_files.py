"""Files of a mount as the shell's tools and litefs' own commands use them, replicated."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from cluster_nodes import (
    PASSTHROUGH,
    PRIMARY_NAME,
    Cluster,
    Node,
    assert_same_bytes,
    assert_sound,
    litefs,
    needs_root,
    wait_same_position,
    wait_until,
)

pytestmark = needs_root
NAME = "app.db"


def make(path: Path, rows: int, mode: str = "delete", page_size: int = 4096) -> bytes:
    """A database outside of any mount; its bytes, without a WAL."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(f"pragma page_size={page_size}")
    connection.execute(f"pragma journal_mode={mode}")
    connection.execute("create table t(id integer primary key, data)")
    connection.execute("begin")
    connection.executemany("insert into t values (?, ?)", ((number, os.urandom(200)) for number in range(rows)))
    connection.execute("commit")
    connection.close()
    return path.read_bytes()


def run(*words: str | os.PathLike[str]) -> None:
    subprocess.run(words, check=True, timeout=30)


def count(node: Node, name: str = NAME) -> int:
    connection = node.connect(name)
    try:
        assert_sound(connection)
        return int(connection.execute("select count(*) from t").fetchone()[0])
    finally:
        connection.close()


def txid(node: Node, name: str = NAME) -> int:
    return int(node.position(name).split("/")[0], 16)


def check(primary: Node, replica: Node, rows: int, name: str = NAME) -> bytes:
    wait_same_position(primary, replica, name)
    assert count(primary, name) == count(replica, name) == rows
    return assert_same_bytes([primary, replica], name)


@pytest.mark.parametrize("mode", ["wal", "delete"])
@pytest.mark.parametrize("passthrough", PASSTHROUGH)
def test_cp_imports(cluster: Cluster, passthrough: str, mode: str, tmp_path: Path) -> None:
    """Also over a database that is there, with another page size, and back out again."""
    primary, replica = cluster.pair()
    content = make(tmp_path / NAME, 300, mode)
    run("cp", tmp_path / NAME, primary.mount)
    assert check(primary, replica, 300) == content
    before = txid(primary)
    other = make(tmp_path / "other.db", 100, mode, page_size=1024)
    run("cp", tmp_path / "other.db", primary.mount / NAME)
    assert check(primary, replica, 100) == other
    assert txid(primary) > before
    run("cp", replica.mount / NAME, tmp_path / "copy.db")
    connection = primary.connect(NAME)
    connection.execute("insert into t values (1000, 1)")
    connection.close()
    check(primary, replica, 101)


@pytest.mark.parametrize("passthrough", PASSTHROUGH)
def test_rsync_imports(cluster: Cluster, passthrough: str, tmp_path: Path) -> None:
    """A temporary file beside the database, then a rename onto it: what rsync does, and rsync itself if it is here."""
    primary, replica = cluster.pair()
    for rows in (200, 50):
        content = make(tmp_path / f"{rows}.db", rows)
        temporary = primary.mount / f".{NAME}.Xy12Zq"
        with open(temporary, "xb") as file:
            for at in range(0, len(content), 32768):
                file.write(content[at : at + 32768])
        os.utime(temporary, (1_700_000_000, 1_700_000_000))
        os.chmod(temporary, 0o644)
        assert NAME in primary.databases() or rows == 200
        os.rename(temporary, primary.mount / NAME)
        assert check(primary, replica, rows) == content
        assert primary.names() == [".lag", NAME, f"{NAME}-pos"]
    if shutil.which("rsync"):
        content = make(tmp_path / NAME, 120)
        run("rsync", "-a", tmp_path / NAME, f"{primary.mount}/")
        assert check(primary, replica, 120) == content


@pytest.mark.parametrize("mode", ["wal", "delete"])
@pytest.mark.parametrize("passthrough", PASSTHROUGH)
def test_rename_remove_and_make_again(cluster: Cluster, passthrough: str, mode: str) -> None:
    primary, replica = cluster.pair()
    make(primary.mount / NAME, 40, mode)
    check(primary, replica, 40)
    before = txid(primary)
    run("mv", primary.mount / NAME, primary.mount / "new.db")
    check(primary, replica, 40, "new.db")
    wait_until(lambda: replica.databases() == ["new.db"], "the old name is gone")
    assert primary.databases() == ["new.db"]

    make(primary.mount / NAME, 7, mode)
    check(primary, replica, 7)
    assert txid(primary) > before + 1, "the drop was a transaction, the new database goes on from there"

    run("mv", primary.mount / "new.db", primary.mount / NAME)
    check(primary, replica, 40)
    wait_until(lambda: replica.databases() == [NAME], "the old name is gone")
    before = txid(primary)
    run("rm", primary.mount / NAME)
    wait_until(lambda: replica.names() == [".lag", ".primary"], "the database is gone")
    assert primary.names() == [".lag"]
    replica.stop()
    replica.start()
    assert replica.databases() == []
    make(primary.mount / NAME, 3, mode, page_size=8192)
    check(primary, replica, 3)
    assert txid(primary) > before + 1


_LEFT_WAL = """
import os, sqlite3, sys
user = sqlite3.connect(sys.argv[1], isolation_level=None)
user.execute("insert into t values (100, 'in the WAL')")
os._exit(0)
"""


@pytest.mark.parametrize("passthrough", PASSTHROUGH)
def test_rename_with_what_is_in_the_wal(cluster: Cluster, passthrough: str) -> None:
    """Nobody has it open, but its last user did not close it: its WAL comes along."""
    primary, replica = cluster.pair()
    make(primary.mount / NAME, 40, "wal")
    run(sys.executable, "-c", _LEFT_WAL, primary.mount / NAME)
    assert (primary.mount / f"{NAME}-wal").stat().st_size
    os.rename(primary.mount / NAME, primary.mount / "new.db")
    wait_until(lambda: count(replica, "new.db") == 41 if "new.db" in replica.databases() else 0, "all rows are there")
    check(primary, replica, 41, "new.db")
    assert primary.databases() == ["new.db"]
    wait_until(lambda: replica.databases() == ["new.db"], "the old name is gone")


@pytest.mark.parametrize("made_by", ["itself", "others"])
@pytest.mark.parametrize("onto", ["nothing", "another"])
@pytest.mark.parametrize("passthrough", PASSTHROUGH)
def test_a_database_in_use_in_wal_mode_keeps_its_name(
    cluster: Cluster, passthrough: str, onto: str, made_by: str
) -> None:
    """SQLite would go on to write a -wal of the old name, which nobody looks at. Who has made the database has it open
    as well as others; so has who did not read it yet. A close counts at once."""
    primary, replica = cluster.pair()
    if made_by == "others":
        make(primary.mount / NAME, 1, "wal")
        user = primary.connect(NAME)
    else:
        user = primary.connect(NAME)
        user.execute("pragma journal_mode=wal")
        user.execute("create table t(id integer primary key, data)")
        user.execute("insert into t values (0, '')")
    if onto == "another":
        make(primary.mount / "new.db", 7, "wal")
        target = primary.connect("new.db")
        assert target.execute("select count(*) from t").fetchone() == (7,)
    for rows in (2, 3):
        with pytest.raises(OSError, match="Device or resource busy"):
            os.rename(primary.mount / NAME, primary.mount / "new.db")
        user.execute("insert into t values (?, 'after it')", (rows,))
        check(primary, replica, rows)
        assert primary.databases() == ([NAME, "new.db"] if onto == "another" else [NAME])
        assert (primary.data / "dbs" / "new.db").exists() == (onto == "another")  # a refusal leaves nothing behind
    assert "app.db is not renamed: an application has app.db open" in primary.log_text()
    user.close()
    if onto == "another":
        with pytest.raises(OSError, match="Device or resource busy"):
            os.rename(primary.mount / NAME, primary.mount / "new.db")
        target.close()
    os.rename(primary.mount / NAME, primary.mount / "new.db")
    check(primary, replica, 3, "new.db")
    wait_until(lambda: replica.databases() == ["new.db"], "the old name is gone")


@pytest.mark.parametrize("passthrough", PASSTHROUGH)
def test_a_database_in_use_in_a_rollback_mode_may_be_renamed(cluster: Cluster, passthrough: str) -> None:
    """As natively: who has it open reads on, and SQLite refuses to write to a file that has lost its name. Not while a
    transaction has begun to write."""
    primary, replica = cluster.pair()
    make(primary.mount / NAME, 40)
    user = primary.connect(NAME)
    user.execute("pragma cache_size=2")
    user.execute("begin")
    user.execute("update t set data = 'half'")
    with pytest.raises(OSError, match="Device or resource busy"):
        os.rename(primary.mount / NAME, primary.mount / "new.db")
    user.execute("commit")
    check(primary, replica, 40)
    os.rename(primary.mount / NAME, primary.mount / "new.db")
    assert user.execute("select count(*) from t where data = 'half'").fetchone() == (40,)
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        user.execute("delete from t")
    other = primary.connect("new.db")
    other.execute("insert into t values (100, '')")
    check(primary, replica, 41, "new.db")
    assert user.execute("select count(*) from t").fetchone() == (41,)
    user.close()
    other.execute("insert into t values (101, '')")
    other.close()
    check(primary, replica, 42, "new.db")
    assert primary.databases() == ["new.db"]


@pytest.mark.parametrize("passthrough", PASSTHROUGH)
def test_a_database_removed_while_it_is_open(cluster: Cluster, passthrough: str) -> None:
    """As on a disk: who has it open keeps it, the name is free."""
    primary, replica = cluster.pair()
    make(primary.mount / NAME, 40, "wal")
    check(primary, replica, 40)
    reader = replica.connect(NAME)
    assert reader.execute("select count(*) from t").fetchone() == (40,)
    run("rm", primary.mount / NAME)
    wait_until(lambda: replica.databases() == [], "the database is gone")
    reader.close()
    make(primary.mount / NAME, 5)
    check(primary, replica, 5)


@pytest.mark.parametrize("passthrough", PASSTHROUGH)
def test_other_files_are_local(cluster: Cluster, passthrough: str, tmp_path: Path) -> None:
    primary, replica = cluster.pair()
    for node in (primary, replica):
        note = node.mount / "notes.txt"
        note.write_text(f"of {node.name}\n")
        with open(note, "a") as file:
            file.write("more\n")
        assert note.read_text() == f"of {node.name}\nmore\n"
        run("cp", "-p", note, node.mount / "copy.txt")
        run("mv", node.mount / "copy.txt", node.mount / "moved.txt")
        os.truncate(node.mount / "moved.txt", 2)
        assert (node.mount / "moved.txt").read_bytes() == b"of"
    (primary.mount / "only-here.txt").write_text("x")
    (primary.mount / "looks-like.db").write_text("not SQLite")
    make(primary.mount / NAME, 4)
    check(primary, replica, 4)
    shown = [name for name in replica.names() if not name.endswith(("-wal", "-shm"))]
    assert shown == [".lag", ".primary", NAME, f"{NAME}-pos", "moved.txt", "notes.txt"]
    assert primary.names() == [
        ".lag", NAME, f"{NAME}-pos", "looks-like.db", "moved.txt", "notes.txt", "only-here.txt"
    ]  # fmt: skip
    run("rm", replica.mount / "notes.txt")
    assert (primary.mount / "notes.txt").exists()
    make(tmp_path / NAME, 1)
    with pytest.raises(OSError, match="Read-only file system"), open(replica.mount / "mine.db", "wb") as file:
        file.write((tmp_path / NAME).read_bytes())
    assert replica.databases() == [NAME]


def test_what_the_node_says_of_itself(cluster: Cluster) -> None:
    primary, replica = cluster.pair()
    make(primary.mount / NAME, 4)
    position = wait_same_position(primary, replica, NAME)
    assert re.fullmatch(r"[0-9a-f]{16}/[0-9a-f]{16}", position)
    assert (replica.mount / f"{NAME}-pos").stat().st_size == 34
    assert (replica.mount / ".primary").read_text() == f"{PRIMARY_NAME}\n"
    assert not (primary.mount / ".primary").exists()
    assert (primary.mount / ".lag").read_text() == "+000000000\n"
    assert re.fullmatch(r"\+\d{9}\n", (replica.mount / ".lag").read_text())
    for name in (".lag", f"{NAME}-pos"):
        with pytest.raises(PermissionError):
            os.unlink(primary.mount / name)
        with pytest.raises(PermissionError):
            (primary.mount / name).write_text("x")
    with pytest.raises(PermissionError):
        os.mkdir(primary.mount / "directory")


def test_export_and_import(cluster: Cluster, tmp_path: Path) -> None:
    """Import into nothing, then over a database that an application has open; export from both nodes."""
    primary, replica = cluster.pair()
    content = make(tmp_path / "one.db", 150)
    done = litefs("import", "-url", primary.url, "-name", NAME, str(tmp_path / "one.db"))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert re.fullmatch(r'Import of database "app\.db" in [\d.]+s\n', done.stdout)
    assert check(primary, replica, 150) == content
    application, reader = primary.connect(NAME), replica.connect(NAME)
    assert application.execute("select count(*) from t").fetchone() == (150,)
    make(tmp_path / "two.db", 60)
    done = litefs("import", "-url", primary.url, "-name", NAME, str(tmp_path / "two.db"))
    assert done.returncode == 0, done.stderr
    check(primary, replica, 60)
    assert application.execute("select count(*) from t").fetchone() == (60,)
    assert reader.execute("select count(*) from t").fetchone() == (60,)
    application.execute("pragma journal_mode=wal")
    application.execute("insert into t values (9999, 'in the wal')")
    for node in (primary, replica):
        wait_same_position(primary, replica, NAME)
        target = tmp_path / f"{node.name}.db"
        done = litefs("export", "-url", node.url, "-name", NAME, str(target))
        assert (done.returncode, done.stderr) == (0, "")
        exported = sqlite3.connect(target)
        assert exported.execute("select count(*) from t").fetchone() == (61,)
        assert_sound(exported)
        exported.close()
        for path in (node.mount / NAME, node.mount / "new.db", node.data / "dbs" / NAME / "database"):
            done = litefs("export", "-url", node.url, "-name", NAME, str(path))
            assert done.returncode == 2 and "litefs" in done.stderr, done.stderr
    application.execute("insert into t values (10000, 'after it')")
    assert application.execute("pragma integrity_check").fetchone() == ("ok",)
    application.close()
    reader.close()


def test_run(cluster: Cluster, tmp_path: Path) -> None:
    primary, replica = cluster.pair()
    script = f"import sqlite3; c = sqlite3.connect({str(primary.mount / NAME)!r}); c.execute('create table t(id)')"
    done = litefs("run", "-url", primary.url, "-promote", "--", "python3", "-c", script)
    assert done.returncode == 0, done.stderr
    check(primary, replica, 0)
    done = litefs("run", "-url", replica.url, "-promote", "--", "touch", str(tmp_path / "touched"))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and "cannot promote" in done.stderr and PRIMARY_NAME in done.stderr
    done = litefs("run", "-url", replica.url, "-if-candidate", "--", "touch", str(tmp_path / "touched"))
    assert (done.returncode, done.stderr) == (0, "node is not a candidate, skipping execution\n")
    assert not (tmp_path / "touched").exists()
    assert litefs("run", "-url", primary.url, "-if-candidate", "--", "false").returncode == 1


def test_a_replica_of_some_databases(cluster: Cluster) -> None:
    primary = cluster.node("primary").start()
    make(primary.mount / "a.db", 10)
    make(primary.mount / "b.db", 20)
    some = cluster.node("some", primary=primary)
    some.config["lease"]["databases"] = ["b.db", "later.db"]
    some.start()
    check(primary, some, 20, "b.db")
    make(primary.mount / "later.db", 5, "wal")
    make(primary.mount / "c.db", 5)
    check(primary, some, 5, "later.db")
    assert some.databases() == ["b.db", "later.db"]


def test_several_replicas_that_come_and_go(cluster: Cluster) -> None:
    primary = cluster.node("primary").start()
    first = cluster.node("first", primary=primary).start()
    connection = primary.connect(NAME)
    connection.execute("pragma journal_mode=wal")
    connection.execute("create table t(id integer primary key, data)")
    for rows in range(1, 4):
        late = cluster.node(f"late{rows}", primary=primary).start()
        connection.execute("insert into t(data) values (randomblob(9000))")
        for node in (first, late):
            check(primary, node, rows)
        assert len(primary.info().get("replicas", [])) in (0, rows + 1)
    cluster.nodes[2].kill()
    connection.execute("insert into t(data) values (randomblob(9000))")
    for node in (first, *cluster.nodes[3:]):
        check(primary, node, 4)
    connection.close()


def test_what_an_application_left_where_nothing_was_mounted(cluster: Cluster) -> None:
    """SQLite makes -wal and -journal by name, also if the mount went after it had opened the database."""
    primary, _ = cluster.pair()
    primary.stop()
    for name in ("app.db-wal", "app.db-shm", "other.db-journal"):
        (primary.mount / name).write_text(name)
    primary.start()
    kept = sorted((primary.data / "lost").glob("*/*"))
    assert [path.name for path in kept] == ["app.db-shm", "app.db-wal", "other.db-journal"]
    assert [path.read_text() for path in kept] == [path.name for path in kept]
    primary.stop()
    for name in ("app.db-wal", "app.db"):  # a database is nobody's leftover
        (primary.mount / name).write_text(name)
    with pytest.raises(AssertionError, match="is not empty: move its files away"):
        primary.start()
    for name in ("app.db-wal", "app.db"):
        (primary.mount / name).unlink()
