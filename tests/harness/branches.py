"""What was kept in `lost/`: the values of the clients in branches that the cluster did not go on with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from pylitefs.engine.lost import branches
from pylitefs.formats.ltx.decoder import Reader

END = b"."  # of every value, see client.py


COPIES = {"tip.db", "base.db"}  # for people: the transactions must be there without them


def lost_files(data: Path, db: str) -> list[Path]:
    found = (path for path in data.glob(f"dbs/{db}/lost/**/*") if path.is_file())
    return sorted(path for path in found if path.name not in COPIES)


def lost_values(nodes: Iterable[Path], db: str, values: Iterable[str]) -> frozenset[str]:
    """Which of `values` stand in a branch that one of the nodes (by data directories) has kept. A branch has whole
    pages, so what stands on the same page without being lost is found too."""
    text = b"\n".join(chunk for data in nodes for path in lost_files(data, db) for chunk in _contents(path))
    return frozenset(value for value in values if value.encode() in text) if text else frozenset()


def branch_epochs(nodes: Iterable[Path], db: str, values: Iterable[str]) -> dict[str, int]:
    """The epoch of the branch in which a value is kept, the lowest if it is in several: by then it had been written."""
    values, found = list(values), dict[str, int]()
    kept = [branch for data in nodes for branch in branches(str(data), db) if branch.epoch]
    for branch in sorted(kept, key=lambda branch: -branch.epoch):
        files = [path for path in Path(branch.folder).rglob("*") if path.is_file() and path.name not in COPIES]
        text = b"\n".join(chunk for path in files for chunk in _contents(path))
        found |= {value: branch.epoch for value in values if value.encode() in text}
    return found


def _contents(path: Path) -> Iterator[bytes]:
    if path.suffix != ".ltx" and path.name != "pages":  # which is one, too: in its compressed pages nothing is found
        yield path.read_bytes()
        return
    with open(path, "rb") as file:
        for _, page in Reader(iter(lambda: file.read(1 << 16), b"")):
            yield bytes(page)
