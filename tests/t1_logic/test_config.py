"""litefs.yml: every key, every refusal, and the line each refusal names."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pylitefs import config
from pylitefs.config import Config, ExecCommand, LeaseConfig
from pylitefs.errors import ConfigError, UsageError

STATIC = "lease:\n  type: static\n"

EVERY_KEY = """\
exit-on-error: false
skip-sync: true
strict-verify: true
exec:
  - cmd: /app migrate --all
    if-candidate: true
  - cmd: /app serve
data:
  dir: /data
  compress: false
  retention: 1h30m
  retention-monitor-interval: 500ms
  max-log-size: 1.5GB
fuse:
  dir: /mnt/db
  allow-other: no
  debug: true
  passthrough: off
  io-uring: off
  uid: 1000
  gid: 100
  mode: 0640
http:
  addr: 127.0.0.1:8000
  snapshot-timeout: 2m
  max-import-size: 10GB
lease:
  type: static
  hostname: 123456789012
  advertise-url: https://db1:20202/
  candidate: false
  promote: true
  reconnect-delay: 250ms
  demote-delay: 5s
  databases: [a.db, b.db]
  recovery-wait: "0"
log:
  format: json
  timestamp: true
  debug: true
"""


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config.parse(text)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_key_is_read() -> None:
    read = config.parse(EVERY_KEY)
    assert read == Config(
        exit_on_error=False,
        skip_sync=True,
        strict_verify=True,
        exec=(ExecCommand("/app migrate --all", if_candidate=True), ExecCommand("/app serve")),
        data=config.DataConfig("/data", False, 5400.0, 0.5, 3 << 29),
        fuse=config.FuseConfig("/mnt/db", False, True, "off", "off", 1000, 100, 0o640),
        http=config.HttpConfig("127.0.0.1:8000", 120.0, 10 << 30),
        lease=LeaseConfig(
            "static", "123456789012", "https://db1:20202/", False, True, 0.25, 5.0, ("a.db", "b.db"), 0.0
        ),
        log=config.LogConfig("json", True, True),
    )
    assert (read.http.host, read.http.port) == ("127.0.0.1", 8000)
    # The text above has every key there is, each with another value than its default.
    defaults = Config()
    for field in dataclasses.fields(Config):
        before, after = getattr(defaults, field.name), getattr(read, field.name)
        leaves = dataclasses.fields(before) if dataclasses.is_dataclass(before) else ()
        assert all(getattr(before, leaf.name) != getattr(after, leaf.name) for leaf in leaves)
        assert before != after


def test_defaults_are_those_of_litefs() -> None:
    read = config.parse(STATIC)
    assert read == Config(lease=LeaseConfig(type="static"))
    shown = {info.path: info.default for info in config.key_infos() if not info.new}
    assert shown == {
        "exit-on-error": "true",
        "skip-sync": "false",
        "strict-verify": "false",
        "exec": "[]",
        "data.dir": "/var/lib/litefs",
        "data.compress": "true",
        "data.retention": "10m",
        "data.retention-monitor-interval": "1m",
        "fuse.dir": "/litefs",
        "fuse.allow-other": "true as root, else false",
        "fuse.debug": "false",
        "http.addr": ":20202",
        "http.snapshot-timeout": "0",
        "lease.type": "required",
        "lease.hostname": '""',
        "lease.advertise-url": '""',
        "lease.candidate": "true",
        "lease.promote": "false",
        "lease.reconnect-delay": "1s",
        "lease.demote-delay": "10s",
        "lease.databases": "[]",
        "log.format": "text",
        "log.timestamp": "false",
        "log.debug": "false",
    }


def test_new_keys_and_their_defaults() -> None:
    shown = {info.path: info.default for info in config.key_infos() if info.new}
    assert shown == {
        "data.max-log-size": "1GB",
        "fuse.passthrough": "auto",
        "fuse.io-uring": "auto",
        "fuse.uid": "none",
        "fuse.gid": "none",
        "fuse.mode": "0666",
        "http.max-import-size": "0",
        "lease.recovery-wait": "3s",
    }


def test_empty_sections_and_strings_keep_their_meaning() -> None:
    read = config.parse(STATIC + "  hostname:\n  databases:\ndata:\nexec:\n")
    assert (read.lease.hostname, read.lease.databases, read.exec) == ("", (), ())
    assert read.data == config.DataConfig()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/app serve -x", (ExecCommand("/app serve -x"),)),
        ("'sh -c \"a; b\"'", (ExecCommand('sh -c "a; b"'),)),
        ('""', ()),
        ("[]", ()),
        ("[{cmd: a}, {cmd: b, if-candidate: true}]", (ExecCommand("a"), ExecCommand("b", True))),
    ],
)
def test_exec(text: str, expected: tuple[ExecCommand, ...]) -> None:
    assert config.parse(f"{STATIC}exec: {text}\n").exec == expected


def test_exec_words_are_split_like_a_shell_does() -> None:
    assert ExecCommand("sh -c 'a \"b\" $c' d\\ e").argv == ("sh", "-c", 'a "b" $c', "d e")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("fuse:\n  dri: /x", 'litefs.yml:4: unknown key "fuse.dri": did you mean "fuse.dir"?'),
        ("fuze:\n  dir: /x", 'litefs.yml:3: unknown key "fuze": did you mean "fuse"?'),
        ("retention: 5m", 'litefs.yml:3: unknown key "retention": did you mean "data.retention"?'),
        (
            "data:\n  max_log_size: 0",
            'litefs.yml:4: unknown key "data.max_log_size": did you mean "data.max-log-size"?',
        ),
        ("log:\n  zzz: 1", 'litefs.yml:4: unknown key "log.zzz": known keys here are debug, format, timestamp'),
        ("fuse:\n  dir: /x\n  dir: /y", 'litefs.yml:5: duplicate key "fuse.dir": first set in line 4'),
        ("log: {}\nlog: {}", 'litefs.yml:4: duplicate key "log": first set in line 3'),
        ("fuse: 3", 'litefs.yml:3: fuse is a section: expected indented "key: value" lines below it'),
        ("fuse:\n  dir: [/x]", "litefs.yml:4: fuse.dir is a list: expected a string"),
        ("fuse:\n  dir: true", 'litefs.yml:4: fuse.dir cannot be "true": expected a string'),
        ("fuse:\n  debug: 1", 'litefs.yml:4: fuse.debug cannot be "1": expected true or false (without quotes)'),
        (
            'fuse:\n  debug: "true"',
            'litefs.yml:4: fuse.debug cannot be "true": expected true or false (without quotes)',
        ),
        ("fuse:\n  debug:", "litefs.yml:4: fuse.debug has no value: expected true or false (without quotes)"),
        ("fuse:\n  passthrough: on", 'litefs.yml:4: fuse.passthrough cannot be "on": expected "auto" or "off"'),
        (
            "fuse:\n  mode: 0999",
            'litefs.yml:4: fuse.mode cannot be "0999": expected permission bits in octal such as 0666',
        ),
        ("fuse:\n  uid: -1", 'litefs.yml:4: fuse.uid cannot be "-1": expected a numeric user or group id'),
        (
            "data:\n  retention: 10",
            'litefs.yml:4: data.retention cannot be "10": expected a duration such as "10s", "1h30m" or "0"',
        ),
        (
            "data:\n  max-log-size: 10",
            'litefs.yml:4: data.max-log-size cannot be "10": expected a size such as "512MB", "1GB" or "0"',
        ),
        (
            "http:\n  addr: 20202",
            'litefs.yml:4: http.addr cannot be "20202": '
            'expected an address such as ":20202", "127.0.0.1:20202" or "[::1]:20202"',
        ),
        ("log:\n  format: xml", 'litefs.yml:4: log.format cannot be "xml": expected "text" or "json"'),
    ],
)
def test_a_wrong_line_is_named_with_what_to_do(line: str, expected: str) -> None:
    assert refused(f"{STATIC}{line}\n") == expected


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("exec:\n  - cmd: a\n  - cmd: b 'c", ":5: exec cannot be split into words: no closing quotation"),
        ("exec:\n  - cmd: a\n  - if-candidate: true", ':5: exec has an entry without "cmd:"'),
        ("exec:\n  - cmd: a\n    if-candidat: true", ':5: exec has the unknown key "if-candidat"'),
        ("exec:\n  - cmd: a\n    if-candidate: 3", ":5: exec has an if-candidate that is not true or false"),
        ("exec:\n  - cmd: ''", ":4: exec has an empty command"),
        ("exec:\n  - a", ':4: exec has an entry without "cmd:"'),
        ("exec:\n  cmd: a", ":4: exec cannot be a section"),
    ],
)
def test_wrong_exec(line: str, part: str) -> None:
    assert part in refused(f"{STATIC}{line}\n")


@pytest.mark.parametrize("key", config.NOT_YET_SUPPORTED)
def test_keys_of_later_parts_are_refused(key: str) -> None:
    section, _, name = key.rpartition(".")
    text = f"{section}:\n  {name}:\n    url: x\n" if section else f"{name}:\n  addr: x\n"
    line = 2 if section else 1
    assert refused(text) == (
        f'litefs.yml:{line}: "{key}" exists in LiteFS but is not supported by this version: remove it'
    )


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (STATIC + "fuse: {dir: /x\n", "litefs.yml:4:1: not valid YAML: "),
        (STATIC + "\tfuse: x\n", "litefs.yml:3:1: not valid YAML: "),
        (STATIC + "a: 'b\n", "litefs.yml:4:1: not valid YAML: "),
        (STATIC + "a: \x00\n", "litefs.yml:3:4: not valid YAML: "),
        (STATIC + 'a: "\\UFFFFFFFF"\n', "litefs.yml: not valid YAML: "),
        (STATIC + 'a: "\\uD800"\n', "litefs.yml:3: the control character #xd800"),
        (STATIC + 'a: "\\x07"\n', "litefs.yml:3: the control character #x0007"),
        ("a: &x [1]\nb: *x\n", "litefs.yml:1: YAML anchors and aliases"),
        ("b: *x\n", "litefs.yml:1: YAML anchors and aliases"),
        ("a: !!python/name:os.system\n", 'litefs.yml:1: the YAML tag "tag:yaml.org,2002:python/name:os.system"'),
        ("a: 1\n---\nb: 1\n", "litefs.yml:2:1: not valid YAML: "),
        ("- a\n", 'litefs.yml:1: expected "key: value" lines'),
        ("hello\n", 'litefs.yml:1: expected "key: value" lines'),
        ("? [a]\n: b\n", "litefs.yml:1: a key must be a word"),
        ("a:\n" + " [\n" * 100_000, "litefs.yml:9: nested more than 8 levels deep"),
        ("# " + "x" * (1 << 20), "litefs.yml: larger than 1048576 bytes"),
    ],
)
def test_what_is_not_a_plain_yaml_file(text: str, place: str) -> None:
    assert refused(text).startswith(place)


def test_a_billion_laughs_is_refused_before_it_is_expanded() -> None:
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    assert refused("\n".join(lines)).startswith("litefs.yml:1: YAML anchors and aliases")


def test_messages_stay_short_whatever_the_value() -> None:
    assert len(refused(f"lease:\n  type: {'x' * 100_000}\n")) < 600
    assert len(refused(f"{STATIC}{'k' * 500}: 1\n")) < 600
    assert len(refused(f"{STATIC}fuse:\n  mode: {'x' * 100_000}\n")) < 600


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 'litefs.yml: lease.type is required: this version supports "static"'),
        ("lease:\n  type: ''\n", 'litefs.yml:2: lease.type is required: this version supports "static"'),
        ("lease:\n  type: consul\n", 'litefs.yml:2: invalid lease type "consul": this version supports "static"'),
        ("fuse:\n  dir: ''\n" + STATIC, "litefs.yml:2: fuse.dir is empty: name the directory to mount"),
        ("data:\n  dir: \n" + STATIC, "litefs.yml:2: data.dir is empty: name the directory for the databases and"),
        (STATIC + "data:\n  dir: /litefs/\n", "litefs.yml:4: fuse.dir and data.dir are the same directory (/litefs)"),
        (STATIC + "data:\n  dir: /litefs/a/b\n", "litefs.yml:4: data.dir (/litefs/a/b) is inside the mount, fuse.dir"),
        (STATIC + "fuse:\n  dir: /var/lib/litefs/m\n", "litefs.yml:4: fuse.dir (/var/lib/litefs/m) is inside data.dir"),
        (
            STATIC + "  databases: [a.db]\n",
            "litefs.yml:3: lease.databases is for replicas only: remove it, or set lease.candidate to false",
        ),
        (
            STATIC + "  candidate: false\n",
            "litefs.yml:3: a replica (lease.candidate: false) needs the primary's URL in lease.advertise-url",
        ),
    ],
)
def test_keys_that_do_not_work_together(text: str, expected: str) -> None:
    assert refused(text).startswith(expected)


def test_directories_with_a_common_beginning_of_their_names_are_two() -> None:
    config.parse(STATIC + "fuse:\n  dir: /data\ndata:\n  dir: /data-log\n")


def test_directories_are_compared_through_symbolic_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    text = f"{STATIC}fuse:\n  dir: {tmp_path}/real\ndata:\n  dir: {tmp_path}/link\n"
    assert "are the same directory" in refused(text)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("db1:20202", "does not start with http:// or https://"),
        ("ftp://db1:20202", "does not start with http:// or https://"),
        ("http://:20202", "has no valid host"),
        ("http://", "has no valid host"),
        ("http://a b:1", "has no valid host"),
        ("http://db1:0", "has port 0"),
        ("http://db1:99999", "is not a URL (port out of range"),
        ("http://db1:x", "is not a URL ("),
        ("http://[::1", "is not a URL ("),
        ("http://db1:20202/path", "has more than a host and a port"),
        ("http://u:p@db1:20202", "has more than a host and a port"),
    ],
)
def test_urls_that_cannot_be_a_node(url: str, problem: str) -> None:
    for candidate in ("true", "false"):
        text = f'{STATIC}  candidate: {candidate}\n  advertise-url: "{url}"\n'
        assert refused(text).startswith(f'litefs.yml:4: lease.advertise-url "{url}" {problem}')


@pytest.mark.parametrize("url", ["http://db1:20202", "https://db1", "http://10.0.0.1:20202/", "http://[::1]:20202"])
def test_urls_of_nodes(url: str) -> None:
    read = config.parse(f'{STATIC}  candidate: false\n  advertise-url: "{url}"\n')
    assert read.lease.advertise_url == url


@pytest.mark.parametrize("name", ["a/b", "", "..", "."])
def test_a_database_filter_has_names_of_databases(name: str) -> None:
    text = f'{STATIC}  candidate: false\n  advertise-url: http://db1\n  databases:\n    - ok.db\n    - "{name}"\n'
    assert refused(text).startswith(f'litefs.yml:7: lease.databases has "{name}"')


def test_overrides_only_turn_on() -> None:
    plain = config.parse(STATIC)
    assert plain.with_overrides() == plain
    on = plain.with_overrides(fuse_debug=True, log_debug=True)
    assert (on.fuse.debug, on.log.debug) == (True, True)
    assert on.with_overrides(fuse_debug=False) == on


def test_validate_checks_a_configuration_built_by_hand() -> None:
    good = Config(lease=LeaseConfig(type="static"))
    config.validate(good)
    with pytest.raises(ConfigError, match=r"^configuration: fuse\.dir is empty"):
        config.validate(dataclasses.replace(good, fuse=config.FuseConfig(dir="")))


@given(st.text(max_size=200))
def test_any_text_is_a_configuration_or_one_line(text: str) -> None:
    try:
        assert isinstance(config.parse(text), Config)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1


WORDS = [info.path.rpartition(".")[2] for info in config.key_infos()] + ["data", "fuse", "http", "lease", "log", "cmd"]
SCALARS = st.one_of(
    st.sampled_from(["1s", "0", "true", "off", "1GB", "~", ":1", "static", "'", '"', "*a", "&a", "0666", "\x85"]),
    st.text(max_size=5),
)
LINES = st.builds(
    lambda indent, dash, word, value: f"{' ' * indent}{dash}{word}: {value}",
    st.integers(0, 3),
    st.sampled_from(["", "- "]),
    st.sampled_from(WORDS),
    SCALARS,
)


@given(st.lists(LINES, max_size=6))
def test_anything_like_a_configuration_is_one_or_one_line(lines: list[str]) -> None:
    try:
        assert isinstance(config.parse("\n".join(lines)), Config)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1


# --- files -----------------------------------------------------------------------------------------------------------


def test_load_a_named_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yml").write_text(STATIC + "  hostname: ${WHO}\n")
    read, path = config.load("my.yml", environ={"WHO": "db7"})
    assert (read.lease.hostname, path) == ("db7", str(tmp_path / "my.yml"))
    read, _ = config.load("my.yml", environ={"WHO": "db7"}, expand_env=False)
    assert read.lease.hostname == "${WHO}"


def test_hostname_is_set_when_the_environment_has_none(tmp_path: Path) -> None:
    file = tmp_path / "litefs.yml"
    file.write_text(STATIC + "  hostname: ${HOSTNAME}\n")
    for environ, expected in [
        ({}, os.uname().nodename),
        ({"HOSTNAME": ""}, os.uname().nodename),
        ({"HOSTNAME": "x"}, "x"),
    ]:
        assert config.load(str(file), environ=environ)[0].lease.hostname == expected


def test_search_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, home = tmp_path / "here", tmp_path / "home"
    here.mkdir()
    home.mkdir()
    monkeypatch.chdir(here)
    environ = {"HOME": str(home)}
    assert config.search_paths(environ) == ("./litefs.yml", str(home / "litefs.yml"), "/etc/litefs.yml")
    assert config.search_paths({}) == ("./litefs.yml", "/etc/litefs.yml")
    (home / "litefs.yml").write_text(STATIC)
    assert config.load(environ=environ)[1] == str(home / "litefs.yml")
    (here / "litefs.yml").write_text(STATIC)
    assert config.load(environ=environ)[1] == str(here / "litefs.yml")


def test_a_broken_file_is_not_skipped_in_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "litefs.yml").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"cannot read config file at .*/litefs.yml: No such file or directory"):
        config.load(environ={})


def test_nothing_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "search_paths", lambda environ: ("./litefs.yml", str(tmp_path / "etc/litefs.yml")))
    with pytest.raises(ConfigError, match=r"^config file not found: "):
        config.load(environ={})


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, reason in [(tmp_path / "no.yml", "No such file or directory"), (tmp_path, "Is a directory")]:
        with pytest.raises(ConfigError) as caught:
            config.load(str(path), environ={})
        assert str(caught.value) == f"cannot read config file at {path}: {reason}"
        assert isinstance(caught.value, UsageError)
        assert caught.value.exit_status == 2


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    file = tmp_path / "litefs.yml"
    file.write_bytes(b"log:\n  debug: \xff\n")
    with pytest.raises(ConfigError) as caught:
        config.load(str(file), environ={})
    assert str(caught.value) == f"{file}:2: not UTF-8 text"
    file.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="larger than 1048576 bytes"):
        config.load(str(file), environ={})


def test_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    file = tmp_path / "litefs.yml"
    file.write_bytes(b"\xef\xbb\xbf" + STATIC.encode())
    assert config.load(str(file), environ={})[0].lease.type == "static"
