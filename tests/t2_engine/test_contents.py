"""What the database file holds at a commit point: less than whole pages, nothing, or nothing that SQLite reads."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_nodes import Node, check_log, new_primary, replay

from pylitefs.engine.database import Database
from pylitefs.engine.rollback_capture import whole_size
from pylitefs.errors import FormatError


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = new_primary(tmp_path / "node", mode="DELETE", page_size=4096, rows=300)
    yield made
    made.close(clean=False)


def path_of(node: Node) -> Path:
    return Path(node.database().files.database)


def commit(node: Node) -> bool:
    """As where a journal goes after writes that nobody noted."""
    node.database().rollback.suspect = True
    return node.store.capture.commit_point(node.database())


def assert_in_log(database: Database, content: bytes) -> None:
    check_log(database)
    assert replay(database) == content.ljust(database.size_bytes, b"\0")[: database.size_bytes]
    assert not database.rollback.pending and database.withheld is None


def test_a_file_that_ends_within_its_last_page(node: Node) -> None:
    """As SQLite leaves it that copies an empty database over one with larger pages: zeros follow."""
    path = path_of(node)
    page = bytearray(path.read_bytes()[:2048])
    page[28:32] = bytes(4)
    page[16:18] = (8192).to_bytes(2, "big")
    path.write_bytes(page)
    assert whole_size(bytes(page[:100]), len(page)) == (8192, 1)
    assert commit(node)
    assert (node.database().page_size, node.database().commit) == (8192, 1)
    assert_in_log(node.database(), bytes(page))
    node.database().rollback.note(0, 10)
    assert node.store.capture.is_as_logged(node.database())


def test_that_a_file_was_emptied_is_told(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    """`: > app.db`, most often a slip: nothing else would tell that the rows are gone, on all nodes."""
    path, database = path_of(node), node.database()
    os.truncate(path, 0)
    assert commit(node) and not database.exists
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert record.getMessage().startswith(f"{database.name}: a program has cut its file off to nothing")
    assert "replicas drop the database as well" in record.getMessage()


@pytest.mark.parametrize("tail", [b"x", b"x" * 4096, b"x" * 5000])
def test_what_follows_the_last_page_does_not_count(node: Node, tail: bytes) -> None:
    path = path_of(node)
    content = path.read_bytes()
    path.write_bytes(content + tail)
    assert not commit(node), "nothing that SQLite reads has changed"
    assert_in_log(node.database(), content)
    assert path.read_bytes() == content + tail


@pytest.mark.parametrize("pages", [1, 2, 5])
def test_a_file_that_ends_before_its_last_page(node: Node, pages: int) -> None:
    """SQLite calls it malformed: it is not recorded, and that is said once, until it is whole again."""
    path, database = path_of(node), node.database()
    content, before = path.read_bytes(), database.position
    path.write_bytes(content[: pages * 4096])
    with pytest.raises(FormatError, match=f"ends after {pages} of the {database.commit} pages"):
        whole_size(content[:100], pages * 4096)
    for _ in range(3):
        assert not commit(node)
        assert database.position == before and database.rollback.pending
        assert database.withheld is not None and "the file ends after" in database.withheld
    assert node.kinds().count("withheld") == 1
    path.write_bytes(content)
    assert not commit(node)
    assert_in_log(database, content)
    assert node.kinds()[-1] == "withheldEnd"


def test_a_header_that_is_none(node: Node) -> None:
    path, database = path_of(node), node.database()
    content, before = path.read_bytes(), database.position
    path.write_bytes(os.urandom(8192))
    assert not commit(node)
    assert database.position == before and "not a SQLite database" in (database.withheld or "")
    other = content[:24] + bytes(3) + b"\x07" + content[28:92] + bytes(3) + b"\x07" + content[96:]
    path.write_bytes(other)
    assert commit(node)
    assert_in_log(database, other)


def test_an_empty_file_is_a_new_database(node: Node) -> None:
    """It is dropped, and goes on as a plain file with the same inode, whoever has it open."""
    path, database, store = path_of(node), node.database(), node.store
    before = database.position.txid
    inode = path.stat().st_ino
    with open(path, "r+b") as open_file:
        path.write_bytes(b"")
        assert commit(node)
        assert not database.exists and database.position.txid == before + 1
        assert not path.exists() and os.stat(store.plain_path("db")).st_ino == inode
        assert "drop" in node.kinds() and not database.rollback.pending
        check_log(database)
        made = sqlite3.connect(":memory:", isolation_level=None)
        made.execute("create table t(a)")
        open_file.write(made.serialize())
    assert store.import_plain("db")
    assert database.exists and database.position.txid == before + 2 and path.stat().st_ino == inode
    assert_in_log(database, made.serialize())


def test_the_rollback_of_a_first_transaction_that_was_recorded(node: Node) -> None:
    """The name stands for one file at each moment: whoever looks finds the old one or the new."""
    database, seen = node.database(), []
    link, unlink = os.link, os.unlink

    def look(*_: object) -> None:
        seen.append((database.exists, path_of(node).exists(), os.path.exists(node.store.plain_path("db"))))

    path_of(node).write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pylitefs.engine.naming.os.link", lambda *names: (look(), link(*names), look()))
        patch.setattr("pylitefs.engine.naming.os.unlink", lambda name: (look(), unlink(name), look()))
        assert commit(node)
    assert all(in_dbs if exists else in_files for exists, in_dbs, in_files in seen), seen


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("content", [b"", b"garbage" * 1000, "half"])
def test_a_start_finds_what_applications_left(tmp_path: Path, content: bytes | str, clean: bool) -> None:
    """The daemon was not there, or was killed before it had looked. It is as if it had been: an empty file is dropped,
    what SQLite cannot read is withheld, and a database that is put in its place later is taken over."""
    node = new_primary(tmp_path / "node", mode="DELETE", rows=300)
    node.store.note_boot()
    whole, path, before = path_of(node).read_bytes(), path_of(node), node.database().position
    if clean:
        node.close()
    path.write_bytes(whole[:8192] if isinstance(content, str) else content)
    if not clean:
        node.database().rollback.suspect = True
        node.close(clean=False)
    start = Node(tmp_path / "node")
    try:
        start.store.settle()
        database = start.database()
        assert database.set_aside_reason is None
        if not content:
            assert not database.exists and database.position.txid == before.txid + 1
            assert os.path.getsize(start.store.plain_path("db")) == 0
            return
        assert database.exists and database.position == before and database.withheld
        other = whole[:24] + bytes(3) + b"\x07" + whole[28:92] + bytes(3) + b"\x07" + whole[96:]
        path.write_bytes(other)
        assert start.store.capture.commit_point(database)
        assert_in_log(database, other)
    finally:
        start.close(clean=False)
