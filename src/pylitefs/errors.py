"""Every error this program raises on purpose, in one tree.

    LitefsError
    ├── UsageError            the user asked for something that cannot be done; exit status 2
    │   └── ConfigError       litefs.yml is wrong
    ├── MountError            the mount point or /dev/fuse cannot be used
    ├── FormatError           bytes that are not what they should be (files and peers alike)
    │   └── TruncatedError    they end too early
    ├── DatabaseError         one database cannot be used; the others go on
    │   ├── DatabaseNotFound
    │   ├── NotADatabase
    │   └── DatabaseBusy      still held by a process of an earlier mount
    │       └── ReadersInTheWay   a replica's readers, for the moment: to be tried again soon
    ├── PositionMismatch      a transaction does not follow the position it was meant for
    ├── ReadOnlyReplica       a write on a node that is not the primary
    ├── ProtocolError         a peer broke the replication protocol
    │   └── ClusterMismatch   it belongs to another cluster
    ├── Ineligible            this node, or the one that was named, may not become the primary as things are
    └── Unavailable           nothing is wrong, but not now (starting, stopping, no primary)
        └── NotPrimary        only the primary answers that; `primary_url` is where it is, if that is known

Each edge translates the tree once: `filesystem.session` into errno, `http.server` into a status,
`cli.main` into an exit status and one line. The message says what happened and what to do.
"""

from __future__ import annotations


class LitefsError(Exception):
    """Base of all errors that are meant for a person: its text is one line."""

    exit_status = 1


class UsageError(LitefsError):
    exit_status = 2


class ConfigError(UsageError):
    pass


class MountError(LitefsError):
    pass


class FormatError(LitefsError, ValueError):
    """Bytes that break their format. The only error a decoder may raise."""


class TruncatedError(FormatError):
    """The bytes end before the structure does."""


class DatabaseError(LitefsError):
    pass


class DatabaseNotFound(DatabaseError):
    def __init__(self, name: str) -> None:
        super().__init__(f'database not found: "{name.encode("utf-8", "backslashreplace").decode()}"')
        self.name = name


class NotADatabase(DatabaseError):
    pass


class DatabaseBusy(DatabaseError):
    pass


class ReadersInTheWay(DatabaseBusy):
    pass


class PositionMismatch(LitefsError):
    pass


class ReadOnlyReplica(LitefsError):
    def __init__(self) -> None:
        super().__init__("this node is a replica: write on the primary")


class ProtocolError(LitefsError):
    pass


class ClusterMismatch(ProtocolError):
    pass


class Ineligible(LitefsError):
    pass


class Unavailable(LitefsError):
    pass


class NotPrimary(Unavailable):
    def __init__(self, message: str = "", primary_url: str = "") -> None:
        super().__init__(message or "this node is not the primary: ask that one")
        self.primary_url = primary_url
