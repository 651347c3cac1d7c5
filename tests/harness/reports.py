"""What the failover tests have in common: what was measured and lost."""

from __future__ import annotations

from harness.cluster import HaCluster, gaps
from harness.history import History, Outcome
from harness.nodes import Member


def report(what: str, seen: History, outcome: Outcome) -> None:
    """What was measured."""
    longest = {db: f"{gaps(seen, db)[0][1]:.2f} s" for db in outcome.copies[outcome.primary] if gaps(seen, db)}
    commits = {db: len(seen.acknowledged(db)) for db in longest}
    print(f"\n{what}: longest write gaps {longest}; commits {commits}; lost {lost(seen, outcome)}")


def lost(seen: History, outcome: Outcome) -> dict[str, int]:
    """How many acknowledged commits the history lacks, by database."""
    found = {}
    for db, copy in outcome.copies[outcome.primary].items():
        found[db] = len({write.value for write in seen.acknowledged(db)} - set(copy.values))
    return found


def assert_reads_go_on(cluster: HaCluster, members: list[Member]) -> None:
    for member in members:
        for name in cluster.databases:
            connection = member.connect(name)
            try:
                assert connection.execute("select count(*) from log").fetchone()[0] > 0
            finally:
                connection.close()
