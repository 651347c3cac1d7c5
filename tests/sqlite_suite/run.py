"""SQLite's own test suite on a mount with a live replica; the same tests on a plain directory are the oracle.

    run.py [--mode wal] [--jobs 2] [--fresh] [FILE ...]

Every test file runs twice, each time in a process of its own: in a plain directory, and in the mount of a primary. What
differs, test by test, is listed, and so is a replica that does not have, by itself and within a few seconds, the bytes
of every database that remains. A file whose results differ runs once more both times: what only one of the two runs had
is listed as "once". Tests that fail in the plain directory as well (as root many do) are no difference.

The results are written after every file to OUT-MODE.json and, as a table, to OUT-MODE.md: a run that is cut off has a
valid partial result, and the next one goes on where it ended (`--fresh`: from the beginning).
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))

from cluster_nodes import Node  # noqa: E402
from harness.silent import content, is_image, is_sound  # noqa: E402
from sqlite_suite.skips import expected, skipped  # noqa: E402

LIMIT_S = 300.0  # for one file in a plain directory; a mount has three times as long
FIRST = (  # what is about files comes first: it is what a mount can get wrong
    "wal*", "pager*", "jrnl*", "journal*", "backup*", "*vacuum*", "mmap*", "lock*", "exclusive*", "trans*",
    "savepoint*", "attach*", "rollback*", "memdb*", "io.test", "sync*", "shared*", "corrupt*",
    "dbpage*", "snapshot*", "crash*",
    "tempdb*", "delete_db*", "filefmt*", "e_wal*", "e_uri*", "busy*", "incrblob*", "multiplex*", "superlock*",
    "zerodamage*",
)  # fmt: skip
SAME_S = 5.0  # until the replica must have the last commit
LATE_S = 30.0  # until it is said to differ
_OK = re.compile(r"^(\S.*?)\.\.\. Ok$")
_WRONG = re.compile(r"^! (\S.*?) (?:got|expected):")
_GOT = re.compile(r"^! (\S.*?) got: +\[(.*)$")
_BEGUN = re.compile(r"^(\S.*?)\.\.\.$")


@dataclass
class Result:
    """Of one test file in one place. `tests`: by name, what each test of that name gave, in order."""

    tests: dict[str, list[str]] = field(default_factory=dict)
    ended: str = ""  # how, if not by itself
    seconds: float = 0.0

    @property
    def count(self) -> int:
        return sum(map(len, self.tests.values()))

    @property
    def failed(self) -> int:
        return sum(given != "ok" for all_given in self.tests.values() for given in all_given)


def parsed(text: str) -> dict[str, list[str]]:
    """The results in the output of testfixture."""
    tests: dict[str, list[str]] = defaultdict(list)
    begun = ""
    for line in text.splitlines():
        if found := _OK.match(line):
            tests[found[1]].append("ok")
        elif line.startswith("Error: ") and begun:
            tests[begun].append(line[:200])
        elif found := _GOT.match(line):
            tests[found[1]].append("got [" + found[2][:200])
        if found := _BEGUN.match(line):
            begun = found[1]
    return dict(tests)


def differences(native: Result, ours: Result) -> dict[str, tuple[str, str]]:
    """By test: what it gave natively and here. Failures count as the same whatever they gave."""

    def verdicts(given: list[str]) -> list[bool]:
        return [one == "ok" for one in given]

    found = {}
    for name in [*native.tests, *(name for name in ours.tests if name not in native.tests)]:
        one, other = native.tests.get(name, []), ours.tests.get(name, [])
        if verdicts(one) != verdicts(other):
            found[name] = (" | ".join(one)[:300] or "not run", " | ".join(other)[:300] or "not run")
    if native.ended != ours.ended:
        found["(end)"] = (native.ended or "by itself", ours.ended or "by itself")
    return found


class Suite:
    """The built test program."""

    def __init__(self, folder: Path) -> None:
        self.bld = folder / "bld"
        self.tests = next(folder.glob("sqlite3-*")) / "test"
        self.version = (self.tests.parent / "VERSION").read_text().strip()

    def words(self, *words: str) -> list[str]:
        return [str(self.bld / "testfixture"), str(HERE / "modes.tcl"), *words]

    def files(self) -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                self.words("list", f"--testdir={folder}"), env=self._environment(), cwd=self.bld, capture_output=True,
                text=True, check=True,
            )  # fmt: skip
        return done.stdout.split()

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "SUITE": str(self.tests), "LC_ALL": "C.UTF-8"}

    def run(self, mode: str, file: str, directory: Path, limit_s: float, log: Path, node: Node | None = None) -> Result:
        """Run one test file in a directory. A process that cannot be killed is freed by unmounting."""
        start_s = time.monotonic()
        ended = ""
        with open(log, "wb") as output:
            process = subprocess.Popen(
                self.words(mode, file, f"--testdir={directory}"), env=self._environment(), cwd=self.bld, stdout=output,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            try:
                status = process.wait(limit_s)
                ended = f"signal {-status}" if status < 0 else ""
            except subprocess.TimeoutExpired:
                ended = f"not within {limit_s:.0f} s"
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
            try:  # its children too
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                assert node is not None
                ended = "hangs in the kernel"
                node.kill()
                process.wait(20)
        text = log.read_text(errors="replace")
        if not ended and "errors out of" not in text:
            ended = "without its summary"
        if ended.startswith("not within"):
            ended = "not in time"
        return Result(parsed(text), ended, time.monotonic() - start_s)


class Place:
    """A primary and a replica, and a plain directory, for one file at a time."""

    def __init__(self, suite: Suite, mode: str, base: Path, sync: int) -> None:
        self.suite, self.mode, self.base, self.sync = suite, mode, base, sync
        self.plain = base / "plain".ljust(len("pair000/primary/mnt"), "_")  # as long a path: some tests depend on it
        self.started = 0
        self.primary: Node | None = None
        self.replica: Node | None = None

    # -- the nodes

    def nodes(self) -> tuple[Node, Node]:
        """A pair that works, made anew if the last one does not."""
        if self.primary is None or self.replica is None:
            self.started += 1
            folder = self.base / f"pair{self.started:03}"
            self.primary = Node(folder, "primary")
            self.replica = Node(folder, "replica", primary=self.primary)
            if self.sync:
                self.primary.config["replication"] = {"sync": self.sync}
            self.primary.start()
            self.replica.start()
        return self.primary, self.replica

    def stop(self) -> list[str]:
        """What was wrong with how they ended."""
        problems = []
        for node in (self.replica, self.primary):
            if node is None or node.process is None:
                continue
            start_s = time.monotonic()
            if node.process.poll() is not None:
                problems.append(f"{node.name} had ended with status {node.process.returncode}")
            else:
                node.process.terminate()
                try:
                    status = node.process.wait(30)
                    took_s = time.monotonic() - start_s
                    if status or took_s > 5:
                        problems.append(f"{node.name}: SIGTERM, status {status} after {took_s:.1f} s")
                except subprocess.TimeoutExpired:
                    problems.append(f"{node.name} does not end at SIGTERM within 30 s")
            if "Traceback (most recent call last)" in node.log_text():
                problems.append(f"a traceback in {node.log}")
            try:
                node.remove()
            except (OSError, subprocess.SubprocessError) as error:
                problems.append(f"{node.name} cannot be ended: {error}")
        if not problems and self.primary is not None:
            shutil.rmtree(self.primary.base.parent, ignore_errors=True)
        self.primary = self.replica = None
        return problems

    # -- one file

    def run(self, file: str) -> dict[str, Any]:
        """The record of one file."""
        native, ours, replica = self._once(file)
        on_purpose = [text for text in replica if expected(file, text.split(":")[0])]
        replica = [text for text in replica if text not in on_purpose]
        found = differences(native, ours)
        record: dict[str, Any] = {}
        if replica or any(not expected(file, name) for name in found):
            native, ours, replica_again = self._once(file)
            again = differences(native, ours)
            once = {name: given for name, given in {**found, **again}.items() if (name in found) != (name in again)}
            found = {name: given for name, given in again.items() if name in found}
            record["once"] = once
            replica_again = [text for text in replica_again if not expected(file, text.split(":")[0])]
            replica = [*replica, *(text for text in replica_again if text not in replica)]
        wanted = [*found, *(text.split(":")[0] for text in on_purpose)]
        record["expected"] = {name: expected(file, name) for name in wanted if expected(file, name)}
        found = {name: given for name, given in found.items() if name not in record["expected"]}
        record |= {
            "tests": ours.count, "failed": ours.failed, "native": native.count, "native_failed": native.failed,
            "seconds": round(ours.seconds, 1), "native_seconds": round(native.seconds, 1),
            "differences": found, "replica": replica,
        }  # fmt: skip
        return record

    def _once(self, file: str) -> tuple[Result, Result, list[str]]:
        shutil.rmtree(self.plain, ignore_errors=True)
        self.plain.mkdir(parents=True)
        native = self.suite.run(self.mode, file, self.plain, LIMIT_S, self.base / f"{file}.native")
        primary, replica = self.nodes()
        ours = self.suite.run(self.mode, file, primary.mount, 3 * LIMIT_S, self.base / f"{file}.mount", primary)
        try:
            problems = compare(primary, replica) + self._clean(primary, replica)
        except (OSError, AssertionError, sqlite3.Error) as error:
            problems = [f"{type(error).__name__}: {error}"[:400]]
        died = [node for node in (primary, replica) if node.process is None or node.process.poll() is not None]
        if problems or died:
            problems += self.stop()
        return native, ours, problems

    def _clean(self, primary: Node, replica: Node) -> list[str]:
        """An empty mount for the next file, as `rm -rf *` makes one. The replica follows."""
        for path in primary.mount.iterdir():
            if path.name.endswith(("-pos", "-lock")) or path.name.startswith("."):
                continue
            try:
                path.unlink()
            except FileNotFoundError:
                pass  # what belongs to a database goes with it
        end_s = time.monotonic() + LATE_S
        while left := {node.name: names for node in (primary, replica) if (names := remaining(node))}:
            if time.monotonic() > end_s:
                return [f"after `rm *` there is still {left}"]
            time.sleep(0.05)
        return []


def remaining(node: Node) -> list[str]:
    names = [name for name in node.names() if not name.startswith(".")]
    return names if node.is_primary else [name for name in names if f"{name}-pos" in names]


# -- comparing


def compare(primary: Node, replica: Node) -> list[str]:
    """What is wrong with the replica now that nothing runs any more. First nobody is asked anything."""
    names = [path.name for path in sorted((primary.data / "dbs").iterdir()) if is_image(path / "database")]
    scratch = primary.base.parent / "copy"
    start_s = time.monotonic()
    problems: list[str] = []
    for name in names:
        late = False
        while (one := seen(primary, name, scratch)) != (other := seen(replica, name, scratch)):
            waited_s = time.monotonic() - start_s
            late |= waited_s > SAME_S
            if waited_s > LATE_S:
                positions = [node.info()["databases"].get(name) for node in (primary, replica)]
                again = [seen(node, name, scratch) for node in (primary, replica)]
                text = f"{one} on the primary, {other} on the replica; asked, {positions}, then {again}"
                problems.append(f"{name}: {text}")
                break
            time.sleep(0.1)
        else:
            if late and is_sound(scratch / "copy.db"):  # a malformed one may be half a copy: it is waited for
                problems.append(f"(late) {name}: the same only after {time.monotonic() - start_s:.1f} s")
    known = [node.info()["databases"] for node in (primary, replica)]
    for name in names:
        positions = [f"{at['txid']}/{at['checksum']}" if (at := all_.get(name)) else "unknown" for all_ in known]
        if positions[0] != positions[1]:
            problems.append(f"{name}: position {positions[0]} on the primary, {positions[1]} on the replica")
    shown = {path.name for path in primary.mount.iterdir() if is_image(path)}
    for name in sorted(shown - set(names)):
        problems.append(f"{name} is a database in the mount, and not in the data directory")
    return problems


def seen(node: Node, name: str, scratch: Path) -> str:
    try:
        return content(node.data, name, scratch)
    except (OSError, sqlite3.Error) as error:
        return f"{type(error).__name__} {error}"


# -- the run


class Run:
    """All files of one mode; see the head of this file."""

    def __init__(self, options: argparse.Namespace, suite: Suite) -> None:
        self.options, self.suite = options, suite
        self.out = Path(f"{options.out}-{options.mode}")
        self.json = self.out.with_name(self.out.name + ".json")
        self.lock = threading.Lock()
        self.document: dict[str, Any] = {
            "sqlite": suite.version, "mode": options.mode, "commit": commit(), "sync": options.sync, "files": {},
            "skipped": {}, "ends": [],
        }  # fmt: skip
        if self.json.exists() and not options.fresh:
            self.document["files"] = json.loads(self.json.read_text())["files"]
        self.todo: queue.Queue[str] = queue.Queue()
        self.count = 0
        self.start_s = time.monotonic()

    def go(self) -> int:
        names = self.options.files or self.suite.files()
        for name in sorted(names, key=lambda name: not any(fnmatch(name, pattern) for pattern in FIRST)):
            if (reason := skipped(name)) and not self.options.files:
                self.document["skipped"][name] = reason
            elif self.options.files or name not in self.document["files"]:
                self.todo.put(name)
        self.count = self.todo.qsize()
        print(f"SQLite {self.suite.version}, mode {self.options.mode}: {self.count} of {len(names)} files to run")
        base = Path(tempfile.mkdtemp(prefix="litefs-sqlite-", dir=self.options.scratch))
        base.chmod(0o755)
        threads = [
            threading.Thread(target=self._work, args=(base / f"job{number}",)) for number in range(self.options.jobs)
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            with self.lock:
                print("stopping; the files that are running are finished", flush=True)
                while not self.todo.empty():
                    self.todo.get_nowait()
            for thread in threads:
                thread.join()
        self._write()
        bad = [name for name, record in self.document["files"].items() if record["differences"] or record["replica"]]
        print(f"{self.json}\n{len(bad)} files differ: {' '.join(bad)}")
        if not bad and not self.document["ends"]:
            shutil.rmtree(base, ignore_errors=True)
        else:
            print(f"the outputs of the tests are in {base}")
        return 1 if bad or self.document["ends"] else 0

    def _work(self, base: Path) -> None:
        place = Place(self.suite, self.options.mode, base, self.options.sync)
        try:
            while True:
                try:
                    name = self.todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    record = place.run(name)
                except Exception as error:
                    record = {
                        "tests": 0, "failed": 0, "native": 0, "native_failed": 0, "seconds": 0, "native_seconds": 0,
                        "differences": {}, "replica": [f"{type(error).__name__}: {error}"[:1000]],
                    }  # fmt: skip
                    place.stop()
                with self.lock:
                    self.document["files"][name] = record
                    self.document["files"] = dict(sorted(self.document["files"].items()))
                    self._write()
                    self._tell(name, record)
        finally:
            if problems := place.stop():
                with self.lock:
                    self.document["ends"] += problems

    def _tell(self, name: str, record: dict[str, Any]) -> None:
        left = self.todo.qsize()
        differ, once = len(record["differences"]), len(record.get("once", {}))
        more = f"  DIFFER {differ}" if differ else f"  once {once}" if once else ""
        more += "".join(f"\n    {name}: {given[0][:90]}  ->  {given[1][:150]}" for name, given in
                        list(record["differences"].items())[:5])  # fmt: skip
        more += "".join(f"\n    REPLICA {text}" for text in record["replica"])
        print(f"{time.monotonic() - self.start_s:7.0f} s  {self.count - left:4}/{self.count}  {name:28} "
              f"{record['tests']:6} tests {record['seconds']:6.1f} s (native {record['native_seconds']:.1f}){more}",
              flush=True)  # fmt: skip

    def _write(self) -> None:
        for path, text in ((self.json, json.dumps(self.document, indent=1)), (self.out.with_name(self.out.name + ".md"),
                                                                              table(self.document))):  # fmt: skip
            new = path.with_name(path.name + ".new")
            new.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(text)
            new.replace(path)


def commit() -> str:
    words = ["git", "-C", os.environ.get("PYTHONPATH", str(ROOT)).split(":")[0], "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


def table(document: dict[str, Any]) -> str:
    """For people."""
    files = document["files"]
    keys = ("tests", "failed", "native", "native_failed", "seconds", "native_seconds")
    total = {key: sum(record[key] for record in files.values()) for key in keys}
    lines = [
        f"# SQLite {document['sqlite']}'s own tests on a mount with a live replica, mode `{document['mode']}`", "",
        f"`make test-sqlite ARGS=\"--mode {document['mode']}\"`, commit {document['commit']}. {len(files)} files, "
        f"{len(document['skipped'])} skipped (below, each with its reason).", "",
        "| | mount | plain directory |", "| --- | --: | --: |",
        f"| tests | {total['tests']:,} | {total['native']:,} |",
        f"| failed | {total['failed']:,} | {total['native_failed']:,} |",
        f"| seconds | {total['seconds']:,.0f} | {total['native_seconds']:,.0f} |", "",
    ]  # fmt: skip
    different = [
        f"| {file} | {name} | `{_cell(given[0])}` | `{_cell(given[1])}` | {'once' if once else ''} |"
        for file, record in sorted(files.items())
        for once, found in ((False, record["differences"]), (True, record.get("once", {})))
        for name, given in found.items()
    ]
    head = ["| file | test | plain directory | mount | |", "| --- | --- | --- | --- | --- |"]
    lines += ["## Tests with another result", "", *([*head, *different] if different else ["None."]), ""]
    on_purpose = [
        f"| {file} | {name} | {reason} |"
        for file, record in files.items()
        for name, reason in record.get("expected", {}).items()
    ]
    if on_purpose:
        lines += ["## Different on purpose", "", "| file | test | why |", "| --- | --- | --- |", *on_purpose, ""]
    replicas = [f"- {file}: {text}" for file, record in sorted(files.items()) for text in record["replica"]]
    replicas += [f"- at the end: {text}" for text in document["ends"]]
    lines += ["## Replicas that differ, and nodes that misbehave", "", *(replicas or ["None."]), ""]
    reasons = defaultdict(list)
    for name, reason in sorted(document["skipped"].items()):
        reasons[reason].append(name.removesuffix(".test"))
    lines += ["## Skipped", "", "| why | files |", "| --- | --- |"]
    lines += [f"| {reason} | {', '.join(names)} |" for reason, names in sorted(reasons.items())]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text[:100].replace("|", "\\|").replace("`", "'").replace("\n", " ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", help="only these test files, also those that are skipped otherwise")
    parser.add_argument("--mode", default="veryquick", help="a permutation of the suite, or of modes.tcl")
    parser.add_argument("--jobs", type=int, default=2, help="so many pairs of nodes at a time")
    parser.add_argument("--sync", type=int, default=0, help="replication.sync of the primary")
    parser.add_argument("--out", default=str(ROOT / "bench/results/sqlite-suite"), help="results, without -MODE.json")
    parser.add_argument("--scratch", default=None, help="where the nodes and directories are, TMPDIR otherwise")
    parser.add_argument("--fresh", action="store_true", help="forget an earlier run's results")
    parser.add_argument("--build", default=str(ROOT / "build/sqlite"), help="the folder that build.sh has made")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):  # also where a shell has told it to ignore SIGINT
        signal.signal(number, signal.default_int_handler)
    return Run(options, Suite(Path(options.build))).go()


if __name__ == "__main__":
    sys.exit(main())
