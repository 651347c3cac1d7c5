"""A replica's log on the disk: what is acknowledged as durable when somebody waits for it.

The database follows the log: after a power cut it is some state that it passed through since its WAL was last fsynced,
and a start redoes the rest from the log (see `recovery`). So a transaction is durable when its entry and all entries
since the last fsync of the WAL are; one fsync of a small file, where the WAL would be another, larger one.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from pylitefs.engine.files import sync_folder

if TYPE_CHECKING:
    from pylitefs.engine.database import Database

MAX_ENTRIES = 1024
"""So many entries may have to be redone; with more it is time to fsync the WAL."""


def durable(database: Database) -> int:
    """fsync what was applied, in the log and in the database; returns its TXID. On the worker. Raises OSError."""
    txid = database.position.txid
    entries = [entry for entry in database.log.entries()[-MAX_ENTRIES:] if entry.max_txid > database.durable_txid]
    for entry in entries:
        with contextlib.suppress(FileNotFoundError), open(entry.path, "rb") as file:
            os.fsync(file.fileno())
    if entries:
        sync_folder(database.files.ltx)
    if database.replica is not None:
        database.replica.sync()
    database.durable_txid = txid
    return txid


def log_durable(database: Database) -> int | None:
    """Make the log durable up to the position; its TXID. None if that would not suffice: `durable` does.
    Blocking, any thread. Raises OSError."""
    log = database.log
    with database.lock:
        txid, since = database.position.txid, database.durable_txid
        done = max(since, database.log_durable_txid)
        entries = log.entries()
    if 0 < txid <= done:
        return txid
    first = entries[0].min_txid if entries else txid + 1
    missing = [entry for entry in entries if entry.max_txid > done]
    if not entries or (first > 1 and (not since or first > since + 1)) or entries[-1].max_txid != txid:
        return None  # what the log begins with may not be on the disk yet
    if sum(entry.max_txid > since for entry in entries[-MAX_ENTRIES - 1 :]) > MAX_ENTRIES:
        return None
    try:
        log.sync(missing)
    except FileNotFoundError:
        return None
    with database.lock:
        if database.position.txid < txid or max(database.durable_txid, database.log_durable_txid) < done:
            return None  # it was set back meanwhile
        database.log_durable_txid = max(txid, database.log_durable_txid)
    return txid
