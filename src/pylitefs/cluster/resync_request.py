"""What a replica says of its copy of a database, so that only what differs is sent."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pylitefs.cluster.decisions import History, branch_point
from pylitefs.cluster.ports import PageSums
from pylitefs.cluster.roles import Refused
from pylitefs.formats.stream import Checksums, Resync
from pylitefs.formats.stream_fields import ErrorCode


@dataclass
class ResyncRequest:
    """A RESYNC and the checksums that came with it. No more are kept than this node's database has pages."""

    resync: Resync
    limit: int
    received: int = 0
    kept: list[PageSums] = field(default_factory=list)

    def add(self, message: Checksums) -> None:
        """Refused unless it continues the ones before."""
        sums = message.array
        expected = (self.resync.request, self.received + 1)
        if (message.request, message.first_pgno) != expected or self.received + len(sums) > self.resync.commit:
            raise Refused(ErrorCode.PROTOCOL, "page checksums out of order")
        if self.received < self.limit:
            self.kept.append(sums[: self.limit - self.received])
        self.received += len(sums)

    @property
    def complete(self) -> bool:
        return self.received == self.resync.commit

    def branch(self, entries: History) -> int | None:
        """See `branch_point`. Blocking."""
        return branch_point(self.resync.position, self.resync.history, self.resync.epochs, entries)

    def known(self, page_size: int) -> PageSums | None:
        """The receiver's page checksums; None if its pages are of another size."""
        if self.resync.page_size != page_size or not self.kept:
            return None
        return np.concatenate(self.kept)
