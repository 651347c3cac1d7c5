"""Databases that were renamed: a replica gives up the old name's content only when it has it under another name.

Databases are independent on the wire, and a drop is small: it would arrive long before the new name's content, and if
the primary were lost then, a replica would have the rows under neither name. So what follows a rename in the old name's
log is held back from a replica

    until it holds the content durably   under one of the names that it had since: it may have been renamed again
    unless it gets it by the same step   as it has come back to this name
    unless it is nowhere any more        because it was removed on purpose, or the replica does not copy it

The replica is asked to make durable at once what something waits for (ASK_DURABLE): an exchange of two names is three
steps that wait one for the other.

Where a snapshot would have to wait, the log is sent from the beginning if it is there: log entries wait only for what
was recorded before them, so that somebody can always go on. Where a log entry would have to wait for what has left the
log, what differs is fetched at once. Where neither is possible, databases that have exchanged their names would wait
for each other for ever; then who notices goes on, and the replica is without those rows until the other name has come.

The renames are known until the daemon ends. A node that takes over has the drop, so it has the content; a replica that
was far behind gets both from it in any order.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pylitefs.cluster.decisions import AskChecksums, Decision, SendLog, Snapshot, View
from pylitefs.cluster.outlet import Outlet
from pylitefs.cluster.ports import Log, Store
from pylitefs.formats.stream_fields import ResyncReason
from pylitefs.ports import Moved

if TYPE_CHECKING:
    from pylitefs.cluster.feed import Feed

log = logging.getLogger("litefs.replication")


@dataclass(frozen=True)
class Place:
    """Where the content of a database was, or is: in `name` from TXID `first` to `last`; None: it is there still."""

    name: str
    first: int
    last: int | None

    def has(self, txid: int) -> bool:
        return self.first <= txid and (self.last is None or txid <= self.last)


class MustWait(Exception):
    """The replica has not got the database's content under its new name."""


def in_turn(feed: Feed, outlet: Outlet, decision: Decision, entries: Log, view: View) -> Decision | None:
    """What to do instead of a decision where the database was renamed; None: wait."""
    if not isinstance(decision, SendLog | Snapshot):
        return decision
    until = view.head.txid
    at_once = waits_for(feed, outlet, until)
    entry = entries.after(feed.sent.txid) if view.reaches else None
    by_log = waits_for(feed, outlet, entry.max_txid) if entry is not None else at_once
    if (by_log if isinstance(decision, SendLog) else at_once) is None:
        return decision
    if by_log is None:
        return SendLog()
    if at_once is None:
        return None if by_log and _can_wait(feed, outlet, by_log) else AskChecksums(ResyncReason.DIVERGED)
    if _can_wait(feed, outlet, at_once | by_log):
        return None
    feed.need_not_wait = until
    return decision


def check_turn(feed: Feed, outlet: Outlet, until: int, since: int) -> None:
    """MustWait if a replica whose copy is as of TXID `since` (0: it has none) must not be brought to `until` yet."""
    found = waits_for(feed, outlet, until, since) if since else None
    if found is not None and _can_wait(feed, outlet, found):
        raise MustWait
    if found is not None:
        feed.need_not_wait = until


def _can_wait(feed: Feed, outlet: Outlet, found: frozenset[Place]) -> bool:
    """False, and a line in the log, if nobody could go on then."""
    feed.waits_for = found
    if not _is_in_a_circle(feed, outlet):
        return True
    feed.waits_for = frozenset()
    log.warning("%s: replica %016X cannot wait until it has this by its new name", feed.name, outlet.replica_id)
    return False


def waits_for(feed: Feed, outlet: Outlet, until: int, since: int | None = None) -> frozenset[Place] | None:
    """Where the replica must get what it has of this database, at TXID `since` (by default, what was sent), before it
    may be brought to `until` by one step: in one of these places. None: it need not wait. The feed is poked when the
    replica has more of one of them."""
    if until <= feed.need_not_wait:
        return None
    since = feed.sent.txid if since is None else since
    found = [place for place in places(outlet.store, feed.name, since, until) if outlet.copies(place.name)]
    if not found or any(place.name == feed.name and place.has(until) for place in found):
        return None
    others = [place for place in found if place.name != feed.name]
    lacking = [outlet.lacks(place, feed) for place in others]  # all: it is poked for each of them
    if not all(lacking):
        return None
    return frozenset(place for place in others if _may_come(place, outlet))


def _may_come(place: Place, outlet: Outlet) -> bool:
    """Whether the replica can still get what is, or was, in this place."""
    if place.last is None:
        return True
    sent, database = outlet.feeds[place.name].sent.txid, outlet.store.get(place.name)
    return place.has(sent) or (sent < place.first and database is not None and 0 < database.log.first_txid <= sent + 1)


def places(store: Store, name: str, since: int, until: int) -> list[Place]:
    """Where the content of `name` at TXID `since` has gone when it was renamed before `until`, in order. Empty if it
    was not, or is nowhere any more."""
    _, moved = _state(store, name, since)
    if moved is None or moved.after >= until:
        return []
    found = []
    while True:
        is_there, onward = _state(store, moved.name, moved.txid)
        found.append(Place(moved.name, moved.txid, onward.after if onward is not None else None))
        if onward is None:
            return found if is_there else []
        moved = onward


def _state(store: Store, name: str, since: int) -> tuple[bool, Moved | None]:
    """Whether there is a database of this name, and where it was moved first after `since`."""
    database = store.get(name)
    is_there = bool(database is not None and database.commit)  # first: a rename is noted before the old name's drop
    known = database or store.tombstone(name)
    moves = known.moves if known is not None else ()
    return is_there, next((moved for moved in moves if moved.after >= since), None)


def _is_in_a_circle(feed: Feed, outlet: Outlet) -> bool:
    """Whether all that this feed waits for, directly or not, waits itself: nobody can go on."""
    seen, to_see = {feed}, [feed]
    while to_see:
        for place in to_see.pop().waits_for:
            other = outlet.feeds.get(place.name)
            if other is None or _comes(place, other):
                return False
            if other not in seen:
                seen.add(other)
                to_see.append(other)
    return True


def _comes(place: Place, feed: Feed) -> bool:
    """Whether the replica will have what is in this place though nobody else goes on: it was sent, or is next."""
    return (feed.standing.in_line and place.has(feed.sent.txid)) or not feed.waits_for
