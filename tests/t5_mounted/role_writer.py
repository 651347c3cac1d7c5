"""usage: role_writer.py DATABASE LOG NAME keep|anew [PRAGMA...]

Inserts NAME-1, NAME-2, ... into table t until standard input ends; each one that was acknowledged is a line in LOG.
"""

import contextlib
import select
import sqlite3
import sys
import time

path, log_path, name, how, *pragmas = sys.argv[1:]
db = None
number = 0
with open(log_path, "a", buffering=1) as log:
    while not select.select([sys.stdin], [], [], 0)[0]:
        number += 1
        try:
            if db is None:
                db = sqlite3.connect(f"file:{path}?mode=rw", uri=True, timeout=0.05, isolation_level=None)
                for pragma in pragmas:
                    with contextlib.suppress(sqlite3.Error):  # a rollback mode is served by a WAL while others read
                        db.execute(f"PRAGMA {pragma}").fetchall()
            db.execute("INSERT INTO t (v, filler) VALUES (?, randomblob(300))", (f"{name}-{number}",))
            log.write(f"{name}-{number}\n")
        except sqlite3.Error:
            if how == "anew" and db is not None:
                with contextlib.suppress(sqlite3.Error):
                    db.close()
                db = None
            time.sleep(0.002)
