"""One database of a replica that cannot be written, beside others; two questions for one database at once."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from memory_link import Wire
from pair import FAST, Pair
from real_nodes import Application
from test_replication_engine import Nodes

from pylitefs.cluster.backoff import Backoff
from pylitefs.cluster.channel import Channel
from pylitefs.cluster.ports import Link
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

        def fail(data: bytes) -> Position:
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


async def test_a_page_size_change_that_waits_for_readers_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pylitefs.engine.apply._REPLACE_TRIES_S", 60.0)
    nodes = Nodes(tmp_path, 1)
    nodes.bad = False
    replace = ReplicaWal.replace
    tried, read = 0, True

    def with_readers(wal: ReplicaWal, pages: Iterable[tuple[int, bytes]], page_size: int, commit: int) -> bool:
        nonlocal tried
        tried += 1
        return False if read else replace(wal, pages, page_size, commit)

    monkeypatch.setattr(ReplicaWal, "replace", with_readers)
    try:
        changed, other = Application(nodes.primary, "a.db"), Application(nodes.primary, "b.db")
        async with nodes.running():
            try:
                await nodes.until_equal()
                await asyncio.to_thread(vacuum, changed, 8192)
                await nodes.until(lambda: tried > 0)
                copy = nodes.replica.find("b.db")
                for _ in range(3):
                    await asyncio.to_thread(other.insert, 100)
                    await nodes.until(lambda: copy.position == other.database.position)
                await nodes.until(lambda: copy.durable_txid == copy.position.txid)
                opened: list[BaseException | None] = []
                nodes.replica.apply.before_open(copy, opened.append)
                await nodes.until(lambda: opened == [None])
                assert nodes.replica.find("a.db").page_size == 4096
            finally:
                read = False
            await nodes.until_equal()
    finally:
        nodes.close()
