"""What the primary does about a replica's copy, who may follow whom, and when to try again: pure rules."""

from __future__ import annotations

import random
from dataclasses import dataclass

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
    Stale,
    Taking,
    View,
    branch_point,
    decide,
)
from pylitefs.cluster.roles import NodeIdentity, Refused, accept, admit
from pylitefs.engine.epochs import passed
from pylitefs.formats.ltx.format import CHECKSUM_FLAG, Position
from pylitefs.formats.stream import PROTOCOL_VERSION, Hello, Welcome
from pylitefs.formats.stream_fields import ErrorCode, ResyncReason


def at(txid: int, content: int = 0, epoch: int = 3) -> Position:
    """A position on the primary's chain, or with other content."""
    return Position(txid, CHECKSUM_FLAG | txid << 8 | content, epoch)


HEAD = at(100)
LIVE = View(HEAD, first_txid=60, reaches=False, checksum=HEAD.checksum, epoch=5)
REACHES = View(HEAD, first_txid=60, reaches=True, checksum=HEAD.checksum, epoch=5)
UNKNOWN = View(NOTHING, 0, False, epoch=5)
NO, LOST, NEXT = Taking.NOTHING, Taking.LOST, Taking.NEXT


@pytest.mark.parametrize(
    ("theirs", "ours", "taking", "decision"),
    [
        (HEAD, LIVE, NO, CaughtUp()),
        (HEAD, LIVE, LOST, CaughtUp()),
        (HEAD, LIVE, NEXT, CaughtUp()),
        (at(100, epoch=2), LIVE, NEXT, AskChecksums(ResyncReason.DIVERGED)),  # perhaps not the same content
        (at(100, epoch=5), LIVE, NEXT, AskChecksums(ResyncReason.DIVERGED)),
        (at(100, epoch=0), View(at(100, epoch=1), 60, False, epoch=1), NEXT, CaughtUp()),  # there was only ever one
        (at(100, epoch=6), LIVE, NEXT, Stale(6)),
        (at(7, epoch=6), REACHES, LOST, Stale(6)),
        (at(7, epoch=6), UNKNOWN, NO, Stale(6)),
        (at(80), REACHES, NO, SendLog()),
        (at(80), REACHES, LOST, SendLog()),
        (at(80, epoch=1), REACHES, NEXT, SendLog()),
        (at(58), LIVE, NO, AskChecksums(ResyncReason.LOG_TOO_SHORT)),
        (at(59, 1), LIVE, NO, AskChecksums(ResyncReason.DIVERGED)),
        (at(80, 1), LIVE, NEXT, AskChecksums(ResyncReason.DIVERGED)),
        (at(100, 1), LIVE, NEXT, AskChecksums(ResyncReason.DIVERGED)),
        (at(100, 1, epoch=4), LIVE, NEXT, AskChecksums(ResyncReason.DIVERGED)),
        (at(100, 1), LIVE, LOST, AskChecksums(ResyncReason.DIVERGED)),
        (at(101), LIVE, NO, AskChecksums(ResyncReason.AHEAD)),
        (at(101), LIVE, LOST, AskTail(HEAD)),
        (at(101), LIVE, NEXT, AskTail(HEAD)),
        (at(101, epoch=5), LIVE, NEXT, AskTail(HEAD)),
        (at(101, epoch=2), LIVE, NEXT, AskChecksums(ResyncReason.AHEAD)),
        (at(101, epoch=2), LIVE, LOST, AskChecksums(ResyncReason.AHEAD)),
        (Position(101, HEAD.checksum, 3), LIVE, LOST, AdoptTxid(Position(101, HEAD.checksum))),
        (Position(101, HEAD.checksum, 3), LIVE, NEXT, AskTail(HEAD)),
        (Position(101, HEAD.checksum, 3), LIVE, NO, AskChecksums(ResyncReason.AHEAD)),
        (at(50), View(HEAD, 0, False), NO, AskChecksums(ResyncReason.LOG_TOO_SHORT)),
        (NOTHING, LIVE, NEXT, Snapshot()),
        (NOTHING, View(HEAD, 1, True, 0, 10_000, 20_000), NO, SendLog()),
        (NOTHING, View(HEAD, 1, True, 0, LOG_ALLOWANCE_BYTES + 30_000, 20_000), NO, Snapshot()),
        (NOTHING, View(HEAD, 1, True, 0, 10_000, 0), NO, Snapshot()),  # dropped: not made first, to be dropped then
        (NOTHING, UNKNOWN, NO, CaughtUp()),
        (NOTHING, UNKNOWN, LOST, CaughtUp()),
        (at(5), UNKNOWN, NO, SetAside()),
        (at(5), UNKNOWN, NEXT, SetAside()),
        (at(5), UNKNOWN, LOST, AskTail(NOTHING)),
    ],
)
def test_each_situation_has_its_decision(theirs: Position, ours: View, taking: Taking, decision: Decision) -> None:
    assert decide(theirs, ours, taking) == decision


