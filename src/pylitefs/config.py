"""litefs.yml: its keys, their defaults, and the checks on them.

The keys are LiteFS's, with the same names and defaults unless marked new. They are declared once, as fields of the
frozen dataclasses below and in `config_lease`; a field's metadata (key name, kind of value, description) drives the
strict loader here and the generated reference (`pylitefs.cli.reference`).

`load` finds, reads, expands and checks a file; `parse` does it for text. Every mistake is a ConfigError of one line
that starts with the file and, where there is one, the line: `litefs.yml:12: unknown key "fuse.dri": did you mean
"fuse.dir"?`.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NoReturn, TypeVar

from pylitefs import config_env, config_yaml
from pylitefs.config_lease import (
    LEASE_TYPES,
    ConsulConfig,
    EtcdConfig,
    KubernetesConfig,
    LeaseConfig,
    ObjectStoreConfig,
    ReplicationConfig,
    lease_problems,
    replication_problems,
)
from pylitefs.config_values import (
    ADDRESS,
    BOOL,
    DURATION,
    EXEC,
    ID,
    MODE,
    SIZE,
    STRING,
    ExecCommand,
    Kind,
    ValueProblem,
    choice,
    default_of,
    key_field,
    optional,
    section_of,
    split_address,
)
from pylitefs.errors import ConfigError

__all__ = [
    "LEASE_TYPES",
    "Config",
    "ConsulConfig",
    "DataConfig",
    "EtcdConfig",
    "ExecCommand",
    "FuseConfig",
    "HttpConfig",
    "KeyInfo",
    "KubernetesConfig",
    "LeaseConfig",
    "LogConfig",
    "ObjectStoreConfig",
    "ReplicationConfig",
    "key_infos",
    "load",
    "parse",
    "search_paths",
    "validate",
]

NOT_YET_SUPPORTED = ("proxy", "backup", "tracing")
"""Keys that LiteFS has and this version has not. A key is accepted once it works, never before."""

_MAX_MESSAGE = 500  # characters of an error: a value may be a megabyte

T = TypeVar("T")


@dataclass(frozen=True)
class DataConfig:
    dir: str = key_field(
        "dir", STRING, "/var/lib/litefs", "Where the databases and their log are kept. Must not be in the mount."
    )
    compress: bool = key_field("compress", BOOL, True, "Compress the pages in the log with LZ4.")
    retention_s: float = key_field(
        "retention", DURATION, 600.0, "How long the log keeps a transaction. `0` keeps everything that fits."
    )
    retention_monitor_interval_s: float = key_field(
        "retention-monitor-interval", DURATION, 60.0, "How often old log files are removed. `0` never removes any."
    )
    max_log_size_bytes: int = key_field(
        "max-log-size",
        SIZE,
        1 << 30,
        "The most one database's log may take; beyond it the oldest files go first. `0` sets no limit.",
        new=True,
    )
    scrub_interval_s: float = key_field(
        "scrub-interval",
        DURATION,
        86400.0,
        "How often every page of every database is read and compared with its checksum. What the disk has damaged is "
        "replaced from the log or another node. `0` never does it.",
        new=True,
    )
    scrub_rate: int = key_field(
        "scrub-rate",
        SIZE,
        16 << 20,
        "The most that is read for it in a second. `0` sets no limit.",
        new=True,
    )


@dataclass(frozen=True)
class FuseConfig:
    dir: str = key_field("dir", STRING, "/litefs", "The directory to mount, where applications open their databases.")
    allow_other: bool | None = key_field(
        "allow-other",
        optional(BOOL, "true as root, else false"),
        None,
        "Let other users use the mount (LiteFS: `false`). Without root it needs `user_allow_other` in /etc/fuse.conf.",
    )
    debug: bool = key_field("debug", BOOL, False, "Log every request of the kernel.")
    passthrough: str = key_field(
        "passthrough",
        choice("auto", "off"),
        "auto",
        "`auto` lets the kernel read and write the files directly where it can (Linux 6.9 or later, as root); "
        "`off` never.",
        new=True,
    )
    io_uring: str = key_field(
        "io-uring",
        choice("auto", "off"),
        "off",
        "`off`: the kernel's requests come through /dev/fuse. `auto` takes them through io_uring where it can (Linux "
        "6.14 or later, at most 16 processors), which saves a wake-up of another processor for each: FULL commits are "
        "about a tenth quicker, and new connections a quarter. As root the daemon allows it in the kernel (module "
        "parameter `enable_uring` of `fuse`) if that is not done. But when the daemon is killed, requests then fail "
        "some hundredths of a second before the kernel has forgotten the pages: who opens a database in a rollback "
        "mode on a replica just then may be shown an old state once.",
        new=True,
    )
    uid: int | None = key_field(
        "uid", optional(ID, "none"), None, "Owner of every file in the mount. None: whoever created it.", new=True
    )
    gid: int | None = key_field(
        "gid", optional(ID, "none"), None, "Group of every file in the mount. None: that of its creator.", new=True
    )
    mode: int = key_field("mode", MODE, 0o666, "Permission bits of the database files in the mount.", new=True)


@dataclass(frozen=True)
class HttpConfig:
    addr: str = key_field(
        "addr", ADDRESS, ":20202", "Where to listen for replicas and commands; port 0 takes any free one."
    )
    snapshot_timeout_s: float = key_field(
        "snapshot-timeout",
        DURATION,
        0.0,
        "The longest that sending one snapshot may take. `0` sets no limit (LiteFS: `0` means `data.retention`).",
    )
    max_import_size_bytes: int = key_field(
        "max-import-size", SIZE, 0, "The largest database that `litefs import` may send. `0` sets no limit.", new=True
    )

    @property
    def host(self) -> str:
        """The host of `addr`; "" means every interface."""
        return split_address(self.addr)[0]

    @property
    def port(self) -> int:
        return split_address(self.addr)[1]


@dataclass(frozen=True)
class LogConfig:
    format: str = key_field("format", choice("text", "json"), "text", "Lines for people or for programs.")
    timestamp: bool = key_field("timestamp", BOOL, False, "Start every line with the time.")
    debug: bool = key_field("debug", BOOL, False, "Log details too.")


@dataclass(frozen=True)
class Config:
    """Everything in litefs.yml. Build variants with `dataclasses.replace`; `validate` checks one built by hand."""

    exit_on_error: bool = key_field(
        "exit-on-error", BOOL, True, "Exit when the start fails; `false` stays alive to be looked at."
    )
    skip_sync: bool = key_field("skip-sync", BOOL, False, "Run `exec` at once instead of when this node has caught up.")
    strict_verify: bool = key_field(
        "strict-verify", BOOL, False, "Read every database and check it after every transaction. For tests: slow."
    )
    exec: tuple[ExecCommand, ...] = key_field(
        "exec",
        EXEC,
        (),
        "Commands to run when the node is ready: one string, or a list of `cmd:` entries, each with an optional "
        "`if-candidate: true`. All but the last must succeed; litefs stops when the last one ends.",
    )
    data: DataConfig = field(
        default_factory=DataConfig, metadata=section_of("data", DataConfig, "Files on this machine.")
    )
    fuse: FuseConfig = field(default_factory=FuseConfig, metadata=section_of("fuse", FuseConfig, "The mount."))
    http: HttpConfig = field(default_factory=HttpConfig, metadata=section_of("http", HttpConfig, "The HTTP server."))
    lease: LeaseConfig = field(
        default_factory=LeaseConfig, metadata=section_of("lease", LeaseConfig, "Who is the primary.")
    )
    replication: ReplicationConfig = field(
        default_factory=ReplicationConfig,
        metadata=section_of("replication", ReplicationConfig, "Synchronous replication: whom a commit waits for."),
    )
    log: LogConfig = field(
        default_factory=LogConfig,
        metadata=section_of("log", LogConfig, "What litefs writes about itself, to standard error."),
    )

    def with_overrides(self, *, fuse_debug: bool = False, log_debug: bool = False) -> Config:
        """This configuration with the command line's switches: True turns one on, False leaves what the file says."""
        return dataclasses.replace(
            self,
            fuse=dataclasses.replace(self.fuse, debug=self.fuse.debug or fuse_debug),
            log=dataclasses.replace(self.log, debug=self.log.debug or log_debug),
        )


