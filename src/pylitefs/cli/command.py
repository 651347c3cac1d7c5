"""Click commands that take flags as LiteFS (Go's `flag` package) does.

    -config PATH   --config PATH   -config=PATH   -debug   -debug=false

`Verb` is a click command with both dash forms of every long flag. `main` turns the plain commands of the verb modules
into it with `adopt`, so a module may declare its flags in either form.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import click

HELP_FLAGS = ["-h", "-help", "--help"]

_AFTER_DASHES = "pylitefs.after_dashes"

_TRUE = frozenset(["1", "t", "T", "true", "TRUE", "True"])  # Go's strconv.ParseBool
_FALSE = frozenset(["0", "f", "F", "false", "FALSE", "False"])


class Verb(click.Command):
    """One verb of `litefs`."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        extra.setdefault("help_option_names", HELP_FLAGS)
        for option in self._options():
            option.opts = _both_dashes(option.opts)
        return super().make_context(info_name, args, parent, **extra)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        before, after = _split_at_dashes(args)
        flags = {name: option for option in self._options() if option.is_flag for name in option.opts}
        before = list(_without_values(before, flags))
        ctx.meta[_AFTER_DASHES] = tuple(after[1:]) if after else None
        try:
            return super().parse_args(ctx, before + after)
        except click.NoSuchOption as error:
            raise self._unknown_flag(error, before, ctx) from None
        except click.UsageError as error:
            error.ctx = error.ctx or ctx  # click's parser leaves it out for a flag without its value
            raise

    def _options(self) -> list[click.Option]:
        return [param for param in self.params if isinstance(param, click.Option)]

    def _unknown_flag(self, error: click.NoSuchOption, args: list[str], ctx: click.Context) -> click.UsageError:
        """What to raise for it, with the flag as it was written: click reads an unknown `-conifg` as `-c`."""
        known = [*ctx.help_option_names, *(name for option in self._options() for name in option.opts)]
        flags = [arg.partition("=")[0] for arg in args if arg.startswith("-")]
        name = next((flag for flag in flags if flag not in known), error.option_name)
        nearest = difflib.get_close_matches(name, known, n=1)
        return click.UsageError(f"unknown flag {name}{f', did you mean {nearest[0]}?' if nearest else ''}", ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Each flag in one form: that both will do, the usage says."""
        named = [(option, option.opts) for option in self._options()]
        for option, names in named:
            option.opts = [name for name in names if not (name.startswith("--") and name[1:] in names)]
        try:
            super().format_options(ctx, formatter)
        finally:
            for option, names in named:
                option.opts = names

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        option = super().get_help_option(ctx)
        if option is not None:
            option.help = "Show this text."
        return option


def adopt(command: click.Command) -> click.Command:
    """`command` as a Verb if it is a plain click command; groups and special ones stay what they are."""
    if type(command) is not click.Command:
        return command
    return Verb(
        name=command.name,
        context_settings=command.context_settings,
        callback=command.callback,
        params=command.params,
        help=command.help,
        epilog=command.epilog,
        short_help=command.short_help,
        options_metavar=command.options_metavar,
        add_help_option=command.add_help_option,
        no_args_is_help=command.no_args_is_help,
        hidden=command.hidden,
        deprecated=command.deprecated,
    )


def words_after_dashes(ctx: click.Context) -> tuple[str, ...] | None:
    """The words after `--` on the command line of a Verb: `litefs mount -- CMD ARG`. None without a `--`."""
    words: tuple[str, ...] | None = ctx.meta.get(_AFTER_DASHES)
    return words


def _both_dashes(names: Iterable[str]) -> list[str]:
    """The names of an option with `-name` and `--name` for each that has more than one letter."""
    both: dict[str, None] = {}
    for name in names:
        word = name.lstrip("-")
        for form in [f"-{word}", f"--{word}"] if len(word) > 1 else [name]:
            both[form] = None
    return list(both)


def _split_at_dashes(args: list[str]) -> tuple[list[str], list[str]]:
    at = args.index("--") if "--" in args else len(args)
    return args[:at], args[at:]


def _without_values(args: list[str], flags: dict[str, click.Option]) -> Iterable[str]:
    """`-debug=true` as `-debug`, and nothing for `-debug=false`."""
    for arg in args:
        name, equals, value = arg.partition("=")
        if not equals or name not in flags or value not in _TRUE | _FALSE:
            yield arg
        elif value in _TRUE:
            yield name
