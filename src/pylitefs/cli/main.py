"""The command `litefs`: finds the verb, runs it, and turns every error into one line and an exit status.

`EXIT_STATUSES` lists the statuses. A verb's module is imported only when the verb is used, so that `litefs version`
does not pay for the daemon. A verb is a click command; it may return its exit status (an int), or None for 0.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click

from pylitefs.cli.command import adopt
from pylitefs.errors import LitefsError

INTERRUPTED = 130
OUTPUT_CLOSED = 141

EXIT_STATUSES = (
    ("0", "success"),
    ("1", "something failed (one line on standard error, `ERROR: ...`), or the command is unknown"),
    ("2", "the command line or litefs.yml is wrong, or the usage was asked for"),
    (f"{INTERRUPTED}", "interrupted (Ctrl-C)"),
    (f"{OUTPUT_CLOSED}", "the reader of standard output has gone"),
    ("N", "`litefs mount`: the supervised command ended with status N"),
)

_COMPLETION = "_LITEFS_COMPLETE"  # set by the shell completion that click generates


@dataclass(frozen=True)
class VerbEntry:
    """Where a verb is implemented."""

    name: str
    target: str  # "module:attribute"; the attribute is a click command
    summary: str


VERBS = (
    VerbEntry("mount", "pylitefs.cli.mount:mount", "mount the file system and replicate its databases"),
    VerbEntry("run", "pylitefs.cli.run:run", "run a program where and when it can write"),
    VerbEntry("export", "pylitefs.cli.export:export", "write a copy of a database to a file"),
    VerbEntry("import", "pylitefs.cli.import_:import_", "create or replace a database from a file"),
    VerbEntry("status", "pylitefs.cli.status:status", "show the node, its databases and the cluster"),
    VerbEntry("sync", "pylitefs.cli.sync:sync", "wait until this node has what the primary has"),
    VerbEntry("promote", "pylitefs.cli.promote:promote", "make a node the primary"),
    VerbEntry("handoff", "pylitefs.cli.promote:handoff", "make the primary pass its lease on"),
    VerbEntry("pause", "pylitefs.cli.pause:pause", "switch automatic failover off"),
    VerbEntry("resume", "pylitefs.cli.pause:resume", "switch automatic failover on again"),
    VerbEntry("history", "pylitefs.cli.history:history", "show the changes of the primary"),
    VerbEntry("lost", "pylitefs.cli.lost:lost", "show, and bring back, transactions that the cluster went on without"),
    VerbEntry("ltx", "pylitefs.cli.ltx_command:ltx", "look into transaction files: dump, verify, checksum"),
    VerbEntry("clean-up", "pylitefs.cli.clean_up:clean_up", "end what a node that was killed has left"),
    VerbEntry("demo", "pylitefs.cli.demo:demo", "run a primary and two replicas on this machine and watch them"),
    VerbEntry("version", "pylitefs.cli.version:version", "print the version"),
)

_USAGE_HEAD = """\
litefs mounts a directory whose SQLite databases are replicated live to other machines.

Usage:

    litefs <command> [arguments]

The commands are:

"""
_USAGE_TAIL = """
Use "litefs <command> -help" to read about one, with examples. A flag may be written -flag or --flag.
"""


def usage() -> str:
    """What `litefs` alone prints."""
    width = max(len(verb.name) for verb in VERBS) + 3
    lines = [f"    {verb.name:<{width}} {verb.summary}\n" for verb in VERBS]
    return _USAGE_HEAD + "".join(lines) + _USAGE_TAIL


class UnknownCommand(LitefsError):
    def __init__(self, name: str) -> None:
        nearest = difflib.get_close_matches(name, [verb.name for verb in VERBS], n=1)
        hint = f'did you mean "{nearest[0]}"?' if nearest else 'see "litefs -help"'
        super().__init__(f"litefs {name}: unknown command: {hint}")


class LitefsGroup(click.Group):
    """The table of verbs as a click group that imports a verb's module when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [verb.name for verb in VERBS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for verb in VERBS:
            if verb.name == cmd_name:
                module_name, _, attribute = verb.target.partition(":")
                return adopt(getattr(importlib.import_module(module_name), attribute))
        return None

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or args[0] == "help" or args[0].startswith("-"):
            click.echo(self._help_for(ctx, args[1:]) if args[:1] == ["help"] else usage(), nl=False)
            ctx.exit(2)
        return super().parse_args(ctx, args)

    def _help_for(self, ctx: click.Context, args: list[str]) -> str:
        """`litefs help` is the usage; `litefs help VERB` the verb's own text."""
        if not args:
            return usage()
        command = self.get_command(ctx, args[0])
        if command is None:
            raise UnknownCommand(args[0])
        with command.make_context(args[0], [], ctx, resilient_parsing=True) as verb_context:
            return command.get_help(verb_context) + "\n"

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        command = self.get_command(ctx, args[0])
        if command is None:
            raise UnknownCommand(args[0])
        return args[0], command, args[1:]

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line and exit with the status of the table above.

        Click's own `main` prints several lines for an error and one for Ctrl-C; it stays in use for shell completion
        and for `standalone_mode=False`.
        """
        name = prog_name or "litefs"
        if not standalone_mode or _COMPLETION in os.environ:
            return super().main(args, name, _COMPLETION, standalone_mode, **extra)
        try:
            with self.make_context(name, list(sys.argv[1:] if args is None else args), **extra) as ctx:
                result = self.invoke(ctx)
            sys.stdout.flush()
        except click.exceptions.Exit as end:
            result = end.exit_code
        except (KeyboardInterrupt, click.Abort):
            result = INTERRUPTED
        except BrokenPipeError:
            _close_stdout()
            result = OUTPUT_CLOSED
        except LitefsError as error:
            result = _complain(str(error), error.exit_status)
        except click.UsageError as error:
            result = _complain(_usage_error(error), 2)
        except click.ClickException as error:
            result = _complain(error.format_message(), error.exit_code)
        except OSError as error:
            result = _complain(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
        sys.exit(result if isinstance(result, int) else 0)


def _usage_error(error: click.UsageError) -> str:
    message = error.format_message().rstrip(".")
    if error.ctx is None:
        return message
    path = error.ctx.command_path
    return f'{path}: {message[:1].lower()}{message[1:]}: see "{path} -help"'


def _complain(message: str, status: int) -> int:
    click.echo(f"ERROR: {' '.join(message.split())}", err=True)
    return status


def _close_stdout() -> None:
    """Send what is still buffered nowhere, so that the interpreter does not complain about it at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


cli = LitefsGroup(name="litefs", help="SQLite databases, replicated live.", add_help_option=False)


def main() -> None:
    """The entry point of the `litefs` command."""
    cli.main()


if __name__ == "__main__":
    main()
