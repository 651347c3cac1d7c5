"""Fixtures of the failover tier: clusters on real lease engines. A test that fails shows its nodes' last words."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from harness.cluster import HaCluster

CLUSTERS = pytest.StashKey[list[HaCluster]]()
New = Callable[..., HaCluster]


@pytest.fixture
def new_cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[New]:
    """Makes clusters, see `HaCluster`; they end with the test."""
    made = request.node.stash[CLUSTERS] = []
    with ExitStack() as stack:

        def new(engine: str = "etcd", **options: Any) -> HaCluster:
            cluster = stack.enter_context(HaCluster(tmp_path / f"c{len(made)}", engine, **options))
            made.append(cluster)
            return cluster

        yield new


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Generator[None, Any, Any]:
    report = yield
    if report.failed:
        for cluster in item.stash.get(CLUSTERS, []):
            report.sections.extend(cluster.logs())
    return report
