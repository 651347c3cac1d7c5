"""From litefs.yml to the lease engine: the right one, described without secrets, and no library more than it needs."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from pathlib import Path

import pytest
from test_config import MINIMAL, engine_text

from pylitefs import config
from pylitefs.cluster.lease_port import Leader, now_s
from pylitefs.config import LeaseConfig
from pylitefs.errors import ConfigError
from pylitefs.lease.open import open_engine, timeout_of, ttl_of

SECTIONS = {
    "consul": "url: 'https://:s3cret@consul:8501/team'\nkey: a",
    "etcd": "urls: [http://e1:2379/, http://e2:2379]\nuser: u\npassword: s3cret\nttl: 3s",
    "object-store": "url: s3://b/f\nendpoint: http://u:s3cret@minio:9000\naccess-key: s3cret\nsecret-key: s3cret",
    "kubernetes": "name: my-app\nurl: http://10.96.0.1:443",
}
DESCRIPTIONS = {
    "consul": "Consul at https://consul:8501",
    "etcd": "etcd at http://e1:2379 and 1 more",
    "object-store": "the bucket s3://b/f at http://minio:9000",
    "kubernetes": "Kubernetes at http://10.96.0.1:443, lease my-app",
}


def lease_of(kind: str, section: str) -> LeaseConfig:
    return config.parse(engine_text(kind, section)).lease


@pytest.mark.parametrize("kind", SECTIONS)
def test_each_engine_is_opened_and_described(kind: str) -> None:
    async def opened() -> tuple[float, str]:
        engine, description = open_engine(lease_of(kind, SECTIONS[kind]))
        await engine.close()
        return engine.min_ttl_s, description

    min_ttl_s, description = asyncio.run(opened())
    assert description == DESCRIPTIONS[kind]
    assert 0 < min_ttl_s <= ttl_of(lease_of(kind, SECTIONS[kind]))


def test_a_directory_is_an_engine_that_works(tmp_path: Path) -> None:
    lease = lease_of("object-store", f"url: {tmp_path.as_uri()}\nttl: 1s")

    async def take() -> str:
        engine, description = open_engine(lease)
        held = await engine.acquire(Leader(1, "db1", "http://db1", 1), ttl_of(lease), b"{}", "")
        assert held is not None
        assert held.valid_until_s <= now_s() + 1.0
        await engine.release(held)
        await engine.close()
        return description

    assert asyncio.run(take()) == f"the directory {tmp_path.as_uri()}"
    assert (tmp_path / "leader").exists()


@pytest.mark.parametrize("kind", MINIMAL)
def test_every_ttl_that_is_allowed_is_one_the_engine_takes(kind: str) -> None:
    least_s = {"consul": 10, "etcd": 2, "object-store": 1, "kubernetes": 1}[kind]
    section = f"{MINIMAL[kind]}\nttl: {least_s}s" + ("\nurl: http://k" if kind == "kubernetes" else "")
    lease = lease_of(kind, section)

    async def opened() -> float:
        engine, _ = open_engine(lease)
        await engine.close()
        return engine.min_ttl_s

    assert asyncio.run(opened()) <= ttl_of(lease) == least_s
    assert 3 * timeout_of(lease) <= ttl_of(lease)  # a renewal that hangs leaves time for others


def test_a_static_lease_has_no_engine() -> None:
    lease = LeaseConfig("static")
    assert ttl_of(lease) == math.inf
    with pytest.raises(ConfigError, match="no engine"):
        open_engine(lease)


@pytest.mark.parametrize("missing", ["ca: /no/such/ca.pem", "cert: /no/such/cert.pem\nkey: /no/such/key.pem"])
def test_certificates_that_are_not_there(missing: str) -> None:
    with pytest.raises(ConfigError, match="cannot read the certificates in /no/such/"):
        open_engine(lease_of("etcd", f"urls: https://e:2379\n{missing}"))


def test_outside_of_a_pod_kubernetes_needs_an_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match="not in a pod of Kubernetes"):
        open_engine(lease_of("kubernetes", "name: a"))


@pytest.mark.parametrize(
    ("kind", "section", "loaded"),
    [
        (None, "", set()),
        ("object-store", "url: file:///tmp", set()),
        ("object-store", "url: s3://b/f", {"obstore"}),
        ("etcd", "urls: http://e:1", {"aiohttp"}),
    ],
)
def test_only_what_is_used_is_loaded(kind: str | None, section: str, loaded: set[str]) -> None:
    code = (
        "import sys\n"
        "from pylitefs import config\n"
        "from pylitefs.lease.open import open_engine, ttl_of\n"
        "lease = config.parse(sys.argv[1]).lease\n"
        "ttl_of(lease)\n"
        "if lease.engine is not None: open_engine(lease)\n"
        "print(*{name.partition('.')[0] for name in sys.modules} & {'aiohttp', 'obstore'})\n"
    )
    text = "lease:\n  type: static\n" if kind is None else engine_text(kind, section)
    done = subprocess.run([sys.executable, "-c", code, text], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert set(done.stdout.split()) == loaded
