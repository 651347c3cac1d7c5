"""`litefs version`."""

from __future__ import annotations

import click

from pylitefs import __version__


def version_string() -> str:
    """The line that `litefs version` and the start of `litefs mount` print."""
    return f"pylitefs v{__version__}"


@click.command()
def version() -> None:
    """Print the version.

    \b
    Example:
        $ litefs version
        pylitefs v0.1.0
    """
    click.echo(version_string())
