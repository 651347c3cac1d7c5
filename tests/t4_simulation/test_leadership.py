"""`cluster.leadership` on virtual time: who leads, when, and what becomes of a lease that cannot be renewed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from leadership_cluster import TTL_S, Cluster, FakeNode, cluster_of, loop_time_s, virtual

from pylitefs.cluster.control import FORCED
from pylitefs.cluster.election import Positions
from pylitefs.cluster.lease_port import Held, Member
from pylitefs.errors import Ineligible, Unavailable


def others(cluster: Cluster, node: FakeNode) -> list[FakeNode]:
    return [other for other in cluster.nodes.values() if other is not node]


async def next_leader(cluster: Cluster, first: FakeNode) -> FakeNode:
    await cluster.until(lambda: cluster.leader not in (None, first))
    leader = cluster.leader
    assert leader is not None
    return leader


@virtual
async def test_one_of_three_leads_and_the_others_follow() -> None:
    async with cluster_of(3) as (cluster, leader):
        assert all(node.leader and node.leader.node_id == leader.node_id for node in others(cluster, leader))
        assert not any(node.write("y") for node in others(cluster, leader))
        await asyncio.sleep(10 * TTL_S)
        assert cluster.leader is leader
        assert cluster.document.state.epoch == 1
        assert cluster.document.state.has_data
        assert [entry.reason for entry in cluster.document.history] == ["first primary"]


@virtual
async def test_another_takes_over_soon_after_the_leader_has_died() -> None:
    async with cluster_of(3) as (cluster, first):
        await first.kill()
        took_s = await cluster.until(lambda: cluster.leader not in (None, first))
        second = cluster.leader
        assert took_s < TTL_S + 1
        assert second is not None
        assert second.log == [(1, "x")]
        assert second.epoch == 2


@virtual
async def test_the_node_with_the_most_data_wins() -> None:
    async with cluster_of(3) as (cluster, first):
        for value in "abc":
            first.write(value)
        behind, ahead = others(cluster, first)
        for node, count in ((behind, 2), (ahead, 3)):
            node.log = first.log[:count]
        await first.kill()
        assert await next_leader(cluster, first) is ahead


@virtual
async def test_a_leader_without_its_engine_acknowledges_nothing_once_another_can_lead() -> None:
    async with cluster_of(2, write=False) as (cluster, first):
        first.engine.cut = True
        await cluster.until(lambda: not first.is_primary)
        second = await next_leader(cluster, first)
        assert any("could not be renewed" in event for event in first.events)
        first.engine.cut = False
        await cluster.until(lambda: first.leader is not None)
        assert first.events[-1] == f"follows {second.node_id}"


@virtual
async def test_without_the_engine_nobody_leads() -> None:
    async with cluster_of(3) as (cluster, _):
        for node in cluster.nodes.values():
            node.engine.cut = True
        assert await cluster.until(lambda: cluster.leader is None) <= TTL_S
        await asyncio.sleep(3 * TTL_S)
        assert cluster.leader is None
        for node in cluster.nodes.values():
            node.engine.cut = False
        await cluster.until(lambda: cluster.leader)


# --- failsafe


@virtual
async def test_without_the_engine_and_with_failsafe_the_leader_stays() -> None:
    async with cluster_of(3, failsafe=True) as (cluster, first):
        await asyncio.sleep(TTL_S)
        for node in cluster.nodes.values():
            node.engine.cut = True
        for _ in range(200):
            assert first.write("x")
            await asyncio.sleep(TTL_S / 10)
        for node in cluster.nodes.values():
            node.engine.cut = False
        await asyncio.sleep(5 * TTL_S)
        assert cluster.leader is first
        assert first.epoch == 2  # the lease had ended: a new term


@virtual
async def test_failsafe_ends_when_one_member_does_not_confirm() -> None:
    async with cluster_of(3, failsafe=True) as (cluster, first):
        await asyncio.sleep(TTL_S)
        first.engine.cut = True
        cluster.cuts.add(frozenset((first.node_id, others(cluster, first)[0].node_id)))
        await next_leader(cluster, first)
        assert not first.is_primary


@virtual
async def test_a_node_that_may_have_promised_before_its_restart_waits_for_the_leases_time() -> None:
    """It has promised in failsafe not to lead, is killed, and does not know it any more; the leader counts on it."""
    async with cluster_of(2, failsafe=True) as (cluster, first):
        await asyncio.sleep(TTL_S)
        (other,) = others(cluster, first)
        for node in cluster.nodes.values():
            node.engine.cut = True
        await asyncio.sleep(2 * TTL_S)
        assert cluster.leader is first, "failsafe"
        await other.kill()
        other.start()
        assert await next_leader(cluster, first) is other  # and `until` has seen that there were never two
        assert not first.is_primary


@virtual
@pytest.mark.parametrize("force", [False, True])
async def test_an_operator_cannot_undo_what_a_node_may_have_promised_before_its_restart(force: bool) -> None:
    """It alone sees the engine again, and is asked to lead. The leader counts on the promise still."""
    async with cluster_of(2, failsafe=True) as (cluster, first):
        await asyncio.sleep(TTL_S)
        (other,) = others(cluster, first)
        for node in cluster.nodes.values():
            node.engine.cut = True
        await asyncio.sleep(2 * TTL_S)
        assert cluster.leader is first, "failsafe"
        await other.kill()
        other.engine.cut = False
        other.start()
        wanted = asyncio.create_task(other.leadership.take(force=force))
        await cluster.until(lambda: cluster.leader is other)  # `until` has seen that there were never two
        await wanted
        assert not first.is_primary


@virtual
async def test_one_promotion_at_a_time() -> None:
    """Failsafe while the node is still being promoted: the term that the lease's end begins must not begin there."""
    async with cluster_of(2, failsafe=True) as (cluster, first):
        await asyncio.sleep(TTL_S)
        (other,) = others(cluster, first)
        other.promote_s = 5 * TTL_S
        await first.leadership.leave("handed over", other.node_id)
        await cluster.until(lambda: other.is_being_promoted and first.leader)
        for node in cluster.nodes.values():
            node.engine.cut = True
        await asyncio.sleep(2 * TTL_S)
        for node in cluster.nodes.values():
            node.engine.cut = False
        await cluster.until(lambda: cluster.leader)  # `promote` has seen that it was never called twice
        assert cluster.document.state.epoch == 3


