"""What the primary does about a replica's copy, who may follow whom, and when to try again: pure rules."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pylitefs.cluster.backoff import Backoff
from pylitefs.cluster.decisions import (
    LOG_ALLOWANCE_BYTES,
    NOTHING,
    AdoptTxid,
    AskChecksums,
    AskTail,
    CaughtUp,
    Decision,
    SendLog,
    SetAside,
    Snapshot,
    View,
    branch_point,
    decide,
)
from pylitefs.cluster.roles import Grant, NodeIdentity, PrimaryInfo, Refused, accept, admit
from pylitefs.config import LeaseConfig
from pylitefs.formats.ltx.format import CHECKSUM_FLAG, Position
from pylitefs.formats.stream import PROTOCOL_VERSION, Hello, Welcome
from pylitefs.formats.stream_fields import ErrorCode, ResyncReason
from pylitefs.lease.static import StaticLease


def at(txid: int, content: int = 0) -> Position:
    """A position on the primary's chain, or with other content."""
    return Position(txid, CHECKSUM_FLAG | txid << 8 | content)


HEAD = at(100)
LIVE = View(HEAD, first_txid=60, reaches=False, checksum=HEAD.checksum)
REACHES = View(HEAD, first_txid=60, reaches=True, checksum=HEAD.checksum)
UNKNOWN = View(NOTHING, 0, False)


@pytest.mark.parametrize(
    ("theirs", "ours", "recovering", "decision"),
    [
        (HEAD, LIVE, False, CaughtUp()),
        (HEAD, LIVE, True, CaughtUp()),
        (at(80), REACHES, False, SendLog()),
        (at(80), REACHES, True, SendLog()),
        (at(58), LIVE, False, AskChecksums(ResyncReason.LOG_TOO_SHORT)),
        (at(59, 1), LIVE, False, AskChecksums(ResyncReason.DIVERGED)),
        (at(80, 1), LIVE, False, AskChecksums(ResyncReason.DIVERGED)),
        (at(100, 1), LIVE, False, AskChecksums(ResyncReason.DIVERGED)),
        (at(100, 1), LIVE, True, AskChecksums(ResyncReason.DIVERGED)),
        (at(101), LIVE, False, AskChecksums(ResyncReason.AHEAD)),
        (at(101), LIVE, True, AskTail(HEAD)),
        (Position(101, HEAD.checksum), LIVE, True, AdoptTxid(Position(101, HEAD.checksum))),
        (Position(101, HEAD.checksum), LIVE, False, AskChecksums(ResyncReason.AHEAD)),
        (at(50), View(HEAD, 0, False), False, AskChecksums(ResyncReason.LOG_TOO_SHORT)),
        (NOTHING, LIVE, False, Snapshot()),
        (NOTHING, View(HEAD, 1, True, 0, 10_000, 20_000), False, SendLog()),
        (NOTHING, View(HEAD, 1, True, 0, LOG_ALLOWANCE_BYTES + 30_000, 20_000), False, Snapshot()),
        (NOTHING, UNKNOWN, False, CaughtUp()),
        (NOTHING, UNKNOWN, True, CaughtUp()),
        (at(5), UNKNOWN, False, SetAside()),
        (at(5), UNKNOWN, True, AskTail(NOTHING)),
    ],
)
def test_each_situation_has_its_decision(theirs: Position, ours: View, recovering: bool, decision: Decision) -> None:
    assert decide(theirs, ours, recovering) == decision


txids = st.integers(0, 12)


@given(txids, st.booleans(), txids, txids, st.booleans(), st.booleans())
def test_nothing_is_taken_for_caught_up_that_is_not(
    theirs: int, other: bool, head: int, first: int, reaches: bool, recovering: bool
) -> None:
    position = NOTHING if theirs == 0 else at(theirs, other)
    ours = View(NOTHING if head == 0 else at(head), first, reaches and not other, at(head).checksum)
    decision = decide(position, ours, recovering)
    if decision == CaughtUp():
        assert position == ours.head
    if isinstance(decision, SendLog):
        assert ours.reaches
    if isinstance(decision, (AskTail, AdoptTxid)):
        assert recovering and position.txid > ours.head.txid


def reaches_up_to(last_shared: int, first_txid: int) -> set[Position]:
    """The positions that a primary's log goes on from, of a history shared up to a TXID."""
    return {at(txid) for txid in range(first_txid - 1, last_shared + 1)}


@pytest.mark.parametrize(
    ("position", "history", "first_txid", "shared", "point"),
    [
        (at(10), [], 1, 10, None),  # nothing beyond
        (at(12, 1), [at(11, 1), at(10), at(9)], 1, 10, 10),
        (at(12, 1), [at(10), at(8)], 1, 9, 8),  # entries that hold several transactions: more is kept than need be
        (at(12, 1), [at(11, 1)], 1, 10, 0),
        (at(12, 1), [], 1, 10, 0),
        (at(12), [at(11), at(10)], 50, 60, None),  # merely old
        (at(60, 1), [at(59, 1), at(40)], 50, 58, 0),
        (NOTHING, [], 1, 10, None),
    ],
)
def test_the_branch_of_a_replica_begins_where_the_histories_part(
    position: Position, history: list[Position], first_txid: int, shared: int, point: int | None
) -> None:
    known = reaches_up_to(shared, first_txid)
    assert branch_point(position, history, first_txid, known.__contains__) == point


