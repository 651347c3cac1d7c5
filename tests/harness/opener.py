"""usage: opener.py DATABASE LOG KIND

Opens a database, reads all of table t in one transaction, with an integrity check, and closes it, again and again until
standard input ends. LOG gets a line for each look that found something else than the one before: the number of rows. A
look that found damage, or fewer rows than an earlier one, is a line that begins with BAD. That a database cannot be
opened now, or is locked, is no finding.

KIND: `ro`, `rw`: how it is opened; `stay`: one connection, for reading, that is opened anew only after an error.
"""

from __future__ import annotations

import contextlib
import select
import sqlite3
import sys
import time

_NOT_NOW = ("unable to open", "locked", "disk I/O error", "readonly database", "busy")


def look(db: sqlite3.Connection) -> int:
    db.execute("BEGIN")
    count, total = db.execute("SELECT count(*), coalesce(sum(length(v)), 0) FROM t NOT INDEXED").fetchone()
    (by_index,) = db.execute("SELECT count(*) FROM t INDEXED BY t_v WHERE v > ''").fetchone()
    (check,) = db.execute("PRAGMA integrity_check").fetchone()
    (again,) = db.execute("SELECT count(*) FROM t NOT INDEXED").fetchone()
    db.execute("COMMIT")
    if check != "ok" or by_index != count or again != count:
        raise sqlite3.DatabaseError(f"{count} rows, {by_index} in the index, then {again}, {total} bytes: {check}")
    return int(count)


def main() -> None:
    path, log_path, kind = sys.argv[1:4]
    db, highest, last = None, 0, ""
    with open(log_path, "a", buffering=1) as log:
        while not select.select([sys.stdin], [], [], 0)[0]:
            found = ""
            try:
                if db is None:
                    mode = "ro" if kind == "stay" else kind
                    db = sqlite3.connect(f"file:{path}?mode={mode}", uri=True, timeout=0.2, isolation_level=None)
                count = look(db)
                found = str(count) if count >= highest else f"BAD {count} rows after {highest}"
                highest = max(highest, count)
            except sqlite3.Error as error:
                if not any(text in str(error) for text in _NOT_NOW):
                    found = f"BAD {error}"
            if db is not None and (kind != "stay" or not found or found.startswith("BAD")):
                with contextlib.suppress(sqlite3.Error):
                    db.close()
                db = None
            if found and found != last:
                log.write(found + "\n")
                last = found
            if not found:
                time.sleep(0.001)


main()
