"""The real engine: pages that the disk of the primary has changed are found, and replaced by the right ones."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from pathlib import Path

import pytest
from pair import FAST
from real_nodes import Application
from test_divergence_engine import flip, rows_of, two
from test_replication_engine import Nodes

from pylitefs.cluster.primary import Replicas
from pylitefs.cluster.roles import NodeIdentity
from pylitefs.engine.database import Database
from pylitefs.engine.lost import branches
from pylitefs.engine.verifier import verify
from pylitefs.errors import DatabaseError
from pylitefs.events import Event


def written(nodes: Nodes) -> Application:
    app = Application(nodes.primary, "a.db")
    for _ in range(5):
        app.insert(9000)
    return app


def damage(database: Database, *pages: int) -> None:
    for page in pages:
        flip(database.files.database, (page - 1) * database.page_size + 100 + page, page % 8)


def seen_on(nodes: Nodes) -> list[Event]:
    seen: list[Event] = []
    nodes.primary.events.subscribe(seen.append)
    return seen


def page_of(database: Database, pgno: int) -> bytes:
    with open(database.files.database, "rb") as file:
        file.seek((pgno - 1) * database.page_size)
        return file.read(database.page_size)


async def read_whole(database: Database) -> None:
    with pytest.raises(DatabaseError):
        await asyncio.to_thread(verify, database)


@pytest.mark.parametrize("pages", [(2, 4), (1,)])
async def test_a_primary_heals_from_its_own_log(tmp_path: Path, pages: tuple[int, ...]) -> None:
    """Nobody need be connected for that. What the log does not change is the database."""
    with two(tmp_path) as nodes:
        app = written(nodes)
        left = rows_of(nodes.primary, tmp_path)
        before = app.database.position
        seen = seen_on(nodes)
        damage(app.database, *pages)
        async with nodes.running():
            await read_whole(app.database)
            await nodes.until(lambda: any(event.type == "healed" for event in seen))
            await asyncio.to_thread(verify, app.database)
            assert [dict(event.data) for event in seen if event.type == "healed"] == [
                {"pages": len(pages), "source": "log"}
            ]
            assert app.database.position.checksum == before.checksum
            assert app.database.captures and not app.database.is_damaged
            assert await asyncio.to_thread(rows_of, nodes.primary, tmp_path) == left
            await nodes.until_equal()
        assert branches(nodes.replica.data_dir) == []


async def test_a_primary_heals_from_a_replica_that_is_behind(tmp_path: Path) -> None:
    """The log does not have the pages any more, and the replica comes later; it has another state, but those pages."""
    with two(tmp_path) as nodes:
        app = written(nodes)
        async with nodes.running():
            await nodes.until_equal()
        app.insert(100)
        app.database.log.retain(0, 1)
        left = rows_of(nodes.primary, tmp_path)
        seen = seen_on(nodes)
        right = {pgno: page_of(app.database, pgno) for pgno in (4, 5, 6)}
        damage(app.database, *right)
        await read_whole(app.database)
        assert app.database.damage.keys() == right.keys()
        async with nodes.running():
            await nodes.until(lambda: any(event.type == "healed" for event in seen))
            assert [event.data["source"] for event in seen if event.type == "healed"] == ["replica"]
            await nodes.until_equal()
            assert await asyncio.to_thread(rows_of, nodes.primary, tmp_path) == left
        assert branches(nodes.replica.data_dir) == []


async def test_pages_of_a_liar_are_not_taken(tmp_path: Path) -> None:
    with two(tmp_path) as nodes:
        app = written(nodes)
        async with nodes.running():
            await nodes.until_equal()
        app.database.log.retain(0, 1)
        honest = nodes.replica.sound_pages
        answers = 0

        def lie(name: str, pgnos: tuple[int, ...]) -> list[tuple[int, bytes]]:
            nonlocal answers
            answers += 1
            return [(pgno, page[:-1] + b"!") for pgno, page in honest(name, pgnos)]

        nodes.replica.sound_pages = lie  # type: ignore[method-assign, assignment]
        damage(app.database, 4)
        before = app.database.position
        async with nodes.running():
            await read_whole(app.database)
            await nodes.until(lambda: answers)
            await read_whole(app.database)
            assert app.database.position == before and app.database.is_damaged
            nodes.replica.sound_pages = honest  # type: ignore[method-assign]
            await nodes.until(lambda: not app.database.is_damaged)
            await asyncio.to_thread(verify, app.database)


async def test_a_page_that_nobody_has_is_looked_for_without_reading_all_of_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For as long as it takes until there is a replica: each time it would be the whole disk."""
    with two(tmp_path) as nodes:
        app = written(nodes)
        app.insert(100)
        app.database.log.retain(0, 1)
        damage(app.database, 4)
        await read_whole(app.database)
        read, asked = nodes.primary.find_damage, nodes.primary.logged_pages
        reads, tries = list[str](), list[str]()
        monkeypatch.setattr("pylitefs.cluster.healing.AGAIN_S", (0.01,))
        monkeypatch.setattr(nodes.primary, "find_damage", lambda name: [reads.append(name), read(name)][1])
        monkeypatch.setattr(nodes.primary, "logged_pages", lambda *of: [tries.append(of[0]), asked(*of)][1])
        identity = NodeIdentity(1, "db1")
        async with Replicas(nodes.primary, identity, timings=FAST, epoch=1):
            await nodes.until(lambda: len(tries) > 5)
        assert len(reads) == 1 and app.database.is_damaged


async def test_damage_that_is_known_is_no_transaction(tmp_path: Path) -> None:
    """A comparison of the whole database, which every transaction of this application is, leaves it out."""
    with two(tmp_path) as nodes:
        app = written(nodes)
        right = page_of(app.database, 4)
        damage(app.database, 4)
        await read_whole(app.database)
        with contextlib.closing(sqlite3.connect(app.database.files.database)) as db:
            rowid = db.execute("SELECT max(id) FROM t").fetchone()[0]
        app.run("INSERT INTO t (v) VALUES (x'01')")
        assert app.database.is_damaged
        async with nodes.running():
            await nodes.until(lambda: not app.database.is_damaged)
            await nodes.until_equal()
            assert page_of(nodes.replica.find("a.db"), 4) == right
        with contextlib.closing(sqlite3.connect(app.database.files.database)) as db:
            assert db.execute("SELECT max(id) FROM t").fetchone()[0] == rowid + 1


async def test_a_damaged_table_is_not_taken_for_a_damaged_database(tmp_path: Path) -> None:
    with two(tmp_path) as nodes:
        app = written(nodes)
        seen = seen_on(nodes)
        before = app.database.position
        with app.database.lock:
            app.database.table.values[3] ^= 8
        async with nodes.running():
            await read_whole(app.database)
            await nodes.until(lambda: any(event.type == "healed" for event in seen))
            assert [event.data["source"] for event in seen if event.type == "healed"] == ["table"]
            await asyncio.to_thread(verify, app.database)
            await nodes.until_equal()
        assert app.database.position == before
