"""How long nobody can write when the primary fails or is switched: `python bench/failover.py --help`.

Three nodes on each lease engine, each with a client that commits (WAL, synchronous=FULL) whenever its node lets it. The
gap is the time between two acknowledged commits: the last one before, and the first one that another node took.

    kill9     the primary's daemon is killed
    sigterm   it is stopped, and hands over
    sigstop   it is stopped with SIGSTOP, and continued when another one leads
    cut       its machine loses the network (as hosts in network namespaces)
    handoff   `litefs handoff`

`takeover` is the time from the fault to that first commit: a primary that is cut off writes on until its lease ends.
The lease lives 3 s, with Consul 10 s, its minimum. Needs root and /dev/fuse; the machine should have nothing else to
do.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from harness.cluster import ENGINES, FULL_DB, TTL_S, HaCluster, wait_more
from harness.nodes import Member

DB = next(iter(FULL_DB))
WARM_UP = 30  # commits before each fault
PAUSE_MS = 2.0
REFUSED_MS = 10.0
LIMIT_S = 1800.0


def kill9(cluster: HaCluster, old: Member) -> None:
    old.kill()


def sigterm(cluster: HaCluster, old: Member) -> None:
    old.terminate()


def sigstop(cluster: HaCluster, old: Member) -> None:
    old.pause()


def cut(cluster: HaCluster, old: Member) -> None:
    assert cluster.network is not None
    cluster.network.isolate(old.name)


def handoff(cluster: HaCluster, old: Member) -> None:
    old.post("/handoff")


FAULTS: dict[str, Callable[[HaCluster, Member], None]] = {
    "kill9": kill9, "sigterm": sigterm, "sigstop": sigstop, "cut": cut, "handoff": handoff,
}  # fmt: skip


@dataclass
class Result:
    """Of one fault on one engine; `problem` says why there are fewer gaps than asked for."""

    engine: str
    fault: str
    ttl_s: float
    gaps_ms: list[float] = field(default_factory=list)
    takeovers_ms: list[float] = field(default_factory=list)
    problem: str = ""

    def row(self) -> list[str]:
        times = [f"{pick(self.gaps_ms):,.0f}" if self.gaps_ms else "-" for pick in (min, statistics.median, max)]
        takeover = f"{statistics.median(self.takeovers_ms):,.0f}" if self.takeovers_ms else "-"
        return [self.engine, self.fault, f"{self.ttl_s:g} s", *times, takeover, str(len(self.gaps_ms)), self.problem]

    def document(self) -> dict[str, object]:
        found: dict[str, object] = {"engine": self.engine, "fault": self.fault, "ttl_s": self.ttl_s}
        if self.gaps_ms:
            found |= {"min_ms": min(self.gaps_ms), "median_ms": statistics.median(self.gaps_ms)}
            found |= {"max_ms": max(self.gaps_ms), "gaps_ms": self.gaps_ms, "takeovers_ms": self.takeovers_ms}
        return found | ({"problem": self.problem} if self.problem else {})


def measure(cluster: HaCluster, fault: str) -> tuple[float, float]:
    """Once: the gap and the takeover in milliseconds. Everything runs again afterwards."""
    clients = cluster.clients
    cluster.revive()
    cluster.wait_settled()
    old = cluster.primary()
    for member in cluster.members:
        clients.start("write", member, DB, "full", PAUSE_MS, REFUSED_MS)
    try:
        wait_more(clients, WARM_UP)
        begun_s = time.monotonic()
        FAULTS[fault](cluster, old)
        others = {member.name for member in cluster.members} - {old.name}

        def first_s() -> float | None:
            """When the first commit of another node was acknowledged."""
            ends = [
                write.end_s
                for write in clients.history().acknowledged(DB)
                if write.node in others and write.end_s is not None and write.end_s > begun_s
            ]
            return min(ends, default=None)

        limit_s = time.monotonic() + 60
        while (first := first_s()) is None:
            if time.monotonic() > limit_s:
                raise AssertionError("nobody took over within 60 s")
            time.sleep(0.05)
        known = [write.end_s for write in clients.history().acknowledged(DB) if write.end_s is not None]
        return (first - max(end_s for end_s in known if end_s < first)) * 1000, (first - begun_s) * 1000
    finally:
        cluster.heal()
        if fault == "sigterm" and old.process is not None:
            with contextlib.suppress(Exception):
                old.process.wait(30)
        clients.stop()


def measure_engine(engine: str, faults: list[str], repeat: int, sync: int, folder: Path) -> Iterator[Result]:
    results = [Result(engine, fault, TTL_S[engine]) for fault in faults]
    try:
        with HaCluster(folder / engine, engine, network="cut" in faults, sync=sync, limit_s=LIMIT_S) as cluster:
            cluster.start()
            for result in results:
                if engine == "directory" and result.fault == "cut":
                    result.problem = "a directory cannot be cut off"
                    continue
                try:
                    for _ in range(repeat):
                        gap_ms, takeover_ms = measure(cluster, result.fault)
                        result.gaps_ms.append(round(gap_ms, 1))
                        result.takeovers_ms.append(round(takeover_ms, 1))
                except (AssertionError, OSError) as error:
                    result.problem = str(error).splitlines()[0]
                    cluster.heal()
    except pytest.skip.Exception as error:
        for result in results:
            result.problem = str(error)
    except (AssertionError, OSError, RuntimeError) as error:
        for result in results:
            result.problem = result.problem or str(error).splitlines()[0]
    yield from results


def table(results: list[Result]) -> str:
    rows = [
        ["engine", "fault", "TTL", "min ms", "median ms", "max ms", "takeover ms", "runs", ""],
        *(one.row() for one in results),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(text.rjust(width) if 1 < at < 8 else text.ljust(width) for at, (text, width) in
                          enumerate(zip(row, widths, strict=True))) + " |"
        for row in rows
    ]  # fmt: skip
    rule = "| " + " | ".join("-" * width for width in widths) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/failover.py", description="Measure failover and switchover.")
    parser.add_argument("--engine", action="append", choices=ENGINES, help="default: all")
    parser.add_argument("--fault", action="append", choices=list(FAULTS), help="default: all")
    parser.add_argument("-k", "--repeat", type=int, default=5, help="times of each (5)")
    parser.add_argument("--sync", type=int, choices=(0, 1, 2), default=0, help="replication.sync of the nodes (0)")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="where nodes have their files (/var/tmp)")
    parser.add_argument("-json", "--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args()


def main() -> int:
    options = parse()
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="litefs-failover-", dir=options.dir, ignore_cleanup_errors=True) as folder:
        for engine in options.engine or ENGINES:
            faults = options.fault or list(FAULTS)
            for result in measure_engine(engine, faults, options.repeat, options.sync, Path(folder)):
                results.append(result)
                print(" ".join(result.row()), file=sys.stderr, flush=True)
    print(json.dumps([result.document() for result in results], indent=1) if options.json else table(results))
    return 0 if all(result.gaps_ms or "cannot be cut" in result.problem for result in results) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
