"""Open a SQLite database and close it again: python -I -S close_wal.py DATABASE

Whoever closes a database in WAL mode last copies the WAL into it and removes -wal and -shm, under SQLite's own locks
(sqlite3WalClose). A program of its own, because the database lies in our mount, see `backup_into`. It imports nothing
of the package.
"""

import os
import sqlite3
import sys


def main(path: str) -> int:
    quoted = "".join(f"%{byte:02x}" for byte in os.fsencode(path))
    try:
        connection = sqlite3.connect(f"file:{quoted}?mode=rw", uri=True, timeout=0.0)
        try:
            connection.execute("pragma schema_version").fetchone()
        finally:
            connection.close()
    except sqlite3.Error:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
