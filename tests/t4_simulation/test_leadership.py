"""`cluster.leadership` on virtual time: who leads, when, and what becomes of a lease that cannot be renewed."""

from __future__ import annotations

import asyncio

from leadership_cluster import TTL_S, Cluster, run

from pylitefs.cluster.state import Document


def test_one_of_three_leads_and_the_others_follow() -> None:
    async def scenario() -> None:
        cluster = Cluster(3)
        cluster.start()
        await cluster.until(lambda: cluster.leader)
        leader = cluster.leader
        assert leader is not None
        assert leader.write("x")
        others = [node for node in cluster.nodes.values() if node is not leader]
        await cluster.until(lambda: all(node.leader and node.leader.node_id == leader.node_id for node in others))
        assert not any(node.write("y") for node in others)
        await asyncio.sleep(10 * TTL_S)
        assert cluster.leader is leader
        document = Document.unpack(cluster.service.view().state.data)
        assert document.state.epoch == 1
        assert document.state.has_data
        assert [entry.reason for entry in document.history] == ["first primary"]
        await cluster.stop()

    run(scenario)


def test_another_takes_over_soon_after_the_leader_has_died() -> None:
    async def scenario() -> None:
        cluster = Cluster(3)
        cluster.start()
        await cluster.until(lambda: cluster.leader)
        first = cluster.leader
        assert first is not None
        first.write("x")
        await cluster.until(lambda: Document.unpack(cluster.service.view().state.data).state.has_data)
        cluster.replicate()
        await first.kill()
        took_s = await cluster.until(lambda: cluster.leader not in (None, first))
        second = cluster.leader
        assert took_s < TTL_S + 1
        assert second is not None
        assert second.log == [(1, "x")]
        assert second.epoch == 2
        await cluster.stop()

    run(scenario)


def test_the_node_with_the_most_data_wins() -> None:
    async def scenario() -> None:
        cluster = Cluster(3)
        cluster.start()
        await cluster.until(lambda: cluster.leader)
        first = cluster.leader
        assert first is not None
        for value in "abc":
            first.write(value)
        await cluster.until(lambda: Document.unpack(cluster.service.view().state.data).state.has_data)
        behind, ahead = [node for node in cluster.nodes.values() if node is not first]
        for node, count in ((behind, 2), (ahead, 3)):
            node.log, node.cluster_id = first.log[:count], first.cluster_id
        await first.kill()
        await cluster.until(lambda: cluster.leader not in (None, first))
        assert cluster.leader is ahead
        await cluster.stop()

    run(scenario)


def test_a_leader_without_its_engine_acknowledges_nothing_once_another_can_lead() -> None:
    async def scenario() -> None:
        cluster = Cluster(2)
        cluster.start()
        await cluster.until(lambda: cluster.leader)
        first = cluster.leader
        assert first is not None
        first.engine.cut = True
        await cluster.until(lambda: not first.is_primary)
        await cluster.until(lambda: cluster.leader not in (None, first))
        assert any("could not be renewed" in event for event in first.events)
        first.engine.cut = False
        await cluster.until(lambda: first.leader is not None)
        assert first.events[-1] == f"follows {cluster.leader.node_id if cluster.leader else 0}"
        await cluster.stop()

    run(scenario)


def test_without_the_engine_nobody_leads_and_with_failsafe_the_leader_stays() -> None:
    async def scenario(failsafe: bool) -> None:
        cluster = Cluster(3, failsafe=failsafe)
        cluster.start()
        await cluster.until(lambda: cluster.leader)
        first = cluster.leader
        assert first is not None
        others = [node for node in cluster.nodes.values() if node is not first]
        await cluster.until(lambda: all(node.leader for node in others))
        await asyncio.sleep(TTL_S)
        for node in cluster.nodes.values():
            node.engine.cut = True
        if not failsafe:
            assert await cluster.until(lambda: cluster.leader is None) <= TTL_S
            await asyncio.sleep(3 * TTL_S)
            assert cluster.leader is None
        else:
            for _ in range(200):
                assert first.write("x")
                await asyncio.sleep(TTL_S / 10)
        for node in cluster.nodes.values():
            node.engine.cut = False
        await cluster.until(lambda: cluster.leader)
        if failsafe:
            await asyncio.sleep(5 * TTL_S)
            assert cluster.leader is first
            assert first.epoch == 2  # the lease had ended: a new term
        await cluster.stop()

    run(lambda: scenario(False))
    run(lambda: scenario(True))


