"""Databases with every kind of name that a file system allows: replicated, or said loudly not to be."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import urllib.request
from pathlib import Path
from urllib.parse import quote

import pytest

from cluster_nodes import START_S, Cluster, Node, needs_root, wait_until
from pylitefs.formats.names import shown

pytestmark = needs_root
NAMES = [
    b"app.db", b"caf\xe9.db", b"\xff\xfe\x80", "größe.db".encode(), b"shop", b"stock-lock", b".hidden", b"...", b" ",
    b" a b ", b"-", b"-wal.db", b"line\nfeed", b"\x01\x7f", b"a%E9\\xe9", b"a+b&c=d#e?f", b"'\"*", b"x" * 247,
]  # fmt: skip
REFUSED = {b"store-wal": "-wal", b"book-shm": "-shm", b"diary-journal": "-journal", b"y" * 248: "248 bytes"}


def insert(path: bytes, value: str, mode: str) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute(f"pragma journal_mode={mode}")
        db.execute("create table if not exists t(a)")
        db.execute("insert into t values(?)", (value,))


def values(node: Node, name: bytes) -> list[str]:
    with contextlib.closing(sqlite3.connect(os.path.join(os.fsencode(node.mount), name))) as db:
        return [value for (value,) in db.execute("select a from t")]


def position(node: Node, name: bytes) -> str:
    return str(node.info()["databases"].get(os.fsdecode(name)))


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_every_name_is_replicated(cluster: Cluster, mode: str) -> None:
    primary, replica = cluster.pair()
    for name in NAMES:
        insert(os.path.join(os.fsencode(primary.mount), name), name.hex(), mode)
    wait_until(
        lambda: all(position(replica, name) == position(primary, name) != "None" for name in NAMES),
        "all are on the replica",
    )
    for name in NAMES:
        assert values(replica, name) == [name.hex()], name
        for node in (primary, replica):
            with urllib.request.urlopen(f"{node.url}/export?name={quote(name)}", timeout=START_S) as answer:
                assert answer.read(16) == b"SQLite format 3\0", name
    for node in (primary, replica):  # all that people and programs read
        said = node.litefs("status", "-url", node.url)
        folded = "".join(said.stdout.split())
        assert said.returncode == 0 and "caf\\xe9.db" in said.stdout, said
        assert all("".join(shown(os.fsdecode(name)).split()) in folded for name in NAMES if len(name) < 100)
        document = json.loads(node.litefs("status", "-url", node.url, "-json").stdout)
        assert {os.fsencode(entry["name"]) for entry in document["databases"]} == set(NAMES)
        assert document["notReplicated"] == []
        assert 'db="caf\\\\xe9.db"' in node.get("/metrics").decode()
    sync = [sys.executable, "-m", "pylitefs", "sync", "-url", replica.url, b"caf\xe9.db"]
    assert subprocess.run(sync, check=False, capture_output=True, timeout=START_S).returncode == 0
    for name in NAMES:
        os.unlink(os.path.join(os.fsencode(primary.mount), name))
    wait_until(lambda: os.listdir(replica.mount) == [".primary", ".lag"] or not replica.databases(), "all are gone")


def test_what_cannot_be_replicated_is_said(cluster: Cluster, tmp_path: Path) -> None:
    """By an event, the log and the status; and it can be put right by renaming it."""
    primary, replica = cluster.pair()
    insert(os.fsencode(tmp_path / "source"), "x", "delete")
    content = (tmp_path / "source").read_bytes()
    with urllib.request.urlopen(f"{primary.url}/events", timeout=START_S) as events:
        assert json.loads(events.readline())["type"] == "init"
        for name in REFUSED:
            with open(os.path.join(os.fsencode(primary.mount), name), "wb") as file:
                file.write(content)
        told: dict[bytes, str] = {}
        while len(told) < len(REFUSED):
            event = json.loads(events.readline())
            if event["type"] == "notReplicated":
                told[os.fsencode(event["db"])] = event["data"]["reason"]
    for name, why in REFUSED.items():
        assert why in told[name]
        assert values(primary, name) == ["x"]
        assert primary.log_text().count(f"{shown(os.fsdecode(name))} is not replicated: ") == 1
    assert "notReplicated" not in primary.log_text(), "one sentence for people is enough"
    document = json.loads(primary.get("/status"))
    assert {os.fsencode(entry["name"]): entry["reason"] for entry in document["notReplicated"]} == told
    assert "store-wal is not replicated: " in primary.litefs("status", "-url", primary.url).stdout
    os.rename(primary.mount / "store-wal", primary.mount / "store.db")
    wait_until(lambda: replica.databases() == ["store.db"], "it is on the replica")
    assert len(json.loads(primary.get("/status"))["notReplicated"]) == len(REFUSED) - 1
    with pytest.raises(OSError, match="Invalid argument"):
        os.rename(primary.mount / "store.db", primary.mount / "store-wal")
    assert primary.databases() == ["store.db"]


def test_names_that_look_like_ours(cluster: Cluster, tmp_path: Path) -> None:
    """A user's file comes before a virtual one; a database that was there first is replicated, and stays itself."""
    primary, replica = cluster.pair()
    insert(os.fsencode(primary.mount / "shop-pos"), "first", "delete")
    (primary.mount / "notes-pos").write_text("mine")
    insert(os.fsencode(primary.mount / "shop"), "shop", "delete")
    insert(os.fsencode(primary.mount / "notes"), "notes", "wal")
    wait_until(
        lambda: all(position(replica, name) == position(primary, name) != "None" for name in (b"shop", b"shop-pos")),
        "both are on the replica",
    )
    for node in (primary, replica):
        assert values(node, b"shop-pos") == ["first"] and values(node, b"shop") == ["shop"]
        assert sorted(os.listdir(node.mount)) == sorted(set(os.listdir(node.mount)))
    assert (primary.mount / "notes-pos").read_text() == "mine"
    with pytest.raises(PermissionError):
        (primary.mount / "shop-lock").unlink()


