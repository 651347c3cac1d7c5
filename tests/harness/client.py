"""A client of a test cluster, on one node: it appends values to a database there, or reads it again and again.

    client.py write MOUNT NODE DATABASE full|normal PAUSE_MS HISTORY [REFUSED_MS]
    client.py halt  MOUNT NODE DATABASE full|normal PAUSE_MS HISTORY [REFUSED_MS]
    client.py read  MOUNT NODE DATABASE ro|rw       PAUSE_MS HISTORY
    client.py open  MOUNT NODE DATABASE ro|rw       PAUSE_MS HISTORY
    client.py keep  MOUNT NODE DATABASE ro|rw       PAUSE_MS HISTORY

`halt` writes under the HALT lock of the database, wherever it runs, as with LiteFS's libraries: the lock, a connection,
a few commits, and both closed. A reader opens the database as it is told, and stays. `open` opens it anew for each
look, so that there is one at every moment of whatever happens; `keep` holds its read transaction for seconds, and looks
twice. All that read do so in one transaction, with an integrity check now and then.

A `journal` of "stay" is that of a writer that takes the database as it finds it, and does not choose a journal mode.

PAUSE_MS is the pause after each commit or read, REFUSED_MS the one after a node has refused.

Standard library only: it is an application. It goes on through every error until its standard input ends, and writes
down what `history.py` describes. A process of its own: what hangs in the kernel on a stopped daemon is only this.

Reads, and writes with synchronous=NORMAL, go on through the handles of a mount whose daemon has died; so every LOOK_S
it looks whether it still has the mount it thinks it has, as a supervisor would restart a program that has not.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import re
import select
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

TABLE = "log"
PADS = 40
SCHEMA = f"""
    create table {TABLE}(seq integer primary key autoincrement, value text not null unique, payload blob);
    create table total(n integer);
    insert into total values (0);
    create trigger counted after insert on {TABLE} begin update total set n = n + 1; end;
    create table pad(id integer primary key, filler blob);
    with recursive number(i) as (select 1 union all select i + 1 from number limit {PADS})
    insert into pad select i, randomblob(900) from number;
