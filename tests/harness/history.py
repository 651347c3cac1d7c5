"""What clients of a cluster saw, and whether a cluster that keeps its promises could have shown it to them. Pure.

Clients append unique values to one table of a database, on whatever node lets them, and read all of it on all nodes.
Each line of a history file is a JSON object; times are CLOCK_MONOTONIC of the one machine all run on:

    {"op": "invoke", "t", "node", "db", "value"}    right before COMMIT
    {"op": "ok" | "fail" | "unknown", "t", "value"} its result; "fail" is certain. No result: unknown
    {"op": "read", "t0", "t", "reader", "node", "db", "keep", "new"}   a whole table, as the first `keep` values of what
                                                    the same reader read before, and `new`
    {"op": "torn", "t0", "t", "reader", "node", "db", "text"}          what cannot be, seen in one read transaction
    {"op": "role", "t0", "t", "node", "primary", "epoch"}              what the node says of itself

`check` returns what is wrong, one line each:

    LOST        an acknowledged commit is missing; of a database that may lose some: it is not in `lost/` either
    TWICE       a value is there more than once
    INVENTED    a value that nobody wrote, or whose write had failed
    STRAY       a read is neither a prefix of the history as it finally is, nor such a prefix with a branch after it
                that was kept in `lost/`, or, where commits wait for replicas, with one that was taken back
    BACK        a node showed less than before, and not because it left a branch
    FLICKER     a node showed a value, then not, then again, whoever had read it there, with no power cut in between,
                and no election where those may lose commits
    DIRTY       a node showed a commit that had failed there and is not in the history, with no death of it in between
    TORN        a read transaction saw what cannot be: a damaged index, a wrong count, or two states
    ORDER       a commit that was acknowledged before another one began comes after it
    STALE       a commit was acknowledged by a primary that another one had replaced, as its clients could tell
    SPLIT       two nodes were the primary of one epoch, or acknowledged commits in it
    APART       nodes differ at the end, or are damaged
"""

from __future__ import annotations

import bisect
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_SHOWN = 5  # problems of each kind and database


@dataclass(frozen=True)
class Write:
    """`end_s` None: there was no answer. `outcome`: "ok", "fail" or "unknown"."""

    value: str
    node: str
    db: str
    start_s: float
    end_s: float | None
    outcome: str


@dataclass(frozen=True)
class Read:
    reader: str
    node: str
    db: str
    start_s: float
    end_s: float
    values: tuple[str, ...]


@dataclass(frozen=True)
class Role:
    node: str
    start_s: float
    end_s: float
    primary: bool
    epoch: int


@dataclass(frozen=True)
class Torn:
    node: str
    db: str
    end_s: float
    text: str


@dataclass
class History:
    """By node, and not from files: `downs`, when its daemon was killed, and `cuts`, when its machine lost its power,
    or its disk became another one. `darks`: from when to when applications ran on a machine without power, which cannot
    be: what they read then, of a disk that is gone, is not judged."""

    writes: list[Write] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    roles: list[Role] = field(default_factory=list)
    torn: list[Torn] = field(default_factory=list)
    downs: dict[str, list[float]] = field(default_factory=dict)
    cuts: dict[str, list[float]] = field(default_factory=dict)
    darks: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def is_dark(self, node: str, at_s: float) -> bool:
        return any(from_s <= at_s <= until_s for from_s, until_s in self.darks.get(node, ()))

    def acknowledged(self, db: str) -> list[Write]:
        return [write for write in self.writes if write.db == db and write.outcome == "ok"]


@dataclass(frozen=True)
class Copy:
    """One node's database after everything was healed. `digest` stands for its bytes."""

    position: str
    digest: str
    integrity: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """`primary` names the node whose history counts. `copies`: by node, by database. `lost`: what is in branches that
    were kept, by database. `durable`: databases of which no acknowledged commit may be missing. `fenced`: those whose
    commits ask the daemon, so that a primary without a lease must not acknowledge any. `awaited`: those whose commits
    may be on other nodes before they are answered. `mixed`: databases with writers of either `synchronous`: what
    is said of commits holds for those that are not NORMAL. `branch_epochs`: the epoch of the branch in which a value
    is kept, the lowest if it is in several, by database."""

    primary: str
    copies: Mapping[str, Mapping[str, Copy]]
    lost: Mapping[str, frozenset[str]]
    durable: frozenset[str]
    fenced: frozenset[str] = frozenset()
    awaited: frozenset[str] = frozenset()
    mixed: frozenset[str] = frozenset()
    branch_epochs: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def counts(self, write: Write) -> bool:
        """Whether what its database promises is promised for this commit."""
        return write.db not in self.mixed or ".normal." not in write.value

    def may_be_taken_back(self, db: str) -> bool:
        return db in self.durable or db in self.awaited


