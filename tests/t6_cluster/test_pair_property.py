"""The property that matters: whatever an application does, a replica that has caught up is byte-identical.

Random SQL (`random_sql`) runs on a primary while nodes are stopped and killed; after every step the replica must come
to the primary's position, with the same rows and the same bytes. A failure shows the seed and what was done:

    PYLITEFS_TEST_SEED=7 pytest tests/t6_cluster/test_pair_property.py
"""

from __future__ import annotations

import os
import random
import sqlite3
from typing import Any

import pytest
from random_sql import RandomSql

from cluster_nodes import (
    PASSTHROUGH,
    Cluster,
    assert_same_bytes,
    assert_sound,
    dump,
    needs_root,
    scaled,
    wait_same_position,
)

pytestmark = needs_root
STEPS = 60
_FIRST = int(os.environ.get("PYLITEFS_TEST_SEED", "1"))
SEEDS = range(_FIRST, _FIRST + scaled(2))


class Pair:
    """A primary, a replica with a connection that stays open, and what happens to them."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self.primary, self.replica = cluster.pair()
        self.random = random.Random(-seed)
        self.sql = RandomSql(seed, self.primary)
        self.readers: dict[str, sqlite3.Connection] = {}

    def step(self) -> None:
        fate = self.random.random()
        if fate < 0.03:
            self._restart_replica(killed=False)
        elif fate < 0.06:
            self._restart_replica(killed=True)
        elif fate < 0.08:
            self._restart_primary()
        elif fate < 0.11:
            self._stall_replica()
        else:
            self.sql.step()

    def _restart_replica(self, *, killed: bool) -> None:
        """With work on the primary while the replica is away."""
        self.sql.told.append("replica: killed" if killed else "replica: stopped")
        self._close_readers()
        if killed:
            self.replica.kill()
        else:
            self.replica.stop()
        for _ in range(self.random.randrange(4)):
            self.sql.step()
        self.replica.start()

    def _restart_primary(self) -> None:
        self.sql.told.append("primary: stopped")
        self.sql.close()
        self.primary.stop()
        self.primary.start()

    def _stall_replica(self) -> None:
        self.sql.told.append("replica: stalled")
        self.replica.pause()
        try:
            for _ in range(self.random.randrange(6)):
                self.sql.step()
        finally:
            self.replica.resume()

    def _close_readers(self) -> None:
        for reader in self.readers.values():
            reader.close()
        self.readers.clear()

    def reader(self, name: str) -> sqlite3.Connection:
        """A connection on the replica: mostly the one that was there before, with or without mmap."""
        if name in self.readers and self.random.random() < 0.15:
            self.readers.pop(name).close()
        if name not in self.readers:
            self.readers[name] = self.replica.connect(name)
            self.readers[name].execute(f"pragma mmap_size={self.random.choice([0, 1 << 26])}")
        return self.readers[name]

    def check(self) -> None:
        for application in self.sql.applications.values():
            expected: dict[str, list[Any]] = self.sql.check(application)
            name = application.name
            wait_same_position(self.primary, self.replica, name)
            reader = self.reader(name)
            assert dump(reader) == expected, f"{name}: other rows on the replica"
            assert_sound(reader)
            assert_same_bytes([self.primary, self.replica], name)

    def close(self) -> None:
        self._close_readers()
        self.sql.close()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("passthrough", PASSTHROUGH)
def test_a_replica_is_identical_after_every_step(cluster: Cluster, passthrough: str, seed: int) -> None:
    pair = Pair(cluster, seed)
    try:
        for _ in range(STEPS):
            pair.step()
            pair.check()
    except BaseException:
        print("\n".join(pair.sql.told))
        raise
    finally:
        pair.close()
    pair.replica.stop()
    pair.primary.stop()
