"""Fixtures of the mounted tier. Each mount has a daemon process of its own, which is ended and unmounted whatever
happens to the test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounted import PlainMount, start_plain, stop_plain


@pytest.fixture(params=["passthrough", "passthrough-readers", "cached"])
def plain_mount(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[PlainMount]:
    """A mounted directory of plain files, in all modes, open to all users."""
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        pytest.skip("needs root and /dev/fuse")
    for parent in (tmp_path, *tmp_path.parents):
        if parent == Path("/tmp"):
            break
        parent.chmod(0o755)
    mounted = start_plain(tmp_path / "mnt", tmp_path / "data", request.param)
    try:
        yield mounted
    finally:
        errors = stop_plain(mounted)
    assert "failed with" not in errors, errors
