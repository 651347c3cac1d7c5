"""The command line's client, and the verbs that use it, against a real server on a thread."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fake_store import FakeStore, make_database, node_info

from pylitefs import errors
from pylitefs.http.client import Client, Refused, Unreachable
from pylitefs.http.server import HttpServer, build_app, listen


@dataclass(frozen=True)
class HttpSettings:
    max_import_size_bytes: int = 0


@contextlib.contextmanager
def serving(store: FakeStore, *, candidate: bool = True) -> Iterator[str]:
    """The URL of a node whose server runs on a thread."""
    sock = listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    started, stop = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        node = node_info(candidate=candidate)
        app = build_app(store, store.list_replicas, HttpSettings(), node, store.import_database)
        server = HttpServer(app, shutdown_timeout_s=1)
        await server.start(sock)
        started.set()
        await stop.wait()
        await server.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert started.wait(30)
        yield f"http://127.0.0.1:{port}"
    finally:
        loops[0].call_soon_threadsafe(stop.set)
        thread.join()


@contextlib.contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """The URL of something that is not a node: it sends `answer` to whoever connects, then closes."""
    with socket.create_server(("127.0.0.1", 0)) as sock:

        def serve() -> None:
            connection, _ = sock.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        thread.join()


def litefs(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pylitefs", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def store(tmp_path: Path) -> FakeStore:
    data = tmp_path / "data"
    data.mkdir()
    return FakeStore(data)


# --- the client ------------------------------------------------------------------------------------------------------


def test_export_and_import_round_trip(store: FakeStore, tmp_path: Path) -> None:
    database = store.add("app.db", rows=5000)
    copy = tmp_path / "copy"
    with serving(store) as url:
        client = Client(url)
        with open(copy, "wb") as target:
            assert client.export("app.db", target) == database.size_bytes
        with open(copy, "rb") as source:
            client.import_("other.db", source)
        assert client.info()["databases"].keys() == {"app.db", "other.db"}
        assert {entry["name"] for entry in client.status()["databases"]} == {"app.db", "other.db"}
    assert store.imported["other.db"] == copy.read_bytes() == database.path.read_bytes()


def test_what_the_node_says_reaches_the_user(store: FakeStore, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("no database " * 1000)
    with serving(store) as url, open(text, "rb") as file, open(os.devnull, "wb") as nowhere:
        with pytest.raises(errors.DatabaseNotFound, match='database not found: "nope"'):
            Client(url).export("nope", nowhere)
        with pytest.raises(Refused, match="not a SQLite database") as refusal:
            Client(url).import_("app.db", file)
        assert refusal.value.status == 400


def test_a_refusal_before_the_end_of_the_body_is_understood(store: FakeStore, tmp_path: Path) -> None:
    big = tmp_path / "big"
    with open(big, "wb") as file:
        file.truncate(64 << 20)  # more than the sockets buffer
    store.is_primary = False
    with serving(store) as url, open(big, "rb") as file, pytest.raises(Refused, match="replica"):
        Client(url).import_("app.db", file)


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    with pytest.raises(Unreachable, match=r"is it running\? \(start it with: litefs mount"):
        Client(url).info()


def test_somebody_listens_but_never_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        with pytest.raises(Unreachable, match="did not answer within"):
            Client(url, timeout_s=0.2).info()


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n",
        b"",
    ],
)
def test_somebody_else_answers(answer: bytes) -> None:
    with answering(answer) as url, pytest.raises(errors.LitefsError) as error:
        Client(url).info()
    assert url in str(error.value)
    assert "\n" not in str(error.value)


def test_an_export_that_breaks_off_is_an_error(tmp_path: Path) -> None:
    with (
        answering(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf") as url,
        open(tmp_path / "x", "wb") as file,
        pytest.raises(Unreachable, match=r"stopped sending after 4 of 100|lost the connection"),
    ):
        Client(url).export("app.db", file)


@pytest.mark.parametrize(
    "url", ["", "localhost:20202", "ftp://x", "http://", "http://x:0", "http://x:99999", "http://["]
)
def test_what_is_not_a_url(url: str) -> None:
    with pytest.raises(errors.UsageError):
        Client(url)


# --- the verbs -------------------------------------------------------------------------------------------------------


def test_export_verb(store: FakeStore, tmp_path: Path) -> None:
    database = store.add("app.db")
    target = tmp_path / "copy.db"
    target.write_text("an older database")
    with serving(store) as url:
        done = litefs("export", "-url", url, "-name", "app.db", str(target))
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith('Export of database "app.db" in ')
        failed = litefs("export", "-url", url, "-name", "nope", str(tmp_path / "other"))
    assert target.read_bytes() == database.path.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.db", "data"]
    assert (failed.returncode, failed.stderr) == (1, 'ERROR: database not found: "nope"\n')


@pytest.mark.parametrize("suffix", ["-wal", "-journal"])
def test_an_export_removes_no_wal(store: FakeStore, tmp_path: Path, suffix: str) -> None:
    """It may have a transaction that was acknowledged."""
    store.add("app.db")
    target, side = tmp_path / "copy.db", tmp_path / f"copy.db{suffix}"
    target.write_text("old")
    side.write_text("of the old one")
    with serving(store) as url:
        refused = litefs("export", "-url", url, "-name", "app.db", str(target))
    assert refused.returncode == 2 and str(side) in refused.stderr, refused.stderr
    assert (target.read_text(), side.read_text()) == ("old", "of the old one")
    assert not (tmp_path / "copy.db.tmp").exists()


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_an_export_replaces_no_database_that_is_open(store: FakeStore, tmp_path: Path, mode: str) -> None:
    """Whoever has it open would go on in a file without a name."""
    store.add("app.db")
    target = tmp_path / "mine.db"
    with contextlib.closing(sqlite3.connect(target, isolation_level=None)) as mine:
        mine.execute(f"pragma journal_mode={mode}")
        mine.execute("create table t (x)")
        with serving(store) as url:
            refused = litefs("export", "-url", url, "-name", "app.db", str(target))
            assert refused.returncode == 2, refused.stderr
        mine.execute("insert into t values (1)")
    with contextlib.closing(sqlite3.connect(target)) as mine:
        assert mine.execute("select x from t").fetchall() == [(1,)]


def test_a_failed_export_leaves_the_old_file(store: FakeStore, tmp_path: Path) -> None:
    target = tmp_path / "copy.db"
    target.write_text("old")
    with serving(store) as url:
        assert litefs("export", "-url", url, "-name", "nope", str(target)).returncode == 1
    assert target.read_text() == "old"
    assert litefs("export", str(target)).returncode == 2


def test_import_verb(store: FakeStore, tmp_path: Path) -> None:
    source, text = tmp_path / "new.db", tmp_path / "text"
    make_database(source, rows=500)
    text.write_text("no database")
    with serving(store) as url:
        done = litefs("import", "-url", url, "-name", "app.db", str(source))
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith('Import of database "app.db" in ')
        refused = litefs("import", "-url", url, "-name", "app.db", str(text))
        missing = litefs("import", "-url", url, "-name", "app.db", str(tmp_path / "missing"))
    assert store.imported["app.db"] == source.read_bytes()
    assert refused.returncode == 1
    assert refused.stderr.startswith("ERROR: ") and refused.stderr.count("\n") == 1
    assert missing.returncode == 1
    assert "missing" in missing.stderr and missing.stderr.count("\n") == 1


def test_import_takes_along_what_is_in_the_wal(store: FakeStore, tmp_path: Path) -> None:
    source = tmp_path / "live.db"
    with contextlib.closing(sqlite3.connect(source)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE t (x)")
        connection.execute("INSERT INTO t VALUES (42)")
        connection.commit()
        assert (tmp_path / "live.db-wal").stat().st_size > 0
        with serving(store) as url:
            assert litefs("import", "-url", url, "-name", "app.db", str(source)).returncode == 0
    with contextlib.closing(sqlite3.connect(Path(store.data_dir) / "app.db")) as connection:
        assert connection.execute("SELECT x FROM t").fetchall() == [(42,)]


def test_status_verb(store: FakeStore) -> None:
    store.add("app.db")
    with serving(store) as url:
        shown = litefs("status", "-url", url)
        document = litefs("status", "-url", url, "-json")
    assert shown.returncode == 0
    assert "app.db" in shown.stdout and "\x1b" not in shown.stdout
    assert json.loads(document.stdout)["databases"][0]["txid"] == "0000000000000001"
    gone = litefs("status", "-url", url)
    assert gone.returncode == 1
    assert "is it running?" in gone.stderr


@pytest.mark.usefixtures("interruptible")
def test_status_watch_ends_with_ctrl_c(store: FakeStore) -> None:
    with serving(store) as url:
        command = [sys.executable, "-m", "pylitefs", "status", "-url", url, "-json", "-watch"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            first, second = process.stdout.readline(), process.stdout.readline()
            process.send_signal(2)
            process.stdout.read()
            assert process.wait(30) == 0
    assert json.loads(first)["node"] and json.loads(second)["node"]


@pytest.mark.parametrize(
    ("is_primary", "candidate", "arguments", "status", "ran"),
    [
        (True, True, [], 0, True),
        (True, True, ["-promote"], 0, True),
        (False, False, ["-promote"], 1, False),
        (False, False, ["-if-candidate"], 0, False),
        (False, False, [], 0, True),
        (True, True, ["-with-halt-lock-on", "/no/such/app.db"], 1, False),
        (True, True, ["-promote", "-with-halt-lock-on", "/no/such/app.db"], 2, False),
    ],
)
def test_run_verb(
    tmp_path: Path, is_primary: bool, candidate: bool, arguments: list[str], status: int, ran: bool
) -> None:
    store = FakeStore(tmp_path, is_primary=is_primary)
    marker = tmp_path / "ran"
    with serving(store, candidate=candidate) as url:
        done = litefs("run", "-url", url, *arguments, "--", "touch", str(marker))
    assert (done.returncode, marker.exists()) == (status, ran)
    assert done.stderr.count("\n") == (0 if ran else 1)
    if arguments == ["-promote"] and not is_primary:
        assert "cannot promote this node: " in done.stderr and "the primary is db1" in done.stderr


def test_run_exits_1_whatever_the_childs_status() -> None:
    failed = litefs("run", "--", "sh", "-c", "exit 7")
    assert (failed.returncode, failed.stderr) == (1, "ERROR: sh exited with status 7\n")
    assert litefs("run", "--", "/does/not/exist").returncode == 1
    assert litefs("run").returncode == 2
