"""Synchronous replication: in whatever order things come, the nodes that may be elected hold what was acknowledged."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pylitefs.cluster.lease_port import LeaseLost
from pylitefs.cluster.sync_gate import Mode, SyncGate, SyncRules
from pylitefs.errors import Unavailable
from pylitefs.events import Event

NAMES = ("a", "b")


class World:
    """A primary with logs, and the shared state. `answers` are those of commits, in order: (name, TXID, error)."""

    def __init__(self, rules: SyncRules, written: frozenset[int] | None) -> None:
        self.now_s = 100.0
        self.heads: dict[str, int] = {}
        self.document = written
        self.answers: list[tuple[str, int, BaseException | None]] = []
        self.write: Callable[[frozenset[int]], None] = self._write
        self.events: list[Event] = []
        self.no_candidates: set[int] = set()
        self.gate = SyncGate(
            rules, lambda: dict(self.heads), self._change, written, clock=self._clock, emit=self.events.append,
            can_lead=lambda node: node not in self.no_candidates,
        )  # fmt: skip

    def _clock(self) -> float:
        self.now_s += 0.001  # so that no wait is for ever
        return self.now_s

    def _write(self, nodes: frozenset[int]) -> None:
        self.document = nodes

    async def _change(self, nodes: frozenset[int]) -> None:
        self.write(nodes)

    def told(self, *kinds: str) -> list[Event]:
        return [event for event in self.events if event.type in kinds]

    def why(self) -> str:
        """For what commits wait."""
        told = self.gate.stalled()
        assert told is not None
        return told.reason

    def commit(self, name: str = "a") -> int:
        txid = self.heads[name] = self.heads.get(name, 0) + 1
        self.gate.wait(name, txid, lambda error: self.answers.append((name, txid, error)))
        return txid

    def join(self, node: int) -> None:
        self.gate.joined(node)
        for name, txid in self.heads.items():
            self.gate.holds(node, name, txid)

    def step(self, times: int = 3) -> None:
        for _ in range(times):
            asyncio.run(self.gate.step())

    @property
    def acknowledged(self) -> list[tuple[str, int]]:
        return [(name, txid) for name, txid, error in self.answers if error is None]


def world(written: frozenset[int] | None = None, **rules: object) -> World:
    return World(SyncRules(**({"replicas": 1, "take_in_s": 0.02} | rules)), written)  # type: ignore[arg-type]


def test_nothing_is_answered_before_the_set_is_written() -> None:
    here = world()
    here.commit()
    here.join(1)
    assert here.answers == []
    here.step()
    assert here.document == {1} and here.acknowledged == [("a", 1)]


def test_a_commit_waits_for_every_node_of_the_set() -> None:
    here = world(replicas=2)
    here.join(1)
    here.join(2)
    here.step()
    assert here.document == {1, 2}
    here.commit()
    here.gate.holds(1, "a", 1)
    assert here.answers == []
    here.gate.holds(2, "a", 1)
    assert here.acknowledged == [("a", 1)]
    here.commit("b")
    here.commit("b")
    here.gate.holds(1, "b", 2)
    here.gate.holds(2, "b", 1)
    assert here.acknowledged == [("a", 1), ("b", 1)]


def test_a_node_that_was_lost_is_replaced() -> None:
    here = world()
    here.join(1)
    here.step()
    here.join(2)
    here.commit()
    here.gate.left(1)
    here.step()
    assert here.document == {1}, "the other one does not hold what is in the log yet"
    here.gate.holds(2, "a", 1)
    assert here.answers == []
    here.now_s += 1.0
    here.step()
    assert here.document == {2} and here.acknowledged == [("a", 1)]


def test_a_node_that_cannot_be_elected_is_not_waited_for_where_another_is() -> None:
    """Else nobody could take the place of a primary that is lost."""
    here = world()
    here.no_candidates = {1}
    here.join(1)
    here.step()
    assert here.document == {1}, "it is better than none"
    here.join(2)
    here.commit()
    here.gate.holds(1, "a", 1)
    here.gate.holds(2, "a", 1)
    here.now_s += 1.0
    here.step()
    assert here.document == {2} and here.acknowledged == [("a", 1)]
    here.gate.left(2)
    here.step()
    assert here.document == {1}
    here.commit()
    here.gate.holds(1, "a", 2)
    assert here.acknowledged == [("a", 1), ("a", 2)]


def test_a_set_that_may_be_written_counts() -> None:
    """The write has failed, and nobody knows: both sets must hold what is acknowledged."""
    here = world()
    here.join(1)
    here.step()
    here.join(2)

    def half(nodes: frozenset[int]) -> None:
        here.document = nodes
        raise Unavailable("no answer")

    here.write = half
    here.gate.left(1)
    here.step(1)
    assert here.document == {2}
    here.commit()
    here.gate.holds(2, "a", 1)
    assert here.answers == []
    here.write = here._write
    here.now_s += 1
    here.step()
    assert here.acknowledged == [("a", 1)] and here.document == {2}


def test_a_set_that_may_be_written_counts_when_a_third_node_has_not_caught_up() -> None:
    here = world()
    here.join(1)
    here.step()
    here.join(2)

    def half(nodes: frozenset[int]) -> None:
        here.document = nodes
        raise Unavailable("no answer")

    here.write = half
    here.gate.left(1)
    here.step(1)
    assert here.document == {2}
    here.join(3)
    here.gate.left(2)
    here.commit()
    here.now_s += 1
    here.step(1)
    assert here.document == {2}, "the third one lacks the commit"
    here.join(1)
    assert here.answers == [], "the second one may be elected"
    here.join(2)
    assert here.acknowledged == [("a", 1)]


def test_a_node_that_may_have_been_taken_in_is_waited_for() -> None:
    here = world(mode=Mode.DEGRADE)
    here.step()
    assert here.document == frozenset()

    def half(nodes: frozenset[int]) -> None:
        here.document = nodes
        raise Unavailable("no answer")

    here.write = half
    here.join(1)
    here.step(1)
    assert here.document == {1}
    here.commit()
    assert here.answers == []
    here.gate.holds(1, "a", 1)
    assert here.acknowledged == [("a", 1)]


def test_the_promoted_node_waits_for_those_that_are_written() -> None:
    here = world(frozenset({1}), mode=Mode.WAIT)
    here.heads["a"] = 5
    here.commit()
    here.step()
    assert here.answers == []
    here.gate.joined(1)
    here.gate.holds(1, "a", 4)
    here.gate.holds(1, "a", 6)
    assert here.acknowledged == [("a", 6)]


def test_a_copy_that_is_mended_does_not_count_and_holds_up_no_other_database() -> None:
    here = world()
    here.heads["b"] = 3
    here.join(1)
    here.step()
    here.gate.strayed(1, "b")
    here.commit("b")
    here.commit("a")
    here.gate.holds(1, "a", 1)
    assert here.acknowledged == [("a", 1)]
    here.gate.holds(1, "b", 4)
    assert here.acknowledged == [("a", 1), ("b", 4)]


def test_a_node_is_not_taken_in_before_all_its_databases_are_in_line() -> None:
    here = world()
    here.heads |= {"a": 1, "b": 3}
    here.gate.joined(1)
    here.gate.holds(1, "a", 1)
    here.step()
    assert not here.document
    here.gate.holds(1, "b", 3)
    here.now_s += 1.0
    here.step()
    assert here.document == {1}


def test_a_database_that_is_released_counts_again() -> None:
    """While it was set aside on the primary it was in nobody's way; then only who holds its log is taken in."""
    here = world(replicas=2)
    here.join(1)
    here.join(2)
    here.step()
    assert here.document == {1, 2}
    here.heads["b"] = 3
    here.gate.released("b")
    here.gate.left(2)
    here.gate.joined(3)
    here.gate.holds(3, "b", 2)
    here.now_s += 1.0
    here.step()
    assert here.document == {1, 2}
    here.gate.holds(3, "b", 3)
    here.now_s += 1.0
    here.step()
    assert here.document == {1, 3}, "both hold it, or are waited for as before"


