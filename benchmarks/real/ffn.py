"""Visual FFNs on the published decoder: whole, as scales and left out, by the number of layers, dense and pruned.

`python -m benchmarks.real.ffn --out out/real-ffn` calibrates, asks and writes the record and the page.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.real.page import RESULTS, FfnFigures, FfnScores, write_pages
from benchmarks.real.questions import CALIBRATION, HELD_OUT, asked_in_words
from benchmarks.selection.figures import FigureRecord, conditions
from benchmarks.tiny.dataset import write_dataset
from capa_export.base.files import write_whole
from capa_export.base.progress import progress, tracked
from capa_export.bundle.store import Bundle
from capa_export.calibrate.stage import calibrate
from capa_export.calibrate.sums import Calibration
from capa_export.config.options import BuildOptions
from capa_export.config.recipe import load_recipe
from capa_export.config.schedule import parse_method
from capa_export.data.questions import Question, questions_from
from capa_export.model.model import Model
from capa_export.study.evaluate.answers import DENSE, Answer
from capa_export.study.evaluate.eager_answers import EagerAnswers, EagerMethods
from capa_export.study.evaluate.scores import AnsweredQuestion, score_methods

__all__ = ["main"]

_RECIPE = Path(__file__).with_name("real.toml")
_SCENES = "clutter"
_PRUNED = "capa@12:0.75/full"
_STANDS_FOR_IT = ("scale", "skip")
_SIZES = (6, 12, 15, 18, 21)
"""Layers, the least harmful first; all linear ones are asked besides."""
_MAX_NEW_TOKENS = 4


def _asked(calibration: Calibration, eta: float) -> Iterator[FfnScores]:
    """What is asked, dense and pruned: all FFNs, then each set as scales and left out."""
    linear = sorted(calibration.linear_layers(eta), key=lambda layer: calibration.layers[layer].relative_error)
    sizes = sorted({min(size, len(linear)) for size in (*_SIZES, len(linear))})
    for schedule in (DENSE, _PRUNED):
        yield FfnScores(schedule=schedule, treatment="full", layers=())
        for treatment in _STANDS_FOR_IT:
            for size in sizes:
                yield FfnScores(schedule=schedule, treatment=treatment, layers=tuple(sorted(linear[:size])))


class _SetMethods(EagerMethods):
    """Answers by what stands for the FFNs of a set of layers."""

    def asked(self, question: Question, rows: Sequence[FfnScores], calibration: Calibration) -> dict[str, Answer]:
        """The answers by the rows' names, dense with all FFNs among them."""
        prompt = self.model.prompter.chat(question.open())
        inputs = self.inputs(prompt)
        dense, cosines = self.dense(prompt, inputs)
        found = dict[str, Answer]()
        for row in rows:
            method = self.given.methods[row.schedule]
            alphas = {layer: torch.from_numpy(alpha).float() for layer, alpha in calibration.alphas(row.layers).items()}
            if row.treatment == "skip":
                alphas = {layer: torch.ones_like(alpha) for layer, alpha in alphas.items()}
            plan = replace(self.plan(method, self.num_keep(method, prompt), cosines), scales=alphas)
            found[row.name] = self._answer(row.name, prompt, inputs, plan, dense)
        return found


def main(arguments: Sequence[str]) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.real.ffn", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="calibration, to go on from")
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--samples", type=int, default=40, help="pictures to calibrate on")
    options = parser.parse_args(arguments)
    recipe = load_recipe(str(_RECIPE))
    with progress() as report, torch.inference_mode():
        model = Model(recipe=recipe, checkpoint=recipe.checkpoint, report=report)
        seen = write_dataset(
            options.out / "calibration-scenes", asked_in_words(_SCENES, options.samples, seed=CALIBRATION)
        )
        asked = questions_from(
            write_dataset(options.out / "questions", asked_in_words(_SCENES, options.questions, seed=HELD_OUT))
        )
        build = BuildOptions(images=seen, samples=options.samples)
        calibration = calibrate(model, Bundle(options.out / "calibration"), build)
        rows = list(_asked(calibration, recipe.ffn.eta))
        methods = {name: parse_method(name) for name in (DENSE, _PRUNED)}
        given = EagerAnswers(model=model, methods=methods, calibration=None, max_new_tokens=_MAX_NEW_TOKENS)
        answering = _SetMethods(given)
        answered = [
            AnsweredQuestion(question, answering.asked(question, rows, calibration))
            for question in map(asked.read, tracked(asked.rows, "questions", len(asked.rows), report))
        ]
    scores = score_methods(answered, [row.name for row in rows], asked.benchmark.metric)
    found = tuple(row.model_copy(update={"scored": scored}) for row, scored in zip(rows, scores, strict=True))
    command = f"python -m benchmarks.real.ffn {shlex.join(arguments)}"
    about = conditions(command, checkpoint=model.digest, questions=len(answered), seed=HELD_OUT)
    record = FigureRecord[FfnFigures](about=about, figures=FfnFigures(scenes=_SCENES, rows=found))
    write_whole(RESULTS / f"{about.date}-ffn-real-{_SCENES}.json", record.model_dump_json(indent=1) + "\n")
    for path in write_pages():
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