"""
BUSY_S = 0.3
REFUSED_MS = "30"
LOOK_S = 0.5
HALT_BYTE = 72
PAYLOAD = b"\xa5" * 200
UNDER_ONE_LOCK = 5
WIDE = 0.1  # of the transactions: many pages
CHECKED = 0.3  # of the looks: with an integrity check
UNREAD = re.compile(r"unable to get the page\. error code=(\d+)")
KEPT_S = {True: 5.0, False: 0.4}  # the longest read transaction of `keep`, in WAL mode and where it keeps writers out


class Client:
    def __init__(
        self,
        mount: str,
        node: str,
        db: str,
        synchronous: str,
        pause_ms: str,
        history: str,
        refused_ms: str = REFUSED_MS,
        journal: str = "wal",
    ) -> None:
        self.path = Path(mount) / db
        self.node, self.db, self.synchronous, self.journal = node, db, synchronous, journal
        self.reads = synchronous in ("ro", "rw")
        self.pause_s, self.refused_s = float(pause_ms) / 1000, float(refused_ms) / 1000
        self.out = os.open(history, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.notes = Path(history).parent / "notes"
        self.connection: sqlite3.Connection | None = None
        self.name = f"{node}.{os.getpid()}"
        self.device = 0  # of the mount that the connection is on
        self.looked_s = 0.0

    def record(self, op: str, **more: Any) -> None:
        os.write(self.out, json.dumps({"op": op, "t": time.monotonic(), **more}).encode() + b"\n")

    def note(self, text: str) -> None:
        """For people."""
        with open(self.notes, "a") as file:
            file.write(f"{time.monotonic():.3f} {self.node} {text}\n")

    def connect(self) -> sqlite3.Connection:
        """OSError, or an error of SQLite."""
        if self.connection is not None and time.monotonic() - self.looked_s > LOOK_S:
            self.looked_s = time.monotonic()
            if os.stat(self.path.parent).st_dev != self.device:
                self.disconnect()
        if self.connection is None:
            self.device, self.looked_s = os.stat(self.path.parent).st_dev, time.monotonic()
            # Never make one: where nothing is mounted at the moment, it would be in the way of the mount.
            uri = f"{self.path.absolute().as_uri()}?mode={self.synchronous if self.reads else 'rw'}"
            connection = sqlite3.connect(uri, uri=True, timeout=BUSY_S, isolation_level=None, cached_statements=0)
            try:
                if not self.reads:
                    self.choose_journal(connection)
                    connection.execute(f"pragma synchronous={self.synchronous}")
                    connection.execute("pragma wal_autocheckpoint=300")
            except BaseException:
                connection.close()
                raise
            self.connection = connection
        return self.connection

    def choose_journal(self, connection: sqlite3.Connection) -> None:
        """Only WAL is kept in the file: PERSIST and TRUNCATE every connection has to choose. One that may not write,
        or on a node where the database is still in WAL mode because others have it open, is refused."""
        if self.journal not in ("wal", "stay"):
            with contextlib.suppress(sqlite3.OperationalError):
                connection.execute(f"pragma journal_mode={self.journal}").fetchone()

    def disconnect(self) -> None:
        """A handle that was refused once stays read-only, and one of a daemon that is gone stays dead."""
        if self.connection is not None:
            connection, self.connection = self.connection, None
            try:
                connection.close()
            except sqlite3.Error:
                pass

    def goes_on(self, pause_s: float) -> bool:
        """False when the standard input has ended."""
        return not select.select([sys.stdin], [], [], pause_s)[0]


def write(client: Client) -> None:
    number = 0
    pause_s = 0.0
    while client.goes_on(pause_s):
        number += 1
        pause_s = (
            client.pause_s if append(client, f"{client.name}.{client.synchronous}.{number}.") else client.refused_s
        )


def append(client: Client, value: str) -> bool:
    """One transaction; whether it was acknowledged."""
    try:
        connection = client.connect()
        connection.execute("begin immediate")
        connection.execute(f"insert into {TABLE}(value, payload) values (?, ?)", (value, PAYLOAD))
        if random.random() < WIDE:
            connection.execute("update pad set filler = randomblob(900) where id % 3 = ?", (random.randrange(3),))
    except (sqlite3.Error, OSError):
        client.disconnect()
        return False
    client.record("invoke", node=client.node, db=client.db, value=value)
    try:
        connection.execute("commit")
    except sqlite3.Error as error:
        client.record("unknown", value=value, error=str(error))
        client.disconnect()
        return False
    client.record("ok", value=value)
    return True


def halt(client: Client) -> None:
    number = 0
    pause_s = 0.0
    while client.goes_on(pause_s):
        pause_s = client.refused_s
        try:
            lock = os.open(f"{client.path}-lock", os.O_RDWR)
        except OSError as error:
            client.note(f"open: {error}")
            continue
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX, 1, HALT_BYTE)
            for _ in range(UNDER_ONE_LOCK):
                number += 1
                if not append(client, f"{client.name}.halt.{client.synchronous}.{number}."):
                    break
                pause_s = client.pause_s
        except OSError as error:
            client.note(f"lock: {error}")
        client.disconnect()
        try:
            os.close(lock)
        except OSError as error:
            client.note(f"close: {error}")


def look(client: Client, connection: sqlite3.Connection) -> tuple[list[str], list[str]]:
    """In the transaction that is open: all values, and what cannot be."""
    found = [value for (value,) in connection.execute(f"select value from {TABLE} order by seq")]
    wrong = []
    (total,) = connection.execute("select n from total").fetchone()
    if total != len(found):
        wrong.append(f"{len(found)} values, and a total of {total}")
    if random.random() < CHECKED:
        text = "; ".join(text for (text,) in connection.execute("pragma integrity_check(3)"))
        failed = UNREAD.search(text)  # it tells of an I/O error as of damage
        if text != "ok" and not (failed and int(failed[1]) & 0xFF == sqlite3.SQLITE_IOERR):
            wrong.append(text)
    return found, wrong


class Reader:
    """Looks, and writes down what has changed since it looked last."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.before: list[str] = []

    def look(self, kept_s: float = 0.0) -> None:
        """One read transaction; held for so long, and then looked at again."""
        client, start_s = self.client, time.monotonic()
        try:
            connection = client.connect()
            connection.execute("begin")
            found, wrong = look(client, connection)
            self._record(found, wrong, start_s)
            if kept_s:
                client.goes_on(kept_s)
                again, wrong = look(client, connection)
                if again != found:
                    wrong.append(f"the snapshot moved: {len(found)} values, then {len(again)}")
                self._torn(wrong, start_s)
            connection.execute("commit")
        except sqlite3.DatabaseError as error:
            client.disconnect()
            if error.sqlite_errorname.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")) or "no such table" in str(error):
                self._torn([str(error)], start_s)
        except OSError:
            client.disconnect()

    def _record(self, found: list[str], wrong: list[str], start_s: float) -> None:
        client, before = self.client, self.before
        keep = len(before) if found[: len(before)] == before else 0
        while keep < min(len(before), len(found)) and found[keep] == before[keep]:
            keep += 1
        client.record(
            "read", t0=start_s, reader=client.name, node=client.node, db=client.db, keep=keep, new=found[keep:]
        )
        self.before = found
        self._torn(wrong, start_s)

    def _torn(self, wrong: list[str], start_s: float) -> None:
        client = self.client
        for text in wrong:
            client.record("torn", t0=start_s, reader=client.name, node=client.node, db=client.db, text=text[:300])


def read(client: Client) -> None:
    reader = Reader(client)
    while client.goes_on(client.pause_s):
        reader.look()


def open_again(client: Client) -> None:
    reader = Reader(client)
    while client.goes_on(client.pause_s):
        reader.look()
        client.disconnect()


def keep(client: Client) -> None:
    reader = Reader(client)
    while client.goes_on(client.pause_s):
        reader.look(random.random() * KEPT_S[client.journal == "wal"])
        if random.random() < 0.3:
            client.disconnect()


def main() -> None:
    client = Client(*sys.argv[2:])
    {"write": write, "halt": halt, "read": read, "open": open_again, "keep": keep}[sys.argv[1]](client)
    client.disconnect()


if __name__ == "__main__":
    main()
