"""A database that was renamed: replicas drop the old name only when they have the new one's content.

Databases are independent on the wire, and a drop is small: it would arrive long before the content, and if the
primary were lost then, a replica would have the rows under neither name. So the drop, and what follows it in the old
name's log, is held back from a replica until that holds the new name durably. It is not when the new name has gone as
well: then the content is where *that* was moved to, or was removed on purpose.

This is known until the daemon ends. A node that takes over has the drop, so it has the content; a replica that was far
behind gets both from it in any order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pylitefs.cluster.outlet import Outlet
from pylitefs.cluster.ports import Store

if TYPE_CHECKING:
    from pylitefs.cluster.feed import Feed


def is_held(feed: Feed, outlet: Outlet, until: int) -> bool:
    """Whether what leads up to this TXID must wait. The feed is poked when that may have changed."""
    needed = needed_first(outlet.store, feed.name, feed.sent.txid, until)
    return needed is not None and outlet.lacks(*needed, feed)


def needed_first(store: Store, name: str, sent: int, until: int) -> tuple[str, int] | None:
    """What a replica that has the transactions of `name` up to `sent` must hold before it may get those up to `until`:
    (another database, its TXID); None if nothing."""
    database = store.get(name)
    moved = database.moved_to if database is not None else None
    if moved is None or not sent <= moved.after < until:
        return None
    passed = {name}
    while moved is not None and moved.name not in passed:
        target = store.get(moved.name)
        if target is not None and target.commit:
            return moved.name, moved.txid
        passed.add(moved.name)
        gone = target or store.tombstone(moved.name)
        moved = gone.moved_to if gone is not None else None
    return None
