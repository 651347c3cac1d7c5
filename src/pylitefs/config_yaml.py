"""YAML text to a small tree that knows its lines, and nothing YAML could do beyond that.

`read` gives Scalar, Sequence and Mapping nodes. What a hostile or mistaken file could use to surprise us is refused
with one line: aliases and anchors (a few lines may stand for gigabytes), tags, several documents, deep nesting, keys
that are not words, a key twice, control characters. Scalars keep the text as written beside the type that YAML 1.1
gives it, because "0666" and "1e5" mean something else to a mode and to a host name.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

import yaml

from pylitefs.errors import ConfigError

MAX_TEXT_BYTES = 1 << 20
MAX_DEPTH = 8

_TAG_PREFIX = "tag:yaml.org,2002:"
_TYPES = frozenset(["str", "bool", "int", "float", "null", "timestamp", "merge", "value", "seq", "map"])


@dataclass(frozen=True)
class Scalar:
    line: int
    text: str  # as written, quotes removed and escapes resolved
    type: str  # "str", "bool", "int", "float", "null", "timestamp", ...

    @property
    def is_null(self) -> bool:
        return self.type == "null"


@dataclass(frozen=True)
class Sequence:
    line: int
    items: tuple[Node, ...]


@dataclass(frozen=True)
class Entry:
    line: int
    key: str
    value: Node


@dataclass(frozen=True)
class Mapping:
    line: int
    entries: tuple[Entry, ...]


Node = Scalar | Sequence | Mapping


def read(text: str, source_name: str) -> Node | None:
    """The tree of the one document in `text`, None when there is nothing in it. Lines count from 1.

    Raises ConfigError ("SOURCE:LINE: ...") for what is not YAML or is refused (see the module's text).
    """
    if len(text) > MAX_TEXT_BYTES:
        raise ConfigError(f"{source_name}: larger than {MAX_TEXT_BYTES} bytes: this is not a configuration file")
    if unprintable := yaml.reader.Reader.NON_PRINTABLE.search(text):
        place = _place(text, unprintable.start(), source_name)
        raise ConfigError(f"{place}: not valid YAML: the character #x{ord(unprintable[0]):04x} is not allowed")
    try:
        _check_events(text, source_name)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_marked_error(error, source_name)) from None
    except (ValueError, OverflowError):  # PyYAML lets these out of its scanner
        raise ConfigError(f"{source_name}: not valid YAML: a \\U escape in it is not a character") from None
    return None if root is None else _convert(root, "", source_name)


def _check_events(text: str, source_name: str) -> None:
    """Refuse aliases, anchors, and depth before anything recursive looks at the text."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark is not None else 1
        if getattr(event, "anchor", None):
            raise ConfigError(f"{source_name}:{line}: YAML anchors and aliases (& and *) are not supported")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise ConfigError(f"{source_name}:{line}: nested more than {MAX_DEPTH} levels deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _convert(node: yaml.Node, path: str, source_name: str) -> Node:
    """The plain tree below `node`, whose dotted path is `path` (for messages)."""
    line = node.start_mark.line + 1
    kind = node.tag.removeprefix(_TAG_PREFIX)
    if kind not in _TYPES:
        raise ConfigError(f'{source_name}:{line}: the YAML tag "{_one_line(node.tag)}" is not supported')
    if isinstance(node, yaml.ScalarNode):
        return Scalar(line, _checked_text(node.value, f"{source_name}:{line}"), kind)
    if isinstance(node, yaml.SequenceNode):
        return Sequence(line, tuple(_convert(item, path, source_name) for item in node.value))
    entries: dict[str, Entry] = {}
    for key_node, value_node in node.value:
        place = f"{source_name}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{place}: a key must be a word, not a list or a section")
        key = _checked_text(key_node.value, place)
        dotted = f"{path}.{key}" if path else key
        if key in entries:
            raise ConfigError(f'{place}: duplicate key "{_one_line(dotted)}": first set in line {entries[key].line}')
        entries[key] = Entry(key_node.start_mark.line + 1, key, _convert(value_node, dotted, source_name))
    return Mapping(line, tuple(entries.values()))


def _checked_text(text: str, place: str) -> str:
    for character in text:
        if character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cs"):
            raise ConfigError(f"{place}: the control character #x{ord(character):04x} is not allowed")
    return text


def _marked_error(error: yaml.MarkedYAMLError, source_name: str) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"{source_name}:{mark.line + 1}:{mark.column + 1}" if mark is not None else source_name
    parts = [part for part in (error.context, error.problem) if part]
    return f"{place}: not valid YAML: {_one_line(', '.join(parts))}"


def _place(text: str, position: int, source_name: str) -> str:
    before = text[:position]
    return f"{source_name}:{before.count(chr(10)) + 1}:{position - before.rfind(chr(10))}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
