"""The kinds of value that litefs.yml knows: how each is written, read, and shown in the reference.

    duration  Go's form: "10s", "1h30m", "500ms", "0"; units ns us ms s m h
    size      "1GB", "512MB", "10KB", "1.5GiB", "0"; units B KB MB GB TB, each 1024 of the one before, KiB the same
    mode      permission bits in octal: 0666

A kind is data (`Kind`): the loader and the generated reference are driven by it. `key_field` and `section_of` declare
the fields of the configuration's dataclasses.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field
from fractions import Fraction
from typing import Any

from pylitefs.config_yaml import Mapping, Node, Scalar, Sequence


class ValueProblem(ValueError):
    """A value that is not of its kind. The text says what is wrong; `line` is where, if not at the value itself."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


@dataclass(frozen=True)
class Kind:
    """One kind of value."""

    name: str
    """The word for it in the reference."""
    expected: str
    """What an error says was expected."""
    parse: Callable[[Node], Any]
    """The value of a node; raises ValueProblem."""
    show: Callable[[Any], str]
    """A value as one would write it; the reference shows defaults this way."""


def key_field(
    name: str, kind: Kind, default: Any, doc: str, *, new: bool = False, required: bool = False, secret: bool = False
) -> Any:
    """A field for one key. `new` marks a key that LiteFS does not have; a secret is in no repr. A `default` that can be
    changed (a mapping) is given as a function."""
    metadata = {"key": name, "kind": kind, "doc": doc, "new": new, "required": required, "secret": secret}
    made = {"default_factory": default} if callable(default) else {"default": default}
    return field(**made, repr=not secret, metadata=metadata)


def section_of(name: str, cls: type, doc: str) -> dict[str, Any]:
    """The metadata of a field for a section of keys, which are the fields of the dataclass `cls`."""
    return {"key": name, "section": cls, "doc": doc}


def default_of(item: Any) -> Any:
    """The default of a dataclass's field that `key_field` made."""
    return item.default_factory() if item.default is MISSING else item.default


# --- durations and sizes ---------------------------------------------------------------------------------------------

_NS_PER_UNIT = {
    "ns": 1,
    "us": 10**3,
    "µs": 10**3,  # U+00B5, as Go
    "μs": 10**3,  # U+03BC, as Go
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
}
_NUMBER = r"(?:[0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})"
_DURATION_PART = re.compile(rf"({_NUMBER})(ns|us|µs|μs|ms|s|m|h)")
_SIZE = re.compile(rf"({_NUMBER})\s?(?:([KMGT])(?:i?B)?|B)", re.IGNORECASE)
_MAX_INT64 = 2**63 - 1


def parse_duration_s(text: str) -> float:
    """Seconds of a duration in Go's form (`time.ParseDuration`). Raises ValueProblem; negative ones are refused."""
    if text in ("0", "+0", "-0"):
        return 0.0
    if text.startswith("-"):
        raise ValueProblem('must not be negative: use "0" to switch it off')
    rest, total_ns = text.removeprefix("+"), Fraction(0)
    position = 0
    while match := _DURATION_PART.match(rest, position):
        total_ns += Fraction(match[1]) * _NS_PER_UNIT[match[2]]
        position = match.end()
    if position == 0 or position != len(rest):
        raise ValueProblem("")
    if total_ns > _MAX_INT64:
        raise ValueProblem("is longer than 292 years")
    return int(total_ns) / 1e9


def format_duration(duration_s: float) -> str:
    """The shortest usual way to write it: 600.0 is "10m", 5400.0 is "1h30m", 0.5 is "500ms"."""
    total_ns = round(duration_s * 1e9)
    if total_ns == 0:
        return "0"
    parts = []
    for unit in ("h", "m", "s", "ms", "us", "ns"):
        count, total_ns = divmod(total_ns, _NS_PER_UNIT[unit])
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts)


def parse_size_bytes(text: str) -> int:
    """Bytes of a size such as "1GB" (1024-based). Raises ValueProblem."""
    if text == "0":
        return 0
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueProblem("")
    factor = 1024 ** (" KMGT".index(match[2].upper()) if match[2] else 0)
    size_bytes = int(Fraction(match[1]) * factor)
    if size_bytes > _MAX_INT64:
        raise ValueProblem("is too large")
    return size_bytes


def format_size(size_bytes: int) -> str:
    """The largest unit that keeps it whole: 1073741824 is "1GB", 1500 is "1500B"."""
    if size_bytes == 0:
        return "0"
    for power, letter in ((4, "T"), (3, "G"), (2, "M"), (1, "K")):
        if size_bytes % 1024**power == 0:
            return f"{size_bytes // 1024**power}{letter}B"
    return f"{size_bytes}B"


