"""Fixtures of the cluster tier. Nodes are real processes; a test that fails shows the end of their logs."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from cluster_nodes import Cluster

CLUSTER = pytest.StashKey[Cluster]()


@pytest.fixture
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    """A cluster without nodes. The mode of its mounts is the parameter "passthrough" of the test, if it has one."""
    callspec = getattr(request.node, "callspec", None)
    with Cluster(tmp_path, callspec.params.get("passthrough", "auto") if callspec else "auto") as made:
        request.node.stash[CLUSTER] = made
        yield made


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Generator[None, Any, Any]:
    report = yield
    if report.failed and CLUSTER in item.stash:
        report.sections.extend(item.stash[CLUSTER].logs())
    return report
