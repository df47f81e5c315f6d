"""Work spread over processes and over a Ray cluster: all of it, once, whatever is lost on the way."""

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from capa_export.base.errors import CapaError
from capa_export.base.workers import Workers, chunks, in_order, run_tasks
from tests.orphans import ended_with_parent


def squarer(offset: int) -> Callable[[int], int]:
    return lambda number: number**2 + offset


def process_of(_: int) -> Callable[[int], tuple[int, str]]:
    return lambda _: (os.getpid(), os.environ["OMP_NUM_THREADS"])


def refuser(_: int) -> Callable[[int], int]:
    def work(number: int) -> int:
        if number == 3:
            raise CapaError("3 is refused")
        return number

    return work


def killed(_: int) -> Callable[[int], int]:
    return lambda _: os._exit(9)


@pytest.mark.parametrize("count", [None, 1, 2])
def test_every_task_is_done_once(count: int | None) -> None:
    results = list(run_tasks(partial(squarer, 5), range(23), Workers(count=count)))
    assert sorted(results) == [(number, number**2 + 5) for number in range(23)]
    assert list(in_order(reversed(results))) == [number**2 + 5 for number in range(23)]


def test_processes_share_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    found = [result for _, result in run_tasks(partial(process_of, 0), range(8), Workers(count=2))]
    assert {threads for _, threads in found} == {"3"}
    assert os.getpid() not in {process for process, _ in found}


def test_threads_that_are_asked_for_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert {result[1] for _, result in run_tasks(partial(process_of, 0), range(2), Workers(count=2))} == {"7"}


def test_tasks_are_taken_as_they_are_done() -> None:
    taken: list[int] = []

    def tasks() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    results = run_tasks(partial(squarer, 0), tasks(), Workers(count=2))
    next(results)
    results.close()
    assert len(taken) < 10


def lingerer(folder: Path) -> Callable[[int], None]:
    def work(number: int) -> None:
        (folder / f"{number} begun").touch()
        time.sleep(0 if number == 0 else 20)
        (folder / f"{number} done").touch()

    return work


def test_what_has_begun_is_not_waited_for(tmp_path: Path) -> None:
    results = run_tasks(partial(lingerer, tmp_path), range(2), Workers(count=2))
    next(results)
    while not (tmp_path / "1 begun").exists():
        time.sleep(0.05)
    results.close()
    assert not (tmp_path / "1 done").exists()


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_is_the_tasks_own(count: int) -> None:
    with pytest.raises(CapaError, match="3 is refused"):
        list(run_tasks(partial(refuser, 0), range(9), Workers(count=count)))


def test_a_killed_process_is_one_line() -> None:
    with pytest.raises(CapaError, match="one of 2 worker processes was killed"):
        list(run_tasks(partial(killed, 0), range(4), Workers(count=2)))


def test_chunks() -> None:
    assert list(chunks(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(chunks([], 3)) == []


def test_no_cluster_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*_: object, **__: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nStart one.")

    # Any cluster of this machine would do for `auto`.
    monkeypatch.setattr("ray.init", nowhere)
    with pytest.raises(
        CapaError, match=r"--ray auto: no cluster answers there: Could not find any running Ray instance"
    ):
        list(run_tasks(partial(squarer, 0), range(4), Workers(ray="auto")))


def slow_writer(log: Path) -> Callable[[int], int]:
    import ray

    node = ray.get_runtime_context().get_node_id()

    def work(number: int) -> int:
        with log.open("a") as file:
            file.write(f"{node}\n")
        time.sleep(1)
        return number

    return work


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_lost_node_loses_nothing(two_nodes: tuple[Any, Any], tmp_path: Path) -> None:
    cluster, second = two_nodes
    log = tmp_path / "log"
    log.touch()

    def lose_it_at_work() -> None:
        while log.read_text().split().count(second.node_id) < 2:
            time.sleep(0.05)
        cluster.remove_node(second, allow_graceful=False)

    loser = Thread(target=lose_it_at_work)
    loser.start()
    found = list(run_tasks(partial(slow_writer, log), range(10), Workers(ray=cluster.address)))
    loser.join()
    assert sorted(found) == [(number, number) for number in range(10)]
    nodes = log.read_text().split()
    assert (nodes.count(second.node_id), len(nodes)) == (2, 11), "the second node's second task was done again"


WORKING = """
import os, sys, time
from functools import partial
from pathlib import Path
from capa_export.base.workers import Workers, run_tasks
from tests.base.test_workers import sleeper

if __name__ == "__main__":
    list(run_tasks(partial(sleeper, Path(os.environ["STARTED"])), range(2), Workers(count=2)))
"""


def sleeper(folder: Path) -> Callable[[int], None]:
    def work(_: int) -> None:
        (folder / str(os.getpid())).touch()
        time.sleep(60)

    return work


def test_processes_end_with_a_command_that_is_killed(tmp_path: Path) -> None:
    assert ended_with_parent(WORKING, tmp_path, 2)