@virtual
async def test_a_leader_whose_successor_is_lost_can_lead_again() -> None:
    """The successor was lost before it had anybody in sync: nobody else has what was acknowledged before."""
    async with cluster_of(3, sync=1) as (cluster, first):
        second, third = others(cluster, first)
        second.log = list(first.log)
        in_sync = frozenset([second.node_id])
        await first.leadership.change_state(lambda state: replace(state, in_sync=in_sync))
        await first.kill()
        assert await next_leader(cluster, first) is second
        await second.kill()
        first.start()
        assert await next_leader(cluster, second) is first
        assert third.is_primary is False


# --- handing over


@virtual
async def test_the_lease_is_passed_on_to_the_node_that_is_named() -> None:
    async with cluster_of(5) as (cluster, first):
        successor = others(cluster, first)[0]
        leaving = asyncio.create_task(first.leadership.leave("handed over", successor.node_id))
        took_s = await cluster.until(lambda: cluster.leader is successor)
        await leaving
        assert took_s < 0.5
        assert f"passed on to {successor.node_id}" in first.events
        assert [entry.reason for entry in cluster.document.history] == ["first primary", "handed over"]


@virtual
async def test_a_node_that_has_passed_on_the_lease_does_not_lead_while_it_is_demoted() -> None:
    """`litefs sync` asks it where the cluster stands, and health checks whether it is the primary."""
    async with cluster_of(2) as (cluster, first):
        first.demote_s = 1.0
        (successor,) = others(cluster, first)
        leaving = asyncio.create_task(first.leadership.leave("handed over", successor.node_id))
        await cluster.until(lambda: successor.leadership.leads)
        assert not leaving.done()
        assert not first.leadership.leads
        await leaving


