"""What the kernel remembers of a name while the engine changes it, in every order of the steps.

The kernel here is a model of Linux's, as far as names are concerned: one entry for a name, negative or not; a LOOKUP is
sent, decided by us, and its answer used under the directory's lock; an entry that has expired is renewed by a LOOKUP
*without* that lock; a notification takes the lock, and so waits for LOOKUPs under way. Tree and notifier are the real
ones, the files too. Whatever the order: when everything is over, the kernel must not remember anything that is wrong,
for nothing would correct it for an hour.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from pylitefs.filesystem.notify import KernelNotifier
from pylitefs.filesystem.tree import Tree, id_of
from pylitefs.formats.fuse import abi
from pylitefs.ports import FileKind, FileRef

NAME = "a.db"
ORDERS = max(1, round(700 * float(os.environ.get("PYLITEFS_TEST_SCALE", "1"))))
Step = Callable[[], bool]
"""False: it cannot go on now."""


@dataclass
class Entry:
    """What the kernel has under the name: a node's number, or 0 for "there is none". `hashed`: it can be found."""

    ino: int
    fresh: bool = True
    hashed: bool = True


@dataclass
class World:
    base: Path
    exists: bool = False  # the engine counts it as a database
    entry: Entry | None = None
    lookers: int = 0  # LOOKUPs under way that hold the directory's lock
    messages: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        for folder in ("files", "dbs"):
            (self.base / folder).mkdir(exist_ok=True)
            for path in (self.base / folder).iterdir():
                path.unlink()
        self.tree = Tree(self.resolve)
        self.notifier = KernelNotifier(self.tree, self, lambda line: None, expire_only=True)
        self.notifier._put = lambda *messages: self.messages.extend(messages)  # type: ignore[method-assign]

    def notify(self, message: bytes) -> bool:
        raise AssertionError("the thread does not run")

    @property
    def plain(self) -> Path:
        return self.base / "files" / NAME

    @property
    def database(self) -> Path:
        return self.base / "dbs" / NAME

    def resolve(self, name: str) -> FileRef:
        if self.exists:
            return FileRef(name, FileKind.DATABASE, name, str(self.database))
        return FileRef(name, FileKind.PLAIN, None, str(self.base / "files" / name))

    # -- the kernel

    def decide(self) -> int:
        found = self.tree.find(NAME)
        return 0 if found is None else found[0].ino

    def look(self) -> list[Step]:
        """stat(2): by the entry if there is one that counts, else a LOOKUP, renewing or under the lock."""
        answer: list[int] = []
        before: list[Entry | None] = []

        def send() -> bool:
            entry = self.entry if self.entry is not None and self.entry.hashed else None
            renews = entry is not None and entry.ino != 0 and not entry.fresh
            if entry is not None and entry.fresh:
                return True  # nothing is asked
            before.append(entry if renews else None)
            if not renews:
                self.lookers += 1
            answer.append(self.decide())
            return True

        def use() -> bool:
            if not answer:
                return True
            entry = before[0]
            if entry is None:
                self.lookers -= 1
                self.entry = Entry(answer[0])
            elif entry.ino == answer[0]:
                entry.fresh = True  # also if it can be found no more
            else:
                entry.hashed = False
            return True

        return [send, use]

    def deliver(self) -> bool:
        """All notifications so far."""
        if self.lookers:
            return False
        while self.messages:
            message = self.messages.pop(0)
            code = abi.OUT_HEADER.unpack_from(message)[1]
            entry = self.entry
            if entry is None or not entry.hashed:
                continue
            if code == abi.NOTIFY_INVAL_ENTRY:
                _, _, flags = abi.INVAL_ENTRY_OUT.unpack_from(message, abi.OUT_HEADER.size)
                if flags & abi.EXPIRE_ONLY:
                    entry.fresh = False
                else:
                    entry.hashed = False
        return True

    # -- the engine

    def told(self) -> bool:
        self.notifier.changed(NAME)
        return True


def do(work: Callable[[], object]) -> Step:
    def step() -> bool:
        work()
        return True

    return step


def importing(world: World) -> list[Step]:
    """`Naming.import_plain`."""
    return [
        do(lambda: os.link(world.plain, world.database)),
        do(lambda: setattr(world, "exists", True)),
        do(world.plain.unlink),
        world.told,
    ]


