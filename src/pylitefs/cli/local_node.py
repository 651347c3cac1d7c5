"""The node on this machine, for commands that read its files: where its data directory and its mount are."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

from pylitefs.config import load, search_paths
from pylitefs.errors import ConfigError, LitefsError, UsageError
from pylitefs.http.client import DEFAULT_URL, Client


@dataclass(frozen=True)
class LocalNode:
    """`mount_dir`: "" where that is not known."""

    data_dir: str
    mount_dir: str = ""


def find_node(config_path: str | None, data_dir: str, url: str) -> LocalNode:
    """What is named counts; else the configuration file, where `litefs mount` looks for it; else the node that answers
    on this machine. A mount belongs to the data directory that the same file, or node, has. Raises LitefsError."""
    if url:
        found = _asked(url)
    elif config_path is not None or any(map(os.path.lexists, search_paths(os.environ))):
        config = load(config_path)[0]
        found = LocalNode(config.data.dir, config.fuse.dir)
    elif data_dir:
        found = LocalNode(data_dir)
        with contextlib.suppress(LitefsError):
            found = _asked(DEFAULT_URL)
    else:
        try:
            found = _asked(DEFAULT_URL)
        except LitefsError:
            looked_at = ", ".join(search_paths(os.environ))
            raise ConfigError(
                f"which node? No configuration file ({looked_at}), and none answers at {DEFAULT_URL}: name the file "
                "with -config, the data directory with -data-dir, or another address with -url"
            ) from None
    return LocalNode(data_dir) if data_dir and not _is_same(data_dir, found.data_dir) else found


def _asked(url: str) -> LocalNode:
    node = Client(url).status()["node"]
    data_dir, mount_dir = str(node["dataDir"]), str(node["mountDir"])
    if not os.path.isdir(data_dir):
        raise UsageError(f"the data directory of the node at {url}, {data_dir}, is not here: run this on its machine")
    return LocalNode(data_dir, mount_dir)


def _is_same(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)
