"""The power of a replica fails: what it has acknowledged as durable, by an fsync of its log alone, is there."""

from __future__ import annotations

import builtins
import math
import random
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from engine_nodes import Node, check_log, file_checksum, new_primary
from power_cut import POLICIES, Recorder
from sqlite_process import SqliteProcess

from pylitefs.engine.fence import Fence
from pylitefs.engine.files import write_at
from pylitefs.engine.ltx_log import LtxLog
from pylitefs.engine.spares import STORED
from pylitefs.formats.ltx.decoder import decode
from pylitefs.formats.ltx.format import Position

IMAGES = 30


def history(folder: Path, rng: random.Random, count: int) -> tuple[list[bytes], dict[int, Position]]:
    """The files of a primary's log, and the position after each."""
    node = new_primary(folder)
    sql = SqliteProcess(node.database().files.database)
    try:
        for _ in range(count):
            match rng.randrange(5):
                case 0:
                    sql("DELETE FROM t WHERE id % 3 = ?", rng.randrange(3))
                case 1:
                    sql("UPDATE t SET v = randomblob(300) WHERE id % 4 = ?", rng.randrange(4))
                case 2:
                    sql("INSERT INTO t (v) SELECT zeroblob(700) FROM t LIMIT 20")
                case _:
                    sql("INSERT INTO t (v) VALUES (randomblob(?))", rng.choice([50, 5000, 40000]))
            node.flush()
        entries = node.database().log.entries()
        positions = {entry.max_txid: Position(entry.max_txid, entry.trailer().post_apply_checksum) for entry in entries}
        return [Path(entry.path).read_bytes() for entry in entries], positions
    finally:
        sql.kill()
        node.close(clean=False)


