"""Ports for servers that tests start. Each pytest process takes them from a range of its own, and none of them twice:
between the moment a port is found free and the one its server listens, nobody else takes it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from pathlib import Path

_FIRST = 10_000
_SHARES = 16  # more processes than that share


def _share() -> tuple[int, int]:
    """The first port and the number of them: below the range from which the kernel takes ports for outgoing
    connections, by the number of pytest's worker; 0 is for a process that is no worker."""
    words = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    size = (max(int(words[0]), _FIRST + 1000) - _FIRST) // _SHARES
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    number = int(worker[2:]) + 1 if worker.startswith("gw") and worker[2:].isdecimal() else 0
    return _FIRST + number % _SHARES * size, size


_offsets = itertools.count(int.from_bytes(os.urandom(4), "big"))  # other runs of pytest begin elsewhere


def free_port(address: str = "127.0.0.1") -> int:
    """A port of `address` that nobody listens on."""
    first, size = _share()
    for offset in itertools.islice(_offsets, size):
        port = first + offset % size
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
            return port
    raise RuntimeError("no free port")
