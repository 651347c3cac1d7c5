"""The table of `cluster.election`, row by row, and what must hold whatever the numbers are."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pylitefs.cluster.election import (
    Acquire,
    ClusterState,
    Decision,
    Follow,
    Positions,
    Rules,
    Self,
    StandAside,
    Total,
    Wait,
    Why,
    announced,
    decide,
    decide_forced,
    gives_way_to,
    known_from,
    lag,
    position_map,
    positions_of,
    rank,
    told,
    total,
)
from pylitefs.cluster.lease_port import Leader, Member, Versioned, View

ME, YOU, THIRD = 2, 1, 3
DATA = {"a.db": (3, 100)}
MORE = {"a.db": (3, 101)}
LESS = {"a.db": (3, 90)}
NONE: Positions = {}
STATE = ClusterState(cluster_id="C1", epoch=3, has_data=True, last_leader=9)
NEW = ClusterState()
SINCE_S = 50.0


def member(node_id: int = YOU, positions: Positions = DATA, cluster_id: str = "C1", **more: Any) -> Member:
    return Member(node_id, f"node-{node_id}", info=announced(positions, cluster_id), **more)


def leader(node_id: int = YOU) -> Leader:
    return Leader(node_id, f"node-{node_id}", "http://x", 3)


def run(
    *members: Member,
    me: Positions = DATA,
    state: ClusterState = STATE,
    held_by: int = 0,
    cluster_id: str = "C1",
    deaf: tuple[int, ...] = (),
    rules: Rules | None = None,
    now_s: float = SINCE_S,
    force: bool = False,
    **more: Any,
) -> Decision:
    """What ME does. Members answer what they have announced, but for `deaf`."""
    view = View(leader(held_by) if held_by else None, Versioned(), members)
    reachable = {found.node_id: position_map(found.info["positions"]) for found in members if found.node_id not in deaf}
    myself = Self(ME, cluster_id, me, **more)
    return (decide_forced if force else decide)(view, state, myself, reachable, rules or Rules(), now_s, SINCE_S)


def sync(*node_ids: int, last_leader: int = 9) -> ClusterState:
    return ClusterState("C1", 3, True, last_leader, in_sync=frozenset(node_ids))


PAUSED = ClusterState("C1", 3, True, 9, paused=True)
MY_PAUSE = ClusterState("C1", 3, True, ME, paused=True)
EMPTY_CLUSTER = ClusterState("C9", 1, False, YOU)
MANY = {f"{number}.db": (3, 100) for number in range(5000)}
MORE_OF_MANY = {**MANY, "7.db": (3, 109)}
MANY_WRITTEN = ClusterState("C1", 3, True, 9, positions=total(MORE_OF_MANY))
HANDED = ClusterState("C1", 3, True, 9, in_sync=frozenset({9}), positions={"a.db": (3, 100)}, handoff_to=ME)
HANDED_AHEAD = replace(HANDED, positions={"a.db": (3, 101)})
HANDED_NEWER = replace(HANDED, positions={"a.db": (4, 50)})
HANDED_MORE = replace(HANDED, positions={"a.db": (3, 100), "b.db": (1, 1)})
KNOWN_POSITIONS = ClusterState("C1", 3, True, 9, positions={"a.db": (3, 150)})

TABLE: list[tuple[str, Decision, type | Why | Acquire]] = [
    # somebody holds it
    ("a leader is followed", run(member(), held_by=YOU), Follow),
    ("even when this node is ahead", run(member(positions=LESS), held_by=YOU), Follow),
    ("even when it is no member", run(held_by=YOU), Follow),
    ("our own lease of an earlier run", run(member(), held_by=ME), Why.BETTER),
    ("our own lease, alone", run(held_by=ME), Acquire),
    # clusters
    ("another cluster's data", run(member(), cluster_id="C2"), Why.FOREIGN),
    ("another cluster's data, and a leader", run(member(), cluster_id="C2", held_by=YOU), Why.FOREIGN),
    ("another cluster's id", run(member(), cluster_id="C2", me=NONE), Why.FOREIGN),
    ("data of no cluster", run(member(), cluster_id="", held_by=YOU), Why.FOREIGN),
    ("new here", run(member(), cluster_id="", me=NONE, held_by=YOU), Follow),
    ("a rival of another cluster", run(member(positions=MORE, cluster_id="C2")), Acquire),
    ("two clusters at a new lease", run(member(cluster_id="C2"), state=NEW), Why.FOREIGN),
    ("one of them is empty", run(member(cluster_id="C2", positions=NONE), state=NEW), Acquire),
    ("a leader without data", run(member(positions=NONE), state=EMPTY_CLUSTER, held_by=YOU), Why.NO_DATA_THERE),
    ("after it has given way", run(member(positions=NONE, cluster_id="C9"), state=EMPTY_CLUSTER), Acquire),
    ("empty follows empty", run(member(positions=NONE), me=NONE, state=EMPTY_CLUSTER, held_by=YOU), Follow),
    # may not
    ("no candidate", run(candidate=False), Why.NOT_CANDIDATE),
    ("no candidate, though everything is here", run(member(positions=LESS), candidate=False), Why.NOT_CANDIDATE),
    ("paused", run(state=PAUSED), Why.PAUSED),
    ("paused, and a leader", run(state=PAUSED, held_by=YOU), Follow),
    ("paused, the last leader again", run(state=MY_PAUSE), Acquire),
    ("out of sync", run(state=sync(YOU)), Why.NOT_IN_SYNC),
    ("out of sync, though ahead", run(member(), me=MORE, state=sync(YOU)), Why.NOT_IN_SYNC),
    ("in sync", run(state=sync(ME)), Acquire),
    ("in sync, a rival that is not is ahead", run(member(positions=MORE), state=sync(ME)), Acquire),
    ("in sync, one that is too is ahead", run(member(positions=MORE), state=sync(ME, YOU)), Why.BETTER),
    ("the old leader", run(state=sync(YOU, last_leader=ME)), Acquire),
    ("nobody in sync but the old leader", run(state=sync()), Why.NOT_IN_SYNC),
    # handed over
    ("passed to this node", run(member(), state=HANDED), Acquire),
    ("passed to another one", run(state=replace(HANDED, handoff_to=YOU)), Why.HANDOFF),
    ("passed to this node, which has lost something", run(state=HANDED_AHEAD), Why.NOT_IN_SYNC),
    ("passed to this node, whose copy is of another branch", run(state=HANDED_NEWER), Why.NOT_IN_SYNC),
    ("passed to this node, which lacks a database", run(state=HANDED_MORE), Why.NOT_IN_SYNC),
    # empty
    ("empty, the cluster has data", run(me=NONE), Why.EMPTY),
    ("empty, at the cluster that has data, all empty", run(member(positions=NONE), me=NONE), Why.EMPTY),
    ("empty, a member has data", run(member(), me=NONE, cluster_id="", state=NEW), Why.EMPTY),
    ("empty, no candidate has data", run(member(candidate=False), me=NONE, cluster_id="", state=NEW), Why.EMPTY),
    ("empty, a silent one has data", run(member(), me=NONE, cluster_id="", state=NEW, deaf=(YOU,)), Why.EMPTY),
    ("TXID 0 is no data", run(me={"a.db": (0, 0)}), Why.EMPTY),
    ("the very first start", run(me=NONE, cluster_id="", state=NEW), Acquire),
    ("the first start, lower id first", run(member(positions=NONE), me=NONE, cluster_id="", state=NEW), Why.BETTER),
    ("the first start, higher id", run(member(THIRD, NONE), me=NONE, cluster_id="", state=NEW), Acquire),
    ("data comes before an empty lower id", run(member(positions=NONE), state=NEW), Acquire),
    # lag
    ("lags", run(member(positions=MORE, candidate=False), rules=Rules(maximum_lag=0)), Why.LAGS),
    ("lags as much as it may", run(member(positions=MORE, candidate=False), rules=Rules(maximum_lag=1)), Acquire),
    ("lags behind what the leader wrote", run(state=KNOWN_POSITIONS, rules=Rules(maximum_lag=49)), Why.LAGS),
    ("not too far behind it", run(state=KNOWN_POSITIONS, rules=Rules(maximum_lag=50)), Acquire),
    ("lags behind one that is gone", run(member(positions=MORE), rules=Rules(maximum_lag=0), deaf=(YOU,)), Why.LAGS),
    ("a rival that lags too far", run(member(positions=LESS, priority=9), rules=Rules(maximum_lag=5)), Acquire),
    # better ones
    ("further ahead", run(member(positions=MORE)), Why.BETTER),
    ("further ahead beats priority", run(member(positions=MORE), priority=9), Why.BETTER),
    ("less far", run(member(positions=LESS, priority=9)), Acquire),
    ("further ahead, no candidate", run(member(positions=MORE, candidate=False)), Acquire),
    ("the same, lower id", run(member()), Why.BETTER),
    ("the same, higher id", run(member(THIRD)), Acquire),
    ("the same, higher priority", run(member(THIRD, priority=1)), Why.BETTER),
    ("the same, lower priority", run(member(), priority=1), Acquire),
    ("a later epoch beats more transactions", run(member(positions={"a.db": (4, 5)})), Why.BETTER),
    ("a database that we lack", run(member(THIRD, {**DATA, "b.db": (1, 1)})), Why.BETTER),
    ("a database that they lack", run(member(), me={**DATA, "b.db": (1, 1)}), Acquire),
    ("the second of two rivals", run(member(positions=LESS), member(THIRD, MORE)), Why.BETTER),
    # better ones that do not answer
    ("ahead, does not answer", run(member(positions=MORE), deaf=(YOU,)), Why.UNHEARD),
    ("still not", run(member(positions=MORE), deaf=(YOU,), now_s=SINCE_S + 0.49), Why.UNHEARD),
    ("long enough", run(member(positions=MORE), deaf=(YOU,), now_s=SINCE_S + 0.5), Acquire),
    ("the same, does not answer", run(member(priority=9), deaf=(YOU,)), Acquire),
    ("ahead, does not answer, out of sync", run(member(positions=MORE), deaf=(YOU,), state=sync(ME)), Acquire),
    ("alone", run(), Acquire),
    # by force
    ("forced, out of sync", run(state=sync(YOU), force=True), Acquire(forced=True)),
    ("forced, lags", run(state=KNOWN_POSITIONS, rules=Rules(maximum_lag=1), force=True), Acquire(forced=True)),
    ("forced without need", run(state=sync(ME), force=True), Acquire()),
    ("forced, one in sync answers", run(member(), me=MORE, state=sync(YOU), force=True), Why.BETTER),
    ("forced, one in sync is silent", run(member(), state=sync(YOU), deaf=(YOU,), force=True), Acquire(forced=True)),
    ("forced, one in sync is no candidate", run(member(candidate=False), state=sync(YOU), force=True),
     Acquire(forced=True)),
    ("forced, the old leader answers", run(member(), state=sync(last_leader=YOU), force=True), Why.BETTER),
    ("forced, another has more", run(member(positions=MORE), state=sync(THIRD), force=True), Why.BETTER),
    ("forced, another has the same", run(member(priority=9), state=sync(THIRD), force=True), Acquire(forced=True)),
    ("forced, a foreign one has more",
     run(member(positions=MORE, cluster_id="C2"), state=sync(THIRD), force=True), Acquire(forced=True)),
    ("forced, somebody holds the lease", run(state=sync(THIRD), held_by=YOU, force=True), Follow),
    ("forced, empty", run(me=NONE, state=sync(ME), force=True), Why.EMPTY),
    ("forced, empty and out of sync", run(me=NONE, state=sync(YOU), force=True), Why.EMPTY),
    ("forced, foreign", run(cluster_id="C2", state=sync(YOU), force=True), Why.FOREIGN),
    ("forced, no candidate", run(candidate=False, state=sync(YOU), force=True), Why.NOT_CANDIDATE),
    # too many databases to announce
    ("many, ahead, does not answer", run(member(positions=MORE_OF_MANY), me=MANY, deaf=(YOU,)), Why.UNHEARD),
    ("many, the same, does not answer", run(member(positions=MANY), me=MANY, deaf=(YOU,)), Acquire),
    ("many, less far, does not answer", run(member(positions=MANY), me=MORE_OF_MANY, deaf=(YOU,)), Acquire),
    ("empty, a silent one has many", run(member(positions=MANY), me=NONE, state=NEW, deaf=(YOU,)), Why.EMPTY),
    ("many, lags behind one that is gone",
     run(member(positions=MORE_OF_MANY), me=MANY, deaf=(YOU,), rules=Rules(maximum_lag=8)), Why.LAGS),
    ("many, lags behind what the leader wrote", run(me=MANY, state=MANY_WRITTEN, rules=Rules(maximum_lag=8)), Why.LAGS),
    ("many, not too far behind it", run(me=MANY, state=MANY_WRITTEN, rules=Rules(maximum_lag=9)), Acquire),
    ("many, a silent rival that lags too far",
     run(member(positions=MANY, priority=9), me=MORE_OF_MANY, deaf=(YOU,), rules=Rules(maximum_lag=8)), Acquire),
]  # fmt: skip


@pytest.mark.parametrize(("decision", "expected"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_the_table(decision: Decision, expected: type | Why | Acquire) -> None:
    if isinstance(expected, Why):
        assert isinstance(decision, Wait | StandAside)
        assert decision.why is expected
        assert decision.text and "\n" not in decision.text
    elif isinstance(expected, Acquire):
        assert decision == expected
    else:
        assert isinstance(decision, expected)


def test_what_is_said_tells_what_to_do() -> None:
    foreign = run(member(), cluster_id="C2")
    assert isinstance(foreign, StandAside)
    assert "C1" in foreign.text and "C2" in foreign.text and "move its data directory away" in foreign.text
    unheard = run(member(positions=MORE), deaf=(YOU,))
    assert isinstance(unheard, Wait) and unheard.until_s == SINCE_S + Rules().patience_s and "node-1" in unheard.text
    in_sync = run(state=sync(YOU))
    assert isinstance(in_sync, StandAside) and f"node {YOU:016X}" in in_sync.text and f"{YOU:016X}" in in_sync.at_first
    known = run(state=replace(sync(YOU, THIRD), hostnames={YOU: "db2", THIRD: "db3", 77: "db3"}))
    assert isinstance(known, StandAside) and f"db2, db3 (node {THIRD:016X}), node" in known.text


@pytest.mark.parametrize(
    ("members", "me", "state", "expected"),
    [
        ((member(),), NONE, EMPTY_CLUSTER, YOU),
        ((member(positions=NONE), member(THIRD)), NONE, EMPTY_CLUSTER, THIRD),
        ((member(candidate=False),), NONE, EMPTY_CLUSTER, None),
        ((member(positions=NONE),), NONE, EMPTY_CLUSTER, None),
        ((member(),), DATA, EMPTY_CLUSTER, None),
        ((member(),), NONE, STATE, None),
    ],
)
def test_who_an_empty_primary_gives_way_to(
    members: tuple[Member, ...], me: Positions, state: ClusterState, expected: int | None
) -> None:
    view = View(leader(ME), Versioned(), members)
    reachable = {found.node_id: position_map(found.info["positions"]) for found in members}
    found = gives_way_to(view, state, Self(ME, "C9", me), reachable)
    assert (found.node_id if found else None) == expected
    assert gives_way_to(view, state, Self(ME, "C9", me), {}) is None


@pytest.mark.parametrize(
    "info", [{}, {"positions": []}, {"positions": {"a": 1}}, {"positions": {"a": [1]}}, {"positions": {"a": [1, -2]}},
             {"positions": {"a": ["1", "2"]}}, {"positions": {"a": [True, True]}}, {"positions": {"a": [1, 0]}},
             {"positions": [1, 2]}, {"positions": [[], 3]}, {"positions": [[[1, 2]], True]}, {"positions": [[[1]], 3]}],
)  # fmt: skip
def test_what_a_member_announces_is_not_trusted(info: dict[str, Any]) -> None:
    assert positions_of(Member(1, info=info)) == {}


def is_ahead(one: Positions, other: Positions) -> bool:
    """Whether `one` has everything that `other` has, and more. Of two positions neither may be."""
    return dict(one) != dict(other) and all(name in one and one[name] >= position for name, position in other.items())


NODES = st.dictionaries(st.sampled_from(["a", "b", "c"]), st.tuples(st.integers(1, 3), st.integers(1, 4)), max_size=3)


@given(NODES, NODES)
def test_a_total_is_ordered_as_the_positions_are(one: Positions, other: Positions) -> None:
    def order(positions: Positions) -> tuple[list[int], int]:
        epochs = sorted((epoch for epoch, _ in positions.values()), reverse=True)
        return epochs, sum(txid for _, txid in positions.values())

    assert (total(one) < total(other)) == (order(one) < order(other))
    assert known_from(told(one)) == one
    assert known_from(told(total(one))) == (total(one) if one else {})


def test_an_entry_stays_small_whatever_it_has_to_tell() -> None:
    for databases in ({f"{number}.db": (number, number + 1) for number in range(20_000)}, {"ä" * 100: (1, 1)}, {}):
        assert len(json.dumps(announced(databases, "C1"))) < 17_000
    assert isinstance(positions_of(member(positions=MANY)), Total)
    few = {f"database-{number:03}.db": (9, 123_456) for number in range(400)}
    assert positions_of(member(positions=few)) == few


@given(NODES, NODES)
def test_who_is_ahead_everywhere_ranks_higher(one: Positions, other: Positions) -> None:
    assert not (is_ahead(one, other) and is_ahead(other, one))
    if is_ahead(one, other):
        assert rank(one, 0, 2) > rank(other, 100, 1)
    if one == other:
        assert rank(one, 0, 1) > rank(other, 0, 2)
    assert (lag(one, other) == 0) == (one == other or is_ahead(one, other))


@given(
    st.lists(st.tuples(NODES, st.booleans(), st.integers(0, 2)), min_size=1, max_size=4),
    st.booleans(),
    st.one_of(st.none(), st.frozensets(st.integers(1, 4))),
    st.one_of(st.none(), st.integers(0, 3)),
)
def test_nodes_that_see_each_other_send_one_at_most_and_the_best(
    nodes: list[tuple[Positions, bool, int]], new: bool, in_sync: frozenset[int] | None, maximum_lag: int | None
) -> None:
    state = NEW if new else ClusterState("C1", 3, True, last_leader=1, in_sync=in_sync)
    members = [
        member(number, positions, candidate=candidate, priority=priority)
        for number, (positions, candidate, priority) in enumerate(nodes, 1)
    ]
    reachable = {found.node_id: position_map(found.info["positions"]) for found in members}
    rules = Rules(maximum_lag)
    view = View(None, Versioned(), tuple(members))
    decisions = {
        found.node_id: decide(
            view, state, Self(found.node_id, "C1", reachable[found.node_id], found.candidate, found.priority),
            {node_id: known for node_id, known in reachable.items() if node_id != found.node_id}, rules, 0.0, 0.0,
        )
        for found in members
    }  # fmt: skip
    winners = [node_id for node_id, decision in decisions.items() if isinstance(decision, Acquire)]
    assert len(winners) <= 1
    may = {node_id for node_id, decision in decisions.items() if not isinstance(decision, StandAside)}
    assert len(winners) == bool(may), "somebody who may take it does"
    for winner in winners:
        for other in may:
            assert not is_ahead(reachable[other], reachable[winner])
        if not reachable[winner]:
            assert new and not any(reachable.values())
