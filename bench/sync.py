"""What a commit that waits for a replica costs: `python bench/sync.py --help`.

A primary and a replica on this machine, `replication.sync: 1`, WAL, synchronous=FULL; native SQLite on the same disk in
turn with them. `fdatasync` is what the disk alone takes for one: a commit needs the primary's and the replica's, so on
one disk, which they share, no replicated commit can be faster than native.

    one      one writer
    ten      ten writers on ten databases
    shared   ten writers on one database: SQLite lets one at a time commit
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nodes import Driver, Pair

LOADS = {"one": ["one.db"], "ten": [f"ten{number}.db" for number in range(10)], "shared": ["shared.db"] * 10}


def fdatasync_ms(folder: Path) -> float:
    """The median of some, each after 4 KB more."""
    took = []
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(50):
            file.write(bytes(4096))
            begun_s = time.perf_counter()
            os.fdatasync(file.fileno())
            took.append((time.perf_counter() - begun_s) * 1000)
    return statistics.median(took)


def percentile(values: list[float], percent: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * percent / 100))]


def measure(pair: Pair, load: str, rounds: int, seconds: float) -> dict[str, Any]:
    names = LOADS[load]
    sides: dict[str, Driver] = {"native": pair.native, "ours": pair.ours}
    for driver in sides.values():
        for name in sorted(set(names)):
            driver.ask("setup", name=name, rows=100)
            driver.ask("keep", name=name)
    took: dict[str, list[float]] = {side: [] for side in sides}
    rates: dict[str, list[float]] = {side: [] for side in sides}
    used_s, count = [0.0, 0.0], 0
    for number in range(rounds):
        for side in list(sides)[:: 1 if number % 2 == 0 else -1]:
            before = [node.usage.cpu_s for node in (pair.primary, pair.replica)]
            result = sides[side].ask("commits", names=names, seconds=seconds)
            took[side] += result["took_ms"]
            rates[side].append(result["ops_per_s"])
            if side == "ours":
                pair.catch_up()
                for at, node in enumerate((pair.primary, pair.replica)):
                    used_s[at] += node.usage.cpu_s - before[at]
                count += result["count"]
    for driver in sides.values():
        driver.ask("release")
    found: dict[str, Any] = {"load": load}
    for side in sides:
        found[side] = {"per_s": statistics.median(rates[side])} | {
            f"p{percent}_ms": percentile(took[side], percent) for percent in (50, 90, 99)
        }
    ratios = [ours / native for ours, native in zip(rates["ours"], rates["native"], strict=True)]
    return found | {
        "ratio": statistics.median(ratios),
        "cpu_us": {"primary": 1e6 * used_s[0] / count, "replica": 1e6 * used_s[1] / count},
    }


def row(found: dict[str, Any]) -> str:
    sides = [
        f"{found[side]['per_s']:7,.0f}/s p50 {found[side]['p50_ms']:6.2f} p99 {found[side]['p99_ms']:7.2f} ms"
        for side in ("native", "ours")
    ]
    cpu = found["cpu_us"]
    return (
        f"{found['load']:>7}  native {sides[0]}   ours {sides[1]}   {found['ratio']:.2f} × native   "
        f"CPU per commit: primary {cpu['primary']:.0f} µs, replica {cpu['replica']:.0f} µs"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/sync.py", description="Measure commits that wait for a replica.")
    parser.add_argument("--load", action="append", choices=list(LOADS), help="default: all")
    parser.add_argument("--rounds", type=int, default=4, help="of native and ours (4)")
    parser.add_argument("--seconds", type=float, default=1.5, help="length of one (1.5)")
    parser.add_argument("--passthrough", choices=("auto", "off"), default="auto", help="as fuse.passthrough")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="where databases are made (/var/tmp)")
    parser.add_argument("-json", "--json", action="store_true", help="print JSON as well")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(prefix="litefs-bench-", dir=options.dir, ignore_cleanup_errors=True) as parent:
        print(f"fdatasync in {options.dir}: {fdatasync_ms(Path(parent)):.2f} ms", flush=True)
        with Pair(Path(parent), options.passthrough, sync=1) as pair:
            for load in options.load or LOADS:
                results.append(measure(pair, load, options.rounds, options.seconds))
                print(row(results[-1]), flush=True)
    if options.json:
        print(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
