"""litefs.yml: every key, every refusal, and the line each refusal names."""

from __future__ import annotations

import dataclasses
import math
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
  scrub-interval: 168h
  scrub-rate: 8MB
fuse:
  dir: /mnt/db
  allow-other: no
  debug: true
  passthrough: off
  io-uring: auto
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
  priority: -5
  tags:
    zone: a
    disk: 0666
  maximum-lag: 0
  failsafe: true
  on-promote: /app tell primary
  on-demote:
    - cmd: /app tell replica
    - cmd: /app log
replication:
  sync: 2
  mode: degrade
  timeout: 1500ms
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
        data=config.DataConfig("/data", False, 5400.0, 0.5, 3 << 29, 604800.0, 8 << 20),
        fuse=config.FuseConfig("/mnt/db", False, True, "off", "auto", 1000, 100, 0o640),
        http=config.HttpConfig("127.0.0.1:8000", 120.0, 10 << 30),
        lease=LeaseConfig(
            type="static",
            hostname="123456789012",
            advertise_url="https://db1:20202/",
            candidate=False,
            promote=True,
            reconnect_delay_s=0.25,
            demote_delay_s=5.0,
            databases=("a.db", "b.db"),
            recovery_wait_s=0.0,
            priority=-5,
            tags={"zone": "a", "disk": "0666"},
            maximum_lag=0,
            failsafe=True,
            on_promote=(ExecCommand("/app tell primary"),),
            on_demote=(ExecCommand("/app tell replica"), ExecCommand("/app log")),
        ),
        replication=config.ReplicationConfig(2, "degrade", 1.5),
        log=config.LogConfig("json", True, True),
    )
    assert (read.http.host, read.http.port) == ("127.0.0.1", 8000)
    # The text above has every key there is, each with another value than its default.
    assert unchanged(Config(), read) == {"lease.consul", "lease.etcd", "lease.object-store", "lease.kubernetes"}


def unchanged(before: object, after: object, prefix: str = "") -> set[str]:
    """The keys, and the sections as a whole, in which two configurations are the same."""
    found = set()
    for field in dataclasses.fields(before):  # type: ignore[arg-type]
        path = prefix + field.metadata["key"]
        one, other = getattr(before, field.name), getattr(after, field.name)
        if one == other:
            found.add(path)
        elif dataclasses.is_dataclass(one):
            found |= unchanged(one, other, f"{path}.")
    return found


ENGINES = {
    "consul": """\
url: https://:s3cret@consul.example:8501/team/a
key: litefs/app
ttl: 15s
lock-delay: "0"
""",
    "etcd": """\
urls: [https://e1:2379, https://e2:2379]
prefix: /apps/x
user: litefs
password: 's3cret'
ca: /etc/ca.pem
cert: /etc/cert.pem
key: /etc/key.pem
ttl: 3s
""",
    "object-store": """\
url: s3://bucket/folder
endpoint: http://minio:9000
region: eu-central-1
access-key: AKIA
secret-key: s3cret
ttl: 2s
""",
    "kubernetes": """\
name: my-app
namespace: apps
url: https://10.96.0.1:443
token-file: /var/token
ca: /etc/ca.pem
ttl: 5s
""",
}
EXPECTED = {
    "consul": config.ConsulConfig("https://:s3cret@consul.example:8501/team/a", "litefs/app", 15.0, 0.0),
    "etcd": config.EtcdConfig(
        ("https://e1:2379", "https://e2:2379"), "/apps/x", "litefs", "s3cret",
        "/etc/ca.pem", "/etc/cert.pem", "/etc/key.pem", 3.0,
    ),
    "object-store": config.ObjectStoreConfig(
        "s3://bucket/folder", "http://minio:9000", "eu-central-1", "AKIA", "s3cret", 2.0
    ),
    "kubernetes": config.KubernetesConfig(
        "my-app", "apps", "https://10.96.0.1:443", "/var/token", "/etc/ca.pem", 5.0
    ),
}  # fmt: skip


def engine_text(kind: str, section: str) -> str:
    """litefs.yml for an engine; its section begins in line 4."""
    return f"lease:\n  type: {kind}\n  {kind}:\n" + "".join(f"    {line}\n" for line in section.splitlines())


@pytest.mark.parametrize("kind", ENGINES)
def test_every_key_of_an_engine_is_read(kind: str) -> None:
    lease = config.parse(engine_text(kind, ENGINES[kind])).lease
    assert lease.engine == lease.engines[kind] == EXPECTED[kind]
    assert unchanged(type(lease.engine)(), lease.engine) == set()  # each with another value than its default
    assert not lease.is_static
    # And no secret is in what might be logged.
    assert "s3cret" not in repr(lease)


