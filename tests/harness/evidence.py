"""What is known of an acknowledged commit that a test finds missing. It may happen once in a thousand runs, and the
folders of a test do not stay for long, so all of it is part of the failure's text."""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Iterable
from pathlib import Path

from harness.nodes import Member
from pylitefs.engine.files import file_chunks
from pylitefs.errors import FormatError
from pylitefs.formats.ltx.decoder import verify_stream

_LOST = re.compile(r"^LOST ([^:]+): .* acknowledged by \S+ at ([\d.]+) s", re.MULTILINE)
_BEFORE_S, _AFTER_S = 3.0, 10.0  # the part of a node's log that is shown
_LINES = 150  # of one node


def of_lost(problems: Iterable[str], members: Iterable[Member]) -> list[str]:
    """The nodes' logs around the first acknowledgement that is missing, and what their disks held after a power cut."""
    found = _LOST.search("\n".join(problems))
    if found is None:
        return []
    name, at_s = found[1], float(found[2])
    at = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=time.monotonic() - at_s)
    shown = [f"evidence for {name}, acknowledged at {at.isoformat()}:"]
    for member in members:
        cuts = [f"{cut_s - at_s:+.3f} s" for cut_s in member.cut_s]
        kills = [f"{kill_s - at_s:+.3f} s" for kill_s in member.killed_s]
        shown.append(f"{member.name}: killed {', '.join(kills) or 'never'}, cut off {', '.join(cuts) or 'never'}")
        shown += [f"  after a cut: {line}" for line in member.after_cut if line.startswith(f"{name}/")]
        shown += [f"  {line}" for line in _around(member.log_text(), at)]
    return shown


def logs_on_disk(data: Path) -> list[str]:
    """The entries of all logs in a data directory, also those that have no final name: a line for each file that has
    anything in it."""
    files = [path for path in sorted(data.glob("dbs/*/ltx/*")) if path.stat().st_size]
    return [f"{path.parents[1].name}/{path.name}: {_described(path)}" for path in files]


def _described(path: Path) -> str:
    if path.suffix not in (".ltx", ".next", ".tmp"):
        return f"{path.stat().st_size} bytes"
    try:
        header, trailer = verify_stream(file_chunks(str(path)))
    except (FormatError, OSError) as error:
        return f"{path.stat().st_size} bytes, {error}"
    sums = f"{header.pre_apply_checksum:016x} to {trailer.post_apply_checksum:016x}"
    return f"transactions {header.min_txid} to {header.max_txid} of epoch {header.epoch}, {sums}"


def _around(log: str, at: datetime.datetime) -> list[str]:
    ends = (at + datetime.timedelta(seconds=seconds) for seconds in (-_BEFORE_S, _AFTER_S))
    first, last = (end.strftime("%Y-%m-%dT%H:%M:%S") for end in ends)
    lines = [line for line in log.split("\n") if first <= line.removeprefix("time=")[: len(first)] <= last]
    return lines if len(lines) <= _LINES else [*lines[: _LINES // 2], "…", *lines[-_LINES // 2 :]]
