"""A bucket as lease engine: S3 and what is compatible with it, and whatever else obstore can write conditionally.

Nothing but a bucket is needed that honours If-None-Match and If-Match on PUT: Amazon S3, MinIO, Cloudflare R2, Ceph,
Google Cloud Storage, Azure. `lease.record` has the format: FOLDER/leader and FOLDER/members/ID.

The library's own retries are off: a PUT that is repeated after its answer was lost would meet its own result.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotFoundError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import from_url

from pylitefs.cluster.lease_port import ABSENT, Clock, now_s
from pylitefs.errors import ConfigError, Unavailable
from pylitefs.lease.record import MAX_RECORD_BYTES, Cell, Changed, RecordEngine

if TYPE_CHECKING:
    from obstore import ObjectMeta, PutMode
    from obstore.store import ObjectStore

MAX_MEMBERS = 1000
_ROLE_SERVICE = "//169.254.169.254/"  # of the machine, which is asked where no credentials are configured
_DURATION = re.compile(r",? (in|after) \d[\d.]*(ns|µs|ms|s)\b")


def open_bucket(
    url: str, options: Mapping[str, str] | None = None, timeout_s: float = 2.0, clock: Clock = now_s
) -> RecordEngine:
    """An engine in the bucket and folder of `url`, such as s3://bucket/folder. ConfigError for what is not such a URL.

    `options` are obstore's: endpoint, region, access_key_id, secret_access_key, … What is not given comes from the
    environment (AWS_…), or from the machine's role. An endpoint that begins with http: is used without TLS.
    """
    given = dict(options or {})
    plain = given.get("endpoint", "").startswith("http:")
    try:
        # One factory for every kind of store: its overloads know each kind's options, we pass on what we were given.
        store = cast(Any, from_url)(
            url,
            config=given,
            client_options={"allow_http": plain, "timeout": f"{timeout_s}s", "connect_timeout": f"{timeout_s}s"},
            retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=timeout_s)},
        )
    except (BaseError, ValueError, TypeError) as error:
        raise ConfigError(f'"{url}" is not a bucket: {_one_line(error)}') from None
    where = f"the bucket {url}" + (f" at {given['endpoint']}" if "endpoint" in given else "")
    return RecordEngine(BucketCells(store, where), timeout_s, clock)


class BucketCells:
    """`lease.record.Cells` in a bucket. A cell's version is what the store calls its ETag, its version, or both."""

    def __init__(self, store: ObjectStore, where: str) -> None:
        self._store = store
        self.where = where
        self._known: dict[str, Cell] = {}

    async def read(self, name: str) -> Cell | None:
        try:
            found = await obstore.get_async(self._store, name)
            if found.meta["size"] > MAX_RECORD_BYTES:
                raise Unavailable(f'{self.where}: "{name}" is no record of litefs: it has {found.meta["size"]} bytes')
            return Cell(bytes(await found.bytes_async()), _version(found.meta))
        except (NotFoundError, FileNotFoundError):
            return None
        except BaseError as error:
            raise self._unavailable(error) from None

    async def read_all(self) -> Mapping[str, Cell]:
        """One request to list them, and one for each that is not as it was the last time."""
        try:
            listed = await obstore.list(self._store, chunk_size=MAX_MEMBERS).collect_async()
        except BaseError as error:
            raise self._unavailable(error) from None
        wanted = [meta for meta in listed[:MAX_MEMBERS] if meta["size"] <= MAX_RECORD_BYTES]
        cells = await asyncio.gather(*(self._read_listed(meta) for meta in wanted))
        self._known = {meta["path"]: cell for meta, cell in zip(wanted, cells, strict=True) if cell is not None}
        return self._known

    async def _read_listed(self, meta: ObjectMeta) -> Cell | None:
        known = self._known.get(meta["path"])
        return known if known is not None and known.version == _version(meta) else await self.read(meta["path"])

    async def write(self, name: str, data: bytes, version: str | None) -> None:
        mode: PutMode = "overwrite" if version is None else "create"
        if version:
            mode = json.loads(version)
        try:
            await obstore.put_async(self._store, name, data, mode=mode, use_multipart=False)
        except (AlreadyExistsError, PreconditionError, NotFoundError, FileExistsError, FileNotFoundError) as error:
            if version is None or (isinstance(error, NotFoundError | FileNotFoundError) and version == ABSENT):
                raise self._unavailable(error) from None  # the bucket is missing
            raise Changed from None
        except BaseError as error:
            raise self._unavailable(error) from None

    async def remove(self, name: str) -> None:
        try:
            await obstore.delete_async(self._store, name)
        except (NotFoundError, FileNotFoundError):
            pass
        except BaseError as error:
            raise self._unavailable(error) from None

    async def pause(self, timeout_s: float, poll_s: float) -> bool:
        await asyncio.sleep(min(timeout_s, poll_s))
        return False

    async def close(self) -> None:
        pass

    def _unavailable(self, error: Exception) -> Unavailable:
        text, hint = _one_line(error), "check lease.object-store and the network"
        if _ROLE_SERVICE in text:
            hint = "it has no credentials: set access-key and secret-key, or AWS_ACCESS_KEY_ID and its kin"
        elif isinstance(error, PermissionDeniedError | UnauthenticatedError):
            hint = "check its credentials, and that they may list, read, write and delete there"
        elif isinstance(error, NotFoundError | FileNotFoundError):
            hint = "does the bucket exist?"
        return Unavailable(f"{self.where} cannot be used: {text}: {hint}")


def _version(meta: Mapping[str, Any]) -> str:
    """An obstore.UpdateVersion as text."""
    return json.dumps({key: meta[key] for key in ("e_tag", "version") if meta.get(key) is not None})


def _one_line(error: Exception) -> str:
    """obstore adds a picture of its own structures after the first line; and in it how long it has taken, which would
    make every error a new one for the log."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _DURATION.sub("", lines[0])[:300] if lines else type(error).__name__
