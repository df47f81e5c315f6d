"""Measures the methods that `tune` finds on training scenes beside every selector of equal cost."""

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.selection.bed import SelectionBed, questions_drawn
from benchmarks.selection.figures import Contest, Contests
from benchmarks.selection.measure.compare import compared
from benchmarks.tiny.dataset import write_dataset
from capa_export.bundle.store import Bundle
from capa_export.config.options import BuildOptions
from capa_export.config.schedule import Method, Stage, parse_method
from capa_export.data.samples import samples_from
from capa_export.model.model import Model
from capa_export.selectors.selector import load_selector
from capa_export.study.tune.candidates import Candidates, offered
from capa_export.study.tune.costs import Costs, prompt_shapes
from capa_export.study.tune.search import FEWEST
from capa_export.study.tune.stage import tune

__all__ = ["measure", "prefills"]

LIKE = ("capa@{layer}:0.75", "capa@{layer}:0.9", "divprune:0.75", "divprune:0.9")
"""Methods that say what all may cost: the recipe's own at its place, and any before the decoder."""
_PREFILLS_OF_TUNE = 3000
"""Prefills of one search, as many as so many questions take."""


def measure(bed: SelectionBed, _selectors: Sequence[str], count: int) -> Contests:
    """`tune` has all selectors to choose from, and as many scenes as there are questions."""
    samples = max(FEWEST, count)
    scenes = write_dataset(bed.folder / "scenes", questions_drawn(samples, split="train"))
    bed.calibration  # noqa: B018 - made before it is taken over.
    model = _model(bed)
    options = BuildOptions(images=scenes, calibration=bed.store.folder, samples=samples)
    contests = [_contest(bed, model, options, like.format(layer=bed.own_layer)) for like in LIKE]
    texts: list[str] = []
    pairs: dict[str, dict[str, str]] = {}
    for contest in contests:
        rivals = {**({} if contest.own is None else {"own": contest.own}), **contest.listed}
        texts += [*rivals.values(), contest.tuned, *contest.others]
        pairs[contest.tuned] = {name: method for name, method in rivals.items() if method != contest.tuned}
    return Contests(layers=bed.layers, rows=compared(bed, texts, count, pairs), contests=tuple(contests))


def _model(bed: SelectionBed) -> Model:
    recipe = bed.model.recipe
    prune = recipe.prune.model_copy(update={"schedule": (Stage(layer=bed.own_layer, ratio=0.75),)})
    return bed.model.with_recipe(recipe.model_copy(update={"prune": prune}))


def _contest(bed: SelectionBed, model: Model, options: BuildOptions, like: str) -> Contest:
    candidates = _candidates(bed, model, options, like)
    _, found = tune(model, Bundle(bed.folder / "tuning"), options, candidates.budget)
    best, *others = (finalist.method for finalist in found.finalists)
    return Contest(
        like=like,
        budget=candidates.budget,
        own=found.own,
        listed={method.stages[0].selector: method.name for method in candidates.one_stage() if _at_home(bed, method)},
        tuned=best,
        others=tuple(others),
        verdict=found.verdict,
        tried=found.tried,
        samples=found.samples,
    )


def _candidates(bed: SelectionBed, model: Model, options: BuildOptions, like: str) -> Candidates:
    """Every candidate that costs what a method does."""
    samples = samples_from(options.images, model.recipe, options.samples or 0, split="train")
    costs = Costs(model.source.dims.decoder, model.recipe.prune.min_keep_per_image, prompt_shapes(model, samples))
    candidates = Candidates(model.recipe, offered(model.family)[0], bed.calibration, costs, budget=1.0)
    return replace(candidates, budget=candidates.share(parse_method(like)))


def _at_home(bed: SelectionBed, method: Method) -> bool:
    stage = method.stages[0]
    selector = load_selector(stage.selector)
    return selector.place == "input" or stage.layer == (bed.own_layer if selector.layer is None else selector.layer)


def prefills(num_selectors: int) -> int:
    """A question's, were a search spread over the usual number of questions."""
    return 1 + len(LIKE) * (num_selectors + 5 + _PREFILLS_OF_TUNE // 180)
