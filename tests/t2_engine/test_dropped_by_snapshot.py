"""A replica that was away is told by an empty snapshot that a database was dropped. The process ends at any moment of
that, and the node may be the primary afterwards."""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path

import pytest
from crash_steps import Crash, Steppable
from engine_nodes import Node, closing_node, make_sqlite, new_primary

from pylitefs.formats.ltx.format import CHECKSUM_FLAG, Position
from pylitefs.ports import SUFFIXES

DROP = Position(8, CHECKSUM_FLAG, 3)


def replica_of(folder: Path, *, pruned: bool) -> Node:
    with closing_node(new_primary(folder / "from")) as source:
        node = Node(folder / "node", is_primary=False)
        for entry in source.database().log.entries():
            node.database().apply(Path(entry.path).read_bytes())
    node.database().durable()
    if pruned:
        node.database().log.retain(0, 1)
    return node


def ends_at(patch: pytest.MonkeyPatch, step: int) -> list[str]:
    steps = Steppable(step)
    for name in ("unlink", "rename", "pwrite", "ftruncate", "fsync"):
        patch.setattr(os, name, steps.wrap(name, getattr(os, name)))
    return steps.made


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("becomes", ["replica", "primary"])
def test_a_crash_leaves_the_old_copy_at_its_position_or_a_dropped_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, becomes: str, pruned: bool
) -> None:
    for step in itertools.count():
        folder = tmp_path / str(step)
        node = replica_of(folder, pruned=pruned)
        resync = node.database().resync(4096, None)
        ended = False
        with monkeypatch.context() as patch:
            made = ends_at(patch, step)
            with contextlib.suppress(Crash):
                resync.finish(0, DROP, ((3, 7),))
                ended = True
        node.close(clean=False)
        where = f"crash before step {step}, after {made}"
        with closing_node(Node(folder / "node", is_primary=becomes == "primary")) as again:
            again.store.settle()
            database = again.database()
            assert database.set_aside_reason is None, where
            if database.exists:
                assert not ended and database.position.txid < 3 and database.position.epoch <= 1, where
                continue
            assert database.position in (Position(0, 0), DROP) and again.store.names() == [], where
            assert database.position == DROP or not ended, where
            if becomes == "primary":  # the name is free
                make_sqlite(again.store.plain_path("db"))
                assert again.store.import_plain("db"), where
                assert database.position.txid == (9 if ended else database.position.txid), where
        if ended:
            break
    assert step > 8


@pytest.mark.parametrize("page_size", [4096, 1024])
def test_the_mount_is_told_when_it_has_gone(tmp_path: Path, page_size: int) -> None:
    """Of the name of each of its files. An empty snapshot says any page size."""
    with closing_node(replica_of(tmp_path, pruned=False)) as node:
        database, told = node.database(), list[tuple[str, bool]]()

        class Told:
            def changed(self, name: str) -> None:
                told.append((name, database.exists or os.path.exists(database.files.database)))

        node.apply.notifier = Told()  # type: ignore[assignment]
        database.resync(page_size, None).finish(0, DROP, ((3, 7),))
        assert set(told) == {("db" + suffix, False) for suffix in ("", *SUFFIXES)}


def test_a_file_that_is_missing_is_not_a_drop(tmp_path: Path) -> None:
    """Though the node had begun, as a replica, to take over what its primary has of it."""
    node = replica_of(tmp_path, pruned=True)
    database = node.database()
    database.log.restart_at(database.position)  # its copy came by a snapshot
    database.unclean()
    database._write_unclean()
    node.close(clean=False)
    os.unlink(database.files.database)
    for entry in os.listdir(database.files.ltx):
        os.unlink(os.path.join(database.files.ltx, entry))
    with closing_node(Node(tmp_path / "node", is_primary=False)) as replica:
        assert replica.database().position.txid == 1 and not replica.database().commit
        replica.database().unclean()
        replica.database()._write_unclean()
        replica.close(clean=False)
    with closing_node(Node(tmp_path / "node")) as primary:
        primary.store.settle()
        assert "is missing" in (primary.database().set_aside_reason or "")
