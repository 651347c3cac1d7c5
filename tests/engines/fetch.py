"""The real lease engines that the tests run against: `python tests/engines/fetch.py etcd consul` prints where they are.

A program that is installed is used. Otherwise the package is downloaded from Debian's archive by the machine's own apt
(its mirror, its proxy, its keys) and unpacked into `bin` beside this file; nothing is installed and no daemon started.

    etcd     package etcd-server of this machine's release
    consul   package consul 1.8 of Debian 11, the last release that has one; the mirror is one that apt knows already
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
BIN = HERE / "bin"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
PACKAGES = {"etcd": ("etcd-server", ""), "consul": ("consul", "bullseye")}  # program: package, release ("" is ours)


class CannotFetch(Exception):
    """The text says why."""


def obtain(program: str) -> str:
    """The path of the program. CannotFetch if it cannot be had here."""
    installed = shutil.which(program)
    if installed:
        return installed
    BIN.mkdir(exist_ok=True)
    with open(BIN / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (BIN / program).exists():
            _unpack(program)
    return str(BIN / program)


def _unpack(program: str) -> None:
    package, release = PACKAGES[program]
    for tool in ("apt-get", "dpkg-deb"):
        if not shutil.which(tool):
            raise CannotFetch(f"{program} is not installed, and there is no {tool} to get {package} with")
    with tempfile.TemporaryDirectory(dir=BIN) as name:
        scratch = Path(name)
        options = _private_apt(scratch, release)
        _run(["apt-get", *options, "update"], scratch)
        _run(["apt-get", *options, "download", package], scratch)
        (archive,) = scratch.glob("*.deb")
        _run(["dpkg-deb", "-x", str(archive), "unpacked"], scratch)
        os.rename(scratch / "unpacked" / "usr" / "bin" / program, BIN / program)


def _private_apt(scratch: Path, release: str) -> list[str]:
    """Options that make apt-get keep lists and archives in `scratch`, so that it needs no privileges."""
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (scratch / folder).mkdir(parents=True)
    options = [f"Dir::State={scratch}/state", f"Dir::Cache={scratch}/cache", "Acquire::Retries=2"]
    if os.geteuid() == 0:
        options.append("APT::Sandbox::User=root")
    if release:
        mirror = _mirror([]) or _mirror(_words(options), update=True)
        if not mirror:
            raise CannotFetch("apt knows no Debian archive, so Debian 11 cannot be found")
        source = scratch / "release.list"
        source.write_text(f"deb [signed-by={KEYRING}] {mirror} {release} main\n")
        options += [f"Dir::Etc::sourcelist={source}", "Dir::Etc::sourceparts=-", "Acquire::Check-Valid-Until=false"]
    return _words(options)


def _words(options: list[str]) -> list[str]:
    return [part for option in options for part in ("-o", option)]


def _mirror(options: list[str], *, update: bool = False) -> str:
    """The address of a Debian archive that this machine's apt uses, "" if it knows none. What an address is of, apt
    knows once it has fetched its lists, which container images do without: `update`."""
    if update:
        _run(["apt-get", *options, "update"], HERE)
    form = "$(ORIGIN)|$(LABEL)|$(SITE)"
    targets = _run(["apt-get", *options, "indextargets", "--format", form, "Created-By: Packages"], HERE)
    for line in sorted(set(targets.splitlines())):
        origin, label, site = line.split("|", 2)
        if origin == "Debian" and label == "Debian":
            return site
    return ""


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise CannotFetch(f"{command[0]} failed: {lines[-1] if lines else done.returncode}")
    return done.stdout


def main() -> int:
    try:
        for program in sys.argv[1:] or PACKAGES:
            print(obtain(program))
    except (CannotFetch, OSError, subprocess.TimeoutExpired) as error:
        print(f"fetch: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
