"""promote, handoff, pause, resume, history, sync, and the cluster in `litefs status`, against answers on a socket."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from fake_node import IDS, FakeNode, cluster, fake_node, member
from test_status_view import PRIMARY, printed

from pylitefs.cli import cluster_view
from pylitefs.cli.main import cli
from pylitefs.cli.status import render
from pylitefs.errors import UsageError


@pytest.fixture
def node() -> Iterator[FakeNode]:
    with fake_node() as made:
        made.answers["GET /cluster"] = (200, cluster())
        yield made


def litefs(node: FakeNode, verb: str, *args: str) -> Result:
    return CliRunner().invoke(cli, [verb, "-url", node.url, *args])


def one_error(result: Result, status: int = 1) -> str:
    assert (result.exit_code, result.stdout) == (status, "")
    assert result.stderr.startswith("ERROR: ") and result.stderr.count("\n") == 1
    return result.stderr.removeprefix("ERROR: ").rstrip()


def switching(node: FakeNode, path: str, to: str) -> None:
    """A POST to `path` makes `to` the primary."""

    def switch() -> tuple[int, dict[str, Any] | str]:
        node.answers["GET /cluster"] = (200, cluster(to, epoch=8))
        return 200, "ok"

    node.answers[f"POST {path}"] = switch


# --- promote and handoff ---------------------------------------------------------------------------------------------


def test_promote_the_node_that_is_asked(node: FakeNode) -> None:
    node.answers["GET /cluster"] = (200, cluster("db2", here="db1"))
    switching(node, "/promote", "db1")
    result = litefs(node, "promote")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(f"db1 ({IDS['db1']}) is the primary now, epoch 8, in ")
    assert node.changes == ["POST /promote"]


@pytest.mark.parametrize("name", ["db2", "2222456789abcdef", "2222", "http://db2:20202", "http://db2:20202/"])
@pytest.mark.parametrize("verb", ["promote", "handoff"])
def test_a_node_by_any_of_its_names(node: FakeNode, verb: str, name: str) -> None:
    switching(node, f"/{verb}", "db2")
    result = litefs(node, verb, "-node", name, "-json")
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert told.pop("durationMs") >= 0
    assert told == {"nodeID": IDS["db2"], "hostname": "db2", "url": "http://db2:20202", "epoch": 8, "changed": True}
    assert node.changes == [f"POST /{verb}?nodeID={IDS['db2']}"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("22", f"22 is the name of 2 nodes: give one of their ids: {IDS['db2']}, {IDS['db3']}"),
        ("db9", "no node of the cluster is called db9: known are db1 (1111456789ABCDEF), db2 (2222456789ABCDEF), db3"),
        ("9", "no node of the cluster is called 9: known are"),
        ("http://db9:20202", "no node of the cluster is called http://db9:20202"),
    ],
)
def test_a_name_that_means_no_node_or_several(node: FakeNode, name: str, expected: str) -> None:
    for verb in ("promote", "handoff"):
        assert one_error(litefs(node, verb, "-node", name), 2).startswith(expected)
    assert node.changes == []


def test_a_host_name_comes_before_the_beginning_of_an_id() -> None:
    document = cluster()
    document["members"][2] |= {"hostname": "2222"}
    assert cluster_view.find_member(document, "2222")["nodeID"] == IDS["db3"]
    document["members"][1] |= {"hostname": "2222"}
    with pytest.raises(UsageError, match="2222 is the name of 2 nodes"):
        cluster_view.find_member(document, "2222")


def test_nothing_is_asked_of_the_primary_already(node: FakeNode) -> None:
    for args in (["promote"], ["promote", "-node", "db1"], ["handoff", "-node", "db1"]):
        result = litefs(node, *args)
        assert (result.exit_code, result.stdout) == (0, f"db1 ({IDS['db1']}) is the primary already, epoch 7\n")
    assert json.loads(litefs(node, "promote", "-json").stdout)["changed"] is False
    assert node.changes == []


def test_handoff_to_whom_the_primary_likes(node: FakeNode) -> None:
    switching(node, "/handoff", "db3")
    assert litefs(node, "handoff").stdout.startswith(f"db3 ({IDS['db3']}) is the primary now, epoch 8, in ")
    assert node.changes == ["POST /handoff"]


def test_a_replica_knows_whom_to_ask_for_a_handoff() -> None:
    with fake_node() as replica, fake_node() as primary:
        document = cluster("db2", here="db1")
        document["primary"]["url"] = primary.url
        replica.answers["GET /cluster"] = (200, document)
        switching(primary, "/handoff", "db3")
        assert litefs(replica, "handoff").stdout.startswith(f"db3 ({IDS['db3']}) is the primary now, epoch 8, in ")
        assert (replica.changes, primary.changes) == ([], ["POST /handoff"])


def test_a_refusal_says_why(node: FakeNode) -> None:
    node.answers["POST /promote"] = (409, "db2 cannot become the primary: lease.candidate is false")
    expected = "db2 cannot become the primary: lease.candidate is false"
    assert one_error(litefs(node, "promote", "-node", "db2")) == expected
    node.answers["POST /handoff"] = (503, "no replica is near enough")
    assert one_error(litefs(node, "handoff")) == "no replica is near enough"


@pytest.fixture
def leaderless(node: FakeNode) -> FakeNode:
    """db2 was the primary, db3 was in sync, and db1 wants to be it."""
    gone = cluster(None, here="db1", sync=1, inSync=[IDS["db3"]], members=[member("db1")])
    gone["history"][-1] |= {"nodeID": IDS["db2"], "hostname": "db2"}
    node.answers["GET /cluster"] = (200, gone)
    switching(node, "/promote", "db1")
    return node


def test_force_for_a_script(leaderless: FakeNode) -> None:
    result = litefs(leaderless, "promote", "-force", "-yes")
    assert result.stdout.startswith(f"db1 ({IDS['db1']}) is the primary now, epoch 8, in ")
    result = litefs(leaderless, "promote", "-force", "-yes", "-node", "db2")
    assert leaderless.changes == ["POST /promote?force=true", f"POST /promote?force=true&nodeID={IDS['db2']}"]


def test_force_where_nobody_can_be_asked(leaderless: FakeNode) -> None:
    assert one_error(litefs(leaderless, "promote", "-force"), 2).endswith("add -yes where nobody can be asked")
    assert one_error(litefs(leaderless, "promote", "-yes"), 2) == "-yes says yes to what -force asks: add -force"
    assert leaderless.changes == []


@pytest.mark.parametrize(("answer", "status"), [("n", 1), ("", 1), ("y", 0)])
def test_force_asks_at_a_terminal(leaderless: FakeNode, answer: str, status: int) -> None:
    terminal, its_end = pty.openpty()
    try:
        command = [sys.executable, "-m", "pylitefs", "promote", "-force", "-url", leaderless.url]
        os.write(terminal, f"{answer}\n".encode())
        done = subprocess.run(command, stdin=its_end, capture_output=True, text=True, timeout=60, check=False)
    finally:
        os.close(terminal)
        os.close(its_end)
    assert done.returncode == status, done.stderr
    assert "Known to have every acknowledged commit: 2233456789ABCDEF, db2.\n" in done.stderr
    assert ("ERROR: nothing was changed" in done.stderr) == (status == 1)
    assert leaderless.changes == (["POST /promote?force=true"] if status == 0 else [])


def test_a_node_of_an_older_version(node: FakeNode) -> None:
    node.answers.clear()
    for verb in ("promote", "handoff", "history"):
        assert "has no /cluster: its version is older" in one_error(litefs(node, verb))
    assert "has no /pause: its version is older" in one_error(litefs(node, "pause"))


def test_a_change_goes_on_to_the_primary() -> None:
    with fake_node() as replica, fake_node() as primary:
        replica.answers["GET /cluster"] = (200, cluster())
        for path in ("/handoff", "/pause"):
            replica.answers[f"POST {path}"] = (421, "this node is not the primary")
            primary.answers[f"POST {path}"] = (200, "ok")

        def switch() -> tuple[int, str]:
            replica.answers["GET /cluster"] = (200, cluster("db3", epoch=8))
            return 200, "ok"

        primary.answers["POST /handoff"] = switch
        assert one_error(litefs(replica, "pause")) == "this node is not the primary"  # and does not know who is
        replica.headers["Litefs-Primary-Url"] = primary.url
        assert litefs(replica, "pause").exit_code == 0
        assert litefs(replica, "handoff", "-node", "db3").stdout.startswith("db3 (")
        assert primary.changes == ["POST /pause", f"POST /handoff?nodeID={IDS['db3']}"]
        # One that sends us on to itself, or in a circle, is not followed for ever.
        primary.answers["POST /pause"] = (421, "nor is this one")
        primary.headers["Litefs-Primary-Url"] = replica.url
        assert one_error(litefs(replica, "pause")) == "nor is this one"
        replica.headers["Litefs-Primary-Url"] = replica.url
        before = len(replica.changes)
        assert one_error(litefs(replica, "pause")) == "this node is not the primary"
        assert len(replica.changes) == before + 1


# --- pause, history, sync --------------------------------------------------------------------------------------------


def test_pause_and_resume(node: FakeNode) -> None:
    node.answers["POST /pause"] = node.answers["POST /resume"] = (200, "ok")
    assert "litefs resume" in litefs(node, "pause").stdout
    assert litefs(node, "resume").stdout == "automatic failover is on\n"
    assert json.loads(litefs(node, "pause", "-json").stdout) == {"paused": True}
    assert json.loads(litefs(node, "resume", "-json").stdout) == {"paused": False}
    assert node.changes == ["POST /pause", "POST /resume", "POST /pause", "POST /resume"]


def test_history(node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    result = litefs(node, "history")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["epoch", "primary", "txid", "since", "reason"]
    assert lines[1][:3] == ["6", "db2", "0000000000000060"] and lines[1][-2:] == ["first", "primary"]
    assert lines[2][:3] == ["7", "db1", "0000000000000070"] and lines[2][-3:] == ["db2", "[lease]", "expired"]
    assert len(lines) == 3
    assert json.loads(litefs(node, "history", "-json").stdout) == cluster()["history"]
    node.answers["GET /cluster"] = (200, cluster(history=[]))
    assert litefs(node, "history").stdout == "no change of the primary is remembered\n"
    assert litefs(node, "history", "-json").stdout == "[]\n"


def test_history_fits_80_columns_and_loses_nothing() -> None:
    entry = cluster()["history"][0] | {
        "hostname": "a-host-with-a-name-of-some-length.example.com",
        "reason": "why " * 40,
    }
    text = printed(cluster_view.render_history([entry]))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert text.count("why") == 40
    assert "a-host-with" in text


def test_a_time_that_is_none_is_shown_as_it_is() -> None:
    assert cluster_view.local_time("yesterday [x]") == r"yesterday \[x]"


def test_sync(node: FakeNode) -> None:
    position = {"name": "app.db", "txid": "000000000001a2bc", "postApplyChecksum": "c0ffee0123456789"}
    node.answers["GET /sync"] = (200, position)
    result = litefs(node, "sync", "app.db")
    assert (result.exit_code, result.stdout) == (0, "000000000001a2bc/c0ffee0123456789\n")
    result = litefs(node, "sync", "app.db", "-txid", "1A2BC", "-timeout", "500ms", "-json")
    assert json.loads(result.stdout) == position
    # A whole position is taken too: litefs sync app.db -txid $(cat app.db-pos)
    assert litefs(node, "sync", "a b&c", "-txid", "000000000001a2bc/c0ffee0123456789").exit_code == 0
    assert node.asked == [
        "GET /sync?db=app.db&timeout=10.000",
        "GET /sync?db=app.db&timeout=0.500&txid=000000000001a2bc",
        "GET /sync?db=a+b%26c&timeout=10.000&txid=000000000001a2bc",
    ]


def test_sync_that_fails(node: FakeNode) -> None:
    node.answers["GET /sync"] = (503, "app.db is at 1a2bb, 1 transaction behind, after 10s: is the primary there?")
    assert one_error(litefs(node, "sync", "app.db")).startswith("app.db is at 1a2bb, 1 transaction behind")
    node.answers["GET /sync"] = (404, "database not found")
    assert one_error(litefs(node, "sync", "app.db")) == 'database not found: "app.db"'
    asked = len(node.asked)
    for args in (["-txid", "xyz"], ["-txid", "1" * 17], ["-timeout", "10"], ["-timeout", "0"], ["-timeout", "-1s"]):
        assert args[0] in one_error(litefs(node, "sync", "app.db", *args), 2)
    assert len(node.asked) == asked


# --- status ----------------------------------------------------------------------------------------------------------


def shown(width: int = 80, **changes: Any) -> str:
    """What `litefs status` prints for a node of the cluster."""
    text = printed(render(PRIMARY | {"cluster": cluster(**changes)}), width)
    assert max(len(line) for line in text.splitlines()) <= width
    return text


def row(text: str, name: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.startswith(name))


def test_status_shows_every_member() -> None:
    text = shown()
    assert row(text, "lease") == ["lease", "etcd", "at", "http://10.0.0.5:2379", "epoch", "7"]
    assert row(text, "member") == ["member", "role", "epoch", "state", "behind", "lag"]
    assert row(text, "db1") == ["db1", "*", "primary", "7"]
    assert row(text, "db2") == ["db2", "replica", "7", "live", "0", "tx", "0.81", "ms"]
    assert "paused" not in text and "problem" not in text and "in sync" not in text
    assert "10.0.0.12:49152" not in text  # the table of connections is not shown beside it


def test_status_of_a_cluster_with_everything() -> None:
    members = [
        member("db2", inSync=False, lagTXIDs=1234, lagMs=3100, state="catch-up", tags={"zone": "b", "disk": "[ssd]"}),
        member("db3", candidate=False, priority=5, seenSeconds=75.2, positions={}, lagMs=None, lagTXIDs=None, state=""),
        member("db1", role="primary", state="", lagTXIDs=None, lagMs=None),
    ]
    text = shown(
        here="db2", primary=None, members=members, paused=True, sync=2, inSync=[IDS["db3"]], problem="etcd is away"
    )
    assert "paused" in text and "litefs resume" in text
    assert "commits wait for 2 replicas" in text and "in sync: db3" in text
    assert "etcd is away" in text
    order = [line.split()[0] for line in text.splitlines() if line.startswith(tuple(IDS))]
    assert order == ["db1", "db2", "db3"]  # the primary first
    wide = shown(200, here="db2", primary=None, members=members, sync=2, inSync=[])
    assert row(wide, "db2")[:9] == ["db2", "*", "replica", "7", "catch-up", "1,234", "tx", "3.1", "s"]
    assert row(wide, "db2")[9:] == ["no", "disk=[ssd],", "zone=b"]
    assert "not heard of for 1 m 15 s, no candidate, priority 5" in wide
    assert "in sync: none" in wide


def test_a_node_that_is_away_is_shown_as_such() -> None:
    away = member("db2", state="away", seenSeconds=75.2, positions={}, lagMs=None, lagTXIDs=None)
    members = [member("db1", role="primary", state="", lagTXIDs=None, lagMs=None), away]
    text = shown(200, members=members, sync=1, inSync=[IDS["db2"]])
    assert " ".join(row(text, "db2")) == "db2 replica away yes not heard of for 1 m 15 s"
    assert "in sync: db2 (away)" in text


def test_commits_that_wait_for_replicas_are_told_of() -> None:
    waiting = {"count": 3, "seconds": 12.345, "reason": "0 of 1 replicas connected (replication.sync: 1)"}
    text = shown(sync=1, inSync=[], commitsWait=waiting)
    assert " ".join(row(text, "waiting")) == (
        "waiting 3 commits wait for replicas since 12 s: 0 of 1 replicas connected"
    ) and "(replication.sync: 1)" in text
    assert "waiting" not in shown(sync=1, inSync=[IDS["db2"]])
    unknown = row(shown(sync=1), "sync")  # who is in sync
    assert " ".join(unknown) == "sync FULL commits wait for 1 replica"


def test_nodes_with_the_same_name_are_told_apart() -> None:
    names = cluster_view.short_names([member("db1"), member("db2", hostname="db1"), member("db3", hostname="")])
    assert list(names.values()) == ["db1 11114567", "db1 22224567", "22334567"]


def test_a_primary_that_is_in_no_list_is_a_member_too() -> None:
    document = cluster()
    document["members"] = [one for one in document["members"] if one["hostname"] != "db1"]
    assert [one["hostname"] for one in cluster_view.members_of(document)] == ["db2", "db3", "db1"]
    assert cluster_view.node_of(document)["hostname"] == "db1"
    assert cluster_view.node_of(document | {"nodeID": "FFFF"}) == {"nodeID": "FFFF", "hostname": "", "url": ""}


def test_one_problem_is_told_once() -> None:
    document = PRIMARY | {"cluster": cluster(problem="etcd is away")}
    document["node"] = PRIMARY["node"] | {"problem": "etcd is away"}
    assert printed(render(document)).count("etcd is away") == 1


def test_a_static_lease_shows_no_epochs() -> None:
    """They are times, of ten digits, and nobody decides by them."""
    text = shown(engine="static")
    assert "epoch" not in text and "the configuration names the primary" in text
    assert row(text, "member") == ["member", "role", "state", "behind", "lag"]


def test_a_static_node_alone_shows_its_connections() -> None:
    text = printed(render(PRIMARY | {"cluster": cluster(members=[], engine="static")}))
    assert "10.0.0.12:49152" in text and "static" in text and "member" not in text


# --- run -promote ----------------------------------------------------------------------------------------------------


def test_run_promote_waits_until_the_node_is_the_primary(node: FakeNode, tmp_path: Path) -> None:
    is_primary = iter([False, False, False, True])
    node.answers["GET /info"] = lambda: (200, {"isPrimary": next(is_primary), "candidate": True})
    node.answers["POST /promote"] = (200, "ok")
    result = litefs(node, "run", "-promote", "--", "touch", str(tmp_path / "ran"))
    assert (result.exit_code, result.stderr, (tmp_path / "ran").exists()) == (0, "", True)
    assert node.asked == ["GET /info", "POST /promote", "GET /info", "GET /info", "GET /info"]


def test_run_promote_on_the_primary_asks_for_nothing(node: FakeNode) -> None:
    node.answers["GET /info"] = (200, {"isPrimary": True, "candidate": True})
    assert litefs(node, "run", "-promote", "--", "true").exit_code == 0
    assert node.changes == []


def test_run_promote_that_is_refused_runs_nothing(node: FakeNode, tmp_path: Path) -> None:
    node.answers["GET /info"] = (200, {"isPrimary": False, "candidate": False, "primary": {"hostname": "db2"}})
    node.answers["POST /promote"] = (409, "lease.candidate is false here")
    result = litefs(node, "run", "-promote", "--", "touch", str(tmp_path / "ran"))
    assert one_error(result) == "cannot promote this node: lease.candidate is false here (the primary is db2)"
    assert not (tmp_path / "ran").exists()
    assert litefs(node, "run", "-promote", "-if-candidate", "--", "touch", str(tmp_path / "ran")).exit_code == 0
    assert not (tmp_path / "ran").exists()
