"""Environment variables in the text of litefs.yml.

The text is expanded before it is read as YAML, so a variable may stand for any value (`candidate: ${IS_PRIMARY}`).

    form                      becomes
    $NAME  ${NAME}  ${ NAME } the variable's value; nothing when it is not set
    ${ NAME == 'text' }       true or false; also with "text", and with != for the opposite
    ${ NAME == OTHER }        true or false: compares two variables
    $$                        one $

These are LiteFS's forms (its `ExpandEnv`, on top of Go's `os.Expand`). Where LiteFS silently drops text we do not:
`$$` is an escape instead of nothing, a `$` that starts no form stays as it is, a `${` without its `}` or with
something else inside is an error, and so is a value with a line break, which would change what the lines after it
mean. Comment lines are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from pylitefs.errors import ConfigError

_REFERENCE = re.compile(r"\$(?:(?P<escape>\$)|(?P<name>[A-Za-z_]\w*)|\{(?P<inside>[^}]*)\}|(?P<open>\{))", re.ASCII)
_NAME = re.compile(r"[\w.-]+", re.ASCII)
_COMPARISON = re.compile(
    r"""(?P<left>\w+)\s*(?P<operator>==|!=)\s*(?:'(?P<single>.*)'|"(?P<double>.*)"|(?P<right>\w+))""", re.ASCII
)


def expand(text: str, environ: Mapping[str, str], source_name: str = "litefs.yml") -> str:
    """`text` with every reference replaced by its value from `environ`; the number of lines does not change.

    Raises ConfigError, with the line, for a reference that is not one of the forms above.
    """
    lines = text.split("\n")
    for index, line in enumerate(lines):
        if "$" in line and not line.lstrip().startswith("#"):
            lines[index] = _expand_line(line, environ, f"{source_name}:{index + 1}")
    return "\n".join(lines)


def _expand_line(line: str, environ: Mapping[str, str], place: str) -> str:
    def value_of(match: re.Match[str]) -> str:
        if match["escape"]:
            return "$"
        if match["open"]:
            raise ConfigError(f'{place}: "${{" has no "}}" in the same line: write $$ for a plain dollar sign')
        if match["name"]:
            return _variable(match["name"], environ, place)
        return _evaluate(match["inside"].strip(), environ, place)

    return _REFERENCE.sub(value_of, line)


def _evaluate(expression: str, environ: Mapping[str, str], place: str) -> str:
    """What stands for `${expression}`."""
    if _NAME.fullmatch(expression):
        return _variable(expression, environ, place)
    match = _COMPARISON.fullmatch(expression)
    if match is None:
        raise ConfigError(
            f'{place}: cannot expand "${{{expression}}}": '
            "use ${NAME}, ${NAME == 'text'}, ${NAME != 'text'} or ${NAME == OTHER}"
        )
    left = environ.get(match["left"], "")
    if match["right"] is not None:
        right = environ.get(match["right"], "")
    else:
        right = match["single"] if match["single"] is not None else match["double"]
    return "true" if (left == right) == (match["operator"] == "==") else "false"


def _variable(name: str, environ: Mapping[str, str], place: str) -> str:
    value = environ.get(name, "")
    if "\n" in value or "\r" in value:
        raise ConfigError(f"{place}: the value of the environment variable {name} has a line break: use one line")
    return value
