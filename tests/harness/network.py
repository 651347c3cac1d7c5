"""A network in namespaces of its own: hosts on one bridge, and what can go wrong between them.

Every namespace belongs to a process that does nothing and ends when our end of its pipe is closed, so that nothing
remains, also when the test is killed. Nothing is changed in the namespace we are in.

`cut` and `cut_one_way` drop packets on the bridge, without a word to either side. `lose` drops a share of them at
random there. `delay` holds them back on the host that sends them, by a small program (`delaying.py`): not every kernel
has `sch_netem`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import pytest

from engines.services import Place

DELAYING = Path(__file__).with_name("delaying.py")
_NETWORK = "10.213.47"  # up to 126 hosts
_RULES = """\
table bridge faults {
    set cut { type ifname . ifname; }
    set lossy { type ifname; }
    chain forward {
        type filter hook forward priority 0; policy accept;
        iifname . oifname @cut drop
        iifname @lossy numgen random mod 1000 < SHARE drop
        oifname @lossy numgen random mod 1000 < SHARE drop
    }
}
"""


class NetworkError(Exception):
    """A command failed; the text is what it said."""


class Network:
    """A context. Hosts are made by name, and are reached at their `Place`."""

    def __init__(self) -> None:
        missing = [name for name in ("ip", "nft", "unshare", "nsenter") if shutil.which(name) is None]
        if missing:
            pytest.skip(
                f"{', '.join(missing)} missing: as root on Debian: apt-get install iproute2 nftables util-linux"
            )
        self._holders: list[subprocess.Popen[bytes]] = []
        self.places: dict[str, Place] = {}
        self._delaying: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Network:
        try:
            self._bridge = self._namespace()
            self._run("ip", "link", "add", "name", "bridge0", "type", "bridge", "forward_delay", "0")
            self._run("ip", "link", "set", "bridge0", "up")
            self._rules(0)
        except NetworkError as error:
            self.close()
            pytest.skip(f"this machine allows no such network: {error}")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for name in list(self._delaying):
            self._end_delay(name)
        for holder in self._holders:
            assert holder.stdin is not None
            holder.stdin.close()
        for holder in self._holders:
            holder.wait()
        self._holders.clear()

    def host(self, name: str) -> Place:
        """A new one, reachable from all others."""
        holder = self._namespace()
        address = f"{_NETWORK}.{len(self.places) + 1}"
        place = self.places[name] = Place(address, holder)
        self._run("ip", "link", "add", "name", name, "type", "veth", "peer", "name", "eth0", "netns", str(holder))
        self._run("ip", "link", "set", name, "master", "bridge0", "up")
        for words in (
            ["link", "set", "lo", "up"],
            ["address", "add", f"{address}/24", "dev", "eth0"],
            ["link", "set", "eth0", "up"],
        ):
            self._run("ip", *words, holder=holder)
        return place

    # -- faults

    def cut(self, one: Iterable[str], others: Iterable[str]) -> None:
        """Nothing passes between any of `one` and any of `others`, either way."""
        others = list(others)
        for name in one:
            for other in others:
                if name != other:
                    self.cut_one_way(name, other)
                    self.cut_one_way(other, name)

    def cut_one_way(self, sender: str, receiver: str) -> None:
        """What `sender` sends does not arrive at `receiver`."""
        self._run("nft", "add", "element", "bridge", "faults", "cut", f"{{ {sender} . {receiver} }}")

    def isolate(self, name: str) -> None:
        self.cut([name], self.places)

    def lose(self, names: Iterable[str], percent: int) -> None:
        """This share of what these hosts send, and of what is sent to them, does not arrive."""
        names = list(names)
        self._rules(percent)
        if names:
            self._run("nft", "add", "element", "bridge", "faults", "lossy", f"{{ {', '.join(names)} }}")

    def delay(self, names: Iterable[str], delay_ms: int, jitter_ms: int = 0) -> None:
        """What these hosts send takes longer."""
        for name in names:
            if name in self._delaying:
                self._end_delay(name)
            place = self.places[name]
            words = [sys.executable, "-I", "-S", str(DELAYING), place.address, f"{_NETWORK}.0/25"]
            self._delaying[name] = process = subprocess.Popen(
                place.words([*words, str(delay_ms), str(jitter_ms)]),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
            assert process.stdout is not None and process.stderr is not None
            if process.stdout.readline() != b"ready\n":
                raise NetworkError(process.stderr.read().decode().strip())

    def _end_delay(self, name: str) -> None:
        """Its route goes with its device, and that with its process."""
        process = self._delaying.pop(name)
        process.communicate()

    def heal(self) -> None:
        """Everything arrives again, at once."""
        self._rules(0)
        for name in list(self._delaying):
            self._end_delay(name)

    # -- namespaces

    def _namespace(self) -> int:
        """A new one: the id of its process."""
        holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo made; exec cat >/dev/null"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._holders.append(holder)
        assert holder.stdout is not None and holder.stderr is not None
        if holder.stdout.readline() != b"made\n":
            raise NetworkError(holder.stderr.read().decode().strip())
        return holder.pid

    def _run(self, *words: str, holder: int | None = None, text: str = "") -> None:
        place = Place("", holder or self._bridge)
        done = subprocess.run(place.words(list(words)), input=text, capture_output=True, text=True, timeout=20)
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            raise NetworkError(f"{' '.join(words)}: {said[0] if said else done.returncode}")

    def _rules(self, percent: int) -> None:
        """Set the rules, with no faults, but what is lossy loses so much from now on."""
        share = min(10 * percent, 999)  # of 1000: nft takes no more
        rules = f"add table bridge faults\ndelete table bridge faults\n{_RULES.replace('SHARE', str(share))}"
        self._run("nft", "-f", "-", text=rules)
