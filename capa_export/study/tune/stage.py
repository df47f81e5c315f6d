"""Finds the recipe that agrees best with dense within a budget."""

from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np

from capa_export.base.errors import CapaError
from capa_export.base.statistics import Difference, difference_of_means
from capa_export.bundle.store import Bundle
from capa_export.calibrate.stage import calibrate
from capa_export.config.options import BuildOptions
from capa_export.config.recipe import FFN, Recipe
from capa_export.config.schedule import Method
from capa_export.data.samples import samples_from
from capa_export.model.agreement import Agreement
from capa_export.model.memory import require_eager_memory
from capa_export.model.model import Model
from capa_export.study.tune.agreement import Judge
from capa_export.study.tune.candidates import Candidates, ffns, linear_layers, offered
from capa_export.study.tune.costs import Costs, prompt_shapes
from capa_export.study.tune.schema import Finalist, Tuning
from capa_export.study.tune.search import FEWEST, Search, mean_kl, rungs

__all__ = ["tune"]

_SAMPLES = 128
_FULL = 0.999999
"""An eta that no layer exceeds where none is to be linear; one that does would lose nothing by it."""


def tune(model: Model, bundle: Bundle, options: BuildOptions, budget: float | Method) -> tuple[Recipe, Tuning]:
    """Find the recipe's best schedule on the samples that it calibrates on.

    Args:
        model: with the recipe.
        bundle: takes the calibration.
        options: pictures, samples at most, and a calibration where there is one; else one is run on the same samples.
        budget: fraction of dense's FLOPs in the decoder's prefill, below 1, or FLOPs a prompt; or a method
            that costs as much.

    Raises:
        CapaError: no schedule meets the budget, there are too few samples, the calibration is another model's, the
            model gives no numbers, or this machine's memory is too small for it.
    """
    samples = samples_from(options.images, model.recipe, options.samples or _SAMPLES, split="train")
    if samples.count < FEWEST:
        raise CapaError(f"{samples.name}: too few to tell schedules apart; give {FEWEST} or more")
    model.check_layers()
    require_eager_memory(model)
    costs = Costs(model.source.dims.decoder, model.recipe.prune.min_keep_per_image, prompt_shapes(model, samples))
    share = 0.0 if isinstance(budget, Method) else costs.share_of(budget)
    calibration = calibrate(model, bundle, options)
    if isinstance(budget, Method):
        share = costs.share(budget, linear_layers(budget, model.recipe, calibration))
    selectors, left_out = offered(model.family)
    candidates = Candidates(model.recipe, selectors, calibration, costs, share)
    own, earlier = candidates.own()
    judge = Judge(model, calibration, selectors)
    search = Search(candidates, ffns(model.recipe.ffn, calibration), judge.agreement, model.report)
    found = search.run(own, map(judge.run_dense, samples), samples.count)

    # The best of several is tested, so that each gets its share of what chance may do.
    level = 1 - 0.05 / max(1, len(found.finalists) - (own is not None))

    def finalist(name: str, agreements: Sequence[Agreement]) -> Finalist:
        method = found.methods[name]
        return Finalist(
            method=name,
            linear_layers=linear_layers(method, model.recipe, calibration),
            flops=candidates.share(method),
            kl=mean_kl(agreements),
            top1=fmean(agreement.top1 for agreement in agreements),
            gain=None if own is None or name == own.name else _gain(found.finalists, own.name, name, level),
        )

    finalists = tuple(finalist(name, agreements) for name, agreements in found.finalists.items())
    best = finalists[0]
    if best.kl is None:
        raise CapaError(
            f"{model.checkpoint}: its logits are no numbers, with all tokens or with any schedule; check its files"
        )
    broken = own is not None and not np.isfinite([agreement.kl for agreement in found.finalists[own.name]]).all()
    proven = own is None or (best.gain is not None and best.gain.low > 0) or broken
    chosen = found.methods[best.method] if proven or own is None else own
    tuning = Tuning(
        model=model.checkpoint_source,
        budget=share,
        dense_flops=costs.dense / samples.count,
        text=costs.text,
        samples=samples.count,
        judges=samples.count - rungs(samples.count)[1],
        tried=found.tried,
        own=None if own is None else own.name,
        chosen=chosen.name,
        finalists=finalists,
        left_out=left_out,
        verdict=_verdict(best, own, earlier, broken=broken),
    )
    return _recipe(model, chosen), tuning


def _gain(finalists: Mapping[str, Sequence[Agreement]], own: str, name: str, level: float) -> Difference | None:
    """How much closer to dense a finalist is than the recipe's own method; None where a figure is no number."""
    of_own, of_other = ([agreement.kl for agreement in finalists[key]] for key in (own, name))
    return difference_of_means(of_own, of_other, level) if np.isfinite([of_own, of_other]).all() else None


def _verdict(best: Finalist, own: Method | None, earlier: int, *, broken: bool) -> str:
    if own is None:
        return f"{best.method}: the recipe's own schedule meets the budget at no ratio and at no earlier layer"
    moved = (
        f", {earlier} layer{'s' * (earlier > 1)} earlier than the recipe has it since later is beyond the budget"
        if earlier
        else ""
    )
    its = f"the recipe's own schedule at this budget ({own.name}{moved})"
    if best.method == own.name:
        return f"{its} agrees best with dense, so it stays"
    if broken:
        return f"{best.method}: the figures of {its} are no numbers"
    if best.gain is None or best.gain.low <= 0:
        return f"{its} stays: {best.method} agrees better with dense, but not beyond chance"
    return f"{best.method} agrees better with dense than {its}"


def _recipe(model: Model, chosen: Method) -> Recipe:
    """The recipe with the chosen method in it, and a checkpoint that is found from anywhere."""
    recipe = model.recipe
    ffn: FFN = recipe.ffn.model_copy(update={"eta": _FULL if chosen.ffn == "full" else chosen.eta})
    prune = recipe.prune.model_copy(update={"schedule": chosen.stages})
    return recipe.model_copy(update={"prune": prune, "ffn": ffn, "checkpoint": model.checkpoint_source})
