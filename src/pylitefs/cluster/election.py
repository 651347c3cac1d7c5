"""Who should be the primary. Pure: what one node does about the lease follows from what it sees.

What a node that does not hold the lease does, the first row that applies:

this node, and what it sees                                                 decision
the cluster has data, and the node another cluster's id, or data and none   StandAside FOREIGN
another node holds the lease, the cluster has no data, and this node has    Wait NO_DATA_THERE
another node holds the lease                                                Follow
the cluster has no data yet, and members have data of several clusters      StandAside FOREIGN
`lease.candidate` is false                                                  StandAside NOT_CANDIDATE
the last leader has passed the lease to this node, and it has what that had Acquire
the last leader has passed it to another one, for `patience_s`              Wait HANDOFF
the cluster is paused, and the node was not its last leader                 StandAside PAUSED
the state lists who is in sync, and neither that nor the last leader it is  StandAside NOT_IN_SYNC
the state lists who the last leader asks in failsafe mode, and not this     StandAside NOT_KNOWN
it has no data, and the cluster has some                                    StandAside EMPTY
it has no data, and a member has some                                       StandAside EMPTY
it lags behind the best that is known by more than `maximum_lag`            StandAside LAGS
a better candidate that can be asked                                        Wait BETTER
one that cannot be asked, but has announced to be ahead, for `patience_s`   Wait UNHEARD
otherwise                                                                   Acquire

So a cluster id binds once there is data under it. A node that became the primary of an empty cluster, because it
started first, asks `gives_way_to`, and lets go when a candidate that has data appears.

*Better* means: may be elected by the rows above, and comes first by `rank`. Every node decides alike, so at most one
of those that see each other tries; if two do (they do not see each other), the engine lets one through. A better node
that has lost the engine cannot renew its entry, drops out of the view, and is waited for no longer.

*Force*: where the nodes that may be elected are lost for good, an operator may name one that is not in sync, or lags
(`decide_forced`). It is refused while a member answers that could be elected without, or that has more.

*The order of positions.* A position is (epoch, txid) for each database; a later epoch beats any number of
transactions of an earlier one, because what an earlier primary added after losing the lease is a branch that the
cluster does not have. Over several databases: first the epochs, sorted from the latest, compared as a list; then the
sum of the TXIDs. This is a total order that agrees with the partial one: if A is ahead of B in some database and
nowhere behind, each of A's sorted epochs is at least B's, and where all are equal A's sum is higher; a database that
B lacks makes its list shorter. So a node never wins over one that has everything it has and more. Where neither is
ahead everywhere, the sum loses the fewest transactions. Of thousands of databases only this is announced (`Total`): who
does not answer can still be compared.
"""

from __future__ import annotations

import enum
import itertools
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from pylitefs.cluster.lease_port import Leader, Member, View

Positions: TypeAlias = Mapping[str, tuple[int, int]]
"""Where a node is: (epoch, txid) of the last transaction of each database. Databases with TXID 0 do not count."""

INFO_POSITIONS = "positions"
INFO_CLUSTER_ID = "cluster-id"

MAX_POSITIONS_BYTES = 16 << 10
"""As JSON, of one member: some 500 databases. The engines keep hundreds of KiB in one entry, but all members' are read
at each look, and each is written three times in a lease's life."""

_LEAST_BYTES = 12  # of a database: "a": [1, 1],
_MAX_EPOCHS = 200  # of a total: each failover adds one, as long as there are databases that were not written since


@dataclass(frozen=True, order=True)
class Total:
    """Positions as far as their order goes. `epochs`: (epoch, how many databases are in it), the latest first."""

    epochs: tuple[tuple[int, int], ...]
    txids: int


Known: TypeAlias = Positions | Total
"""Where a node is, as far as it was told."""


