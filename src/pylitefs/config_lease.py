"""The sections `lease` and `replication` of litefs.yml: who is the primary, and for whom a commit waits.

`lease.type` names the engine; each engine has a section of its own below `lease`, and only that of the type in use may
be there. `problems` gives what cannot work together; `config.validate` turns it into an error with its line.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from pylitefs.config_values import (
    BOOL,
    COUNT,
    DURATION,
    HOOK,
    INTEGER,
    NAMES,
    SECRET,
    STRING,
    TAGS,
    URLS,
    ExecCommand,
    choice,
    format_duration,
    key_field,
    optional,
    section_of,
)

LEASE_TYPES = ("static", "consul", "etcd", "object-store", "kubernetes")
"""The values of lease.type. All but the first are engines, with a section of their own."""

MIN_TTL_S = {"consul": 10.0, "etcd": 2.0, "object-store": 1.0, "kubernetes": 1.0}
"""Consul's sessions have no shorter one; etcd's servers grant none; the others are read twice a second."""

MAX_TTL_S = 600.0
DEGRADE_TIMEOUT_S = 5.0
MAX_SYNC = 16

_KUBERNETES_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,44}[a-z0-9])?")  # "-ID" must fit behind it, in 63 characters

Problem = tuple[str, str]
"""The key to blame, and what to say."""


@dataclass(frozen=True)
class ConsulConfig:
    """`lease.consul`."""

    url: str = key_field(
        "url",
        SECRET,
        "http://127.0.0.1:8500",
        "`http(s)://[:TOKEN@]HOST[:PORT][/PREFIX]`: the agent, with an ACL token and a prefix for all keys.",
        secret=True,
    )
    key: str = key_field("key", STRING, "", "The cluster's own key, such as `litefs/my-app`.", required=True)
    ttl_s: float = key_field(
        "ttl", DURATION, 10.0, "How long the lease is held without a sign of life. Consul's least is 10s."
    )
    lock_delay_s: float = key_field(
        "lock-delay", DURATION, 1.0, "How long Consul keeps the key from others after a session has ended by itself."
    )


@dataclass(frozen=True)
class EtcdConfig:
    """`lease.etcd`."""

    urls: tuple[str, ...] = key_field(
        "urls", URLS, (), "Client URLs of the servers, such as `http://10.0.0.5:2379`: any will do.",
        new=True, required=True,
    )  # fmt: skip
    prefix: str = key_field("prefix", STRING, "/litefs/", "The cluster's own prefix of all keys.", new=True)
    user: str = key_field("user", STRING, "", "For servers with authentication.", new=True)
    password: str = key_field(
        "password", SECRET, "", "Of that user, for example `${ETCD_PASSWORD}`.", new=True, secret=True
    )
    ca: str = key_field("ca", STRING, "", "File with the certificates to trust. Empty: the system's.", new=True)
    cert: str = key_field(
        "cert", STRING, "", "File with this node's certificate, for servers that ask for one.", new=True
    )
    key: str = key_field("key", STRING, "", "File with the certificate's private key.", new=True)
    ttl_s: float = key_field(
        "ttl", DURATION, 10.0, "How long the lease is held without a sign of life. The least is 2s.", new=True
    )


@dataclass(frozen=True)
class ObjectStoreConfig:
    """`lease.object-store`."""

    url: str = key_field(
        "url",
        STRING,
        "",
        "`s3://BUCKET/FOLDER`, or `file:///DIRECTORY` on a file system that all nodes share. The folder is the "
        "cluster's own.",
        new=True,
        required=True,
    )
    endpoint: str = key_field("endpoint", STRING, "", "URL of an S3-compatible server. Empty: Amazon's.", new=True)
    region: str = key_field(
        "region", STRING, "", "Empty: that of the environment (`AWS_REGION`), or us-east-1.", new=True
    )
    access_key: str = key_field(
        "access-key", STRING, "", "Empty: from the environment (`AWS_ACCESS_KEY_ID`), or the machine's role.", new=True
    )
    secret_key: str = key_field(
        "secret-key", SECRET, "", "Belongs to it, for example `${S3_SECRET_KEY}`.", new=True, secret=True
    )
    ttl_s: float = key_field(
        "ttl", DURATION, 10.0, "How long the lease is held without a sign of life. The least is 1s.", new=True
    )


@dataclass(frozen=True)
class KubernetesConfig:
    """`lease.kubernetes`."""

    name: str = key_field("name", STRING, "", "The cluster's own name for its Lease objects.", new=True, required=True)
    namespace: str = key_field("namespace", STRING, "", "Empty: the pod's.", new=True)
    url: str = key_field("url", STRING, "", "The API server. Empty: what a pod finds in its environment.", new=True)
    token_file: str = key_field(
        "token-file", STRING, "", "File with a bearer token. Empty: the pod's account.", new=True
    )
    ca: str = key_field("ca", STRING, "", "File with the certificates to trust. Empty: the pod's.", new=True)
    ttl_s: float = key_field(
        "ttl", DURATION, 15.0, "How long the lease is held without a sign of life. The least is 1s.", new=True
    )


@dataclass(frozen=True)
class LeaseConfig:
    """`lease`."""

    type: str = key_field(
        "type",
        STRING,
        "",
        "Who decides which node is the primary: `static` (this file does), or an engine that all nodes reach: "
        "`consul`, `etcd`, `object-store` or `kubernetes`.",
        required=True,
    )
    hostname: str = key_field(
        "hostname",
        STRING,
        "",
        "This node's name, which applications on a replica read from `.primary`. Empty: the machine's. "
        "With a static lease: the primary's name, on every node.",
    )
    advertise_url: str = key_field(
        "advertise-url",
        STRING,
        "",
        "Where other nodes reach this one. Empty: `http://HOSTNAME:PORT` with the port of `http.addr`. With a static "
        "lease: the primary's URL, such as `http://10.0.0.1:20202`, required on a replica.",
    )
    candidate: bool = key_field(
        "candidate",
        BOOL,
        True,
        "Whether this node may become the primary. With a static lease: `true` on the one primary, `false` on every "
        "replica.",
    )
    promote: bool = key_field(
        "promote",
        BOOL,
        False,
        "Become the primary once this node has caught up, by a switchover. No effect with a static lease.",
    )
    reconnect_delay_s: float = key_field(
        "reconnect-delay", DURATION, 1.0, "Shortest pause before a replica connects again; it grows, with jitter."
    )
    demote_delay_s: float = key_field(
        "demote-delay",
        DURATION,
        10.0,
        "Accepted, without effect (LiteFS: pause after a forced demotion): a lease that was passed on is left to its "
        "successor for a quarter of its time.",
    )
    databases: tuple[str, ...] = key_field(
        "databases", NAMES, (), "On a replica: copy only these databases. Empty: all. Forbidden on a candidate."
    )
    recovery_wait_s: float = key_field(
        "recovery-wait",
        DURATION,
        3.0,
        "How long a primary that was not stopped cleanly waits for its replicas to give back transactions "
        "that its own disk lost.",
        new=True,
    )
    priority: int = key_field(
        "priority", INTEGER, 0, "Of candidates with the same data, the one with the highest wins.", new=True
    )
    tags: Mapping[str, str] = key_field(
        "tags", TAGS, dict, "What `litefs status` and `/cluster` say about this node: `zone: a`.", new=True
    )
    maximum_lag: int | None = key_field(
        "maximum-lag",
        optional(COUNT, "none"),
        None,
        "A candidate that is more transactions behind the best that is known does not take the lease, even if nobody "
        "else can. None: no limit.",
        new=True,
    )
    failsafe: bool = key_field(
        "failsafe",
        BOOL,
        False,
        "Where the engine cannot be reached, the primary stays the primary as long as every known member confirms it.",
        new=True,
    )
    on_promote: tuple[ExecCommand, ...] = key_field(
        "on-promote",
        HOOK,
        (),
        "Commands to run when this node has become the primary, written like `exec`; the node goes on whatever they "
        "return. They find LITEFS_ROLE, LITEFS_EPOCH, LITEFS_NODE_ID and LITEFS_PRIMARY_URL in their environment.",
        new=True,
    )
    on_demote: tuple[ExecCommand, ...] = key_field(
        "on-demote", HOOK, (), "The same for when it has stopped being the primary.", new=True
    )
    consul: ConsulConfig = field(
        default_factory=ConsulConfig, metadata=section_of("consul", ConsulConfig, "For `lease.type: consul`.")
    )
    etcd: EtcdConfig = field(
        default_factory=EtcdConfig,
        metadata=section_of("etcd", EtcdConfig, "For `lease.type: etcd`, version 3.4 or later."),
    )
    object_store: ObjectStoreConfig = field(
        default_factory=ObjectStoreConfig,
        metadata=section_of(
            "object-store",
            ObjectStoreConfig,
            "For `lease.type: object-store`: a bucket with conditional writes (If-Match), or a shared directory.",
        ),
    )
    kubernetes: KubernetesConfig = field(
        default_factory=KubernetesConfig,
        metadata=section_of(
            "kubernetes", KubernetesConfig, "For `lease.type: kubernetes`: objects of coordination.k8s.io/v1."
        ),
    )

    @property
    def is_static(self) -> bool:
        return self.type == "static"

    @property
    def engine(self) -> ConsulConfig | EtcdConfig | ObjectStoreConfig | KubernetesConfig | None:
        """The section of the engine in use; None with a static lease."""
        return self.engines.get(self.type)

    @property
    def engines(self) -> dict[str, ConsulConfig | EtcdConfig | ObjectStoreConfig | KubernetesConfig]:
        """The section of every engine by its type."""
        return {
            "consul": self.consul,
            "etcd": self.etcd,
            "object-store": self.object_store,
            "kubernetes": self.kubernetes,
        }

    @property
    def own_hostname(self) -> str:
        """This node's name: on a static replica `hostname` is another node's."""
        own = self.hostname if self.candidate or not self.is_static else ""
        return own or os.uname().nodename

    def own_url(self, port: int) -> str:
        """Where other nodes reach this one, which listens at `port`."""
        own = self.advertise_url if self.candidate or not self.is_static else ""
        return own.rstrip("/") or f"http://{self.own_hostname}:{port}"


@dataclass(frozen=True)
class ReplicationConfig:
    """`replication`."""

    sync: int = key_field(
        "sync",
        COUNT,
        0,
        "How many replicas must hold a transaction on their disks before the primary acknowledges it. `0`: none.",
        new=True,
    )
    mode: str = key_field(
        "mode",
        choice("wait", "degrade"),
        "wait",
        "What happens while there are fewer: `wait` makes commits wait, `degrade` acknowledges them after the timeout, "
        "as with `sync: 0`, until there are enough again.",
        new=True,
    )
    timeout_s: float | None = key_field(
        "timeout",
        optional(DURATION, "none with `wait`, 5s with `degrade`"),
        None,
        "How long a commit waits for its replicas. With `wait` it fails then; `0` sets no limit.",
        new=True,
    )

    @property
    def limit_s(self) -> float:
        """How long a commit waits: `timeout`, or what stands for it; math.inf without a limit."""
        if self.timeout_s is None:
            return DEGRADE_TIMEOUT_S if self.mode == "degrade" else math.inf
        return self.timeout_s or math.inf


# --- checks ----------------------------------------------------------------------------------------------------------


def lease_problems(lease: LeaseConfig, is_set: Mapping[str, int]) -> Iterator[Problem]:
    """Everything in `lease` that cannot be. `is_set`: the keys that the file has, with their lines."""
    supported = ", ".join(f'"{name}"' for name in LEASE_TYPES)
    if not lease.type:
        yield "lease.type", f"lease.type is required: one of {supported}"
        return
    if lease.type not in LEASE_TYPES:
        yield "lease.type", f'invalid lease type "{lease.type}": expected one of {supported}'
        return
    for name, engine in lease.engines.items():
        if name != lease.type and (f"lease.{name}" in is_set or engine != type(engine)()):
            yield (
                f"lease.{name}",
                f'lease.{name} is for lease.type "{name}", but lease.type is "{lease.type}": remove it, or change '
                "lease.type",
            )
    if lease.candidate and lease.databases:
        yield "lease.databases", "lease.databases is for replicas only: remove it, or set lease.candidate to false"
    if lease.is_static and not lease.candidate and not lease.advertise_url:
        yield (
            "lease.candidate",
            "a replica (lease.candidate: false) needs the primary's URL in lease.advertise-url",
        )
    if lease.advertise_url and (problem := url_problem(lease.advertise_url)):
        yield (
            "lease.advertise-url",
            f'lease.advertise-url "{lease.advertise_url}" {problem}: expected something like http://10.0.0.1:20202',
        )
    if lease.engine is not None:
        yield from _ttl_problems(lease.type, lease.engine.ttl_s)
        yield from _engine_problems(lease)


def replication_problems(replication: ReplicationConfig, lease: LeaseConfig) -> Iterator[Problem]:
    """Everything in `replication` that cannot be."""
    if replication.sync > MAX_SYNC:
        yield (
            "replication.sync",
            f"replication.sync is {replication.sync}: at most {MAX_SYNC} replicas can be waited for",
        )
    if replication.mode == "degrade" and replication.timeout_s == 0:
        yield (
            "replication.timeout",
            'replication.timeout cannot be 0 with replication.mode "degrade": say how long a commit waits, such as 5s',
        )


def _ttl_problems(name: str, ttl_s: float) -> Iterator[Problem]:
    path, least_s = f"lease.{name}.ttl", MIN_TTL_S[name]
    if ttl_s < least_s:
        whose = "Consul has no shorter sessions" if name == "consul" else "a shorter one could not be held safely"
        yield path, f"{path} is {format_duration(ttl_s)}: the least is {format_duration(least_s)} ({whose})"
    elif ttl_s > MAX_TTL_S:
        yield path, f"{path} is {format_duration(ttl_s)}: the most is {format_duration(MAX_TTL_S)}"


def _engine_problems(lease: LeaseConfig) -> Iterator[Problem]:
    match lease.engine:
        case ConsulConfig() as consul:
            yield from _consul_problems(consul)
        case EtcdConfig() as etcd:
            yield from _etcd_problems(etcd)
        case ObjectStoreConfig() as store:
            yield from _object_store_problems(store)
        case KubernetesConfig() as kubernetes:
            yield from _kubernetes_problems(kubernetes)


def _consul_problems(consul: ConsulConfig) -> Iterator[Problem]:
    if problem := url_problem(consul.url, more=True):
        yield "lease.consul.url", f"lease.consul.url {problem}: expected something like http://127.0.0.1:8500"
    if not consul.key.strip("/"):
        yield "lease.consul.key", "lease.consul.key is required: the cluster's own key, such as litefs/my-app"
    if consul.lock_delay_s > 60:
        yield "lease.consul.lock-delay", "lease.consul.lock-delay is longer than 60s, the most that Consul takes"


def _etcd_problems(etcd: EtcdConfig) -> Iterator[Problem]:
    if not etcd.urls:
        yield "lease.etcd.urls", "lease.etcd.urls is required: the servers, such as [http://10.0.0.5:2379]"
    for url in etcd.urls:
        if problem := url_problem(url):
            yield (
                "lease.etcd.urls",
                f'lease.etcd.urls: "{_without_password(url)}" {problem}: expected something like http://10.0.0.5:2379',
            )
    if not etcd.prefix.strip("/"):
        yield "lease.etcd.prefix", "lease.etcd.prefix is empty: give the cluster a prefix of its own, such as /litefs/"
    if etcd.user and not etcd.password:
        yield "lease.etcd.user", "lease.etcd.user needs lease.etcd.password"
    if etcd.password and not etcd.user:
        yield "lease.etcd.password", "lease.etcd.password needs lease.etcd.user"
    if bool(etcd.cert) != bool(etcd.key):
        have, lack = ("cert", "key") if etcd.cert else ("key", "cert")
        yield f"lease.etcd.{have}", f"lease.etcd.{have} needs lease.etcd.{lack}"
    if (etcd.ca or etcd.cert) and any(url.startswith("http:") for url in etcd.urls):
        yield "lease.etcd.urls", "lease.etcd.urls has a URL without TLS beside certificates: use https://"


def _object_store_problems(store: ObjectStoreConfig) -> Iterator[Problem]:
    try:
        parts = urlsplit(store.url)
        scheme, bucket, path = parts.scheme, parts.hostname or "", unquote(parts.path)
        more = bool(parts.query or parts.fragment or parts.username is not None or parts.port)
    except ValueError:
        scheme, bucket, path, more = "", "", "", True
    example = "expected something like s3://my-bucket/litefs/my-app or file:///mnt/shared/litefs"
    if not store.url:
        yield "lease.object-store.url", f"lease.object-store.url is required: {example}"
    elif scheme not in ("s3", "file") or more:
        yield "lease.object-store.url", f"lease.object-store.url is not the URL of a bucket or a directory: {example}"
    elif scheme == "s3" and not bucket:
        yield "lease.object-store.url", f"lease.object-store.url has no bucket: {example}"
    elif scheme == "file" and (bucket not in ("", "localhost") or not path.strip("/")):
        yield "lease.object-store.url", f"lease.object-store.url has no directory: {example}"
    if scheme == "file":
        for name in ("endpoint", "region", "access-key", "secret-key"):
            if getattr(store, name.replace("-", "_")):
                yield f"lease.object-store.{name}", f"lease.object-store.{name} is for buckets: remove it"
    if store.endpoint and (problem := url_problem(store.endpoint, more=True)):
        yield (
            "lease.object-store.endpoint",
            f"lease.object-store.endpoint {problem}: expected something like https://s3.example.com",
        )
    if bool(store.access_key) != bool(store.secret_key):
        have, lack = ("access-key", "secret-key") if store.access_key else ("secret-key", "access-key")
        yield f"lease.object-store.{have}", f"lease.object-store.{have} needs lease.object-store.{lack}"


def _kubernetes_problems(kubernetes: KubernetesConfig) -> Iterator[Problem]:
    if not kubernetes.name:
        yield "lease.kubernetes.name", "lease.kubernetes.name is required: the cluster's own name, such as my-app"
    elif not _KUBERNETES_NAME.fullmatch(kubernetes.name):
        yield (
            "lease.kubernetes.name",
            f'lease.kubernetes.name "{kubernetes.name}" cannot be the name of an object: use lower-case letters, '
            'digits and "-", at most 46 of them',
        )
    if kubernetes.url and (problem := url_problem(kubernetes.url)):
        yield "lease.kubernetes.url", f"lease.kubernetes.url {problem}: expected something like https://10.96.0.1:443"


def url_problem(url: str, *, more: bool = False) -> str:
    """What is wrong with a URL; "" when nothing is. `more`: it may have a user and a path beside host and port."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        return f"is not a URL ({str(error).lower()})" if not more else "is not a URL"
    if parts.scheme not in ("http", "https"):
        return "does not start with http:// or https://"
    if not host or any(character.isspace() for character in url):
        return "has no valid host"
    if port == 0:
        return "has port 0"
    if not more and (parts.path not in ("", "/") or parts.query or parts.fragment or parts.username is not None):
        return "has more than a host and a port"
    return ""


def _without_password(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//…@", url)
