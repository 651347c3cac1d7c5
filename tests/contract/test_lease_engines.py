"""What is peculiar to one lease engine: how nodes reach it and prove who they are, and what others see in it."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lease_services import Service, base64_text, consul, etcd, kubernetes, request
from lease_subjects import Services
from test_lease_contract import acquire, eventually, leader

from pylitefs.cluster.lease_port import ABSENT, Leader, LeaseLost, Member
from pylitefs.errors import ConfigError, Unavailable
from pylitefs.lease.consul import Address, ConsulEngine
from pylitefs.lease.etcd import EtcdEngine
from pylitefs.lease.http_json import tls_context
from pylitefs.lease.kubernetes import open_kubernetes

HELD_S = 60.0

# --- Consul


def consul_value(service: Service, key: str, headers: dict[str, str] | None = None) -> dict[str, Any]:
    return dict(json.loads(request("GET", f"{service.url}/v1/kv/{key}", headers=headers))[0])


async def test_consul_shows_what_litefs_shows(services: Services) -> None:
    service = services.get("consul")
    engine = ConsulEngine(service.url, "shown/primary", timeout_s=5.0)
    held = await engine.acquire(Leader(0xAB, "alpha", "http://alpha:20202", 4), HELD_S, b'{"x":1}', ABSENT)
    assert held is not None
    found = await asyncio.to_thread(consul_value, service, "shown/primary")
    value = json.loads(base64.b64decode(found["Value"]))
    assert (value["hostname"], value["advertise-url"]) == ("alpha", "http://alpha:20202")
    assert (value["node-id"], value["epoch"]) == ("00000000000000ab", 4)
    session = json.loads(await asyncio.to_thread(request, "GET", f"{service.url}/v1/session/info/{found['Session']}"))[
        0
    ]
    assert (session["Name"], session["Behavior"], session["TTL"]) == ("litefs", "delete", "60s")
    assert session["LockDelay"] == 1_000_000_000
    await engine.release(held)
    await engine.close()
    sessions = json.loads(await asyncio.to_thread(request, "GET", f"{service.url}/v1/session/list"))
    assert found["Session"] not in [session["ID"] for session in sessions]


async def test_a_primary_that_is_a_node_of_litefs_is_respected(services: Services) -> None:
    """It renews its session and nothing else; nobody takes the lease while that lives, and everybody sees who it is."""
    service = services.get("consul")
    created = await asyncio.to_thread(
        request, "PUT", f"{service.url}/v1/session/create", {"Name": "litefs", "Behavior": "delete", "TTL": "10s"}
    )
    session = json.loads(created)["ID"]
    value = {"hostname": "old", "advertise-url": "http://old:20202"}
    url = f"{service.url}/v1/kv/legacy/primary?acquire={session}"
    assert await asyncio.to_thread(request, "PUT", url, value) == b"true"
    engine = ConsulEngine(service.url, "legacy/primary", timeout_s=5.0)
    assert (await engine.view()).leader == Leader(0, "old", "http://old:20202", 0)
    await asyncio.sleep(1.5)  # more than a lease of ours and its margin would have
    assert (await engine.view()).leader is not None
    assert await acquire(engine, 1, 1.0) is None
    await asyncio.to_thread(request, "PUT", f"{service.url}/v1/kv/legacy/primary?release={session}", value)
    assert (await engine.view()).leader is None
    assert await acquire(engine, 1, HELD_S)
    await engine.close()


async def test_a_consul_session_that_is_destroyed_takes_lease_and_entry_with_it(services: Services) -> None:
    service = services.get("consul")
    engine = ConsulEngine(service.url, "destroyed/primary", timeout_s=5.0, lock_delay_s=0.0)
    held = await acquire(engine, 1, HELD_S)
    assert held is not None
    await engine.announce(Member(1), HELD_S)
    key = f"destroyed/primary/members/{1:016x}"
    for session in (held.token, (await asyncio.to_thread(consul_value, service, key))["Session"]):
        await asyncio.to_thread(request, "PUT", f"{service.url}/v1/session/destroy/{session}")
    with pytest.raises(LeaseLost):
        await engine.renew(held)
    assert (await engine.view()).members == ()
    await engine.announce(Member(1), HELD_S)
    assert (await engine.view()).members == (Member(1),)
    await engine.close()


async def test_clusters_side_by_side_in_consul(services: Services) -> None:
    """Keys of which one begins with the other."""
    service = services.get("consul")
    short, longer = (ConsulEngine(service.url, key, timeout_s=5.0) for key in ("beside", "beside2"))
    assert await acquire(longer, 1, HELD_S)
    assert (await short.view()).leader is None
    assert await acquire(short, 2, HELD_S)
    assert (await longer.view()).leader == leader(1, 1)
    await asyncio.gather(short.close(), longer.close())


async def test_consul_with_tokens_and_a_prefix(tmp_path: Path) -> None:
    """A token that may touch nothing but its prefix, as hosted Consuls give them."""
    acl = {"enabled": True, "default_policy": "deny", "tokens": {"master": "root-token", "agent": "root-token"}}
    with await asyncio.to_thread(consul, tmp_path / "consul", {"acl": acl}) as service:
        root = {"X-Consul-Token": "root-token"}
        rules = "".join(f'{kind}_prefix "apps/blog" {{ policy = "write" }}\n' for kind in ("key", "node", "session"))
        await eventually_put(f"{service.url}/v1/acl/policy", {"Name": "blog", "Rules": rules}, root)
        made = await eventually_put(f"{service.url}/v1/acl/token", {"Policies": [{"Name": "blog"}]}, root)
        token = json.loads(made)["SecretID"]
        host = service.url.removeprefix("http://")
        engine = ConsulEngine(f"http://:{token}@{host}/apps/blog", "primary", timeout_s=5.0)
        held = await acquire(engine, 1, HELD_S)
        assert held is not None
        await engine.announce(Member(1), HELD_S)
        held = await engine.renew(held)
        found = await asyncio.to_thread(consul_value, service, "apps/blog/primary", root)
        session = await asyncio.to_thread(
            request, "GET", f"{service.url}/v1/session/info/{found['Session']}", None, root
        )
        assert json.loads(session)[0]["Node"] == "apps/blog/litefs"
        await engine.release(held)
        await engine.close()
        wrong = ConsulEngine(f"http://:wrong-token@{host}/apps/blog", "primary", timeout_s=5.0)
        with pytest.raises(Unavailable, match="check the credentials") as caught:
            await acquire(wrong, 1, HELD_S)
        assert "wrong-token" not in str(caught.value)
        await wrong.close()


async def eventually_put(url: str, document: object, headers: dict[str, str]) -> bytes:
    """Consul's ACLs are ready a little after its leader is."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await asyncio.to_thread(request, "PUT", url, document, headers)
            except OSError:
                await asyncio.sleep(0.2)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8500", Address("http://127.0.0.1:8500", "", "")),
        ("https://:s%2Fcret@consul.example", Address("https://consul.example", "s/cret", "")),
        ("https://:t@c.example:8501/shared-x/app/", Address("https://c.example:8501", "t", "shared-x/app")),
        ("http://[::1]:8500/a", Address("http://[::1]:8500", "", "a")),
    ],
)
def test_what_a_consul_url_says(url: str, expected: Address) -> None:
    assert Address.parse(url) == expected