@dataclass(frozen=True)
class ClusterState:
    """What the shared document says that matters here. `has_data`: the cluster has ever had a transaction."""

    cluster_id: str = ""
    epoch: int = 0
    has_data: bool = False
    last_leader: int = 0
    paused: bool = False
    in_sync: frozenset[int] | None = None  # None: replication is asynchronous
    positions: Known = field(default_factory=dict)  # as the last leader wrote them down
    voters: frozenset[int] | None = None  # failsafe: who is asked, and so may lead; None: it is off
    handoff_to: int = 0  # whom the last leader has passed the lease to, having made sure that it has everything
    hostnames: Mapping[int, str] = field(default_factory=dict)  # of nodes that were heard of; not of the document


WANTED = sys.maxsize
"""The priority of a node that an operator has named: of all with the same data, that one."""


@dataclass(frozen=True)
class Self:
    """This node. `cluster_id` is "" where it belongs to none yet."""

    node_id: int
    cluster_id: str
    positions: Positions
    candidate: bool = True
    priority: int = 0


@dataclass(frozen=True)
class Rules:
    """The configuration. `maximum_lag` is a number of transactions; None: any. `patience_s`: how long the lease is left
    to somebody who was ahead when last heard of, but does not answer now."""

    maximum_lag: int | None = None
    patience_s: float = 0.5


class Why(enum.Enum):
    """Why a node does not try to take the lease: a row of the table above."""

    FOREIGN = "foreign"
    NOT_CANDIDATE = "not a candidate"
    PAUSED = "paused"
    NO_DATA_THERE = "the primary has no data"
    NOT_IN_SYNC = "not in sync"
    NOT_KNOWN = "not known to the last leader"
    EMPTY = "empty"
    LAGS = "lags"
    BETTER = "a better candidate"
    HANDOFF = "passed to another node"
    UNHEARD = "a better candidate that does not answer"


@dataclass(frozen=True)
class Acquire:
    """Try to take the lease. `forced`: though commits that were acknowledged may be missing here."""

    forced: bool = False


@dataclass(frozen=True)
class Follow:
    """Be a replica of `leader`."""

    leader: Leader


@dataclass(frozen=True)
class Wait:
    """Look again soon: somebody else is expected to take the lease. `until_s` is when this is over without a change."""

    why: Why
    text: str
    until_s: float | None = None


@dataclass(frozen=True)
class StandAside:
    """This node must not take the lease as things are; `text` says what would have to change. `at_first`: what is said
    instead in the first moments, where that is part of every failover; "" if it is not."""

    why: Why
    text: str
    at_first: str = ""


Decision: TypeAlias = Acquire | Follow | Wait | StandAside


@dataclass(frozen=True)
class _Contender:
    node_id: int
    hostname: str
    positions: Known
    cluster_id: str
    candidate: bool
    priority: int
    answers: bool


def decide(
    view: View,
    state: ClusterState,
    me: Self,
    reachable: Mapping[int, Positions],
    rules: Rules,
    now_s: float,
    leaderless_since_s: float,
) -> Decision:
    """What a node that does not hold the lease does now.

    `reachable`: the positions of the members that were asked just now and have answered. `leaderless_since_s`: when
    this node first saw that nobody holds the lease, by the clock of `now_s`.
    """
    myself = _myself(me)
    if text := _foreign(myself, state):
        return StandAside(Why.FOREIGN, text)
    if view.leader is not None and view.leader.node_id != me.node_id:
        if myself.positions and state.cluster_id and not state.has_data:
            return Wait(Why.NO_DATA_THERE, _no_data_there(view.leader, me.candidate))
        return Follow(view.leader)
    until_s = leaderless_since_s + rules.patience_s
    if takes_over(state, me):
        return Acquire()
    if state.handoff_to not in (0, me.node_id) and now_s < until_s:
        return Wait(Why.HANDOFF, f"the lease was passed to {_names({state.handoff_to}, state)}", until_s)
    others = _others(view, state, me, reachable)
    if not state.has_data and (text := _several_clusters([myself, *others])):
        return StandAside(Why.FOREIGN, text)
    if refused := _ineligible(myself, state, others, rules):
        return refused
    everybody = [*others, myself]
    rivals = [
        rival
        for rival in others
        if rank(rival.positions, rival.priority, rival.node_id) > rank(myself.positions, me.priority, me.node_id)
        and not _ineligible(rival, state, [other for other in everybody if other is not rival], rules)
    ]
    for rival in rivals:
        if rival.answers:
            return Wait(Why.BETTER, f"{_name(rival)} is the better candidate ({_comparison(rival, myself)})")
    for rival in rivals:
        if total(rival.positions) > total(myself.positions) and now_s < until_s:
            return Wait(Why.UNHEARD, f"{_name(rival)} was ahead when last heard of, and does not answer now", until_s)
    return Acquire()