# --- the rest of the scalars -----------------------------------------------------------------------------------------


def _scalar(node: Node) -> Scalar:
    if not isinstance(node, Scalar):
        raise ValueProblem(f"is a {'list' if isinstance(node, Sequence) else 'section'}")
    return node


def _filled(node: Node) -> Scalar:
    """A scalar that is not empty. For all but strings an empty value (an unset variable, say) is never meant."""
    scalar = _scalar(node)
    if scalar.is_null:
        raise ValueProblem("has no value")
    return scalar


def _parse_string(node: Node) -> str:
    scalar = _scalar(node)
    if scalar.type == "bool":
        raise ValueProblem("")
    if "\n" in scalar.text or "\t" in scalar.text:
        raise ValueProblem("has a line break or a tab in it")
    return "" if scalar.is_null else scalar.text


def _parse_bool(node: Node) -> bool:
    scalar = _filled(node)
    if scalar.type != "bool":
        raise ValueProblem("")
    return scalar.text.lower() in ("true", "yes", "on")


def _parse_secret(node: Node) -> str:
    """As a string, but no message shows it."""
    try:
        return _parse_string(node)
    except ValueProblem as problem:
        raise ValueProblem(str(problem) or "must be in quotes to be a string") from None


def _parse_count(node: Node) -> int:
    text = _filled(node).text
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise ValueProblem("")
    return int(text)


def _parse_integer(node: Node) -> int:
    text = _filled(node).text
    if not re.fullmatch(r"[+-]?[0-9]{1,9}", text):
        raise ValueProblem("")
    return int(text)


def _parse_id(node: Node) -> int:
    text = _filled(node).text
    if not re.fullmatch(r"[0-9]{1,10}", text) or int(text) >= 2**32 - 1:
        raise ValueProblem("")
    return int(text)


def _parse_mode(node: Node) -> int:
    match = re.fullmatch(r"(?:0o?)?([0-7]{1,3})", _filled(node).text)
    if match is None:
        raise ValueProblem("")
    return int(match[1], 8)


