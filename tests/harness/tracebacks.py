"""Tracebacks in the log of a daemon: there should be none."""

from __future__ import annotations

import re

_FRAME = re.compile(r'File "([^"]*)", line (\d+), in (\w+)')
_BEFORE, _LINES = 3, 40


def found(log: str) -> list[str]:
    """Each with the lines before it, and so many of its own."""
    lines = log.split("\n")
    starts = [at for at, line in enumerate(lines) if "Traceback (most recent call last)" in line]
    return ["\n".join(lines[max(0, at - _BEFORE) : at + _LINES]) for at in starts]


def in_a_line(text: str) -> str:
    """What was raised, and where: the last frame of the first traceback in a text."""
    _, _, text = text.partition("Traceback (most recent call last)")
    text, *_ = text.split("The above exception", 1)[0].split("During handling", 1)
    frames = list(_FRAME.finditer(text))
    if not frames:
        return "?"
    path, line, function = frames[-1].groups()
    rest = text[frames[-1].end() :].replace("\\n", "\n").split("\n")
    said = next((line for line in rest if line and not line.startswith(" ")), "?")
    return f"{said} ({'/'.join(path.split('/')[-2:])}:{line} {function})"
