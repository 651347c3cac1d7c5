"""pytest puts this folder on the path: tests of every tier may import `harness`, `engines` and `cluster_nodes`."""

from __future__ import annotations

import os
import signal
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
