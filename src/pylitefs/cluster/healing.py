"""A primary's damaged pages, replaced when nobody has the file open: from its own log, else from any replica.

Which bytes are right is told by their checksum in the primary's table (`engine.damage`), so it does not matter at which
position a replica is, and what a peer sends cannot do harm. Nothing of it is on the way of a commit.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from pylitefs.cluster.ports import Database, Store
from pylitefs.cluster.tasks import supervised
from pylitefs.cluster.transfer import Blocking
from pylitefs.errors import LitefsError
from pylitefs.formats.stream_pages import MAX_PAGES_SIZE

log = logging.getLogger("litefs.damage")

BATCH_BYTES = 4 << 20
"""So much is put in place at once."""

ANSWER_S = 10.0
"""How long a replica may take to send pages."""

AGAIN_S = (1.0, 5.0, 30.0)
"""When to try again, if something was in the way or nobody has the pages; also as soon as a replica connects."""

WHOLE_TRIES = 100
"""Every so many tries the whole database is read: what was overwritten since is not damaged any more. Else only what is
known to be damaged is looked for."""

Pages = list[tuple[int, bytes]]


class Source(Protocol):
    """A replica that is connected."""

    async def ask_pages(self, name: str, pgnos: Sequence[int]) -> Pages:
        """Those of them that it has. LitefsError if it has gone."""


class Healing:
    """Of one term of office. On the loop."""

    def __init__(self, store: Store, sources: Callable[[], Iterable[Source]], blocking: Blocking) -> None:
        self._store, self._sources, self._blocking = store, sources, blocking
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._somebody_new = asyncio.Event()

    def begin(self) -> None:
        """What was found earlier, perhaps as a replica."""
        for name in self._store.all_names():
            database = self._store.get(name)
            if database is not None and database.is_damaged:
                self.heal(name)

    def heal(self, name: str) -> None:
        """Damaged pages were found."""
        running = self._tasks.get(name)
        if running is None or running.done():  # what one that is done has not seen must be looked at anew
            work = supervised(f"healing {name}", lambda: self._heal(name))
            self._tasks[name] = asyncio.get_running_loop().create_task(work)

    def connected(self) -> None:
        """There is somebody new to ask."""
        self._somebody_new.set()

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _heal(self, name: str) -> None:
        tries, told, whole, said = 0, 0, True, ""
        while (database := self._store.get(name)) is not None:
            self._somebody_new.clear()
            try:
                if whole:
                    await self._blocking(self._store.find_damage, name)
                    whole = False
                if not (left := await self._heal_once(name, database)):
                    return
                if left != told:
                    told = left
                    log.error(
                        "%s: %d damaged pages are neither in the log nor on a replica that is connected: start one "
                        "that has a copy, or restore a backup",
                        name, left,
                    )  # fmt: skip
            except (LitefsError, OSError) as error:
                if str(error) != said:
                    said = str(error)
                    log.warning("%s: damaged pages cannot be replaced now, it will be tried again: %s", name, error)
            except Exception:
                log.exception("%s: damaged pages cannot be replaced", name)
            try:
                async with asyncio.timeout(AGAIN_S[min(tries, len(AGAIN_S) - 1)]):
                    await self._somebody_new.wait()
            except TimeoutError:
                tries += 1
                whole = whole or tries % WHOLE_TRIES == 0

    async def _heal_once(self, name: str, database: Database) -> int:
        """Replace what is known to be damaged; how many pages are left that nobody has."""
        damaged = sorted(database.damage)
        step = max(1, BATCH_BYTES // max(512, database.page_size))
        for at in range(0, len(damaged), step):
            await self._replace(name, damaged[at : at + step], database.page_size)
        return len(database.damage)

    async def _replace(self, name: str, pgnos: list[int], page_size: int) -> None:
        """As many of them as can be had."""
        found: dict[int, bytes] = dict(await self._blocking(self._store.logged_pages, name, pgnos))
        await self._put(name, found, "log")
        for source in list(self._sources()):
            missing = [pgno for pgno in pgnos if pgno not in found]
            step = max(1, MAX_PAGES_SIZE // page_size)
            got: dict[int, bytes] = {}
            try:
                for at in range(0, len(missing), step):
                    got |= dict(await source.ask_pages(name, missing[at : at + step]))
            except (LitefsError, TimeoutError) as error:
                log.warning("%s: a replica cannot send pages: %s", name, error or "no answer")
            found |= {pgno: got[pgno] for pgno in await self._put(name, got, "replica")}

    async def _put(self, name: str, pages: dict[int, bytes], source: str) -> list[int]:
        """Which of them are in place now, and sound."""
        if not pages:
            return []
        await self._blocking(_put, self._store, name, sorted(pages.items()))
        sound = [pgno for pgno, _ in await self._blocking(self._store.sound_pages, name, sorted(pages))]
        database = self._store.get(name)
        if database is not None and sound:
            database.note_healed(sound, source)
        return sound


def _put(store: Store, name: str, pages: Pages) -> None:
    store.worker.submit(store.mend, name, pages).result()
