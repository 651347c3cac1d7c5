"""What rows a lost branch has added, changed and deleted, and what becomes of them in the database as it is now.

Three copies are compared: `base` before the branch, `tip` with it, and `now`. Without a base nobody can tell what the
branch has done from what was done since: then rows that only the tip has are taken for added, and nothing for deleted.

    base       tip          now                      it is
    nothing    row          nothing                  added
    row        another      as in base               changed
    row        nothing      as in base               deleted
    any        any          as in tip                there already
    any        any          anything else            a conflict
    (none)     row          another row              a conflict

Rows are told apart by the primary key, else by the rowid.
"""

from __future__ import annotations

import enum
import os
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pylitefs.errors import DatabaseError

Row = tuple[object, ...]
BUSY_S = 10.0


class Kind(enum.Enum):
    """What a row of the branch is to the database as it is now."""

    ADDED = "added"
    CHANGED = "changed"
    DELETED = "deleted"
    ALREADY = "there already"
    CONFLICT = "conflict"


@dataclass(frozen=True)
class Table:
    """`key` and `columns` are names; the key is `rowid` (or another name of it) where there is no primary key."""

    name: str
    key: tuple[str, ...]
    columns: tuple[str, ...]
    sql: str

    @property
    def has_no_key(self) -> bool:
        return not set(self.key) <= set(self.columns)

    @property
    def selected(self) -> tuple[str, ...]:
        return (*self.key, *(column for column in self.columns if column not in self.key))


@dataclass(frozen=True)
class Change:
    """One row. `tip` and `now` are what the branch and the database hold, by `Table.selected`; None: no such row."""

    table: Table
    kind: Kind
    tip: Row | None
    now: Row | None

    def statement(self) -> tuple[str, Row] | None:
        """SQL and its values that make the database's row the branch's."""
        table, key = self.table, " AND ".join(f"{quoted(name)} IS ?" for name in self.table.key)
        width = len(table.key)
        if self.tip is None:
            return (f"DELETE FROM {quoted(table.name)} WHERE {key}", self.now[:width]) if self.now is not None else None
        if self.now is None:
            first = width if table.has_no_key else 0
            names, marks = ", ".join(map(quoted, table.selected[first:])), ", ".join("?" * len(self.tip[first:]))
            return f"INSERT INTO {quoted(table.name)} ({names}) VALUES ({marks})", self.tip[first:]
        places = [at for at in range(width, len(self.tip)) if not _same((self.tip[at],), (self.now[at],))]
        if not places:
            return None
        names = ", ".join(f"{quoted(table.selected[at])} = ?" for at in places)
        values = (*(self.tip[at] for at in places), *self.tip[:width])
        return f"UPDATE {quoted(table.name)} SET {names} WHERE {key}", values


@dataclass(frozen=True)
class Missing:
    """Something of the schema that the branch has made, and the database has not."""

    name: str
    sql: str