# --- what keys there are ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeyInfo:
    """One key, for the reference and for suggestions."""

    path: str  # "fuse.dir"
    section: str  # "fuse"; "" at the top
    kind: str
    default: str  # as one would write it
    doc: str
    new: bool  # LiteFS does not have it


def key_infos(cls: type = Config, prefix: str = "") -> Iterator[KeyInfo]:
    """Every key that holds a value, in the order of declaration, those at the top of each section first."""
    fields = sorted(dataclasses.fields(cls), key=lambda item: "section" in item.metadata)
    for item in fields:
        meta, path = item.metadata, prefix + item.metadata["key"]
        if "section" in meta:
            yield from key_infos(meta["section"], f"{path}.")
        else:
            kind: Kind = meta["kind"]
            default = "required" if meta["required"] else kind.show(default_of(item))
            yield KeyInfo(path, prefix.rstrip("."), kind.name, default, meta["doc"], meta["new"])


def sections(cls: type = Config, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, description) of every section, in the order of `key_infos`."""
    for item in dataclasses.fields(cls):
        if "section" in item.metadata:
            yield prefix + item.metadata["key"], item.metadata["doc"]
            yield from sections(item.metadata["section"], f"{prefix}{item.metadata['key']}.")


# --- finding and reading ---------------------------------------------------------------------------------------------


def search_paths(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Where the file is looked for, first match wins, when no path is given."""
    home = environ.get("HOME", "")
    return ("./litefs.yml", *([os.path.join(home, "litefs.yml")] if home else []), "/etc/litefs.yml")


