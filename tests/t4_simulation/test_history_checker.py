"""The checker of cluster histories finds what it is there to find, and nothing in a history that is good.

Each bad history is the good one with one change, which must lead to the problem it is an example of.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.branches import lost_values
from harness.history import Copy, History, Outcome, Read, Role, Torn, Write, check, parse
from pylitefs.formats.ltx.checksum import page_checksum
from pylitefs.formats.ltx.encoder import encode
from pylitefs.formats.ltx.format import Header

DB = "app.db"
FINAL = ("a1", "a2", "b1", "b2")


def write(value: str, start_s: float, end_s: float | None, outcome: str = "ok") -> Write:
    return Write(value, value[0], DB, start_s, end_s, outcome)


def read(node: str, at_s: float, *values: str) -> Read:
    return Read(f"{node}.1", node, DB, at_s - 0.1, at_s, values)


def role(node: str, at_s: float, primary: bool, epoch: int) -> Role:
    return Role(node, at_s - 0.01, at_s, primary, epoch)


def good() -> tuple[History, Outcome]:
    """Node a writes a1 and a2 in epoch 1 and dies; b writes b1 and b2 in epoch 2. a3 had no answer, a4 was refused."""
    history = History(
        writes=[
            write("a1", 1.0, 1.1), write("a2", 2.0, 2.1), write("a3", 3.0, None, "unknown"),
            write("a4", 3.5, 3.6, "fail"), write("b1", 5.0, 5.1), write("b2", 6.0, 6.1),
        ],
        reads=[
            read("a", 1.5, "a1"), read("c", 1.6), read("a", 2.5, "a1", "a2"), read("a", 3.2, "a1", "a2", "a3"),
            read("b", 5.5, "a1", "a2", "b1"), read("c", 5.6, "a1", "a2"), read("a", 6.5, *FINAL),
            read("c", 7.0, *FINAL),
        ],
        roles=[
            role("a", 0.5, True, 1), role("b", 0.5, False, 1), role("a", 3.3, True, 1), role("b", 4.0, True, 2),
            role("a", 6.2, False, 2), role("b", 7.0, True, 2),
        ],
    )  # fmt: skip
    copy = Copy("4/c", "d", "ok", FINAL)
    copies = {node: {DB: copy} for node in "abc"}
    return history, Outcome("b", copies, {DB: frozenset({"a3"})}, frozenset({DB}), frozenset({DB}))


def final_is(outcome: Outcome, *values: str) -> Outcome:
    copy = Copy("4/c", "d", "ok", values)
    return dataclasses.replace(outcome, copies={node: {DB: copy} for node in "abc"})


def kinds(history: History, outcome: Outcome) -> set[str]:
    return {problem.split(" ")[0] for problem in check(history, outcome)}


def ordered(history: History) -> History:
    """As `parse` leaves it."""
    return History(
        sorted(history.writes, key=lambda found: found.start_s),
        sorted(history.reads, key=lambda found: found.start_s),
        sorted(history.roles, key=lambda found: found.start_s),
        history.torn,
        history.downs,
        history.cuts,
    )


def test_a_good_history() -> None:
    assert check(*good()) == []


Change = Callable[[History, Outcome], Outcome | None]


def acknowledged_commit_missing(history: History, outcome: Outcome) -> Outcome:
    history.reads.clear()
    return final_is(outcome, "a1", "b1", "b2")


def missing_though_kept(history: History, outcome: Outcome) -> Outcome:
    history.reads.clear()
    return dataclasses.replace(final_is(outcome, "a1", "b1", "b2"), lost={DB: frozenset({"a2", "a3"})})


def asynchronous_and_not_kept(history: History, outcome: Outcome) -> Outcome:
    history.reads.clear()
    return dataclasses.replace(final_is(outcome, "a1", "b1", "b2"), durable=frozenset())


def last_commit_missing(history: History, outcome: Outcome) -> Outcome:
    history.reads.clear()
    return final_is(outcome, "a1", "a2", "b1")


def twice_in_the_end(history: History, outcome: Outcome) -> Outcome:
    return final_is(outcome, *FINAL, "a1")


def twice_in_a_read(history: History, outcome: Outcome) -> None:
    history.reads.append(read("c", 8.0, *FINAL, "b2"))


def refused_value_in_the_end(history: History, outcome: Outcome) -> Outcome:
    return final_is(outcome, *FINAL, "a4")


def value_of_nobody(history: History, outcome: Outcome) -> Outcome:
    return final_is(outcome, *FINAL, "x1")


def refused_value_read(history: History, outcome: Outcome) -> None:
    history.reads.insert(3, read("a", 3.1, "a1", "a2", "a4"))


def hole(history: History, outcome: Outcome) -> None:
    history.reads.append(read("d", 5.8, "a1", "b1"))


def swapped(history: History, outcome: Outcome) -> None:
    history.reads.append(read("d", 5.8, "a2", "a1"))


def branch_that_was_not_kept(history: History, outcome: Outcome) -> Outcome:
    return dataclasses.replace(outcome, lost={}, durable=frozenset())


def two_that_were_taken_back(history: History, outcome: Outcome) -> Outcome:
    history.writes.append(write("a6", 3.3, None, "unknown"))
    history.reads.insert(4, read("a", 3.4, "a1", "a2", "a3", "a6"))
    return dataclasses.replace(outcome, lost={})


def branch_in_the_middle(history: History, outcome: Outcome) -> None:
    history.reads.append(read("d", 5.8, "a1", "a2", "a3", "b1"))


def went_back(history: History, outcome: Outcome) -> None:
    history.reads.append(read("b", 6.3, "a1", "a2"))


def went_back_with_its_branch(history: History, outcome: Outcome) -> None:
    history.reads.insert(4, read("a", 4.9, "a1"))


def gone_and_back(history: History, outcome: Outcome) -> None:
    """Seen by one reader, missed by another, seen by a third."""
    for number, values in enumerate((FINAL, FINAL[:3], FINAL)):
        one = read("d", 7.0 + number, *values)
        history.reads.append(dataclasses.replace(one, reader=f"d.{number}"))


def failed_and_seen(history: History, outcome: Outcome) -> None:
    history.writes[2] = write("a3", 3.0, 3.1, "unknown")


def read_that_cannot_be(history: History, outcome: Outcome) -> None:
    history.torn.append(Torn("a", DB, 2.5, "wrong # of entries in index"))


def mixed(history: History, outcome: Outcome, lost: str, in_lost: bool) -> Outcome:
    history.reads.clear()
    history.writes.append(Write(lost, "a", DB, 2.2, 2.3, "ok"))
    return dataclasses.replace(outcome, mixed=frozenset({DB}), lost={DB: frozenset({lost} if in_lost else ())})


def full_commit_of_a_mixed_database_missing(history: History, outcome: Outcome) -> Outcome:
    return mixed(history, outcome, "a.1.full.9.", True)


def normal_commit_of_a_mixed_database_not_kept(history: History, outcome: Outcome) -> Outcome:
    return mixed(history, outcome, "a.1.normal.9.", False)


def against_the_order_of_answers(history: History, outcome: Outcome) -> Outcome:
    history.reads.clear()
    return final_is(outcome, "a1", "b1", "a2", "b2")


def two_primaries_of_an_epoch(history: History, outcome: Outcome) -> None:
    history.roles.append(role("c", 6.5, True, 2))


def two_writers_of_an_epoch(history: History, outcome: Outcome) -> Outcome:
    history.writes.append(Write("c1", "c", DB, 7.1, 7.2, "ok"))
    history.roles += [role("c", 7.05, True, 2), role("c", 7.3, True, 2)]
    return final_is(outcome, *FINAL, "c1")


def stale_primary_acknowledges(history: History, outcome: Outcome) -> Outcome:
    """It is in the history even so, which makes it no better: nobody promised that."""
    history.writes.append(Write("a5", "a", DB, 5.2, 5.3, "ok"))
    history.roles += [role("a", 5.15, True, 1), role("a", 5.4, True, 1)]
    history.reads.clear()
    return final_is(outcome, "a1", "a2", "b1", "a5", "b2")


def stale_primary_acknowledges_and_it_is_lost(history: History, outcome: Outcome) -> Outcome:
    history.writes.append(write("a5", 6.3, 6.4))
    return dataclasses.replace(outcome, durable=frozenset(), lost={DB: frozenset({"a3", "a5"})})


def stale_primary_of_which_the_branch_tells(history: History, outcome: Outcome) -> Outcome:
    """It was not asked for its role meanwhile, but its branch is of an epoch that had ended."""
    history.roles = [role for role in history.roles if role.start_s < 6.0]
    changed = stale_primary_acknowledges_and_it_is_lost(history, outcome)
    return dataclasses.replace(changed, branch_epochs={DB: {"a5": 1}})


def another_position(history: History, outcome: Outcome) -> Outcome:
    return dataclasses.replace(outcome, copies={**outcome.copies, "c": {DB: Copy("3/c", "d", "ok", FINAL)}})


def other_bytes(history: History, outcome: Outcome) -> Outcome:
    return dataclasses.replace(outcome, copies={**outcome.copies, "c": {DB: Copy("4/c", "e", "ok", FINAL)}})


def damaged(history: History, outcome: Outcome) -> Outcome:
    return dataclasses.replace(outcome, copies={**outcome.copies, "c": {DB: Copy("4/c", "d", "row 3 missing", FINAL)}})


def database_missing(history: History, outcome: Outcome) -> Outcome:
    return dataclasses.replace(outcome, copies={**outcome.copies, "c": {}})


BAD: list[tuple[Change, str]] = [
    (acknowledged_commit_missing, "LOST"),
    (missing_though_kept, "LOST"),
    (asynchronous_and_not_kept, "LOST"),
    (last_commit_missing, "LOST"),
    (twice_in_the_end, "TWICE"),
    (twice_in_a_read, "TWICE"),
    (refused_value_in_the_end, "INVENTED"),
    (value_of_nobody, "INVENTED"),
    (refused_value_read, "INVENTED"),
    (hole, "STRAY"),
    (swapped, "STRAY"),
    (branch_that_was_not_kept, "STRAY"),
    (branch_in_the_middle, "STRAY"),
    (two_that_were_taken_back, "STRAY"),
    (went_back, "BACK"),
    (went_back_with_its_branch, "BACK"),
    (gone_and_back, "FLICKER"),
    (failed_and_seen, "DIRTY"),
    (read_that_cannot_be, "TORN"),
    (full_commit_of_a_mixed_database_missing, "LOST"),
    (normal_commit_of_a_mixed_database_not_kept, "LOST"),
    (against_the_order_of_answers, "ORDER"),
    (two_primaries_of_an_epoch, "SPLIT"),
    (two_writers_of_an_epoch, "SPLIT"),
    (stale_primary_acknowledges, "STALE"),
    (stale_primary_acknowledges_and_it_is_lost, "STALE"),
    (stale_primary_of_which_the_branch_tells, "STALE"),
    (another_position, "APART"),
    (other_bytes, "APART"),
    (damaged, "APART"),
    (database_missing, "APART"),
]


@pytest.mark.parametrize(("change", "kind"), BAD, ids=[change.__name__ for change, _ in BAD])
def test_a_bad_history_is_found(change: Change, kind: str) -> None:
    history, outcome = good()
    changed = change(history, outcome)
    assert kind in kinds(ordered(history), changed or outcome)


def test_what_is_read_of_a_disk_that_is_gone() -> None:
    history, outcome = good()
    read_that_cannot_be(history, outcome)
    history.darks = {"a": [(1.0, 2.4)], "b": [(2.4, 2.6)]}
    assert [problem.split()[0] for problem in check(history, outcome)] == ["TORN"]
    history.darks["a"].append((2.4, 2.6))
    assert check(history, outcome) == []


def test_what_may_happen() -> None:
    """A commit without an answer may be there; one of an asynchronous database may be lost if it is in lost/."""
    history, outcome = good()
    history.reads = history.reads[:3]
    assert check(history, final_is(outcome, "a1", "a2", "a3", "b1", "b2")) == []
    history, outcome = good()  # a replica has shown a commit that was waited for, and taken back
    assert check(history, dataclasses.replace(outcome, lost={})) == []
    history.reads = history.reads[:3]
    kept = dataclasses.replace(final_is(outcome, "a1", "b1", "b2"), lost={DB: frozenset({"a2", "a3"})})
    assert check(history, dataclasses.replace(kept, durable=frozenset())) == []
    history, outcome = good()
    assert check(history, mixed(history, outcome, "a.1.normal.9.", True)) == []
    history, outcome = good()  # the node died in between, and SQLite's recovery found the commit that had failed
    failed_and_seen(history, outcome)
    history.downs = {"a": [3.15]}
    assert check(history, outcome) == []
    history, outcome = good()
    gone_and_back(history, outcome)
    history.cuts = {"d": [7.5]}
    assert [problem for problem in check(history, outcome) if "FLICKER" in problem] == []
    history.cuts = {}
    asynchronous = dataclasses.replace(outcome, durable=frozenset())
    assert "FLICKER" in kinds(history, asynchronous)
    history.roles.append(Role("d", 7.5, 7.5, True, 1000))
    assert "FLICKER" not in kinds(history, asynchronous) and "FLICKER" in kinds(history, outcome)


@pytest.mark.parametrize(("back_s", "problems"), [(3.5, {"FLICKER"}), (4.5, set())])
def test_an_election_may_bring_back_what_was_not_acknowledged(back_s: float, problems: set[str]) -> None:
    """It is on a replica, another primary has it not, and the next one has. Nothing else may bring it back."""
    history, outcome = good()
    shown = ("a1", "a2", "a3")
    history.reads[:] = [read("d", 3.2, *shown), read("d", 3.35, *shown[:2]), read("d", back_s, *shown)]
    assert kinds(ordered(history), final_is(outcome, "a1", "a2", "a3", "b1", "b2")) == problems


def test_a_primary_for_a_moment_that_was_not_asked_then() -> None:
    """Its branch tells that it was one of a later epoch: it said that it was none before."""
    history, outcome = good()
    changed = stale_primary_acknowledges_and_it_is_lost(history, outcome)
    assert check(history, dataclasses.replace(changed, branch_epochs={DB: {"a5": 3}})) == []


def test_only_the_first_problems_of_a_kind_are_told() -> None:
    history, outcome = good()
    history.reads.clear()
    history.writes += [write(f"c{number}", 7.0 + number, 7.5 + number) for number in range(40)]
    found = check(history, outcome)
    assert len(found) == 6 and found[-1] == f"LOST {DB}: … 40 in all"


def line(op: str, t: float, **more: object) -> str:
    return json.dumps({"op": op, "t": t, **more}) + "\n"


def test_files_become_a_history() -> None:
    named = {"node": "a", "db": DB}
    writer = line("invoke", 1, value="a1", **named) + line("ok", 2, value="a1")
    writer += line("invoke", 3, value="a2", **named) + line("unknown", 4, value="a2")
    writer += line("invoke", 5, value="a3", **named) + '{"op": "ok", "t": 6, "val'
    reads = [line("read", 2, t0=1, reader="r", keep=0, new=["a1", "a2"], **named)]
    reads.append(line("read", 4, t0=3, reader="r", keep=1, new=["a3"], **named))
    roles = line("role", 1, t0=0, node="a", primary=True, epoch=3)
    more = line("torn", 4, t0=3, reader="r", text="2 values", **named)
    history = parse([writer, "".join(reads), roles, more])
    assert history.torn == [Torn("a", DB, 4, "2 values")]
    assert [(found.value, found.end_s, found.outcome) for found in history.writes] == [
        ("a1", 2, "ok"), ("a2", 4, "unknown"), ("a3", None, "unknown"),
    ]  # fmt: skip
    assert [found.values for found in history.reads] == [("a1", "a2"), ("a1", "a3")]
    assert history.roles == [Role("a", 0, 1, True, 3)]


def test_values_in_branches_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "dbs" / DB / "lost" / "1"
    folder.mkdir(parents=True)
    page = b"..n1.7.full.12." + bytes(512 - 15)
    header = Header(0, page_size=512, commit=1, min_txid=1, max_txid=1, timestamp_ms=0, pre_apply_checksum=0)
    (folder / "1.ltx").write_bytes(encode(header, [(1, page)], page_checksum(1, page)))
    assert lost_values([tmp_path], DB, {"n1.7.full.12.", "n1.7.full.1.", "n1.7.full.13."}) == {"n1.7.full.12."}
    assert lost_values([tmp_path], "other.db", {"n1.7.full.12."}) == frozenset()
