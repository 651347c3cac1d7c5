"""Consul as lease engine, with LiteFS's key, value and session, version 1.8 or later.

    KEY               {"hostname", "advertise-url", and of ours "node-id", "epoch", "ttl", "beat"}, locked by a session
    KEY/state         the shared document
    KEY/members/ID    locked by a session of its own

KEY is lease.consul.key below the path of lease.consul.url. As with LiteFS, a path is also the name of a catalog node,
PATH/litefs, that sessions belong to: tokens that are confined to PATH can make no others.

Everything that changes the lease is one transaction: acquire is a lock of KEY and a compare-and-swap of KEY/state.

*Why sessions are not enough.* Consul ends a session no sooner than its TTL, in fact after twice that, and allows none
below 10 s: LiteFS needs 20 s to replace a primary. So the holder changes `beat` with every renewal, and whoever has
seen it unchanged for the TTL and a margin (`lease.observed`) may delete KEY, at the index it has seen, and lock it
anew, in one transaction. The session stays as what other tools see, and cleans up after a cluster that is gone. What
a node of LiteFS holds has no beat, and is never taken from it.
"""

from __future__ import annotations

import asyncio
import base64
import math
import secrets
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from pylitefs.cluster.lease_port import (
    ABSENT,
    Clock,
    Conflict,
    Held,
    Leader,
    LeaseLost,
    Member,
    Versioned,
    View,
    now_s,
)
from pylitefs.errors import ConfigError
from pylitefs.lease import documents
from pylitefs.lease.http_json import Afterwards, Answer, JsonClient
from pylitefs.lease.observed import Observed

MIN_SESSION_TTL_S = 10.0
_LONGEST_WAIT_S = 10.0  # of one blocking query, so that a server that is gone is noticed

Json = dict[str, Any]


@dataclass(frozen=True)
class Address:
    """What lease.consul.url says: `http(s)://[:TOKEN@]HOST[:PORT][/PREFIX]`."""

    url: str
    token: str
    prefix: str

    @classmethod
    def parse(cls, url: str) -> Address:
        try:
            parts = urlsplit(url)
            port = f":{parts.port}" if parts.port else ""
        except ValueError as error:
            raise ConfigError(f'lease.consul.url "{_without_token(url)}": {error}') from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f'lease.consul.url "{_without_token(url)}" is not a URL: expected something like http://127.0.0.1:8500'
            )
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        return cls(f"{parts.scheme}://{host}{port}", unquote(parts.password or ""), unquote(parts.path).strip("/"))


@dataclass(frozen=True)
class _Entry:
    data: bytes
    index: int
    session: str

    @property
    def fields(self) -> Json:
        return documents.decode(self.data)