@pytest.mark.parametrize("url", ["", "localhost:8500", "ftp://:secret@h/x", "http://:secret@h:99999", "http://"])
def test_what_is_no_consul_url(url: str) -> None:
    with pytest.raises(ConfigError, match=r"lease\.consul\.url") as caught:
        Address.parse(url)
    assert "secret" not in str(caught.value)


# --- etcd


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA of the tests' own, and certificates of it for a server and a client."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *new_key, "-keyout", "ca.key", "-out", "ca.crt", "-days", "2", "-subj", "/CN=test CA")
    (folder / "extensions").write_text("subjectAltName=IP:127.0.0.1\n")
    for name in ("server", "client"):
        openssl("req", *new_key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signing = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "extensions")
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.crt", *signing)
    return folder


@pytest.fixture
def etcd_with_tls(certificates: Path, tmp_path: Path) -> Iterator[Service]:
    files = {"cert-file": "server.crt", "key-file": "server.key", "trusted-ca-file": "ca.crt"}
    options = [f"--{name}={certificates / file}" for name, file in files.items()]

    def ready() -> bool:
        with socket.create_connection(("127.0.0.1", service.port), timeout=2):
            return b"ready to serve client requests" in (service.folder / "log").read_bytes()

    service = etcd(tmp_path / "etcd", *options, "--client-cert-auth", ready=ready, scheme="https")
    with service:
        yield service


