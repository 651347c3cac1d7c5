"""The real engine: pages that the disk of the primary has changed are found, and replaced by the right ones. What an
application wrote is not, however it was written.

Damage is made beneath the file system, where nobody writes the file: that needs root, and a loop device."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import pydoc
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pair import FAST
from real_nodes import Application
from test_divergence_engine import rows_of, two
from test_replication_engine import Nodes

from pylitefs.cluster.primary import Replicas
from pylitefs.cluster.roles import NodeIdentity
from pylitefs.engine import proof
from pylitefs.engine.database import Database
from pylitefs.engine.lost import branches
from pylitefs.engine.scrubber import Scrubber
from pylitefs.engine.verifier import verify
from pylitefs.errors import DatabaseError, LitefsError
from pylitefs.events import Event

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness.rot import RottenDisk

needs_root = pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/loop-control"), reason="needs root")
pytestmark = needs_root
DISK_BYTES = 64 << 20


class Rotten:
    """Two nodes whose files are on a disk that can be damaged."""

    def __init__(self, disk: RottenDisk, nodes: Nodes) -> None:
        self.disk, self.nodes = disk, nodes

    def damage(self, database: Database, *pages: int) -> None:
        """They were read right before: else nobody can tell that it was not an application."""
        scrub(self.nodes)
        for page in pages:
            self.disk.flip(database.files.database, (page - 1) * database.page_size + 100 + page, page % 8)


@pytest.fixture(autouse=True)
def tried_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pylitefs.cluster.healing.AGAIN_S", (0.1,))


@pytest.fixture
def rotten(tmp_path: Path) -> Iterator[Rotten]:
    disk = RottenDisk(tmp_path / "disk", DISK_BYTES)
    disk.path.mkdir()
    disk.attach()
    try:
        with two(disk.path) as nodes:
            yield Rotten(disk, nodes)
    finally:
        disk.detach()
        disk.image.unlink()


def scrub(nodes: Nodes) -> None:
    """Read everything once, and remember that it was right."""
    time.sleep(2 * proof.TICK_S)  # what was written in the same tick cannot be told apart
    done = threading.Event()
    nodes.primary.events.subscribe(lambda event: done.set() if event.type == "scrubbed" else None)
    scrubber = Scrubber(nodes.primary, 0.01, 0)
    scrubber.start()
    try:
        assert done.wait(30)
    finally:
        scrubber.stop()


def written(nodes: Nodes) -> Application:
    app = Application(nodes.primary, "a.db")
    for _ in range(5):
        app.insert(9000)
    return app


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
async def test_a_primary_heals_from_its_own_log(rotten: Rotten, tmp_path: Path, pages: tuple[int, ...]) -> None:
    """Nobody need be connected for that. What the log does not change is the database."""
    nodes = rotten.nodes
    app = written(nodes)
    left = rows_of(nodes.primary, tmp_path)
    before = app.database.position
    seen = seen_on(nodes)
    rotten.damage(app.database, *pages)
    async with nodes.running():
        await read_whole(app.database)
        await nodes.until(lambda: any(event.type == "healed" for event in seen))
        await asyncio.to_thread(verify, app.database)
        assert [dict(event.data) for event in seen if event.type == "healed"] == [
            {"pages": len(pages), "source": "log"}
        ]
        assert app.database.position == before
        assert app.database.captures and not app.database.is_damaged
        assert await asyncio.to_thread(rows_of, nodes.primary, tmp_path) == left
        await nodes.until_equal()
    assert branches(nodes.replica.data_dir) == []


async def test_a_primary_heals_from_a_replica_that_is_behind(rotten: Rotten, tmp_path: Path) -> None:
    """The log does not have the pages any more, and the replica comes later; it has another state, but those pages."""
    nodes = rotten.nodes
    app = written(nodes)
    async with nodes.running():
        await nodes.until_equal()
    app.insert(100)
    app.database.log.retain(0, 1)
    left = rows_of(nodes.primary, tmp_path)
    seen = seen_on(nodes)
    right = {pgno: page_of(app.database, pgno) for pgno in (4, 5, 6)}
    rotten.damage(app.database, *right)
    await read_whole(app.database)
    assert app.database.damage.keys() == right.keys()
    async with nodes.running():
        await nodes.until(lambda: any(event.type == "healed" for event in seen))
        assert [event.data["source"] for event in seen if event.type == "healed"] == ["replica"]
        await nodes.until_equal()
        assert await asyncio.to_thread(rows_of, nodes.primary, tmp_path) == left
    assert branches(nodes.replica.data_dir) == []


async def test_pages_of_a_liar_are_not_taken(rotten: Rotten, tmp_path: Path) -> None:
    nodes = rotten.nodes
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
    rotten.damage(app.database, 4)
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
    rotten: Rotten, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For as long as it takes until there is a replica: each time it would be the whole disk."""
    nodes = rotten.nodes
    app = written(nodes)
    app.insert(100)
    app.database.log.retain(0, 1)
    rotten.damage(app.database, 4)
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


