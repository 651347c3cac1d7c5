"""`litefs demo`."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pylitefs.cli.demo_cluster import Cluster, DemoFailed, check_requirements
from pylitefs.cli.demo_failover import ElectingCluster, play_failover
from pylitefs.cli.demo_workload import DATABASE, RATE_PER_S, Reader, Writer, check_line, compare
from pylitefs.cli.status import format_ms
from pylitefs.errors import UsageError

_REPLICAS = 2
_REFRESH_S = 0.25
_BURST_SHARE = 0.25  # of the time: the end, when the writer does not wait between transactions
_BARS = "▁▂▃▄▅▆▇█"


@click.command()
@click.option("-seconds", "seconds", type=int, default=12, show_default=True, metavar="N", help="How long to write.")
@click.option("-keep", "keep", is_flag=True, help="Keep the directory with the nodes' data, configuration and logs.")
@click.option("-cluster", "cluster", is_flag=True, help="Three nodes that elect their primary, which is killed.")
def demo(seconds: int, keep: bool, cluster: bool) -> int:
    """Run a primary and two replicas on this machine and watch a database being replicated.

    A writer inserts rows into a SQLite database on the primary's mount while readers on the replicas' mounts see them
    arrive. At the end all copies are compared byte by byte, and everything is removed. The exit status is 0 if they are
    the same.

    With -cluster, three nodes elect their primary through etcd (or a shared directory where there is no program
    "etcd"), and every commit waits for a second node. The primary is killed, comes back, and the lease is handed over:
    no commit that has returned is lost.

    \b
    Example:
        $ sudo litefs demo
        $ sudo litefs demo -cluster
        $ sudo litefs demo -seconds 60 -keep
    """
    if not 1 <= seconds <= 86_400:
        raise UsageError("-seconds must be from 1 to 86400")
    check_requirements()
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=120)
    names = ["primary", *(f"replica-{number}" for number in range(1, _REPLICAS + 1))]
    nodes = ElectingCluster(keep) if cluster else Cluster(names, keep)
    with _sigterm_interrupts(), nodes:
        if isinstance(nodes, ElectingCluster):
            passed = play_failover(console, nodes, seconds)
        else:
            passed = _play(console, nodes, seconds)
        problems = nodes.stop()
    for problem in problems:
        console.print(f"  {problem}", style="red", markup=False)
    left = f"everything is kept in {nodes.directory}" if keep else "all nodes are stopped, all files removed"
    console.print(left, markup=False)
    return 0 if passed and not problems else 1


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM cleans up as Ctrl-C does."""

    def interrupt(_signum: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _play(console: Console, cluster: Cluster, seconds: int) -> bool:
    """Start, write, compare. Whether all copies are the same."""
    console.print(f"starting a primary and {_REPLICAS} replicas in {cluster.directory}", markup=False)
    cluster.start()
    writer = Writer(cluster.primary.mount_dir / DATABASE)
    readers = [Reader(node) for node in cluster.replicas]
    try:
        writer.start()
        writer.ready.wait()
        for reader in readers:
            reader.start()
        _show(console, cluster, writer, readers, seconds)
    finally:
        writer.stop()
        for reader in readers:
            reader.stop()
    failed = [(thread.name, thread.error) for thread in readers if thread.error is not None]
    if writer.error is not None:
        failed.insert(0, (writer.name, writer.error))
    if failed:
        raise DemoFailed(f"the {failed[0][0]} failed: {failed[0][1]}")
    console.print(f"{writer.count:,} transactions written; comparing the copies")
    checks = compare(cluster, writer.count)
    for check in checks:
        console.print(check_line(check), soft_wrap=True)
    return all(check.passed for check in checks)


# --- the live part ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NodeView:
    """One row of the table."""

    name: str
    newest_id: int
    behind: int  # rows
    latency_ms: tuple[float, float] | None  # p50, p99
    newest_row: str


@dataclass(frozen=True)
class View:
    """What is shown at one moment."""

    elapsed_s: float
    total_s: int
    hurried: bool
    count: int
    rates: tuple[int, ...]  # transactions of each of the last seconds
    nodes: tuple[NodeView, ...]


def _show(console: Console, cluster: Cluster, writer: Writer, readers: list[Reader], seconds: int) -> None:
    """Show the numbers for that long; ends early if the writer or a reader fails."""
    started_s = time.monotonic()
    rates: list[int] = []
    counted = 0
    with contextlib.ExitStack() as stack:
        live = None
        if console.is_terminal:
            live = stack.enter_context(Live(console=console, auto_refresh=False))
        while (elapsed_s := time.monotonic() - started_s) < seconds:
            if writer.error or any(reader.error for reader in readers):
                return
            if elapsed_s >= seconds * (1 - _BURST_SHARE):
                writer.hurry()
            new_second = elapsed_s >= len(rates) + 1
            if new_second:
                rates.append(writer.count - counted)
                counted = writer.count
            view = _view(elapsed_s, seconds, cluster, writer, readers, rates)
            if live is not None:
                live.update(render(view), refresh=True)
            elif new_second:
                console.print(plain_line(view), markup=False, soft_wrap=True)
            time.sleep(_REFRESH_S)


def _view(
    elapsed_s: float, total_s: int, cluster: Cluster, writer: Writer, readers: list[Reader], rates: list[int]
) -> View:
    count = writer.count
    rows = [NodeView(cluster.primary.name, count, 0, None, "")]
    for reader in readers:
        newest_id = reader.newest_id
        latency_ms = reader.latencies_ms(writer.committed_ns)
        rows.append(NodeView(reader.node.name, newest_id, max(0, count - newest_id), latency_ms, reader.newest_row))
    hurried = elapsed_s >= total_s * (1 - _BURST_SHARE)
    return View(elapsed_s, total_s, hurried, count, tuple(rates[-30:]), tuple(rows))


def render(view: View) -> RenderableType:
    """The live table; fits 80 columns."""
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("node", style="bold", no_wrap=True)
    for heading in ("rows", "behind", "p50", "p99"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("newest row read there", no_wrap=True)
    for node in view.nodes:
        is_primary = node is view.nodes[0]
        behind = Text("" if is_primary else f"{node.behind:,}", style="yellow" if node.behind else "green")
        p50, p99 = (format_ms(value) for value in node.latency_ms) if node.latency_ms else ("", "")
        newest = Text("the writer is here" if is_primary else node.newest_row, style="dim" if is_primary else "")
        table.add_row(node.name, f"{node.newest_id:,}", behind, p50, p99, newest)
    phase = "as fast as it can" if view.hurried else f"{RATE_PER_S} transactions/s"
    left_s = max(0, round(view.total_s - view.elapsed_s))
    rate = f"{view.rates[-1]:,} tx/s" if view.rates else ""
    return Group(
        Text(),
        table,
        Text(),
        Text.assemble(("writing ", "dim"), f"{phase}  ", (f"{rate}  ", "bold"), (_sparkline(view.rates), "cyan")),
        Text(f"p50, p99: from COMMIT on the primary to a SELECT on the replica; {left_s} s left", style="dim"),
    )


def plain_line(view: View) -> str:
    """The same as one line, for a log."""
    parts = [f"{round(view.elapsed_s):3d} s", f"{view.rates[-1] if view.rates else 0:6,} tx/s"]
    for node in view.nodes:
        text = f"{node.name} {node.newest_id:,}"
        if node.latency_ms:
            text += f" (p50 {format_ms(node.latency_ms[0])}, p99 {format_ms(node.latency_ms[1])})"
        parts.append(text)
    return "  ".join(parts)


def _sparkline(rates: tuple[int, ...]) -> str:
    highest = max(rates, default=0)
    return "".join(_BARS[min(len(_BARS) - 1, rate * len(_BARS) // (highest + 1))] for rate in rates)