async def test_etcd_with_certificates(etcd_with_tls: Service, certificates: Path) -> None:
    ca, cert, key = (str(certificates / name) for name in ("ca.crt", "client.crt", "client.key"))
    engine = EtcdEngine([etcd_with_tls.url], "litefs/a", tls=tls_context(ca, cert, key), timeout_s=5.0)
    held = await acquire(engine, 1, HELD_S)
    assert held is not None
    assert not await engine.wait(await engine.view(), 0.2)
    await engine.release(held)
    await engine.close()
    for tls in (tls_context(cert=cert, key=key), tls_context(ca)):  # an unknown server, a client without certificate
        stranger = EtcdEngine([etcd_with_tls.url], "litefs/a", tls=tls, timeout_s=5.0)
        with pytest.raises(Unavailable) as caught:
            await stranger.view()
        assert "\n" not in str(caught.value)
        await stranger.close()


@pytest.mark.parametrize("ca", ["/no/such/file", __file__])
def test_certificates_that_cannot_be_read(ca: str) -> None:
    with pytest.raises(ConfigError, match="cannot read the certificates"):
        tls_context(ca)


async def test_etcd_with_users(tmp_path: Path) -> None:
    with await asyncio.to_thread(etcd, tmp_path / "etcd") as service:
        v3 = f"{service.url}/v3/auth"
        everything = {"key": base64_text("/litefs/"), "range_end": base64_text("/litefs0"), "permType": "READWRITE"}
        for path, document in {
            "user/add": {"name": "root", "password": "r"}, "user/grant": {"user": "root", "role": "root"},
            "role/add": {"name": "nodes"}, "role/grant": {"name": "nodes", "perm": everything},
        }.items():  # fmt: skip
            await asyncio.to_thread(request, "POST", f"{v3}/{path}", document)
        await asyncio.to_thread(request, "POST", f"{v3}/user/add", {"name": "node", "password": "secret"})
        await asyncio.to_thread(request, "POST", f"{v3}/user/grant", {"user": "node", "role": "nodes"})
        await asyncio.to_thread(request, "POST", f"{v3}/enable", {})
        engine = EtcdEngine([service.url], "litefs/a", user="node", password="secret", timeout_s=5.0)
        held = await acquire(engine, 1, HELD_S)
        assert held is not None
        await engine.announce(Member(1), HELD_S)
        for stale in ("nonsense.1", ""):
            engine._http.headers["Authorization"] = stale  # as after etcd has forgotten it
            held = await engine.renew(held)
            await engine.announce(Member(1, priority=len(stale)), HELD_S)
        assert not await engine.wait(await engine.view(), 0.2)
        await engine.release(held)
        await engine.close()
        for user, password, prefix in (
            ("", "", "litefs/a"),
            ("node", "wrong", "litefs/a"),
            ("node", "secret", "other"),
        ):
            stranger = EtcdEngine([service.url], prefix, user=user, password=password, timeout_s=5.0)
            with pytest.raises(Unavailable, match=r"lease\.etcd") as caught:
                await stranger.view()
            assert "secret" not in str(caught.value)
            await stranger.close()


async def test_one_of_several_etcd_servers_is_enough(services: Services) -> None:
    """One that is gone, one that accepts and says nothing; the third answers, and is asked first from then on."""
    service = services.get("etcd")
    gone, silent = socket.socket(), socket.socket()
    gone.bind(("127.0.0.1", 0))
    silent.bind(("127.0.0.1", 0))
    silent.listen(16)
    urls = [f"http://127.0.0.1:{place.getsockname()[1]}" for place in (gone, silent)] + [service.url]
    engine = EtcdEngine(urls, "litefs/several", timeout_s=1.5)
    try:
        assert (await engine.view()).leader is None
        held = await acquire(engine, 1, HELD_S)
        assert held is not None
        await engine.renew(held)
    finally:
        gone.close()
        silent.close()
        await engine.close()


async def test_etcd_has_compacted_what_a_wait_begins_at(services: Services) -> None:
    service = services.get("etcd")
    engine = EtcdEngine([service.url], "litefs/compacted", timeout_s=5.0)
    view = await engine.view()
    state = await engine.update(b"1", view.state.version)
    for number in range(3):
        state = await engine.update(str(number).encode(), state.version)
    await asyncio.to_thread(request, "POST", f"{service.url}/v3/kv/compaction", {"revision": state.version})
    assert await engine.wait(view, 30.0)
    assert (await engine.view()).state == state
    await engine.close()


