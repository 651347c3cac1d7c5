"""How the commands write tables, sizes and times."""

from __future__ import annotations

import sys

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 120  # columns when nobody's terminal sets them
_FOLDED_WIDTH = 10


def console() -> Console:
    """Standard output."""
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=PLAIN_WIDTH)


def table(headings: list[str], rows: list[list[str]], *, blank: bool = True) -> RenderableType:
    """Columns named by `headings`, ">" for those aligned right, "~" for those that are folded where space is narrow.
    `blank`: an empty line before it."""
    shown = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for index, heading in enumerate(headings):
        name = heading.lstrip(">~")
        folded = heading.startswith("~")
        widest = max(Text.from_markup(row[index]).cell_len for row in rows)
        shown.add_column(
            name,
            justify="right" if heading.startswith(">") else "left",
            overflow="fold",
            no_wrap=not folded,
            min_width=min(widest, _FOLDED_WIDTH) if folded else max(widest, len(name)),
            style="" if index else "bold",
        )
    for row in rows:
        shown.add_row(*row)
    return Group(Text(), shown) if blank else shown


def format_ms(lag_ms: float) -> str:
    """0.42 ms, 12 ms, 3.1 s, 5 m 2 s."""
    if lag_ms < 1000:
        return f"{lag_ms:.2f} ms" if lag_ms < 10 else f"{lag_ms:.0f} ms"
    return f"{lag_ms / 1000:.1f} s" if lag_ms < 60_000 else format_duration(int(lag_ms / 1000))


def format_duration(duration_s: int) -> str:
    """The two largest units: 45 s, 3 m 20 s, 2 d 4 h."""
    parts: list[tuple[int, str]] = []
    for size_s, unit in ((86400, "d"), (3600, "h"), (60, "m"), (1, "s")):
        count, duration_s = divmod(duration_s, size_s)
        if count or parts:
            parts.append((count, unit))
    return " ".join(f"{count} {unit}" for count, unit in parts[:2] if count) or "0 s"


def format_size(size_bytes: int) -> str:
    """Four significant characters at most and a unit of 1024: 0 B, 999 B, 1.5 KB, 12 MB."""
    size, unit = float(size_bytes), "B"
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1024
    return f"{size:.1f} {unit}" if unit != "B" and size < 9.95 else f"{size:.0f} {unit}"