# --- reading -------------------------------------------------------------------------------------------------------


def parse(files: Iterable[str]) -> History:
    """A history from the texts of its files. A torn last line (its writer was killed) does not count."""
    history = History()
    for text in files:
        _parse_file(text, history)
    history.writes.sort(key=lambda write: write.start_s)
    history.reads.sort(key=lambda read: read.start_s)
    history.roles.sort(key=lambda role: role.start_s)
    return history


def _parse_file(text: str, history: History) -> None:
    lines = text.split("\n")
    lines.pop()  # empty, or torn
    invoked: dict[str, dict[str, Any]] = {}
    last: dict[tuple[str, str], tuple[str, ...]] = {}
    for line in lines:
        record = json.loads(line)
        kind, at_s = record["op"], record["t"]
        if kind == "invoke":
            assert record["value"] not in invoked, f"{record['value']} was invoked twice: a defect of the client"
            invoked[record["value"]] = record
        elif kind in ("ok", "fail", "unknown"):
            history.writes.append(_write(invoked.pop(record["value"]), at_s, kind))
        elif kind == "torn":
            history.torn.append(Torn(record["node"], record["db"], at_s, record["text"]))
        elif kind == "read":
            reader = record["reader"]
            values = last.get((reader, record["db"]), ())[: record["keep"]] + tuple(record["new"])
            last[reader, record["db"]] = values
            history.reads.append(Read(reader, record["node"], record["db"], record["t0"], at_s, values))
        else:
            history.roles.append(Role(record["node"], record["t0"], at_s, record["primary"], record["epoch"]))
    history.writes.extend(_write(record, None, "unknown") for record in invoked.values())


def _write(invoke: dict[str, Any], end_s: float | None, outcome: str) -> Write:
    return Write(invoke["value"], invoke["node"], invoke["db"], invoke["t"], end_s, outcome)


# --- checking ------------------------------------------------------------------------------------------------------


def check(history: History, outcome: Outcome) -> list[str]:
    """What is wrong; nothing if all is well."""
    problems = [*_apart(outcome), *_split_roles(history.roles)]
    epochs = attributed(history)
    problems += _split_writes(history, epochs)
    elections = _elections(history.roles)
    for db in sorted(outcome.copies[outcome.primary]):
        final = outcome.copies[outcome.primary][db].values
        lost = outcome.lost.get(db, frozenset())
        writes = [write for write in history.writes if write.db == db]
        reads = [read for read in history.reads if read.db == db]
        unanswered = _unanswered(writes)
        promised = [write for write in writes if outcome.counts(write)]
        others = [write for write in writes if not outcome.counts(write)]
        taken_back = unanswered | lost if db in outcome.mixed else unanswered
        torn_here = [torn for torn in history.torn if torn.db == db and not history.is_dark(torn.node, torn.end_s)]
        found = [
            *_lost(promised, final, lost, db in outcome.durable),
            *_lost(others, final, lost, False),
            *_twice(final, reads),
            *_invented(writes, final, reads, lost),
            *_stray(reads, final, lost, unanswered if outcome.may_be_taken_back(db) else frozenset()),
            *_back(reads, final, taken_back if db in outcome.durable else lost),
            *_flicker(reads, history.cuts, elections, unanswered if db in outcome.durable - outcome.mixed else None),
            *(f"TORN read on {torn.node} at {torn.end_s:.3f} s: {torn.text}" for torn in torn_here),
            *_order(writes, final),
        ]
        if db in outcome.durable:
            found += _dirty(promised, reads, final, history.downs)
        if db in outcome.fenced:
            found += _stale(promised, epochs)
            found += _stale_and_lost(promised, final, history.roles, outcome.branch_epochs.get(db, {}))
        problems += _first_of_each(db, found)
    return problems


def _first_of_each(db: str, found: Sequence[str]) -> list[str]:
    """Not more than a few of each kind, each with the database's name."""
    counts: Counter[str] = Counter()
    shown = []
    for problem in found:
        kind, _, text = problem.partition(" ")
        counts[kind] += 1
        if counts[kind] <= _SHOWN:
            shown.append(f"{kind} {db}: {text}")
    return shown + [f"{kind} {db}: … {count} in all" for kind, count in counts.items() if count > _SHOWN]


