"""`litefs lost` on what real nodes have kept: what is shown is what was lost, and applying brings exactly that back."""

from __future__ import annotations

import contextlib
import json
import sqlite3

import pytest

from cluster_nodes import Cluster, Node, litefs, needs_root, wait_same_position, wait_until

pytestmark = needs_root
NAME = "app.db"

SCHEMA = """
create table item (id integer primary key, name text collate nocase, price);
create table note (text);
create table pair (a text, b integer, v blob, primary key (a, b)) without rowid;
create table log (id integer primary key, what text);
create trigger on_item after insert on item begin insert into log (what) values ('added ' || new.name); end;
insert into item values (1, 'one', 10), (2, 'two', 20), (3, 'three', 30), (4, 'four', 40);
insert into note values ('first'), ('second');
insert into pair values ('x', 1, x'00'), ('y', 2, null);
"""
BRANCH = """
insert into item values (5, 'five?', 50.5), (6, 'it''s six', null);
update item set name = 'ONE' where id = 1;
update item set price = 21 where id = 2;
delete from item where id = 3;
insert into note values ('of the branch');
insert into pair values ('z', 3, x'ff00');
create table fresh (k primary key, v);
insert into fresh values ('a', 1), ('b', 2);
"""
SINCE = """
update item set price = 22 where id = 2;
insert into item values (6, 'another six', 66);
insert into note values ('since');
"""


def run(node: Node, sql: str) -> None:
    connection = node.connect(NAME)
    try:
        for statement in sql.strip().split(";\n"):
            if statement.strip():
                connection.execute(statement)
    finally:
        connection.close()


def script(node: Node, sql: str) -> None:
    with contextlib.closing(node.connect(NAME)) as connection:
        connection.executescript(sql)


def rows(node: Node, table: str) -> list[tuple[object, ...]]:
    with contextlib.closing(node.connect(NAME)) as connection:
        return connection.execute(f"select * from {table} order by 1").fetchall()


@pytest.fixture
def parted(cluster: Cluster) -> tuple[Node, Node, str]:
    """(primary, replica, the replica's branch): for a while both were the primary."""
    primary, replica = cluster.pair()
    with contextlib.closing(primary.connect(NAME)) as connection:
        connection.execute("pragma journal_mode = wal")
    script(primary, SCHEMA)
    wait_same_position(primary, replica, NAME)
    replica.stop()
    primary.stop()
    follows = replica.config["lease"]
    replica.config["lease"] = {"type": "static", "candidate": True}
    replica.start()
    script(replica, BRANCH)
    replica.stop()
    replica.config["lease"] = follows
    primary.start()
    script(primary, SINCE)
    replica.start()
    wait_same_position(primary, replica, NAME)
    listed = json.loads(litefs("lost", "list", "-json", "-data-dir", str(replica.data)).stdout)
    assert [(item["database"], item["applied"]) for item in listed] == [(NAME, False)]
    return primary, replica, listed[0]["branch"]


def test_what_is_kept_is_shown_and_comes_back(parted: tuple[Node, Node, str]) -> None:
    primary, replica, branch = parted
    config = str(replica.base / "litefs.yml")
    shown = litefs("lost", "show", "-config", config, branch)
    assert shown.returncode == 0, shown.stderr
    for line in [
        "added         5, 'five?', 50.5",
        "changed       1, 'ONE', 10",
        "conflict      2, 'two', 21",
        "now           2, 'two', 22",
        "deleted       3, 'three', 30",
        "conflict      6, 'it''s six', NULL",
        "added         'z', 3, X'ff00'",
        "added         'b', 2",
        "CREATE TABLE fresh (k primary key, v);",
        "added: 6, changed: 1, deleted: 1, there already: 0, conflict: 3",
    ]:
        assert line.lower() in shown.stdout.lower(), f"{line}\n{shown.stdout}"

    folder = replica.data / "dbs" / NAME / "lost" / branch.split("/")[1]
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    before = rows(primary, "item")
    dry = litefs("lost", "apply", "-db", str(primary.mount / NAME), str(folder))
    assert dry.returncode == 0 and rows(primary, "item") == before, dry.stderr

    done = litefs("lost", "apply", "-write", "-db", str(primary.mount / NAME), str(folder))
    assert done.returncode == 0, done.stderr
    assert "conflicts were left alone: 3" in done.stdout
    check_merged(primary)
    wait_same_position(primary, replica, NAME)
    check_merged(replica)
    assert {name: data for name, data in files.items() if (folder / name).read_bytes() != data} == {}
    assert (folder / "applied").exists()
    again = litefs("lost", "apply", "-write", "-db", str(primary.mount / NAME), str(folder))
    assert again.returncode == 1 and "applied before" in again.stderr

    sql = "".join(line for line in dry.stdout.splitlines(keepends=True) if not line.startswith("--"))
    with contextlib.closing(sqlite3.connect(":memory:")) as other:  # what is printed does the same
        other.executescript(SCHEMA + SINCE + "drop trigger on_item;" + sql)
        assert other.execute("select * from item order by 1").fetchall() == rows(primary, "item")