def load(
    path: str | None = None, *, expand_env: bool = True, environ: Mapping[str, str] = os.environ
) -> tuple[Config, str]:
    """The configuration in the file `path`, or in the first of `search_paths`, and the absolute path it came from.

    Environment variables are expanded unless `expand_env` is false; HOSTNAME stands for this machine's name if
    `environ` has none. Raises ConfigError.
    """
    if path is not None:
        return _parse_file(_read(path), path, expand_env, environ), os.path.abspath(path)
    for candidate in search_paths(environ):
        found = os.path.abspath(candidate)
        if os.path.lexists(found):
            return _parse_file(_read(found), found, expand_env, environ), found
    looked_at = ", ".join(search_paths(environ))
    raise ConfigError(f"config file not found: write one of {looked_at}, or name it with -config")


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(config_yaml.MAX_TEXT_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"cannot read config file at {path}: {reason}") from None
    if len(content) > config_yaml.MAX_TEXT_BYTES:
        raise ConfigError(f"{path}: larger than {config_yaml.MAX_TEXT_BYTES} bytes: this is not a configuration file")
    return content


def _parse_file(content: bytes, path: str, expand_env: bool, environ: Mapping[str, str]) -> Config:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text") from None
    if expand_env:
        if not environ.get("HOSTNAME"):
            environ = {**environ, "HOSTNAME": os.uname().nodename}
        text = config_env.expand(text, environ, path)
    return parse(text, path)


def parse(text: str, source_name: str = "litefs.yml") -> Config:
    """The configuration that `text` (already expanded) describes, checked. Raises ConfigError."""
    root = config_yaml.read(text, source_name)
    loader = _Loader(source_name)
    if root is None or (isinstance(root, config_yaml.Scalar) and root.is_null):
        root = config_yaml.Mapping(1, ())
    if not isinstance(root, config_yaml.Mapping):
        raise ConfigError(f'{source_name}:{root.line}: expected "key: value" lines')
    config = loader.section(Config, root, "")
    validate(config, source_name, loader.lines)
    return config