def _lost(writes: Sequence[Write], final: Sequence[str], lost: frozenset[str], durable: bool) -> list[str]:
    there = set(final)
    problems = []
    for write in writes:
        if write.outcome != "ok" or write.value in there:
            continue
        if durable:
            kept = "it is in lost/" if write.value in lost else "and not in lost/ either"
            problems.append(f"LOST {write.value}, acknowledged by {write.node} at {write.end_s:.3f} s; {kept}")
        elif write.value not in lost:
            problems.append(f"LOST {write.value}, acknowledged by {write.node} at {write.end_s:.3f} s, not in lost/")
    return problems


def _twice(final: Sequence[str], reads: Sequence[Read]) -> list[str]:
    problems = [f"TWICE {value} in the end" for value, count in Counter(final).items() if count > 1]
    for read in reads:
        if len(set(read.values)) != len(read.values):
            value = next(value for value, count in Counter(read.values).items() if count > 1)
            problems.append(f"TWICE {value} read on {read.node} at {read.end_s:.3f} s")
    return problems


def _invented(writes: Sequence[Write], final: Sequence[str], reads: Sequence[Read], lost: frozenset[str]) -> list[str]:
    outcomes = {write.value: write.outcome for write in writes}
    seen = dict.fromkeys(final, "in the end")
    for read in reads:
        for value in read.values[::-1]:
            if value in seen:
                break  # a reader that saw it saw what stands before it, and that was looked at
            seen[value] = f"read on {read.node} at {read.end_s:.3f} s"
    seen |= {value: "in lost/" for value in lost if value not in seen}
    problems = []
    for value, where in seen.items():
        if outcomes.get(value) in (None, "fail"):
            why = "nobody wrote it" if value not in outcomes else "its write had failed"
            problems.append(f"INVENTED {value} {where}: {why}")
    return problems


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """How many values both begin with; equal beginnings are compared as a whole, which is the usual case."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    return next(at for at in range(length) if one[at] != other[at])


def _unanswered(writes: Sequence[Write]) -> frozenset[str]:
    """Commits that a replica may have shown before they failed: one that waits for replicas is on them before it is
    acknowledged, and is taken back there too if it fails."""
    return frozenset(write.value for write in writes if write.outcome != "ok")


def _stray(
    reads: Sequence[Read], final: tuple[str, ...], lost: frozenset[str], unanswered: frozenset[str]
) -> list[str]:
    there = set(final)
    problems = []
    for read in reads:
        common = _common(read.values, final)
        if len(read.values) == common + 1 and read.values[-1] in unanswered - there:
            continue  # one at a time: the next writer of a database waits for it
        for value in read.values[common:]:
            if value in there or value not in lost:
                what = "which is elsewhere in the history" if value in there else "which is not in lost/"
                instead = final[common] if common < len(final) else "no more"
                problems.append(
                    f"STRAY read on {read.node} at {read.end_s:.3f} s: {common} values as in the history, then "
                    f"{value}, {what} (the history has {instead})"
                )
                break
    return problems


def _back(reads: Sequence[Read], final: tuple[str, ...], lost: frozenset[str]) -> list[str]:
    """`lost`: what was kept in a branch, and may be the history even so: of a later primary that had never left it; or,
    where commits wait for replicas, what nobody was told of: its old primary may have given it to the new one later."""
    last: dict[str, Read] = {}
    problems = []
    for read in reads:
        before = last.get(read.reader)
        last[read.reader] = read
        if before is None or read.values[: len(before.values)] == before.values:
            continue
        still = _common(read.values, before.values)
        kept = min(len(before.values), _common(before.values, final))  # what it showed of the final history
        if not lost.issuperset(before.values[still:kept]):
            problems.append(
                f"BACK {read.node} showed {len(before.values)} values until {before.end_s:.3f} s, and at "
                f"{read.end_s:.3f} s no longer {before.values[still]}"
            )
    return problems


def _elections(roles: Sequence[Role]) -> list[float]:
    """When each epoch's primary was first seen."""
    first: dict[int, float] = {}
    for role in roles:
        if role.primary:
            first[role.epoch] = min(role.end_s, first.get(role.epoch, role.end_s))
    return sorted(first.values())


def _flicker(
    reads: Sequence[Read],
    cuts: Mapping[str, Sequence[float]],
    elections_s: Sequence[float],
    unanswered: frozenset[str] | None,
) -> list[str]:
    """Of one node's reads, whoever made them: a value in one, not in a later one, and in a still later one. Two reads
    that overlap in time are in no order. What a disk has lost with its power, or with itself, may come back. What an
    election has lost the next one may bring back; that is only what was not acknowledged, of a database whose commits
    wait for replicas. `unanswered`: that; None: of another database."""
    by_node: dict[str, list[Read]] = defaultdict(list)
    for read in reads:
        by_node[read.node].append(read)
    return [
        problem
        for node in sorted(by_node)
        for problem in _flicker_of(by_node[node], cuts.get(node, ()), elections_s, unanswered)
    ]


