"""The worker thread: nobody keeps it from what others wait for."""

from __future__ import annotations

import os
import threading
import time

from pylitefs.engine.worker import Worker


def test_timers_that_are_always_due_do_not_keep_a_job_waiting() -> None:
    """As looks at several databases in the middle of a commit are, while their writers wait for the answer to a job."""
    worker = Worker()
    calls = [0, 0, 0]
    over = threading.Event()

    def look(number: int) -> None:
        calls[number] += 1
        time.sleep(0.002)  # longer than until it is due again
        if not over.is_set():
            worker.call_later(0.0001, look, number)

    worker.start()
    try:
        for number in range(len(calls)):
            worker.submit(worker.call_later, 0.0, look, number).result(timeout=30)
        for _ in range(20):
            assert worker.submit(threading.get_ident).result(timeout=30) != threading.get_ident()
        assert all(calls)
    finally:
        over.set()
        worker.stop()


def test_jobs_that_go_on_for_ever_keep_no_timer_and_no_descriptor_waiting() -> None:
    """As the work of a long catch-up does, which submits itself again; the capture hangs on both."""
    worker = Worker()
    over, due, readable = threading.Event(), threading.Event(), threading.Event()
    reading, writing = os.pipe()

    def work() -> None:
        if not over.is_set():
            worker.post(work)

    worker.watch(reading, lambda: (os.read(reading, 1), readable.set()))
    worker.start()
    try:
        worker.post(work)
        worker.post(work)
        worker.submit(worker.call_later, 0.01, due.set).result(timeout=30)
        assert due.wait(30), "the timer is never run"
        os.write(writing, b"x")
        assert readable.wait(30), "the descriptor is never looked at"
    finally:
        over.set()
        worker.stop()
        os.close(reading)
        os.close(writing)


def test_a_long_job_gives_way_to_timers_and_descriptors_of_other_databases() -> None:
    """Another database's commit is captured while a transaction of gigabytes is recorded; its own waits."""
    worker = Worker()
    other, own, node, heard = (threading.Event() for _ in range(4))
    reading, writing = os.pipe()

    def long() -> str:
        until_s = time.monotonic() + 30
        while not (other.is_set() and heard.is_set()) and time.monotonic() < until_s:
            worker.give_way("long")
        return "own first" if own.is_set() or node.is_set() else "in order"

    def hear() -> None:
        os.read(reading, 1)
        assert worker.is_in_way("long")
        assert not worker.is_in_way("other")
        heard.set()

    worker.watch(reading, hear, in_long_jobs=True)
    os.write(writing, b"x")
    worker.call_later(0.0, node.set)
    worker.call_later(0.0, own.set, database="long")
    worker.call_later(0.0, other.set, database="other")
    done = worker.submit(long, database="long")
    worker.start()
    try:
        assert done.result(timeout=60) == "in order"
        assert other.is_set(), "another database's timer waited for the end of a long job"
        assert heard.is_set(), "nobody heard of writes until the end of a long job"
        assert own.wait(30)
        assert node.wait(30)
    finally:
        worker.stop()
        os.close(reading)
        os.close(writing)


def test_who_comes_too_late_does_not_wait_for_ever() -> None:
    worker = Worker()
    worker.start()
    worker.stop()
    assert worker.submit(list).cancelled()
