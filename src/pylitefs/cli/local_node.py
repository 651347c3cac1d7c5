"""The node on this machine: where its API is, and, for commands that read its files, its data directory and mount."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from pylitefs.config import load, search_paths
from pylitefs.errors import ConfigError, LitefsError, UsageError
from pylitefs.http.client import DEFAULT_URL, Client

_F = TypeVar("_F", bound=Callable[..., Any])


def url_option(text: str) -> Callable[[_F], _F]:
    """`-url`, by default the node of this machine."""
    where = f"`http.addr` of the configuration file, or {DEFAULT_URL}"
    return click.option(
        "-url", "url", default=None, callback=_or_own, show_default=where, metavar="URL", help=text
    )  # fmt: skip


def _or_own(_ctx: click.Context, _param: click.Parameter, url: str | None) -> str:
    return own_url() if url is None else url


def own_url() -> str:
    """Where the node of this machine answers, by the configuration file, which is looked for where `litefs mount` does.
    The usual address where there is none; also where it cannot be used: who may not read it may ask the node."""
    if not any(map(os.path.lexists, search_paths(os.environ))):
        return DEFAULT_URL
    try:
        http = load(None)[0].http
    except LitefsError:
        return DEFAULT_URL
    host = "localhost" if http.host in ("", "0.0.0.0", "::") else http.host
    return f"http://{f'[{host}]' if ':' in host else host}:{http.port}" if http.port else DEFAULT_URL


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