async def test_damage_that_is_known_is_no_transaction(rotten: Rotten, tmp_path: Path) -> None:
    """A comparison of the whole database, which every transaction of this application is, leaves it out."""
    nodes = rotten.nodes
    app = written(nodes)
    right = page_of(app.database, 4)
    rotten.damage(app.database, 4)
    await read_whole(app.database)
    with contextlib.closing(sqlite3.connect(app.database.files.database)) as db:
        rowid = db.execute("SELECT max(id) FROM t").fetchone()[0]
    app.run("INSERT INTO t (v) VALUES (x'01')")
    assert app.database.is_damaged
    async with nodes.running():
        await nodes.until(lambda: not app.database.is_damaged)
        await nodes.until_equal()
        assert page_of(app.database, 4) == right
    with contextlib.closing(sqlite3.connect(app.database.files.database)) as db:
        assert db.execute("SELECT max(id) FROM t").fetchone()[0] == rowid + 1


async def test_a_damaged_table_is_not_taken_for_a_damaged_database(rotten: Rotten, tmp_path: Path) -> None:
    nodes = rotten.nodes
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


# -- what an application wrote is never "healed" -----------------------------------------------------------------------


def in_place(path: str, offset: int, change: Callable[[bytes], bytes]) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        os.pwrite(fd, change(os.pread(fd, 1, offset)), offset)
    finally:
        os.close(fd)


def other(byte: bytes) -> bytes:
    return bytes([byte[0] ^ 0x41])


def plainly(path: str, offset: int) -> None:
    in_place(path, offset, other)


def and_its_time_set_back(path: str, offset: int) -> None:
    before = os.stat(path)
    in_place(path, offset, other)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def through_a_mapping(path: str, offset: int) -> None:
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[offset] ^= 0x41


def by_a_copy_over_it(path: str, offset: int) -> None:
    content = bytearray(Path(path).read_bytes())
    content[offset] ^= 0x41
    with open(path, "wb") as file:
        file.write(content)


def by_a_rename(path: str, offset: int) -> None:
    """In the data directory."""
    content = bytearray(Path(path).read_bytes())
    content[offset] ^= 0x41
    Path(f"{path}.mine").write_bytes(content)
    os.rename(f"{path}.mine", path)


WRITERS = [plainly, and_its_time_set_back, through_a_mapping, by_a_copy_over_it, by_a_rename]
PAGE, PLACE = 4, 3 * 4096 + 2000


def byte_of(database: Database) -> bytes:
    return page_of(database, PAGE)[PLACE % 4096 :][:1]


async def ends_as_written(nodes: Nodes, app: Application, wrote: bytes, seen: list[Event]) -> None:
    """What the application wrote is in its file, in the log, and on the replica."""

    async def reached() -> bool:
        with contextlib.suppress(LitefsError):
            await asyncio.to_thread(verify, app.database)
        return byte_of(app.database) == wrote and not app.database.is_damaged

    async with asyncio.timeout(60):
        while not await reached():
            await asyncio.sleep(0.05)
    await nodes.until_equal()
    assert byte_of(app.database) == wrote
    await asyncio.to_thread(nodes.replica.find("a.db").copy_to, str(nodes.folder / "copy"))
    assert (nodes.folder / "copy").read_bytes()[PLACE : PLACE + 1] == wrote
    assert branches(nodes.replica.data_dir) == []


