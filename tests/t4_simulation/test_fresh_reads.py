"""`litefs sync` on a node that has more transactions than the primary, because they are a branch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_engine import FakeStore
from pair import Pair

from pylitefs.errors import Unavailable
from pylitefs.formats.ltx.format import Position
from pylitefs.node_control import NodeControl


class Asked:
    """What `Peers` has of the primary, without HTTP between."""

    def __init__(self, store: FakeStore) -> None:
        self._store = store

    async def position(self, _url: str, name: str, _timeout_s: float) -> Position:
        return self._store.databases[name].position


async def test_a_branch_is_not_what_the_primary_has(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    try:
        async with pair.running(epoch=1):
            pair.write("a.db", 2)
            await pair.until_equal()
        old, new = pair.replica, pair.primary
        old.is_primary = True
        for number in range(5):
            old.databases["a.db"].write({1: bytes([number]) * 512})
        old.is_primary = False
        node: Any = SimpleNamespace(store=old, primary_url="http://new", peers=Asked(new), leadership=None)
        pair.unreachable = True
        async with pair.running(epoch=2):
            pair.write("a.db", 1)
            assert new.databases["a.db"].position.txid < old.databases["a.db"].position.txid
            with pytest.raises(Unavailable, match="has not reached"):
                await NodeControl(node).sync("a.db", None, 0.1)
            pair.unreachable = False
            assert await NodeControl(node).sync("a.db", None, 20.0) == new.databases["a.db"].position
            assert pair.equal()
    finally:
        pair.close()
