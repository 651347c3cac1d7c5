"""A SQLite VFS that tells every write, truncate, sync and delete before it is done, through ctypes.

It wraps SQLite's own unix VFS: the files are real. Connect with `file:PATH?vfs=NAME` and uri=True.
Source: sqlite.org/c3ref/vfs.html, sqlite.org/c3ref/io_methods.html.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
from collections.abc import Callable
from typing import Any, Protocol

SQLITE_IOERR = 10
_PRNG_SEED = 28  # SQLITE_TESTCTRL_PRNG_SEED
_PTR, _INT, _I64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64


class _Vfs(ctypes.Structure):
    _fields_ = (
        ("iVersion", _INT), ("szOsFile", _INT), ("mxPathname", _INT), ("pNext", _PTR), ("zName", ctypes.c_char_p),
        ("pAppData", _PTR), ("xOpen", _PTR), ("xDelete", _PTR), ("rest", _PTR * 14),
    )  # fmt: skip


class _Methods(ctypes.Structure):
    _fields_ = (("iVersion", _INT), ("xClose", _PTR), ("xRead", _PTR), ("xWrite", _PTR), ("xTruncate", _PTR),
                ("xSync", _PTR), ("rest", _PTR * 13))  # fmt: skip


class _File(ctypes.Structure):
    _fields_ = (("methods", ctypes.POINTER(_Methods)),)


_OPEN = ctypes.CFUNCTYPE(_INT, _PTR, _PTR, ctypes.POINTER(_File), _INT, _PTR)
_DELETE = ctypes.CFUNCTYPE(_INT, _PTR, ctypes.c_char_p, _INT)
_WRITE = ctypes.CFUNCTYPE(_INT, _PTR, _PTR, _INT, _I64)
_TRUNCATE = ctypes.CFUNCTYPE(_INT, _PTR, _I64)
_SYNC = ctypes.CFUNCTYPE(_INT, _PTR, _INT)


class Listener(Protocol):
    """Called before each operation of SQLite on a named file; an exception makes SQLite's call fail."""

    def created(self, path: str) -> None: ...

    def write(self, path: str, data: bytes, offset: int) -> None: ...

    def truncate(self, path: str, size: int) -> None: ...

    def sync(self, path: str) -> None: ...

    def delete(self, path: str, sync_folder: bool) -> None: ...


def library() -> ctypes.CDLL | None:
    """The libsqlite3 that Python's sqlite3 uses; None where it cannot be reached (linked statically)."""
    import _sqlite3

    with open("/proc/self/maps") as maps:
        paths = {line.split()[-1] for line in maps if "libsqlite3.so" in line}
    assert _sqlite3 is not None
    return ctypes.CDLL(paths.pop()) if len(paths) == 1 else None


class RecordingVfs:
    """One VFS under a name of its own; `unregister` when its connections are closed. `seed`: of SQLite's randomness."""

    def __init__(self, name: str, listener: Listener, seed: int) -> None:
        found = library()
        assert found is not None
        self._library, self._listener = found, listener
        self._library.sqlite3_vfs_find.restype = ctypes.POINTER(_Vfs)
        self._unix = self._library.sqlite3_vfs_find(b"unix")
        self._library.sqlite3_test_control(_PRNG_SEED, _INT(seed + 1), None)
        self.errors: list[BaseException] = []
        self._paths: dict[int, str] = {}
        self._tables: dict[int, _Methods] = {}
        unix = self._unix.contents
        self._vfs = _Vfs.from_buffer_copy(unix)
        self._name = name.encode()
        self._vfs.zName = self._name
        self._vfs.pNext = None
        self._original_open, self._original_delete = _OPEN(unix.xOpen), _DELETE(unix.xDelete)
        self._open, self._delete = _OPEN(self._x_open), _DELETE(self._x_delete)
        self._write, self._truncate = _WRITE(self._x_write), _TRUNCATE(self._x_truncate)
        self._sync = _SYNC(self._x_sync)
        self._vfs.xOpen = ctypes.cast(self._open, _PTR)
        self._vfs.xDelete = ctypes.cast(self._delete, _PTR)
        assert self._library.sqlite3_vfs_register(ctypes.byref(self._vfs), 0) == 0

    def unregister(self) -> None:
        self._library.sqlite3_vfs_unregister(ctypes.byref(self._vfs))

    def _told(self, tell: Callable[..., None], *args: Any) -> bool:
        try:
            tell(*args)
        except BaseException as error:
            self.errors.append(error)
            return False
        return True

    def _x_open(self, vfs: int, name: int | None, file: Any, flags: int, out: int | None) -> int:
        path = None if not name else os.fsdecode(ctypes.string_at(name))
        new = path is not None and not os.path.exists(path)
        result = int(self._original_open(ctypes.cast(self._unix, _PTR), name, file, flags, out))
        if result or path is None or not file.contents.methods:
            return result
        if new and os.path.exists(path):
            self._told(self._listener.created, path)
        address = ctypes.addressof(file.contents.methods.contents)
        table = self._tables.get(address)
        if table is None:
            table = self._tables[address] = _Methods.from_buffer_copy(file.contents.methods.contents)
            self._originals = (_WRITE(table.xWrite), _TRUNCATE(table.xTruncate), _SYNC(table.xSync))
            table.xWrite = ctypes.cast(self._write, _PTR)
            table.xTruncate = ctypes.cast(self._truncate, _PTR)
            table.xSync = ctypes.cast(self._sync, _PTR)
        file.contents.methods = ctypes.pointer(table)
        self._paths[ctypes.addressof(file.contents)] = path
        return result

    def _x_delete(self, vfs: int, name: bytes, sync_folder: int) -> int:
        path = os.fsdecode(name)
        if os.path.exists(path) and not self._told(self._listener.delete, path, bool(sync_folder)):
            return SQLITE_IOERR
        return int(self._original_delete(ctypes.cast(self._unix, _PTR), name, sync_folder))

    def _x_write(self, file: int, data: int, size: int, offset: int) -> int:
        if not self._told(self._listener.write, self._paths[file], ctypes.string_at(data, size), offset):
            return SQLITE_IOERR
        result = int(self._originals[0](file, data, size, offset))
        written = getattr(self._listener, "written", None)  # which few want to know
        if written is not None and not result and not self._told(written, self._paths[file], offset, size):
            return SQLITE_IOERR
        return result

    def _x_truncate(self, file: int, size: int) -> int:
        if not self._told(self._listener.truncate, self._paths[file], size):
            return SQLITE_IOERR
        return int(self._originals[1](file, size))

    def _x_sync(self, file: int, flags: int) -> int:
        if not self._told(self._listener.sync, self._paths[file]):
            return SQLITE_IOERR
        return int(self._originals[2](file, flags))
