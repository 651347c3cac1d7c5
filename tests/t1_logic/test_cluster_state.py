"""The document that nodes share in the lease engine."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pylitefs.cluster.control import HistoryEntry
from pylitefs.cluster.election import ClusterState, Total
from pylitefs.cluster.lease_port import MAX_STATE_BYTES
from pylitefs.cluster.state import HISTORY, Document
from pylitefs.errors import FormatError

ids = st.integers(0, (1 << 64) - 1)
counts = st.integers(0, (1 << 63) - 1)
texts = st.text(max_size=40)
positions = st.dictionaries(texts, st.tuples(counts, st.integers(1, 1 << 60)), max_size=5)
states = st.builds(
    ClusterState,
    cluster_id=texts,
    epoch=counts,
    has_data=st.booleans(),
    last_leader=ids,
    paused=st.booleans(),
    in_sync=st.none() | st.frozensets(st.integers(1, (1 << 64) - 1), max_size=4),
    voters=st.none() | st.frozensets(st.integers(1, (1 << 64) - 1), max_size=4),
    positions=positions,
    handoff_to=ids,
)
entries = st.builds(HistoryEntry, counts, ids, texts, counts, texts, counts)
documents = st.builds(Document, states, st.lists(entries, max_size=5).map(tuple))


@given(documents)
def test_what_is_packed_comes_back(document: Document) -> None:
    assert Document.unpack(document.pack()) == document


@given(st.binary(max_size=200))
def test_other_bytes_are_refused(data: bytes) -> None:
    if data:
        with pytest.raises(FormatError, match="not written by this version"):
            Document.unpack(data)


@given(documents, st.sampled_from(["format", "epoch", "in-sync", "history", "last-leader"]), st.none() | st.text())
def test_a_document_with_a_strange_field_is_refused(document: Document, key: str, value: str | None) -> None:
    fields = json.loads(document.pack())
    fields[key] = value
    if key == "in-sync" and value is None:
        return
    if key == "last-leader" and value == "":
        return
    if key in ("in-sync", "history") and value == "":
        return  # an empty sequence, as an empty list is
    try:
        Document.unpack(json.dumps(fields).encode())
    except FormatError:
        return
    assert key == "last-leader"
    assert value is not None
    assert int(value, 16) >= 0


def test_nothing_is_the_empty_document() -> None:
    assert Document.unpack(b"") == Document()


def test_a_document_is_never_too_large_for_an_engine() -> None:
    entry = HistoryEntry(1, 2, "h" * 5000, 3, "r" * 5000, 4)
    document = Document(ClusterState(epoch=9, positions={f"db-{number}" * 9: (1, 1) for number in range(9000)}))
    for _ in range(HISTORY * 2):
        document = document.with_entry(entry)
    data = document.pack()
    assert len(data) <= MAX_STATE_BYTES
    again = Document.unpack(data)
    assert again.state.epoch == 9
    assert again.state.positions == Total(((1, 9000),), 9000)
    assert 0 < len(again.history) <= HISTORY


def test_the_newest_entries_of_the_history_stay() -> None:
    document = Document()
    for epoch in range(HISTORY + 7):
        document = document.with_entry(HistoryEntry(epoch, 1, "", 0, "", 0))
    assert [entry.epoch for entry in document.history] == list(range(7, HISTORY + 7))
