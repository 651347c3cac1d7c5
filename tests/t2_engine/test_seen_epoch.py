"""DATA/epoch, noted from several threads."""

from __future__ import annotations

import threading
from pathlib import Path

from pylitefs.engine.epochs import SeenEpoch


def test_the_highest_epoch_stays_whoever_comes_last(tmp_path: Path) -> None:
    """A session that has ended may still be noting its epoch when the next one, or a promotion, notes a later one."""
    failed: list[BaseException] = []
    for turn in range(20):
        seen = SeenEpoch(str(tmp_path))
        seen.load()
        together = threading.Barrier(4)

        def note(epoch: int, seen: SeenEpoch = seen, together: threading.Barrier = together) -> None:
            together.wait()
            try:
                seen.note(epoch)
            except OSError as error:
                failed.append(error)

        threads = [threading.Thread(target=note, args=(10 * turn + number,)) for number in (4, 3, 2, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        again = SeenEpoch(str(tmp_path))
        again.load()
        assert (failed, seen.value, again.value) == ([], 10 * turn + 4, 10 * turn + 4)
