"""Events in the log of the node: a sentence each for those that a user should know of, with what they say as fields.

    level=WARNING logger=litefs msg="transactions of it are kept in lost/ …" event=lost database=app.db folder=…

INFO and above is for people: what has become of their data, nodes and databases. How litefs came to it (`gap`,
`repair`: it compared a database with its log, which happens whenever it could not see all that was done, and finds
nothing that a user should do) is DEBUG; metrics count it. TXIDs are 16 hex digits, as everywhere where people see them.
"""

from __future__ import annotations

import logging

from pylitefs.events import Event

log = logging.getLogger("litefs")

QUIET = frozenset({"tx", "synced", "init", "primaryChange"})
SAID = frozenset({"notReplicated", "notTakenOver", "overlooked", "forced"})
"""Who emits one of these has logged a sentence."""

_DEBUG, _INFO, _WARNING = logging.DEBUG, logging.INFO, logging.WARNING

SENTENCES: dict[str, tuple[int, str]] = {
    "drop": (_INFO, "dropped on every node: the database was removed, or has another name"),
    "gap": (_DEBUG, "its WAL does not go on from what is in its log: the database is compared with that"),
    "repair": (_DEBUG, "what its log lacked is recorded"),
    "resync": (_INFO, "the pages that were other than the primary's are fetched"),
    "snapshotSent": (_INFO, "a replica got a whole copy, or the pages of its own that differed"),
    "replicaConnected": (_INFO, "replica connected"),
    "replicaLost": (_INFO, "replica disconnected"),
    "recovered": (_INFO, "it was not closed in order, and has been brought in line with its log"),
    "busyAfterCrash": (_WARNING, "not served yet: a process still has it open, from before litefs was killed"),
    "setAside": (_WARNING, "set aside: it can be read, and is not replicated"),
    "withheld": (_WARNING, "replicas keep the state before: what its file holds now cannot be recorded"),
    "withheldEnd": (_INFO, "what its file holds is recorded again"),
    "lost": (_WARNING, "kept in lost/: what the cluster went on without (litefs lost list shows it)"),
    "promoted": (_INFO, "this node is the primary now"),
    "demoted": (_INFO, "this node is not the primary any more"),
    "halt": (_INFO, "another node has its HALT lock, and may write it"),
    "haltEnd": (_INFO, "the HALT lock has ended"),
    "haltHeld": (_INFO, "this node has its HALT lock, and may write it"),
    "haltLost": (_WARNING, "this node has lost its HALT lock"),
    "syncDegraded": (_WARNING, "commits do not wait for replicas any more: too few are in sync"),
    "syncRestored": (_INFO, "commits wait for replicas again"),
    "corruptLog": (_WARNING, "a file of its log is damaged: replicas get the pages that differ instead"),
    "damaged": (_WARNING, "pages are not what was written to them"),
    "healed": (_WARNING, "damaged pages are as they should be again"),
    "scrubbed": (_INFO, "every page of every database was read, to look for damage"),
    "diskFull": (_WARNING, "the disk is full: its transactions wait"),
    "diskFreed": (_INFO, "there is room on the disk again"),
    "logFailing": (_WARNING, "its log cannot be written: replicas wait"),
    "logWorks": (_INFO, "its log can be written again"),
}
"""By the event's type."""


def write(event: Event) -> None:
    """Any thread."""
    if event.type in QUIET or event.type in SAID:
        return
    level, sentence = SENTENCES.get(event.type, (_INFO, event.type))
    if event.type == "recovered" and event.data.get("outcome") == "released":
        sentence = "it is served again"
    if log.isEnabledFor(level):
        fields: dict[str, object] = {"event": event.type}
        if event.database is not None:
            fields["database"] = event.database
        fields |= {key: _shown(key, value) for key, value in event.data.items() if key not in _RESERVED}
        log.log(level, sentence, extra=fields)


def _shown(key: str, value: object) -> object:
    return f"{value:016x}" if key.endswith("txid") and isinstance(value, int) else value


_RESERVED = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "event", "database"}