@pytest.mark.parametrize("how", WRITERS)
@pytest.mark.parametrize("was_read", [True, False])
async def test_what_an_application_wrote_past_us_is_recorded(
    rotten: Rotten, how: Callable[[str, int], None], was_read: bool
) -> None:
    """Whatever way, and also if all was read and sound right before."""
    nodes = rotten.nodes
    app = written(nodes)
    seen = seen_on(nodes)
    if was_read:
        scrub(nodes)
        assert app.database.sound.proves(PAGE, int(app.database.page_checksums()[PAGE - 1]))
    before = byte_of(app.database)
    how(app.database.files.database, PLACE)
    assert byte_of(app.database) == other(before)
    async with nodes.running():
        await asyncio.to_thread(scrub, nodes)
        await ends_as_written(nodes, app, other(before), seen)
    assert not [event for event in seen if event.type in ("damaged", "healed")]
    assert [event for event in seen if event.type == "repair"]


async def test_a_writer_that_has_it_open_all_the_time_proves_nothing(rotten: Rotten) -> None:
    """It may be in the middle of a write, or have the file mapped: then no time tells of what it stores."""
    nodes = rotten.nodes
    app = written(nodes)
    seen = seen_on(nodes)
    with open(app.database.files.database, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[PLACE] ^= 1
        memory[PLACE] ^= 1  # the page can be written from now on, without a sign
        scrub(nodes)
        wanted = int(app.database.page_checksums()[PAGE - 1])
        assert not app.database.sound.proves(PAGE, wanted)
        before = byte_of(app.database)
        memory[PLACE] ^= 0x41
        async with nodes.running():
            await asyncio.to_thread(scrub, nodes)
            await ends_as_written(nodes, app, other(before), seen)
    assert not [event for event in seen if event.type in ("damaged", "healed")]


async def test_damage_waits_while_an_application_has_the_file_open(rotten: Rotten) -> None:
    """A reader too: it may have the damaged page in its cache."""
    nodes = rotten.nodes
    app = written(nodes)
    seen = seen_on(nodes)
    rotten.damage(app.database, PAGE)
    async with nodes.running():
        with open(app.database.files.database, "rb") as file:
            damaged = page_of(app.database, PAGE)
            await read_whole(app.database)
            for _ in range(20):
                await asyncio.sleep(0.1)
                assert app.database.is_damaged and page_of(app.database, PAGE) == damaged
            assert file.readable()
        await nodes.until(lambda: not app.database.is_damaged)
        await asyncio.to_thread(verify, app.database)
        await nodes.until_equal()
    assert [event.data["source"] for event in seen if event.type == "healed"] == ["log"]


STEPS = {
    "Healing reads all of it": "pylitefs.engine.damage.find_damage",
    "the right pages are looked for": "pylitefs.engine.damage.logged_pages",
    "they are put in place": "pylitefs.engine.damage.mend",
    "what stands beside the file is looked at": "pylitefs.engine.damage.stands_alone",
    "the lease is taken": "pylitefs.engine.damage.alone_with",
    "the damaged page is read once more": "pylitefs.engine.damage.read_at",
    "the right page is written": "pylitefs.engine.damage.write_at",
    "it is read to see whether it is sound": "pylitefs.engine.damage.sound_pages",
}


@pytest.mark.parametrize(
    ("step", "when"),
    [*((step, "before") for step in STEPS), ("the lease is taken", "after"), (list(STEPS)[-1], "after")],
)
async def test_an_application_writes_between_any_two_steps_of_the_healing(
    rotten: Rotten, monkeypatch: pytest.MonkeyPatch, step: str, when: str
) -> None:
    """The very page that is damaged, past us. Where it is kept waiting it writes right afterwards; its write counts."""
    nodes = rotten.nodes
    app = written(nodes)
    seen = seen_on(nodes)
    rotten.damage(app.database, PAGE)
    original = pydoc.locate(STEPS[step])
    assert callable(original)
    writers: list[threading.Thread] = []
    wrote: list[bytes] = []

    def application() -> None:
        in_place(app.database.files.database, PLACE, lambda byte: wrote.append(b"\x2a") or b"\x2a")

    def at(now: str) -> None:
        if when == now and not writers:
            writers.append(threading.Thread(target=application))
            writers[0].start()
            writers[0].join(0.3)  # with the lease it waits until that is given back

    def stepped(*args: Any) -> Any:
        at("before")
        try:
            return original(*args)
        finally:
            at("after")

    monkeypatch.setattr(STEPS[step], stepped)
    async with nodes.running():
        await read_whole(app.database)
        await nodes.until(lambda: wrote)
        writers[0].join()
        await ends_as_written(nodes, app, b"\x2a", seen)