def dropping(world: World) -> list[Step]:
    return [do(lambda: setattr(world, "exists", False)), do(world.database.unlink), world.told]


def making(world: World) -> list[Step]:
    """On a replica: written aside, then it counts as there."""
    return [
        do(lambda: world.database.write_bytes(b"new")),
        do(lambda: setattr(world, "exists", True)),
        world.told,
    ]


def replacing(world: World) -> list[Step]:
    def put() -> None:
        new = world.database.with_name("new")
        new.write_bytes(b"other")
        new.rename(world.database)

    return [do(put), world.told]


def dropped_and_made(world: World) -> list[Step]:
    return dropping(world) + making(world)


SCENARIOS = {  # what is there at first, and what the engine does
    "importing": ("plain", importing),
    "dropping": ("database", dropping),
    "making": ("nothing", making),
    "replacing": ("database", replacing),
    "dropped and made": ("database", dropped_and_made),
}


def orders(*lengths: int) -> Iterator[tuple[int, ...]]:
    """All merges of sequences of these lengths: which one goes on, at each step."""
    total = sum(lengths)

    def go(left: tuple[int, ...], so_far: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if len(so_far) == total:
            yield so_far
            return
        for index, count in enumerate(left):
            if count:
                yield from go((*left[:index], count - 1, *left[index + 1 :]), (*so_far, index))

    yield from go(lengths, ())


def run(world: World, sequences: list[list[Step]], order: tuple[int, ...]) -> None:
    """A step that cannot go on yet is tried again after each of the others."""
    waiting = [list(sequence) for sequence in sequences]
    due = [0] * len(sequences)
    for index in order:
        due[index] += 1
        progress = True
        while progress:
            progress = False
            for number, steps in enumerate(waiting):
                while due[number] and steps and steps[0]():
                    steps.pop(0)
                    due[number] -= 1
                    progress = True
    assert not any(waiting)


@pytest.mark.parametrize("cached", ["unknown", "known", "expired"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_nothing_wrong_is_remembered(tmp_path: Path, scenario: str, cached: str) -> None:
    start, change = SCENARIOS[scenario]
    every = list(orders(len(change(World(tmp_path))), 2, 2, 1))
    for order in Random(1).sample(every, min(len(every), ORDERS)):
        world = World(tmp_path)
        if start == "plain":
            world.plain.write_bytes(b"old")
        elif start == "database":
            world.database.write_bytes(b"old")
            world.exists = True
        if cached != "unknown":
            for step in world.look():
                step()
            assert world.entry is not None
            world.entry.fresh = cached == "known"
        run(world, [change(world), world.look(), world.look(), [world.deliver]], order)
        world.deliver()
        entry = world.entry
        if entry is not None and entry.hashed and entry.fresh:
            where = world.resolve(NAME).path
            truth = id_of(os.stat(where)) if where is not None and os.path.exists(where) else None
            known = world.tree.nodes[entry.ino].file_id if entry.ino else None
            assert known == truth, f"{scenario}, {cached}, order {order}: remembers {known}, there is {truth}"


def test_a_file_is_found_at_every_moment_of_its_import(tmp_path: Path) -> None:
    """It was there before, and is there afterwards: a program that looks meanwhile finds it too."""
    for at in itertools.count():
        world = World(tmp_path)
        world.plain.write_bytes(b"old")
        steps = importing(world)
        if at > len(steps):
            break
        for step in steps[:at]:
            step()
        first = world.tree.find(NAME)
        # and between the two things that a LOOKUP asks for (to be told takes the lock that the LOOKUP holds)
        world.tree._resolve = _and_then(world.resolve, [step for step in steps[at:] if step != world.told])
        second = world.tree.find(NAME)
        assert first is not None and second is not None and first[0] is second[0], f"before step {at}"


def _and_then(resolve: Callable[[str], FileRef], steps: list[Step]) -> Callable[[str], FileRef]:
    """`resolve`; after the first call the steps are taken."""

    def asked(name: str) -> FileRef:
        ref = resolve(name)
        while steps:
            steps.pop(0)()
        return ref

    return asked
