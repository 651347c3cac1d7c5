"""From the section `lease` of litefs.yml to its engine.

A back end is imported when it is asked for: a node with a static lease loads none of them.
"""

from __future__ import annotations

import math
import re
import ssl

from pylitefs.cluster.lease_port import Engine
from pylitefs.config import ConsulConfig, EtcdConfig, KubernetesConfig, LeaseConfig, ObjectStoreConfig
from pylitefs.errors import ConfigError

MAX_TIMEOUT_S = 2.0
MIN_TIMEOUT_S = 0.3


def ttl_of(lease: LeaseConfig) -> float:
    """How long a lease is valid without being renewed; math.inf for a static one."""
    return math.inf if lease.engine is None else lease.engine.ttl_s


def timeout_of(lease: LeaseConfig) -> float:
    """For one question to the engine: a renewal that failed must leave the time for two more."""
    return max(MIN_TIMEOUT_S, min(MAX_TIMEOUT_S, ttl_of(lease) / 4))


def open_engine(lease: LeaseConfig) -> tuple[Engine, str]:
    """The engine, and what to call it: "etcd at http://10.0.0.5:2379", without secrets. Asks nobody yet. To be called,
    used and closed on one event loop. ConfigError for what `config.validate` cannot see: files that are not there."""
    timeout_s = timeout_of(lease)
    match lease.engine:
        case ConsulConfig() as consul:
            return _consul(consul, timeout_s)
        case EtcdConfig() as etcd:
            return _etcd(etcd, timeout_s)
        case ObjectStoreConfig() as store:
            return _object_store(store, timeout_s)
        case KubernetesConfig() as kubernetes:
            return _kubernetes(kubernetes, timeout_s)
        case None:
            raise ConfigError(f'lease.type "{lease.type}" has no engine')


def _consul(consul: ConsulConfig, timeout_s: float) -> tuple[Engine, str]:
    from pylitefs.lease.consul import Address, ConsulEngine

    engine = ConsulEngine(consul.url, consul.key, lock_delay_s=consul.lock_delay_s, timeout_s=timeout_s)
    return engine, f"Consul at {Address.parse(consul.url).url}"


def _etcd(etcd: EtcdConfig, timeout_s: float) -> tuple[Engine, str]:
    from pylitefs.lease.etcd import EtcdEngine
    from pylitefs.lease.http_json import tls_context

    tls: ssl.SSLContext | None = None
    if etcd.ca or etcd.cert:
        tls = tls_context(etcd.ca, etcd.cert, etcd.key)
    engine = EtcdEngine(etcd.urls, etcd.prefix, user=etcd.user, password=etcd.password, tls=tls, timeout_s=timeout_s)
    more = f" and {len(etcd.urls) - 1} more" if len(etcd.urls) > 1 else ""
    return engine, f"etcd at {etcd.urls[0].rstrip('/')}{more}"


def _object_store(store: ObjectStoreConfig, timeout_s: float) -> tuple[Engine, str]:
    if store.url.startswith("file:"):
        from pylitefs.lease.directory import open_directory

        return open_directory(store.url, timeout_s), f"the directory {store.url}"
    from pylitefs.lease.object_store import open_bucket

    options = {
        "endpoint": store.endpoint,
        "region": store.region,
        "access_key_id": store.access_key,
        "secret_access_key": store.secret_key,
    }
    engine = open_bucket(store.url, {name: value for name, value in options.items() if value}, timeout_s)
    where = f" at {_without_user(store.endpoint)}" if store.endpoint else ""
    return engine, f"the bucket {store.url}{where}"


def _kubernetes(kubernetes: KubernetesConfig, timeout_s: float) -> tuple[Engine, str]:
    from pylitefs.lease.kubernetes import open_kubernetes

    engine = open_kubernetes(
        kubernetes.name,
        namespace=kubernetes.namespace,
        url=kubernetes.url,
        token_file=kubernetes.token_file,
        ca=kubernetes.ca,
        timeout_s=timeout_s,
    )
    where = f" at {kubernetes.url.rstrip('/')}" if kubernetes.url else ""
    return engine, f"Kubernetes{where}, lease {kubernetes.name}"


def _without_user(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//", url)
