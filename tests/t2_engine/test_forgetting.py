"""Dropped databases of which only a tombstone is left: what stays, what a crash leaves, and names that come back."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from crash_steps import Crash, Steppable
from engine_nodes import Node, check_log, closing_node, make_sqlite, rows_of

from harness.interleaver import Steps, sweep
from pylitefs.engine import commit_points, forgetting, naming, registry, tombstones
from pylitefs.engine.tombstones import Tombstone, Tombstones
from pylitefs.engine.transaction import TransactionWriter
from pylitefs.formats.ltx.format import CHECKSUM_FLAG, Position
from pylitefs.ports import Moved

SEED = int(os.environ.get("PYLITEFS_TEST_SEED", time.time_ns() % 1_000_000))
WAIT_S = 10
HOUR_S = 3600.0


def make(node: Node, name: str = "db") -> Position:
    make_sqlite(node.store.plain_path(name))
    assert node.store.import_plain(name)
    return node.database(name).position


def drop(node: Node, name: str = "db") -> Position:
    database = node.database(name)
    node.store.worker.submit(node.store.naming.drop, database).result(WAIT_S)
    return database.position


def forget_now(node: Node, after_s: float = HOUR_S) -> None:
    """What the retention does when so much time has gone by. On the test's thread, with the jobs that follow."""
    with pytest.MonkeyPatch.context() as patch:
        clocks = SimpleNamespace(time=lambda: time.time() + after_s, monotonic=lambda: time.monotonic() + after_s)
        node.store.forgetting.forget_old()  # those without a log are seen for the first time
        patch.setattr(forgetting, "time", clocks)
        node.store.forgetting.forget_old()


def forget(node: Node, after_s: float = HOUR_S) -> None:
    if node.store.is_primary:
        node.store.worker.submit(forget_now, node, after_s).result(WAIT_S)
        node.store.worker.submit(lambda: None).result(WAIT_S)
    else:
        forget_now(node, after_s)


def folder(node: Node, name: str = "db") -> str:
    return os.path.join(node.store.databases_dir, name)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with closing_node(Node(tmp_path / "primary")) as node:
        yield node


def primary_with_drop(path: Path) -> Node:
    node = Node(path)
    node.store.note_epoch(5)
    assert make(node).txid == 1 and drop(node).txid == 2
    return node


def test_only_a_tombstone_stays_of_what_was_dropped_long_ago(tmp_path: Path) -> None:
    """On the primary and on a replica; what comes after it goes on from there, and is replicated."""
    with (
        closing_node(primary_with_drop(tmp_path / "a")) as node,
        closing_node(Node(tmp_path / "b", is_primary=False)) as replica,
    ):
        for entry in node.database().log.entries():
            replica.database().apply(Path(entry.path).read_bytes())
        end = node.database().position
        for each in (node, replica):
            forget(each, after_s=HOUR_S / 10)
            assert os.path.exists(folder(each)), "younger than the retention"
            forget(each)
            assert not os.path.exists(folder(each)) and each.store.get("db") is None and each.store.all_names() == []
            assert each.store.tombstone("db") == Tombstone(end, ((5, 1),))
            assert each.store.has_databases and each.store.seen_epoch == 5
        assert make(node) == node.database().log.head and node.database().position.txid == 3
        check_log(node.database())
        (entry,) = node.database().log.entries()
        assert replica.database().position == end
        assert replica.database().apply(Path(entry.path).read_bytes()) == node.database().position
        assert node.database().log.epochs() == replica.database().log.epochs() == ((5, 1),)
        assert len(rows_of(replica.database().files.database)) == 3
        assert drop(node).txid == 4
        forget(node)
        assert make(node).txid == 5


@pytest.mark.parametrize("clean", [True, False])
def test_a_start_reads_tombstones(tmp_path: Path, clean: bool) -> None:
    node = primary_with_drop(tmp_path)
    forget(node)
    node.close(clean=clean)
    with closing_node(Node(tmp_path)) as again:
        again.store.settle()
        assert again.store.all_names() == [] and os.listdir(again.store.databases_dir) == []
        assert again.store.has_databases and again.store.seen_epoch == 5
        recalled = again.store.recall("db")
        assert recalled is not None and recalled.log.epochs() == ((5, 1),) and recalled.position.txid == 2
        assert make(again).txid == 3
        check_log(again.database())
        again.close()
    with closing_node(Node(tmp_path)) as again:
        again.store.settle()
        assert again.database().position.txid == 3 and len(rows_of(again.database().files.database)) == 3
        assert again.database().log.epochs() == ((5, 1),)


