"""Fixtures of the contract tier: one suite for all implementations of a port, real services where there are any.

Tests may be coroutine functions; each runs on an event loop of its own, and what a `Subject` of it made is closed then.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from lease_services import Subject
from lease_subjects import ENGINES, Services, new_subject
from virtual_time import VirtualTimeLoop


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    given = [value if isinstance(value, list) else [value] for value in arguments.values()]
    subjects = [value for values in given for value in values if isinstance(value, Subject)]

    async def run() -> None:
        try:
            await pyfuncitem.obj(**arguments)
        finally:
            for subject in subjects:
                await subject.close()

    virtual = any(subject.virtual for subject in subjects)
    with asyncio.Runner(loop_factory=VirtualTimeLoop if virtual else None) as runner:
        runner.run(run())
    return True


@pytest.fixture(scope="session")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    with ExitStack() as stack:
        yield Services(tmp_path_factory.mktemp("engines"), stack)


@pytest.fixture(params=ENGINES)
def subject(request: pytest.FixtureRequest, services: Services, tmp_path: Path) -> Subject:
    """Each engine in turn."""
    return new_subject(request.param, services, tmp_path)


@pytest.fixture(params=ENGINES)
def subjects(request: pytest.FixtureRequest, services: Services, tmp_path: Path) -> list[Subject]:
    """Six clusters on each engine in turn."""
    return [new_subject(request.param, services, tmp_path) for _ in range(6)]
