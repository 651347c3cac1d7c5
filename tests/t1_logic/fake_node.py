"""A node's HTTP API with answers made up by a test, on a real socket, for the command line's commands."""

from __future__ import annotations

import contextlib
import copy
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Json = dict[str, Any]
IDS = {"db1": "1111456789ABCDEF", "db2": "2222456789ABCDEF", "db3": "2233456789ABCDEF"}


def member(name: str, **changes: Any) -> Json:
    """A member of `/cluster`."""
    document = {
        "nodeID": IDS[name],
        "hostname": name,
        "url": f"http://{name}:20202",
        "role": "replica",
        "state": "live",
        "candidate": True,
        "priority": 0,
        "tags": {},
        "positions": {"app.db": {"epoch": 7, "txid": "000000000001a2bc"}},
        "lagMs": 0.81,
        "lagTXIDs": 0,
        "inSync": True,
        "seenSeconds": 0.0,
    }
    assert changes.keys() <= document.keys()
    return document | changes


def cluster(primary: str | None = "db1", here: str = "db1", **changes: Any) -> Json:
    """The document of `/cluster` with three members."""
    members = [
        member(name, **({"role": "primary", "state": "", "lagMs": None, "lagTXIDs": None} if name == primary else {}))
        for name in IDS
    ]
    document = {
        "nodeID": IDS[here],
        "isPrimary": here == primary,
        "clusterID": "LFSC0123456789ABCDEF",
        "epoch": 7,
        "primary": next((one for one in members if one["hostname"] == primary), None),
        "members": members,
        "paused": False,
        "sync": 0,
        "inSync": None,
        "commitsWait": None,
        "history": [
            {
                "epoch": epoch,
                "nodeID": IDS[name],
                "hostname": name,
                "txid": f"{epoch * 16:016x}",
                "reason": reason,
                "time": f"2026-01-0{epoch}T03:04:05.678Z",
            }
            for epoch, name, reason in [(6, "db2", "first primary"), (7, "db1", "db2 [lease] expired")]
        ],
        "engine": "etcd at http://10.0.0.5:2379",
        "problem": "",
    }
    assert changes.keys() <= document.keys()
    return copy.deepcopy(document | changes)


class FakeNode:
    """`answers` by "METHOD PATH": a status and a document or a line; a function makes it when it is asked for.
    `asked` has every request, with its query."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, Json | str] | Callable[[], tuple[int, Json | str]]] = {}
        self.headers: dict[str, str] = {"Litefs-Id": IDS["db1"]}
        self.asked: list[str] = []
        self.url = ""

    def answer(self, method: str, target: str) -> tuple[int, bytes]:
        self.asked.append(f"{method} {target}")
        found = self.answers.get(f"{method} {target.partition('?')[0]}", (404, "Not Found"))
        status, body = found() if callable(found) else found
        return status, (body + "\n" if isinstance(body, str) else json.dumps(body)).encode()

    @property
    def changes(self) -> list[str]:
        """What was asked but for looking."""
        return [request for request in self.asked if not request.startswith("GET ")]


@contextlib.contextmanager
def fake_node() -> Iterator[FakeNode]:
    node = FakeNode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply("GET")

        def do_POST(self) -> None:
            self.reply("POST")

        def reply(self, method: str) -> None:
            status, body = node.answer(method, self.path)
            self.send_response(status)
            for name, value in node.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        node.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield node
        finally:
            server.shutdown()
            thread.join()
