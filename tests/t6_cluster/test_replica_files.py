"""A replica's live files belong to its daemon: nobody else removes or shortens them, not even root, not even while it
is at them itself."""

from __future__ import annotations

import errno
import os
import threading

import pytest

from cluster_nodes import PASSTHROUGH, Cluster, assert_same_bytes, assert_sound, needs_root, scaled, wait_same_position

pytestmark = needs_root

WRITES = 400


@pytest.mark.parametrize("passthrough", PASSTHROUGH)
def test_nobody_else_removes_or_shortens_them(cluster: Cluster, passthrough: str) -> None:
    primary, replica = cluster.pair()
    app = primary.connect("db")
    app.execute("pragma journal_mode = wal")
    app.execute("create table t (id integer primary key, v blob)")
    wait_same_position(primary, replica, "db")
    reader = replica.connect("db")
    assert reader.execute("select count(*) from t").fetchone() == (0,)
    stop = threading.Event()
    done: list[str] = []

    def destroy() -> None:
        while not stop.is_set():
            for name in ("db", "db-wal", "db-shm"):
                for attempt in (lambda path: os.truncate(path, 0), os.unlink):
                    try:
                        attempt(replica.mount / name)
                    except OSError as error:
                        if error.errno not in (errno.EROFS, errno.ENOENT):
                            done.append(f"{name}: {error}")
                    else:
                        done.append(f"{name} was destroyed")

    hostile = threading.Thread(target=destroy)
    hostile.start()
    try:
        for _ in range(scaled(WRITES)):
            app.execute("insert into t (v) values (randomblob(200))")
        app.execute("delete from t where id % 2")
        app.execute("vacuum")
        wait_same_position(primary, replica, "db")
    finally:
        stop.set()
        hostile.join()
    assert done == []
    assert reader.execute("select count(*) from t").fetchone() == (scaled(WRITES) // 2,)
    assert_sound(reader)
    new = replica.connect("db")
    assert_sound(new)
    for connection in (reader, new, app):
        connection.close()
    assert_same_bytes([primary, replica], "db")


@pytest.mark.parametrize("passthrough", PASSTHROUGH)
def test_another_page_size_of_a_database_at_rest(cluster: Cluster, passthrough: str) -> None:
    primary, replica = cluster.pair()
    app = primary.connect("db")
    app.execute("create table t (id integer primary key, v blob)")
    app.execute("insert into t (v) values (randomblob(30000))")
    wait_same_position(primary, replica, "db")
    replica.stop()
    replica.start()  # it has the database as one file, and no WAL
    for size in (8192, 1024):
        app.execute(f"pragma page_size = {size}")
        app.execute("vacuum")
        wait_same_position(primary, replica, "db")
        seen = replica.connect("db")
        assert seen.execute("pragma page_size").fetchone() == (size,)
        assert_sound(seen)
        seen.close()
    app.close()
    assert_same_bytes([primary, replica], "db")
    assert "will be tried again" not in replica.log_text()
