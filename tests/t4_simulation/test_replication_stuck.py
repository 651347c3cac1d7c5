"""One database of a replica that cannot be written, beside others; two questions for one database at once."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from memory_link import Wire
from pair import FAST, Pair
from real_nodes import Application
from test_replication_engine import Nodes

from pylitefs.cluster.backoff import Backoff
from pylitefs.cluster.channel import Channel
from pylitefs.cluster.ports import Link, LinkClosed
from pylitefs.cluster.replica import IN_FLIGHT_BYTES, Replica
from pylitefs.cluster.roles import NodeIdentity
from pylitefs.engine.replica_wal import ReplicaWal
from pylitefs.formats.ltx.format import Position
from pylitefs.formats.stream import (
    MAX_CHECKSUMS,
    PROTOCOL_VERSION,
    Checksums,
    Databases,
    Heartbeat,
    Hello,
    Message,
    Resync,
    SendChecksums,
    Sender,
    Welcome,
)
from pylitefs.formats.stream_fields import ResyncReason


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path)
    yield made
    made.close()


async def test_a_database_that_an_old_process_holds_does_not_stop_the_others(tmp_path: Path) -> None:
    """As after kill -9 of the replica's daemon while an application has a.db open."""
    nodes = Nodes(tmp_path, 1)
    nodes.bad = False
    try:
        held, other = Application(nodes.primary, "a.db"), Application(nodes.primary, "b.db")
        async with nodes.running():
            await nodes.until_equal()
            copy = nodes.replica.find("a.db")
            before = copy.position
            copy.is_busy = True
            sent = 0
            while sent <= IN_FLIGHT_BYTES:  # more than may wait on the replica
                await asyncio.to_thread(held.insert, 700_000)
                sent += 700_000
            for _ in range(5):
                await asyncio.to_thread(other.insert, 100)
            await nodes.until(lambda: nodes.replica.find("b.db").position == other.database.position)
            assert copy.position == before
            assert nodes.follower.ready.is_set()
            copy.is_busy = False
            await nodes.until_equal()
            await asyncio.to_thread(held.insert, 100)
            await nodes.until_equal()
            assert len(nodes.wires) == 1
    finally:
        nodes.close()


