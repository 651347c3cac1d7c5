"""A random application for the property test: SQL on databases of the primary, and on a twin of each in memory.

The twin gets the same statements and says which rows there must be. Everything follows from the seed, and `told` is the
list of what was done, to be read with a failure.
"""

from __future__ import annotations

import contextlib
import random
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cluster_nodes import Node, dump

ROLLBACK_MODES = ["delete", "truncate", "persist", "memory"]
MODES = [*ROLLBACK_MODES, "off", "wal", "wal", "wal"]
PAGE_SIZES = [512, 1024, 4096, 4096, 8192, 65536]
SYNCHRONOUS = ["off", "normal", "full", "extra"]
CHECKPOINTS = ["passive", "full", "restart", "truncate"]


@dataclass
class Application:
    """One database, the connection that works on it, perhaps a second one, and the twin."""

    name: str
    twin: sqlite3.Connection
    connection: sqlite3.Connection | None = None
    second: sqlite3.Connection | None = None
    mode: str = ""
    tables: list[str] = field(default_factory=list)
    serial: int = 0

    def close(self) -> None:
        for connection in (self.second, self.connection):
            if connection is not None:
                connection.close()
        self.second = self.connection = None


class RandomSql:
    """`step` does one random thing and returns when it is committed; `applications` by database name."""

    def __init__(self, seed: int, primary: Node) -> None:
        self.random = random.Random(seed)
        self.primary = primary
        self.applications: dict[str, Application] = {}
        self.told: list[str] = [f"seed {seed}"]
        self._steps: list[tuple[int, Callable[[Application], None]]] = [
            (30, self._write),
            (12, self._transaction),
            (8, self._rollback),
            (6, self._large),
            (5, self._schema),
            (8, self._switch_mode),
            (8, self._tune),
            (8, self._checkpoint),
            (5, self._vacuum),
            (4, self._attach),
            (4, self._exclusive),
            (4, self._second_writer),
            (5, self._reopen),
        ]

    # -- what is done

    def step(self) -> Application:
        """Do something with one of the databases, which is returned."""
        if len(self.applications) < 2 or (len(self.applications) < 4 and self.random.random() < 0.05):
            return self._create(f"db{len(self.applications)}.sqlite")
        application = self.random.choice(list(self.applications.values()))
        weights = [weight for weight, _ in self._steps]
        (_, work) = self.random.choices(self._steps, weights)[0]
        self.told.append(f"{application.name}: {work.__name__.strip('_')}")
        work(application)
        return application

    def close(self) -> None:
        for application in self.applications.values():
            application.close()

    def check(self, application: Application) -> dict[str, list[Any]]:
        """The rows of the database as its application sees them, which must be the twin's."""
        seen = dump(self._open(application))
        expected = dump(application.twin)
        assert seen == expected, f"{application.name}: the application does not see what it wrote"
        return seen

    def _tell(self, text: str) -> None:
        self.told[-1] += f" {text}"

    def _create(self, name: str) -> Application:
        twin = sqlite3.connect(":memory:", isolation_level=None)
        application = self.applications[name] = Application(name, twin)
        self.told.append(f"{name}: create")
        connection = self._open(application)
        page_size = self.random.choice(PAGE_SIZES)
        self._tell(f"page size {page_size}")
        connection.execute(f"pragma page_size={page_size}")
        if self.random.random() < 0.3:
            connection.execute(f"pragma auto_vacuum={self.random.choice([1, 2])}")
        self._set_mode(application, self.random.choice(MODES))
        self._make_table(application)
        return application

    def _open(self, application: Application) -> sqlite3.Connection:
        if application.connection is None:
            application.connection = self.primary.connect(application.name)
            application.mode = application.connection.execute("pragma journal_mode").fetchone()[0]
        return application.connection

    def _both(self, application: Application, sql: str, values: tuple[Any, ...] = ()) -> None:
        application.twin.execute(sql, values)
        self._open(application).execute(sql, values)

    def _write(self, application: Application) -> None:
        self._change(application)

    def _change(self, application: Application) -> None:
        """One statement that changes rows."""
        table = self.random.choice(application.tables)
        kind = self.random.random()
        if kind < 0.6:
            for _ in range(self.random.choice([1, 1, 1, 5])):
                self._both(application, f"insert into {table}(a, b) values (?, ?)", self._row(application))
        elif kind < 0.8:
            values = (self.random.randbytes(self.random.randrange(900)), self.random.randrange(2, 9))
            self._both(application, f"update {table} set b = ? where id % ? = 1", values)
        else:
            self._both(application, f"delete from {table} where id % ? = 0", (self.random.randrange(2, 6),))

    def _row(self, application: Application) -> tuple[int, bytes]:
        application.serial += 1
        size = self.random.choice([10, 100, 700, 3000, 20000])
        return application.serial, self.random.randbytes(self.random.randrange(size))

    def _transaction(self, application: Application) -> None:
        self._both(application, self.random.choice(["begin", "begin immediate", "begin exclusive"]))
        for _ in range(self.random.randrange(8)):
            self._change(application)
        self._both(application, "commit")

    def _rollback(self, application: Application) -> None:
        """Nothing stays of it; without a journal it cannot be undone, so then it is committed."""
        if application.mode == "off":
            return self._transaction(application)
        self._both(application, "begin immediate")
        self._change(application)
        self._both(application, "savepoint s")
        self._change(application)
        self._both(application, "rollback to s")
        self._both(application, self.random.choice(["rollback", "commit"]))
        return None

    def _large(self, application: Application) -> None:
        """More pages than the cache holds: they are written before the commit."""
        connection = self._open(application)
        connection.execute("pragma cache_size=8")
        self._both(application, "begin")
        for _ in range(self.random.randrange(10, 60)):
            self._change(application)
        undone = application.mode != "off" and self.random.random() < 0.3
        self._tell("rolled back" if undone else "")
        self._both(application, "rollback" if undone else "commit")
        connection.execute("pragma cache_size=-2000")

    def _schema(self, application: Application) -> None:
        if len(application.tables) > 1 and self.random.random() < 0.4:
            self._both(application, f"drop table {application.tables.pop()}")
        else:
            self._make_table(application)

    def _make_table(self, application: Application) -> None:
        application.serial += 1
        table = f"t{application.serial}"
        self._both(application, f"create table {table}(id integer primary key, a, b)")
        if self.random.random() < 0.5:
            self._both(application, f"create index i{application.serial} on {table}(b)")
        application.tables.append(table)

    def _switch_mode(self, application: Application) -> None:
        self._set_mode(application, self.random.choice(MODES))

    def _set_mode(self, application: Application, mode: str) -> None:
        """Also while another connection is open: then WAL mode stays, as SQLite has it."""
        connection = self._open(application)
        self._tell(f"{application.mode} to {mode}")
        with contextlib.suppress(sqlite3.OperationalError):  # database is locked, natively too
            if application.second is not None and "wal" in (mode, application.mode):
                connection.execute("pragma busy_timeout=50")
            connection.execute(f"pragma journal_mode={mode}")
        connection.execute("pragma busy_timeout=10000")
        application.mode = connection.execute("pragma journal_mode").fetchone()[0]
        if application.second is None:
            assert application.mode == mode, f"{application.name}: stays in mode {application.mode}"

    def _tune(self, application: Application) -> None:
        synchronous, limit = self.random.choice(SYNCHRONOUS), self.random.choice([0, 1, 1000])
        connection = self._open(application)
        self._tell(f"synchronous {synchronous}, autocheckpoint {limit}")
        connection.execute(f"pragma synchronous={synchronous}")
        connection.execute(f"pragma wal_autocheckpoint={limit}")
        connection.execute(f"pragma mmap_size={self.random.choice([0, 1 << 26])}")

    def _checkpoint(self, application: Application) -> None:
        kind = self.random.choice(CHECKPOINTS)
        self._tell(kind)
        (busy, _, _) = self._open(application).execute(f"pragma wal_checkpoint({kind})").fetchone()
        assert not busy, f"{application.name}: {kind} checkpoint was busy"

    def _vacuum(self, application: Application) -> None:
        """In rollback modes the page size changes with it."""
        connection = self._open(application)
        page_size = self.random.choice(PAGE_SIZES)
        self._tell(f"page size {page_size}")
        connection.execute(f"pragma page_size={page_size}")
        connection.execute("vacuum")

    def _attach(self, application: Application) -> None:
        """One transaction over two databases; in rollback modes with a super-journal."""
        others = [other for other in self.applications.values() if other is not application and other.tables]
        other = self.random.choice(others)
        connection = self._open(application)
        if "off" in (application.mode, other.mode) or self._is_exclusive(other) or self._is_exclusive(application):
            return  # the second would become exclusive too, and that while its own application uses it
        self._tell(f"with {other.name}")
        connection.execute("attach ? as other", (str(self.primary.mount / other.name),))
        undone = self.random.random() < 0.3
        connection.execute("begin immediate")
        application.twin.execute("begin")
        other.twin.execute("begin")
        self._change(application)
        table, row = self.random.choice(other.tables), self._row(other)
        for target, schema in ((connection, "other."), (other.twin, "")):
            target.execute(f"insert into {schema}{table}(a, b) values (?, ?)", row)
        for target in (connection, application.twin, other.twin):
            target.execute("rollback" if undone else "commit")
        connection.execute("detach other")

    def _exclusive(self, application: Application) -> None:
        if application.second is not None:
            application.second.close()
            application.second = None
        connection = self._open(application)
        mode = "normal" if self._is_exclusive(application) else "exclusive"
        self._tell(mode)
        connection.execute(f"pragma locking_mode={mode}")
        self._change(application)
        connection.execute("select count(*) from sqlite_schema").fetchall()

    def _is_exclusive(self, application: Application) -> bool:
        mode = self._open(application).execute("pragma main.locking_mode").fetchone()[0]
        return bool(mode == "exclusive")

    def _second_writer(self, application: Application) -> None:
        """Another connection writes; it stays open for a while."""
        if self._is_exclusive(application) or application.second is not None:
            if application.second is not None:
                self._tell("closed")
                application.second.close()
                application.second = None
            return
        application.second = self.primary.connect(application.name)
        table, row = self.random.choice(application.tables), self._row(application)
        for target in (application.second, application.twin):
            target.execute(f"insert into {table}(a, b) values (?, ?)", row)

    def _reopen(self, application: Application) -> None:
        application.close()
        self._open(application)
