"""Full visual FFNs against scales, none, and scales chosen picture by picture; and where the line is drawn."""

from collections.abc import Sequence

import numpy as np

from benchmarks.selection.bed import SelectionBed
from benchmarks.selection.figures import FFNFigures, Row
from benchmarks.selection.measure.compare import compared
from capa_export.config.schedule import parse_method
from capa_export.data.questions import Question
from capa_export.study.evaluate.eager_answers import EagerMethods

__all__ = ["ETAS", "measure", "prefills"]

ETAS = (0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99)
_FFNS = ("scale", "skip", "per-image")


def measure(bed: SelectionBed, _selectors: Sequence[str], count: int) -> FFNFigures:
    """Dense and capa at ratio 0.75, each with every treatment; dense with every eta."""
    capa = f"capa@{bed.own_layer}:0.75"
    texts = [f"dense/{ffn}" for ffn in _FFNS] + [f"{capa}/{ffn}" for ffn in ("full", *_FFNS)]
    sweep = {f"{eta:g}": f"dense/eta={eta:g}" for eta in ETAS}
    pairs = {
        f"{stages}/{ffn}": {
            "full": "dense" if stages == "dense" else f"{stages}/full",
            **({} if ffn == "scale" else {"scale": f"{stages}/scale"}),
        }
        for stages in ("dense", capa)
        for ffn in _FFNS
    }
    rows = compared(bed, [*texts, *sweep.values()], count, pairs)
    eta = bed.model.recipe.ffn.eta
    cosines_QL = np.stack(list(bed.each(_cosines, count, "linear layers by picture")))
    linear_QL = cosines_QL > eta
    return FFNFigures(
        layers=bed.layers,
        rows=tuple(_of_images(bed, row, linear_QL) for row in rows),
        eta=eta,
        linear={text: bed.calibration.linear_layers(float(text)) for text in sweep},
        per_image=tuple(linear_QL.mean(0).tolist()),
    )


def _cosines(opened: EagerMethods, question: Question) -> np.ndarray:
    """[L], as the method `per-image` sees them."""
    prompt = opened.model.prompter.chat(question.open())
    _, cosines = opened.dense(prompt, opened.inputs(prompt))
    return np.array([cosines[layer] for layer in sorted(cosines)])


def _of_images(bed: SelectionBed, row: Row, linear_QL: np.ndarray) -> Row:
    """A row with the FLOPs of the layers that are linear for each picture, where those decide."""
    method = parse_method(row.scored.method)
    if method.ffn != "per-image":
        return row
    sets, times = np.unique(linear_QL, axis=0, return_counts=True)
    found = [bed.flops(method, np.flatnonzero(one).tolist()) for one in sets]
    return row.model_copy(update={"flops": float(np.average(found, weights=times))})


def prefills(_num_selectors: int) -> int:
    """A question's, with the one that tells how linear its layers are."""
    return 2 + 2 * len(_FFNS) + 1 + len(ETAS)