async def test_an_entry_that_is_as_it_was_wakes_nobody(services: Services) -> None:
    service = services.get("etcd")
    engine = EtcdEngine([service.url], "litefs/quiet", timeout_s=5.0)
    await engine.announce(Member(1), HELD_S)
    view = await engine.view()
    waiting = asyncio.ensure_future(engine.wait(view, 0.5))
    await asyncio.sleep(0.1)
    await engine.announce(Member(1), HELD_S)
    assert not await waiting
    await engine.close()


# --- Kubernetes


async def test_a_watch_is_what_ends_a_wait(services: Services) -> None:
    """The node would look by itself only in an hour."""
    service = services.get("kubernetes")
    watcher, writer = (
        open_kubernetes("watched", namespace="apps", url=service.url, token="secret", timeout_s=5.0) for _ in range(2)
    )
    view = await watcher.view()
    watcher._members_every_s = 3600.0
    for node_id in (1, 2):
        waiting = asyncio.ensure_future(watcher.wait(view, 3600.0))
        await asyncio.sleep(0.2)
        await writer.announce(Member(node_id), HELD_S)
        async with asyncio.timeout(30):
            assert await waiting
        view = await watcher.view()
    await asyncio.gather(watcher.close(), writer.close())


async def test_the_objects_that_kubernetes_shows(services: Services) -> None:
    service = services.get("kubernetes")
    engine = open_kubernetes("shown", namespace="apps", url=service.url, token="secret", timeout_s=5.0)
    held = await engine.acquire(Leader(1, "alpha", "http://alpha:20202", 4), HELD_S, b"{}", ABSENT)
    assert held is not None
    await engine.announce(Member(1, "alpha"), HELD_S)
    url = f"{service.url}/apis/coordination.k8s.io/v1/namespaces/apps/leases?labelSelector=litefs-lease=shown"
    listed = await asyncio.to_thread(request, "GET", url, None, {"Authorization": "Bearer secret"})
    found = {item["metadata"]["name"]: item["spec"] for item in json.loads(listed)["items"]}
    assert set(found) == {"shown", f"shown-{1:016x}"}
    spec = found["shown"]
    assert (spec["holderIdentity"], spec["leaseDurationSeconds"], spec["leaseTransitions"]) == ("alpha", 60, 4)
    await engine.close()


async def test_in_a_pod(certificates: Path, tmp_path: Path) -> None:
    """The service account's files, of which the token is replaced while the node runs."""
    account = tmp_path / "account"
    account.mkdir()
    (account / "token").write_text("first\n")
    (account / "namespace").write_text("apps")
    (account / "ca.crt").write_bytes((certificates / "ca.crt").read_bytes())
    cert = str(certificates / "server.crt"), str(certificates / "server.key")
    with await asyncio.to_thread(kubernetes, tmp_path / "api", cert) as service:
        environ = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(service.port)}
        engine = open_kubernetes("pod", environ=environ, account=str(account), timeout_s=5.0)
        (service.folder / "tokens").write_text("first")
        held = await acquire(engine, 1, HELD_S)
        assert held is not None
        (service.folder / "tokens").write_text("second")
        with pytest.raises(Unavailable, match="check the credentials"):
            await engine.renew(held)
        (account / "token").write_text("second\n")
        held = await engine.renew(held)
        assert not await engine.wait(await engine.view(), 0.2)
        (account / "token").unlink()
        with pytest.raises(Unavailable, match="service account"):
            await engine.view()
        await engine.close()


@pytest.mark.parametrize("name", ["", "Big", "a_b", "-a", "a" * 47, "a/b"])
def test_names_that_kubernetes_would_not_take(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be the name"):
        open_kubernetes(name, url="http://127.0.0.1:1")


def test_outside_of_a_pod() -> None:
    with pytest.raises(ConfigError, match="not in a pod"):
        open_kubernetes("a", environ={})


async def test_a_watch_that_begins_too_long_ago(services: Services) -> None:
    """The API server keeps 200 events; a node that has slept through them looks anew."""
    service = services.get("kubernetes")
    sleeper, writer = (
        open_kubernetes("slept", namespace="apps", url=service.url, token="secret", timeout_s=5.0) for _ in range(2)
    )
    view = await sleeper.view()
    state = view.state
    for number in range(210):
        state = await writer.update(str(number).encode(), state.version)
    assert await sleeper.wait(view, 30.0)
    view = await eventually(sleeper, lambda view: view.state == state)
    waiting = asyncio.ensure_future(sleeper.wait(view, 30.0))
    await asyncio.sleep(0.1)
    await writer.announce(Member(1), HELD_S)
    assert await waiting
    await asyncio.gather(sleeper.close(), writer.close())
