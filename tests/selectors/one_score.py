"""One selector's nodes and what they keep, on ONNX Runtime and in TensorRT-RTX; a view gives inputs and shapes.

T = prompt tokens, K = those kept, X = text tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from onnxscript import OpBuilder

from capa_export.config.target import DimRange
from capa_export.graph.build import Input, Output, SelectorNodes, build_model, call
from capa_export.selectors.selector import GraphView, SelectorChoice, TensorView, load_selector
from capa_export.trt.engines import build_graphs
from tests.targets import one_gpu

__all__ = ["Case", "build", "exact_rows", "graph_scores", "kept", "layout", "reference_scores", "same"]

_AXES = {
    # The axes of the eager side's tensors, and those of the graph's.
    "hidden": (("tokens", None), lambda x: x),
    "query": ((1, None, 1, None), lambda x: x[None, :, None]),
    "key": ((1, None, "tokens", None), lambda x: x[None]),
    "value": ((1, None, "tokens", None), lambda x: x[None]),
    "plain_query": ((1, None, 1, None), lambda x: x[None, :, None]),
    "plain_key": ((1, None, "tokens", None), lambda x: x[None]),
    "output_weight": ((None, None), lambda x: x),
    "visual_saliency": (("tokens",), lambda x: x),
    "visual_features": (("tokens", None), lambda x: x),
    "visual_grid": ((2, "tokens"), lambda x: x),
}
_GRAPH_NAMES = {"hidden": "hidden_TD"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case(TensorView):
    """A view with what the nodes read and the reference has no need of."""

    query: torch.Tensor | None = None
    """[H, d], of the last prompt token, rotated."""


Specs = tuple[tuple[str, str, tuple[int | str, ...]], ...]
"""Name, dtype and shape of the inputs that a graph has for a view."""


def layout(*runs: int) -> torch.Tensor:
    """is_visual of runs of text and visual tokens in turn, text first: layout(1, 4, 2) is tvvvvtt."""
    return torch.cat([torch.full((length,), bool(index % 2)) for index, length in enumerate(runs)])


def exact_rows(count: int, seed: int = 0) -> torch.Tensor:
    """Rows [count, 32] of length 4, of -1, 0 and 1: cosines come out exact, and many of them equal."""
    random = torch.Generator().manual_seed(seed)
    places = torch.rand(count, 32, generator=random).argsort(dim=1) < 16
    return places * (torch.randint(0, 2, (count, 32), generator=random) * 2.0 - 1)


def graph_scores(name: str, view: TensorView, **options: Any) -> torch.Tensor:
    """Scores [T] of the nodes on ONNX Runtime; asserts that text is above all and that TopKKeep keeps what they say."""
    feeds = _feeds(view)
    session = _session(name, _specs(view), tuple(sorted(options.items())))
    scores, rows = (torch.from_numpy(output) for output in session.run(None, feeds))
    assert scores.shape == view.is_visual.shape
    assert (scores[~view.is_visual] == torch.inf).all()
    assert rows.tolist() == torch.sort(torch.cat([torch.where(~view.is_visual)[0], kept(scores, view)]))[0].tolist()
    return scores


def reference_scores(name: str, view: TensorView, **options: Any) -> torch.Tensor:
    """Scores [T] of the eager reference, which sees FP32 alone."""
    selector = load_selector(name)
    wide = {field: tensor.float() for field in _AXES if (tensor := getattr(view, field, None)) is not None}
    wide.pop("visual_grid", None)
    return selector.reference(replace(view, **wide), **SelectorChoice(name, options).values)


def kept(scores: torch.Tensor, view: TensorView) -> torch.Tensor:
    """Rows [num_keep] of the visual tokens with the best scores, best first; ties to the lowest row, NaN last."""
    rows = torch.where(view.is_visual)[0]
    amounts = scores[rows].nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return rows[torch.sort(amounts, descending=True, stable=True).indices[: view.num_keep]]


def same(name: str, view: TensorView, **options: Any) -> torch.Tensor:
    """Assert that graph and reference keep the same rows, in the same order unless scores are amounts; return them."""
    ours, theirs = graph_scores(name, view, **options), reference_scores(name, view, **options)
    visual = view.is_visual
    if load_selector(name).graded:
        torch.testing.assert_close(ours[visual], theirs[visual], rtol=1e-4, atol=1e-5)
    else:
        assert ours[visual].tolist() == theirs[visual].tolist()
        rows = kept(theirs, view)
        assert theirs[rows].tolist() == list(range(view.num_keep, 0, -1))
        assert theirs[visual].count_nonzero() == view.num_keep
    assert kept(ours, view).sort().values.tolist() == kept(theirs, view).sort().values.tolist()
    return kept(theirs, view)


def build(name: str, view: TensorView, folder: Path, **options: Any) -> dict[str, Any]:
    """A TensorRT-RTX engine with any number of tokens, num_keep being the value of an input."""
    ir.save(_model(name, _specs(view), tuple(sorted(options.items()))), folder / f"{name}.onnx")
    target = one_gpu(
        dims={"tokens": DimRange(min=2, opt=640, max=4096), "text": DimRange(min=1, opt=64, max=1024)},
        values={"num_keep": DimRange(min=1, opt=144, max=3072)},
    )
    return build_graphs(folder, {f"{name}.onnx": name}, folder / "engines", target, weights="embedded")[name]


def _specs(view: TensorView) -> Specs:
    specs: list[tuple[str, str, tuple[int | str, ...]]] = []
    for field in fields(view):
        tensor = getattr(view, field.name)
        if field.name in _AXES and tensor is not None:
            axes, to_graph = _AXES[field.name]
            shape = tuple(axis or size for axis, size in zip(axes, to_graph(tensor).shape, strict=True))
            specs.append((_GRAPH_NAMES.get(field.name, field.name), to_graph(tensor).numpy().dtype.name, shape))
    return tuple(specs)


def _feeds(view: TensorView) -> dict[str, np.ndarray]:
    feeds = {
        "text_rows_X": torch.where(~view.is_visual)[0].numpy(),
        "num_keep": np.array([view.num_keep], np.int64),
    }
    for field, (_, to_graph) in _AXES.items():
        tensor = getattr(view, field, None)
        if tensor is not None:
            feeds[_GRAPH_NAMES.get(field, field)] = np.ascontiguousarray(to_graph(tensor).numpy())
    return feeds


def _model(name: str, specs: Specs, options: Sequence[tuple[str, Any]]) -> ir.Model:
    """Inputs of a GraphView; outputs are the scores and the rows that stay, text among them."""
    selector = load_selector(name)

    def trace(op: OpBuilder, values: dict[str, ir.Value]) -> list[Output]:
        view = GraphView(scale=0.25, **values)
        scores_T = selector.score(SelectorNodes(op), view, **SelectorChoice(name, dict(options)).values)
        num_rows = op.Add(view.num_keep, op.Shape(view.text_rows_X))
        (kept_K,) = call(op, "TopKKeep", scores_T, num_rows, min_keep_per_image=0)
        return [("scores", scores_T, ("tokens",)), ("kept", kept_K, ("kept",))]

    inputs = [Input("text_rows_X", ir.DataType.INT64, ("text",)), Input("num_keep", ir.DataType.INT64, (1,))]
    inputs += [Input(name, ir.DataType.from_numpy(np.dtype(dtype)), shape) for name, dtype, shape in specs]
    return build_model("one_score", inputs, trace)


@cache
def _session(name: str, specs: Specs, options: Sequence[tuple[str, Any]]) -> onnxruntime.InferenceSession:
    model = ir.to_proto(_model(name, specs, options))
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
