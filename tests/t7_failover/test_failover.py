"""The primary fails, in every way there is: another node takes writes, and the clients' histories hold.

Times are printed (`pytest -s`), never asserted: what is waited for only has to come.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable
from typing import Any

import pytest

from cluster_nodes import SCALE, needs_root, wait_until
from harness.branches import lost_values
from harness.cluster import ALL_DBS, DELETE_DB, FULL_DB, HaCluster, gaps, wait_more
from harness.disks import RamDisk, RealDisk
from harness.reports import assert_reads_go_on, lost, report

pytestmark = [needs_root, pytest.mark.timeout(150)]
New = Callable[..., HaCluster]
SMALL_DISK = 48 << 20
LONGER = pytest.mark.skipif(SCALE < 2, reason="with PYLITEFS_TEST_SCALE=2")


def engines(*names: str, longer: tuple[str, ...] = ()) -> Any:
    """On each of these; on some only where there is time."""
    return pytest.mark.parametrize("engine", [*names, *(pytest.param(name, marks=LONGER) for name in longer)])


@pytest.mark.rotates(2)
@engines("etcd", "consul", "kubernetes", longer=("directory", "s3"))
def test_kill_9(new_cluster: New, engine: str) -> None:
    cluster = new_cluster(engine, databases=ALL_DBS)
    cluster.start()
    with cluster.workload() as clients:
        wait_more(clients, 100)
        old = cluster.primary()
        old.kill()
        print(f"\n{engine}: the next primary after {cluster.wait_primary([old]):.2f} s")
        wait_more(clients, 100)
    report(f"kill -9, {engine}", *cluster.judge())


def test_an_application_notices_that_the_daemon_was_killed(new_cluster: New) -> None:
    """Its NORMAL commits do not ask the daemon, and the kernel would pass them through for ever."""
    cluster = new_cluster(databases=ALL_DBS)
    cluster.start()
    old = cluster.primary()
    with contextlib.closing(sqlite3.connect(old.mount / "app.db", isolation_level=None, timeout=0.1)) as db:
        db.execute("pragma journal_mode = wal")
        db.execute("pragma synchronous = normal")
        db.execute("create table t (v)")
        db.execute("insert into t values (1)")
        assert old.process is not None
        os.kill(old.process.pid, signal.SIGKILL)
        deadline_s = time.monotonic() + 30
        told = ""
        while "unable to open database file" not in told and "disk I/O error" not in told:
            assert time.monotonic() < deadline_s, f"it commits still, or was told: {told}"
            try:
                db.execute("insert into t values (2)")
            except sqlite3.OperationalError as error:  # "database is locked", in the moment when it happens
                told = str(error)
    old.process.wait()
    cluster.wait_primary([old])


@pytest.mark.parametrize(("nodes", "sync"), [(3, 1), (5, 2)])
def test_machines_are_lost(new_cluster: New, nodes: int, sync: int) -> None:
    """With sync: N no acknowledged FULL commit is missing though the primary and N - 1 others are gone for good."""
    cluster = new_cluster(sync=sync, databases=FULL_DB | DELETE_DB)
    cluster.start(nodes)
    with cluster.workload() as clients:
        wait_more(clients, 100)
        gone = [cluster.primary(), *cluster.replicas()[: sync - 1]]
        for member in gone:
            member.kill()
            member.unmount()
        cluster.wait_primary(gone)
        wait_more(clients, 50)
    for path in (path for member in gone for path in member.data.iterdir()):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    report(f"{len(gone)} of {nodes} machines lost, sync {sync}", *cluster.judge())


@pytest.mark.parametrize(("sync", "which"), [(0, "primary"), (1, "all")])
def test_power_cut(new_cluster: New, sync: int, which: str) -> None:
    """Whatever was not synced is gone, also on all nodes at once; every acknowledged FULL commit is there."""
    cluster = new_cluster(sync=sync, databases=ALL_DBS)
    cluster.start(disk=RealDisk)
    with cluster.workload() as clients:
        wait_more(clients, 100)
        old = cluster.primary()
        dark = [old] if which == "primary" else cluster.members
        cluster.lose_power(dark)
        if which == "primary":
            cluster.wait_primary([old])
            wait_more(clients, 50)
        cluster.plug_in(dark)
        cluster.wait_primary()
        wait_more(clients, 50)
    report(f"power cut of {which}, sync {sync}", *cluster.judge())


@pytest.mark.rotates(2)
@engines("etcd", "s3", "consul", longer=("directory", "kubernetes"))
def test_sigterm_hands_over(new_cluster: New, engine: str) -> None:
    """Nothing is lost, also of what is not waited for, and nobody has to notice that the primary is gone."""
    cluster = new_cluster(engine, databases=ALL_DBS)
    cluster.start()
    with cluster.workload() as clients:
        wait_more(clients, 100)
        old = cluster.primary()
        old.terminate()
        cluster.wait_primary([old])
        wait_more(clients, 100)
        assert old.process is not None
        assert old.process.wait(30) == 0
    seen, outcome = cluster.judge()
    report(f"SIGTERM, {engine}", seen, outcome)
    assert not any(lost(seen, outcome).values()), "a clean handover lost commits"


@pytest.mark.parametrize("sync", [0, 1])
def test_stopped_for_longer_than_the_lease(new_cluster: New, sync: int) -> None:
    """SIGSTOP, SIGCONT: nothing of FULL is acknowledged afterwards, and NORMAL is kept in lost/, and reported."""
    cluster = new_cluster(sync=sync, databases=ALL_DBS)
    cluster.start()
    cluster.create("late.db", "wal")
    with cluster.workload() as clients, contextlib.ExitStack() as stack:
        wait_more(clients, 100)
        old = cluster.primary()  # by now: on a busy machine the first one's lease may have ended meanwhile
        late = stack.enter_context(contextlib.closing(old.connect("late.db")))
        late.execute("pragma synchronous = normal")
        late.execute("pragma wal_autocheckpoint = 0")
        late.execute("insert into log (value) values ('before')")
        wait_until(lambda: all(member.copy("late.db").values for member in cluster.members), "the first row is there")
        old.pause()
        cluster.wait_primary([old])
        with contextlib.closing(cluster.primary().connect("late.db")) as other:
            other.execute("insert into log (value) values ('of another')")
        wait_more(clients, 100)
        late.execute("insert into log (value) values ('much too late')")
        old.resume()
        wait_until(lambda: old.role() is not None and not old.takes_writes(), "the old primary knows that it is none")
        wait_more(clients, 50)
    report(f"SIGSTOP, sync {sync}", *cluster.judge())
    for member in cluster.members:
        assert member.copy("late.db").values == ("before", "of another")
    assert lost_values([old.data], "late.db", ["much too late"])
    assert [line for line in old.log_text().splitlines() if "event=lost database=late.db" in line]


@engines("etcd", "kubernetes", longer=("s3", "consul"))
def test_hung_engine(new_cluster: New, engine: str) -> None:
    """It is stopped with SIGSTOP: connections stay, nothing answers."""
    cluster = new_cluster(engine, databases=ALL_DBS)
    members = cluster.start()
    with cluster.workload() as clients:
        wait_more(clients, 100)
        cluster.cut_engine()
        cluster.wait_no_primary()
        assert_reads_go_on(cluster, members)
        cluster.heal()
        cluster.wait_primary()
        wait_more(clients, 50)
    report(f"hung {engine}", *cluster.judge())


def test_full_disk(new_cluster: New) -> None:
    """Nothing can be written on the primary any more: another one takes over."""
    cluster = new_cluster(databases=ALL_DBS)
    cluster.start(disk=RamDisk, disk_bytes=SMALL_DISK)
    with cluster.workload() as clients:
        wait_more(clients, 100)
        old = cluster.primary()
        old.fill()
        cluster.wait_primary([old])
        wait_more(clients, 50)
        old.empty()
        wait_more(clients, 50)
    report("full disk", *cluster.judge())


def test_switchover_under_load(new_cluster: New) -> None:
    """Three times, to a node that is named and to any: nothing is lost, also of what is not waited for."""
    cluster = new_cluster(databases=ALL_DBS)
    cluster.start()
    with cluster.workload(pause_ms=2.0) as clients:
        for turn in range(3):
            wait_more(clients, 100)
            old = cluster.primary()
            if turn == 0:
                old.post("/handoff")
            else:
                target = cluster.replicas()[0]
                path = f"/handoff?nodeID={target.cluster()['nodeID']}" if turn == 1 else "/promote"
                (old if turn == 1 else target).post(path)
                assert target.takes_writes(), f"{path} said that it is done"
            assert not old.takes_writes()
        wait_more(clients, 100)
    seen, outcome = cluster.judge()
    for db in outcome.copies[outcome.primary]:
        print(f"\n{db}: longest write gaps {[f'{length * 1000:.0f} ms' for _, length in gaps(seen, db)[:5]]}")
    report("switchover", seen, outcome)
    assert not any(lost(seen, outcome).values()), "a switchover lost commits"
    reasons = [entry["reason"] for entry in json.loads(cluster.primary().get("/history"))[-3:]]
    assert reasons == ["handed over"] * 3


def test_clocks_differ(new_cluster: New) -> None:
    """CLOCK_BOOTTIME of each node is another one, by days; leases compare no clocks of two machines."""
    cluster = new_cluster(databases=ALL_DBS)
    for number, offset_s in enumerate((0, 400_000, 90), 1):
        cluster.member(f"n{number}", offset_s=offset_s)
    cluster.begin()
    with cluster.workload() as clients:
        wait_more(clients, 50)
        old = cluster.primary()
        old.kill()
        cluster.wait_primary([old])
        wait_more(clients, 50)
    report("clocks that differ", *cluster.judge())


def test_clocks_jump(new_cluster: New) -> None:
    """The wall clock of the primary goes back by a month, and another one's forward, while both run: nobody notices."""
    cluster = new_cluster(databases=ALL_DBS)
    cluster.start()
    with cluster.workload() as clients:
        wait_more(clients, 50)
        old = cluster.primary()
        old.skew(-2_600_000)
        cluster.replicas()[0].skew(2_600_000)
        wait_more(clients, 200)
        assert cluster.primary() is old
        old.post("/handoff")
        cluster.wait_primary([old])
        wait_more(clients, 50)
    seen, outcome = cluster.judge()
    report("clocks that jump", seen, outcome)
    assert not any(lost(seen, outcome).values()), "a clean handover lost commits"
