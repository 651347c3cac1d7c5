"""What a node tells people of its cluster: who is away, who has just ceased to lead, and what was dropped."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from pair import Pair
from test_node_switch import member, until

from pylitefs.cluster.candidate import Settings
from pylitefs.cluster.control import ClusterView, HistoryEntry, MemberView
from pylitefs.cluster.known_nodes import AWAY_S, MAX_AWAY, KnownNodes
from pylitefs.cluster.lease_port import Member
from pylitefs.cluster.state import Document
from pylitefs.config import parse
from pylitefs.engine.store import Store, StoreOptions
from pylitefs.events import Event, EventBus
from pylitefs.http.cluster_documents import cluster_document, members_from, numbers
from pylitefs.node import Node
from pylitefs.node_control import NodeControl


def of(view: ClusterView, node_id: int) -> MemberView:
    (found,) = [shown for shown in view.members if shown.node_id == node_id]
    return found


async def test_members_that_are_away_stay_in_sight(tmp_path: Path) -> None:
    """Their entries in the engine end with their TTL. Commits may wait for one that this process has never seen."""
    async with member(tmp_path) as (node, engine):
        control = NodeControl(node)
        await engine.announce(Member(7, "n7", "http://127.0.0.1:7", priority=3), 1.0)
        await node.start_member(engine, "memory", Settings(ttl_s=2.0))
        leadership = node.leadership
        assert leadership is not None
        await until(lambda: leadership.leads and leadership.known.hostnames(leadership.document).get(7))
        await until(lambda: of(control.view(), 7).state == "away")
        await leadership.change_state(lambda state: replace(state, in_sync=frozenset({7, 9})))
        view = control.view()
        seven, nine = of(view, 7), of(view, 9)
        assert (seven.hostname, seven.url, seven.priority) == ("n7", "http://127.0.0.1:7", 3)
        assert seven.in_sync and seven.seen_s is not None and nine.in_sync and nine.seen_s is None
        assert [one.node_id for one in members_from(cluster_document(view))] == [one.node_id for one in view.members]
        assert numbers(view, True, 1.0, 0).members == 1, "as before: those that are there"
        await engine.announce(Member(7, "n7", "http://127.0.0.1:7"), 30.0)
        await until(lambda: of(control.view(), 7).state != "away")


def test_who_matters_is_remembered_and_nobody_else_for_ever() -> None:
    clock_s = 0.0
    known = KnownNodes(lambda: clock_s)
    led = Document(history=(HistoryEntry(1, 5, "n5", 0, "", 0),))
    for number in range(10, 60):
        known.saw(Member(number, f"n{number}"))
    away = known.away({59}, {5, 10}, led)
    assert len(away) == 2 + MAX_AWAY and {10, 58} <= {found.node_id for found, _ in away}
    assert (Member(5, "n5"), None) in away and (Member(10, "n10"), 0.0) in away
    assert known.hostnames(led)[5] == "n5" and known.hostnames(led)[59] == "n59"
    clock_s = AWAY_S + 1.0
    assert known.away((), {10}, led) == [(Member(10, "n10"), clock_s)]


async def test_a_node_that_has_just_lost_its_office_does_not_call_itself_the_primary(tmp_path: Path) -> None:
    async with member(tmp_path) as (node, engine):
        await node.start_member(engine, "memory", Settings(ttl_s=30.0))
        leadership, control = node.leadership, NodeControl(node)
        assert leadership is not None
        await until(lambda: leadership.leads)
        assert control.view().primary is not None
        views: list[ClusterView] = []

        def heard(event: Event) -> None:
            if event.type == "demoted":
                assert leadership.view is not None and leadership.view.leader is not None
                views.append(control.view())

        node.store.events.subscribe(heard)
        await leadership.leave("handed over", 7)
        assert [(view.primary, view.is_primary) for view in views] == [(None, False)]
        assert [shown.role for shown in views[0].members if shown.node_id == node.node_id] in ([], ["replica"])


@contextlib.asynccontextmanager
async def static_replica(folder: Path, pair: Pair) -> AsyncIterator[tuple[Node, NodeControl, Callable[[], None]]]:
    """A node whose configuration names a primary, which is the one of `pair`; and what cuts it off from that."""
    document = {
        "fuse": {"dir": str(folder / "mnt")}, "data": {"dir": str(folder / "data")},
        "lease": {"type": "static", "hostname": "db1", "advertise-url": "http://127.0.0.1:1", "candidate": False},
    }  # fmt: skip
    (folder / "data").mkdir()
    store = Store(str(folder / "data"), EventBus(), StoreOptions(is_primary=False))
    store.load()
    store.start()
    node = Node(parse(json.dumps(document)), store, 1)
    try:
        await node.start_replica("db1", "http://127.0.0.1:1")
        yield node, NodeControl(node), lambda: pair.wires[-1].cut("the power is off")
    finally:
        await node.stop()
        await node.close()
        await asyncio.to_thread(store.close, clean=True)


async def test_a_static_replica_whose_primary_is_away_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not that it is 0 transactions behind; and where its primary is."""
    pair = Pair(tmp_path)
    try:
        async with pair.running():
            pair.write("a.db", 3)
            pair.write("b.db", 1).drop()
            monkeypatch.setattr("pylitefs.node.connector", lambda http, url: pair.connect)
            folder = tmp_path / "static"
            folder.mkdir()
            pair.following.cancel()
            async with static_replica(folder, pair) as (node, control, cut):
                await until(lambda: node.lag_txids == 0 and node.unhealthy() is None and node.ready.is_set())
                view = control.view()
                assert of(view, node.node_id).state != "not connected" and of(view, node.node_id).lag_txids == 0
                assert set(node.positions()) == {"a.db", "b.db"}, "for elections"
                assert set(of(view, node.node_id).positions) == {"a.db"}, "a database that was dropped is shown"
                pair.unreachable = True
                cut()
                await until(lambda: node.unhealthy() is not None)
                view = control.view()
                me = of(view, node.node_id)
                assert (me.state, me.lag_txids) == ("not connected", None)
                assert view.problem.startswith("not connected to the primary for 0 s: ")
                assert view.primary is not None and view.primary.seen_s is not None
                assert (view.primary.hostname, view.primary.url) == ("db1", "http://127.0.0.1:1")
    finally:
        pair.close()
