"""Commands that read a node's files find the node as the other commands do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_node import FakeNode, fake_node

from pylitefs.cli import local_node
from pylitefs.cli.local_node import LocalNode, find_node
from pylitefs.errors import ConfigError, UsageError
from pylitefs.http.client import DEFAULT_URL


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


@pytest.mark.parametrize(
    ("addr", "url"),
    [
        (":29999", "http://localhost:29999"),
        ("0.0.0.0:29999", "http://localhost:29999"),
        ("[::]:29999", "http://localhost:29999"),
        ("10.0.0.5:29999", "http://10.0.0.5:29999"),
        ("[fe80::1]:29999", "http://[fe80::1]:29999"),
        (":0", DEFAULT_URL),  # nobody knows
    ],
)
def test_commands_find_the_port_in_the_configuration_file(node: FakeNode, tmp_path: Path, addr: str, url: str) -> None:
    path = configured(tmp_path, "/var/lib/a")
    document = json.loads(Path(path).read_text()) | {"http": {"addr": addr}}
    (tmp_path / "litefs.yml").write_text(json.dumps(document))
    assert local_node.own_url() == (node.url if url == DEFAULT_URL else url)


def test_commands_ask_the_usual_address_without_a_file_or_with_one_that_is_of_no_use(
    node: FakeNode, tmp_path: Path
) -> None:
    assert local_node.own_url() == node.url
    (tmp_path / "litefs.yml").write_text("nonsense: 1")
    assert local_node.own_url() == node.url


@pytest.mark.parametrize("words", [["status", "-json"], ["history", "-json"], ["pause"], ["sync", "app.db"]])
def test_every_command_asks_there(node: FakeNode, tmp_path: Path, words: list[str]) -> None:
    path = configured(tmp_path, "/var/lib/a")
    host, port = node.url.removeprefix("http://").split(":")
    document = json.loads(Path(path).read_text()) | {"http": {"addr": f"{host}:{port}"}}
    (tmp_path / "litefs.yml").write_text(json.dumps(document))
    command = [sys.executable, "-m", "pylitefs", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert node.asked, done.stderr
    elsewhere = subprocess.run([*command, "-url", "http://127.0.0.1:1"], cwd=tmp_path, capture_output=True, check=False)
    assert b"http://127.0.0.1:1" in elsewhere.stderr