async def test_a_defect_does_not_end_the_gate(caplog: pytest.LogCaptureFixture) -> None:
    here = world()
    failures = [RuntimeError("a defect"), RuntimeError("another one")]

    def write(nodes: frozenset[int]) -> None:
        if failures:
            raise failures.pop()
        here.document = nodes

    here.write = write
    task = asyncio.ensure_future(here.gate.run())
    try:
        here.join(1)
        here.commit()
        here.gate.holds(1, "a", 1)
        async with asyncio.timeout(10):
            while not here.acknowledged:
                await asyncio.sleep(0.01)
        assert not failures and not task.done()
        assert caplog.text.count("cannot be seen to") == 2
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_a_timeout_fails_the_commit() -> None:
    here = world(timeout_s=2.0)
    here.join(1)
    here.step()
    here.commit()
    here.now_s += 1.5
    here.step()
    assert here.answers == []
    here.now_s += 0.6
    here.step()
    ((name, txid, error),) = here.answers
    assert (name, txid) == ("a", 1) and isinstance(error, OSError) and error.errno == errno.EIO
    here.gate.holds(1, "a", 1)
    assert len(here.answers) == 1


def test_degrade_takes_the_missing_out_first() -> None:
    here = world(mode=Mode.DEGRADE, timeout_s=2.0)
    here.join(1)
    here.step()
    here.commit()
    here.now_s += 2.1
    here.write = lambda nodes: (_ for _ in ()).throw(Unavailable("not now"))
    here.step()
    assert here.answers == [] and here.document == {1}
    here.write = here._write
    here.now_s += 1.0
    here.step()
    assert here.document == frozenset() and here.acknowledged == [("a", 1)]
    here.commit()
    assert len(here.acknowledged) == 2
    here.gate.holds(1, "a", 2)
    here.now_s += 1.0
    here.step()
    assert here.document == {1}


