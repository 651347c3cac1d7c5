"""Kills and failovers by seed, a few of them: the long run is `python tests/harness/endurance.py`.

PYLITEFS_TEST_SEED is the first seed; PYLITEFS_TEST_SCALE=1000 is 10,000 kills.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster_nodes import SCALE, needs_root
from harness.endurance import ROUND_KILLS, ROUND_LIMIT_S, Round

KILLS = round(10 * SCALE)
FIRST = int(os.environ.get("PYLITEFS_TEST_SEED", 1))
ROUNDS = [min(ROUND_KILLS, KILLS - done) for done in range(0, KILLS, ROUND_KILLS)]
pytestmark = [needs_root, pytest.mark.timeout(round(ROUND_LIMIT_S) + 60)]


@pytest.mark.parametrize("number", range(len(ROUNDS)))
def test_kills_and_failovers(tmp_path: Path, number: int) -> None:
    result = Round(tmp_path, FIRST + number, ROUNDS[number]).run()
    assert not result.problems, "\n".join([f"PYLITEFS_TEST_SEED={FIRST + number}", *result.problems])
    print(f"\n{result}")