@contextmanager
def recording(recorder: Recorder, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Also files that are made by `open`."""
    real = builtins.open

    def open_(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        new = isinstance(path, str) and mode.startswith("w") and not Path(path).exists()
        file = real(path, mode, *args, **kwargs)
        if new:
            recorder.created(path)
        elif isinstance(path, str) and mode.startswith("w"):
            recorder.truncate(path, 0)
        return file

    with recorder.recording(), patch.context() as inner:
        inner.setattr(builtins, "open", open_)
        yield


@pytest.mark.parametrize("seed", range(10))
def test_what_was_acknowledged_survives(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    files, positions = history(tmp_path / "primary", rng, 25)
    root = tmp_path / "replica"
    replica = Node(root, is_primary=False)
    quick = 0
    with closing(replica):
        database = replica.database()
        database.apply(files[0])
        assert database.durable() == 1
        recorder = Recorder(root)
        with recording(recorder, monkeypatch):
            for data in files[1:]:
                database.apply(data)
                if rng.random() < 0.7:
                    database.log.make_spare()  # as the opener does, sooner or later
                if rng.random() < 0.6:
                    txid = database.log_durable()
                    quick += txid is not None
                    recorder.mark(str(txid if txid is not None else database.durable()))
                if rng.random() < 0.15:
                    recorder.mark(str(database.durable()))
                if rng.random() < 0.2 and database.replica is not None:
                    database.replica.checkpoint()
                recorder.write_back(0.1, rng)
    assert quick > 5, "the quick way is what this is about"
    assert sum(op.kind == "rename" and op.path.endswith(STORED) for op in recorder.ops) > 3
    boundaries = recorder.boundaries()
    for number in range(IMAGES):
        count = rng.choice(boundaries) if rng.random() < 0.5 else rng.randrange(len(recorder.ops) + 1)
        promised = max((int(op.path) for op in recorder.ops[:count] if op.kind == "mark"), default=1)
        folder = tmp_path / f"image{number}"
        recorder.image(count, rng, rng.choice(POLICIES), folder)
        node = Node(folder, is_primary=False)
        try:
            found = node.database()
            assert found.position.txid >= promised
            with open(found.files.database, "r+b") as file:
                file.truncate(found.size_bytes)
            state = file_checksum(found.files.database)
            assert state == found.position.checksum
            # The WAL may have survived where the end of the log has not: what was promised is there all the same.
            states = [at.txid for at in positions.values() if at.checksum == state]
            assert max(states, default=0) >= promised
            if max(states) <= found.log.head.txid:
                assert state == positions[found.position.txid].checksum
                check_log(found)
        finally:
            node.close(clean=False)


@pytest.mark.parametrize("all_of_them", [True, False])
def test_what_was_acknowledged_survives_a_promotion(
    tmp_path: Path, all_of_them: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From then on the files count, not the log: the power fails before anything was written there."""
    rng = random.Random(3)
    files, _ = history(tmp_path / "primary", rng, 8)
    root = tmp_path / "replica"
    replica = Node(root, is_primary=False)
    with closing(replica):
        database = replica.database()
        database.apply(files[0])
        assert database.durable() == 1
        recorder = Recorder(root)
        with recording(recorder, monkeypatch):
            for data in files[1:]:
                database.apply(data)
            promised = database.log_durable()
            assert promised == database.position.txid
            since = len(recorder.ops)
            replica.store.start()
            database.app_handles += 1  # an application reads it
            if all_of_them:
                replica.store.promote(2)
            else:
                replica.store.promote_database(database.name, Fence(math.inf))
            assert database.captures
    for number in range(4 * len(POLICIES)):
        folder, policy = tmp_path / f"image{number}", POLICIES[number % len(POLICIES)]
        recorder.image(rng.randrange(since, len(recorder.ops) + 1), rng, policy, folder)
        node = Node(folder, is_primary=False)
        try:
            found = node.database()
            with open(found.files.database, "r+b") as file:
                file.truncate(found.size_bytes)
            assert file_checksum(found.files.database) == database.log.head.checksum, policy
        finally:
            node.close(clean=False)


def test_a_copy_that_came_as_a_whole_is_not_durable_by_the_log(tmp_path: Path) -> None:
    """The log begins in the middle: what it begins with must be on the disk first."""
    files, positions = history(tmp_path / "primary", random.Random(7), 6)
    replica = Node(tmp_path / "replica", is_primary=False)
    with closing(replica):
        database = replica.database()
        for data in files[:3]:
            database.apply(data)
        assert database.durable() == database.position.txid
        with database.lock:
            database.reposition(database.position, database.page_size, database.commit, database.page_checksums())
        assert database.log_durable() is None
        database.apply(files[3])
        assert database.log_durable() is None
        assert database.durable() == database.position.txid
        database.apply(files[4])
        assert database.log_durable() == database.position.txid == max(list(positions)[:5])


def test_a_log_that_was_begun_anew_is_not_taken_for_the_one_before(tmp_path: Path) -> None:
    """Old entries have gone, and an entry that was in store comes: its fsync makes both durable."""
    files, positions = history(tmp_path / "primary", random.Random(3), 6)
    root = tmp_path / "replica"
    log = LtxLog(str(root / "ltx"))
    log.open(verify=True)
    recorder = Recorder(root)

    def publish(data: bytes) -> None:
        ltx = decode(data)
        path = log.temporary()
        with open(path, "wb", buffering=0) as file:
            write_at(file.fileno(), data, 0)
        log.publish(path, ltx.header, ltx.trailer.post_apply_checksum)
        log.sync(log.entries()[-1:])
        log.make_spare()

    with recording(recorder, pytest.MonkeyPatch()):
        for data in files[:2]:
            publish(data)
        log.restart_at(positions[decode(files[2]).header.max_txid])
        publish(files[3])
    assert [op.path.endswith(STORED) for op in recorder.ops if op.kind == "rename"] == [False, True, True]
    recorder.image(len(recorder.ops), random.Random(0), "none", tmp_path / "image")
    found = LtxLog(str(tmp_path / "image" / "ltx"))
    found.open(verify=True)
    assert found.head == log.head and found.count == 1


def test_a_name_that_was_lost_is_given_again_also_after_a_start_that_had_to_wait(tmp_path: Path) -> None:
    """Somebody reads the database file just then, a backup say."""
    files, _ = history(tmp_path / "primary", random.Random(3), 6)
    replica = Node(tmp_path / "replica", is_primary=False)
    with closing(replica):
        database = replica.database()
        for data in files:
            database.apply(data)
            assert database.log_durable() or database.durable()
            database.log.make_spare()
        promised, newest = database.log.head, Path(database.log.entries()[-1].path)
        replica.close(clean=False)
    newest.rename(newest.with_name(f"9{STORED}"))  # what a power cut may leave
    with open(database.files.database, "rb"), closing(Node(tmp_path / "replica", is_primary=False)) as node:
        assert node.database().is_busy
        node.close(clean=False)
    with closing(Node(tmp_path / "replica", is_primary=False)) as again:
        assert again.database().log.head == promised
