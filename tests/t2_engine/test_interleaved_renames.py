"""`mv` of files of which databases are being made, between any two steps of it: no rows go that nobody removed, and
none are in two databases."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_nodes import Node, check_log, closing_node, make_sqlite, rows_of
from test_naming import WAIT_S

from harness.interleaver import Steps, sweep
from pylitefs.engine import naming, plain_files, registry, renaming, replacement
from pylitefs.engine.renaming import when_unused
from pylitefs.ports import FileKind, FileRef

MODULES = [naming, plain_files, registry, renaming, replacement]
STRIDE = 1 if float(os.environ.get("PYLITEFS_TEST_SCALE", "1")) > 1 else 17  # with it, in both journal modes
ROWS = {"a": 1, "b": 2}  # how many each has


def found(node: Node) -> dict[str, int]:
    """How many rows each file of the mount has, databases and plain files."""
    names = {name: node.database(name).files.database for name in node.store.names()}
    for name in names:
        assert node.database(name).set_aside_reason is None
        check_log(node.database(name))
    plain = {name: node.store.plain_path(name) for name in os.listdir(node.store.plain_dir)}
    assert not names.keys() & plain.keys(), f"two files of one name: {names} {plain}"
    paths = [*names.values(), *plain.values()]
    assert len({os.stat(path).st_ino for path in paths}) == len(paths), "one file is two databases"
    return {name: len(rows_of(path)) for name, path in (names | plain).items()}


def ref(node: Node, name: str) -> FileRef:
    database = node.store.get(name)
    if database is not None and database.exists:
        return FileRef(name, FileKind.DATABASE, name, database.files.database)
    return FileRef(name, FileKind.PLAIN, None, node.store.plain_path(name))


def renamed(there: dict[str, str], mode: str, *imports: str) -> Callable[[Steps], None]:
    """`mv a b`, while what is in `imports` is taken over as a database. `there`: what a and b are before."""

    def scenario(steps: Steps) -> None:
        with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
            with closing_node(Node(Path(folder))) as node:
                for name, kind in there.items():
                    make_sqlite(node.store.plain_path(name), mode=mode, rows=ROWS[name])
                    if kind == "database":
                        assert node.store.import_plain(name)
                before = found(node)
                old, new = ref(node, "a"), ref(node, "b")

                def take_over(name: str) -> None:
                    with contextlib.suppress(OSError):
                        node.store.import_plain(name)

                steps.actions(*(steps.aside(lambda name=name: take_over(name)) for name in imports))
                worker, done = node.store.worker, True
                with steps.on_worker(worker), steps.here():
                    try:
                        when_unused(
                            node.store, "a", "b",
                            lambda: worker.submit(node.store.naming.rename, old, new).result(WAIT_S),
                        )  # fmt: skip
                    except OSError:
                        done = False
                steps.finish()
                worker.submit(lambda: None).result(WAIT_S)
                after = {"b": ROWS["a"]} if done else before
                assert found(node) == after, f"rename {'done' if done else 'refused'}"
            with closing_node(Node(Path(folder))) as again:
                again.store.settle()
                assert found(again) == after, "after a kill -9"

    return scenario


@pytest.mark.parametrize("imports", ["a", "b"])
@pytest.mark.parametrize("a", ["plain", "database"])
@pytest.mark.parametrize("b", ["plain", "database", None])
def test_an_import_between_any_two_steps_of_a_rename(a: str, b: str | None, imports: str) -> None:
    there = {"a": a} | ({"b": b} if b is not None else {})
    seed = sum(map(ord, f"{a}{b}{imports}"))
    modes = ["wal", "delete"] if STRIDE == 1 else [["wal", "delete"][seed % 2]]
    for mode in modes:
        assert sweep(renamed(there, mode, imports), MODULES, stride=STRIDE, seed=seed) > 5


def test_both_are_imported_while_one_is_renamed() -> None:
    assert sweep(renamed({"a": "plain", "b": "plain"}, "wal", "a", "b"), MODULES, stride=STRIDE, pairs=10) > 5