@pytest.mark.parametrize("appends", [False, True])
@pytest.mark.parametrize("is_primary", [True, False])
def test_a_crash_between_any_two_steps_leaves_the_position(tmp_path: Path, appends: bool, is_primary: bool) -> None:
    for step in itertools.count():
        base = tmp_path / str(step)
        node = primary_with_drop(base)
        if appends:  # to a file of tombstones that is there
            make(node, "other")
            drop(node, "other")
            node.database().log.pin(0)
            forget(node)
            node.database().log._pins.clear()
        steps = Steppable(step, "unlink", "rmdir", "fsync", "rename")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(forgetting, "os", steps)
            patch.setattr(tombstones, "os", steps)
            patch.setattr(tombstones, "publish_file", steps.wrap("publish", tombstones.publish_file))
            patch.setattr(tombstones, "write_at", steps.wrap("write", tombstones.write_at))
            with contextlib.suppress(Crash):
                forget(node)
        ended = len(steps.made) < step
        steps.step = 1 << 60  # what is removed in a thread was not to be removed, and may be
        node.close(clean=False)
        where = f"crash before step {step}, after {steps.made}"
        with closing_node(Node(base, is_primary=is_primary)) as again:
            again.store.settle()
            assert again.store.names() == [] and not again.store.not_replicated(), where
            database = again.store.recall("db")
            assert database is not None, where
            assert database.set_aside_reason is None and database.log.head == database.position, where
            assert database.position.is_at(Position(2, CHECKSUM_FLAG, 5)), where
            assert database.log.epochs() == ((5, 1),), where
            forget(again)
            assert not os.path.exists(folder(again)), where
            if is_primary:
                assert make(again).txid == 3, where
                check_log(again.database())
        if ended:
            break
    assert step >= 2 + appends


@pytest.mark.parametrize("linked", [False, True])
def test_a_name_that_came_back_begins_after_the_tombstone_also_after_a_crash(tmp_path: Path, linked: bool) -> None:
    """Its folder is there, perhaps with the file, and the log has nothing yet."""
    node = primary_with_drop(tmp_path)
    forget(node)
    make_sqlite(node.store.plain_path("db"))

    def crash(*_: object, **more: object) -> None:
        raise Crash

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransactionWriter if linked else naming.Naming, "write" if linked else "_link_to_database", crash)
        with contextlib.suppress(Crash):
            node.store.import_plain("db")
    node.close(clean=False)
    assert os.path.exists(folder(node)) and os.path.exists(os.path.join(folder(node), "database")) == linked
    with closing_node(Node(tmp_path)) as again:
        again.store.settle()
        assert again.database().position.txid == 3 and len(rows_of(again.database().files.database)) == 3
        assert again.database().log.epochs() == ((5, 1),) and again.database().set_aside_reason is None
        check_log(again.database())


def test_what_is_in_use_is_not_forgotten(node: Node) -> None:
    make(node)
    end = drop(node)
    database = node.database()

    def stays() -> None:
        forget(node)
        assert node.store.get("db") is database and os.path.exists(database.files.ltx)

    with database.log.pin(0):
        stays()
    database.app_handles = 1
    stays()
    database.app_handles = 0
    database.rollback.suspect = True
    stays()
    database.rollback.clear()
    node.store.forgetting.needs_drop = lambda name: True
    stays()
    node.store.forgetting.needs_drop = lambda name: False
    lost = Path(database.files.lost, "20260101T000000")
    lost.mkdir(parents=True)
    stays()
    lost.rmdir()
    for name in ("database", "moved", "redo", "something"):
        path = Path(database.files.folder, name)
        path.touch()
        stays()
        path.unlink()
    with database.lock:  # somebody else is at it
        done = node.store.worker.submit(forget_now, node)
        done.result(WAIT_S)
    assert node.store.get("db") is database
    forget(node)
    assert node.store.get("db") is None and node.store.tombstone("db") == Tombstone(end)


