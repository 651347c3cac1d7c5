"""The composition root: builds the parts of one node in order, runs them, and takes them down in reverse.

    listen ▸ recover ▸ serve HTTP ▸ wait for what replicas give back ▸ mount ▸ follow, or stand for it ▸ ready ▸ exec
Signals are heeded from the start; what was built until then is taken down in good order.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import gc
import logging
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable
from concurrent.futures import Future
from typing import Any, TypeVar

from pylitefs import __version__
from pylitefs.cluster.candidate import Settings
from pylitefs.cluster.recovery_wait import RecoveryWait
from pylitefs.cluster.tasks import cancel, in_thread, supervised
from pylitefs.config import Config
from pylitefs.engine.hooks import EngineHooks
from pylitefs.engine.store import Store, StoreOptions
from pylitefs.errors import DatabaseError, LitefsError, MountError, ReadOnlyReplica, UsageError
from pylitefs.events import Event, EventBus
from pylitefs.filesystem.guard import MountGuard
from pylitefs.filesystem.mount import cover, find_dead, mount_at, put_away, uncover
from pylitefs.filesystem.session import Session
from pylitefs.http.cluster_routes import ClusterRoutes
from pylitefs.http.replication import PATH as REPLICATION_PATH
from pylitefs.http.replication import handler
from pylitefs.http.server import HttpServer, Route, build_app, listen
from pylitefs.lease.open import open_engine, ttl_of
from pylitefs.node import Node
from pylitefs.node_control import NodeControl
from pylitefs.observability import event_log, systemd
from pylitefs.ports import Notifier
from pylitefs.status import NodeInfo
from pylitefs.supervise import Supervisor

log = logging.getLogger("litefs")
T = TypeVar("T")

SWITCH_INTERVAL_S = 0.00005
"""How long a thread may keep the interpreter while others wait: a FUSE request must not wait 5 ms for a capture."""

FILES_WANTED = 1 << 20
_M_ARENA_MAX = -8  # malloc.h
_LOCK_WAIT_S = 2.0
_MOUNT_TRIES = 10


class Stopped(Exception):
    """A signal came while the node was starting."""


class Daemon:
    """One node. `run` returns the exit status of the process."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._events = EventBus()
        self._stop = asyncio.Event()
        self._signum = signal.SIGTERM
        self._stack = contextlib.AsyncExitStack()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._supervisor: Supervisor | None = None
        self._mounted = False
        self._was_dead = False  # there was a dead mount
        self._store: Store
        self._node: Node
        self._control: NodeControl
        self._session: Session | None = None

    async def run(self) -> int:
        loop = self._loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._signalled, signum)
        loop.set_exception_handler(_loop_error)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        _keep_memory_small()
        _raise_file_limit()
        try:
            async with self._stack:
                await self._start()
                return await self._serve()
        except Stopped:
            return 0

    def _signalled(self, signum: signal.Signals) -> None:
        log.info("stopping", extra={"signal": signum.name})
        self._signum = signum
        self._stop.set()

    # -- start -------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        config = self._config
        static = config.lease.is_static
        http_socket = listen(config.http.host, config.http.port)
        self._stack.callback(http_socket.close)
        await self._lock_data_dir()
        # Before recovery: a dead mount holds the files that passed through it, so that they would count as in use.
        self._stack.callback(uncover, config.fuse.dir)
        await in_thread(self._take_away_dead)
        await self._build_store(is_primary=static and config.lease.candidate, by_election=not static)
        self._node = Node(config, self._store, http_socket.getsockname()[1])
        self._control = NodeControl(self._node)
        await self._serve_http(http_socket)
        self._stack.push_async_callback(self._node.close)
        if self._store.is_primary:
            await self._begin_as_primary()
        elif not static:
            await self._settle()
        await in_thread(self._store.note_boot)
        await self._mount()
        self._stack.push_async_callback(self._leave)
        if not static:
            lease = config.lease
            settings = Settings(
                ttl_of(lease), lease.candidate, lease.priority, lease.tags, lease.maximum_lag, lease.failsafe,
                config.replication.sync,
            )  # fmt: skip
            engine, name = open_engine(lease)
            await self._node.start_member(engine, name, settings)
            watching = asyncio.create_task(supervised("watching the disk", self._control.watch_disk))
            self._stack.push_async_callback(cancel, watching)
        elif not self._store.is_primary:
            await self._node.start_replica(config.lease.hostname, config.lease.advertise_url)

    async def _begin_as_primary(self) -> None:
        """Static lease: let replicas give back what this node has lost, then take what its files hold as it is."""
        recovery = self._recovery()
        await self._node.start_primary(recovery)
        if recovery is not None:
            wait_s = self._config.lease.recovery_wait_s
            log.info("unclean start: asking replicas for transactions", extra={"seconds": wait_s})
            await self._unless_stopped(recovery.wait())
        await self._settle()

    async def _settle(self) -> None:
        await self._unless_stopped(in_thread(self._store.worker.submit(self._store.settle).result))

    async def _leave(self) -> None:
        """Before the mount goes: pass the lease on, follow nobody."""
        await self._control.leave()
        await self._node.stop()

    async def _unless_stopped(self, work: Awaitable[T]) -> T:
        """Wait for `work`, or leave at once when a signal has come."""
        task = asyncio.ensure_future(work)
        stop = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Stopped
            return task.result()
        finally:
            for waiting in (task, stop):
                waiting.cancel()
            await asyncio.gather(task, stop, return_exceptions=True)

    async def _lock_data_dir(self) -> None:
        """One daemon per data directory; the lock goes with the process."""
        path = self._config.data.dir
        try:
            os.makedirs(path, exist_ok=True)
            fd = os.open(os.path.join(path, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise LitefsError(f"cannot use the data directory {path}: {error.strerror}") from None
        self._stack.callback(os.close, fd)
        deadline = time.monotonic() + _LOCK_WAIT_S  # one that was killed may take a moment to end
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise LitefsError(
                        f"the data directory {path} is in use by another litefs: stop that one first"
                    ) from None
            await self._unless_stopped(asyncio.sleep(0.05))

    async def _build_store(self, *, is_primary: bool, by_election: bool) -> None:
        config = self._config
        self._store = Store(
            config.data.dir,
            self._events,
            StoreOptions(
                is_primary=is_primary,
                role_from_marker=by_election,
                mount_dir=os.path.realpath(config.fuse.dir),
                file_mode=config.fuse.mode,
                uid=config.fuse.uid,
                gid=config.fuse.gid,
                compress=config.data.compress,
                strict_verify=config.strict_verify,
                scrub_interval_s=config.data.scrub_interval_s,
                scrub_rate=config.data.scrub_rate,
                retention_s=config.data.retention_s,
                retention_interval_s=config.data.retention_monitor_interval_s,
                max_log_size_bytes=config.data.max_log_size_bytes,
            ),
        )
        self._stack.callback(self._events.subscribe(event_log.write))
        self._stack.callback(self._events.subscribe(self._heard))
        await self._unless_stopped(in_thread(self._store.load))
        self._store.start()
        self._stack.push_async_callback(in_thread, self._close_store)

    def _heard(self, event: Event) -> None:
        """In the emitting thread."""
        if event.type == "replicaConnected" and self._loop is not None:  # emitted on the loop, which must not wait
            self._loop.run_in_executor(None, self._store.note_replicas, len(self._node.infos()))
        elif event.type == "recovered" and event.data.get("outcome") == "released" and self._loop is not None:
            self._loop.call_soon_threadsafe(self._node.reconnect)

    def _close_store(self) -> None:
        self._store.close(clean=True)

    def _recovery(self) -> RecoveryWait | None:
        wait_s = self._config.lease.recovery_wait_s
        if not (self._store.is_primary and self._store.started_unclean and wait_s > 0):
            return None
        names = {*self._store.all_names(), *self._store.tombstones()}
        return RecoveryWait(names, wait_s, expected=self._store.replica_count())

    async def _serve_http(self, http_socket: socket.socket) -> None:
        node = self._node
        info = NodeInfo(
            node_id=f"{node.node_id:016X}",
            version=__version__,
            mount_dir=self._config.fuse.dir,
            candidate=self._config.lease.candidate,
            started_s=time.time(),
            hostname=node.hostname,
            primary_url=lambda: node.primary_url,
            passthrough=lambda: self._session.passthrough if self._session is not None and self._mounted else None,
            unhealthy=self._unhealthy,
            caught_up=node.ready.is_set,
        )
        routes = [Route("GET", REPLICATION_PATH, handler(node.serve))]
        cluster = ClusterRoutes(
            self._control, self._store, info, self._ping, node.halts,
            max_body_bytes=self._config.http.max_import_size_bytes,
        )  # fmt: skip
        app = build_app(self._store, node.infos, self._config.http, info, self._import, routes, cluster)
        server = HttpServer(app)
        self._stack.push_async_callback(server.close)
        await server.start(http_socket)

    def _ping(self) -> Future[None]:
        """Whether the worker still works."""
        return self._store.worker.submit(lambda: None, database="/")

    async def _mount(self) -> None:
        fuse = self._config.fuse
        loop = asyncio.get_running_loop()
        hooks = EngineHooks(self._store, self._store.apply)

        def gone() -> None:
            loop.call_soon_threadsafe(self._unmounted_by_others)

        def connected(passthrough: bool, notifier: Notifier) -> None:
            store = self._store  # the path was resolved before: nothing answers questions about it yet
            store.worker.submit(store.mounted, store.options.mount_dir, passthrough, notifier).result()

        session = self._session = Session(
            fuse.dir,
            self._config.data.dir,
            hooks,
            passthrough=fuse.passthrough == "auto",
            io_uring=fuse.io_uring == "auto",
            allow_other=os.geteuid() == 0 if fuse.allow_other is None else fuse.allow_other,
            uid=fuse.uid,
            gid=fuse.gid,
            debug=fuse.debug,
            log=logging.getLogger("litefs.fuse").info,
            on_gone=gone,
            on_connected=connected,
        )
        data_dir = os.path.realpath(self._config.data.dir)
        guard = MountGuard(fuse.dir, data_dir, retires=not self._config.lease.is_static)
        self._stack.callback(guard.stop)
        await in_thread(self._start_session, session)
        self._stack.push_async_callback(self._unmount)
        guard.hold(session.device_fd, session.cached_fd, session.mount_device)
        self._mounted = True
        await asyncio.wrap_future(self._store.worker.submit(self._store.serving))
        self._store.start_upkeep()
        log.info("mounted", extra={"dir": fuse.dir, "passthrough": session.passthrough, "io_uring": session.io_uring})

    def _take_away_dead(self) -> None:
        """Raises MountError."""
        path, self._was_dead = find_dead(self._config.fuse.dir, logging.getLogger("litefs.fuse").info)
        for _ in range(_MOUNT_TRIES if self._was_dead else 0):
            self._put_away()
            if mount_at(path) is not None or cover(path):
                break

    def _put_away(self) -> None:
        """What applications have left in the bare directory. Where a dead mount was there until just now, that may be
        anything: one that tries again makes a new database."""
        folder = os.path.join(self._config.data.dir, "lost", time.strftime("%Y%m%dT%H%M%S"))
        with contextlib.suppress(OSError):  # then the mount says what is in the way
            for path in put_away(self._config.fuse.dir, folder, everything=self._was_dead):
                log.warning("left behind by an application where nothing was mounted, kept as %s", path)

    def _start_session(self, session: Session) -> None:
        """Raises MountError."""
        for left in reversed(range(_MOUNT_TRIES)):
            self._put_away()
            try:
                session.start()
                return
            except MountError:
                if not left or not self._was_dead:
                    raise

    async def _unmount(self) -> None:
        self._mounted = False
        await in_thread(self._unmount_now)
        await self._node.send_the_rest()

    def _unmount_now(self) -> None:
        assert self._session is not None
        for step in (self._store.close_doors, self._store.roles.stop, self._store.stand_ins.stop, self._rest):
            try:
                step()
            except Exception:  # whatever fails, the mount goes
                log.exception("while the mount is taken down")
        self._session.stop()
        self._store.worker.submit(self._store.unmounted).result(timeout=60)

    def _rest(self) -> None:
        if not self._store.is_primary:
            self._store.worker.submit(self._store.rest_all).result(timeout=30)

    def _unmounted_by_others(self) -> None:
        log.error("the mount was removed by someone else: stopping")
        self._mounted = False
        self._stop.set()

    # -- run ---------------------------------------------------------------------------------------------------

    async def _serve(self) -> int:
        if not self._config.skip_sync:
            if not self._node.ready.is_set():
                log.info("waiting to connect to the cluster and catch up")
            await self._unless_stopped(self._node.ready.wait())
            await self._unless_stopped(self._promote())
        log.info("ready", extra={"role": "primary" if self._store.is_primary else "replica"})
        systemd.notify("READY=1")
        supervisor = self._supervisor = Supervisor(self._config.exec, self._config.lease.candidate)
        status = await self._run_commands(supervisor)
        systemd.notify("STOPPING=1")
        return status

    async def _promote(self) -> None:
        """`lease.promote`: this node is wanted as the primary."""
        lease = self._config.lease
        if lease.promote and not lease.is_static and not self._store.is_primary:
            if not lease.candidate:
                log.info("lease.promote has no effect: this node is no candidate")
                return
            try:
                await self._control.promote(None)
            except LitefsError as error:
                log.warning("this node could not become the primary: %s", error)

    async def _run_commands(self, supervisor: Supervisor) -> int:
        stop = asyncio.create_task(self._stop.wait())
        commands = asyncio.create_task(self._commands(supervisor))
        try:
            await asyncio.wait({stop, commands}, return_when=asyncio.FIRST_COMPLETED)
            if not commands.done():
                await supervisor.stop(self._signum)
                return 0
            status = commands.result()
            if status is None:
                await stop
                return 0
            return status
        finally:
            await cancel(stop)
            await cancel(commands)

    @staticmethod
    async def _commands(supervisor: Supervisor) -> int | None:
        await supervisor.run_all()
        return await supervisor.wait() if supervisor.has_background else None

    def _unhealthy(self) -> str | None:
        if not self._mounted:
            return "not mounted (starting or stopping)"
        return self._node.unhealthy()

    # -- import ------------------------------------------------------------------------------------------------

    def _import(self, name: str, path: str) -> None:
        """Put a validated database file in place of `name`, through the mount, as an application would. Blocking."""
        if not self._store.is_primary:
            raise ReadOnlyReplica
        target = os.path.join(os.path.realpath(self._config.fuse.dir), name)
        database = self._store.get(name)
        if database is not None and database.exists:
            _copy_into(path, target)
            return
        temporary = os.path.join(os.path.dirname(target), f".{name[:200]}.import")
        try:
            shutil.copyfile(path, temporary)
            os.rename(temporary, target)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        self._wait_for_replicas(name)

    def _wait_for_replicas(self, name: str) -> None:
        """As a FULL commit does; a rename does not wait. Blocking."""
        gate, database = self._store.gate, self._store.get(name)
        if gate is None or not gate.active or database is None:
            return
        done: Future[None] = Future()

        def answer(error: BaseException | None) -> None:
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

        gate.wait(name, database.position.txid, answer)
        done.result()


def _copy_into(path: str, target: str) -> None:
    """Replace a database's content by SQLite's own backup, so that open connections see it as one transaction."""
    command = [sys.executable, "-m", "pylitefs.backup_into", path, target]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        raise DatabaseError(
            f"import failed, nothing was changed: {reason[0]} (a database in WAL mode cannot change its page size; "
            "one that is being written cannot be replaced)"
        )


def _keep_memory_small() -> None:
    """One malloc arena for all threads (glibc makes eight for each core), and what was imported is not garbage."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
    gc.collect()
    gc.freeze()


def _raise_file_limit() -> None:
    """Each open file of an application needs one here too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(FILES_WANTED, hard) if hard != resource.RLIM_INFINITY else FILES_WANTED
    if soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What nobody awaited. A connection that cannot be accepted for want of a descriptor is tried again each second."""
    error = context.get("exception")
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        log.warning("a connection waits to be accepted: %s", error.strerror)
    else:
        loop.default_exception_handler(context)


def run(config: Config) -> int:
    """Run a node until it is stopped; the exit status. Raises LitefsError."""
    return asyncio.run(Daemon(config).run())


__all__ = ["Daemon", "MountError", "UsageError", "run"]
