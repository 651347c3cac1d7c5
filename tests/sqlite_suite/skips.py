"""What of SQLite's suite cannot be the same on a mount: files that do not run there, and single tests, with reasons."""

from __future__ import annotations

from fnmatch import fnmatch

_FOLDERS = "needs sub-directories in the place where the databases are: a mount has none"
_IN_PLACE = "database and WAL are written in place and not opened again: the replica waits for a quiet time"
_BIG = "5 GB in one database: comparing the copies takes minutes; run it alone, by its name"
_LINKS = "needs symbolic or hard links: a mount has none"

SKIPS: dict[str, str] = {
    "async3.test": _FOLDERS,
    "multiplex*.test": "cuts one database into several files: none of them is a database that SQLite itself would open",
    "oserror.test": _FOLDERS,
    "quota.test": _FOLDERS,
    "quota2.test": _FOLDERS,
    "shell8.test": _FOLDERS,
    "vtabH.test": _FOLDERS,
    "walro.test": _FOLDERS,
    "zipfile.test": _FOLDERS,
    "walbig.test": _BIG,
    "zipfile2.test": _FOLDERS,
    "symlink.test": _LINKS,
    "symlink2.test": _LINKS,
}

# Single tests of files that run, by "FILE NAME": what is different there on purpose. They are listed apart.
EXPECTED: dict[str, str] = {
    "backup2.test backup2-10": _FOLDERS,
    "delete_db.test delete_db-3.*": _FOLDERS,
    "incrcorrupt.test test.db": "the test cuts the file off, and SQLite calls it malformed: replicas keep the last "
    "whole state, and `litefs status` says so",
    "interrupt2.test sv_test.db *": "a copy of a file and its WAL while a checkpoint was cut off: only with the WAL "
    "SQLite can read it, so it is replicated when it is opened and closed, and `litefs status` says so",
    "lock5.test lock5-dotfile.*": _FOLDERS,
    "pager1.test pager1-33.*": "renames a journal away: EPERM on a mount, as documented",
    "superlock.test (late) test.db2": _IN_PLACE,
    "wal4.test wal4-2-*": "a WAL without a database is removed when the database is made, not when it is first read: "
    "fewer steps, so fewer of them can be made to fail",
}


def expected(file: str, test: str) -> str:
    """Why the test may have another result than natively; empty if it may not."""
    return next((reason for pattern, reason in EXPECTED.items() if fnmatch(f"{file} {test}", pattern)), "")


def skipped(name: str) -> str:
    """The reason, empty if the file runs."""
    return next((reason for pattern, reason in SKIPS.items() if fnmatch(name, pattern)), "")