def test_a_placeholder_on_a_replica_makes_room(cluster: Cluster) -> None:
    """An empty file that was there before the database came, as a container's mount makes it, is not listed twice; a
    file with content is kept under another name."""
    primary = cluster.node("primary")
    replica = cluster.node("replica", primary=primary)
    replica.config["lease"]["reconnect-delay"] = "100ms"
    replica.config["fuse"] |= {"uid": 1234, "gid": 2345, "mode": "0640"}
    replica.start(wait=False)
    wait_until(lambda: ".lag" in os.listdir(replica.mount), "the replica is mounted")
    (replica.mount / "app.db").touch()
    (replica.mount / "other.db").write_text("a text")
    primary.start()
    for name in ("app.db", "other.db"):
        insert(os.fsencode(primary.mount / name), "x", "wal")
    wait_until(lambda: replica.databases() == ["app.db", "other.db"], "both are on the replica")
    wait_until(lambda: values(replica, b"app.db") == values(replica, b"other.db") == ["x"], "with their content")
    found = os.listdir(replica.mount)
    assert found.count("app.db") == found.count("other.db") == 1
    assert (replica.mount / "other.db.local-1").read_text() == "a text"
    for name in ("app.db", "app.db-wal", "app.db-shm"):  # of this node's owner and mode
        status = os.stat(os.path.join(replica.data, "dbs", "app.db", name[6:].lstrip("-") or "database"))
        assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (1234, 2345, 0o640), name


def test_only_a_line_stays_of_what_was_dropped_long_ago(cluster: Cluster) -> None:
    """On both nodes, of every name; unless somebody has it open. It goes on where it ended when it comes back."""
    names = [b"app.db", b"caf\xe9.db", b"shop", b"line\nfeed", b"x" * 247]
    primary = cluster.node("primary")
    replica = cluster.node("replica", primary=primary)
    for node in (primary, replica):
        node.config["data"] |= {"retention": "100ms", "retention-monitor-interval": "100ms"}
        node.start()

    def folders(node: Node) -> set[bytes]:
        return set(os.listdir(os.fsencode(node.data / "dbs")))

    for name in names:
        insert(os.path.join(os.fsencode(primary.mount), name), "old", "wal" if len(name) % 2 else "delete")
    wait_until(lambda: all(position(replica, name) == position(primary, name) != "None" for name in names), "all there")
    with contextlib.closing(sqlite3.connect(primary.mount / "shop")) as held:
        assert held.execute("select a from t").fetchall() == [("old",)]
        for name in names:
            os.unlink(os.path.join(os.fsencode(primary.mount), name))
        wait_until(lambda: folders(primary) == {b"shop"}, "what nobody has open is forgotten")
    for node in (primary, replica):
        wait_until(lambda node=node: not folders(node) and not node.info()["databases"], "nothing is left")
        assert len((node.data / "tombstones").read_bytes().splitlines()) == len(names)
    replica.stop()
    replica.start()
    for name in names:
        insert(os.path.join(os.fsencode(primary.mount), name), "new", "delete" if len(name) % 2 else "wal")
    wait_until(lambda: all(position(replica, name) == position(primary, name) != "None" for name in names), "all again")
    for name in names:
        assert values(primary, name) == values(replica, name) == ["new"]
        assert int(primary.info()["databases"][os.fsdecode(name)]["txid"], 16) > 3
