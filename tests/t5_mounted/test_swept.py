"""An application drops, renames, closes or checkpoints a database, and another one comes in between any two steps of
the daemon: see `swept_daemon`. PYLITEFS_TEST_SCALE has more of the steps in one run, which begins with another one at
each seed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from role_node import RoleNode, needs_mount
from swept_daemon import SCENARIOS

from cluster_nodes import SCALE

pytestmark = [
    pytest.mark.skipif(not needs_mount(), reason="needs root and /dev/fuse"),
    pytest.mark.timeout(round(150 * max(1.0, SCALE))),
]
SEED = int(os.environ.get("PYLITEFS_TEST_SEED", time.time_ns() % 1_000_000))
STRIDE = max(1, round(250 / SCALE))
PAIRS = round(3 * SCALE)


class SweptNode(RoleNode):
    PROGRAM = Path(__file__).with_name("swept_daemon.py")


@pytest.mark.parametrize("kind", SCENARIOS)
@pytest.mark.parametrize(("mode", "passthrough"), [("WAL", "auto"), ("WAL", "off"), ("DELETE", "auto")])
def test_an_application_between_any_two_steps(tmp_path: Path, kind: str, mode: str, passthrough: str) -> None:
    if "checkpoint" in kind and mode == "DELETE":
        pytest.skip("there is no WAL")
    node = SweptNode(tmp_path, passthrough)
    try:
        node.promote(2)
        steps = node.sweep(kind, mode, PAIRS, SEED, STRIDE)
    except RuntimeError as error:
        raise AssertionError(f"PYLITEFS_TEST_SEED={SEED}: {error}") from None
    finally:
        node.end()
    assert steps > 50