class ConsulEngine:
    """A `cluster.lease_port.Engine` at `url` below `key`."""

    min_ttl_s = 1.0

    def __init__(
        self,
        url: str,
        key: str,
        *,
        lock_delay_s: float = 1.0,
        tls: ssl.SSLContext | None = None,
        timeout_s: float = 2.0,
        clock: Clock = now_s,
    ) -> None:
        address = Address.parse(url)
        headers = {"X-Consul-Token": address.token} if address.token else {}
        self._http = JsonClient("Consul", [address.url], "lease.consul.url", timeout_s, tls, headers)
        self._key = "/".join(part for part in (address.prefix, key.strip("/")) if part)
        self._node = f"{address.prefix}/litefs" if address.prefix else ""
        self._lock_delay_s = lock_delay_s
        self._clock = clock
        self._observed = Observed(clock)
        self._member_session: str | None = None
        self._announcing = asyncio.Lock()
        self._renewed_s: dict[str, float] = {}
        self._tasks = Afterwards()

    # --- looking

    async def view(self) -> View:
        return (await self._look())[0]

    async def wait(self, view: View, timeout_s: float) -> bool:
        """Blocking queries. A renewal ends one too, but is no change; what it shows counts as seen."""
        end_s = self._clock() + timeout_s
        index, wake_s = view.token, 0.0
        while True:
            wait_s = min(end_s - self._clock(), wake_s, _LONGEST_WAIT_S)
            new, wake_s = await self._look(index if wait_s > 0 else "", wait_s)
            if new != view:
                return True
            if self._clock() >= end_s:
                return False
            index = new.token

    async def _look(self, index: str = "", wait_s: float = 0.0) -> tuple[View, float]:
        """The view, and how long until something in it counts as expired. With `index`: once it has changed since."""
        entries, token = await self._entries(index, wait_s)
        lock = entries.get(self._key)
        remaining_s = self._remaining_s(lock)
        leader = documents.leader_from(lock.fields) if lock is not None and remaining_s > 0 else None
        wakes = [remaining_s] if leader else []
        members = []
        for name in sorted(name for name in entries if name.startswith(self._key + "/members/")):
            fields = entries[name].fields
            member, ttl_s = documents.member_from(fields), documents.ttl_from(fields)
            if member is None or ttl_s is None:
                continue
            left_s = self._observed.remaining_s(name, _mark(entries[name]), ttl_s)
            if left_s > 0:
                members.append(member)
                wakes.append(left_s)
        self._observed.keep_only(entries)
        found = entries.get(self._key + "/state")
        state = Versioned(found.data, str(found.index)) if found else Versioned()
        return View(leader, state, tuple(members), token), min(wakes, default=math.inf)

    async def _entries(self, index: str = "", wait_s: float = 0.0) -> tuple[dict[str, _Entry], str]:
        query = {"recurse": "true", "consistent": "true"}
        if index:
            query |= {"index": index, "wait": f"{max(1, math.ceil(wait_s * 1000))}ms"}
        # Consul lengthens a wait by up to a sixteenth of it.
        answer = await self._http.ask(
            "GET", f"/v1/kv/{quote(self._key)}", query=query, again=True, extra_s=wait_s * 17 / 16 if index else 0.0
        )
        if answer.status not in (200, 404):
            raise self._http.unexpected(answer)
        entries = {}
        with self._http.reading(answer):
            token = str(int(answer.headers["X-Consul-Index"]))
            for found in answer.document if answer.status == 200 else ():
                if found["Key"] == self._key or found["Key"].startswith(self._key + "/"):
                    data = base64.b64decode(found["Value"] or "")
                    entries[found["Key"]] = _Entry(data, int(found["ModifyIndex"]), str(found.get("Session", "")))
        return entries, token

    def _remaining_s(self, lock: _Entry | None) -> float:
        if lock is None or not lock.session:
            return 0.0
        ttl_s = documents.ttl_from(lock.fields)
        if ttl_s is None:
            return math.inf  # LiteFS holds it: its session ends it
        return self._observed.remaining_s(self._key, _mark(lock), ttl_s)

    # --- the lease

    async def acquire(self, leader: Leader, ttl_s: float, state: bytes, version: str) -> Held | None:
        documents.check_ttl(ttl_s, self.min_ttl_s, "Consul")
        documents.check_state(state)
        lock = (await self._entries())[0].get(self._key)
        if self._remaining_s(lock) > 0:
            return None
        start_s = self._clock()
        session = await self._new_session(ttl_s)
        value = documents.encode({**documents.leader_fields(leader), "ttl": ttl_s, "beat": secrets.token_hex(8)})
        operations = [self._set_state(state, version), self._kv("lock", "", value, session)]
        if lock is not None and lock.session:
            operations.insert(0, {"KV": {"Verb": "delete-cas", "Key": self._key, "Index": lock.index}})
        try:
            done = await self._txn(operations)
        except BaseException:
            self._end_later(session)  # the transaction may have happened
            raise
        if isinstance(done, int):
            self._end_later(session)
            return None
        self._renewed_s[session] = start_s
        return Held(leader, ttl_s, start_s + ttl_s, Versioned(state, self._state_version(done)), token=session)

    async def renew(self, held: Held) -> Held:
        start_s = self._clock()
        if start_s >= held.valid_until_s:
            raise LeaseLost(f"the lease has expired: it was not renewed for {held.ttl_s:g} s")
        value = documents.encode(
            {**documents.leader_fields(held.leader), "ttl": held.ttl_s, "beat": secrets.token_hex(8)}
        )
        done = await self._txn([self._check(held.token), self._kv("lock", "", value, held.token)], again=True)
        if isinstance(done, int) or not await self._renew_session(held.token):
            raise LeaseLost("the lease is not ours any more: its session has ended, or it was taken or deleted")
        return replace(held, valid_until_s=start_s + held.ttl_s)

    async def release(self, held: Held) -> None:
        """The key goes before its session does: a session that ends with a lock makes others wait for lock-delay."""
        await self._txn([self._check(held.token), self._kv("delete", "")], again=True)
        await self._end_session(held.token)

    async def update(self, state: bytes, version: str, held: Held | None = None) -> Versioned:
        documents.check_state(state)
        checks = [self._check(held.token)] if held else []
        done = await self._txn([*checks, self._set_state(state, version)])
        if not isinstance(done, int):
            return Versioned(state, self._state_version(done))
        if checks and done == 0:
            raise LeaseLost("the lease is not ours any more: its session has ended, or it was taken or deleted")
        raise Conflict("the cluster's state was changed by another node: read it again")

    # --- the members

    async def announce(self, member: Member, ttl_s: float) -> None:
        documents.check_ttl(ttl_s, self.min_ttl_s, "Consul")
        name = f"/members/{documents.hex_id(member.node_id)}"
        value = documents.encode({**documents.member_fields(member), "ttl": ttl_s, "beat": secrets.token_hex(8)})
        async with self._announcing:
            for _ in range(2):
                if self._member_session is None or not await self._renew_session(self._member_session):
                    self._member_session = await self._new_session(ttl_s)
                    self._renewed_s[self._member_session] = self._clock()
                # Deleted first, because an earlier run of this node may have it locked.
                done = await self._txn(
                    [self._kv("delete", name), self._kv("lock", name, value, self._member_session)], again=True
                )
                if not isinstance(done, int):
                    return
                self._member_session = None  # it has ended

    async def withdraw(self, node_id: int) -> None:
        await self._txn([self._kv("delete", f"/members/{documents.hex_id(node_id)}")], again=True)

    async def close(self) -> None:
        await self._tasks.cancel()
        await self._http.close()

    # --- Consul's words

    async def _new_session(self, ttl_s: float) -> str:
        document: Json = {
            "Name": "litefs",
            "Behavior": "delete",
            "TTL": f"{math.ceil(max(MIN_SESSION_TTL_S, ttl_s))}s",
            "LockDelay": f"{round(self._lock_delay_s * 1000)}ms",
            "Checks": [],
            "NodeChecks": [],
        }
        if self._node:
            await self._put("/v1/catalog/register", {"Node": self._node, "Address": "localhost"})
            document["Node"] = self._node
        answer = await self._put("/v1/session/create", document)
        with self._http.reading(answer):
            return str(answer.document["ID"])

    async def _renew_session(self, session: str) -> bool:
        """Whether it is there. It is renewed only as often as it needs that, which may be less often than the lease."""
        now = self._clock()
        if now - self._renewed_s.get(session, -math.inf) < MIN_SESSION_TTL_S / 4:
            return True
        answer = await self._http.ask("PUT", f"/v1/session/renew/{session}", again=True)
        if answer.status == 404:
            self._renewed_s.pop(session, None)
            return False
        if answer.status != 200:
            raise self._http.unexpected(answer)
        self._renewed_s[session] = now
        return True

    async def _end_session(self, session: str) -> None:
        self._renewed_s.pop(session, None)
        await self._http.ask("PUT", f"/v1/session/destroy/{session}", again=True)

    def _end_later(self, session: str) -> None:
        """End it without waiting, as far as that is possible: it ends by itself."""
        self._tasks.start(self._end_session(session))

    async def _txn(self, operations: Sequence[Json], again: bool = False) -> list[Json] | int:
        """The results; or the place of the first operation that was refused, and then nothing was done."""
        answer = await self._http.ask("PUT", "/v1/txn", document=operations, again=again)
        document = answer.document
        if answer.status not in (200, 409):
            raise self._http.unexpected(answer)
        with self._http.reading(answer):
            if answer.status == 409:
                return min(int(error["OpIndex"]) for error in document["Errors"])
            return [result["KV"] for result in document["Results"] or [] if "KV" in result]

    def _kv(self, verb: str, name: str, value: bytes = b"", session: str = "") -> Json:
        operation: Json = {"Verb": verb, "Key": self._key + name}
        if session:
            operation |= {"Value": base64.b64encode(value).decode(), "Session": session}
        return {"KV": operation}

    def _check(self, session: str) -> Json:
        return {"KV": {"Verb": "check-session", "Key": self._key, "Session": session}}

    def _set_state(self, state: bytes, version: str) -> Json:
        index = 0 if version == ABSENT else int(version)
        value = base64.b64encode(state).decode()
        return {"KV": {"Verb": "cas", "Key": self._key + "/state", "Value": value, "Index": index}}

    def _state_version(self, results: Sequence[Json]) -> str:
        return next(str(result["ModifyIndex"]) for result in results if result["Key"] == self._key + "/state")

    async def _put(self, path: str, document: Json) -> Answer:
        answer = await self._http.ask("PUT", path, document=document, again=True)
        if answer.status != 200:
            raise self._http.unexpected(answer)
        return answer


def _mark(entry: _Entry) -> str:
    return f"{entry.session}/{entry.fields.get('beat', '')}"


def _without_token(url: str) -> str:
    return url if "@" not in url else "…@" + url.rpartition("@")[2]
