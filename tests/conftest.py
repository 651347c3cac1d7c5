"""pytest puts this folder on the path: tests of every tier may import `harness`, `engines` and `cluster_nodes`."""

from __future__ import annotations

import datetime
import os
import signal
import zlib
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Where it is set each of a thousand daemons would compile the whole program anew: half of what its start costs.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

settings.register_profile("on any machine", deadline=None)  # a busy one has moments of seconds
settings.load_profile("on any machine")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """What the test starts can be interrupted by SIGINT, also where a shell has told pytest to ignore that (`&`)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


ROTATION = "PYLITEFS_TEST_ROTATION"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "rotates(of): one of so many runs, each day another; see docs/HACKING.md")
    os.environ.setdefault(ROTATION, str(datetime.date.today().toordinal()))  # the workers must choose alike


def pytest_report_header(config: pytest.Config) -> str:
    return f"{ROTATION}={os.environ[ROTATION]}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What runs with and without passthrough does so without it every third day: these are the most expensive tests,
    and nearly all that they find both find. A test that is named on the command line always runs."""
    if float(os.environ.get("PYLITEFS_TEST_SCALE", "1")) >= 2 or any("::" in word for word in config.args):
        return
    left_out = [item for item in items if not _is_due(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if _is_due(item)]


def _is_due(item: pytest.Item) -> bool:
    mark = item.get_closest_marker("rotates")
    of = mark.args[0] if mark is not None else 1
    callspec = getattr(item, "callspec", None)
    if callspec is not None and callspec.params.get("passthrough") == "off" and "t6_cluster" in item.nodeid:
        of = max(of, 3)
    return (zlib.crc32(item.nodeid.encode()) + int(os.environ[ROTATION])) % of == 0