def _flicker_of(
    reads: Sequence[Read], cuts_s: Sequence[float], elections_s: Sequence[float], unanswered: frozenset[str] | None
) -> list[str]:
    """`reads` of one node, by their starts. A read is compared with the last one that had ended when it began."""
    problems = []
    ended: list[tuple[float, int]] = []  # the reads so far, by their ends
    gone: dict[str, tuple[Read, Read]] = {}  # what a read had shown, and the next one did not
    for at, read in enumerate(reads):
        there: set[str] | None = None
        for value, (_, without) in list(gone.items()):
            if without.end_s < read.start_s:
                there = set(read.values) if there is None else there
                if value in there:
                    shown, without = gone.pop(value)
                    excuses_s = [*cuts_s, *elections_s] if unanswered is None else cuts_s
                    if any(shown.start_s < at_s < read.end_s for at_s in excuses_s):
                        continue
                    if value in (unanswered or ()) and any(without.start_s < at_s < read.end_s for at_s in elections_s):
                        continue
                    one, two, three = (f"{one.end_s:.3f} s ({len(one.values)})" for one in (shown, without, read))
                    problems.append(f"FLICKER {read.node} showed {value} at {one}, not at {two}, and again at {three}")
        last = bisect.bisect_left(ended, (read.start_s, -1)) - 1
        if last >= 0:
            before = reads[ended[last][1]]
            if read.values[: len(before.values)] != before.values:
                there = set(read.values) if there is None else there
                gone.update({value: (before, read) for value in before.values if value not in there | gone.keys()})
        bisect.insort(ended, (read.end_s, at))
    return problems


def _dirty(
    writes: Sequence[Write], reads: Sequence[Read], final: Sequence[str], downs: Mapping[str, Sequence[float]]
) -> list[str]:
    """A commit that failed is not visible where it failed. After a death of the daemon it may be, until the node has
    met the new primary: SQLite's own recovery counts what stands in the file."""
    there = set(final)
    failed = {
        write.value: write for write in writes
        if write.outcome != "ok" and write.end_s is not None and write.value not in there
    }  # fmt: skip
    problems = []
    for read in reads if failed else ():
        for value in read.values[-3:]:
            write = failed.get(value)
            if write is None or write.node != read.node or write.end_s is None or read.start_s < write.end_s:
                continue
            if not any(write.start_s < at_s < read.end_s for at_s in downs.get(read.node, ())):
                del failed[value]
                problems.append(
                    f"DIRTY {value} failed on {write.node} at {write.end_s:.3f} s, was read there at {read.end_s:.3f} "
                    "s, and is not in the history"
                )
    return problems


def _order(writes: Sequence[Write], final: Sequence[str]) -> list[str]:
    """No commit that began after another one's answer stands before it: seen from the end, each began before the
    earliest answer of those after it."""
    by_value = {write.value: write for write in writes}
    problems = []
    earliest: Write | None = None
    for value in reversed(final):
        write = by_value.get(value)
        if write is None:
            continue
        if earliest is not None and earliest.end_s is not None and write.start_s > earliest.end_s:
            problems.append(
                f"ORDER {write.value} began at {write.start_s:.3f} s and stands before {earliest.value}, which "
                f"{earliest.node} had acknowledged at {earliest.end_s:.3f} s"
            )
        if write.outcome != "ok" or write.end_s is None:
            continue
        if earliest is None or earliest.end_s is None or write.end_s < earliest.end_s:
            earliest = write
    return problems


def attributed(history: History) -> dict[str, int]:
    """In which epoch a value was acknowledged, where that is certain: its node was the primary of that epoch before the
    commit began and after it was answered, as it says itself."""
    by_node: dict[str, list[Role]] = defaultdict(list)
    for role in history.roles:
        by_node[role.node].append(role)
    starts = {node: [role.start_s for role in roles] for node, roles in by_node.items()}
    ends = {node: [role.end_s for role in roles] for node, roles in by_node.items()}
    found = {}
    for write in history.writes:
        if write.outcome != "ok" or write.end_s is None or write.node not in by_node:
            continue
        roles = by_node[write.node]
        before = bisect.bisect_right(ends[write.node], write.start_s) - 1
        after = bisect.bisect_left(starts[write.node], write.end_s)
        if before < 0 or after >= len(roles):
            continue
        one, other = roles[before], roles[after]
        if one.primary and other.primary and one.epoch == other.epoch:
            found[write.value] = one.epoch
    return found