def test_every_engine_is_there() -> None:
    assert set(config.LEASE_TYPES) == {"static", *ENGINES} == {"static", *LeaseConfig().engines}


MINIMAL = {
    "consul": "key: a",
    "etcd": "urls: http://e:2379",
    "object-store": "url: file:///mnt/shared",
    "kubernetes": "name: a",
}


@pytest.mark.parametrize(
    ("kind", "ttl_s"), [("consul", 10.0), ("etcd", 10.0), ("object-store", 10.0), ("kubernetes", 15.0)]
)
def test_the_least_of_an_engine(kind: str, ttl_s: float) -> None:
    lease = config.parse(engine_text(kind, MINIMAL[kind])).lease
    assert lease.engine is not None
    assert lease.engine.ttl_s == ttl_s
    assert lease.candidate
    assert (lease.own_hostname, lease.own_url(8080)) == (os.uname().nodename, f"http://{os.uname().nodename}:8080")
    text = engine_text(kind, MINIMAL[kind]).replace("lease:\n", "lease:\n  candidate: false\n  hostname: db7\n")
    replica = config.parse(text + "  databases: [a.db]\n").lease  # needs no primary's URL
    assert (replica.own_hostname, replica.own_url(1)) == ("db7", "http://db7:1")


def test_the_names_of_a_static_lease_are_the_primarys() -> None:
    names = "  hostname: db1\n  advertise-url: http://10.0.0.1:5/\n"
    primary = config.parse(f"{STATIC}{names}").lease
    replica = config.parse(f"{STATIC}{names}  candidate: false\n").lease
    assert (primary.own_hostname, primary.own_url(9)) == ("db1", "http://10.0.0.1:5")
    assert (replica.own_hostname, replica.own_url(9)) == (os.uname().nodename, f"http://{os.uname().nodename}:9")