def test_failsafe_ends_when_one_member_does_not_confirm() -> None:
    async def scenario() -> None:
        cluster = Cluster(3, failsafe=True)
        cluster.start()
        await cluster.until(lambda: cluster.leader)
        first = cluster.leader
        assert first is not None
        others = [node for node in cluster.nodes.values() if node is not first]
        await cluster.until(lambda: all(node.leader for node in others))
        await asyncio.sleep(TTL_S)
        first.engine.cut = True
        cluster.cuts.add(frozenset((first.node_id, others[0].node_id)))
        await cluster.until(lambda: cluster.leader not in (None, first))
        assert not first.is_primary
        await cluster.stop()

    run(scenario)


def test_the_lease_is_passed_on_to_the_node_that_is_named() -> None:
    async def scenario() -> None:
        cluster = Cluster(5)
        cluster.start()
        await cluster.until(lambda: cluster.leader)
        first = cluster.leader
        assert first is not None
        first.write("x")
        await cluster.until(lambda: Document.unpack(cluster.service.view().state.data).state.has_data)
        cluster.replicate()
        successor = next(node for node in cluster.nodes.values() if node is not first)
        leaving = asyncio.create_task(first.leadership.leave("handed over", successor.node_id))
        took_s = await cluster.until(lambda: cluster.leader is successor)
        await leaving
        assert took_s < 0.5
        assert f"passed on to {successor.node_id}" in first.events
        history = Document.unpack(cluster.service.view().state.data).history
        assert [entry.reason for entry in history] == ["first primary", "handed over"]
        await cluster.stop()

    run(scenario)


def test_a_successor_that_has_died_keeps_nobody_from_leading() -> None:
    async def scenario() -> None:
        cluster = Cluster(3)
        cluster.start()
        await cluster.until(lambda: cluster.leader)
        first = cluster.leader
        assert first is not None
        first.write("x")
        await cluster.until(lambda: Document.unpack(cluster.service.view().state.data).state.has_data)
        cluster.replicate()
        dead, _ = [node for node in cluster.nodes.values() if node is not first]
        await dead.kill()
        await first.leadership.leave("handed over", dead.node_id)
        await cluster.until(lambda: cluster.leader, TTL_S * 2)
        assert cluster.leader is not dead
        await cluster.stop()

    run(scenario)


def test_paused_only_the_last_leader_comes_back_and_take_overrides_it() -> None:
    async def scenario() -> None:
        cluster = Cluster(3)
        cluster.start()
        await cluster.until(lambda: cluster.leader)
        first = cluster.leader
        assert first is not None
        first.write("x")
        await cluster.until(lambda: Document.unpack(cluster.service.view().state.data).state.has_data)
        cluster.replicate()
        other = next(node for node in cluster.nodes.values() if node is not first)
        await other.leadership.pause(True)
        await asyncio.sleep(TTL_S)
        assert first.leadership.document.state.paused
        await first.kill()
        await asyncio.sleep(5 * TTL_S)
        assert cluster.leader is None
        assert "paused" in other.leadership.problem
        await other.leadership.take()
        await cluster.until(lambda: cluster.leader)
        assert cluster.leader is other
        assert Document.unpack(cluster.service.view().state.data).state.paused
        await cluster.stop()

    run(scenario)


def test_an_empty_leader_gives_way_to_a_node_that_has_data() -> None:
    async def scenario() -> None:
        cluster = Cluster(2)
        cluster.start(1)
        await cluster.until(lambda: cluster.leader)
        other = cluster.nodes[2]
        other.log, other.cluster_id = [(1, "x")], "C9"
        cluster.nodes[1].cluster_id = ""
        cluster.start(2)
        await cluster.until(lambda: cluster.leader is other)
        await cluster.stop()

    run(scenario)
