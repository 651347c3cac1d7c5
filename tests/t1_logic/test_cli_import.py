"""`litefs import`: an error names the file, the reason, and what to do, in one line."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from fake_node import FakeNode, fake_node

from pylitefs.cli.import_ import import_
from pylitefs.errors import LitefsError, UsageError
from pylitefs.http.client import Refused
from pylitefs.http.queries import checked_name


@pytest.fixture
def node() -> Iterator[FakeNode]:
    with fake_node() as made:
        yield made


@pytest.fixture
def dump(tmp_path: Path) -> str:
    path = tmp_path / "dump.db"
    sqlite3.connect(path).execute("create table t(a)")
    return str(path)


def error_of(node: FakeNode, path: str, name: str = "app.db") -> LitefsError:
    error = CliRunner().invoke(import_, ["-url", node.url, "-name", name, path]).exception
    assert isinstance(error, LitefsError)
    return error


def test_what_the_node_refuses_is_told_with_the_files_name(node: FakeNode, dump: str) -> None:
    node.answers["POST /import"] = 400, "not a SQLite database: it has 6 bytes"
    error = error_of(node, dump)
    assert str(error) == f'{dump} was not imported as "app.db": not a SQLite database: it has 6 bytes'
    assert isinstance(error, Refused) and error.status == 400


def test_a_replica_says_where_the_primary_is(node: FakeNode, dump: str) -> None:
    node.answers["POST /import"] = 503, "this node is a replica: write on the primary"
    node.answers["GET /info"] = 200, {"isPrimary": False, "primary": {"hostname": "db1", "url": "http://db1:20202"}}
    assert str(error_of(node, dump)).endswith("this node is a replica: write on the primary (-url http://db1:20202)")
    node.answers["GET /info"] = 200, {"isPrimary": False}
    assert str(error_of(node, dump)).endswith("write on the primary")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("a/b.db", "not in folders"),
        ("x-wal", '"-wal" for a file of another database'),
        (".primary", "no file name that a database can have"),
        ("n" * 248, "248 bytes"),
    ],
)
def test_why_a_name_cannot_be_had_is_told(name: str, why: str) -> None:
    with pytest.raises(UsageError, match="cannot be the name of a database: ") as error:
        checked_name(name)
    assert why in str(error.value)