@pytest.mark.parametrize(
    ("kind", "section", "expected"),
    [
        ("consul", "url: http://c:8500", ":3: lease.consul.key is required"),
        ("consul", "key: /", ":4: lease.consul.key is required"),
        ("consul", "key: a\nttl: 9s", ":5: lease.consul.ttl is 9s: the least is 10s (Consul has no shorter sessions)"),
        ("consul", "key: a\nttl: 1h", ":5: lease.consul.ttl is 1h: the most is 10m"),
        ("consul", "key: a\nlock-delay: 2m", ":5: lease.consul.lock-delay is longer than 60s"),
        ("consul", "key: a\nurl: ''", ":5: lease.consul.url does not start with http:// or https://: expected some"),
        ("consul", "key: a\nurl: c:8500", ":5: lease.consul.url does not start with http:// or https://: expected"),
        ("consul", "key: a\nurl: 'http://:s3cret@c:x'", ":5: lease.consul.url is not a URL: expected something like"),
        ("consul", "key: a\ntoken: s3cret", ':5: unknown key "lease.consul.token": known keys here are key, lock-dela'),
        ("etcd", "prefix: /a", ":3: lease.etcd.urls is required: the servers, such as [http://10.0.0.5:2379]"),
        ("etcd", "urls: []", ":4: lease.etcd.urls is required"),
        ("etcd", "urls:\n  - http://a:1\n  - ''", ":6: lease.etcd.urls has an empty entry: expected a URL, or a list"),
        ("etcd", "urls: [a:2379]", ':4: lease.etcd.urls: "a:2379" does not start with http:// or https://: expected'),
        (
            "etcd",
            "urls: ['http://u:s3cret@a:1']",
            ':4: lease.etcd.urls: "http://…@a:1" has more than a host and a port',
        ),
        ("etcd", "urls: http://a:1\nprefix: /", ":5: lease.etcd.prefix is empty: give the cluster a prefix of its own"),
        ("etcd", "urls: http://a:1\nuser: u", ":5: lease.etcd.user needs lease.etcd.password"),
        ("etcd", "urls: http://a:1\npassword: s3cret", ":5: lease.etcd.password needs lease.etcd.user"),
        ("etcd", "urls: http://a:1\npassword: [s3cret]", ":5: lease.etcd.password is a list: expected a string"),
        ("etcd", "urls: http://a:1\npassword: true", ":5: lease.etcd.password must be in quotes to be a string: expec"),
        ("etcd", "urls: https://a:1\ncert: /c", ":5: lease.etcd.cert needs lease.etcd.key"),
        ("etcd", "urls: https://a:1\nkey: /c", ":5: lease.etcd.key needs lease.etcd.cert"),
        ("etcd", "urls: http://a:1\nca: /c", ":4: lease.etcd.urls has a URL without TLS beside certificates: use http"),
        ("etcd", "urls: http://a:1\nttl: 1s", ":5: lease.etcd.ttl is 1s: the least is 2s"),
        ("etcd", "url: http://a:1", ':4: unknown key "lease.etcd.url": did you mean "lease.etcd.urls"?'),
        ("object-store", "region: x", ":3: lease.object-store.url is required: expected something like s3://my-bucket"),
        (
            "object-store",
            "url: bucket/x",
            ":4: lease.object-store.url is not the URL of a bucket or a directory: expec",
        ),
        (
            "object-store",
            "url: gs://b/x",
            ":4: lease.object-store.url is not the URL of a bucket or a directory: expec",
        ),
        ("object-store", "url: 's3://b/x?y=1'", ":4: lease.object-store.url is not the URL of a bucket or a directory"),
        ("object-store", "url: s3:///x", ":4: lease.object-store.url has no bucket: expected"),
        ("object-store", "url: file:///", ":4: lease.object-store.url has no directory: expected"),
        ("object-store", "url: file://mnt/x", ":4: lease.object-store.url has no directory: expected"),
        ("object-store", "url: file:///x\nregion: y", ":5: lease.object-store.region is for buckets: remove it"),
        ("object-store", "url: s3://b\nendpoint: minio", ":5: lease.object-store.endpoint does not start with http://"),
        (
            "object-store",
            "url: s3://b\naccess-key: a",
            ":5: lease.object-store.access-key needs lease.object-store.sec",
        ),
        ("object-store", "url: s3://b\nsecret-key: s3cret", ":5: lease.object-store.secret-key needs lease.object-sto"),
        ("object-store", "url: s3://b\nttl: 500ms", ":5: lease.object-store.ttl is 500ms: the least is 1s"),
        ("kubernetes", "namespace: x", ":3: lease.kubernetes.name is required: the cluster's own name, such as my-app"),
        ("kubernetes", "name: My_App", ':4: lease.kubernetes.name "My_App" cannot be the name of an object: use lower'),
        ("kubernetes", f"name: {'a' * 47}", f':4: lease.kubernetes.name "{"a" * 47}" cannot be the name of an object'),
        ("kubernetes", "name: a\nurl: x", ":5: lease.kubernetes.url does not start with http:// or https://: expected"),
        ("kubernetes", "name: a\nttl: '0'", ":5: lease.kubernetes.ttl is 0: the least is 1s"),
    ],
)
def test_a_mistake_in_an_engine_is_named(kind: str, section: str, expected: str) -> None:
    message = refused(engine_text(kind, section))
    assert message.startswith(f"litefs.yml{expected}")
    assert "s3cret" not in message


def test_the_longest_name_for_kubernetes_is_what_the_engine_takes() -> None:
    from pylitefs.lease.kubernetes import MAX_NAME

    assert config.parse(engine_text("kubernetes", f"name: {'a' * MAX_NAME}")).lease.kubernetes.name == "a" * MAX_NAME
    refused(engine_text("kubernetes", f"name: {'a' * (MAX_NAME + 1)}"))


