"""Bits that flip in a database file, under real nodes: the scrub finds them, and they are gone without an operator.

On the primary only what is proven to be damage is: it is made beneath the file system there."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster_nodes import (
    PASSTHROUGH,
    Cluster,
    Node,
    assert_same_bytes,
    assert_sound,
    dump,
    needs_root,
    pairwise,
    wait_same_position,
    wait_until,
)
from harness.rot import RottenDisk

pytestmark = needs_root
NAME = "app.db"


@pytest.fixture
def disk(tmp_path: Path, cluster: Cluster) -> Iterator[RottenDisk]:
    """For the primary's data directory. It goes after the nodes."""
    made = RottenDisk(tmp_path / "disk", 64 << 20)
    made.path.mkdir()
    made.attach()
    try:
        yield made
        for node in cluster.nodes:
            node.remove()
    finally:
        made.detach()
        made.image.unlink()


def pair(cluster: Cluster, disk: RottenDisk | None = None, **data: Any) -> tuple[Node, Node]:
    """Both look for damage all the time."""
    primary = cluster.node("primary")
    replica = cluster.node("replica", primary=primary)
    if disk is not None:
        primary.data = disk.path / "data"
        primary.config["data"]["dir"] = str(primary.data)
    for node in (primary, replica):
        node.config["data"] |= {"scrub-interval": "500ms", "scrub-rate": 0, **data}
        node.start()
    return primary, replica


def fill(node: Node, mode: str) -> dict[str, list[Any]]:
    with contextlib.closing(node.connect(NAME)) as connection:
        connection.execute(f"pragma journal_mode = {mode}")
        connection.execute("create table t (id integer primary key, v text)")
        connection.executemany("insert into t (v) values (?)", [(f"{i:04} " * 150,) for i in range(400)])
        connection.execute("pragma wal_checkpoint(truncate)")
        return dump(connection)


def metric(node: Node, name: str) -> float:
    for line in node.get("/metrics").decode().splitlines():
        if line.startswith(f"{name}_total "):
            return float(line.split()[1])
    raise AssertionError(f"no metric {name}")


def flip(node: Node, *pages: int) -> None:
    """One letter in each of these pages, in the file that the node keeps."""
    with open(node.data / "dbs" / NAME / "database", "r+b") as file:
        for page in pages:
            offset = (page - 1) * 4096 + 3000 + page
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1 << page % 7]))


def rot(disk: RottenDisk, node: Node, *pages: int) -> None:
    """The same on the disk, beneath the file, once all of it was read."""
    time.sleep(0.3)  # since it was written last
    for _ in range(2):  # the first may have begun before
        done = metric(node, "litefs_scrubbed_bytes")
        wait_until(lambda done=done: metric(node, "litefs_scrubbed_bytes") > done, "everything was read")
    for page in pages:
        disk.flip(node.data / "dbs" / NAME / "database", (page - 1) * 4096 + 3000 + page, page % 7)


def healed(node: Node, pages: int) -> None:
    wait_until(lambda: metric(node, "litefs_pages_healed") >= pages, f"{pages} pages healed on {node.name}")


def is_whole(node: Node, rows: dict[str, list[Any]]) -> None:
    with contextlib.closing(node.connect(NAME)) as connection:
        assert_sound(connection)
        assert dump(connection) == rows


@pytest.mark.parametrize(
    ("mode", "held", "passthrough"),
    pairwise(("wal", True, "auto"), ("wal", False, "off"), ("delete", True, "off"), ("delete", False, "auto")),
)
def test_bit_rot_on_the_primary(cluster: Cluster, disk: RottenDisk, passthrough: str, mode: str, held: bool) -> None:
    """From its log, once nobody has it open. Until then it stays as it is, and is said."""
    primary, replica = pair(cluster, disk)
    rows = fill(primary, mode)
    position = wait_same_position(primary, replica, NAME)
    with contextlib.ExitStack() as stack:
        rot(disk, primary, 10, 11, 40)
        if held:
            connection = stack.enter_context(contextlib.closing(primary.connect(NAME)))
            connection.execute("select count(*) from t").fetchall()
            wait_until(lambda: "close it everywhere" in primary.log_text(), "it is said what to do")
            assert metric(primary, "litefs_pages_healed") == 0
    healed(primary, 3)
    assert primary.position(NAME) == position
    is_whole(primary, rows)
    with contextlib.closing(primary.connect(NAME)) as writer:
        writer.execute("insert into t (v) values ('afterwards')")
        rows = dump(writer)
    wait_same_position(primary, replica, NAME)
    is_whole(replica, rows)
    assert_same_bytes([primary, replica], NAME)
    assert metric(primary, "litefs_damage_found") >= 1 and "healed" in primary.log_text()
    assert not (replica.data / "dbs" / NAME / "lost").exists()