async def test_a_database_that_cannot_be_written_does_not_stop_the_others(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = True

    async with pair.running():
        pair.write("a.db", 1)
        pair.write("b.db", 1)
        await pair.until_equal()
        copy = pair.replica.databases["a.db"]
        apply = copy.apply

        def fail(data: bytes, *, spare_readers: bool) -> Position:
            if broken:
                raise OSError(errno.EIO, "Input/output error")
            return apply(data)

        monkeypatch.setattr(copy, "apply", fail)
        source = pair.primary.databases["a.db"]
        for _ in range(3):
            pair.write("a.db", 30, pages=200, size=400, noise=True)
            head = pair.write("b.db", 1).position
            await pair.until(lambda head=head: pair.replica.databases["b.db"].position == head)  # type: ignore[misc]
        assert copy.position.txid == 1 < source.position.txid
        broken = False
        await pair.until_equal()
        pair.write("a.db", 1)
        await pair.until_equal()
    assert [event.type for event in pair.replica.seen if event.type.startswith("disk")] == []
    assert len(pair.wires) == 1


async def test_checksums_for_two_questions_do_not_mix(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The primary refuses checksums that are not the next ones of the newest RESYNC."""
    pair.replica.cluster_id = pair.primary.cluster_id
    assert pair.replica.cluster_id is not None
    copy = pair.replica.get_or_create("a.db")
    copy.write({1: bytes(copy.page_size)})
    sums = np.arange(1, 5 * MAX_CHECKSUMS, dtype=np.uint64)
    monkeypatch.setattr(copy, "page_checksums", lambda: sums)
    wire = Wire(pair.rng)

    async def connect() -> Link:
        return wire.ends[0]

    replica = Replica(
        pair.replica, NodeIdentity(2, "db2"), connect, timings=FAST, backoff=Backoff(0.01, 0.05, pair.rng)
    )
    task = asyncio.ensure_future(replica.run())
    primary = Channel(wire.ends[1], Sender.REPLICA)
    seen: list[Message] = []
    try:
        await primary.expect(Hello, 5)
        await primary.expect(Databases, 5)
        await primary.send(Welcome(PROTOCOL_VERSION, pair.replica.cluster_id, 1, "db1", 1))
        for _ in range(2):
            await primary.send(SendChecksums("a.db", ResyncReason.LOG_TOO_SHORT))
        at: tuple[int, int] | None = None
        while at != (2, len(sums)):
            async with asyncio.timeout(10):
                message, _ = await primary.receive(5)
            if isinstance(message, Resync):
                at = (message.request, 0)
            elif isinstance(message, Checksums):
                seen.append(message)
                assert at is not None and (message.request, message.first_pgno) == (at[0], at[1] + 1)
                at = (at[0], at[1] + len(message.array))
            else:
                await primary.send(Heartbeat(0))
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert len([message for message in seen if isinstance(message, Checksums) and message.request == 2]) == 5


def vacuum(app: Application, page_size: int) -> None:
    """Give a database another page size."""
    with app.database.lock:
        with contextlib.closing(sqlite3.connect(app.database.files.database)) as db:
            db.execute("PRAGMA journal_mode = MEMORY")
            db.execute(f"PRAGMA page_size = {page_size}")
            db.execute("VACUUM")
        app.database.rollback.suspect = True
        app.store.capture.commit_point(app.database)


class Readers:
    """Of databases of the replica: whether somebody is in a read transaction, and how often that was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        self.reading = set(names)
        self.asked: Counter[str] = Counter()
        lock = ReplicaWal.lock_readers_out

        def lock_readers_out(wal: ReplicaWal) -> bool:
            name = wal._files.name
            self.asked[name] += 1
            return name not in self.reading and lock(wal)

        monkeypatch.setattr(ReplicaWal, "lock_readers_out", lock_readers_out)


@contextlib.asynccontextmanager
async def with_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: Iterable[str] = ("a.db",), wait_s: float = 60.0
) -> AsyncIterator[tuple[Nodes, dict[str, Application], Readers]]:
    """All of them, and other.db, are on both nodes; the replica's have readers."""
    monkeypatch.setattr("pylitefs.cluster.applier.READERS_S", wait_s)
    nodes = Nodes(tmp_path, 1)
    nodes.bad = False
    readers = Readers(monkeypatch, *names)
    try:
        apps = {name: Application(nodes.primary, name) for name in (*names, "other.db")}
        async with nodes.running():
            await nodes.until_equal()
            yield nodes, apps, readers
    finally:
        nodes.close()


async def test_databases_that_wait_for_readers_do_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than may be nested on the worker. Nobody waits there: an open is answered, also of those that wait."""
    names = [f"{number}.db" for number in range(12)]
    async with with_readers(tmp_path, monkeypatch, names) as (nodes, apps, readers):
        for name in names:
            await asyncio.to_thread(vacuum, apps[name], 8192)
        await nodes.until(lambda: all(readers.asked[name] > 1 for name in names))
        copy, other = nodes.replica.find("other.db"), apps["other.db"]
        for _ in range(3):
            await asyncio.to_thread(other.insert, 100)
            await nodes.until(lambda: copy.position == other.database.position)
        await nodes.until(lambda: copy.durable_txid == copy.position.txid)
        opened: list[BaseException | None] = []
        for name in (*names, "other.db"):
            nodes.replica.apply.before_open(nodes.replica.find(name), opened.append)
        await nodes.until(lambda: opened == [None] * 13)
        assert {nodes.replica.find(name).page_size for name in names} == {4096}
        readers.reading.clear()
        await nodes.until_equal()
        assert len(nodes.wires) == 1


async def test_what_comes_after_a_page_size_change_that_waits_is_applied_and_nothing_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small ones and one that comes in pieces, another page size once more; in place, as soon as nobody reads."""
    async with with_readers(tmp_path, monkeypatch) as (nodes, apps, readers):
        copy, inode = nodes.replica.find("a.db"), os.stat(nodes.replica.find("a.db").files.database).st_ino
        seen: list[str] = []
        nodes.replica.events.subscribe(lambda event: seen.append(event.type))
        for act in (
            lambda: vacuum(apps["a.db"], 8192),
            lambda: apps["a.db"].insert(100),
            lambda: apps["a.db"].insert(700_000),
            lambda: vacuum(apps["a.db"], 1024),
            lambda: apps["a.db"].insert(100),
        ):
            await asyncio.to_thread(act)
        await nodes.until(lambda: readers.asked["a.db"] > 1)
        assert copy.page_size == 4096
        readers.reading.clear()
        await nodes.until_equal()
        assert os.stat(copy.files.database).st_ino == inode and copy.page_size == 1024
        assert "resync" not in seen and len(nodes.wires) == 1


async def test_a_reader_that_stays_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with with_readers(tmp_path, monkeypatch, wait_s=0.05) as (nodes, apps, readers):
        inode = os.stat(nodes.replica.find("a.db").files.database).st_ino
        await asyncio.to_thread(apps["a.db"].insert, 700_000)
        await asyncio.to_thread(vacuum, apps["a.db"], 8192)
        await asyncio.to_thread(apps["a.db"].insert, 100)
        await nodes.until_equal()
        assert os.stat(nodes.replica.find("a.db").files.database).st_ino != inode
        assert readers.asked["a.db"] > 1 and len(nodes.wires) == 1


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("how", ["drop", "ask", "too much", "disconnected"])
async def test_readers_are_not_waited_for_when(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, large: bool
) -> None:
    """It is dropped; somebody asks for it; too much has come after it; the connection has ended, and who has sent it
    may be gone."""
    async with with_readers(tmp_path, monkeypatch) as (nodes, apps, readers):
        app, copy = apps["a.db"], nodes.replica.find("a.db")
        if large:
            await asyncio.to_thread(app.insert, 700_000)
        await nodes.until_equal()
        await asyncio.to_thread(vacuum, app, 8192)
        head = app.database.position
        await nodes.until(lambda: readers.asked["a.db"] > 2)
        assert copy.page_size == 4096
        match how:
            case "drop":
                await asyncio.wrap_future(nodes.primary.worker.submit(nodes.primary.naming.drop, app.database))
                await nodes.until(lambda: not copy.exists)
            case "ask":
                (feeds,) = nodes.replicas.sessions.values()
                feeds.ask_durable({"a.db": head})
                await nodes.until(lambda: copy.position == head)
            case "too much":
                for _ in range(12):
                    await asyncio.to_thread(app.insert, 450_000)
                await nodes.until_equal()
            case "disconnected":
                monkeypatch.setattr(nodes.replicas, "serve", lambda link: link.close())
                session = nodes.follower._session
                assert session is not None
                session.end(LinkClosed("cut"))
                await nodes.until(lambda: copy.position == head)


async def test_what_was_asked_for_before_it_came_waits_for_no_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of the database that a renamed one takes the place of: the old name is dropped when the new one is here."""
    async with with_readers(tmp_path, monkeypatch) as (nodes, apps, _):
        app, copy = apps["a.db"], nodes.replica.find("a.db")
        await asyncio.to_thread(app.insert, 700_000)
        await nodes.until_equal()
        (session,) = nodes.replicas.sessions.values()
        before = app.database.position
        session.ask_durable({"a.db": Position(before.txid + 2, 0)})
        await nodes.until(lambda: nodes.follower._session._applier._queues["a.db"].hurried)  # type: ignore[union-attr]
        await asyncio.to_thread(app.insert, 100)
        await asyncio.to_thread(vacuum, app, 8192)
        await nodes.until(lambda: copy.position == app.database.position)