def test_a_snapshot_on_its_way_keeps_what_was_dropped(tmp_path: Path, node: Node) -> None:
    """On the replica, where it comes in pieces, with the worker's other jobs in between."""
    make(node)
    drop(node)
    with closing_node(Node(tmp_path / "replica", is_primary=False)) as replica:
        for entry in node.database().log.entries():
            replica.database().apply(Path(entry.path).read_bytes())
        make(node)
        database = replica.database()
        resync = database.resync(4096, None)
        data = Path(node.database().files.database).read_bytes()
        resync.pages([(at // 4096 + 1, data[at : at + 4096]) for at in range(0, len(data), 4096)])
        forget(replica)
        at = node.database().position
        assert resync.finish(len(data) // 4096, at, ()) == at and replica.database() is database
        drop(node)
        newest = node.database().log.entries()[-1]
        incoming = database.receive(newest.min_txid, newest.max_txid)
        forget(replica)
        incoming.write(Path(newest.path).read_bytes())
        assert incoming.finish() == node.database().position == replica.database().position
        forget(replica)
        assert replica.store.get("db") is None


def test_who_has_the_old_object_records_nothing(node: Node) -> None:
    make(node)
    drop(node)
    old = node.database()
    forget(node)
    make(node)
    with pytest.raises(OSError, match="dropped long ago"):
        node.store.naming.record_drop(old)
    assert node.database().exists and node.database() is not old


# -- the name comes back at any moment --------------------------------------------------------------------------------


def came_back(node: Node) -> None:
    for _ in range(2):
        assert node.database().position.txid == 3 and node.database().exists
        check_log(node.database())
        assert len(rows_of(node.database().files.database)) == 3
        assert os.listdir(node.store.plain_dir) == []
        node.close()
        node = Node(Path(node.store.data_dir))
        node.store.settle()
    node.close()


def made_again_while_it_is_forgotten(steps: Steps, path: Path) -> None:
    node = primary_with_drop(path)
    with closing_node(node):
        make_sqlite(node.store.plain_path("db"))
        steps.actions(steps.aside(lambda: node.store.import_plain("db")))
        with steps.on_worker(node.store.worker):
            forget(node)
        steps.finish()
        came_back(node)


def forgotten_while_it_is_made_again(steps: Steps, path: Path) -> None:
    node = primary_with_drop(path)
    with closing_node(node):
        make_sqlite(node.store.plain_path("db"))
        steps.actions(steps.aside(lambda: forget(node)))
        with steps.here():
            assert node.store.import_plain("db")
        steps.finish()
        came_back(node)


@pytest.mark.parametrize("scenario", [made_again_while_it_is_forgotten, forgotten_while_it_is_made_again])
def test_a_name_comes_back_between_any_two_steps(tmp_path: Path, scenario: Callable[[Steps, Path], None]) -> None:
    numbers = itertools.count()
    modules = {
        made_again_while_it_is_forgotten: [forgetting, tombstones, registry],
        forgotten_while_it_is_made_again: [naming, registry, commit_points],
    }[scenario]
    assert sweep(lambda steps: scenario(steps, tmp_path / str(next(numbers))), modules, stride=4, seed=SEED) > 20


# -- the file ----------------------------------------------------------------------------------------------------------

STONES = {
    "a": Tombstone(Position(7, CHECKSUM_FLAG, 3), ((2, 4), (3, 7))),
    "line\nbreak": Tombstone(Position(1 << 60, CHECKSUM_FLAG, 0)),
    "caf\udce9.db": Tombstone(Position(2, CHECKSUM_FLAG, 1)),
}


def read(path: Path) -> dict[str, Tombstone]:
    stones = Tombstones(str(path))
    stones.load()
    return stones.copy()


def test_tombstones_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert read(tmp_path) == {}
    stones = Tombstones(str(tmp_path))
    for name, stone in STONES.items():  # the first writes the file, the others append
        stones.put({name: stone})
        stones.save()
    assert read(tmp_path) == STONES and stones.epoch == 3
    newer = Tombstone(Position(9, CHECKSUM_FLAG, 3), ((2, 4), (3, 7)), Moved("b", 1, 8))
    stones.put({"a": newer, "caf\udce9.db": None})
    assert read(tmp_path) == STONES
    stones.save()
    assert read(tmp_path) == {"a": Tombstone(newer.position, newer.epochs), "line\nbreak": STONES["line\nbreak"]}
    assert stones.get("a") == newer


@pytest.mark.parametrize("lost", range(1, 24, 3))
def test_a_line_that_is_torn_does_not_count_and_harms_no_other(tmp_path: Path, lost: int) -> None:
    stones = Tombstones(str(tmp_path))
    stones.put(STONES)
    stones.save()
    path = tmp_path / "tombstones"
    data = path.read_bytes()
    path.write_bytes(data[:-lost])
    left = read(tmp_path)
    assert left == {name: stone for name, stone in STONES.items() if name in left}
    assert set(STONES) - set(left) <= {"caf\udce9.db"}
    path.write_bytes(data[:8] + bytes(4) + data[12:-lost])
    again = Tombstones(str(tmp_path))
    again.load()
    again.put({"new": STONES["a"]})
    again.save()
    assert read(tmp_path) == {**again.copy()} and "new" in again and "line\nbreak" in again


def test_a_write_that_fails_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stones = Tombstones(str(tmp_path))
    stones.put({"a": STONES["a"]})
    stones.save()
    with monkeypatch.context() as patch:

        def half(fd: int, data: bytes, offset: int) -> None:
            os.pwrite(fd, data[:10], offset)
            raise OSError(28, "No space left on device")

        patch.setattr(tombstones, "write_at", half)
        stones.put({"b": STONES["a"]})
        with pytest.raises(OSError, match="No space"):
            stones.save()
    assert read(tmp_path) == {"a": STONES["a"]}
    stones.put({"c": STONES["a"]})
    stones.save()
    assert read(tmp_path) == dict.fromkeys("abc", STONES["a"])


def test_the_file_does_not_grow_with_a_name_that_comes_and_goes(tmp_path: Path) -> None:
    stones = Tombstones(str(tmp_path))
    for txid in range(1, 2100):
        stones.put({"a": Tombstone(Position(txid, CHECKSUM_FLAG, 1))})
        stones.save()
    assert (tmp_path / "tombstones").read_bytes().count(b"\n") < 1100
    assert read(tmp_path)["a"].position.txid == 2099