@pytest.mark.parametrize("opened", [True, False])
def test_what_was_written_in_the_data_directory_is_no_damage(cluster: Cluster, opened: bool) -> None:
    """By a process that nobody here knows of. It is what applications on the primary see: replicas get it."""
    primary, replica = pair(cluster)
    fill(primary, "wal")
    wait_same_position(primary, replica, NAME)
    position = primary.position(NAME)
    flip(primary, 10, 11, 40)
    if opened:  # it is looked at when SQLite makes a WAL on top of it
        with contextlib.closing(primary.connect(NAME)) as connection:
            rows = dump(connection)
        wait_until(lambda: primary.position(NAME) != position, "it is recorded")
    else:
        wait_until(lambda: "they are recorded as an application's" in primary.log_text(), "it is found")
        wait_until(lambda: metric(primary, "litefs_repairs") >= 1, "it is recorded")
        with contextlib.closing(primary.connect(NAME)) as connection:
            rows = dump(connection)
    wait_same_position(primary, replica, NAME)
    is_whole(primary, rows)
    is_whole(replica, rows)
    assert_same_bytes([primary, replica], NAME)
    assert metric(primary, "litefs_pages_healed") == 0


def test_bit_rot_on_the_primary_where_only_the_replica_has_the_page(cluster: Cluster, disk: RottenDisk) -> None:
    primary, replica = pair(cluster, disk, retention="100ms", **{"retention-monitor-interval": "100ms"})
    rows = fill(primary, "wal")
    with contextlib.closing(primary.connect(NAME)) as writer:
        writer.execute("create table u (x)")
        writer.execute("insert into u values (1)")
        writer.execute("pragma wal_checkpoint(truncate)")
        rows = dump(writer)
    wait_same_position(primary, replica, NAME)
    log = primary.data / "dbs" / NAME / "ltx"
    wait_until(lambda: len([name for name in os.listdir(log) if name.endswith(".ltx")]) == 1, "the log is short")
    rot(disk, primary, 10, 11, 40)
    healed(primary, 3)
    assert "source=replica" in primary.log_text()
    is_whole(primary, rows)
    wait_same_position(primary, replica, NAME)
    assert_same_bytes([primary, replica], NAME)


@pytest.mark.parametrize("passthrough", PASSTHROUGH)
@pytest.mark.parametrize("held", [True, False])
def test_bit_rot_on_a_replica(cluster: Cluster, passthrough: str, held: bool) -> None:
    primary, replica = pair(cluster)
    rows = fill(primary, "wal")
    wait_same_position(primary, replica, NAME)
    with contextlib.ExitStack() as stack:
        connection: sqlite3.Connection | None = None
        if held:
            connection = stack.enter_context(contextlib.closing(replica.connect(NAME)))
            connection.execute("select count(*) from t").fetchall()
        file = replica.data / "dbs" / NAME / "database"
        wait_until(lambda: file.read_bytes() == replica.export(NAME), "the replica has checkpointed")
        flip(replica, 10, 11, 40)
        if connection is not None:
            connection.execute("select sum(length(v)) from t").fetchall()
        healed(replica, 3)
        if connection is not None:
            assert dump(connection) == rows
    is_whole(replica, rows)
    assert_same_bytes([primary, replica], NAME)
    assert not (replica.data / "dbs" / NAME / "lost").exists()