@virtual
async def test_a_successor_that_has_died_keeps_nobody_from_leading() -> None:
    async with cluster_of(3) as (cluster, first):
        dead = others(cluster, first)[0]
        await dead.kill()
        await first.leadership.leave("handed over", dead.node_id)
        await cluster.until(lambda: cluster.leader, TTL_S * 2)
        assert cluster.leader is not dead


@virtual
@pytest.mark.parametrize("fault", ["refused", "unheard"])
async def test_a_handover_that_failed_is_taken_back(fault: str) -> None:
    """Else it would count at a later failover too, and that node may lack what was committed since."""
    async with cluster_of(3) as (cluster, first):
        behind, ahead = others(cluster, first)
        first.engine.faults = [fault]
        with pytest.raises(Unavailable, match="not passed on"):
            await first.leadership.leave("handed over", behind.node_id)
        assert cluster.leader is first
        assert cluster.document.state.handoff_to == 0
        assert first.write("y")
        ahead.log = list(first.log)
        await first.kill()
        assert await next_leader(cluster, first) is ahead


@virtual
async def test_a_handover_that_cannot_be_taken_back_ends_the_term() -> None:
    """Nobody can tell what stands in the engine: the successor has everything, and nothing is written any more."""
    async with cluster_of(3) as (cluster, first):
        successor = others(cluster, first)[0]
        first.engine.faults = ["unheard", "refused"]
        leaving = asyncio.create_task(first.leadership.leave("handed over", successor.node_id))
        await cluster.until(lambda: not first.engine.faults)
        assert not first.write("y")
        await leaving
        assert await next_leader(cluster, first) is successor
        assert not first.is_primary


@virtual
async def test_a_handover_that_was_cancelled_is_given_up() -> None:
    """By then everybody else may have less than this node: it writes on."""
    async with cluster_of(2) as (cluster, first):
        first.engine.slow_s = lambda: 0.1
        leaving = asyncio.create_task(first.leadership.leave("handed over", others(cluster, first)[0].node_id))
        await cluster.until(lambda: first.until_s == 0.0)
        leaving.cancel()
        await asyncio.wait({leaving})
        await cluster.until(lambda: cluster.leader)
        assert cluster.leader is first
        assert first.write("y")
        await asyncio.sleep(5 * TTL_S)
        assert cluster.leader is first
        assert cluster.document.state.handoff_to == 0
        assert "passed on to 2" not in first.events


@virtual
async def test_a_stop_ends_a_handover_that_is_under_way() -> None:
    async with cluster_of(2) as (cluster, first):
        first.engine.slow_s = lambda: 0.1
        leaving = asyncio.create_task(first.leadership.leave("handed over", others(cluster, first)[0].node_id))
        await cluster.until(lambda: first.until_s == 0.0)
        async with asyncio.timeout(TTL_S):
            await first.leadership.stop("the node is stopping")
        with pytest.raises(Unavailable, match="the node is stopping"):
            await leaving
        await next_leader(cluster, first)


@virtual
async def test_an_empty_leader_gives_way_to_a_node_that_has_data() -> None:
    cluster = Cluster(2)
    cluster.start(1)
    await cluster.until(lambda: cluster.leader)
    other = cluster.nodes[2]
    other.log, other.cluster_id = [(1, "x")], "C9"
    cluster.nodes[1].cluster_id = ""
    cluster.start(2)
    await cluster.until(lambda: cluster.leader is other)
    await cluster.stop()


