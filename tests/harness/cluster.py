"""A cluster on a real lease engine, with clients, and the judgement of what they saw.

    with HaCluster(folder, engine="etcd", network=True) as cluster:
        cluster.start(3)
        with cluster.workload():
            cluster.primary().kill()
            …
        cluster.judge()

Everything started in it ends with it: nodes, clients, the engine, mounts, disks, the network. If a daemon hangs the
watchdog kills the nodes, by their ids, and what waits for them fails.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from cluster_nodes import PATIENCE, Cluster, wait_until
from engines import services
from engines.services import BUCKET, HERE, Service
from harness import evidence, history, tracebacks
from harness.branches import branch_epochs, lost_values
from harness.forks import Forks
from harness.history import History, Outcome
from harness.network import Network
from harness.nodes import Member, wait_for
from harness.silent import content
from pylitefs.engine.files import sync_filesystem

CLIENT = Path(__file__).with_name("client.py")
ENGINES = ("etcd", "consul", "directory", "s3", "kubernetes")
TTL_S = dict.fromkeys(ENGINES, 3.0) | {"consul": 10.0}
ENGINE_HOST = "engine"
OBSERVE_S = 0.1
LIMIT_S = 110.0
SETTLE_S = 60.0 * PATIENCE
_TRIES = 3


# What the clients write. Name: journal mode, `synchronous`.
FULL_DB = {"full.db": ("wal", "full")}
NORMAL_DB = {"normal.db": ("wal", "normal")}
DELETE_DB = {"delete.db": ("delete", "full")}
PERSIST_DB = {"persist.db": ("persist", "full")}
TRUNCATE_DB = {"truncate.db": ("truncate", "full")}
ROLLBACK_DB = {"rollback.db": ("delete", "normal")}  # counts as FULL, in whatever mode it is shown
MIXED_DB = {"mixed.db": ("wal", "mixed")}  # writers with FULL beside writers with NORMAL
ALL_DBS = FULL_DB | NORMAL_DB | DELETE_DB
SILENT_S = 20.0 * PATIENCE  # by when all nodes must have the last commit, with nobody asking


class HaCluster(Cluster):
    """A context. `network`: every node, and the engine, is a host of its own. `forgetful`: databases of which a fault
    may have lost commits for good. `forked`: nodes start without the time that Python takes to load."""

    def __init__(
        self,
        base: Path,
        engine: str = "etcd",
        *,
        network: bool = False,
        sync: int = 0,
        mode: str = "wait",
        lease: dict[str, Any] | None = None,
        databases: dict[str, tuple[str, str]] | None = None,
        limit_s: float = LIMIT_S,
        ttl_s: float | None = None,
        forked: bool = False,
    ) -> None:
        super().__init__(base)
        self._watchdog = threading.Timer(limit_s, self._hung)
        self._watchdog.daemon = True
        self.engine = engine
        self.ttl_s = TTL_S[engine] if ttl_s is None else ttl_s
        self.sync = sync
        self.mode = mode
        self.databases = FULL_DB if databases is None else databases
        self.members: list[Member] = []
        self.service: Service | None = None
        self.network: Network | None = None
        self._wants_network, self._wants_forks = network, forked
        self._forks: Forks | None = None
        self._more_lease = lease or {}
        self._stack = ExitStack()
        self.clients = Clients(base / "history")
        self.forgetful: set[str] = set()
        self._hushed = 0  # rounds of `hush`
        self._pause_ms, self._halts, self._watched = 10.0, False, False

    # -- what there is

    def __enter__(self) -> HaCluster:
        super().__enter__()
        try:
            if self._wants_network:
                self.network = self._stack.enter_context(Network())
            if self._wants_forks:
                self._forks = self._stack.enter_context(Forks())
            self._start_engine()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with contextlib.suppress(Exception):
                self.heal()
            self.clients.kill()
            super().__exit__(kind, error, trace)
        finally:
            self._stack.close()

    def _hung(self) -> None:
        self.clients.kill()
        super()._hung()

    def _start_engine(self) -> None:
        folder = self.base / ENGINE_HOST
        if self.engine == "directory":
            folder.mkdir(parents=True)
            return
        place = self.network.host(ENGINE_HOST) if self.network is not None else HERE
        make: Any = getattr(services, self.engine)
        self.service = self._stack.enter_context(make(folder, place=place))

    def _lease(self) -> dict[str, Any]:
        """The section of litefs.yml."""
        ttl = f"{self.ttl_s:g}s"
        if self.engine == "directory":
            return {"type": "object-store", "object-store": {"url": (self.base / ENGINE_HOST).as_uri(), "ttl": ttl}}
        assert self.service is not None
        url = self.service.url
        if self.engine == "etcd":
            return {"type": "etcd", "etcd": {"urls": [url], "prefix": "/litefs/test/", "ttl": ttl}}
        if self.engine == "consul":
            return {"type": "consul", "consul": {"url": url, "key": "litefs/test", "ttl": ttl, "lock-delay": "1s"}}
        if self.engine == "kubernetes":
            given = {"name": "test", "namespace": "apps", "url": url, "token-file": str(self.service.folder / "tokens")}
            return {"type": "kubernetes", "kubernetes": {**given, "ttl": ttl}}
        store = {"url": f"s3://{BUCKET}/test", "endpoint": url, "region": "us-east-1", "ttl": ttl}
        return {"type": "object-store", "object-store": {**store, "access-key": "test", "secret-key": "test"}}

    def member(self, name: str, *, lease: dict[str, Any] | None = None, **options: Any) -> Member:
        """A node that is not started yet."""
        place = self.network.host(name) if self.network is not None else HERE
        replication = {"sync": self.sync, "mode": self.mode, "timeout": "10s"} if self.sync else None
        member = Member(
            self.base, name, {**self._lease(), **self._more_lease, **(lease or {})}, place=place,
            replication=replication, forks=self._forks, **options,
        )  # fmt: skip
        self.members.append(member)
        self.nodes.append(member)
        return member

    def start(self, count: int = 3, **options: Any) -> list[Member]:
        """Nodes n1 … that agree on a primary, have the databases, and follow it."""
        for number in range(1, count + 1):
            self.member(f"n{number}", **options)
        return self.begin()

    def begin(self) -> list[Member]:
        """As `start`, with the members that were made."""
        members = self.members
        for member in members:
            member.start(wait=False)
        for member in members:
            wait_for(member.serves, f"{member.name} serves", members)
        self.wait_primary()
        for name, (journal, _) in self.databases.items():
            self.create(name, journal)
        self.wait_settled()
        for member in members:
            # Else a disk whose power is cut has the tables not at all, or some: the state after one of the first
            # commits. From here on a reader that does not find them has found a fault.
            sync_filesystem(str(member.data))
        return members

    def create(self, name: str, journal: str) -> None:
        """A database with the table of the clients. As an application does it: where the primary loses its lease
        meanwhile (the machine may be loaded), on the next one once more."""
        until_s = time.monotonic() + SETTLE_S
        while True:
            try:
                self._create(self.primary(), name, journal)
                return
            except sqlite3.OperationalError:
                if time.monotonic() > until_s:
                    raise

    def _create(self, member: Member, name: str, journal: str) -> None:
        from harness.client import SCHEMA, TABLE

        with contextlib.closing(member.connect(name)) as connection:
            mode = connection.execute(f"pragma journal_mode={journal}").fetchone()[0]
            assert mode == journal, f"{name}: journal mode {mode} instead of {journal}"
            if not connection.execute("select 1 from sqlite_master where name = ?", (TABLE,)).fetchall():
                connection.executescript(f"begin immediate; {SCHEMA} commit;")
            # What an attempt that failed has left may be seen, and be taken back. Not after a commit on top of it.
            connection.execute("pragma synchronous = full")
            connection.execute("pragma user_version = 1")

    # -- who is who

    def primary(self) -> Member:
        """The one that takes writes now; waits for one."""
        while True:
            self.wait_primary()
            for member in self.members:
                if member.runs and not member.stopped and member.takes_writes():
                    return member

    def replicas(self) -> list[Member]:
        primary = self.primary()
        return [member for member in self.members if member is not primary and member.runs and not member.stopped]

    def wait_primary(self, but: Iterable[Member] = (), timeout_s: float = SETTLE_S) -> float:
        """Until a node that is not one of `but` takes writes; how long that took."""
        among = [member for member in self.members if member not in list(but)]

        def found() -> bool:
            return any(member.runs and not member.stopped and member.takes_writes() for member in among)

        return wait_for(found, f"one of {[member.name for member in among]} takes writes", self.members, timeout_s)

    def wait_no_primary(self, timeout_s: float = SETTLE_S) -> float:
        def found() -> bool:
            return not any(member.runs and not member.stopped and member.takes_writes() for member in self.members)

        return wait_for(found, "nobody takes writes", self.members, timeout_s)

    def running(self) -> list[Member]:
        return [member for member in self.members if member.runs]

    # -- faults

    def heal(self) -> None:
        """Everything works again: network, engine, disks, stopped processes. Nodes that are dead stay dead."""
        if self.network is not None:
            self.network.heal()
        if self.service is not None:
            self.service.resume()
        for member in self.members:
            member.empty()
            member.skew(0)
            if member.stopped and member.runs:
                member.resume()

    def cut_engine(self) -> None:
        """Nobody reaches the engine any more."""
        if self.network is not None:
            self.network.isolate(ENGINE_HOST)
        else:
            assert self.service is not None
            self.service.pause()

    def lose_power(self, members: Iterable[Member]) -> None:
        """All that runs there is dead, and what was not synced is lost. `plug_in` starts it again."""
        for member in members:
            member.lose_power()
            self.clients.end_on(member)
            member.dark_s.append((member.cut_s[-1], time.monotonic()))
        for name, (journal, synchronous) in self.databases.items():
            returns = journal == "delete" and not self.sync  # the journal may come back, as natively
            if returns or (synchronous != "full" and journal == "wal"):
                self.forgetful.add(name)

    def plug_in(self, members: Iterable[Member]) -> None:
        for member in members:
            member.plug_in()
            member.after_cut += evidence.logs_on_disk(member.data)
            member.start(wait=False)
            self._work_on(member)

    def revive(self) -> None:
        """Start what is dead."""
        for member in self.members:
            if not member.runs:
                member.start(wait=False)
        for member in self.members:
            wait_for(member.serves, f"{member.name} serves", self.members)

    # -- clients

    @contextlib.contextmanager
    def workload(self, pause_ms: float = 10.0, halts: bool = False, watched: bool = False) -> Iterator[Clients]:
        """On every node a writer and a reader of each database, with `halts` on one of them also a writer that takes
        the HALT lock. With `watched` on every node readers, too, that open a database at every moment, and that hold
        their read transactions; and half of the writers take a database in the journal mode in which they find it. They
        are stopped on exit, after healing."""
        self._pause_ms, self._halts, self._watched = pause_ms, halts, watched
        for member in self.members:
            self._work_on(member)
        self.clients.observe(self.members)
        try:
            yield self.clients
            self.heal()
        finally:
            self.clients.stop()

    def _work_on(self, member: Member) -> None:
        number = self.members.index(member)
        for name, (journal, synchronous) in self.databases.items():
            chosen = "stay" if self._watched and number % 2 else journal
            for one in ("full", "normal") if synchronous == "mixed" else (synchronous,):
                self.clients.start("write", member, name, one, self._pause_ms, journal=chosen)
            self.clients.start("read", member, name, "rw" if number % 2 else "ro", 100.0)
            if self._halts and number == 1 and synchronous == "full":
                self.clients.start("halt", member, name, synchronous, 500.0, 500.0)

        if self._watched:
            for number, name in enumerate(self.databases, self.members.index(member)):
                # Each in turn: so many processes are too many for the machines that run the tests.
                kind, pause_ms = (("open", 20.0), ("keep", 50.0))[number % 2]
                self.clients.start(kind, member, name, "rw", pause_ms, journal=self.databases[name][0])

    def kill_applications(self, member: Member) -> int:
        """Those on one node (kill -9); others take their place. How many there were."""
        count = self.clients.end_on(member)
        self._work_on(member)
        return count

    # -- the end

    def wait_silent(self, limit_s: float = SILENT_S) -> float:
        """Until all that run have the same content in their data directories, without a word to them; how long it
        took. AssertionError, with what they have when they are asked."""
        start_s = time.monotonic()
        while different := self._different():
            if time.monotonic() - start_s > limit_s:
                asked = {member.name: member.positions() for member in self.running()}
                again = "all is the same then" if not self._different() else "and it is still different then"
                raise AssertionError(f"SILENT not the same {limit_s:.0f} s after the last commit, with nobody asking: "
                                     f"{different}; asked, they are at {asked}, {again}")  # fmt: skip
            time.sleep(0.1)
        return time.monotonic() - start_s

    def _different(self) -> dict[str, dict[str, str]]:
        found = {}
        for name in self.databases:
            there = {}
            for member in self.running():
                try:
                    there[member.name] = content(member.data, name, self.base / "copy")
                except (OSError, sqlite3.Error) as error:  # a checkpoint at this moment
                    there[member.name] = f"{type(error).__name__} {error}"
            if len(set(there.values())) > 1:
                found[name] = there
        return found

    def hush(self, rounds: int, rng: random.Random) -> list[float]:
        """So many times: a commit or a few on the primary, and silence until all nodes have it. How long each took."""
        took_s = []
        for _ in range(rounds):
            self._hushed += 1
            number = self._hushed
            name = rng.choice(sorted(self.databases))
            synchronous, count = rng.choice(("full", "normal")), rng.choice((1, 1, 1, 2, 20))
            checkpoints, closes = rng.random() < 0.2, rng.random() < 0.5
            for tries in itertools.count():
                connection = self.primary().connect(name)
                try:
                    connection.execute(f"pragma synchronous={synchronous}")
                    for one in range(count):
                        self.clients.append(connection, f"hush.{number}.{tries}.{one}.", name)
                    if checkpoints:
                        connection.execute("pragma wal_checkpoint(passive)").fetchall()
                    break
                except sqlite3.OperationalError:  # a lease may end at load: as an application does it, once more
                    connection.close()
                    if tries == _TRIES:
                        raise
            if closes:
                connection.close()
            took_s.append(self.wait_silent())
            if not closes:
                connection.close()
        return took_s

    def wait_settled(self, timeout_s: float = SETTLE_S) -> float:
        """Until one node takes writes and all that run are where it is."""

        def settled() -> bool:
            leaders = [member for member in self.running() if member.takes_writes()]
            if len(leaders) != 1:
                raise OSError(f"{[member.name for member in leaders]} take writes")
            wanted = leaders[0].positions()
            for member in self.running():
                if (seen := member.positions()) != wanted:
                    raise OSError(f"{member.name} is at {seen}, {leaders[0].name} at {wanted}")
            return bool(wanted) or not self.databases

        return wait_for(settled, "one primary, and all nodes where it is", self.members, timeout_s)

    def outcome(self) -> Outcome:
        primary = self.primary()
        copies = {member.name: {name: member.copy(name) for name in self.databases} for member in self.running()}
        fenced = frozenset(
            name for name, database in self.databases.items() if database != ("wal", "normal")
        )
        mixed = frozenset(name for name, (_, synchronous) in self.databases.items() if synchronous == "mixed")
        lost, epochs = {}, {}
        data = [member.data for member in self.members]
        for name in self.databases:
            values = self.clients.values(name)
            kept, epochs[name] = lost_values(data, name, values), branch_epochs(data, name, values)
            lost[name] = frozenset(values) if name in self.forgetful else kept
        durable = fenced if self.sync else frozenset()
        awaited = fenced if self.clients.under_halt else frozenset()
        return Outcome(primary.name, copies, lost, durable, fenced, awaited, mixed, epochs)

    def judge(self) -> tuple[History, Outcome]:
        """Heal, start what is dead, wait until all agree; then the checker must find nothing."""
        dead = [f"ENDED {member.name} by itself" for member in self.members if not member.runs and not member.ended]
        self.heal()
        self.revive()
        self.wait_primary()
        silent = []
        try:
            self.wait_silent()
        except AssertionError as error:
            silent.append(str(error))
        self.wait_settled()
        if self.databases and not silent:
            try:
                self.hush(1, random.Random(self._hushed))
            except AssertionError as error:
                silent.append(str(error))
        outcome = self.outcome()
        seen = self.clients.history()
        seen.downs = {member.name: member.killed_s for member in self.members}
        seen.cuts = {member.name: member.cut_s for member in self.members}
        seen.darks = {member.name: member.dark_s for member in self.members}
        problems = [*silent, *history.check(seen, outcome), *dead, *self.complaints()]
        first, *others = problems or [""]
        told = [f"{len(problems)} problems, the first: {first}", *others, f"histories in {self.clients.folder}"]
        told += evidence.of_lost(problems, self.members)
        assert not problems, "\n".join(told)
        return seen, outcome

    def complaints(self) -> list[str]:
        """What no node should have said."""
        return [
            f"TRACEBACK in the log of {member.name}: {tracebacks.in_a_line(text)}\n{text}"
            for member in self.members
            for text in tracebacks.found(member.log_text())[:3]
        ]


class Clients:
    """The processes of a workload, and what they have written down."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.under_halt = False  # some write from replicas
        self._processes: list[subprocess.Popen[bytes]] = []
        self._started = 0
        self._watching: list[threading.Thread] = []
        self._over = threading.Event()
        self._read: dict[Path, int] = {}
        self._acknowledged: Counter[Path] = Counter()

    def start(
        self, kind: str, member: Member, db: str, synchronous: str, pause_ms: float, refused_ms: float = 30.0,
        journal: str = "wal",
    ) -> None:  # fmt: skip
        self.folder.mkdir(parents=True, exist_ok=True)
        out = self.folder / f"{kind}-{member.name}-{db}-{self._started}"
        self._started += 1
        self.under_halt |= kind == "halt"
        words = [sys.executable, "-I", "-S", str(CLIENT), kind, str(member.mount), member.name, db, synchronous]
        words += [str(pause_ms), str(out), str(refused_ms), journal]
        self._processes.append(subprocess.Popen(words, stdin=subprocess.PIPE))

    def append(self, connection: sqlite3.Connection, value: str, db: str) -> None:
        """A commit of our own, that counts like the clients'."""
        with open(self.folder / f"own-{db}", "a") as file:
            named = {"node": "own", "db": db, "value": value}
            file.write(json.dumps({"op": "invoke", "t": time.monotonic(), **named}) + "\n")
            connection.execute("insert into log(value) values (?)", (value,))
            file.write(json.dumps({"op": "ok", "t": time.monotonic(), "value": value}) + "\n")

    def end_on(self, member: Member) -> int:
        """Kill those of one node; how many there were."""
        there = [process for process in self._processes if str(member.mount) in process.args]  # type: ignore[operator]
        for process in there:
            process.kill()
        for process in there:
            process.wait(10)
            self._processes.remove(process)
        return len(there)

    def observe(self, members: list[Member]) -> None:
        """Write down, again and again, what each node says of its role."""
        self._over.clear()
        for member in members:
            thread = threading.Thread(target=self._observe, args=(member,), daemon=True)
            thread.start()
            self._watching.append(thread)

    def _observe(self, member: Member) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f"roles-{member.name}", "a", buffering=1) as file:
            while not self._over.wait(OBSERVE_S):
                start_s = time.monotonic()
                role = member.role()
                if role is not None:
                    record = {"op": "role", "t0": start_s, "t": time.monotonic(), "node": member.name}
                    file.write(json.dumps({**record, "primary": role[0], "epoch": role[1]}) + "\n")

    def stop(self) -> None:
        """They end when they have finished what they are at."""
        self._over.set()
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
        hung = []
        end_s = time.monotonic() + 20
        for process in self._processes:
            try:
                process.wait(max(0.1, end_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                hung.append(" ".join(process.args[3:]))  # type: ignore[index]
        self.kill()
        assert not hung, f"these clients hang in the kernel, though everything was healed: {hung}"

    def kill(self) -> None:
        self._over.set()
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
        self._processes.clear()
        for thread in self._watching:
            thread.join(5)
        self._watching.clear()

    def history(self) -> History:
        return history.parse(path.read_text() for path in sorted(self.folder.glob("*-*")))

    def values(self, db: str) -> set[str]:
        return {write.value for write in self.history().writes if write.db == db}

    def acknowledged(self, kind: str = "", node: str = "") -> int:
        """How many commits so far, of all clients, or of those of a kind and a node. Reads what is new since."""
        for path in self.folder.glob("*-*"):
            with open(path, "rb") as file:
                file.seek(self._read.get(path, 0))
                new = file.read()
            whole = new.rfind(b"\n") + 1
            self._read[path] = self._read.get(path, 0) + whole
            self._acknowledged[path] += new[:whole].count(b'{"op": "ok"')
        wanted = f"{kind}-{node}-*" if kind else "*"
        return sum(count for path, count in self._acknowledged.items() if path.match(wanted))


def wait_more(clients: Clients, count: int, timeout_s: float = SETTLE_S) -> None:
    """Until so many more commits are acknowledged."""
    wanted = clients.acknowledged() + count
    wait_until(lambda: clients.acknowledged() >= wanted, f"{count} more commits", timeout_s)


def gaps(seen: History, db: str) -> list[tuple[float, float]]:
    """(start, length) of the pauses between acknowledged commits, the longest first."""
    ends = sorted(write.end_s for write in seen.acknowledged(db) if write.end_s is not None)
    pauses = [(one, other - one) for one, other in itertools.pairwise(ends)]
    return sorted(pauses, key=lambda pause: -pause[1])