txids = st.integers(0, 12)


@given(txids, st.booleans(), txids, txids, st.booleans(), st.sampled_from(Taking), *[st.integers(1, 4)] * 3)
def test_nothing_is_taken_for_caught_up_that_is_not(
    theirs: int, other: bool, head: int, first: int, reaches: bool, taking: Taking, epoch: int, last: int, lease: int
) -> None:
    position = NOTHING if theirs == 0 else at(theirs, other, epoch)
    ours = View(
        NOTHING if head == 0 else at(head, 0, min(last, lease)), first, reaches and not other, at(head).checksum,
        epoch=lease,
    )  # fmt: skip
    decision = decide(position, ours, taking)
    assert (decision == Stale(epoch)) == (theirs > 0 and epoch > lease)
    if decision == CaughtUp():
        assert position.is_at(ours.head)
    if isinstance(decision, SendLog):
        assert ours.reaches
    if isinstance(decision, (AskTail, AdoptTxid)):
        assert taking is not Taking.NOTHING and position.txid > ours.head.txid
        assert ours.head.epoch <= epoch <= lease


@dataclass(frozen=True)
class Chain:
    """A primary whose history is shared up to a TXID, and whose log reaches back to `first_txid`."""

    first_txid: int
    shared: int
    lines: tuple[tuple[int, int], ...] = ((3, 1),)
    last: int = 100

    @property
    def head(self) -> Position:
        return at(self.last)

    def epochs(self) -> tuple[tuple[int, int], ...]:
        return self.lines

    def holds(self, position: Position) -> bool:
        return position in [at(txid) for txid in range(self.first_txid - 1, self.shared + 1)]

    def passed(self, position: Position) -> bool:
        return passed(self.lines, self.head, position)


TURNS = ((2, 1), (3, 40), (5, 61))
"""Who wrote what: epoch 2 up to TXID 39, 3 up to 60, then 5."""


@pytest.mark.parametrize(
    ("position", "history", "ours", "point"),
    [
        (at(10), [], Chain(1, 10), None),  # nothing beyond
        (at(12, 1), [at(11, 1), at(10), at(9)], Chain(1, 10), 10),
        (at(12, 1), [at(10), at(8)], Chain(1, 9), 8),  # entries of several transactions: more is kept
        (at(12, 1), [at(11, 1)], Chain(1, 10), 0),
        (at(12, 1), [], Chain(1, 10), 0),
        (at(12), [at(11), at(10)], Chain(50, 60), None),  # merely old
        (at(12, 0, 1), [at(11, 0, 1)], Chain(50, 60, ()), None),  # the same where there was never another primary
        (at(60, 1, 1), [at(59, 1, 1), at(40, 0, 1)], Chain(50, 58, ()), 0),  # it shows two chains of one epoch
        (NOTHING, [], Chain(1, 10), None),
        # The log does not reach back, and the epochs tell.
        (at(60), [at(59)], Chain(80, 100, TURNS), None),
        (at(62, 1), [at(61, 1), at(60), at(59)], Chain(80, 100, TURNS), 60),
        (at(45, 1, 2), [at(41, 1, 2), at(38, 0, 2)], Chain(80, 100, TURNS), 38),  # the end of epoch 2 was lost
        (at(65, 1, 4), [at(63, 1, 4), at(60)], Chain(80, 100, TURNS), 60),  # epoch 4 came to nothing
        (at(65, 1, 4), [at(63, 1, 4)], Chain(80, 100, TURNS), 0),
        (at(90, 1, 4), [at(85, 1, 4), at(60), at(30, 0, 2)], Chain(80, 79, TURNS), 60),
        (at(30, 0, 1), [], Chain(80, 100, ((3, 40), (5, 61))), None),
        (at(45, 0, 1), [at(39, 0, 1)], Chain(80, 100, ((3, 40), (5, 61))), 39),
    ],
)
def test_the_branch_of_a_replica_begins_where_the_histories_part(
    position: Position, history: list[Position], ours: Chain, point: int | None
) -> None:
    assert branch_point(position, history, (), ours) == point


