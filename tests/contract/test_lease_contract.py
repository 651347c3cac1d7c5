"""What every lease engine guarantees (`cluster.lease_port`), asked of each of them, on the real thing."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable

import pytest
from lease_services import Subject

from pylitefs.cluster.election import announced, positions_of, total
from pylitefs.cluster.lease_port import (
    ABSENT,
    MAX_STATE_BYTES,
    Conflict,
    Engine,
    Held,
    Leader,
    LeaseLost,
    Member,
    View,
    now_s,
)
from pylitefs.errors import LitefsError, UsageError

EVENTUALLY_S = 30.0
HELD_S = 60.0  # of a lease that must not end, however slow the machine is


def leader(number: int, epoch: int) -> Leader:
    return Leader(number, f"node-{number}", f"http://10.0.0.{number}:20202", epoch)


def state_of(epoch: int) -> bytes:
    return json.dumps({"epoch": epoch}).encode()


def epoch_in(view: View) -> int:
    return int(json.loads(view.state.data)["epoch"]) if view.state.data else 0


async def acquire(engine: Engine, number: int, ttl_s: float) -> Held | None:
    """As a node would: see that nobody has it, and raise the epoch."""
    view = await engine.view()
    epoch = epoch_in(view) + 1
    return await engine.acquire(leader(number, epoch), ttl_s, state_of(epoch), view.state.version)


async def eventually(engine: Engine, condition: Callable[[View], bool]) -> View:
    """The first view that meets the condition, without asking more often than the engine says."""
    async with asyncio.timeout(EVENTUALLY_S):
        while not condition(view := await engine.view()):
            await engine.wait(view, 1.0)
    return view


def clock(subject: Subject) -> float:
    return asyncio.get_running_loop().time() if subject.virtual else now_s()


async def test_nothing_then_a_leader_with_its_state(subject: Subject) -> None:
    one, two = subject.engine_list(2)
    empty = await one.view()
    assert empty == View(None, empty.state, ())
    assert (empty.state.data, empty.state.version) == (b"", ABSENT)
    before_s = clock(subject)
    held = await one.acquire(leader(1, 1), subject.ttl_s, state_of(1), ABSENT)
    assert held is not None
    assert held.leader == leader(1, 1)
    assert before_s < held.valid_until_s <= clock(subject) + subject.ttl_s
    seen = await two.view()
    assert seen.leader == leader(1, 1)
    assert seen.state == held.state
    assert seen.state.data == state_of(1)


async def test_one_of_many_holds_it_and_every_epoch_is_new(subject: Subject) -> None:
    epochs: list[int] = []
    inside = 0
    wanted = 8

    async def contend(number: int) -> None:
        nonlocal inside
        engine = subject.engine()
        while len(epochs) < wanted:
            held = await acquire(engine, number, HELD_S)
            if held is None:
                await engine.wait(await engine.view(), 0.05)
                continue
            inside += 1
            assert inside == 1, "two hold the lease"
            epochs.append(held.leader.epoch)
            held = await engine.renew(held)
            assert clock(subject) < held.valid_until_s
            inside -= 1
            await engine.release(held)

    async def look() -> None:
        """Leader and state are of one moment."""
        engine = subject.engine()
        while len(epochs) < wanted:
            view = await engine.view()
            assert view.leader is None or view.leader.epoch == epoch_in(view)
            await asyncio.sleep(0.01)

    await asyncio.gather(look(), *(contend(number) for number in range(1, 7)))
    assert epochs == list(range(1, len(epochs) + 1))


async def ends_and_then_its_old_holder_has_lost_it(subject: Subject) -> None:
    one, two = subject.engine_list(2)
    held = await acquire(one, 1, subject.ttl_s)
    assert held is not None
    view = await eventually(two, lambda view: view.leader is None)
    assert clock(subject) >= held.valid_until_s, "expired too early"
    assert epoch_in(view) == 1, "the state stays"
    with pytest.raises(LeaseLost):
        await one.renew(held)
    theirs = await acquire(two, 2, HELD_S)
    assert theirs is not None and theirs.leader.epoch == 2
    with pytest.raises(LeaseLost):
        await one.renew(held)
    with pytest.raises(LeaseLost):
        await one.update(b"{}", theirs.state.version, held)
    await one.release(held)  # does them no harm
    assert (await two.view()).leader == theirs.leader
    await two.renew(theirs)


async def its_own_holder_can_take_it_again(subject: Subject) -> None:
    engine = subject.engine()
    held = await acquire(engine, 1, subject.ttl_s)
    assert held is not None
    await asyncio.sleep(subject.ttl_s)
    with pytest.raises(LeaseLost):
        await engine.renew(held)
    async with asyncio.timeout(EVENTUALLY_S):
        while (again := await acquire(engine, 1, HELD_S)) is None:
            await engine.wait(await engine.view(), 1.0)
    assert again.leader.epoch == 2
    await engine.renew(again)


async def renewals_keep_it(subject: Subject) -> None:
    one, two, three = subject.engine_list(3)
    ttl_s = max(subject.ttl_s, 3.0)  # enough for a machine that does something else for a while
    held = await acquire(one, 1, ttl_s)
    assert held is not None
    done = asyncio.Event()

    async def renew() -> None:
        current = held
        end_s = clock(subject) + 1.5 * ttl_s
        while clock(subject) < end_s:
            await asyncio.sleep(ttl_s / 5)
            before_s = clock(subject)
            current = await one.renew(current)
            assert before_s <= current.valid_until_s - ttl_s <= clock(subject)
        done.set()

    async def try_to_take() -> None:
        while not done.is_set():
            assert await acquire(two, 2, ttl_s) is None
            await asyncio.sleep(ttl_s / 10)

    async def wait_for_it() -> None:
        """A renewal is no change."""
        view = await three.view()
        assert not await three.wait(view, ttl_s)

    await asyncio.gather(renew(), try_to_take(), wait_for_it())
    assert (await two.view()).leader == held.leader


async def test_a_release_hands_over_at_once(subject: Subject) -> None:
    one, two = subject.engine_list(2)
    for number in range(3):
        held = await acquire(one, 1, HELD_S)
        assert held is not None, f"round {number}"
        await one.release(held)
        with pytest.raises(LeaseLost):
            await one.renew(held)
        one, two = two, one
    assert epoch_in(await one.view()) == 3


async def test_a_lease_that_an_operator_deletes_is_lost(subject: Subject) -> None:
    engine = subject.engine()
    held = await acquire(engine, 1, HELD_S)
    assert held is not None
    await subject.delete()
    with pytest.raises(LeaseLost):
        await engine.renew(held)
    assert (await engine.view()).leader is None


async def test_the_state_changes_only_from_what_was_read(subject: Subject) -> None:
    one, two = subject.engine_list(2)
    first = await one.update(b'{"a": 1}', ABSENT)
    with pytest.raises(Conflict):
        await two.update(b'{"b": 1}', ABSENT)
    held = await two.acquire(leader(2, 1), HELD_S, b'{"b": 2}', first.version)
    assert held is not None
    with pytest.raises(Conflict):
        await one.update(b'{"a": 2}', first.version)
    second = await one.update('{"ä": "☃"}'.encode(), held.state.version)
    with pytest.raises(Conflict) as caught:
        await two.update(b"{}", held.state.version, held)
    assert not isinstance(caught.value, LeaseLost)
    held = await two.renew(held)  # what others write does not take the lease
    third = await two.update(b'{"b": 3}', second.version, held)
    view = await one.view()
    assert view.state == third
    assert view.leader == held.leader
    await two.release(held)
    assert await one.acquire(leader(1, 2), subject.ttl_s, b"{}", second.version) is None
    view = await one.view()
    assert (view.leader, view.state) == (None, third), "a refused acquisition changes nothing"


async def test_no_update_is_lost(subject: Subject) -> None:
    async def count(engine: Engine) -> None:
        for _ in range(4):
            async with asyncio.timeout(EVENTUALLY_S):
                while True:
                    view = await engine.view()
                    try:
                        await engine.update(state_of(epoch_in(view) + 1), view.state.version)
                        break
                    except Conflict:
                        continue

    await asyncio.gather(*(count(engine) for engine in subject.engine_list(4)))
    assert epoch_in(await subject.engine().view()) == 16


async def waiting_ends_with_a_change(subject: Subject) -> None:
    watcher, engine = subject.engine_list(2)
    held: Held | None = None

    async def take() -> None:
        nonlocal held
        held = await acquire(engine, 2, HELD_S)

    async def change_state() -> None:
        await engine.update(b'{"epoch": 7}', (await engine.view()).state.version)

    async def let_go() -> None:
        assert held is not None
        await engine.release(held)

    async def appear() -> None:
        await engine.announce(Member(2, info={"x": 1}), HELD_S)

    async def say_more() -> None:
        await engine.announce(Member(2, info={"x": 2}), HELD_S)

    async def leave() -> None:
        await engine.withdraw(2)

    for step in (appear, say_more, leave, take, change_state, let_go):
        view = await watcher.view()
        waiting = asyncio.ensure_future(watcher.wait(view, EVENTUALLY_S))
        await asyncio.sleep(0.1)
        assert not waiting.done(), f"before {step.__name__}"
        await step()
        assert await waiting, step.__name__
        assert await watcher.view() != view, step.__name__
    assert not await watcher.wait(await watcher.view(), 0.2)


async def test_a_change_before_the_wait_is_not_missed(subject: Subject) -> None:
    watcher, engine = subject.engine_list(2)
    view = await watcher.view()
    assert await acquire(engine, 2, HELD_S)
    assert await watcher.wait(view, EVENTUALLY_S)


async def members_come_change_and_go(subject: Subject) -> None:
    one, two = subject.engine_list(2)
    first = Member(1, "node-1", "http://10.0.0.1:20202", True, 5, {"zone": "ä"}, {"positions": {"a.db": [3, 17]}})
    second = Member(0xFFFF_FFFF_FFFF_FFFF, "node-2", "http://10.0.0.2:20202", False)
    await asyncio.gather(one.announce(first, HELD_S), two.announce(second, HELD_S))
    assert (await one.view()).members == (first, second)
    assert (await two.view()).members == (first, second)
    changed = Member(1, "node-1", "http://10.0.0.9:20202", False)
    await one.announce(changed, HELD_S)
    assert (await two.view()).members == (changed, second)
    await two.announce(second, subject.ttl_s)
    await eventually(one, lambda view: view.members == (changed,))  # it has not said anything since
    await two.announce(second, HELD_S)
    assert (await one.view()).members == (changed, second)
    await two.withdraw(second.node_id)
    await two.withdraw(second.node_id)
    assert (await one.view()).members == (changed,)


async def test_a_node_with_very_many_databases_is_a_member(subject: Subject) -> None:
    """More than any engine has room for in one entry, if each were in it."""
    engine = subject.engine()
    positions = {f"tenant-{number:05}.db": (number % 5, number) for number in range(80_000)}
    await engine.announce(Member(1, info=announced(positions, "C1")), HELD_S)
    (member,) = (await subject.engine().view()).members
    assert positions_of(member) == total({name: found for name, found in positions.items() if found[1]})


async def test_a_node_that_starts_again_has_its_entry_again(subject: Subject) -> None:
    before, after = subject.engine_list(2)
    await before.announce(Member(1, "before"), HELD_S)
    await after.announce(Member(1, "after"), HELD_S)
    await after.announce(Member(1, "after", priority=1), HELD_S)
    assert (await before.view()).members == (Member(1, "after", priority=1),)


async def test_what_no_engine_could_keep_is_refused(subject: Subject) -> None:
    engine = subject.engine()
    too_long = b'"' + b"x" * MAX_STATE_BYTES + b'"'
    with pytest.raises(UsageError, match="too short"):
        await engine.acquire(leader(1, 1), engine.min_ttl_s / 2, b"{}", ABSENT)
    refused: list[Callable[[], Awaitable[object]]] = [
        lambda: engine.acquire(leader(1, 1), subject.ttl_s, too_long, ABSENT),
        lambda: engine.update(too_long, ABSENT),
    ]
    for attempt in refused:
        with pytest.raises(LitefsError, match="bytes"):
            await attempt()
    assert (await engine.view()).leader is None
    longest = too_long[2:]
    assert (await engine.update(longest, ABSENT)).data == longest
    assert (await subject.engine().view()).state.data == longest


async def slow_nodes_never_hold_it_together(subject: Subject) -> None:
    """Nodes that renew just in time or just too late, against others that are waiting for that."""
    ttl_s = subject.ttl_s
    end_s = clock(subject) + 3 * ttl_s
    valid_until_s: dict[int, float] = {}
    chances = random.Random(1)

    async def node(number: int) -> None:
        engine = subject.engine()
        while clock(subject) < end_s:
            held = await acquire(engine, number, ttl_s)
            if held is None:
                await engine.wait(await engine.view(), ttl_s / 4)
                continue
            others = [until_s for other, until_s in valid_until_s.items() if other != number]
            assert max(others, default=0.0) <= clock(subject), "another one's lease was still valid"
            try:
                while True:
                    valid_until_s[number] = held.valid_until_s
                    await asyncio.sleep(chances.uniform(0.9, 1.1) * ttl_s)
                    held = await engine.renew(held)
            except LeaseLost:
                await asyncio.sleep(ttl_s / 2)

    await asyncio.gather(*(node(number) for number in (1, 2, 3)))
    assert len(valid_until_s) > 1, "the lease never changed hands"


async def test_what_takes_time(subjects: list[Subject]) -> None:
    """All at once, each in a cluster of its own."""
    checks = (
        ends_and_then_its_old_holder_has_lost_it,
        its_own_holder_can_take_it_again,
        renewals_keep_it,
        members_come_change_and_go,
        slow_nodes_never_hold_it_together,
        waiting_ends_with_a_change,
    )
    await asyncio.gather(*(check(subject) for check, subject in zip(checks, subjects, strict=True)))
