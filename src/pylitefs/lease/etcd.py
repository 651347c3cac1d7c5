"""etcd as lease engine, version 3.4 or later, through the JSON gateway that every etcd server has.

Keys, below a prefix that is the cluster's own:

    PREFIX/leader        who holds the lease; attached to an etcd lease, so it goes when that ends
    PREFIX/state         the shared document; stays
    PREFIX/members/ID    attached to a lease of its own

Acquire is one transaction: no key PREFIX/leader, PREFIX/state as it was read → both are put. The lease is ours while
the leader key has the revision at which we created it. The version of the state is its modification revision.
"""

from __future__ import annotations

import asyncio
import base64
import math
import ssl
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

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
from pylitefs.errors import Unavailable
from pylitefs.lease import documents
from pylitefs.lease.http_json import Afterwards, Answer, JsonClient, Rejected

_UNAUTHENTICATED = 16  # the code of gRPC for a token that is no more
_NOT_FOUND = 5  # and for a lease that is no more

Json = dict[str, Any]


class EtcdEngine:
    """A `cluster.lease_port.Engine`. `urls` are the client URLs of the cluster's servers, of which any will do."""

    min_ttl_s = 2.0  # what a server with default settings grants at the least

    def __init__(
        self,
        urls: Sequence[str],
        prefix: str,
        *,
        user: str = "",
        password: str = "",
        tls: ssl.SSLContext | None = None,
        timeout_s: float = 2.0,
        clock: Clock = now_s,
    ) -> None:
        self._http = JsonClient("etcd", urls, "lease.etcd", timeout_s, tls)
        prefix = prefix.strip("/")
        self._prefix = f"/{prefix}/" if prefix else "/"
        self._credentials = {"name": user, "password": password} if user else None
        self._clock = clock
        self._member_lease: tuple[str, float] | None = None
        self._announcing = asyncio.Lock()
        self._tasks = Afterwards()

    # --- looking

    async def view(self) -> View:
        answer = await self._ask("/v3/kv/range", self._everything(), again=True)
        leader, state, members = None, Versioned(), []
        with self._http.reading(answer):
            for entry in answer.document.get("kvs", []):
                name = base64.b64decode(entry["key"]).decode("utf-8", "replace").removeprefix(self._prefix)
                data = base64.b64decode(entry.get("value", ""))
                if name == "leader":
                    leader = documents.leader_from(documents.decode(data))
                elif name == "state":
                    state = Versioned(data, str(int(entry["mod_revision"])))
                elif name.startswith("members/") and (member := documents.member_from(documents.decode(data))):
                    members.append(member)
            token = str(int(answer.document["header"]["revision"]))
        return View(leader, state, tuple(members), token)

    async def wait(self, view: View, timeout_s: float) -> bool:
        """A watch from the view's revision on."""
        created = {**self._everything(), "start_revision": str(int(view.token or 0) + 1)}
        await self._log_in()
        try:
            return await self._http.watch(
                "POST", "/v3/watch", self._changed, timeout_s, document={"create_request": created}
            )
        except Rejected as error:
            self._forget_token(error.answer)
            raise

    def _changed(self, message: Any) -> bool:
        """Whether a watch's message means that something has changed, which one about an old revision does."""
        result = documents.part(message, "result") if isinstance(message, dict) else {}
        if result.get("events") or result.get("compact_revision"):
            return True
        if not result or result.get("canceled"):
            said = " ".join(str(result.get("cancel_reason") or message).split())[:200]
            raise Unavailable(f"etcd has ended a watch ({said}): check lease.etcd, and that its user may read there")
        return False

    def _everything(self) -> Json:
        return {"key": _encoded(self._prefix), "range_end": _encoded(self._prefix[:-1] + "0")}  # "0" comes after "/"

    # --- the lease

    async def acquire(self, leader: Leader, ttl_s: float, state: bytes, version: str) -> Held | None:
        documents.check_ttl(ttl_s, self.min_ttl_s, "etcd")
        documents.check_state(state)
        start_s = self._clock()
        lease = await self._grant(ttl_s)
        data = documents.encode(documents.leader_fields(leader))
        try:
            done = await self._txn(
                [self._created("leader", "0"), self._at("state", version)],
                [self._put("leader", data, lease), self._put("state", state)],
            )
        except BaseException:
            self._give_back(lease)  # the transaction may have happened
            raise
        if done is None:
            self._give_back(lease)
            return None
        return Held(leader, ttl_s, start_s + ttl_s, Versioned(state, done), token=f"{lease}/{done}")

    async def renew(self, held: Held) -> Held:
        start_s = self._clock()
        if start_s >= held.valid_until_s:
            raise LeaseLost(f"the lease has expired: it was not renewed for {held.ttl_s:g} s")
        lease, created = held.token.split("/")
        is_ours = self._txn([self._created("leader", created)], [], again=True)
        alive, ours = await _both(self._keep_alive(lease), is_ours)
        if not alive or ours is None:
            raise LeaseLost("the lease is not ours any more: it has expired, or was deleted or taken")
        return replace(held, valid_until_s=start_s + held.ttl_s)

    async def release(self, held: Held) -> None:
        """Revoking the lease deletes the key in one step with it."""
        await self._revoke(held.token.split("/")[0])

    async def update(self, state: bytes, version: str, held: Held | None = None) -> Versioned:
        documents.check_state(state)
        ours = [self._created("leader", held.token.split("/")[1])] if held else []
        done = await self._txn([*ours, self._at("state", version)], [self._put("state", state)])
        if done is not None:
            return Versioned(state, done)
        if ours and await self._txn(ours, [], again=True) is None:
            raise LeaseLost("the lease is not ours any more: it has expired, or was deleted or taken")
        raise Conflict("the cluster's state was changed by another node: read it again")

    # --- the members

    async def announce(self, member: Member, ttl_s: float) -> None:
        """An entry that is as it was is not put again, so that nobody is woken by it."""
        documents.check_ttl(ttl_s, self.min_ttl_s, "etcd")
        name, data = f"members/{documents.hex_id(member.node_id)}", documents.encode(documents.member_fields(member))
        async with self._announcing:
            lease = await self._own_lease(ttl_s)
            same = {"target": "VALUE", "key": self._key(name), "value": _encoded(data)}
            attached = {"target": "LEASE", "key": self._key(name), "lease": lease}
            if await self._txn([same, attached], [], again=True) is None:
                await self._txn([], [self._put(name, data, lease)], again=True)

    async def _own_lease(self, ttl_s: float) -> str:
        if self._member_lease is not None and self._member_lease[1] == ttl_s:
            if await self._keep_alive(self._member_lease[0]):
                return self._member_lease[0]
        elif self._member_lease is not None:
            self._give_back(self._member_lease[0])
        self._member_lease = None
        lease = await self._grant(ttl_s)
        self._member_lease = lease, ttl_s
        return lease

    async def withdraw(self, node_id: int) -> None:
        key = self._key(f"members/{documents.hex_id(node_id)}")
        await self._ask("/v3/kv/deleterange", {"key": key}, again=True)

    async def close(self) -> None:
        await self._tasks.cancel()
        await self._http.close()

    # --- etcd's words

    async def _grant(self, ttl_s: float) -> str:
        answer = await self._ask("/v3/lease/grant", {"TTL": str(math.ceil(ttl_s))})
        with self._http.reading(answer):
            return str(int(answer.document["ID"]))

    async def _keep_alive(self, lease: str) -> bool:
        """Whether it is there. For one that is not, etcd leaves the TTL out."""
        answer = await self._ask("/v3/lease/keepalive", {"ID": lease}, again=True)
        with self._http.reading(answer):
            return int(answer.document["result"].get("TTL", 0)) > 0

    async def _revoke(self, lease: str) -> None:
        try:
            await self._ask("/v3/lease/revoke", {"ID": lease}, again=True)
        except Rejected as error:
            if _code(error.answer) != _NOT_FOUND:
                raise

    def _give_back(self, lease: str) -> None:
        """Revoke it without waiting, as far as that is possible: it ends by itself."""
        self._tasks.start(self._revoke(lease))

    async def _txn(self, compare: list[Json], success: list[Json], again: bool = False) -> str | None:
        """The revision of the transaction; None if one of its conditions was not met."""
        answer = await self._ask("/v3/kv/txn", {"compare": compare, "success": success}, again=again)
        with self._http.reading(answer):
            revision = str(int(answer.document["header"]["revision"]))
            return revision if answer.document.get("succeeded") is True else None

    def _created(self, name: str, revision: str) -> Json:
        return {"target": "CREATE", "key": self._key(name), "create_revision": revision}

    def _at(self, name: str, version: str) -> Json:
        revision = "0" if version == ABSENT else version
        return {"target": "MOD", "key": self._key(name), "mod_revision": revision}

    def _put(self, name: str, data: bytes, lease: str = "0") -> Json:
        return {"request_put": {"key": self._key(name), "value": _encoded(data), "lease": lease}}

    def _key(self, name: str) -> str:
        return _encoded(self._prefix + name)

    async def _ask(self, path: str, document: Json, *, again: bool = False) -> Answer:
        for attempt in range(2):
            await self._log_in()
            answer = await self._http.ask("POST", path, document=document, again=again)
            if answer.status == 200:
                return answer
            if not self._forget_token(answer) or attempt:
                break
        raise self._http.unexpected(answer)

    async def _log_in(self) -> None:
        if self._credentials is None or "Authorization" in self._http.headers:
            return
        answer = await self._http.ask("POST", "/v3/auth/authenticate", document=self._credentials, again=True)
        if answer.status != 200:
            raise self._http.unexpected(answer)
        with self._http.reading(answer):
            self._http.headers["Authorization"] = str(answer.document["token"])

    def _forget_token(self, answer: Answer) -> bool:
        """Whether the answer says that our token is not valid any more; then the next request gets a new one."""
        if answer.status == 401 or _code(answer) == _UNAUTHENTICATED:
            return self._http.headers.pop("Authorization", None) is not None
        return False


def _code(answer: Answer) -> int:
    found = answer.document
    code = found.get("code") if isinstance(found, dict) else None
    return code if isinstance(code, int) else 0


def _encoded(data: bytes | str) -> str:
    return base64.b64encode(data.encode() if isinstance(data, str) else data).decode()


async def _both(one: Any, other: Any) -> tuple[Any, Any]:
    """Both results; the first error, once both have ended."""
    results = await asyncio.gather(one, other, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results[0], results[1]
