"""Why a switchover does not begin: what its operator is told."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pylitefs.cluster.lease_port import Member
from pylitefs.errors import Unavailable
from pylitefs.events import EventBus
from pylitefs.node_control import NodeControl
from pylitefs.status import ReplicaInfo, ReplicaProgress

TXIDS = 500


class Primary:
    """A node that leads, with one replica. `applied`: that replica's TXID, None where it is not in line."""

    hostname, node_id, is_fit = "n1", 1, True

    def __init__(self, folder: Path, applied: int | None, problem: str = "", silent: bool = False) -> None:
        databases = {"a.db": SimpleNamespace(position=SimpleNamespace(txid=TXIDS))}
        self.store = SimpleNamespace(
            data_dir=str(folder), get=databases.get, all_names=lambda: list(databases), events=EventBus()
        )
        view = SimpleNamespace(leader=None, members=(Member(2, "n2", "http://n2", True),))
        self.leadership = SimpleNamespace(leads=True, problem=problem, view=view)
        self._progress = ReplicaProgress(0, applied or 0, 0, in_line=applied is not None)
        self._silent = silent
        self.asked = 0

    def infos(self) -> list[ReplicaInfo]:
        return [ReplicaInfo(f"{2:016X}", "n2:1", "live", hostname="n2", databases={"a.db": self._progress})]

    def ask_durable(self, node_id: int, heads: dict[str, Any]) -> None:
        """It does not hurry."""

    async def ask(self, member: Member, timeout_s: float) -> None:
        self.asked += 1
        if self._silent:
            raise Unavailable(f"{member.url} did not answer within {timeout_s:g} s")


async def refusal(node: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("pylitefs.node_control.CATCH_UP_S", 0.2)
    with pytest.raises(Unavailable) as refused:
        await NodeControl(node).handoff(2)
    return str(refused.value)


async def test_who_is_far_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    far, strayed = Primary(tmp_path, 100), Primary(tmp_path, None)
    assert await refusal(far, monkeypatch) == "n2 is 400 transactions behind: try again later"
    assert await refusal(strayed, monkeypatch) == "n2 is not in line with this node yet: try again later"


async def test_who_is_near_and_does_not_answer_is_not_said_to_be_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    node = Primary(tmp_path, TXIDS - 14, silent=True)
    with caplog.at_level(logging.INFO, "litefs"):
        why = await refusal(node, monkeypatch)
    assert why == "n2 cannot be asked (http://n2 did not answer within 0.3 s): try again later"
    assert node.asked > 2
    assert len([record for record in caplog.records if "cannot take over" in record.message]) == 1


async def test_without_the_engine_nobody_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With failsafe the primary goes on without the engine, and nobody could take its lease: that is the reason, at
    once, whatever else is wrong."""
    node = Primary(tmp_path, None, problem="the lease cannot be renewed: the engine is gone", silent=True)
    assert await refusal(node, monkeypatch) == "nothing has changed: the lease cannot be renewed: the engine is gone"
    assert not node.asked