@virtual
async def test_a_leader_that_gets_data_while_it_asks_the_others_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was acknowledged would go to lost/."""
    cluster = Cluster(2)
    cluster.start(1)
    await cluster.until(lambda: cluster.leader)
    first, other = cluster.nodes[1], cluster.nodes[2]
    other.log, other.cluster_id = [(1, "x")], "C9"
    first.cluster_id = ""
    ask = first.ask

    async def asked(member: Member, timeout_s: float) -> Positions:
        answer = await ask(member, timeout_s)
        if not first.log:
            assert first.write("y")
        return answer

    monkeypatch.setattr(first, "ask", asked)
    cluster.start(2)
    await cluster.until(lambda: first.log)
    await asyncio.sleep(2 * TTL_S)
    assert cluster.leader is first and [value for _, value in first.log] == ["y"]
    await cluster.stop()


@virtual
async def test_an_empty_leader_gives_way_also_after_a_handover_that_failed() -> None:
    cluster = Cluster(2)
    cluster.start(1)
    await cluster.until(lambda: cluster.leader)
    first, other = cluster.nodes[1], cluster.nodes[2]
    other.log, other.cluster_id = [(1, "x")], "C9"
    first.cluster_id = ""
    first.engine.faults = ["refused"]
    with pytest.raises(Unavailable):
        await first.leadership.leave("handed over", 2)
    cluster.start(2)
    await cluster.until(lambda: cluster.leader is other)
    await cluster.stop()


# --- the end of a term


@virtual
async def test_a_later_epoch_ends_the_term_at_once() -> None:
    """A replica has followed a later primary than us: nothing is acknowledged from that moment on, also when a renewal
    that was under way succeeds."""
    async with cluster_of(2) as (cluster, first):
        first.engine.slow_s = lambda: 0.1
        await cluster.until(lambda: first.engine.is_renewing)
        first.demote_s = 0.5
        first.leadership.supersede("epoch 9 has begun")
        assert not first.write("y")
        while first.is_primary:
            assert not first.write("y")
            await asyncio.sleep(0.01)
        assert "demoted: epoch 9 has begun" in first.events
        await cluster.until(lambda: cluster.leader)


@virtual
async def test_a_later_epoch_ends_a_handover_too() -> None:
    async with cluster_of(2) as (cluster, first):
        first.engine.slow_s = lambda: 0.1
        leaving = asyncio.create_task(first.leadership.leave("handed over", others(cluster, first)[0].node_id))
        await cluster.until(lambda: first.until_s == 0.0)
        first.leadership.supersede("epoch 9 has begun")
        with pytest.raises(Unavailable, match="epoch 9 has begun"):
            await leaving
        await cluster.until(lambda: not first.is_primary)


@virtual
async def test_a_lease_that_is_lost_during_the_promotion_is_not_used() -> None:
    """What the promotion's thread does it does to its end, and then it is undone."""
    async with cluster_of(2) as (cluster, first):
        (other,) = others(cluster, first)
        other.promote_s = 3 * TTL_S
        await first.leadership.leave("handed over", other.node_id)
        await cluster.until(lambda: other.is_being_promoted)
        other.engine.cut = True
        await cluster.until(lambda: cluster.leader is first)
        assert other.is_being_promoted, "its thread still runs"
        other.engine.cut = False
        await cluster.until(lambda: not other.is_being_promoted and other.leader)
        assert [event for event in other.events if not event.startswith("follows")] == [
            "demoted: the lease could not be renewed: the lease engine does not answer"
        ]
        assert cluster.leader is first


@virtual
async def test_a_term_that_fails_says_why() -> None:
    """The cluster's id could not be written down."""
    cluster = Cluster(1)
    node = cluster.nodes[1]
    node.engine.faults = ["refused"]
    cluster.start()
    await cluster.until(lambda: cluster.leader and cluster.document.state.cluster_id)
    assert "demoted: the engine was not reached" in node.events
    await cluster.stop()


@virtual
async def test_a_stop_does_not_wait_for_ever_for_a_term_that_has_ended() -> None:
    async with cluster_of(2) as (cluster, first):
        first.demote_s = 2.0
        first.engine.cut = True
        await cluster.until(lambda: first.until_s == 0.0)
        assert first.is_primary, "it is being demoted"
        async with asyncio.timeout(60):
            await first.leadership.stop("the node is stopping")
        assert not first.is_primary


# --- paused


