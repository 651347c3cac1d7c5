"""Where a daemon spends its CPU time while a workload runs: `python bench/profiler.py --help`.

A primary and a replica are started; one of them runs inside this program (`--inside`), which looks at the stacks of all
its threads every few milliseconds (`sys._current_frames`) and charges to each stack the CPU time that its thread has
used since the last look (`pthread_getcpuclockid`): threads that wait cost nothing.

A look needs the interpreter's lock, so what is found is where a thread lets go of it; and a thread that works in bursts
shorter than the interval is found waiting, which is shown as such. `--exact` uses cProfile in every thread instead: it
sees all, for the whole life of the daemon, and makes calls slower.

(Not called profile.py: a module of that name in the program's directory would hide the one that cProfile imports.)
"""

from __future__ import annotations

import argparse
import atexit
import collections
import cProfile
import io
import json
import os
import pstats
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

INTERVAL_S = 0.002
DEPTH = 40
OURS = "pylitefs/"
WAITS = (
    "engine/worker.py:Worker._wait",
    "selectors.py:EpollSelector.select",
    "session.py:Session._serve",
    "opener.py:Opener._run",
    "thread.py:_worker",
)
"""Where threads wait for work. CPU time that is charged to these was used in bursts between two looks."""
Stack = tuple[CodeType, ...]


# --- inside the daemon -----------------------------------------------------------------------------------------------


class Sampler:
    """CPU time by thread name and stack, the root first."""

    def __init__(self, own_name: str = "profiler") -> None:
        self.cpu_ns: dict[tuple[str, Stack], int] = collections.defaultdict(int)
        self._last_ns: dict[int, int] = {}
        self._thread = threading.Thread(target=self._run, name=own_name, daemon=True)
        self._stopped = threading.Event()
        self._begun = False

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(1)

    def mark(self) -> None:
        """The workload starts; when it is called again, it has ended."""
        if self._begun:
            self._stopped.set()
        else:
            self._begun = True
            self.cpu_ns.clear()

    def _run(self) -> None:
        while not self._stopped.wait(INTERVAL_S):
            names = {thread.ident: thread.name for thread in threading.enumerate()}
            for ident, frame in sys._current_frames().items():
                if ident != self._thread.ident and ident in names:
                    self._charge(names[ident], ident, frame)

    def _charge(self, name: str, ident: int, frame: FrameType | None) -> None:
        try:
            now_ns = time.clock_gettime_ns(time.pthread_getcpuclockid(ident))
        except OSError:  # it has just ended
            return
        used_ns = now_ns - self._last_ns.get(ident, now_ns)
        self._last_ns[ident] = now_ns
        if used_ns <= 0:
            return
        codes = []
        while frame is not None and len(codes) < DEPTH:
            codes.append(frame.f_code)
            frame = frame.f_back
        self.cpu_ns[name, tuple(reversed(codes))] += used_ns

    def dump(self) -> list[dict[str, Any]]:
        return [
            {"thread": name, "stack": [label(code) for code in stack], "cpu_ns": used_ns}
            for (name, stack), used_ns in self.cpu_ns.items()
        ]


def label(code: CodeType) -> str:
    """FILE:FUNCTION; ours begin with the package's name, without its parent directories."""
    path = re.sub(
        r"^.*/(pylitefs/|site-packages/|python3\.\d+/)", lambda match: OURS * (match[1] == OURS), code.co_filename
    )
    return f"{path}:{code.co_qualname}"


class Exact:
    """A cProfile in every thread."""

    def __init__(self) -> None:
        self._profiles: list[tuple[str, cProfile.Profile]] = []

    def start(self) -> None:
        self._enable("main")
        run: Callable[[threading.Thread], None] = threading.Thread.run

        def profiled(thread: threading.Thread) -> None:
            self._enable(thread.name)
            run(thread)

        threading.Thread.run = profiled  # type: ignore[method-assign]

    def _enable(self, name: str) -> None:
        profile = cProfile.Profile(time.thread_time)
        self._profiles.append((name, profile))
        profile.enable()

    def stop(self) -> None:
        pass

    def dump(self) -> list[dict[str, Any]]:
        found = []
        for name, profile in self._profiles:
            text = io.StringIO()
            stats = pstats.Stats(profile, stream=text)
            total_s: float = stats.total_tt  # type: ignore[attr-defined]
            if total_s >= 0.01:
                stats.sort_stats("tottime").print_stats(25)
                found.append({"thread": name, "text": text.getvalue()})
        return found


def inside(out: str, exact: bool, words: list[str]) -> int:
    """Run the daemon here; what was found is written at its end. SIGUSR2 begins and ends the time that counts."""
    watcher: Sampler | Exact = Exact() if exact else Sampler()

    def save() -> None:
        Path(out).write_text(json.dumps(watcher.dump()))

    def mark(_signum: int, _frame: FrameType | None) -> None:
        if isinstance(watcher, Sampler):
            watcher.mark()

    signal.signal(signal.SIGUSR2, mark)
    atexit.register(save)
    from pylitefs.cli.main import main

    sys.argv = ["litefs", *words]
    watcher.start()
    try:
        main()
    finally:
        watcher.stop()
    return 0


# --- outside ---------------------------------------------------------------------------------------------------------


