"""What the mount shows beside the files themselves: which names there are, and the virtual files."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from pylitefs.engine.store import Store
from pylitefs.ports import SIDE_KINDS, SUFFIXES, FileKind, FileRef

_NEVER_REPLICATED_MS = 2147483647
_DOT_FILES = {".primary": FileKind.PRIMARY, ".lag": FileKind.LAG}


class Shown:
    """The part of `FileHooks` that changes nothing."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def resolve(self, name: str) -> FileRef:
        if name in _DOT_FILES:
            return FileRef(name, _DOT_FILES[name], None, None)
        database = self._store.get(name)
        if database is not None and database.exists:
            return FileRef(name, FileKind.DATABASE, name, database.files.database)
        for suffix, kind in SUFFIXES.items():
            if name.endswith(suffix):
                database = self._store.get(name[: -len(suffix)])
                if database is not None and database.exists:
                    if kind in SIDE_KINDS:
                        return FileRef(name, kind, database.name, database.files.backing(kind))
                    if not os.path.lexists(self._store.plain_path(name)):  # a user's own file comes first
                        return FileRef(name, kind, database.name, None)
        return FileRef(name, FileKind.PLAIN, None, self._store.plain_path(name))

    def names(self) -> list[str]:
        """Plain files are asked for before and after: one that becomes a database meanwhile, or was one, is in neither
        list for who looks once."""
        found = [".lag", *os.listdir(self._store.plain_dir)]
        if self._store.primary_hostname is not None:
            found.append(".primary")
        for name in self._store.names():
            database = self._store.get(name)
            assert database is not None
            found += [name, name + "-pos"]
            for suffix, kind in SUFFIXES.items():
                if kind in SIDE_KINDS and os.path.exists(database.files.backing(kind)):
                    found.append(name + suffix)
        return list(dict.fromkeys(found + os.listdir(self._store.plain_dir)))

    def virtual_size(self, ref: FileRef) -> int | None:
        if ref.kind is FileKind.POSITION:
            return 34
        if ref.kind is FileKind.LAG:
            return 11
        if ref.kind is FileKind.LOCK:
            return 0
        hostname = self._store.primary_hostname
        return None if hostname is None else len(hostname.encode()) + 1

    def virtual_content(self, ref: FileRef, then: Callable[[bytes | BaseException], None]) -> None:
        if ref.kind is FileKind.POSITION:
            database = self._store.get(ref.database or "")
            if database is None:
                then(FileNotFoundError(errno.ENOENT, ref.name))
                return
            self._store.flush(database).add_done_callback(
                lambda done: then(done.exception() or f"{done.result()}\n".encode())
            )
        elif ref.kind is FileKind.LAG:
            then(self._lag())
        elif ref.kind is FileKind.LOCK:
            then(b"")
        elif self._store.primary_hostname is None:
            then(FileNotFoundError(errno.ENOENT, ref.name))
        else:
            then(f"{self._store.primary_hostname}\n".encode())

    def _lag(self) -> bytes:
        """Milliseconds as LiteFS prints them: sign and 9 digits; 0 on the primary, the largest number before the
        first contact (11 bytes, so that its newline is cut)."""
        lag = self._store.lag_ms
        value = 0 if self._store.is_primary else _NEVER_REPLICATED_MS if lag is None else lag
        return f"{value:+010d}\n".encode()[:11]
