"""Measures samples on the dense model: at once, layer by layer, or in several processes."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any

from capa_export.base.progress import tracked
from capa_export.base.workers import Workers, chunks, in_order, run_tasks
from capa_export.calibrate.sums import Calibration, summed
from capa_export.calibrate.unfinished import UnfinishedSums
from capa_export.data.samples import Sample, Samples
from capa_export.model.model import Model

__all__ = ["measure_samples"]

_SAMPLES_A_TASK = 4


def measure_samples(
    model: Model, samples: Samples, workers: Workers, unfinished: UnfinishedSums, *, by_layer: bool
) -> Calibration:
    """Measure the samples, from where an interrupted run stopped.

    Args:
        model: the checkpoint.
        samples: pictures and questions.
        workers: processes that share them, each with the model.
        unfinished: keeps the sums on the way.
        by_layer: whether to hold one layer's weights in memory, where this process does all the work.

    Raises:
        CapaError: the model does not load, or gives no numbers, or a sample cannot be used.
    """
    from capa_export.calibrate.layerwise import calibrate_layerwise
    from capa_export.calibrate.measure import calibrate

    if not workers.here:
        return _measure_by_workers(model, samples, workers, unfinished)
    about: Any = {"checkpoint_digest": model.digest, "unfinished": unfinished, "report": model.report}
    if by_layer:
        return calibrate_layerwise(model.source, model.prompter, samples, **about)
    return calibrate(model.eager, model.family, model.prompter, samples, **about)


def _measure_by_workers(model: Model, samples: Samples, workers: Workers, unfinished: UnfinishedSums) -> Calibration:
    """Measure the samples in several processes: equal to one process to the last bit where each has as many threads."""
    before = unfinished.load()
    done = before.samples if before else 0
    tasks = chunks(islice(samples, done, None), _SAMPLES_A_TASK)
    results = in_order(run_tasks(partial(_measurer, model.unopened(), model.digest), tasks, workers))
    measured = tracked(chain.from_iterable(results), "calibrate", samples.count - done, model.report)
    return summed(measured, before, unfinished.keep)


def _measurer(model: Model, checkpoint_digest: str) -> Callable[[Sequence[Sample]], list[Calibration]]:
    """Open the model in a worker process; returns a function that measures samples one by one."""
    from capa_export.calibrate.measure import measure

    eager, family, prompter = model.eager, model.family, model.prompter
    return lambda samples: [measure(eager, family, prompter, sample, checkpoint_digest) for sample in samples]