def test_one_that_does_not_keep_up_is_not_waited_for() -> None:
    here = world(mode=Mode.DEGRADE, timeout_s=2.0)
    here.step()
    here.join(1)
    for _ in range(10):
        here.commit()
        here.now_s += 0.3
        here.step(1)
    assert here.document == frozenset()
    assert len(here.acknowledged) == 10


def test_a_slow_replica_is_replaced() -> None:
    here = world(replace_after_s=1.0)
    here.join(1)
    here.step()
    here.join(2)
    here.commit()
    here.gate.holds(2, "a", 1)
    here.step()
    assert here.answers == []
    here.now_s += 1.1
    here.step()
    assert here.document == {2} and here.acknowledged == [("a", 1)]


@pytest.mark.parametrize("how", ["closed", "lease lost"])
def test_a_node_that_leads_no_more_fails_what_waits(how: str) -> None:
    here = world()
    here.commit()
    if how == "closed":
        here.gate.close(Unavailable("demoted"))
    else:
        here.write = lambda nodes: (_ for _ in ()).throw(LeaseLost("another node leads"))
        here.gate.joined(1)
        here.gate.holds(1, "a", 1)
        here.step()
    here.commit()
    assert [type(error) for _, _, error in here.answers] == [OSError, OSError]


def test_how_long_commits_waited_is_told() -> None:
    here = world(timeout_s=5.0)
    here.join(1)
    here.step()
    here.commit()
    here.now_s += 1.0
    here.gate.holds(1, "a", 1)
    here.commit()
    here.now_s += 5.1
    here.step(1)
    here.commit("b")
    here.gate.close(Unavailable("demoted"))
    here.commit("b")
    found = [(event.database, event.data["txid"], event.data.get("failed")) for event in here.told("synced")]
    assert found == [("a", 1, None), ("a", 2, "timeout"), ("b", 1, "demoted"), ("b", 2, "demoted")]
    waited = [event.data["seconds"] for event in here.told("synced")]
    assert 1.0 < waited[0] < 1.1 and 5.1 < waited[1] < 5.2 and max(waited[2:]) < 0.1


def test_when_commits_do_not_wait_any_more_is_told() -> None:
    here = world(mode=Mode.DEGRADE, timeout_s=2.0, replicas=2)
    for node in (1, 2):
        here.join(node)
    here.step()
    here.gate.left(1)
    here.commit()
    here.gate.holds(2, "a", 1)
    here.now_s += 2.1
    here.step()
    here.commit()
    here.gate.holds(2, "a", 2)
    here.step()
    here.join(1)
    here.now_s += 1.0
    here.step()
    told = [(event.type, event.data["in_sync"]) for event in here.told("syncDegraded", "syncRestored")]
    assert told == [("syncRestored", 2), ("syncDegraded", 1), ("syncRestored", 2)]
    assert here.acknowledged == [("a", 1), ("a", 2)]


def test_commits_that_wait_for_long_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    here = world()
    here.commit()
    here.step()
    assert here.gate.stalled() is None and not caplog.records
    here.now_s += 2.0
    here.commit("b")
    for _ in range(3):
        here.step()
    told = here.gate.stalled()
    assert told is not None and told.count == 2 and 2.0 < told.seconds < 2.5
    assert str(told) == "2 commits wait for replicas since 2 s: 0 of 1 replicas connected (replication.sync: 1)"
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.getMessage() == (
        f"{told}. They wait without a limit (replication.timeout): start the replicas, or see litefs status"
    )
    with caplog.at_level("INFO"):
        here.join(1)
        for _ in range(3):
            here.step()
    assert here.gate.stalled() is None and len(here.acknowledged) == 2
    ends = [found.getMessage() for found in caplog.records if "any more" in found.getMessage()]
    assert ends == ["commits do not wait for replicas any more, after 2 s"]