@pytest.mark.parametrize("number", [0, 1])
@virtual
async def test_paused_only_the_last_leader_comes_back_and_take_overrides_it(number: int) -> None:
    """The operator's choice counts, not which of the others has the lower id."""
    async with cluster_of(3) as (cluster, first):
        other = others(cluster, first)[number]
        await other.leadership.pause(True)
        await asyncio.sleep(TTL_S)
        assert first.leadership.document.state.paused
        await first.kill()
        await asyncio.sleep(5 * TTL_S)
        assert cluster.leader is None
        assert "paused" in other.leadership.problem
        await other.leadership.take()
        assert cluster.leader is other
        assert cluster.document.state.paused
        assert cluster.document.history[-1].reason == "promoted"


# --- by force


@contextlib.asynccontextmanager
async def one_of_three_is_left() -> AsyncIterator[tuple[Cluster, FakeNode, FakeNode, FakeNode]]:
    """The leader and the node in sync have died, with a commit that the third never got: the cluster, and all three."""
    async with cluster_of(3, sync=1) as (cluster, first):
        standby, third = others(cluster, first)
        await first.leadership.change_state(lambda state: replace(state, in_sync=frozenset({standby.node_id})))
        assert first.write("y")
        standby.log = list(first.log)
        third.follows = False
        await first.kill()
        await standby.kill()
        await asyncio.sleep(5 * TTL_S)
        assert cluster.leader is None
        yield cluster, first, standby, third


