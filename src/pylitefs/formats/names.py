"""Names of databases: which there can be, and how they are written. The only place that decides it.

A database's name is a file name: 1 to 255 bytes, not NUL and not "/". Inside the program, and in JSON, it is text by
PEP 383: UTF-8, and every byte that is not UTF-8 as one of U+DC80..U+DCFF ("caf\\xe9.db" is "caf\\udce9.db" in JSON).
So every name can be written, and is itself when it is read back. Where people read it, and in metrics and the log,
`shown` is what stands for it. In a URL it is percent-encoded by its bytes (%E9).

Names that a database cannot have, because SQLite or we need them for something else:

    "." ".." ".primary" ".lag"      there is something else under these names
    NAME-journal NAME-wal NAME-shm  SQLite takes them for files of the database NAME
    more than 247 bytes             there is no room for "-journal": a replica needs NAME-wal and NAME-shm
"""

from __future__ import annotations

MAX_FILE_NAME = 255  # bytes
MAX_NAME = MAX_FILE_NAME - len("-journal")
_SIDE_FILES = ("-journal", "-wal", "-shm")
_TAKEN = (".", "..", ".primary", ".lag")


def to_bytes(name: str) -> bytes:
    """The file name. Raises ValueError for text that stands for none."""
    return name.encode("utf-8", "surrogateescape")


def from_bytes(raw: bytes) -> str:
    """The counterpart of `to_bytes`."""
    return raw.decode("utf-8", "surrogateescape")


def problem_of(name: str) -> str | None:
    """Why no database can have this name; None if it can."""
    try:
        raw = to_bytes(name)
    except ValueError:
        return "it stands for no file name"
    if from_bytes(raw) != name:
        return "it stands for no file name"  # UTF-8 that was written as single bytes
    if b"/" in raw:
        return "it has a / in it, and databases lie in the mounted directory itself, not in folders"
    if not raw or name in _TAKEN or b"\0" in raw:
        return "it is no file name that a database can have"
    for suffix in _SIDE_FILES:
        if name.endswith(suffix):
            return f'SQLite takes a name that ends with "{suffix}" for a file of another database: rename it'
    if len(raw) > MAX_NAME:
        return f"its name has {len(raw)} bytes, and more than {MAX_NAME} leave no room for -journal: rename it"
    return None


def is_database_name(name: str) -> bool:
    """Whether a database can have this name. Every such database is replicated."""
    return problem_of(name) is None


def shown(name: str) -> str:
    """A name for people: what cannot be printed, and the backslash, as an escape of its bytes. No two names look the
    same."""
    text = name.replace("\\", "\\\\").encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(character if character.isprintable() else _escaped(character) for character in text)


def _escaped(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in character.encode())