@pytest.mark.parametrize(
    ("position", "history", "epochs", "ours", "point"),
    [
        # It has lost its log further back than the histories part: its epochs tell.
        (at(65, 1, 4), [at(63, 1, 4)], ((2, 1), (3, 40), (4, 61)), Chain(80, 100, TURNS), 60),
        (at(65, 1, 4), [at(63, 1, 4)], ((2, 1), (4, 40)), Chain(80, 100, TURNS), 39),
        (at(65, 1, 4), [at(63, 1, 4)], ((2, 1), (3, 40), (4, 50)), Chain(80, 100, TURNS), 49),
        (at(65, 1, 4), [at(63, 1, 4)], ((4, 1),), Chain(80, 100, TURNS), 0),  # they have nothing in common
        (at(45, 1, 2), [at(41, 1, 2)], ((2, 1),), Chain(80, 100, TURNS), 39),  # the end of epoch 2 was lost
        (at(12, 1), [at(11, 1)], ((3, 1),), Chain(1, 10), 0),  # two chains in one epoch: nothing is certain
        (at(90, 1), [at(89, 1)], ((2, 1), (3, 40)), Chain(80, 100, ((2, 1), (3, 40))), 0),
    ],
)
def test_epochs_tell_where_histories_part(
    position: Position,
    history: list[Position],
    epochs: tuple[tuple[int, int], ...],
    ours: Chain,
    point: int,
) -> None:
    assert branch_point(position, history, epochs, ours) == point


@given(st.data())
def test_what_is_not_in_the_history_is_always_in_the_branch(data: st.DataObject) -> None:
    """Two histories of turns in office that part somewhere; the log of one reaches back as far as it likes."""
    ours: list[tuple[int, int]] = []  # (epoch, content) of each TXID
    for epoch in data.draw(st.lists(st.integers(2, 9), unique=True, min_size=1, max_size=5).map(sorted)):
        ours += [(epoch, 0)] * data.draw(st.integers(1, 4))
    parting = data.draw(st.integers(0, len(ours)))
    last = ours[parting - 1][0] if parting else 1
    taken = {epoch for epoch, _ in ours[parting:]}
    free = [epoch for epoch in range(last, 12) if (epoch == last and parting == len(ours)) or epoch not in taken]
    if last in taken and parting and data.draw(st.booleans()):
        free = [last, *[epoch for epoch in free if epoch > last]]
        # The same epoch goes on at one side only: at the other it ended there.
        ours = ours[:parting] + [turn for turn in ours[parting:] if turn[0] > last]
    branch = sorted(data.draw(st.lists(st.sampled_from(free), max_size=6))) if free else []
    theirs = ours[:parting] + [(epoch, 1) for epoch in branch]
    if not theirs or not ours:
        return
    lines = tuple((epoch, [e for e, _ in ours].index(epoch) + 1) for epoch in sorted({e for e, _ in ours}))
    first = data.draw(st.integers(1, len(ours)))

    class Log:
        first_txid = first
        head = position_in(ours, len(ours))

        def epochs(self) -> tuple[tuple[int, int], ...]:
            return lines

        def holds(self, known: Position) -> bool:
            return first - 1 <= known.txid <= len(ours) and known.is_at(position_in(ours, known.txid))

        def passed(self, known: Position) -> bool:
            return passed(lines, position_in(ours, len(ours)), known)

    history = [position_in(theirs, txid) for txid in range(len(theirs), 0, -1)]
    kept = data.draw(st.integers(1, len(history)))
    own = tuple((epoch, [e for e, _ in theirs].index(epoch) + 1) for epoch in sorted({e for e, _ in theirs}))
    point = branch_point(history[0], history[1:kept], data.draw(st.sampled_from([(), own])), Log())
    if branch and branch != [e for e, _ in ours[parting : parting + len(branch)]]:
        assert point is not None and point <= parting
    elif not branch:
        assert point is None or (point == 0 and first > 1), "nothing is kept that was not lost"


def position_in(turns: list[tuple[int, int]], txid: int) -> Position:
    return NOTHING if txid == 0 else at(txid, turns[txid - 1][1], turns[txid - 1][0])


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
