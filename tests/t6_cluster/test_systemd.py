"""The unit for systemd (docs/litefs.service), run by a real one: litefs is killed, and an application in another unit
goes on. It cannot commit any more then, whatever systemd kills besides, and what it committed is not lost."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from cluster_nodes import needs_root, wait_until
from harness.systemd import Systemd, can_run

pytestmark = [needs_root, pytest.mark.skipif(not can_run(), reason="needs systemd and a cgroup2 hierarchy")]
UNIT = Path(__file__).parents[2] / "docs" / "litefs.service"
SOURCE = Path(__file__).parents[2] / "src"
ROUNDS = 3
APPLICATION = """
import sqlite3, sys, time
db = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=0.2)
db.execute("pragma journal_mode = wal")
db.execute("pragma synchronous = normal")
db.execute("create table if not exists t (v)")
print("begun", flush=True)
for number in range(1_000_000):
    value = f"{sys.argv[2]}-{number}"
    try:
        db.execute("insert into t values (?)", (value,))
        print(f"value {value}", flush=True)
    except sqlite3.Error as error:
        print(f"error: {error}", flush=True)
    time.sleep(0.002)
"""


class Machine:
    def __init__(self, base: Path) -> None:
        self.base, self.mount = base, base / "mnt"
        self.systemd = Systemd(base)
        (base / "lease").mkdir()
        (base / "litefs.yml").write_text(
            f"fuse:\n  dir: {self.mount}\ndata:\n  dir: {base}/data\nhttp:\n  addr: 127.0.0.1:0\n"
            f"lease:\n  type: object-store\n  hostname: here\n  advertise-url: http://127.0.0.1:1\n"
            f"  object-store:\n    url: file://{base}/lease\n    ttl: 3s\n"
        )
        litefs = f"{sys.executable} -m pylitefs"
        text = UNIT.read_text().replace("/usr/local/bin/litefs", litefs)
        text = text.replace("/etc/litefs.yml", f"{base}/litefs.yml")
        assert text.count(litefs) == 2 and "Restart=on-failure" in text
        text = text.replace("Restart=on-failure", f"Environment=PYTHONPATH={SOURCE}\nStandardError=file:{base}/log")
        self._unit("litefs", text.replace("[Unit]", "[Unit]\nDefaultDependencies=no"))
        (base / "application.py").write_text(APPLICATION)

    def _unit(self, name: str, text: str) -> None:
        (self.systemd.units / f"{name}.service").write_text(text)

    def application(self, name: str) -> Path:
        """Another unit; what it says goes to the path."""
        out = self.base / name
        self._unit(
            name,
            f"[Unit]\nDefaultDependencies=no\n[Service]\nStandardOutput=file:{out}\nStandardError=file:{out}\n"
            f"ExecStart={sys.executable} {self.base}/application.py {self.mount}/app.db {name}\n",
        )
        self.systemd.systemctl("daemon-reload")
        self.systemd.systemctl("start", name)
        return out

    def values(self) -> set[str]:
        code = "import sqlite3, sys; [print(v) for v, in sqlite3.connect(sys.argv[1]).execute('select v from t')]"
        done = self.systemd.run(sys.executable, "-c", code, f"{self.mount}/app.db")
        assert done.returncode == 0, done.stderr
        return set(done.stdout.split())


def answered(out: Path) -> list[str]:
    lines = out.read_text().splitlines() if out.exists() else []
    return [line.split()[1] for line in lines if line.startswith("value ")]


def refused(out: Path) -> bool:
    return "unable to open database file" in "".join(out.read_text().splitlines()[-3:])


@pytest.mark.timeout(180)
def test_litefs_is_killed_and_an_application_of_another_unit_goes_on(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    all_answered: set[str] = set()
    with machine.systemd as systemd:
        for number in range(ROUNDS):
            assert systemd.systemctl("start", "litefs") == "", systemd.log()
            assert systemd.systemctl("is-active", "litefs") == "active"
            out = machine.application(f"app{number}")
            wait_until(lambda out=out: len(answered(out)) >= 20, f"some commits, noted in {out}")
            assert machine.values() >= all_answered
            systemd.systemctl("kill", "--kill-who=main", "--signal=SIGKILL", "litefs")
            wait_until(lambda out=out: refused(out), "commits are refused")
            before = len(answered(out))
            time.sleep(0.3)
            assert len(answered(out)) == before, "refused, and committed again"
            wait_until(lambda: systemd.systemctl("is-active", "litefs") == "failed", "systemd has ended the unit")
            assert f" {machine.mount} " in systemd.run("cat", "/proc/mounts").stdout, "below it nobody would refuse"
            systemd.systemctl("kill", "--signal=SIGKILL", f"app{number}")
            wait_until(lambda n=number: systemd.systemctl("is-active", f"app{n}") != "active", "the application ends")
            all_answered |= set(answered(out))
        systemd.systemctl("start", "litefs")
        assert machine.values() == all_answered
        assert systemd.systemctl("stop", "litefs") == ""
        assert systemd.systemctl("show", "-p", "Result", "litefs") == "Result=success"
