"""What a replica acknowledges is what it has when that is sent."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from fake_engine import FakeStore
from pair import FAST

from pylitefs.cluster import acks
from pylitefs.cluster.acks import Acks
from pylitefs.cluster.channel import Channel
from pylitefs.formats import stream
from pylitefs.formats.ltx.format import Position
from pylitefs.formats.stream_fields import ResyncReason


class Link:
    """It takes a message when it is told to."""

    peer = "primary:1"

    def __init__(self) -> None:
        self.sent: list[stream.Message] = []
        self.room = asyncio.Semaphore(0)

    async def send(self, data: bytes) -> None:
        await self.room.acquire()
        self.sent.append(stream.unpack(data, stream.Sender.REPLICA))

    async def receive(self) -> bytes:
        raise NotImplementedError

    async def close(self) -> None: ...


async def test_nothing_that_was_given_up_is_acknowledged_after_that_was_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are so many databases that they take several messages, and one of the last is given up meanwhile. The
    primary would take it for the result of what it sends next, and answer commits that the replica does not have."""
    monkeypatch.setattr(acks, "batches", lambda items: stream.batches(items, 2))
    store, link = FakeStore(tmp_path, is_primary=False), Link()
    channel = Channel(link, stream.Sender.PRIMARY)
    told = Acks(store, channel, FAST)
    names = ["a", "b", "c", "d"]
    running = asyncio.ensure_future(told.run())
    try:
        for name in names:
            told.applied(name, 7, durable=7)
        told.hurry()
        while not channel._sending.locked():
            await asyncio.sleep(0)
        told.given_up("d")
        resync = stream.Resync("d", 1, ResyncReason.LOCAL, 0, 0, Position(0, 0), (), ())
        saying = asyncio.ensure_future(channel.send(resync))
        for _ in range(3):
            link.room.release()
        async with asyncio.timeout(10):
            while len(link.sent) < 3:
                await asyncio.sleep(0.001)
        await saying
        at = link.sent.index(resync)
        after = [entry for message in link.sent[at:] if isinstance(message, stream.Ack) for entry in message.entries]
        assert [entry.name for entry in after] == ["c", "d"], "the order is another one"
        assert [entry.durable for entry in after] == [7, 0]
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        store.close()
