"""The generated documents are what the code says, and what they show works."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import click
import pytest

from pylitefs import config, config_env
from pylitefs.cli import reference
from pylitefs.cli.main import VERBS, cli

REGENERATE = "run: python -m pylitefs.cli.reference"


@pytest.mark.parametrize("name", reference.DOCUMENTS)
def test_the_documents_are_up_to_date(name: str) -> None:
    written = (reference.DOCS / name).read_text(encoding="utf-8")
    assert written == reference.DOCUMENTS[name](), REGENERATE


def test_regenerating_writes_every_document(tmp_path: Path) -> None:
    reference.main(tmp_path / "docs")
    assert {path.name for path in (tmp_path / "docs").iterdir()} == {"CONFIGURATION.md", "CLI.md"}


def test_every_key_has_a_row_with_its_description() -> None:
    text = reference.configuration()
    infos = list(config.key_infos())
    assert len(infos) == 67
    for info in infos:
        rows = [line for line in text.splitlines() if line.startswith(f"| `{info.path}` |")]
        assert len(rows) == 1
        assert rows[0].count(" | ") == 3
        assert info.doc.endswith(".")


def test_every_row_of_every_table_has_the_columns_of_its_head() -> None:
    for render in reference.DOCUMENTS.values():
        for table in re.findall(r"(?:^\|.*\n)+", render(), re.MULTILINE):
            assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table


def test_the_examples_are_configurations() -> None:
    primary = config.parse(reference.PRIMARY_EXAMPLE)
    replica = config.parse(reference.REPLICA_EXAMPLE)
    assert (primary.lease.candidate, replica.lease.candidate) == (True, False)
    assert primary.lease.advertise_url == replica.lease.advertise_url
    assert replica.exec[0].argv[0] == "my-application"
    for host, candidate in [("db1", True), ("db2", False)]:
        text = config_env.expand(reference.SHARED_EXAMPLE, {"HOSTNAME": host, "PRIMARY": "db1"})
        lease = config.parse(text).lease
        assert lease == dataclasses.replace(primary.lease, candidate=candidate)


def test_the_examples_with_engines_are_configurations() -> None:
    environ = {"HOSTNAME": "db1", "ETCD_PASSWORD": "x: #", "ZONE": "a", "CONSUL_URL": "https://:t@consul:8501/apps"}
    shown = config.parse(config_env.expand(reference.ENGINE_EXAMPLE, environ))
    assert (shown.lease.etcd.password, shown.lease.own_url(0), shown.replication.sync) == (
        "x: #", "http://db1:20202", 1,
    )  # fmt: skip
    others = [config.parse(config_env.expand(text, environ)) for text in reference.OTHER_ENGINES_EXAMPLE.split("---\n")]
    assert {"static", "etcd", *(other.lease.type for other in others)} == set(config.LEASE_TYPES)


def test_the_error_that_is_shown_is_the_one_that_comes() -> None:
    with pytest.raises(config.ConfigError) as caught:
        config.parse("\n" * 10 + "fuse:\n  dri: /x\n")
    assert f"ERROR: {caught.value}\n" in reference.configuration()


@pytest.mark.parametrize("verb", [verb.name for verb in VERBS])
def test_every_command_explains_itself_with_an_example(verb: str) -> None:
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    commands = [command, *(command.commands.values() if isinstance(command, click.Group) else ())]
    for each in commands:
        assert "litefs " + verb in f"{each.help}{each.epilog}", f"{each.name}: no example in its help"
        for param in each.params:
            if isinstance(param, click.Option):
                assert param.help, f"{each.name}: {param.opts} has no help"