@virtual
async def test_a_node_that_may_lack_commits_leads_only_by_force() -> None:
    async with one_of_three_is_left() as (cluster, first, standby, third):
        with pytest.raises(Ineligible, match="litefs promote -force"):
            await third.leadership.take()
        assert cluster.leader is None
        await third.leadership.take(force=True)
        assert cluster.leader is third
        assert third.events[-2:] == ["forced 2", "promoted 2"]
        entry = cluster.document.history[-1]
        assert (entry.epoch, entry.node_id, entry.txid, entry.reason) == (2, third.node_id, 1, FORCED)
        assert cluster.document.state.in_sync == frozenset()
        first.start()
        standby.start()
        await cluster.until(lambda: first.leader and standby.leader)
        await third.kill()  # they have followed, but commits did not wait for them: they may lack some now
        await asyncio.sleep(5 * TTL_S)
        assert cluster.leader is None


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Warnings that acknowledged commits may be missing."""
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return [line for line in lines if "may lack commits" in line]


@virtual
async def test_in_a_routine_failover_nobody_is_warned_that_commits_may_be_missing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    async with cluster_of(3) as (cluster, first):
        standby, third = (node for node in cluster.nodes.values() if node is not first)
        await first.leadership.change_state(lambda state: replace(state, in_sync=frozenset({standby.node_id})))
        await first.kill()
        await cluster.until(lambda: cluster.leader is standby)
        names = ", ".join(sorted((first.hostname, standby.hostname)))
        assert not told(caplog) and f"no primary at the moment: one of {names} is expected" in caplog.text

        await cluster.until(lambda: third.leader and third.leader.node_id == standby.node_id)
        await standby.leadership.change_state(lambda state: replace(state, in_sync=frozenset()))
        await standby.kill()
        await cluster.until(lambda: third.leadership.problem.startswith("no primary at the moment"))
        assert not told(caplog)
        await cluster.until(lambda: told(caplog))  # it takes long now, and nobody is left who could
        line = (
            f"no primary: {standby.hostname} must come back first, for this node may lack commits that were "
            "acknowledged (if it is lost for good: litefs promote -force)"
        )
        assert told(caplog) == [line] and third.leadership.problem == line


@virtual
async def test_force_does_nothing_while_somebody_leads_or_could() -> None:
    async with one_of_three_is_left() as (cluster, _, standby, third):
        await third.leadership.pause(True)  # or it would just lead
        standby.start()
        await cluster.until(lambda: standby.leadership.problem.endswith("promote"))
        with pytest.raises(Ineligible, match=f"litefs promote -node {standby.hostname}"):
            await third.leadership.take(force=True)
        assert cluster.leader is None
        await standby.leadership.take()
        with pytest.raises(Unavailable, match=f"{standby.hostname} is the primary now"):
            await third.leadership.take(force=True)
        await asyncio.sleep(5 * TTL_S)
        assert cluster.leader is standby
        assert FORCED not in [entry.reason for entry in cluster.document.history]


async def two_of_three() -> tuple[Cluster, FakeNode]:
    """With failsafe; they run and have a row, and the third is known to nobody. The leader."""
    cluster = Cluster(3, failsafe=True)
    cluster.start(1, 2)
    await cluster.until(lambda: cluster.leader and any(node.leader for node in cluster.nodes.values()))
    first = cluster.leader
    assert first is not None and first.write("x")
    cluster.replicate()
    await asyncio.sleep(TTL_S)
    return cluster, first


@virtual
@pytest.mark.parametrize("force", [False, True])
async def test_nobody_is_promoted_beside_a_primary_that_leads_on_in_failsafe(force: bool) -> None:
    """It has lost the engine, and does not know the node that came later: one that it knows says that it is there."""
    cluster, first = await two_of_three()
    late = cluster.nodes[3]
    (other,) = (node for node in cluster.nodes.values() if node not in (first, late))
    first.engine.cut, other.follows = True, False
    assert first.write("z")
    await asyncio.sleep(2 * TTL_S)
    late.log, late.cluster_id = list(first.log), first.cluster_id  # more than the other has
    cluster.start(3)
    await cluster.until(lambda: "does not know this node yet" in late.leadership.problem)
    with pytest.raises(Unavailable, match=r"node-[12] follows a primary that leads on"):
        async with asyncio.timeout(60):
            await late.leadership.take(force=force)
    assert cluster.leader is first and first.write("y")
    await first.kill()
    await asyncio.sleep(2 * TTL_S)
    assert cluster.leader is other, "it was known, and leads when its promise has ended"
    await cluster.stop()


@virtual
async def test_who_has_not_promised_is_not_let_in_while_the_primary_leads_by_promises() -> None:
    """The primary cannot renew its lease, sees the engine again, and finds a node there that it did not know. That one
    must not be elected when the lease ends in the engine: nobody has asked it."""
    cluster, first = await two_of_three()
    late, renew = cluster.nodes[3], first.engine.renew

    async def fails(held: Held) -> Held:
        raise Unavailable("the lease cannot be renewed")

    first.engine.renew = fails  # type: ignore[method-assign]
    late.log, late.cluster_id = list(first.log), first.cluster_id
    cluster.cuts.add(frozenset((first.node_id, late.node_id)))
    cluster.start(3)
    until_s = loop_time_s() + 4 * TTL_S
    while loop_time_s() < until_s:
        await asyncio.sleep(0.05)
        assert cluster.leader is first  # there are never two
        assert late.node_id not in (cluster.document.state.voters or ())
    first.engine.renew = renew  # type: ignore[method-assign]
    await cluster.until(lambda: late.node_id in (cluster.document.state.voters or ()))
    await cluster.stop()


@virtual
async def test_a_node_that_was_restarted_may_have_promised() -> None:
    """Failsafe: it answers those who ask, before it has seen what stands in the engine."""
    async with cluster_of(3, failsafe=True) as (cluster, first):
        node = others(cluster, first)[0]
        await cluster.until(lambda: cluster.document.state.voters is not None)
        await asyncio.sleep(2 * TTL_S)
        assert not node.leadership.has_promised
        await node.kill()
        node.start()
        node.engine.cut = True
        await asyncio.sleep(TTL_S / 2)
        assert node.leadership.view is None and node.leadership.has_promised
        await asyncio.sleep(TTL_S)
        assert not node.leadership.has_promised


@virtual
async def test_force_that_is_given_up_is_forgotten() -> None:
    """The engine cannot be reached at that moment, and whoever wanted it does not wait: it does not come true later."""
    async with one_of_three_is_left() as (cluster, first, _, third):
        third.engine.cut = True
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(TTL_S):
                await third.leadership.take(force=True)
        third.engine.cut = False
        await asyncio.sleep(5 * TTL_S)
        assert cluster.leader is None
        first.start()
        await cluster.until(lambda: cluster.leader is first)
