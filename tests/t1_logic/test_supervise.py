"""The commands of `exec`, run as real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pylitefs.config_values import ExecCommand
from pylitefs.supervise import ExecFailed, Supervisor

DEADLINE_S = 30.0


def commands(*lines: str) -> list[ExecCommand]:
    return [ExecCommand(line) for line in lines]


def gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"


def read_when_written(path: Path) -> str:
    deadline_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline_s:
        if path.exists() and (text := path.read_text()).endswith("\n"):
            return text.strip()
        time.sleep(0.01)
    raise AssertionError(f"{path} was not written")


def test_all_run_in_order_and_the_last_gives_the_status(tmp_path: Path) -> None:
    order = tmp_path / "order"

    async def scenario() -> int:
        supervisor = Supervisor(
            commands(
                f"sh -c 'echo one >> {order}'", f"sh -c 'echo two >> {order}'", f"sh -c 'echo last >> {order}; exit 7'"
            ),
            is_candidate=True,
        )
        await supervisor.run_all()
        assert supervisor.has_background
        return await supervisor.wait()

    assert asyncio.run(scenario()) == 7
    assert order.read_text().split() == ["one", "two", "last"]


def test_a_failing_command_ends_the_start(tmp_path: Path) -> None:
    never = tmp_path / "never"
    supervisor = Supervisor(commands("sh -c 'exit 3'", f"touch {never}"), is_candidate=True)
    with pytest.raises(ExecFailed, match="status 3"):
        asyncio.run(supervisor.run_all())
    assert not supervisor.has_background
    assert not never.exists()


@pytest.mark.parametrize("name", ["/does/not/exist", "no-such-program-at-all"])
def test_a_program_that_does_not_exist(name: str) -> None:
    with pytest.raises(ExecFailed, match="cannot run"):
        asyncio.run(Supervisor(commands(name), is_candidate=True).run_all())


def test_if_candidate_skips_on_a_replica(tmp_path: Path) -> None:
    first, last = tmp_path / "first", tmp_path / "last"
    listed = [ExecCommand(f"touch {first}"), ExecCommand(f"touch {last}", if_candidate=True)]

    async def scenario(is_candidate: bool) -> bool:
        supervisor = Supervisor(listed, is_candidate)
        await supervisor.run_all()
        if supervisor.has_background:
            assert await supervisor.wait() == 0
        return supervisor.has_background

    assert not asyncio.run(scenario(False))
    assert first.exists() and not last.exists()
    assert asyncio.run(scenario(True))
    assert last.exists()


def test_no_commands() -> None:
    async def scenario() -> None:
        supervisor = Supervisor([], is_candidate=True)
        await supervisor.run_all()
        assert not supervisor.has_background
        assert await supervisor.stop() is None

    asyncio.run(scenario())


def test_stop_hands_the_signal_on_and_waits(tmp_path: Path) -> None:
    ready, cleaned = tmp_path / "ready", tmp_path / "cleaned"
    script = f"trap 'touch {cleaned}; exit 5' TERM; echo > {ready}; while :; do sleep 0.05; done"

    async def scenario() -> int | None:
        supervisor = Supervisor([ExecCommand(f'sh -c "{script}"')], is_candidate=True)
        await supervisor.run_all()
        await asyncio.to_thread(read_when_written, ready)
        return await supervisor.stop(signal.SIGTERM)

    assert asyncio.run(scenario()) == 5
    assert cleaned.exists()


def test_stop_while_an_earlier_command_runs_starts_no_other(tmp_path: Path) -> None:
    pid_file, never = tmp_path / "pid", tmp_path / "never"

    async def scenario() -> None:
        supervisor = Supervisor(
            commands(f"sh -c 'echo $$ > {pid_file}; exec sleep 1000'", f"touch {never}"), is_candidate=True
        )
        starting = asyncio.create_task(supervisor.run_all())
        await asyncio.to_thread(read_when_written, pid_file)
        assert await supervisor.stop(signal.SIGTERM) == 1  # killed by a signal: no status of its own
        await starting
        assert not supervisor.has_background

    asyncio.run(scenario())
    assert not never.exists()
    assert gone(int(pid_file.read_text()))


def test_a_child_has_default_signals_and_no_input(tmp_path: Path) -> None:
    out = tmp_path / "out"
    grep = f"sh -c 'grep SigIgn /proc/self/status > {out}; wc -c >> {out}'"

    async def scenario() -> int:
        supervisor = Supervisor(commands(grep), is_candidate=True)
        await supervisor.run_all()
        return await supervisor.wait()

    assert asyncio.run(scenario()) == 0
    ignored, empty = out.read_text().split()[1], out.read_text().split()[2]
    assert not int(ignored, 16) & (1 << (signal.SIGPIPE - 1) | 1 << (signal.SIGXFSZ - 1))
    assert empty == "0"


def test_no_child_outlives_a_killed_parent(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = f"""
import asyncio
from pylitefs.config_values import ExecCommand
from pylitefs.supervise import Supervisor
async def main():
    supervisor = Supervisor([ExecCommand("sh -c 'echo $$ > {pid_file}; exec sleep 1000'")], True)
    await supervisor.run_all()
    await supervisor.wait()
asyncio.run(main())
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        child_pid = int(read_when_written(pid_file))
        assert not gone(child_pid)
    finally:
        parent.kill()
        parent.wait()
    deadline_s = time.monotonic() + DEADLINE_S
    while not gone(child_pid) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    outlived = not gone(child_pid)
    if outlived:
        os.kill(child_pid, signal.SIGKILL)
    assert not outlived