class Comparison:
    """Of the database that `connection` has open as main, with copies in files. Reads in the transaction that the
    connection is in, if any. DatabaseError for what SQLite cannot read."""

    def __init__(self, connection: sqlite3.Connection, tip: str, base: str | None) -> None:
        self._db = connection
        self.has_base = base is not None
        self.skipped: list[str] = []  # why tables were left out
        try:
            connection.execute("ATTACH ? AS tip", (_uri(tip),))
            if base is not None:
                connection.execute("ATTACH ? AS base", (_uri(base),))
        except sqlite3.Error as error:
            raise DatabaseError(f"{tip}: {error}") from None

    def missing(self) -> list[Missing]:
        """Tables, indexes, views and triggers of the branch that are not here, and were made by it."""
        query = "SELECT name, sql FROM {}.sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite^_%' ESCAPE '^'"
        here, before = dict(self._db.execute(query.format("main"))), {}
        if self.has_base:
            before = dict(self._db.execute(query.format("base")))
        order = query.format("tip") + " ORDER BY type != 'table', rowid"
        return [Missing(name, sql) for name, sql in self._db.execute(order) if name not in here and name not in before]

    def changes(self) -> Iterator[Change]:
        """Row by row, table by table."""
        for table in self._tables("tip"):
            if self._fits(table):
                yield from self._of_table(table)

    def _tables(self, schema: str) -> list[Table]:
        virtual = [
            name for (name,) in self._db.execute(
                f"SELECT name FROM {schema}.sqlite_master WHERE type = 'table' AND sql LIKE 'CREATE VIRTUAL%'"
            )
        ]  # fmt: skip
        found = []
        query = f"SELECT name, sql FROM {schema}.sqlite_master WHERE type = 'table' ORDER BY rowid"
        for name, sql in self._db.execute(query).fetchall():
            if name in virtual or any(name.startswith(f"{each}_") for each in virtual):
                if schema == "tip" and name in virtual:
                    self.skipped.append(f"{name}: a virtual table")
            elif not name.startswith("sqlite_"):
                found.append(self._table(schema, name, sql))
        return found

    def _table(self, schema: str, name: str, sql: str) -> Table:
        info = self._db.execute(f"PRAGMA {schema}.table_xinfo({quoted(name)})").fetchall()
        columns = tuple(row[1] for row in info if row[6] == 0)  # without those that are computed
        key = tuple(row[1] for row in sorted(info, key=lambda row: row[5]) if row[5])
        if not key:
            free = [each for each in ("rowid", "_rowid_", "oid") if each not in {column.lower() for column in columns}]
            key = (free[0],) if free else columns
        return Table(name, key, columns, sql)

    def _fits(self, table: Table) -> bool:
        """Whether its rows can be compared; a table that is to be created first counts as empty."""
        for schema in ("main", *(["base"] if self.has_base else [])):
            other = next((each for each in self._tables(schema) if each.name == table.name), None)
            if other is not None and (set(other.columns), other.key) != (set(table.columns), table.key):
                self.skipped.append(f"{table.name}: its columns are others now")
                return False
            if other is None and schema == "main" and table.name not in {each.name for each in self.missing()}:
                self.skipped.append(f"{table.name}: the table was dropped since")
                return False
        return True

    def _of_table(self, table: Table) -> Iterator[Change]:
        keys = ", ".join(map(quoted, table.key))
        exact = ", ".join(f"{quoted(name)} COLLATE BINARY, typeof({quoted(name)})" for name in table.selected)
        source, other = f"tip.{quoted(table.name)}", "base" if self.has_base else "main"
        exists = self._has(other, table.name)
        against = f"{other}.{quoted(table.name)}" if exists else None
        differing = f"SELECT {exact} FROM {source}"
        if against is not None:
            differing += f" EXCEPT SELECT {exact} FROM {against}"
        for pairs in self._db.execute(f"{differing} ORDER BY 1").fetchall():
            row = tuple(pairs[::2])  # with the types between
            yield self._judge(table, row, self._find("base", table, row) if self.has_base else None)
        if self.has_base and against is not None:
            gone = f"SELECT {keys} FROM {against} EXCEPT SELECT {keys} FROM {source} ORDER BY {keys}"
            for row in self._db.execute(gone).fetchall():
                yield self._judge(table, None, self._find("base", table, row), tuple(row))

    def _judge(self, table: Table, tip: Row | None, base: Row | None, key: Row | None = None) -> Change:
        now = self._find("main", table, tip if tip is not None else key or ())
        if _same(now, tip):
            kind = Kind.ALREADY
        elif tip is not None and base is None and self.has_base and table.has_no_key:
            kind, now = Kind.ADDED, None  # its rowid means nothing
        elif not _same(now, base):
            kind = Kind.CONFLICT
        else:
            kind = Kind.DELETED if tip is None else Kind.ADDED if base is None else Kind.CHANGED
        return Change(table, kind, tip, now)

    def _find(self, schema: str, table: Table, row: Sequence[object]) -> Row | None:
        if not self._has(schema, table.name):
            return None
        names = ", ".join(map(quoted, table.selected))
        where = " AND ".join(f"{quoted(name)} IS ?" for name in table.key)
        query = f"SELECT {names} FROM {schema}.{quoted(table.name)} WHERE {where}"
        found = self._db.execute(query, tuple(row[: len(table.key)])).fetchone()
        return tuple(found) if found is not None else None

    def _has(self, schema: str, name: str) -> bool:
        query = f"SELECT 1 FROM {schema}.sqlite_master WHERE type = 'table' AND name = ?"
        return self._db.execute(query, (name,)).fetchone() is not None