def _split_roles(roles: Sequence[Role]) -> list[str]:
    claims: dict[int, set[str]] = defaultdict(set)
    for role in roles:
        if role.primary:
            claims[role.epoch].add(role.node)
    return [
        f"SPLIT epoch {epoch}: {' and '.join(sorted(nodes))} were its primary"
        for epoch, nodes in sorted(claims.items())
        if len(nodes) > 1
    ]


def _split_writes(history: History, epochs: Mapping[str, int]) -> list[str]:
    nodes: dict[int, set[str]] = defaultdict(set)
    for write in history.writes:
        if write.value in epochs:
            nodes[epochs[write.value]].add(write.node)
    return [
        f"SPLIT epoch {epoch}: {' and '.join(sorted(names))} acknowledged commits in it"
        for epoch, names in sorted(nodes.items())
        if len(names) > 1
    ]


def _stale(writes: Sequence[Write], epochs: Mapping[str, int]) -> list[str]:
    """Among the answers before a commit began, the highest epoch must not be above its own."""
    known = [write for write in writes if write.value in epochs and write.end_s is not None]
    by_end = sorted(known, key=lambda write: write.end_s or 0.0)
    problems = []
    highest: Write | None = None
    at = 0
    for write in sorted(known, key=lambda write: write.start_s):
        while at < len(by_end) and (by_end[at].end_s or 0.0) < write.start_s:
            if highest is None or epochs[by_end[at].value] > epochs[highest.value]:
                highest = by_end[at]
            at += 1
        if highest is not None and epochs[highest.value] > epochs[write.value]:
            problems.append(
                f"STALE {write.value} acknowledged by {write.node} in epoch {epochs[write.value]} at {write.end_s:.3f} "
                f"s, after {highest.node} had acknowledged {highest.value} in epoch {epochs[highest.value]}"
            )
    return problems


def _stale_and_lost(
    writes: Sequence[Write], final: Sequence[str], roles: Sequence[Role], branch_epochs: Mapping[str, int]
) -> list[str]:
    """A commit that is not in the history, though it began after another node's that is had been answered. Where its
    branch was kept, its epoch is not above one of which another node had said that it was the primary. Else its node
    never said that it was the primary again, of which it was asked meanwhile: at load it may be asked too seldom."""
    there = set(final)
    said: dict[str, list[Role]] = defaultdict(list)
    for role in roles:
        said[role.node].append(role)
    answered = sorted((write.end_s, write.node) for write in writes if write.value in there and write.end_s is not None)
    problems = []
    for write in writes:
        if write.outcome != "ok" or write.value in there or write.end_s is None:
            continue
        before = answered[: bisect.bisect_left(answered, (write.start_s, ""))]
        since_s = next((end_s for end_s, node in reversed(before) if node != write.node), None)
        if since_s is None:
            continue
        if write.value in branch_epochs:
            claims = [role.epoch for role in roles if role.primary and role.node != write.node
                      and role.end_s < write.start_s]  # fmt: skip
            stale = branch_epochs[write.value] <= max(claims, default=0)
        else:
            meanwhile = [role for role in said[write.node] if since_s < role.end_s and role.start_s < write.end_s + 1.0]
            stale = bool(meanwhile) and not any(role.primary for role in meanwhile)
        if stale:
            problems.append(
                f"STALE {write.value} acknowledged by {write.node} at {write.end_s:.3f} s, and lost, "
                f"{write.start_s - since_s:.3f} s after another primary's commits were"
            )
    return problems


def _apart(outcome: Outcome) -> list[str]:
    problems = []
    wanted = outcome.copies[outcome.primary]
    for node, copies in sorted(outcome.copies.items()):
        if sorted(copies) != sorted(wanted):
            problems.append(f"APART {node} has {sorted(copies)}, {outcome.primary} {sorted(wanted)}")
        for db, copy in sorted(copies.items()):
            if copy.integrity != "ok":
                problems.append(f"APART {db} on {node} is damaged: {copy.integrity}")
            if db in wanted and (copy.position, copy.digest) != (wanted[db].position, wanted[db].digest):
                problems.append(
                    f"APART {db} on {node}: {copy.position}, bytes {copy.digest}; on {outcome.primary} "
                    f"{wanted[db].position}, bytes {wanted[db].digest}"
                )
    return problems
