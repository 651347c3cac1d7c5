"""What a node knows of its cluster from the lease engine, and how it changes the document that all share."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

from pylitefs.cluster.election import ClusterState
from pylitefs.cluster.known_nodes import KnownNodes
from pylitefs.cluster.lease_port import Conflict, Engine, Held, LeaseLost, View
from pylitefs.cluster.state import Document
from pylitefs.errors import Unavailable

log = logging.getLogger("litefs.lease")

_TRIES = 10


class SharedState:
    """The newest view, the document in it, and what is wrong with the engine, or why nobody leads. `changed` is called,
    on the loop, when any of them is new."""

    def __init__(self, engine: Engine, changed: Callable[[], None]) -> None:
        self.known = KnownNodes()
        self._engine = engine
        self._changed = changed
        self._lock = asyncio.Lock()
        self.view: View | None = None
        self.document = Document()
        self.problem = "looking at the lease engine for the first time"

    def has_problem(self, text: str, level: int = logging.WARNING) -> None:
        """"" if there is none. `level` of the line in the log."""
        if text != self.problem:
            self.problem = text
            if text:
                log.log(level, "%s", text)
            self._changed()

    async def look(self) -> View:
        """Unavailable, FormatError."""
        async with self._lock:
            view = await self._engine.view()
            self.saw(view, Document.unpack(view.state.data))
            return view

    def saw(self, view: View, document: Document) -> None:
        self.view, self.document = view, document
        for member in view.members:
            self.known.saw(member)
        self._changed()

    async def change(self, change: Callable[[ClusterState], ClusterState], held: Callable[[], Held | None]) -> None:
        """As the leader: replace the state by what `change` makes of it. Unavailable; LeaseLost if we lead no more."""
        async with self._lock:
            wanted = replace(self.document, state=change(self.document.state))
            for _ in range(_TRIES):
                mine = held()
                if mine is None:
                    raise LeaseLost("this node does not hold the lease any more")
                try:
                    await self._write(wanted, mine)
                    return
                except LeaseLost:
                    raise
                except Conflict:  # what others may have written is `paused`
                    view = await self._engine.view()
                    self.saw(view, Document.unpack(view.state.data))
                    wanted = wanted.with_state(paused=self.document.state.paused)
        raise Unavailable("the cluster's state is being written by too many nodes at once: try again")

    async def pause(self, paused: bool) -> None:
        """As any node. Unavailable."""
        async with self._lock:
            for _ in range(_TRIES):
                view = await self._engine.view()
                self.saw(view, Document.unpack(view.state.data))
                try:
                    await self._write(self.document.with_state(paused=paused), None)
                    return
                except Conflict:
                    continue
        raise Unavailable("the cluster's state is being written by too many nodes at once: try again")

    async def _write(self, document: Document, held: Held | None) -> None:
        assert self.view is not None
        written = await self._engine.update(document.pack(), self.view.state.version, held)
        self.saw(replace(self.view, state=written), document)
