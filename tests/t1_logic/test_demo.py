"""What `litefs demo` does before and after its nodes run. The whole of it, with nodes, is in t6_cluster."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from pylitefs import config
from pylitefs.cli import demo_cluster
from pylitefs.cli.demo_cluster import Cluster, DemoFailed, check_requirements, is_mounted
from pylitefs.cli.demo_workload import Reader
from pylitefs.cli.demo_workload import Seen as Sighting
from pylitefs.errors import MountError


def test_the_nodes_configuration_is_valid() -> None:
    with Cluster(["primary", "replica-1", "replica-2"], keep=False) as cluster:
        for node in cluster.nodes:
            node.write_config(cluster.lease_of(node))
        loaded = [config.load(str(node.directory / "litefs.yml"))[0] for node in cluster.nodes]
        assert [one.lease.candidate for one in loaded] == [True, False, False]
        assert {one.lease.advertise_url for one in loaded} == {cluster.primary.url}
        assert len({one.http.port for one in loaded}) == 3
        directory = cluster.directory
    assert not directory.exists()


def test_a_node_that_does_not_start_is_reported_and_everything_removed() -> None:
    names = ["primary", "replica-1"]
    with pytest.raises(DemoFailed, match="primary ended with status"), Cluster(names, keep=False) as cluster:
        directory = cluster.directory
        cluster.primary.write_config(cluster.lease_of(cluster.primary))
        (cluster.primary.directory / "litefs.yml").write_text("no-such-key: 1\n")
        cluster.primary.start()
        cluster.primary.wait_ready()
    assert not directory.exists()


def test_keep_keeps(tmp_path: Path) -> None:
    with Cluster(["primary", "replica-1"], keep=True) as cluster:
        cluster.primary.write_config(cluster.lease_of(cluster.primary))
    try:
        assert (cluster.primary.directory / "litefs.yml").exists()
    finally:
        shutil.rmtree(cluster.directory)


def test_mounts_are_recognised(tmp_path: Path) -> None:
    assert is_mounted(Path("/proc"))
    assert not is_mounted(tmp_path)


def test_without_privileges_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/dev/fuse" or exists(path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(demo_cluster.shutil, "which", lambda _name: None)
    with pytest.raises(MountError, match="install the package fuse3"):
        check_requirements()
    monkeypatch.setattr(os.path, "exists", lambda _path: False)
    with pytest.raises(MountError, match="no /dev/fuse"):
        check_requirements()


def test_latencies_count_every_row_once() -> None:
    with Cluster(["primary", "replica-1"], keep=False) as cluster:
        reader = Reader(cluster.replicas[0])
    committed_ns = {1: 0, 2: 1_000_000, 3: 9_000_000}  # 4 was not timed
    reader._seen.append(Sighting(1, 2, 3_000_000))  # 3 ms and 2 ms
    assert reader.latencies_ms(committed_ns) == (3.0, 3.0)
    reader._seen.append(Sighting(3, 4, 8_000_000))  # seen before COMMIT returned
    assert reader.latencies_ms(committed_ns) == (2.0, 3.0)
