"""Measure the mount against native SQLite on the same disk: `make bench`, or `python bench/run.py --help`.

Prints one table and, after a run of everything, writes bench/results/DATE.json and DATE.md. Needs /dev/fuse; with
passthrough also root and Linux 6.9 or later. The machine should have nothing else to do.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from metrics import GROUPS, Metric, Settings, failures_as_metric
from nodes import HERE
from report import cells, headline, machine, save, table


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/run.py", description="Measure the mount against native SQLite.")
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="about a minute, rough figures, 200 idle databases")
    extent.add_argument("--full", action="store_true", help="longer rounds, and the 10 GB database")
    parser.add_argument("--only", action="append", choices=list(GROUPS), metavar="NAME", help=", ".join(GROUPS))
    parser.add_argument("--passthrough", choices=("auto", "off"), default="auto", help="as fuse.passthrough")
    parser.add_argument("--rounds", type=int, help="rounds of native and ours")
    parser.add_argument("--seconds", type=float, help="length of one workload in one round")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="where databases are made (/var/tmp)")
    parser.add_argument("--no-save", action="store_true", help="write nothing to bench/results")
    return parser.parse_args()


def settings_of(options: argparse.Namespace, parent: Path) -> Settings:
    quick, full = options.quick, options.full
    return Settings(
        parent=parent,
        passthrough=options.passthrough,
        rounds=options.rounds or (3 if quick else 7 if full else 5),
        slice_s=options.seconds or (0.25 if quick else 2.0 if full else 0.8),
        latency_s=3.0 if quick else 30.0 if full else 10.0,
        apply_s=2.0 if quick else 10.0 if full else 5.0,
        large_rounds=1 if quick else 5 if full else 3,
        idle_s=3.0 if quick else 20.0 if full else 8.0,
        many=200 if quick else 1000,
        full=full,
    )


def interrupt(_signum: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    options = parse()
    signal.signal(signal.SIGTERM, interrupt)
    mode = "quick" if options.quick else "full" if options.full else "default"
    facts = machine(options.dir) | {"passthrough": options.passthrough, "mode": mode}
    print(headline(facts), flush=True)
    metrics: list[Metric] = []
    begun_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="litefs-bench-", dir=options.dir, ignore_cleanup_errors=True) as parent:
        settings = settings_of(options, Path(parent))
        for name in options.only or GROUPS:
            print(f"{time.monotonic() - begun_s:4.0f} s  {name}", file=sys.stderr, flush=True)
            with failures_as_metric(name, metrics):
                for metric in GROUPS[name](settings):
                    metrics.append(metric)
                    print("        " + "  ".join(cell for cell in cells(metric) if cell), file=sys.stderr, flush=True)
    print(table(metrics))
    missed = [metric.name for metric in metrics if metric.passed is False]
    summary = "every target is reached" if not missed else f"{len(missed)} targets are missed: {', '.join(missed)}"
    print(f"\n{time.monotonic() - begun_s:.0f} s; {summary}")
    if not options.only and not options.no_save:
        print(f"written to {save(HERE / 'results', facts, metrics)}")
    return 1 if any(metric.note.startswith("FAILED") for metric in metrics) else 0  # a missed target is no error


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