@pytest.mark.parametrize("section", ["{}", "", "{key: a}"])
def test_the_section_of_another_engine_is_refused(section: str) -> None:
    expected = 'litefs.yml:3: lease.consul is for lease.type "consul", but lease.type is "static": remove it, or change'
    assert refused(f"{STATIC}  consul: {section}\n").startswith(expected)
    by_hand = Config(lease=LeaseConfig("static", consul=config.ConsulConfig(key="a")))
    with pytest.raises(ConfigError, match=r'^configuration: lease\.consul is for lease\.type "consul"'):
        config.validate(by_hand)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("  tags: a", ':3: lease.tags cannot be "a": expected lines of "name: text"'),
        ("  tags: {a: [b]}", ':3: lease.tags has no text for the tag "a": expected'),
        ("  tags:\n    a:", ':4: lease.tags has no text for the tag "a": expected'),
        ('  tags: {a: "b\\tc"}', ':3: lease.tags has a line break or a tab in the tag "a"'),
        (f"  tags: {{a: {'b' * 200}}}", ":3: lease.tags has a tag that is empty or longer than 200 characters"),
        (f"  tags: {{{', '.join(f'a{n}: b' for n in range(33))}}}", ":3: lease.tags has more than 32 tags"),
        ("  priority: high", ':3: lease.priority cannot be "high": expected a number such as 10 or -10'),
        ("  maximum-lag: -1", ':3: lease.maximum-lag cannot be "-1": expected a number such as 0, 1 or 100'),
        ("  maximum-lag: 10s", ':3: lease.maximum-lag cannot be "10s": expected a number'),
        ("  on-promote: [{cmd: a, if-candidate: true}]", ":3: lease.on-promote has an if-candidate, which is for exec"),
        ("  on-demote: a 'b", ":3: lease.on-demote cannot be split into words: no closing quotation"),
        ("replication:\n  sync: -1", ':4: replication.sync cannot be "-1": expected a number'),
        ("replication:\n  sync: 17", ":4: replication.sync is 17: at most 16 replicas can be waited for"),
        ("replication:\n  mode: async", ':4: replication.mode cannot be "async": expected "wait" or "degrade"'),
        (
            "replication:\n  mode: degrade\n  timeout: '0'",
            ':5: replication.timeout cannot be 0 with replication.mode "degrade": say how long a commit waits',
        ),
    ],
)
def test_mistakes_in_the_keys_of_a_cluster(line: str, expected: str) -> None:
    assert refused(f"{STATIC}{line}\n").startswith(f"litefs.yml{expected}")


@pytest.mark.parametrize(
    ("text", "limit_s"),
    [
        ("{}", math.inf),
        ("{sync: 1}", math.inf),
        ("{mode: wait, timeout: '0'}", math.inf),
        ("{mode: wait, timeout: 3s}", 3.0),
        ("{mode: degrade}", 5.0),
        ("{mode: degrade, timeout: 1s}", 1.0),
    ],
)
def test_how_long_a_commit_waits(text: str, limit_s: float) -> None:
    assert config.parse(f"{STATIC}replication: {text}\n").replication.limit_s == limit_s


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
        "lease.consul.url": "http://127.0.0.1:8500",
        "lease.consul.key": "required",
        "lease.consul.ttl": "10s",
        "lease.consul.lock-delay": "1s",
        "log.format": "text",
        "log.timestamp": "false",
        "log.debug": "false",
    }


def test_new_keys_and_their_defaults() -> None:
    shown = {info.path: info.default for info in config.key_infos() if info.new}
    assert shown == {
        "data.max-log-size": "1GB",
        "data.scrub-interval": "24h",
        "data.scrub-rate": "16MB",
        "fuse.passthrough": "auto",
        "fuse.io-uring": "off",
        "fuse.uid": "none",
        "fuse.gid": "none",
        "fuse.mode": "0666",
        "http.max-import-size": "0",
        "lease.recovery-wait": "3s",
        "lease.priority": "0",
        "lease.tags": "{}",
        "lease.maximum-lag": "none",
        "lease.failsafe": "false",
        "lease.on-promote": "[]",
        "lease.on-demote": "[]",
        "lease.etcd.urls": "required",
        "lease.etcd.prefix": "/litefs/",
        "lease.etcd.user": '""',
        "lease.etcd.password": '""',
        "lease.etcd.ca": '""',
        "lease.etcd.cert": '""',
        "lease.etcd.key": '""',
        "lease.etcd.ttl": "10s",
        "lease.object-store.url": "required",
        "lease.object-store.endpoint": '""',
        "lease.object-store.region": '""',
        "lease.object-store.access-key": '""',
        "lease.object-store.secret-key": '""',
        "lease.object-store.ttl": "10s",
        "lease.kubernetes.name": "required",
        "lease.kubernetes.namespace": '""',
        "lease.kubernetes.url": '""',
        "lease.kubernetes.token-file": '""',
        "lease.kubernetes.ca": '""',
        "lease.kubernetes.ttl": "15s",
        "replication.sync": "0",
        "replication.mode": "wait",
        "replication.timeout": "none with `wait`, 5s with `degrade`",
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
        ("", 'litefs.yml: lease.type is required: one of "static", "consul", "etcd", "object-store", "kubernetes"'),
        ("lease:\n  type: ''\n", 'litefs.yml:2: lease.type is required: one of "static", '),
        ("lease:\n  type: zk\n", 'litefs.yml:2: invalid lease type "zk": expected one of "static", "consul", '),
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