def test_why_commits_wait_is_told() -> None:
    here = world(replicas=2)
    here.join(0xA)
    here.commit()
    here.now_s += 2.0
    assert here.why() == "1 of 2 replicas connected (replication.sync: 2)"
    here.gate.joined(0xB)
    assert here.why() == "replicas are connected, but have not caught up yet"
    here.write = lambda nodes: (_ for _ in ()).throw(Unavailable("not now"))
    here.gate.holds(0xA, "a", 1)
    here.gate.holds(0xB, "a", 1)
    here.step()
    assert here.why() == "which replicas are in sync could not be written down"
    here.write = here._write
    here.now_s += 1.0
    here.step()
    assert here.gate.stalled() is None
    here.commit()
    here.gate.holds(0xA, "a", 2)
    here.now_s += 1.6
    assert here.why() == "no answer from 000000000000000B"


FEW = (1, 2, 3)


class Anything(RuleBasedStateMachine):
    """Replicas come, go, hold and report in any order; writes of the state succeed, fail, or are not answered, and
    count at any time until a later one has succeeded. Whichever set may stand there, its nodes hold what was
    acknowledged, and with "wait" it has enough of them; and what waits is answered once all is well."""

    @initialize(
        replicas=st.sampled_from([2, 2, 1]),
        mode=st.sampled_from(Mode),
        limited=st.booleans(),
        written=st.one_of(st.none(), st.frozensets(st.sampled_from(FEW), max_size=2)),
        present=st.lists(st.tuples(st.sampled_from(FEW), st.sampled_from([True, True, False])), max_size=3),
    )
    def begin(
        self, replicas: int, mode: Mode, limited: bool, written: frozenset[int] | None, present: list[tuple[int, bool]]
    ) -> None:
        self.rules = SyncRules(
            replicas, mode, timeout_s=2.0 if limited or mode is Mode.DEGRADE else 0.0, take_in_s=0.5
        )
        self.loop = asyncio.new_event_loop()
        self.held = {node: dict.fromkeys(NAMES, 0) for node in FEW}  # durably, whether we were told or not
        self.heads: dict[str, int] = {}
        self.acknowledged: dict[str, int] = {}
        self.begin_term(written)
        for node, ends in present:
            self.catch_up(node, 1, ends)

    def begin_term(self, written: frozenset[int] | None) -> None:
        self.world = World(self.rules, written)
        self.world.heads = self.heads
        self.unsure: list[frozenset[int]] = [frozenset(FEW)] if written is None else []  # writes that may count yet
        self.connected: set[int] = set()
        self.told = 0
        self.writing: asyncio.Future[None] | None = None
        self.task: asyncio.Task[None] | None = None
        self.world.gate._change = self.change

    @property
    def may_stand(self) -> list[frozenset[int]]:
        return [self.world.document or frozenset(), *self.unsure]

    async def change(self, nodes: frozenset[int]) -> None:
        self.wanted, self.writing = nodes, self.loop.create_future()
        self.unsure.append(nodes)
        await self.writing

    def pump(self) -> None:
        for _ in range(5):
            self.loop.run_until_complete(asyncio.sleep(0))
            self.check()

    @rule(name=st.sampled_from(NAMES), holders=st.just(frozenset(FEW)) | st.frozensets(st.sampled_from(FEW)))
    def commit(self, name: str, holders: frozenset[int]) -> None:
        self.world.commit(name)
        self.check()
        for node in holders:
            self.hold(node, name, report=True)

    @rule(node=st.sampled_from(FEW), name=st.sampled_from(NAMES), report=st.booleans())
    def hold(self, node: int, name: str, report: bool) -> None:
        if node in self.connected:
            self.held[node][name] = self.heads.get(name, 0)
            if report:
                self.report(node)

    @rule(node=st.sampled_from(FEW))
    def report(self, node: int) -> None:
        if node in self.connected:
            for name in NAMES:
                self.world.gate.holds(node, name, self.held[node][name])
                self.check()

    @rule(node=st.sampled_from(FEW), looks=st.integers(1, 3), ends=st.sampled_from([None, True, False]))
    def catch_up(self, node: int, looks: int, ends: bool | None) -> None:
        self.join(node)
        for name in NAMES:
            self.hold(node, name, report=True)
        self.world.now_s += 0.6  # so that a pause is over
        for _ in range(looks):
            self.look()
        if ends is not None and self.is_writing:
            self.write_ends(ends)

    @rule(node=st.sampled_from(FEW))
    def join(self, node: int) -> None:
        if node not in self.connected:
            self.connected.add(node)
            self.world.gate.joined(node)

    @rule(node=st.sampled_from(FEW))
    def leave(self, node: int) -> None:
        self.connected.discard(node)
        self.world.gate.left(node)

    @rule(old=st.sampled_from(FEW), new=st.sampled_from(FEW), behind=st.booleans(), answered=st.booleans())
    def replace(self, old: int, new: int, behind: bool, answered: bool) -> None:
        """One is lost, another takes its place, or falls behind before it has."""
        self.leave(old)
        self.catch_up(new, 0, None)
        if behind:
            self.world.commit("a")
        self.look()
        self.look()
        if self.is_writing:
            self.write_ends(answered)
        else:
            self.world.now_s += 0.6  # it is not waited for any more
            self.look()

    @rule(node=st.sampled_from(FEW), name=st.sampled_from(NAMES))
    def stray(self, node: int, name: str) -> None:
        self.world.gate.strayed(node, name)

    @rule(seconds=st.sampled_from([0.1, 1.0, 3.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.now_s += seconds

    @rule()
    def look(self) -> None:
        if self.task is None or self.task.done():
            if self.task is not None:
                self.task.result()
            self.task = self.loop.create_task(self.world.gate.step())
        else:
            self.loop.run_until_complete(asyncio.sleep(0.0025))  # it asks every 2 ms
        self.pump()

    @property
    def is_writing(self) -> bool:
        return self.writing is not None and not self.writing.done()

    @precondition(lambda self: self.is_writing)
    @rule(answered=st.booleans())
    def write_ends(self, answered: bool) -> None:
        assert self.writing is not None
        if answered:
            self.world.document, self.unsure = self.wanted, []
            self.writing.set_result(None)
        else:
            self.writing.set_exception(Unavailable("no answer"))
        self.pump()

    @rule(stands=st.integers(0, 9), refused=st.booleans())
    def another_term(self, stands: int, refused: bool) -> None:
        """This node is elected once more, on whichever set stands there. The end of its term is a write that is
        refused, or comes without one."""
        if refused and self.is_writing:
            assert self.writing is not None
            self.writing.set_exception(LeaseLost("another node leads"))
            self.pump()
            assert self.world.gate.is_closed
        self.world.gate.close(Unavailable("demoted"))
        self.world.commit("a")
        self.check()
        assert self.world.gate.waiting == 0
        self.end()
        self.begin_term(self.may_stand[stands % len(self.may_stand)])

    def check(self) -> None:
        answers = self.world.answers
        fresh, self.told = answers[self.told :], len(answers)
        for name, txid, error in fresh:
            if error is not None:
                assert (self.rules.mode is Mode.WAIT and self.rules.timeout_s) or self.world.gate.is_closed
                continue
            self.acknowledged[name] = max(txid, self.acknowledged.get(name, 0))
            if self.rules.mode is Mode.WAIT:
                assert sum(self.held[node][name] >= txid for node in FEW) >= self.rules.replicas
                assert all(len(nodes) >= self.rules.replicas for nodes in self.may_stand), "nobody could take over"
        for node in frozenset[int]().union(*self.may_stand):
            for name, txid in self.acknowledged.items():
                assert self.held[node][name] >= txid, f"node {node} may be elected and lacks {name} {txid}"

    @invariant()
    def who_may_be_elected_holds_what_was_acknowledged(self) -> None:
        self.check()

    @rule()
    def all_is_well(self) -> None:
        """Everybody is there and holds everything, and the state can be written: what waits is answered."""
        for _ in range(4):
            for node in FEW:
                self.catch_up(node, 1, ends=True)
        gate = self.world.gate
        assert gate.waiting == 0 and len(gate.in_sync) == self.rules.replicas and gate.in_sync == self.world.document
        for name in NAMES:
            txid = self.world.commit(name)
            for node in gate.in_sync:
                assert (name, txid, None) not in self.world.answers, "it does not wait for all that may be elected"
                self.held[node][name] = txid
                self.world.gate.holds(node, name, txid)
            assert (name, txid, None) in self.world.answers, "it waits for others"
        self.check()

    def end(self) -> None:
        if self.task is not None and not self.task.done():
            self.task.cancel()
            for _ in range(3):
                self.loop.run_until_complete(asyncio.sleep(0))

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            self.end()
            self.loop.close()


TestAnything = Anything.TestCase
TestAnything.settings = settings(max_examples=300, stateful_step_count=30, deadline=None)
