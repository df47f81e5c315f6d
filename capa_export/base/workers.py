"""Runs tasks in processes of this machine, or on a Ray cluster; results come in the order in which they are done."""

import logging
import os
import pickle
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import islice
from multiprocessing import get_context
from threading import Thread
from typing import Any, TypeVar

from capa_export.base.errors import CapaError, ExitCode, first_line, how_to_install
from capa_export.base.progress import talk, talks

__all__ = ["Workers", "chunks", "in_order", "module_arguments", "run_tasks"]

Task = TypeVar("Task")
Result = TypeVar("Result")
Prepare = Callable[[], Callable[[Task], Result]]
"""Called once in each process; the function it returns does the tasks. It is pickled, unless all is done here."""

_AHEAD = 2
"""Tasks handed out for each process, so that none waits for the next."""
_START = """import sys
sys.path[:] = filter(None, sys.path)
import runpy
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
_RETRIES = 5
"""Nodes that a task may lose before its failure is the task's own fault."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """The processes that do the work; by default this one alone."""

    count: int | None = None
    """Number of processes; on a cluster, of processes at a time, by default one a node."""
    ray: str | None = None
    """Address of a Ray cluster, as `auto` or `ray://HOST:10001`."""

    @property
    def here(self) -> bool:
        """Whether this process does all the work."""
        return self.ray is None and (self.count or 1) == 1


def module_arguments(module: str) -> tuple[str, ...]:
    """Arguments of Python that run a module as `-m` does, but import nothing from the current folder."""
    return "-c", _START, module


def chunks(items: Iterable[Task], size: int) -> Iterator[list[Task]]:
    """The items, `size` at a time."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def run_tasks(
    prepare: "Prepare[Task, Result]", tasks: Iterable[Task], workers: Workers
) -> Generator[tuple[int, Result]]:
    """Do every task once; yields its number and its result.

    Tasks are taken only as fast as they are done. A task whose worker is lost with its node is done again by another,
    and yields once all the same. Closing the generator ends the work, also in other processes.

    Raises:
        CapaError: a task raises it, a process ended, or the cluster cannot be reached.
    """
    if workers.ray is not None:
        return _on_ray(prepare, tasks, workers.ray, workers.count)
    if workers.here:
        return _here(prepare, tasks)
    return _in_processes(prepare, tasks, workers.count or 1)


def in_order(results: Iterable[tuple[int, Result]]) -> Iterator[Result]:
    """Yield the results of `run_tasks` in the order of the tasks."""
    waiting: dict[int, Result] = {}
    due = 0
    for number, result in results:
        waiting[number] = result
        while due in waiting:
            yield waiting.pop(due)
            due += 1


def _here(prepare: "Prepare[Task, Result]", tasks: Iterable[Task]) -> Generator[tuple[int, Result]]:
    work = cache(prepare)
    for number, task in enumerate(tasks):
        yield number, work()(task)


def _in_processes(prepare: "Prepare[Task, Result]", tasks: Iterable[Task], count: int) -> Generator[tuple[int, Result]]:
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // count))
    prepared, remaining = pickle.dumps(prepare), enumerate(tasks)
    pending: dict[Future[Any], int] = {}
    context = get_context("spawn")
    # The system closes `held` where this process dies, however it does.
    released, held = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(count, context, initializer=_start, initargs=(threads, released, talks()))
    try:
        while True:
            for number, task in islice(remaining, _AHEAD * count - len(pending)):
                pending[pool.submit(_do, prepared, task)] = number
            if not pending:
                return
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield pending.pop(future), future.result()
    except BrokenProcessPool as error:
        raise CapaError(
            f"one of {count} worker processes was killed; each holds the model: use fewer --workers if memory is short"
        ) from error
    finally:
        if pending:
            held.close()  # A task may take minutes.
        pool.shutdown(cancel_futures=True)
        held.close()
        released.close()


def _start(threads: str, released: Any, talking: bool) -> None:  # noqa: FBT001 - an argument of a pool.
    """Set up a worker process, before torch is loaded, which reads the number of threads then."""
    os.environ["OMP_NUM_THREADS"] = threads
    if talking:
        talk()
    # The driver's to handle: it ends the pool.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_once, args=(released,), daemon=True).start()


def _end_once(released: Any) -> None:
    with suppress(EOFError, OSError):
        released.recv()
    os._exit(1)


@cache
def _prepared(prepare: bytes) -> Callable[[Any], Any]:
    return pickle.loads(prepare)()  # noqa: S301 - the driver's own.


def _do(prepare: bytes, task: Any) -> Any:
    return _prepared(prepare)(task)


def _on_ray(
    prepare: "Prepare[Task, Result]", tasks: Iterable[Task], address: str, count: int | None
) -> Generator[tuple[int, Result]]:
    """Run tasks on a Ray cluster, which gives those of a lost node to another; results come to this process alone."""
    try:
        import ray
        from ray.exceptions import RayError, RayTaskError
    except ImportError as error:
        raise CapaError(f"--ray needs Ray: {how_to_install('ray')}", ExitCode.USAGE) from error
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise CapaError(f"--ray {address}: no cluster answers there: {first_line(error)}") from error
    # Ray put its own handler there, which ends the process in its own way.
    signal.signal(signal.SIGTERM, terminate)
    try:
        able = [cpus for node in ray.nodes() if node["Alive"] and (cpus := int(node["Resources"].get("CPU", 0)))]
        if not able:
            raise CapaError(f"--ray {address}: no node of this cluster offers a processor")
        count = count or len(able)
        # Ray gives a task as many threads. A task that asks for more than a node has would wait for ever.
        cpus = max(1, min(sum(able) // count, *able))
        do = ray.remote(_do).options(num_cpus=cpus, max_retries=_RETRIES)
        prepared, remaining = ray.put(pickle.dumps(prepare)), enumerate(tasks)
        pending: dict[Any, int] = {}
        while True:
            for number, task in islice(remaining, count - len(pending)):
                pending[do.remote(prepared, task)] = number
            if not pending:
                return
            done, _ = ray.wait(list(pending))
            for reference in done:
                yield pending.pop(reference), ray.get(reference)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, CapaError) else error) from error
    except RayError as error:
        raise CapaError(f"--ray {address}: the cluster failed: {first_line(error)}") from error
    finally:
        ray.shutdown()
