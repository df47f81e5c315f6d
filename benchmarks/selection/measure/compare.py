"""Answers of many methods to the same questions, and every paired difference that is asked for."""

from collections.abc import Mapping, Sequence

from benchmarks.selection.bed import MAX_NEW_TOKENS, SelectionBed
from benchmarks.selection.figures import Row, ScoreDifference
from capa_export.base.errors import CapaError
from capa_export.base.statistics import difference_of_shares
from capa_export.config.schedule import Method, Stage
from capa_export.data.metrics import METRICS
from capa_export.study.evaluate.models import EvaluatedModel, eager_model, parse_methods, product_of_methods
from capa_export.study.evaluate.results import Results
from capa_export.study.evaluate.stage import evaluate

__all__ = ["at_own_places", "compared"]

Pairs = Mapping[str, Mapping[str, str]]
"""Method -> what another one stands for -> that one."""


def at_own_places(bed: SelectionBed, selectors: Sequence[str], ratios: Sequence[float], ffn: str) -> list[str]:
    """Every selector where it acts by itself, at every ratio."""
    recipe = bed.model.recipe
    own = recipe.prune.model_copy(update={"schedule": (Stage(layer=bed.own_layer, ratio=0.75),)})
    return product_of_methods(recipe.model_copy(update={"prune": own}), selectors, [], ratios, [ffn])


def compared(bed: SelectionBed, texts: Sequence[str], count: int, pairs: Pairs) -> tuple[Row, ...]:
    """Dense and the methods on the bed's first questions; what was answered before is not asked again.

    Raises:
        CapaError: a question cannot be asked.
    """
    methods = parse_methods(list(dict.fromkeys(texts)))
    if any(method.ffn != "full" for method in methods.values()):
        bed.calibration  # noqa: B018 - made before the workers, as all methods share it.
    evaluated, questions = eager_model(bed.model, bed.store, bed.options, methods, MAX_NEW_TOKENS), bed.first(count)
    found = evaluate(evaluated, questions, bed.folder, workers=bed.options.workers, report=bed.model.report)
    if found.skipped:
        first = found.skipped[0]
        raise CapaError(f"{bed.name}: {len(found.skipped)} questions cannot be asked; row {first.row}: {first.reason}")
    kinds, scores = _scores(bed, evaluated, count)
    return tuple(
        Row(
            scored=scored,
            flops=bed.flops(methods[scored.method], _linear(bed, methods[scored.method])),
            against={
                name: _against(scores[scored.method], scores[other], kinds, other)
                for name, other in pairs.get(scored.method, {}).items()
            },
        )
        for scored in found.methods
    )


def _linear(bed: SelectionBed, method: Method) -> Sequence[int]:
    if method.ffn == "full":
        return ()
    return bed.calibration.scaled_layers(bed.model.recipe.ffn, method.eta)


def _scores(bed: SelectionBed, evaluated: EvaluatedModel, count: int) -> tuple[list[str], dict[str, list[float]]]:
    """The questions' kinds, and method -> score of each question."""
    results = Results(bed.folder, model=evaluated.digest, source=evaluated.source)
    kinds: list[str] = []
    scores: dict[str, list[float]] = {method: [] for method in evaluated.keys}
    for question in bed.read(count):
        kinds.append(question.kind)
        digest = question.digest()
        for method, key in evaluated.keys.items():
            answer = results.found[results.key(digest, key)]
            scores[method].append(METRICS["exact"](answer.text, question.answers, ()))
    results.close()
    return kinds, scores


def _against(own: Sequence[float], other: Sequence[float], kinds: Sequence[str], method: str) -> ScoreDifference:
    by_kind = {kind: [index for index, of in enumerate(kinds) if of == kind] for kind in sorted(set(kinds))}
    return ScoreDifference(
        method=method,
        all=difference_of_shares(own, other),
        kinds={
            kind: difference_of_shares([own[i] for i in rows], [other[i] for i in rows])
            for kind, rows in by_kind.items()
        },
    )
