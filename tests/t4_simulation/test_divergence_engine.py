"""The real engine: nodes that take turns, and files that were damaged from outside. All heals by itself."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import shutil
import sqlite3
from pathlib import Path

import pytest
from real_nodes import Application, open_store
from test_replication_engine import Nodes

from pylitefs.cluster.recovery_wait import RecoveryWait
from pylitefs.engine.fence import Fence
from pylitefs.engine.lost import BASE, PAGES, TIP, Branch, branches
from pylitefs.engine.store import Store, StoreOptions
from pylitefs.engine.verifier import verify
from pylitefs.errors import DatabaseError, PositionMismatch
from pylitefs.events import EventBus
from pylitefs.formats.ltx.decoder import decode


def rows(path: str | Path) -> list[tuple[int, bytes]]:
    with contextlib.closing(sqlite3.connect(f"file:{path}?immutable=1", uri=True)) as db:
        return db.execute("SELECT id, v FROM t ORDER BY id").fetchall()


def rows_of(store: Store, folder: Path) -> list[tuple[int, bytes]]:
    copy = folder / "copy.db"
    store.find("a.db").copy_to(str(copy))
    return rows(copy)


def changed_places(nodes: Nodes, epoch: int) -> Application:
    """Both stop in order and start in the other role."""
    nodes.primary.close(clean=True)
    nodes.replica.close(clean=True)
    names = [Path(nodes.replica.data_dir), Path(nodes.primary.data_dir)]
    nodes.primary, nodes.replica = open_store(names[0], is_primary=True), open_store(names[1], is_primary=False)
    nodes.primary.note_epoch(epoch)
    return application(nodes.primary)


def application(store: Store) -> Application:
    app = Application.__new__(Application)
    app.store, app.name, app.database = store, "a.db", store.find("a.db")
    app.database.term = store.epoch
    return app


@contextlib.contextmanager
def two(folder: Path):  # type: ignore[no-untyped-def]
    nodes = Nodes(folder, 1)
    nodes.bad = False
    try:
        yield nodes
    finally:
        nodes.close()


async def diverged(
    nodes: Nodes, folder: Path, *, trim: bool = False, by: int = 2
) -> tuple[list[tuple[int, bytes]], Branch]:
    """(the rows with the branch, the branch) of a node that was the primary and whose last writes nobody got."""
    app = Application(nodes.primary, "a.db")
    for _ in range(5):
        app.insert(300)
    async with nodes.running():
        await nodes.until_equal()
    for _ in range(by):
        app.insert(200)
    app.run("UPDATE t SET v = x'0102' WHERE id = 2")
    if trim:
        app.database.log.retain(0, 1)
    left = rows_of(nodes.primary, folder)
    app = changed_places(nodes, 2)
    app.insert(100)
    app.run("UPDATE t SET v = x'0304' WHERE id = 4")
    async with nodes.running(epoch=2):
        await nodes.until_equal()
    (branch,) = branches(nodes.replica.data_dir)
    return left, branch


async def test_a_branch_is_kept_with_the_states_around_it(tmp_path: Path) -> None:
    with two(tmp_path) as nodes:
        left, branch = await diverged(nodes, tmp_path)
        assert (branch.database, branch.transactions, branch.epoch, branch.applied) == ("a.db", 3, 1, False)
        assert len(branch.files()) == 3
        tip, base = branch.path(TIP), branch.path(BASE)
        assert tip is not None and base is not None and branch.path(PAGES) is None
        assert rows(tip) == left
        assert [id for id, _ in rows(base)] == [1, 2, 3, 4, 5]
        assert {row for row in rows(base) if row[0] != 2} == {row for row in left if row[0] <= 5 and row[0] != 2}
        assert nodes.replica.find("a.db").log.epochs() == ((2, 7),)


async def test_a_branch_that_the_log_does_not_hold_is_kept_as_pages(tmp_path: Path) -> None:
    with two(tmp_path) as nodes:
        left, branch = await diverged(nodes, tmp_path, trim=True)
        path, tip = branch.path(PAGES), branch.path(TIP)
        assert branch.transactions >= 3  # where nothing older can be compared, all of them
        assert path is not None and tip is not None and rows(tip) == left
        ltx = decode(Path(path).read_bytes())
        state = tmp_path / "state.db"
        nodes.replica.find("a.db").copy_to(str(state))
        data = bytearray(state.read_bytes())
        size = ltx.header.page_size
        assert ltx.header.pre_apply_checksum == nodes.replica.find("a.db").position.checksum
        for pgno, page in ltx.pages:
            data[(pgno - 1) * size : pgno * size] = page
        state.write_bytes(data[: ltx.header.commit * size])
        assert rows(state) == left


async def test_a_large_database_keeps_its_branch_without_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pylitefs.engine.lost.COPY_MAX_BYTES", 4096)
    with two(tmp_path) as nodes:
        _, branch = await diverged(nodes, tmp_path)
        assert branch.path(TIP) is None and branch.path(PAGES) is not None and len(branch.files()) == 3


async def test_what_follows_the_head_is_given_back_while_the_primary_takes_writes(tmp_path: Path) -> None:
    with two(tmp_path) as nodes:
        app = Application(nodes.primary, "a.db")
        for _ in range(3):
            app.insert(300)
        async with nodes.running():
            await nodes.until_equal()
        for _ in range(4):
            app.insert(20_000)
        head, left = app.database.position, rows_of(nodes.primary, tmp_path)
        app = changed_places(nodes, 2)
        async with nodes.running(epoch=2):
            await nodes.until(lambda: app.database.position == head)
            await nodes.until_equal()
            after = await asyncio.to_thread(rows_of, nodes.primary, tmp_path)
        assert after == left and app.database.captures and not app.database.yields
        assert app.database.epoch == 1, "the giver's"
        assert branches(nodes.replica.data_dir) == []


async def test_what_only_the_log_has_lost_is_adopted_with_its_epoch(tmp_path: Path) -> None:
    """A power cut of a primary whose starts have epochs: the database has all of it, and so has the replica."""
    with two(tmp_path) as nodes:
        app = Application(nodes.primary, "a.db")
        app.insert(300)
        nodes.primary.begin_epoch(0)
        app.insert(300)
        app.insert(400)
        first = nodes.primary.epoch
        async with nodes.running(epoch=first):
            await nodes.until_equal()
        head, lost = app.database.position, app.database.log.entries()[-2:]
        nodes.primary.close(clean=False)
        for entry in lost:
            os.unlink(entry.path)
        (tmp_path / "primary" / "boot").write_text("another boot of the machine\n")
        nodes.primary = open_store(tmp_path / "primary", is_primary=True)
        nodes.primary.begin_epoch(nodes.primary.seen_epoch)
        assert nodes.primary.epoch > first
        app = application(nodes.primary)
        app.database.term = 0
        recovery = RecoveryWait(["a.db"], 10.0)
        async with nodes.running(recovery, epoch=nodes.primary.epoch):
            await recovery.wait()
            await asyncio.to_thread(nodes.primary.worker.submit(nodes.primary.settle).result)
            assert app.database.log.holds(head), "the epoch included"
            await asyncio.to_thread(app.insert, 100)
            await nodes.until_equal()
        assert app.database.epoch == nodes.primary.epoch
        assert branches(nodes.replica.data_dir) == []


async def test_what_a_start_recorded_is_kept_though_its_txid_and_epoch_are_others_too(tmp_path: Path) -> None:
    """A power cut took the log's entries of an epoch, not the database: the start records the difference under the
    first TXID of that epoch. The new primary went through another one, to which its log does not reach back."""
    with two(tmp_path) as nodes:
        app = Application(nodes.primary, "a.db")
        app.insert(300)
        nodes.primary.note_epoch(2)
        app.database.term = 2
        for _ in range(5):
            app.insert(300)
        async with nodes.running(epoch=2):
            await nodes.until_equal()
        app.insert(200)
        left = rows_of(nodes.primary, tmp_path)
        lost = [entry for entry in app.database.log.entries() if entry.header().epoch == 2]
        nodes.primary.close(clean=False)
        nodes.replica.close(clean=True)
        old, new = Path(nodes.primary.data_dir), Path(nodes.replica.data_dir)
        for entry in lost:
            os.unlink(entry.path)
        (old / "boot").write_text("another boot of the machine\n")
        (old / "primary").write_text('{"epoch": 2, "databases": null}\n')
        nodes.primary = open_store(new, is_primary=True)
        nodes.primary.note_epoch(3)
        app = application(nodes.primary)
        app.insert(100)
        app.database.log.retain(0, 1)
        nodes.replica = Store(str(old), EventBus(), StoreOptions(is_primary=False, role_from_marker=True))
        nodes.replica.load()
        nodes.replica.settle()
        nodes.replica.start()
        recorded = nodes.replica.find("a.db").position
        assert len(lost) == 6 and recorded.epoch == 2 and app.database.log.passed(recorded)
        async with nodes.running(epoch=3):
            await nodes.until_equal()
        (branch,) = branches(nodes.replica.data_dir)
        tip = branch.path(TIP)
        assert tip is not None and rows(tip) == left


# --- damage -----------------------------------------------------------------------------------------------------------


def flip(path: str, offset: int, bit: int = 4) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1 << bit]))


async def test_a_replica_that_is_set_aside_is_mended_in_silence(tmp_path: Path) -> None:
    """A WAL of something else stands beside the file when somebody opens it. No transaction comes that would tell."""
    with two(tmp_path) as nodes:
        app = Application(nodes.primary, "a.db")
        app.insert(300)
        async with nodes.running():
            await nodes.until_equal()
            copy = nodes.replica.find("a.db")
            assert nodes.replica.worker.submit(nodes.replica.apply.rest, copy).result()
            with contextlib.closing(sqlite3.connect(tmp_path / "other")) as other:
                other.execute("PRAGMA journal_mode = WAL")
                other.execute("CREATE TABLE other (a)")
                shutil.copyfile(tmp_path / "other-wal", copy.files.wal)
            with pytest.raises(PositionMismatch):
                nodes.replica.worker.submit(nodes.replica.apply.activate, copy).result()
            assert copy.set_aside_reason is not None
            await nodes.until(lambda: copy.set_aside_reason is None and copy.position == app.database.position)
            await nodes.until_equal()
            await asyncio.to_thread(verify, copy)


async def test_what_is_recorded_late_is_told_in_silence(tmp_path: Path) -> None:
    """A node has ceased to be the primary and follows the next one, and what an application held back is recorded only
    now: rows that nobody else has."""
    with two(tmp_path) as nodes:
        app = Application(nodes.primary, "a.db")
        app.insert(300)
        async with nodes.running():
            await nodes.until_equal()
            await asyncio.to_thread(nodes.replica.promote_database, "a.db", Fence(math.inf))
            late, before = application(nodes.replica), app.database.position.txid
            await asyncio.to_thread(late.insert, 200)
            assert await asyncio.to_thread(nodes.replica.demote_database, "a.db", 5.0)
            await nodes.until(lambda: app.database.position == late.database.position)  # it is taken
        assert app.database.position.txid == before + 1


@pytest.mark.parametrize("restart", [False, True])
async def test_a_damaged_file_of_a_replica_heals(tmp_path: Path, restart: bool) -> None:
    """Of pages that nobody writes any more; also if the node stops before it is connected."""
    with two(tmp_path) as nodes:
        app = Application(nodes.primary, "a.db")
        for _ in range(3):
            app.insert(9000)
        async with nodes.running():
            await nodes.until_equal()
        copy = nodes.replica.find("a.db")
        assert nodes.replica.worker.submit(nodes.replica.apply.rest, copy).result()
        for page in (2, 4):  # the same bit at the same place would not be seen: see `Position`
            flip(copy.files.database, page * copy.page_size + 100, page)
        seen: list[str] = []
        nodes.replica.events.subscribe(lambda event: seen.append(event.type))
        if restart:
            with pytest.raises(DatabaseError):
                verify(copy)
            nodes.replica.close(clean=True)
            nodes.replica = open_store(tmp_path / "replica", is_primary=False)
        async with nodes.running():
            await nodes.until(nodes.follower.ready.is_set)
            copy = nodes.replica.find("a.db")
            if not restart:
                with pytest.raises(DatabaseError):
                    await asyncio.to_thread(verify, copy)
                await nodes.until(lambda: "resync" in seen)
                assert seen.count("damaged") == 1
            await nodes.until(lambda: copy.position == app.database.position and not copy.is_damaged)
            await nodes.until_equal()
            await asyncio.to_thread(verify, copy)
        assert branches(nodes.replica.data_dir) == []


@pytest.mark.parametrize("place", ["header", "page", "trailer"])
async def test_a_damaged_log_entry_of_the_primary_stops_nothing(tmp_path: Path, place: str) -> None:
    with two(tmp_path) as nodes:
        app = Application(nodes.primary, "a.db")
        app.insert(500)
        async with nodes.running():
            await nodes.until_equal()
        app.insert(9000)
        entry = app.database.log.entries()[-1]
        flip(entry.path, {"header": 20, "page": 200, "trailer": os.path.getsize(entry.path) - 12}[place])
        app.insert(100)
        async with nodes.running():
            await nodes.until_equal()
            await asyncio.to_thread(app.insert, 100)
            await nodes.until_equal()
        assert branches(nodes.replica.data_dir) == []
