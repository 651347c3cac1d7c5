"""Telling systemd how the service is (`Type=notify`): sd_notify(3) without its library."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


def notify(state: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Send `state` ("READY=1", "STOPPING=1", "STATUS=...") to the service manager.

    False when there is none (NOTIFY_SOCKET is unset) or it cannot be reached; never an error, for the service does not
    depend on it. Lines of a state are separated by newlines.
    """
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]  # an abstract socket
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.settimeout(1)
            sock.sendto(state.encode(), address)
    except OSError:
        return False
    return True