def decide_forced(
    view: View,
    state: ClusterState,
    me: Self,
    reachable: Mapping[int, Positions],
    rules: Rules,
    now_s: float,
    leaderless_since_s: float,
) -> Decision:
    """As `decide`, for a node that an operator wants as the primary though it is not in sync, or lags."""
    decision = decide(view, state, me, reachable, rules, now_s, leaderless_since_s)
    if not isinstance(decision, StandAside) or decision.why not in (Why.NOT_IN_SYNC, Why.LAGS):
        return decision
    myself, others = _myself(me), _others(view, state, me, reachable)
    if refused := _ineligible(myself, replace(state, in_sync=None), others, replace(rules, maximum_lag=None)):
        return refused
    rivals = [other for other in others if other.answers and other.candidate]
    for other in rivals:
        if not _ineligible(other, state, [*others, myself], rules):
            text = f"nothing has to be forced: {_name(other)} may lead, litefs promote -node {_name(other)}"
            return StandAside(Why.BETTER, text)
    for other in rivals:
        if total(other.positions) > total(myself.positions):
            text = f"{_name(other)} has more than this node, and answers: litefs promote -force -node {_name(other)}"
            return StandAside(Why.BETTER, text)
    return Acquire(forced=True)


def takes_over(state: ClusterState, me: Self) -> bool:
    """Whether the last leader has passed the lease to this node, and that has everything still that the leader wrote
    down then: it may have lost something since, and is one of several candidates then."""
    if not me.candidate or state.handoff_to != me.node_id:
        return False
    positions = _with_data(me.positions)
    return bool(positions or not state.has_data) and not _behind(positions, [state.positions])


def gives_way_to(view: View, state: ClusterState, me: Self, reachable: Mapping[int, Positions]) -> Member | None:
    """For the holder of the lease: the member that it should leave it to, because only that one has data."""
    if state.has_data or _with_data(me.positions):
        return None
    wanted = {
        other.node_id
        for other in _others(view, state, me, reachable)
        if other.answers and other.candidate and other.positions
    }
    return next((member for member in view.members if member.node_id in wanted), None)


def rank(positions: Known, priority: int, node_id: int) -> tuple[Total, int, int]:
    """The highest should be the primary: by data, then by priority, then the lowest id."""
    return total(positions), priority, -node_id


def total(known: Known) -> Total:
    """By which positions are ordered, see the module's docstring."""
    if isinstance(known, Total):
        return known
    epochs = itertools.groupby(sorted((epoch for epoch, _ in known.values()), reverse=True))
    counts = ((epoch, sum(1 for _ in found)) for epoch, found in epochs)
    return Total(tuple(itertools.islice(counts, _MAX_EPOCHS)), sum(txid for _, txid in known.values()))


def lag(positions: Positions, best: Positions) -> int:
    """How many transactions of `best` are missing in `positions`, by the TXIDs; those of a database that is as far in a
    later epoch are not."""
    missing = 0
    for name, (epoch, txid) in best.items():
        mine_epoch, mine_txid = positions.get(name, (0, 0))
        if (mine_epoch, mine_txid) < (epoch, txid):
            missing += max(1, txid - mine_txid)
    return missing


