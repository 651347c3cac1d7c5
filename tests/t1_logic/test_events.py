"""The event bus, its bounded streams, and the lines of /events."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest

from pylitefs.events import Event, EventBus, EventStream, SlowConsumer
from pylitefs.status import event_line, rfc3339


def test_every_subscriber_gets_every_event_until_it_leaves() -> None:
    bus, first, second = EventBus(), [], []
    leave = bus.subscribe(first.append)
    bus.subscribe(second.append)
    bus.emit(Event("tx", "a.db"))
    leave()
    leave()
    bus.emit(Event("gap", "a.db"))
    assert [event.type for event in first] == ["tx"]
    assert [event.type for event in second] == ["tx", "gap"]
    assert bus.subscriber_count == 1


def test_the_same_callback_twice_is_two_subscriptions() -> None:
    bus, got = EventBus(), []
    leave = bus.subscribe(got.append)
    bus.subscribe(got.append)
    leave()
    bus.emit(Event("tx"))
    assert len(got) == 1


def test_a_failing_subscriber_disturbs_nobody(caplog: pytest.LogCaptureFixture) -> None:
    bus, got = EventBus(), []

    def fail(_event: Event) -> None:
        raise ZeroDivisionError

    bus.subscribe(fail)
    bus.subscribe(got.append)
    bus.emit(Event("tx"))
    assert len(got) == 1
    assert "subscriber failed" in caplog.text


def test_a_stream_gets_events_of_other_threads_in_order() -> None:
    per_thread = 200

    async def scenario() -> list[Event]:
        bus, received = EventBus(), []
        with EventStream(bus, limit=3 * per_thread) as stream:
            threads = [
                threading.Thread(target=lambda name=name: [bus.emit(Event("tx", name, {"n": n})) for n in range(200)])
                for name in ("a", "b", "c")
            ]
            for thread in threads:
                thread.start()
            while len(received) < 3 * per_thread:
                batch = await stream.next_batch(30)
                received += batch
            for thread in threads:
                thread.join()
        assert bus.subscriber_count == 0
        return received

    received = asyncio.run(scenario())
    for name in ("a", "b", "c"):
        assert [event.data["n"] for event in received if event.database == name] == list(range(per_thread))


def test_a_stream_that_is_not_read_ends() -> None:
    async def scenario() -> None:
        bus = EventBus()
        with EventStream(bus, limit=4) as stream:
            for _ in range(4):
                bus.emit(Event("tx"))
            assert len(await stream.next_batch(30)) == 4
            for _ in range(5):
                bus.emit(Event("tx"))
            await asyncio.wait_for(stream.overflowed.wait(), 30)
            with pytest.raises(SlowConsumer):
                await stream.next_batch(30)

    asyncio.run(scenario())


def test_no_event_is_an_empty_batch() -> None:
    async def scenario() -> list[Event]:
        with EventStream(EventBus()) as stream:
            return await stream.next_batch(0.01)

    assert asyncio.run(scenario()) == []


def test_events_after_the_loop_has_ended_are_dropped() -> None:
    bus = EventBus()

    async def open_stream() -> EventStream:
        return EventStream(bus).__enter__()

    stream = asyncio.run(open_stream())
    bus.emit(Event("tx"))  # nobody can be told, and nothing is raised
    stream.close()
    assert bus.subscriber_count == 0


def test_event_lines() -> None:
    event = Event(
        "tx",
        'odd"name.db',
        {
            "txid": 1,
            "min_txid": 1,
            "post_apply_checksum": 1 << 63,
            "page_size": 512,
            "commit": 9,
            "timestamp_ms": 1000,
            "latency_s": None,
            "node_id": "AB",
        },
    )
    line = event_line(event)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert json.loads(line) == {
        "type": "tx",
        "db": 'odd"name.db',
        "data": {
            "txID": "0000000000000001",
            "minTxID": "0000000000000001",
            "postApplyChecksum": "8000000000000000",
            "pageSize": 512,
            "commit": 9,
            "timestamp": "1970-01-01T00:00:01Z",
            "nodeID": "AB",
        },
    }
    assert json.loads(event_line(Event("primaryChange", None, {"is_primary": False, "hostname": "db1"}))) == {
        "type": "primaryChange",
        "data": {"isPrimary": False, "hostname": "db1"},
    }


@pytest.mark.parametrize(
    ("timestamp_ms", "text"),
    [
        (0, "1970-01-01T00:00:00Z"),
        (1_700_000_000_123, "2023-11-14T22:13:20.123Z"),
        (1_700_000_000_100, "2023-11-14T22:13:20.1Z"),
    ],
)
def test_rfc3339(timestamp_ms: int, text: str) -> None:
    assert rfc3339(timestamp_ms) == text