# --- who may follow whom ----------------------------------------------------------------------------------------------

PRIMARY, REPLICA = NodeIdentity(1, "db1"), NodeIdentity(2, "db2")


def hello(**change: object) -> Hello:
    fields: dict[str, object] = {"protocol": PROTOCOL_VERSION, "cluster_id": "A", "node_id": 2, "epoch": 1}
    return Hello(**(fields | change))  # type: ignore[arg-type]


def welcome(**change: object) -> Welcome:
    fields: dict[str, object] = {"protocol": PROTOCOL_VERSION, "cluster_id": "A", "node_id": 1, "epoch": 1}
    return Welcome(**(fields | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("message", "has_data", "code"),
    [
        (hello(), True, None),
        (hello(cluster_id=""), False, None),
        (hello(cluster_id="", node_id=3, epoch=0), False, None),
        (hello(cluster_id=""), True, ErrorCode.FOREIGN),
        (hello(cluster_id="B"), True, ErrorCode.CLUSTER_MISMATCH),
        (hello(cluster_id="B"), False, ErrorCode.CLUSTER_MISMATCH),
        (hello(node_id=1), False, ErrorCode.SELF),
        (hello(epoch=2), True, ErrorCode.STALE_EPOCH),
        (hello(protocol=PROTOCOL_VERSION + 1), True, ErrorCode.VERSION),
        (hello(protocol=0), True, ErrorCode.VERSION),
    ],
)
def test_the_primary_admits_only_its_own(message: Hello, has_data: bool, code: ErrorCode | None) -> None:
    if code is None:
        admit(message, has_data, PRIMARY, "A", 1)
    else:
        with pytest.raises(Refused) as caught:
            admit(message, has_data, PRIMARY, "A", 1)
        assert caught.value.code is code and caught.value.message.code is code


@pytest.mark.parametrize(
    ("message", "has_data", "cluster_id", "code"),
    [
        (welcome(), True, "A", None),
        (welcome(epoch=5), True, "A", None),
        (welcome(), False, None, None),
        (welcome(), True, None, ErrorCode.FOREIGN),
        (welcome(cluster_id="B"), True, "A", ErrorCode.CLUSTER_MISMATCH),
        (welcome(cluster_id=""), False, None, ErrorCode.PROTOCOL),
        (welcome(node_id=2), True, "A", ErrorCode.SELF),
        (welcome(epoch=0), True, "A", ErrorCode.STALE_EPOCH),
        (welcome(protocol=9), True, "A", ErrorCode.VERSION),
    ],
)
def test_the_replica_follows_only_its_own(
    message: Welcome, has_data: bool, cluster_id: str | None, code: ErrorCode | None
) -> None:
    if code is None:
        accept(message, has_data, REPLICA, cluster_id, 1)
    else:
        with pytest.raises(Refused) as caught:
            accept(message, has_data, REPLICA, cluster_id, 1)
        assert caught.value.code is code


def test_refusals_say_what_to_upgrade() -> None:
    with pytest.raises(Refused, match="upgrade the replica"):
        admit(hello(protocol=0), False, PRIMARY, "A", 1)
    with pytest.raises(Refused, match="upgrade the primary"):
        admit(hello(protocol=9), False, PRIMARY, "A", 1)


# --- when to try again, and the static lease --------------------------------------------------------------------------


def test_pauses_grow_with_jitter_up_to_a_limit() -> None:
    pauses = []
    for seed in range(200):
        backoff = Backoff(1.0, 10.0, random.Random(seed))
        pauses.append([backoff.after_failure() for _ in range(8)])
    for number, limit in enumerate([1, 2, 4, 8, 10, 10, 10, 10]):
        column = [row[number] for row in pauses]
        assert 0 <= min(column) < 0.2 * limit and 0.8 * limit < max(column) <= limit


def test_a_clean_end_is_followed_at_once_and_only_once() -> None:
    backoff = Backoff(1.0, 10.0, random.Random(1))
    assert backoff.after_session(clean=True) == 0
    assert backoff.after_failure() > 0
    assert backoff.after_session(clean=False) > 0
    assert backoff.after_refusal() == 10


def test_the_static_lease_is_what_the_configuration_says() -> None:
    primary = StaticLease(LeaseConfig(type="static", candidate=True))
    replica = StaticLease(
        LeaseConfig(type="static", candidate=False, hostname="db1", advertise_url="http://10.0.0.1:20202")
    )
    assert asyncio.run(primary.acquire()) == Grant(1)
    assert asyncio.run(replica.acquire()) == PrimaryInfo("db1", "http://10.0.0.1:20202")