def split_address(text: str) -> tuple[str, int]:
    """Host and port of "host:port", ":port" or "[v6]:port"; the host is "" for all interfaces. Raises ValueProblem."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\s:\[\]/]*)):([0-9]{1,5})", text)
    if match is None or int(match[3]) > 65535:
        raise ValueProblem("")
    return match[1] or match[2] or "", int(match[3])


def _parse_address(node: Node) -> str:
    text = _parse_string(node)
    split_address(text)
    return text


def choice(*options: str) -> Kind:
    """A string that must be one of `options`. YAML reads a bare `off` as a boolean; here it is a word."""

    def parse(node: Node) -> str:
        text = _filled(node).text
        if text not in options:
            raise ValueProblem("")
        return text

    listed = " or ".join(f'"{option}"' for option in options)
    return Kind(" or ".join(f"`{option}`" for option in options), listed, parse, str)


def optional(kind: Kind, default_text: str) -> Kind:
    """`kind` with a default of None, which the reference shows as `default_text`."""
    return Kind(kind.name, kind.expected, kind.parse, lambda value: default_text if value is None else kind.show(value))


# --- lists -----------------------------------------------------------------------------------------------------------


def _parse_names(node: Node) -> tuple[str, ...]:
    if isinstance(node, Scalar) and node.is_null:
        return ()
    if not isinstance(node, Sequence):
        raise ValueProblem("")
    names = []
    for item in node.items:
        try:
            name = _parse_string(item)
        except ValueProblem as problem:
            raise ValueProblem(str(problem), item.line) from None
        if name in ("", ".", "..") or "/" in name:
            raise ValueProblem(f'has "{name}", which is not the name of a database', item.line)
        names.append(name)
    return tuple(names)


def _parse_urls(node: Node) -> tuple[str, ...]:
    """One URL, or a list of them."""
    if isinstance(node, Scalar):
        text = _parse_string(node)
        return (text,) if text else ()
    if not isinstance(node, Sequence):
        raise ValueProblem("")
    urls = []
    for item in node.items:
        try:
            urls.append(_parse_string(item))
        except ValueProblem as problem:
            raise ValueProblem(str(problem), item.line) from None
        if not urls[-1]:
            raise ValueProblem("has an empty entry", item.line)
    return tuple(urls)


MAX_TAGS = 32
MAX_TAG_CHARACTERS = 200


def _parse_tags(node: Node) -> dict[str, str]:
    """Every value is text, as it is written."""
    if isinstance(node, Scalar) and node.is_null:
        return {}
    if not isinstance(node, Mapping):
        raise ValueProblem("")
    tags = {}
    for entry in node.entries:
        if not isinstance(entry.value, Scalar) or entry.value.is_null:
            raise ValueProblem(f'has no text for the tag "{entry.key[:80]}"', entry.line)
        if any(character in "\n\t" for character in entry.key + entry.value.text):
            raise ValueProblem(f'has a line break or a tab in the tag "{entry.key[:80]}"', entry.line)
        if not entry.key or len(entry.key + entry.value.text) > MAX_TAG_CHARACTERS:
            raise ValueProblem(f"has a tag that is empty or longer than {MAX_TAG_CHARACTERS} characters", entry.line)
        tags[entry.key] = entry.value.text
    if len(tags) > MAX_TAGS:
        raise ValueProblem(f"has more than {MAX_TAGS} tags")
    return tags


@dataclass(frozen=True)
class ExecCommand:
    """One command of `exec`: run in order, the last one in the background."""

    cmd: str
    if_candidate: bool = False

    @property
    def argv(self) -> tuple[str, ...]:
        """The command split into words as a shell would, without expanding anything."""
        return tuple(shlex.split(self.cmd))


def _parse_exec(node: Node) -> tuple[ExecCommand, ...]:
    if isinstance(node, Scalar):
        return (_exec_command(node),) if node.text.strip() and not node.is_null else ()
    if not isinstance(node, Sequence):
        raise ValueProblem("")
    return tuple(_exec_entry(item) for item in node.items)


def _exec_entry(node: Node) -> ExecCommand:
    if not isinstance(node, Mapping):
        raise ValueProblem('has an entry without "cmd:"', node.line)
    command, if_candidate = None, False
    for entry in node.entries:
        if entry.key == "cmd":
            command = _exec_command(entry.value)
        elif entry.key == "if-candidate":
            try:
                if_candidate = _parse_bool(entry.value)
            except ValueProblem:
                raise ValueProblem("has an if-candidate that is not true or false", entry.line) from None
        else:
            raise ValueProblem(f'has the unknown key "{entry.key}": known are cmd and if-candidate', entry.line)
    if command is None:
        raise ValueProblem('has an entry without "cmd:"', node.line)
    return ExecCommand(command.cmd, if_candidate)


def _parse_hook(node: Node) -> tuple[ExecCommand, ...]:
    commands = _parse_exec(node)
    if any(command.if_candidate for command in commands):
        raise ValueProblem("has an if-candidate, which is for exec only")
    return commands


def _exec_command(node: Node) -> ExecCommand:
    if not isinstance(node, Scalar) or node.is_null or not node.text.strip():
        raise ValueProblem("has an empty command", node.line)
    command = ExecCommand(node.text)
    try:
        words = command.argv
    except ValueError as error:
        raise ValueProblem(f"cannot be split into words: {str(error).lower()}", node.line) from None
    if not words or not words[0]:
        raise ValueProblem("has an empty command", node.line)
    return command


STRING = Kind("string", "a string", _parse_string, lambda value: str(value) if value else '""')
BOOL = Kind("boolean", "true or false (without quotes)", _parse_bool, lambda value: "true" if value else "false")
DURATION = Kind(
    "duration",
    'a duration such as "10s", "1h30m" or "0"',
    lambda node: parse_duration_s(_filled(node).text),
    format_duration,
)
SIZE = Kind(
    "size", 'a size such as "512MB", "1GB" or "0"', lambda node: parse_size_bytes(_filled(node).text), format_size
)
SECRET = Kind("string", "a string", _parse_secret, STRING.show)
COUNT = Kind("number", "a number such as 0, 1 or 100", _parse_count, str)
INTEGER = Kind("number", "a number such as 10 or -10", _parse_integer, str)
ID = Kind("number", "a numeric user or group id", _parse_id, str)
MODE = Kind("octal mode", "permission bits in octal such as 0666", _parse_mode, lambda value: f"0{value:03o}")
ADDRESS = Kind("address", 'an address such as ":20202", "127.0.0.1:20202" or "[::1]:20202"', _parse_address, str)
NAMES = Kind("list", "a list of database names", _parse_names, lambda value: f"[{', '.join(value)}]")
URLS = Kind("URL or list", "a URL, or a list of URLs", _parse_urls, lambda value: f"[{', '.join(value)}]")
TAGS = Kind(
    "mapping",
    'lines of "name: text"',
    _parse_tags,
    lambda value: ", ".join(f"{k}: {v}" for k, v in value.items()) or "{}",
)
EXEC = Kind(
    "string or list",
    'a command, or a list of "- cmd: COMMAND" entries',
    _parse_exec,
    lambda value: "[]" if not value else "; ".join(command.cmd for command in value),
)
HOOK = Kind(EXEC.name, EXEC.expected, _parse_hook, EXEC.show)
