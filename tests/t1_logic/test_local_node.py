"""Commands that read a node's files find the node as the other commands do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_node import FakeNode, fake_node

from pylitefs.cli import local_node
from pylitefs.cli.local_node import LocalNode, find_node
from pylitefs.errors import ConfigError, UsageError


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNode]:
    """The one that runs on this machine; there is no configuration file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with fake_node() as made:
        monkeypatch.setattr(local_node, "DEFAULT_URL", made.url)
        yield made


def status(data_dir: Path) -> tuple[int, Any]:
    return 200, {"node": {"dataDir": str(data_dir), "mountDir": "/litefs"}}


def configured(tmp_path: Path, data_dir: str) -> str:
    path = tmp_path / "other.yml"
    text = {"fuse": {"dir": "/mnt"}, "data": {"dir": data_dir}, "lease": {"type": "static", "candidate": True}}
    path.write_text(json.dumps(text))
    return str(path)


def test_without_a_file_the_node_that_runs_is_asked(node: FakeNode, tmp_path: Path) -> None:
    node.answers["GET /status"] = status(tmp_path)
    assert find_node(None, "", "") == find_node(None, "", node.url) == LocalNode(str(tmp_path), "/litefs")
    assert find_node(None, f"{tmp_path}/.", "") == LocalNode(str(tmp_path), "/litefs")
    assert find_node(None, "/elsewhere", "") == LocalNode("/elsewhere"), "its mount is another database's"


def test_a_file_counts_before_that(node: FakeNode, tmp_path: Path) -> None:
    path = configured(tmp_path, "/var/lib/a")
    assert find_node(path, "", "") == LocalNode("/var/lib/a", "/mnt")
    assert find_node(path, "/var/lib/b", "") == LocalNode("/var/lib/b")
    (tmp_path / "litefs.yml").write_text("nonsense: 1")
    with pytest.raises(ConfigError, match="nonsense"):
        find_node(None, "", "")
    assert not node.asked


def test_none_of_them(node: FakeNode, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^which node\? No configuration file .*-config.*-data-dir.*-url$"):
        find_node(None, "", "")
    assert find_node(None, "/var/lib/a", "") == LocalNode("/var/lib/a")
    node.answers["GET /status"] = status(tmp_path / "on another machine")
    with pytest.raises(UsageError, match="is not here: run this on its machine"):
        find_node(None, "", node.url)
