"""Kills and changes of the primary by seed: 10,000 and 1,000 in the long run, whose result stands in bench/results/.

    python tests/harness/endurance.py [--kills 10000] [--changes 1000] [--seed 1] [--jobs 2] [--minutes N]
    python tests/harness/endurance.py --simulated [--kills 10000] [--changes 1000] …

*Real*: a round is a cluster of three nodes, drawn by its seed, with writers, readers that hold snapshots and readers
that open a database at every moment, and a hundred faults: daemons are killed (kill -9) and started again, one, two or
all at once, and some of them once more while they start; the primary's is killed, told to stop (SIGTERM), or to hand
over, several times in a row; all applications of a node are killed in the middle of whatever they do, and the lease
engine is, where that keeps its data. Kills of daemons, of applications and of engines are counted apart, and a change
of the primary is an epoch in which another node than before was seen to take writes. Then all must agree in silence,
the clients' histories are judged (`history.py`), and the nodes' copies are compared byte by byte. Daemons are forked
(`forks.py`): a start does not load Python anew, all else is as ever.

*Simulated*: the clusters of `tests/t4_simulation`, by seed and in virtual time: the real election, shared state and
commit gate on databases that are lists, with the faults that are written there.

Each round is a process of its own, and one line of OUT.jsonl, with what was wrong; of the simulated ones so many as
share a line. OUT.md, the tables, is written after every one: a run may be stopped at any time, and goes on with the
next seed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
sys.path[:0] = [str(TESTS), str(TESTS / "t4_simulation")]

from cluster_nodes import PATIENCE  # noqa: E402
from harness.cluster import (  # noqa: E402
    DELETE_DB,
    FULL_DB,
    MIXED_DB,
    NORMAL_DB,
    PERSIST_DB,
    ROLLBACK_DB,
    HaCluster,
)
from harness.history import Role  # noqa: E402
from harness.nodes import Member, wait_for  # noqa: E402

ROUND_KILLS = 120
ROUND_S = 120.0 * PATIENCE  # then it ends with the faults it has had
ROUND_LIMIT_S = ROUND_S + 300 * PATIENCE  # then it hangs
ENGINES = ("etcd", "etcd", "directory", "s3", "kubernetes")
TTL_S = dict.fromkeys(ENGINES, 1.5) | {"etcd": 2.0}  # the time of a failover is mostly this
KEPT = 20  # folders of rounds that failed
DURABLE = ("etcd",)  # engines that can be killed: they have their data on the disk
AT_ONCE = 25  # simulated clusters of one line
PAUSES_S = (0.0, 0.02, 0.1, 0.3)  # between faults


@dataclass
class Result:
    """Of one round. `problems` empty: all was well."""

    seed: int
    setup: dict[str, Any]
    kills: int = 0
    starting: int = 0  # of these, before they served
    changes: int = 0
    terminated: int = 0
    applications: int = 0  # killed, as the engines are
    engines: int = 0
    acknowledged: int = 0
    reads: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def changes_of(roles: list[Role]) -> int:
    """How often another node than before was seen to take writes, as the primary of an epoch."""
    primaries = {role.epoch: role.node for role in roles if role.primary}
    nodes = [node for _, node in sorted(primaries.items())]
    return sum(one != other for one, other in itertools.pairwise(nodes))


class Round:
    """One cluster and its faults."""

    def __init__(self, folder: Path, seed: int, kills: int = ROUND_KILLS) -> None:
        self.rng = rng = random.Random(f"endurance {seed}")
        self.wanted = kills
        self.sync = rng.choice((0, 1))
        databases = rng.choice((FULL_DB, MIXED_DB)) | rng.choice((NORMAL_DB, DELETE_DB, PERSIST_DB, ROLLBACK_DB))
        self.retention = rng.choice(("10m", "2s"))
        engine = rng.choice(ENGINES)
        self.cluster = HaCluster(
            folder, engine, sync=self.sync, databases=databases, limit_s=ROUND_LIMIT_S, ttl_s=TTL_S[engine], forked=True
        )
        self.result = Result(seed, {"engine": engine, "sync": self.sync, "databases": sorted(databases),
                                    "retention": self.retention})  # fmt: skip

    def run(self) -> Result:
        """All of it; problems are in the result."""
        start_s = time.monotonic()
        result = self.result
        try:
            with self.cluster as cluster:
                try:
                    cluster.start(3, data={"retention": self.retention, "retention-monitor-interval": "1s"})
                    with cluster.workload(pause_ms=25.0, watched=True):
                        while result.kills < self.wanted and time.monotonic() - start_s < ROUND_S:
                            self._fault()
                            time.sleep(self.rng.choice(PAUSES_S))
                        cluster.revive()
                    seen, _ = cluster.judge()
                    result.acknowledged = sum(write.outcome == "ok" for write in seen.writes)
                    result.reads, result.changes = len(seen.reads), changes_of(seen.roles)
                    assert all(seen.acknowledged(name) for name in cluster.databases), "nothing was ever committed"
                    cluster.hush(2, self.rng)
                    cluster.judge()
                except BaseException:
                    for name, text in cluster.logs():
                        (cluster.base / f"{name.replace(' ', '-')}.txt").write_text(text)
                    raise
        except Exception as error:
            result.problems = [f"{type(error).__name__}: {error}"[:3000]]
        result.seconds = round(time.monotonic() - start_s, 1)
        return result

    # -- faults

    def _fault(self) -> None:
        kinds = [*(self._kill_replica,) * 6, *(self._kill_all,) * 3, self._kill_primary, self._stop]
        kinds += [*(self._hand_over,) * 2, self._kill_applications]
        if self.result.setup["engine"] in DURABLE and self.rng.random() < 0.3:
            kinds += [self._kill_engine]
        for member in self.cluster.members:
            assert member.runs or member.ended, f"{member.name} has ended by itself\n{member.log_tail()}"
        self.rng.choice(kinds)()

    def _kill(self, members: list[Member]) -> None:
        for member in members:
            self.result.starting += member.role() is None
            member.kill()
            self.result.kills += 1

    def _start(self, members: list[Member]) -> None:
        """Some of them once more, or several times: before they mount, or right after."""
        for member in members:
            member.start(wait=False)
        again = members
        while self.rng.random() < 0.4:
            time.sleep(0.6 * self.rng.random())
            again = self.rng.sample(again, self.rng.randint(1, len(again)))
            self._kill(again)
            for member in again:
                member.start(wait=False)
        if self.rng.random() < 0.8:  # else the next fault meets them while they start
            for member in members:
                wait_for(member.serves, f"{member.name} serves", self.cluster.members)

    def _leader(self) -> Member | None:
        """Nobody is waited for: while an election is under way there is none."""
        return next((member for member in self.cluster.members if member.runs and member.takes_writes()), None)

    def _kill_replica(self) -> None:
        leader = self._leader()
        replicas = [member for member in self.cluster.members if member is not leader and member.runs]
        victims = self.rng.sample(replicas, min(len(replicas), self.rng.choice((1, 2, 2))))
        if victims:
            self._kill(victims)
            time.sleep(self.rng.choice(PAUSES_S))
            self._start(victims)

    def _kill_all(self) -> None:
        """Not before there is something to lose."""
        self.cluster.wait_primary()
        self._kill(self.cluster.running())
        self._start(self.cluster.members)

    def _kill_applications(self) -> None:
        """Of one node, in the middle of whatever they do; others take their place."""
        self.result.applications += self.cluster.kill_applications(self.rng.choice(self.cluster.members))

    def _kill_engine(self) -> None:
        """Back before the lease has ended, or after."""
        service = self.cluster.service
        assert service is not None
        service.kill()
        self.result.engines += 1
        time.sleep(self.rng.choice((0.0, 0.3, 1.0, 3.0)))
        service.start()
        self.cluster.wait_primary()

    def _kill_primary(self) -> None:
        old = self.cluster.primary()
        self._kill([old])
        if self.rng.random() < 0.7:
            self.cluster.wait_primary(but=[old])
        self._start([old])

    def _stop(self) -> None:
        """SIGTERM: it hands over, and ends in order."""
        old = self.cluster.primary()
        old.terminate()
        assert old.process is not None
        status = old.process.wait(40)
        assert status == 0, f"{old.name}: SIGTERM, status {status}\n{old.log_tail()}"
        self.result.terminated += 1
        self.cluster.wait_primary(but=[old])
        self._start([old])

    def _hand_over(self) -> None:
        """Again and again, to whoever is there."""
        for _ in range(self.rng.choice((1, 2, 4))):
            replicas = self.cluster.replicas()
            if not replicas:
                return
            to = self.rng.choice(replicas)
            try:
                to.post("/promote", timeout_s=10.0)
            except OSError:
                return  # it may refuse: not in sync yet
            self.cluster.wait_primary()
            time.sleep(self.rng.choice(PAUSES_S))


# -- many of them


class Record:
    """What was found so far, in its two files."""

    def __init__(self, out: Path, *, fresh: bool) -> None:
        self._lines, self._table = (out.with_name(out.name + ending) for ending in (".jsonl", ".md"))
        if fresh:
            self._lines.unlink(missing_ok=True)
        texts = self._lines.read_text().splitlines() if self._lines.exists() else []
        self.found: list[dict[str, Any]] = [json.loads(line) for line in texts]

    def add(self, record: dict[str, Any]) -> None:
        self.found.append(record)
        with open(self._lines, "a") as file:
            file.write(json.dumps(record) + "\n")
        self._table.write_text(tables(self.found))

    def of(self, *, simulated: bool) -> list[dict[str, Any]]:
        return [record for record in self.found if ("simulated" in record) is simulated]

    def enough(self, options: argparse.Namespace, start_s: float) -> bool:
        if options.minutes and time.monotonic() - start_s > options.minutes * 60:
            return True
        total = summed(self.of(simulated=options.simulated), "kills", "changes")
        return total["kills"] >= options.kills and total["changes"] >= options.changes


def summed(records: list[dict[str, Any]], *keys: str) -> Counter[str]:
    return Counter({key: sum(record[key] for record in records) for key in keys})


def many(options: argparse.Namespace) -> int:
    """Real clusters."""
    record, start_s, seed = Record(Path(options.out), fresh=options.fresh), time.monotonic(), options.seed
    done = {found["seed"] for found in record.of(simulated=False)}
    base = Path(tempfile.mkdtemp(prefix="litefs-endurance-", dir=options.scratch))
    base.chmod(0o755)
    with ThreadPoolExecutor(options.jobs) as pool:

        def work() -> None:
            nonlocal seed
            while not record.enough(options, start_s):
                mine, seed = seed, seed + 1
                if mine in done:
                    continue
                found = one(base, mine)
                record.add(found)
                total = summed(record.of(simulated=False), "kills", "changes")
                print(f"{time.monotonic() - start_s:6.0f} s  seed {mine}: {found['kills']} kills, {found['changes']} "
                      f"changes, {found['acknowledged']} commits, {found['seconds']:.0f} s; in all {total['kills']}, "
                      f"{total['changes']}" + "".join(f"\n    {text[:600]}" for text in found["problems"]),
                      flush=True)  # fmt: skip

        for task in [pool.submit(work) for _ in range(options.jobs)]:
            task.result()
    bad = [found["seed"] for found in record.of(simulated=False) if found["problems"]]
    print(f"{len(bad)} rounds with problems: {bad}\n{options.out}.md; folders of those that failed: {base}")
    if not bad:
        shutil.rmtree(base, ignore_errors=True)
    return 1 if bad else 0


def one(base: Path, seed: int) -> dict[str, Any]:
    """A round in a process of its own."""
    folder = base / f"s{seed}"
    words = [sys.executable, __file__, "--round", str(seed), "--scratch", str(folder)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=ROUND_LIMIT_S + 120, check=False)
        record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, ValueError) as error:
        text = getattr(error, "stderr", None) or (done.stderr if "done" in locals() else "")
        record = asdict(Result(seed, {}, problems=[f"the round ended without a result: {error!r} {text!s:.2000}"]))
    if not record["problems"] or sum(path.is_dir() for path in base.iterdir()) > KEPT:
        shutil.rmtree(folder, ignore_errors=True)
    return record


# -- simulated ones


def simulated(options: argparse.Namespace) -> int:
    record, start_s = Record(Path(options.out), fresh=options.fresh), time.monotonic()
    done = {(found["simulated"], found["seed"]) for found in record.of(simulated=True)}
    todo = (work for work in _all_simulated(options.seed) if work not in done)
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        under_way = {pool.submit(simulate_some, *next(todo)) for _ in range(options.jobs)}
        while under_way:
            ended, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            for task in ended:
                found = task.result()
                record.add(found)
                for text in found["problems"]:
                    print(text[:3000], flush=True)
                if not record.enough(options, start_s):
                    under_way.add(pool.submit(simulate_some, *next(todo)))
    all_found = record.of(simulated=True)
    print(f"{time.monotonic() - start_s:.0f} s, in all {dict(summed(all_found, 'clusters', 'kills', 'changes'))}")
    return 1 if any(found["problems"] for found in all_found) else 0


def _all_simulated(first: int) -> Iterator[tuple[str, int]]:
    from test_leadership_simulation import SETUPS

    while True:
        yield from ((name, first) for name in SETUPS)
        first += AT_ONCE


def simulate_some(name: str, first: int) -> dict[str, Any]:
    from test_leadership_simulation import played

    logging.disable()  # what nodes say of their elections
    start_s, problems, total = time.monotonic(), [], Counter[str]()
    for seed in range(first, first + AT_ONCE):
        run = played(seed, name)
        total.update(run.counts)
        if run.text:
            problems.append(run.text)
    keys = ("kills", "cuts", "changes", "acknowledged", "reads")
    return {"simulated": name, "seed": first, "clusters": AT_ONCE, **{key: total[key] for key in keys},
            "virtual_s": round(total["virtual_ms"] / 1000), "seconds": round(time.monotonic() - start_s, 1),
            "problems": problems}  # fmt: skip


# -- for people


def tables(found: list[dict[str, Any]]) -> str:
    real = [record for record in found if "simulated" not in record]
    lines = ["# Kills and changes of the primary, by seed", ""]
    lines += ["`python tests/harness/endurance.py`; its head says what is done, and how it is judged.", ""]
    if real:
        lines += _real_table(real)
    if others := [record for record in found if "simulated" in record]:
        lines += _simulated_table(others)
    return "\n".join(lines) + "\n"


def _real_table(found: list[dict[str, Any]]) -> list[str]:
    numbers = ("kills", "starting", "applications", "engines", "changes", "terminated", "acknowledged", "reads")
    total, seconds = summed(found, *numbers), sum(record["seconds"] for record in found)
    bad = [record for record in found if record["problems"]]
    lines = [
        "## Real daemons", "",
        "Clusters of three daemons, mounts and SQLite applications on one machine, with real lease engines, writers, "
        "readers that hold snapshots, and readers that open the databases at every moment.", "",
        "| | |", "| --- | --: |",
        f"| rounds (clusters) | {len(found)} |", f"| daemons killed (kill -9) | {total['kills']:,} |",
        f"| … of these while they started | {total['starting']:,} |",
        f"| applications killed | {total['applications']:,} |", f"| lease engines killed | {total['engines']:,} |",
        f"| changes of the primary | {total['changes']:,} |", f"| SIGTERMs of a primary | {total['terminated']:,} |",
        f"| commits acknowledged | {total['acknowledged']:,} |", f"| reads that were judged | {total['reads']:,} |",
        f"| hours of clusters | {seconds / 3600:.1f} |", f"| rounds with a problem | {len(bad)} |", "",
    ]  # fmt: skip
    if bad:
        lines += ["| seed | cluster | problem | the same seed, later |", "| --: | --- | --- | --- |"]
    for record in sorted(bad, key=lambda record: record["seed"]):
        setup = record["setup"]
        what = f"{setup.get('engine')}, sync {setup.get('sync')}, {', '.join(setup.get('databases', []))}"
        later = [one["problems"] for one in found[found.index(record) + 1 :] if one["seed"] == record["seed"]]
        again = f"{len(later)} runs, {sum(map(bool, later))} with a problem" if later else ""
        lines.append(f"| {record['seed']} | {what} | {_cell(record['problems'][0])} | {again} |")
    return [*lines, ""] if bad else lines


def _simulated_table(found: list[dict[str, Any]]) -> list[str]:
    keys = ("clusters", "kills", "cuts", "changes", "acknowledged", "reads", "virtual_s")
    lines = [
        "## Simulated nodes", "",
        "`tests/t4_simulation/test_leadership_simulation.py` in virtual time: the real election, shared state and "
        "commit gate, on databases that are lists; no mount, no SQLite. Crashes are kills of a node's process; of "
        "these, power cuts take what was not durable with them, or the whole disk.", "",
        "| cluster | runs | crashes | … with the power, or the disk | changes of the primary | commits acknowledged "
        "| reads judged | hours of virtual time | runs with a problem |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]  # fmt: skip
    names = list(dict.fromkeys(record["simulated"] for record in found))
    for name in [*names, ""]:
        records = [record for record in found if name in ("", record["simulated"])]
        total, bad = summed(records, *keys), sum(len(record["problems"]) for record in records)
        counts = [f"{total[key]:,}" for key in keys[:-1]]
        row = [name or "all", *counts, f"{total['virtual_s'] / 3600:.1f}", str(bad)]
        lines.append(f"| {' | '.join(row)} |")
    texts = [text for record in found for text in record["problems"]]
    return [*lines, "", *(f"- {_cell(text)}" for text in texts)]


def _cell(text: str) -> str:
    return text[:400].replace("|", "\\|").replace("\n", "<br>")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--simulated", action="store_true", help="simulated clusters")
    parser.add_argument("--kills", type=int, default=10_000)
    parser.add_argument("--changes", type=int, default=1_000, help="of the primary")
    parser.add_argument("--seed", type=int, default=1, help="of the first round")
    parser.add_argument("--jobs", type=int, default=2, help="so many clusters at a time")
    parser.add_argument("--minutes", type=float, default=0, help="end after about so many; 0: when it is enough")
    parser.add_argument("--out", default=str(ROOT / "bench/results/endurance"), help="results, without .jsonl and .md")
    parser.add_argument("--fresh", action="store_true", help="forget an earlier run's results")
    parser.add_argument("--scratch", default=None, help="where the nodes are, TMPDIR otherwise")
    parser.add_argument("--round", type=int, default=None, help="only this seed, here")
    options = parser.parse_args()
    if options.round is None:
        return simulated(options) if options.simulated else many(options)
    folder = Path(options.scratch or tempfile.mkdtemp(prefix="litefs-endurance-"))
    result = Round(folder, options.round).run()
    print(json.dumps(asdict(result)))
    sys.stdout.flush()
    os._exit(1 if result.problems else 0)


if __name__ == "__main__":
    sys.exit(main())