def report(found: list[dict[str, Any]], top: int) -> str:
    if found and "text" in found[0]:
        return "\n".join(f"--- {item['thread']}\n{item['text']}" for item in found)
    total_ns = sum(item["cpu_ns"] for item in found) or 1
    threads: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for item in found:
        threads[re.sub(r"[-_]\d+$", "-*", item["thread"])].append(item)
    sums_ns = {thread: sum(item["cpu_ns"] for item in items) for thread, items in threads.items()}
    lines = [f"CPU {total_ns / 1e6:,.0f} ms in all"]
    for thread in sorted(threads, key=lambda thread: -sums_ns[thread]):
        if sums_ns[thread] >= total_ns / 100:
            lines.append(f"\n--- {thread}: {sums_ns[thread] / 1e6:,.0f} ms, {100 * sums_ns[thread] / total_ns:.0f} %")
            lines += _thread_lines(threads[thread], sums_ns[thread], top)
    return "\n".join(lines)


def _thread_lines(items: list[dict[str, Any]], sum_ns: int, top: int) -> list[str]:
    own: collections.Counter[str] = collections.Counter()
    below: collections.Counter[str] = collections.Counter()
    for item in items:
        own[item["stack"][-1]] += item["cpu_ns"]
        below.update(dict.fromkeys(item["stack"], item["cpu_ns"]))
    lines = [f"{'itself':>8} {'with callees':>13}"]
    for name, own_ns in own.most_common(top):
        if own_ns >= sum_ns / 100:
            burst = "  (bursts between two looks)" if name.endswith(WAITS) else ""
            lines.append(f"{100 * own_ns / sum_ns:7.1f}% {100 * below[name] / sum_ns:12.1f}%  {name}{burst}")
    lines.append("  with callees:")
    wide = [(name, used_ns) for name, used_ns in below.most_common() if name.startswith(OURS) and own[name] < used_ns]
    lines += [f"{'':8} {100 * used_ns / sum_ns:12.1f}%  {name}" for name, used_ns in wide[:top]]
    return lines


WORKLOADS: dict[str, tuple[str, dict[str, Any]]] = {
    "insert": ("run", {"workload": "insert"}),
    "full": ("run", {"workload": "insert", "sync": "full"}),
    "mix": ("run", {"workload": "mix"}),
    "writers": ("writers", {}),
    "connects": ("connects", {}),
    "paced": ("stamp", {"per_s": 100}),
    "delete": ("run", {"workload": "insert"}),
}


def outside(options: argparse.Namespace) -> int:
    from nodes import Pair  # not above: inside, the daemon's own imports must come first

    with tempfile.TemporaryDirectory(prefix="litefs-bench-", dir=options.dir, ignore_cleanup_errors=True) as parent:
        pair = Pair(Path(parent), options.passthrough, options.sync)
        out = pair.base / "profile.json"
        program = (__file__, "--inside", str(out), *(["--exact"] if options.exact else []), "--")
        plain = ("-m", "pylitefs")
        node = pair.primary if options.node == "primary" else pair.replica
        try:
            pair.start(program if node is pair.primary else plain, program if node is pair.replica else plain)
            _load(pair, node.pid, options)
            node.stop()
            found = json.loads(out.read_text())
        finally:
            pair.stop()
    print(report(found, options.top))
    if options.folded and "stack" in found[0]:
        lines = [f"{item['thread']};{';'.join(item['stack'])} {item['cpu_ns'] // 1000}" for item in found]
        Path(options.folded).write_text("\n".join(lines) + "\n")
    return 0


def _load(pair: Any, pid: int, options: argparse.Namespace) -> None:
    pair.ours.ask("setup", name="bench.db", journal="delete" if options.workload == "delete" else "wal")
    pair.ours.ask("keep", name="bench.db")
    if options.workload == "large":
        command, named = "large", {"size_bytes": 100_000_000}
    else:
        command, named = WORKLOADS[options.workload]
        named = named | {"seconds": options.seconds}
    pair.catch_up()
    os.kill(pid, signal.SIGUSR2)
    busy = [node.usage.cpu_s for node in (pair.primary, pair.replica)]
    result = pair.ours.ask(command, name="bench.db", **named)
    pair.catch_up()
    os.kill(pid, signal.SIGUSR2)
    used = [node.usage.cpu_s - before for node, before in zip((pair.primary, pair.replica), busy, strict=True)]
    print({key: round(value) if value > 1 else value for key, value in result.items()})
    print(f"CPU: primary {used[0]:.2f} s, replica {used[1]:.2f} s")


def main() -> int:
    if "--inside" in sys.argv[1:3]:
        at = sys.argv.index("--")
        return inside(sys.argv[2], "--exact" in sys.argv[3:at], sys.argv[at + 1 :])
    parser = argparse.ArgumentParser(prog="bench/profiler.py", description="Where a daemon spends its CPU time.")
    parser.add_argument("workload", choices=[*WORKLOADS, "large"])
    parser.add_argument("--node", choices=("primary", "replica"), default="primary")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--exact", action="store_true", help="cProfile instead of samples")
    parser.add_argument("--top", type=int, default=18, help="functions shown per thread")
    parser.add_argument("--folded", metavar="FILE", help="write the stacks for a flame graph")
    parser.add_argument("--sync", type=int, choices=(0, 1), default=0, help="replication.sync of the primary")
    parser.add_argument("--passthrough", choices=("auto", "off"), default="auto")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"))
    return outside(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
