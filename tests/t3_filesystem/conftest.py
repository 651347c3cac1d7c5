"""Fixtures: a fake kernel in front of the handlers, with passthrough and without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_kernel import Kernel


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    kernel = Kernel(tmp_path)
    yield kernel
    kernel.dispatcher.patience.stop()


@pytest.fixture
def cached(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path, passthrough=False)
