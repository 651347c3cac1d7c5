"""The lease engine for storage that can compare and swap one small record, but cannot let it expire.

The record holds leader and state together, so that one swap sets both; each member has a cell of its own.

    {"format": 1, "leader": {…} or null, "term": "…", "beat": "…", "ttl": 10.0, "state": "…", "state-version": "…"}

`term` names one acquisition, `beat` one renewal, `state-version` one change of the state: random, so that a record
which was deleted and made anew does not look like an old one. Leases expire by observation (`lease.observed`).

A write whose answer was lost may have happened, or may still happen. A renewal is written again then; an acquisition is
remembered (`_abandoned`), so that the lease which nobody knows to have can be taken anew at once; a late write meets
another version.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

from pylitefs.cluster.lease_port import (
    ABSENT,
    Clock,
    Conflict,
    Held,
    Leader,
    LeaseLost,
    Member,
    Versioned,
    View,
    now_s,
)
from pylitefs.errors import Unavailable
from pylitefs.lease import documents
from pylitefs.lease.observed import Observed

LEADER = "leader"
MEMBERS = "members/"
MAX_RECORD_BYTES = 1 << 20
FORMAT = 1

_ATTEMPTS = 10  # of a swap that others keep overtaking
_FORGET_MEMBERS_AFTER_S = 60.0


_Change = Callable[["Record"], "Record"]


class Changed(Exception):
    """The cell is not at that version any more."""


@dataclass(frozen=True)
class Cell:
    """What a cell holds, and what to give back to replace it."""

    data: bytes
    version: str


class Cells(Protocol):
    """Small files by name, in the folder of one cluster. All but `close` raise Unavailable.

    `write` must be atomic, and seen by every `read` that begins after it has returned.
    """

    @property
    def where(self) -> str:
        """For messages: which storage, at which URL."""

    async def read(self, name: str) -> Cell | None: ...
    async def read_all(self) -> Mapping[str, Cell]: ...
    async def write(self, name: str, data: bytes, version: str | None) -> None:
        """Replace the cell if it is at `version` (ABSENT: if there is none), else Changed. None: whatever it holds."""

    async def remove(self, name: str) -> None: ...
    async def pause(self, timeout_s: float, poll_s: float) -> bool:
        """Wait until a cell has changed, then True; False after `timeout_s`. Storage that cannot tell returns False
        after `poll_s`."""

    async def close(self) -> None: ...


@dataclass(frozen=True)
class Record:
    """The cell LEADER."""

    leader: Leader | None = None
    term: str = ""
    beat: str = ""
    ttl_s: float = 0.0
    state: Versioned = field(default_factory=Versioned)

    def pack(self) -> bytes:
        return documents.encode(
            {
                "format": FORMAT,
                "leader": documents.leader_fields(self.leader) if self.leader else None,
                "term": self.term,
                "beat": self.beat,
                "ttl": self.ttl_s,
                "state": self.state.data.decode("utf-8", "surrogateescape"),
                "state-version": self.state.version,
            }
        )

    @classmethod
    def unpack(cls, data: bytes) -> Record:
        """Raises ValueError for what is no record."""
        fields = documents.decode(data)
        ttl_s = documents.ttl_from(fields)
        texts = [fields.get(key) for key in ("term", "beat", "state", "state-version")]
        if fields.get("format") != FORMAT or ttl_s is None:
            raise ValueError
        term, beat, state, version = (text if isinstance(text, str) else "" for text in texts)
        return cls(
            documents.leader_from(documents.part(fields, "leader")) if fields.get("leader") is not None else None,
            term,
            beat,
            ttl_s,
            Versioned(state.encode("utf-8", "surrogateescape"), version),
        )


class RecordEngine:
    """A `cluster.lease_port.Engine` over `cells`. `timeout_s` is for one call, whatever it takes."""

    min_ttl_s = 1.0

    def __init__(self, cells: Cells, timeout_s: float = 2.0, clock: Clock = now_s) -> None:
        self._cells = cells
        self._timeout_s = timeout_s
        self._clock = clock
        self._observed = Observed(clock)
        self._abandoned: set[str] = set()
        self._members: tuple[Member, ...] = ()
        self._members_read_s = -math.inf
        self._members_every_s = 1.0
        self._expired_since_s: dict[str, float] = {}

    # --- looking

    async def view(self) -> View:
        async with self._deadline():
            return (await self._look())[0]

    async def wait(self, view: View, timeout_s: float) -> bool:
        """The record is looked at whenever the cells wake up; the members, which cost more to read, twice in a TTL."""
        end_s = self._clock() + timeout_s
        changed = False
        while True:
            async with self._deadline():
                due_s = self._members_read_s + self._members_every_s - self._clock()
                new, wake_s = await (self._look() if changed or due_s <= 0 else self._look_at_leader())
            now_s = self._clock()
            if new != view:
                return True
            if now_s >= end_s:
                return False
            due_s = self._members_read_s + self._members_every_s - now_s
            changed = await self._cells.pause(max(0.01, min(end_s - now_s, wake_s, due_s)), self._members_every_s / 6)

    async def _look(self) -> tuple[View, float]:
        cells = await self._cells.read_all()
        members, names = [], []
        now_s = self._clock()
        for name in sorted(name for name in cells if name.startswith(MEMBERS)):
            fields = documents.decode(cells[name].data)
            member = documents.member_from(documents.part(fields, "member"))
            ttl_s = documents.ttl_from(fields)
            if member is None or ttl_s is None:
                continue
            names.append(name)
            if self._observed.remaining_s(name, str(fields.get("beat")), ttl_s) > 0:
                members.append(member)
                self._expired_since_s.pop(name, None)
            else:
                self._expired_since_s.setdefault(name, now_s)
        self._observed.keep_only([*names, LEADER])
        self._members, self._members_read_s = tuple(members), now_s
        return self._seen(self._record(cells.get(LEADER)))

    async def _look_at_leader(self) -> tuple[View, float]:
        return self._seen(self._record(await self._cells.read(LEADER)))

    def _seen(self, record: Record) -> tuple[View, float]:
        """The view, and how long until the lease counts as expired."""
        remaining_s = self._remaining_s(record)
        leader = record.leader if remaining_s > 0 else None
        if record.ttl_s:
            self._members_every_s = min(6.0, record.ttl_s / 2)
        return View(leader, record.state, self._members), remaining_s if leader else math.inf

    def _remaining_s(self, record: Record) -> float:
        if record.leader is None:
            return 0.0
        return self._observed.remaining_s(LEADER, f"{record.term}/{record.beat}", record.ttl_s)

    def _record(self, cell: Cell | None) -> Record:
        if cell is None:
            return Record()
        try:
            return Record.unpack(cell.data)
        except ValueError:
            raise Unavailable(
                f'{self._cells.where}: "{LEADER}" is not a record of this version of litefs: give the cluster another '
                "place, or, with every node stopped, delete it"
            ) from None

    # --- the lease

    async def acquire(self, leader: Leader, ttl_s: float, state: bytes, version: str) -> Held | None:
        documents.check_ttl(ttl_s, self.min_ttl_s, self._cells.where)
        documents.check_state(state)
        async with self._deadline():
            cell = await self._cells.read(LEADER)
            record = self._record(cell)
            taken = self._remaining_s(record) > 0 and record.term not in self._abandoned
            if taken or record.state.version != version:
                return None
            new = Record(leader, _unique(), _unique(), ttl_s, Versioned(state, _unique()))
            self._abandoned.add(new.term)
            start_s = self._clock()
            try:
                await self._swap(cell, new)
            except Changed:
                self._abandoned.discard(new.term)
                return None
            self._abandoned.clear()
        return Held(leader, ttl_s, start_s + ttl_s, new.state, new.term)

    async def renew(self, held: Held) -> Held:
        start_s = self._clock()
        if start_s >= held.valid_until_s:
            self._abandoned.add(held.token)
            raise LeaseLost(f"the lease has expired: it was not renewed for {held.ttl_s:g} s")
        await self._change(held, lambda record: replace(record, beat=_unique()))
        return replace(held, valid_until_s=start_s + held.ttl_s)

    async def release(self, held: Held) -> None:
        try:
            await self._change(held, lambda record: replace(record, leader=None, term="", beat=_unique()))
        except LeaseLost:
            pass

    async def update(self, state: bytes, version: str, held: Held | None = None) -> Versioned:
        documents.check_state(state)
        written = Versioned(state, _unique())

        def change(record: Record) -> Record:
            if record.state.version != version:
                raise Conflict("the cluster's state was changed by another node: read it again")
            return replace(record, state=written, ttl_s=record.ttl_s or self.min_ttl_s)

        await self._change(held, change)
        return written

    async def _change(self, held: Held | None, change: _Change) -> None:
        """Swap the record for what `change` makes of it, while the lease is ours; anew when others were quicker."""
        async with self._deadline():
            for _ in range(_ATTEMPTS):
                cell = await self._cells.read(LEADER)
                record = self._record(cell)
                if held is not None and (record.leader is None or record.term != held.token):
                    raise LeaseLost("the lease is not ours any more: it was taken or deleted")
                try:
                    await self._swap(cell, change(record))
                    return
                except Changed:
                    continue
        raise Unavailable(f"{self._cells.where}: too many nodes write the lease at once: try again")

    async def _swap(self, cell: Cell | None, record: Record) -> None:
        await self._cells.write(LEADER, record.pack(), cell.version if cell else ABSENT)

    # --- the members

    async def announce(self, member: Member, ttl_s: float) -> None:
        documents.check_ttl(ttl_s, self.min_ttl_s, self._cells.where)
        fields = {"member": documents.member_fields(member), "ttl": ttl_s, "beat": _unique()}
        name = MEMBERS + documents.hex_id(member.node_id)
        async with self._deadline():
            await self._cells.write(name, documents.encode(fields), None)
            self._expired_since_s.pop(name, None)
            for old, since_s in list(self._expired_since_s.items()):
                if self._clock() - since_s > _FORGET_MEMBERS_AFTER_S:
                    del self._expired_since_s[old]
                    await self._cells.remove(old)

    async def withdraw(self, node_id: int) -> None:
        async with self._deadline():
            await self._cells.remove(MEMBERS + documents.hex_id(node_id))

    async def close(self) -> None:
        await self._cells.close()

    @asynccontextmanager
    async def _deadline(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._timeout_s):
                yield
        except TimeoutError:
            raise Unavailable(
                f"{self._cells.where} did not answer within {self._timeout_s:g} s: is it there, and can it be reached?"
            ) from None


def _unique() -> str:
    return secrets.token_hex(8)