def write(connection: sqlite3.Connection, tip: str, base: str | None, *, force: bool) -> dict[str, int]:
    """Do to the database what the branch has done, in one transaction; how many rows of each kind. Conflicts are left
    alone, or with `force` overwritten. DatabaseError, and nothing is changed."""
    comparison = Comparison(connection, tip, base)
    counts = {kind.value: 0 for kind in Kind}
    try:
        connection.execute("BEGIN IMMEDIATE")
        broken = len(connection.execute("PRAGMA main.foreign_key_check").fetchall())
        triggers = connection.execute("SELECT name, sql FROM main.sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:  # what they did then is among the rows
            connection.execute(f"DROP TRIGGER {quoted(name)}")
        missing = comparison.missing()
        changes = list(comparison.changes())
        for item in missing:
            if not item.sql.upper().startswith("CREATE TRIGGER"):
                connection.execute(item.sql)
        for change in sorted(changes, key=lambda change: change.kind is not Kind.DELETED):
            counts[change.kind.value] += 1
            statement = change.statement()
            if statement is not None and (change.kind is not Kind.CONFLICT or force):
                connection.execute(*statement)
        for _, sql in triggers:
            connection.execute(sql)
        for item in missing:
            if item.sql.upper().startswith("CREATE TRIGGER"):
                connection.execute(item.sql)
        if len(connection.execute("PRAGMA main.foreign_key_check").fetchall()) > broken:
            raise DatabaseError("rows would refer to rows that are not there (foreign keys): nothing was changed")
        connection.execute("COMMIT")
    except sqlite3.Error as error:
        readonly = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_READONLY
        hint = ": write on the primary, or here under litefs run -with-halt-lock-on" if readonly else ""
        raise DatabaseError(f"{error}: nothing was changed{hint}") from None
    finally:
        if connection.in_transaction:
            connection.rollback()
    return counts


def connect(path: str, *, writable: bool) -> sqlite3.Connection:
    """DatabaseError if it cannot be opened."""
    try:
        connection = sqlite3.connect(
            _uri(path, "mode=rw" if writable else "mode=ro"), timeout=BUSY_S, isolation_level=None, uri=True
        )
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.Error as error:
        raise DatabaseError(f"{path}: {error}") from None
    return connection


def quoted(name: str) -> str:
    """An SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def literal(value: object) -> str:
    """A value as SQL writes it."""
    match value:
        case None:
            return "NULL"
        case bytes():
            return f"X'{value.hex()}'"
        case str():
            text = value.replace("'", "''")
            return f"'{text}'" if "\0" not in value else f"CAST(X'{value.encode().hex()}' AS TEXT)"
        case float() if value in (float("inf"), float("-inf")):
            return "9e999" if value > 0 else "-9e999"
        case _:
            return repr(value)


def text_of(sql: str, values: Row) -> str:
    """A statement with its values in place. Its marks are the question marks outside of quotes."""
    parts, rest, quote = [], iter(values), False
    for character in sql:
        if character == '"':
            quote = not quote
        parts.append(literal(next(rest)) if character == "?" and not quote else character)
    return "".join(parts) + ";"


def _same(one: Sequence[object] | None, other: Sequence[object] | None) -> bool:
    """Equal in value and type: 1 is not 1.0."""
    if one is None or other is None:
        return one is other
    return len(one) == len(other) and all(type(a) is type(b) and a == b for a, b in zip(one, other, strict=True))


def _uri(path: str, how: str = "mode=ro&immutable=1") -> str:
    name = os.path.abspath(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    return f"file:{name}?{how}"