class _Loader:
    """Builds the dataclasses from the tree, and remembers the line of every key that was set."""

    def __init__(self, source_name: str) -> None:
        self.source_name = source_name
        self.lines: dict[str, int] = {}

    def section(self, cls: type[T], node: config_yaml.Mapping, prefix: str) -> T:
        known = {item.metadata["key"]: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
        values: dict[str, object] = {}
        for entry in node.entries:
            path = prefix + entry.key
            self.lines[path] = entry.line
            if path in NOT_YET_SUPPORTED:
                self.fail(entry.line, f'"{path}" exists in LiteFS but is not supported by this version: remove it')
            if entry.key not in known:
                self.fail(entry.line, _unknownkey(path, prefix))
            item = known[entry.key]
            if "section" in item.metadata:
                values[item.name] = self.subsection(item.metadata["section"], entry.value, path)
            else:
                values[item.name] = self.value(item.metadata["kind"], entry.value, path)
        return cls(**values)

    def subsection(self, cls: type[T], node: config_yaml.Node, path: str) -> T:
        if isinstance(node, config_yaml.Scalar) and node.is_null:
            return cls()
        if not isinstance(node, config_yaml.Mapping):
            self.fail(node.line, f'{path} is a section: expected indented "key: value" lines below it')
        return self.section(cls, node, f"{path}.")

    def value(self, kind: Kind, node: config_yaml.Node, path: str) -> object:
        try:
            return kind.parse(node)
        except ValueProblem as problem:
            found = str(problem) or f"cannot be {_quoted(node)}"
            self.fail(problem.line or node.line, f"{path} {found}: expected {kind.expected}")

    def fail(self, line: int, message: str) -> NoReturn:
        raise ConfigError(f"{self.source_name}:{line}: {' '.join(message.split())[:_MAX_MESSAGE]}")


def _quoted(node: config_yaml.Node) -> str:
    if not isinstance(node, config_yaml.Scalar):
        return "a list" if isinstance(node, config_yaml.Sequence) else "a section"
    text = node.text if len(node.text) <= 60 else node.text[:60] + "…"
    return f'"{text}"'


def _unknownkey(path: str, prefix: str) -> str:
    """What to say about a key that does not exist, with the nearest that does."""
    paths = [info.path for info in key_infos()] + [name for name, _ in sections()]
    siblings = [known for known in paths if known.rpartition(".")[0] == prefix.rstrip(".")]
    by_last_word = {known.rpartition(".")[2]: known for known in reversed(paths)}
    last_word = path.rpartition(".")[2].lower().replace("_", "-")
    message = f'unknown key "{path[:80]}"'
    here = [known.removeprefix(prefix) for known in siblings]
    if near := difflib.get_close_matches(last_word, here, n=1, cutoff=0.8):
        return f'{message}: did you mean "{prefix}{near[0]}"?'
    if near := difflib.get_close_matches(last_word, by_last_word, n=1, cutoff=0.8):
        return f'{message}: did you mean "{by_last_word[near[0]]}"?'
    if near := difflib.get_close_matches(last_word, here, n=1):
        return f'{message}: did you mean "{prefix}{near[0]}"?'
    return f"{message}: known keys here are {', '.join(sorted(here))}"


# --- checks across keys ----------------------------------------------------------------------------------------------


def validate(config: Config, source_name: str = "configuration", lines: Mapping[str, int] | None = None) -> None:
    """Raise ConfigError for the first thing in `config` that cannot work together.

    `lines` maps dotted keys to the line that set them, for the message; a key that is missing is blamed on its section.
    """

    def fail(path: str, message: str) -> NoReturn:
        while path and path not in (lines or {}):
            path = path.rpartition(".")[0]
        line = (lines or {}).get(path)
        message = " ".join(message.split())[:_MAX_MESSAGE]
        raise ConfigError(f"{source_name}:{line}: {message}" if line else f"{source_name}: {message}")

    if not config.fuse.dir:
        fail("fuse.dir", "fuse.dir is empty: name the directory to mount")
    if not config.data.dir:
        fail("data.dir", "data.dir is empty: name the directory for the databases and their log")
    mount, data = os.path.realpath(config.fuse.dir), os.path.realpath(config.data.dir)
    blamed = "data.dir" if lines and "data.dir" in lines else "fuse.dir"
    if mount == data:
        fail(blamed, f"fuse.dir and data.dir are the same directory ({mount}): use two")
    if os.path.commonpath([mount, data]) == mount:
        fail(blamed, f"data.dir ({data}) is inside the mount, fuse.dir ({mount}): move it out")
    if os.path.commonpath([mount, data]) == data:
        fail(blamed, f"fuse.dir ({mount}) is inside data.dir ({data}): move it out")

    found = (*lease_problems(config.lease, lines or {}), *replication_problems(config.replication, config.lease))
    for path, message in found:
        fail(path, message)
