"""An engine that is hung, gone, cut off or full of rubbish: Unavailable in time, with one line that says what to do.

And everything works again once the engine does.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from lease_services import BUCKET, BUCKET_HEADERS, BUCKET_OPTIONS, Service, request
from lease_subjects import SERVICES, Services, directory_subject, new_subject, subject_of
from test_lease_contract import acquire, eventually, leader

from pylitefs.cluster.lease_port import ABSENT, Engine, Held, LeaseLost, Member, now_s
from pylitefs.errors import ConfigError, Unavailable
from pylitefs.lease.directory import open_directory
from pylitefs.lease.memory import MemoryEngine, MemoryService
from pylitefs.lease.object_store import open_bucket

TIMEOUT_S = 1.5
SHORT_S = 0.5  # where nothing has to succeed in time
STRANGERS = (
    b"",
    b"SSH-2.0-OpenSSH_9.2\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
    b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n",
)
LIMIT_S = 10.0  # of what must take TIMEOUT_S a few times at most: a hang, not slowness, is what is looked for


async def assert_unavailable(engine: Engine, held: Held, where: str) -> None:
    """Every call says so. They are made at once, so that this takes no longer than the slowest."""
    calls = {
        "view": engine.view(),
        "acquire": engine.acquire(leader(1, 9), 5.0, b"{}", ABSENT),
        "renew": engine.renew(held),
        "release": engine.release(held),
        "update": engine.update(b"{}", ABSENT),
        "update with lease": engine.update(b"{}", ABSENT, held),
        "announce": engine.announce(Member(1), 5.0),
        "withdraw": engine.withdraw(1),
    }
    async with asyncio.timeout(LIMIT_S):
        results = await asyncio.gather(*calls.values(), return_exceptions=True)
    for name, result in zip(calls, results, strict=True):
        assert isinstance(result, Unavailable), f"{name}: {result!r}"
        assert "\n" not in str(result) and where in str(result) and ": " in str(result), str(result)


async def test_engines_that_hang_or_die(tmp_path: Path) -> None:
    await asyncio.gather(*(hangs_and_dies(kind, tmp_path) for kind in SERVICES))


async def hangs_and_dies(kind: str, tmp_path: Path) -> None:
    service: Service = await asyncio.to_thread(SERVICES[kind], tmp_path / kind)
    try:
        await asyncio.to_thread(service.start)
        subject = subject_of(kind, service, "faults", TIMEOUT_S)
        engine = subject.engine()
        await eventually_works(engine)
        held = await acquire(engine, 1, 60.0)
        assert held is not None
        service.pause()
        try:
            await assert_unavailable(engine, held, str(service.port))
        finally:
            service.resume()
        await eventually_works(engine)
        waiting = asyncio.ensure_future(engine.wait(await engine.view(), 60.0))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        service.kill()
        await assert_unavailable(engine, held, str(service.port))
        with pytest.raises(Unavailable):
            async with asyncio.timeout(LIMIT_S):
                await waiting
        await asyncio.to_thread(service.start)
        await eventually_works(engine)
        await subject.close()
    finally:
        service.kill()


async def eventually_works(engine: Engine) -> None:
    """Reading, announcing and taking the lease, from whatever state the fault has left."""
    async with asyncio.timeout(60.0):
        while True:
            try:
                await engine.announce(Member(1), 60.0)
                view = await engine.view()
                if view.leader is None:
                    held = await acquire(engine, 1, 5.0)
                    assert held is not None
                    await engine.release(held)
                if [member.node_id for member in view.members] == [1]:
                    return  # else the engine got round to an old withdrawal only now
            except Unavailable:
                pass
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("kind", SERVICES)
async def test_what_is_no_engine_at_all(kind: str, tmp_path: Path) -> None:
    """Something that accepts connections and says nothing, something that speaks another protocol, and nobody."""

    async def somebody(reply: bytes) -> None:
        async with await asyncio.start_server(partial(answer_with, reply), "127.0.0.1", 0) as server:
            await assert_view_unavailable(kind, server.sockets[0].getsockname()[1], tmp_path)

    async def nobody() -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            await assert_view_unavailable(kind, unused.getsockname()[1], tmp_path)

    await asyncio.gather(nobody(), *(somebody(reply) for reply in STRANGERS))


async def answer_with(reply: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        await reader.read(100)
        writer.write(reply)
        await writer.drain()
        if not reply:
            await reader.read()
    except OSError:
        pass
    finally:
        writer.close()


async def assert_view_unavailable(kind: str, port: int, folder: Path) -> None:
    subject = subject_of(kind, Service(folder, [], lambda: True, port), "faults", SHORT_S)
    with pytest.raises(Unavailable) as caught:
        async with asyncio.timeout(LIMIT_S):
            await subject.engine().view()
    assert "\n" not in str(caught.value) and str(port) in str(caught.value)
    await subject.close()


@pytest.mark.parametrize("kind", ["consul", "object-store", "kubernetes", "directory"])
async def test_a_renewal_between_looking_and_taking(kind: str, services: Services, tmp_path: Path) -> None:
    """The moment that observation alone does not cover: the record is taken for expired, and is renewed just then."""
    subject = new_subject(kind, services, tmp_path)
    holder, taker = subject.engine_list(2)
    held = await acquire(holder, 1, 60.0)
    assert held is not None
    assert await acquire(taker, 2, 60.0) is None
    taker._observed._clock = lambda: now_s() + 100.0  # type: ignore[attr-defined]
    assert (await taker.view()).leader is None, "it counts as expired"
    place, name = (taker, "_txn") if kind == "consul" else (taker._cells, "write")  # type: ignore[attr-defined]
    write = getattr(place, name)

    async def renew_first(*arguments: object) -> object:
        nonlocal held
        assert held is not None
        held = await holder.renew(held)
        return await write(*arguments)

    setattr(place, name, renew_first)
    assert await acquire(taker, 2, 60.0) is None
    setattr(place, name, write)
    await holder.renew(held)
    assert (await holder.view()).leader == held.leader
    await subject.close()


async def test_an_acquisition_whose_answer_is_lost(tmp_path: Path) -> None:
    """A record engine knows its own attempt again, and does not wait for its TTL to end."""
    subject = directory_subject(tmp_path)
    one, two = subject.engine_list(2)
    cells = one._cells  # type: ignore[attr-defined]
    write = cells.write

    async def lose_the_answer(*arguments: object) -> None:
        await write(*arguments)
        raise Unavailable("the answer was lost")

    cells.write = lose_the_answer
    with pytest.raises(Unavailable):
        await one.acquire(leader(1, 1), 60.0, b'{"epoch": 1}', ABSENT)
    cells.write = write
    assert await acquire(two, 2, 60.0) is None
    held = await acquire(one, 1, 60.0)
    assert held is not None and held.leader.epoch == 2
    await one.renew(held)
    await subject.close()


async def test_a_shared_directory_that_is_locked_or_gone(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    engine = open_directory(folder.as_uri(), SHORT_S)
    held = await acquire(engine, 1, 60.0)
    assert held is not None
    held = await engine.renew(held)
    lock = os.open(folder / ".lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    for attempt in (engine.renew(held), engine.announce(Member(1), 60.0), engine.update(b"{}", held.state.version)):
        with pytest.raises(Unavailable, match=str(folder)):
            async with asyncio.timeout(LIMIT_S):
                await attempt
    os.close(lock)
    while any(thread.name == "lease-directory" for thread in threading.enumerate()):
        await asyncio.sleep(0.01)
    folder.rename(tmp_path / "away")
    with pytest.raises(Unavailable, match="does it exist"):
        await engine.view()
    with pytest.raises(Unavailable, match="does it exist"):
        await engine.renew(held)
    (tmp_path / "away").rename(folder)
    await engine.renew(held)
    assert not [name for name in os.listdir(folder) if name.startswith(".tmp")], "temporary files are left"


@pytest.mark.parametrize(
    "rubbish", [b"", b"\xff\xfe", b"[]", b'{"format": 99}', b'{"format": 1, "ttl": -1}', b"[" * 100_000]
)
async def test_a_record_that_is_none(rubbish: bytes, tmp_path: Path) -> None:
    """Never taken for a free lease."""
    engine = open_directory(tmp_path.as_uri())
    (tmp_path / "leader").write_bytes(rubbish)
    for attempt in (engine.view(), engine.acquire(leader(1, 1), 5.0, b"{}", ABSENT), engine.update(b"{}", ABSENT)):
        with pytest.raises(Unavailable, match="delete it"):
            await attempt
    assert (tmp_path / "leader").read_bytes() == rubbish


async def test_entries_of_others_are_passed_over(tmp_path: Path) -> None:
    engine = open_directory(tmp_path.as_uri())
    await engine.announce(Member(7), 60.0)
    for name, content in {
        "members%x": b"rubbish",
        "members%y": b'{"member": [], "ttl": 3}',
        "notes.txt": b"hello",
    }.items():
        (tmp_path / name).write_bytes(content)
    assert [member.node_id for member in (await engine.view()).members] == [7]


@pytest.mark.parametrize("url", ["file://elsewhere/x", "file:relative", "/plain/path", "s3://bucket"])
def test_what_is_not_the_url_of_a_directory(url: str) -> None:
    with pytest.raises(ConfigError, match="file:///"):
        open_directory(url)


@pytest.mark.parametrize("url", ["", "nonsense", "ftp://host/x", "s3://"])
def test_what_is_not_a_bucket(url: str) -> None:
    with pytest.raises(ConfigError, match="is not a bucket"):
        open_bucket(url, BUCKET_OPTIONS)


async def test_a_bucket_that_does_not_exist(services: Services) -> None:
    service = services.get("object-store")
    engine = open_bucket("s3://no-such-bucket/x", {**BUCKET_OPTIONS, "endpoint": service.url}, 5.0)
    with pytest.raises(Unavailable, match="does the bucket exist"):
        await engine.acquire(leader(1, 1), 5.0, b"{}", ABSENT)
    with pytest.raises(Unavailable, match="does the bucket exist"):
        await engine.announce(Member(1), 5.0)


async def test_objects_of_others_are_passed_over(services: Services) -> None:
    service = services.get("object-store")
    options = {**BUCKET_OPTIONS, "endpoint": service.url}
    engine = open_bucket(f"s3://{BUCKET}/mixed", options, 5.0)
    await engine.announce(Member(7), 60.0)
    url = f"{service.url}/{BUCKET}/mixed/members/huge"
    await asyncio.to_thread(request, "PUT", url, {"x": "x" * (2 << 20)}, BUCKET_HEADERS)
    assert [member.node_id for member in (await engine.view()).members] == [7]


async def test_a_simulated_cut() -> None:
    service = MemoryService()
    one, two = MemoryEngine(service, 0.05), MemoryEngine(service, 0.05)
    held = await acquire(one, 1, 0.3)
    assert held is not None
    one.cut = True
    with pytest.raises(Unavailable):
        await one.renew(held)
    await eventually(two, lambda view: view.leader is None)
    assert await acquire(two, 2, 60.0)
    one.cut = False
    with pytest.raises(LeaseLost):
        await one.renew(held)
    two.slow_s = lambda: 0.2
    before_s = time.monotonic()
    with pytest.raises(Unavailable):
        await two.view()
    assert time.monotonic() - before_s < LIMIT_S
