"""The log: the chain, torn tails, retention, pins, branches."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from pylitefs.engine import spares
from pylitefs.engine.ltx_log import EMPTY, LogEntry, LtxLog
from pylitefs.formats.ltx.checksum import page_checksum
from pylitefs.formats.ltx.encoder import encode
from pylitefs.formats.ltx.format import CHECKSUM_FLAG, Header, Position, file_name

PAGE = 512


class Chain:
    """Makes entries that follow one another: a database of one page, which every transaction replaces."""

    def __init__(self, folder: Path) -> None:
        self.log = LtxLog(str(folder))
        self.log.open(verify=True)
        self.positions = [EMPTY]

    def header(self, count: int = 1) -> Header:
        last = self.positions[-1]
        return Header(0, PAGE, 1, last.txid + 1, last.txid + count, 1_700_000_000_000, last.checksum)

    def add(self, count: int = 1, *, seed: int | None = None) -> LogEntry:
        header = self.header(count)
        page = random.Random(header.max_txid if seed is None else seed).randbytes(PAGE)
        checksum = page_checksum(1, page) | CHECKSUM_FLAG
        temporary = self.log.temporary()
        Path(temporary).write_bytes(encode(header, [(1, page)], checksum))
        entry = self.log.publish(temporary, header, checksum)
        self.positions.append(Position(header.max_txid, checksum))
        return entry


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path / "ltx")


def reopened(chain: Chain, *, verify: bool = True) -> tuple[LtxLog, list[str]]:
    log = LtxLog(chain.log.folder)
    return log, log.open(verify=verify)


def spans(log: LtxLog) -> list[tuple[int, int]]:
    return [(entry.min_txid, entry.max_txid) for entry in log.entries()]


@pytest.mark.parametrize("verify", [True, False])
def test_a_chain_is_found_again(chain: Chain, verify: bool) -> None:
    for count in (1, 3, 1, 20):
        chain.add(count)
    log, dropped = reopened(chain, verify=verify)
    assert dropped == []
    assert spans(log) == [(1, 1), (2, 4), (5, 5), (6, 25)]
    assert log.head == chain.positions[-1]
    assert log.size_bytes == sum(entry.size_bytes for entry in chain.log.entries()) == chain.log.size_bytes
    assert log.positions(2) == chain.positions[:-3:-1]


def test_an_empty_folder_is_an_empty_log(tmp_path: Path) -> None:
    log = LtxLog(str(tmp_path / "new" / "ltx"))
    assert log.open(verify=True) == []
    assert log.head == EMPTY and log.entries() == [] and log.first_txid == 0


def test_leftovers_are_removed(chain: Chain) -> None:
    chain.add()
    leftover = Path(chain.log.temporary())
    leftover.write_bytes(b"half a file")
    (Path(chain.log.folder) / "notes.txt").write_text("not ours")
    reopened(chain)
    assert not leftover.exists()
    assert (Path(chain.log.folder) / "notes.txt").exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "zeros", "flip", "tail gone"])
def test_a_torn_tail_is_dropped(chain: Chain, damage: str) -> None:
    for _ in range(4):
        entry = chain.add()
    path = Path(entry.path)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "empty":
        data = bytearray()
    elif damage == "zeros":
        data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    elif damage == "flip":
        data[len(data) // 2] ^= 1
    else:
        data = data[:-1]
    path.write_bytes(data)
    log, dropped = reopened(chain)
    assert dropped == [path.name]
    assert not path.exists()
    assert log.head == chain.positions[-2]
    assert spans(log) == [(1, 1), (2, 2), (3, 3)]


def test_a_torn_entry_in_the_middle_takes_those_after_it_along(chain: Chain) -> None:
    entries = [chain.add() for _ in range(5)]
    path = Path(entries[2].path)
    data = bytearray(path.read_bytes())
    data[120] ^= 0xFF
    path.write_bytes(data)
    log, dropped = reopened(chain)
    assert sorted(dropped) == sorted(os.path.basename(entry.path) for entry in entries[2:])
    assert log.head == chain.positions[2]


@pytest.mark.parametrize("verify", [True, False])
def test_what_lies_before_a_hole_is_dropped(chain: Chain, verify: bool) -> None:
    entries = [chain.add() for _ in range(6)]
    os.unlink(entries[2].path)
    log, dropped = reopened(chain, verify=verify)
    assert sorted(dropped) == [os.path.basename(entry.path) for entry in entries[:2]]
    assert spans(log) == [(4, 4), (5, 5), (6, 6)]
    assert log.head == chain.positions[-1]


def test_entries_of_two_branches_do_not_chain(chain: Chain, tmp_path: Path) -> None:
    """TXIDs that follow one another are not enough: the checksums must too."""
    chain.add()
    chain.add()
    other = Chain(tmp_path / "other")
    other.add(seed=100)
    other.add(seed=101)
    third = other.add(seed=102)
    os.rename(third.path, os.path.join(chain.log.folder, os.path.basename(third.path)))
    log, dropped = reopened(chain)
    assert spans(log) == [(3, 3)]
    assert len(dropped) == 2


def test_a_file_whose_name_lies_is_dropped(chain: Chain) -> None:
    chain.add()
    entry = chain.add()
    os.rename(entry.path, os.path.join(os.path.dirname(entry.path), file_name(3, 3)))
    log, dropped = reopened(chain)
    assert len(dropped) == 1
    assert log.head == chain.positions[1]


def test_queries(chain: Chain) -> None:
    for count in (1, 3, 2):
        chain.add(count)
    log = chain.log
    found = [None if (entry := log.covering(txid)) is None else entry.max_txid for txid in range(8)]
    assert found == [None, 1, 4, 4, 4, 6, 6, None]
    assert [txid for txid in range(8) if log.after(txid) is not None] == [0, 1, 4]
    assert all(log.reaches(position) for position in chain.positions)
    assert not log.reaches(Position(1, chain.positions[2].checksum))
    assert not log.reaches(Position(2, chain.positions[1].checksum))


def test_retention_by_time(chain: Chain) -> None:
    for age in (500, 400, 100, 50):
        entry = chain.add()
        os.utime(entry.path, (10_000 - age, 10_000 - age))
    chain.log.open(verify=False)
    assert chain.log.retain(200, 0, now_s=10_000) == 2
    assert spans(chain.log) == [(3, 3), (4, 4)]
    assert chain.log.retain(1, 0, now_s=10_000) == 1, "the newest one holds the position"
    log, dropped = reopened(chain)
    assert spans(log) == [(4, 4)] and dropped == [] and log.head == chain.positions[-1]


def test_retention_by_size(chain: Chain) -> None:
    entries = [chain.add() for _ in range(6)]
    limit = entries[-1].size_bytes + entries[-2].size_bytes
    assert chain.log.retain(0, limit) == 4
    assert spans(chain.log) == [(5, 5), (6, 6)]
    assert chain.log.size_bytes == limit
    assert chain.log.retain(0, 1) == 1
    assert not os.path.exists(entries[4].path) and os.path.exists(entries[5].path)


def test_no_limit_keeps_everything(chain: Chain) -> None:
    for _ in range(3):
        chain.add()
    assert chain.log.retain(0, 0, now_s=1e12) == 0


def test_a_pin_keeps_what_its_reader_still_needs(chain: Chain) -> None:
    for _ in range(6):
        chain.add()
    with chain.log.pin(3):
        assert chain.log.retain(0, 1) == 3
        assert chain.log.after(3) is not None
        assert chain.log.retain(0, 1) == 0
    assert chain.log.retain(0, 1) == 2


def test_take_back_undoes_publish(chain: Chain) -> None:
    chain.add()
    before = chain.log.size_bytes
    entry = chain.add()
    chain.log.take_back(entry, chain.positions[1])
    assert chain.log.head == chain.positions[1] and chain.log.size_bytes == before
    assert not os.path.exists(entry.path)
    log, dropped = reopened(chain)
    assert log.head == chain.positions[1] and dropped == []


def test_take_back_only_concerns_the_newest(chain: Chain) -> None:
    first = chain.add()
    chain.add()
    chain.log.take_back(first, EMPTY)
    assert chain.log.head == chain.positions[2] and os.path.exists(first.path)


def test_a_branch_is_kept_beside_the_log(chain: Chain, tmp_path: Path) -> None:
    for count in (1, 1, 3, 1):
        chain.add(count)
    contents = {Path(entry.path).name: Path(entry.path).read_bytes() for entry in chain.log.entries()}
    lost = tmp_path / "lost"
    lost.mkdir()
    for _ in range(2):  # a try that failed later is repeated
        kept = chain.log.keep_branch(3, str(lost))
        assert [Path(path).name for path in kept] == sorted(contents)[2:], "an entry that goes beyond goes as a whole"
        assert spans(chain.log) == [(1, 1), (2, 2), (3, 5), (6, 6)], "whatever comes next may fail"
    chain.log.restart_at(chain.positions[2])
    assert all(Path(path).read_bytes() == contents[Path(path).name] for path in kept)
    assert chain.log.keep_branch(99, str(tmp_path / "none")) == []


def test_restart_at_begins_an_empty_log(chain: Chain) -> None:
    for _ in range(3):
        chain.add()
    chain.log.restart_at(Position(77, CHECKSUM_FLAG | 5))
    assert chain.log.entries() == [] and chain.log.size_bytes == 0
    assert chain.log.head == Position(77, CHECKSUM_FLAG | 5)
    assert chain.log.reaches(Position(77, CHECKSUM_FLAG | 5)) and not chain.log.reaches(chain.positions[3])
    assert [name for name in os.listdir(chain.log.folder) if name.endswith(".ltx")] == []


def test_an_entry_that_does_not_follow_replaces_the_log(chain: Chain) -> None:
    chain.add()
    chain.add()
    chain.positions.append(Position(9, chain.positions[-1].checksum))
    chain.add()
    assert spans(chain.log) == [(10, 10)]
    log, dropped = reopened(chain)
    assert spans(log) == [(10, 10)] and dropped == []


def in_store(chain: Chain) -> int:
    return sum(path.suffix == ".next" for path in Path(chain.log.folder).iterdir())


def test_files_are_in_store_only_while_entries_are_made_durable(chain: Chain) -> None:
    """Each time an fsync of the folder: a node that was a replica, and is the primary now, has no use for them."""
    for _ in range(40):
        chain.log.sync([chain.add()])
        chain.log.make_spare()
        assert in_store(chain) >= 3
    for _ in range(40):
        chain.add()
        chain.log.make_spare()
    assert in_store(chain) == 0


def test_files_that_cannot_all_be_made_leave_nothing(chain: Chain) -> None:
    """No inode is left, say: the commits that go on meanwhile must not use up what little comes free."""
    chain.log.sync([chain.add()])
    (Path(chain.log.folder) / "9.next").mkdir()
    chain.log.make_spare()
    assert in_store(chain) == 1
    chain.log.make_spare()
    assert in_store(chain) > 1, "the next try"


def test_the_name_of_the_first_entry_is_made_durable(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that a power cut takes is given back only to what follows an entry: the first one follows none."""
    chain.log.sync([chain.add()])
    chain.log.make_spare()
    chain.log.restart_at(chain.positions[-1])
    chain.log.sync([])  # what went before is durable by now
    folders: list[str] = []
    monkeypatch.setattr(spares, "sync_folder", folders.append)
    chain.log.sync([chain.add()])
    assert folders == [chain.log.folder]
    chain.log.sync([chain.add()])
    assert len(folders) == 1, "that one would be found again"
