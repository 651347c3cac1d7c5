"""Copy one SQLite database into another with SQLite's own backup: python -m pylitefs.backup_into SOURCE TARGET

A program of its own, because the target lies in a mount: a SQLite connection inside the daemon would lose its locks
whenever the daemon closes another descriptor of the same file (POSIX locks belong to the process).
"""

from __future__ import annotations

import sqlite3
import sys

TIMEOUT_S = 10.0  # for whoever writes to the target

_BUSY, _LOCKED = 5, 6  # SQLITE_BUSY, SQLITE_LOCKED (sqlite3.h)


def main(source_path: str, target_path: str) -> int:
    """0 when done; otherwise 1 and one line on stderr. Open connections see the copy as one transaction."""
    source = sqlite3.connect(f"file:{source_path}?mode=ro&immutable=1", uri=True)
    target = sqlite3.connect(target_path, timeout=TIMEOUT_S)

    def after_step(status: int, _remaining: int, _total: int) -> None:
        if status in (_BUSY, _LOCKED):  # after the timeout; the standard library would try again for ever
            raise sqlite3.OperationalError(f"database is locked: somebody writes to it for {TIMEOUT_S:.0f} s now")

    try:
        source.backup(target, progress=after_step)
    except sqlite3.Error as error:
        sys.stderr.write(f"{error}\n")
        return 1
    finally:
        target.close()
        source.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