def check_merged(node: Node) -> None:
    assert rows(node, "item") == [
        (1, "ONE", 10), (2, "two", 22), (4, "four", 40), (5, "five?", 50.5), (6, "another six", 66),
    ]  # fmt: skip
    assert rows(node, "note") == [("first",), ("of the branch",), ("second",), ("since",)]
    assert rows(node, "pair") == [("x", 1, b"\0"), ("y", 2, None), ("z", 3, b"\xff\0")]
    assert rows(node, "fresh") == [("a", 1), ("b", 2)]
    with contextlib.closing(node.connect(NAME)) as connection:
        assert connection.execute("select count(*) from sqlite_schema where type = 'trigger'").fetchone() == (1,)


def test_conflicts_are_overwritten_by_force_only(parted: tuple[Node, Node, str]) -> None:
    primary, replica, branch = parted
    folder = replica.data / "dbs" / NAME / "lost" / branch.split("/")[1]
    done = litefs("lost", "apply", "-write", "-force", "-db", str(primary.mount / NAME), str(folder))
    assert done.returncode == 0 and "overwritten: 3" in done.stdout, done.stderr
    assert rows(primary, "item")[1] == (2, "two", 21) and rows(primary, "item")[-1] == (6, "it's six", None)


def test_mistakes_are_told_in_one_line_and_change_nothing(parted: tuple[Node, Node, str]) -> None:
    primary, replica, branch = parted
    folder = str(replica.data / "dbs" / NAME / "lost" / branch.split("/")[1])
    data = str(replica.data)
    for words, text in [
        (["show", "-data-dir", data, "app.db/nothing"], "no such branch"),
        (["show", "-data-dir", data, branch], "litefs runs on"),
        (["apply", "-write", "-db", str(replica.mount / NAME), folder], "nothing was changed: write on the primary"),
        (["apply", "-write", "-db", str(primary.mount / "none.db"), folder], "unable to open"),
        (["show", "-data-dir", data, "-db", "/dev/null", data], "no lost transactions"),
    ]:
        done = litefs("lost", *words)
        assert done.returncode != 0 and text in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert "none.db" not in primary.names()
    replica.stop()
    assert "added: 6" in litefs("lost", "show", "-data-dir", data, branch).stdout
    wait_until(lambda: rows(primary, "note"), "the primary is not disturbed")


def test_what_follows_exactly_is_given_back_while_applications_use_the_primary(cluster: Cluster) -> None:
    primary, replica = cluster.pair()
    with contextlib.closing(primary.connect(NAME)) as connection:
        connection.execute("pragma journal_mode = wal")
    script(primary, SCHEMA)
    wait_same_position(primary, replica, NAME)
    replica.stop()
    primary.stop()
    follows = replica.config["lease"]
    replica.config["lease"] = {"type": "static", "candidate": True}
    replica.start()
    script(replica, BRANCH)
    position = replica.position(NAME)
    replica.stop()
    replica.config["lease"] = follows
    primary.start()
    with contextlib.closing(primary.connect(NAME)) as user:  # has it open, in the WAL's shared memory
        assert len(user.execute("select * from item").fetchall()) == 4
        replica.start()
        wait_until(lambda: primary.position(NAME) == position, "the branch is given back")
        assert user.execute("select count(*) from fresh").fetchone() == (2,)
        user.execute("insert into item values (7, 'seven', 70)")
        user.execute("pragma wal_checkpoint(truncate)")
    wait_same_position(primary, replica, NAME)
    assert rows(primary, "item") == rows(replica, "item")
    assert rows(primary, "item")[-1] == (7, "seven", 70)
    assert litefs("lost", "list", "-data-dir", str(replica.data)).stdout == "nothing was lost\n"
    primary.kill()
    primary.start()
    assert rows(primary, "item")[-1] == (7, "seven", 70)
    wait_same_position(primary, replica, NAME)
