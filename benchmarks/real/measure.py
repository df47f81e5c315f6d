"""Selectors on the published decoder: `python -m benchmarks.real.measure --out out/real` measures and writes the page.

What --out holds is not asked again, so that a run that was cut off goes on where it was.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.real.page import RESULTS, RealFigures, write_pages
from benchmarks.real.questions import HELD_OUT, SCENES, asked_in_words
from benchmarks.selection.figures import FigureRecord, conditions
from benchmarks.tiny.dataset import write_dataset
from capa_export.base.errors import CapaError
from capa_export.base.files import write_whole
from capa_export.base.progress import progress
from capa_export.bundle.store import Bundle
from capa_export.config.options import BuildOptions
from capa_export.config.recipe import load_recipe
from capa_export.data.questions import questions_from
from capa_export.model.model import Model
from capa_export.selectors.selector import load_selector
from capa_export.study.evaluate.models import eager_model, parse_methods
from capa_export.study.evaluate.stage import evaluate

__all__ = ["main", "method_texts"]

_RECIPE = Path(__file__).with_name("real.toml")
_SELECTORS = ("capa", "attention", "random", "fastv", "cdpruner")
_LAYERS = (4, 8, 12)
_RATIOS = (0.75, 0.9)
_DRAWN = 200
"""Questions about each sort of scenes, as `benchmarks.real.questions` writes them."""
_MAX_NEW_TOKENS = 4


def method_texts() -> list[str]:
    """Every selector at every layer and ratio, or before the decoder at every ratio; FFNs are full."""
    places = {
        name: [""] if load_selector(name).place == "input" else [f"@{layer}" for layer in _LAYERS]
        for name in _SELECTORS
    }
    return [f"{name}{place}:{ratio:g}/full" for ratio in _RATIOS for name in _SELECTORS for place in places[name]]


def main(arguments: Sequence[str]) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.real.measure", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="answers, to go on from")
    parser.add_argument("--scenes", nargs="+", choices=SCENES, default=list(SCENES))
    parser.add_argument("--questions", type=int, default=80, help="drawn from 200 (default: 80)")
    parser.add_argument("--render", action="store_true", help="only make the page again")
    options = parser.parse_args(arguments)
    if not options.render:
        if options.out is None:
            parser.error("--out: name a folder for answers; or --render")
        with progress() as report:
            recipe = load_recipe(str(_RECIPE))
            model = Model(recipe=recipe, checkpoint=recipe.checkpoint, report=report)
            for scenes in options.scenes:
                folder = options.out / scenes
                data = write_dataset(folder / "questions", asked_in_words(scenes, _DRAWN, seed=HELD_OUT))
                asked = questions_from(data, limit=options.questions)
                store, methods = Bundle(folder / "calibration"), parse_methods(method_texts())
                evaluated = eager_model(model, store, BuildOptions(), methods, _MAX_NEW_TOKENS)
                found = evaluate(evaluated, asked, folder, report=report)
                command = f"python -m benchmarks.real.measure {shlex.join(arguments)}"
                about = conditions(command, checkpoint=model.digest, questions=found.questions, seed=HELD_OUT)
                figures = RealFigures(scenes=scenes, layers=model.source.dims.decoder.num_layers, methods=found.methods)
                record = FigureRecord[RealFigures](about=about, figures=figures)
                write_whole(RESULTS / f"{about.date}-real-{scenes}.json", record.model_dump_json(indent=1) + "\n")
    for path in write_pages():
        print(path)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except CapaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)