def positions_of(member: Member) -> Known:
    """What a member has announced; what is strange in it does not count."""
    return known_from(member.info.get(INFO_POSITIONS))


def position_map(value: object) -> Positions:
    """Positions from JSON, {name: [epoch, txid]}; what is strange in it does not count."""
    if not isinstance(value, dict):
        return {}
    return _with_data({str(name): position for name, pair in value.items() if (position := _position(pair))})


def known_from(value: object) -> Known:
    """What `told` made of positions."""
    if not isinstance(value, list):
        return position_map(value)
    epochs, txids = value if len(value) == 2 else ([], 0)
    counts = [_position(pair) for pair in epochs] if isinstance(epochs, list) else []
    found = tuple(sorted((count for count in counts if count is not None), reverse=True))
    return Total(found, txids) if found and type(txids) is int and txids > 0 else {}


def told(known: Known, max_bytes: int = 0) -> dict[str, list[int]] | list[Any]:
    """As JSON: {name: [epoch, txid]}; of a total, and where that is too long: [[[epoch, count]], sum]."""
    if not isinstance(known, Total) and (not max_bytes or len(known) * _LEAST_BYTES <= max_bytes):
        document = {name: list(position) for name, position in sorted(known.items())}
        if not max_bytes or len(json.dumps(document)) <= max_bytes:
            return document
    found = total(known)
    return [[list(count) for count in found.epochs], found.txids]


def announced(positions: Positions, cluster_id: str) -> dict[str, Any]:
    """The part of a member's `info` that elections read."""
    return {INFO_POSITIONS: told(_with_data(positions), MAX_POSITIONS_BYTES), INFO_CLUSTER_ID: cluster_id}


def _myself(me: Self) -> _Contender:
    positions = _with_data(me.positions)
    return _Contender(me.node_id, "this node", positions, me.cluster_id, me.candidate, me.priority, answers=True)


def _contender(member: Member, reachable: Mapping[int, Positions]) -> _Contender:
    answers = member.node_id in reachable
    positions = _with_data(reachable[member.node_id]) if answers else positions_of(member)
    cluster_id = member.info.get(INFO_CLUSTER_ID, "")
    return _Contender(
        member.node_id,
        member.hostname,
        positions,
        cluster_id if isinstance(cluster_id, str) else "",
        member.candidate,
        member.priority,
        answers,
    )


def _others(view: View, state: ClusterState, me: Self, reachable: Mapping[int, Positions]) -> list[_Contender]:
    """The other members that belong to the cluster, or may."""
    found = [_contender(member, reachable) for member in view.members if member.node_id != me.node_id]
    return [contender for contender in found if not _foreign(contender, state)]


def _foreign(node: _Contender, state: ClusterState) -> str:
    """What to do about a node that does not belong to the cluster; "" if it does, or may."""
    if not state.has_data or node.cluster_id == state.cluster_id:
        return ""
    if node.cluster_id:
        return (
            f"this node belongs to cluster {node.cluster_id}, the lease to cluster {state.cluster_id}: point `lease` "
            "at this node's own cluster, or, if its data is not wanted, stop it and move its data directory away"
        )
    if node.positions:
        return (
            f"this node has data that belongs to no cluster, and cluster {state.cluster_id} has its own: "
            "export what is wanted, then stop it and move its data directory away"
        )
    return ""


def _several_clusters(nodes: list[_Contender]) -> str:
    """What to do when nodes that have data of different clusters meet at a new lease; "" if they do not."""
    known = {node.cluster_id: node for node in nodes if node.positions}
    if len(known) < 2:
        return ""
    names = " and ".join(f"{_name(node)} (cluster {node.cluster_id or 'none'})" for _, node in sorted(known.items()))
    return f"the lease is new, and there is data of several clusters: {names}: stop all nodes but those of one cluster"


def _no_data_there(leader: Leader, candidate: bool) -> str:
    what = "it will give way" if candidate else "set lease.candidate to true here, or stop it"
    return f"this node has data, and the primary, {leader.hostname or leader.url}, has none: {what}"


