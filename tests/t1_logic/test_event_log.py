"""What a user reads in the log of what happens: sentences, at a level that fits."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from pylitefs.events import Event
from pylitefs.observability import event_log
from pylitefs.observability.logging import set_up

FORMATS = Path(__file__).parents[2] / "docs" / "FORMATS.md"


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """The node's log, at the level that users have."""
    stream, root = io.StringIO(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    set_up(SimpleNamespace(format="text", timestamp=False, debug=False), stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)


def documented() -> set[str]:
    """Types of events, from the table for those who read them."""
    rows = FORMATS.read_text().partition("## Events")[2].partition("\n## ")[0].splitlines()
    return {kind for row in rows if row.startswith("| `") for kind in re.findall(r"`(\w+)`", row.split("|")[1])}


def test_every_event_has_a_sentence_or_a_reason_for_none() -> None:
    kinds = [event_log.QUIET, event_log.SAID, event_log.SENTENCES.keys()]
    assert sum(map(len, kinds)) == len(frozenset().union(*kinds)), "each is in one of them"
    assert documented() == frozenset().union(*kinds)
    for _, sentence in event_log.SENTENCES.values():
        assert len(sentence.split()) > 1


def test_it_is_a_sentence_and_its_fields(written: io.StringIO) -> None:
    event_log.write(Event("drop", "app.db", {"txid": 26}))
    event_log.write(Event("recovered", "app.db", {"outcome": "released", "txid": 255}))
    event_log.write(Event("lost", "app.db", {"reason": "it came late", "transactions": 3, "max_txid": 4096}))
    event_log.write(Event("tx", "app.db", {"txid": 26}))
    drop, served, lost = written.getvalue().splitlines()
    assert drop == (
        'level=INFO logger=litefs msg="dropped on every node: the database was removed, or has another name" '
        "event=drop database=app.db txid=000000000000001a"
    )
    assert 'msg="it is served again" event=recovered' in served
    assert lost.startswith("level=WARNING") and "transactions=3 max_txid=0000000000001000" in lost


def test_what_is_harmless_is_not_told(written: io.StringIO) -> None:
    """A database is compared with its log whenever a read-only connection closed it: no user can do anything."""
    event_log.write(Event("gap", "app.db", {"cursor": "(-1, -1)", "found": "(1, 2)"}))
    event_log.write(Event("repair", "app.db", {"pages": 2}))
    assert not written.getvalue()
    event_log.write(Event("something new", None, {"levelname": "never a record's own"}))
    assert written.getvalue() == 'level=INFO logger=litefs msg="something new" event="something new"\n'
