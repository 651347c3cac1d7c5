"""Holds back what this host sends: `delaying.py ADDRESS NETWORK DELAY_MS JITTER_MS`, until its standard input ends.

The route to NETWORK is led through a device of its own here, whose packets are sent on, in their order, by the host's
real device when their time has come. Says "ready" when it does. Standard library only.
"""

from __future__ import annotations

import fcntl
import os
import random
import select
import socket
import struct
import subprocess
import sys
import time
from collections import deque

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
DEVICE, REAL = "slow0", "eth0"
LARGEST = 65536


def open_device() -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
    return fd


def main() -> None:
    address, network, *times = sys.argv[1:]
    delay_s, jitter_s = (float(text) / 1000 for text in times)
    device = open_device()
    sender = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, REAL.encode())
    subprocess.run(["ip", "link", "set", DEVICE, "up"], check=True)
    subprocess.run(["ip", "route", "add", network, "dev", DEVICE, "src", address], check=True)
    print("ready", flush=True)
    waiting: deque[tuple[float, bytes]] = deque()
    while True:
        timeout_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        readable = select.select([device, sys.stdin], [], [], timeout_s)[0]
        if sys.stdin in readable:
            return
        now_s = time.monotonic()
        if device in readable:
            due_s = now_s + max(0.0, delay_s + random.uniform(-jitter_s, jitter_s))
            waiting.append((max(due_s, waiting[-1][0] if waiting else 0.0), os.read(device, LARGEST)))
        while waiting and waiting[0][0] <= now_s:
            packet = waiting.popleft()[1]
            try:
                sender.sendto(packet, (socket.inet_ntoa(packet[16:20]), 0))
            except OSError:
                pass  # lost, as packets may be


if __name__ == "__main__":
    main()
