"""The processes that end a WAL which stands in for a rollback mode, when the daemon stops."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pylitefs.engine import stand_in
from pylitefs.engine.stand_in import StandIns
from pylitefs.engine.worker import Worker


def database(folder: Path, name: str) -> Any:
    return SimpleNamespace(
        name=name, handles_lock=threading.Lock(), in_use=False, wal_stands_in=True, may_commit=True, exists=True,
        files=SimpleNamespace(live=lambda kind: str(folder / name)),
    )  # fmt: skip


def test_all_of_them_are_ended_and_none_begins_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each one that ends is taken off the list by the worker while the stop waits for the next one."""
    program = tmp_path / "program.py"
    program.write_text("import sys, time\nopen(sys.argv[1], 'w').close()\ntime.sleep(60)\n")
    monkeypatch.setattr(stand_in, "_PROGRAM", str(program))
    worker = Worker()
    worker.start()
    stand_ins = StandIns(worker)
    try:
        databases = [database(tmp_path, f"{number}.db") for number in range(3)]
        for each in databases:
            stand_ins.closed(each)
        deadline_s = time.monotonic() + 20
        while not all((tmp_path / each.name).exists() for each in databases):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        processes = list(stand_ins._processes.values())
        stand_ins.stop()
        assert len(processes) == 3 and all(process.poll() is not None for process in processes)
        late = database(tmp_path, "late.db")
        worker.submit(stand_ins._begin, late).result(20)
        assert late.name not in stand_ins._processes
    finally:
        worker.stop()
