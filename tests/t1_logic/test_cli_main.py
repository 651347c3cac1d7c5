"""The `litefs` command: usage, unknown commands, errors as one line, exit statuses, what it imports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable

import click
import pytest
from click.testing import CliRunner, Result

from pylitefs import __version__
from pylitefs.cli import main as cli_main
from pylitefs.cli.command import Verb, adopt, words_after_dashes
from pylitefs.cli.main import cli, usage
from pylitefs.errors import ConfigError, MountError


def litefs(*args: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pylitefs.cli.main", *args], capture_output=True, text=True, timeout=60, **options
    )


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, list(args))


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[click.Command], None]:
    """Makes `litefs x` the given command."""

    def install(command: click.Command) -> None:
        monkeypatch.setattr(cli, "get_command", lambda ctx, name: adopt(command) if name == "x" else None)

    return install


# --- usage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [[], ["help"], ["-help"], ["--help"], ["-h"], ["-config", "x"], ["--", "mount"]])
def test_usage_on_standard_output_and_exit_2(args: list[str]) -> None:
    done = litefs(*args)
    assert (done.returncode, done.stdout, done.stderr) == (2, usage(), "")


def test_usage_names_every_command() -> None:
    for entry in cli_main.VERBS:
        assert f"\n    {entry.name} " in usage()


def test_help_with_a_command() -> None:
    assert run("help", "version").stdout == run("version", "--help").stdout
    assert (run("help", "version").exit_code, run("version", "--help").exit_code) == (2, 0)
    assert run("help", "nope").stderr == 'ERROR: litefs nope: unknown command: see "litefs -help"\n'


def test_help_lists_each_flag_once() -> None:
    text = run("help", "run").stdout
    assert "-if-candidate" in text and "--if-candidate" not in text
    assert "A flag may be written -flag or --flag." in run().stdout


def test_unknown_command() -> None:
    done = litefs("mont", "-config", "x")
    said = 'ERROR: litefs mont: unknown command: did you mean "mount"?\n'
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)


def test_version() -> None:
    done = litefs("version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"pylitefs v{__version__}\n", "")


def test_version_imports_nothing_of_the_daemon() -> None:
    code = (
        "import sys\n"
        "from pylitefs.cli.main import cli\n"
        "try: cli.main(['version'])\n"
        "except SystemExit: pass\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    loaded = done.stdout.split()
    assert "click" in loaded
    assert not {"numpy", "aiohttp", "asyncio", "yaml", "rich", "prometheus_client", "lz4", "fastcrc"} & set(loaded)


def test_the_installed_command_is_this_one() -> None:
    script = os.path.join(os.path.dirname(sys.executable), "litefs")
    done = subprocess.run([script, "version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"pylitefs v{__version__}\n")


# --- flags as in LiteFS ----------------------------------------------------------------------------------------------


@click.command()
@click.option("-config", "config", metavar="PATH", default="none")
@click.option("--fuse.debug", "fuse_debug", is_flag=True)
@click.option("-v", "verbose", is_flag=True)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def flags(config: str, fuse_debug: bool, verbose: bool, words: tuple[str, ...]) -> None:
    click.echo(f"{config} {fuse_debug} {verbose} {' '.join(words)}".strip())


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("-config a", "a False False"),
        ("--config a", "a False False"),
        ("-config=a", "a False False"),
        ("--config=a", "a False False"),
        ("-config=a=b", "a=b False False"),
        ("-fuse.debug", "none True False"),
        ("--fuse.debug", "none True False"),
        ("-fuse.debug=true -v", "none True True"),
        ("-fuse.debug=false", "none False False"),
        ("--fuse.debug=1 -v=f", "none True False"),
        ("-v -- cmd -config b -v=true", "none False True cmd -config b -v=true"),
    ],
)
def test_flags_in_every_form(args: str, expected: str, verb: Callable[[click.Command], None]) -> None:
    verb(flags)
    result = run("x", *args.split())
    assert (result.exit_code, result.stdout, result.stderr) == (0, expected + "\n", "")


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ("-conifg a", ["unknown flag -conifg, did you mean -config?"]),
        ("-v --nope", ["unknown flag --nope"]),
        ("-hlp", ["unknown flag -hlp, did you mean -help?"]),
        ("-config", ["-config"]),
    ],
)
def test_a_wrong_flag_is_one_line_with_its_name(
    args: str, parts: list[str], verb: Callable[[click.Command], None]
) -> None:
    verb(flags)
    result = run("x", *args.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("ERROR: litefs x: ")
    assert result.stderr.endswith(': see "litefs x -help"\n')
    assert result.stderr.count("\n") == 1
    assert all(part in result.stderr for part in parts)


@pytest.mark.parametrize("flag", ["-h", "-help", "--help"])
def test_every_command_has_help(flag: str) -> None:
    result = run("version", flag)
    assert result.exit_code == 0
    assert "Print the version." in result.stdout
    assert "$ litefs version" in result.stdout


@pytest.mark.parametrize(
    ("args", "expected"), [("a -v", None), ("a -- b -c", ("b", "-c")), ("--", ()), ("-- a -- b", ("a", "--", "b"))]
)
def test_words_after_dashes(args: str, expected: tuple[str, ...] | None, verb: Callable[[click.Command], None]) -> None:
    @click.command()
    @click.option("-v", is_flag=True)
    @click.argument("words", nargs=-1)
    @click.pass_context
    def show(ctx: click.Context, v: bool, words: tuple[str, ...]) -> None:
        click.echo(repr(words_after_dashes(ctx)))

    verb(show)
    assert run("x", *args.split()).stdout == f"{expected!r}\n"


def test_only_plain_commands_are_adopted() -> None:
    group = click.Group("g")
    assert adopt(group) is group
    assert isinstance(adopt(flags), Verb)


# --- errors ----------------------------------------------------------------------------------------------------------


def failing(error: BaseException) -> click.Command:
    @click.command()
    def fail() -> None:
        click.echo("before")
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (MountError("mount point /x is busy: stop what uses it"), 1, "mount point /x is busy: stop what uses it"),
        (MountError("two\nlines"), 1, "two lines"),
        (ConfigError("litefs.yml:1: wrong"), 2, "litefs.yml:1: wrong"),
        (click.ClickException("no good"), 1, "no good"),
        (click.UsageError("Too many words."), 2, 'litefs x: too many words: see "litefs x -help"'),
        (FileNotFoundError(2, "No such file or directory", "/x"), 1, "/x: No such file or directory"),
        (OSError(28, "No space left on device"), 1, "[Errno 28] No space left on device"),
    ],
)
def test_errors_are_one_line(error: Exception, status: int, line: str, verb: Callable[[click.Command], None]) -> None:
    verb(failing(error))
    result = run("x")
    assert (result.exit_code, result.stdout) == (status, "before\n")
    assert result.stderr == f"ERROR: {line}\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
def test_an_interrupt_is_quiet(error: BaseException, verb: Callable[[click.Command], None]) -> None:
    verb(failing(error))
    result = run("x")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "before\n", "")


def test_a_bug_is_not_hidden(verb: Callable[[click.Command], None]) -> None:
    verb(failing(AssertionError("a bug")))
    assert isinstance(run("x").exception, AssertionError)


@pytest.mark.parametrize(("result", "status"), [(None, 0), (0, 0), (7, 7), ("text", 0)])
def test_a_command_may_return_its_status(result: object, status: int, verb: Callable[[click.Command], None]) -> None:
    @click.command()
    def give() -> object:
        return result

    verb(give)
    assert run("x").exit_code == status


def test_a_closed_standard_output_is_quiet() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pylitefs.cli.main", "version"],
            stdout=write_end,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_a_running_command_quietly() -> None:
    code = (
        "import click, sys, time\n"
        "from pylitefs.cli.main import cli\n"
        "@click.command()\n"
        "def wait():\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "cli.get_command = lambda ctx, name: wait\n"
        "cli.main(['x'])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, err) == (130, "")
