"""The static lease: the configuration names the one primary.

`lease.candidate: true` makes a node the primary; there must be only one such node, and nothing checks that (LiteFS's
rule). Any other node follows `lease.advertise-url`.
"""

from __future__ import annotations

from pylitefs.cluster.roles import Grant, PrimaryInfo
from pylitefs.config import LeaseConfig

EPOCH = 1


class StaticLease:
    """A `cluster.roles.Lease` that never expires and cannot be handed over."""

    def __init__(self, config: LeaseConfig) -> None:
        if not config.is_static:
            raise ValueError(f'a static lease for lease.type "{config.type}"')  # would make every candidate a primary
        self._config = config

    async def acquire(self) -> Grant | PrimaryInfo:
        if self._config.candidate:
            return Grant(EPOCH)
        return PrimaryInfo(self._config.hostname, self._config.advertise_url)

    async def release(self) -> None:
        pass
