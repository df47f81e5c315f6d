"""A test bed with the questions that it is asked, and work spread over them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.tiny.dataset import write_dataset
from capa_export.base.progress import Report, silent, tracked
from capa_export.base.workers import Workers, in_order, run_tasks
from capa_export.bundle.store import Bundle
from capa_export.calibrate.stage import calibrate
from capa_export.calibrate.sums import Calibration
from capa_export.config.options import BuildOptions
from capa_export.config.recipe import load_recipe
from capa_export.config.schedule import Method
from capa_export.data.questions import Question, Questions, questions_from
from capa_export.data.scenes import HARD_KINDS, KINDS, SceneSample, Split, samples
from capa_export.model.model import Model
from capa_export.plan.flops import flops
from capa_export.study.evaluate.eager_answers import EagerAnswers, EagerMethods

__all__ = ["CLUTTER", "KINDS_ASKED", "MAX_NEW_TOKENS", "SEED", "SelectionBed", "open_bed", "questions_drawn"]

SEED = 602
"""Seed of held-out scenes, none of which calibration, validation or the published accuracy is taken on."""
CLUTTER = "clutter"
"""The basic kinds, where glyphs as large as the shapes and of their colours fill every free cell."""
KINDS_ASKED = (*KINDS, *HARD_KINDS, CLUTTER)
MAX_NEW_TOKENS = 4

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SelectionBed:
    """A trained model under measurement, with its questions."""

    name: str
    folder: Path
    """Folder of answers, calibration and figures."""
    model: Model
    store: Bundle
    """Takes the calibration."""
    options: BuildOptions
    questions: Questions
    """Questions in an order in which each number of them holds the smaller ones."""

    @cached_property
    def calibration(self) -> Calibration:
        """The calibration on the stream that was trained on; made once."""
        return calibrate(self.model, self.store, self.options)

    @property
    def layers(self) -> int:
        return self.model.source.dims.decoder.num_layers

    @property
    def own_layer(self) -> int:
        """Layer of the recipe's first stage inside the decoder."""
        return next((stage.layer for stage in self.model.recipe.prune.schedule if stage.layer >= 0), 2)

    def first(self, count: int) -> Questions:
        return replace(self.questions, rows=self.questions.rows[:count])

    def read(self, count: int) -> Iterator[Question]:
        return (self.questions.read(row) for row in self.questions.rows[:count])

    def flops(self, method: Method, linear: Sequence[int]) -> float:
        """Prefill of one picture with its question, as a share of dense; `linear` layers take a scale."""
        prompt = self._prompt
        prune = method.prune(self.model.recipe.prune.min_keep_per_image)
        keep = [] if prune is None else prune.num_keep(prompt.image_lengths)
        counted = flops(
            self.model.source.dims.decoder,
            num_visual=prompt.num_visual,
            num_text=len(prompt.input_ids) - prompt.num_visual,
            schedule=[(stage.layer, count) for stage, count in zip(method.stages, keep, strict=True)],
            linear_layers=linear,
            selectors={stage.layer: stage.chosen for stage in method.stages},
        )
        return counted.capa.total / counted.dense.total

    @cached_property
    def _prompt(self) -> Any:
        return self.model.prompter.chat(self.questions.read(self.questions.rows[0]).open())

    def each(
        self,
        measure: Callable[[EagerMethods, Question], T],
        count: int,
        what: str,
        methods: Mapping[str, Method] | None = None,
    ) -> Iterator[T]:
        """Measure each of the first questions by the workers; yields results in order. `measure` is pickled."""
        workers = self.options.workers
        apart = self.model if workers.here else self.model.unopened()
        prepare = partial(_measurer, apart, dict(methods or {}), measure)
        found = in_order(run_tasks(prepare, self.read(count), workers))
        return tracked(found, f"{self.name} {what}", count, self.model.report)


def _measurer(
    model: Model, methods: Mapping[str, Method], measure: Callable[[EagerMethods, Question], T]
) -> Callable[[Question], T]:
    given = EagerAnswers(model=model, methods=methods, calibration=None, max_new_tokens=MAX_NEW_TOKENS)
    return partial(measure, EagerMethods(given))


def questions_drawn(count: int, split: Split = "held_out") -> Iterator[SceneSample]:
    """All kinds in turn."""
    plain = samples(count, seed=SEED, kinds=KINDS_ASKED[:-1], split=split)
    heavy = samples(count, seed=SEED, kinds=KINDS, heavy=True, split=split)
    for index in range(count):
        kind = KINDS_ASKED[index % len(KINDS_ASKED)]
        yield replace(next(heavy), kind=kind) if kind == CLUTTER else next(plain)


def open_bed(
    name: str,
    out: Path,
    count: int,
    *,
    workers: int = 1,
    samples_calibrated: int | None = None,
    report: Report = silent,
) -> SelectionBed:
    """A bed with its first `count` questions.

    Raises:
        CapaError: there is no recipe of that name.
    """
    recipe = load_recipe(name)
    options = BuildOptions(samples=samples_calibrated, workers=Workers(count=workers))
    model = Model(recipe=recipe, checkpoint=recipe.checkpoint, report=report)
    data = write_dataset(out / name / "questions", questions_drawn(count))
    return SelectionBed(
        name=name,
        folder=out / name,
        model=model,
        store=Bundle(out / name / "calibration"),
        options=options,
        questions=questions_from(data),
    )
