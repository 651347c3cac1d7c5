"""Kills and failovers by seed: 10,000 and 1,000 in the long run, whose result stands in bench/results/.

    python tests/harness/endurance.py [--kills 10000] [--failovers 1000] [--seed 1] [--jobs 2] [--minutes N]

A round is a cluster of three nodes, drawn by its seed, with writers, readers that hold snapshots and readers that open
a database at every moment, and some dozens of faults: a node's daemon is killed (kill -9) and started again, all of
them are, the primary's is killed and another one takes over, it is told to stop (SIGTERM), or to hand over; all
applications of a node are killed in the middle of whatever they do, and the lease engine is, where that keeps its data.
Kills of daemons, of applications and of engines are counted apart. Then all must agree in silence, and the clients'
histories are judged (`history.py`). Each round is a process of its own, and one line of
OUT.jsonl, with what was wrong. OUT.md, the table, is written after every round: a run may be stopped at any time, and
goes on with the next seed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
sys.path.insert(0, str(TESTS))

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
from harness.nodes import Member, wait_for  # noqa: E402

ROUND_KILLS = 60
ROUND_S = 150.0 * PATIENCE  # then it ends with the faults it has had
ROUND_LIMIT_S = ROUND_S + 300 * PATIENCE  # then it hangs
ENGINES = ("etcd", "etcd", "directory", "s3", "kubernetes")
KEPT = 20  # folders of rounds that failed
DURABLE = ("etcd",)  # engines that can be killed: they have their data on the disk


@dataclass
class Result:
    """Of one round. `problems` empty: all was well."""

    seed: int
    setup: dict[str, Any]
    kills: int = 0
    failovers: int = 0
    terminated: int = 0
    applications: int = 0  # killed, as the engines are
    engines: int = 0
    acknowledged: int = 0
    reads: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


class Round:
    """One cluster and its faults."""

    def __init__(self, folder: Path, seed: int, kills: int = ROUND_KILLS) -> None:
        self.rng = rng = random.Random(f"endurance {seed}")
        self.wanted = kills
        self.sync = rng.choice((0, 1))
        databases = rng.choice((FULL_DB, MIXED_DB)) | rng.choice((NORMAL_DB, DELETE_DB, PERSIST_DB, ROLLBACK_DB))
        self.retention = rng.choice(("10m", "2s"))
        engine = rng.choice(ENGINES)
        self.cluster = HaCluster(folder, engine, sync=self.sync, databases=databases, limit_s=ROUND_LIMIT_S)
        self.result = Result(seed, {"engine": engine, "sync": self.sync, "databases": sorted(databases),
                                    "retention": self.retention})  # fmt: skip
        self.epoch = 0

    def run(self) -> Result:
        """All of it; problems are in the result."""
        start_s = time.monotonic()
        result = self.result
        try:
            with self.cluster as cluster:
                try:
                    cluster.start(3, data={"retention": self.retention, "retention-monitor-interval": "1s"})
                    with cluster.workload(pause_ms=20.0, watched=True):
                        self.epoch = self._epoch()
                        while result.kills < self.wanted and time.monotonic() - start_s < ROUND_S:
                            self._fault()
                            time.sleep(self.rng.choice((0.0, 0.05, 0.2, 0.6)))
                        cluster.revive()
                    seen, _ = cluster.judge()
                    result.acknowledged = sum(write.outcome == "ok" for write in seen.writes)
                    result.reads = len(seen.reads)
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
        kinds = [*(self._kill_replica,) * 5, *(self._kill_all,) * 3, self._kill_primary, self._stop, self._hand_over]
        kinds += [self._kill_applications] * 2
        if self.result.setup["engine"] in DURABLE and self.rng.random() < 0.3:
            kinds += [self._kill_engine]
        self.rng.choice(kinds)()

    def _kill(self, members: list[Member]) -> None:
        for member in members:
            member.kill()
            self.result.kills += 1
        time.sleep(self.rng.choice((0.0, 0.0, 0.3)))

    def _start(self, members: list[Member]) -> None:
        for member in members:
            member.start(wait=False)
        if self.rng.random() < 0.7:  # else it is killed while it starts
            for member in members:
                wait_for(member.serves, f"{member.name} serves", self.cluster.members)

    def _kill_replica(self) -> None:
        replicas = self.cluster.replicas()
        victims = self.rng.sample(replicas, min(len(replicas), self.rng.choice((1, 1, 2))))
        self._kill(victims)
        self._start(victims)

    def _kill_all(self) -> None:
        victims = [member for member in self.cluster.members if member.runs]
        self._kill(victims)
        self._start(victims)

    def _kill_applications(self) -> None:
        """Of one node, in the middle of whatever they do; others take their place."""
        self.result.applications += self.cluster.kill_applications(self.rng.choice(self.cluster.members))

    def _kill_engine(self) -> None:
        """Back before the lease has ended, or after."""
        service = self.cluster.service
        assert service is not None
        service.kill()
        self.result.engines += 1
        time.sleep(self.rng.choice((0.0, 0.3, 1.5, 4.0)))
        service.start()
        self.cluster.wait_primary()
        self._count()

    def _kill_primary(self) -> None:
        old = self.cluster.primary()
        self._kill([old])
        if self.rng.random() < 0.7:
            self.cluster.wait_primary(but=[old])
        self._start([old])
        self._count()

    def _stop(self) -> None:
        old = self.cluster.primary()
        old.terminate()
        assert old.process is not None
        status = old.process.wait(40)
        assert status == 0, f"{old.name}: SIGTERM, status {status}\n{old.log_tail()}"
        self.result.terminated += 1
        self.cluster.wait_primary(but=[old])
        self._start([old])
        self._count()

    def _hand_over(self) -> None:
        old = self.cluster.primary()
        replicas = self.cluster.replicas()
        if not replicas:
            return
        to = self.rng.choice(replicas)
        try:
            to.post("/promote", timeout_s=10.0)
        except OSError:
            return  # it may refuse: not in sync yet
        wait_for(lambda: not old.takes_writes(), f"{old.name} has handed over", self.cluster.members)
        self._count()

    def _epoch(self) -> int:
        return int(self.cluster.primary().cluster()["epoch"])

    def _count(self) -> None:
        """A failover is an epoch of another primary that takes writes; what happened in between is counted once."""
        epoch = self._epoch()
        if epoch > self.epoch:
            self.result.failovers += 1
            self.epoch = epoch


# -- many of them


def many(options: argparse.Namespace) -> int:
    out = Path(options.out)
    lines = out.with_name(out.name + ".jsonl")
    if options.fresh:
        lines.unlink(missing_ok=True)
    found = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    done = {record["seed"] for record in found}
    start_s = time.monotonic()
    seed = options.seed

    def enough() -> bool:
        over = options.minutes and time.monotonic() - start_s > options.minutes * 60
        kills, failovers = (sum(record[key] for record in found) for key in ("kills", "failovers"))
        return over or (kills >= options.kills and failovers >= options.failovers)

    base = Path(tempfile.mkdtemp(prefix="litefs-endurance-", dir=options.scratch))
    base.chmod(0o755)
    with ThreadPoolExecutor(options.jobs) as pool:

        def work() -> None:
            nonlocal seed
            while not enough():
                mine, seed = seed, seed + 1
                if mine in done:
                    continue
                record = one(base, mine)
                found.append(record)
                with open(lines, "a") as file:
                    file.write(json.dumps(record) + "\n")
                out.with_name(out.name + ".md").write_text(table(found))
                total = Counter({key: sum(record[key] for record in found) for key in ("kills", "failovers")})
                print(f"{time.monotonic() - start_s:6.0f} s  seed {mine}: {record['kills']} kills, "
                      f"{record['failovers']} failovers, {record['acknowledged']} commits, {record['seconds']:.0f} s; "
                      f"in all {total['kills']}, {total['failovers']}"
                      + "".join(f"\n    {text[:600]}" for text in record["problems"]), flush=True)  # fmt: skip

        for task in [pool.submit(work) for _ in range(options.jobs)]:
            task.result()
    bad = [record["seed"] for record in found if record["problems"]]
    print(f"{len(found)} rounds, {len(bad)} with problems: {bad}\n{out}.md; folders of those that failed: {base}")
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


def table(found: list[dict[str, Any]]) -> str:
    """For people."""
    numbers = ("kills", "applications", "engines", "failovers", "terminated", "acknowledged", "reads", "seconds")
    total = {key: sum(record[key] for record in found) for key in numbers}
    bad = [record for record in found if record["problems"]]
    lines = [
        "# Kills and failovers by seed", "",
        "`python tests/harness/endurance.py`: clusters of three nodes on real engines, with writers, readers that "
        "hold snapshots and readers that open the databases at every moment; what it does stands in its head.", "",
        "| | |", "| --- | --: |",
        f"| rounds (clusters) | {len(found)} |", f"| daemons killed (kill -9) | {total['kills']:,} |",
        f"| applications killed | {total['applications']:,} |", f"| lease engines killed | {total['engines']:,} |",
        f"| changes of the primary | {total['failovers']:,} |", f"| SIGTERMs of a primary | {total['terminated']:,} |",
        f"| commits acknowledged | {total['acknowledged']:,} |", f"| reads that were judged | {total['reads']:,} |",
        f"| hours of clusters | {total['seconds'] / 3600:.1f} |", f"| rounds with a problem | {len(bad)} |", "",
    ]  # fmt: skip
    if bad:
        lines += ["| seed | cluster | problem |", "| --: | --- | --- |"]
    for record in sorted(bad, key=lambda record: record["seed"]):
        text = record["problems"][0][:400].replace("|", "\\|").replace("\n", "<br>")
        setup = record["setup"]
        what = f"{setup.get('engine')}, sync {setup.get('sync')}, {', '.join(setup.get('databases', []))}"
        lines.append(f"| {record['seed']} | {what} | {text} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=10_000)
    parser.add_argument("--failovers", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=1, help="of the first round")
    parser.add_argument("--jobs", type=int, default=2, help="so many clusters at a time")
    parser.add_argument("--minutes", type=float, default=0, help="end after about so many; 0: when it is enough")
    parser.add_argument("--out", default=str(ROOT / "bench/results/endurance"), help="results, without .jsonl and .md")
    parser.add_argument("--fresh", action="store_true", help="forget an earlier run's results")
    parser.add_argument("--scratch", default=None, help="where the nodes are, TMPDIR otherwise")
    parser.add_argument("--round", type=int, default=None, help="only this seed, here")
    options = parser.parse_args()
    if options.round is None:
        return many(options)
    folder = Path(options.scratch or tempfile.mkdtemp(prefix="litefs-endurance-"))
    result = Round(folder, options.round).run()
    print(json.dumps(asdict(result)))
    sys.stdout.flush()
    os._exit(1 if result.problems else 0)


if __name__ == "__main__":
    sys.exit(main())
