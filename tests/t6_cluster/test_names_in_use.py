"""A file that loses its name while it is open takes its users along: they are no users of what has the name next."""

from __future__ import annotations

import contextlib
import os
import subprocess

import pytest

from cluster_nodes import Cluster, Node, needs_root, wait_same_position, wait_until

pytestmark = needs_root


def make(node: Node, name: str, mode: str) -> None:
    with contextlib.closing(node.connect(name)) as connection:
        assert connection.execute(f"pragma journal_mode = {mode}").fetchone() == (mode,)
        connection.execute("create table t(name)")
        connection.execute("insert into t values (?)", (name,))


def mv(node: Node, old: str, new: str) -> None:
    """OSError if it is refused."""
    os.rename(node.mount / old, node.mount / new)


@pytest.mark.parametrize("born", ["copied here", "made here"])
@pytest.mark.parametrize("how", ["mv", "rm", "mv over it", "emptied"])
def test_who_has_an_old_file_open(cluster: Cluster, how: str, born: str) -> None:
    primary, replica = cluster.pair()
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(contextlib.closing(primary.connect("a.db"))) if born == "made here" else None
        make(primary, "a.db", "delete")
        old = made or stack.enter_context(contextlib.closing(primary.connect("a.db")))
        assert old.execute("select name from t").fetchall() == [("a.db",)]
        if how == "mv":
            mv(primary, "a.db", "b.db")
        elif how == "rm":
            (primary.mount / "a.db").unlink()
        elif how == "mv over it":
            make(primary, "x.db", "delete")
            mv(primary, "x.db", "a.db")
            (primary.mount / "a.db").unlink()
        else:
            subprocess.run(["sh", "-c", ': > "$0"', str(primary.mount / "a.db")], check=True, timeout=20)
            (primary.mount / "a.db").unlink()
        make(primary, "a.db", "wal")
        mv(primary, "a.db", "c.db")  # refused, if anybody had it open
        wait_same_position(primary, replica, "c.db")
        if how == "mv":
            assert old.execute("select name from t").fetchall() == [("a.db",)]
            with contextlib.closing(primary.connect("b.db")) as new:
                new.execute("insert into t values ('more')")
            wait_same_position(primary, replica, "b.db")
            mv(primary, "b.db", "d.db")
            wait_until(lambda: replica.databases() == ["c.db", "d.db"], "the names")