def _ineligible(node: _Contender, state: ClusterState, others: list[_Contender], rules: Rules) -> StandAside | None:
    """Why a node of this cluster may not take a lease that is free; None if it may."""
    if not node.candidate:
        return StandAside(Why.NOT_CANDIDATE, "nobody is the primary, and lease.candidate is false here")
    was_leader = node.node_id == state.last_leader
    if state.paused and not was_leader:
        return StandAside(
            Why.PAUSED, "nobody is the primary, and automatic failover is paused: litefs resume, or promote"
        )
    if state.in_sync is not None and node.node_id not in state.in_sync and not was_leader:
        known = {*state.in_sync, state.last_leader} - {0}
        who = _names(known, state)
        who, lost = (who, "it is") if len(known) == 1 else (f"one of {who}", "they are")
        return StandAside(
            Why.NOT_IN_SYNC,
            f"no primary: {who} must come back first, for this node may lack commits that were acknowledged "
            f"(if {lost} lost for good: litefs promote -force)",
            f"no primary at the moment: {who} is expected to take over (it has every acknowledged commit)",
        )
    if state.voters is not None and node.node_id not in state.voters and not was_leader:
        return StandAside(
            Why.NOT_KNOWN,
            "the last primary, which may still lead (lease.failsafe), does not know this node yet: "
            "it must come back, or use litefs promote",
        )
    if not node.positions:
        holders = [other for other in others if other.positions]
        if state.has_data or holders:
            wanted = _name(holders[0]) if holders else "a node that has the cluster's data"
            return StandAside(Why.EMPTY, f"this node has no data, and the cluster has: waiting for {wanted}")
    if rules.maximum_lag is not None:
        behind = _behind(node.positions, [state.positions, *(other.positions for other in others)])
        if behind > rules.maximum_lag:
            return StandAside(
                Why.LAGS, f"this node is {behind} transactions behind, more than lease.maximum-lag: {rules.maximum_lag}"
            )
    return None


def _behind(mine: Known, known: list[Known]) -> int:
    """How many transactions of what is known `mine` lacks; at least so many where only totals are known."""
    maps = [one for one in known if not isinstance(one, Total)]
    if isinstance(mine, Total):
        totals = [total(one) for one in known]
        behind = 0
    else:
        totals = [one for one in known if isinstance(one, Total)]
        behind = lag(mine, _furthest(maps))
    here = total(mine)
    return max([behind, *(there.txids - here.txids for there in totals if there > here)])


def _furthest(known: list[Positions]) -> dict[str, tuple[int, int]]:
    """The highest position of each database, whoever has it."""
    best: dict[str, tuple[int, int]] = {}
    for positions in known:
        for name, position in positions.items():
            best[name] = max(position, best.get(name, position))
    return best


def _with_data(positions: Positions) -> Positions:
    return {name: (epoch, txid) for name, (epoch, txid) in positions.items() if txid > 0}


def _position(value: Any) -> tuple[int, int] | None:
    if isinstance(value, list | tuple) and len(value) == 2 and all(type(part) is int and part >= 0 for part in value):
        return value[0], value[1]
    return None


def _name(node: _Contender) -> str:
    return node.hostname or f"node {node.node_id:016X}"


def _names(node_ids: Iterable[int], state: ClusterState) -> str:
    """Host names, where they are known, and the id where that alone would not tell them apart."""
    every = list(state.hostnames.values())
    names = []
    for node_id in sorted(node_ids):
        hostname = state.hostnames.get(node_id, "")
        text = f"node {node_id:016X}"
        names.append(text if not hostname else hostname if every.count(hostname) == 1 else f"{hostname} ({text})")
    return ", ".join(sorted(names))


def _comparison(rival: _Contender, me: _Contender) -> str:
    if total(rival.positions) > total(me.positions):
        return "further ahead"
    return "higher priority" if rival.priority > me.priority else "lower id"
