"""`litefs` with synchronous replication under the static lease: the in-sync set is written to a file.

python gated_daemon.py RULES COMMAND…     RULES: JSON, the fields of SyncRules and "state", the file
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from pylitefs.cli.main import main
from pylitefs.cluster.primary import Replicas
from pylitefs.cluster.sync_gate import Mode, SyncGate, SyncRules


def install(rules: SyncRules, state: str) -> None:
    enter = Replicas.__aenter__

    async def entered(self: Replicas) -> Replicas:
        store: Any = self.store

        def heads() -> dict[str, int]:
            return {name: store.get(name).log.head.txid for name in store.all_names()}

        async def change(nodes: frozenset[int]) -> None:
            with open(f"{state}.new", "w") as file:
                json.dump(sorted(nodes), file)
            os.rename(f"{state}.new", state)

        self.gate = store.gate = SyncGate(rules, heads, change, None)
        self.gate_task = asyncio.create_task(self.gate.run())  # type: ignore[attr-defined]
        return await enter(self)

    Replicas.__aenter__ = entered  # type: ignore[method-assign]


if __name__ == "__main__":
    fields = json.loads(sys.argv.pop(1))
    path = fields.pop("state")
    install(SyncRules(**(fields | {"mode": Mode(fields.get("mode", "wait"))})), path)
    sys.argv[0] = "litefs"
    sys.exit(main())
